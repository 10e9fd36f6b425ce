//! What a Deployment says about itself: counts, and the conditions that `kubectl rollout status` and `kubectl wait` read.

use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::super::plan::{Plan, View};
use super::super::pods;
use super::rollout::limits;
use super::sets::Sets;
use super::{spec, wished};

const COMPLETE: &str = "NewReplicaSetAvailable";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";

/// Whether every replica is of the current template and available, and nothing else is left.
pub fn is_complete(deployment: &Deployment, sets: &Sets) -> bool {
    complete(deployment, &counts(deployment, sets))
}

fn complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wished = Some(wished(deployment));
    status.updated_replicas == wished
        && status.replicas == wished
        && status.available_replicas == wished
}

fn counts(deployment: &Deployment, sets: &Sets) -> DeploymentStatus {
    let status = |set: &std::sync::Arc<k8s_openapi::api::apps::v1::ReplicaSet>| {
        set.status.clone().unwrap_or_default()
    };
    let available = sets.available();
    DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: Some(sets.all().map(|set| status(set).replicas).sum()),
        updated_replicas: Some(sets.current.as_ref().map_or(0, |set| status(set).replicas)),
        ready_replicas: Some(
            sets.all()
                .map(|set| status(set).ready_replicas.unwrap_or(0))
                .sum(),
        ),
        available_replicas: Some(available),
        unavailable_replicas: Some((sets.total() - available).max(0)),
        terminating_replicas: Some(
            sets.all()
                .map(|set| status(set).terminating_replicas.unwrap_or(0))
                .sum(),
        ),
        collision_count: deployment
            .status
            .as_ref()
            .and_then(|status| status.collision_count),
        conditions: None,
    }
}

/// Plans the status patch if the status differs. `created` is the hash of a ReplicaSet that this plan makes.
pub fn report(
    view: &View<'_>,
    deployment: &Deployment,
    sets: &Sets,
    created: Option<&str>,
    plan: &mut Plan,
) {
    let old = deployment.status.clone().unwrap_or_default();
    let mut new = counts(deployment, sets);
    let mut conditions = old.conditions.clone().unwrap_or_default();
    set_available(deployment, &new, &mut conditions, view.now);
    set_progressing(
        view.now,
        deployment,
        sets,
        &old,
        &new,
        created,
        &mut conditions,
        plan,
    );
    set_failure(sets, &mut conditions, view);
    new.conditions = Some(conditions);
    if same(&old, &new) {
        return;
    }
    plan.push(pods::status_patch(
        deployment,
        json!({
            "observedGeneration": new.observed_generation,
            "replicas": new.replicas,
            "updatedReplicas": new.updated_replicas,
            "readyReplicas": new.ready_replicas,
            "availableReplicas": new.available_replicas,
            "unavailableReplicas": new.unavailable_replicas,
            "terminatingReplicas": new.terminating_replicas,
            "conditions": new.conditions,
        }),
    ));
}

fn same(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    let numbers = |status: &DeploymentStatus| {
        [
            status.replicas,
            status.updated_replicas,
            status.ready_replicas,
            status.available_replicas,
            status.unavailable_replicas,
            status.terminating_replicas,
        ]
        .map(|number| number.unwrap_or(0))
    };
    numbers(old) == numbers(new)
        && old.observed_generation == new.observed_generation
        && old.conditions.as_deref().unwrap_or_default()
            == new.conditions.as_deref().unwrap_or_default()
}

fn set_available(
    deployment: &Deployment,
    status: &DeploymentStatus,
    conditions: &mut Vec<DeploymentCondition>,
    now: Timestamp,
) {
    let (_, unavailable_max) = limits(deployment);
    let enough = status.available_replicas.unwrap_or(0) >= wished(deployment) - unavailable_max;
    let condition = if enough {
        condition(
            "Available",
            true,
            "MinimumReplicasAvailable",
            "Deployment has minimum availability.",
            now,
        )
    } else {
        condition(
            "Available",
            false,
            "MinimumReplicasUnavailable",
            "Deployment does not have minimum availability.",
            now,
        )
    };
    put(conditions, condition);
}

#[expect(
    clippy::too_many_arguments,
    reason = "one decision over two statuses; a struct would only rename them"
)]
fn set_progressing(
    now: Timestamp,
    deployment: &Deployment,
    sets: &Sets,
    old: &DeploymentStatus,
    new: &DeploymentStatus,
    created: Option<&str>,
    conditions: &mut Vec<DeploymentCondition>,
    plan: &mut Plan,
) {
    let Some(spec) = spec(deployment) else { return };
    let deadline = spec.progress_deadline_seconds.unwrap_or(600);
    if deadline == i32::MAX {
        conditions.retain(|condition| condition.type_ != "Progressing");
        return;
    }
    let name = deployment.metadata.name.as_deref().unwrap_or_default();
    let known = conditions
        .iter()
        .find(|condition| condition.type_ == "Progressing")
        .cloned();
    let reason = known
        .as_ref()
        .and_then(|known| known.reason.as_deref())
        .unwrap_or_default()
        .to_string();
    let subject = match (&sets.current, created) {
        (_, Some(hash)) => format!("ReplicaSet \"{name}-{hash}\""),
        (Some(set), None) => format!(
            "ReplicaSet \"{}\"",
            set.metadata.name.as_deref().unwrap_or_default()
        ),
        (None, None) => format!("Deployment \"{name}\""),
    };
    if spec.paused == Some(true) {
        if reason != "DeploymentPaused" && reason != TIMED_OUT {
            put(
                conditions,
                unknown("DeploymentPaused", "Deployment is paused", now),
            );
        }
        return;
    }
    if reason == "DeploymentPaused" {
        put(
            conditions,
            unknown("DeploymentResumed", "Deployment is resumed", now),
        );
        return;
    }
    if created.is_some() {
        let message = subject.replacen("ReplicaSet", "Created new replica set", 1);
        put(
            conditions,
            condition("Progressing", true, "NewReplicaSetCreated", &message, now),
        );
        return;
    }
    if known.is_none() && sets.current.is_some() {
        let message = subject.replacen("ReplicaSet", "Found new replica set", 1);
        put(
            conditions,
            condition("Progressing", true, "FoundNewReplicaSet", &message, now),
        );
        return;
    }
    if new.replicas == new.updated_replicas && reason == COMPLETE {
        return;
    }
    if complete(deployment, new) {
        let message = format!("{subject} has successfully progressed.");
        put(
            conditions,
            condition("Progressing", true, COMPLETE, &message, now),
        );
    } else if progresses(old, new) {
        let mut progress = condition(
            "Progressing",
            true,
            "ReplicaSetUpdated",
            &format!("{subject} is progressing."),
            now,
        );
        if let Some(known) = known.filter(|known| known.status == "True") {
            progress.last_transition_time = known.last_transition_time;
        }
        // Replaced even when it reads the same: its update time is what the deadline counts from.
        conditions.retain(|condition| condition.type_ != "Progressing");
        conditions.push(progress);
    } else if let Some(known) = known.filter(|_| reason != COMPLETE && reason != TIMED_OUT) {
        let from = known
            .last_update_time
            .or(known.last_transition_time)
            .map_or(now, |Time(at)| at);
        let due = from
            .saturating_add(SignedDuration::from_secs(deadline.into()))
            .unwrap_or(Timestamp::MAX);
        if due <= now {
            let message = format!("{subject} has timed out progressing.");
            put(
                conditions,
                condition("Progressing", false, TIMED_OUT, &message, now),
            );
        } else {
            plan.look_again(due);
        }
    }
}

fn progresses(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    let number = |value: Option<i32>| value.unwrap_or(0);
    let outdated =
        |status: &DeploymentStatus| number(status.replicas) - number(status.updated_replicas);
    number(new.updated_replicas) > number(old.updated_replicas)
        || outdated(new) < outdated(old)
        || number(new.ready_replicas) > number(old.ready_replicas)
        || number(new.available_replicas) > number(old.available_replicas)
}

/// Why the current ReplicaSet cannot create its pods, if it cannot.
fn set_failure(sets: &Sets, conditions: &mut Vec<DeploymentCondition>, view: &View<'_>) {
    let failure = sets
        .current
        .iter()
        .chain(sets.old.iter().rev())
        .flat_map(|set| {
            set.status
                .iter()
                .flat_map(|status| status.conditions.iter().flatten())
        })
        .find(|condition| condition.type_ == "ReplicaFailure")
        .map(|condition| (condition.reason.clone(), condition.message.clone()))
        .or_else(|| {
            Some((
                Some("ReplicaSetCreateError".to_string()),
                Some(view.last_failure?.to_string()),
            ))
        });
    match failure {
        Some((reason, message)) => put(
            conditions,
            condition(
                "ReplicaFailure",
                true,
                reason.as_deref().unwrap_or_default(),
                message.as_deref().unwrap_or_default(),
                view.now,
            ),
        ),
        None => conditions.retain(|condition| condition.type_ != "ReplicaFailure"),
    }
}

fn condition(
    type_: &str,
    holds: bool,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> DeploymentCondition {
    DeploymentCondition {
        type_: type_.into(),
        status: if holds { "True" } else { "False" }.into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    }
}

fn unknown(reason: &str, message: &str, now: Timestamp) -> DeploymentCondition {
    DeploymentCondition {
        status: "Unknown".into(),
        ..condition("Progressing", true, reason, message, now)
    }
}

/// Puts a condition in place of the one of its type, unless it says the same; a time of transition changes with the
/// status only.
fn put(conditions: &mut Vec<DeploymentCondition>, mut new: DeploymentCondition) {
    match conditions
        .iter_mut()
        .find(|condition| condition.type_ == new.type_)
    {
        Some(known)
            if known.status == new.status
                && known.reason == new.reason
                && known.message == new.message => {}
        Some(known) => {
            if known.status == new.status {
                new.last_transition_time = known.last_transition_time.clone();
            }
            *known = new;
        }
        None => conditions.push(new),
    }
}
