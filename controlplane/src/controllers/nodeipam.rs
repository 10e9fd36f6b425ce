//! Node addresses: gives every node its own ranges of pod addresses out of the cluster's, one of each family.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::Node;
use serde_json::json;

use super::Error;
use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Note, Plan, View};
use super::snapshot::{Change, Snapshot};

const REPORTER: &str = "cidrAllocator";
/// Prefix length of a node's part, as upstream's defaults.
const PART_PREFIX_V4: u8 = 24;
const PART_PREFIX_V6: u8 = 64;
/// A pool has at most this many parts, as a power of two: upstream's bound.
const PART_BITS_MAX: u8 = 16;

pub const CONTROLLER: Controller = Controller {
    name: "node-ipam",
    affected,
    plan,
};

/// All nodes are planned together, under one key: two nodes planned apart could be given the same range.
fn everyone() -> Key {
    Key::cluster("nodes")
}

fn affected(_: &Snapshot, change: &Change, keys: &mut Keys) {
    let ranges = |object: &Option<Object>| match object {
        Some(Object::Node(node)) => Some(ranges_of(node)),
        _ => None,
    };
    if matches!(change.object(), Object::Node(_)) && ranges(&change.old) != ranges(&change.new) {
        keys.insert(everyone());
    }
    // A node that has none yet, for instance because there was none left, is looked at again with every node change.
    if matches!(&change.new, Some(Object::Node(node)) if ranges_of(node).is_empty()) {
        keys.insert(everyone());
    }
}

fn ranges_of(node: &Node) -> Vec<String> {
    let spec = node.spec.as_ref();
    match spec
        .and_then(|spec| spec.pod_cidrs.clone())
        .filter(|ranges| !ranges.is_empty())
    {
        Some(ranges) => ranges,
        None => spec
            .and_then(|spec| spec.pod_cidr.clone())
            .filter(|range| !range.is_empty())
            .into_iter()
            .collect(),
    }
}

/// A range of pod addresses, and how long the prefix of one node's part of it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    range: IpNetwork,
    part_prefix: u8,
}

impl Pool {
    /// # Errors
    /// When there is no room for one node, or for more than anyone will ever have.
    pub fn new(range: IpNetwork) -> Result<Self, Error> {
        let part_prefix = if range.is_ipv4() {
            PART_PREFIX_V4
        } else {
            PART_PREFIX_V6
        };
        match part_prefix.checked_sub(range.prefix()) {
            None => Err(Error::ClusterCidr(range, part_prefix)),
            Some(bits) if bits > PART_BITS_MAX => Err(Error::ClusterCidrSize(range, PART_BITS_MAX)),
            Some(_) => Ok(Self { range, part_prefix }),
        }
    }

    fn address_bits(&self) -> u32 {
        if self.range.is_ipv4() { 32 } else { 128 }
    }

    /// Addresses of one part.
    fn step(&self) -> u128 {
        1 << (self.address_bits() - u32::from(self.part_prefix))
    }

    /// First addresses of the pool's parts, in order.
    fn parts(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let (first, step, v4) = (
            number(self.range.network()),
            self.step(),
            self.range.is_ipv4(),
        );
        let count = 1_u128 << (self.part_prefix - self.range.prefix());
        (0..count).map(move |part| address(first + part * step, v4))
    }

    /// The pool's parts that a range covers or lies in.
    fn parts_of(&self, range: IpNetwork) -> Vec<IpAddr> {
        let covers = |outer: IpNetwork, inner: IpNetwork| {
            outer.is_ipv4() == inner.is_ipv4() && outer.contains(inner.network())
        };
        if covers(self.range, range) && range.prefix() >= self.part_prefix {
            let first = number(range.network()) & !(self.step() - 1);
            return vec![address(first, range.is_ipv4())];
        }
        if !covers(self.range, range) && !covers(range, self.range) {
            return Vec::new();
        }
        self.parts().filter(|part| range.contains(*part)).collect()
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

fn address(number: u128, v4: bool) -> IpAddr {
    match u32::try_from(number) {
        Ok(number) if v4 => Ipv4Addr::from(number).into(),
        _ => Ipv6Addr::from(number).into(),
    }
}

fn plan(view: &View<'_>, _: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let pools = &view.settings.pools;
    let mut taken: BTreeMap<IpAddr, &str> = BTreeMap::new();
    let mut without: Vec<&Node> = Vec::new();
    // The oldest node keeps a range that two claim. What a node has is immutable, so the other is told, not changed.
    let mut nodes: Vec<_> = view.snapshot.nodes.values().collect();
    nodes.sort_by_key(|node| {
        (
            node.metadata.creation_timestamp.clone(),
            node.metadata.name.clone(),
        )
    });
    for node in &nodes {
        let ranges = ranges_of(node);
        if ranges.is_empty() {
            if node.metadata.deletion_timestamp.is_none() {
                without.push(node);
            }
            continue;
        }
        let name = node.metadata.name.as_deref().unwrap_or_default();
        for range in ranges
            .iter()
            .filter_map(|range| range.parse::<IpNetwork>().ok())
        {
            for part in pools.iter().flat_map(|pool| pool.parts_of(range)) {
                match taken.get(&part) {
                    Some(other) => plan.note(Note::warning(
                        &Target::of(&***node),
                        REPORTER,
                        "CIDRConflict",
                        format!("Node {name} has pod range {range}, which node {other} has too; delete and re-register one of them"),
                    )),
                    None => {
                        taken.insert(part, name);
                    }
                }
            }
        }
    }
    let taken: BTreeSet<IpAddr> = taken.into_keys().collect();
    let mut free: Vec<_> = pools
        .iter()
        .map(|pool| (pool, pool.parts().filter(|part| !taken.contains(part))))
        .collect();
    for node in without {
        // A part of every pool, or nothing: what a node once has never changes.
        let mut ranges = Vec::new();
        for (pool, free) in &mut free {
            match free.next() {
                Some(part) => ranges.push(format!("{part}/{}", pool.part_prefix)),
                None => plan.note(Note::warning(
                    &Target::of(node),
                    REPORTER,
                    "CIDRNotAvailable",
                    format!(
                        "No range of /{} is left in {} for this node's pods",
                        pool.part_prefix, pool.range
                    ),
                )),
            }
        }
        if ranges.len() < pools.len() || ranges.is_empty() {
            continue;
        }
        plan.push(Action::Patch {
            target: Target::of(node),
            subresource: None,
            body: json!({
                "metadata": {"uid": node.metadata.uid},
                "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
            }),
        });
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Cluster, node};
    use super::*;

    fn with_range(name: &str, range: &str) -> Node {
        let mut node = node(name);
        let spec = node.spec.get_or_insert_default();
        spec.pod_cidr = Some(range.into());
        spec.pod_cidrs = Some(vec![range.into()]);
        node
    }

    fn given(cluster: &Cluster, name: &str) -> Vec<String> {
        ranges_of(cluster.snapshot.nodes.get(&Key::cluster(name)).unwrap())
    }

    fn pools(ranges: &[&str]) -> Vec<Pool> {
        let pools = ranges.iter().map(|range| Pool::new(range.parse().unwrap()));
        pools.collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn a_pool_holds_whole_parts_and_no_absurd_number_of_them() {
        for (range, fits) in [
            ("10.0.0.0/8", true),
            ("10.0.0.0/7", false),
            ("10.0.0.0/25", false),
            ("fd00:10:244::/56", true),
            ("fd00::/47", false),
            ("fd00::/65", false),
        ] {
            assert_eq!(Pool::new(range.parse().unwrap()).is_ok(), fits, "{range}");
        }
    }

    #[test]
    fn nodes_get_a_range_of_each_family_or_none() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.settings.pools = pools(&["10.244.0.0/23", "fd00:10:244::/56"]);
        cluster.add(with_range("old", "fd00:10:244::/63"));
        for name in ["a", "b", "c"] {
            cluster.add(node(name));
        }
        cluster.settle();
        let mut all: Vec<_> = ["a", "b", "c"].map(|name| given(&cluster, name)).to_vec();
        all.sort();
        assert_eq!(
            all,
            [
                vec![],
                vec!["10.244.0.0/24".to_owned(), "fd00:10:244:2::/64".to_owned()],
                vec!["10.244.1.0/24".to_owned(), "fd00:10:244:3::/64".to_owned()],
            ]
        );
        let full = |note: &Note| note.reason == "CIDRNotAvailable" && note.message.contains("/23");
        assert!(cluster.notes.iter().any(full), "{:?}", cluster.notes);
    }

    #[test]
    fn every_node_gets_a_range_of_its_own() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        for index in 0..5 {
            cluster.add(node(&format!("n{index}")));
        }
        cluster.settle();
        let all: BTreeSet<String> = (0..5)
            .flat_map(|index| given(&cluster, &format!("n{index}")))
            .collect();
        assert_eq!(all.len(), 5);
        assert!(
            all.contains("10.244.0.0/24") && all.contains("10.244.4.0/24"),
            "{all:?}"
        );
    }

    #[test]
    fn ranges_in_use_are_left_alone_and_freed_ones_are_used_again() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.add(with_range("old", "10.244.0.0/23"));
        cluster.add(with_range("foreign", "192.168.0.0/24"));
        cluster.add(node("new"));
        cluster.settle();
        assert_eq!(given(&cluster, "new"), ["10.244.2.0/24"]);
        cluster.delete_now("old");
        cluster.add(node("next"));
        cluster.settle();
        assert_eq!(given(&cluster, "next"), ["10.244.0.0/24"]);
    }

    #[test]
    fn a_full_pool_is_said_and_a_deleted_node_makes_room() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.settings.pools = pools(&["10.0.0.0/24"]);
        cluster.add(node("a"));
        cluster.settle();
        cluster.add(node("b"));
        cluster.settle();
        assert!(given(&cluster, "b").is_empty());
        assert!(
            cluster
                .notes
                .iter()
                .any(|note| note.reason == "CIDRNotAvailable"),
            "{:?}",
            cluster.notes
        );
        cluster.delete_now("a");
        cluster.settle();
        assert_eq!(given(&cluster, "b"), ["10.0.0.0/24"]);
    }

    #[test]
    fn two_nodes_with_one_range_are_reported() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.add(with_range("a", "10.244.7.0/24"));
        cluster.add(with_range("b", "10.244.7.0/24"));
        cluster.settle();
        assert!(
            cluster
                .notes
                .iter()
                .any(|note| note.reason == "CIDRConflict")
        );
    }
}
