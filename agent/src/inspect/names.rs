//! Whose an address is.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;

use cluster_model::ObjectKey;
use serde::{Deserialize, Serialize};

use super::View;

/// What an address belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Owner {
    /// `<namespace>/<name>`.
    Pod(String),
    /// `<namespace>/<name>`.
    Service(String),
    Node(String),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Pod(name) => f.write_str(name),
            Owner::Service(name) => write!(f, "service {name}"),
            Owner::Node(name) => write!(f, "node {name}"),
        }
    }
}

/// The names of the addresses that the agent knows: Services, nodes, its own pods, and every pod that is an endpoint. Other
/// nodes' pods that serve nothing are strangers to it: it does not watch pods.
#[derive(Clone, Debug, Default)]
pub struct Names {
    owners: HashMap<IpAddr, Owner>,
}

impl Names {
    pub fn of(view: &View) -> Self {
        let mut owners = HashMap::new();
        for service in view.snapshot.services() {
            for slice in view.snapshot.slices(&service.key) {
                for endpoint in &slice.endpoints {
                    // An endpoint at a node's own address is one of several pods there, or none.
                    if let Some(target) = &endpoint.target
                        && &*target.kind == "Pod"
                    {
                        owners.insert(endpoint.address, Owner::Pod(target.key.to_string()));
                    }
                }
            }
        }
        for allocation in &view.allocations {
            if let Some(pod) = &allocation.pod {
                for address in &allocation.addresses {
                    owners.insert(*address, Owner::Pod(pod.clone()));
                }
            }
        }
        for node in view.snapshot.nodes() {
            for ip in &node.internal_ips {
                owners.insert(*ip, Owner::Node(node.name.to_string()));
            }
        }
        for service in view.snapshot.services() {
            let all = [
                &service.cluster_ips,
                &service.external_ips,
                &service.load_balancer_ips,
            ];
            for ip in all.into_iter().flatten() {
                owners
                    .entry(*ip)
                    .or_insert_with(|| Owner::Service(service.key.to_string()));
            }
        }
        Self { owners }
    }

    pub fn get(&self, address: IpAddr) -> Option<&Owner> {
        self.owners.get(&address)
    }

    /// Addresses of a pod.
    pub fn pod(&self, key: &ObjectKey) -> Vec<IpAddr> {
        let name = key.to_string();
        let mut found: Vec<IpAddr> = self
            .owners
            .iter()
            .filter(|(_, owner)| matches!(owner, Owner::Pod(pod) if *pod == name))
            .map(|(address, _)| *address)
            .collect();
        found.sort();
        found
    }
}
