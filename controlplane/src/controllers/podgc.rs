//! Pod garbage collection: pods bound to nodes that no longer exist, and the oldest of too many ended pods.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::SignedDuration;

use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Plan, View};
use super::pods;
use super::snapshot::{Change, Snapshot};

/// Ended pods that are kept: upstream's `--terminated-pod-gc-threshold`.
const ENDED_MAX: usize = 12_500;
/// How long a node must have been gone: a node that registers anew after its object was deleted keeps its pods.
const NODE_GONE: SignedDuration = SignedDuration::from_secs(40);

pub const CONTROLLER: Controller = Controller {
    name: "pod-garbage-collector",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    match (change.object(), &change.new) {
        (Object::Node(node), _) if change.old.is_none() || change.new.is_none() => {
            keys.insert(Key::of(&node.metadata));
        }
        (Object::Pod(pod), Some(_)) => {
            if let Some(node) = pods::node_name(pod)
                && !snapshot.nodes.contains(&Key::cluster(node))
            {
                keys.insert(Key::cluster(node));
            }
            if pods::is_terminal(pod) {
                keys.insert(ended());
            }
        }
        _ => {}
    }
}

/// Node names have no slash.
fn ended() -> Key {
    Key::new("ended", "pods")
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    if *key == ended() {
        too_many_ended(view)
    } else {
        lost_with_node(view, key)
    }
}

fn lost_with_node(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    if view.snapshot.nodes.contains(key) {
        return plan;
    }
    for pod in view.snapshot.pods_on_node(&key.name) {
        // Counted from the newest thing known about the pod: this process may not have seen the node go.
        let seen = pod
            .metadata
            .deletion_timestamp
            .iter()
            .chain(&pod.metadata.creation_timestamp);
        let transitions = pod
            .status
            .iter()
            .flat_map(|status| status.conditions.iter().flatten());
        let transitions =
            transitions.filter_map(|condition| condition.last_transition_time.as_ref());
        let newest = seen
            .chain(transitions)
            .map(|Time(at)| *at)
            .max()
            .unwrap_or(view.now);
        let due = newest
            .min(view.now)
            .saturating_add(NODE_GONE)
            .unwrap_or(view.now);
        if due <= view.now {
            plan.push(delete_at_once(pod));
        } else {
            plan.look_again(due);
        }
    }
    plan
}

fn too_many_ended(view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let mut ended: Vec<_> = view
        .snapshot
        .pods
        .values()
        .filter(|pod| pods::is_terminal(pod) && !pods::is_terminating(pod))
        .collect();
    let surplus = ended.len().saturating_sub(ENDED_MAX);
    ended.sort_by_key(|pod| pod.metadata.creation_timestamp.clone());
    for pod in ended.into_iter().take(surplus) {
        plan.push(delete_at_once(pod));
    }
    plan
}

/// Nobody is left who would end the pod gracefully.
fn delete_at_once(pod: &Pod) -> Action {
    Action::Delete {
        target: Target::of(pod),
        propagation: None,
        grace_seconds: Some(0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Cluster, node, pod};
    use super::*;

    #[test]
    fn pods_of_a_vanished_node_go_and_others_stay() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.add(node("stays"));
        cluster.add(node("goes"));
        for (name, on) in [("a", "stays"), ("b", "goes")] {
            let mut pod = pod("default", name);
            pod.spec.get_or_insert_default().node_name = Some(on.into());
            cluster.add(pod);
        }
        cluster.delete_now("goes");
        cluster.settle();
        assert_eq!(
            cluster.snapshot.pods.len(),
            2,
            "a node may come back at once"
        );
        cluster.advance(60);
        cluster.settle();
        assert!(cluster.snapshot.pods.contains(&Key::new("default", "a")));
        assert!(!cluster.snapshot.pods.contains(&Key::new("default", "b")));
    }
}
