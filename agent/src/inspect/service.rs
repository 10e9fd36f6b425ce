//! Services as they are served on this node: what is in the maps, what is not, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use cluster_model::{
    Endpoint, Kind, ObjectRef, Rejected, Service, ServiceKey, ServiceType, Snapshot,
    TrafficDistribution, TrafficPolicy,
};
use serde::{Deserialize, Serialize};

use crate::dataplane::{Frontend, ServiceId};
use crate::health::HealthChecks;
use crate::node_ports::NodePorts;
use crate::plan::{Here, Ledger, Policy, PortKey, PortPlan, Route, ServicePlan};

/// One Service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceItem {
    pub namespace: String,
    pub name: String,
    /// `spec.type`.
    #[serde(rename = "type")]
    pub service_type: String,
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    pub load_balancer_ips: Vec<IpAddr>,
    /// Fields of the spec that change where traffic goes, as `name: value`; those at their default are left out.
    pub policies: BTreeMap<String, String>,
    /// Why nothing of it is in the maps, when that is as it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_served: Option<String>,
    pub ports: Vec<PortItem>,
    pub endpoints: Vec<EndpointItem>,
    /// What it wants and cannot have, in words.
    pub refused: Vec<String>,
    /// What it has to somebody else's harm.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A port of a Service in one address family.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortItem {
    pub name: String,
    pub family: String,
    /// Only endpoints of this node, by the traffic policy of its frontends.
    pub local: bool,
    /// Absent while it has no frontend in the maps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u32>,
    pub frontends: Vec<FrontendItem>,
    /// Where new flows go.
    pub active: Vec<SocketAddr>,
    /// Where flows stay that are there already, and new ones go when none is active.
    pub terminating: Vec<SocketAddr>,
    /// Without a backend clients get no answer, rather than a refusal: other nodes have some.
    pub silent: bool,
    /// Backends that are not in the maps.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub left_out: usize,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendItem {
    pub address: String,
    /// Those that it leads to this port.
    pub clients: Clients,
    /// Only clients in `loadBalancerSourceRanges` may come by it.
    pub guarded: bool,
    /// Whether the maps lead it to this port.
    pub installed: bool,
}

/// Whose packets a frontend leads to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Clients {
    All,
    /// Pods of this node, and the node itself.
    Internal,
    /// All others.
    External,
}

/// An endpoint of a Service's slices, used or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointItem {
    pub address: IpAddr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// `<kind> <namespace>/<name>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// On this node.
    pub local: bool,
    pub usage: Usage,
    /// Why it is not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// What an endpoint is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Usage {
    Active,
    Terminating,
    Unused,
}

impl Usage {
    pub fn name(self) -> &'static str {
        match self {
            Usage::Active => "active",
            Usage::Terminating => "terminating",
            Usage::Unused => "unused",
        }
    }
}

/// What a Service is shown from.
pub struct Books<'a> {
    pub snapshot: &'a Snapshot,
    /// Absent until the data plane is up.
    pub ledger: Option<&'a Ledger>,
    pub here: &'a Here,
    /// Objects that were refused as malformed.
    pub rejected: &'a BTreeMap<ObjectRef, Rejected>,
    pub health_checks: &'a HealthChecks,
    pub node_ports: &'a NodePorts,
}

impl Books<'_> {
    /// Every Service that there is something to say of, in order: those that were refused count too.
    pub fn services(&self) -> Vec<ServiceKey> {
        let known = self.snapshot.services().map(|service| service.key.clone());
        let refused = self
            .rejected
            .keys()
            .filter(|object| object.kind == Kind::Service)
            .map(|object| object.key.clone());
        let all: BTreeSet<ServiceKey> = known.chain(refused).collect();
        all.into_iter().collect()
    }

    /// A Service; None when there is none of this name.
    pub fn service(&self, key: &ServiceKey) -> Option<ServiceItem> {
        let mut item = match self.snapshot.service(key) {
            Some(service) => self.known(service),
            None => ServiceItem {
                namespace: key.namespace.to_string(),
                name: key.name.to_string(),
                not_served: Some("it is malformed".into()),
                ..ServiceItem::default()
            },
        };
        let own = ObjectRef {
            kind: Kind::Service,
            key: key.clone(),
        };
        let malformed = self.rejected.get(&own);
        item.refused
            .extend(malformed.map(|one| format!("{}: {}", one.field, one.reason)));
        (malformed.is_some() || self.snapshot.service(key).is_some()).then_some(item)
    }

    fn known(&self, service: &Service) -> ServiceItem {
        let mut item = ServiceItem {
            namespace: service.key.namespace.to_string(),
            name: service.key.name.to_string(),
            service_type: match service.service_type {
                ServiceType::ClusterIp => "ClusterIP",
                ServiceType::NodePort => "NodePort",
                ServiceType::LoadBalancer => "LoadBalancer",
                ServiceType::ExternalName => "ExternalName",
            }
            .into(),
            cluster_ips: service.cluster_ips.clone(),
            external_ips: service.external_ips.clone(),
            load_balancer_ips: service.load_balancer_ips.clone(),
            policies: policies(service),
            not_served: not_served(service),
            ..ServiceItem::default()
        };
        if let Some(ledger) = self.ledger
            && let Some((plan, ids)) = ledger.service(&service.key)
        {
            let ids: BTreeMap<&PortKey, ServiceId> = ids.into_iter().collect();
            let mut frontends: BTreeMap<&PortKey, Vec<(&Frontend, &Route)>> = BTreeMap::new();
            for (frontend, route) in &plan.frontends {
                let mut lead = |key| frontends.entry(key).or_default().push((frontend, route));
                lead(&route.internal);
                if route.external != route.internal {
                    lead(&route.external);
                }
            }
            for (key, port) in &plan.ports {
                let id = ids.get(key).copied();
                let frontends = frontends.remove(key).unwrap_or_default();
                item.ports
                    .push(port_item(ledger, key, &frontends, port, id));
            }
            item.refused
                .extend(refusals(ledger, &service.key, plan, &ids));
        }
        item.refused
            .extend(self.health_checks.refusal(&service.key));
        item.warnings = self.node_ports.shared_of(&service.key);
        let slices = self.snapshot.slices(&service.key);
        for slice in slices {
            let named = |bad: &String| format!("EndpointSlice {}: {bad}", slice.key.name);
            item.refused.extend(slice.refused.iter().map(named));
        }
        item.refused.extend(self.malformed_slices(&service.key));
        let used = |address: &IpAddr, backends: fn(&PortItem) -> &Vec<SocketAddr>| {
            item.ports
                .iter()
                .any(|port| backends(port).iter().any(|at| at.ip() == *address))
        };
        let mut endpoints: BTreeMap<(Usage, IpAddr), EndpointItem> = BTreeMap::new();
        for slice in slices {
            for endpoint in &slice.endpoints {
                let usage = if used(&endpoint.address, |port| &port.active) {
                    Usage::Active
                } else if used(&endpoint.address, |port| &port.terminating) {
                    Usage::Terminating
                } else {
                    Usage::Unused
                };
                endpoints.insert(
                    (usage, endpoint.address),
                    self.endpoint_item(service, slice.headless, endpoint, usage),
                );
            }
        }
        item.endpoints = endpoints.into_values().collect();
        item
    }

    /// Slices that count as absent. Whose they were to be is told by their name alone, which begins with the Service's by custom.
    fn malformed_slices(&self, key: &ServiceKey) -> impl Iterator<Item = String> {
        let begins = |slice: &ObjectRef| {
            slice.kind == Kind::EndpointSlice
                && slice.key.namespace == key.namespace
                && slice
                    .key
                    .name
                    .strip_prefix(&*key.name)
                    .is_some_and(|rest| rest.starts_with('-'))
        };
        self.rejected
            .iter()
            .filter(move |(object, _)| begins(object))
            .map(|(_, rejected)| rejected.to_string())
    }

    /// `for_names` says that the endpoint's slice is for names alone.
    fn endpoint_item(
        &self,
        service: &Service,
        for_names: bool,
        endpoint: &Endpoint,
        usage: Usage,
    ) -> EndpointItem {
        let local = endpoint.node_name.as_ref() == Some(&self.here.node);
        let conditions = endpoint.conditions;
        let ready = conditions.ready || service.publish_not_ready;
        let why = match usage {
            Usage::Active | Usage::Terminating => None,
            Usage::Unused if service.headless || service.cluster_ips.is_empty() => None,
            Usage::Unused if for_names => {
                Some("by its slice's label service.kubernetes.io/headless it is for names alone")
            }
            Usage::Unused if !ready && conditions.terminating => {
                Some("it terminates and serves no more")
            }
            Usage::Unused if !ready => Some("it is not ready"),
            Usage::Unused if self.ledger.is_none() => Some("the data plane is not up"),
            Usage::Unused if service.internal_traffic_policy == TrafficPolicy::Local && !local => {
                Some("internalTrafficPolicy Local, and it is on another node")
            }
            Usage::Unused => Some("nearer endpoints are preferred, or no port of it is asked for"),
        };
        EndpointItem {
            address: endpoint.address,
            node: endpoint.node_name.as_deref().map(Into::into),
            zone: endpoint.zone.as_deref().map(Into::into),
            target: endpoint
                .target
                .as_ref()
                .map(|target| format!("{} {}", target.kind, target.key)),
            local,
            usage,
            why: why.map(Into::into),
        }
    }
}

fn policies(service: &Service) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut say = |name: &str, value: String| {
        found.insert(name.to_owned(), value);
    };
    if service.internal_traffic_policy == TrafficPolicy::Local {
        say("internalTrafficPolicy", "Local".into());
    }
    if service.external_traffic_policy == TrafficPolicy::Local {
        say("externalTrafficPolicy", "Local".into());
    }
    match service.traffic_distribution {
        TrafficDistribution::Any => {}
        TrafficDistribution::SameZone => say("trafficDistribution", "PreferSameZone".into()),
        TrafficDistribution::SameNode => say("trafficDistribution", "PreferSameNode".into()),
    }
    if let Some(seconds) = service.affinity_timeout_s {
        say("sessionAffinity", format!("ClientIP, {seconds} s"));
    }
    if service.publish_not_ready {
        say("publishNotReadyAddresses", "true".into());
    }
    if let Some(port) = service.health_check_node_port {
        say("healthCheckNodePort", port.to_string());
    }
    if !service.load_balancer_source_ranges.is_empty() {
        let ranges: Vec<String> = service
            .load_balancer_source_ranges
            .iter()
            .map(ToString::to_string)
            .collect();
        say("loadBalancerSourceRanges", ranges.join(", "));
    }
    found
}

fn not_served(service: &Service) -> Option<String> {
    if let Some(proxy) = &service.proxy_name {
        return Some(format!("the proxy {proxy} serves it"));
    }
    if service.service_type == ServiceType::ExternalName {
        let name = service.external_name.as_deref().unwrap_or_default();
        return Some(format!("it is an alias of {name}"));
    }
    if service.headless {
        return Some("it is headless: names lead to its endpoints".into());
    }
    service
        .cluster_ips
        .is_empty()
        .then(|| "it has no address yet".into())
}

fn port_item(
    ledger: &Ledger,
    key: &PortKey,
    frontends: &[(&Frontend, &Route)],
    port: &PortPlan,
    id: Option<ServiceId>,
) -> PortItem {
    let held = id.and_then(|id| ledger.held().services.get(&id));
    let frontends = frontends.iter().filter_map(|(frontend, route)| {
        let clients = match (route.internal == *key, route.external == *key) {
            (true, true) => Clients::All,
            (true, false) => Clients::Internal,
            (false, true) => Clients::External,
            (false, false) => return None,
        };
        let lead = ledger.held().frontends.get(frontend);
        let leads_here = lead.is_some_and(|lead| {
            let ids = [lead.internal, lead.external].map(Some);
            match clients {
                Clients::All => ids == [id, id],
                Clients::Internal => ids[0] == id,
                Clients::External => ids[1] == id,
            }
        });
        Some(FrontendItem {
            address: frontend.to_string(),
            clients,
            guarded: route.guarded,
            installed: leads_here,
        })
    });
    PortItem {
        name: key.port.to_string(),
        family: if key.ipv4 { "IPv4" } else { "IPv6" }.into(),
        local: key.policy == Policy::Local,
        id: id.map(|id| id.0),
        frontends: frontends.collect(),
        active: held.map(|held| held.active.clone()).unwrap_or_default(),
        terminating: held
            .map(|held| held.terminating.clone())
            .unwrap_or_default(),
        silent: port.backends.silent,
        left_out: port.left_out,
    }
}

/// What a Service's ports want and have not.
fn refusals(
    ledger: &Ledger,
    service: &ServiceKey,
    plan: &ServicePlan,
    ids: &BTreeMap<&PortKey, ServiceId>,
) -> Vec<String> {
    let mut lost: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut won: BTreeSet<&PortKey> = BTreeSet::new();
    for (frontend, route) in &plan.frontends {
        match ledger.winner(frontend) {
            Some(winner) if winner != service => lost
                .entry(winner.to_string())
                .or_default()
                .push(frontend.to_string()),
            _ => won.extend([&route.internal, &route.external]),
        }
    }
    let mut found: Vec<String> = lost
        .iter()
        .map(|(winner, frontends)| format!("{} belongs to {winner}", frontends.join(", ")))
        .collect();
    for key in won {
        // Before the first batch nothing has one.
        if !ids.contains_key(key) && !ledger.held().services.is_empty() {
            found.push(format!("{key} has no id"));
        }
    }
    for (key, port) in plan.ports.iter().filter(|(_, port)| port.left_out > 0) {
        found.push(format!(
            "{key}: {} backends are left out: no packet may go to their addresses, or they are more than a port can have",
            port.left_out
        ));
    }
    found
}
