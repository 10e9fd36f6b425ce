//! The cluster, as the kubelet sees it: the `Cluster` seam and its client for the API server.

mod events;
mod kubernetes;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, PodStatus, Secret, Service};
use tokio::sync::broadcast;

pub use events::{Note, Recorder};
pub use kubernetes::KubeCluster;

use crate::clock::Wait;
use crate::pod::PodKey;

/// A ClusterError names the request to the API server that failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClusterError {
    #[error("cannot {operation} {object}: {message}")]
    Request {
        operation: &'static str,
        object: String,
        message: String,
    },
    /// The object is not there, or has another uid by now.
    #[error("cannot {operation} {object}: it is gone")]
    Gone {
        operation: &'static str,
        object: String,
    },
}

/// A Reference names an object whose changes a pod must follow.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reference {
    ConfigMap { namespace: String, name: String },
    Secret { namespace: String, name: String },
}

/// A Token is a ServiceAccount's, bound to one pod.
#[derive(Debug, Clone)]
pub struct Token {
    pub value: String,
    /// For how long no new one need be asked for.
    pub fresh: Wait,
}

/// Whether an event is bad news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    Normal,
    Warning,
}

/// An Interest keeps the objects it names under watch until it is dropped.
pub type Interest = Box<dyn std::any::Any + Send + Sync>;

/// A Cluster is where pods come from and where their status goes.
#[async_trait]
pub trait Cluster: Send + Sync {
    async fn config_map(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<ConfigMap>, ClusterError>;
    async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Secret>, ClusterError>;
    /// A token for the pod's ServiceAccount.
    async fn token(
        &self,
        pod: &Pod,
        audience: Option<&str>,
        expiration_s: i64,
    ) -> Result<Token, ClusterError>;
    /// The handler that a RuntimeClass names; None if there is no such class.
    async fn runtime_handler(&self, class: &str) -> Result<Option<String>, ClusterError>;
    /// All Services, once they have been read.
    async fn services(&self) -> Vec<Service>;
    /// Reports the status; fields that `old` has and `new` has not are removed.
    async fn report(
        &self,
        key: &PodKey,
        old: &PodStatus,
        new: &PodStatus,
    ) -> Result<(), ClusterError>;
    /// Removes the pod's object for good. A pod of another uid is left alone, and one that is gone is a success.
    async fn delete(&self, key: &PodKey) -> Result<(), ClusterError>;
    /// Puts an event on record; never waits.
    fn event(
        &self,
        pod: &Pod,
        container: Option<&str>,
        kind: EventKind,
        reason: &'static str,
        message: String,
    );
    /// Follows the objects; each change of one is announced on `changes`.
    fn follow(&self, references: Vec<Reference>) -> Interest;
    fn changes(&self) -> broadcast::Receiver<Reference>;
}
