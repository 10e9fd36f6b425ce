//! CronJobs in a cluster in memory.

use k8s_openapi::api::batch::v1::{CronJob, CronJobStatus, Job};
use serde_json::{Value, json};

use super::super::object::Key;
use super::super::plan::Controller;
use super::super::testing::{Cluster, namespace};
use super::SCHEDULED_AT;

const CONTROLLERS: &[Controller] = &[super::CONTROLLER];

fn key() -> Key {
    Key::new("default", "tick")
}

/// A CronJob of every minute, made at midnight.
fn cluster(spec: Value) -> Cluster {
    let mut cluster = Cluster::new(CONTROLLERS);
    cluster.add(namespace("default"));
    let mut value = json!({
        "metadata": {"namespace": "default", "name": "tick"},
        "spec": {
            "schedule": "* * * * *", "concurrencyPolicy": "Allow", "suspend": false,
            "successfulJobsHistoryLimit": 3, "failedJobsHistoryLimit": 1,
            "jobTemplate": {
                "metadata": {"labels": {"made": "by-tick"}},
                "spec": {"template": {"spec": {"containers": [{"name": "main", "image": "image"}]}}},
            },
        },
    });
    json_patch::merge(&mut value, &json!({"spec": spec}));
    cluster.add::<CronJob>(serde_json::from_value(value).unwrap());
    cluster.settle();
    cluster
}

fn status(cluster: &Cluster) -> CronJobStatus {
    let cron = cluster.snapshot.cron_jobs.get(&key()).unwrap();
    cron.status.clone().unwrap_or_default()
}

fn names(cluster: &Cluster) -> Vec<String> {
    cluster
        .snapshot
        .jobs
        .iter()
        .map(|(key, _)| key.name.to_string())
        .collect()
}

fn pass(cluster: &mut Cluster, seconds: i64) {
    cluster.advance(seconds);
    cluster.settle();
}

/// Lets every running Job end.
fn end_all(cluster: &mut Cluster, condition: &str) {
    let time = cluster.time();
    let keys: Vec<_> = cluster
        .snapshot
        .jobs
        .iter()
        .map(|(key, _)| key.clone())
        .collect();
    for key in keys {
        cluster.edit::<Job>(&key, |job| {
            let status = job.status.get_or_insert_default();
            if status.conditions.is_none() {
                status.conditions = Some(vec![
                    serde_json::from_value(json!({
                        "type": condition, "status": "True", "lastTransitionTime": time,
                    }))
                    .unwrap(),
                ]);
                status.completion_time = (condition == "Complete").then(|| time.clone());
            }
        });
    }
    cluster.settle();
}

fn reasons(cluster: &Cluster) -> Vec<&'static str> {
    cluster.notes.iter().map(|note| note.reason).collect()
}

#[test]
fn a_job_is_made_each_time_and_named_after_it() {
    let mut cluster = cluster(json!({}));
    assert!(names(&cluster).is_empty());
    pass(&mut cluster, 60);
    assert_eq!(names(&cluster), ["tick-29453761"]);
    let job = cluster.snapshot.jobs.values().next().unwrap().clone();
    assert_eq!(job.metadata.labels.as_ref().unwrap()["made"], "by-tick");
    assert_eq!(
        job.metadata.annotations.as_ref().unwrap()[SCHEDULED_AT],
        "2026-01-01T00:01:00Z"
    );
    assert_eq!(status(&cluster).last_schedule_time, Some(cluster.time()));
    assert_eq!(status(&cluster).active.unwrap().len(), 1);
    pass(&mut cluster, 60);
    assert_eq!(
        names(&cluster).len(),
        2,
        "the first still runs, which is allowed"
    );
    end_all(&mut cluster, "Complete");
    assert_eq!(status(&cluster).active, None);
    assert_eq!(status(&cluster).last_successful_time, Some(cluster.time()));
    assert!(reasons(&cluster).contains(&"SawCompletedJob"));
}

#[test]
fn of_missed_times_only_the_last_one_is_made_up_for() {
    let mut cluster = cluster(json!({}));
    pass(&mut cluster, 5 * 60 + 20);
    assert_eq!(names(&cluster), ["tick-29453765"]);
    let mut late = self::cluster(json!({"schedule": "0 * * * *", "startingDeadlineSeconds": 30}));
    pass(&mut late, 3600 + 31);
    assert!(names(&late).is_empty(), "too late to start");
    let mut many = self::cluster(json!({}));
    pass(&mut many, 200 * 60);
    assert_eq!(names(&many).len(), 1);
    assert!(reasons(&many).contains(&"TooManyMissedTimes"));
}

#[test]
fn a_running_job_forbids_or_is_replaced_as_the_policy_says() {
    let mut forbids = cluster(json!({"concurrencyPolicy": "Forbid"}));
    pass(&mut forbids, 60);
    pass(&mut forbids, 60);
    assert_eq!(names(&forbids), ["tick-29453761"]);
    assert!(reasons(&forbids).contains(&"JobAlreadyActive"));
    end_all(&mut forbids, "Complete");
    assert_eq!(
        names(&forbids),
        ["tick-29453761", "tick-29453762"],
        "made up for at once"
    );

    let mut replaces = cluster(json!({"concurrencyPolicy": "Replace"}));
    pass(&mut replaces, 60);
    pass(&mut replaces, 60);
    assert_eq!(names(&replaces), ["tick-29453762"]);
    assert_eq!(status(&replaces).active.unwrap().len(), 1);
}

#[test]
fn history_is_limited() {
    let mut cluster =
        cluster(json!({"successfulJobsHistoryLimit": 2, "failedJobsHistoryLimit": 0}));
    for _ in 0..4 {
        pass(&mut cluster, 60);
        end_all(&mut cluster, "Complete");
    }
    assert_eq!(names(&cluster), ["tick-29453763", "tick-29453764"]);
    pass(&mut cluster, 60);
    end_all(&mut cluster, "Failed");
    assert_eq!(names(&cluster), ["tick-29453763", "tick-29453764"]);
}

#[test]
fn a_suspended_or_unreadable_schedule_starts_nothing() {
    let mut suspended = cluster(json!({"suspend": true}));
    pass(&mut suspended, 600);
    assert!(names(&suspended).is_empty());
    let mut unreadable = cluster(json!({"schedule": "at noon"}));
    pass(&mut unreadable, 600);
    assert!(names(&unreadable).is_empty());
    assert!(reasons(&unreadable).contains(&"UnparseableSchedule"));
}

#[test]
fn a_job_that_was_deleted_by_hand_is_told_of_and_not_made_again() {
    let mut cluster = cluster(json!({}));
    pass(&mut cluster, 60);
    cluster.delete_now("tick-29453761");
    cluster.settle();
    assert!(names(&cluster).is_empty());
    assert_eq!(status(&cluster).active, None);
    assert!(reasons(&cluster).contains(&"MissingJob"));
}
