//! ConfigMaps, Secrets, Events, Leases and PriorityClasses.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::metadata::config_key;
use super::place::Place;
use super::{Errors, NameRule, Strategy};
use crate::api::fields::{self, Fields};
use crate::api::status::FieldError;

/// The most bytes that the values of one ConfigMap or Secret may have together.
const DATA_BYTES_MAX: usize = 1 << 20;

fn validate_data(object: &Value, maps: &[&str], errors: &mut Errors) {
    let mut bytes = 0;
    for map in maps {
        for (key, value) in object.object(&format!("/{map}")).into_iter().flatten() {
            if let Some(why) = config_key(key) {
                errors.push(FieldError::invalid(
                    format!("{map}[{key}]"),
                    key.as_str(),
                    why,
                ));
            }
            bytes += value.as_str().map_or(0, str::len);
        }
    }
    if bytes > DATA_BYTES_MAX * 4 / 3 {
        errors.push(FieldError {
            field: maps[0].to_owned(),
            reason: "FieldValueTooLong",
            message: format!("Too long: may not be more than {DATA_BYTES_MAX} bytes"),
        });
    }
}

/// An object that says it is immutable stays as it is, and says so for good.
fn validate_immutable(object: &Value, old: &Value, maps: &[&str], errors: &mut Errors) {
    if !old.flag("/immutable") {
        return;
    }
    for field in maps.iter().chain(&["immutable"]) {
        let pointer = format!("/{field}");
        if object.pointer(&pointer) != old.pointer(&pointer) {
            errors.push(FieldError::forbidden(
                *field,
                "field is immutable when `immutable` is set",
            ));
        }
    }
}

pub struct ConfigMap;

impl Strategy for ConfigMap {
    fn validate(&self, map: &Value, errors: &mut Errors) {
        validate_data(map, &["data", "binaryData"], errors);
        let binary = map.object("/binaryData");
        for key in map
            .object("/data")
            .into_iter()
            .flatten()
            .map(|(key, _)| key)
        {
            if binary.is_some_and(|binary| binary.contains_key(key)) {
                let why = "duplicate of key present in data";
                errors.push(FieldError::invalid(
                    format!("data[{key}]"),
                    key.as_str(),
                    why,
                ));
            }
        }
    }

    fn validate_update(&self, map: &Value, old: &Value, errors: &mut Errors) {
        validate_immutable(map, old, &["data", "binaryData"], errors);
    }
}

pub struct Secret;

impl Strategy for Secret {
    fn default(&self, secret: &mut Value) {
        secret.default("/type", "Opaque");
        if let Some(Value::Object(plain)) = secret.remove("/stringData") {
            let data = secret.object_mut("/data");
            for (key, value) in plain {
                data.insert(key, STANDARD.encode(value.as_str().unwrap_or("")).into());
            }
        }
    }

    fn validate(&self, secret: &Value, errors: &mut Errors) {
        validate_data(secret, &["data"], errors);
        let needs: &[&str] = match secret.text("/type") {
            "kubernetes.io/tls" => &["tls.crt", "tls.key"],
            "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
            "kubernetes.io/dockercfg" => &[".dockercfg"],
            "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
            _ => &[],
        };
        for key in needs {
            if !secret
                .object("/data")
                .is_some_and(|data| data.contains_key(*key))
            {
                errors.push(FieldError::required(format!("data[{key}]"), ""));
            }
        }
        let has = |key: &str| secret["data"].get(key).is_some();
        if secret.text("/type") == "kubernetes.io/basic-auth"
            && !has("username")
            && !has("password")
        {
            for key in ["username", "password"] {
                errors.push(FieldError::required(format!("data[{key}]"), ""));
            }
        }
        const ACCOUNT: &str = "kubernetes.io/service-account.name";
        let account = secret["metadata"]["annotations"][ACCOUNT].as_str();
        if secret.text("/type") == "kubernetes.io/service-account-token"
            && account.unwrap_or("").is_empty()
        {
            let path = format!("metadata.annotations[{ACCOUNT}]");
            errors.push(FieldError::required(path, ""));
        }
    }

    fn validate_update(&self, secret: &Value, old: &Value, errors: &mut Errors) {
        validate_immutable(secret, old, &["data"], errors);
        let kind = |secret| Place::root(secret).field("type");
        kind(secret).unchanged(&kind(old), errors);
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["type"]
    }
}

pub struct Event;

impl Strategy for Event {
    fn name_rule(&self) -> NameRule {
        NameRule::PathSegment
    }

    fn creates_on_update(&self) -> bool {
        true
    }

    fn default(&self, event: &mut Value) {
        for field in ["source", "reportingComponent", "reportingInstance"] {
            let empty: Value = if field == "source" {
                Value::Object(Default::default())
            } else {
                "".into()
            };
            event.default(&format!("/{field}"), empty);
        }
    }

    fn validate(&self, event: &Value, errors: &mut Errors) {
        let involved = event.text("/involvedObject/namespace");
        let namespace = fields::namespace(event);
        if involved != namespace && !(involved.is_empty() && namespace == "default") {
            let why = "does not match event.namespace";
            errors.push(FieldError::invalid(
                "involvedObject.namespace",
                involved,
                why,
            ));
        }
    }

    fn selectable(&self) -> &'static [&'static str] {
        &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "source.component",
            "type",
        ]
    }
}

pub struct Lease;

impl Strategy for Lease {
    fn creates_on_update(&self) -> bool {
        true
    }

    fn default(&self, lease: &mut Value) {
        lease.object_mut("/spec");
    }

    fn validate(&self, lease: &Value, errors: &mut Errors) {
        let spec = Place::root(lease).field("spec");
        spec.field("leaseDurationSeconds").positive(errors);
        spec.field("leaseTransitions").not_negative(errors);
    }
}

pub struct PriorityClass;

/// The largest priority a user may give; more is for the system's classes.
const USER_PRIORITY_MAX: i64 = 1_000_000_000;

impl Strategy for PriorityClass {
    fn default(&self, class: &mut Value) {
        class.default("/preemptionPolicy", "PreemptLowerPriority");
        class.default("/value", 0);
    }

    fn validate(&self, class: &Value, errors: &mut Errors) {
        let system =
            ["system-cluster-critical", "system-node-critical"].contains(&fields::name(class));
        if fields::name(class).starts_with("system-") && !system {
            let why = "priority class names with 'system-' prefix are reserved for system use only";
            errors.push(FieldError::forbidden("metadata.name", why));
        }
        if class.int("/value") > USER_PRIORITY_MAX && !system {
            let why =
                format!("maximum allowed value of a user defined priority is {USER_PRIORITY_MAX}");
            errors.push(FieldError::forbidden("value", &why));
        }
        Place::root(class)
            .field("preemptionPolicy")
            .one_of(&["Never", "PreemptLowerPriority"], errors);
    }

    fn validate_update(&self, class: &Value, old: &Value, errors: &mut Errors) {
        let (class, old) = (Place::root(class), Place::root(old));
        if class.field("value").value() != old.field("value").value() {
            class
                .field("value")
                .forbidden("may not be changed in an update.", errors);
        }
        let policy = class.field("preemptionPolicy");
        policy.unchanged(&old.field("preemptionPolicy"), errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn string_data_of_a_secret_becomes_data() {
        let mut secret = json!({"stringData": {"a": "hello"}, "data": {"b": "eA=="}});
        Secret.default(&mut secret);
        assert_eq!(
            secret,
            json!({"data": {"b": "eA==", "a": "aGVsbG8="}, "type": "Opaque"})
        );
    }

    #[test]
    fn an_immutable_config_map_stays() {
        let old = json!({"immutable": true, "data": {"a": "1"}});
        let mut errors = Vec::new();
        ConfigMap.validate_update(
            &json!({"immutable": true, "data": {"a": "2"}}),
            &old,
            &mut errors,
        );
        assert_eq!(errors.len(), 1);
        ConfigMap.validate_update(&json!({"data": {"a": "1"}}), &old, &mut errors);
        assert_eq!(errors[1].field, "immutable");
    }
}
