//! What is allowed and seldom meant: clients are told in `Warning` headers, in upstream's words.

use serde_json::Value;

use super::key_pair;
use crate::api::fields::Fields;
use crate::registry::Resource;

/// Labels of nodes that have other names since v1.14 and v1.17.
const RENAMED_NODE_LABELS: [(&str, &str, &str); 5] = [
    ("beta.kubernetes.io/arch", "v1.14", "kubernetes.io/arch"),
    ("beta.kubernetes.io/os", "v1.14", "kubernetes.io/os"),
    (
        "beta.kubernetes.io/instance-type",
        "v1.17",
        "node.kubernetes.io/instance-type",
    ),
    (
        "failure-domain.beta.kubernetes.io/region",
        "v1.17",
        "topology.kubernetes.io/region",
    ),
    (
        "failure-domain.beta.kubernetes.io/zone",
        "v1.17",
        "topology.kubernetes.io/zone",
    ),
];

/// Where the pods of a kind are described: the path to their metadata and spec, as pointer and as messages have it.
pub fn pod_at(resource: &Resource) -> Option<(&'static str, &'static str)> {
    match (resource.group, resource.plural) {
        ("", "pods") => Some(("", "")),
        ("", "replicationcontrollers")
        | ("apps", "deployments" | "replicasets" | "daemonsets" | "statefulsets")
        | ("batch", "jobs") => Some(("/spec/template", "spec.template.")),
        ("", "podtemplates") => Some(("/template", "template.")),
        ("batch", "cronjobs") => Some((
            "/spec/jobTemplate/spec/template",
            "spec.jobTemplate.spec.template.",
        )),
        _ => None,
    }
}

/// The warnings about a new object, or about what changed of it.
pub fn warnings(resource: &Resource, object: &Value, old: Option<&Value>) -> Vec<String> {
    let mut told = Vec::new();
    let differs =
        |pointer: &str| old.is_none_or(|old| object.pointer(pointer) != old.pointer(pointer));
    if let Some((pointer, path)) = pod_at(resource) {
        let spec = format!("{pointer}/spec");
        if differs(&spec)
            && let Some(spec) = object.pointer(&spec)
        {
            about_pod(spec, &format!("{path}spec"), &mut told);
        }
    }
    match (resource.group, resource.plural) {
        ("", "services") if differs("/spec") => about_service(object, &mut told),
        ("", "secrets") if object.text("/type") == "kubernetes.io/tls" => {
            let (certificate, key) = (object.text("/data/tls.crt"), object.text("/data/tls.key"));
            told.extend(key_pair::fault(certificate, key));
        }
        ("storage.k8s.io", "csidrivers")
            if !object.items("/spec/tokenRequests").is_empty()
                && !object.has("/spec/serviceAccountTokenInSecrets") =>
        {
            told.push("spec.serviceAccountTokenInSecrets is unset; if supported by this CSI driver, set to true to prevent possible logging of tokens in volume attributes".to_owned());
        }
        ("networking.k8s.io", "ingresses")
            if old.is_none()
                && object.has("/metadata/annotations/kubernetes.io~1ingress.class") =>
        {
            told.push("annotation \"kubernetes.io/ingress.class\" is deprecated, please use 'spec.ingressClassName' instead".to_owned());
        }
        _ => {}
    }
    told
}

fn about_pod(spec: &Value, path: &str, told: &mut Vec<String>) {
    for (label, since, now) in RENAMED_NODE_LABELS {
        if spec
            .object("/nodeSelector")
            .is_some_and(|labels| labels.contains_key(label))
        {
            told.push(format!(
                "{path}.nodeSelector[{label}]: deprecated since {since}; use {now:?} instead"
            ));
        }
    }
    for (list, field, what) in [
        ("hostAliases", "ip", "ip"),
        ("imagePullSecrets", "name", "name"),
    ] {
        let items = spec.items(&format!("/{list}"));
        for (at, item) in items.iter().enumerate() {
            let value = item.text(&format!("/{field}"));
            let earlier = &items[..at];
            if !value.is_empty() && earlier.iter().any(|other| other[field] == item[field]) {
                told.push(format!(
                    "{path}.{list}[{at}].{field}: duplicate {what} {value:?}"
                ));
            }
        }
    }
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for (at, container) in spec.items(&format!("/{list}")).iter().enumerate() {
            about_container(container, &format!("{path}.{list}[{at}]"), told);
        }
    }
    if spec.int("/terminationGracePeriodSeconds") < 0 {
        told.push(format!(
            "{path}.terminationGracePeriodSeconds: must be >= 0; negative values are invalid and will be treated as 1"
        ));
    }
}

fn about_container(container: &Value, path: &str, told: &mut Vec<String>) {
    for amounts in ["limits", "requests"] {
        for name in ["memory", "ephemeral-storage"] {
            let amount = container.text(&format!("/resources/{amounts}/{name}"));
            // Thousandths are the only fractions that quantities are written in here.
            if amount.ends_with('m') {
                told.push(format!(
                    "{path}.resources.{amounts}[{name}]: fractional byte value {amount:?} is invalid, must be an integer"
                ));
            }
        }
    }
    let variables = container.items("/env");
    for (at, variable) in variables.iter().enumerate() {
        let name = variable.text("/name");
        // One that refers to the earlier one is meant: it extends it.
        let extends = variable.text("/value").contains(&format!("$({name})"));
        if !extends
            && variables[..at]
                .iter()
                .any(|other| other.text("/name") == name)
        {
            told.push(format!(
                "{path}.env[{at}]: hides previous definition of {name:?}, which may be dropped when using apply"
            ));
        }
    }
    let ports = container.items("/ports");
    for (at, port) in ports.iter().enumerate() {
        let same = |other: &&Value| {
            ["containerPort", "protocol", "hostPort", "hostIP"]
                .iter()
                .all(|field| other[*field] == port[*field])
        };
        if let Some(earlier) = ports[..at].iter().position(|other| same(&other)) {
            told.push(format!(
                "{path}.ports[{at}]: duplicate port definition with {path}.ports[{earlier}]"
            ));
        }
    }
}

fn about_service(service: &Value, told: &mut Vec<String>) {
    let kind = service.text("/spec/type");
    if service.text("/spec/clusterIP") == "None" {
        for (field, what) in [
            ("loadBalancerIP", "spec.loadBalancerIP"),
            ("externalIPs", "spec.externalIPs"),
        ] {
            if service.has(&format!("/spec/{field}")) {
                told.push(format!("{what} is ignored for headless services"));
            }
        }
        if service.text("/spec/sessionAffinity") == "ClientIP" {
            told.push("spec.SessionAffinity is ignored for headless services".to_owned());
        }
    }
    let addresses = !service.items("/spec/externalIPs").is_empty();
    if addresses && kind != "ExternalName" {
        told.push(
            "spec.externalIPs is deprecated and may no longer be implemented in some clusters"
                .to_owned(),
        );
    }
    if addresses && kind == "ExternalName" {
        told.push("spec.externalIPs is ignored when spec.type is \"ExternalName\"".to_owned());
    }
    if !service.text("/spec/externalName").is_empty() && kind != "ExternalName" {
        told.push("spec.externalName is ignored when spec.type is not \"ExternalName\"".to_owned());
    }
    if service.text("/spec/trafficDistribution") == "PreferClose" {
        told.push(
            "spec.trafficDistribution: \"PreferClose\" is deprecated; use \"PreferSameZone\""
                .to_owned(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry;
    use serde_json::json;

    #[test]
    fn what_is_seldom_meant_is_told_where_it_is() {
        let deployments = registry::resource("apps", "v1", "deployments").expect("a row");
        let object = json!({"spec": {"template": {"spec": {
            "nodeSelector": {"beta.kubernetes.io/os": "linux"},
            "containers": [{"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "$(A)2"}, {"name": "A", "value": "3"}],
                "ports": [{"containerPort": 80}, {"containerPort": 80}],
                "resources": {"requests": {"memory": "100m", "cpu": "100m"}}}]}}}});
        assert_eq!(
            warnings(deployments, &object, None),
            [
                r#"spec.template.spec.nodeSelector[beta.kubernetes.io/os]: deprecated since v1.14; use "kubernetes.io/os" instead"#,
                r#"spec.template.spec.containers[0].resources.requests[memory]: fractional byte value "100m" is invalid, must be an integer"#,
                r#"spec.template.spec.containers[0].env[2]: hides previous definition of "A", which may be dropped when using apply"#,
                "spec.template.spec.containers[0].ports[1]: duplicate port definition with spec.template.spec.containers[0].ports[0]",
            ]
        );
        assert!(warnings(deployments, &object, Some(&object)).is_empty());
        let services = registry::resource("", "v1", "services").expect("a row");
        let headless = json!({"spec": {"clusterIP": "None", "sessionAffinity": "ClientIP", "externalName": "x"}});
        assert_eq!(warnings(services, &headless, None).len(), 2);
    }
}
