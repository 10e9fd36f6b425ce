//! DaemonSet: one pod of a template on every node that may run it.

mod placement;
mod status;
#[cfg(test)]
mod tests;
mod update;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod};

use self::placement::Placement;
use super::labels::{self, Labels};
use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Note, Plan, View};
use super::pods;
use super::revisions::Versioned;
use super::snapshot::{Change, Snapshot};

const REPORTER: &str = "daemonset-controller";
/// Label of pods and ControllerRevisions that says of which revision of the template they are.
const HASH_LABEL: &str = "controller-revision-hash";
const GENERATION_LABEL: &str = "pod-template-generation";
const GENERATION_ANNOTATION: &str = "deprecated.daemonset.template.generation";
/// Pods created or deleted in one plan: upstream's burst.
const BURST_MAX: usize = 250;

pub const CONTROLLER: Controller = Controller {
    name: "daemonset",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    if let (Some(Object::Node(old)), Some(Object::Node(new))) = (&change.old, &change.new)
        && same_for_placement(old, new)
    {
        return;
    }
    for state in change.states() {
        match state {
            Object::DaemonSet(set) => {
                keys.insert(Key::of(&set.metadata));
            }
            Object::Node(_) => keys.extend(snapshot.daemon_sets.iter().map(|(key, _)| key.clone())),
            Object::ControllerRevision(found) => match pods::controller_of(&found.metadata) {
                Some(_) => keys.extend(pods::controller_key(&found.metadata, "DaemonSet")),
                None => keys.extend(
                    snapshot
                        .daemon_sets
                        .namespace(found.metadata.namespace.as_deref().unwrap_or_default())
                        .filter(|(_, set)| selects(set, found.metadata.labels.as_ref()))
                        .map(|(key, _)| key.clone()),
                ),
            },
            Object::Pod(pod) => match pods::controller_of(&pod.metadata) {
                Some(_) => keys.extend(pods::controller_key(&pod.metadata, "DaemonSet")),
                None => keys.extend(
                    snapshot
                        .daemon_sets
                        .namespace(pod.metadata.namespace.as_deref().unwrap_or_default())
                        .filter(|(_, set)| selects(set, pod.metadata.labels.as_ref()))
                        .map(|(key, _)| key.clone()),
                ),
            },
            _ => {}
        }
    }
}

/// Nodes post their status every few seconds: only labels, taints and `unschedulable` can move pods.
fn same_for_placement(old: &Node, new: &Node) -> bool {
    old.metadata.labels == new.metadata.labels
        && super::nodes::taints(old) == super::nodes::taints(new)
        && super::nodes::is_unschedulable(old) == super::nodes::is_unschedulable(new)
        && old.metadata.uid == new.metadata.uid
}

fn selects(set: &DaemonSet, found: Option<&Labels>) -> bool {
    set.spec.as_ref().is_some_and(|spec| {
        !labels::is_empty(&spec.selector) && labels::selector_matches(&spec.selector, found)
    })
}

/// The DaemonSet's pods by the node they are for.
type PodsByNode<'a> = BTreeMap<String, Vec<&'a Pod>>;

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let Some(set) = view.snapshot.daemon_sets.get(key) else {
        return Plan::nothing();
    };
    let Some(spec) = set.spec.as_ref() else {
        return Plan::nothing();
    };
    let mut plan = Plan::nothing();
    if labels::is_empty(&spec.selector) {
        let message = "This daemon set is selecting all pods. A non-empty selector is required.";
        plan.note(Note::warning(
            &Target::of(&**set),
            REPORTER,
            "SelectingAll",
            message,
        ));
        return plan;
    }
    if set.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let versioned = Versioned {
        owner: &**set,
        selector: &spec.selector,
        template: &spec.template,
        collisions: set
            .status
            .as_ref()
            .and_then(|status| status.collision_count),
        limit: spec.revision_history_limit,
        hash_label: HASH_LABEL,
    };
    let current = versioned.current(view.snapshot, &mut plan);
    let Some(hash) = current.and_then(|revision| versioned.hash_of(revision)) else {
        // The revision that this plan creates names the pods of the next one.
        return plan;
    };
    let owned = owned_pods(view.snapshot, set, key, &mut plan);
    let places: Vec<Placement> = view
        .snapshot
        .nodes
        .values()
        .map(|node| Placement::of(set, node))
        .collect();
    if !view.snapshot.namespace_is_terminating(&key.namespace) {
        place(view, set, &places, &owned, &hash, &mut plan);
    }
    status::report(view, set, &places, &owned, &hash, &mut plan);
    let live: BTreeSet<&str> = owned
        .values()
        .flatten()
        .filter_map(|pod| pod.metadata.labels.as_ref()?.get(HASH_LABEL))
        .map(String::as_str)
        .chain([hash.as_str()])
        .collect();
    let in_use = |revision: &_| {
        versioned
            .hash_of(revision)
            .is_some_and(|hash| live.contains(hash.as_str()))
    };
    versioned.clear_history(view.snapshot, in_use, &mut plan);
    plan
}

fn owned_pods<'a>(
    snapshot: &'a Snapshot,
    set: &DaemonSet,
    key: &Key,
    plan: &mut Plan,
) -> PodsByNode<'a> {
    let uid = set.metadata.uid.as_deref().unwrap_or_default();
    let mut owned = PodsByNode::new();
    let mut add = |pod: &'a Pod| {
        if let Some(node) = placement::node_of(pod) {
            owned.entry(node).or_default().push(pod);
        }
    };
    for pod in snapshot.pods_owned_by(uid) {
        if selects(set, pod.metadata.labels.as_ref()) {
            add(pod);
        } else if !pods::is_terminating(pod) {
            plan.push(pods::release(&**pod, uid));
        }
    }
    for pod in snapshot.orphan_pods(&key.namespace) {
        if selects(set, pod.metadata.labels.as_ref()) && pods::is_active(pod) {
            plan.push(pods::adopt(&**pod, set));
            add(pod);
        }
    }
    owned
}

/// Creates what is missing, deletes what is too much, and replaces pods of older revisions.
fn place(
    view: &View<'_>,
    set: &DaemonSet,
    places: &[Placement],
    owned: &PodsByNode<'_>,
    hash: &str,
    plan: &mut Plan,
) {
    let mut create: Vec<&str> = Vec::new();
    let mut delete: Vec<&Pod> = Vec::new();
    let none = Vec::new();
    for place in places {
        let on_node = owned.get(&place.node).unwrap_or(&none);
        if !place.should_continue {
            delete.extend(on_node.iter().filter(|pod| !pods::is_terminating(pod)));
            continue;
        }
        let (done, rest): (Vec<&Pod>, Vec<&Pod>) = on_node
            .iter()
            .copied()
            .filter(|pod| !pods::is_terminating(pod))
            .partition(|pod| pods::is_terminal(pod));
        for pod in &done {
            let message = format!(
                "Found {} daemon pod {} on node {}, will try to kill it",
                pods::phase(pod).to_lowercase(),
                Key::of(&pod.metadata),
                place.node
            );
            let reason = if pods::phase(pod) == "Failed" {
                "FailedDaemonPod"
            } else {
                "SucceededDaemonPod"
            };
            plan.note(Note::warning(&Target::of(set), REPORTER, reason, message));
            delete.push(pod);
        }
        let any_terminating = on_node.iter().any(|pod| pods::is_terminating(pod));
        if rest.is_empty() {
            // A pod on its way out keeps its ports and its place until it is gone; so does one that has just ended.
            if place.should_run && done.is_empty() && !any_terminating {
                create.push(&place.node);
            }
        } else if !update::surges(set) {
            delete.extend(all_but_oldest(&rest));
        }
    }
    let gone: Vec<&Pod> = owned
        .iter()
        .filter(|(node, _)| !view.snapshot.nodes.contains(&Key::cluster(node)))
        .flat_map(|(_, pods)| {
            pods.iter()
                .copied()
                .filter(|pod| !pods::is_terminating(pod))
        })
        .collect();
    delete.extend(gone);
    if delete.is_empty() && create.is_empty() {
        update::plan(
            view,
            set,
            places,
            owned,
            hash,
            &mut create,
            &mut delete,
            plan,
        );
    }
    for node in create.into_iter().take(BURST_MAX) {
        let pod = Object::of(placement::pod_for(set, node, hash));
        let note = Note::normal(
            &Target::of(set),
            REPORTER,
            "SuccessfulCreate",
            "Created pod: {name}",
        )
        .or_failure("FailedCreate", "Error creating: ");
        plan.push_noted(Action::Create(pod), note);
    }
    for pod in delete.into_iter().take(BURST_MAX) {
        let note = Note::normal(
            &Target::of(set),
            REPORTER,
            "SuccessfulDelete",
            "Deleted pod: {name}",
        )
        .or_failure("FailedDelete", "Error deleting: ");
        plan.push_noted(
            Action::Delete {
                target: Target::of(pod),
                propagation: None,
                grace_seconds: None,
            },
            note,
        );
    }
}

/// Of several pods on one node, the oldest stays, bound ones before unbound ones.
fn all_but_oldest<'a>(on_node: &[&'a Pod]) -> Vec<&'a Pod> {
    let mut sorted = on_node.to_vec();
    sorted.sort_by_key(|pod| {
        (
            pods::node_name(pod).is_none(),
            pod.metadata.creation_timestamp.clone(),
            pod.metadata.name.clone(),
        )
    });
    sorted.split_off(1)
}
