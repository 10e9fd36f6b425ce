//! A node's life, with the real binary: it starts, supervises, and leaves nothing when its PID 1 is killed.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use keelway::cgroup::Hierarchies;
use keelway::family::IpFamily;
use keelway::network::{self, Subnet, Underlay};
use keelway::node::launch::Nodes;
use keelway::node::{BIN_DIR, Bind, NodeSpec, ServiceSpec, ServiceStatus};
use keelway::process::Process;

const KEELWAY: &str = env!("CARGO_BIN_EXE_keelway");
const PATIENCE: Duration = Duration::from_secs(20);

fn not_root() -> bool {
    let skip = !nix::unistd::geteuid().is_root();
    if skip {
        println!("skipped: needs root");
    }
    skip
}

/// A cluster's folder and control groups; dropping it ends and removes all of it.
struct Cluster {
    name: String,
    dir: tempfile::TempDir,
    hierarchies: Hierarchies,
}

impl Cluster {
    fn new(test: &str) -> Self {
        let name = format!("life-{test}-{}", std::process::id());
        let hierarchies = Hierarchies::of_this_machine().expect("cgroups");
        Cluster {
            name,
            dir: tempfile::tempdir().expect("a folder"),
            hierarchies,
        }
    }

    fn node(&self, name: &str, services: Vec<ServiceSpec>) -> (NodeSpec, PathBuf) {
        self.hierarchies
            .create(&self.name, name)
            .expect("control groups");
        let dir = self.dir.path().join(name);
        fs::create_dir_all(&dir).expect("a folder");
        let spec = NodeSpec {
            cluster: self.name.clone(),
            name: name.to_owned(),
            dir: dir.clone(),
            binds: vec![Bind {
                from: KEELWAY.into(),
                to: Path::new(BIN_DIR).join("keelway"),
                read_only: true,
            }],
            files: BTreeMap::from([("/etc/hosts".into(), "127.0.0.1 localhost\n".to_owned())]),
            net_sysctls: BTreeMap::from([("ipv4/ip_forward".to_owned(), "1".to_owned())]),
            path: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into(),
            machine: false,
            services,
        };
        let file = dir.join("node.json");
        fs::write(&file, serde_json::to_vec(&spec).expect("JSON")).expect("written");
        (spec, file)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.hierarchies
            .kill(&self.name, PATIENCE)
            .expect("all processes end");
        self.hierarchies
            .remove(&self.name, PATIENCE)
            .expect("all control groups go");
    }
}

fn shell(name: &str, script: &str) -> ServiceSpec {
    ServiceSpec {
        name: name.into(),
        argv: ["/bin/sh", "-c", script].map(String::from).to_vec(),
        env: BTreeMap::new(),
        after: Vec::new(),
        notifies: false,
        listens: false,
        outside: false,
    }
}

/// Waits until `look` sees what it wants; for things of other processes that tell nobody when they change.
async fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn read(spec: &NodeSpec, path: &str) -> Option<String> {
    fs::read_to_string(spec.dir.join("var").join(path))
        .ok()
        .filter(|text| text.ends_with('\n'))
}

fn services(spec: &NodeSpec) -> Vec<ServiceStatus> {
    fs::read(spec.dir.join("services.json"))
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default()
}

fn mounts_below(dir: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    mounts
        .lines()
        .filter(|line| line.contains(&dir.display().to_string()))
        .map(String::from)
        .collect()
}

#[tokio::test]
async fn a_killed_pid_1_takes_everything_with_it() {
    if not_root() {
        return;
    }
    let cluster = Cluster::new("kill");
    // An orphan that has left its session and its parents, as a container does.
    let service = shell(
        "orphans",
        "setsid sh -c 'sleep 1000 & sleep 1000 &' ; echo started > /var/tmp/started; exec sleep 1000",
    );
    let (spec, file) = cluster.node("node-1", vec![service]);
    let mut nodes = Nodes::default();
    nodes
        .start(Path::new(KEELWAY), &spec, &file, None)
        .expect("started");
    nodes
        .wait(|board| board.is_booted("node-1").then_some(()))
        .await
        .expect("booted");
    let init = nodes
        .wait(|board| board.init("node-1"))
        .await
        .expect("a PID 1");
    nodes.detach().await.expect("detached");
    eventually("the service has started", || read(&spec, "tmp/started")).await;
    let before = eventually("all processes are in the group", || {
        Some(cluster.hierarchies.pids(&cluster.name)).filter(|pids| pids.len() >= 4)
    })
    .await;
    assert!(before.contains(&init.pid));
    assert_eq!(
        mounts_below(cluster.dir.path()),
        Vec::<String>::new(),
        "the machine sees no mount of a node"
    );

    init.kill_and_wait(PATIENCE).expect("killed");
    eventually("no process is left", || {
        cluster
            .hierarchies
            .pids(&cluster.name)
            .is_empty()
            .then_some(())
    })
    .await;
    cluster
        .hierarchies
        .remove(&cluster.name, PATIENCE)
        .expect("groups are free to go");
    assert!(!cluster.hierarchies.clusters().contains(&cluster.name));
}

#[tokio::test]
async fn a_node_does_not_outlive_an_up_that_ended_too_early() {
    if not_root() {
        return;
    }
    let cluster = Cluster::new("abandon");
    let (spec, file) = cluster.node("node-1", vec![shell("service", "exec sleep 1000")]);
    let mut nodes = Nodes::default();
    nodes
        .start(Path::new(KEELWAY), &spec, &file, None)
        .expect("started");
    let init = nodes
        .wait(|board| board.init("node-1").filter(|_| board.is_booted("node-1")))
        .await
        .expect("booted");
    assert!(init.is_alive());
    drop(nodes);
    eventually("PID 1 ends", || (!init.is_alive()).then_some(())).await;
    eventually("its processes end", || {
        cluster
            .hierarchies
            .pids(&cluster.name)
            .is_empty()
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_dead_service_is_started_again_at_once() {
    if not_root() {
        return;
    }
    let cluster = Cluster::new("restart");
    let (spec, file) = cluster.node("node-1", vec![shell("service", "exec sleep 1000")]);
    let mut nodes = Nodes::default();
    nodes
        .start(Path::new(KEELWAY), &spec, &file, None)
        .expect("started");
    nodes
        .wait(|board| board.is_booted("node-1").then_some(()))
        .await
        .expect("booted");
    nodes.detach().await.expect("detached");
    let running = |wanted: u32| {
        services(&spec)
            .into_iter()
            .find(|service| service.pid.is_some() && service.restarts == wanted)
    };
    eventually("it runs", || running(0)).await;
    let sleeper = eventually("its process is known", || {
        let pids = cluster.hierarchies.pids(&cluster.name);
        pids.into_iter().find(|pid| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n")
        })
    })
    .await;
    let killed = Instant::now();
    Process::now(sleeper)
        .expect("there")
        .kill_and_wait(PATIENCE)
        .expect("killed");
    eventually("it runs again", || running(1)).await;
    assert!(
        killed.elapsed() < Duration::from_secs(1),
        "took {:?}",
        killed.elapsed()
    );
}

#[tokio::test]
async fn a_node_has_its_own_world_and_the_machine_keeps_its() {
    if not_root() {
        return;
    }
    let cluster = Cluster::new("world");
    let script = "{ hostname; cat /proc/1/comm; grep SigBlk /proc/self/status; ls /sys/class/net; cat /proc/sys/net/ipv4/ip_forward; cat /etc/hosts; \
                  stat -f -c %T /sys/fs/bpf; echo 1 > /proc/sys/vm/swappiness 2>/dev/null && echo machine sysctl written; \
                  touch /usr/x 2>/dev/null && echo machine file written; touch /etc/keelway-was-here /opt/keelway-was-here; \
                  mkdir -p /sys/fs/bpf/x && echo pinned; } > /var/tmp/out 2>&1; echo >> /var/tmp/out; exec sleep 1000";
    let (spec, file) = cluster.node("node-7", vec![shell("look", script)]);
    let forwarding = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("a sysctl");
    let mut nodes = Nodes::default();
    nodes
        .start(Path::new(KEELWAY), &spec, &file, None)
        .expect("started");
    let seen = nodes
        .while_well(async {
            Ok::<_, keelway::node::launch::LaunchError>(
                eventually("it looked", || {
                    read(&spec, "tmp/out")
                        .filter(|text| text.contains("\n\n") || text.contains("pinned"))
                })
                .await,
            )
        })
        .await
        .expect("well");
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines.first(), Some(&"node-7"));
    assert_eq!(lines.get(1), Some(&"keelway"));
    assert!(lines.contains(&"lo") && !lines.contains(&"eth0"), "{seen}");
    assert!(lines.contains(&"127.0.0.1 localhost"));
    assert!(lines.contains(&"SigBlk:\t0000000000000000"), "{seen}");
    assert!(
        lines.contains(&"bpf_fs") && lines.contains(&"pinned"),
        "{seen}"
    );
    assert!(!seen.contains("written"), "{seen}");
    assert!(
        !Path::new("/etc/keelway-was-here").exists()
            && !Path::new("/opt/keelway-was-here").exists()
    );
    assert_eq!(
        fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("a sysctl"),
        forwarding
    );
}

/// Flags of the link-local addresses of a node's uplink; none while there are none.
fn link_local_states(init: u32) -> Option<Vec<u32>> {
    let table = fs::read_to_string(format!("/proc/{init}/net/if_inet6")).expect("addresses");
    // Address, index, length, scope, flags, name.
    let flags = table.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_ours = words[0].starts_with("fe80") && words[5] == "eth0";
        is_ours.then(|| u32::from_str_radix(words[4], 16).expect("flags"))
    });
    Some(flags.collect()).filter(|flags: &Vec<u32>| !flags.is_empty())
}

#[tokio::test]
async fn nodes_reach_each_other_over_the_underlay() {
    if not_root() {
        return;
    }
    let cluster = Cluster::new("underlay");
    let (subnet, family) = (Subnet(300), IpFamily::Dual);
    let other = subnet.worker(family, 2);
    let mut nodes = Nodes::default();
    let mut specs = Vec::new();
    let mut ping = shell(
        "ping",
        &format!(
            "ping -c 1 -W 5 {} > /var/tmp/out 2>&1 && ping -6 -c 1 -W 5 {} >> /var/tmp/out 2>&1; \
             echo $? >> /var/tmp/out; exec sleep 1000",
            other[0], other[1]
        ),
    );
    ping.after = vec!["network".into()];
    ping.argv[0] = "/bin/busybox".into();
    ping.argv.insert(1, "sh".into());
    for (name, services) in [
        ("control-plane", Vec::new()),
        ("node-1", vec![ping]),
        ("node-2", Vec::new()),
    ] {
        let (spec, file) = cluster.node(name, services);
        nodes
            .start(Path::new(KEELWAY), &spec, &file, None)
            .expect("started");
        specs.push(spec);
    }
    let inits = nodes
        .wait(|board| {
            ["control-plane", "node-1", "node-2"]
                .iter()
                .map(|name| board.init(name).map(|init| init.pid))
                .collect::<Option<Vec<u32>>>()
        })
        .await
        .expect("all have a PID 1");
    let underlay = Underlay {
        egress: false,
        pods: family.pods(),
        control_plane: (inits[0], subnet.control_plane(family)),
        control_planes: Vec::new(),
        workers: vec![(inits[1], subnet.worker(family, 1)), (inits[2], other)],
    };
    network::connect(&underlay).expect("connected");
    for init in &inits[1..] {
        let states = eventually("the link has an address of its own", || {
            link_local_states(*init)
        })
        .await;
        assert!(
            states
                .iter()
                .all(|flags| flags & libc::IFA_F_TENTATIVE == 0),
            "for what is forwarded no neighbour is asked for meanwhile: {states:x?}"
        );
    }
    nodes.tell("network").await.expect("told");
    let out = eventually("the ping has ended", || {
        read(&specs[1], "tmp/out").filter(|text| {
            text.lines()
                .last()
                .is_some_and(|line| line.parse::<u8>().is_ok())
        })
    })
    .await;
    assert_eq!(out.lines().last(), Some("0"), "{out}");
}

#[tokio::test]
async fn a_listening_socket_is_handed_over_and_outlives_its_service() {
    if not_root() {
        return;
    }
    let cluster = Cluster::new("listener");
    // Says how it was called, then accepts nothing: the socket itself must stay open over restarts.
    let mut service = shell(
        "api",
        "echo $LISTEN_FDS $LISTEN_PID $$ > /var/tmp/out; readlink /proc/self/fd/3 >> /var/tmp/out; exec sleep 1000",
    );
    service.listens = true;
    let (spec, file) = cluster.node("control-plane", vec![service]);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = listener.local_addr().expect("an address");
    let mut nodes = Nodes::default();
    nodes
        .start(Path::new(KEELWAY), &spec, &file, Some(listener.into()))
        .expect("started");
    let out = nodes
        .while_well(async {
            Ok::<_, keelway::node::launch::LaunchError>(
                eventually("it was called", || {
                    read(&spec, "tmp/out").filter(|text| text.lines().count() == 2)
                })
                .await,
            )
        })
        .await
        .expect("well");
    let lines: Vec<&str> = out.lines().collect();
    let words: Vec<&str> = lines[0].split(' ').collect();
    assert_eq!(words[0], "1");
    assert_eq!(words[1], words[2], "LISTEN_PID is the service itself");
    assert!(lines[1].starts_with("socket:"), "{out}");
    std::net::TcpStream::connect(address).expect("the socket listens, in this network namespace");
    drop(nodes);
}
