//! PodDisruptionBudget: how many of the selected pods may be evicted now.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::{
    PodDisruptionBudget, PodDisruptionBudgetSpec, PodDisruptionBudgetStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::labels::selector_matches;
use super::object::{Key, Object, Target};
use super::patch::replace_status;
use super::plan::{Controller, Keys, Note, Plan, View, Write};
use super::pods::{self, scaled};
use super::snapshot::{Change, Snapshot};

const REPORTER: &str = "controllermanager";
/// How long an evicted pod may take to be seen to go before it counts as staying.
const DISRUPTION_MAX: SignedDuration = SignedDuration::from_secs(120);

pub const CONTROLLER: Controller = Controller {
    name: "disruption",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    for state in change.states() {
        let namespace = state.meta().namespace.as_deref().unwrap_or_default();
        match state {
            Object::PodDisruptionBudget(budget) => {
                keys.insert(Key::of(&budget.metadata));
            }
            Object::Pod(pod) => keys.extend(
                snapshot
                    .disruption_budgets
                    .namespace(namespace)
                    .filter(|(_, budget)| covers(budget, pod))
                    .map(|(key, _)| key.clone()),
            ),
            // A wish that changes is what shares are counted from.
            Object::Deployment(_)
            | Object::ReplicaSet(_)
            | Object::ReplicationController(_)
            | Object::StatefulSet(_) => keys.extend(
                snapshot
                    .disruption_budgets
                    .namespace(namespace)
                    .map(|(key, _)| key.clone()),
            ),
            _ => {}
        }
    }
}

fn covers(budget: &PodDisruptionBudget, pod: &Pod) -> bool {
    let selector = budget.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| selector_matches(selector, pod.metadata.labels.as_ref()))
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(budget) = view.snapshot.disruption_budgets.get(key) else {
        return plan;
    };
    let Some(spec) = budget.spec.as_ref() else {
        return plan;
    };
    if budget.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let pods: Vec<&Pod> = view
        .snapshot
        .pods
        .namespace(&key.namespace)
        .map(|(_, pod)| &**pod)
        .filter(|pod| covers(budget, pod))
        .collect();
    let mut status = budget.status.clone().unwrap_or_default();
    status.disrupted_pods = still_disrupted(&status, &pods, view.now, &mut plan);
    status.observed_generation = budget.metadata.generation;
    match bounds(view.snapshot, spec, &pods) {
        Ok((expected, desired)) => {
            let healthy = pods
                .iter()
                .filter(|pod| pods::is_ready(pod) && !pods::is_terminating(pod))
                .filter(|pod| {
                    let name = pod.metadata.name.as_deref().unwrap_or_default();
                    !status
                        .disrupted_pods
                        .as_ref()
                        .is_some_and(|gone| gone.contains_key(name))
                })
                .count();
            let healthy = number(healthy);
            let allowed = if expected > 0 {
                (healthy - desired).max(0)
            } else {
                0
            };
            status.expected_pods = Some(expected);
            status.desired_healthy = Some(desired);
            status.current_healthy = Some(healthy);
            status.disruptions_allowed = Some(allowed);
            let (holds, reason) = if allowed > 0 {
                ("True", "SufficientPods")
            } else {
                ("False", "InsufficientPods")
            };
            set_condition(budget, &mut status, holds, reason, "", view.now);
        }
        Err(unmanaged) => {
            // Nothing may go while the share cannot be counted.
            status.disruptions_allowed = Some(0);
            let message = format!("found no controllers for pods: {}", unmanaged.join(", "));
            set_condition(
                budget,
                &mut status,
                "False",
                "SyncFailed",
                &message,
                view.now,
            );
            let target = Target::of(&**budget);
            plan.note(Note::warning(
                &target,
                REPORTER,
                "CalculateExpectedPodCountFailed",
                message,
            ));
        }
    }
    plan.writes.extend(
        replace_status(&**budget, budget.status.as_ref(), &status)
            .map(|action| Write { action, note: None }),
    );
    plan
}

fn number(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

/// Pods that were evicted and are not yet seen to go; looks again when the first of them counts as staying.
fn still_disrupted(
    status: &PodDisruptionBudgetStatus,
    pods: &[&Pod],
    now: Timestamp,
    plan: &mut Plan,
) -> Option<BTreeMap<String, Time>> {
    let there: BTreeSet<&str> = pods
        .iter()
        .filter(|pod| !pods::is_terminating(pod))
        .filter_map(|pod| pod.metadata.name.as_deref())
        .collect();
    let mut left = BTreeMap::new();
    for (name, Time(at)) in status.disrupted_pods.iter().flatten() {
        let until = at.saturating_add(DISRUPTION_MAX).unwrap_or(Timestamp::MAX);
        if there.contains(name.as_str()) && until > now {
            plan.look_again(until);
            left.insert(name.clone(), Time(*at));
        }
    }
    (!left.is_empty()).then_some(left)
}

/// How many pods there should be, and how many of them must stay healthy. Shares are of what the pods' owners wish for; fails
/// with the names of pods whose owner is not known.
fn bounds(
    snapshot: &Snapshot,
    spec: &PodDisruptionBudgetSpec,
    pods: &[&Pod],
) -> Result<(i32, i32), Vec<String>> {
    if let Some(unavailable) = &spec.max_unavailable {
        let expected = wished(snapshot, pods)?;
        let allowed = scaled(Some(unavailable), expected, true, "0");
        return Ok((expected, (expected - allowed).max(0)));
    }
    match &spec.min_available {
        Some(share @ IntOrString::String(_)) => {
            let expected = wished(snapshot, pods)?;
            Ok((expected, scaled(Some(share), expected, true, "0")))
        }
        Some(IntOrString::Int(least)) => Ok((number(pods.len()), *least)),
        None => Ok((number(pods.len()), 0)),
    }
}

/// The sum of the wishes of the pods' owners.
fn wished(snapshot: &Snapshot, pods: &[&Pod]) -> Result<i32, Vec<String>> {
    let mut owners: BTreeMap<String, i32> = BTreeMap::new();
    let mut unmanaged = Vec::new();
    for pod in pods {
        match owner_wish(snapshot, pod) {
            Some((uid, wish)) => {
                owners.insert(uid, wish);
            }
            None => unmanaged.extend(pod.metadata.name.clone()),
        }
    }
    if unmanaged.is_empty() {
        Ok(owners.values().sum())
    } else {
        Err(unmanaged)
    }
}

/// UID and replicas of what scales the pod: its controller, or that one's Deployment.
fn owner_wish(snapshot: &Snapshot, pod: &Pod) -> Option<(String, i32)> {
    let owner = pods::controller_of(&pod.metadata)?;
    let key = Key::new(
        pod.metadata.namespace.as_deref().unwrap_or_default(),
        &owner.name,
    );
    let uid = owner.uid.clone();
    match owner.kind.as_str() {
        "ReplicaSet" => {
            let set = snapshot.replica_sets.get(&key)?;
            let above = pods::controller_key(&set.metadata, "Deployment")
                .and_then(|key| snapshot.deployments.get(&key));
            Some(match above {
                Some(deployment) => (
                    deployment.metadata.uid.clone().unwrap_or_default(),
                    deployment.spec.as_ref()?.replicas.unwrap_or(1),
                ),
                None => (uid, set.spec.as_ref()?.replicas.unwrap_or(1)),
            })
        }
        "ReplicationController" => {
            let found = snapshot.replication_controllers.get(&key)?;
            Some((uid, found.spec.as_ref()?.replicas.unwrap_or(1)))
        }
        "StatefulSet" => {
            let set = snapshot.stateful_sets.get(&key)?;
            Some((uid, set.spec.as_ref()?.replicas.unwrap_or(1)))
        }
        _ => None,
    }
}

fn set_condition(
    budget: &PodDisruptionBudget,
    status: &mut PodDisruptionBudgetStatus,
    holds: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let conditions = status.conditions.get_or_insert_default();
    let since = conditions
        .iter()
        .find(|known| known.type_ == "DisruptionAllowed" && known.status == holds)
        .map(|known| known.last_transition_time.clone());
    conditions.retain(|known| known.type_ != "DisruptionAllowed");
    conditions.push(Condition {
        type_: "DisruptionAllowed".into(),
        status: holds.into(),
        reason: reason.into(),
        message: message.into(),
        observed_generation: budget.metadata.generation,
        last_transition_time: since.unwrap_or(Time(now)),
    });
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::replicas;
    use super::super::testing::{Cluster, namespace, set};
    use super::*;

    fn cluster(budget: Value) -> Cluster {
        let mut cluster = Cluster::new(&[CONTROLLER, replicas::REPLICA_SETS]);
        cluster.add(namespace("default"));
        let mut value = json!({
            "metadata": {"namespace": "default", "name": "guard"},
            "spec": {"selector": {"matchLabels": {"app": "web"}}},
        });
        json_patch::merge(&mut value, &json!({"spec": budget}));
        cluster.add::<PodDisruptionBudget>(serde_json::from_value(value).unwrap());
        cluster.add(set("default", "web", 4));
        cluster.roll_out();
        cluster
    }

    fn status(cluster: &Cluster) -> PodDisruptionBudgetStatus {
        let budget = cluster.snapshot.disruption_budgets.values().next().unwrap();
        budget.status.clone().unwrap()
    }

    /// (expected, desired, healthy, allowed)
    fn counts(cluster: &Cluster) -> (i32, i32, i32, i32) {
        let status = status(cluster);
        (
            status.expected_pods.unwrap(),
            status.desired_healthy.unwrap(),
            status.current_healthy.unwrap(),
            status.disruptions_allowed.unwrap(),
        )
    }

    #[test]
    fn bounds_follow_from_numbers_and_shares() {
        for (budget, expected) in [
            (json!({"minAvailable": 3}), (4, 3, 4, 1)),
            (json!({"minAvailable": "51%"}), (4, 3, 4, 1)),
            (json!({"minAvailable": 9}), (4, 9, 4, 0)),
            (json!({"maxUnavailable": 1}), (4, 3, 4, 1)),
            (json!({"maxUnavailable": "30%"}), (4, 2, 4, 2)),
            (json!({"maxUnavailable": 9}), (4, 0, 4, 4)),
            (
                json!({"minAvailable": 1, "selector": {"matchLabels": {"app": "none"}}}),
                (0, 1, 0, 0),
            ),
        ] {
            assert_eq!(counts(&cluster(budget.clone())), expected, "{budget}");
        }
    }

    #[test]
    fn a_pod_that_does_not_serve_or_was_evicted_takes_from_the_budget() {
        let mut cluster = cluster(json!({"maxUnavailable": 2}));
        let keys: Vec<_> = cluster
            .snapshot
            .pods
            .iter()
            .map(|(key, _)| key.clone())
            .collect();
        cluster.set_ready(&keys[0], false);
        let now = cluster.time();
        cluster.edit::<PodDisruptionBudget>(&Key::new("default", "guard"), |budget| {
            let evicted = [(keys[1].name.to_string(), now)];
            budget.status.as_mut().unwrap().disrupted_pods = Some(evicted.into());
        });
        cluster.settle();
        assert_eq!(counts(&cluster), (4, 2, 2, 0));
        let condition = status(&cluster).conditions.unwrap().remove(0);
        assert_eq!(
            (&*condition.status, &*condition.reason),
            ("False", "InsufficientPods")
        );
        // It stayed after all.
        cluster.advance(120);
        cluster.settle();
        assert_eq!(counts(&cluster), (4, 2, 3, 1));
        assert_eq!(status(&cluster).disrupted_pods, None);
    }

    #[test]
    fn a_share_of_pods_that_nobody_owns_allows_nothing() {
        let mut cluster =
            cluster(json!({"minAvailable": "50%", "selector": {"matchLabels": {"app": "lone"}}}));
        let mut lone = super::super::testing::pod("default", "lone");
        lone.metadata.labels = Some([("app".to_string(), "lone".to_string())].into());
        cluster.add(lone);
        cluster.roll_out();
        let condition = status(&cluster).conditions.unwrap().remove(0);
        assert_eq!(
            (&*condition.reason, status(&cluster).disruptions_allowed),
            ("SyncFailed", Some(0))
        );
    }
}
