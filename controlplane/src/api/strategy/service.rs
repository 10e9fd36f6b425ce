//! Services. Addresses and node ports are given out by [`crate::api::allocation`], between defaulting and validation.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{Errors, NameRule, Strategy, one_of};
use crate::api::fields::Fields;
use crate::api::status::FieldError;

pub struct Service;

/// How long a client sticks to its backend unless said otherwise.
const AFFINITY_TIMEOUT_S: i64 = 10800;

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
                service.default("/spec/ipFamilyPolicy", "SingleStack");
                if service.items("/spec/ipFamilies").is_empty() {
                    service.set("/spec/ipFamilies", json!(["IPv4"]));
                }
            }
        }
    }

    fn prepare_create(&self, service: &mut Value) {
        service.set("/status", json!({"loadBalancer": {}}));
    }

    fn prepare_update(&self, service: &mut Value, old: &Value) {
        let has_address = |service: &Value| service.text("/spec/type") != "ExternalName";
        if has_address(service) && has_address(old) {
            // Clients that do not know the address keep it.
            if service.text("/spec/clusterIP").is_empty()
                && service.items("/spec/clusterIPs").is_empty()
            {
                for field in ["/spec/clusterIP", "/spec/clusterIPs"] {
                    if let Some(value) = old.pointer(field) {
                        service.set(field, value.clone());
                    }
                }
            }
        } else if !has_address(service) {
            // Turning to an ExternalName gives the address back, unless the client says one.
            if service.text("/spec/clusterIP") == old.text("/spec/clusterIP") {
                for field in [
                    "clusterIP",
                    "clusterIPs",
                    "ipFamilies",
                    "ipFamilyPolicy",
                    "internalTrafficPolicy",
                ] {
                    service.remove(&format!("/spec/{field}"));
                }
            }
        }
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
        if !old.has("/status") {
            service.default("/status", json!({"loadBalancer": {}}));
        }
    }

    fn validate(&self, service: &Value, errors: &mut Errors) {
        let kind = service.text("/spec/type");
        one_of(
            service,
            "/spec/type",
            "",
            &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"],
            errors,
        );
        one_of(
            service,
            "/spec/sessionAffinity",
            "",
            &["ClientIP", "None"],
            errors,
        );
        one_of(
            service,
            "/spec/internalTrafficPolicy",
            "",
            &["Cluster", "Local"],
            errors,
        );
        one_of(
            service,
            "/spec/externalTrafficPolicy",
            "",
            &["Cluster", "Local"],
            errors,
        );
        let distributions = ["PreferClose", "PreferSameZone", "PreferSameNode"];
        one_of(
            service,
            "/spec/trafficDistribution",
            "",
            &distributions,
            errors,
        );
        one_of(
            service,
            "/spec/ipFamilyPolicy",
            "",
            &["SingleStack", "PreferDualStack", "RequireDualStack"],
            errors,
        );
        let headless = service.text("/spec/clusterIP") == "None";
        let ports = service.items("/spec/ports");
        if ports.is_empty() && !headless && kind != "ExternalName" {
            errors.push(FieldError::required("spec.ports", ""));
        }
        if kind == "ExternalName" && service.text("/spec/externalName").is_empty() {
            errors.push(FieldError::required("spec.externalName", ""));
        }
        if headless && matches!(kind, "NodePort" | "LoadBalancer") {
            let why = format!("may not be set to 'None' for {kind} services");
            errors.push(FieldError::invalid("spec.clusterIPs[0]", "None", why));
        }
        let mut names: Vec<&str> = Vec::new();
        let mut numbers: Vec<(i64, &str)> = Vec::new();
        for (at, port) in ports.iter().enumerate() {
            let field = |name: &str| format!("spec.ports[{at}].{name}");
            let name = port.text("/name");
            if name.is_empty() && ports.len() > 1 {
                errors.push(FieldError::required(field("name"), ""));
            } else if !name.is_empty() {
                if let Some(why) = super::dns_label(name) {
                    errors.push(FieldError::invalid(field("name"), name, why));
                }
                if names.contains(&name) {
                    errors.push(FieldError::duplicate(field("name"), name));
                }
                names.push(name);
            }
            if !(1..=65535).contains(&port.int("/port")) {
                let why = "must be between 1 and 65535, inclusive";
                errors.push(FieldError::invalid(field("port"), port.int("/port"), why));
            }
            let number = port.pointer("/targetPort").and_then(Value::as_i64);
            if let Some(number) = number.filter(|number| !(1..=65535).contains(number)) {
                let why = "must be between 1 and 65535, inclusive";
                errors.push(FieldError::invalid(field("targetPort"), number, why));
            }
            let at = format!("spec.ports[{at}]");
            one_of(port, "/protocol", &at, &["SCTP", "TCP", "UDP"], errors);
            if numbers.contains(&(port.int("/port"), port.text("/protocol"))) {
                errors.push(FieldError::duplicate(
                    at,
                    json!({"port": port["port"], "protocol": port["protocol"]}),
                ));
            }
            numbers.push((port.int("/port"), port.text("/protocol")));
            if port.int("/nodePort") != 0 && matches!(kind, "ClusterIP" | "ExternalName") {
                errors.push(FieldError::forbidden(
                    field("nodePort"),
                    &format!("may not be used when `type` is '{kind}'"),
                ));
            }
        }
        for (at, address) in service.items("/spec/externalIPs").iter().enumerate() {
            let text = address.as_str().unwrap_or("");
            if text.parse::<IpAddr>().is_err() {
                errors.push(FieldError::invalid(
                    format!("spec.externalIPs[{at}]"),
                    text,
                    "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
                ));
            }
        }
        super::metadata::validate_labels(service.object("/spec/selector"), "spec.selector", errors);
    }

    fn validate_update(&self, service: &Value, old: &Value, errors: &mut Errors) {
        let addressed = |service: &Value| service.text("/spec/type") != "ExternalName";
        let (new_ip, old_ip) = (service.text("/spec/clusterIP"), old.text("/spec/clusterIP"));
        if addressed(service) && addressed(old) && !old_ip.is_empty() && new_ip != old_ip {
            let given = service
                .pointer("/spec/clusterIPs")
                .cloned()
                .unwrap_or_default();
            errors.push(FieldError::invalid(
                "spec.clusterIPs[0]",
                given,
                "may not change once set",
            ));
        }
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["spec.clusterIP", "spec.type"]
    }

    fn name_rule(&self) -> NameRule {
        NameRule::Label
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(service["spec"]["ipFamilies"], json!(["IPv4"]));
    }

    #[test]
    fn an_update_without_the_address_keeps_it_and_another_one_is_refused() {
        let old = json!({"spec": {"type": "ClusterIP", "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5"]}});
        let mut new = json!({"spec": {"type": "ClusterIP"}});
        Service.prepare_update(&mut new, &old);
        assert_eq!(new["spec"]["clusterIP"], "10.96.0.5");
        let mut errors = Vec::new();
        let other = json!({"spec": {"type": "ClusterIP", "clusterIP": "10.96.0.6", "clusterIPs": ["10.96.0.6"]}});
        Service.validate_update(&other, &old, &mut errors);
        assert_eq!(errors.len(), 1);
    }
}
