//! Taint eviction: pods leave nodes with NoExecute taints that they do not tolerate, or no longer.

use k8s_openapi::api::core::v1::{Node, Pod, Taint, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::super::nodes::{self, tolerates};
use super::super::object::{Key, Object, Target};
use super::super::plan::{Action, Controller, Keys, Note, Plan, View};
use super::super::pods;
use super::super::snapshot::{Change, Snapshot};

const REPORTER: &str = "taint-eviction-controller";
/// How long pods stay on a node that is not ready or unreachable when they say nothing about it. API servers write this
/// into pods (DefaultTolerationSeconds); pods that came in past that are treated the same.
const DEFAULT_SECONDS: i64 = 300;

pub const CONTROLLER: Controller = Controller {
    name: "taint-eviction",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    match change.object() {
        Object::Node(node) if change.states().any(has_no_execute) => {
            keys.insert(Key::of(&node.metadata));
        }
        Object::Pod(pod) if change.new.is_some() => {
            if let Some(node) = pods::node_name(pod).map(Key::cluster)
                && snapshot
                    .nodes
                    .get(&node)
                    .is_some_and(|node| no_execute(node).next().is_some())
            {
                keys.insert(node);
            }
        }
        _ => {}
    }
}

fn has_no_execute(object: &Object) -> bool {
    matches!(object, Object::Node(node) if no_execute(node).next().is_some())
}

fn no_execute(node: &Node) -> impl Iterator<Item = &Taint> {
    nodes::taints(node)
        .iter()
        .filter(|taint| taint.effect == "NoExecute")
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(node) = view.snapshot.nodes.get(key) else {
        return plan;
    };
    for pod in view.snapshot.pods_on_node(&key.name) {
        if !pods::is_active(pod) {
            continue;
        }
        match leaves_at(node, pod, view.now) {
            // Said first: whoever counts failures may leave this one out.
            Some(at) if at <= view.now && pods::condition(pod, pods::DISRUPTED).is_none() => {
                let why = "Taint manager: deleting due to NoExecute taint";
                let conditions =
                    pods::with_disruption(pod, "DeletionByTaintManager", why, view.now);
                plan.push(pods::guarded_status_patch(
                    &**pod,
                    json!({"conditions": conditions}),
                ));
            }
            Some(at) if at <= view.now => {
                let note = Note::normal(
                    &Target::of(&**pod),
                    REPORTER,
                    "TaintManagerEviction",
                    format!("Marking for deletion Pod {}", Key::of(&pod.metadata)),
                );
                let delete = Action::Delete {
                    target: Target::of(&**pod),
                    propagation: None,
                    grace_seconds: None,
                };
                plan.push_noted(delete, note);
            }
            Some(at) => plan.look_again(at),
            None => {}
        }
    }
    plan
}

/// When the pod has to leave the node; None when it may stay.
fn leaves_at(node: &Node, pod: &Pod, now: Timestamp) -> Option<Timestamp> {
    no_execute(node)
        .filter_map(|taint| leaves_for(taint, nodes::tolerations(pod), now))
        .min()
}

fn leaves_for(taint: &Taint, tolerations: &[Toleration], now: Timestamp) -> Option<Timestamp> {
    let since = taint.time_added.as_ref().map_or(now, |Time(at)| *at);
    let after = |seconds: i64| {
        let wait = SignedDuration::from_secs(seconds.clamp(0, i64::from(i32::MAX)));
        Some(since.saturating_add(wait).unwrap_or(Timestamp::MAX))
    };
    let mut matching = tolerations
        .iter()
        .filter(|toleration| tolerates(toleration, taint))
        .peekable();
    if matching.peek().is_none() {
        let built_in = taint.key == nodes::NOT_READY || taint.key == nodes::UNREACHABLE;
        return if built_in {
            after(DEFAULT_SECONDS)
        } else {
            Some(now)
        };
    }
    // Of several tolerations with a limit the shortest counts; without any limit the pod stays.
    matching
        .filter_map(|toleration| toleration.toleration_seconds)
        .min()
        .and_then(after)
}
