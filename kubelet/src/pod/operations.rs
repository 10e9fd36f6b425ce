//! operations: carrying out one `Op` of a plan.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_cri::v1::PodSandboxConfig;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{Mutex, mpsc, watch};

use super::container::linux_resources;
use super::env::{Objects, Place};
use super::plan::{Op, StopReason};
use super::sandbox::{ClusterDns, Resolv, SandboxError, log_directory_name, sandbox_config};
use super::status::NodeFacts;
use super::worker::Signal;
use super::{PodKey, find_container, host_network};
use crate::cgroup::{Cgroups, pod_cgroup};
use crate::clock::{Clock, Wait};
use crate::cluster::{Cluster, EventKind, Reference, Token};
use crate::config::Config;
use crate::probe::{Target, run_handler};
use crate::runtime::{ExitSource, Runtime};
use crate::volume::payload::{Needs, Sources, TokenKey, payload, volume_needs};
use crate::volume::{PodFolder, VolumeError, VolumeKind, place, tree};

/// Least time that a container gets between its SIGTERM and its SIGKILL when a preStop hook used up the rest (upstream's).
const AFTER_PRE_STOP_S: i64 = 2;

/// A Context is what every pod of the node shares.
pub struct Context {
    pub config: Arc<Config>,
    pub runtime: Arc<dyn Runtime>,
    pub cluster: Arc<dyn Cluster>,
    pub clock: Arc<dyn Clock>,
    pub cgroups: Cgroups,
    pub node: NodeFacts,
    pub runtime_name: String,
    pub cpu_milli: i64,
    pub memory_bytes: i64,
    pub network_ready: watch::Receiver<bool>,
    pub exit_source: watch::Receiver<ExitSource>,
}

/// A Failed operation in the words of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    pub reason: &'static str,
    pub message: String,
    /// First wait before the next try, and the longest, in seconds.
    pub wait_s: (u64, u64),
}

pub(super) fn failed(reason: &'static str, message: impl ToString, wait_s: (u64, u64)) -> Failed {
    Failed {
        reason,
        message: message.to_string(),
        wait_s,
    }
}

/// What an operation leaves behind for the worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Done {
    /// For how long tokens in the volumes need no renewal; set by PrepareVolumes.
    pub fresh: Option<Wait>,
}

/// A Job is one operation on one pod.
pub struct Job {
    pub context: Arc<Context>,
    pub pod: Arc<Pod>,
    pub pod_ips: Vec<String>,
    pub tokens: Arc<Mutex<BTreeMap<TokenKey, Token>>>,
    pub signals: mpsc::UnboundedSender<Signal>,
}

impl Job {
    /// Does it.
    pub async fn execute(&self, op: Op) -> Result<Done, Failed> {
        let runtime = &self.context.runtime;
        let unable =
            |reason| move |error: crate::runtime::RuntimeError| failed(reason, error, (1, 30));
        match op {
            Op::PrepareVolumes => self.prepare_volumes().await,
            Op::RunSandbox {
                attempt,
                stop_first,
            } => self.run_sandbox(attempt, stop_first).await,
            Op::StopSandbox { id } => runtime
                .stop_sandbox(&id)
                .await
                .map(|()| Done::default())
                .map_err(unable("FailedKillPod")),
            Op::RemoveSandbox { id } => runtime
                .remove_sandbox(&id)
                .await
                .map(|()| Done::default())
                .map_err(unable("FailedKillPod")),
            Op::RemoveContainer { id } => runtime
                .remove_container(&id)
                .await
                .map(|()| Done::default())
                .map_err(unable("FailedKillPod")),
            Op::StartContainer {
                name,
                attempt,
                sandbox_id,
                backoff_s,
                target_id,
            } => {
                self.start_container(&name, attempt, &sandbox_id, backoff_s, target_id)
                    .await
            }
            Op::StopContainer {
                name,
                id,
                deadline,
                reason,
                ..
            } => self.stop_container(&name, &id, deadline, reason).await,
            Op::KillContainer { id, grace_s, .. } => runtime
                .stop_container(&id, grace_s)
                .await
                .map(|()| Done::default())
                .map_err(unable("FailedKillPod")),
            Op::ResizeContainer { name, id, .. } => self.resize_container(&name, &id).await,
            Op::Clean => self.clean().await,
        }
    }

    pub(super) fn key(&self) -> PodKey {
        PodKey::of(&self.pod)
    }

    pub(super) fn folder(&self) -> PodFolder {
        PodFolder::new(&self.context.config.root_dir, &self.key().uid)
    }

    fn log_directory(&self) -> PathBuf {
        self.context
            .config
            .log_dir
            .join(log_directory_name(&self.key()))
    }

    pub(super) fn place(&self) -> Place {
        let context = &self.context;
        Place {
            pod_ips: if host_network(&self.pod) {
                context.node.ips.clone()
            } else {
                self.pod_ips.clone()
            },
            host_ips: context.node.ips.clone(),
            allocatable_cpu_milli: context.cpu_milli,
            allocatable_memory_bytes: context.memory_bytes,
        }
    }

    pub(super) fn event(
        &self,
        container: Option<&str>,
        kind: EventKind,
        reason: &'static str,
        message: impl ToString,
    ) {
        self.context
            .cluster
            .event(&self.pod, container, kind, reason, message.to_string());
    }

    pub(super) async fn objects(&self, needs: &Needs) -> Result<Objects, VolumeError> {
        let namespace = self.key().namespace;
        let mut objects = Objects::default();
        for name in &needs.config_maps {
            let found = self.context.cluster.config_map(&namespace, name).await;
            let found = found.map_err(|e| VolumeError::Api {
                object: format!("configmap {name}"),
                message: e.to_string(),
            })?;
            objects
                .config_maps
                .extend(found.map(|map| (name.clone(), map)));
        }
        for name in &needs.secrets {
            let found = self.context.cluster.secret(&namespace, name).await;
            let found = found.map_err(|e| VolumeError::Api {
                object: format!("secret {name}"),
                message: e.to_string(),
            })?;
            objects
                .secrets
                .extend(found.map(|secret| (name.clone(), secret)));
        }
        Ok(objects)
    }

    async fn prepare_volumes(&self) -> Result<Done, Failed> {
        match self.fill_volumes().await {
            Ok(fresh) => Ok(Done { fresh }),
            Err(error) => {
                let message = format!("MountVolume.SetUp failed for {error}");
                self.event(None, EventKind::Warning, "FailedMount", &message);
                Err(failed("ContainerCreating", message, (1, 30)))
            }
        }
    }

    async fn fill_volumes(&self) -> Result<Option<Wait>, VolumeError> {
        let Some(spec) = &self.pod.spec else {
            return Ok(None);
        };
        let folder = self.folder();
        let needs = volume_needs(spec);
        let objects = self.objects(&needs).await?;
        let mut fresh: Option<Wait> = None;
        let mut tokens = BTreeMap::new();
        let mut kept = self.tokens.lock().await;
        for key in needs.tokens {
            let now = self.context.clock.now();
            let token = match kept.get(&key) {
                Some(token) if token.fresh.end(now).is_some() => token.clone(),
                _ => {
                    let token = self
                        .context
                        .cluster
                        .token(&self.pod, key.0.as_deref(), key.1)
                        .await;
                    token.map_err(|e| VolumeError::Token {
                        volume: String::new(),
                        message: e.to_string(),
                    })?
                }
            };
            fresh = Some(fresh.map_or(token.fresh, |others| Wait {
                since: others.since.max(token.fresh.since),
                until: others.until.min(token.fresh.until),
            }));
            tokens.insert(key.clone(), token.value.clone());
            kept.insert(key, token);
        }
        drop(kept);
        let place = self.place();
        let sources = Sources {
            pod: &self.pod,
            objects: &objects,
            tokens: &tokens,
            place: &place,
        };
        let group = place::fs_group(&self.pod);
        for volume in spec.volumes.iter().flatten() {
            let path = place::prepare(&self.pod, volume, &folder)?;
            if let Some(files) = payload(volume, &sources)? {
                tree::write(&volume.name, &path, &files, group, self.context.clock.now())?;
            }
        }
        Ok(fresh)
    }

    pub(super) fn sandbox_config(&self, attempt: u32) -> Result<PodSandboxConfig, SandboxError> {
        let config = &self.context.config;
        let host = std::fs::read_to_string(&config.resolv_conf)
            .map(|text| Resolv::parse(&text))
            .unwrap_or_default();
        let dns = ClusterDns {
            servers: &config.cluster_dns,
            domain: &config.cluster_domain,
            host: &host,
        };
        let cgroup = pod_cgroup(self.context.cgroups.root(), &self.pod);
        let logs = self.log_directory();
        sandbox_config(&self.pod, attempt, &cgroup, &logs.to_string_lossy(), &dns)
    }

    /// What the pod's RuntimeClass calls its kind of sandbox.
    async fn runtime_handler(&self) -> Result<String, String> {
        let class = self
            .pod
            .spec
            .as_ref()
            .and_then(|s| s.runtime_class_name.as_deref());
        let Some(class) = class.filter(|name| !name.is_empty()) else {
            return Ok(String::new());
        };
        match self.context.cluster.runtime_handler(class).await {
            Ok(Some(handler)) => Ok(handler),
            Ok(None) => Err(format!("RuntimeClass \"{class}\" not found")),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn run_sandbox(&self, attempt: u32, stop_first: Vec<String>) -> Result<Done, Failed> {
        let unable = |message: String| {
            self.event(
                None,
                EventKind::Warning,
                "FailedCreatePodSandBox",
                format!("Failed to create pod sandbox: {message}"),
            );
            failed("ContainerCreating", message, (1, 30))
        };
        let config = self
            .sandbox_config(attempt)
            .map_err(|e| unable(e.to_string()))?;
        let handler = self.runtime_handler().await.map_err(unable)?;
        for id in stop_first {
            self.context
                .runtime
                .stop_sandbox(&id)
                .await
                .map_err(|e| unable(e.to_string()))?;
        }
        self.context
            .cgroups
            .make_pod(&self.pod)
            .map_err(|e| unable(e.to_string()))?;
        let logs = self.log_directory();
        tokio::fs::create_dir_all(&logs)
            .await
            .map_err(|e| unable(format!("cannot make {}: {e}", logs.display())))?;
        self.context
            .runtime
            .run_sandbox(config, &handler)
            .await
            .map_err(|e| unable(e.to_string()))?;
        Ok(Done::default())
    }

    async fn stop_container(
        &self,
        name: &str,
        id: &str,
        deadline: Timestamp,
        reason: StopReason,
    ) -> Result<Done, Failed> {
        let message = match reason {
            StopReason::PodEnding => format!("Stopping container {name}"),
            StopReason::SandboxGone => {
                format!("Stopping container {name}: the pod's sandbox is gone")
            }
            StopReason::ImageChanged => {
                format!("Container {name} definition changed, will be restarted")
            }
            StopReason::Resized => {
                format!("Container {name} resize requires restart")
            }
            StopReason::LivenessFailed => {
                format!("Container {name} failed liveness probe, will be restarted")
            }
            StopReason::StartupFailed => {
                format!("Container {name} failed startup probe, will be restarted")
            }
        };
        self.event(Some(name), EventKind::Normal, "Killing", message);
        let container = find_container(&self.pod, name);
        let container = container.as_ref();
        let hook = container
            .and_then(|c| c.lifecycle.as_ref())
            .and_then(|l| l.pre_stop.as_ref());
        let left_ms = || {
            deadline
                .duration_since(self.context.clock.now())
                .as_millis()
                .max(0)
        };
        let mut grace_s = ceil_s(left_ms());
        if let (Some(container), Some(hook), true) = (container, hook, grace_s > 0) {
            let pod_ip = self.place().pod_ips.first().cloned().unwrap_or_default();
            let target = Target {
                runtime: self.context.runtime.as_ref(),
                container_id: id,
                container,
                pod_ip: &pod_ip,
            };
            let limit = Duration::from_millis(u64::try_from(left_ms()).unwrap_or(0));
            if let Err(message) = run_handler(&target, hook, limit).await {
                self.event(
                    Some(name),
                    EventKind::Warning,
                    "FailedPreStopHook",
                    format!("PreStopHook failed: {message}"),
                );
            }
            grace_s = ceil_s(left_ms()).max(AFTER_PRE_STOP_S);
        }
        let answer = self.context.runtime.stop_container(id, grace_s).await;
        answer
            .map(|()| Done::default())
            .map_err(|e| failed("FailedKillPod", e, (1, 30)))
    }

    /// Gives a running container what its spec names now, within the pod's cgroup, which changes with it.
    async fn resize_container(&self, name: &str, id: &str) -> Result<Done, Failed> {
        let unable = |message: String| {
            self.event(
                Some(name),
                EventKind::Warning,
                "FailedResize",
                format!("Error: {message}"),
            );
            failed("ResizeError", message, (10, 300))
        };
        let container = find_container(&self.pod, name)
            .ok_or_else(|| unable(format!("the pod has no container {name}")))?;
        let resources = linux_resources(&self.pod, &container, self.context.memory_bytes);
        let cgroups = &self.context.cgroups;
        // No child may have more CPU than its parent (cgroup v1): one that grows follows it, one that shrinks goes first.
        let made = cgroups.make_pod(&self.pod);
        made.map_err(|error| unable(error.to_string()))?;
        let resized = self.context.runtime.resize_container(id, resources).await;
        resized.map_err(|error| unable(error.to_string()))?;
        let made = cgroups.make_pod(&self.pod);
        made.map_err(|error| unable(error.to_string()))?;
        Ok(Done::default())
    }

    async fn clean(&self) -> Result<Done, Failed> {
        let (folder, logs, cgroups, uid) = (
            self.folder(),
            self.log_directory(),
            self.context.cgroups.clone(),
            self.key().uid,
        );
        let cleaned = tokio::task::spawn_blocking(move || {
            cgroups.remove_uid(&uid);
            place::remove(&folder)?;
            match std::fs::remove_dir_all(&logs) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        });
        match cleaned.await {
            Ok(Ok(())) => Ok(Done::default()),
            Ok(Err(error)) => Err(failed("FailedUnmount", error, (1, 30))),
            Err(error) => Err(failed("FailedUnmount", error, (1, 30))),
        }
    }
}

fn ceil_s(milliseconds: i128) -> i64 {
    i64::try_from((milliseconds + 999) / 1000).unwrap_or(i64::MAX)
}

/// The objects whose changes a pod's generated volumes follow.
pub fn references(pod: &Pod) -> Vec<Reference> {
    let Some(spec) = &pod.spec else {
        return Vec::new();
    };
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    let needs = volume_needs(spec);
    let maps = needs
        .config_maps
        .into_iter()
        .map(|name| Reference::ConfigMap {
            namespace: namespace.clone(),
            name,
        });
    let secrets = needs.secrets.into_iter().map(|name| Reference::Secret {
        namespace: namespace.clone(),
        name,
    });
    maps.chain(secrets).collect()
}

/// Whether a pod has volumes that its own metadata is written into.
pub fn shows_metadata(pod: &Pod) -> bool {
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    volumes.into_iter().any(|v| {
        matches!(
            VolumeKind::of(v),
            Some(VolumeKind::DownwardApi | VolumeKind::Projected)
        )
    })
}
