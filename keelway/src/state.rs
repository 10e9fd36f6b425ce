//! What is known of the clusters of this machine, in `/var/lib/keelway/clusters/<cluster>/`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::deploy::Settings;
use crate::network::{SUBNETS, Subnet};
use crate::node::{SERVICES_FILE, ServiceStatus};
use crate::process::Process;

const STATE_DIR: &str = "/var/lib/keelway";
const STATE_FILE: &str = "cluster.json";

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("cannot {action} {path}: {source}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "another keelway command works on cluster `{0}` right now; wait for it to end, or stop it"
    )]
    Busy(String),
    #[error("all {SUBNETS} networks for clusters are in use; take one down first")]
    NoSubnet,
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::File {
        action,
        path,
        source,
    }
}

/// What is written down of one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterState {
    pub name: String,
    /// Which network its underlay has, see [`Subnet`].
    pub subnet: u16,
    /// Where the API server listens on 127.0.0.1.
    pub api_port: u16,
    /// The user's file that has its context.
    pub kubeconfig: Option<PathBuf>,
    /// `up` has come to its end.
    pub complete: bool,
    pub nodes: Vec<NodeState>,
    /// What agent and DNS were given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deployed: Option<Settings>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeState {
    pub name: String,
    /// Its address of the cluster's primary family.
    pub address: IpAddr,
    /// That of the other one, in a cluster of both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_address: Option<IpAddr>,
    pub control_plane: bool,
    /// Its PID 1, as the machine numbers it.
    pub init: Option<Process>,
    /// A command has begun to replace it and has not come to the end of that: what runs of it may be about to end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unsettled: bool,
}

impl NodeState {
    /// Its addresses, the primary family's first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        std::iter::once(self.address)
            .chain(self.second_address)
            .collect()
    }

    pub fn is_running(&self) -> bool {
        self.init.is_some_and(|init| init.is_alive())
    }

    /// Whether it runs and will go on, whatever becomes of the command that started it.
    pub fn is_settled(&self) -> bool {
        !self.unsettled && self.is_running()
    }
}

/// The folder of all clusters.
#[derive(Debug, Clone)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// `KEELWAY_STATE_DIR`, else `/var/lib/keelway`.
    pub fn from_environment() -> Self {
        StateDir(
            std::env::var_os("KEELWAY_STATE_DIR").map_or_else(|| STATE_DIR.into(), PathBuf::from),
        )
    }

    pub fn at(path: impl Into<PathBuf>) -> Self {
        StateDir(path.into())
    }

    fn clusters_dir(&self) -> PathBuf {
        self.0.join("clusters")
    }

    /// The folder of a cluster.
    pub fn cluster(&self, name: &str) -> ClusterDir {
        ClusterDir {
            name: name.to_owned(),
            path: self.clusters_dir().join(name),
        }
    }

    /// The folder of this machine as a node of a cluster of many machines. Clusters' own are elsewhere.
    pub fn machine(&self) -> ClusterDir {
        ClusterDir {
            name: "machine.images".to_owned(),
            path: self.0.join("machine"),
        }
    }

    /// Names of the clusters that have a folder.
    pub fn names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.clusters_dir()) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// Writes down a new cluster with a subnet that no other one has, chosen under a lock. `state.subnet` is set.
    ///
    /// # Errors
    /// When all are taken, or files cannot be written.
    pub fn claim_subnet(
        &self,
        dir: &ClusterDir,
        state: &mut ClusterState,
    ) -> Result<Subnet, StateError> {
        let clusters = self.clusters_dir();
        let folder = File::open(&clusters).map_err(file("open", &clusters))?;
        let _lock = Flock::lock(folder, FlockArg::LockExclusive)
            .map_err(|(_, error)| file("lock", &clusters)(error.into()))?;
        let taken: Vec<u16> = self
            .names()
            .iter()
            .filter(|name| **name != dir.name)
            .filter_map(|name| self.cluster(name).read())
            .map(|other| other.subnet)
            .collect();
        state.subnet = (0..SUBNETS)
            .find(|subnet| !taken.contains(subnet))
            .ok_or(StateError::NoSubnet)?;
        dir.write(state)?;
        Ok(Subnet(state.subnet))
    }

    /// Removes the folders above the clusters, when nothing is in them.
    pub fn remove_if_empty(&self) {
        drop(fs::remove_dir(self.clusters_dir()));
        drop(fs::remove_dir(&self.0));
    }
}

/// The folder of one cluster.
#[derive(Debug, Clone)]
pub struct ClusterDir {
    pub name: String,
    pub path: PathBuf,
}

/// Held by the command that works on a cluster; the kernel lets go of it when that command ends, however it does.
#[derive(Debug)]
pub struct ClusterLock(#[expect(dead_code, reason = "held for its lock")] Flock<File>);

impl ClusterDir {
    /// Locks the cluster; None when it has no folder.
    ///
    /// # Errors
    /// Busy when another command holds it.
    pub fn lock(&self) -> Result<Option<ClusterLock>, StateError> {
        let folder = match File::open(&self.path) {
            Ok(folder) => folder,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(file("open", &self.path)(error)),
        };
        let inode = folder
            .metadata()
            .map_err(file("look at", &self.path))?
            .ino();
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            // The folder may have been removed by the one who had the lock before.
            Ok(lock) if fs::metadata(&self.path).is_ok_and(|now| now.ino() == inode) => {
                Ok(Some(ClusterLock(lock)))
            }
            Ok(_) => Ok(None),
            Err((_, nix::Error::EWOULDBLOCK)) => Err(StateError::Busy(self.name.clone())),
            Err((_, error)) => Err(file("lock", &self.path)(error.into())),
        }
    }

    /// Makes the folder and locks it.
    ///
    /// # Errors
    /// Busy when another command has it.
    pub fn create(&self) -> Result<ClusterLock, StateError> {
        // Private keys are below it.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .map_err(file("make", &self.path))?;
        self.lock()?
            .ok_or_else(|| StateError::Busy(self.name.clone()))
    }

    /// What is written down; None when nothing is, or it cannot be read any more.
    pub fn read(&self) -> Option<ClusterState> {
        serde_json::from_slice(&fs::read(self.path.join(STATE_FILE)).ok()?).ok()
    }

    /// Replaces what is written down.
    ///
    /// # Errors
    /// When the disk is full, for example.
    pub fn write(&self, state: &ClusterState) -> Result<(), StateError> {
        let (path, new) = (
            self.path.join(STATE_FILE),
            self.path.join("cluster.json.new"),
        );
        let text =
            serde_json::to_vec_pretty(state).map_err(|error| file("write", &new)(error.into()))?;
        let mut out = File::create(&new).map_err(file("write", &new))?;
        out.write_all(&text).map_err(file("write", &new))?;
        fs::rename(&new, &path).map_err(file("replace", &path))
    }

    /// The folder of a node.
    pub fn node(&self, node: &str) -> PathBuf {
        self.path.join(node)
    }

    /// What a node's PID 1 has written down of its services; none when it has not, or it cannot be read.
    pub fn services(&self, node: &str) -> Vec<ServiceStatus> {
        let text = fs::read(self.node(node).join(SERVICES_FILE)).ok();
        let services = text.and_then(|text| serde_json::from_slice(&text).ok());
        services.unwrap_or_default()
    }

    /// The kubeconfig of the cluster's administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.path.join("kubeconfig")
    }

    /// Removes the folder with all in it. A folder that is gone is a success.
    ///
    /// # Errors
    /// When something in it cannot be removed.
    pub fn remove(&self) -> Result<(), StateError> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(file("remove", &self.path)(error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(name: &str) -> ClusterState {
        ClusterState {
            name: name.into(),
            subnet: 0,
            api_port: 1,
            kubeconfig: None,
            complete: false,
            nodes: Vec::new(),
            deployed: None,
        }
    }

    #[test]
    fn clusters_get_subnets_of_their_own_and_free_ones_are_used_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = StateDir::at(folder.path());
        let claim = |name: &str| {
            let cluster = dir.cluster(name);
            let _lock = cluster.create().expect("locked");
            dir.claim_subnet(&cluster, &mut state(name))
                .expect("a subnet")
                .0
        };
        assert_eq!((claim("a"), claim("b"), claim("c")), (0, 1, 2));
        dir.cluster("b").remove().expect("removed");
        assert_eq!(claim("d"), 1);
        assert_eq!(dir.names(), ["a", "c", "d"]);
    }

    #[test]
    fn a_cluster_is_worked_on_by_one_command_at_a_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let cluster = StateDir::at(folder.path()).cluster("a");
        assert!(cluster.lock().expect("no folder").is_none());
        let lock = cluster.create().expect("locked");
        assert!(matches!(cluster.lock(), Err(StateError::Busy(_))));
        drop(lock);
        assert!(cluster.lock().expect("free").is_some());
    }

    #[test]
    fn a_torn_state_file_reads_as_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let cluster = StateDir::at(folder.path()).cluster("a");
        let _lock = cluster.create().expect("locked");
        cluster.write(&state("a")).expect("written");
        assert_eq!(cluster.read(), Some(state("a")));
        fs::write(cluster.path.join(STATE_FILE), "{\"name\":").expect("torn");
        assert_eq!(cluster.read(), None);
        cluster.remove().expect("removed");
        cluster.remove().expect("removing again is fine");
    }
}
