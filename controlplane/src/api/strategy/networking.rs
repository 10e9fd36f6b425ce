//! Ingresses and NetworkPolicies.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::{Value, json};

use super::metadata::{dns_label, dns_subdomain, validate_selector, wildcard_subdomain};
use super::place::Place;
use super::{Errors, Strategy};
use crate::api::fields::Fields;
use crate::api::status::FieldError;

pub struct Ingress;

/// The older way to name a class.
const CLASS_ANNOTATION: &str = "/metadata/annotations/kubernetes.io~1ingress.class";

impl Strategy for Ingress {
    fn prepare_create(&self, ingress: &mut Value) {
        ingress.set("/status", json!({"loadBalancer": {}}));
    }

    fn validate(&self, ingress: &Value, errors: &mut Errors) {
        let root = Place::root(ingress);
        let spec = root.field("spec");
        let (backend, rules) = (spec.field("defaultBackend"), spec.field("rules"));
        if rules.is_empty() && !backend.is_there() {
            let why = "either `defaultBackend` or `rules` must be specified";
            errors.push(FieldError::invalid(spec.path(), rules.value().clone(), why));
        }
        if backend.is_there() {
            validate_backend(&backend, errors);
        }
        for rule in rules.items() {
            validate_host(&rule.field("host"), errors);
            let http = rule.field("http");
            if !http.is_there() {
                continue;
            }
            if http.field("paths").is_empty() {
                http.field("paths").missing("", errors);
            }
            for path in http.field("paths").items() {
                validate_path(&path, errors);
                validate_backend(&path.field("backend"), errors);
            }
        }
        for tls in spec.field("tls").items() {
            for host in tls.field("hosts").items() {
                validate_host(&host, errors);
            }
            tls.field("secretName").keep_to(dns_subdomain, errors);
        }
        let class = spec.field("ingressClassName");
        class.keep_to(dns_subdomain, errors);
        let annotation = ingress.text(CLASS_ANNOTATION);
        let new = !ingress.has("/metadata/uid");
        if new && class.is_there() && !annotation.is_empty() && annotation != class.text() {
            let why = "must match `ingressClassName` when both are specified";
            let place = "annotations.kubernetes.io/ingress.class";
            errors.push(FieldError::invalid(place, annotation, why));
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

fn validate_host(host: &Place<'_>, errors: &mut Errors) {
    let name = host.text();
    if name.parse::<IpAddr>().is_ok() {
        host.invalid("must be a DNS name, not an IP address", errors);
    } else if name.contains('*') {
        host.keep_to(wildcard_subdomain, errors);
    } else {
        host.keep_to(dns_subdomain, errors);
    }
}

fn validate_path(path: &Place<'_>, errors: &mut Errors) {
    let (kind, text) = (path.field("pathType"), path.field("path"));
    if kind.is_empty() {
        return kind.missing("pathType must be specified", errors);
    }
    match kind.text() {
        "Exact" | "Prefix" => {
            if !text.text().starts_with('/') {
                text.invalid("must be an absolute path", errors);
            }
            for part in ["//", "/./", "/../", "%2f", "%2F"] {
                if text.text().contains(part) {
                    text.invalid(format!("must not contain '{part}'"), errors);
                }
            }
            for end in ["/..", "/."] {
                if text.text().ends_with(end) {
                    text.invalid(format!("cannot end with '{end}'"), errors);
                }
            }
        }
        "ImplementationSpecific" => {
            if !text.is_empty() && !text.text().starts_with('/') {
                text.invalid("must be an absolute path", errors);
            }
        }
        _ => kind.one_of(&["Exact", "ImplementationSpecific", "Prefix"], errors),
    }
}

fn validate_backend(backend: &Place<'_>, errors: &mut Errors) {
    let (service, resource) = (backend.field("service"), backend.field("resource"));
    match (service.is_there(), resource.is_there()) {
        (true, true) => {
            errors.push(FieldError::invalid(
                backend.path(),
                "",
                "cannot set both resource and service backends",
            ));
        }
        (false, false) => {
            let why = "resource or service backend is required";
            errors.push(FieldError::invalid(backend.path(), "", why));
        }
        (false, true) => {
            resource.field("kind").require(errors);
            resource.field("name").require(errors);
        }
        (true, false) => {
            service.field("name").require_name(dns_label, errors);
            let (name, number) = (service.field("port.name"), service.field("port.number"));
            match (name.is_empty(), number.int() == 0) {
                (false, false) => {
                    let why = "cannot set both port name & port number";
                    errors.push(FieldError::invalid(backend.path(), "", why));
                }
                (true, true) => {
                    let why = "port name or number is required";
                    backend.missing(why, errors);
                }
                (false, true) => name.port_or_name(errors),
                (true, false) => number.port(errors),
            }
        }
    }
}

pub struct IngressClass;

impl Strategy for IngressClass {
    fn default(&self, class: &mut Value) {
        if class.has("/spec/parameters") {
            class.default("/spec/parameters/scope", "Cluster");
        }
    }

    fn validate(&self, class: &Value, errors: &mut Errors) {
        let spec = Place::root(class).field("spec");
        let controller = spec.field("controller");
        if controller.require(errors) {
            let text = controller.text();
            if text.len() > 250 {
                controller.invalid("must be no more than 250 bytes", errors);
            }
            if !text.contains('/') {
                controller.invalid(
                    "must be a domain-prefixed path (such as \"acme.io/foo\")",
                    errors,
                );
            }
        }
        let parameters = spec.field("parameters");
        if parameters.is_there() {
            parameters.field("kind").require(errors);
            parameters.field("name").require(errors);
            parameters
                .field("scope")
                .require_one_of(&["Cluster", "Namespace"], errors);
        }
    }

    fn validate_update(&self, class: &Value, old: &Value, errors: &mut Errors) {
        let controller = |class| Place::root(class).field("spec.controller");
        controller(class).unchanged(&controller(old), errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

pub struct NetworkPolicy;

impl Strategy for NetworkPolicy {
    fn default(&self, policy: &mut Value) {
        for direction in ["/spec/ingress", "/spec/egress"] {
            for rule in policy.items_mut(direction) {
                for port in rule.items_mut("/ports") {
                    port.default("/protocol", "TCP");
                }
            }
        }
        // A policy that says nothing about directions is about incoming traffic, and outgoing where it has rules for it.
        if policy.items("/spec/policyTypes").is_empty() {
            let mut kinds = vec!["Ingress"];
            if !policy.items("/spec/egress").is_empty() {
                kinds.push("Egress");
            }
            policy.set("/spec/policyTypes", json!(kinds));
        }
        policy.object_mut("/spec/podSelector");
    }

    fn validate(&self, policy: &Value, errors: &mut Errors) {
        let spec = Place::root(policy).field("spec");
        validate_selector(&spec.field("podSelector"), errors);
        for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
            for rule in spec.field(direction).items() {
                for port in rule.field("ports").items() {
                    validate_policy_port(&port, errors);
                }
                for peer in rule.field(peers).items() {
                    validate_peer(&peer, errors);
                }
            }
        }
        let kinds = spec.field("policyTypes");
        if kinds.len() > 2 {
            kinds.invalid("may not specify more than two policyTypes", errors);
        } else {
            for kind in kinds.items() {
                kind.exactly_one_as_listed(&["Ingress", "Egress"], errors);
            }
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

fn validate_policy_port(port: &Place<'_>, errors: &mut Errors) {
    port.field("protocol")
        .exactly_one_as_listed(&["TCP", "UDP", "SCTP"], errors);
    let (first, last) = (port.field("port"), port.field("endPort"));
    if first.is_there() {
        first.port_or_name(errors);
    }
    if !last.is_there() {
        return;
    }
    if !first.is_there() {
        last.invalid("may not be specified when `port` is not specified", errors);
    } else if first.value().is_string() {
        last.invalid("may not be specified when `port` is non-numeric", errors);
    } else if last.int() < first.int() {
        let why = "must be greater than or equal to `port`";
        errors.push(FieldError::invalid(last.path(), first.int(), why));
    } else {
        last.port(errors);
    }
}

fn validate_peer(peer: &Place<'_>, errors: &mut Errors) {
    let block = peer.field("ipBlock");
    let selectors = [peer.field("podSelector"), peer.field("namespaceSelector")];
    let selects = selectors.iter().any(Place::is_there);
    if !selects && !block.is_there() {
        return peer.missing("must specify a peer", errors);
    }
    if selects && block.is_there() {
        return peer.forbidden("may not specify both ipBlock and another peer", errors);
    }
    for selector in &selectors {
        validate_selector(selector, errors);
    }
    if !block.is_there() {
        return;
    }
    let cidr = block.field("cidr");
    if !cidr.require(errors) {
        return;
    }
    cidr.cidr(errors);
    let Ok(network) = cidr.text().parse::<IpNetwork>() else {
        return;
    };
    for except in block.field("except").items() {
        except.cidr(errors);
        let Ok(inner) = except.text().parse::<IpNetwork>() else {
            continue;
        };
        let strict = network.contains(inner.network()) && inner.prefix() > network.prefix();
        if !strict {
            except.invalid("must be a strict subset of `cidr`", errors);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::told;
    use super::*;

    #[test]
    fn an_ingress_leads_somewhere() {
        assert_eq!(
            told(&Ingress, &json!({"spec": {}})),
            ["spec: Invalid value: null: either `defaultBackend` or `rules` must be specified"]
        );
        let rule = |host: &str, path: Value| json!({"spec": {"rules": [{"host": host, "http": {"paths": [path]}}]}});
        let backend = json!({"service": {"name": "3-web", "port": {"number": 80}}});
        let good = rule(
            "*.example.com",
            json!({"path": "/a", "pathType": "Prefix", "backend": backend}),
        );
        assert_eq!(told(&Ingress, &good), Vec::<String>::new());
        let bad = rule(
            "10.0.0.1",
            json!({"path": "a", "pathType": "Exact", "backend": {"service": {"name": "web", "port": {}}}}),
        );
        assert_eq!(
            told(&Ingress, &bad),
            [
                r#"spec.rules[0].host: Invalid value: "10.0.0.1": must be a DNS name, not an IP address"#,
                r#"spec.rules[0].http.paths[0].path: Invalid value: "a": must be an absolute path"#,
                "spec.rules[0].http.paths[0].backend: Required value: port name or number is required",
            ]
        );
    }

    #[test]
    fn policies_are_about_directions_ports_and_peers() {
        let mut policy = json!({"spec": {"podSelector": {}, "egress": [{"ports": [{"port": 80, "endPort": 70}],
            "to": [{}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}]}]}});
        NetworkPolicy.default(&mut policy);
        assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
        assert_eq!(policy["spec"]["egress"][0]["ports"][0]["protocol"], "TCP");
        assert_eq!(
            told(&NetworkPolicy, &policy),
            [
                "spec.egress[0].ports[0].endPort: Invalid value: 80: must be greater than or equal to `port`",
                "spec.egress[0].to[0]: Required value: must specify a peer",
                r#"spec.egress[0].to[1].ipBlock.except[0]: Invalid value: "11.0.0.0/16": must be a strict subset of `cidr`"#,
            ]
        );
    }
}
