//! A runtime and a cluster in memory, and a stage that workers play on.

#![allow(dead_code, reason = "each test file uses a part of it")]

mod cluster;
mod runtime;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use keelway_kubelet::cgroup::Cgroups;
use keelway_kubelet::clock::Clock;
use keelway_kubelet::config::{Config, Credentials};
use keelway_kubelet::pod::admission::Refusal;
use keelway_kubelet::pod::operations::Context;
use keelway_kubelet::pod::status::NodeFacts;
use keelway_kubelet::pod::worker::{Handle, Signal, Worker};
use keelway_kubelet::runtime::ExitSource;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use cluster::FakeCluster;
pub use runtime::FakeRuntime;

/// A clock that follows tokio's, which jumps when everything waits.
pub struct JumpingClock {
    start: tokio::time::Instant,
}

impl JumpingClock {
    pub fn new() -> Self {
        Self {
            start: tokio::time::Instant::now(),
        }
    }
}

impl Clock for JumpingClock {
    fn now(&self) -> Timestamp {
        let passed = SignedDuration::try_from(self.start.elapsed()).unwrap();
        Timestamp::from_second(1_800_000_000).unwrap() + passed
    }
}

pub fn pod(name: &str, spec: Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
        "spec": spec,
    }))
    .unwrap()
}

/// Waits until something holds; five minutes of jumping time is a failure.
pub async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = tokio::time::Instant::now();
    while !holds() {
        assert!(
            start.elapsed() < Duration::from_secs(300),
            "never happened: {what}"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// By uid: the way to reach a worker, and its task.
type Workers = Arc<Mutex<HashMap<String, (Handle, JoinHandle<()>)>>>;

pub struct Stage {
    pub runtime: Arc<FakeRuntime>,
    pub cluster: Arc<FakeCluster>,
    context: Arc<Context>,
    network: watch::Sender<bool>,
    _exit_source: watch::Sender<ExitSource>,
    workers: Workers,
    folder: tempfile::TempDir,
}

impl Stage {
    pub fn new() -> Self {
        let stage = Self::without_network();
        stage.network_is_ready();
        stage
    }

    pub fn without_network() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(JumpingClock::new());
        let workers: Workers = Arc::default();
        let told = workers.clone();
        let runtime = Arc::new(FakeRuntime::new(clock.clone(), move |id: &str| {
            for (handle, _) in told.lock().unwrap().values() {
                let _ = handle.signals.send(Signal::Changed(Arc::from(id)));
            }
        }));
        let cluster = Arc::new(FakeCluster::default());
        let (network, network_ready) = watch::channel(false);
        let (exit_source, exit_sources) = watch::channel(ExitSource::CriEvents);
        let path = |name: &str| folder.path().join(name);
        let config = Config {
            node_name: "n1".to_owned(),
            node_ips: vec!["192.0.2.1".parse().unwrap()],
            kubeconfig: PathBuf::new(),
            runtime_socket: PathBuf::new(),
            cgroup_root: String::new(),
            credentials: Credentials::Given {
                cert: PathBuf::new(),
                key: PathBuf::new(),
            },
            client_ca: PathBuf::new(),
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".to_owned(),
            root_dir: path("kubelet"),
            log_dir: path("logs"),
            resolv_conf: path("resolv.conf"),
            port: 0,
            healthz: "127.0.0.1:0".parse().unwrap(),
            pods_max: 110,
            labels: Vec::new(),
            taints: Vec::new(),
        };
        let context = Arc::new(Context {
            config: Arc::new(config),
            runtime: runtime.clone(),
            cluster: cluster.clone(),
            clock,
            cgroups: Cgroups::with_hierarchies("", Vec::new()),
            node: NodeFacts {
                ips: vec!["192.0.2.1".to_owned()],
            },
            runtime_name: "fake".to_owned(),
            cpu_milli: 2000,
            memory_bytes: 1 << 30,
            network_ready,
            exit_source: exit_sources,
        });
        Self {
            runtime,
            cluster,
            context,
            network,
            _exit_source: exit_source,
            workers,
            folder,
        }
    }

    pub fn network_is_ready(&self) {
        self.network.send(true).unwrap();
    }

    pub fn start(&self, pod: Pod) -> Pod {
        self.start_refusing(pod, None)
    }

    /// A worker of a pod that was not let in, if there is a refusal.
    pub fn start_refusing(&self, pod: Pod, refusal: Option<Refusal>) -> Pod {
        let (worker, handle) = Worker::new(self.context.clone(), Arc::new(pod.clone()), false);
        let worker = worker.refusing(refusal);
        let task = tokio::spawn(async move { drop(worker.run().await) });
        self.workers
            .lock()
            .unwrap()
            .insert(pod.metadata.uid.clone().unwrap(), (handle, task));
        pod
    }

    pub fn is_ready(&self, pod: &str) -> bool {
        self.cluster.condition(pod, "Ready") == Some("True".to_owned())
    }

    /// Marks a pod as the API server does on a delete.
    pub fn mark_deleted(&self, pod: &mut Pod, grace_s: i64) {
        let gone_at = self.context.clock.now() + SignedDuration::from_secs(grace_s);
        pod.metadata.deletion_timestamp = Some(Time(gone_at));
        pod.metadata.deletion_grace_period_seconds = Some(grace_s);
    }

    pub fn update(&self, pod: Pod) {
        self.tell(
            &pod.metadata.uid.clone().unwrap(),
            Signal::Pod(Arc::new(pod)),
        );
    }

    pub fn remove(&self, pod: &Pod) {
        self.tell(pod.metadata.uid.as_ref().unwrap(), Signal::Removed);
    }

    fn tell(&self, uid: &str, signal: Signal) {
        self.workers.lock().unwrap()[uid]
            .0
            .signals
            .send(signal)
            .unwrap();
    }

    /// What kill -9 does to the kubelet.
    pub fn kill_workers(&mut self) {
        for (_, (_, task)) in self.workers.lock().unwrap().drain() {
            task.abort();
        }
    }

    pub fn volume_file(&self, pod: &str, path: &str) -> String {
        let path = self
            .folder
            .path()
            .join("kubelet/pods")
            .join(format!("uid-{pod}"))
            .join("volumes")
            .join(path);
        std::fs::read_to_string(path).unwrap_or_default()
    }

    pub fn folder_is_gone(&self, pod: &str) -> bool {
        !self
            .folder
            .path()
            .join("kubelet/pods")
            .join(format!("uid-{pod}"))
            .exists()
    }
}
