//! Services. Addresses and node ports are given out by [`crate::api::allocation`], between defaulting and validation.

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

/// Whether clients outside the cluster may reach a service.
fn is_exposed(service: &Value) -> bool {
    match service.text("/spec/type") {
        "NodePort" | "LoadBalancer" => true,
        "ClusterIP" => !service.items("/spec/externalIPs").is_empty(),
        _ => false,
    }
}

/// Whether the type of a service comes with node ports.
pub fn wants_node_ports(service: &Value) -> bool {
    match service.text("/spec/type") {
        "NodePort" => true,
        "LoadBalancer" => {
            service.pointer("/spec/allocateLoadBalancerNodePorts") != Some(&Value::Bool(false))
        }
        _ => false,
    }
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
                if matches!(kind, "NodePort" | "LoadBalancer") {
                    service.default("/spec/externalTrafficPolicy", "Cluster");
                } else if service.items("/spec/externalIPs").is_empty() {
                    service.remove("/spec/externalTrafficPolicy");
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
        if !wants_node_ports(service) {
            // Turning away from node ports gives them back where the client only carried them along.
            for port in service.items_mut("/spec/ports") {
                let number = port.int("/nodePort");
                if old
                    .items("/spec/ports")
                    .iter()
                    .any(|old| old.int("/nodePort") == number)
                {
                    port.remove("/nodePort");
                }
            }
        } else {
            for port in service.items_mut("/spec/ports") {
                let same = |old: &&Value| {
                    old.int("/port") == port.int("/port")
                        && old.text("/protocol") == port.text("/protocol")
                };
                let known = old
                    .items("/spec/ports")
                    .iter()
                    .find(same)
                    .map_or(0, |old| old.int("/nodePort"));
                if known != 0 {
                    port.default("/nodePort", known);
                }
            }
        }
        // So does the policy for clients outside, where there can be none any more.
        let policy = "/spec/externalTrafficPolicy";
        if is_exposed(old) && !is_exposed(service) && old.text(policy) == service.text(policy) {
            service.remove(policy);
        }
        if old.text("/spec/type") == "LoadBalancer" && service.text("/spec/type") != "LoadBalancer"
        {
            // As above: what only the old type can have goes with it, unless the client set it anew.
            for field in [
                "/spec/allocateLoadBalancerNodePorts",
                "/spec/loadBalancerClass",
            ] {
                if service.pointer(field) == old.pointer(field) {
                    service.remove(field);
                }
            }
        }
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
        let special = match ip {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        if ip.is_unspecified() {
            address.invalid(format!("may not be unspecified ({ip})"), errors);
        } else if ip.is_loopback() {
            let why = "may not be in the loopback range (127.0.0.0/8, ::1/128)";
            address.invalid(why, errors);
        } else if special {
            let why = "may not be in the link-local range (169.254.0.0/16, fe80::/10)";
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

#[cfg(test)]
mod tests {
    use super::super::testing::told_with_defaults;
    use super::*;

    #[test]
    fn ports_get_a_protocol_and_a_target() {
        let mut service = json!({"spec": {"ports": [{"port": 80}, {"port": 53, "protocol": "UDP", "targetPort": "dns"}]}});
        Service.default(&mut service);
        assert_eq!(
            service["spec"]["ports"][0],
            json!({"port": 80, "protocol": "TCP", "targetPort": 80})
        );
        assert_eq!(service["spec"]["ports"][1]["targetPort"], "dns");
        assert_eq!(service["spec"]["type"], "ClusterIP");
    }

    #[test]
    fn a_type_that_changes_takes_along_what_only_it_can_have() {
        let mut old = json!({"spec": {
            "type": "LoadBalancer", "loadBalancerClass": "example.com/a", "ports": [{"port": 80, "nodePort": 30000}],
        }});
        Service.default(&mut old);
        let mut service = old.clone();
        service["spec"]["type"] = "ClusterIP".into();
        Service.default(&mut service);
        Service.prepare_update(&mut service, &old);
        let mut errors = Vec::new();
        Service.validate(&service, &mut errors);
        assert!(errors.is_empty(), "{errors:?}");
        // What is set anew is wrong, and is said to be.
        service["spec"]["loadBalancerClass"] = "example.com/b".into();
        Service.prepare_update(&mut service, &old);
        Service.validate(&service, &mut errors);
        assert_eq!(errors.len(), 1, "{errors:?}");
    }

    #[test]
    fn a_service_that_becomes_a_name_loses_its_policy_for_clients_outside() {
        let mut old =
            json!({"spec": {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30000}]}});
        Service.default(&mut old);
        let mut service = old.clone();
        service["spec"]["type"] = "ExternalName".into();
        service["spec"]["externalName"] = "example.com".into();
        Service.default(&mut service);
        Service.prepare_update(&mut service, &old);
        let mut errors = Vec::new();
        Service.validate(&service, &mut errors);
        assert!(errors.is_empty(), "{errors:?}");
        // What is set anew is wrong, and is said to be.
        service["spec"]["externalTrafficPolicy"] = "Local".into();
        Service.prepare_update(&mut service, &old);
        Service.validate(&service, &mut errors);
        assert_eq!(errors.len(), 1, "{errors:?}");
    }

    #[test]
    fn a_balancers_port_for_health_stays() {
        let balanced = |port: u16, policy: &str| {
            json!({"spec": {"type": "LoadBalancer", "ports": [{"port": 80}],
                "externalTrafficPolicy": policy, "healthCheckNodePort": port}})
        };
        let faults = |new: &Value| {
            let mut errors = Vec::new();
            Service.validate_update(new, &balanced(30222, "Local"), &mut errors);
            errors
                .into_iter()
                .map(|error| error.field)
                .collect::<Vec<_>>()
        };
        let field = "spec.healthCheckNodePort";
        assert!(!faults(&balanced(30222, "Local")).contains(&field.to_owned()));
        assert!(faults(&balanced(30333, "Local")).contains(&field.to_owned()));
        assert!(!faults(&balanced(0, "Cluster")).contains(&field.to_owned()));
    }

    #[test]
    fn what_does_not_go_with_the_type_is_refused() {
        let told = |spec: Value| told_with_defaults(&Service, json!({ "spec": spec }));
        assert_eq!(told(json!({"ports": [{"port": 80}]})), Vec::<String>::new());
        assert_eq!(told(json!({})), ["spec.ports: Required value"]);
        assert_eq!(
            told(
                json!({"ports": [{"port": 80, "name": "a", "nodePort": 30000}, {"port": 80, "name": "a", "targetPort": "-x"}],
                "loadBalancerSourceRanges": ["10.0.0.0/8"], "externalIPs": ["127.0.0.1"]})
            ),
            [
                "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
                "spec.ports[1].name: Duplicate value: \"a\"",
                "spec.ports[1].targetPort: Invalid value: \"-x\": must not begin or end with a hyphen",
                r#"spec.ports[1]: Duplicate value: {"port":80,"protocol":"TCP"}"#,
                r#"spec.externalIPs[0]: Invalid value: "127.0.0.1": may not be in the loopback range (127.0.0.0/8, ::1/128)"#,
                "spec.loadBalancerSourceRanges: Forbidden: may only be used when `type` is 'LoadBalancer'",
            ]
        );
        assert_eq!(
            told(json!({"type": "ExternalName"})),
            ["spec.externalName: Required value"]
        );
    }
}
