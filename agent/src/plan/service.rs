//! The plan of one Service.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use cluster_model::{Service, ServiceKey, ServicePort, ServiceType, Snapshot};
use dataplane_abi::limits;

use super::endpoints;
use crate::dataplane::{Frontend, Protocol, ServiceBackends};

/// The node that plans are made for: some endpoints are nearer to it than others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Here {
    pub node: Arc<str>,
    pub zone: Option<Arc<str>>,
}

/// Names a service port: one port of one Service, in one address family. It has one id in the maps for as long as it lives.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortKey {
    pub service: ServiceKey,
    /// The port's name in the Service; may be empty.
    pub port: Arc<str>,
    pub ipv4: bool,
}

impl fmt::Display for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}:{}{}",
            self.service,
            self.port,
            if self.ipv4 { "" } else { " (IPv6)" }
        )
    }
}

/// All that the data plane shall hold of one Service. Empty for a Service that has no address of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePlan {
    /// Addresses on which a port that is not the Service's is rejected.
    pub vips: BTreeSet<IpAddr>,
    pub ports: BTreeMap<PortKey, PortPlan>,
}

/// The frontends of a service port, and where they lead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPlan {
    pub frontends: BTreeSet<Frontend>,
    pub backends: ServiceBackends,
    /// Backends that were left out because a service port can have no more.
    pub left_out: usize,
}

/// Plans one Service. An absent Service, a headless or external one, or one that another proxy serves, has the empty plan.
pub fn plan(snapshot: &Snapshot, key: &ServiceKey, here: &Here) -> ServicePlan {
    let mut plan = ServicePlan::default();
    let Some(service) = snapshot.service(key) else {
        return plan;
    };
    if service.service_type == ServiceType::ExternalName
        || service.headless
        || service.proxy_name.is_some()
    {
        return plan;
    }
    plan.vips = service.cluster_ips.iter().copied().collect();
    for port in &service.ports {
        // SCTP is not spoken by the data plane: its packets are dropped there by name.
        let Some(protocol) = Protocol::from_number(port.protocol.number()) else {
            continue;
        };
        for ipv4 in [true, false] {
            let frontends: BTreeSet<Frontend> = service
                .cluster_ips
                .iter()
                .filter(|addr| addr.is_ipv4() == ipv4)
                .map(|addr| Frontend {
                    addr: *addr,
                    port: port.port,
                    protocol,
                })
                .collect();
            if !frontends.is_empty() {
                let port_key = PortKey {
                    service: key.clone(),
                    port: port.name.clone(),
                    ipv4,
                };
                plan.ports.insert(
                    port_key,
                    plan_port(snapshot, service, port, ipv4, here, frontends),
                );
            }
        }
    }
    plan
}

fn plan_port(
    snapshot: &Snapshot,
    service: &Service,
    port: &ServicePort,
    ipv4: bool,
    here: &Here,
    frontends: BTreeSet<Frontend>,
) -> PortPlan {
    let mut backends = endpoints::select(snapshot.slices(&service.key), service, port, ipv4, here);
    let limit = limits::BACKENDS_PER_SERVICE as usize;
    let wished = backends.active.len() + backends.terminating.len();
    backends.active.truncate(limit);
    backends.terminating.truncate(limit - backends.active.len());
    let left_out = wished.saturating_sub(limit);
    PortPlan {
        frontends,
        backends,
        left_out,
    }
}

/// What is wrong with a plan: a fault of the planner, never of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("{0}: {1} is no address of the Service")]
    FrontendElsewhere(PortKey, Frontend),
    #[error("{0}: backend {1} is of another address family")]
    BackendFamily(PortKey, std::net::SocketAddr),
    #[error("{0}: backend {1} is there twice")]
    BackendTwice(PortKey, std::net::SocketAddr),
    #[error("{0}: {1} backends are more than a service port can have")]
    TooManyBackends(PortKey, usize),
    #[error("frontend {0} belongs to {1} and to {2}")]
    FrontendTwice(Frontend, Box<PortKey>, Box<PortKey>),
}

/// Checks what must hold of a plan, whatever the cluster looks like.
pub fn check(plan: &ServicePlan) -> Result<(), Violation> {
    let mut owners: BTreeMap<Frontend, &PortKey> = BTreeMap::new();
    for (key, port) in &plan.ports {
        for frontend in &port.frontends {
            if !plan.vips.contains(&frontend.addr) || frontend.addr.is_ipv4() != key.ipv4 {
                return Err(Violation::FrontendElsewhere(key.clone(), *frontend));
            }
            if let Some(other) = owners.insert(*frontend, key) {
                return Err(Violation::FrontendTwice(
                    *frontend,
                    Box::new(other.clone()),
                    Box::new(key.clone()),
                ));
            }
        }
        let mut seen = BTreeSet::new();
        for backend in port
            .backends
            .active
            .iter()
            .chain(&port.backends.terminating)
        {
            if backend.is_ipv4() != key.ipv4 {
                return Err(Violation::BackendFamily(key.clone(), *backend));
            }
            if !seen.insert(backend) {
                return Err(Violation::BackendTwice(key.clone(), *backend));
            }
        }
        if seen.len() > limits::BACKENDS_PER_SERVICE as usize {
            return Err(Violation::TooManyBackends(key.clone(), seen.len()));
        }
    }
    Ok(())
}
