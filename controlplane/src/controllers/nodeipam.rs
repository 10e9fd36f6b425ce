//! Node addresses: gives every node its own range of pod addresses out of the cluster's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;
use k8s_openapi::api::core::v1::Node;
use serde_json::json;

use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Note, Plan, View};
use super::snapshot::{Change, Snapshot};

const REPORTER: &str = "cidrAllocator";

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

fn plan(view: &View<'_>, _: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let pool = view.settings.cluster_cidr;
    let mut taken: BTreeMap<Ipv4Addr, &str> = BTreeMap::new();
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
            .filter_map(|range| range.parse::<Ipv4Network>().ok())
        {
            for part in parts_of(range, view.settings.node_prefix, pool) {
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
    let taken: BTreeSet<Ipv4Addr> = taken.into_keys().collect();
    let mut free = all_parts(pool, view.settings.node_prefix).filter(|part| !taken.contains(part));
    for node in without {
        let Some(part) = free.next() else {
            let message = format!(
                "No range of /{} is left in {pool} for this node's pods",
                view.settings.node_prefix
            );
            plan.note(Note::warning(
                &Target::of(node),
                REPORTER,
                "CIDRNotAvailable",
                message,
            ));
            continue;
        };
        let range = format!("{part}/{}", view.settings.node_prefix);
        plan.push(Action::Patch {
            target: Target::of(node),
            subresource: None,
            body: json!({
                "metadata": {"uid": node.metadata.uid},
                "spec": {"podCIDR": range, "podCIDRs": [range]},
            }),
        });
    }
    plan
}

/// First addresses of the pool's parts, in order.
fn all_parts(pool: Ipv4Network, prefix: u8) -> impl Iterator<Item = Ipv4Addr> {
    let step = 1u64 << (32 - u32::from(prefix));
    let first = u64::from(u32::from(pool.network()));
    let end = first + (1u64 << (32 - u32::from(pool.prefix())));
    (first..end)
        .step_by(step as usize)
        .filter_map(|address| u32::try_from(address).ok())
        .map(Ipv4Addr::from)
}

/// The pool's parts that a range covers or lies in.
fn parts_of(range: Ipv4Network, prefix: u8, pool: Ipv4Network) -> Vec<Ipv4Addr> {
    if !pool.overlaps(range) {
        return Vec::new();
    }
    let inside = if range.prefix() < pool.prefix() {
        pool
    } else {
        range
    };
    if inside.prefix() >= prefix {
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
        return vec![Ipv4Addr::from(u32::from(inside.network()) & mask)];
    }
    all_parts(inside, prefix).collect()
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
        cluster.settings.cluster_cidr = "10.0.0.0/24".parse().unwrap();
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
