//! The addresses that nodes have, and whether these change when nodes do.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use cluster_model::Snapshot;

/// Of all nodes of the cluster.
#[derive(Debug, Default)]
pub(super) struct NodeAddresses(HashMap<Arc<str>, Vec<IpAddr>>);

impl NodeAddresses {
    /// Takes nodes that changed. False when their addresses are what they were: most of what nodes say of themselves is something else, and
    /// they say it by the minute.
    pub fn take(&mut self, snapshot: &Snapshot, changed: &[Arc<str>]) -> bool {
        let mut differ = false;
        for name in changed {
            let now = snapshot.node(name).map(|node| node.internal_ips.clone());
            let had = match &now {
                Some(addresses) => self.0.insert(name.clone(), addresses.clone()),
                None => self.0.remove(name),
            };
            differ |= had != now;
        }
        differ
    }
}

#[cfg(test)]
mod tests {
    use cluster_model::{Change, Dirty, Kind, Object, read_manifest};

    use super::*;

    /// A node with this address and label.
    fn node(ip: &str, zone: &str) -> Vec<Object> {
        let labels = format!(r#"{{"topology.kubernetes.io/zone": "{zone}"}}"#);
        let status = format!(r#"{{"addresses": [{{"type": "InternalIP", "address": "{ip}"}}]}}"#);
        let node = format!(
            r#"{{"apiVersion": "v1", "kind": "Node", "metadata": {{"name": "a", "labels": {labels}}}, "spec": {{}}, "status": {status}}}"#
        );
        let list = format!(r#"{{"apiVersion": "v1", "kind": "List", "items": [{node}]}}"#);
        read_manifest(list.as_bytes()).expect("a node")
    }

    #[test]
    fn nodes_that_change_in_other_things_have_the_addresses_that_they_had() {
        let mut known = NodeAddresses::default();
        let mut snapshot = Snapshot::default();
        for (objects, differ) in [
            (node("198.18.0.1", "a"), true),
            (node("198.18.0.1", "b"), false),
            (node("198.18.0.2", "b"), true),
            (vec![], true),
            (vec![], false),
        ] {
            snapshot.apply(Change::Replace(Kind::Node, objects), &mut Dirty::default());
            assert_eq!(known.take(&snapshot, &["a".into()]), differ);
        }
    }
}
