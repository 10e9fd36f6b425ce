//! The plan of one Service.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use cluster_model::{Service, ServiceKey, ServicePort, ServiceType, Snapshot, TrafficPolicy};
use dataplane_abi::limits;
use litemap::LiteMap;

use super::endpoints::Endpoints;
use crate::dataplane::{Frontend, ServiceBackends, Sources, Vip, maglev};

/// The node that plans are made for: some endpoints are nearer to it than others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Here {
    pub node: Arc<str>,
    pub zone: Option<Arc<str>>,
    pub balancing: Balancing,
}

/// How backends are chosen for clients outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balancing {
    /// By a Maglev table, so that all nodes choose alike, unless a Service says otherwise.
    pub maglev: bool,
    /// Entries of a table, one of [`maglev::SIZES`].
    pub table_size: u32,
    pub dsr: Dsr,
}

/// Whether clients outside are answered by their backend's node directly, wherever they asked (direct server return).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Dsr {
    /// Never: by the node that they asked.
    #[default]
    Off,
    /// Those of Services that say so.
    Annotated,
    /// Unless a Service says otherwise.
    On,
}

impl Default for Balancing {
    fn default() -> Self {
        Self {
            maglev: false,
            table_size: maglev::SIZE_DEFAULT,
            dsr: Dsr::Off,
        }
    }
}

/// A table has at least so many entries for each backend, whatever size was asked for: with fewer, shares would differ too much. Above
/// 8,191 backends there is no such table, and the largest has half as many.
const ENTRIES_PER_BACKEND: usize = 16;
const TABLE_SIZE_MAX: u32 = maglev::SIZES[maglev::SIZES.len() - 1];
const _: () = assert!(
    limits::BACKENDS_PER_SERVICE as usize * ENTRIES_PER_BACKEND / 2 <= TABLE_SIZE_MAX as usize
);

impl Balancing {
    /// Entries of the table for so many backends of a Service; 0 without one. What the annotation says otherwise than it may counts as
    /// not said.
    fn entries(self, service: &Service, backends: usize, direct: bool) -> u32 {
        let by_table = direct
            || match service.balancing.as_deref() {
                Some("maglev") => true,
                Some("random") => false,
                _ => self.maglev,
            };
        if !by_table || backends < 2 {
            return 0;
        }
        let least = backends * ENTRIES_PER_BACKEND;
        let enough = maglev::SIZES.into_iter();
        let mut enough = enough.filter(|size| *size as usize >= least);
        enough
            .next()
            .map_or(TABLE_SIZE_MAX, |size| size.max(self.table_size))
    }
}

/// Which endpoints a service port leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Policy {
    Cluster,
    /// Those of this node only.
    Local,
}

impl From<TrafficPolicy> for Policy {
    fn from(policy: TrafficPolicy) -> Self {
        match policy {
            TrafficPolicy::Cluster => Self::Cluster,
            TrafficPolicy::Local => Self::Local,
        }
    }
}

/// Names a service port: one port of one Service, in one address family, under one traffic policy. It has one id in the maps for as
/// long as it lives.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortKey {
    pub service: ServiceKey,
    /// The port's name in the Service; may be empty.
    pub port: Arc<str>,
    pub ipv4: bool,
    pub policy: Policy,
}

impl fmt::Display for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.ipv4 { "" } else { " (IPv6)" };
        let policy = match self.policy {
            Policy::Cluster => "",
            Policy::Local => " (this node)",
        };
        write!(f, "{}:{}{family}{policy}", self.service, self.port)
    }
}

/// Where a frontend leads: see [`crate::dataplane::Lead`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub internal: PortKey,
    pub external: PortKey,
    pub guarded: bool,
}

impl Balancing {
    /// Whether clients outside are to be answered directly. All nodes have to choose alike, knowing no more than the packet, where they
    /// have the same endpoints to choose from.
    fn is_direct(self, service: &Service, policy: Policy) -> bool {
        let asked = match (self.dsr, service.dsr.as_deref()) {
            (Dsr::Off, _) | (_, Some("off")) => false,
            (_, Some("on")) | (Dsr::On, _) => true,
            (Dsr::Annotated, _) => false,
        };
        asked && policy == Policy::Cluster && service.affinity_timeout_s.is_none()
    }
}

/// All that the data plane shall hold of one Service. Empty for a Service that has no address of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePlan {
    /// Addresses on which a port that is not the Service's is rejected.
    pub vips: LiteMap<IpAddr, Vip>,
    pub frontends: LiteMap<Frontend, Route>,
    /// What the frontends lead to.
    pub ports: LiteMap<PortKey, PortPlan>,
}

/// A map that is made once and kept: as small as what is in it, where a tree's first node has room for eleven.
pub(super) fn kept<K: Ord, V>(map: BTreeMap<K, V>) -> LiteMap<K, V> {
    LiteMap::from_sorted_store_unchecked(map.into_iter().collect())
}

/// What a service port leads to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortPlan {
    pub backends: ServiceBackends,
    /// Ranges from which clients may come by guarded frontends; empty without such.
    pub sources: Sources,
    /// Backends that were left out: no packet may go to their addresses, or a service port can have no more.
    pub left_out: usize,
}

/// Plans one Service. An absent Service, a headless or external one, or one that another proxy serves, has the empty plan.
pub fn plan(snapshot: &Snapshot, key: &ServiceKey, here: &Here) -> ServicePlan {
    let Some(service) = snapshot.service(key) else {
        return ServicePlan::default();
    };
    if service.service_type == ServiceType::ExternalName
        || service.headless
        || service.proxy_name.is_some()
    {
        return ServicePlan::default();
    }
    let (mut frontends, mut ports) = (BTreeMap::<Frontend, Route>::new(), BTreeMap::new());
    for port in &service.ports {
        for ipv4 in [true, false] {
            let port_key = |policy| PortKey {
                service: key.clone(),
                port: port.name.clone(),
                ipv4,
                policy,
            };
            // What frontends of this port lead to, and how.
            let mut asked: BTreeMap<PortKey, Asked> = BTreeMap::new();
            for (addr, number, reach) in addresses(service, port, ipv4) {
                let frontend = Frontend {
                    addr,
                    port: number,
                    protocol: port.protocol.into(),
                };
                let (internal, external) = match reach {
                    Reach::Cluster => {
                        let policy = service.internal_traffic_policy.into();
                        (policy, policy)
                    }
                    // Clients on this node need not be brought back to it: as kube-proxy, they get any endpoint.
                    Reach::External | Reach::Balanced => {
                        (Policy::Cluster, service.external_traffic_policy.into())
                    }
                };
                let route = Route {
                    internal: port_key(internal),
                    external: port_key(external),
                    // As kube-proxy: ranges of the other family guard nothing.
                    guarded: reach == Reach::Balanced
                        && service
                            .load_balancer_source_ranges
                            .iter()
                            .any(|range| range.is_ipv4() == ipv4),
                };
                // An address may be there twice: an external address that a load balancer gave, say. The stricter way wins.
                let there = frontends
                    .entry(frontend)
                    .and_modify(|there| there.guarded |= route.guarded)
                    .or_insert(route);
                for (key, outside) in [
                    (&there.internal, false),
                    (&there.external, reach != Reach::Cluster),
                ] {
                    if key.port == port.name {
                        let asked = asked.entry(key.clone()).or_default();
                        asked.guarded |= there.guarded;
                        asked.outside |= outside;
                    }
                }
            }
            plan_ports(snapshot, service, port, here, asked, &mut ports);
        }
    }
    ServicePlan {
        vips: kept(vips(snapshot, service)),
        frontends: kept(frontends),
        ports: kept(ports),
    }
}

/// How frontends ask for a service port.
#[derive(Clone, Copy, Default)]
struct Asked {
    /// One of them is guarded.
    guarded: bool,
    /// One of them is for clients outside.
    outside: bool,
}

/// By what kind of address a client comes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// The Service's own.
    Cluster,
    /// A port of the node, or an address that leads to it.
    External,
    /// A load balancer's, which may be for some sources only.
    Balanced,
}

/// Every address and port that leads to a port of a Service, in the families that the Service has.
fn addresses(service: &Service, port: &ServicePort, ipv4: bool) -> Vec<(IpAddr, u16, Reach)> {
    let of_family = |ip: &&IpAddr| ip.is_ipv4() == ipv4;
    let mut found: Vec<(IpAddr, u16, Reach)> = Vec::new();
    let mut add = |addresses: &[IpAddr], reach| {
        let own = addresses.iter().filter(of_family);
        found.extend(own.map(|addr| (*addr, port.port, reach)));
    };
    add(&service.cluster_ips, Reach::Cluster);
    if !service.cluster_ips.iter().any(|ip| ip.is_ipv4() == ipv4) {
        return found;
    }
    add(&service.external_ips, Reach::External);
    if service.service_type == ServiceType::LoadBalancer {
        add(&service.load_balancer_ips, Reach::Balanced);
    }
    let has_node_ports = matches!(
        service.service_type,
        ServiceType::NodePort | ServiceType::LoadBalancer
    );
    if let Some(number) = port.node_port.filter(|_| has_node_ports) {
        let every: IpAddr = if ipv4 {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        found.push((every, number, Reach::External));
    }
    found
}

/// The addresses whose unknown ports are rejected: the Service's own, and a load balancer's, unless that is a node's (as some
/// balancers have it), whose other ports are the node's business. External addresses are whatever somebody wrote there.
fn vips(snapshot: &Snapshot, service: &Service) -> BTreeMap<IpAddr, Vip> {
    let own = service.cluster_ips.iter().map(|ip| (*ip, Vip::Cluster));
    let mut vips = BTreeMap::new();
    if service.service_type == ServiceType::LoadBalancer {
        let is_node = |ip: &IpAddr| snapshot.nodes().any(|node| node.internal_ips.contains(ip));
        // Of a family that the Service has not, an address means nothing.
        let has_family = |ip: &IpAddr| {
            let mut own = service.cluster_ips.iter();
            own.any(|own| own.is_ipv4() == ip.is_ipv4())
        };
        let given = service.load_balancer_ips.iter();
        let given = given.filter(|ip| has_family(ip) && !is_node(ip));
        vips.extend(given.map(|ip| (*ip, Vip::External)));
    }
    vips.extend(own);
    vips
}

/// Plans what the frontends of a port lead to in one family, under each policy that one of them asks for.
fn plan_ports(
    snapshot: &Snapshot,
    service: &Service,
    port: &ServicePort,
    here: &Here,
    asked: BTreeMap<PortKey, Asked>,
    ports: &mut BTreeMap<PortKey, PortPlan>,
) {
    let Some(ipv4) = asked.keys().next().map(|key| key.ipv4) else {
        return;
    };
    let endpoints = Endpoints::of(snapshot.slices(&service.key), service, port, ipv4);
    for (key, Asked { guarded, outside }) in asked {
        let mut backends = endpoints.by(key.policy, service, here);
        let limit = limits::BACKENDS_PER_SERVICE as usize;
        let wished = backends.active.len() + backends.terminating.len();
        backends.active.truncate(limit);
        backends.terminating.truncate(limit - backends.active.len());
        if outside {
            let direct =
                here.balancing.is_direct(service, key.policy) && !endpoints.differ_by_node();
            let count = backends.active.len();
            backends.maglev = here.balancing.entries(service, count, direct);
            // Where nobody is left but who terminates, every node chooses for itself.
            backends.direct = direct && count > 0;
            backends.keeps_clients = key.policy == Policy::Local;
        }
        let ranges = service.load_balancer_source_ranges.iter();
        let sources = ranges
            .filter(|range| guarded && range.is_ipv4() == ipv4)
            .copied()
            .collect();
        let port_plan = PortPlan {
            backends,
            sources,
            left_out: wished.saturating_sub(limit) + endpoints.refused.len(),
        };
        ports.insert(key, port_plan);
    }
}

/// What is wrong with a plan: a fault of the planner, never of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("{0} leads to {1}, which has no plan")]
    LeadsNowhere(Frontend, PortKey),
    #[error("{0} leads to {1}, which is of another address family")]
    FrontendFamily(Frontend, PortKey),
    #[error("{0}: no frontend leads there")]
    Unreached(PortKey),
    #[error("{0}: backend {1} is of another address family")]
    BackendFamily(PortKey, SocketAddr),
    #[error("{0}: backend {1} is there twice")]
    BackendTwice(PortKey, SocketAddr),
    #[error("{0}: {1} backends are more than a service port can have")]
    TooManyBackends(PortKey, usize),
    #[error("{0}: {1} backends have a table of {2} entries")]
    Table(PortKey, usize, u32),
}

/// Checks what must hold of a plan, whatever the cluster looks like.
pub fn check(plan: &ServicePlan) -> Result<(), Violation> {
    let mut reached = BTreeSet::new();
    for (frontend, route) in &plan.frontends {
        for key in [&route.internal, &route.external] {
            if !plan.ports.contains_key(key) {
                return Err(Violation::LeadsNowhere(*frontend, key.clone()));
            }
            if frontend.addr.is_ipv4() != key.ipv4 {
                return Err(Violation::FrontendFamily(*frontend, key.clone()));
            }
            reached.insert(key);
        }
    }
    for (key, port) in &plan.ports {
        if !reached.contains(key) {
            return Err(Violation::Unreached(key.clone()));
        }
        let mut backends = port.backends.all();
        if let Some(other) = backends.find(|backend| backend.is_ipv4() != key.ipv4) {
            return Err(Violation::BackendFamily(key.clone(), *other));
        }
        let all = port.backends.sorted();
        if let Some(twice) = all.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Violation::BackendTwice(key.clone(), twice[0]));
        }
        let (active, entries) = (port.backends.active.len(), port.backends.maglev);
        let is_good = maglev::SIZES.contains(&entries) && (2..entries as usize).contains(&active);
        if entries != 0 && !is_good {
            return Err(Violation::Table(key.clone(), active, entries));
        }
        if all.len() > limits::BACKENDS_PER_SERVICE as usize {
            return Err(Violation::TooManyBackends(key.clone(), all.len()));
        }
    }
    Ok(())
}
