//! Which endpoints serve a service port on this node, and in what order.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use cluster_model::{Endpoint, EndpointSlice, Service, ServicePort, TrafficDistribution};

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
    /// Those that kube-proxy would consider: named by the slices of the port's Service, ready or serving.
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
        for slice in slices {
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

    /// Those that a traffic policy leads to, selected as kube-proxy does: ready endpoints that the traffic distribution allows
    /// take new flows; those that terminate come after them, for when no ready one is left.
    ///
    /// With policy Local the distribution has nothing left to choose from. Endpoints of this node come first among the active
    /// ones.
    pub fn by(&self, policy: Policy, service: &Service, here: &Here) -> ServiceBackends {
        let local = |list: &[(SocketAddr, &'a Endpoint)]| -> Vec<(SocketAddr, &'a Endpoint)> {
            let here = |(_, endpoint): &&(SocketAddr, &Endpoint)| is_here(endpoint, here);
            list.iter().filter(here).copied().collect()
        };
        let (ready, mut terminating) = match policy {
            Policy::Cluster => (
                prefer(self.ready.clone(), service.traffic_distribution, here),
                self.terminating.clone(),
            ),
            Policy::Local => (local(&self.ready), local(&self.terminating)),
        };
        let active = local_first(&ready, here);
        // The same address may be in two slices while an endpoint moves between them.
        terminating.retain(|(address, _)| !active.contains(address));
        let any_elsewhere = !self.ready.is_empty() || !self.terminating.is_empty();
        let silent = active.is_empty() && terminating.is_empty() && any_elsewhere;
        ServiceBackends {
            terminating: local_first(&terminating, here),
            active,
            silent,
            affinity_timeout_s: service.affinity_timeout_s.unwrap_or(0),
            maglev: 0,
            direct: false,
        }
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
    let mut local: BTreeMap<SocketAddr, bool> = BTreeMap::new();
    for (address, endpoint) in endpoints {
        *local.entry(*address).or_default() |= is_here(endpoint, here);
    }
    let (near, far): (Vec<_>, Vec<_>) = local.into_iter().partition(|(_, local)| *local);
    near.into_iter()
        .chain(far)
        .map(|(address, _)| address)
        .collect()
}

fn is_here(endpoint: &Endpoint, here: &Here) -> bool {
    endpoint.node_name.as_deref() == Some(&*here.node)
}

/// The nearest non-empty choice. Hints of the slices' writer say who should use an endpoint, and count only when every
/// ready endpoint has one (KEP-2433, KEP-3015); without them the node and zone of the endpoints themselves decide.
fn prefer<'a>(
    ready: Vec<(SocketAddr, &'a Endpoint)>,
    distribution: TrafficDistribution,
    here: &Here,
) -> Vec<(SocketAddr, &'a Endpoint)> {
    let narrowed = |wanted: &dyn Fn(&Endpoint) -> bool| -> Option<Vec<(SocketAddr, &'a Endpoint)>> {
        let near: Vec<_> = ready
            .iter()
            .filter(|(_, endpoint)| wanted(endpoint))
            .copied()
            .collect();
        (!near.is_empty()).then_some(near)
    };
    let all_hinted = |hints: fn(&Endpoint) -> &Vec<Arc<str>>| {
        ready.iter().all(|(_, one)| !hints(one).is_empty())
    };
    let node_hints = all_hinted(|endpoint| &endpoint.for_nodes);
    let zone_hints = all_hinted(|endpoint| &endpoint.for_zones);

    let by_node = match distribution {
        TrafficDistribution::SameNode if node_hints => {
            narrowed(&|endpoint| endpoint.for_nodes.contains(&here.node))
        }
        TrafficDistribution::SameNode => narrowed(&|endpoint| is_here(endpoint, here)),
        _ => None,
    };
    let by_zone = || match &here.zone {
        Some(zone) if zone_hints => narrowed(&|endpoint| endpoint.for_zones.contains(zone)),
        Some(zone) if distribution == TrafficDistribution::SameZone => {
            narrowed(&|endpoint| endpoint.zone.as_ref() == Some(zone))
        }
        _ => None,
    };
    match by_node.or_else(by_zone) {
        Some(near) => near,
        None => ready,
    }
}
