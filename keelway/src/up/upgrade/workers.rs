//! Workers: their programs become this build's under pods that go on. A node's PID 1 stays, with it containerd and every container would end.
//!
//! Node by node, images that it lacks are imported, other programs are put where its own are, and the services that run them are ended, for PID 1
//! to start again. Then the agent and the cluster DNS roll out, as any DaemonSet; with the agent comes the CNI plugin.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use super::{LOOK_PERIOD, Upgrade, within};
use crate::config;
use crate::containerd::{self, Containerd, Snapshotter};
use crate::deploy;
use crate::node::{BIN_DIR, NodeSpec, mounts};
use crate::process::{Process, STOP_PATIENCE};
use crate::state::NodeState;
use crate::up::{UpError, workers_of};

/// The service whose new process shows by the node's lease that it works.
const KUBELET: &str = "kubelet";
/// The DaemonSets, with what they are called in a line of progress.
const PARTS: [(&str, &str); 2] = [("keelway-agent", "agent"), ("keelway-dns", "cluster DNS")];

/// Archives of images, and the digest of each image in them.
pub(super) struct Images {
    archives: Vec<(PathBuf, BTreeMap<String, String>)>,
}

impl Images {
    /// Those of a build.
    ///
    /// # Errors
    /// Names where archives were looked for, or one that cannot be read.
    pub(super) fn find(dir: Option<&Path>, program: &Path) -> Result<Self, UpError> {
        let found = config::images(dir, program)?.into_iter();
        let archives = found.map(|archive| {
            let images = containerd::images_in(&archive)?;
            Ok((archive, images))
        });
        let archives: Result<_, UpError> = archives.collect();
        Ok(Images {
            archives: archives?,
        })
    }

    fn builds(&self) -> BTreeMap<String, String> {
        let all = self.archives.iter();
        all.flat_map(|(_, images)| images.clone()).collect()
    }
}

impl Upgrade<'_> {
    /// Gives how many workers were given other programs: those that have this build's stay.
    pub(super) async fn all_workers(&mut self, images: &Images) -> Result<usize, UpError> {
        let mut replaced = 0;
        for node in workers_of(&self.state) {
            let Some(init) = node.init.filter(Process::is_alive) else {
                eprintln!("{} does not run, and stays as it is", node.name);
                continue;
            };
            let (patience, name) = (self.patience, node.name.as_str());
            within(patience, name, self.import(&node, init, images)).await?;
            if node.is_settled() && self.is_of_this_build(&node) {
                continue;
            }
            let step = self.progress.step(format!("{} replaced", node.name));
            let spec = self.describe(&node)?;
            self.note(&node, |known| known.unsettled = true)?;
            within(patience, name, self.replace_programs(&node, init, &spec)).await?;
            self.note(&node, |known| known.unsettled = false)?;
            step.done();
            replaced += 1;
        }
        self.roll_out(images).await?;
        Ok(replaced)
    }

    /// Brings a node the images that it lacks, or has of another build.
    async fn import(
        &self,
        node: &NodeState,
        init: Process,
        images: &Images,
    ) -> Result<(), UpError> {
        let snapshotter = Snapshotter::for_folder(&self.dir.path);
        let containerd = Containerd::of_node(&node.name, init.pid, snapshotter);
        let known = containerd.images().await?;
        let lacks = |(_, of_archive): &&(PathBuf, BTreeMap<String, String>)| {
            of_archive.is_empty()
                || of_archive
                    .iter()
                    .any(|(name, digest)| known.get(name) != Some(digest))
        };
        let missing: Vec<_> = images.archives.iter().filter(lacks).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let step = self.progress.step(format!("images on {}", node.name));
        for (archive, _) in missing {
            containerd.import(archive).await?;
        }
        step.done();
        Ok(())
    }

    /// Puts this build's programs where a node has its own, and has PID 1 run them.
    async fn replace_programs(
        &self,
        node: &NodeState,
        init: Process,
        spec: &NodeSpec,
    ) -> Result<(), UpError> {
        let ours = spec
            .binds
            .iter()
            .filter(|bind| bind.to.starts_with(BIN_DIR));
        let ours: Vec<_> = ours.cloned().collect();
        let bound = tokio::task::spawn_blocking(move || mounts::replace(init.pid, &ours));
        bound.await.map_err(|_| UpError::Panicked)??;
        // The balancer comes before the kubelet, which reaches API servers by it.
        let services = spec.services.iter();
        let services = services.filter(|service| {
            let program = service.argv.first();
            program.is_some_and(|program| Path::new(program).starts_with(BIN_DIR))
        });
        for service in services {
            self.restart(node, init, &service.name).await?;
        }
        self.api.node_ready(&node.name).await;
        Ok(())
    }

    /// Ends the process of a service, and waits for the next one. Of the kubelet also until it has renewed the node's lease.
    async fn restart(&self, node: &NodeState, init: Process, service: &str) -> Result<(), UpError> {
        let before = self.pid_of(node, service);
        if let Some(process) = before.and_then(|pid| self.process_of(init, pid)) {
            let ended = tokio::task::spawn_blocking(move || {
                process.signal_and_wait(Signal::SIGTERM, STOP_PATIENCE)
            });
            let ended = ended.await.map_err(|_| UpError::Panicked)?;
            ended.map_err(|source| UpError::StopService {
                service: service.to_owned(),
                node: node.name.clone(),
                source,
            })?;
        }
        let last = self.api.lease_of_node(&node.name).await;
        loop {
            let runs = self
                .pid_of(node, service)
                .is_some_and(|now| Some(now) != before);
            let works = async {
                service != KUBELET || {
                    let now = self.api.lease_of_node(&node.name).await;
                    now.is_some() && now != last
                }
            };
            if runs && works.await {
                return Ok(());
            }
            tokio::time::sleep(LOOK_PERIOD).await;
        }
    }

    /// The process of a service, as its node numbers it.
    fn pid_of(&self, node: &NodeState, service: &str) -> Option<u32> {
        let mut services = self.dir.services(&node.name).into_iter();
        services.find(|known| known.name == service)?.pid
    }

    /// The process that the node of this PID 1 knows by a number.
    fn process_of(&self, init: Process, number: u32) -> Option<Process> {
        let all = self.machine.hierarchies.pids(&self.state.name).into_iter();
        let mut all = all.filter_map(Process::now);
        all.find(|process| process.number_within(&init) == Some(number))
    }

    /// Has the agent and the DNS become what this build's manifests say, one node after another.
    async fn roll_out(&self, images: &Images) -> Result<(), UpError> {
        let Some(settings) = &self.state.deployed else {
            eprintln!(
                "agent and DNS stay as they are: the build that made this cluster did not write down what they were given"
            );
            return Ok(());
        };
        let settings = deploy::Settings {
            builds: images.builds(),
            ..settings.clone()
        };
        let workers = u32::try_from(workers_of(&self.state).len()).unwrap_or(u32::MAX);
        let patience = self.patience.saturating_mul(workers);
        for object in deploy::objects(&settings)? {
            self.api.apply(&object).await?;
            let kind = object.types.as_ref().map(|types| types.kind.as_str());
            let name = object.metadata.name.as_deref().unwrap_or_default();
            let part = PARTS.iter().find(|(set, _)| *set == name);
            let Some((_, part)) = part.filter(|_| kind == Some("DaemonSet")) else {
                continue;
            };
            if self.api.is_rolled_out(name).await? {
                continue;
            }
            let step = self.progress.step(format!("{part} replaced on every node"));
            let rolled = async {
                self.api.rolled_out(name).await;
                Ok(())
            };
            within(patience, name, rolled).await?;
            step.done();
        }
        Ok(())
    }
}
