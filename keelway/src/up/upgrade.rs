//! `keelway upgrade`: the control planes of a running cluster are replaced by this build, one after another, while the others serve.
//!
//! Each takes leave of its clients, gives back what it leads, ends with its member of etcd, and comes back as another process on the same
//! state. The next one goes when enough of the others serve to do without it. The socket of 127.0.0.1 that all of them accept from is
//! handed on: no connection to it is refused.
//!
//! Before a control plane is ended, it is written down that it is unsettled, and when its new PID 1 goes on by itself, that it is no more.
//! A command that is killed takes the PID 1 with it that it has started, but not at once: whether one runs says nothing of whether it stays.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::Endpoints;
use kube::Api;
use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt};

use super::{API, IMAGES, NETWORK, SWITCH, UpError, converge, failure, is_control_plane};
use crate::api::ClusterApi;
use crate::checks::Machine;
use crate::config::{self, Binaries, ClusterName};
use crate::etcd;
use crate::family::IpFamily;
use crate::machine::balancer;
use crate::network;
use crate::node::launch::Nodes;
use crate::node::{BIN_DIR, NodeSpec, ServiceStatus};
use crate::process::STOP_PATIENCE;
use crate::progress::Progress;
use crate::state::{ClusterDir, ClusterState, NodeState, StateDir};
use crate::status::kubeconfig_of;
use crate::sys;

/// How often it is asked whom the cluster leads clients to.
const LOOK_PERIOD: Duration = Duration::from_millis(200);
/// A server that has lost its store may never answer.
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
/// How long clients are led to a server that took no leave: until its lease ends, and another server has seen that.
const LED_TO_MAX: Duration = Duration::from_secs(20);
/// PID 1 keeps the listening socket as its standard output.
const LISTENER: i32 = 1;

/// The flags of `keelway upgrade`.
#[derive(Debug, Clone, clap::Args)]
pub struct UpgradeFlags {
    /// Name of the cluster
    #[arg(long, default_value = "default")]
    name: ClusterName,
    /// Folder with keelway-controlplane [default: that of this program]
    #[arg(long, value_name = "DIR", env = "KEELWAY_BIN_DIR")]
    bin_dir: Option<PathBuf>,
    /// Seconds that each control plane has to come back
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

/// Replaces the control planes of a cluster.
///
/// # Errors
/// Names the control plane that did not come back; the others run, and trying again goes on where this ended.
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
        outcome = upgrade.all() => outcome,
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
        "{replaced} of {} control planes of cluster {name} were replaced, in {:.2} s.",
        upgrade.control_planes().len(),
        upgrade.progress.elapsed().as_secs_f64()
    );
    Ok(())
}

struct Upgrade<'a> {
    binaries: Binaries,
    api: ClusterApi,
    progress: Progress,
    /// How long one control plane may take.
    patience: Duration,
    dir: ClusterDir,
    state: ClusterState,
    machine: &'a Machine,
}

impl Upgrade<'_> {
    fn control_planes(&self) -> Vec<NodeState> {
        let nodes = self.state.nodes.iter();
        let found = nodes.filter(|node| is_control_plane(node));
        found.cloned().collect()
    }

    /// Gives how many were replaced: those of this build stay.
    async fn all(&mut self) -> Result<usize, UpError> {
        let mut all = self.control_planes();
        if all.len() < 2 {
            return Err(UpError::OnlyOne(self.state.name.clone()));
        }
        if !all.iter().any(NodeState::is_running) {
            return Err(UpError::NotRunning(self.state.name.clone()));
        }
        // One that is down, or that an attempt which was cut off has left, comes first: it costs nobody anything, and the others need it.
        all.sort_by_key(NodeState::is_settled);
        let mut replaced = 0;
        for node in all {
            if node.is_settled() && self.is_of_this_build(&node) {
                continue;
            }
            if node.is_settled() {
                self.await_spare(&node).await?;
            }
            let step = self.progress.step(format!("{} replaced", node.name));
            let limit = tokio::time::timeout(self.patience, self.replace(&node));
            match limit.await {
                Ok(outcome) => outcome?,
                Err(_) => {
                    return Err(UpError::NotBack {
                        node: node.name,
                        patience: self.patience,
                    });
                }
            }
            step.done();
            replaced += 1;
        }
        Ok(replaced)
    }

    /// Whether a node that runs has the programs that it would get. It sees them as bound files, which stay what they are when a build
    /// puts others in their place.
    fn is_of_this_build(&self, node: &NodeState) -> bool {
        let file = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
        let Some(init) = node.init else { return false };
        let root = PathBuf::from(format!("/proc/{}/root", init.pid));
        let bin = root.join(BIN_DIR.trim_start_matches('/'));
        self.programs().into_iter().all(|(name, new)| {
            let now = file(&bin.join(name));
            now.is_some() && now == file(new)
        })
    }

    /// The programs of a control plane's node.
    fn programs(&self) -> [(&'static str, &Path); 2] {
        [
            ("keelway", &self.binaries.keelway),
            ("keelway-controlplane", &self.binaries.controlplane),
        ]
    }

    /// Waits until enough other control planes serve for the cluster to go on without this one.
    async fn await_spare(&self, node: &NodeState) -> Result<(), UpError> {
        let all = self.control_planes();
        let needed = needed_beside(all.len());
        let others: Vec<NodeState> = all.into_iter().filter(|o| o.name != node.name).collect();
        let mut serving = Vec::new();
        let enough = self.await_served(|served| {
            let serves = |other: &&NodeState| {
                served.contains(&other.address) && other.is_settled() && self.has_its_store(other)
            };
            let names = others.iter().filter(serves).map(|other| other.name.clone());
            serving = names.collect();
            serving.len() >= needed
        });
        match tokio::time::timeout(self.patience, enough).await {
            Ok(()) => Ok(()),
            Err(_) => Err(UpError::Needed {
                node: node.name.clone(),
                serving: match serving.is_empty() {
                    true => "none".to_owned(),
                    false => serving.join(", "),
                },
                needed,
            }),
        }
    }

    /// Whether a control plane's member of the store runs: its server answers by those of others, too.
    fn has_its_store(&self, node: &NodeState) -> bool {
        let text = fs::read(self.dir.node(&node.name).join("services.json"));
        let services: Option<Vec<ServiceStatus>> = text
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok());
        let mut services = services.into_iter().flatten();
        services.all(|service| service.name != etcd::SERVICE || service.pid.is_some())
    }

    /// Ends what runs of a control plane, by whichever command it was started.
    async fn end(&self, node: &NodeState) -> Result<(), UpError> {
        let (hierarchies, init) = (self.machine.hierarchies.clone(), node.init);
        let (cluster, name) = (self.state.name.clone(), node.name.clone());
        let ended = tokio::task::spawn_blocking(move || {
            match init.map(|init| init.signal_and_wait(Signal::SIGTERM, STOP_PATIENCE)) {
                // It has had its time, and is ended with the rest.
                Some(Err(error)) if error.kind() == io::ErrorKind::TimedOut => {}
                Some(Err(source)) => return Err(UpError::Stop { node: name, source }),
                Some(Ok(())) | None => {}
            }
            // A command that was killed may have started a PID 1 and not written it down.
            hierarchies.kill_node(&cluster, &name, STOP_PATIENCE)?;
            Ok(())
        });
        ended.await.map_err(|_| UpError::Panicked)?
    }

    /// Writes down how it is with a node.
    fn note(&mut self, node: &NodeState, note: impl Fn(&mut NodeState)) -> Result<(), UpError> {
        let nodes = self.state.nodes.iter_mut();
        nodes.filter(|known| known.name == node.name).for_each(note);
        Ok(self.dir.write(&self.state)?)
    }

    /// Ends a control plane, if it runs, and starts it again from this build.
    async fn replace(&mut self, node: &NodeState) -> Result<(), UpError> {
        let listener = self.listener()?;
        self.note(node, |known| known.unsettled = true)?;
        self.end(node).await?;
        // What is waited for below is the new one. Where the others have no quorum now, nobody is led anywhere.
        let all = self.control_planes();
        if all.iter().filter(|other| other.is_settled()).count() * 2 > all.len() {
            let left = self.await_served(|served| !served.contains(&node.address));
            let _ = tokio::time::timeout(LED_TO_MAX, left).await;
        }
        let spec = self.describe(node)?;
        self.machine
            .hierarchies
            .create(&self.state.name, &node.name)?;
        let mut nodes = Nodes::default();
        let file = spec.dir.join("node.json");
        nodes.start(&self.binaries.keelway, &spec, &file, Some(listener))?;
        let init = nodes.wait(|board| board.init(&node.name)).await?;
        self.note(node, |known| known.init = Some(init))?;
        self.connect(node, init.pid).await?;
        nodes
            .wait(|board| board.is_booted(&node.name).then_some(()))
            .await?;
        for happened in [NETWORK, API, IMAGES] {
            nodes.tell(happened).await?;
        }
        let has_etcd = spec.services.iter().any(|s| s.name == etcd::SERVICE);
        let serves = async {
            if has_etcd {
                nodes
                    .wait(|board| board.is_ready(&node.name, etcd::SERVICE).then_some(()))
                    .await?;
            }
            self.await_served(|served| served.contains(&node.address))
                .await;
            Ok::<_, UpError>(())
        };
        nodes.while_well(serves).await?;
        converge::route_pods(&self.api, &self.state.nodes, init.pid).await?;
        nodes.detach().await?;
        self.note(node, |known| known.unsettled = false)
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
        for (name, new) in self.programs() {
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

    /// A copy of the socket that all control planes accept from, by one that runs.
    fn listener(&self) -> Result<OwnedFd, UpError> {
        let failed = |source| UpError::Listen {
            port: self.state.api_port,
            source,
        };
        let copy = |node: &NodeState| {
            let process = sys::pidfd_open(node.init?.pid).ok()?;
            let copy = sys::pidfd_getfd(&process, LISTENER).ok()?;
            let listens = getsockopt(&copy, sockopt::AcceptConn);
            listens.is_ok_and(|listens| listens).then_some(copy)
        };
        // One that is about to end may have let go of it.
        let all = self.control_planes();
        let mut copies = all.iter().filter(|node| node.is_running()).filter_map(copy);
        let none = || io::Error::other("no control plane's PID 1 has the socket");
        copies.next().ok_or_else(|| failed(none()))
    }

    async fn connect(&self, node: &NodeState, pid: u32) -> Result<(), UpError> {
        let nodes = &self.state.nodes;
        let switch = nodes.iter().find(|node| node.name == SWITCH);
        let switch = switch.and_then(|node| Some(node.init?.pid));
        let switch = switch.ok_or_else(|| UpError::NotRunning(self.state.name.clone()))?;
        let all = self.control_planes();
        let at = all.iter().position(|other| other.name == node.name);
        let number = at.and_then(|at| u8::try_from(at + 1).ok()).unwrap_or(1);
        let addresses = node.addresses();
        let family = IpFamily::of(&addresses);
        tokio::task::spawn_blocking(move || {
            network::attach(switch, number, (pid, &addresses), &family.pods())
        })
        .await
        .map_err(|_| UpError::Panicked)??;
        Ok(())
    }

    /// Waits until the addresses that the cluster leads clients to are as they should be. While a request is not answered, nothing is known.
    async fn await_served(&self, mut wanted: impl FnMut(&[IpAddr]) -> bool) {
        let endpoints: Api<Endpoints> = Api::namespaced(self.api.client(), "default");
        loop {
            let asked = tokio::time::timeout(REQUEST_PATIENCE, endpoints.get("kubernetes"));
            if let Ok(Ok(found)) = asked.await {
                let served = balancer::addresses(&found);
                let served: Vec<IpAddr> = served.iter().map(SocketAddr::ip).collect();
                if wanted(&served) {
                    return;
                }
            }
            tokio::time::sleep(LOOK_PERIOD).await;
        }
    }
}

/// How many others have to serve before one of `all` control planes is taken: with them the store has its quorum. Of two, the other one has
/// none, but is what there is.
fn needed_beside(all: usize) -> usize {
    let quorum = all / 2 + 1;
    quorum.min(all.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_plane_is_spared_when_the_others_are_a_quorum() {
        for (all, needed) in [(2, 1), (3, 2), (4, 3), (5, 3)] {
            assert_eq!(needed_beside(all), needed, "of {all}");
        }
    }
}
