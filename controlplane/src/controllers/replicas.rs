//! ReplicaSet and ReplicationController: keep as many pods of a template as are wished for.

use std::collections::HashMap;

use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec, ReplicationController};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, Time};
use k8s_openapi::jiff::Timestamp;
use serde_json::json;

use super::labels;
use super::object::{Key, Object, Target, Typed};
use super::plan::{Action, Controller, Keys, Note, Plan, View};
use super::pods::{self, Availability};
use super::snapshot::{Change, Snapshot, Table};

/// Pods created or deleted in one plan: upstream's burst.
const BURST_MAX: usize = 500;

pub const REPLICA_SETS: Controller = Controller {
    name: "replicaset",
    affected: affected::<ReplicaSet>,
    plan: plan::<ReplicaSet>,
};

pub const REPLICATION_CONTROLLERS: Controller = Controller {
    name: "replicationcontroller",
    affected: affected::<ReplicationController>,
    plan: plan::<ReplicationController>,
};

/// What the owner of a number of equal pods wishes for.
struct Wish<'a> {
    replicas: i32,
    min_ready_seconds: i32,
    selector: LabelSelector,
    template: Option<&'a PodTemplateSpec>,
}

/// The two kinds, which differ in how they are written down.
trait Replicated: Typed {
    const REPORTER: &'static str;
    fn of(object: &Object) -> Option<&Self>;
    fn table(snapshot: &Snapshot) -> &Table<Self>;
    fn wish(&self) -> Option<Wish<'_>>;
    fn status(&self) -> ReplicaSetStatus;
}

impl Replicated for ReplicaSet {
    const REPORTER: &'static str = "replicaset-controller";

    fn of(object: &Object) -> Option<&Self> {
        match object {
            Object::ReplicaSet(set) => Some(set),
            _ => None,
        }
    }

    fn table(snapshot: &Snapshot) -> &Table<Self> {
        &snapshot.replica_sets
    }

    fn wish(&self) -> Option<Wish<'_>> {
        let spec = self.spec.as_ref()?;
        Some(Wish {
            replicas: spec.replicas.unwrap_or(1),
            min_ready_seconds: spec.min_ready_seconds.unwrap_or(0),
            selector: spec.selector.clone(),
            template: spec.template.as_ref(),
        })
    }

    fn status(&self) -> ReplicaSetStatus {
        self.status.clone().unwrap_or_default()
    }
}

impl Replicated for ReplicationController {
    const REPORTER: &'static str = "replication-controller";

    fn of(object: &Object) -> Option<&Self> {
        match object {
            Object::ReplicationController(controller) => Some(controller),
            _ => None,
        }
    }

    fn table(snapshot: &Snapshot) -> &Table<Self> {
        &snapshot.replication_controllers
    }

    fn wish(&self) -> Option<Wish<'_>> {
        let spec = self.spec.as_ref()?;
        Some(Wish {
            replicas: spec.replicas.unwrap_or(1),
            min_ready_seconds: spec.min_ready_seconds.unwrap_or(0),
            selector: LabelSelector {
                match_labels: spec.selector.clone(),
                match_expressions: None,
            },
            template: spec.template.as_ref(),
        })
    }

    fn status(&self) -> ReplicaSetStatus {
        let status = self.status.clone().unwrap_or_default();
        let conditions = status.conditions.map(|conditions| {
            let same = |condition: k8s_openapi::api::core::v1::ReplicationControllerCondition| {
                ReplicaSetCondition {
                    type_: condition.type_,
                    status: condition.status,
                    reason: condition.reason,
                    message: condition.message,
                    last_transition_time: condition.last_transition_time,
                }
            };
            conditions.into_iter().map(same).collect()
        });
        ReplicaSetStatus {
            replicas: status.replicas,
            fully_labeled_replicas: status.fully_labeled_replicas,
            ready_replicas: status.ready_replicas,
            available_replicas: status.available_replicas,
            observed_generation: status.observed_generation,
            terminating_replicas: None,
            conditions,
        }
    }
}

fn affected<K: Replicated>(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    for state in change.states() {
        if let Some(owner) = K::of(state) {
            keys.insert(Key::of(owner.metadata()));
        }
        let Object::Pod(pod) = state else { continue };
        match pods::controller_of(&pod.metadata) {
            Some(_) => keys.extend(pods::controller_key(&pod.metadata, K::KIND)),
            // Anyone who selects an orphan may want to adopt it.
            None => keys.extend(
                K::table(snapshot)
                    .namespace(pod.metadata.namespace.as_deref().unwrap_or_default())
                    .filter(|(_, owner)| owner.wish().is_some_and(|wish| wish.selects(pod)))
                    .map(|(key, _)| key.clone()),
            ),
        }
    }
}

impl Wish<'_> {
    fn selects(&self, pod: &Pod) -> bool {
        !labels::is_empty(&self.selector)
            && labels::selector_matches(&self.selector, pod.metadata.labels.as_ref())
    }
}

fn plan<K: Replicated>(view: &View<'_>, key: &Key) -> Plan {
    let Some(set) = K::table(view.snapshot).get(key) else {
        return Plan::nothing();
    };
    let Some(wish) = set.wish() else {
        return Plan::nothing();
    };
    let mut plan = Plan::nothing();
    let uid = set.metadata().uid.as_deref().unwrap_or_default();
    let deleting = set.metadata().deletion_timestamp.is_some();

    let mut owned: Vec<&Pod> = Vec::new();
    for pod in view.snapshot.pods_owned_by(uid) {
        if wish.selects(pod) {
            owned.push(pod);
        } else if !deleting && !pods::is_terminating(pod) {
            plan.push(pods::release(&**pod, uid));
        }
    }
    if !deleting {
        for pod in view.snapshot.orphan_pods(&key.namespace) {
            if wish.selects(pod) && pods::is_active(pod) {
                plan.push(pods::adopt(&**pod, &**set));
                // Counted at once: it must not be created a second time while it is being adopted.
                owned.push(pod);
            }
        }
    }
    let active: Vec<&Pod> = owned
        .iter()
        .copied()
        .filter(|pod| pods::is_active(pod))
        .collect();
    let desired = usize::try_from(wish.replicas).unwrap_or(0);
    if !deleting && !view.snapshot.namespace_is_terminating(&key.namespace) {
        if active.len() < desired {
            let missing = (desired - active.len()).min(BURST_MAX);
            create(&**set, &wish, missing, &mut plan);
        } else if active.len() > desired {
            let surplus = (active.len() - desired).min(BURST_MAX);
            for pod in first_to_go(view.snapshot, &**set, active.clone(), view.now)
                .into_iter()
                .take(surplus)
            {
                let note = Note::normal(
                    &Target::of(&**set),
                    K::REPORTER,
                    "SuccessfulDelete",
                    "Deleted pod: {name}",
                )
                .or_failure("FailedDelete", "Error deleting: ");
                let delete = Action::Delete {
                    target: Target::of(pod),
                    propagation: None,
                    grace_seconds: None,
                };
                plan.push_noted(delete, note);
            }
        }
    }
    let failure = (active.len() != desired)
        .then_some(view.last_failure)
        .flatten();
    report_status(view, &**set, &wish, &owned, &active, failure, &mut plan);
    plan
}

fn create<K: Replicated>(set: &K, wish: &Wish<'_>, count: usize, plan: &mut Plan) {
    let Some(template) = wish.template else {
        return;
    };
    let pod = Object::of(pods::from_template(template, set));
    let note = Note::normal(
        &Target::of(set),
        K::REPORTER,
        "SuccessfulCreate",
        "Created pod: {name}",
    )
    .or_failure("FailedCreate", "Error creating: ");
    for _ in 0..count {
        plan.push_noted(Action::Create(pod.clone()), note.clone());
    }
}

/// The pods in the order in which a smaller ReplicaSet gives them up (upstream: ActivePodsWithRanks): unassigned,
/// pending, not ready, cheap to delete, doubled up on a node, ready for a short time, restarted often, young.
fn first_to_go<'a, K: Replicated>(
    snapshot: &Snapshot,
    set: &K,
    mut active: Vec<&'a Pod>,
    now: Timestamp,
) -> Vec<&'a Pod> {
    let siblings = doubled_up(snapshot, set);
    active.sort_by_cached_key(|pod| {
        let assigned = pods::node_name(pod).is_some();
        let progress = match pods::phase(pod) {
            "Pending" => 0,
            "Running" => 2,
            _ => 1,
        };
        let ready = pods::is_ready(pod);
        let cost: i64 = pod
            .metadata
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get("controller.kubernetes.io/pod-deletion-cost"))
            .and_then(|cost| cost.parse().ok())
            .unwrap_or(0);
        let neighbours = pods::node_name(pod)
            .and_then(|node| siblings.get(node))
            .copied()
            .unwrap_or(0);
        let age =
            |time: Option<&Time>| time.map_or(0, |Time(at)| now.duration_since(*at).as_secs());
        let ready_for = if ready {
            age(pods::condition(pod, "Ready")
                .and_then(|condition| condition.last_transition_time.as_ref()))
        } else {
            0
        };
        (
            (assigned, progress, ready, cost),
            (
                std::cmp::Reverse(neighbours),
                ready_for,
                std::cmp::Reverse(pods::restarts_max(pod)),
            ),
            age(pod.metadata.creation_timestamp.as_ref()),
            pod.metadata.name.clone(),
        )
    });
    active
}

/// Active pods per node of all ReplicaSets with the same owner: scaling down then evens out over nodes.
fn doubled_up<K: Replicated>(snapshot: &Snapshot, set: &K) -> HashMap<String, usize> {
    let mut on_node = HashMap::new();
    let mut count = |uid: &str| {
        for pod in snapshot
            .pods_owned_by(uid)
            .filter(|pod| pods::is_active(pod))
        {
            if let Some(node) = pods::node_name(pod) {
                *on_node.entry(node.to_string()).or_default() += 1;
            }
        }
    };
    match pods::controller_of(set.metadata()) {
        Some(owner) => {
            for sibling in snapshot.replica_sets_owned_by(&owner.uid) {
                count(sibling.metadata.uid.as_deref().unwrap_or_default());
            }
        }
        None => count(set.metadata().uid.as_deref().unwrap_or_default()),
    }
    on_node
}

fn report_status<K: Replicated>(
    view: &View<'_>,
    set: &K,
    wish: &Wish<'_>,
    owned: &[&Pod],
    active: &[&Pod],
    failure: Option<&str>,
    plan: &mut Plan,
) {
    let template_labels = wish
        .template
        .and_then(|template| template.metadata.as_ref()?.labels.clone());
    let count = |predicate: &dyn Fn(&Pod) -> bool| -> i32 {
        active
            .iter()
            .filter(|pod| predicate(pod))
            .count()
            .try_into()
            .unwrap_or(i32::MAX)
    };
    let min_ready_seconds = wish.min_ready_seconds;
    for pod in active {
        if let Availability::At(at) = pods::availability(pod, min_ready_seconds, view.now) {
            plan.look_again(at);
        }
    }
    let old = set.status();
    let terminating = owned
        .iter()
        .filter(|pod| pods::is_terminating(pod) && !pods::is_terminal(pod))
        .count();
    let status = ReplicaSetStatus {
        replicas: count(&|_| true),
        fully_labeled_replicas: Some(count(&|pod| {
            template_labels
                .as_ref()
                .is_none_or(|pairs| labels::pairs_match(pairs, pod.metadata.labels.as_ref()))
        })),
        ready_replicas: Some(count(&pods::is_ready)),
        available_replicas: Some(count(&|pod| {
            pods::availability(pod, min_ready_seconds, view.now) == Availability::Now
        })),
        terminating_replicas: (K::TABLE == super::object::Kind::ReplicaSet)
            .then(|| terminating.try_into().unwrap_or(i32::MAX)),
        observed_generation: set.metadata().generation,
        conditions: Some(failure_condition(
            old.conditions.as_deref().unwrap_or_default(),
            failure,
            view.now,
        )),
    };
    if same_status(&old, &status) {
        return;
    }
    let body = json!({
        "replicas": status.replicas,
        "fullyLabeledReplicas": status.fully_labeled_replicas,
        "readyReplicas": status.ready_replicas,
        "availableReplicas": status.available_replicas,
        "terminatingReplicas": status.terminating_replicas,
        "observedGeneration": status.observed_generation,
        "conditions": status.conditions.filter(|conditions| !conditions.is_empty()),
    });
    plan.push(pods::status_patch(set, body));
}

fn failure_condition(
    old: &[ReplicaSetCondition],
    failure: Option<&str>,
    now: Timestamp,
) -> Vec<ReplicaSetCondition> {
    let mut conditions: Vec<_> = old
        .iter()
        .filter(|condition| condition.type_ != "ReplicaFailure")
        .cloned()
        .collect();
    if let Some(message) = failure {
        let known = old
            .iter()
            .find(|condition| condition.type_ == "ReplicaFailure");
        conditions.push(ReplicaSetCondition {
            type_: "ReplicaFailure".into(),
            status: "True".into(),
            reason: Some("FailedCreate".into()),
            message: Some(message.into()),
            last_transition_time: known
                .and_then(|condition| condition.last_transition_time.clone())
                .or(Some(Time(now))),
        });
    }
    conditions
}

/// Absent and zero mean the same in a status.
fn same_status(old: &ReplicaSetStatus, new: &ReplicaSetStatus) -> bool {
    let number = |value: Option<i32>| value.unwrap_or(0);
    old.replicas == new.replicas
        && number(old.fully_labeled_replicas) == number(new.fully_labeled_replicas)
        && number(old.ready_replicas) == number(new.ready_replicas)
        && number(old.available_replicas) == number(new.available_replicas)
        && number(old.terminating_replicas) == number(new.terminating_replicas)
        && old.observed_generation == new.observed_generation
        && old.conditions.as_deref().unwrap_or_default()
            == new.conditions.as_deref().unwrap_or_default()
}
