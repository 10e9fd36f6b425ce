//! The controllers: each is a pure function from a snapshot of the cluster and a key to writes; one runner feeds them and
//! does what they ask, through the public API.
//!
//! `plan.rs` says what a controller is, `snapshot.rs` what it sees. The files named after controllers import neither tokio
//! nor kube; `runner.rs`, `watch.rs`, `execute.rs` and `lease.rs` do nothing but carry changes in and writes out.

mod aggregation;
mod bootstrap;
mod certificates;
mod clock;
mod cronjob;
mod daemonset;
mod deployment;
mod disruption;
mod endpoints;
pub(crate) mod events;
pub(crate) mod execute;
mod garbage;
mod graph;
pub(crate) mod intake;
mod job;
mod job_ttl;
pub(crate) mod labels;
pub(crate) mod lease;
mod namespace;
mod namespaced_defaults;
mod nodeipam;
mod nodelifecycle;
pub(crate) mod nodes;
pub(crate) mod object;
pub(crate) mod patch;
pub(crate) mod plan;
mod podgc;
pub(crate) mod pods;
mod quota;
mod replicas;
mod revisions;
pub(crate) mod runner;
mod service_ranges;
pub(crate) mod snapshot;
mod statefulset;
#[cfg(test)]
pub(crate) mod testing;
mod tokens;
pub(crate) mod volumes;
pub(crate) mod watch;

use std::path::PathBuf;
use std::sync::Arc;

use ipnetwork::IpNetwork;

pub use certificates::{CLIENT_SIGNER, organizations};
pub use cronjob::{Schedule, ScheduleError};
pub use runner::run;

use certificates::Authority;
use nodeipam::Pool;
use plan::Controller;

/// All controllers, in no order that matters.
pub(crate) const ALL: &[Controller] = &[
    deployment::CONTROLLER,
    replicas::REPLICA_SETS,
    replicas::REPLICATION_CONTROLLERS,
    daemonset::CONTROLLER,
    statefulset::CONTROLLER,
    job::CONTROLLER,
    job_ttl::CONTROLLER,
    cronjob::CONTROLLER,
    disruption::CONTROLLER,
    quota::CONTROLLER,
    tokens::CONTROLLER,
    certificates::CONTROLLER,
    bootstrap::SIGNER,
    bootstrap::CLEANER,
    volumes::CLAIMS,
    volumes::VOLUMES,
    volumes::protection::CLAIMS,
    volumes::protection::VOLUMES,
    volumes::protection::CLASSES,
    endpoints::CONTROLLER,
    endpoints::SUBSETS,
    endpoints::MIRRORING,
    nodeipam::CONTROLLER,
    nodelifecycle::CONTROLLER,
    nodelifecycle::EVICTION,
    namespaced_defaults::CONTROLLER,
    namespace::CONTROLLER,
    garbage::CONTROLLER,
    podgc::CONTROLLER,
    aggregation::CONTROLLER,
    service_ranges::CONTROLLER,
];

/// What the controllers are started with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Credentials and address of the API server.
    pub kubeconfig: PathBuf,
    /// PEM file of the CA that pods are to trust the API server by.
    pub ca_file: PathBuf,
    /// PEM file of that CA's key. Where it is missing, certificates that clients ask for are signed elsewhere.
    pub ca_key_file: PathBuf,
    /// Ranges of all pod addresses: one, or one of each family.
    pub cluster_cidrs: Vec<IpNetwork>,
    /// Name of this control plane in leader elections: unique among them, and the same after a restart, so that a control
    /// plane that was killed takes its lease up again at once.
    pub identity: String,
}

/// What plans depend on beside the snapshot.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What every node gets a part of, from each.
    pub pools: Vec<Pool>,
    /// PEM of the CA that pods are to trust the API server by.
    pub root_ca: String,
    /// Signs certificates that clients ask for.
    pub authority: Option<Arc<Authority>>,
}

/// Why the controllers cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("controllers: cannot read the CA {path}: {source}")]
    RootCa {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("controllers: cannot read the CA's key {path}: {source}")]
    CaKey {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("controllers: {0}")]
    Authority(#[from] certificates::Error),
    #[error("controllers: --cluster-cidr {0} has no room for a /{1} per node")]
    ClusterCidr(IpNetwork, u8),
    #[error("controllers: --cluster-cidr {0} is too large: its nodes are to be at most 2^{1}")]
    ClusterCidrSize(IpNetwork, u8),
    #[error(transparent)]
    Client(#[from] watch::ClientError),
}
