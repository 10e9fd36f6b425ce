//! Destinations to which pods keep their own addresses.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
};

use cluster_model::Snapshot;
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

/// The cluster's own ranges, where pods' addresses mean something: those of pods and of the nodes themselves; what is of the link, as
/// ip-masq-agent has it; and what was configured.
pub fn plan_unmasqueraded(
    snapshot: &Snapshot,
    configured: impl IntoIterator<Item = IpNetwork>,
) -> BTreeSet<IpNetwork> {
    let of_nodes = snapshot.nodes().flat_map(|node| {
        let addresses = node.internal_ips.iter().map(|ip| IpNetwork::from(*ip));
        node.pod_cidrs.iter().copied().chain(addresses)
    });
    let of_the_link = [
        Ipv4Network::new(Ipv4Addr::new(169, 254, 0, 0), 16).map(IpNetwork::V4),
        Ipv6Network::new(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10).map(IpNetwork::V6),
    ];
    // A range is the same whatever bits follow its prefix.
    let network =
        |range: IpNetwork| IpNetwork::new(range.network(), range.prefix()).unwrap_or(range);
    of_nodes
        .chain(of_the_link.into_iter().flatten())
        .chain(configured)
        .map(network)
        .collect()
}
