//! Namespace deletion: everything in it goes, pods first, then the namespace itself.

use serde_json::json;

use super::graph::GraphNode;
use super::object::{Key, Kind, Object, Target};
use super::plan::{Action, Controller, Keys, Plan, Propagation, View};
use super::snapshot::{Change, Snapshot};

/// The finalizer in `spec.finalizers` that keeps a namespace until it is empty.
pub const FINALIZER: &str = "kubernetes";
/// Objects deleted in one plan, so that one large namespace does not hold up the rest.
const DELETES_MAX: usize = 500;

pub const CONTROLLER: Controller = Controller {
    name: "namespace",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    match change.object() {
        Object::Namespace(namespace) => {
            keys.insert(Key::of(&namespace.metadata));
        }
        object => {
            if let Some(name) = object.meta().namespace.as_deref()
                && snapshot.namespace_is_terminating(name)
            {
                keys.insert(Key::cluster(name));
            }
        }
    }
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(namespace) = view.snapshot.namespaces.get(key) else {
        return plan;
    };
    if namespace.metadata.deletion_timestamp.is_none() {
        return plan;
    }
    let phase = namespace
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    if phase != Some("Terminating") {
        plan.push(super::pods::status_patch(
            &**namespace,
            json!({"phase": "Terminating"}),
        ));
    }
    let held = namespace
        .spec
        .as_ref()
        .and_then(|spec| spec.finalizers.as_deref())
        .unwrap_or_default();
    if !held.iter().any(|finalizer| finalizer == FINALIZER) {
        return plan;
    }
    let content: Vec<&std::sync::Arc<GraphNode>> = view
        .snapshot
        .graph
        .of_namespace(&key.name)
        .filter(|node| is_content(node))
        .collect();
    // Pods may still need what else is there: secrets, accounts, the policies that bound them (KEP-5080).
    let pods: Vec<_> = content
        .iter()
        .filter(|node| *node.resource == **Kind::Pod.resource())
        .copied()
        .collect();
    let stage = if pods.is_empty() { content } else { pods };
    if stage.is_empty() {
        plan.push(Action::FinalizeNamespace(Target::of(&**namespace)));
        return plan;
    }
    for node in stage
        .into_iter()
        .filter(|node| !node.deleting)
        .take(DELETES_MAX)
    {
        plan.push(Action::Delete {
            target: node.target(),
            propagation: Some(Propagation::Background),
            grace_seconds: None,
        });
    }
    plan
}

/// Events are content too, but they come in while the rest goes. They are deleted like the rest, and hold nothing up:
/// the check before the end looks at everything that is there then.
fn is_content(node: &GraphNode) -> bool {
    node.resource.namespaced
}
