//! Services. Addresses and node ports are given out by [`crate::api::allocation`], between defaulting and validation.

mod carry;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::metadata::dns_subdomain;
use super::place::Place;
use super::{Errors, NameRule, Strategy, dns_label, families, qualified_name};
use crate::api::fields::Fields;
use crate::api::status::FieldError;

pub struct Service;

/// How long a client sticks to its backend unless said otherwise.
const AFFINITY_TIMEOUT_S: i64 = 10800;
const AFFINITY_TIMEOUT_S_MAX: i64 = 86400;
/// Where kubelets are asked for logs and commands, on every node.
const KUBELET_PORT: i64 = 10250;

/// The type of a service, by default as well.
fn kind(service: &Value) -> &str {
    match service.text("/spec/type") {
        "" => "ClusterIP",
        kind => kind,
    }
}

/// Whether clients outside the cluster may reach a service.
fn is_exposed(service: &Value) -> bool {
    match kind(service) {
        "NodePort" | "LoadBalancer" => true,
        "ClusterIP" => !service.items("/spec/externalIPs").is_empty(),
        _ => false,
    }
}

/// Whether the type of a service has node ports.
fn has_node_ports(service: &Value) -> bool {
    matches!(kind(service), "NodePort" | "LoadBalancer")
}

/// Whether ports of a service that have no node port are given one.
pub fn wants_node_ports(service: &Value) -> bool {
    let allocates =
        || service.pointer("/spec/allocateLoadBalancerNodePorts") != Some(&Value::Bool(false));
    has_node_ports(service) && (kind(service) == "NodePort" || allocates())
}

/// Whether a service is a balancer that leads to local backends only: its nodes say at a port of its own whether they have any.
pub fn tells_of_health(service: &Value) -> bool {
    kind(service) == "LoadBalancer" && service.text("/spec/externalTrafficPolicy") == "Local"
}

impl Strategy for Service {
    fn creates_on_update(&self) -> bool {
        true
    }

    fn default(&self, service: &mut Value) {
        service.default("/spec/type", "ClusterIP");
        service.default("/spec/sessionAffinity", "None");
        if service.text("/spec/sessionAffinity") == "ClientIP" {
            service.default(
                "/spec/sessionAffinityConfig/clientIP/timeoutSeconds",
                AFFINITY_TIMEOUT_S,
            );
        } else {
            service.remove("/spec/sessionAffinityConfig");
        }
        for port in service.items_mut("/spec/ports") {
            port.default("/protocol", "TCP");
            let target = port.pointer("/targetPort");
            let absent =
                |target: &Value| target.is_null() || *target == json!(0) || *target == json!("");
            if target.is_none_or(absent) {
                let number = port.int("/port");
                port.set("/targetPort", number);
            }
        }
        match service.text("/spec/type").to_owned().as_str() {
            "ExternalName" => {}
            kind => {
                service.default("/spec/internalTrafficPolicy", "Cluster");
                if is_exposed(service) {
                    service.default("/spec/externalTrafficPolicy", "Cluster");
                }
                if kind == "LoadBalancer" {
                    service.default("/spec/allocateLoadBalancerNodePorts", true);
                }
            }
        }
    }

    fn prepare_create(&self, service: &mut Value) {
        service.set("/status", json!({"loadBalancer": {}}));
    }

    fn prepare_update(&self, service: &mut Value, old: &Value) {
        families::drop_for_external_name(service, old);
        carry::keep(service, old);
        carry::leave(service, old);
        if !old.has("/status") {
            service.default("/status", json!({"loadBalancer": {}}));
        }
    }

    fn validate(&self, service: &Value, errors: &mut Errors) {
        let spec = Place::root(service).field("spec");
        let kind = spec.field("type").text();
        for (field, allowed) in CHOICES {
            spec.field(field).one_of(allowed, errors);
        }
        let headless = spec.field("clusterIP").text() == "None";
        if spec.field("ports").is_empty() && !headless && kind != "ExternalName" {
            spec.field("ports").missing("", errors);
        }
        if headless && matches!(kind, "NodePort" | "LoadBalancer") {
            let why = format!("may not be set to 'None' for {kind} services");
            errors.push(FieldError::invalid("spec.clusterIPs[0]", "None", why));
        }
        if kind == "ExternalName" {
            let name = spec.field("externalName");
            let plain = |text: &str| dns_subdomain(text.strip_suffix('.').unwrap_or(text));
            name.require_name(plain, errors);
            for field in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                if !spec.field(field).is_empty() {
                    let why = "may not be set for ExternalName services";
                    spec.field(field).forbidden(why, errors);
                }
            }
        }
        validate_ports(&spec, kind, errors);
        validate_addresses(&spec, errors);
        families::validate(service, errors);
        validate_policies(&spec, kind, errors);
        super::metadata::validate_labels(service.object("/spec/selector"), "spec.selector", errors);
    }

    fn validate_update(&self, service: &Value, old: &Value, errors: &mut Errors) {
        let (spec, before) = (
            Place::root(service).field("spec"),
            Place::root(old).field("spec"),
        );
        families::validate_update(service, old, errors);
        let balanced = |spec: &Place<'_>| spec.field("type").text() == "LoadBalancer";
        if balanced(&spec) && balanced(&before) {
            let class = spec.field("loadBalancerClass");
            if class.value() != before.field("loadBalancerClass").value() {
                class.invalid("may not change once set", errors);
            }
        }
        let check = before.field("healthCheckNodePort");
        let local = |spec: &Place<'_>| spec.field("externalTrafficPolicy").text() == "Local";
        if check.int() != 0 && balanced(&spec) && local(&spec) && local(&before) {
            spec.field("healthCheckNodePort").unchanged(&check, errors);
        }
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["spec.clusterIP", "spec.type"]
    }

    fn name_rule(&self) -> NameRule {
        NameRule::Label
    }
}

/// Checks what a balancer says of a service: that may have become another type meanwhile.
pub fn validate_status(service: &Value, errors: &mut Errors) {
    let ingress = Place::root(service).field("status.loadBalancer.ingress");
    if kind(service) != "LoadBalancer" && !ingress.is_empty() {
        let why = "may only be used when `spec.type` is 'LoadBalancer'";
        ingress.forbidden(why, errors);
    }
}

/// Fields that have one of a few values, where they are there.
const CHOICES: [(&str, &[&str]); 5] = [
    (
        "type",
        &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"],
    ),
    ("sessionAffinity", &["ClientIP", "None"]),
    ("internalTrafficPolicy", &["Cluster", "Local"]),
    ("externalTrafficPolicy", &["Cluster", "Local"]),
    (
        "trafficDistribution",
        &["PreferClose", "PreferSameNode", "PreferSameZone"],
    ),
];

fn validate_ports(spec: &Place<'_>, kind: &str, errors: &mut Errors) {
    let ports = spec.field("ports");
    let mut names: BTreeSet<&str> = BTreeSet::new();
    let mut numbers: BTreeSet<(i64, &str)> = BTreeSet::new();
    let mut node_ports: BTreeSet<(i64, &str)> = BTreeSet::new();
    for port in ports.items() {
        let name = port.field("name");
        if name.is_empty() && ports.len() > 1 {
            name.missing("", errors);
        } else if !name.is_empty() {
            name.keep_to(dns_label, errors);
            if !names.insert(name.text()) {
                name.duplicate(errors);
            }
        }
        let (number, protocol) = (port.field("port"), port.field("protocol"));
        number.port(errors);
        if kind == "LoadBalancer" && number.int() == KUBELET_PORT {
            let why = format!(
                "may not expose port {KUBELET_PORT} externally since it is used by kubelet"
            );
            number.invalid(why, errors);
        }
        protocol.require_one_of(&["SCTP", "TCP", "UDP"], errors);
        if port.field("targetPort").is_there() {
            port.field("targetPort").port_or_name(errors);
        }
        port.field("appProtocol").keep_to(qualified_name, errors);
        let claim = (number.int(), protocol.text());
        if !numbers.insert(claim) {
            let given = json!({"port": claim.0, "protocol": claim.1});
            errors.push(FieldError::duplicate(port.path(), given));
        }
        let node_port = port.field("nodePort");
        if node_port.int() == 0 {
            continue;
        }
        if matches!(kind, "ClusterIP" | "ExternalName") {
            node_port.forbidden(&format!("may not be used when `type` is '{kind}'"), errors);
        }
        if !node_ports.insert((node_port.int(), protocol.text())) {
            node_port.duplicate(errors);
        }
    }
}

fn validate_addresses(spec: &Place<'_>, errors: &mut Errors) {
    for address in spec.field("externalIPs").items() {
        let Ok(ip) = address.text().parse::<IpAddr>() else {
            address.address(errors);
            continue;
        };
        let ip = ip.to_canonical();
        let (on_link, group_on_link) = match ip {
            IpAddr::V4(ip) => (ip.is_link_local(), ip.octets()[..3] == [224, 0, 0]),
            IpAddr::V6(ip) => (
                ip.is_unicast_link_local(),
                ip.segments()[0] & 0xff0f == 0xff02,
            ),
        };
        if ip.is_unspecified() {
            address.invalid(format!("may not be unspecified ({ip})"), errors);
        } else if ip.is_loopback() {
            let why = "may not be in the loopback range (127.0.0.0/8, ::1/128)";
            address.invalid(why, errors);
        } else if on_link {
            let why = "may not be in the link-local range (169.254.0.0/16, fe80::/10)";
            address.invalid(why, errors);
        } else if group_on_link {
            let why = "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)";
            address.invalid(why, errors);
        }
    }
    for range in spec.field("loadBalancerSourceRanges").items() {
        let trimmed = Value::from(range.text().trim());
        Place::at(&trimmed, range.path()).cidr(errors);
    }
}

/// What goes with some types and settings only.
fn validate_policies(spec: &Place<'_>, kind: &str, errors: &mut Errors) {
    if kind != "LoadBalancer" {
        for field in [
            "loadBalancerSourceRanges",
            "loadBalancerClass",
            "allocateLoadBalancerNodePorts",
        ] {
            if !spec.field(field).is_empty() {
                let why = "may only be used when `type` is 'LoadBalancer'";
                spec.field(field).forbidden(why, errors);
            }
        }
    }
    spec.field("loadBalancerClass")
        .keep_to(qualified_name, errors);
    let external = spec.field("externalTrafficPolicy");
    let reachable = matches!(kind, "NodePort" | "LoadBalancer")
        || (kind == "ClusterIP" && !spec.field("externalIPs").is_empty());
    if !external.is_empty() && !reachable {
        external.invalid("may only be set for externally-accessible services", errors);
    }
    let check = spec.field("healthCheckNodePort");
    if check.int() != 0 && !(kind == "LoadBalancer" && external.text() == "Local") {
        let why =
            "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
        check.invalid(why, errors);
    }
    let timeout = spec.field("sessionAffinityConfig.clientIP.timeoutSeconds");
    if timeout.is_there() && !(1..=AFFINITY_TIMEOUT_S_MAX).contains(&timeout.int()) {
        let why = format!("must be greater than 0 and less than {AFFINITY_TIMEOUT_S_MAX}");
        timeout.invalid(why, errors);
    }
}
