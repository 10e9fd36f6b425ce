//! A node of a development cluster: a set of namespaces under a PID 1 of ours.
//!
//! `keelway up` writes a [`NodeSpec`] and starts `keelway node-init` with one end of a socket pair as standard input.
//! Over it the node reports [`Event`]s and takes [`Order`]s, one JSON object a line each. Until it is told to go on by
//! itself ([`Order::Detach`]), a node ends with the process that holds the other end.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub mod init;
pub mod launch;
pub mod mounts;
mod services;

pub use services::exec_service;

/// Where our own binaries are in a node.
pub const BIN_DIR: &str = "/opt/keelway/bin";

/// What one node is made of. Written by `up`, read by the node's PID 1, nothing else is passed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeSpec {
    pub cluster: String,
    pub name: String,
    /// The node's folder on the machine: its /var is below it, and its root is mounted there while it is built.
    pub dir: PathBuf,
    /// Files and folders of the machine that the node sees.
    pub binds: Vec<Bind>,
    /// Small files of the node itself, by path.
    pub files: BTreeMap<PathBuf, String>,
    /// Settings of the node's own network namespace, by path below /proc/sys/net.
    pub net_sysctls: BTreeMap<String, String>,
    /// The PATH of its services.
    pub path: String,
    /// It is this machine as a node of a cluster of many machines: with the machine's own network and host name, and the folders
    /// that no part of a node needs for itself.
    #[serde(default)]
    pub machine: bool,
    pub services: Vec<ServiceSpec>,
}

/// A file or folder of the machine, and where the node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Bind {
    pub from: PathBuf,
    pub to: PathBuf,
    pub read_only: bool,
}

/// A process that a node's PID 1 keeps running.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceSpec {
    pub name: String,
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// What has to have happened before its first start: names of services that say when they are ready, and names
    /// that come with [`Order::Happened`].
    pub after: Vec<String>,
    /// It tells by NOTIFY_SOCKET (sd_notify) when it is ready.
    pub notifies: bool,
    /// It gets the listening socket that `up` has handed over, as LISTEN_FDS.
    pub listens: bool,
    /// It gets the namespaces that `up` was started in, and moves there: network as standard input, mount as standard output.
    #[serde(default)]
    pub outside: bool,
}

/// What a node tells `up`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "event")]
pub enum Event {
    /// PID 1 was started, under this number of the machine.
    Init { pid: u32 },
    /// Its file systems are in place, and its first services start.
    Booted,
    /// A service said that it is ready.
    Ready { service: String },
    /// A service ended and will be started again.
    Exited {
        service: String,
        status: String,
        restarts: u32,
    },
    /// The node cannot go on.
    Failed { reason: String },
}

/// What `up` tells a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "order")]
pub enum Order {
    /// Something that services wait for has happened.
    Happened { name: String },
    /// The cluster is up: go on without `up`.
    Detach,
    /// End the services, then the node.
    Stop,
}

/// Where PID 1 writes down its services, in the node's folder.
pub const SERVICES_FILE: &str = "services.json";

/// The state of one service, in [`SERVICES_FILE`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    pub name: String,
    /// Its process, as the node numbers it.
    pub pid: Option<u32>,
    pub restarts: u32,
    /// Of one that tells: whether this process has said that it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
}
