//! What a write may change of an object, and what of it counts as a change.

use serde_json::Value;

use super::fields::Fields;
use super::request::Target;
use super::status::Status;
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
    let counted = |object: &Value| {
        let fields = object.as_object().into_iter().flatten();
        fields
            .filter(|(key, _)| {
                !["metadata", "status", "kind", "apiVersion"].contains(&key.as_str())
            })
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect::<std::collections::BTreeMap<_, _>>()
    };
    counted(new) != counted(old)
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
