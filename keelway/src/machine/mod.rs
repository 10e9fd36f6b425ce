//! This machine as a node of a cluster of many machines: `keelway server` begins a cluster, `join` adds this machine to one, `start`
//! starts it again, `leave` takes it out.
//!
//! A node is what it is in a cluster of one machine ([`crate::node`]): a PID 1 of ours that supervises, with files of its own below
//! the state folder. Its network is the machine's.

pub mod balancer;
pub mod discovery;
pub mod join;
pub mod leave;
pub mod member;
mod moving;
pub mod rotation;
pub mod run;
pub mod server;
pub mod share;
mod spec;
pub mod systemd;
pub mod token;

use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::api::ApiError;
use crate::cgroup::CgroupError;
use crate::config::ConfigError;
use crate::containerd::Snapshotter;
use crate::deploy::DeployError;
use crate::kubeconfig::KubeconfigError;
use crate::node::launch::LaunchError;
use crate::pki::PkiError;
use crate::process::Process;
use crate::seed::SeedError;
use crate::state::{ClusterDir, StateDir, StateError};

/// Where each node reaches the API servers, whichever of them live ([`balancer`]).
pub const LOCAL_API_PORT: u16 = 6444;
/// The port that API servers listen at unless they are told otherwise.
pub const API_PORT: u16 = 6443;
pub use spec::local_api;

/// How long a machine may take to become a node.
pub const TIMEOUT: Duration = Duration::from_secs(180);
const STATE_FILE: &str = "machine.json";

#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Seed(#[from] SeedError),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Deploy(#[from] DeployError),
    #[error(transparent)]
    Kubeconfig(#[from] KubeconfigError),
    #[error(transparent)]
    Discovery(#[from] discovery::DiscoveryError),
    #[error(transparent)]
    Token(#[from] token::TokenError),
    #[error(transparent)]
    Share(#[from] share::ShareError),
    #[error(transparent)]
    Systemd(#[from] systemd::SystemdError),
    #[error("cannot {action} {path}: {source}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "{path}, which says what this machine is, cannot be read ({source}): is it of a later version? Nothing was changed"
    )]
    Unreadable {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error(
        "this machine is node {node} of cluster {cluster} already; `keelway leave` takes it out, `keelway start` starts it again"
    )]
    Member { node: String, cluster: String },
    #[error(
        "this machine is no node; `keelway server` begins a cluster, `keelway join` adds it to one"
    )]
    NoMember,
    #[error("node {0} runs already")]
    Running(String),
    #[error(
        "this machine has no default route, so its address in the cluster has to be given: --node-ip IP"
    )]
    NoAddress,
    #[error("--node-ip {0} is no address of this machine")]
    Foreign(IpAddr),
    #[error("--node-ip takes one address, or one of each family with the IPv4 address first")]
    NodeIps,
    #[error(
        "{0:?} cannot be a node's name: it is to be a DNS name in lower case; give one with --node-name"
    )]
    NodeName(String),
    #[error("{flag} {range}: {reason}")]
    Range {
        flag: &'static str,
        range: IpNetwork,
        reason: &'static str,
    },
    #[error("{0}")]
    Refused(String),
    #[error("this machine did not become a node within {0:?}; what it wrote is in {1}")]
    Timeout(Duration, PathBuf),
    #[error("interrupted")]
    Interrupted,
}

/// Has a file, or the names in a folder, on disk.
fn sync(path: &Path) -> Result<(), MachineError> {
    let synced = fs::File::open(path).and_then(|file| file.sync_all());
    synced.map_err(file("sync", path))
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MachineError {
    let path = path.to_owned();
    move |source| MachineError::File {
        action,
        path,
        source,
    }
}

/// What a machine does in its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    ControlPlane,
    Worker,
}

/// What is written down of this machine as a node, in `machine.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MachineState {
    pub cluster: String,
    pub node: String,
    pub role: Role,
    pub addresses: Vec<IpAddr>,
    /// The cluster counts on it as a node; what is written down before that, and after, is of an attempt to join or to leave.
    pub complete: bool,
    /// Its PID 1.
    pub init: Option<Process>,
    /// Its member of the cluster's etcd, or what was to be one.
    #[serde(default)]
    pub etcd: Option<EtcdState>,
    /// The cluster has yet to be told that this is a control plane, and that others can be, too: that is done by the next start.
    #[serde(default)]
    pub unannounced: bool,
    /// Its state is on the way into an etcd that it begins, or was when that was cut off.
    #[serde(default)]
    pub moving: bool,
    /// Settings of the machine's network that were changed, with what they were.
    pub settings_before: Vec<(PathBuf, String)>,
}

/// What is written down of a machine's member of etcd, from before the others are told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EtcdState {
    /// Where the members are reached that were there before.
    pub others: Vec<String>,
    /// It has a vote, so that the others count on it.
    pub votes: bool,
}

impl MachineState {
    /// Of one that is about to become a node.
    fn new(cluster: &str, node: &str, role: Role, addresses: &[IpAddr]) -> Self {
        MachineState {
            cluster: cluster.to_owned(),
            node: node.to_owned(),
            role,
            addresses: addresses.to_vec(),
            complete: false,
            init: None,
            etcd: None,
            unannounced: false,
            moving: false,
            settings_before: Vec::new(),
        }
    }

    pub fn is_running(&self) -> bool {
        self.init.is_some_and(|init| init.is_alive())
    }
}

/// The folder of this machine as a node.
#[derive(Debug, Clone)]
pub struct MachineDir(ClusterDir);

/// The authorities of the cluster: as it has told the kubelet of them, beside its certificate, where it has. They may be others than those
/// that the machine joined with.
fn known_authorities(certificate: &Path, joined_with: PathBuf) -> PathBuf {
    let told = certificate.with_file_name("ca.crt");
    match told.exists() {
        true => told,
        false => joined_with,
    }
}

impl MachineDir {
    pub fn of(state: &StateDir) -> Self {
        MachineDir(state.machine())
    }

    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The kubeconfig of the cluster's administrator, on control planes.
    pub fn kubeconfig(&self) -> PathBuf {
        self.0.kubeconfig()
    }

    /// The node's own folder.
    pub fn node(&self) -> PathBuf {
        self.path().join("node")
    }

    /// The node's description, from which it is started.
    pub fn spec(&self) -> PathBuf {
        self.node().join("node.json")
    }

    /// What the node sees as /etc/keelway: the control plane's certificates and keys, or what a worker joined with.
    pub fn credentials(&self) -> PathBuf {
        self.node().join("credentials")
    }

    /// The certificates that the kubelet has asked the cluster for, each with its key.
    pub fn kubelet_certificates(&self) -> [PathBuf; 2] {
        let folder = self.node().join("var/lib/kubelet/pki");
        ["kubelet-client.pem", "kubelet-serving.pem"].map(|name| folder.join(name))
    }

    /// The authorities of the cluster.
    pub fn authorities(&self) -> PathBuf {
        let [client, _] = self.kubelet_certificates();
        known_authorities(&client, self.credentials().join("ca.crt"))
    }

    /// What is written down; None when nothing is, or it cannot be read.
    pub fn read(&self) -> Option<MachineState> {
        self.known().ok().flatten()
    }

    /// What is written down; None when nothing is.
    ///
    /// # Errors
    /// When it is there and cannot be read: what a machine is made of is not to be taken for nothing.
    pub fn known(&self) -> Result<Option<MachineState>, MachineError> {
        let path = self.path().join(STATE_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(file("read", &path)(error)),
        };
        let known = serde_json::from_slice(&text);
        known
            .map(Some)
            .map_err(|source| MachineError::Unreadable { path, source })
    }

    fn write(&self, state: &MachineState) -> Result<(), MachineError> {
        let (path, new) = (
            self.path().join(STATE_FILE),
            self.path().join("machine.new"),
        );
        let text =
            serde_json::to_vec_pretty(state).map_err(|error| file("write", &new)(error.into()))?;
        let write = || {
            let mut out = fs::File::create(&new)?;
            out.write_all(&text)?;
            out.sync_all()
        };
        write().map_err(file("write", &new))?;
        fs::rename(&new, &path).map_err(file("replace", &path))?;
        sync(self.path())
    }

    /// Removes the folder, what is written down last: while anything is left, it is known that there is.
    fn remove(&self) -> Result<(), MachineError> {
        let entries = match fs::read_dir(self.path()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(file("read", self.path())(error)),
        };
        for entry in entries {
            let entry = entry.map_err(file("read", self.path()))?;
            let (path, kind) = (entry.path(), entry.file_type());
            let removed = match kind.map_err(file("look at", &path))? {
                _ if entry.file_name() == STATE_FILE => Ok(()),
                kind if kind.is_dir() => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            removed.map_err(file("remove", &path))?;
        }
        Ok(self.0.remove()?)
    }

    fn snapshotter(&self) -> Snapshotter {
        Snapshotter::for_folder(self.path())
    }
}

/// The addresses of this machine in its cluster: those given, or the one that it reaches the world from.
fn addresses(given: &[IpAddr]) -> Result<Vec<IpAddr>, MachineError> {
    match given {
        [_] => Ok(given.to_vec()),
        [first, second] if first.is_ipv4() && second.is_ipv6() => Ok(given.to_vec()),
        [] => Ok(vec![own_address().ok_or(MachineError::NoAddress)?]),
        _ => Err(MachineError::NodeIps),
    }
}

/// The same, of which each is an address of this machine: what is made of another's would be taken for that one.
fn own_addresses(given: &[IpAddr]) -> Result<Vec<IpAddr>, MachineError> {
    let addresses = addresses(given)?;
    let foreign = |address: &&IpAddr| UdpSocket::bind((**address, 0)).is_err();
    match addresses.iter().find(foreign) {
        Some(foreign) => Err(MachineError::Foreign(*foreign)),
        None => Ok(addresses),
    }
}

/// The source address that the kernel would choose towards an address of documentation (RFC 5737), of IPv6 (RFC 3849) where there is no
/// way to one of IPv4. Nothing is sent.
fn own_address() -> Option<IpAddr> {
    let towards = |bind: &str, far: &str| {
        let socket = UdpSocket::bind(bind).ok()?;
        socket.connect(far).ok()?;
        let address = socket.local_addr().ok()?.ip();
        let is_local = match address {
            IpAddr::V4(_) => false,
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        let usable = !address.is_unspecified() && !address.is_loopback() && !is_local;
        usable.then_some(address)
    };
    towards("0.0.0.0:0", "192.0.2.1:9").or_else(|| towards("[::]:0", "[2001:db8::1]:9"))
}

/// A node's name: the one given, or the machine's.
fn node_name(given: Option<&str>) -> Result<String, MachineError> {
    let name = match given {
        Some(name) => name.to_owned(),
        None => nix::unistd::gethostname()
            .ok()
            .and_then(|name| name.into_string().ok())
            .unwrap_or_default()
            .to_lowercase(),
    };
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.chars().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() <= 253 && name.split('.').all(label) {
        Ok(name)
    } else {
        Err(MachineError::NodeName(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_one_address_or_one_of_each_family() {
        let parse = |texts: &[&str]| -> Vec<IpAddr> {
            let parsed = texts.iter().map(|text| text.parse().expect("an address"));
            parsed.collect()
        };
        for good in [&["10.0.0.1"][..], &["fd00::1"], &["10.0.0.1", "fd00::1"]] {
            let given = parse(good);
            assert_eq!(addresses(&given).expect("good"), given);
        }
        for bad in [
            &["fd00::1", "10.0.0.1"][..],
            &["10.0.0.1", "10.0.0.2"],
            &["10.0.0.1", "fd00::1", "fd00::2"],
        ] {
            assert!(addresses(&parse(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_a_machine_is_made_of_is_not_taken_for_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = MachineDir::of(&StateDir::at(folder.path()));
        assert!(dir.known().expect("nothing is there").is_none());
        let _lock = dir.0.create().expect("made");
        let state = MachineState::new("c", "n", Role::Worker, &[]);
        dir.write(&state).expect("written");
        assert_eq!(dir.known().expect("read"), Some(state));
        fs::write(dir.path().join(STATE_FILE), "{\"cluster\":").expect("torn");
        assert!(matches!(dir.known(), Err(MachineError::Unreadable { .. })));
    }

    #[test]
    fn a_node_has_addresses_of_its_own_machine() {
        let parse = |text: &str| text.parse::<IpAddr>().expect("an address");
        assert!(own_addresses(&[parse("127.0.0.1")]).is_ok());
        let foreign = own_addresses(&[parse("192.0.2.77")]);
        assert!(matches!(foreign, Err(MachineError::Foreign(_))));
    }

    #[test]
    fn node_names_are_dns_names() {
        for good in ["a", "node-1", "n1.example.org"] {
            assert_eq!(node_name(Some(good)).expect("good"), good);
        }
        for bad in ["", "Node", "a_b", "-a", "a..b", &"a".repeat(64)] {
            assert!(node_name(Some(bad)).is_err(), "{bad}");
        }
    }
}
