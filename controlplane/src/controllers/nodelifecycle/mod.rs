//! Node lifecycle: notices nodes that have gone silent, and turns what is known of a node into taints and evictions.

mod eviction;
#[cfg(test)]
mod tests;

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;

use super::nodes;
use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Note, Plan, View};
use super::pods;
use super::snapshot::{Change, NODE_LEASE_NAMESPACE, Snapshot};

pub use eviction::CONTROLLER as EVICTION;

const REPORTER: &str = "node-controller";
/// How long a node may be silent; kubelets renew their Lease every 10 s.
pub const GRACE: Duration = Duration::from_secs(40);

pub const CONTROLLER: Controller = Controller {
    name: "node-lifecycle",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    match change.object() {
        Object::Node(node) => {
            keys.insert(Key::of(&node.metadata));
        }
        Object::Lease(lease)
            if lease.metadata.namespace.as_deref() == Some(NODE_LEASE_NAMESPACE) =>
        {
            keys.extend(lease.metadata.name.as_deref().map(Key::cluster));
        }
        Object::Pod(pod) => {
            // A pod that turns up ready on a node that is silent.
            if let Some(node) = pods::node_name(pod).map(Key::cluster)
                && snapshot
                    .nodes
                    .get(&node)
                    .is_some_and(|node| is_silent(node))
            {
                keys.insert(node);
            }
        }
        _ => {}
    }
}

fn is_silent(node: &Node) -> bool {
    nodes::ready_condition(node).is_some_and(|condition| condition.status == "Unknown")
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(node) = view.snapshot.nodes.get(key) else {
        return plan;
    };
    if node.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let heard = view.snapshot.heartbeat(&key.name);
    let silence = heard.map_or(Duration::ZERO, |heard| {
        view.instant.saturating_duration_since(heard)
    });
    let left = GRACE.saturating_sub(silence);
    if !left.is_zero() {
        plan.look_again(view.after(left));
    } else if !is_silent(node) {
        let note = Note::normal(
            &Target::of(&**node),
            REPORTER,
            "NodeNotReady",
            format!("Node {} status is now: NodeNotReady", key.name),
        );
        let conditions = silenced(node, view.now);
        plan.push_noted(
            pods::guarded_status_patch(&**node, json!({"conditions": conditions})),
            note,
        );
        return plan;
    }
    retaint(view, node, &mut plan);
    if is_silent(node) && left.is_zero() {
        for pod in view.snapshot.pods_on_node(&key.name) {
            if pods::is_ready(pod) {
                plan.push(unready(pod, view.now));
            }
        }
    }
    plan
}

/// The node's conditions when nothing has been heard of it.
fn silenced(node: &Node, now: Timestamp) -> Vec<NodeCondition> {
    let mut conditions = node
        .status
        .as_ref()
        .and_then(|status| status.conditions.clone())
        .unwrap_or_default();
    for type_ in ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"] {
        let unknown = |heartbeat: Option<Time>, reason: &str, message: &str| NodeCondition {
            type_: type_.into(),
            status: "Unknown".into(),
            reason: Some(reason.into()),
            message: Some(message.into()),
            last_heartbeat_time: heartbeat,
            last_transition_time: Some(Time(now)),
        };
        match conditions
            .iter_mut()
            .find(|condition| condition.type_ == type_)
        {
            Some(known) if known.status == "Unknown" => {}
            Some(known) => {
                let heartbeat = known.last_heartbeat_time.clone();
                *known = unknown(
                    heartbeat,
                    "NodeStatusUnknown",
                    "Kubelet stopped posting node status.",
                );
            }
            None => {
                let created = node.metadata.creation_timestamp.clone();
                conditions.push(unknown(
                    created,
                    "NodeStatusNeverUpdated",
                    "Kubelet never posted node status.",
                ));
            }
        }
    }
    conditions
}

/// The taints that conditions and `unschedulable` ask for. A node whose kubelet has said nothing yet is not ready.
fn wanted_taints(node: &Node) -> Vec<(&'static str, &'static str)> {
    let mut wanted = Vec::new();
    let status =
        |type_: &str| nodes::condition(node, type_).map(|condition| condition.status.as_str());
    match status("Ready") {
        Some("True") => {}
        Some("Unknown") => wanted.extend([
            (nodes::UNREACHABLE, "NoSchedule"),
            (nodes::UNREACHABLE, "NoExecute"),
        ]),
        Some(_) => wanted.extend([
            (nodes::NOT_READY, "NoSchedule"),
            (nodes::NOT_READY, "NoExecute"),
        ]),
        None => wanted.push((nodes::NOT_READY, "NoSchedule")),
    }
    for (type_, taint) in [
        ("MemoryPressure", nodes::MEMORY_PRESSURE),
        ("DiskPressure", nodes::DISK_PRESSURE),
        ("PIDPressure", nodes::PID_PRESSURE),
        ("NetworkUnavailable", nodes::NETWORK_UNAVAILABLE),
    ] {
        if status(type_) == Some("True") {
            wanted.push((taint, "NoSchedule"));
        }
    }
    if nodes::is_unschedulable(node) {
        wanted.push((nodes::UNSCHEDULABLE, "NoSchedule"));
    }
    wanted
}

fn is_ours(taint: &Taint) -> bool {
    [
        nodes::NOT_READY,
        nodes::UNREACHABLE,
        nodes::UNSCHEDULABLE,
        nodes::MEMORY_PRESSURE,
        nodes::DISK_PRESSURE,
        nodes::PID_PRESSURE,
        nodes::NETWORK_UNAVAILABLE,
    ]
    .contains(&taint.key.as_str())
}

fn retaint(view: &View<'_>, node: &Node, plan: &mut Plan) {
    let present = nodes::taints(node);
    let wanted = wanted_taints(node);
    let is_wanted = |taint: &Taint| wanted.contains(&(taint.key.as_str(), taint.effect.as_str()));
    let mut taints: Vec<Taint> = present
        .iter()
        .filter(|taint| !is_ours(taint) || is_wanted(taint))
        .cloned()
        .collect();
    for (key, effect) in wanted {
        if !taints
            .iter()
            .any(|taint| taint.key == key && taint.effect == effect)
        {
            taints.push(Taint {
                key: key.into(),
                effect: effect.into(),
                value: None,
                time_added: Some(Time(view.now)),
            });
        }
    }
    if taints == present {
        return;
    }
    plan.push(Action::Patch {
        target: Target::of(node),
        subresource: None,
        body: json!({
            "metadata": {"uid": node.metadata.uid, "resourceVersion": node.metadata.resource_version},
            "spec": {"taints": (!taints.is_empty()).then_some(taints)},
        }),
    });
}

/// A pod of a silent node is not ready, whatever it last said: nothing should be sent there.
fn unready(pod: &Pod, now: Timestamp) -> Action {
    let mut conditions = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.clone())
        .unwrap_or_default();
    for condition in conditions
        .iter_mut()
        .filter(|condition| condition.type_ == "Ready")
    {
        condition.status = "False".into();
        condition.last_transition_time = Some(Time(now));
    }
    pods::guarded_status_patch(pod, json!({"conditions": conditions}))
}
