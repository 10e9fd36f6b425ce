//! `keelway down`: takes a cluster away, whatever state it is in.
//!
//! Each step succeeds when there is nothing to do, and the folder that names the cluster goes last, so a `down` that is
//! itself killed is finished by the next one.

use std::path::PathBuf;
use std::time::Duration;

use crate::cgroup::{CgroupError, Hierarchies};
use crate::kubeconfig::{self, KubeconfigError};
use crate::state::{ClusterDir, StateDir, StateError};

/// How long a killed process may take to end; the kernel frees a node's memory and mounts in that time.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum DownError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Kubeconfig(#[from] KubeconfigError),
    #[error("cannot kill node {node}: {source}")]
    Kill {
        node: String,
        source: std::io::Error,
    },
}

/// What `down` found of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    Nothing,
    Cluster { nodes: usize },
}

/// Names of all clusters that left a trace on this machine.
pub fn clusters(state: &StateDir, hierarchies: &Hierarchies) -> Vec<String> {
    let mut names = state.names();
    names.extend(hierarchies.clusters());
    names.sort();
    names.dedup();
    names
}

/// Takes down one cluster. Only one command may work on it at a time.
///
/// # Errors
/// When something of it could not be removed; trying again is safe.
pub fn cluster(
    state: &StateDir,
    hierarchies: &Hierarchies,
    name: &str,
) -> Result<Found, DownError> {
    let dir = state.cluster(name);
    let lock = dir.lock()?;
    let found = lock.is_some() || hierarchies.clusters().iter().any(|cluster| cluster == name);
    let nodes = remove(&dir, hierarchies)?;
    drop(lock);
    state.remove_if_empty();
    Ok(if found {
        Found::Cluster { nodes }
    } else {
        Found::Nothing
    })
}

/// Removes all of a cluster; the caller has its lock. Returns how many nodes were known of.
///
/// # Errors
/// As [`cluster`].
pub fn remove(dir: &ClusterDir, hierarchies: &Hierarchies) -> Result<usize, DownError> {
    let known = dir.read();
    let nodes = known.as_ref().map_or(0, |known| known.nodes.len());
    for node in known.iter().flat_map(|known| &known.nodes) {
        if let Some(init) = node.init {
            init.kill_and_wait(PATIENCE)
                .map_err(|source| DownError::Kill {
                    node: node.name.clone(),
                    source,
                })?;
        }
    }
    // Whatever is left or was never written down: a PID 1 that had just been started, for example.
    hierarchies.kill(&dir.name, PATIENCE)?;
    hierarchies.remove(&dir.name, PATIENCE)?;
    let mut files: Vec<PathBuf> = known
        .and_then(|known| known.kubeconfig)
        .into_iter()
        .collect();
    if let Ok(usual) = kubeconfig::Files::from_environment() {
        files.extend(usual.all().iter().cloned());
    }
    for file in files {
        match kubeconfig::remove_from(&file, &kubeconfig::context_name(&dir.name)) {
            // Not ours to repair, and no reason to leave the cluster.
            Err(KubeconfigError::NotOne { .. }) => {}
            other => other?,
        }
    }
    dir.remove()?;
    Ok(nodes)
}
