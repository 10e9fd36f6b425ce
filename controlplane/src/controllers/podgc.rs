//! Pod garbage collection: pods bound to nodes that no longer exist, pods that were deleted before they had a node, and the
//! oldest of too many ended pods.

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
            if is_abandoned(pod) {
                let key = Key::of(&pod.metadata);
                keys.insert(Key::new(
                    &key.namespace,
                    &format!("{ABANDONED}{}", key.name),
                ));
            }
            if pods::is_terminal(pod) {
                keys.insert(ended());
            }
        }
        _ => {}
    }
}

/// Keys of single pods; names of nodes hold no slash.
const ABANDONED: &str = "pod/";

/// On its way out without a node: no kubelet will ever say that it has ended.
fn is_abandoned(pod: &Pod) -> bool {
    pods::is_terminating(pod) && pods::node_name(pod).is_none()
}

/// Node names have no slash.
fn ended() -> Key {
    Key::new("ended", "pods")
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    if *key == ended() {
        too_many_ended(view)
    } else if let Some(name) = key.name.strip_prefix(ABANDONED) {
        let mut plan = Plan::nothing();
        let pod = view.snapshot.pods.get(&Key::new(&key.namespace, name));
        if let Some(pod) = pod.filter(|pod| is_abandoned(pod)) {
            end(pod, None, view, &mut plan);
        }
        plan
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
        let transitions = transitions
            // That one is written below.
            .filter(|condition| condition.type_ != pods::DISRUPTED)
            .filter_map(|condition| condition.last_transition_time.as_ref());
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
            end(pod, Some("PodGC: node no longer exists"), view, &mut plan);
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

/// Takes a pod away that nobody runs: first it is said to have failed, for whoever counts it, then it goes.
fn end(pod: &Pod, disrupted: Option<&str>, view: &View<'_>, plan: &mut Plan) {
    if !pods::is_terminal(pod) {
        let disrupted = disrupted.map(|why| ("DeletionByPodGC", why));
        plan.push(pods::fail(pod, disrupted, view.now));
    } else if pod.metadata.deletion_grace_period_seconds != Some(0)
        || pod.metadata.deletion_timestamp.is_none()
    {
        plan.push(delete_at_once(pod));
    }
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
    use super::super::plan::Propagation;
    use super::super::testing::{Cluster, node, pod};
    use super::*;

    #[test]
    fn a_pod_deleted_before_it_had_a_node_is_failed_for_whoever_holds_it() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.hold_pods = true;
        let mut held = pod("default", "held");
        held.metadata.finalizers = Some(vec!["acme.io/counts".into()]);
        cluster.add(held);
        cluster.delete("held", Propagation::Background);
        cluster.settle();
        let pod = cluster.snapshot.pods.values().next().unwrap();
        assert_eq!(pods::phase(pod), "Failed");
    }

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
