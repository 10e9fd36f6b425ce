//! Services, as the network path sees them.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use crate::reject::{self, BadField};
use crate::{Kind, Rejected, ServiceKey, wire};

/// A Service whose addresses and ports have been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    pub key: ServiceKey,
    pub service_type: ServiceType,
    /// The addresses of the Service; empty when it is headless, external, or has none yet.
    pub cluster_ips: Vec<IpAddr>,
    /// `clusterIP: None`: names resolve to the endpoints.
    pub headless: bool,
    /// The canonical name of a Service of type ExternalName.
    pub external_name: Option<Arc<str>>,
    pub external_ips: Vec<IpAddr>,
    /// Addresses that a load balancer has been given (`status.loadBalancer.ingress` with mode VIP).
    pub load_balancer_ips: Vec<IpAddr>,
    /// External and balanced addresses that were left out because no packet can be sent to them, in words. The others serve.
    pub refused: Vec<String>,
    pub load_balancer_source_ranges: Vec<IpNetwork>,
    pub ports: Vec<ServicePort>,
    /// Endpoints count as ready whatever their conditions say.
    pub publish_not_ready: bool,
    pub traffic_distribution: TrafficDistribution,
    /// `sessionAffinity: ClientIP` with its timeout, in seconds.
    pub affinity_timeout_s: Option<u32>,
    pub internal_traffic_policy: TrafficPolicy,
    pub external_traffic_policy: TrafficPolicy,
    pub health_check_node_port: Option<u16>,
    /// Label `service.kubernetes.io/service-proxy-name`: another proxy serves this Service.
    pub proxy_name: Option<Arc<str>>,
    /// Annotation [`BALANCING_ANNOTATION`], whatever it says.
    pub balancing: Option<Arc<str>>,
    /// Annotation [`DSR_ANNOTATION`], whatever it says.
    pub dsr: Option<Arc<str>>,
}

impl Service {
    /// A Service of type ClusterIP that has its name and nothing else.
    pub fn named(key: ServiceKey) -> Self {
        Self {
            key,
            service_type: ServiceType::ClusterIp,
            cluster_ips: Vec::new(),
            headless: false,
            external_name: None,
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            refused: Vec::new(),
            load_balancer_source_ranges: Vec::new(),
            ports: Vec::new(),
            publish_not_ready: false,
            traffic_distribution: TrafficDistribution::Any,
            affinity_timeout_s: None,
            internal_traffic_policy: TrafficPolicy::Cluster,
            external_traffic_policy: TrafficPolicy::Cluster,
            health_check_node_port: None,
            proxy_name: None,
            balancing: None,
            dsr: None,
        }
    }
}

/// `spec.type` of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ServiceType {
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalName,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name of the port, by which slices refer to it; empty when the Service has one port without a name.
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: Option<u16>,
    pub app_protocol: Option<Arc<str>>,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// The protocol's number in an IP header.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }

    /// The API's name of the protocol; absent means TCP.
    pub(crate) fn parse(
        text: Option<&str>,
        field: impl FnOnce() -> String,
    ) -> Result<Self, BadField> {
        match text {
            None | Some("" | "TCP") => Ok(Protocol::Tcp),
            Some("UDP") => Ok(Protocol::Udp),
            Some("SCTP") => Ok(Protocol::Sctp),
            Some(other) => Err(BadField::new(
                field(),
                format!("{other:?} is not TCP, UDP or SCTP"),
            )),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// `spec.trafficDistribution`: which endpoints to prefer. It speaks to whoever writes the Service's slices; proxies go by the hints that
/// are in these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TrafficDistribution {
    /// All alike. Values this version does not know mean the same, as the API asks.
    #[default]
    Any,
    /// `PreferSameZone`, and its older name `PreferClose`.
    SameZone,
    /// `PreferSameNode`.
    SameNode,
}

/// `spec.internalTrafficPolicy` and `spec.externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TrafficPolicy {
    #[default]
    Cluster,
    /// Only endpoints of the node that the traffic enters at.
    Local,
}

/// Annotation that says how backends are chosen for clients outside: `maglev` or `random`.
pub const BALANCING_ANNOTATION: &str = "keelway.io/balancing";
/// Annotation that says whether clients outside are answered by their endpoint's node directly: `on` or `off`.
pub const DSR_ANNOTATION: &str = "keelway.io/dsr";
pub(crate) const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// The API's default timeout of `sessionAffinity: ClientIP`, in seconds.
const AFFINITY_TIMEOUT_DEFAULT_S: u32 = 10_800;

impl TryFrom<wire::Service<'_>> for Service {
    type Error = Rejected;

    fn try_from(service: wire::Service<'_>) -> Result<Self, Rejected> {
        convert(&service).map_err(|bad| bad.of(Kind::Service, &service.metadata))
    }
}

fn convert(service: &wire::Service<'_>) -> Result<Service, BadField> {
    let key = reject::namespaced(&service.metadata)?;
    let spec = service
        .spec
        .as_ref()
        .ok_or_else(|| BadField::new("spec", "is missing"))?;
    let service_type = match spec.type_.as_deref() {
        None | Some("" | "ClusterIP") => ServiceType::ClusterIp,
        Some("NodePort") => ServiceType::NodePort,
        Some("LoadBalancer") => ServiceType::LoadBalancer,
        Some("ExternalName") => ServiceType::ExternalName,
        Some(other) => {
            return Err(BadField::new(
                "spec.type",
                format!("{other:?} is not a type of Service"),
            ));
        }
    };
    let external = service_type == ServiceType::ExternalName;
    let annotations = &service.metadata.annotations;
    let (cluster_ips, headless) = if external {
        (Vec::new(), false)
    } else {
        cluster_ips(spec)?
    };
    let external_ips = addresses(
        spec.external_ips.as_deref().unwrap_or_default(),
        "spec.externalIPs",
    );
    let (external_ips, mut refused) = usable(external_ips);
    let (load_balancer_ips, others) = usable(load_balancer_ips(service));
    refused.extend(others);
    Ok(Service {
        service_type,
        cluster_ips,
        headless,
        external_name: match spec.external_name.as_deref() {
            Some(name) if external && !name.is_empty() => Some(name.into()),
            _ if external => return Err(BadField::new("spec.externalName", "is empty")),
            _ => None,
        },
        external_ips,
        load_balancer_ips,
        refused,
        load_balancer_source_ranges: source_ranges(spec)?,
        ports: ports(spec)?,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or_default(),
        traffic_distribution: match spec.traffic_distribution.as_deref() {
            Some("PreferSameZone" | "PreferClose") => TrafficDistribution::SameZone,
            Some("PreferSameNode") => TrafficDistribution::SameNode,
            _ => TrafficDistribution::Any,
        },
        affinity_timeout_s: affinity(spec)?,
        internal_traffic_policy: policy(
            spec.internal_traffic_policy.as_deref(),
            "spec.internalTrafficPolicy",
        )?,
        external_traffic_policy: policy(
            spec.external_traffic_policy.as_deref(),
            "spec.externalTrafficPolicy",
        )?,
        health_check_node_port: match spec.health_check_node_port {
            None | Some(0) => None,
            Some(number) => Some(reject::port(number, || "spec.healthCheckNodePort".into())?),
        },
        proxy_name: service
            .metadata
            .labels
            .get(PROXY_NAME_LABEL)
            .map(Into::into),
        balancing: annotations.get(BALANCING_ANNOTATION).map(Into::into),
        dsr: annotations.get(DSR_ANNOTATION).map(Into::into),
        key,
    })
}

/// The addresses of a Service, and whether it is headless. `clusterIP` alone is an older writer's form.
fn cluster_ips(spec: &wire::ServiceSpec<'_>) -> Result<(Vec<IpAddr>, bool), BadField> {
    let listed: Vec<&str> = match spec.cluster_ips.as_deref() {
        Some(list) if !list.is_empty() => list.iter().map(|text| &**text).collect(),
        _ => spec
            .cluster_ip
            .as_deref()
            .into_iter()
            .filter(|text| !text.is_empty())
            .collect(),
    };
    if listed == ["None"] {
        return Ok((Vec::new(), true));
    }
    let ips: Result<Vec<IpAddr>, BadField> = addresses(&listed, "spec.clusterIPs").collect();
    Ok((ips?, false))
}

fn addresses(
    texts: &[impl AsRef<str>],
    field: &str,
) -> impl Iterator<Item = Result<IpAddr, BadField>> {
    let texts = texts.iter().enumerate();
    texts.map(move |(i, text)| reject::address(text.as_ref(), || format!("{field}[{i}]")))
}

/// Those of a Service's addresses that can be served, and what is wrong with the others.
fn usable(addresses: impl Iterator<Item = Result<IpAddr, BadField>>) -> (Vec<IpAddr>, Vec<String>) {
    let (mut usable, mut refused) = (Vec::new(), Vec::new());
    for address in addresses {
        match address {
            Ok(address) => usable.push(address),
            Err(bad) => refused.push(bad.to_string()),
        }
    }
    (usable, refused)
}

fn load_balancer_ips(
    service: &wire::Service<'_>,
) -> impl Iterator<Item = Result<IpAddr, BadField>> {
    let ingress = service
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref())
        .and_then(|balancer| balancer.ingress.as_deref())
        .unwrap_or_default();
    // Mode Proxy: the balancer sends to the node's own address, and its own must not be short-cut (KEP-1860).
    let vips = ingress
        .iter()
        .enumerate()
        .filter(|(_, one)| one.ip_mode.as_deref() != Some("Proxy"));
    vips.filter_map(|(i, one)| {
        one.ip
            .as_deref()
            .filter(|ip| !ip.is_empty())
            .map(|ip| (i, ip))
    })
    .map(|(i, ip)| reject::address(ip, || format!("status.loadBalancer.ingress[{i}].ip")))
}

fn source_ranges(spec: &wire::ServiceSpec<'_>) -> Result<Vec<IpNetwork>, BadField> {
    let texts = spec
        .load_balancer_source_ranges
        .as_deref()
        .unwrap_or_default();
    let parse = |(i, text): (usize, &wire::Text<'_>)| {
        text.trim().parse().map_err(|_| {
            BadField::new(
                format!("spec.loadBalancerSourceRanges[{i}]"),
                format!("{:?} is not a CIDR", &**text),
            )
        })
    };
    texts.iter().enumerate().map(parse).collect()
}

fn ports(spec: &wire::ServiceSpec<'_>) -> Result<Vec<ServicePort>, BadField> {
    let one = |(i, port): (usize, &wire::ServicePort<'_>)| {
        Ok(ServicePort {
            name: port.name.as_deref().unwrap_or_default().into(),
            protocol: Protocol::parse(port.protocol.as_deref(), || {
                format!("spec.ports[{i}].protocol")
            })?,
            port: reject::port(port.port, || format!("spec.ports[{i}].port"))?,
            node_port: match port.node_port {
                None | Some(0) => None,
                Some(number) => Some(reject::port(number, || {
                    format!("spec.ports[{i}].nodePort")
                })?),
            },
            app_protocol: port.app_protocol.as_deref().map(Into::into),
        })
    };
    let given = spec.ports.as_deref().unwrap_or_default();
    // As long as needed and no longer, as endpoints are.
    let mut ports = Vec::with_capacity(given.len());
    for port in given.iter().enumerate() {
        ports.push(one(port)?);
    }
    for (i, port) in ports.iter().enumerate() {
        if ports[..i].iter().any(|other| other.name == port.name) {
            return Err(BadField::new(
                format!("spec.ports[{i}].name"),
                format!("{:?} is there twice", port.name),
            ));
        }
    }
    Ok(ports)
}

fn affinity(spec: &wire::ServiceSpec<'_>) -> Result<Option<u32>, BadField> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return Ok(None),
        Some("ClientIP") => {}
        Some(other) => {
            return Err(BadField::new(
                "spec.sessionAffinity",
                format!("{other:?} is not None or ClientIP"),
            ));
        }
    }
    let configured = spec
        .session_affinity_config
        .as_ref()
        .and_then(|config| config.client_ip.as_ref())
        .and_then(|client_ip| client_ip.timeout_seconds);
    match configured.map(u32::try_from) {
        None => Ok(Some(AFFINITY_TIMEOUT_DEFAULT_S)),
        Some(Ok(seconds @ 1..=86_400)) => Ok(Some(seconds)),
        Some(_) => Err(BadField::new(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!("{} is not 1 to 86400", configured.unwrap_or_default()),
        )),
    }
}

fn policy(text: Option<&str>, field: &str) -> Result<TrafficPolicy, BadField> {
    match text {
        None | Some("" | "Cluster") => Ok(TrafficPolicy::Cluster),
        Some("Local") => Ok(TrafficPolicy::Local),
        Some(other) => Err(BadField::new(
            field,
            format!("{other:?} is not Cluster or Local"),
        )),
    }
}
