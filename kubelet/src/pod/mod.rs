//! One pod: what should happen next (`plan`), what to report (`status`), what to tell the runtime
//! (`sandbox`, `container`, `env`), and the worker that does it (`worker`, `operations`, `start`).

pub mod admission;
pub mod container;
pub mod credentials;
pub mod env;
mod image;
pub mod memory;
pub mod operations;
pub mod plan;
pub mod report;
pub mod sandbox;
mod start;
pub mod status;
pub mod storage;
pub mod worker;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

/// The seconds a pod gets to end when nothing says otherwise.
pub const GRACE_S_DEFAULT: i64 = 30;

/// The identity of a pod: a new pod of the same name has another uid.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodKey {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

impl PodKey {
    pub fn of(pod: &Pod) -> Self {
        Self {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid: pod.metadata.uid.clone().unwrap_or_default(),
        }
    }
}

impl std::fmt::Display for PodKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// RestartPolicy of a pod, or of one container of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

impl RestartPolicy {
    pub fn of(spec: &PodSpec) -> Self {
        match spec.restart_policy.as_deref() {
            Some("Never") => Self::Never,
            Some("OnFailure") => Self::OnFailure,
            _ => Self::Always,
        }
    }

    /// Whether a container that ended with `exit_code` is started again.
    pub fn restarts(self, exit_code: i32) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => exit_code != 0,
            Self::Never => false,
        }
    }
}

/// A sidecar is an init container that keeps running (KEP-753).
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

pub fn host_network(pod: &Pod) -> bool {
    pod.spec
        .as_ref()
        .and_then(|spec| spec.host_network)
        .unwrap_or(false)
}

/// The grace period of the pod as its spec has it.
pub fn spec_grace_s(pod: &Pod) -> i64 {
    pod.spec
        .as_ref()
        .and_then(|spec| spec.termination_grace_period_seconds)
        .unwrap_or(GRACE_S_DEFAULT)
}

/// All containers with a word on whether they are init containers.
pub fn all_containers(spec: &PodSpec) -> impl Iterator<Item = (&Container, bool)> {
    let init = spec.init_containers.iter().flatten().map(|c| (c, true));
    init.chain(spec.containers.iter().map(|c| (c, false)))
}

/// The ephemeral containers as containers: they have the same fields but for the container they look into.
pub fn ephemeral_containers(spec: &PodSpec) -> impl Iterator<Item = (Container, Option<&str>)> {
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    ephemeral.filter_map(|c| {
        let fields = serde_json::to_value(c).ok()?;
        let container = serde_json::from_value(fields).ok()?;
        Some((container, c.target_container_name.as_deref()))
    })
}

/// The container of this name, of whatever kind.
pub fn find_container(pod: &Pod, name: &str) -> Option<Container> {
    let spec = pod.spec.as_ref()?;
    let known = all_containers(spec)
        .map(|(c, _)| c)
        .find(|c| c.name == name);
    let ephemeral = || {
        ephemeral_containers(spec)
            .map(|(c, _)| c)
            .find(|c| c.name == name)
    };
    known.cloned().or_else(ephemeral)
}

/// Whether the pod has ended for good, as its status in the API says.
pub fn ended(pod: &Pod) -> bool {
    matches!(
        pod.status.as_ref().and_then(|s| s.phase.as_deref()),
        Some("Succeeded" | "Failed")
    )
}
