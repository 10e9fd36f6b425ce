//! Which endpoints serve a service port on this node, and in what order.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use cluster_model::{Endpoint, EndpointSlice, Service, ServicePort};

use super::{Here, service::Policy};
use crate::dataplane::ServiceBackends;

/// The endpoints of a service port in one family.
pub(super) struct Endpoints<'a> {
    ready: Vec<(SocketAddr, &'a Endpoint)>,
    /// Terminating, but still serving.
    terminating: Vec<(SocketAddr, &'a Endpoint)>,
    /// Addresses that no packet of a Service may go to.
    pub refused: BTreeSet<SocketAddr>,
}

impl<'a> Endpoints<'a> {
    /// Those that kube-proxy would consider: named by the slices of the port's Service that are not for names alone, ready or serving.
    pub fn of(
        slices: &'a [Arc<EndpointSlice>],
        service: &Service,
        port: &ServicePort,
        ipv4: bool,
    ) -> Self {
        let mut found = Self {
            ready: Vec::new(),
            terminating: Vec::new(),
            refused: BTreeSet::new(),
        };
        for slice in slices.iter().filter(|slice| !slice.headless) {
            let numbers = slice
                .ports
                .iter()
                .filter(|one| one.name == port.name && one.protocol == port.protocol);
            for number in numbers {
                for endpoint in &slice.endpoints {
                    if endpoint.address.is_ipv4() != ipv4 {
                        continue;
                    }
                    let address = SocketAddr::new(endpoint.address, number.port);
                    let usable = if endpoint.conditions.ready || service.publish_not_ready {
                        &mut found.ready
                    } else if endpoint.conditions.serving && endpoint.conditions.terminating {
                        &mut found.terminating
                    } else {
                        continue;
                    };
                    if is_reachable(endpoint.address) {
                        usable.push((address, endpoint));
                    } else {
                        found.refused.insert(address);
                    }
                }
            }
        }
        found
    }

    /// Those that a traffic policy leads to, selected as kube-proxy does: ready endpoints that hints allow take new flows; those that
    /// terminate come after them, for when no ready one is left.
    ///
    /// With policy Local hints have no say. Endpoints of this node come first among the active ones.
    pub fn by(&self, policy: Policy, service: &Service, here: &Here) -> ServiceBackends {
        let local = |list: &[(SocketAddr, &'a Endpoint)]| -> Cow<'_, [(SocketAddr, &'a Endpoint)]> {
            let here = |(_, endpoint): &&(SocketAddr, &Endpoint)| is_here(endpoint, here);
            list.iter().filter(here).copied().collect()
        };
        let (ready, terminating) = match policy {
            Policy::Cluster => (self.hinted(here), Cow::from(&self.terminating)),
            Policy::Local => (local(&self.ready), local(&self.terminating)),
        };
        let active = local_first(&ready, here);
        let mut terminating = local_first(&terminating, here);
        // The same address may be in two slices while an endpoint moves between them.
        if !terminating.is_empty() {
            let active: HashSet<&SocketAddr> = active.iter().collect();
            terminating.retain(|address| !active.contains(address));
        }
        let any_elsewhere = !self.ready.is_empty() || !self.terminating.is_empty();
        let silent = active.is_empty() && terminating.is_empty() && any_elsewhere;
        ServiceBackends {
            active,
            terminating,
            silent,
            affinity_timeout_s: service.affinity_timeout_s.unwrap_or(0),
            maglev: 0,
            direct: false,
            keeps_clients: false,
        }
    }

    /// The ready endpoints that hints lead this node to, as kube-proxy reads them (KEP-2433, KEP-3015): hints for nodes count before those
    /// for zones, and either only when every ready endpoint has one, and one of them is for this node. Else there are all.
    fn hinted(&self, here: &Here) -> Cow<'_, [(SocketAddr, &'a Endpoint)]> {
        let meant = |is_meant: &dyn Fn(&Endpoint) -> bool| {
            let meant = self.ready.iter().filter(|(_, one)| is_meant(one));
            meant.copied().collect::<Cow<'_, [_]>>()
        };
        let (by_node, by_zone) = self.are_hinted();
        if by_node {
            let near = meant(&|one| one.for_nodes.contains(&here.node));
            if !near.is_empty() {
                return near;
            }
        }
        if let Some(zone) = here.zone.as_ref().filter(|_| by_zone) {
            let near = meant(&|one| one.for_zones.contains(zone));
            if !near.is_empty() {
                return near;
            }
        }
        Cow::from(&self.ready)
    }

    /// Whether every ready endpoint says which nodes it is for, and which zones.
    fn are_hinted(&self) -> (bool, bool) {
        let all = |hints: fn(&Endpoint) -> &Vec<Arc<str>>| {
            self.ready.iter().all(|(_, one)| !hints(one).is_empty())
        };
        (all(|one| &one.for_nodes), all(|one| &one.for_zones))
    }

    /// Whether nodes may choose among different endpoints, each as hints tell it.
    pub fn differ_by_node(&self) -> bool {
        let (by_node, by_zone) = self.are_hinted();
        !self.ready.is_empty() && (by_node || by_zone)
    }
}

/// Whether an address can be an endpoint's. The API refuses others; an object that came by another way would turn the node's own
/// traffic against it.
fn is_reachable(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || link_local)
}

/// The addresses, each once: this node's first, then by number.
fn local_first(endpoints: &[(SocketAddr, &Endpoint)], here: &Here) -> Vec<SocketAddr> {
    let mut all: Vec<(SocketAddr, bool)> = endpoints
        .iter()
        .map(|(address, endpoint)| (*address, !is_here(endpoint, here)))
        .collect();
    // Slices are mostly in order already, of which this sort makes use. An address that is near in one of them is near.
    all.sort();
    all.dedup_by_key(|(address, _)| *address);
    let near = all.iter().filter(|(_, far)| !far);
    let far = all.iter().filter(|(_, far)| *far);
    near.chain(far).map(|(address, _)| *address).collect()
}

fn is_here(endpoint: &Endpoint, here: &Here) -> bool {
    endpoint.node_name.as_deref() == Some(&*here.node)
}
