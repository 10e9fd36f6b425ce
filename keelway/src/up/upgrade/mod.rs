//! `keelway upgrade`: a running cluster becomes this build's: its control planes, one after another, then its workers.
//!
//! Before a node is worked on, it is written down that it is unsettled, and when it goes on by itself, that it is no more. A command that is
//! killed takes the PID 1 with it that it has started, but not at once: whether one runs says nothing of whether it stays.

mod control_planes;
mod workers;

use std::fs;
use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use self::workers::Images;
use super::{UpError, failure, is_control_plane, workers_of};
use crate::api::ClusterApi;
use crate::checks::Machine;
use crate::config::{self, Binaries, ClusterName};
use crate::node::{BIN_DIR, NodeSpec};
use crate::progress::Progress;
use crate::state::{ClusterDir, ClusterState, NodeState, StateDir};
use crate::status::kubeconfig_of;

/// How often it is looked for what nothing tells of.
const LOOK_PERIOD: Duration = Duration::from_millis(200);

/// The flags of `keelway upgrade`.
#[derive(Debug, Clone, clap::Args)]
pub struct UpgradeFlags {
    /// Name of the cluster
    #[arg(long, default_value = "default")]
    name: ClusterName,
    /// What is replaced; everything when left out
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Folder with keelway-controlplane and keelway-kubelet [default: that of this program]
    #[arg(long, value_name = "DIR", env = "KEELWAY_BIN_DIR")]
    bin_dir: Option<PathBuf>,
    /// Folder with the images' archives
    #[arg(long, value_name = "DIR", env = "KEELWAY_IMAGES_DIR")]
    image_dir: Option<PathBuf>,
    /// Seconds that each node has to come back
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

/// A part of a cluster that is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    ControlPlanes,
    Workers,
}

/// Makes a cluster this build's.
///
/// # Errors
/// Names the node that did not come back; the others run, and trying again goes on where this ended.
pub async fn run(
    flags: &UpgradeFlags,
    machine: &Machine,
    state_dir: &StateDir,
    program: &Path,
) -> Result<(), UpError> {
    let name = flags.name.as_ref();
    let dir = state_dir.cluster(name);
    let _lock = dir.lock()?.ok_or_else(|| UpError::NotUp(name.into()))?;
    let state = dir.read().filter(|state| state.complete);
    let state = state.ok_or_else(|| UpError::NotUp(name.into()))?;
    let admin = kubeconfig_of(&dir).ok_or_else(|| UpError::NotUp(name.into()))?;
    let images = match flags.only {
        Some(Part::ControlPlanes) => None,
        Some(Part::Workers) | None => Some(Images::find(flags.image_dir.as_deref(), program)?),
    };
    let mut upgrade = Upgrade {
        binaries: config::binaries(flags.bin_dir.as_deref(), program)?,
        api: ClusterApi::new(&admin).await?,
        progress: Progress::default(),
        patience: Duration::from_secs(flags.timeout),
        dir,
        state,
        machine,
    };
    let outcome = tokio::select! {
        outcome = upgrade.all(flags.only, images.as_ref()) => outcome,
        _ = tokio::signal::ctrl_c() => Err(UpError::Interrupted),
    };
    let replaced = match outcome {
        Err(error) => {
            failure::explain(&upgrade.dir).await;
            return Err(error);
        }
        Ok(replaced) => replaced,
    };
    println!(
        "{replaced} of cluster {name} were replaced, in {:.2} s.",
        upgrade.progress.elapsed().as_secs_f64()
    );
    Ok(())
}

struct Upgrade<'a> {
    binaries: Binaries,
    api: ClusterApi,
    progress: Progress,
    /// How long one node may take.
    patience: Duration,
    dir: ClusterDir,
    state: ClusterState,
    machine: &'a Machine,
}

impl Upgrade<'_> {
    /// Gives what was replaced, in words.
    async fn all(
        &mut self,
        only: Option<Part>,
        images: Option<&Images>,
    ) -> Result<String, UpError> {
        let control_planes = self.control_planes();
        if only != Some(Part::Workers) && control_planes.len() < 2 {
            return Err(UpError::OnlyOne(self.state.name.clone()));
        }
        if !control_planes.iter().any(NodeState::is_running) {
            return Err(UpError::NotRunning(self.state.name.clone()));
        }
        let mut said = Vec::new();
        if only != Some(Part::Workers) {
            let replaced = self.all_control_planes().await?;
            said.push(format!(
                "{replaced} of {} control planes",
                control_planes.len()
            ));
        }
        if let Some(images) = images {
            let replaced = self.all_workers(images).await?;
            let all = workers_of(&self.state).len();
            said.push(format!("{replaced} of {all} workers"));
        }
        Ok(said.join(" and "))
    }

    fn control_planes(&self) -> Vec<NodeState> {
        let nodes = self.state.nodes.iter();
        let found = nodes.filter(|node| is_control_plane(node));
        found.cloned().collect()
    }

    /// Whether a node that runs has the programs that it would get. It sees them as bound files, which stay what they are when a build
    /// puts others in their place.
    fn is_of_this_build(&self, node: &NodeState) -> bool {
        let file = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
        let Some(init) = node.init else { return false };
        let root = PathBuf::from(format!("/proc/{}/root", init.pid));
        let bin = root.join(BIN_DIR.trim_start_matches('/'));
        self.programs(node).into_iter().all(|(name, new)| {
            let now = file(&bin.join(name));
            now.is_some() && now == file(new)
        })
    }

    /// The programs of a node.
    fn programs(&self, node: &NodeState) -> [(&'static str, &Path); 2] {
        let own = match node.control_plane {
            true => ("keelway-controlplane", self.binaries.controlplane.as_path()),
            false => ("keelway-kubelet", self.binaries.kubelet.as_path()),
        };
        [("keelway", &self.binaries.keelway), own]
    }

    /// Writes down how it is with a node.
    fn note(&mut self, node: &NodeState, note: impl Fn(&mut NodeState)) -> Result<(), UpError> {
        let nodes = self.state.nodes.iter_mut();
        nodes.filter(|known| known.name == node.name).for_each(note);
        Ok(self.dir.write(&self.state)?)
    }

    /// The description of a node, with the programs of this build. What else it says stays.
    fn describe(&self, node: &NodeState) -> Result<NodeSpec, UpError> {
        let path = self.dir.node(&node.name).join("node.json");
        let failed = |source| UpError::Write {
            path: path.clone(),
            source,
        };
        let text = fs::read(&path).map_err(failed)?;
        let mut spec: NodeSpec =
            serde_json::from_slice(&text).map_err(|error| failed(error.into()))?;
        for (name, new) in self.programs(node) {
            let to = Path::new(BIN_DIR).join(name);
            for bind in spec.binds.iter_mut().filter(|bind| bind.to == to) {
                bind.from = new.to_owned();
            }
        }
        let next = path.with_extension("next.json");
        let text = serde_json::to_vec_pretty(&spec).map_err(|error| failed(error.into()))?;
        fs::write(&next, text).map_err(failed)?;
        fs::rename(&next, &path).map_err(failed)?;
        Ok(spec)
    }
}

/// Gives a task of a node, or of a part of the cluster, its time.
async fn within<T>(
    patience: Duration,
    node: &str,
    task: impl Future<Output = Result<T, UpError>>,
) -> Result<T, UpError> {
    let late = |_| UpError::NotBack {
        node: node.to_owned(),
        patience,
    };
    tokio::time::timeout(patience, task).await.map_err(late)?
}
