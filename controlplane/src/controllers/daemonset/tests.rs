//! DaemonSets in a cluster in memory.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use proptest::prelude::*;
use serde_json::json;

use super::super::object::Key;
use super::super::plan::Controller;
use super::super::pods;
use super::super::testing::{Cluster, daemon_set, namespace, node};
use super::{HASH_LABEL, placement};

const CONTROLLERS: &[Controller] = &[super::CONTROLLER];

fn agent() -> Key {
    Key::new("default", "agent")
}

fn cluster(nodes: usize) -> Cluster {
    let mut cluster = Cluster::new(CONTROLLERS);
    cluster.add(namespace("default"));
    for index in 0..nodes {
        cluster.add(node(&format!("n{index}")));
    }
    cluster.add(daemon_set("default", "agent"));
    cluster
}

fn status(cluster: &Cluster) -> k8s_openapi::api::apps::v1::DaemonSetStatus {
    cluster
        .snapshot
        .daemon_sets
        .get(&agent())
        .unwrap()
        .status
        .clone()
        .unwrap_or_default()
}

fn nodes_with_pods(cluster: &Cluster) -> Vec<String> {
    let mut nodes: Vec<String> = cluster
        .snapshot
        .pods
        .values()
        .filter_map(|pod| placement::node_of(pod))
        .collect();
    nodes.sort();
    nodes
}

fn hashes(cluster: &Cluster) -> std::collections::BTreeSet<String> {
    cluster
        .snapshot
        .pods
        .values()
        .map(|pod| pod.metadata.labels.as_ref().unwrap()[HASH_LABEL].clone())
        .collect()
}

fn set_image(cluster: &mut Cluster, image: &str) {
    cluster.edit::<DaemonSet>(&agent(), |set| {
        set.spec
            .as_mut()
            .unwrap()
            .template
            .spec
            .as_mut()
            .unwrap()
            .containers[0]
            .image = Some(image.into());
    });
}

#[test]
fn every_node_gets_one_pod_and_the_status_counts_them() {
    let mut cluster = cluster(3);
    cluster.settle();
    assert_eq!(nodes_with_pods(&cluster), ["n0", "n1", "n2"]);
    let before = status(&cluster);
    assert_eq!(
        (
            before.desired_number_scheduled,
            before.number_ready,
            before.number_unavailable
        ),
        (3, 0, Some(3))
    );
    cluster.roll_out();
    let after = status(&cluster);
    assert_eq!(
        (
            after.number_ready,
            after.number_available,
            after.updated_number_scheduled
        ),
        (3, Some(3), Some(3))
    );
    assert_eq!(after.observed_generation, Some(1));
    cluster.add(node("n3"));
    cluster.roll_out();
    assert_eq!(status(&cluster).number_available, Some(4));
}

#[test]
fn selector_and_taints_decide_and_a_changed_label_moves_the_pod() {
    let mut cluster = cluster(2);
    let mut tainted = node("tainted");
    tainted.spec =
        serde_json::from_value(json!({"taints": [{"key": "x", "effect": "NoSchedule"}]})).unwrap();
    cluster.add(tainted);
    let mut unready = node("unready");
    unready.spec = serde_json::from_value(json!({
        "unschedulable": true,
        "taints": [
            {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"},
            {"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"},
        ],
    }))
    .unwrap();
    cluster.add(unready);
    cluster.roll_out();
    // A node that is not ready has taints that every daemon tolerates; but not-ready:NoSchedule it does not need to.
    assert_eq!(nodes_with_pods(&cluster), ["n0", "n1", "unready"]);
    cluster.edit::<DaemonSet>(&agent(), |set| {
        let template = set.spec.as_mut().unwrap().template.spec.as_mut().unwrap();
        template.node_selector = Some([("role".to_string(), "edge".to_string())].into());
    });
    cluster.roll_out();
    assert!(nodes_with_pods(&cluster).is_empty());
    cluster.edit::<Node>(&Key::cluster("n1"), |node| {
        node.metadata
            .labels
            .get_or_insert_default()
            .insert("role".into(), "edge".into());
    });
    cluster.roll_out();
    assert_eq!(nodes_with_pods(&cluster), ["n1"]);
}

#[test]
fn a_taint_that_only_keeps_new_pods_away_lets_a_running_one_stay() {
    let mut cluster = cluster(1);
    cluster.roll_out();
    let taint = |effect: &str| {
        serde_json::from_value(json!({"taints": [{"key": "x", "effect": effect}]})).unwrap()
    };
    cluster.edit::<Node>(&Key::cluster("n0"), |node| node.spec = taint("NoSchedule"));
    cluster.roll_out();
    assert_eq!(cluster.snapshot.pods.len(), 1);
    assert_eq!(status(&cluster).number_misscheduled, 1);
    cluster.edit::<Node>(&Key::cluster("n0"), |node| node.spec = taint("NoExecute"));
    cluster.roll_out();
    assert!(cluster.snapshot.pods.is_empty());
}

#[test]
fn an_update_replaces_one_pod_at_a_time_and_history_allows_undo() {
    let mut cluster = cluster(3);
    cluster.roll_out();
    let old = hashes(&cluster);
    set_image(&mut cluster, "image:2");
    cluster.settle();
    let ready = cluster
        .snapshot
        .pods
        .values()
        .filter(|pod| pods::is_ready(pod))
        .count();
    assert_eq!(
        ready, 2,
        "one makes way, the others wait until its successor is ready"
    );
    cluster.roll_out();
    assert!(hashes(&cluster).is_disjoint(&old) && hashes(&cluster).len() == 1);
    assert_eq!(status(&cluster).updated_number_scheduled, Some(3));
    assert_eq!(cluster.snapshot.revisions.len(), 2);
    set_image(&mut cluster, "image:1");
    cluster.roll_out();
    assert_eq!(hashes(&cluster), old);
    let mut revisions: Vec<i64> = cluster
        .snapshot
        .revisions
        .values()
        .map(|found| found.revision)
        .collect();
    revisions.sort_unstable();
    assert_eq!(revisions, [2, 3], "the old revision is the newest again");
}

#[test]
fn with_a_surge_the_new_pod_is_ready_before_the_old_one_goes() {
    let mut cluster = cluster(2);
    cluster.edit::<DaemonSet>(&agent(), |set| {
        set.spec.as_mut().unwrap().update_strategy =
            serde_json::from_value(json!({"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}))
                .unwrap();
    });
    cluster.roll_out();
    set_image(&mut cluster, "image:2");
    cluster.settle();
    assert_eq!(cluster.snapshot.pods.len(), 3);
    assert_eq!(
        cluster
            .snapshot
            .pods
            .values()
            .filter(|pod| pods::is_ready(pod))
            .count(),
        2
    );
    cluster.roll_out();
    assert_eq!(
        (cluster.snapshot.pods.len(), hashes(&cluster).len()),
        (2, 1)
    );
}

#[test]
fn on_delete_waits_for_someone_to_delete() {
    let mut cluster = cluster(2);
    cluster.edit::<DaemonSet>(&agent(), |set| {
        set.spec.as_mut().unwrap().update_strategy =
            serde_json::from_value(json!({"type": "OnDelete"})).unwrap();
    });
    cluster.roll_out();
    let old = hashes(&cluster);
    set_image(&mut cluster, "image:2");
    cluster.roll_out();
    assert_eq!(hashes(&cluster), old);
    let first = cluster
        .snapshot
        .pods
        .iter()
        .next()
        .unwrap()
        .0
        .name
        .to_string();
    cluster.delete_now(&first);
    cluster.roll_out();
    assert_eq!(hashes(&cluster).len(), 2);
}

#[test]
fn a_failed_pod_is_replaced_and_a_pod_of_a_vanished_node_goes() {
    let mut cluster = cluster(2);
    cluster.roll_out();
    let key = cluster.snapshot.pods.iter().next().unwrap().0.clone();
    cluster.edit::<Pod>(&key, |pod| {
        pod.status.as_mut().unwrap().phase = Some("Failed".into())
    });
    cluster.roll_out();
    assert!(!cluster.snapshot.pods.contains(&key));
    assert_eq!(cluster.snapshot.pods.len(), 2);
    assert!(
        cluster
            .notes
            .iter()
            .any(|note| note.reason == "FailedDaemonPod")
    );
    cluster.delete_now("n1");
    cluster.roll_out();
    assert_eq!(nodes_with_pods(&cluster), ["n0"]);
}

#[test]
fn a_template_that_the_server_filled_in_is_not_taken_for_a_new_one() {
    let mut cluster = cluster(1);
    cluster.roll_out();
    let key = cluster.snapshot.revisions.iter().next().unwrap().0.clone();
    cluster.edit::<k8s_openapi::api::apps::v1::ControllerRevision>(&key, |revision| {
        revision.data.as_mut().unwrap().0["spec"]["template"]["spec"]["schedulerName"] =
            json!("default-scheduler");
    });
    cluster.roll_out();
    assert_eq!(cluster.snapshot.revisions.len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// However an update meets nodes that come and pods that become ready, never more pods than allowed are away at once,
    /// and no node has two pods.
    #[test]
    fn an_update_keeps_all_but_the_allowed_number_running(
        nodes in 1usize..6, allowed in 1i32..4, steps in prop::collection::vec((0u8..4, 0usize..6), 1..40),
    ) {
        let mut cluster = cluster(nodes);
        cluster.edit::<DaemonSet>(&agent(), |set| {
            set.spec.as_mut().unwrap().update_strategy =
                serde_json::from_value(json!({"rollingUpdate": {"maxUnavailable": allowed}})).unwrap();
        });
        cluster.roll_out();
        let mut image = 1;
        for (step, count) in steps {
            match step {
                0 => {
                    image += 1;
                    set_image(&mut cluster, &format!("image:{image}"));
                }
                1 => cluster.settle(),
                2 => for _ in 0..count { cluster.step(); },
                _ => {
                    let waiting: Vec<Key> = cluster.snapshot.pods.iter()
                        .filter(|(_, pod)| !pods::is_ready(pod)).map(|(key, _)| key.clone()).take(count).collect();
                    for key in waiting {
                        cluster.set_ready(&key, true);
                    }
                }
            }
            let ready = cluster.snapshot.pods.values().filter(|pod| pods::is_ready(pod)).count();
            prop_assert!(ready + usize::try_from(allowed).unwrap() >= nodes, "{ready} of {nodes} ready");
            let mut on = nodes_with_pods(&cluster);
            on.dedup();
            prop_assert_eq!(on.len(), cluster.snapshot.pods.len());
        }
        cluster.roll_out();
        prop_assert_eq!(hashes(&cluster).len(), 1);
        prop_assert_eq!(status(&cluster).number_available, Some(i32::try_from(nodes).unwrap()));
    }
}
