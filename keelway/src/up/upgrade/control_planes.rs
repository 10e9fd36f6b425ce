//! Control planes are replaced one after another, while the others serve.
//!
//! Each takes leave of its clients, gives back what it leads, ends with its member of etcd, and comes back as another process on the same
//! state. The next one goes when enough of the others serve to do without it. The socket of 127.0.0.1 that all of them accept from is
//! handed on: no connection to it is refused.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use k8s_openapi::api::core::v1::Endpoints;
use kube::Api;
use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt};

use super::{LOOK_PERIOD, Upgrade, within};
use crate::etcd;
use crate::family::IpFamily;
use crate::machine::balancer;
use crate::network;
use crate::node::launch::Nodes;
use crate::process::STOP_PATIENCE;
use crate::state::NodeState;
use crate::sys;
use crate::up::{API, IMAGES, NETWORK, SWITCH, UpError, converge};

/// A server that has lost its store may never answer.
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
/// How long clients are led to a server that took no leave: until its lease ends, and another server has seen that.
const LED_TO_MAX: Duration = Duration::from_secs(20);
/// PID 1 keeps the listening socket as its standard output.
const LISTENER: i32 = 1;

impl Upgrade<'_> {
    /// Gives how many were replaced: those of this build stay.
    pub(super) async fn all_control_planes(&mut self) -> Result<usize, UpError> {
        let mut all = self.control_planes();
        // One that is down, or that an attempt which was cut off has left, comes first: it costs nobody anything, and the others need it.
        all.sort_by_key(|node| node.is_settled() && self.has_its_store(node));
        let mut replaced = 0;
        for node in all {
            if node.is_settled() && self.is_of_this_build(&node) {
                continue;
            }
            if node.is_settled() {
                self.await_spare(&node).await?;
            }
            let step = self.progress.step(format!("{} replaced", node.name));
            within(self.patience, &node.name, self.replace(&node)).await?;
            step.done();
            replaced += 1;
        }
        Ok(replaced)
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

    /// Whether a control plane's member of the store is one of its quorum: its server answers by those of others, too.
    fn has_its_store(&self, node: &NodeState) -> bool {
        let services = self.dir.services(&node.name);
        services.iter().all(|service| {
            // A PID 1 of before does not say what is ready.
            service.name != etcd::SERVICE || service.pid.is_some() && service.ready != Some(false)
        })
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
