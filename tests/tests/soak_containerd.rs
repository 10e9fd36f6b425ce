//! Sandboxes of a real containerd come and go while agent, plugin and containerd are killed at random moments: in the end nothing is
//! leaked and nothing is doubled. What lives is what containerd says. `KEELWAY_SOAK_S` says for how many seconds, `KEELWAY_SOAK_SEED` with which
//! numbers.
//!
//! The test runs itself again inside fresh mount, network, IPC and PID namespaces. When that process ends, the kernel ends everything
//! that it started; only its cgroups are left to remove.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_cri::v1::{LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxMetadata};
use keelway_kubelet::runtime::{
    CriRuntime, LABEL_POD_NAME, LABEL_POD_NAMESPACE, LABEL_POD_UID, Runtime as _,
};
use keelway_tests::agents::{AgentNode, Pod, program, two_dual_stack_nodes, until};
use keelway_tests::audit::audit;
use keelway_tests::dice::{self, Dice};
use keelway_tests::sandbox::{Network, Sandbox, is_root};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const FOLDER: &str = "KEELWAY_SOAK_FOLDER";
/// Pods that come and go beside each other.
const LANES: u32 = 4;
/// Where the sandboxes' cgroups are, in every hierarchy.
fn cgroup_of(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    format!("keelway-soak{}", name.replace('.', "-"))
}

#[test]
fn whatever_is_killed_addresses_are_those_of_live_sandboxes() {
    let test = "whatever_is_killed_addresses_are_those_of_live_sandboxes";
    if !is_root(test) {
        return;
    }
    for needed in ["containerd", "runc", "ctr", "unshare"] {
        if Command::new(needed).arg("--help").output().is_err() {
            println!("{test}: skipped: needs {needed}");
            return;
        }
    }
    let folder = tempfile::tempdir().expect("a folder");
    let inside = Command::new("unshare")
        .args([
            "--mount",
            "--net",
            "--ipc",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--",
        ])
        .arg(std::env::current_exe().expect("this program"))
        .args(["inside", "--exact", "--ignored", "--nocapture"])
        .env(FOLDER, folder.path())
        .status()
        .expect("unshare");
    remove_cgroups(&cgroup_of(folder.path()));
    if !inside.success() {
        let log = fs::read_to_string(folder.path().join("containerd.log")).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(30).collect();
        panic!("{inside}; containerd, last first: {last:#?}");
    }
}

/// The cgroups of this name in all hierarchies. Nothing is in them any more, or is about to be gone.
fn remove_cgroups(name: &str) {
    fn remove(path: &Path) {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                remove(&entry.path());
            }
        }
        let gone = until("the group is empty", || {
            Ok((fs::remove_dir(path).is_ok() || !path.exists()).then_some(()))
        });
        if let Err(error) = gone {
            eprintln!("{}: {error:#}", path.display());
        }
    }
    for hierarchy in fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten()
    {
        let path = hierarchy.path().join(name);
        if path.exists() {
            remove(&path);
        }
    }
    let alone = Path::new("/sys/fs/cgroup").join(name);
    if alone.exists() {
        remove(&alone);
    }
}

/// A containerd on a node's host, which may be killed and started again.
struct Containerd {
    folder: PathBuf,
    child: Child,
}

impl Containerd {
    fn start(node: &AgentNode, folder: &Path) -> Result<Self> {
        fs::write(folder.join("containerd.toml"), config(node, folder))?;
        Ok(Self {
            child: Self::spawn(node, folder)?,
            folder: folder.into(),
        })
    }

    fn spawn(node: &AgentNode, folder: &Path) -> Result<Child> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(folder.join("containerd.log"))?;
        let mut command = Command::new("containerd");
        command
            .arg("-c")
            .arg(folder.join("containerd.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        node.host.run(|| command.spawn()).context("containerd")
    }

    fn socket(folder: &Path) -> PathBuf {
        folder.join("containerd.sock")
    }

    /// kill -9, and another one.
    fn replace(&mut self, node: &AgentNode) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = Self::spawn(node, &self.folder)?;
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // The shims go with the PID namespace.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn config(node: &AgentNode, folder: &Path) -> String {
    let conf_dir = node.conf_list();
    let conf_dir = conf_dir.parent().unwrap_or(Path::new("/"));
    format!(
        r#"version = 2
root = "{folder}/containerd"
state = "/run/containerd"
oom_score = 0
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/keelway/pause:{version}"
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{folder}/bin"
  conf_dir = "{conf_dir}"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "native"
"#,
        folder = folder.display(),
        socket = Containerd::socket(folder).display(),
        version = env!("CARGO_PKG_VERSION"),
        conf_dir = conf_dir.display(),
    )
}

/// A client of containerd, for one thread.
struct Client {
    runtime: CriRuntime,
    waiting: tokio::runtime::Runtime,
    cgroup: String,
}

impl Client {
    fn new(folder: &Path) -> Result<Self> {
        let waiting = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let runtime = waiting.block_on(async { CriRuntime::new(&Containerd::socket(folder)) });
        Ok(Self {
            runtime,
            waiting,
            cgroup: cgroup_of(folder),
        })
    }

    fn is_ready(&self) -> bool {
        self.waiting
            .block_on(self.runtime.status())
            .is_ok_and(|status| status.ready && status.network_ready)
    }

    /// Makes a sandbox; what became of a failed attempt is removed, as a kubelet does. Its id, if there is one.
    fn make(&self, name: &str, attempt: u32) -> Result<Option<String>> {
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                attempt,
            }),
            hostname: name.into(),
            labels: [
                (LABEL_POD_NAME, name.to_owned()),
                (LABEL_POD_NAMESPACE, "default".into()),
                (LABEL_POD_UID, format!("uid-{name}")),
            ]
            .map(|(label, value)| (label.to_owned(), value))
            .into(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", self.cgroup),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        match self.waiting.block_on(self.runtime.run_sandbox(config, "")) {
            Ok(id) => Ok(Some(id)),
            Err(_) => {
                self.remove_all(name)?;
                Ok(None)
            }
        }
    }

    /// The sandboxes of a pod, with their addresses. Asked until containerd answers.
    fn sandboxes(&self, name: &str) -> Result<Vec<(String, Vec<IpAddr>)>> {
        let view = until("containerd answers", || {
            Ok(self
                .waiting
                .block_on(self.runtime.observe(&format!("uid-{name}")))
                .ok())
        })?;
        view.sandboxes
            .into_iter()
            .map(|sandbox| {
                let ips: Result<Vec<IpAddr>, _> = sandbox.ips.iter().map(|ip| ip.parse()).collect();
                Ok((sandbox.id, ips?))
            })
            .collect()
    }

    /// Removes a pod's sandboxes, and repeats that until none is left.
    fn remove_all(&self, name: &str) -> Result<()> {
        until("the sandboxes go", || {
            let there = self.sandboxes(name)?;
            for (id, _) in &there {
                let removed = self.waiting.block_on(async {
                    self.runtime.stop_sandbox(id).await?;
                    self.runtime.remove_sandbox(id).await
                });
                if removed.is_err() {
                    return Ok(None);
                }
            }
            Ok(there.is_empty().then_some(()))
        })
    }
}

/// Pods of one lane, until the end; the last one stays.
fn live(
    folder: &Path,
    lane: u32,
    seed: u64,
    end: &AtomicBool,
    lives: &AtomicU32,
) -> Result<String> {
    let client = Client::new(folder)?;
    let mut dice = Dice::new(seed.wrapping_add(u64::from(lane) * 7919));
    for count in 0.. {
        let name = format!("lane-{lane}-{count}");
        for attempt in 0..=dice.below(2) as u32 {
            client.make(&name, attempt)?;
        }
        lives.fetch_add(1, Ordering::Relaxed);
        let there = client.sandboxes(&name)?;
        if end.load(Ordering::Relaxed) && there.len() == 1 {
            return Ok(name);
        }
        client.remove_all(&name)?;
    }
    bail!("it goes on until it is told to end")
}

/// Kills a plugin that runs now, if one does. Everything in this PID namespace is this test's.
fn kill_plugin() -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let plugin = processes
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .find(|pid| {
            fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim_end() == "keelway-cni")
        });
    plugin.is_some_and(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok())
}

/// The network namespaces that containerd keeps, by the addresses in them.
fn networks() -> Result<BTreeMap<Vec<IpAddr>, Network>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        // One that it forgot may be a file without a mount.
        let Ok(network) = Network::open(&entry.path()) else {
            continue;
        };
        let addresses = network.run(|| -> Result<Vec<IpAddr>> {
            let addresses = keelway_agent::net::Kernel::new(keelway_agent::net::Netlink::open()?)
                .addresses()?
                .into_iter()
                .filter(|(_, _, length)| matches!(length, 32 | 128))
                .map(|(_, ip, _)| ip)
                .filter(|ip| !ip.is_loopback());
            let addresses: BTreeSet<IpAddr> = addresses.collect();
            Ok(addresses.into_iter().collect())
        });
        if let Ok(addresses) = addresses {
            found.insert(addresses, network);
        }
    }
    Ok(found)
}

#[test]
#[ignore = "runs in namespaces that whatever_is_killed_addresses_are_those_of_live_sandboxes makes"]
fn inside() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        println!("skipped: needs the namespaces of another test");
        return;
    };
    soak(&folder).expect("a soak");
}

fn soak(folder: &Path) -> Result<()> {
    let (seconds, seed) = dice::soak(15);
    let sandbox = Sandbox::enter()?;
    nix::mount::mount(
        Some("tmpfs"),
        "/run",
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )?;
    let socket = Containerd::socket(folder);
    let socket = socket.to_str().context("a path")?;
    let flags = ["--runtime-endpoint", socket, "--collect-after", "20"];
    let (cluster, [mut node, _other]) = two_dual_stack_nodes(&sandbox, folder, &flags)?;
    cluster.write(&[])?;
    let installed = Command::new(program("keelway-agent")?)
        .args(["install", "--bin-dir"])
        .arg(folder.join("bin"))
        .status()?;
    ensure!(installed.success(), "the plugin is not installed");
    node.start()?;
    let mut containerd = Containerd::start(&node, folder)?;
    let client = Client::new(folder)?;
    until("containerd is ready", || {
        Ok(client.is_ready().then_some(()))
    })?;
    let images = std::env::var_os("KEELWAY_IMAGES_DIR").context("KEELWAY_IMAGES_DIR")?;
    let imported = Command::new("ctr")
        .args([
            "-a",
            socket,
            "-n",
            "k8s.io",
            "images",
            "import",
            "--snapshotter",
            "native",
        ])
        .arg(Path::new(&images).join("pause.tar"))
        .output()?;
    ensure!(imported.status.success(), "{imported:?}");

    let (end, lives) = (AtomicBool::new(false), AtomicU32::new(0));
    let mut kills = [0; 3];
    let stayed: Vec<String> = thread::scope(|scope| -> Result<_> {
        let killable = node.killable()?;
        let node = &node;
        let (end, lives) = (&end, &lives);
        let lanes: Vec<_> = (0..LANES)
            .map(|lane| scope.spawn(move || live(folder, lane, seed, end, lives)))
            .collect();
        let mut dice = Dice::new(seed ^ 0x5bd1_e995);
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(seconds) {
            // The moment is what this is about; there is nothing to await.
            thread::sleep(Duration::from_millis(100 + dice.below(1200)));
            let victim = dice.below(4) as usize;
            let killed = match victim {
                0 => killable.kill_worker(),
                1 => containerd.replace(node).map(|()| true)?,
                _ => kill_plugin(),
            };
            kills[victim.min(2)] += u32::from(killed);
        }
        end.store(true, Ordering::Relaxed);
        lanes
            .into_iter()
            .map(|lane| lane.join().expect("no panic"))
            .collect()
    })?;
    println!(
        "{} pods came; killed: {} agents, {} containerds, {} plugins; {} pods stay",
        lives.load(Ordering::Relaxed),
        kills[0],
        kills[1],
        kills[2],
        stayed.len()
    );
    ensure!(kills[0] > 0 && kills[1] > 0, "nothing was tried");

    // Whatever sandboxes are there, by containerd's own word, have their addresses, and nobody else has one.
    let mut wrong: Vec<String>;
    let rested = Instant::now() + Duration::from_secs(120);
    loop {
        let pods = pods(&client, &stayed)?;
        wrong = audit(&node, &pods.iter().collect::<Vec<_>>())
            .unwrap_or_else(|error| vec![format!("no audit: {error:#}")]);
        if wrong.is_empty() || Instant::now() > rested {
            break;
        }
        // What the runtime forgot is collected some time later, and nothing tells when.
        thread::sleep(Duration::from_millis(500));
    }
    ensure!(
        wrong.is_empty(),
        "seed {seed}: {wrong:#?}\n{}",
        node.read_log()
    );
    for name in &stayed {
        client.remove_all(name)?;
    }
    until("nothing is left", || {
        wrong = audit(&node, &[])?;
        Ok(wrong.is_empty().then_some(()))
    })
    .with_context(|| format!("seed {seed}: {wrong:#?}"))?;
    drop(containerd);
    node.stop()
}

/// The pods that live, as containerd knows them.
fn pods(client: &Client, names: &[String]) -> Result<Vec<Pod>> {
    let mut networks = networks()?;
    let mut pods = Vec::new();
    for name in names {
        for (container, mut addresses) in client.sandboxes(name)? {
            addresses.sort();
            let network = networks
                .remove(&addresses)
                .with_context(|| format!("{name} has no network with {addresses:?}"))?;
            let Some(IpAddr::V4(address)) = addresses.first().copied() else {
                bail!("{name} has no IPv4 address");
            };
            pods.push(Pod {
                network,
                container,
                address,
                addresses,
            });
        }
    }
    Ok(pods)
}
