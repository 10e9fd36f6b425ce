//! What a Job's own rules say about its pods: which failures count and which end the Job, and when enough has succeeded.

use k8s_openapi::api::batch::v1::{Job, PodFailurePolicyRule, SuccessPolicy};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use super::super::object::Key;
use super::super::pods;
use super::indexes::Indexes;

/// What follows from the failure of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It counts towards the back-off limits.
    Counts,
    Ignored,
    /// The index will not be tried again.
    FailsIndex,
    /// The whole Job has failed; the message says by which rule.
    FailsJob(String),
}

/// Judges a failed pod by the first rule of the Job's podFailurePolicy that matches it.
pub fn judge(job: &Job, pod: &Pod) -> Failure {
    let rules = job
        .spec
        .as_ref()
        .and_then(|spec| spec.pod_failure_policy.as_ref())
        .map(|policy| policy.rules.as_slice())
        .unwrap_or_default();
    for (number, rule) in rules.iter().enumerate() {
        let Some(what) = matched(rule, pod) else {
            continue;
        };
        return match rule.action.as_str() {
            "Ignore" => Failure::Ignored,
            "FailIndex" => Failure::FailsIndex,
            "FailJob" => Failure::FailsJob(format!(
                "{what} matching {} rule at index {number}",
                rule.action
            )),
            _ => Failure::Counts,
        };
    }
    Failure::Counts
}

/// What of the pod matches the rule, in words.
fn matched(rule: &PodFailurePolicyRule, pod: &Pod) -> Option<String> {
    let key = Key::of(&pod.metadata);
    if let Some(wanted) = &rule.on_exit_codes {
        return statuses(pod).find_map(|container| {
            if wanted
                .container_name
                .as_ref()
                .is_some_and(|name| *name != container.name)
            {
                return None;
            }
            let code = exit_code(container).filter(|code| *code != 0)?;
            let listed = wanted.values.contains(&code);
            let matches = match wanted.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                _ => false,
            };
            matches.then(|| {
                format!(
                    "Container {} for pod {key} failed with exit code {code}",
                    container.name
                )
            })
        });
    }
    rule.on_pod_conditions.iter().flatten().find_map(|pattern| {
        let wanted = pattern.status.as_deref().unwrap_or("True");
        pods::condition(pod, &pattern.type_)
            .filter(|condition| condition.status == wanted)
            .map(|condition| format!("Pod {key} has condition {}", condition.type_))
    })
}

fn statuses(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.as_ref();
    let main = status.and_then(|status| status.container_statuses.as_deref());
    let init = status.and_then(|status| status.init_container_statuses.as_deref());
    main.into_iter().chain(init).flatten()
}

fn exit_code(container: &ContainerStatus) -> Option<i32> {
    Some(container.state.as_ref()?.terminated.as_ref()?.exit_code)
}

/// The message of the first rule of a success policy that the succeeded indexes satisfy.
pub fn success(policy: &SuccessPolicy, completed: &Indexes, completions: i32) -> Option<String> {
    let met = policy.rules.iter().position(|rule| {
        let Some(wanted) = &rule.succeeded_indexes else {
            return rule
                .succeeded_count
                .is_some_and(|count| completed.len() >= count);
        };
        let wanted = Indexes::parse(wanted, completions);
        match rule.succeeded_count {
            Some(count) => completed.shared(&wanted) >= count,
            None => completed.contains_all(&wanted),
        }
    })?;
    Some(format!("Matched rules at index {met}"))
}
