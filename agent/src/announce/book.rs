//! Which node answers for which address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cluster_model::{Conditions, ServiceKey, ServiceType, Snapshot, TrafficPolicy};
use sha2::{Digest, Sha256};

use crate::balancer::Pools;

/// A Service's addresses, and who may answer for them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    addresses: Vec<IpAddr>,
    /// With `externalTrafficPolicy: Local`, the nodes that have a ready endpoint, or, while none is ready anywhere, one that still serves
    /// and terminates; otherwise every node may.
    nodes: Option<BTreeSet<Arc<str>>>,
}

/// The addresses of all Services of type LoadBalancer.
#[derive(Debug, Default)]
pub struct Book {
    entries: BTreeMap<ServiceKey, Entry>,
}

impl Book {
    /// Plans one Service anew.
    pub fn replan(&mut self, snapshot: &Snapshot, key: &ServiceKey) {
        match entry(snapshot, key) {
            Some(entry) => self.entries.insert(key.clone(), entry),
            None => self.entries.remove(key),
        };
    }

    /// The addresses that `here` answers for while these nodes live. Only those of our pools: others are somebody else's.
    pub fn wished(
        &self,
        pools: &Pools,
        live: &BTreeSet<Arc<str>>,
        here: &Arc<str>,
    ) -> BTreeSet<IpAddr> {
        let mut wished = BTreeSet::new();
        for entry in self.entries.values() {
            for address in &entry.addresses {
                if pools.of(*address).is_none() {
                    continue;
                }
                let may = |node: &&Arc<str>| {
                    entry
                        .nodes
                        .as_ref()
                        .is_none_or(|nodes| nodes.contains(*node))
                };
                if winner(*address, live.iter().filter(may)) == Some(here) {
                    wished.insert(*address);
                }
            }
        }
        wished
    }
}

fn entry(snapshot: &Snapshot, key: &ServiceKey) -> Option<Entry> {
    let service = snapshot.service(key)?;
    let addresses = service.load_balancer_ips.clone();
    if service.service_type != ServiceType::LoadBalancer
        || service.proxy_name.is_some()
        || addresses.is_empty()
    {
        return None;
    }
    let local = service.external_traffic_policy == TrafficPolicy::Local;
    let nodes = local.then(|| {
        let those = |wanted: &dyn Fn(&Conditions) -> bool| -> BTreeSet<Arc<str>> {
            let slices = snapshot.slices(key).iter();
            slices
                .filter(|slice| !slice.headless)
                .flat_map(|slice| &slice.endpoints)
                .filter(|endpoint| wanted(&endpoint.conditions))
                .filter_map(|endpoint| endpoint.node_name.clone())
                .collect()
        };
        let ready = those(&|one| one.ready || service.publish_not_ready);
        if !ready.is_empty() {
            return ready;
        }
        those(&|one| one.serving && one.terminating)
    });
    Some(Entry { addresses, nodes })
}

/// Chooses among nodes by the highest hash of address and node (rendezvous hashing, Thaler and Ravishankar 1996): all come to the
/// same choice, addresses are spread, and a node that comes or goes moves only its own.
pub fn winner<'a>(
    address: IpAddr,
    nodes: impl Iterator<Item = &'a Arc<str>>,
) -> Option<&'a Arc<str>> {
    nodes.max_by_key(|node| {
        let digest = Sha256::digest(format!("{address} {node}"));
        let weight: [u8; 8] = *digest.first_chunk().unwrap_or(&[0; 8]);
        (u64::from_be_bytes(weight), *node)
    })
}

#[cfg(test)]
mod tests {
    use cluster_model::{Change, Dirty, read_manifest};
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn nodes(names: &[&str]) -> BTreeSet<Arc<str>> {
        names.iter().map(|name| (*name).into()).collect()
    }

    fn pools() -> Pools {
        Pools::parse("pools: [{name: a, addresses: [192.0.2.0/24]}]").unwrap()
    }

    fn book(policy: &str, address: &str) -> Book {
        let endpoints = json!([
            {"addresses": ["10.0.0.1"], "nodeName": "b"},
            {"addresses": ["10.0.0.2"], "nodeName": "c", "conditions": {"ready": false, "terminating": true}},
        ]);
        book_of(policy, address, endpoints)
    }

    fn book_of(policy: &str, address: &str, endpoints: serde_json::Value) -> Book {
        let manifest = json!({"items": [
            {"kind": "Service", "metadata": {"namespace": "default", "name": "web"},
             "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.1", "externalTrafficPolicy": policy, "ports": [{"port": 80}]},
             "status": {"loadBalancer": {"ingress": [{"ip": address}]}}},
            {"kind": "EndpointSlice", "addressType": "IPv4", "ports": [{"port": 80}],
             "endpoints": endpoints,
             "metadata": {"namespace": "default", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}}},
        ]});
        let mut snapshot = Snapshot::default();
        for object in read_manifest(manifest.to_string().as_bytes()).unwrap() {
            snapshot.apply(Change::Upsert(object), &mut Dirty::default());
        }
        let mut book = Book::default();
        book.replan(&snapshot, &ServiceKey::new("default", "web"));
        book
    }

    fn announcers(book: &Book, live: &[&str]) -> Vec<String> {
        let live = nodes(live);
        let announces = |node: &&Arc<str>| !book.wished(&pools(), &live, node).is_empty();
        live.iter()
            .filter(announces)
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn one_live_node_answers_and_another_when_it_is_gone() {
        let book = book("Cluster", "192.0.2.7");
        let first = announcers(&book, &["a", "b", "c"]);
        assert_eq!(first.len(), 1);
        let rest: Vec<&str> = ["a", "b", "c"]
            .into_iter()
            .filter(|node| *node != first[0])
            .collect();
        assert_eq!(announcers(&book, &rest).len(), 1);
    }

    #[test]
    fn with_policy_local_only_nodes_with_ready_endpoints_answer() {
        let book = book("Local", "192.0.2.7");
        assert_eq!(announcers(&book, &["a", "b", "c"]), ["b"]);
        assert_eq!(announcers(&book, &["a", "c"]), [""; 0]);
    }

    #[test]
    fn with_policy_local_and_nothing_ready_nodes_answer_whose_endpoints_still_serve() {
        let one = |node: &str, ready: bool, serving: bool, terminating: bool| {
            json!({"addresses": ["10.0.0.1"], "nodeName": node,
                   "conditions": {"ready": ready, "serving": serving, "terminating": terminating}})
        };
        let left = json!([
            one("a", false, true, true),
            one("b", false, false, true),
            one("c", false, true, false)
        ]);
        let book = book_of("Local", "192.0.2.7", left);
        assert_eq!(announcers(&book, &["a", "b", "c"]), ["a"]);
        let ready = json!([one("a", false, true, true), one("b", true, true, false)]);
        let book = book_of("Local", "192.0.2.7", ready);
        assert_eq!(announcers(&book, &["a", "b", "c"]), ["b"]);
        assert_eq!(announcers(&book, &["a", "c"]), [""; 0]);
    }

    #[test]
    fn addresses_of_others_are_not_answered_for() {
        assert_eq!(announcers(&book("Cluster", "203.0.113.7"), &["a"]), [""; 0]);
    }

    proptest! {
        #[test]
        fn a_node_that_goes_moves_only_its_own_addresses(last in any::<u8>(), gone in 0..5usize) {
            let all = nodes(&["a", "b", "c", "d", "e"]);
            let address = IpAddr::from([192, 0, 2, last]);
            let before = winner(address, all.iter()).unwrap();
            let leaver = all.iter().nth(gone).unwrap();
            let after = winner(address, all.iter().filter(|node| *node != leaver)).unwrap();
            prop_assert!(before == leaver || before == after);
        }
    }
}
