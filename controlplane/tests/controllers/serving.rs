//! Deployments, DaemonSets, Services and nodes, and control planes that die.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::cluster::Cluster;
use futures::TryStreamExt;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::{Value, json};

pub fn object<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

pub fn workload(kind: &str, name: &str, replicas: Option<i32>) -> Value {
    let mut value = json!({
        "apiVersion": "apps/v1", "kind": kind,
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "main", "image": "image:1"}]},
            },
        },
    });
    if let Some(replicas) = replicas {
        value["spec"]["replicas"] = json!(replicas);
    }
    value
}

pub fn service(name: &str) -> Service {
    object(json!({
        "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8080}]},
    }))
}

fn of(name: &str) -> ListParams {
    ListParams::default().labels(&format!("app={name}"))
}

pub async fn ready_addresses(slices: &Api<EndpointSlice>, service: &str) -> BTreeSet<String> {
    let found = slices
        .list(&ListParams::default().labels(&format!("kubernetes.io/service-name={service}")))
        .await;
    let slices = found.map(|list| list.items).unwrap_or_default();
    let endpoints = slices
        .into_iter()
        .flat_map(|slice| slice.endpoints.into_iter().flatten());
    let ready = endpoints.filter(|endpoint| {
        endpoint
            .conditions
            .as_ref()
            .is_some_and(|is| is.ready == Some(true))
    });
    ready.flat_map(|endpoint| endpoint.addresses).collect()
}

/// Whether `kubectl rollout status` would be satisfied.
async fn rolled_out(deployments: &Api<Deployment>, name: &str) -> bool {
    let Ok(found) = deployments.get(name).await else {
        return false;
    };
    let status = found.status.clone().unwrap_or_default();
    let wished = found.spec.as_ref().and_then(|spec| spec.replicas);
    status.observed_generation == found.metadata.generation
        && status.updated_replicas == wished
        && status.replicas == wished
        && status.available_replicas == wished
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_is_spread_served_rolled_and_cleaned_up() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(3).await;
    cluster.takes_pods().await;
    let deployments: Api<Deployment> = cluster.api("default");
    let pods: Api<Pod> = cluster.api("default");
    let slices: Api<EndpointSlice> = cluster.api("default");
    let services: Api<Service> = cluster.api("default");
    services
        .create(&PostParams::default(), &service("web"))
        .await
        .unwrap();
    deployments
        .create(
            &PostParams::default(),
            &object(workload("Deployment", "web", Some(30))),
        )
        .await
        .unwrap();
    cluster
        .eventually("30 pods are available", async || {
            rolled_out(&deployments, "web").await
        })
        .await;

    let list = pods.list(&of("web")).await.unwrap().items;
    let mut per_node: BTreeMap<String, usize> = BTreeMap::new();
    for pod in &list {
        *per_node
            .entry(pod.spec.as_ref().unwrap().node_name.clone().unwrap())
            .or_default() += 1;
    }
    assert_eq!(per_node.into_values().collect::<Vec<_>>(), [10, 10, 10]);
    cluster
        .eventually("all are endpoints", async || {
            ready_addresses(&slices, "web").await.len() == 30
        })
        .await;

    // A rollout, with the number of active pods watched all the way.
    let most = Arc::new(AtomicUsize::new(0));
    let counter = tokio::spawn(count_active(pods.clone(), most.clone()));
    let image = json!({"spec": {"template": {"spec": {"containers": [{"name": "main", "image": "image:2"}]}}}});
    deployments
        .patch("web", &PatchParams::default(), &Patch::Strategic(image))
        .await
        .unwrap();
    cluster
        .eventually("the new template is everywhere", async || {
            rolled_out(&deployments, "web").await
        })
        .await;
    counter.abort();
    let most = most.load(Ordering::Relaxed);
    assert!(
        (31..=38).contains(&most),
        "30 and a surge of 25 %, rounded up: {most}"
    );
    let list = pods.list(&of("web")).await.unwrap().items;
    let images: BTreeSet<_> = list
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
        .map(|pod| {
            pod.spec.as_ref().unwrap().containers[0]
                .image
                .clone()
                .unwrap()
        })
        .collect();
    assert_eq!(images, BTreeSet::from(["image:2".to_string()]));
    let web = deployments.get("web").await.unwrap();
    assert_eq!(
        web.metadata.annotations.unwrap()["deployment.kubernetes.io/revision"],
        "2"
    );

    // Gone with all that hangs on it.
    deployments
        .delete("web", &DeleteParams::background())
        .await
        .unwrap();
    services
        .delete("web", &DeleteParams::background())
        .await
        .unwrap();
    let sets: Api<ReplicaSet> = cluster.api("default");
    cluster
        .eventually("sets, pods and slices are collected", async || {
            let nobody = pods
                .list(&of("web"))
                .await
                .is_ok_and(|list| list.items.is_empty());
            let no_sets = sets
                .list(&of("web"))
                .await
                .is_ok_and(|list| list.items.is_empty());
            nobody
                && no_sets
                && slices
                    .list(&ListParams::default())
                    .await
                    .is_ok_and(|list| list.items.len() == 1)
        })
        .await;
    let events: Api<Event> = cluster.api("default");
    let reasons: BTreeSet<String> = events
        .list(&ListParams::default())
        .await
        .unwrap()
        .items
        .into_iter()
        .filter_map(|event| event.reason)
        .collect();
    for reason in [
        "ScalingReplicaSet",
        "SuccessfulCreate",
        "SuccessfulDelete",
        "Scheduled",
    ] {
        assert!(
            reasons.contains(reason),
            "{reason} is missing in {reasons:?}"
        );
    }
}

async fn count_active(pods: Api<Pod>, most: Arc<AtomicUsize>) {
    let mut active: BTreeSet<String> = BTreeSet::new();
    let stream = watcher(pods, watcher::Config::default().labels("app=web")).touched_objects();
    let mut stream = std::pin::pin!(stream);
    while let Ok(Some(pod)) = stream.try_next().await {
        let uid = pod.metadata.uid.clone().unwrap();
        // A deleted pod's last state has a deletion timestamp too.
        if pod.metadata.deletion_timestamp.is_some() {
            active.remove(&uid);
        } else {
            active.insert(uid);
        }
        most.fetch_max(active.len(), Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_that_is_killed_in_a_burst_ends_with_the_pods_asked_for() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(2).await;
    let deployments: Api<Deployment> = cluster.api("default");
    let pods: Api<Pod> = cluster.api("default");
    deployments
        .create(
            &PostParams::default(),
            &object(workload("Deployment", "burst", Some(200))),
        )
        .await
        .unwrap();
    cluster
        .eventually("the burst is under way", async || {
            pods.list(&of("burst"))
                .await
                .is_ok_and(|list| list.items.len() >= 20)
        })
        .await;
    cluster.kill();
    cluster.launch().await;
    cluster
        .eventually("200 pods are available", async || {
            rolled_out(&deployments, "burst").await
        })
        .await;
    let list = pods.list(&of("burst")).await.unwrap().items;
    assert_eq!(list.len(), 200);
    let sets: Api<ReplicaSet> = cluster.api("default");
    assert_eq!(sets.list(&of("burst")).await.unwrap().items.len(), 1);
    let addresses: BTreeSet<_> = list
        .iter()
        .filter_map(|pod| pod.spec.as_ref().unwrap().node_name.clone())
        .collect();
    assert_eq!(addresses.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_control_plane_takes_over_when_the_leading_one_dies() {
    let mut cluster = Cluster::start_with("api").await;
    cluster.add_nodes(1).await;
    let leases: Api<Lease> = cluster.api("kube-system");
    let holder = async |name: &str| {
        let lease = leases.get(name).await.ok();
        lease
            .and_then(|lease| lease.spec?.holder_identity)
            .unwrap_or_default()
    };
    let both_led_by = async |address: &str| {
        holder("kube-scheduler").await.starts_with(address)
            && holder("kube-controller-manager").await.starts_with(address)
    };
    let first = cluster.launch_more("controllers,scheduler", "127.0.0.2");
    cluster
        .eventually("the first leads", async || both_led_by("127.0.0.2:").await)
        .await;
    let _second = cluster.launch_more("controllers,scheduler", "127.0.0.3");
    let deployments: Api<Deployment> = cluster.api("default");
    deployments
        .create(
            &PostParams::default(),
            &object(workload("Deployment", "one", Some(3))),
        )
        .await
        .unwrap();
    cluster
        .eventually("it does its work", async || {
            rolled_out(&deployments, "one").await
        })
        .await;
    assert!(both_led_by("127.0.0.2:").await, "the second waits");
    drop(first);
    deployments
        .create(
            &PostParams::default(),
            &object(workload("Deployment", "two", Some(3))),
        )
        .await
        .unwrap();
    cluster
        .eventually("the second leads", async || both_led_by("127.0.0.3:").await)
        .await;
    cluster
        .eventually("and does the work", async || {
            rolled_out(&deployments, "two").await
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_namespaces_and_daemons_are_looked_after() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(3).await;
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    cluster
        .eventually("every node has a range of its own", async || {
            let list = nodes
                .list(&ListParams::default())
                .await
                .map(|list| list.items)
                .unwrap_or_default();
            let ranges: BTreeSet<_> = list
                .into_iter()
                .filter_map(|node| node.spec?.pod_cidr)
                .collect();
            ranges.len() == 3
                && ranges
                    .iter()
                    .all(|range| range.starts_with("10.244.") && range.ends_with("/24"))
        })
        .await;

    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    namespaces
        .create(
            &PostParams::default(),
            &object(json!({"metadata": {"name": "team"}})),
        )
        .await
        .unwrap();
    let accounts: Api<ServiceAccount> = cluster.api("team");
    let maps: Api<ConfigMap> = cluster.api("team");
    cluster
        .eventually("the namespace has its account and CA", async || {
            let ca = maps.get("kube-root-ca.crt").await;
            let ca = ca
                .ok()
                .and_then(|map| map.data)
                .and_then(|data| data.get("ca.crt").cloned());
            accounts.get("default").await.is_ok()
                && ca.is_some_and(|ca| ca.contains("BEGIN CERTIFICATE"))
        })
        .await;

    let daemons: Api<DaemonSet> = cluster.api("team");
    daemons
        .create(
            &PostParams::default(),
            &object(workload("DaemonSet", "agent", None)),
        )
        .await
        .unwrap();
    let available = async |generation: i64| {
        let status = daemons
            .get("agent")
            .await
            .ok()
            .and_then(|daemon| daemon.status)
            .unwrap_or_default();
        status.observed_generation == Some(generation)
            && status.number_available == Some(3)
            && status.updated_number_scheduled == Some(3)
    };
    cluster
        .eventually("a daemon is on every node", async || available(1).await)
        .await;
    let image = json!({"spec": {"template": {"spec": {"containers": [{"name": "main", "image": "image:2"}]}}}});
    daemons
        .patch("agent", &PatchParams::default(), &Patch::Strategic(image))
        .await
        .unwrap();
    cluster
        .eventually("every daemon is of the new template", async || {
            available(2).await
        })
        .await;

    // A pod that fits nowhere says why, and is placed once it may.
    let pods: Api<Pod> = cluster.api("team");
    let choosy = json!({
        "metadata": {"name": "choosy"},
        "spec": {"nodeSelector": {"disk": "ssd"}, "containers": [{"name": "main", "image": "image"}]},
    });
    pods.create(&PostParams::default(), &object(choosy))
        .await
        .unwrap();
    let scheduled = async |status: &str| {
        let pod = pods.get("choosy").await.ok();
        let conditions = pod
            .and_then(|pod| pod.status?.conditions)
            .unwrap_or_default();
        conditions
            .into_iter()
            .find(|condition| condition.type_ == "PodScheduled" && condition.status == status)
    };
    cluster
        .eventually("the pod says why it waits", async || {
            scheduled("False").await.is_some()
        })
        .await;
    assert_eq!(
        scheduled("False").await.unwrap().message.as_deref(),
        Some(
            "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector. preemption: 0/3 nodes are \
             available: 3 Preemption is not helpful for scheduling."
        )
    );
    let label = json!({"metadata": {"labels": {"disk": "ssd"}}});
    nodes
        .patch("node-1", &PatchParams::default(), &Patch::Merge(label))
        .await
        .unwrap();
    cluster
        .eventually("the pod runs where it may", async || {
            let pod = pods.get("choosy").await.ok();
            pod.and_then(|pod| pod.spec?.node_name).as_deref() == Some("node-1")
        })
        .await;
    cluster
        .eventually("it says that it is placed", async || {
            scheduled("True").await.is_some()
        })
        .await;

    namespaces
        .delete("team", &DeleteParams::default())
        .await
        .unwrap();
    cluster
        .eventually("the namespace is gone with everything in it", async || {
            let gone = matches!(namespaces.get_opt("team").await, Ok(None));
            gone && pods
                .list(&ListParams::default())
                .await
                .is_ok_and(|list| list.items.is_empty())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_follow_readiness_within_milliseconds() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(1).await;
    let deployments: Api<Deployment> = cluster.api("default");
    let pods: Api<Pod> = cluster.api("default");
    let slices: Api<EndpointSlice> = cluster.api("default");
    let services: Api<Service> = cluster.api("default");
    services
        .create(&PostParams::default(), &service("quick"))
        .await
        .unwrap();
    deployments
        .create(
            &PostParams::default(),
            &object(workload("Deployment", "quick", Some(5))),
        )
        .await
        .unwrap();
    cluster
        .eventually("all are endpoints", async || {
            ready_addresses(&slices, "quick").await.len() == 5
        })
        .await;
    let pod = pods.list(&of("quick")).await.unwrap().items.remove(0);
    let name = pod.metadata.name.unwrap();
    let stream = watcher(
        slices.clone(),
        watcher::Config::default().labels("kubernetes.io/service-name=quick"),
    );
    let mut stream = std::pin::pin!(stream.applied_objects());
    let mut times = Vec::new();
    for round in 0..20 {
        let ready = round % 2 == 1;
        let conditions = json!({"status": {"conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}});
        let start = std::time::Instant::now();
        pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(conditions))
            .await
            .unwrap();
        let wanted = if ready { 5 } else { 4 };
        let seen = async {
            while let Ok(Some(slice)) = stream.try_next().await {
                let endpoints = slice.endpoints.unwrap_or_default();
                let ready = endpoints
                    .iter()
                    .filter(|one| one.conditions.as_ref().unwrap().ready == Some(true));
                if ready.count() == wanted {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), seen)
            .await
            .expect("the slice follows");
        times.push(start.elapsed());
    }
    times.sort();
    let median = times[times.len() / 2];
    println!(
        "from a pod's status to its slice: median {median:?}, longest {:?}",
        times[times.len() - 1]
    );
    // Generous, for a loaded machine and a debug build; a controller that polled would take seconds.
    assert!(median < Duration::from_secs(1), "{times:?}");
}
