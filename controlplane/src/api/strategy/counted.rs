//! What the counts in a status must be to each other: nothing is negative, and no part is more than the whole.

use serde_json::Value;

use super::Errors;
use super::place::Place;
use crate::api::status::FieldError;
use crate::registry::Resource;

/// Counts that may not be more than `status.replicas`, and how `availableReplicas` over `readyReplicas` is told.
fn parts(resource: &Resource) -> Option<(&'static [&'static str], &'static str)> {
    let ready = "cannot be greater than readyReplicas";
    Some(match (resource.group, resource.plural) {
        ("apps", "deployments") => (
            &["updatedReplicas", "readyReplicas", "availableReplicas"],
            ready,
        ),
        ("apps", "replicasets") | ("", "replicationcontrollers") => (
            &["fullyLabeledReplicas", "readyReplicas", "availableReplicas"],
            ready,
        ),
        ("apps", "statefulsets") => (
            &[
                "readyReplicas",
                "currentReplicas",
                "updatedReplicas",
                "availableReplicas",
            ],
            "cannot be greater than status.readyReplicas",
        ),
        ("apps", "daemonsets") | ("policy", "poddisruptionbudgets") => (&[], ""),
        ("batch", "jobs") | ("autoscaling", "horizontalpodautoscalers") => (&[], ""),
        _ => return None,
    })
}

/// Checks the status of an object, for kinds that count something there.
pub fn validate_status(resource: &Resource, object: &Value, errors: &mut Errors) {
    let Some((parts, over_ready)) = parts(resource) else {
        return;
    };
    let status = Place::root(object).field("status");
    for (field, _) in status.value().as_object().into_iter().flatten() {
        status.field(field).not_negative(errors);
    }
    let count = |field: &str| status.field(field).int();
    let mut told = |field: &str, why: &str| {
        let place = status.field(field);
        errors.push(FieldError::invalid(place.path(), place.int(), why));
    };
    for part in parts {
        if count(part) > count("replicas") {
            told(part, "cannot be greater than status.replicas");
        }
    }
    if !parts.is_empty() && count("availableReplicas") > count("readyReplicas") {
        told("availableReplicas", over_ready);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn no_part_of_a_status_is_more_than_the_whole() {
        let told = |status: Value| {
            let resource = crate::registry::resource("apps", "v1", "deployments");
            let mut errors = Vec::new();
            let object = json!({"status": status});
            validate_status(resource.expect("deployments"), &object, &mut errors);
            errors.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let good =
            json!({"replicas": 2, "readyReplicas": 1, "availableReplicas": 1, "conditions": []});
        assert_eq!(told(good), [""; 0]);
        assert_eq!(
            told(json!({"replicas": -1})),
            [
                "status.replicas: Invalid value: -1: must be greater than or equal to 0",
                "status.updatedReplicas: Invalid value: 0: cannot be greater than status.replicas",
                "status.readyReplicas: Invalid value: 0: cannot be greater than status.replicas",
                "status.availableReplicas: Invalid value: 0: cannot be greater than status.replicas",
            ]
        );
        assert_eq!(
            told(json!({"replicas": 2, "availableReplicas": 1})),
            ["status.availableReplicas: Invalid value: 1: cannot be greater than readyReplicas"]
        );
    }
}
