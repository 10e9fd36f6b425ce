//! Pods.

use serde_json::{Value, json};

use super::place::Place;
use super::{Errors, Strategy, pod_spec};
use crate::api::fields::{self, Fields};
use crate::api::status::FieldError;

pub struct Pod;

impl Strategy for Pod {
    fn default(&self, pod: &mut Value) {
        pod.object_mut("/spec");
        let Some(spec) = pod.pointer_mut("/spec") else {
            return;
        };
        pod_spec::default(spec);
        spec.default("/enableServiceLinks", true);
        for list in pod_spec::CONTAINER_LISTS {
            for container in spec.items_mut(&format!("/{list}")) {
                // Who is limited asks for as much as the limit, unless told otherwise.
                for (resource, limit) in container
                    .object("/resources/limits")
                    .cloned()
                    .into_iter()
                    .flatten()
                {
                    container
                        .object_mut("/resources/requests")
                        .entry(resource)
                        .or_insert(limit);
                }
            }
        }
    }

    fn prepare_create(&self, pod: &mut Value) {
        let class = qos_class(pod);
        pod.set("/status", json!({"phase": "Pending", "qosClass": class}));
        // Told at once: no scheduler looks at the pod until its gates are gone.
        if !pod.items("/spec/schedulingGates").is_empty() {
            let gated = json!({"type": "PodScheduled", "status": "False", "lastProbeTime": null,
                "lastTransitionTime": fields::now(), "reason": "SchedulingGated",
                "message": "Scheduling is blocked due to non-empty scheduling gates"});
            pod.set("/status/conditions", json!([gated]));
        }
    }

    fn validate(&self, pod: &Value, errors: &mut Errors) {
        pod_spec::validate(&Place::root(pod).field("spec"), errors);
    }

    fn validate_update(&self, pod: &Value, old: &Value, errors: &mut Errors) {
        let fixed = |pod: &Value| {
            let mut spec = pod.pointer("/spec").cloned().unwrap_or_default();
            for list in pod_spec::CONTAINER_LISTS {
                for container in spec.items_mut(&format!("/{list}")) {
                    container.remove("/image");
                }
            }
            for field in [
                "activeDeadlineSeconds",
                "tolerations",
                "terminationGracePeriodSeconds",
                "schedulingGates",
            ] {
                spec.remove(&format!("/{field}"));
            }
            // Set once, by the binding.
            if old.text("/spec/nodeName").is_empty() {
                spec.remove("/nodeName");
            }
            spec
        };
        let count = |pod: &Value, list: &str| pod.items(&format!("/spec/{list}")).len();
        let lists = ["containers", "initContainers"];
        let mut lists = lists.into_iter();
        let resized = lists.find(|list| count(pod, list) != count(old, list));
        if let Some(list) = resized {
            let why = match list {
                "containers" => "pod updates may not add or remove containers",
                _ => "pod updates may not add or remove init containers",
            };
            errors.push(FieldError::forbidden(format!("spec.{list}"), why));
        } else if fixed(pod) != fixed(old) {
            let why = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";
            errors.push(FieldError::forbidden("spec", why));
        }
        let lasting = |toleration: &Value| {
            let mut toleration = toleration.clone();
            toleration.remove("/tolerationSeconds");
            toleration
        };
        let kept = pod.items("/spec/tolerations").iter().map(lasting);
        let kept: Vec<Value> = kept.collect();
        let before = old.items("/spec/tolerations").iter();
        if before
            .map(lasting)
            .any(|toleration| !kept.contains(&toleration))
        {
            errors.push(FieldError::forbidden(
                "spec.tolerations",
                "existing toleration can not be modified except its tolerationSeconds",
            ));
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }

    fn selectable(&self) -> &'static [&'static str] {
        &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.podIPs",
            "status.nominatedNodeName",
        ]
    }

    /// A pod that runs nowhere, or runs no more, goes at once. The others wait for their kubelet.
    fn grace_s(&self, pod: &Value, asked: Option<i64>) -> i64 {
        if pod.text("/spec/nodeName").is_empty()
            || matches!(pod.text("/status/phase"), "Failed" | "Succeeded")
        {
            return 0;
        }
        asked.unwrap_or_else(|| {
            pod.pointer("/spec/terminationGracePeriodSeconds")
                .and_then(Value::as_i64)
                .unwrap_or(30)
        })
    }
}

/// The quality of service that the resources of all containers make.
pub fn qos_class(pod: &Value) -> &'static str {
    let counted = ["cpu", "memory"];
    let mut guaranteed = true;
    let mut any = false;
    for list in ["/spec/containers", "/spec/initContainers"] {
        for container in pod.items(list) {
            for resource in counted {
                let limit = container.pointer(&format!("/resources/limits/{resource}"));
                let request = container.pointer(&format!("/resources/requests/{resource}"));
                any |= limit.is_some() || request.is_some();
                guaranteed &= limit.is_some() && (request.is_none() || request == limit);
            }
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quality_of_service_follows_from_resources() {
        let pod = |resources: Value| json!({"spec": {"containers": [{"resources": resources}]}});
        assert_eq!(qos_class(&pod(json!({}))), "BestEffort");
        assert_eq!(
            qos_class(&pod(json!({"requests": {"cpu": "1"}}))),
            "Burstable"
        );
        assert_eq!(
            qos_class(&pod(json!({"limits": {"cpu": "1", "memory": "1Gi"}}))),
            "Guaranteed"
        );
    }

    #[test]
    fn a_running_pod_waits_and_others_go_at_once() {
        let mut pod =
            json!({"spec": {"terminationGracePeriodSeconds": 12}, "status": {"phase": "Pending"}});
        assert_eq!(Pod.grace_s(&pod, None), 0, "not scheduled");
        pod.set("/spec/nodeName", "n");
        assert_eq!(Pod.grace_s(&pod, None), 12);
        assert_eq!(Pod.grace_s(&pod, Some(0)), 0);
        pod.set("/status/phase", "Succeeded");
        assert_eq!(Pod.grace_s(&pod, None), 0, "over");
    }

    #[test]
    fn only_a_few_fields_of_a_pod_change() {
        let old = json!({"spec": {"nodeName": "n", "containers": [{"name": "c", "image": "a"}]}});
        let mut errors = Vec::new();
        let mut new = old.clone();
        new.set("/spec/containers", json!([{"name": "c", "image": "b"}]));
        Pod.validate_update(&new, &old, &mut errors);
        assert_eq!(errors, []);
        new.set("/spec/nodeName", "other");
        Pod.validate_update(&new, &old, &mut errors);
        assert_eq!(errors.len(), 1);
    }

    #[test]
    fn tolerations_are_added_and_their_time_changes() {
        let pod = |list: Value| json!({"spec": {"containers": [], "tolerations": list}});
        let old = pod(json!([{"key": "a", "effect": "NoExecute", "tolerationSeconds": 1}]));
        for (list, faults) in [
            (
                json!([{"key": "a", "effect": "NoExecute", "tolerationSeconds": 9}, {"key": "b"}]),
                0,
            ),
            (json!([{"key": "a", "effect": "NoExecute"}]), 0),
            (json!([{"key": "a", "effect": "NoSchedule"}]), 1),
            (json!([]), 1),
        ] {
            let mut errors = Vec::new();
            Pod.validate_update(&pod(list.clone()), &old, &mut errors);
            assert_eq!(errors.len(), faults, "{list}");
        }
    }
}
