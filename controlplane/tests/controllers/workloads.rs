//! Workloads that run to an end, in an order or on a schedule, against the API server, as a user sees them.

use std::collections::BTreeSet;

use crate::cluster::Cluster;
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::{
    Endpoints, Event, PersistentVolumeClaim, Pod, ReplicationController, Service,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

fn object<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

fn create() -> PostParams {
    PostParams::default()
}

/// A Job whose pods end at once with the exit code.
fn job(name: &str, exit_code: i32, spec: Value) -> Job {
    let mut value = json!({
        "metadata": {"name": name},
        "spec": {"template": {"spec": {
            "restartPolicy": "Never",
            "containers": [{"name": "main", "image": "image", "command": ["exit", exit_code.to_string()]}],
        }}},
    });
    json_patch::merge(&mut value, &json!({"spec": spec}));
    object(value)
}

async fn conditions(jobs: &Api<Job>, name: &str) -> Vec<(String, String)> {
    let found = jobs.get(name).await.ok().and_then(|job| job.status);
    let conditions = found
        .and_then(|status| status.conditions)
        .unwrap_or_default();
    conditions
        .into_iter()
        .filter(|condition| condition.status == "True")
        .map(|condition| (condition.type_, condition.reason.unwrap_or_default()))
        .collect()
}

async fn has(jobs: &Api<Job>, name: &str, type_: &str) -> bool {
    conditions(jobs, name)
        .await
        .iter()
        .any(|(found, _)| found == type_)
}

fn of_job(name: &str) -> ListParams {
    ListParams::default().labels(&format!("batch.kubernetes.io/job-name={name}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_run_to_their_end_and_count_every_pod() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(2).await;
    let jobs: Api<Job> = cluster.api("default");
    let pods: Api<Pod> = cluster.api("default");
    let made = jobs
        .create(
            &create(),
            &job("sum", 0, json!({"completions": 5, "parallelism": 2})),
        )
        .await
        .unwrap();
    let uid = made.metadata.uid.unwrap();
    let selector = made.spec.unwrap().selector.unwrap().match_labels.unwrap();
    assert_eq!(selector["batch.kubernetes.io/controller-uid"], uid);
    cluster
        .eventually("the Job is complete", async || {
            has(&jobs, "sum", "Complete").await
        })
        .await;
    let status = jobs.get("sum").await.unwrap().status.unwrap();
    assert_eq!(
        (
            status.succeeded,
            status.failed.unwrap_or(0),
            status.active.unwrap_or(0)
        ),
        (Some(5), 0, 0)
    );
    assert!(status.start_time.is_some() && status.completion_time.is_some());
    let list = pods.list(&of_job("sum")).await.unwrap().items;
    assert_eq!(list.len(), 5);
    assert!(
        list.iter()
            .all(|pod| pod.metadata.finalizers.iter().flatten().next().is_none())
    );

    let indexed = json!({"completions": 3, "parallelism": 3, "completionMode": "Indexed"});
    jobs.create(&create(), &job("indexed", 0, indexed))
        .await
        .unwrap();
    cluster
        .eventually("every index has completed", async || {
            has(&jobs, "indexed", "Complete").await
        })
        .await;
    let status = jobs.get("indexed").await.unwrap().status.unwrap();
    assert_eq!(status.completed_indexes.as_deref(), Some("0-2"));
    let names: BTreeSet<_> = pods
        .list(&of_job("indexed"))
        .await
        .unwrap()
        .items
        .into_iter()
        .map(|pod| pod.spec.unwrap().hostname.unwrap())
        .collect();
    assert_eq!(
        names,
        ["indexed-0", "indexed-1", "indexed-2"]
            .map(String::from)
            .into()
    );

    jobs.create(&create(), &job("fails", 3, json!({"backoffLimit": 0})))
        .await
        .unwrap();
    cluster
        .eventually("the Job has failed", async || {
            has(&jobs, "fails", "Failed").await
        })
        .await;
    let expected = [
        ("FailureTarget", "BackoffLimitExceeded"),
        ("Failed", "BackoffLimitExceeded"),
    ];
    let expected: Vec<_> = expected.map(|(a, b)| (a.to_string(), b.to_string())).into();
    assert_eq!(conditions(&jobs, "fails").await, expected);

    let policy = json!({"podFailurePolicy": {"rules": [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [3]}}]}});
    jobs.create(&create(), &job("policy", 3, policy))
        .await
        .unwrap();
    cluster
        .eventually("its rule has failed the Job", async || {
            conditions(&jobs, "policy")
                .await
                .contains(&("Failed".into(), "PodFailurePolicy".into()))
        })
        .await;

    jobs.create(
        &create(),
        &job("brief", 0, json!({"ttlSecondsAfterFinished": 1})),
    )
    .await
    .unwrap();
    cluster
        .eventually("the Job went after its time, with its pods", async || {
            matches!(jobs.get_opt("brief").await, Ok(None))
                && pods
                    .list(&of_job("brief"))
                    .await
                    .is_ok_and(|list| list.items.is_empty())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_suspended_resumed_and_deleted_with_their_pods() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(1).await;
    let jobs: Api<Job> = cluster.api("default");
    let pods: Api<Pod> = cluster.api("default");
    // Its pods run until they are stopped.
    let spec = json!({
        "parallelism": 2, "completions": 2, "backoffLimit": 0,
        "template": {"spec": {"containers": [{"name": "main", "image": "image"}]}},
    });
    jobs.create(&create(), &job("waits", 0, spec))
        .await
        .unwrap();
    let active = async || {
        let status = jobs.get("waits").await.ok().and_then(|job| job.status);
        status.and_then(|status| status.active).unwrap_or(0)
    };
    let ready = async || {
        let status = jobs.get("waits").await.ok().and_then(|job| job.status);
        status.and_then(|status| status.ready).unwrap_or(0)
    };
    cluster
        .eventually("two run", async || ready().await == 2)
        .await;
    let suspend = |suspend: bool| Patch::Merge(json!({"spec": {"suspend": suspend}}));
    jobs.patch("waits", &PatchParams::default(), &suspend(true))
        .await
        .unwrap();
    cluster
        .eventually("none runs any more", async || {
            active().await == 0
                && has(&jobs, "waits", "Suspended").await
                && pods
                    .list(&of_job("waits"))
                    .await
                    .is_ok_and(|list| list.items.is_empty())
        })
        .await;
    jobs.patch("waits", &PatchParams::default(), &suspend(false))
        .await
        .unwrap();
    cluster
        .eventually("two run again", async || ready().await == 2)
        .await;
    assert_eq!(conditions(&jobs, "waits").await, []);
    jobs.delete("waits", &DeleteParams::background())
        .await
        .unwrap();
    cluster
        .eventually(
            "its pods are gone, though they were not counted",
            async || {
                pods.list(&of_job("waits"))
                    .await
                    .is_ok_and(|list| list.items.is_empty())
            },
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cron_job_starts_jobs_and_keeps_few() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(1).await;
    let crons: Api<CronJob> = cluster.api("default");
    let jobs: Api<Job> = cluster.api("default");
    let template = json!({"spec": job("unused", 0, json!({})).spec});
    let cron = json!({
        "metadata": {"name": "tick"},
        "spec": {"schedule": "@every 1s", "successfulJobsHistoryLimit": 2, "jobTemplate": template},
    });
    crons.create(&create(), &object(cron)).await.unwrap();
    cluster
        .eventually("one has succeeded", async || {
            let status = crons.get("tick").await.ok().and_then(|cron| cron.status);
            status.is_some_and(|status| {
                status.last_schedule_time.is_some() && status.last_successful_time.is_some()
            })
        })
        .await;
    let events: Api<Event> = cluster.api("default");
    cluster
        .eventually("old ones are deleted", async || {
            let list = events
                .list(&ListParams::default())
                .await
                .map(|list| list.items);
            list.unwrap_or_default().iter().any(|event| {
                event.reason.as_deref() == Some("SuccessfulDelete")
                    && event.involved_object.kind.as_deref() == Some("CronJob")
            })
        })
        .await;
    let suspend = Patch::Merge(json!({"spec": {"suspend": true}}));
    crons
        .patch("tick", &PatchParams::default(), &suspend)
        .await
        .unwrap();
    cluster
        .eventually("none runs, two are kept", async || {
            let list = jobs
                .list(&ListParams::default())
                .await
                .map(|list| list.items);
            let status = crons.get("tick").await.ok().and_then(|cron| cron.status);
            list.is_ok_and(|list| list.len() == 2)
                && status.is_some_and(|status| status.active.is_none())
        })
        .await;
    let wrong = json!({
        "metadata": {"name": "wrong"}, "spec": {"schedule": "at noon", "jobTemplate": {"spec": job("x", 0, json!({})).spec}},
    });
    let error = crons.create(&create(), &object(wrong)).await.unwrap_err();
    assert!(error.to_string().contains("spec.schedule"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stateful_set_comes_up_in_order_rolls_and_keeps_its_claims() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(2).await;
    let sets: Api<StatefulSet> = cluster.api("default");
    let pods: Api<Pod> = cluster.api("default");
    let claims: Api<PersistentVolumeClaim> = cluster.api("default");
    let set = json!({
        "metadata": {"name": "db"},
        "spec": {
            "replicas": 3, "serviceName": "db", "selector": {"matchLabels": {"app": "db"}},
            "template": {
                "metadata": {"labels": {"app": "db"}},
                "spec": {"containers": [{"name": "main", "image": "image:1"}]},
            },
        },
    });
    sets.create(&create(), &object(set)).await.unwrap();
    let rolled = async |name: &str, generation: i64, replicas: i32| {
        let status = sets.get(name).await.ok().and_then(|set| set.status);
        status.is_some_and(|status| {
            status.observed_generation == Some(generation)
                && status.replicas == replicas
                && status.available_replicas == Some(replicas)
                && status.updated_replicas == Some(replicas)
                && status.current_revision == status.update_revision
        })
    };
    cluster
        .eventually("three pods run", async || rolled("db", 1, 3).await)
        .await;
    let list = pods
        .list(&ListParams::default().labels("app=db"))
        .await
        .unwrap()
        .items;
    let mut made: Vec<_> = list
        .iter()
        .map(|pod| {
            (
                pod.metadata.creation_timestamp.clone(),
                pod.metadata.name.clone().unwrap(),
            )
        })
        .collect();
    made.sort();
    let order: Vec<_> = made.into_iter().map(|(_, name)| name).collect();
    assert_eq!(order, ["db-0", "db-1", "db-2"]);
    let image = json!({"spec": {"template": {"spec": {"containers": [{"name": "main", "image": "image:2"}]}}}});
    sets.patch("db", &PatchParams::default(), &Patch::Strategic(image))
        .await
        .unwrap();
    cluster
        .eventually("all are of the new template", async || {
            rolled("db", 2, 3).await
        })
        .await;
    let revisions: Api<ControllerRevision> = cluster.api("default");
    assert_eq!(
        revisions
            .list(&ListParams::default())
            .await
            .unwrap()
            .items
            .len(),
        2
    );
    let scale = Patch::Merge(json!({"spec": {"replicas": 1}}));
    sets.patch("db", &PatchParams::default(), &scale)
        .await
        .unwrap();
    cluster
        .eventually("one is left", async || rolled("db", 3, 1).await)
        .await;
    assert!(pods.get_opt("db-0").await.unwrap().is_some());

    // Claims are objects; nothing here provides the volumes.
    let with_claims = json!({
        "metadata": {"name": "store"},
        "spec": {
            "replicas": 2, "serviceName": "store", "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": {"app": "store"}},
            "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete", "whenScaled": "Retain"},
            "template": {
                "metadata": {"labels": {"app": "store"}},
                "spec": {"containers": [{"name": "main", "image": "image"}]},
            },
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {
                "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}],
        },
    });
    sets.create(&create(), &object(with_claims)).await.unwrap();
    cluster
        .eventually("each pod has its claim", async || {
            claims
                .list(&ListParams::default())
                .await
                .is_ok_and(|list| list.items.len() == 2)
        })
        .await;
    assert!(claims.get_opt("data-store-1").await.unwrap().is_some());
    sets.delete("store", &DeleteParams::background())
        .await
        .unwrap();
    cluster
        .eventually("the claims went with the set", async || {
            claims
                .list(&ListParams::default())
                .await
                .is_ok_and(|list| list.items.is_empty())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replication_controllers_and_endpoints_serve_older_clients() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(1).await;
    let controllers: Api<ReplicationController> = cluster.api("default");
    let services: Api<Service> = cluster.api("default");
    let endpoints: Api<Endpoints> = cluster.api("default");
    let slices: Api<EndpointSlice> = cluster.api("default");
    let controller = json!({
        "metadata": {"name": "old"},
        "spec": {"replicas": 2, "template": {
            "metadata": {"labels": {"app": "old"}},
            "spec": {"containers": [{"name": "main", "image": "image"}]},
        }},
    });
    let made = controllers
        .create(&create(), &object(controller))
        .await
        .unwrap();
    assert_eq!(made.spec.unwrap().selector.unwrap()["app"], "old");
    let service = json!({"metadata": {"name": "old"}, "spec": {"selector": {"app": "old"}, "ports": [{"port": 80}]}});
    services.create(&create(), &object(service)).await.unwrap();
    let addresses = async |name: &str| {
        let found = endpoints.get_opt(name).await.ok().flatten();
        let subsets = found.and_then(|found| found.subsets).unwrap_or_default();
        subsets
            .iter()
            .flat_map(|subset| subset.addresses.iter().flatten())
            .count()
    };
    cluster
        .eventually("both pods are Endpoints", async || {
            let status = controllers
                .get("old")
                .await
                .ok()
                .and_then(|found| found.status);
            status.is_some_and(|status| status.available_replicas == Some(2))
                && addresses("old").await == 2
        })
        .await;
    let scale = Patch::Merge(json!({"spec": {"replicas": 0}}));
    controllers
        .patch("old", &PatchParams::default(), &scale)
        .await
        .unwrap();
    cluster
        .eventually("none is left", async || addresses("old").await == 0)
        .await;
    services
        .delete("old", &DeleteParams::default())
        .await
        .unwrap();
    cluster
        .eventually("the Endpoints went with the Service", async || {
            matches!(endpoints.get_opt("old").await, Ok(None))
        })
        .await;

    let service =
        json!({"metadata": {"name": "custom"}, "spec": {"ports": [{"name": "http", "port": 80}]}});
    services.create(&create(), &object(service)).await.unwrap();
    let custom = json!({
        "metadata": {"name": "custom"},
        "subsets": [{"addresses": [{"ip": "10.1.2.3"}], "ports": [{"name": "http", "port": 9000}]}],
    });
    endpoints.create(&create(), &object(custom)).await.unwrap();
    let mirrored = async || {
        let of = ListParams::default().labels("kubernetes.io/service-name=custom");
        let list = slices
            .list(&of)
            .await
            .map(|list| list.items)
            .unwrap_or_default();
        list.into_iter()
            .flat_map(|slice| slice.endpoints.into_iter().flatten())
            .flat_map(|endpoint| endpoint.addresses)
            .collect::<Vec<_>>()
    };
    cluster
        .eventually("it is mirrored", async || mirrored().await == ["10.1.2.3"])
        .await;
    endpoints
        .delete("custom", &DeleteParams::default())
        .await
        .unwrap();
    cluster
        .eventually("the mirror is gone", async || mirrored().await.is_empty())
        .await;
}
