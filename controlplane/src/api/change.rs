//! What a write may change of an object, and what of it counts as a change.

use serde_json::Value;

use super::fields::Fields;
use super::request::Target;
use super::status::{FieldError, Status};
use super::strategy;
use super::write::Part;

/// resourceVersion and uid of the wanted object, where given, must be those of the present one.
pub fn check_preconditions(target: &Target, new: &Value, old: &Value) -> Result<(), Status> {
    let (revision, uid) = (
        new.text("/metadata/resourceVersion"),
        new.text("/metadata/uid"),
    );
    if !revision.is_empty() && revision != old.text("/metadata/resourceVersion") {
        return Err(Status::modified(target.subject()));
    }
    if !uid.is_empty() && uid != old.text("/metadata/uid") {
        let present = old.text("/metadata/uid");
        let why = format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {present}"
        );
        return Err(Status::conflict(target.subject(), why));
    }
    Ok(())
}

/// Refuses to replace an object of a kind that asks for the version it is replaced from, when that is not given.
pub fn check_revision_given(target: &Target, new: &Value) -> Result<(), Status> {
    let resource = target.resource;
    let given = !new.text("/metadata/resourceVersion").is_empty();
    if given || !strategy::replaced_by_revision(resource) {
        return Ok(());
    }
    let why = "must be specified for an update";
    let error = FieldError::invalid("metadata.resourceVersion", 0, why);
    let name = super::fields::name(new);
    // Upstream names the resource here, not the kind.
    let (group, plural) = (resource.group, resource.plural);
    Err(Status::invalid(group, plural, name, vec![error]))
}

/// A patch that names another identity would make another object of this one.
pub fn check_identity(target: &Target, new: &Value, old: &Value) -> Result<(), Status> {
    let field = "/metadata/uid";
    hold(target, new, old, field, !new.text(field).is_empty())
}

/// Nothing but a deletion says when an object ends. One that has begun stands, whatever is written.
pub fn check_lifetime(target: &Target, new: &Value, old: &Value) -> Result<(), Status> {
    let field = "/metadata/deletionTimestamp";
    hold(target, new, old, field, new.has(field) && !old.has(field))
}

/// Refuses a change of a fixed field, where it is `given`.
fn hold(target: &Target, new: &Value, old: &Value, field: &str, given: bool) -> Result<(), Status> {
    let (wanted, present) = (new.pointer(field), old.pointer(field));
    if !given || wanted == present {
        return Ok(());
    }
    let resource = target.resource;
    let path = field.trim_start_matches('/').replace('/', ".");
    let value = wanted.cloned().unwrap_or_default();
    let error = FieldError::invalid(path, value, "field is immutable");
    let name = super::fields::name(old);
    Err(Status::invalid(
        resource.group,
        resource.kind,
        name,
        vec![error],
    ))
}

/// Puts back what the write may not change.
pub fn carry_over(new: &mut Value, old: &Value, part: Part, target: &Target) {
    if part == Part::Status {
        let status = new.pointer("/status").cloned();
        let wanted = new.pointer("/metadata").cloned().unwrap_or_default();
        *new = old.clone();
        for field in ["labels", "annotations", "finalizers", "managedFields"] {
            match wanted.get(field) {
                Some(value) => new.set(&format!("/metadata/{field}"), value.clone()),
                None => _ = new.remove(&format!("/metadata/{field}")),
            }
        }
        match status {
            Some(status) => new.set("/status", status),
            None => _ = new.remove("/status"),
        }
    }
    let fixed = [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "generateName",
        "resourceVersion",
    ];
    for field in fixed {
        let pointer = format!("/metadata/{field}");
        match old.pointer(&pointer) {
            Some(value) => new.set(&pointer, value.clone()),
            None => _ = new.remove(&pointer),
        }
    }
    match old.pointer("/metadata/managedFields") {
        Some(managed) if !new.has("/metadata/managedFields") => {
            new.set("/metadata/managedFields", managed.clone())
        }
        _ => {}
    }
    if part == Part::Main && target.resource.subresource("status").is_some() {
        match old.pointer("/status") {
            Some(status) => new.set("/status", status.clone()),
            None => _ = new.remove("/status"),
        }
    }
}

/// Takes out what is empty and means nothing: clients compare objects, and upstream never shows these.
pub fn drop_empty(object: &mut Value) {
    for field in [
        "labels",
        "annotations",
        "finalizers",
        "ownerReferences",
        "managedFields",
    ] {
        let pointer = format!("/metadata/{field}");
        let empty = match object.pointer(&pointer) {
            Some(Value::Object(fields)) => fields.is_empty(),
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Null) => true,
            _ => false,
        };
        if empty {
            object.remove(&pointer);
        }
    }
}

/// Whether anything differs that a generation stands for.
pub fn spec_differs(new: &Value, old: &Value) -> bool {
    let uncounted = ["metadata", "status", "kind", "apiVersion"];
    let lacks = |one: &Value, other: &Value| {
        let fields = one.as_object().into_iter().flatten();
        let mut counted = fields.filter(|(key, _)| !uncounted.contains(&key.as_str()));
        counted.any(|(key, value)| other.get(key) != Some(value))
    };
    lacks(new, old) || lacks(old, new)
}

/// Whether the object is being deleted and nothing holds that back any more.
pub fn finished(object: &Value) -> bool {
    object.has("/metadata/deletionTimestamp")
        && object.items("/metadata/finalizers").is_empty()
        && object.items("/spec/finalizers").is_empty()
        && object.int("/metadata/deletionGracePeriodSeconds") == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_status_write_changes_nothing_but_the_status_and_labels() {
        let target = Target::parse("/api/v1/namespaces/a/pods/b/status").expect("a pod's status");
        let old = json!({"metadata": {"name": "b", "uid": "1", "labels": {"x": "1"}}, "spec": {"nodeName": "n"}, "status": {"phase": "Pending"}});
        let mut new = json!({"metadata": {"name": "b", "labels": {"x": "2"}}, "spec": {}, "status": {"phase": "Running"}});
        carry_over(&mut new, &old, Part::Status, &target);
        let expected = json!({"metadata": {"name": "b", "uid": "1", "labels": {"x": "2"}}, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}});
        assert_eq!(new, expected);
        let mut new = json!({"metadata": {"name": "b"}, "spec": {"nodeName": "n", "x": 1}, "status": {"phase": "Failed"}});
        carry_over(&mut new, &old, Part::Main, &target);
        assert_eq!(new["status"]["phase"], "Pending");
        assert_eq!(new["spec"]["x"], 1);
    }
}
