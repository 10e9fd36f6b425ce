//! What is done to a pod that exists: binding it to a node, adding ephemeral containers, resizing.

use bytes::Bytes;
use http::request::Parts;
use serde_json::{Value, json};

use super::success;
use crate::api::body::decode;
use crate::api::fields::{self, Fields};
use crate::api::reply::Answer;
use crate::api::request::Target;
use crate::api::status::{FieldError, Status};
use crate::api::write::Part;
use crate::api::{Api, Call};
use crate::registry;

impl Api {
    /// Puts a pod on a node, once.
    pub(in crate::api) async fn bind(
        &self,
        call: &Call,
        parts: &Parts,
        body: Bytes,
    ) -> Result<Answer, Status> {
        let options = call.write_options(parts)?;
        let binding = decode(parts, &body, "v1", "Binding", options.validation)?.value;
        // `bindings` takes what `pods/<name>/binding` takes, with the pod's name inside.
        let target = &match registry::resource("", "v1", "pods") {
            Some(pods) if call.target.resource.kind == "Binding" => Target {
                resource: pods,
                name: Some(fields::name(&binding).to_owned()),
                ..call.target.clone()
            },
            _ => call.target.clone(),
        };
        if fields::name(&binding) != target.object_name()? {
            let why = "name in URL does not match name in Binding object";
            return Err(Status::bad_request(why));
        }
        let node = binding.text("/target/name").to_owned();
        let kind = binding.text("/target/kind");
        let mut errors = Vec::new();
        if !["", "Node"].contains(&kind) {
            let known = ["Node", "<empty>"];
            errors.push(FieldError::unsupported_as_listed(
                "target.kind",
                kind,
                &known,
            ));
        }
        if node.is_empty() {
            errors.push(FieldError::required("target.name", ""));
        }
        if !errors.is_empty() {
            let name = target.object_name()?;
            return Err(Status::invalid("", "Binding", name, errors));
        }
        let change = |old: &Value| {
            let uid = binding.text("/metadata/uid");
            if !uid.is_empty() && uid != old.text("/metadata/uid") {
                return Err(Status::conflict(
                    target.subject(),
                    format!("the pod has another UID than {uid}"),
                ));
            }
            if old.has("/metadata/deletionTimestamp") {
                let why = format!(
                    "pod {} is being deleted, cannot be assigned to a host",
                    fields::name(old)
                );
                return Err(Status::conflict(target.subject(), why));
            }
            if !old.text("/spec/nodeName").is_empty() {
                let why = format!(
                    "pod {} is already assigned to node {:?}",
                    fields::name(old),
                    old.text("/spec/nodeName")
                );
                return Err(Status::conflict(target.subject(), why));
            }
            let mut new = old.clone();
            new.set("/spec/nodeName", node.as_str());
            for (key, value) in binding
                .object("/metadata/annotations")
                .into_iter()
                .flatten()
            {
                new.object_mut("/metadata/annotations")
                    .insert(key.clone(), value.clone());
            }
            let scheduled = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": fields::now()});
            let mut conditions = new.items("/status/conditions").to_vec();
            conditions.retain(|condition| condition.text("/type") != "PodScheduled");
            conditions.push(scheduled);
            new.set("/status/conditions", conditions);
            Ok(new)
        };
        self.modify(target, &options, Part::Exact("binding"), change)
            .await?;
        Ok(success())
    }
}

/// Adds ephemeral containers. Those that are there stay as they are: they are never restarted, so nothing of them can change.
pub fn ephemeral_containers(old: &Value, wanted: &Value) -> Result<Value, Status> {
    let at = "spec.ephemeralContainers";
    let (before, after) = (
        old.items("/spec/ephemeralContainers"),
        wanted.items("/spec/ephemeralContainers"),
    );
    let find = |list: &[Value], name: &str| list.iter().find(|c| c.text("/name") == name).cloned();
    let mut errors = Vec::new();
    for known in before {
        let name = known.text("/name");
        match find(after, name) {
            None => {
                let why = format!("existing ephemeral containers {name:?} may not be removed");
                errors.push(FieldError::forbidden(at, &why));
            }
            Some(kept) if !same_but_defaults(known, &kept) => {
                let why = format!("existing ephemeral containers {name:?} may not be changed");
                errors.push(FieldError::forbidden(at, &why));
            }
            Some(_) => {}
        }
    }
    let taken = |name: &str| {
        ["/spec/containers", "/spec/initContainers"]
            .iter()
            .any(|list| find(old.items(list), name).is_some())
    };
    for (index, container) in after.iter().enumerate() {
        let (name, target) = (
            container.text("/name"),
            container.text("/targetContainerName"),
        );
        let field = |name: &str| format!("{at}[{index}].{name}");
        if taken(name)
            || after[..index]
                .iter()
                .any(|other| other.text("/name") == name)
        {
            errors.push(FieldError::duplicate(field("name"), name));
        }
        if !target.is_empty() && !taken(target) {
            errors.push(FieldError::not_found(field("targetContainerName"), target));
        }
        for forbidden in [
            "ports",
            "livenessProbe",
            "readinessProbe",
            "startupProbe",
            "lifecycle",
            "resources",
        ] {
            let given = container.get(forbidden).is_some_and(|value| match value {
                Value::Object(fields) => !fields.is_empty(),
                Value::Array(items) => !items.is_empty(),
                other => !other.is_null(),
            });
            if given {
                let why = "cannot be set for an Ephemeral Container";
                errors.push(FieldError::forbidden(field(forbidden), why));
            }
        }
    }
    if !errors.is_empty() {
        return Err(Status::invalid("", "Pod", fields::name(old), errors));
    }
    let mut new = old.clone();
    new.set("/spec/ephemeralContainers", after.to_vec());
    Ok(new)
}

/// Whether a container that was sent says nothing else than the present one; fields that have defaults may be left out.
fn same_but_defaults(present: &Value, sent: &Value) -> bool {
    let fields = sent.as_object().into_iter().flatten();
    fields
        .into_iter()
        .all(|(key, value)| present.get(key) == Some(value))
}

/// Changes what containers ask for and may use (KEP-1287).
pub fn resources(old: &Value, wanted: &Value) -> Result<Value, Status> {
    let mut new = old.clone();
    let mut errors = Vec::new();
    for list in ["containers", "initContainers"] {
        let pointer = format!("/spec/{list}");
        let sent = wanted.items(&pointer).to_vec();
        for (index, container) in new.items_mut(&pointer).iter_mut().enumerate() {
            let name = container.text("/name").to_owned();
            let Some(sent) = sent.iter().find(|sent| sent.text("/name") == name) else {
                let why = "containers may not be added or removed by a resize";
                errors.push(FieldError::forbidden(format!("spec.{list}"), why));
                continue;
            };
            let resources = sent
                .pointer("/resources")
                .cloned()
                .unwrap_or_else(|| json!({}));
            if resources == container["resources"] {
                continue;
            }
            if list == "initContainers" && container.text("/restartPolicy") != "Always" {
                let field = format!("spec.{list}[{index}].resources");
                errors.push(FieldError::forbidden(
                    field,
                    "resources for non-sidecar init containers are immutable",
                ));
                continue;
            }
            for other in ["limits", "requests"].iter().flat_map(|part| {
                let fields = resources.object(&format!("/{part}")).into_iter().flatten();
                let before = container
                    .object(&format!("/resources/{part}"))
                    .cloned()
                    .unwrap_or_default();
                let changed = fields.filter(move |(key, value)| before.get(*key) != Some(*value));
                changed
                    .map(move |(key, _)| (*part, key.clone()))
                    .collect::<Vec<_>>()
            }) {
                if !["cpu", "memory"].contains(&other.1.as_str()) {
                    let field = format!("spec.{list}[{index}].resources.{}", other.0);
                    errors.push(FieldError::forbidden(
                        field,
                        "only cpu and memory resources are mutable",
                    ));
                }
            }
            container.set("/resources", resources);
        }
    }
    if !errors.is_empty() {
        return Err(Status::invalid("", "Pod", fields::name(old), errors));
    }
    let class = |pod: &Value| crate::api::strategy::qos_class(pod);
    if class(&new) != class(old) {
        let why = "Pod QOS Class may not change as a result of resizing";
        let error = FieldError::invalid("metadata", class(&new), why);
        return Err(Status::invalid("", "Pod", fields::name(old), vec![error]));
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Value {
        json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}],
            "ephemeralContainers": [{"name": "e", "image": "i", "terminationMessagePath": "/dev/termination-log"}]}})
    }

    #[test]
    fn ephemeral_containers_are_only_added() {
        let mut sent = pod();
        let list = json!([{"name": "e", "image": "i"}, {"name": "f", "image": "j", "targetContainerName": "c"}]);
        sent.set("/spec/ephemeralContainers", list);
        sent.set("/spec/containers", json!([]));
        let new = ephemeral_containers(&pod(), &sent).expect("added");
        assert_eq!(
            new["spec"]["containers"],
            pod()["spec"]["containers"],
            "nothing else changes"
        );
        assert_eq!(new["spec"]["ephemeralContainers"][1]["name"], "f");
        for (list, message) in [
            (json!([]), "may not be removed"),
            (
                json!([{"name": "e", "image": "other"}]),
                "may not be changed",
            ),
            (
                json!([{"name": "e", "image": "i"}, {"name": "c", "image": "i"}]),
                r#"[1].name: Duplicate value: "c""#,
            ),
            (
                json!([{"name": "e", "image": "i"}, {"name": "f", "targetContainerName": "x"}]),
                r#"Not found: "x""#,
            ),
            (
                json!([{"name": "e", "image": "i"}, {"name": "f", "ports": [{}]}]),
                "ports: Forbidden",
            ),
        ] {
            sent.set("/spec/ephemeralContainers", list);
            let refused = ephemeral_containers(&pod(), &sent).expect_err(message);
            assert!(refused.message.contains(message), "{}", refused.message);
        }
    }

    #[test]
    fn a_resize_changes_cpu_and_memory_within_a_class() {
        let mut sent = pod();
        sent.set(
            "/spec/containers",
            json!([{"name": "c", "image": "ignored", "resources": {"requests": {"cpu": "2"}}}]),
        );
        let new = resources(&pod(), &sent).expect("resized");
        assert_eq!(
            new["spec"]["containers"],
            json!([{"name": "c", "resources": {"requests": {"cpu": "2"}}}])
        );
        for (containers, message) in [
            (json!([{"name": "c"}]), "QOS Class may not change"),
            (json!([]), "may not be added or removed"),
            (
                json!([{"name": "c", "resources": {"requests": {"cpu": "1", "x.io/gpu": "1"}}}]),
                "only cpu and memory",
            ),
        ] {
            sent.set("/spec/containers", containers);
            let refused = resources(&pod(), &sent).expect_err(message);
            assert!(refused.message.contains(message), "{}", refused.message);
        }
    }
}
