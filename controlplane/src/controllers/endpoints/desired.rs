//! The endpoints that a Service should have, grouped by the address family and ports that a slice has in common.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::super::labels::Labels;
use super::super::object::{Key, Target};
use super::super::pods;
use super::super::snapshot::Snapshot;
use super::{is_shared_out, zone};

/// What all endpoints of a slice share. Named target ports may resolve differently in different pods, so a Service can
/// have several.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape {
    pub address_type: &'static str,
    /// (name, protocol, port, application protocol), sorted.
    pub ports: Vec<(String, String, i32, Option<String>)>,
}

impl Shape {
    pub fn of_ports(address_type: &'static str, ports: &[EndpointPort]) -> Self {
        let mut ports: Vec<_> = ports
            .iter()
            .map(|port| {
                (
                    port.name.clone().unwrap_or_default(),
                    port.protocol.clone().unwrap_or_else(|| "TCP".into()),
                    port.port.unwrap_or(0),
                    port.app_protocol.clone(),
                )
            })
            .collect();
        ports.sort();
        Self {
            address_type,
            ports,
        }
    }

    pub fn endpoint_ports(&self) -> Vec<EndpointPort> {
        let port =
            |(name, protocol, port, app_protocol): &(String, String, i32, Option<String>)| {
                EndpointPort {
                    name: Some(name.clone()),
                    protocol: Some(protocol.clone()),
                    port: Some(*port),
                    app_protocol: app_protocol.clone(),
                }
            };
        self.ports.iter().map(port).collect()
    }
}

pub fn address_type(family: &str) -> Option<&'static str> {
    match family {
        "IPv4" => Some("IPv4"),
        "IPv6" => Some("IPv6"),
        _ => None,
    }
}

/// Address families of a Service's slices. A Service without any address family yet is taken for IPv4.
pub fn families(service: &Service) -> Vec<&'static str> {
    let families = service
        .spec
        .as_ref()
        .and_then(|spec| spec.ip_families.as_ref());
    let known: Vec<_> = families
        .into_iter()
        .flatten()
        .filter_map(|family| address_type(family))
        .collect();
    if known.is_empty() {
        vec!["IPv4"]
    } else {
        known
    }
}

/// The pod's addresses, the first one first.
pub fn addresses(pod: &Pod) -> impl Iterator<Item = &str> {
    let status = pod.status.as_ref();
    let all = status
        .and_then(|status| status.pod_ips.as_deref())
        .unwrap_or_default();
    let single = status
        .and_then(|status| status.pod_ip.as_deref())
        .filter(|_| all.is_empty());
    all.iter()
        .map(|ip| ip.ip.as_str())
        .chain(single)
        .filter(|ip| !ip.is_empty())
}

/// Every desired endpoint, by shape. Each address family of the Service has at least one group, empty if need be.
pub fn groups(
    snapshot: &Snapshot,
    service: &Service,
    selector: &Labels,
) -> BTreeMap<Shape, Vec<Endpoint>> {
    let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
    let publish = service
        .spec
        .as_ref()
        .and_then(|spec| spec.publish_not_ready_addresses)
        .unwrap_or(false);
    let families = families(service);
    let mut groups: BTreeMap<Shape, Vec<Endpoint>> = BTreeMap::new();
    for pod in snapshot.pods_with_labels(namespace, selector) {
        // A pod that has ended has no address worth naming, whether or not it still reports one.
        if pods::is_terminal(pod) {
            continue;
        }
        // Nothing answers where there is no node any more; its pods are collected later.
        let node = pods::node_name(pod).map(Key::cluster);
        let node = node.and_then(|node| snapshot.nodes.get(&node));
        if node.is_none() && !publish {
            continue;
        }
        let zone = node.and_then(|node| zone(node));
        for family in &families {
            let Some(address) = addresses(pod).find(|address| is_of(address, family)) else {
                continue;
            };
            let shape = Shape::of_ports(family, &ports_in(service, pod));
            groups
                .entry(shape)
                .or_default()
                .push(endpoint(service, pod, address, zone, publish));
        }
    }
    for family in families {
        if !groups.keys().any(|shape| shape.address_type == family) {
            groups.insert(
                Shape {
                    address_type: family,
                    ports: Vec::new(),
                },
                Vec::new(),
            );
        }
    }
    groups
}

pub fn is_of(address: &str, family: &str) -> bool {
    match address.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => family == "IPv4",
        Ok(IpAddr::V6(_)) => family == "IPv6",
        Err(_) => false,
    }
}

/// The Service's ports as numbers in one pod; a named target port that the pod does not have is left out.
pub fn ports_in(service: &Service, pod: &Pod) -> Vec<EndpointPort> {
    let ports = service
        .spec
        .as_ref()
        .and_then(|spec| spec.ports.as_deref())
        .unwrap_or_default();
    ports
        .iter()
        .filter_map(|port| {
            Some(EndpointPort {
                name: Some(port.name.clone().unwrap_or_default()),
                protocol: Some(protocol(port).into()),
                port: Some(target_port(port, pod)?),
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect()
}

fn protocol(port: &ServicePort) -> &str {
    port.protocol.as_deref().unwrap_or("TCP")
}

fn target_port(port: &ServicePort, pod: &Pod) -> Option<i32> {
    match port.target_port.as_ref() {
        None | Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => {
            let spec = pods::spec(pod);
            // Init containers that keep running (sidecars) may serve a port as well.
            let sidecars = spec.init_containers.iter().flatten();
            let sidecars =
                sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
            spec.containers
                .iter()
                .chain(sidecars)
                .flat_map(|container| container.ports.iter().flatten())
                .find(|found| {
                    found.name.as_ref() == Some(name)
                        && found.protocol.as_deref().unwrap_or("TCP") == protocol(port)
                })
                .map(|found| found.container_port)
        }
    }
}

fn endpoint(
    service: &Service,
    pod: &Pod,
    address: &str,
    zone: Option<&String>,
    publish: bool,
) -> Endpoint {
    let terminating = pods::is_terminating(pod);
    let serving = pods::is_ready(pod);
    let node_name = pods::node_name(pod).map(str::to_string);
    let spec = pods::spec(pod);
    let hostname = spec.hostname.clone().filter(|hostname| {
        !hostname.is_empty() && spec.subdomain.is_some() && spec.subdomain == service.metadata.name
    });
    let mut target = Target::of(pod).reference();
    target.api_version = None;
    let zone = zone.cloned();
    let ready = publish || (serving && !terminating);
    Endpoint {
        addresses: vec![address.into()],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname,
        hints: hints(service, ready, node_name.as_deref(), zone.as_deref()),
        zone,
        node_name,
        target_ref: Some(target),
        ..Default::default()
    }
}

/// For whom a ready endpoint is meant first, as the Service's `trafficDistribution` says (KEP-3015): proxies go by this, not by
/// the Service. Where endpoints are shared out among zones, that comes before it.
fn hints(
    service: &Service,
    ready: bool,
    node: Option<&str>,
    zone: Option<&str>,
) -> Option<EndpointHints> {
    let distribution = service.spec.as_ref()?.traffic_distribution.as_deref()?;
    if !ready || is_shared_out(service) {
        return None;
    }
    let for_zones = zone.map(|zone| vec![ForZone { name: zone.into() }]);
    let for_nodes = node.map(|node| vec![ForNode { name: node.into() }]);
    let hints = match distribution {
        "PreferClose" | "PreferSameZone" => EndpointHints {
            for_zones,
            for_nodes: None,
        },
        "PreferSameNode" => EndpointHints {
            for_zones,
            for_nodes,
        },
        _ => return None,
    };
    (hints.for_zones.is_some() || hints.for_nodes.is_some()).then_some(hints)
}
