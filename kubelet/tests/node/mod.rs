//! A node inside namespaces: containerd with an image of busybox, a CNI plugin that only answers, and workers.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use keelway_kubelet::cgroup::{Cgroups, hierarchies};
use keelway_kubelet::clock::SystemClock;
use keelway_kubelet::config::{Config, Credentials};
use keelway_kubelet::pod::operations::Context;
use keelway_kubelet::pod::status::NodeFacts;
use keelway_kubelet::pod::worker::{Handle, Signal, Worker};
use keelway_kubelet::pods::watch_changes;
use keelway_kubelet::runtime::{ContainerPhase, CriRuntime, ExitSource, Runtime};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;

use crate::fake::FakeCluster;

/// The only image, for sandboxes too: left alone it sleeps.
pub const IMAGE: &str = "localhost/test/busybox:1";
/// What the CNI plugin answers. Nothing has this address; nobody connects to it.
pub const POD_IP: &str = "10.9.0.2";

type Workers = Arc<Mutex<HashMap<String, (Handle, JoinHandle<()>)>>>;

pub struct Node {
    pub folder: PathBuf,
    pub runtime: Arc<CriRuntime>,
    pub cluster: Arc<FakeCluster>,
    context: Arc<Context>,
    workers: Workers,
    _network: watch::Sender<bool>,
    containerd: Child,
}

impl Drop for Node {
    fn drop(&mut self) {
        // The shims go with the PID namespace.
        let _ = self.containerd.kill();
        let _ = self.containerd.wait();
    }
}

/// Waits until something holds; half a minute is a failure.
pub async fn soon(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "never happened: {what}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn run(program: &str, arguments: &[&str]) {
    let done = Command::new(program).args(arguments).output().unwrap();
    assert!(
        done.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}

/// The cgroup of a node: named after its folder, so that whoever made the folder can remove it.
fn cgroup_root(folder: &Path) -> String {
    format!(
        "/keelway-kubelet-test{}",
        folder
            .file_name()
            .unwrap()
            .to_string_lossy()
            .replace('.', "-")
    )
}

pub fn remove_cgroups(folder: &Path) {
    fn remove(path: &Path) {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                remove(&entry.path());
            }
        }
        // A process that was killed a moment ago may still be on its way out.
        for _ in 0..100 {
            if fs::remove_dir(path).is_ok() || !path.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let root = cgroup_root(folder);
    for hierarchy in hierarchies(&fs::read_to_string("/proc/self/mountinfo").unwrap()) {
        let path = hierarchy.mount.join(root.trim_start_matches('/'));
        if path.exists() {
            remove(&path);
        }
    }
}

impl Node {
    pub async fn start(folder: &Path) -> Self {
        run("mount", &["--make-rprivate", "/"]);
        run("mount", &["-t", "tmpfs", "tmpfs", "/run"]);
        run("ip", &["link", "set", "lo", "up"]);
        let path = |name: &str| folder.join(name);
        write_cni(&path("cni"));
        let socket = path("containerd.sock");
        let config = containerd_config(folder, &socket);
        fs::write(path("containerd.toml"), config).unwrap();
        let log = fs::File::create(path("containerd.log")).unwrap();
        let mut containerd = Command::new("containerd")
            .arg("-c")
            .arg(path("containerd.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();

        let runtime = Arc::new(CriRuntime::new(&socket));
        let start = Instant::now();
        while !runtime
            .status()
            .await
            .is_ok_and(|status| status.ready && status.network_ready)
        {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "containerd is not ready: {:?}",
                runtime.status().await
            );
            assert_eq!(containerd.try_wait().unwrap(), None, "containerd ended");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let archive = write_image(&path("image"));
        let address = socket.to_str().unwrap();
        run(
            "ctr",
            &[
                "-a",
                address,
                "-n",
                "k8s.io",
                "images",
                "import",
                archive.to_str().unwrap(),
            ],
        );

        let cluster = Arc::new(FakeCluster::default());
        let (network, network_ready) = watch::channel(true);
        let (exit_source, exit_sources) = watch::channel(ExitSource::Relist);
        let cgroups = Cgroups::discover(&cgroup_root(folder)).unwrap();
        cgroups.make_classes().unwrap();
        fs::write(path("resolv.conf"), "").unwrap();
        let context = Arc::new(Context {
            config: Arc::new(Config {
                node_name: "n1".to_owned(),
                node_ips: vec!["127.0.0.1".parse().unwrap()],
                kubeconfig: PathBuf::new(),
                runtime_socket: socket.clone(),
                cgroup_root: cgroup_root(folder),
                credentials: Credentials::Given {
                    cert: PathBuf::new(),
                    key: PathBuf::new(),
                },
                client_ca: PathBuf::new(),
                cluster_dns: vec!["10.96.0.10".parse().unwrap()],
                cluster_domain: "cluster.local".to_owned(),
                root_dir: path("kubelet"),
                log_dir: path("logs"),
                resolv_conf: path("resolv.conf"),
                port: 0,
                healthz: "127.0.0.1:0".parse().unwrap(),
                pods_max: 110,
                labels: Vec::new(),
                taints: Vec::new(),
            }),
            runtime: runtime.clone(),
            cluster: cluster.clone(),
            clock: Arc::new(SystemClock),
            cgroups,
            node: NodeFacts {
                ips: vec!["127.0.0.1".to_owned()],
            },
            runtime_name: "containerd".to_owned(),
            cpu_milli: 2000,
            memory_bytes: 1 << 30,
            network_ready,
            exit_source: exit_sources.clone(),
        });
        let workers = Workers::default();
        let (changes, mut changed) = broadcast::channel(1024);
        tokio::spawn(watch_changes(runtime.clone(), changes, exit_source));
        let told = workers.clone();
        tokio::spawn(async move {
            while let Ok(id) = changed.recv().await {
                for (handle, _) in told.lock().unwrap().values() {
                    let _ = handle.signals.send(Signal::Changed(id.clone()));
                }
            }
        });
        let announced = exit_sources
            .clone()
            .wait_for(|source| *source != ExitSource::Relist)
            .await
            .map(|source| *source);
        println!("exits are learnt from {announced:?}");
        Self {
            folder: folder.to_path_buf(),
            runtime,
            cluster,
            context,
            workers,
            _network: network,
            containerd,
        }
    }

    pub fn start_pod(&self, pod: &Pod) {
        let (worker, handle) = Worker::new(self.context.clone(), Arc::new(pod.clone()), false);
        let task = tokio::spawn(async move { drop(worker.run().await) });
        self.workers
            .lock()
            .unwrap()
            .insert(pod.metadata.uid.clone().unwrap(), (handle, task));
    }

    pub fn update(&self, pod: Pod) {
        let uid = pod.metadata.uid.clone().unwrap();
        self.workers.lock().unwrap()[&uid]
            .0
            .signals
            .send(Signal::Pod(Arc::new(pod)))
            .unwrap();
    }

    pub fn kill_workers(&mut self) {
        for (_, (_, task)) in self.workers.lock().unwrap().drain() {
            task.abort();
        }
    }

    pub fn mark_deleted(&self, pod: &mut Pod, grace_s: i64) {
        pod.metadata.deletion_timestamp = Some(Time(
            Timestamp::now() + jiff::SignedDuration::from_secs(grace_s),
        ));
        pod.metadata.deletion_grace_period_seconds = Some(grace_s);
    }

    pub fn is_ready(&self, pod: &str) -> bool {
        self.cluster.condition(pod, "Ready") == Some("True".to_owned())
    }

    pub fn reported_at(&self, pod: &str) -> Timestamp {
        self.cluster.reported_at(pod).unwrap()
    }

    pub async fn running(&self, pod: &str, container: &str) -> Option<String> {
        let view = self.runtime.observe(&format!("uid-{pod}")).await.unwrap();
        let run = view
            .containers
            .iter()
            .find(|c| c.name == container && c.phase == ContainerPhase::Running)?;
        Some(run.id.clone())
    }

    pub fn volume(&self, pod: &str, path: &str) -> PathBuf {
        self.folder
            .join("kubelet/pods")
            .join(format!("uid-{pod}"))
            .join("volumes")
            .join(path)
    }

    /// The limit is on the pod's own cgroup, wherever the memory controller is.
    pub fn assert_memory_limit(&self, uid: &str, bytes: u64) {
        let below = format!(
            "{}/kubepods/pod{uid}",
            cgroup_root(&self.folder).trim_start_matches('/')
        );
        let files = ["memory.limit_in_bytes", "memory.max"];
        let all = hierarchies(&fs::read_to_string("/proc/self/mountinfo").unwrap());
        let limits = all
            .iter()
            .flat_map(|h| files.map(|file| h.mount.join(&below).join(file)));
        let found: Vec<_> = limits
            .filter_map(|path| fs::read_to_string(path).ok())
            .map(|text| text.trim().to_owned())
            .collect();
        assert_eq!(found, [bytes.to_string()]);
    }

    pub async fn assert_nothing_left(&self, pod: &str) {
        let uid = format!("uid-{pod}");
        let view = self.runtime.observe(&uid).await.unwrap();
        assert!(
            view.sandboxes.is_empty() && view.containers.is_empty(),
            "{view:?}"
        );
        assert!(!self.folder.join("kubelet/pods").join(&uid).exists());
        assert_eq!(fs::read_dir(self.folder.join("logs")).unwrap().count(), 0);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&uid), "{mounts}");
        for hierarchy in hierarchies(&mounts) {
            let below = format!(
                "{}/kubepods/pod{uid}",
                cgroup_root(&self.folder).trim_start_matches('/')
            );
            assert!(
                !hierarchy.mount.join(below).exists(),
                "{}",
                hierarchy.mount.display()
            );
        }
    }
}

fn containerd_config(folder: &Path, socket: &Path) -> String {
    let folder = folder.display();
    format!(
        r#"version = 2
root = "{folder}/containerd"
state = "/run/containerd"
oom_score = 0
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{IMAGE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{folder}/cni"
  conf_dir = "{folder}/cni/conf"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "native"
"#,
        socket = socket.display(),
    )
}

/// A plugin that makes nothing and says that it made an interface; and the loopback that containerd insists on.
fn write_cni(folder: &Path) {
    fs::create_dir_all(folder.join("conf")).unwrap();
    let answer = json!({
        "cniVersion": "0.4.0", "interfaces": [{"name": "eth0", "sandbox": "/x"}],
        "ips": [{"version": "4", "address": format!("{POD_IP}/24"), "interface": 0}],
    });
    let plugin = |name: &str, answer: &str| {
        let script =
            format!("#!/bin/sh\ncat > /dev/null\n[ \"$CNI_COMMAND\" != ADD ] || echo '{answer}'\n");
        fs::write(folder.join(name), script).unwrap();
        fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    };
    plugin("answer", &answer.to_string());
    plugin(
        "loopback",
        r#"{"cniVersion": "0.3.1", "interfaces": [{"name": "lo", "sandbox": "/x"}]}"#,
    );
    let conf = json!({"cniVersion": "0.4.0", "name": "test", "plugins": [{"type": "answer"}]});
    fs::write(folder.join("conf/10-test.conflist"), conf.to_string()).unwrap();
}

/// An OCI archive with the machine's busybox, which is linked statically.
fn write_image(folder: &Path) -> PathBuf {
    let (root, layout) = (folder.join("root"), folder.join("layout"));
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::create_dir_all(root.join("tmp")).unwrap();
    let found = Command::new("sh")
        .args(["-c", "command -v busybox"])
        .output()
        .unwrap();
    fs::copy(
        String::from_utf8(found.stdout).unwrap().trim(),
        root.join("bin/busybox"),
    )
    .unwrap();
    for applet in ["sh", "cat", "grep", "head", "hostname", "sleep"] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let blob = |bytes: &[u8]| {
        let digest: String = Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        fs::write(blobs.join(&digest), bytes).unwrap();
        json!({"digest": format!("sha256:{digest}"), "size": bytes.len()})
    };
    let with = |mut descriptor: Value, media_type: &str| {
        descriptor["mediaType"] = json!(media_type);
        descriptor
    };
    let layer = folder.join("layer.tar");
    run(
        "tar",
        &[
            "-C",
            root.to_str().unwrap(),
            "-cf",
            layer.to_str().unwrap(),
            ".",
        ],
    );
    let layer = blob(&fs::read(layer).unwrap());
    let config = json!({
        "architecture": keelway_kubelet::machine::architecture(), "os": "linux",
        "config": {"Entrypoint": ["/bin/sleep", "1000000"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    });
    let config = blob(config.to_string().as_bytes());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": with(config, "application/vnd.oci.image.config.v1+json"),
        "layers": [with(layer, "application/vnd.oci.image.layer.v1.tar")],
    });
    let mut manifest = with(
        blob(manifest.to_string().as_bytes()),
        "application/vnd.oci.image.manifest.v1+json",
    );
    manifest["annotations"] = json!({"io.containerd.image.name": IMAGE});
    fs::write(
        layout.join("index.json"),
        json!({"schemaVersion": 2, "manifests": [manifest]}).to_string(),
    )
    .unwrap();
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion": "1.0.0"}"#,
    )
    .unwrap();
    let archive = folder.join("image.tar");
    run(
        "tar",
        &[
            "-C",
            layout.to_str().unwrap(),
            "-cf",
            archive.to_str().unwrap(),
            ".",
        ],
    );
    archive
}
