//! Which endpoints serve a service port on this node, and in what order.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use cluster_model::{
    Endpoint, EndpointSlice, Service, ServicePort, TrafficDistribution, TrafficPolicy,
};

use super::Here;
use crate::dataplane::ServiceBackends;

/// Selects as kube-proxy does: ready endpoints that the traffic policy and distribution allow take new flows; those
/// that terminate but still serve come after them, for when no ready one is left.
///
/// Endpoints of this node come first among the active ones.
pub(super) fn select(
    slices: &[Arc<EndpointSlice>],
    service: &Service,
    port: &ServicePort,
    ipv4: bool,
    here: &Here,
) -> ServiceBackends {
    let local_only = service.internal_traffic_policy == TrafficPolicy::Local;
    let mut ready: Vec<(SocketAddr, &Endpoint)> = Vec::new();
    let mut terminating: Vec<(SocketAddr, &Endpoint)> = Vec::new();
    for slice in slices {
        let numbers = slice
            .ports
            .iter()
            .filter(|one| one.name == port.name && one.protocol == port.protocol);
        for number in numbers {
            for endpoint in &slice.endpoints {
                if endpoint.address.is_ipv4() != ipv4 || (local_only && !is_here(endpoint, here)) {
                    continue;
                }
                let address = SocketAddr::new(endpoint.address, number.port);
                if endpoint.conditions.ready || service.publish_not_ready {
                    ready.push((address, endpoint));
                } else if endpoint.conditions.serving && endpoint.conditions.terminating {
                    terminating.push((address, endpoint));
                }
            }
        }
    }
    // With policy Local the distribution has nothing left to choose from.
    let chosen = if local_only {
        ready
    } else {
        prefer(ready, service.traffic_distribution, here)
    };
    let active = local_first(&chosen, here);
    // The same address may be in two slices while an endpoint moves between them.
    terminating.retain(|(address, _)| !active.contains(address));
    ServiceBackends {
        terminating: local_first(&terminating, here),
        active,
    }
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
