//! The Service by which pods reach the API server.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cluster_model::ServiceKey;
use ipnetwork::IpNetwork;

use super::service::kept;
use super::{Policy, PortKey, PortPlan, Route, ServicePlan};
use crate::dataplane::{Frontend, State};

const NAMESPACE: &str = "default";
const NAME: &str = "kubernetes";

/// The Service of the API server itself.
pub fn lifeline() -> ServiceKey {
    ServiceKey::new(NAMESPACE, NAME)
}

/// Whether this is the Service of the API server itself.
pub fn is_lifeline(key: &ServiceKey) -> bool {
    &*key.namespace == NAMESPACE && &*key.name == NAME
}

/// The plan of what maps hold at the address that the Service of the API server has in every cluster, the first of a range, as far as
/// nobody has it; empty without. It names its ports by their numbers, since maps know no names.
pub fn held_lifeline(
    held: &State,
    service_ranges: &[IpNetwork],
    is_free: impl Fn(&Frontend) -> bool,
) -> ServicePlan {
    let firsts: Vec<IpAddr> = service_ranges.iter().filter_map(first).collect();
    let (mut frontends, mut ports) = (BTreeMap::new(), BTreeMap::new());
    for (frontend, lead) in &held.frontends {
        if !firsts.contains(&frontend.addr) || !is_free(frontend) {
            continue;
        }
        let Some(backends) = held.services.get(&lead.internal) else {
            continue;
        };
        let port = PortKey {
            service: lifeline(),
            port: frontend.port.to_string().into(),
            ipv4: frontend.addr.is_ipv4(),
            policy: Policy::Cluster,
        };
        let route = Route {
            internal: port.clone(),
            external: port.clone(),
            guarded: false,
        };
        frontends.insert(*frontend, route);
        let plan = PortPlan {
            backends: backends.clone(),
            ..PortPlan::default()
        };
        ports.insert(port, plan);
    }
    let has_port = |addr: &IpAddr| frontends.keys().any(|frontend| frontend.addr == *addr);
    let vips: BTreeMap<_, _> = held
        .vips
        .iter()
        .filter(|(addr, _)| has_port(addr))
        .map(|(addr, kind)| (*addr, *kind))
        .collect();
    ServicePlan {
        vips: kept(vips),
        frontends: kept(frontends),
        ports: kept(ports),
    }
}

/// The first address of a range that is not the range's own.
fn first(range: &IpNetwork) -> Option<IpAddr> {
    match range {
        IpNetwork::V4(range) => range.nth(1).map(IpAddr::V4),
        IpNetwork::V6(range) => range.nth(1).map(IpAddr::V6),
    }
}

/// Gives a plan without backends those that the maps hold under its frontends. When the API server's Service has no endpoint, whoever
/// is to give it one may need the Service: its last ones are the best guess, and no worse than a refusal. Says whether any were kept.
pub fn keep_backends(plan: &mut ServicePlan, held: &State) -> bool {
    let mut kept = false;
    for (frontend, route) in &plan.frontends {
        let Some(port) = plan.ports.get_mut(&route.internal) else {
            continue;
        };
        if !port.backends.active.is_empty() || !port.backends.terminating.is_empty() {
            continue;
        }
        let lead = held.frontends.get(frontend);
        let last = lead.and_then(|lead| held.services.get(&lead.internal));
        if let Some(last) =
            last.filter(|last| !last.active.is_empty() || !last.terminating.is_empty())
        {
            port.backends.active.clone_from(&last.active);
            port.backends.terminating.clone_from(&last.terminating);
            port.backends.maglev = last.maglev;
            port.backends.direct = last.direct;
            port.backends.silent = false;
            kept = true;
        }
    }
    kept
}
