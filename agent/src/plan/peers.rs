//! Where addresses on other nodes are, in the overlay.

use cluster_model::{Node, Snapshot};
use ipnetwork::IpNetwork;

use crate::dataplane::Peers;
use crate::net::overlay_mac;

/// The ranges of all nodes but the one named `here`, and their own addresses, with the hardware address of the overlay's end there. None
/// of nodes that the overlay does not reach. What two nodes claim is the first one's by name, as with routes.
pub fn plan_peers(snapshot: &Snapshot, here: &str) -> Peers {
    let Some(own) = snapshot.node(here) else {
        return Peers::new();
    };
    let Some(is_v4) = own.internal_ips.first().map(|ip| ip.is_ipv4()) else {
        return Peers::new();
    };
    let mut others: Vec<&Node> = snapshot
        .nodes()
        .map(|node| &**node)
        .filter(|node| &*node.name != here)
        .collect();
    others.sort_by(|a, b| a.name.cmp(&b.name));
    let mut peers = Peers::new();
    for node in others {
        let mut like = node.internal_ips.iter();
        let Some(underlay) = like.find(|ip| ip.is_ipv4() == is_v4) else {
            continue;
        };
        let addresses = node.internal_ips.iter().map(|ip| IpNetwork::from(*ip));
        let ranges = node.pod_cidrs.iter().copied().chain(addresses);
        for range in ranges.filter(|range| !own.pod_cidrs.contains(range)) {
            // A range is the same whatever bits follow its prefix.
            let range = IpNetwork::new(range.network(), range.prefix()).unwrap_or(range);
            peers.entry(range).or_insert_with(|| overlay_mac(*underlay));
        }
    }
    peers
}
