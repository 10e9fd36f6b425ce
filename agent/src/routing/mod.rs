//! The ways to other nodes' pods: routes, the overlay's entries, and the probes that decide between them.
//!
//! A seam for encryption is here: a third way beside direct and overlay would be one more kind of [`NodeRoute`], chosen in
//! [`plan_routes`], and an interface like the overlay's.

mod paths;
mod probe;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use cluster_model::Snapshot;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::event::Event;
use crate::net::{Kernel, NetlinkError, OverlayPeer};
use crate::node::Node;
use crate::plan::{NodeRoute, PathKey, RouteChange, RoutePlan, Routing, diff_routes, plan_routes};

pub use paths::{Answer, Paths, Question, Settings};
use probe::Prober;

/// A way to a node's pods, for people and scripts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PathReport {
    pub node: String,
    pub ipv4: bool,
    pub range: String,
    /// `direct` or `vxlan`.
    pub way: String,
    /// Whether pod addresses have passed both ways without the overlay. Absent where that cannot be asked.
    pub proven: Option<bool>,
    /// Round trip by the way in use; absent while nothing came back.
    pub latency_us: Option<u64>,
    /// Probes without an answer since the last one that had one.
    pub unanswered: u32,
}

/// A table of the ways, for people.
pub fn table(paths: &[PathReport]) -> String {
    let mut text = format!(
        "{:<24} {:<24} {:<7} {:<7} {:>10} {:>10}\n",
        "NODE", "RANGE", "WAY", "PROVEN", "LATENCY", "UNANSWERED"
    );
    for path in paths {
        let proven = match path.proven {
            None => "-",
            Some(true) => "yes",
            Some(false) => "no",
        };
        let latency = path
            .latency_us
            .map_or_else(|| "-".into(), |us| format!("{us} us"));
        text += &format!(
            "{:<24} {:<24} {:<7} {:<7} {:>10} {:>10}\n",
            path.node, path.range, path.way, proven, latency, path.unanswered
        );
    }
    text
}

/// The routes of this node.
pub struct Routes {
    routing: Routing,
    plan: RoutePlan,
    /// The overlay's entries are those of the plan: nothing failed as they were made so.
    peers_known: bool,
    /// Direct routes that the kernel does not take, since the gateway is on no link of ours.
    refused: BTreeSet<IpAddr>,
    prober: Prober,
}

impl Routes {
    pub fn new(routing: Routing, events: Sender<Event>) -> Self {
        Self {
            routing,
            plan: RoutePlan::default(),
            peers_known: false,
            refused: BTreeSet::new(),
            prober: Prober::new(events),
        }
    }

    /// Has the overlay's entries made anew: with the interface, somebody took them down.
    pub fn forget_peers(&mut self) {
        self.peers_known = false;
    }

    /// How many ways there are.
    pub fn count(&self) -> usize {
        self.plan.routes.len()
    }

    /// Brings the node's routes to what the cluster and the probes say. Where that is what it was, the kernel's table is compared only
    /// `again`: for what failed before, and for routes that others took away.
    pub fn settle(
        &mut self,
        snapshot: &Snapshot,
        here: &str,
        node: &Node,
        kernel: &mut Kernel,
        again: bool,
    ) -> Result<(), NetlinkError> {
        let proven = self.prober.proven();
        let plan = plan_routes(snapshot, here, self.routing, &proven);
        if plan == self.plan && !again {
            return Ok(());
        }
        let held = kernel.node_routes(node.overlay.as_ref().map(|link| link.index))?;
        let mut failed = None;
        // What was planned last is held, but for what an earlier agent left, and where that failed.
        let anew = !self.peers_known;
        if let Some(overlay) = &node.overlay {
            failed = self.settle_peers(&plan, overlay.index, anew, kernel).err();
            self.peers_known = failed.is_none();
        }
        for change in diff_routes(&held, &plan.routes) {
            match kernel.apply_route(change, node) {
                Ok(()) => {
                    tracing::debug!(?change, "route");
                    if let RouteChange::Replace(NodeRoute::Pods { node, .. }) = change {
                        self.refused.remove(&node);
                    }
                }
                Err(error) => match change {
                    // On another link, behind a router that knows nothing of pods: the overlay is the way.
                    RouteChange::Replace(NodeRoute::Pods { node, range })
                        if self.routing == Routing::Auto
                            && is_probe(&plan, range)
                            && is_off_link(&error) =>
                    {
                        if self.refused.insert(node) {
                            tracing::info!(%node, "is on no link of this node: its pods are reached by the overlay");
                        }
                    }
                    _ => failed = Some(error),
                },
            }
        }
        if let Some(overlay) = node.overlay.as_ref().filter(|_| anew) {
            // Not sooner: routes led by them until now.
            let wished = plan.peers.values().flatten().copied().collect();
            let kept = kernel.keep_overlay_gateways(overlay.index, &wished);
            failed = failed.or(kept.err());
        }
        let mut probed = plan.probed.clone();
        for one in probed.values_mut() {
            // Probes would go by the overlay, and prove nothing.
            one.node = one.node.filter(|node| !self.refused.contains(node));
        }
        self.prober.follow(&probed, &node.uplink.link.name);
        self.plan = plan;
        failed.map_or(Ok(()), Err)
    }

    fn settle_peers(
        &self,
        plan: &RoutePlan,
        overlay: u32,
        anew: bool,
        kernel: &mut Kernel,
    ) -> Result<(), NetlinkError> {
        let held = if anew {
            kernel.overlay_peers(overlay)?
        } else {
            self.plan.peers.keys().copied().collect()
        };
        let none = BTreeSet::new();
        for underlay in &held {
            let had = self.plan.peers.get(underlay).unwrap_or(&none);
            match plan.peers.get(underlay) {
                None => kernel.remove_overlay_peer(overlay, Some(*underlay), had)?,
                Some(now) => {
                    let gone: BTreeSet<IpAddr> = had.difference(now).copied().collect();
                    kernel.remove_overlay_peer(overlay, None, &gone)?;
                }
            }
        }
        for (underlay, gateways) in &plan.peers {
            if anew || self.plan.peers.get(underlay) != Some(gateways) {
                let peer = OverlayPeer {
                    underlay: *underlay,
                    gateways: gateways.clone(),
                };
                kernel.set_overlay_peer(overlay, &peer)?;
            }
        }
        Ok(())
    }

    /// The ways to every node, as they are now.
    pub fn report(&self) -> Vec<PathReport> {
        let measured = self.prober.measured();
        let row = |(key, route): (&PathKey, &NodeRoute)| {
            let path = measured.get(key);
            PathReport {
                node: key.node.to_string(),
                ipv4: key.ipv4,
                range: route.range().to_string(),
                way: match route {
                    NodeRoute::Overlay { .. } => "vxlan".into(),
                    _ => "direct".into(),
                },
                proven: self
                    .plan
                    .probed
                    .get(key)
                    .and_then(|probed| probed.node)
                    .map(|_| path.is_some_and(|path| path.proven)),
                latency_us: path.and_then(|path| path.latency_us),
                unanswered: path.map_or(0, |path| path.unanswered),
            }
        };
        self.plan.paths.iter().map(row).collect()
    }

    /// Nodes that cannot be reached, in words.
    pub fn problems(&self) -> BTreeMap<Arc<str>, &'static str> {
        self.plan.unreachable.clone()
    }
}

fn is_probe(plan: &RoutePlan, range: ipnetwork::IpNetwork) -> bool {
    plan.probed
        .values()
        .any(|probed| ipnetwork::IpNetwork::from(probed.there.probe) == range)
}

fn is_off_link(error: &NetlinkError) -> bool {
    matches!(
        error.errno(),
        Some(Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EINVAL)
    )
}
