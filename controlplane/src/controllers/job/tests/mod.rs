//! Jobs in a cluster in memory.

mod counted;

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::batch::v1::{Job, JobStatus};
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodCondition, PodStatus,
};
use serde_json::{Value, json};

use crate::controllers::job::facts::{self, INDEX, TRACKING};
use crate::controllers::object::Key;
use crate::controllers::plan::{Controller, Propagation};
use crate::controllers::pods;
use crate::controllers::testing::{Cluster, namespace};
use crate::controllers::{garbage, job_ttl};

const CONTROLLERS: &[Controller] = &[
    crate::controllers::job::CONTROLLER,
    job_ttl::CONTROLLER,
    garbage::CONTROLLER,
];

fn key() -> Key {
    Key::new("default", "sum")
}

/// A Job as the API server stores it, with `spec` over the defaults.
fn cluster(spec: Value) -> Cluster {
    let mut cluster = Cluster::new(CONTROLLERS);
    cluster.hold_pods = true;
    cluster.add(namespace("default"));
    let mut value = json!({
        "metadata": {"namespace": "default", "name": "sum"},
        "spec": {
            "parallelism": 1, "completions": 1, "backoffLimit": 6, "completionMode": "NonIndexed", "suspend": false,
            "podReplacementPolicy": "TerminatingOrFailed",
            "selector": {"matchLabels": {"job-name": "sum"}},
            "template": {
                "metadata": {"labels": {"job-name": "sum"}},
                "spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "image"}]},
            },
        },
    });
    json_patch::merge(&mut value, &json!({"spec": spec}));
    cluster.add::<Job>(serde_json::from_value(value).unwrap());
    cluster.settle();
    cluster
}

fn job(cluster: &Cluster) -> Arc<Job> {
    cluster.snapshot.jobs.get(&key()).unwrap().clone()
}

fn status(cluster: &Cluster) -> JobStatus {
    job(cluster).status.clone().unwrap_or_default()
}

fn active(cluster: &Cluster) -> Vec<Arc<Pod>> {
    let pods = cluster.snapshot.pods.values();
    pods.filter(|pod| pods::is_active(pod)).cloned().collect()
}

fn indexes(cluster: &Cluster) -> BTreeSet<i32> {
    active(cluster)
        .iter()
        .filter_map(|pod| facts::index_of(pod))
        .collect()
}

fn of_index(cluster: &Cluster, index: i32) -> Arc<Pod> {
    let mut pods = active(cluster);
    pods.retain(|pod| facts::index_of(pod) == Some(index));
    pods.pop()
        .unwrap_or_else(|| panic!("no pod of index {index}"))
}

/// Lets a pod end with an exit code, as its kubelet reports it.
fn end(cluster: &mut Cluster, pod: &Pod, exit_code: i32) {
    let now = cluster.time();
    cluster.edit::<Pod>(&Key::of(&pod.metadata), |pod| {
        let phase = if exit_code == 0 {
            "Succeeded"
        } else {
            "Failed"
        };
        pod.status = Some(PodStatus {
            phase: Some(phase.into()),
            container_statuses: Some(vec![ContainerStatus {
                name: "main".into(),
                state: Some(ContainerState {
                    terminated: Some(ContainerStateTerminated {
                        exit_code,
                        finished_at: Some(now),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }]),
            ..Default::default()
        });
    });
}

fn end_one(cluster: &mut Cluster, exit_code: i32) {
    let pod = active(cluster).pop().expect("an active pod");
    end(cluster, &pod, exit_code);
    cluster.settle();
}

fn conditions(cluster: &Cluster) -> Vec<(String, String)> {
    let conditions = status(cluster).conditions.unwrap_or_default();
    conditions
        .into_iter()
        .filter(|condition| condition.status == "True")
        .map(|condition| (condition.type_, condition.reason.unwrap_or_default()))
        .collect()
}

fn pair(type_: &str, reason: &str) -> (String, String) {
    (type_.into(), reason.into())
}

fn events(cluster: &Cluster) -> Vec<&'static str> {
    cluster.notes.iter().map(|note| note.reason).collect()
}

#[test]
fn a_job_runs_to_completion_within_its_parallelism() {
    let mut cluster = cluster(json!({"completions": 3, "parallelism": 2}));
    assert_eq!(active(&cluster).len(), 2);
    assert!(status(&cluster).start_time.is_some());
    assert!(active(&cluster).iter().all(|pod| facts::is_tracked(pod)));
    end_one(&mut cluster, 0);
    assert_eq!(active(&cluster).len(), 2);
    end_one(&mut cluster, 0);
    assert_eq!(active(&cluster).len(), 1, "only one is still to do");
    end_one(&mut cluster, 0);
    let status = status(&cluster);
    assert_eq!(
        (status.succeeded, status.active, status.failed),
        (Some(3), Some(0), Some(0))
    );
    assert_eq!(
        conditions(&cluster),
        [
            pair("SuccessCriteriaMet", "CompletionsReached"),
            pair("Complete", "CompletionsReached")
        ]
    );
    assert!(status.completion_time.is_some());
    let uncounted = status.uncounted_terminated_pods.unwrap();
    assert_eq!((uncounted.succeeded, uncounted.failed), (None, None));
    assert!(
        cluster
            .snapshot
            .pods
            .values()
            .all(|pod| !facts::is_tracked(pod))
    );
    assert!(events(&cluster).contains(&"Completed"));
}

#[test]
fn a_failed_pod_is_replaced_after_a_while_that_doubles() {
    let mut cluster = cluster(json!({}));
    for wait in [10, 20, 40] {
        end_one(&mut cluster, 1);
        cluster.advance(wait - 1);
        cluster.settle();
        assert_eq!(active(&cluster).len(), 0, "{wait} s are not over");
        cluster.advance(1);
        cluster.settle();
        assert_eq!(active(&cluster).len(), 1, "after {wait} s");
    }
    assert_eq!(status(&cluster).failed, Some(3));
}

#[test]
fn too_many_failures_end_the_job_and_stop_what_runs() {
    let mut cluster = cluster(json!({"parallelism": 3, "completions": 3, "backoffLimit": 0}));
    end_one(&mut cluster, 1);
    assert_eq!(
        conditions(&cluster),
        [pair("FailureTarget", "BackoffLimitExceeded")]
    );
    assert_eq!(status(&cluster).terminating, Some(2));
    cluster.finish_pods();
    cluster.settle();
    assert_eq!(
        conditions(&cluster),
        [
            pair("FailureTarget", "BackoffLimitExceeded"),
            pair("Failed", "BackoffLimitExceeded")
        ]
    );
    let status = status(&cluster);
    assert_eq!(
        (status.active, status.terminating, status.failed),
        (Some(0), Some(0), Some(3))
    );
    assert!(status.completion_time.is_none());
    assert!(events(&cluster).contains(&"BackoffLimitExceeded"));
}

#[test]
fn restarts_in_place_count_as_failures() {
    let mut cluster = cluster(json!({
        "backoffLimit": 2, "template": {"spec": {"restartPolicy": "OnFailure"}},
    }));
    let pod = active(&cluster).pop().unwrap();
    cluster.edit::<Pod>(&Key::of(&pod.metadata), |pod| {
        pod.status = serde_json::from_value(json!({"phase": "Running", "containerStatuses": [
            {"name": "main", "image": "i", "imageID": "", "ready": false, "restartCount": 2}]}))
        .unwrap();
    });
    cluster.settle();
    assert_eq!(
        conditions(&cluster),
        [pair("FailureTarget", "BackoffLimitExceeded")]
    );
}

#[test]
fn a_job_without_completions_is_done_when_one_has_succeeded_and_none_runs() {
    let mut cluster = cluster(json!({"completions": null, "parallelism": 2}));
    assert_eq!(active(&cluster).len(), 2);
    end_one(&mut cluster, 0);
    assert_eq!(active(&cluster).len(), 1, "nothing new is started");
    assert!(conditions(&cluster).is_empty());
    end_one(&mut cluster, 0);
    assert_eq!(conditions(&cluster).len(), 2);
    assert_eq!(status(&cluster).succeeded, Some(2));
}

#[test]
fn the_deadline_ends_a_job() {
    let mut cluster = cluster(json!({"activeDeadlineSeconds": 30}));
    cluster.advance(29);
    cluster.settle();
    assert_eq!(active(&cluster).len(), 1);
    cluster.advance(1);
    cluster.settle();
    assert_eq!(
        conditions(&cluster),
        [pair("FailureTarget", "DeadlineExceeded")]
    );
    cluster.finish_pods();
    cluster.settle();
    assert_eq!(conditions(&cluster)[1], pair("Failed", "DeadlineExceeded"));
}

#[test]
fn suspending_stops_pods_without_counting_them_and_resuming_starts_the_clock_again() {
    let mut cluster = cluster(json!({"parallelism": 2, "completions": 2, "backoffLimit": 0}));
    cluster.edit::<Job>(&key(), |job| {
        job.spec.as_mut().unwrap().suspend = Some(true)
    });
    cluster.settle();
    assert_eq!(active(&cluster).len(), 0);
    cluster.finish_pods();
    cluster.settle();
    assert_eq!(conditions(&cluster), [pair("Suspended", "JobSuspended")]);
    assert_eq!(status(&cluster).failed, Some(0));
    cluster.advance(60);
    cluster.edit::<Job>(&key(), |job| {
        job.spec.as_mut().unwrap().suspend = Some(false)
    });
    cluster.settle();
    assert_eq!(active(&cluster).len(), 2);
    let status = status(&cluster);
    assert_eq!(status.start_time, Some(cluster.time()));
    let suspended = status.conditions.unwrap().remove(0);
    assert_eq!(
        (&*suspended.status, suspended.reason.as_deref()),
        ("False", Some("JobResumed"))
    );
    assert_eq!(
        events(&cluster)
            .iter()
            .filter(|reason| ["Suspended", "Resumed"].contains(reason))
            .count(),
        2
    );
}

#[test]
fn an_indexed_job_runs_each_index_to_success() {
    let mut cluster = cluster(json!({
        "completionMode": "Indexed", "completions": 4, "parallelism": 3,
    }));
    assert_eq!(indexes(&cluster), [0, 1, 2].into());
    let pod = of_index(&cluster, 1);
    assert_eq!(pod.metadata.annotations.as_ref().unwrap()[INDEX], "1");
    assert_eq!(pod.metadata.labels.as_ref().unwrap()[INDEX], "1");
    assert!(pod.metadata.name.as_ref().unwrap().starts_with("sum-1-"));
    let spec = pod.spec.as_ref().unwrap();
    assert_eq!(spec.hostname.as_deref(), Some("sum-1"));
    assert_eq!(
        spec.containers[0].env.as_ref().unwrap()[0].name,
        "JOB_COMPLETION_INDEX"
    );
    for index in [2, 0] {
        let pod = of_index(&cluster, index);
        end(&mut cluster, &pod, 0);
        cluster.settle();
    }
    assert_eq!(status(&cluster).completed_indexes.as_deref(), Some("0,2"));
    assert_eq!(indexes(&cluster), [1, 3].into());
    let pod = of_index(&cluster, 1);
    end(&mut cluster, &pod, 1);
    cluster.advance(10);
    cluster.settle();
    assert_eq!(
        indexes(&cluster),
        [1, 3].into(),
        "a failed index is tried again"
    );
    for index in [1, 3] {
        let pod = of_index(&cluster, index);
        end(&mut cluster, &pod, 0);
        cluster.settle();
    }
    let status = status(&cluster);
    assert_eq!(status.completed_indexes.as_deref(), Some("0-3"));
    assert_eq!((status.succeeded, status.failed), (Some(4), Some(1)));
    assert_eq!(conditions(&cluster).len(), 2);
}

#[test]
fn an_index_has_its_own_limit_of_attempts() {
    let mut cluster = cluster(json!({
        "completionMode": "Indexed", "completions": 2, "parallelism": 2, "backoffLimitPerIndex": 1,
        "backoffLimit": i32::MAX,
    }));
    let pod = of_index(&cluster, 0);
    end(&mut cluster, &pod, 1);
    cluster.settle();
    assert_eq!(indexes(&cluster), [1].into(), "index 0 waits");
    cluster.advance(10);
    cluster.settle();
    let again = of_index(&cluster, 0);
    assert_eq!(facts::number(&again, facts::FAILURES), 1);
    assert_eq!(status(&cluster).failed, Some(1));
    end(&mut cluster, &again, 1);
    cluster.settle();
    assert_eq!(status(&cluster).failed_indexes.as_deref(), Some("0"));
    assert_eq!(indexes(&cluster), [1].into());
    let pod = of_index(&cluster, 1);
    end(&mut cluster, &pod, 0);
    cluster.settle();
    assert_eq!(
        conditions(&cluster),
        [
            pair("FailureTarget", "FailedIndexes"),
            pair("Failed", "FailedIndexes")
        ]
    );
    let status = status(&cluster);
    assert_eq!(status.completed_indexes.as_deref(), Some("1"));
    assert_eq!((status.succeeded, status.failed), (Some(1), Some(2)));
}

#[test]
fn too_many_failed_indexes_end_the_job_early() {
    let mut cluster = cluster(json!({
        "completionMode": "Indexed", "completions": 4, "parallelism": 4, "backoffLimitPerIndex": 0,
        "maxFailedIndexes": 1, "backoffLimit": i32::MAX,
    }));
    for index in [0, 1] {
        let pod = of_index(&cluster, index);
        end(&mut cluster, &pod, 1);
        cluster.settle();
    }
    assert_eq!(
        conditions(&cluster),
        [pair("FailureTarget", "MaxFailedIndexesExceeded")]
    );
    cluster.finish_pods();
    cluster.settle();
    assert_eq!(
        conditions(&cluster)[1],
        pair("Failed", "MaxFailedIndexesExceeded")
    );
    assert_eq!(status(&cluster).failed_indexes.as_deref(), Some("0-3"));
}

#[test]
fn the_failure_policy_says_what_a_failure_means() {
    let policy = |action: &str| {
        json!({
            "podReplacementPolicy": "Failed", "backoffLimit": 0,
            "podFailurePolicy": {"rules": [
                {"action": action, "onExitCodes": {"operator": "In", "values": [42]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]},
        })
    };
    let mut ends = cluster(policy("FailJob"));
    end_one(&mut ends, 42);
    assert_eq!(conditions(&ends)[1], pair("Failed", "PodFailurePolicy"));
    let message = status(&ends).conditions.unwrap().remove(0).message.unwrap();
    assert!(
        message.starts_with("Container main for pod default/sum-")
            && message.ends_with("failed with exit code 42 matching FailJob rule at index 0"),
        "{message}"
    );

    let mut ignores = cluster(policy("Ignore"));
    end_one(&mut ignores, 42);
    assert!(conditions(&ignores).is_empty());
    assert_eq!(status(&ignores).failed, Some(0));

    let mut disrupted = cluster(policy("FailJob"));
    let pod = active(&disrupted).pop().unwrap();
    end(&mut disrupted, &pod, 137);
    disrupted.edit::<Pod>(&Key::of(&pod.metadata), |pod| {
        pod.status.as_mut().unwrap().conditions = Some(vec![PodCondition {
            type_: "DisruptionTarget".into(),
            status: "True".into(),
            ..Default::default()
        }]);
    });
    disrupted.settle();
    assert!(
        conditions(&disrupted).is_empty(),
        "a disruption is no failure"
    );

    let mut counts = cluster(policy("FailJob"));
    end_one(&mut counts, 1);
    assert_eq!(
        conditions(&counts)[1],
        pair("Failed", "BackoffLimitExceeded")
    );
}

#[test]
fn a_success_policy_ends_a_job_before_all_indexes_have_succeeded() {
    let mut cluster = cluster(json!({
        "completionMode": "Indexed", "completions": 3, "parallelism": 3,
        "successPolicy": {"rules": [{"succeededIndexes": "1-2", "succeededCount": 1}]},
    }));
    let pod = of_index(&cluster, 0);
    end(&mut cluster, &pod, 0);
    cluster.settle();
    assert!(conditions(&cluster).is_empty());
    let pod = of_index(&cluster, 2);
    end(&mut cluster, &pod, 0);
    cluster.settle();
    assert_eq!(
        conditions(&cluster),
        [pair("SuccessCriteriaMet", "SuccessPolicy")]
    );
    cluster.finish_pods();
    cluster.settle();
    assert_eq!(conditions(&cluster)[1], pair("Complete", "SuccessPolicy"));
    assert_eq!(status(&cluster).completed_indexes.as_deref(), Some("0,2"));
}

#[test]
fn a_deleted_pod_is_replaced_when_the_policy_says_so() {
    for (policy, while_terminating) in [("TerminatingOrFailed", 1), ("Failed", 0)] {
        let mut cluster = cluster(json!({"podReplacementPolicy": policy}));
        let pod = active(&cluster).pop().unwrap();
        cluster.delete(pod.metadata.name.as_ref().unwrap(), Propagation::Background);
        cluster.settle();
        assert_eq!(active(&cluster).len(), while_terminating, "{policy}");
        end(&mut cluster, &pod, 143);
        cluster.advance(10);
        cluster.settle();
        assert_eq!(active(&cluster).len(), 1, "{policy}");
        assert_eq!(status(&cluster).failed, Some(1), "{policy}");
    }
}

#[test]
fn an_ended_job_goes_after_its_time_with_its_pods() {
    let mut cluster = cluster(json!({"ttlSecondsAfterFinished": 60}));
    end_one(&mut cluster, 0);
    cluster.advance(59);
    cluster.settle();
    assert!(cluster.snapshot.jobs.contains(&key()));
    cluster.advance(1);
    cluster.settle();
    cluster.finish_pods();
    cluster.settle();
    assert!(!cluster.snapshot.jobs.contains(&key()));
    assert!(cluster.snapshot.pods.is_empty());
}

#[test]
fn a_deleted_job_holds_no_pod() {
    for propagation in [
        Propagation::Background,
        Propagation::Foreground,
        Propagation::Orphan,
    ] {
        let mut cluster = cluster(json!({"parallelism": 2, "completions": 2}));
        cluster.delete("sum", propagation);
        cluster.settle();
        assert!(
            cluster.snapshot.pods.values().all(|pod| !pod
                .metadata
                .finalizers
                .iter()
                .flatten()
                .any(|held| held == TRACKING)),
            "{propagation:?}"
        );
        cluster.finish_pods();
        cluster.settle();
        assert!(!cluster.snapshot.jobs.contains(&key()), "{propagation:?}");
    }
}

#[test]
fn a_job_of_another_manager_is_left_alone() {
    let cluster = cluster(json!({"managedBy": "acme.io/jobs"}));
    assert!(cluster.snapshot.pods.is_empty());
    assert!(job(&cluster).status.is_none());
}
