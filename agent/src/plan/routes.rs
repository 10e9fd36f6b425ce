//! Routes to the pods of other nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cluster_model::{Node, Snapshot};
use ipnetwork::IpNetwork;

use crate::addresses::Reserved;
use crate::net::overlay_link_local;

/// How nodes are to reach each other's pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Routing {
    /// By the overlay until a probe has shown that the network carries pod addresses, directly from then on. For each pair of nodes.
    #[default]
    Auto,
    /// Directly always: the network between the nodes carries pod addresses.
    Direct,
    /// By the overlay always.
    Vxlan,
}

/// The way to a node's pods of one family.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathKey {
    pub node: Arc<str>,
    pub ipv4: bool,
}

/// A route of ours in the node's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeRoute {
    /// Pods of another node, by that node's address.
    Pods { range: IpNetwork, node: IpAddr },
    /// Pods of another node, through the overlay: by an address of its pod range, or of its end of the overlay (IPv6).
    Overlay { range: IpNetwork, gateway: IpAddr },
    /// This node's own range: an address that no pod has is unreachable here, and is not sent to anyone else.
    Own { range: IpNetwork },
}

impl NodeRoute {
    pub fn range(&self) -> IpNetwork {
        match self {
            NodeRoute::Pods { range, .. }
            | NodeRoute::Overlay { range, .. }
            | NodeRoute::Own { range } => *range,
        }
    }
}

/// A change of the table. A route is replaced in place: its range is never without a route meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteChange {
    Replace(NodeRoute),
    Remove(NodeRoute),
}

/// A way that can be probed: this node's and the other one's addresses in their pod ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probed {
    pub here: Reserved,
    pub there: Reserved,
    /// The other node's own address, when the way can be direct.
    pub node: Option<IpAddr>,
}

/// All that this node shall know of the ways to others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoutePlan {
    pub routes: BTreeSet<NodeRoute>,
    /// The nodes of the overlay, by their underlay address, with the addresses that routes to them lead by.
    pub peers: BTreeMap<IpAddr, BTreeSet<IpAddr>>,
    pub probed: BTreeMap<PathKey, Probed>,
    /// What each range's route is for.
    pub paths: BTreeMap<PathKey, NodeRoute>,
    /// Nodes that cannot be reached, and why.
    pub unreachable: BTreeMap<Arc<str>, &'static str>,
}

/// Plans the routes of the node named `here`. `proven` are the ways on which pod addresses have passed. When two nodes claim one range,
/// the one whose name comes first has it.
pub fn plan_routes(
    snapshot: &Snapshot,
    here: &str,
    routing: Routing,
    proven: &BTreeSet<PathKey>,
) -> RoutePlan {
    let mut nodes: Vec<&Arc<Node>> = snapshot.nodes().collect();
    nodes.sort_by(|a, b| (&*a.name != here, &a.name).cmp(&(&*b.name != here, &b.name)));
    let mut plan = RoutePlan::default();
    let Some(own) = nodes.first().filter(|node| &*node.name == here) else {
        return plan;
    };
    let underlay = own.internal_ips.first().copied();
    let like = |node: &Node, ipv4: bool| {
        node.internal_ips
            .iter()
            .copied()
            .find(|ip| ip.is_ipv4() == ipv4)
    };
    let reserved = |node: &Node, ipv4: bool| {
        node.pod_cidrs
            .iter()
            .find(|range| range.is_ipv4() == ipv4)
            .and_then(|range| Reserved::of(*range))
    };
    let mut taken = BTreeSet::new();
    for node in &nodes {
        let mut claimed = Vec::new();
        for range in node.pod_cidrs.iter().copied() {
            if taken.insert(range) {
                claimed.push(range);
            } else {
                plan.unreachable
                    .insert(Arc::clone(&node.name), "another node has its pod range");
            }
        }
        for range in claimed {
            let ipv4 = range.is_ipv4();
            if &*node.name == here {
                plan.routes.insert(NodeRoute::Own { range });
                continue;
            }
            let key = PathKey {
                node: Arc::clone(&node.name),
                ipv4,
            };
            // A node of the family that this one lacks has no direct way, but the overlay carries both.
            let direct = like(node, ipv4).filter(|_| like(own, ipv4).is_some());
            let peer = underlay
                .and_then(|underlay| like(node, underlay.is_ipv4()))
                .filter(|_| routing != Routing::Direct);
            let gateway = match peer.filter(|_| !ipv4) {
                Some(peer) => overlay_link_local(peer).into(),
                None => Reserved::of(range).map_or(range.ip(), |own| own.host),
            };
            let by_direct = direct.filter(|_| match routing {
                Routing::Direct => true,
                Routing::Vxlan => false,
                Routing::Auto => proven.contains(&key) || peer.is_none(),
            });
            if let Some(peer) = peer {
                plan.peers.entry(peer).or_default().insert(gateway);
            }
            let route = match (by_direct, peer) {
                (Some(node), _) => NodeRoute::Pods { range, node },
                (None, Some(_)) => NodeRoute::Overlay { range, gateway },
                (None, None) => {
                    plan.unreachable.insert(
                        Arc::clone(&node.name),
                        "it has no address of a family that this node has",
                    );
                    continue;
                }
            };
            plan.routes.insert(route);
            plan.paths.entry(key.clone()).or_insert(route);
            if let (Some(here), Some(there)) = (reserved(own, ipv4), reserved(node, ipv4)) {
                plan.probed.entry(key).or_insert(Probed {
                    here,
                    there,
                    node: direct.filter(|_| routing == Routing::Auto),
                });
            }
        }
    }
    // What probes go by is direct always, whatever pods go by.
    for probed in plan.probed.values() {
        if let Some(node) = probed.node {
            plan.routes.insert(NodeRoute::Pods {
                range: probed.there.probe.into(),
                node,
            });
        }
    }
    plan
}

/// The changes from what the table holds to what it shall hold.
pub fn diff_routes(held: &BTreeSet<NodeRoute>, wished: &BTreeSet<NodeRoute>) -> Vec<RouteChange> {
    let kinds: BTreeMap<IpNetwork, bool> = wished
        .iter()
        .map(|route| (route.range(), matches!(route, NodeRoute::Own { .. })))
        .collect();
    let replaced = wished.difference(held).copied().map(RouteChange::Replace);
    // A route whose range has a new one is gone by its replacement, unless one of them closes the range.
    let gone = held.difference(wished).copied().filter(|route| {
        kinds
            .get(&route.range())
            .is_none_or(|own| *own != matches!(route, NodeRoute::Own { .. }))
    });
    gone.map(RouteChange::Remove).chain(replaced).collect()
}
