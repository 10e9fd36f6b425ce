//! StatefulSets in a cluster in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::object::Key;
use super::super::plan::{Controller, Propagation};
use super::super::snapshot::Snapshot;
use super::super::testing::{Cluster, namespace};
use super::super::{garbage, pods};
use super::identity::{POD_INDEX_LABEL, POD_NAME_LABEL, revision_of};

const CONTROLLERS: &[Controller] = &[super::CONTROLLER, garbage::CONTROLLER];

fn key() -> Key {
    Key::new("default", "db")
}

fn cluster(spec: Value) -> Cluster {
    let mut cluster = Cluster::new(CONTROLLERS);
    cluster.add(namespace("default"));
    cluster.add(set(spec));
    cluster
}

fn set(spec: Value) -> StatefulSet {
    let mut value = json!({
        "metadata": {"namespace": "default", "name": "db"},
        "spec": {
            "replicas": 3, "serviceName": "db", "podManagementPolicy": "OrderedReady",
            "selector": {"matchLabels": {"app": "db"}},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": 0}},
            "template": {
                "metadata": {"labels": {"app": "db"}},
                "spec": {"containers": [{"name": "main", "image": "image:1"}]},
            },
        },
    });
    json_patch::merge(&mut value, &json!({"spec": spec}));
    serde_json::from_value(value).unwrap()
}

fn names(cluster: &Cluster) -> Vec<String> {
    cluster
        .snapshot
        .pods
        .iter()
        .map(|(key, _)| key.name.to_string())
        .collect()
}

fn pod(cluster: &Cluster, name: &str) -> Arc<Pod> {
    let found = cluster.snapshot.pods.get(&Key::new("default", name));
    found.unwrap_or_else(|| panic!("no pod {name}")).clone()
}

fn ready(cluster: &mut Cluster, name: &str) {
    cluster.set_ready(&Key::new("default", name), true);
    cluster.settle();
}

fn status(cluster: &Cluster) -> StatefulSetStatus {
    let set = cluster.snapshot.stateful_sets.get(&key()).unwrap();
    set.status.clone().unwrap_or_default()
}

fn edit(cluster: &mut Cluster, change: Value) {
    cluster.edit::<StatefulSet>(&key(), |set| {
        let mut value = json!(set.spec);
        json_patch::merge(&mut value, &change);
        set.spec = serde_json::from_value(value).unwrap();
    });
    cluster.settle();
}

fn image(name: &str) -> Value {
    json!({"template": {"spec": {"containers": [{"name": "main", "image": name}]}}})
}

fn images(cluster: &Cluster) -> BTreeMap<String, String> {
    cluster
        .snapshot
        .pods
        .iter()
        .map(|(key, pod)| {
            let image = pod.spec.as_ref().unwrap().containers[0].image.clone();
            (key.name.to_string(), image.unwrap())
        })
        .collect()
}

#[test]
fn pods_come_up_one_by_one_and_go_down_from_the_end() {
    let mut cluster = cluster(json!({}));
    cluster.settle();
    assert_eq!(names(&cluster), ["db-0"]);
    let first = pod(&cluster, "db-0");
    let labels = first.metadata.labels.as_ref().unwrap();
    assert_eq!(
        (&*labels[POD_NAME_LABEL], &*labels[POD_INDEX_LABEL]),
        ("db-0", "0")
    );
    let spec = first.spec.as_ref().unwrap();
    assert_eq!(
        (spec.hostname.as_deref(), spec.subdomain.as_deref()),
        (Some("db-0"), Some("db"))
    );
    ready(&mut cluster, "db-0");
    assert_eq!(names(&cluster), ["db-0", "db-1"]);
    // One that stops serving holds up the rest.
    cluster.set_ready(&Key::new("default", "db-0"), false);
    ready(&mut cluster, "db-1");
    assert_eq!(names(&cluster), ["db-0", "db-1"]);
    ready(&mut cluster, "db-0");
    ready(&mut cluster, "db-2");
    assert_eq!(
        (status(&cluster).ready_replicas, status(&cluster).replicas),
        (Some(3), 3)
    );
    cluster.hold_pods = true;
    edit(&mut cluster, json!({"replicas": 1}));
    assert!(pods::is_terminating(&pod(&cluster, "db-2")));
    assert!(!pods::is_terminating(&pod(&cluster, "db-1")));
    cluster.finish_pods();
    cluster.settle();
    assert!(pods::is_terminating(&pod(&cluster, "db-1")));
    cluster.finish_pods();
    cluster.settle();
    assert_eq!(names(&cluster), ["db-0"]);
}

#[test]
fn parallel_pods_wait_for_nobody() {
    let mut cluster = cluster(json!({"podManagementPolicy": "Parallel"}));
    cluster.settle();
    assert_eq!(names(&cluster), ["db-0", "db-1", "db-2"]);
    edit(&mut cluster, json!({"replicas": 0}));
    assert!(names(&cluster).is_empty());
}

#[test]
fn ordinals_may_start_elsewhere() {
    let mut cluster = cluster(json!({"replicas": 2, "ordinals": {"start": 5}}));
    cluster.roll_out();
    assert_eq!(names(&cluster), ["db-5", "db-6"]);
    edit(&mut cluster, json!({"ordinals": {"start": 6}}));
    cluster.roll_out();
    assert_eq!(names(&cluster), ["db-6", "db-7"]);
}

#[test]
fn an_update_goes_from_the_last_to_the_first_and_becomes_current() {
    let mut cluster = cluster(json!({}));
    cluster.roll_out();
    let before = status(&cluster);
    assert_eq!(before.current_revision, before.update_revision);
    edit(&mut cluster, image("image:2"));
    let during = status(&cluster);
    assert_ne!(during.current_revision, during.update_revision);
    assert_eq!(images(&cluster)["db-2"], "image:2");
    assert_eq!(images(&cluster)["db-1"], "image:1", "waits for db-2");
    ready(&mut cluster, "db-2");
    assert_eq!(images(&cluster)["db-1"], "image:2");
    cluster.roll_out();
    let after = status(&cluster);
    assert_eq!(after.current_revision, during.update_revision);
    assert_eq!(
        (after.current_replicas, after.updated_replicas),
        (Some(3), Some(3))
    );
    assert_eq!(cluster.snapshot.revisions.len(), 2);
    // Back again: the old revision is the newest now.
    edit(&mut cluster, image("image:1"));
    cluster.roll_out();
    assert_eq!(status(&cluster).current_revision, before.current_revision);
    assert_eq!(cluster.snapshot.revisions.len(), 2);
    assert!(images(&cluster).values().all(|image| image == "image:1"));
}

#[test]
fn a_partition_keeps_the_lower_ordinals_on_the_current_template() {
    let mut cluster = cluster(json!({"updateStrategy": {"rollingUpdate": {"partition": 2}}}));
    cluster.roll_out();
    edit(&mut cluster, image("image:2"));
    cluster.roll_out();
    let of = |images: &[&str]| {
        (0..3)
            .map(|index| (format!("db-{index}"), images[index].to_string()))
            .collect::<BTreeMap<_, _>>()
    };
    assert_eq!(images(&cluster), of(&["image:1", "image:1", "image:2"]));
    // One that is lost comes back as it was.
    cluster.delete_now("db-0");
    cluster.roll_out();
    assert_eq!(images(&cluster), of(&["image:1", "image:1", "image:2"]));
    assert_eq!(
        (
            status(&cluster).current_replicas,
            status(&cluster).updated_replicas
        ),
        (Some(2), Some(1))
    );
    edit(
        &mut cluster,
        json!({"updateStrategy": {"rollingUpdate": {"partition": 0}}}),
    );
    cluster.roll_out();
    assert_eq!(images(&cluster), of(&["image:2", "image:2", "image:2"]));
}

#[test]
fn on_delete_replaces_nothing_by_itself() {
    let mut cluster =
        cluster(json!({"updateStrategy": {"type": "OnDelete", "rollingUpdate": null}}));
    cluster.roll_out();
    edit(&mut cluster, image("image:2"));
    cluster.roll_out();
    assert!(images(&cluster).values().all(|image| image == "image:1"));
    cluster.delete_now("db-1");
    cluster.roll_out();
    assert_eq!(images(&cluster)["db-1"], "image:2");
}

#[test]
fn several_may_be_unavailable_at_a_time_when_allowed() {
    let mut cluster = cluster(json!({
        "replicas": 5, "podManagementPolicy": "Parallel",
        "updateStrategy": {"rollingUpdate": {"maxUnavailable": 2}},
    }));
    cluster.roll_out();
    cluster.hold_pods = true;
    edit(&mut cluster, image("image:2"));
    let going: Vec<_> = names(&cluster)
        .into_iter()
        .filter(|name| pods::is_terminating(&pod(&cluster, name)))
        .collect();
    assert_eq!(going, ["db-3", "db-4"]);
}

#[test]
fn a_pod_that_has_ended_is_made_again() {
    let mut cluster = cluster(json!({"replicas": 1}));
    cluster.roll_out();
    let uid = pod(&cluster, "db-0").metadata.uid.clone();
    cluster.edit::<Pod>(&Key::new("default", "db-0"), |pod| {
        pod.status.as_mut().unwrap().phase = Some("Failed".into());
    });
    cluster.roll_out();
    assert_ne!(pod(&cluster, "db-0").metadata.uid, uid);
    assert!(
        cluster
            .notes
            .iter()
            .any(|note| note.reason == "RecreatingFailedPod")
    );
}

fn with_claims(policy: Value) -> Value {
    json!({
        "replicas": 2, "persistentVolumeClaimRetentionPolicy": policy,
        "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"]}}],
    })
}

fn claims(cluster: &Cluster) -> Vec<String> {
    cluster
        .snapshot
        .claims
        .iter()
        .map(|(key, _)| key.name.to_string())
        .collect()
}

#[test]
fn claims_come_first_and_stay() {
    let mut cluster = cluster(with_claims(
        json!({"whenDeleted": "Retain", "whenScaled": "Retain"}),
    ));
    cluster.roll_out();
    assert_eq!(claims(&cluster), ["data-db-0", "data-db-1"]);
    let volume = pod(&cluster, "db-1")
        .spec
        .as_ref()
        .unwrap()
        .volumes
        .as_ref()
        .unwrap()[0]
        .clone();
    assert_eq!(
        volume.persistent_volume_claim.unwrap().claim_name,
        "data-db-1"
    );
    edit(&mut cluster, json!({"replicas": 1}));
    cluster.delete("db", Propagation::Background);
    cluster.settle();
    assert!(names(&cluster).is_empty());
    assert_eq!(claims(&cluster), ["data-db-0", "data-db-1"]);
}

#[test]
fn claims_go_when_the_policy_says_so() {
    let mut cluster = cluster(with_claims(
        json!({"whenDeleted": "Retain", "whenScaled": "Delete"}),
    ));
    cluster.roll_out();
    edit(&mut cluster, json!({"replicas": 1}));
    assert_eq!(claims(&cluster), ["data-db-0"]);
    edit(
        &mut cluster,
        json!({"persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete"}}),
    );
    cluster.delete("db", Propagation::Background);
    cluster.settle();
    assert!(claims(&cluster).is_empty());
}

#[test]
fn pods_are_adopted_by_name_and_label_and_released() {
    let mut cluster = cluster(json!({"replicas": 1}));
    cluster.roll_out();
    cluster.edit::<Pod>(&Key::new("default", "db-0"), |pod| {
        pod.metadata.owner_references = None;
        pod.metadata
            .labels
            .as_mut()
            .unwrap()
            .remove(POD_INDEX_LABEL);
    });
    cluster.settle();
    let adopted = pod(&cluster, "db-0");
    assert!(pods::controller_of(&adopted.metadata).is_some());
    assert!(
        adopted
            .metadata
            .labels
            .as_ref()
            .unwrap()
            .contains_key(POD_INDEX_LABEL)
    );
    cluster.edit::<Pod>(&Key::new("default", "db-0"), |pod| {
        pod.metadata.labels.as_mut().unwrap().remove("app");
    });
    cluster.settle();
    assert!(pods::controller_of(&pod(&cluster, "db-0").metadata).is_none());
    assert!(
        cluster
            .notes
            .iter()
            .any(|note| note.reason == "FailedCreate")
    );
    // The name is free again.
    cluster.delete_now("db-0");
    cluster.settle();
    assert!(pods::controller_of(&pod(&cluster, "db-0").metadata).is_some());
}

#[derive(Clone, Debug)]
enum Change {
    Replicas(i32),
    Image(u8),
    Partition(i32),
    Ready(usize, bool),
    Lose(usize),
    Finish,
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let change = prop_oneof![
        1 => (0..5_i32).prop_map(Change::Replicas),
        1 => (1..4_u8).prop_map(Change::Image),
        1 => (0..4_i32).prop_map(Change::Partition),
        4 => (0..5_usize, prop_oneof![3 => Just(true), 1 => Just(false)]).prop_map(|(pod, is)| Change::Ready(pod, is)),
        1 => (0..5_usize).prop_map(Change::Lose),
        2 => Just(Change::Finish),
    ];
    proptest::collection::vec(change, 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..Default::default() })]

    /// Whatever happens on the way: ordered pods never have a gap that the set made itself, an update stops at most one pod
    /// that serves, and in the end every pod is of the template it should be of.
    #[test]
    fn order_holds_and_all_comes_to_rest(changes in changes()) {
        let mut cluster = cluster(json!({}));
        cluster.hold_pods = true;
        let broken = Arc::new(Mutex::new(None::<String>));
        let found = broken.clone();
        let mut known: BTreeMap<String, bool> = BTreeMap::new();
        cluster.check = Some(Box::new(move |snapshot: &Snapshot| {
            let now: BTreeMap<_, _> = snapshot.pods.iter()
                .map(|(key, pod)| (key.name.to_string(), super::is_running_and_ready(pod) && !pods::is_terminating(pod)))
                .collect();
            // A pod that appears needs all below it to serve.
            let wished = snapshot.stateful_sets.get(&key()).and_then(|set| set.spec.as_ref()?.replicas).unwrap_or(0);
            for name in now.keys().filter(|name| !known.contains_key(*name)) {
                let ordinal: i32 = name.rsplit_once('-').unwrap().1.parse().unwrap();
                let gap = (0..ordinal.min(wished)).find(|below| now.get(&format!("db-{below}")) != Some(&true));
                if let Some(below) = gap {
                    *found.lock().unwrap() = Some(format!("{name} came before db-{below} served: {now:?}"));
                }
            }
            known = now;
        }));
        cluster.settle();
        for change in changes {
            let live = names(&cluster);
            match change {
                Change::Replicas(number) => edit(&mut cluster, json!({"replicas": number})),
                Change::Image(number) => edit(&mut cluster, image(&format!("image:{number}"))),
                Change::Partition(number) => {
                    edit(&mut cluster, json!({"updateStrategy": {"rollingUpdate": {"partition": number}}}));
                }
                Change::Ready(index, is) if !live.is_empty() => {
                    cluster.set_ready(&Key::new("default", &live[index % live.len()]), is);
                }
                Change::Lose(index) if !live.is_empty() => cluster.delete_now(&live[index % live.len()]),
                Change::Ready(..) | Change::Lose(_) => {}
                Change::Finish => cluster.finish_pods(),
            }
            cluster.settle();
        }
        edit(&mut cluster, json!({"updateStrategy": {"rollingUpdate": {"partition": 0}}}));
        for _ in 0..40 {
            cluster.finish_pods();
            cluster.all_ready();
            cluster.settle();
        }
        prop_assert_eq!(broken.lock().unwrap().clone(), None);
        let status = status(&cluster);
        let wished = cluster.snapshot.stateful_sets.get(&key()).unwrap().spec.as_ref().unwrap().replicas.unwrap();
        prop_assert_eq!(names(&cluster).len(), usize::try_from(wished).unwrap());
        prop_assert_eq!(status.ready_replicas, Some(wished));
        prop_assert_eq!(&status.current_revision, &status.update_revision);
        for pod in cluster.snapshot.pods.values() {
            prop_assert_eq!(revision_of(pod), status.update_revision.as_ref());
        }
    }
}

#[test]
fn a_share_of_the_replicas_may_be_unavailable() {
    let mut cluster = cluster(json!({"replicas": 4, "podManagementPolicy": "Parallel"}));
    cluster.roll_out();
    cluster.hold_pods = true;
    cluster.edit::<StatefulSet>(&key(), |set| {
        let strategy = set.spec.as_mut().unwrap().update_strategy.as_mut().unwrap();
        strategy.rolling_update.as_mut().unwrap().max_unavailable =
            Some(IntOrString::String("75%".into()));
    });
    edit(&mut cluster, image("image:2"));
    let going = names(&cluster)
        .into_iter()
        .filter(|name| pods::is_terminating(&pod(&cluster, name)));
    assert_eq!(going.count(), 3);
}
