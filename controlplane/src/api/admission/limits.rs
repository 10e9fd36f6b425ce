//! LimitRanges: defaults for containers that say nothing, and bounds for containers, pods and claims.

use serde_json::Value;

use super::stored;
use crate::api::Api;
use crate::api::fields::{self, Fields};
use crate::api::request::Target;
use crate::api::status::Status;
use crate::codec::quantity::Quantity;

/// Where a pod says what LimitRanges filled in.
const ANNOTATION: &str = "kubernetes.io/limit-ranger";

/// Fills in requests and limits that the namespace's LimitRanges have for containers without.
pub async fn default_pod(api: &Api, target: &Target, pod: &mut Value) -> Result<(), Status> {
    for range in stored(api, "", "limitranges", target.namespace.as_deref()).await? {
        apply_defaults(pod, &range);
    }
    Ok(())
}

fn apply_defaults(pod: &mut Value, range: &Value) {
    let mut notes = Vec::new();
    for limit in range.items("/spec/limits") {
        if limit.text("/type") != "Container" {
            continue;
        }
        for (list, what) in [
            ("containers", "container"),
            ("initContainers", "init container"),
        ] {
            for container in pod.items_mut(&format!("/spec/{list}")) {
                for (defaults, kind) in [("/defaultRequest", "requests"), ("/default", "limits")] {
                    let mut set = Vec::new();
                    for (resource, quantity) in limit.object(defaults).into_iter().flatten() {
                        let given = container.object_mut(&format!("/resources/{kind}"));
                        if !given.contains_key(resource) {
                            given.insert(resource.clone(), quantity.clone());
                            set.push(resource.as_str());
                        }
                    }
                    if container
                        .object(&format!("/resources/{kind}"))
                        .is_some_and(serde_json::Map::is_empty)
                    {
                        container.remove(&format!("/resources/{kind}"));
                    }
                    if !set.is_empty() {
                        set.sort_unstable();
                        let kind = kind.trim_end_matches('s');
                        let name = container.text("/name");
                        notes.push(format!("{} {kind} for {what} {name}", set.join(", ")));
                    }
                }
            }
        }
    }
    if !notes.is_empty() {
        let note = format!("LimitRanger plugin set: {}", notes.join("; "));
        pod.object_mut("/metadata/annotations")
            .insert(ANNOTATION.to_owned(), note.into());
    }
}

/// Refuses a pod that breaks the bounds of its namespace.
pub async fn check_pod(api: &Api, target: &Target, pod: &Value) -> Result<(), Status> {
    let mut faults = Vec::new();
    for range in stored(api, "", "limitranges", target.namespace.as_deref()).await? {
        for limit in range.items("/spec/limits") {
            match limit.text("/type") {
                "Container" => {
                    for list in ["/spec/containers", "/spec/initContainers"] {
                        for container in pod.items(list) {
                            check(
                                limit,
                                |kind, resource| {
                                    let at = format!("/resources/{kind}");
                                    Quantity::of(container.object(&at)?.get(resource)?)
                                },
                                &mut faults,
                            );
                        }
                    }
                }
                "Pod" => check(
                    limit,
                    |kind, resource| pod_total(pod, kind, resource),
                    &mut faults,
                ),
                _ => {}
            }
        }
    }
    refuse(target, pod, faults)
}

/// Refuses a claim that asks for less or more than its namespace allows.
pub async fn check_claim(api: &Api, target: &Target, claim: &Value) -> Result<(), Status> {
    let mut faults = Vec::new();
    for range in stored(api, "", "limitranges", target.namespace.as_deref()).await? {
        for limit in range.items("/spec/limits") {
            if limit.text("/type") == "PersistentVolumeClaim" {
                // A claim has requests only, and the most it may have is held against them.
                let asked = |_: &str, resource: &str| {
                    Quantity::of(claim.object("/spec/resources/requests")?.get(resource)?)
                };
                check(limit, asked, &mut faults);
            }
        }
    }
    refuse(target, claim, faults)
}

fn refuse(target: &Target, object: &Value, faults: Vec<String>) -> Result<(), Status> {
    let why = match faults.as_slice() {
        [] => return Ok(()),
        [single] => single.clone(),
        several => format!("[{}]", several.join(", ")),
    };
    let subject = target.subject_named(fields::name(object));
    Err(Status::forbidden(subject, why))
}

/// What a pod has of a resource: its containers together, or its largest init container; None when one does not say.
pub fn pod_total(pod: &Value, kind: &str, resource: &str) -> Option<Quantity> {
    let of = |container: &Value| {
        let at = format!("/resources/{kind}");
        Quantity::of(container.object(&at)?.get(resource)?)
    };
    let mut total: Option<Quantity> = None;
    for container in pod.items("/spec/containers") {
        if let Some(quantity) = of(container) {
            total = Some(total.unwrap_or(Quantity::ZERO) + quantity);
        }
    }
    // Init containers run one by one, beside the sidecars that have started before them.
    let mut sidecars = Quantity::ZERO;
    let mut peak: Option<Quantity> = None;
    for container in pod.items("/spec/initContainers") {
        let Some(quantity) = of(container) else {
            continue;
        };
        if container.text("/restartPolicy") == "Always" {
            sidecars = sidecars + quantity;
            peak = peak.max(Some(sidecars));
        } else {
            peak = peak.max(Some(sidecars + quantity));
        }
    }
    if !sidecars.is_zero() {
        total = Some(total.unwrap_or(Quantity::ZERO) + sidecars);
    }
    let total = total.max(peak)?;
    let overhead = pod.object("/spec/overhead");
    let overhead = overhead.and_then(|overhead| Quantity::of(overhead.get(resource)?));
    Some(total + overhead.unwrap_or(Quantity::ZERO))
}

/// Holds what `of` says of requests and limits against one item of a LimitRange.
fn check(limit: &Value, of: impl Fn(&str, &str) -> Option<Quantity>, faults: &mut Vec<String>) {
    let kind = limit.text("/type");
    let bounds = |field: &str| {
        let bounds = limit.object(field).into_iter().flatten();
        bounds.filter_map(|(name, value)| Some((name.as_str(), Quantity::of(value)?)))
    };
    for (resource, least) in bounds("/min") {
        match (of("requests", resource), of("limits", resource)) {
            (None, _) => faults.push(format!(
                "minimum {resource} usage per {kind} is {least}.  No request is specified"
            )),
            (Some(request), _) if request < least => faults.push(format!(
                "minimum {resource} usage per {kind} is {least}, but request is {request}"
            )),
            (_, Some(limit)) if limit < least => faults.push(format!(
                "minimum {resource} usage per {kind} is {least}, but limit is {limit}"
            )),
            _ => {}
        }
    }
    for (resource, most) in bounds("/max") {
        match (of("limits", resource), of("requests", resource)) {
            (None, _) => faults.push(format!(
                "maximum {resource} usage per {kind} is {most}.  No limit is specified"
            )),
            (Some(limit), _) if limit > most => faults.push(format!(
                "maximum {resource} usage per {kind} is {most}, but {} is {limit}",
                if kind == "PersistentVolumeClaim" {
                    "request"
                } else {
                    "limit"
                }
            )),
            (_, Some(request)) if request > most => faults.push(format!(
                "maximum {resource} usage per {kind} is {most}, but request is {request}"
            )),
            _ => {}
        }
    }
    for (resource, most) in bounds("/maxLimitRequestRatio") {
        match (of("limits", resource), of("requests", resource)) {
            (Some(limit), Some(request)) => {
                let Some(ratio) = limit.ratio(request) else {
                    faults.push(format!("{resource} max limit to request ratio per {kind} is {most}, but request is 0"));
                    continue;
                };
                if most.ratio(Quantity::count(1)).is_some_and(|most| ratio > most) {
                    faults.push(format!(
                        "{resource} max limit to request ratio per {kind} is {most}, but provided ratio is {ratio:.6}"
                    ));
                }
            }
            _ => faults.push(format!(
                "{resource} max limit to request ratio per {kind} is {most}, but no request is specified or request is 0"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn range() -> Value {
        json!({"spec": {"limits": [{"type": "Container",
            "min": {"cpu": "100m"}, "max": {"cpu": "2"},
            "default": {"cpu": "1", "memory": "1Gi"}, "defaultRequest": {"cpu": "200m"}}]}})
    }

    fn faults(pod: &Value, limit: &Value) -> Vec<String> {
        let mut faults = Vec::new();
        check(
            limit,
            |kind, resource| pod_total(pod, kind, resource),
            &mut faults,
        );
        faults
    }

    #[test]
    fn containers_that_say_nothing_get_the_defaults_and_a_note() {
        let mut pod = json!({"spec": {"containers": [
            {"name": "a"}, {"name": "b", "resources": {"requests": {"cpu": "1"}, "limits": {"cpu": "1", "memory": "1"}}}]}});
        apply_defaults(&mut pod, &range());
        assert_eq!(
            pod["spec"]["containers"][0]["resources"],
            json!({"requests": {"cpu": "200m"}, "limits": {"cpu": "1", "memory": "1Gi"}})
        );
        assert_eq!(
            pod["spec"]["containers"][1]["resources"]["requests"],
            json!({"cpu": "1"})
        );
        assert_eq!(
            pod["metadata"]["annotations"][ANNOTATION],
            "LimitRanger plugin set: cpu request for container a; cpu, memory limit for container a"
        );
    }

    #[test]
    fn bounds_are_held_against_requests_and_limits() {
        let pod = |resources: Value| json!({"spec": {"containers": [{"name": "a", "resources": resources}]}});
        let limit = &range()["spec"]["limits"][0];
        let fits = pod(json!({"requests": {"cpu": "100m"}, "limits": {"cpu": "2"}}));
        assert_eq!(faults(&fits, limit), Vec::<String>::new());
        let outside = pod(json!({"requests": {"cpu": "50m"}, "limits": {"cpu": "3"}}));
        assert_eq!(
            faults(&outside, limit),
            [
                "minimum cpu usage per Container is 100m, but request is 50m",
                "maximum cpu usage per Container is 2, but limit is 3",
            ]
        );
        let silent = faults(&pod(json!({})), limit);
        assert_eq!(
            silent[0],
            "minimum cpu usage per Container is 100m.  No request is specified"
        );
        let ratio = json!({"type": "Pod", "maxLimitRequestRatio": {"cpu": "2"}});
        let spread = pod(json!({"requests": {"cpu": "1"}, "limits": {"cpu": "3"}}));
        assert_eq!(
            faults(&spread, &ratio),
            ["cpu max limit to request ratio per Pod is 2, but provided ratio is 3.000000"]
        );
    }

    #[test]
    fn a_pod_needs_the_larger_of_its_containers_and_its_init_containers() {
        let with = |cpu: &str| json!({"requests": {"cpu": cpu}});
        let pod = json!({"spec": {
            "containers": [{"resources": with("1")}, {"resources": with("500m")}],
            "initContainers": [
                {"resources": with("200m"), "restartPolicy": "Always"}, {"resources": with("3")}],
            "overhead": {"cpu": "100m"}}});
        assert_eq!(
            pod_total(&pod, "requests", "cpu")
                .map(|q| q.to_string())
                .as_deref(),
            Some("3300m")
        );
        assert_eq!(pod_total(&pod, "requests", "memory"), None);
    }
}
