//! Objects as the rows that `kubectl get` prints: columns and cells per kind, worded as upstream prints them.

mod age;
mod cluster;
mod extension;
mod pod;
mod policy;
mod service;
mod storage;
mod workload;

use serde_json::{Value, json};

use super::request::Form;
use crate::registry::Resource;

pub use age::{age, human_duration};

/// One column of a table; wide columns have priority 1.
#[derive(Debug)]
pub struct Column {
    name: &'static str,
    kind: &'static str,
    priority: u8,
}

const fn column(name: &'static str) -> Column {
    Column {
        name,
        kind: "string",
        priority: 0,
    }
}

const fn count(name: &'static str) -> Column {
    Column {
        name,
        kind: "integer",
        priority: 0,
    }
}

const fn boolean(name: &'static str) -> Column {
    Column {
        name,
        kind: "boolean",
        priority: 0,
    }
}

const fn wide(name: &'static str) -> Column {
    Column {
        name,
        kind: "string",
        priority: 1,
    }
}

/// How a kind is printed.
#[derive(Debug)]
pub struct Printer {
    columns: &'static [Column],
    /// Cells of one object, one per column.
    cells: fn(&Value) -> Vec<Value>,
}

/// The columns of kinds that have none of their own.
static GENERIC: Printer = Printer {
    columns: &[
        column("Name"),
        Column {
            name: "Created At",
            kind: "date",
            priority: 0,
        },
    ],
    cells: |object| {
        vec![
            name(object),
            object
                .pointer("/metadata/creationTimestamp")
                .cloned()
                .unwrap_or(Value::Null),
        ]
    },
};

/// The printer of a kind. Kinds without columns of their own get name and creation time.
pub fn printer(group: &str, kind: &str) -> &'static Printer {
    match (group, kind) {
        ("", "Pod") => &pod::POD,
        ("", "Service") => &service::SERVICE,
        ("", "Endpoints") => &service::ENDPOINTS,
        ("discovery.k8s.io", "EndpointSlice") => &service::ENDPOINT_SLICE,
        ("", "Node") => &cluster::NODE,
        ("", "Namespace") => &cluster::NAMESPACE,
        ("", "ConfigMap") => &cluster::CONFIG_MAP,
        ("", "Secret") => &cluster::SECRET,
        ("", "Event") | ("events.k8s.io", "Event") => &cluster::EVENT,
        ("coordination.k8s.io", "Lease") => &cluster::LEASE,
        ("scheduling.k8s.io", "PriorityClass") => &cluster::PRIORITY_CLASS,
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => {
            &cluster::ROLE_BINDING
        }
        ("networking.k8s.io", "NetworkPolicy") => &cluster::NETWORK_POLICY,
        ("apps", "Deployment") => &workload::DEPLOYMENT,
        ("apps", "ReplicaSet") | ("", "ReplicationController") => &workload::REPLICA_SET,
        ("apps", "DaemonSet") => &workload::DAEMON_SET,
        ("apps", "StatefulSet") => &workload::STATEFUL_SET,
        ("apps", "ControllerRevision") => &workload::CONTROLLER_REVISION,
        ("batch", "Job") => &workload::JOB,
        ("batch", "CronJob") => &policy::CRON_JOB,
        ("", "PodTemplate") => &policy::POD_TEMPLATE,
        ("", "ResourceQuota") => &policy::QUOTA,
        ("policy", "PodDisruptionBudget") => &policy::DISRUPTION_BUDGET,
        ("autoscaling", "HorizontalPodAutoscaler") => &policy::AUTOSCALER,
        ("", "PersistentVolumeClaim") => &storage::CLAIM,
        ("", "PersistentVolume") => &storage::VOLUME,
        ("", "ComponentStatus") => &storage::COMPONENT_STATUS,
        ("storage.k8s.io", "StorageClass") => &storage::STORAGE_CLASS,
        ("storage.k8s.io", "CSINode") => &storage::CSI_NODE,
        ("networking.k8s.io", "Ingress") => &storage::INGRESS,
        ("networking.k8s.io", "IngressClass") => &storage::INGRESS_CLASS,
        ("networking.k8s.io", "IPAddress") => &storage::IP_ADDRESS,
        ("networking.k8s.io", "ServiceCIDR") => &storage::SERVICE_CIDR,
        ("node.k8s.io", "RuntimeClass") => &storage::RUNTIME_CLASS,
        ("certificates.k8s.io", "CertificateSigningRequest") => &storage::SIGNING_REQUEST,
        ("storage.k8s.io", "CSIDriver") => &extension::CSI_DRIVER,
        ("storage.k8s.io", "VolumeAttachment") => &extension::VOLUME_ATTACHMENT,
        ("storage.k8s.io", "VolumeAttributesClass") => &extension::VOLUME_ATTRIBUTES_CLASS,
        (
            "admissionregistration.k8s.io",
            "ValidatingWebhookConfiguration" | "MutatingWebhookConfiguration",
        ) => &extension::WEBHOOKS,
        ("admissionregistration.k8s.io", "ValidatingAdmissionPolicy") => {
            &extension::VALIDATING_POLICY
        }
        ("admissionregistration.k8s.io", "MutatingAdmissionPolicy") => &extension::MUTATING_POLICY,
        (
            "admissionregistration.k8s.io",
            "ValidatingAdmissionPolicyBinding" | "MutatingAdmissionPolicyBinding",
        ) => &extension::POLICY_BINDING,
        ("apiregistration.k8s.io", "APIService") => &extension::API_SERVICE,
        ("flowcontrol.apiserver.k8s.io", "FlowSchema") => &extension::FLOW_SCHEMA,
        ("flowcontrol.apiserver.k8s.io", "PriorityLevelConfiguration") => {
            &extension::PRIORITY_LEVEL
        }
        ("resource.k8s.io", "ResourceClaim") => &extension::DEVICE_CLAIM,
        ("resource.k8s.io", "ResourceSlice") => &extension::DEVICE_SLICE,
        ("resource.k8s.io", "ResourceClaimTemplate" | "DeviceClass") => &extension::AGED,
        ("", "ServiceAccount") => &extension::AGED,
        _ => &GENERIC,
    }
}

/// What of each object goes with its row (`includeObject`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Include {
    None,
    Metadata,
    Object,
}

/// A `Table` of `objects`. `headed` is false for all but the first event of a watch.
pub fn table<'a>(
    printer: &Printer,
    version: &str,
    objects: impl IntoIterator<Item = &'a Value>,
    include: Include,
    headed: bool,
) -> Value {
    let rows: Vec<Value> = objects
        .into_iter()
        .map(|object| row(printer, object, include))
        .collect();
    let columns: Vec<Value> = if headed {
        printer.columns.iter().map(definition).collect()
    } else {
        Vec::new()
    };
    json!({
        "kind": "Table", "apiVersion": format!("meta.k8s.io/{version}"), "metadata": {},
        "columnDefinitions": columns, "rows": rows,
    })
}

fn definition(column: &Column) -> Value {
    let format = if column.name == "Name" { "name" } else { "" };
    json!({"name": column.name, "type": column.kind, "format": format, "description": "", "priority": column.priority})
}

fn row(printer: &Printer, object: &Value, include: Include) -> Value {
    let cells = (printer.cells)(object);
    match include {
        Include::None => json!({"cells": cells}),
        Include::Metadata => json!({"cells": cells, "object": partial(object, "v1")}),
        Include::Object => json!({"cells": cells, "object": object}),
    }
}

/// The `PartialObjectMetadata` of an object.
pub fn partial(object: &Value, version: &str) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": object["metadata"],
    })
}

/// One object in the form asked for. `headed` is false for all but the first event of a watch.
pub fn shaped(object: Value, form: Form, resource: &Resource, headed: bool) -> Value {
    match form {
        Form::Object => object,
        Form::Partial(version) => partial(&object, version),
        Form::Table(version, include) => {
            let printer = printer(resource.group, resource.kind);
            let mut table = table(printer, version, [&object], include, headed);
            table["metadata"]["resourceVersion"] = object["metadata"]["resourceVersion"].clone();
            table
        }
    }
}

fn name(object: &Value) -> Value {
    object
        .pointer("/metadata/name")
        .cloned()
        .unwrap_or_default()
}

/// Text, or `<none>` when there is none.
fn or_none(text: &str) -> String {
    if text.is_empty() {
        "<none>".to_owned()
    } else {
        text.to_owned()
    }
}

/// The age of an object since its creation.
fn created(object: &Value) -> Value {
    age(crate::api::fields::Fields::text(
        object,
        "/metadata/creationTimestamp",
    ))
    .into()
}

/// Labels or a plain selector as `a=b,c=d`.
fn pairs(labels: Option<&serde_json::Map<String, Value>>) -> String {
    let mut pairs: Vec<String> = labels
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or("")))
        .collect();
    pairs.sort();
    or_none(&pairs.join(","))
}

/// The names and the images of a template's containers.
fn containers(template: &Value) -> (Value, Value) {
    use crate::api::fields::Fields;
    let all = template.items("/spec/containers");
    let join = |field: &str| {
        all.iter()
            .map(|c| c.text(field))
            .collect::<Vec<_>>()
            .join(",")
    };
    (join("/name").into(), join("/image").into())
}

/// A label selector with its expressions, as `a=b,c in (d,e),!f`.
fn selector(selector: Option<&Value>) -> String {
    use crate::api::fields::Fields;
    let Some(selector) = selector else {
        return "<none>".to_owned();
    };
    let mut parts: Vec<String> = selector
        .object("/matchLabels")
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or("")))
        .collect();
    parts.sort();
    for expression in selector.items("/matchExpressions") {
        let key = expression.text("/key");
        let values: Vec<&str> = expression
            .items("/values")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        parts.push(match expression.text("/operator") {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "Exists" => key.to_owned(),
            _ => format!("!{key}"),
        });
    }
    or_none(&parts.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_printer_has_a_cell_per_column() {
        let kinds = [
            ("", "Pod"),
            ("", "Service"),
            ("", "Endpoints"),
            ("discovery.k8s.io", "EndpointSlice"),
            ("", "Node"),
            ("", "Namespace"),
            ("", "ConfigMap"),
            ("", "Secret"),
            ("", "ServiceAccount"),
            ("", "Event"),
            ("coordination.k8s.io", "Lease"),
            ("scheduling.k8s.io", "PriorityClass"),
            ("rbac.authorization.k8s.io", "RoleBinding"),
            ("rbac.authorization.k8s.io", "ClusterRoleBinding"),
            ("networking.k8s.io", "NetworkPolicy"),
            ("apps", "Deployment"),
            ("apps", "ReplicaSet"),
            ("apps", "DaemonSet"),
            ("apps", "StatefulSet"),
            ("apps", "ControllerRevision"),
            ("batch", "Job"),
            ("example.com", "Unknown"),
        ];
        let all = crate::registry::resources().iter();
        let all = all.map(|resource| (resource.group, resource.kind));
        for (group, kind) in kinds.into_iter().chain(all) {
            let printer = printer(group, kind);
            let cells = (printer.cells)(&json!({"metadata": {"name": "x"}}));
            assert_eq!(cells.len(), printer.columns.len(), "{kind}");
            let at = printer
                .columns
                .iter()
                .position(|column| column.name == "Name")
                .expect("a column Name");
            assert_eq!(cells[at], "x", "{kind}");
        }
    }

    #[test]
    fn selectors_print_as_kubectl_shows_them() {
        let value = json!({"matchLabels": {"b": "2", "a": "1"}, "matchExpressions": [
            {"key": "k", "operator": "In", "values": ["x", "y"]}, {"key": "n", "operator": "DoesNotExist"}]});
        assert_eq!(selector(Some(&value)), "a=1,b=2,k in (x,y),!n");
        assert_eq!(selector(Some(&json!({}))), "<none>");
    }
}
