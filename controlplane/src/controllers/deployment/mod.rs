//! Deployment: moves pods from one template to the next through ReplicaSets, one per template.
//!
//! A plan takes one step: it makes the ReplicaSet of the current template, or scales sets up, or scales sets down, or
//! clears away old ones. The step's outcome shows in the next snapshot, where the next step is planned.

mod rollout;
mod sets;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, ReplicaSet};
use serde_json::json;

use self::sets::Sets;
use super::labels;
use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Note, Plan, View};
use super::pods;
use super::snapshot::{Change, Snapshot};

const REPORTER: &str = "deployment-controller";
pub(super) const HASH_LABEL: &str = "pod-template-hash";
pub(super) const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
const DESIRED_REPLICAS: &str = "deployment.kubernetes.io/desired-replicas";
const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";
/// Annotations of a Deployment that its ReplicaSets do not get.
const NOT_COPIED: &[&str] = &[
    "kubectl.kubernetes.io/last-applied-configuration",
    "deprecated.deployment.rollback.to",
    REVISION,
    REVISION_HISTORY,
    DESIRED_REPLICAS,
    MAX_REPLICAS,
];

pub const CONTROLLER: Controller = Controller {
    name: "deployment",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    for state in change.states() {
        match state {
            Object::Deployment(deployment) => {
                keys.insert(Key::of(&deployment.metadata));
            }
            Object::ReplicaSet(set) => match pods::controller_of(&set.metadata) {
                Some(_) => keys.extend(pods::controller_key(&set.metadata, "Deployment")),
                None => keys.extend(
                    snapshot
                        .deployments
                        .namespace(set.metadata.namespace.as_deref().unwrap_or_default())
                        .filter(|(_, deployment)| selects(deployment, set))
                        .map(|(key, _)| key.clone()),
                ),
            },
            // Recreate waits until the last old pod is gone.
            Object::Pod(pod) if change.new.is_none() || pods::is_terminal(pod) => {
                let set = pods::controller_key(&pod.metadata, "ReplicaSet")
                    .and_then(|set| snapshot.replica_sets.get(&set).cloned());
                keys.extend(set.and_then(|set| pods::controller_key(&set.metadata, "Deployment")));
            }
            _ => {}
        }
    }
}

fn selects(deployment: &Deployment, set: &ReplicaSet) -> bool {
    spec(deployment).is_some_and(|spec| {
        !labels::is_empty(&spec.selector)
            && labels::selector_matches(&spec.selector, set.metadata.labels.as_ref())
    })
}

fn spec(deployment: &Deployment) -> Option<&DeploymentSpec> {
    deployment.spec.as_ref()
}

fn wished(deployment: &Deployment) -> i32 {
    spec(deployment).and_then(|spec| spec.replicas).unwrap_or(1)
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let Some(deployment) = view.snapshot.deployments.get(key) else {
        return Plan::nothing();
    };
    let Some(spec) = spec(deployment) else {
        return Plan::nothing();
    };
    let mut plan = Plan::nothing();
    if labels::is_empty(&spec.selector) {
        let message = "This deployment is selecting all pods. A non-empty selector is required.";
        plan.note(Note::warning(
            &Target::of(&**deployment),
            REPORTER,
            "SelectingAll",
            message,
        ));
        return plan;
    }
    let deleting = deployment.metadata.deletion_timestamp.is_some();
    let owned = owned_sets(view.snapshot, deployment, deleting, &mut plan);
    let sets = Sets::of(view, deployment, owned);
    if deleting {
        status::report(view, deployment, &sets, None, &mut plan);
        return plan;
    }
    let created = step(view, deployment, spec, &sets, &mut plan);
    status::report(view, deployment, &sets, created.as_deref(), &mut plan);
    plan
}

/// The ReplicaSets that are the Deployment's, after adoption; those whose labels no longer match are let go.
fn owned_sets(
    snapshot: &Snapshot,
    deployment: &Deployment,
    deleting: bool,
    plan: &mut Plan,
) -> Vec<Arc<ReplicaSet>> {
    let uid = deployment.metadata.uid.as_deref().unwrap_or_default();
    let mut owned = Vec::new();
    for set in snapshot.replica_sets_owned_by(uid) {
        if selects(deployment, set) {
            owned.push(set.clone());
        } else if !deleting && set.metadata.deletion_timestamp.is_none() {
            plan.push(pods::release(&**set, uid));
        }
    }
    if !deleting {
        for set in snapshot
            .orphan_replica_sets(deployment.metadata.namespace.as_deref().unwrap_or_default())
        {
            if selects(deployment, set) && set.metadata.deletion_timestamp.is_none() {
                plan.push(pods::adopt(&**set, deployment));
                owned.push(set.clone());
            }
        }
    }
    owned
}

/// Plans one step; gives the hash of the template for which a ReplicaSet is made, if one is.
fn step(
    view: &View<'_>,
    deployment: &Arc<Deployment>,
    spec: &DeploymentSpec,
    sets: &Sets,
    plan: &mut Plan,
) -> Option<String> {
    if spec.paused == Some(true) || rollout::was_scaled(deployment, sets) {
        if let Some(set) = &sets.current {
            refresh(deployment, sets, set, plan);
        }
        let writes_before = plan.writes.len();
        rollout::scale_proportionally(deployment, sets, plan);
        if plan.writes.len() == writes_before && spec.paused == Some(true) {
            clear_history(deployment, sets, plan);
        }
        return None;
    }
    let recreate = spec
        .strategy
        .as_ref()
        .and_then(|strategy| strategy.type_.as_deref())
        == Some("Recreate");
    let mut made = None;
    if recreate
        && (rollout::scale_old_to_zero(deployment, sets, plan) || old_pods_run(view.snapshot, sets))
    {
        return None;
    }
    match &sets.current {
        None => {
            if !view.snapshot.namespace_is_terminating(
                deployment.metadata.namespace.as_deref().unwrap_or_default(),
            ) {
                made = make_set(view.snapshot, deployment, spec, sets, plan);
            }
        }
        Some(set) => {
            refresh(deployment, sets, set, plan);
            let scaled = if recreate {
                rollout::scale(deployment, set, wished(deployment), plan)
            } else {
                rollout::scale_current(deployment, sets, plan)
                    || rollout::scale_old_down(deployment, sets, plan)
            };
            if !scaled && status::is_complete(deployment, sets) {
                clear_history(deployment, sets, plan);
            }
        }
    }
    made
}

fn old_pods_run(snapshot: &Snapshot, sets: &Sets) -> bool {
    sets.old.iter().any(|set| {
        let uid = set.metadata.uid.as_deref().unwrap_or_default();
        snapshot
            .pods_owned_by(uid)
            .any(|pod| !pods::is_terminal(pod))
    })
}

/// Creates the ReplicaSet of the current template, with as many replicas as the strategy allows at once.
fn make_set(
    snapshot: &Snapshot,
    deployment: &Arc<Deployment>,
    spec: &DeploymentSpec,
    sets: &Sets,
    plan: &mut Plan,
) -> Option<String> {
    let collisions = deployment
        .status
        .as_ref()
        .and_then(|status| status.collision_count);
    let hash = pods::template_hash(&spec.template, collisions);
    let target = Target::of(&**deployment);
    let name = format!("{}-{hash}", target.key.name);
    if snapshot
        .replica_sets
        .contains(&Key::new(&target.key.namespace, &name))
    {
        // The name is taken by a set of another template or another owner: the next plan hashes to another name.
        let status = json!({"collisionCount": collisions.unwrap_or(0) + 1});
        plan.push(pods::status_patch(&**deployment, status));
        return None;
    }
    let mut template = spec.template.clone();
    let template_labels = template.metadata.get_or_insert_default();
    template_labels.labels = Some(pods::with_label(
        template_labels.labels.as_ref(),
        HASH_LABEL,
        &hash,
    ));
    let labels = template_labels.labels.clone();
    let mut selector = spec.selector.clone();
    selector.match_labels = Some(pods::with_label(
        selector.match_labels.as_ref(),
        HASH_LABEL,
        &hash,
    ));
    let replicas = rollout::replicas_of_new(deployment, sets);
    let mut annotations = sets::copied_annotations(deployment);
    annotations.insert(REVISION.into(), sets.next_revision().to_string());
    annotations.insert(DESIRED_REPLICAS.into(), wished(deployment).to_string());
    annotations.insert(
        MAX_REPLICAS.into(),
        rollout::replicas_max(deployment).to_string(),
    );
    let set = ReplicaSet {
        metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
            name: Some(name.clone()),
            namespace: deployment.metadata.namespace.clone(),
            labels,
            annotations: Some(annotations),
            owner_references: Some(vec![pods::controller_reference(&**deployment)]),
            ..Default::default()
        },
        spec: Some(k8s_openapi::api::apps::v1::ReplicaSetSpec {
            replicas: Some(replicas),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        }),
        status: None,
    };
    let note = Note::normal(
        &target,
        REPORTER,
        "ScalingReplicaSet",
        format!("Scaled up replica set {name} from 0 to {replicas}"),
    )
    .or_failure(
        "ReplicaSetCreateError",
        "Failed to create new replica set: ",
    );
    if replicas > 0 {
        plan.push_noted(Action::Create(Object::of(set)), note);
    } else {
        plan.push(Action::Create(Object::of(set)));
    }
    set_revision(deployment, sets.next_revision(), plan);
    Some(hash)
}

/// Keeps revision and annotations of the current ReplicaSet, and the Deployment's own revision.
fn refresh(deployment: &Arc<Deployment>, sets: &Sets, set: &ReplicaSet, plan: &mut Plan) {
    let own = set.metadata.annotations.clone().unwrap_or_default();
    let mut wanted = sets::copied_annotations(deployment);
    let next = sets.next_revision();
    let known = sets::revision_of(set);
    if known < next {
        wanted.insert(REVISION.into(), next.to_string());
        if known > 0 {
            let mut history = own.get(REVISION_HISTORY).cloned().unwrap_or_default();
            if !history.is_empty() {
                history.push(',');
            }
            history.push_str(&known.to_string());
            wanted.insert(REVISION_HISTORY.into(), history);
        }
    }
    let changed: serde_json::Map<_, _> = wanted
        .iter()
        .filter(|(name, value)| own.get(*name) != Some(value))
        .map(|(name, value)| (name.clone(), json!(value)))
        .collect();
    let min_ready_seconds = spec(deployment)
        .and_then(|spec| spec.min_ready_seconds)
        .unwrap_or(0);
    let differs = set
        .spec
        .as_ref()
        .and_then(|spec| spec.min_ready_seconds)
        .unwrap_or(0)
        != min_ready_seconds;
    if !changed.is_empty() || differs {
        plan.push(Action::Patch {
            target: Target::of(set),
            subresource: None,
            // No resourceVersion: nothing here depends on what else changed, and the scaling patch of the same plan
            // must not make this one fail.
            body: json!({
                "metadata": {"uid": set.metadata.uid, "annotations": changed},
                "spec": {"minReadySeconds": min_ready_seconds},
            }),
        });
    }
    set_revision(deployment, known.max(next), plan);
}

fn set_revision(deployment: &Deployment, revision: i64, plan: &mut Plan) {
    let revision = revision.to_string();
    if deployment
        .metadata
        .annotations
        .as_ref()
        .and_then(|annotations| annotations.get(REVISION))
        != Some(&revision)
    {
        plan.push(Action::Patch {
            target: Target::of(deployment),
            subresource: None,
            body: json!({"metadata": {"uid": deployment.metadata.uid, "annotations": {REVISION: revision}}}),
        });
    }
}

/// Deletes the oldest empty ReplicaSets past `revisionHistoryLimit`.
fn clear_history(deployment: &Deployment, sets: &Sets, plan: &mut Plan) {
    let limit = spec(deployment)
        .and_then(|spec| spec.revision_history_limit)
        .unwrap_or(10);
    let mut idle: Vec<&Arc<ReplicaSet>> =
        sets.old.iter().filter(|set| sets::is_idle(set)).collect();
    let surplus = idle
        .len()
        .saturating_sub(usize::try_from(limit).unwrap_or(0));
    idle.sort_by_key(|set| sets::revision_of(set));
    for set in idle.into_iter().take(surplus) {
        plan.push(Action::Delete {
            target: Target::of(&**set),
            propagation: None,
            grace_seconds: None,
        });
    }
}
