//! The container runtime, as the kubelet sees it: the `Runtime` seam, what is observed through it, and its CRI client.

mod cri;
mod exits;

use async_trait::async_trait;
use futures::stream::BoxStream;
use k8s_cri::v1::{AuthConfig, ContainerConfig, LinuxContainerResources, PodSandboxConfig};

pub use cri::CriRuntime;

/// Labels that every runtime client of Kubernetes sets; others (crictl) read them too.
pub const LABEL_POD_NAME: &str = "io.kubernetes.pod.name";
pub const LABEL_POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub const LABEL_POD_UID: &str = "io.kubernetes.pod.uid";
pub const LABEL_CONTAINER_NAME: &str = "io.kubernetes.container.name";
/// What a container must wait before its next start, in seconds. Kept on the container so that back-off survives the kubelet.
pub const ANNOTATION_BACKOFF: &str = "keelway.io/backoff-seconds";
/// The limits that a container was made with, as `Limits` prints them.
pub const ANNOTATION_LIMITS: &str = "keelway.io/limits";
/// The image as the pod's spec names it; a change means that the container must be replaced.
pub const ANNOTATION_IMAGE: &str = "keelway.io/image";
pub const ANNOTATION_TERMINATION_PATH: &str = "io.kubernetes.container.terminationMessagePath";

/// A RuntimeError names the call to the runtime that failed, and what the runtime said.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RuntimeError {
    #[error("{operation}: {message}")]
    Call {
        operation: &'static str,
        message: String,
        kind: FailureKind,
    },
    #[error("cannot reach the container runtime at {socket}: {message}")]
    Connect { socket: String, message: String },
}

/// A FailureKind is the part of a gRPC status that callers act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    NotFound,
    Unimplemented,
    DeadlineExceeded,
    Other,
}

impl RuntimeError {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Call { kind, .. } => *kind,
            Self::Connect { .. } => FailureKind::Other,
        }
    }
}

/// RuntimeStatus says whether the runtime can run pods at all, and pods with a network of their own.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RuntimeStatus {
    pub ready: bool,
    pub network_ready: bool,
    pub message: String,
    pub network_message: String,
}

/// A SandboxView is one sandbox as the runtime reports it. Times are nanoseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SandboxView {
    pub id: String,
    pub attempt: u32,
    pub ready: bool,
    pub created_at_ns: i64,
    /// Empty for pods on the host's network.
    pub ips: Vec<String>,
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerPhase {
    Created,
    Running,
    Exited,
}

/// A ContainerView is one container as the runtime reports it. Times are nanoseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerView {
    pub id: String,
    pub name: String,
    /// How often this container of the pod was started before.
    pub attempt: u32,
    pub sandbox_id: String,
    pub phase: ContainerPhase,
    pub created_at_ns: i64,
    pub started_at_ns: i64,
    pub finished_at_ns: i64,
    pub exit_code: i32,
    pub reason: String,
    pub message: String,
    pub image: String,
    pub image_id: String,
    pub spec_image: String,
    pub backoff_s: u64,
    /// What it was made with; empty when that is not known.
    pub limits: String,
    pub log_path: String,
}

/// A PodView is all that the runtime knows of one pod: newest sandbox first, newest container first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodView {
    pub sandboxes: Vec<SandboxView>,
    pub containers: Vec<ContainerView>,
}

impl PodView {
    pub fn latest(&self, name: &str) -> Option<&ContainerView> {
        self.containers.iter().find(|c| c.name == name)
    }

    pub fn in_sandbox<'a>(&'a self, name: &str, sandbox: &str) -> Option<&'a ContainerView> {
        self.containers
            .iter()
            .find(|c| c.name == name && c.sandbox_id == sandbox)
    }
}

/// A KnownPod is a pod that has a sandbox or a container in the runtime.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KnownPod {
    pub uid: String,
    pub namespace: String,
    pub name: String,
}

/// An ImageView is an image that the runtime has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImageView {
    pub id: String,
    pub tags: Vec<String>,
    pub size_bytes: u64,
    pub uid: Option<i64>,
    pub user: String,
}

/// What a command in a container answered.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExecOutput {
    pub exit_code: i32,
    pub output: String,
}

/// A StreamRequest asks the runtime for the address of a streaming connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamRequest {
    Exec {
        container_id: String,
        command: Vec<String>,
        tty: bool,
        stdin: bool,
        stdout: bool,
        stderr: bool,
    },
    Attach {
        container_id: String,
        tty: bool,
        stdin: bool,
        stdout: bool,
        stderr: bool,
    },
    PortForward {
        sandbox_id: String,
        ports: Vec<i32>,
    },
}

/// How the kubelet learns that containers end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitSource {
    CriEvents,
    ContainerdEvents,
    /// Nothing is announced: workers look again and again while containers run.
    Relist,
}

/// A Runtime runs sandboxes and containers. Stop and remove are idempotent: what is gone already is a success.
#[async_trait]
pub trait Runtime: Send + Sync {
    async fn version(&self) -> Result<String, RuntimeError>;
    async fn status(&self) -> Result<RuntimeStatus, RuntimeError>;
    async fn known_pods(&self) -> Result<Vec<KnownPod>, RuntimeError>;
    async fn observe(&self, pod_uid: &str) -> Result<PodView, RuntimeError>;
    /// `handler`: what a RuntimeClass calls its kind of sandbox; empty for the runtime's own choice.
    async fn run_sandbox(
        &self,
        config: PodSandboxConfig,
        handler: &str,
    ) -> Result<String, RuntimeError>;
    async fn stop_sandbox(&self, id: &str) -> Result<(), RuntimeError>;
    async fn remove_sandbox(&self, id: &str) -> Result<(), RuntimeError>;
    async fn images(&self) -> Result<Vec<ImageView>, RuntimeError>;
    async fn image(&self, name: &str) -> Result<Option<ImageView>, RuntimeError>;
    async fn pull(
        &self,
        name: &str,
        auth: Option<AuthConfig>,
        sandbox: PodSandboxConfig,
    ) -> Result<(), RuntimeError>;
    async fn create_container(
        &self,
        sandbox_id: &str,
        config: ContainerConfig,
        sandbox: PodSandboxConfig,
    ) -> Result<String, RuntimeError>;
    async fn start_container(&self, id: &str) -> Result<(), RuntimeError>;
    async fn stop_container(&self, id: &str, grace_s: i64) -> Result<(), RuntimeError>;
    async fn remove_container(&self, id: &str) -> Result<(), RuntimeError>;
    /// Changes what a running container may use.
    async fn resize_container(
        &self,
        id: &str,
        resources: LinuxContainerResources,
    ) -> Result<(), RuntimeError>;
    async fn exec(
        &self,
        id: &str,
        command: Vec<String>,
        timeout_s: i64,
    ) -> Result<ExecOutput, RuntimeError>;
    async fn reopen_log(&self, id: &str) -> Result<(), RuntimeError>;
    /// The bytes that a container has written to its own file system; 0 where the runtime cannot tell.
    async fn written_bytes(&self, id: &str) -> Result<u64, RuntimeError>;
    async fn stream_url(&self, request: StreamRequest) -> Result<String, RuntimeError>;
    /// Ids of containers and sandboxes that changed, and where this is learnt from. The stream ends when the runtime goes away.
    async fn changes(&self) -> Result<(ExitSource, BoxStream<'static, String>), RuntimeError>;
}
