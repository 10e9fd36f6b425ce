//! Namespace deletion: everything in it goes, pods first, then the namespace itself.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;

use super::graph::GraphNode;
use super::object::{Key, Kind, Object, Target};
use super::plan::{Action, Controller, Keys, Plan, Propagation, View, Write};
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
    let stage = if pods.is_empty() { &content } else { &pods };
    if stage.iter().all(|node| node.deleting) && plan.is_empty() {
        // All that can be done is done: whoever wonders what it waits for finds it in the conditions.
        plan.writes
            .extend(tell(namespace, &content, view.now).map(|action| Write { action, note: None }));
    }
    if stage.is_empty() {
        plan.push(Action::FinalizeNamespace(Target::of(&**namespace)));
        return plan;
    }
    for node in stage.iter().filter(|node| !node.deleting).take(DELETES_MAX) {
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

/// The conditions of a namespace that is going away, if they have changed.
fn tell(
    namespace: &Namespace,
    content: &[&std::sync::Arc<GraphNode>],
    now: Timestamp,
) -> Option<Action> {
    let mut remaining: BTreeMap<String, usize> = BTreeMap::new();
    let mut held: BTreeMap<&str, usize> = BTreeMap::new();
    for node in content
        .iter()
        .filter(|node| node.resource.plural != "events")
    {
        let name = format!("{}.{}", node.resource.plural, node.resource.group);
        *remaining.entry(name).or_default() += 1;
        for finalizer in node.finalizers.iter() {
            *held.entry(finalizer).or_default() += 1;
        }
    }
    let list = |parts: Vec<String>| parts.join(", ");
    let resources = list(
        remaining
            .iter()
            .map(|(name, count)| format!("{name} has {count} resource instances"))
            .collect(),
    );
    let finalizers = list(
        held.iter()
            .map(|(name, count)| format!("{name} in {count} resource instances"))
            .collect(),
    );
    let condition = |type_: &str, holds: bool, reason: &str, message: String| NamespaceCondition {
        type_: type_.into(),
        status: if holds { "True" } else { "False" }.into(),
        reason: Some(reason.into()),
        message: Some(message),
        last_transition_time: Some(Time(now)),
    };
    let mut conditions = vec![
        condition(
            "NamespaceDeletionDiscoveryFailure",
            false,
            "ResourcesDiscovered",
            "All resources successfully discovered".into(),
        ),
        condition(
            "NamespaceDeletionGroupVersionParsingFailure",
            false,
            "ParsedGroupVersions",
            "All legacy kube types successfully parsed".into(),
        ),
        condition(
            "NamespaceDeletionContentFailure",
            false,
            "ContentDeleted",
            "All content successfully deleted, may be waiting on finalization".into(),
        ),
        if remaining.is_empty() {
            let message = "All content successfully removed".into();
            condition(
                "NamespaceContentRemaining",
                false,
                "ContentRemoved",
                message,
            )
        } else {
            let message = format!("Some resources are remaining: {resources}");
            condition(
                "NamespaceContentRemaining",
                true,
                "SomeResourcesRemain",
                message,
            )
        },
        if held.is_empty() {
            let message = "All content-preserving finalizers finished".into();
            condition(
                "NamespaceFinalizersRemaining",
                false,
                "ContentHasNoFinalizers",
                message,
            )
        } else {
            let message =
                format!("Some content in the namespace has finalizers remaining: {finalizers}");
            condition(
                "NamespaceFinalizersRemaining",
                true,
                "SomeFinalizersRemain",
                message,
            )
        },
    ];
    let status = namespace.status.as_ref();
    let known = status
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default();
    for condition in &mut conditions {
        let same = known
            .iter()
            .find(|known| known.type_ == condition.type_ && known.status == condition.status);
        if let Some(known) = same {
            condition.last_transition_time = known.last_transition_time.clone();
        }
    }
    (known != conditions)
        .then(|| super::pods::status_patch(namespace, json!({"conditions": conditions})))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Cluster, namespace, pod};
    use super::*;

    fn condition(cluster: &Cluster, type_: &str) -> (String, String) {
        let team = cluster
            .snapshot
            .namespaces
            .get(&Key::cluster("team"))
            .unwrap();
        let conditions = team
            .status
            .as_ref()
            .unwrap()
            .conditions
            .clone()
            .unwrap_or_default();
        let found = conditions
            .into_iter()
            .find(|condition| condition.type_ == type_)
            .unwrap();
        (found.status, found.message.unwrap())
    }

    #[test]
    fn pods_go_before_the_rest_and_the_namespace_says_what_it_waits_for() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.hold_pods = true;
        cluster.add(namespace("team"));
        let mut held = pod("team", "slow");
        held.metadata.finalizers = Some(vec!["acme.io/slow".into()]);
        cluster.add(held);
        let account: k8s_openapi::api::core::v1::ServiceAccount =
            serde_json::from_value(json!({"metadata": {"namespace": "team", "name": "bot"}}))
                .unwrap();
        cluster.add(account);
        cluster.delete("team", Propagation::Background);
        cluster.settle();
        assert!(
            !cluster.snapshot.service_accounts.is_empty(),
            "pods may still need it"
        );
        assert_eq!(
            condition(&cluster, "NamespaceContentRemaining"),
            (
                "True".into(),
                "Some resources are remaining: pods. has 1 resource instances, serviceaccounts. has 1 resource instances".into()
            )
        );
        let (status, message) = condition(&cluster, "NamespaceFinalizersRemaining");
        assert!(
            status == "True" && message.contains("acme.io/slow in 1 resource instances"),
            "{message}"
        );
        cluster.delete_now("slow");
        cluster.settle();
        assert!(cluster.snapshot.namespaces.is_empty());
    }
}
