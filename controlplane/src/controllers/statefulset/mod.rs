//! StatefulSet: pods with a name, a place in an order, and claims that stay theirs.

mod identity;
mod step;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{
    ControllerRevision, StatefulSet, StatefulSetSpec, StatefulSetStatus,
};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};

use self::identity::revision_of;
use self::step::{Step, Version, is_running_and_ready};
use super::labels::{self, Labels};
use super::object::{Key, Object};
use super::patch::replace_status;
use super::plan::{Controller, Keys, Plan, View, Write};
use super::pods::{self, Availability};
use super::revisions::Versioned;
use super::snapshot::{Change, Snapshot};

const REPORTER: &str = "statefulset-controller";
const HASH_LABEL: &str = "controller.kubernetes.io/hash";

pub const CONTROLLER: Controller = Controller {
    name: "statefulset",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    for state in change.states() {
        match state {
            Object::StatefulSet(set) => {
                keys.insert(Key::of(&set.metadata));
            }
            Object::Pod(_) | Object::ControllerRevision(_) => {
                let meta = state.meta();
                match pods::controller_of(meta) {
                    Some(_) => keys.extend(pods::controller_key(meta, "StatefulSet")),
                    None => keys.extend(
                        snapshot
                            .stateful_sets
                            .namespace(meta.namespace.as_deref().unwrap_or_default())
                            .filter(|(_, set)| selects(set, meta.labels.as_ref()))
                            .map(|(key, _)| key.clone()),
                    ),
                }
                // A name that is another's may become free.
                if let Object::Pod(pod) = state
                    && let Some((set, _)) = pod
                        .metadata
                        .name
                        .as_deref()
                        .unwrap_or_default()
                        .rsplit_once('-')
                {
                    let namespace = meta.namespace.as_deref().unwrap_or_default();
                    let key = Key::new(namespace, set);
                    if snapshot.stateful_sets.contains(&key) {
                        keys.insert(key);
                    }
                }
            }
            Object::PersistentVolumeClaim(claim) => {
                let name = claim.metadata.name.as_deref().unwrap_or_default();
                keys.extend(
                    snapshot
                        .stateful_sets
                        .namespace(claim.metadata.namespace.as_deref().unwrap_or_default())
                        .filter(|(key, _)| name.contains(&*key.name))
                        .map(|(key, _)| key.clone()),
                );
            }
            _ => {}
        }
    }
}

fn selects(set: &StatefulSet, found: Option<&Labels>) -> bool {
    set.spec.as_ref().is_some_and(|spec| {
        !labels::is_empty(&spec.selector) && labels::selector_matches(&spec.selector, found)
    })
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(set) = view.snapshot.stateful_sets.get(key) else {
        return plan;
    };
    let Some(spec) = set.spec.as_ref() else {
        return plan;
    };
    if set.metadata.deletion_timestamp.is_some() || labels::is_empty(&spec.selector) {
        return plan;
    }
    let status = set.status.clone().unwrap_or_default();
    let versioned = Versioned {
        owner: &**set,
        selector: &spec.selector,
        template: &spec.template,
        collisions: status.collision_count,
        limit: spec.revision_history_limit,
        hash_label: HASH_LABEL,
    };
    let Some(update) = versioned.current(view.snapshot, &mut plan) else {
        // The revision that this plan makes names the pods of the next one.
        return plan;
    };
    let history = versioned.history(view.snapshot);
    let current = history
        .iter()
        .copied()
        .find(|revision| revision.metadata.name == status.current_revision)
        .unwrap_or(update);
    let owned = owned_pods(view.snapshot, set, key, &mut plan);
    let by_ordinal: BTreeMap<i32, &Pod> = owned
        .iter()
        .filter_map(|pod| Some((identity::ordinal_of(set, pod)?, *pod)))
        .collect();
    let current_template = template_in(current).unwrap_or_else(|| spec.template.clone());
    let (current_name, update_name) = (name_of(current), name_of(update));
    if !view.snapshot.namespace_is_terminating(&key.namespace) {
        let step = Step {
            view,
            set,
            spec,
            pods: &by_ordinal,
            current: Version {
                name: current_name,
                template: &current_template,
            },
            update: Version {
                name: update_name,
                template: &spec.template,
            },
        };
        step.plan(&mut plan);
    }
    let new = report(
        view,
        set,
        spec,
        &owned,
        current_name,
        update_name,
        &mut plan,
    );
    plan.writes.extend(
        replace_status(&**set, set.status.as_ref(), &new)
            .map(|action| Write { action, note: None }),
    );
    let in_use = |revision: &ControllerRevision| {
        let name = name_of(revision);
        name == current_name
            || name == update_name
            || owned
                .iter()
                .any(|pod| revision_of(pod).is_some_and(|found| found == name))
    };
    versioned.clear_history(view.snapshot, in_use, &mut plan);
    plan
}

fn name_of(revision: &ControllerRevision) -> &str {
    revision.metadata.name.as_deref().unwrap_or_default()
}

/// The template that a revision holds.
fn template_in(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    let template = revision.data.as_ref()?.0.pointer("/spec/template")?;
    serde_json::from_value(template.clone()).ok()
}

/// The set's pods; adopts and releases where names and labels say so.
fn owned_pods<'a>(
    snapshot: &'a Snapshot,
    set: &StatefulSet,
    key: &Key,
    plan: &mut Plan,
) -> Vec<&'a Pod> {
    let uid = set.metadata.uid.as_deref().unwrap_or_default();
    let belongs = |pod: &Pod| {
        selects(set, pod.metadata.labels.as_ref()) && identity::ordinal_of(set, pod).is_some()
    };
    let mut owned: Vec<&Pod> = Vec::new();
    for pod in snapshot.pods_owned_by(uid) {
        if belongs(pod) || pods::is_terminating(pod) {
            owned.push(pod);
        } else {
            plan.push(pods::release(&**pod, uid));
        }
    }
    for pod in snapshot.orphan_pods(&key.namespace) {
        if belongs(pod) && !pods::is_terminating(pod) {
            plan.push(pods::adopt(&**pod, set));
            owned.push(pod);
        }
    }
    owned
}

fn report(
    view: &View<'_>,
    set: &StatefulSet,
    spec: &StatefulSetSpec,
    owned: &[&Pod],
    current: &str,
    update: &str,
    plan: &mut Plan,
) -> StatefulSetStatus {
    let seconds = spec.min_ready_seconds.unwrap_or(0);
    let count = |holds: &dyn Fn(&Pod) -> bool| -> i32 {
        let number = owned.iter().filter(|pod| holds(pod)).count();
        i32::try_from(number).unwrap_or(i32::MAX)
    };
    let of = |name: &str, pod: &Pod| {
        !pods::is_terminating(pod) && revision_of(pod).is_some_and(|found| found == name)
    };
    for pod in owned {
        if let Availability::At(at) = pods::availability(pod, seconds, view.now) {
            plan.look_again(at);
        }
    }
    let mut status = set.status.clone().unwrap_or_default();
    status.observed_generation = set.metadata.generation;
    status.replicas = count(&|_| true);
    status.ready_replicas = Some(count(&is_running_and_ready));
    status.available_replicas = Some(count(&|pod| {
        is_running_and_ready(pod) && pods::availability(pod, seconds, view.now) == Availability::Now
    }));
    status.current_replicas = Some(count(&|pod| of(current, pod)));
    status.updated_replicas = Some(count(&|pod| of(update, pod)));
    status.current_revision = Some(current.into());
    status.update_revision = Some(update.into());
    status.collision_count = status.collision_count.or(Some(0));
    let wanted = spec.replicas.unwrap_or(1);
    let everywhere = status.updated_replicas == Some(wanted)
        && status.ready_replicas == Some(wanted)
        && status.replicas == wanted;
    if everywhere {
        status.current_replicas = status.updated_replicas;
        status.current_revision = Some(update.into());
    }
    status
}
