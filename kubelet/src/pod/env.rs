//! env: the environment of a container, from literals, fields, resources, ConfigMaps, Secrets and Services.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    ConfigMap, Container, EnvVar, Pod, ResourceFieldSelector, Secret, Service,
};

use crate::quantity::{milli, whole};

/// An EnvError says which variable cannot be made, and why; the pod shows it as CreateContainerConfigError.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    #[error("{kind} \"{name}\" not found")]
    Missing { kind: &'static str, name: String },
    #[error("couldn't find key {key} in {kind} {name}")]
    MissingKey {
        kind: &'static str,
        name: String,
        key: String,
    },
    #[error("unsupported fieldPath: {0}")]
    Field(String),
    #[error("unsupported resource: {0}")]
    Resource(String),
    #[error("container {0} not found")]
    Container(String),
}

/// Objects that a pod refers to, by name in its namespace.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    pub config_maps: BTreeMap<String, ConfigMap>,
    pub secrets: BTreeMap<String, Secret>,
    pub services: Vec<Service>,
}

/// Facts about where the pod runs.
#[derive(Debug, Clone, Default)]
pub struct Place {
    pub pod_ips: Vec<String>,
    pub host_ips: Vec<String>,
    pub allocatable_cpu_milli: i64,
    pub allocatable_memory_bytes: i64,
}

/// The environment in order; a later variable of the same name has replaced an earlier one.
pub fn environment(
    pod: &Pod,
    container: &Container,
    objects: &Objects,
    place: &Place,
) -> Result<Vec<(String, String)>, EnvError> {
    let mut env = Environment::default();
    let links = pod
        .spec
        .as_ref()
        .and_then(|s| s.enable_service_links)
        .unwrap_or(true);
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    for (name, value) in service_variables(&objects.services, namespace, links) {
        env.set(name, value);
    }
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(reference) = &source.config_map_ref {
            match objects.config_maps.get(&reference.name) {
                Some(map) => {
                    for (key, value) in map.data.iter().flatten() {
                        env.set(format!("{prefix}{key}"), value.clone());
                    }
                }
                None if reference.optional == Some(true) => {}
                None => {
                    return Err(EnvError::Missing {
                        kind: "configmap",
                        name: reference.name.clone(),
                    });
                }
            }
        }
        if let Some(reference) = &source.secret_ref {
            match objects.secrets.get(&reference.name) {
                Some(secret) => {
                    for (key, value) in secret.data.iter().flatten() {
                        env.set(
                            format!("{prefix}{key}"),
                            String::from_utf8_lossy(&value.0).into_owned(),
                        );
                    }
                }
                None if reference.optional == Some(true) => {}
                None => {
                    return Err(EnvError::Missing {
                        kind: "secret",
                        name: reference.name.clone(),
                    });
                }
            }
        }
    }
    for variable in container.env.iter().flatten() {
        if let Some(value) = value_of(pod, container, variable, objects, place, &env)? {
            env.set(variable.name.clone(), value);
        }
    }
    Ok(env.0)
}

#[derive(Default)]
struct Environment(Vec<(String, String)>);

impl Environment {
    fn set(&mut self, name: String, value: String) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some(known) => known.1 = value,
            None => self.0.push((name, value)),
        }
    }
}

fn value_of(
    pod: &Pod,
    container: &Container,
    variable: &EnvVar,
    objects: &Objects,
    place: &Place,
    so_far: &Environment,
) -> Result<Option<String>, EnvError> {
    let Some(from) = &variable.value_from else {
        return Ok(Some(expand(
            variable.value.as_deref().unwrap_or_default(),
            &so_far.0,
        )));
    };
    if let Some(field) = &from.field_ref {
        return pod_field(pod, place, &field.field_path).map(Some);
    }
    if let Some(resource) = &from.resource_field_ref {
        return resource_field(pod, container, place, resource).map(Some);
    }
    if let Some(reference) = &from.config_map_key_ref {
        let optional = reference.optional == Some(true);
        let Some(map) = objects.config_maps.get(&reference.name) else {
            return absent(
                optional,
                EnvError::Missing {
                    kind: "configmap",
                    name: reference.name.clone(),
                },
            );
        };
        return match map
            .data
            .iter()
            .flatten()
            .find(|(key, _)| **key == reference.key)
        {
            Some((_, value)) => Ok(Some(value.clone())),
            None => absent(
                optional,
                EnvError::MissingKey {
                    kind: "ConfigMap",
                    name: reference.name.clone(),
                    key: reference.key.clone(),
                },
            ),
        };
    }
    if let Some(reference) = &from.secret_key_ref {
        let optional = reference.optional == Some(true);
        let Some(secret) = objects.secrets.get(&reference.name) else {
            return absent(
                optional,
                EnvError::Missing {
                    kind: "secret",
                    name: reference.name.clone(),
                },
            );
        };
        return match secret
            .data
            .iter()
            .flatten()
            .find(|(key, _)| **key == reference.key)
        {
            Some((_, value)) => Ok(Some(String::from_utf8_lossy(&value.0).into_owned())),
            None => absent(
                optional,
                EnvError::MissingKey {
                    kind: "Secret",
                    name: reference.name.clone(),
                    key: reference.key.clone(),
                },
            ),
        };
    }
    Ok(Some(String::new()))
}

fn absent(optional: bool, error: EnvError) -> Result<Option<String>, EnvError> {
    if optional { Ok(None) } else { Err(error) }
}

/// A field of the pod, as the downward API names it.
pub fn pod_field(pod: &Pod, place: &Place, path: &str) -> Result<String, EnvError> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    let lines = |map: &Option<BTreeMap<String, String>>| {
        let line = |(key, value): (&String, &String)| {
            format!("{key}={}", serde_json::Value::from(value.as_str()))
        };
        map.iter()
            .flatten()
            .map(line)
            .collect::<Vec<_>>()
            .join("\n")
    };
    let subscript = |name: &str| {
        path.strip_prefix(name)?
            .strip_prefix("['")?
            .strip_suffix("']")
    };
    let lookup = |map: &Option<BTreeMap<String, String>>, key: &str| {
        map.iter()
            .flatten()
            .find(|(k, _)| *k == key)
            .map(|(_, v)| v.clone())
    };
    Ok(match path {
        "metadata.name" => meta.name.clone().unwrap_or_default(),
        "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        "metadata.labels" => lines(&meta.labels),
        "metadata.annotations" => lines(&meta.annotations),
        "spec.nodeName" => spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
        "spec.serviceAccountName" => spec
            .and_then(|s| s.service_account_name.clone())
            .unwrap_or_default(),
        "status.podIP" => place.pod_ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => place.pod_ips.join(","),
        "status.hostIP" => place.host_ips.first().cloned().unwrap_or_default(),
        "status.hostIPs" => place.host_ips.join(","),
        _ => match (
            subscript("metadata.labels"),
            subscript("metadata.annotations"),
        ) {
            (Some(key), _) => lookup(&meta.labels, key).unwrap_or_default(),
            (_, Some(key)) => lookup(&meta.annotations, key).unwrap_or_default(),
            _ => return Err(EnvError::Field(path.to_owned())),
        },
    })
}

/// A resource of a container in units of its divisor, rounded up; a missing limit is what the node can give.
pub fn resource_field(
    pod: &Pod,
    container: &Container,
    place: &Place,
    field: &ResourceFieldSelector,
) -> Result<String, EnvError> {
    let container = match field
        .container_name
        .as_deref()
        .filter(|name| !name.is_empty())
    {
        None => container,
        Some(name) => {
            let spec = pod.spec.as_ref();
            let mut all = spec.into_iter().flat_map(crate::resources::containers);
            all.find(|c| c.name == name)
                .ok_or_else(|| EnvError::Container(name.to_owned()))?
        }
    };
    let resources = container.resources.as_ref();
    let (limits, requests) = (
        resources.and_then(|r| r.limits.as_ref()),
        resources.and_then(|r| r.requests.as_ref()),
    );
    let (kind, name) = field
        .resource
        .split_once('.')
        .ok_or_else(|| EnvError::Resource(field.resource.clone()))?;
    let declared = match kind {
        "limits" => limits.and_then(|map| map.get(name)),
        "requests" => requests
            .and_then(|map| map.get(name))
            .or_else(|| limits.and_then(|map| map.get(name))),
        _ => return Err(EnvError::Resource(field.resource.clone())),
    };
    let value_milli: i128 = match (name, kind, declared) {
        ("cpu", _, Some(q)) => milli(q).unwrap_or(0).into(),
        (_, _, Some(q)) => i128::from(whole(q).unwrap_or(0)) * 1000,
        ("cpu", "limits", None) => place.allocatable_cpu_milli.into(),
        ("memory", "limits", None) => i128::from(place.allocatable_memory_bytes) * 1000,
        ("cpu" | "memory" | "ephemeral-storage", _, None) => 0,
        _ => return Err(EnvError::Resource(field.resource.clone())),
    };
    let divisor_milli = i128::from(
        field
            .divisor
            .as_ref()
            .and_then(milli)
            .filter(|d| *d > 0)
            .unwrap_or(1000),
    );
    Ok(((value_milli + divisor_milli - 1) / divisor_milli).to_string())
}

/// Replaces `$(NAME)` by known variables; `$$` is a dollar, and an unknown reference stays as it is.
pub fn expand(text: &str, env: &[(String, String)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        out.push_str(&rest[..dollar]);
        rest = &rest[dollar + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest
            .strip_prefix('(')
            .and_then(|inner| inner.split_once(')'))
        {
            match env.iter().find(|(known, _)| known == name) {
                Some((_, value)) => out.push_str(value),
                None => out.push_str(&format!("$({name})")),
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

/// Variables for the Services of the namespace and for the API server's, in the form that Docker links had.
fn service_variables(services: &[Service], namespace: &str, links: bool) -> Vec<(String, String)> {
    let mut variables = Vec::new();
    for service in services {
        let (ns, name) = (
            service.metadata.namespace.as_deref(),
            service.metadata.name.as_deref().unwrap_or_default(),
        );
        let is_api = ns == Some("default") && name == "kubernetes";
        if !(is_api || links && ns == Some(namespace)) {
            continue;
        }
        let Some(spec) = &service.spec else { continue };
        let Some(ip) = spec
            .cluster_ip
            .as_deref()
            .filter(|ip| !ip.is_empty() && *ip != "None")
        else {
            continue;
        };
        let Some(first) = spec.ports.iter().flatten().next() else {
            continue;
        };
        let host = if ip.contains(':') {
            format!("[{ip}]")
        } else {
            ip.to_owned()
        };
        let prefix = name.to_uppercase().replace('-', "_");
        variables.push((format!("{prefix}_SERVICE_HOST"), ip.to_owned()));
        variables.push((format!("{prefix}_SERVICE_PORT"), first.port.to_string()));
        for port in spec.ports.iter().flatten() {
            if let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) {
                variables.push((
                    format!(
                        "{prefix}_SERVICE_PORT_{}",
                        name.to_uppercase().replace('-', "_")
                    ),
                    port.port.to_string(),
                ));
            }
        }
        let protocol = |protocol: &Option<String>| protocol.as_deref().unwrap_or("TCP").to_owned();
        let url = |p: &str, port: i32| format!("{}://{host}:{port}", p.to_lowercase());
        variables.push((
            format!("{prefix}_PORT"),
            url(&protocol(&first.protocol), first.port),
        ));
        for port in spec.ports.iter().flatten() {
            let p = protocol(&port.protocol);
            let stem = format!("{prefix}_PORT_{}_{}", port.port, p.to_uppercase());
            variables.push((stem.clone(), url(&p, port.port)));
            variables.push((format!("{stem}_PROTO"), p.to_lowercase()));
            variables.push((format!("{stem}_PORT"), port.port.to_string()));
            variables.push((format!("{stem}_ADDR"), ip.to_owned()));
        }
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fixture(container: serde_json::Value) -> (Pod, Objects, Place) {
        let pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"app": "x"}},
            "spec": {"nodeName": "n1", "containers": [container]},
        }));
        let config_map = serde_json::from_value(json!({"data": {"A": "1", "B": "2"}})).unwrap();
        let secret = serde_json::from_value(json!({"data": {"S": "c2VjcmV0"}})).unwrap();
        let service = serde_json::from_value(json!({
            "metadata": {"name": "my-svc", "namespace": "ns"},
            "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
        }));
        let objects = Objects {
            config_maps: BTreeMap::from([("cm".to_owned(), config_map)]),
            secrets: BTreeMap::from([("s".to_owned(), secret)]),
            services: vec![service.unwrap()],
        };
        let place = Place {
            pod_ips: vec!["10.1.1.1".to_owned()],
            host_ips: vec!["192.0.2.1".to_owned()],
            allocatable_cpu_milli: 2000,
            allocatable_memory_bytes: 1 << 30,
        };
        (pod.unwrap(), objects, place)
    }

    fn env_of(container: serde_json::Value) -> Result<Vec<(String, String)>, EnvError> {
        let (pod, objects, place) = fixture(container);
        environment(
            &pod,
            &pod.spec.as_ref().unwrap().containers[0],
            &objects,
            &place,
        )
    }

    #[test]
    fn every_source_of_a_variable_is_read() {
        let env = env_of(json!({"name": "c", "envFrom": [{"prefix": "P_", "configMapRef": {"name": "cm"}}], "env": [
            {"name": "LITERAL", "value": "v"},
            {"name": "REF", "value": "$(LITERAL)-$(P_A)-$$(LITERAL)-$(NONE)"},
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
            {"name": "CM", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "B"}}},
            {"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "S"}}},
            {"name": "NOTHING", "valueFrom": {"secretKeyRef": {"name": "none", "key": "S", "optional": true}}},
            {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
            {"name": "MEM", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
        ]})).unwrap();
        let get = |name: &str| env.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
        for (name, value) in [
            ("REF", Some("v-1-$(LITERAL)-$(NONE)")),
            ("NODE", Some("n1")),
            ("IP", Some("10.1.1.1")),
            ("LABEL", Some("x")),
            ("CM", Some("2")),
            ("SECRET", Some("secret")),
            ("NOTHING", None),
            ("CPU", Some("2")),
            ("MEM", Some("1024")),
            ("MY_SVC_SERVICE_HOST", Some("10.96.0.9")),
            ("MY_SVC_PORT_80_TCP", Some("tcp://10.96.0.9:80")),
        ] {
            assert_eq!(get(name), value, "{name}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        for (container, message) in [
            (
                json!({"name": "c", "envFrom": [{"configMapRef": {"name": "gone"}}]}),
                "configmap \"gone\" not found",
            ),
            (
                json!({"name": "c", "env": [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "Z"}}}]}),
                "couldn't find key Z in ConfigMap cm",
            ),
            (
                json!({"name": "c", "env": [{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": "spec.foo"}}}]}),
                "unsupported fieldPath: spec.foo",
            ),
        ] {
            assert_eq!(env_of(container).unwrap_err().to_string(), message);
        }
    }
}
