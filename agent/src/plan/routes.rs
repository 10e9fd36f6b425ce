//! Routes to the pods of other nodes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use cluster_model::Snapshot;
use ipnetwork::IpNetwork;

/// A route of ours in the node's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeRoute {
    /// Pods of another node, by that node's address.
    Pods { range: IpNetwork, node: IpAddr },
    /// This node's own range: an address that no pod has is unreachable here, and is not sent to anyone else.
    Own { range: IpNetwork },
}

impl NodeRoute {
    pub fn range(&self) -> IpNetwork {
        match self {
            NodeRoute::Pods { range, .. } | NodeRoute::Own { range } => *range,
        }
    }
}

/// A change of the table. A route is replaced in place: its range is never without a route meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteChange {
    Replace(NodeRoute),
    Remove(NodeRoute),
}

/// Plans the routes of the node named `here`. When two nodes claim one range, the one whose name comes first has it.
pub fn plan_routes(snapshot: &Snapshot, here: &str) -> BTreeSet<NodeRoute> {
    let mut nodes: Vec<_> = snapshot.nodes().collect();
    nodes.sort_by(|a, b| (&*a.name != here, &a.name).cmp(&(&*b.name != here, &b.name)));
    let mut taken = BTreeSet::new();
    let mut routes = BTreeSet::new();
    for node in nodes {
        for range in node.pod_cidrs.iter().copied() {
            let address = node
                .internal_ips
                .iter()
                .copied()
                .find(|ip| ip.is_ipv4() == range.is_ipv4());
            let route = match address {
                _ if &*node.name == here => NodeRoute::Own { range },
                Some(node) => NodeRoute::Pods { range, node },
                None => continue,
            };
            if taken.insert(range) {
                routes.insert(route);
            }
        }
    }
    routes
}

/// The changes from what the table holds to what it shall hold.
pub fn diff_routes(held: &BTreeSet<NodeRoute>, wished: &BTreeSet<NodeRoute>) -> Vec<RouteChange> {
    let ranges: BTreeSet<IpNetwork> = wished.iter().map(NodeRoute::range).collect();
    let replaced = wished.difference(held).copied().map(RouteChange::Replace);
    // A route whose range has a new one is gone by its replacement, unless it is of the other kind.
    let gone = held.difference(wished).copied().filter(|route| {
        let kind_changes = wished.iter().any(|other| {
            other.range() == route.range()
                && std::mem::discriminant(other) != std::mem::discriminant(route)
        });
        !ranges.contains(&route.range()) || kind_changes
    });
    gone.map(RouteChange::Remove).chain(replaced).collect()
}
