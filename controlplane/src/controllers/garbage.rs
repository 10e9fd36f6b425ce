//! Owner garbage collection: objects go when all of their owners are gone, and the finalizers `orphan` and
//! `foregroundDeletion` do what they promise.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::json;

use super::graph::{Graph, GraphNode};
use super::object::{Key, Target};
use super::plan::{Action, Controller, Keys, Note, Plan, Propagation, View};
use super::snapshot::{Change, Snapshot};

pub const ORPHAN: &str = "orphan";
pub const FOREGROUND: &str = "foregroundDeletion";

const REPORTER: &str = "garbage-collector-controller";

/// Keys are UIDs here: a name may belong to another object by the time it is planned.
pub const CONTROLLER: Controller = Controller {
    name: "garbage-collector",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    for state in change.states() {
        let owners = state.meta().owner_references.iter().flatten();
        let deleting = state.meta().deletion_timestamp.is_some();
        let gone = change.new.is_none();
        // An owner in foreground deletion waits for this one.
        if deleting || gone || change.old.is_some() {
            keys.extend(
                owners
                    .filter(|owner| {
                        snapshot
                            .graph
                            .get(&owner.uid)
                            .is_some_and(|owner| owner.deleting)
                    })
                    .map(|owner| Key::cluster(&owner.uid)),
            );
        }
        if !gone && (deleting || state.meta().owner_references.is_some()) {
            keys.insert(Key::cluster(state.uid()));
        }
        if deleting || gone {
            keys.extend(
                snapshot
                    .graph
                    .dependents(state.uid())
                    .map(|dependent| Key::cluster(&dependent.uid)),
            );
        }
    }
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let graph = &view.snapshot.graph;
    let Some(node) = graph.get(&key.name) else {
        return plan;
    };
    if node.deleting {
        if node.has_finalizer(ORPHAN) {
            orphan_dependents(graph, node, &mut plan);
        } else if node.has_finalizer(FOREGROUND) {
            wait_for_dependents(graph, node, &mut plan);
        }
        return plan;
    }
    collect(view.snapshot, node, &mut plan);
    plan
}

/// What is known of an object's owners.
#[derive(Default)]
struct Owners {
    /// Exist and stay.
    solid: Vec<OwnerReference>,
    /// Exist, but are in foreground deletion and wait for this object to go.
    waiting: Vec<OwnerReference>,
    /// Do not exist as far as is known.
    gone: Vec<OwnerReference>,
}

impl Owners {
    fn of(graph: &Graph, node: &GraphNode) -> Self {
        let mut owners = Self::default();
        for owner in node.owners.iter() {
            match graph.get(&owner.uid) {
                // A cluster-scoped object cannot be owned from within a namespace, nor one namespace's object from another:
                // such a reference names an owner that does not exist.
                Some(found)
                    if !(found.key.namespace.is_empty()
                        || found.key.namespace == node.key.namespace) =>
                {
                    owners.gone.push(owner.clone());
                }
                Some(found) if found.deleting && found.has_finalizer(FOREGROUND) => {
                    owners.waiting.push(owner.clone())
                }
                Some(_) => owners.solid.push(owner.clone()),
                None => owners.gone.push(owner.clone()),
            }
        }
        owners
    }
}

fn collect(snapshot: &Snapshot, node: &Arc<GraphNode>, plan: &mut Plan) {
    let graph = &snapshot.graph;
    if node.owners.is_empty() {
        return;
    }
    let owners = Owners::of(graph, node);
    if owners.gone.is_empty() && owners.waiting.is_empty() {
        return;
    }
    if !owners.solid.is_empty() {
        // Someone still owns it: only the dead references go.
        plan.push(owners_patch(node, &owners.solid));
        return;
    }
    let has_dependents = graph.dependents(&node.uid).next().is_some();
    if !owners.waiting.is_empty() && closes_circle(graph, node) {
        // Each would wait for the next, round and round: this one holds its owners up no more.
        let released: Vec<OwnerReference> = node
            .owners
            .iter()
            .map(|owner| OwnerReference {
                block_owner_deletion: Some(false),
                ..owner.clone()
            })
            .collect();
        plan.push(owners_patch(node, &released));
        return;
    }
    for owner in &owners.gone {
        if let Some(elsewhere) = graph.get(&owner.uid) {
            let target = node.target();
            let message = format!(
                "ownerRef [{}/{}, namespace: {}, name: {}, uid: {}] does not exist in namespace {:?}",
                owner.api_version,
                owner.kind,
                node.key.namespace,
                owner.name,
                elsewhere.uid,
                &*node.key.namespace
            );
            plan.note(Note::warning(
                &target,
                REPORTER,
                "OwnerRefInvalidNamespace",
                message,
            ));
        }
    }
    let propagation = if !owners.waiting.is_empty() && has_dependents {
        // The owner waits for all that hangs on it, so this one waits for its own.
        Propagation::Foreground
    } else if node.has_finalizer(ORPHAN) {
        Propagation::Orphan
    } else if node.has_finalizer(FOREGROUND) {
        Propagation::Foreground
    } else {
        Propagation::Background
    };
    if owners
        .gone
        .iter()
        .all(|owner| snapshot.is_known_deleted(&owner.uid))
    {
        plan.push(Action::Delete {
            target: node.target(),
            propagation: Some(propagation),
            grace_seconds: None,
        });
    } else {
        plan.push(Action::Collect {
            target: node.target(),
            revision: node.revision,
            owners: owners.gone,
            propagation,
        });
    }
}

/// Whether the object would wait for a dependent that waits for others in turn, and so might wait for this one.
fn closes_circle(graph: &Graph, node: &GraphNode) -> bool {
    node.owners
        .iter()
        .any(|owner| owner.block_owner_deletion == Some(true))
        && graph
            .dependents(&node.uid)
            .any(|dependent| dependent.deleting && dependent.has_finalizer(FOREGROUND))
}

fn owners_patch(node: &GraphNode, owners: &[OwnerReference]) -> Action {
    Action::Patch {
        target: node.target(),
        subresource: None,
        body: json!({"metadata": {
            "uid": &*node.uid, "resourceVersion": node.revision.to_string(), "ownerReferences": owners,
        }}),
    }
}

fn orphan_dependents(graph: &Graph, node: &GraphNode, plan: &mut Plan) {
    for dependent in graph.dependents(&node.uid) {
        let others = dependent
            .owners
            .iter()
            .filter(|owner| *owner.uid != *node.uid);
        let keep: Vec<OwnerReference> = others.cloned().collect();
        plan.push(owners_patch(dependent, &keep));
    }
    if plan.is_empty() {
        plan.push(without_finalizer(node, ORPHAN));
    }
}

fn wait_for_dependents(graph: &Graph, node: &GraphNode, plan: &mut Plan) {
    let blocks = |dependent: &&Arc<GraphNode>| {
        dependent
            .owners
            .iter()
            .any(|owner| *owner.uid == *node.uid && owner.block_owner_deletion == Some(true))
    };
    if !graph
        .dependents(&node.uid)
        .any(|dependent| blocks(&dependent))
    {
        plan.push(without_finalizer(node, FOREGROUND));
    }
}

fn without_finalizer(node: &GraphNode, finalizer: &str) -> Action {
    let keep: Vec<&String> = node
        .finalizers
        .iter()
        .filter(|found| *found != finalizer)
        .collect();
    let target: Target = node.target();
    Action::Patch {
        target,
        subresource: None,
        body: json!({"metadata": {
            "uid": &*node.uid, "resourceVersion": node.revision.to_string(), "finalizers": keep,
        }}),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Cluster, namespace, pod, set};
    use super::*;
    use crate::controllers::object::Typed;
    use crate::controllers::pods::controller_reference;

    fn owned_pod<K: Typed>(name: &str, owner: &K) -> k8s_openapi::api::core::v1::Pod {
        let mut pod = pod("default", name);
        pod.metadata.owner_references = Some(vec![controller_reference(owner)]);
        pod
    }

    /// A set with two pods, in a cluster where only garbage collection runs.
    fn family() -> Cluster {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.add(namespace("default"));
        let owner = cluster.add(set("default", "owner", 2));
        for name in ["a", "b"] {
            cluster.add(owned_pod(name, &owner));
        }
        cluster
    }

    #[test]
    fn dependents_go_after_their_owner_in_the_background() {
        let mut cluster = family();
        cluster.settle();
        assert_eq!(cluster.snapshot.pods.len(), 2);
        cluster.delete("owner", Propagation::Background);
        cluster.settle();
        assert!(cluster.snapshot.replica_sets.is_empty() && cluster.snapshot.pods.is_empty());
    }

    #[test]
    fn an_owner_in_foreground_deletion_goes_last() {
        let mut cluster = family();
        cluster.hold_pods = true;
        cluster.delete("owner", Propagation::Foreground);
        cluster.settle();
        assert!(
            cluster
                .snapshot
                .pods
                .values()
                .all(|pod| pod.metadata.deletion_timestamp.is_some())
        );
        assert_eq!(
            (
                cluster.snapshot.pods.len(),
                cluster.snapshot.replica_sets.len()
            ),
            (2, 1),
            "waits for its pods"
        );
        cluster.finish_pods();
        cluster.settle();
        assert!(cluster.snapshot.replica_sets.is_empty() && cluster.snapshot.pods.is_empty());
    }

    #[test]
    fn a_circle_of_owners_does_not_hold_itself_up() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.add(namespace("default"));
        for name in ["a", "b", "c"] {
            cluster.add(pod("default", name));
        }
        let key = |name: &str| Key::new("default", name);
        for (name, owner) in [("a", "c"), ("b", "a"), ("c", "b")] {
            let owner = (**cluster.snapshot.pods.get(&key(owner)).unwrap()).clone();
            cluster.edit::<k8s_openapi::api::core::v1::Pod>(&key(name), |pod| {
                pod.metadata.owner_references = Some(vec![controller_reference(&owner)]);
            });
        }
        cluster.settle();
        assert_eq!(cluster.snapshot.pods.len(), 3);
        cluster.delete("a", Propagation::Foreground);
        cluster.settle();
        let left: Vec<_> = cluster
            .snapshot
            .pods
            .iter()
            .map(|(key, _)| key.clone())
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn an_owner_in_another_namespace_is_none_and_told_of() {
        let mut cluster = family();
        cluster.add(namespace("other"));
        let owner = (**cluster
            .snapshot
            .replica_sets
            .get(&Key::new("default", "owner"))
            .unwrap())
        .clone();
        let mut stray = pod("other", "stray");
        stray.metadata.owner_references = Some(vec![controller_reference(&owner)]);
        cluster.add(stray);
        cluster.settle();
        assert!(!cluster.snapshot.pods.contains(&Key::new("other", "stray")));
        assert!(
            cluster
                .notes
                .iter()
                .any(|note| note.reason == "OwnerRefInvalidNamespace")
        );
        assert_eq!(cluster.snapshot.pods.len(), 2);
    }

    #[test]
    fn orphans_stay_without_their_owner() {
        let mut cluster = family();
        cluster.delete("owner", Propagation::Orphan);
        cluster.settle();
        assert!(cluster.snapshot.replica_sets.is_empty());
        assert_eq!(cluster.snapshot.pods.len(), 2);
        assert!(cluster.snapshot.pods.values().all(|pod| {
            pod.metadata
                .owner_references
                .as_ref()
                .is_none_or(Vec::is_empty)
                && pod.metadata.deletion_timestamp.is_none()
        }));
    }

    #[test]
    fn a_second_owner_keeps_an_object_and_the_dead_reference_goes() {
        let mut cluster = family();
        let other = cluster.add(set("default", "other", 0));
        let mut pod = (**cluster
            .snapshot
            .pods
            .get(&Key::new("default", "a"))
            .unwrap())
        .clone();
        let mut second = controller_reference(&other);
        second.controller = None;
        pod.metadata.owner_references.as_mut().unwrap().push(second);
        cluster.update(pod);
        cluster.delete("owner", Propagation::Background);
        cluster.settle();
        let kept = cluster
            .snapshot
            .pods
            .get(&Key::new("default", "a"))
            .expect("the other owner keeps it");
        assert_eq!(kept.metadata.owner_references.as_ref().unwrap().len(), 1);
        assert!(!cluster.snapshot.pods.contains(&Key::new("default", "b")));
    }

    #[test]
    fn a_reference_to_an_owner_that_never_was_is_collected() {
        let mut cluster = family();
        let mut ghost = set("default", "ghost", 1);
        ghost.metadata.uid = Some("no-such-uid".into());
        cluster.add(owned_pod("c", &ghost));
        cluster.settle();
        assert!(!cluster.snapshot.pods.contains(&Key::new("default", "c")));
        assert_eq!(cluster.snapshot.pods.len(), 2);
    }
}
