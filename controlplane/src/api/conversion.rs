//! Kinds that are served in two forms and stored in one: Events (stored as v1) and HorizontalPodAutoscalers (stored as
//! autoscaling/v2).

use serde_json::{Map, Value, json};

use super::fields::Fields;
use crate::registry::{self, Resource};

/// Where v1 autoscalers carry what only v2 has a field for.
const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
const CURRENT_METRICS: &str = "autoscaling.alpha.kubernetes.io/current-metrics";
const CONDITIONS: &str = "autoscaling.alpha.kubernetes.io/conditions";
const BEHAVIOR: &str = "autoscaling.alpha.kubernetes.io/behavior";
/// Annotation of v1, and the field of v2 whose JSON it holds.
const CARRIED: [(&str, &str); 4] = [
    (METRICS, "/spec/metrics"),
    (BEHAVIOR, "/spec/behavior"),
    (CURRENT_METRICS, "/status/currentMetrics"),
    (CONDITIONS, "/status/conditions"),
];

/// Whether objects of this resource are stored in the form of another version and must be converted to be served.
pub fn converts(resource: &Resource) -> bool {
    !std::ptr::eq(stored_resource(resource), resource)
}

/// The resource in whose form objects are stored.
pub fn stored_resource(resource: &Resource) -> &Resource {
    let stored = match (resource.group, resource.version) {
        ("events.k8s.io", _) => registry::resource("", "v1", resource.plural),
        ("autoscaling", "v1") => registry::resource("autoscaling", "v2", resource.plural),
        _ => None,
    };
    stored.unwrap_or(resource)
}

/// Event fields: their names in v1 and in events.k8s.io/v1.
const EVENT_FIELDS: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

/// An object as stored, from the form of its request.
pub fn to_stored(object: Value, resource: &Resource) -> Value {
    match resource.group {
        _ if !converts(resource) => object,
        "events.k8s.io" => rename(
            object,
            "v1",
            EVENT_FIELDS.map(|(core, newer)| (newer, core)),
        ),
        _ => autoscaler_to_v2(object),
    }
}

/// An object in the form of its request, from the stored one.
pub fn from_stored(object: Value, resource: &Resource) -> Value {
    match resource.group {
        _ if !converts(resource) => object,
        "events.k8s.io" => rename(object, "events.k8s.io/v1", EVENT_FIELDS),
        _ => autoscaler_to_v1(object),
    }
}

/// Where v2 lists metrics, what of one holds its value, and the field of v1 that is its CPU utilization.
const CPU_UTILIZATIONS: [(&str, &str, &str); 2] = [
    (
        "/spec/metrics",
        "target",
        "/spec/targetCPUUtilizationPercentage",
    ),
    (
        "/status/currentMetrics",
        "current",
        "/status/currentCPUUtilizationPercentage",
    ),
];

fn is_cpu_utilization(metric: &Value, target: &str) -> bool {
    metric.text("/type") == "Resource"
        && metric.text("/resource/name") == "cpu"
        && metric.has(&format!("/resource/{target}/averageUtilization"))
}

fn autoscaler_to_v1(mut object: Value) -> Value {
    for (list, target, field) in CPU_UTILIZATIONS {
        let mut metrics = object.items(list).to_vec();
        if let Some(at) = metrics
            .iter()
            .position(|metric| is_cpu_utilization(metric, target))
        {
            let cpu = metrics.remove(at);
            let share = cpu.int(&format!("/resource/{target}/averageUtilization"));
            object.set(field, share);
            if metrics.is_empty() {
                object.remove(list);
            } else {
                object.set(list, metrics);
            }
        }
    }
    for (annotation, pointer) in CARRIED {
        if let Some(value) = object.remove(pointer) {
            object
                .object_mut("/metadata/annotations")
                .insert(annotation.to_owned(), value.to_string().into());
        }
    }
    object["apiVersion"] = "autoscaling/v1".into();
    object
}

fn autoscaler_to_v2(mut object: Value) -> Value {
    for (annotation, pointer) in CARRIED {
        let carried = object
            .pointer_mut("/metadata/annotations")
            .and_then(Value::as_object_mut)
            .and_then(|annotations| annotations.shift_remove(annotation));
        let parsed = carried.and_then(|text| serde_json::from_str::<Value>(text.as_str()?).ok());
        if let Some(value) = parsed {
            object.set(pointer, value);
        }
    }
    if object
        .object("/metadata/annotations")
        .is_some_and(Map::is_empty)
    {
        object.remove("/metadata/annotations");
    }
    for (list, target, field) in CPU_UTILIZATIONS {
        if let Some(share) = object.remove(field) {
            let mut metric = json!({"averageUtilization": share});
            if target == "target" {
                metric["type"] = "Utilization".into();
            }
            let cpu = json!({"type": "Resource", "resource": {"name": "cpu", target: metric}});
            let mut metrics = vec![cpu];
            metrics.extend(object.items(list).iter().cloned());
            object.set(list, metrics);
        }
    }
    object["apiVersion"] = "autoscaling/v2".into();
    object
}

/// A field selector of a request, with the names that the stored form has for its fields.
pub fn stored_selector<'a>(selector: &'a str, resource: &Resource) -> std::borrow::Cow<'a, str> {
    if resource.group != "events.k8s.io" {
        return selector.into();
    }
    let renamed = selector.split(',').map(|part| {
        let known = EVENT_FIELDS.iter().find(|(_, newer)| {
            part.strip_prefix(newer)
                .is_some_and(|rest| rest.starts_with(['.', '=', '!']))
        });
        match known {
            Some((core, newer)) => format!("{core}{}", &part[newer.len()..]),
            None => part.to_owned(),
        }
    });
    renamed.collect::<Vec<_>>().join(",").into()
}

fn rename(object: Value, api_version: &str, names: [(&str, &str); 7]) -> Value {
    let Value::Object(fields) = object else {
        return object;
    };
    let renamed =
        fields.into_iter().map(
            |(key, value)| match names.iter().find(|(from, _)| *from == key) {
                Some((_, to)) => ((*to).to_owned(), value),
                None if key == "apiVersion" => (key, api_version.into()),
                None => (key, value),
            },
        );
    Value::Object(renamed.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::object::key;

    #[test]
    fn events_of_the_newer_group_are_stored_as_core_events() {
        let newer = registry::resource("events.k8s.io", "v1", "events").expect("a table row");
        let event = json!({"kind": "Event", "apiVersion": "events.k8s.io/v1", "metadata": {"name": "e"},
            "regarding": {"kind": "Pod"}, "note": "hello", "reportingController": "c", "reason": "r"});
        let stored = to_stored(event.clone(), newer);
        assert_eq!(stored["involvedObject"]["kind"], "Pod");
        assert_eq!(stored["message"], "hello");
        assert_eq!(from_stored(stored, newer), event);
        assert_eq!(
            stored_selector("regarding.name=a,type!=Normal,reportingController=x", newer),
            "involvedObject.name=a,type!=Normal,reportingComponent=x"
        );
        assert_eq!(key(newer, Some("ns"), "e"), "/core/events/ns/e");
    }

    #[test]
    fn autoscalers_of_v1_are_those_of_v2_and_lose_nothing() {
        let v1 =
            registry::resource("autoscaling", "v1", "horizontalpodautoscalers").expect("a row");
        let newer = json!({"kind": "HorizontalPodAutoscaler", "apiVersion": "autoscaling/v2", "metadata": {"name": "a"},
            "spec": {"maxReplicas": 3, "metrics": [
                {"type": "Resource", "resource": {"name": "cpu", "target": {"averageUtilization": 70, "type": "Utilization"}}},
                {"type": "Pods", "pods": {"metric": {"name": "rps"}, "target": {"type": "AverageValue", "averageValue": "5"}}}],
                "behavior": {"scaleDown": {"selectPolicy": "Disabled"}}}});
        let older = from_stored(newer.clone(), v1);
        assert_eq!(older["apiVersion"], "autoscaling/v1");
        assert_eq!(
            older["spec"],
            json!({"maxReplicas": 3, "targetCPUUtilizationPercentage": 70})
        );
        assert!(
            older["metadata"]["annotations"][METRICS]
                .as_str()
                .is_some_and(|text| text.contains("rps"))
        );
        assert_eq!(to_stored(older, v1), newer);
        let plain = json!({"kind": "HorizontalPodAutoscaler", "apiVersion": "autoscaling/v1", "metadata": {"name": "a"},
            "spec": {"maxReplicas": 3, "targetCPUUtilizationPercentage": 50}});
        assert_eq!(from_stored(to_stored(plain.clone(), v1), v1), plain);
    }
}
