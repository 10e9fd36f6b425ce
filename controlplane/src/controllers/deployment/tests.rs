//! Rollouts in a cluster in memory: every step of every controller is taken, and the bounds are held after each write.

use std::cell::RefCell;
use std::rc::Rc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use proptest::prelude::*;
use serde_json::json;

use super::super::object::Key;
use super::super::plan::{Controller, Propagation};
use super::super::pods;
use super::super::snapshot::Snapshot;
use super::super::testing::{Cluster, deployment, namespace, pod, set};
use super::sets::{annotation, replicas, revision_of};
use super::{HASH_LABEL, REVISION};

const CONTROLLERS: &[Controller] = &[super::CONTROLLER, super::super::replicas::REPLICA_SETS];

fn web() -> Key {
    Key::new("default", "web")
}

fn cluster() -> Cluster {
    let mut cluster = Cluster::new(CONTROLLERS);
    cluster.add(namespace("default"));
    cluster
}

fn running(replicas: i32) -> Cluster {
    let mut cluster = cluster();
    cluster.add(deployment("default", "web", replicas));
    cluster.roll_out();
    cluster
}

fn set_image(cluster: &mut Cluster, image: &str) {
    cluster.edit::<Deployment>(&web(), |web| {
        web.spec
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

fn edit(
    cluster: &mut Cluster,
    change: impl FnOnce(&mut k8s_openapi::api::apps::v1::DeploymentSpec),
) {
    cluster.edit::<Deployment>(&web(), |web| change(web.spec.as_mut().unwrap()));
}

fn found(cluster: &Cluster) -> &Deployment {
    cluster.snapshot.deployments.get(&web()).unwrap()
}

fn sets_of(cluster: &Cluster) -> Vec<&ReplicaSet> {
    let mut sets: Vec<&ReplicaSet> = cluster
        .snapshot
        .replica_sets
        .values()
        .map(|set| &**set)
        .collect();
    sets.sort_by_key(|set| revision_of(set));
    sets
}

fn condition(cluster: &Cluster, type_: &str) -> (String, String) {
    let status = found(cluster).status.as_ref().unwrap();
    let condition = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == type_)
        .unwrap();
    (condition.status.clone(), condition.reason.clone().unwrap())
}

/// Whether `kubectl rollout status` would say that the rollout is done.
fn rolled_out(cluster: &Cluster) -> bool {
    let web = found(cluster);
    let status = web.status.clone().unwrap_or_default();
    let wished = web.spec.as_ref().unwrap().replicas.unwrap();
    web.metadata.generation == status.observed_generation
        && status.updated_replicas == Some(wished)
        && status.replicas == Some(wished)
        && status.available_replicas == Some(wished)
}

#[test]
fn a_new_deployment_makes_a_set_and_its_pods() {
    let mut cluster = cluster();
    cluster.add(deployment("default", "web", 3));
    cluster.settle();
    assert_eq!(
        condition(&cluster, "Available"),
        ("False".into(), "MinimumReplicasUnavailable".into())
    );
    assert!(!rolled_out(&cluster));
    cluster.roll_out();
    assert!(rolled_out(&cluster));
    assert_eq!(
        condition(&cluster, "Available"),
        ("True".into(), "MinimumReplicasAvailable".into())
    );
    assert_eq!(
        condition(&cluster, "Progressing"),
        ("True".into(), "NewReplicaSetAvailable".into())
    );
    let sets = sets_of(&cluster);
    assert_eq!(sets.len(), 1);
    let hash = &sets[0].metadata.labels.as_ref().unwrap()[HASH_LABEL];
    assert_eq!(
        sets[0].metadata.name.as_deref(),
        Some(format!("web-{hash}").as_str())
    );
    for pod in cluster.snapshot.pods.values() {
        assert_eq!(&pod.metadata.labels.as_ref().unwrap()[HASH_LABEL], hash);
        assert!(
            pod.metadata
                .name
                .as_ref()
                .unwrap()
                .starts_with(&format!("web-{hash}-"))
        );
    }
    assert_eq!(
        found(&cluster).metadata.annotations.as_ref().unwrap()[REVISION],
        "1"
    );
    let scaled = cluster
        .notes
        .iter()
        .find(|note| note.reason == "ScalingReplicaSet")
        .unwrap();
    assert_eq!(
        scaled.message,
        format!("Scaled up replica set web-{hash} from 0 to 3")
    );
}

#[test]
fn a_new_template_replaces_all_pods_and_keeps_history_for_undo() {
    let mut cluster = running(4);
    set_image(&mut cluster, "image:2");
    cluster.roll_out();
    assert!(rolled_out(&cluster));
    let sets = sets_of(&cluster);
    assert_eq!(
        sets.iter().map(|set| replicas(set)).collect::<Vec<_>>(),
        [0, 4]
    );
    assert_eq!(
        sets.iter().map(|set| revision_of(set)).collect::<Vec<_>>(),
        [1, 2]
    );
    // What `kubectl rollout undo` does: the old template comes back.
    set_image(&mut cluster, "image:1");
    cluster.roll_out();
    let sets = sets_of(&cluster);
    assert_eq!(sets.len(), 2, "the old set is used again");
    assert_eq!(revision_of(sets[1]), 3);
    assert_eq!(
        annotation(sets[1], "deployment.kubernetes.io/revision-history"),
        Some("1")
    );
    assert_eq!(replicas(sets[1]), 4);
    assert_eq!(
        found(&cluster).metadata.annotations.as_ref().unwrap()[REVISION],
        "3"
    );
}

#[test]
fn old_sets_past_the_history_limit_are_deleted() {
    let mut cluster = running(1);
    edit(&mut cluster, |spec| spec.revision_history_limit = Some(2));
    for image in 2..7 {
        set_image(&mut cluster, &format!("image:{image}"));
        cluster.roll_out();
    }
    let revisions: Vec<i64> = sets_of(&cluster)
        .iter()
        .map(|set| revision_of(set))
        .collect();
    assert_eq!(revisions, [4, 5, 6]);
}

#[test]
fn recreate_starts_nothing_before_all_old_pods_are_gone() {
    let mut cluster = cluster();
    let mut recreate = deployment("default", "web", 3);
    recreate.spec.as_mut().unwrap().strategy =
        serde_json::from_value(json!({"type": "Recreate"})).unwrap();
    cluster.add(recreate);
    cluster.roll_out();
    cluster.hold_pods = true;
    set_image(&mut cluster, "image:2");
    cluster.settle();
    assert_eq!(cluster.snapshot.pods.len(), 3);
    assert!(
        cluster
            .snapshot
            .pods
            .values()
            .all(|pod| pods::is_terminating(pod)),
        "nothing new beside the old"
    );
    cluster.finish_pods();
    cluster.roll_out();
    assert!(rolled_out(&cluster));
    assert_eq!(cluster.snapshot.pods.len(), 3);
}

#[test]
fn scaling_changes_the_current_set_only() {
    let mut cluster = running(2);
    for wished in [5, 1, 0, 3] {
        edit(&mut cluster, |spec| spec.replicas = Some(wished));
        cluster.roll_out();
        assert!(rolled_out(&cluster), "{wished}");
        assert_eq!(
            cluster.snapshot.pods.len(),
            usize::try_from(wished).unwrap()
        );
        assert_eq!(sets_of(&cluster).len(), 1);
    }
}

#[test]
fn scaling_in_the_middle_of_a_rollout_is_shared_out() {
    let mut cluster = running(10);
    set_image(&mut cluster, "image:2");
    cluster.settle();
    let before: Vec<i32> = sets_of(&cluster).iter().map(|set| replicas(set)).collect();
    assert_eq!(before, [8, 5], "maxUnavailable 25% down, maxSurge 25% up");
    edit(&mut cluster, |spec| spec.replicas = Some(20));
    cluster.settle();
    let after: Vec<i32> = sets_of(&cluster).iter().map(|set| replicas(set)).collect();
    assert_eq!(after.iter().sum::<i32>(), 25, "20 and maxSurge: {after:?}");
    assert!(
        after[0] > before[0] && after[1] > before[1],
        "{before:?} {after:?}"
    );
    cluster.roll_out();
    assert!(rolled_out(&cluster));
}

#[test]
fn a_cut_in_the_middle_of_a_rollout_leaves_those_that_serve() {
    let mut cluster = cluster();
    let mut web = deployment("default", "web", 2);
    web.spec.as_mut().unwrap().strategy = serde_json::from_value(json!({
        "type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }))
    .unwrap();
    cluster.add(web);
    cluster.roll_out();
    // Two templates whose pods never serve, one of them left halfway, and a wish that grew: three sets of one or two.
    set_image(&mut cluster, "image:2");
    cluster.step();
    set_image(&mut cluster, "image:3");
    edit(&mut cluster, |spec| spec.replicas = Some(3));
    cluster.settle();
    let serving = |cluster: &Cluster| {
        let pods = cluster.snapshot.pods.values();
        pods.filter(|pod| pods::is_active(pod) && pods::is_ready(pod))
            .count()
    };
    assert_eq!(serving(&cluster), 2);
    edit(&mut cluster, |spec| spec.replicas = Some(1));
    cluster.settle();
    assert!(serving(&cluster) >= 1, "{:?}", sets_of(&cluster));
    cluster.roll_out();
    assert!(rolled_out(&cluster));
}

#[test]
fn a_paused_deployment_scales_but_does_not_roll() {
    let mut cluster = running(2);
    edit(&mut cluster, |spec| spec.paused = Some(true));
    set_image(&mut cluster, "image:2");
    edit(&mut cluster, |spec| spec.replicas = Some(4));
    cluster.roll_out();
    assert_eq!(sets_of(&cluster).len(), 1);
    assert_eq!(cluster.snapshot.pods.len(), 4);
    assert_eq!(
        condition(&cluster, "Progressing"),
        ("Unknown".into(), "DeploymentPaused".into())
    );
    edit(&mut cluster, |spec| spec.paused = None);
    cluster.roll_out();
    assert!(rolled_out(&cluster));
    assert_eq!(
        sets_of(&cluster)
            .iter()
            .map(|set| replicas(set))
            .collect::<Vec<_>>(),
        [0, 4]
    );
}

#[test]
fn a_rollout_that_stands_still_is_called_so_after_its_deadline() {
    let mut cluster = running(2);
    edit(&mut cluster, |spec| {
        spec.progress_deadline_seconds = Some(60)
    });
    set_image(&mut cluster, "broken");
    cluster.settle();
    cluster.advance(30);
    cluster.settle();
    assert_eq!(condition(&cluster, "Progressing").0, "True");
    cluster.advance(31);
    cluster.settle();
    assert_eq!(
        condition(&cluster, "Progressing"),
        ("False".into(), "ProgressDeadlineExceeded".into())
    );
    assert_eq!(
        condition(&cluster, "Available").0,
        "True",
        "the old pods still serve"
    );
    cluster.roll_out();
    assert_eq!(
        condition(&cluster, "Progressing"),
        ("True".into(), "NewReplicaSetAvailable".into())
    );
}

#[test]
fn pods_that_cannot_be_created_are_said_so_on_set_and_deployment() {
    let mut cluster = cluster();
    cluster.refuse_pods = Some("quota exceeded".into());
    cluster.add(deployment("default", "web", 1));
    cluster.settle();
    // The runner plans a failed key again after a while.
    let key = Key::of(&sets_of(&cluster)[0].metadata);
    cluster.edit::<ReplicaSet>(&key, |_| {});
    cluster.settle();
    assert_eq!(
        condition(&cluster, "ReplicaFailure"),
        ("True".into(), "FailedCreate".into())
    );
    cluster.refuse_pods = None;
    cluster.edit::<ReplicaSet>(&key, |_| {});
    cluster.roll_out();
    assert!(rolled_out(&cluster));
    let conditions = found(&cluster)
        .status
        .as_ref()
        .unwrap()
        .conditions
        .as_ref()
        .unwrap();
    assert!(
        conditions
            .iter()
            .all(|condition| condition.type_ != "ReplicaFailure")
    );
}

#[test]
fn a_set_with_another_template_under_the_same_name_is_stepped_around() {
    let mut cluster = cluster();
    let web = deployment("default", "web", 1);
    let hash = pods::template_hash(&web.spec.as_ref().unwrap().template, None);
    cluster.add(set("default", &format!("web-{hash}"), 0));
    cluster.add(web);
    cluster.roll_out();
    assert!(rolled_out(&cluster));
    assert_eq!(
        found(&cluster).status.as_ref().unwrap().collision_count,
        Some(1)
    );
}

#[test]
fn min_ready_seconds_delay_availability() {
    let mut cluster = cluster();
    let mut slow = deployment("default", "web", 1);
    slow.spec.as_mut().unwrap().min_ready_seconds = Some(10);
    cluster.add(slow);
    cluster.roll_out();
    assert!(!rolled_out(&cluster));
    assert_eq!(
        found(&cluster).status.as_ref().unwrap().ready_replicas,
        Some(1)
    );
    cluster.advance(10);
    cluster.settle();
    assert!(rolled_out(&cluster));
}

#[test]
fn an_adopted_set_serves_until_the_slow_new_pods_are_available() {
    let mut cluster = cluster();
    let old = Key::new("default", "web");
    cluster.add(set("default", "web", 1));
    cluster.roll_out();
    let mut slow = deployment("default", "web", 1);
    slow.spec.as_mut().unwrap().min_ready_seconds = Some(10);
    cluster.add(slow);
    set_image(&mut cluster, "none:1");
    cluster.settle();
    set_image(&mut cluster, "good:1");
    let serving = |cluster: &Cluster| replicas(cluster.snapshot.replica_sets.get(&old).unwrap());
    cluster.settle();
    assert_eq!(serving(&cluster), 1, "nothing else is there");
    cluster.roll_out();
    assert_eq!(
        serving(&cluster),
        1,
        "the new pod is ready, not yet available"
    );
    cluster.advance(10);
    cluster.roll_out();
    cluster.advance(10);
    cluster.roll_out();
    assert_eq!(serving(&cluster), 0);
    assert!(rolled_out(&cluster));
}

#[test]
fn a_set_adopts_matching_orphans_and_lets_go_of_pods_that_no_longer_match() {
    let mut cluster = cluster();
    let mut orphan = pod("default", "orphan");
    orphan.metadata.labels = Some([("app".to_string(), "rs".to_string())].into());
    cluster.add(orphan);
    cluster.add(set("default", "rs", 2));
    cluster.roll_out();
    assert_eq!(cluster.snapshot.pods.len(), 2, "the orphan counts");
    let orphan = Key::new("default", "orphan");
    assert!(pods::controller_of(&cluster.snapshot.pods.get(&orphan).unwrap().metadata).is_some());
    cluster.edit::<k8s_openapi::api::core::v1::Pod>(&orphan, |pod| pod.metadata.labels = None);
    cluster.roll_out();
    assert!(pods::controller_of(&cluster.snapshot.pods.get(&orphan).unwrap().metadata).is_none());
    assert_eq!(cluster.snapshot.pods.len(), 3, "a new pod takes its place");
}

#[test]
fn a_smaller_set_gives_up_pods_that_are_worth_least() {
    let mut cluster = cluster();
    cluster.add(set("default", "rs", 4));
    cluster.settle();
    let keys: Vec<Key> = cluster
        .snapshot
        .pods
        .iter()
        .map(|(key, _)| key.clone())
        .collect();
    for key in &keys[1..] {
        cluster.edit::<k8s_openapi::api::core::v1::Pod>(key, |pod| {
            pod.spec.as_mut().unwrap().node_name = Some("n".into())
        });
        cluster.set_ready(key, true);
    }
    cluster.edit::<k8s_openapi::api::core::v1::Pod>(&keys[3], |pod| {
        let cost = (
            "controller.kubernetes.io/pod-deletion-cost".to_string(),
            "-5".to_string(),
        );
        pod.metadata.annotations = Some([cost].into());
    });
    let rs = Key::new("default", "rs");
    cluster.edit::<ReplicaSet>(&rs, |set| set.spec.as_mut().unwrap().replicas = Some(2));
    cluster.settle();
    let left: Vec<&Key> = cluster.snapshot.pods.iter().map(|(key, _)| key).collect();
    assert_eq!(
        left,
        [&keys[1], &keys[2]],
        "the unassigned one and the cheap one go"
    );
}

#[test]
fn a_deleted_deployment_starts_nothing_any_more() {
    let mut cluster = running(2);
    cluster.delete("web", Propagation::Foreground);
    set_image(&mut cluster, "image:2");
    cluster.settle();
    assert_eq!(sets_of(&cluster).len(), 1);
}

#[derive(Clone, Debug)]
enum Step {
    Image(u8),
    Scale(i32),
    PodsReady(usize),
    Controllers(usize),
    Settle,
    Pause(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0u8..4).prop_map(Step::Image),
        (0i32..9).prop_map(Step::Scale),
        (1usize..5).prop_map(Step::PodsReady),
        (1usize..12).prop_map(Step::Controllers),
        Just(Step::Settle),
        any::<bool>().prop_map(Step::Pause),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Templates, scales and readiness change at any moment, also in the middle of a rollout; after each single write the
    /// pods are no more than the largest wish since the last rest with its surge, and the available ones no fewer than
    /// promised for the smallest.
    #[test]
    fn a_rollout_keeps_its_bounds_at_every_step(
        surge in 0i32..4, unavailable in 0i32..4, first in 0i32..8, steps in steps(),
    ) {
        let mut cluster = cluster();
        let mut web = deployment("default", "web", first);
        let spec = web.spec.as_mut().unwrap();
        spec.strategy = serde_json::from_value(json!({
            "type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable},
        })).unwrap();
        cluster.add(web);
        cluster.roll_out();

        // The most pods that any wish since the last rest allows.
        let bound = Rc::new(RefCell::new((first, first)));
        let broken: Rc<RefCell<Option<String>>> = Rc::default();
        let (seen, problem) = (bound.clone(), broken.clone());
        let unavailable_max = if surge == 0 && unavailable == 0 { 1 } else { unavailable };
        cluster.check = Some(Box::new(move |snapshot: &Snapshot| {
            let (lowest, highest) = *seen.borrow();
            let active = snapshot.pods.values().filter(|pod| pods::is_active(pod)).count() as i32;
            let ready = snapshot.pods.values().filter(|pod| pods::is_active(pod) && pods::is_ready(pod)).count() as i32;
            if active > highest + surge {
                *problem.borrow_mut() = Some(format!("{active} pods, allowed {highest} + {surge}"));
            }
            // Pods become ready and never fail here, so only a change of the wish may leave fewer available than promised.
            if ready < lowest - unavailable_max {
                *problem.borrow_mut() = Some(format!("{ready} available, promised {lowest} - {unavailable_max}"));
            }
        }));
        for step in steps {
            match step {
                Step::Image(image) => set_image(&mut cluster, &format!("image:{image}")),
                Step::Scale(wished) => {
                    let ready = cluster.snapshot.pods.values()
                        .filter(|pod| pods::is_active(pod) && pods::is_ready(pod)).count() as i32;
                    {
                        let mut bound = bound.borrow_mut();
                        bound.0 = bound.0.min(wished).min(ready);
                        bound.1 = bound.1.max(wished);
                    }
                    edit(&mut cluster, |spec| spec.replicas = Some(wished));
                }
                Step::PodsReady(count) => {
                    let waiting: Vec<Key> = cluster.snapshot.pods.iter()
                        .filter(|(_, pod)| pods::is_active(pod) && !pods::is_ready(pod))
                        .map(|(key, _)| key.clone()).take(count).collect();
                    for key in waiting {
                        cluster.set_ready(&key, true);
                    }
                }
                Step::Controllers(count) => for _ in 0..count { cluster.step(); },
                Step::Settle => {
                    cluster.settle();
                    if rolled_out(&cluster) {
                        let wished = found(&cluster).spec.as_ref().unwrap().replicas.unwrap();
                        *bound.borrow_mut() = (wished, wished);
                    }
                }
                Step::Pause(paused) => edit(&mut cluster, |spec| spec.paused = Some(paused)),
            }
            prop_assert!(broken.borrow().is_none(), "{:?}", broken.borrow());
        }
        // Whatever happened, it ends where the wish is.
        edit(&mut cluster, |spec| spec.paused = None);
        cluster.roll_out();
        prop_assert!(broken.borrow().is_none(), "{:?}", broken.borrow());
        prop_assert!(rolled_out(&cluster), "{:?}", found(&cluster).status);
        let wished = found(&cluster).spec.as_ref().unwrap().replicas.unwrap();
        prop_assert_eq!(cluster.snapshot.pods.len() as i32, wished);
    }
}
