//! Budgets, tokens, certificates, volumes and priorities against the API server, as a user sees them.

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::core::v1::{
    ConfigMap, Event, PersistentVolume, PersistentVolumeClaim, Pod, ResourceQuota, Secret,
    ServiceAccount,
};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::scheduling::v1::PriorityClass;
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use serde_json::{Value, json};

use crate::cluster::Cluster;

fn object<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

fn create() -> PostParams {
    PostParams::default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_secret_lets_its_account_in_until_it_goes() {
    let cluster = Cluster::start().await;
    let accounts: Api<ServiceAccount> = cluster.api("default");
    let secrets: Api<Secret> = cluster.api("default");
    accounts
        .create(&create(), &object(json!({"metadata": {"name": "bot"}})))
        .await
        .unwrap();
    let secret = json!({
        "metadata": {"name": "bot-token", "annotations": {"kubernetes.io/service-account.name": "bot"}},
        "type": "kubernetes.io/service-account-token",
    });
    secrets.create(&create(), &object(secret)).await.unwrap();
    let field = async |name: &str| {
        let found = secrets.get_opt("bot-token").await.ok().flatten()?;
        let value = found.data?.remove(name)?;
        Some(String::from_utf8(value.0).unwrap())
    };
    cluster
        .eventually("the Secret is filled", async || {
            field("token").await.is_some()
        })
        .await;
    assert_eq!(field("namespace").await.as_deref(), Some("default"));
    assert!(field("ca.crt").await.unwrap().contains("BEGIN CERTIFICATE"));
    let token = field("token").await.unwrap();
    assert_eq!(
        cluster.user_of(&token).await.as_deref(),
        Some("system:serviceaccount:default:bot")
    );
    accounts
        .delete("bot", &DeleteParams::default())
        .await
        .unwrap();
    cluster
        .eventually("the Secret went with its account", async || {
            matches!(secrets.get_opt("bot-token").await, Ok(None))
        })
        .await;
    assert_eq!(cluster.user_of(&token).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_more_important_pod_gets_the_room() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(1).await;
    let classes: Api<PriorityClass> = Api::all(cluster.client.clone());
    let pods: Api<Pod> = cluster.api("default");
    cluster.takes_pods().await;
    let budgets: Api<PodDisruptionBudget> = cluster.api("default");
    for (name, value) in [("low", 1), ("high", 1000)] {
        let class = json!({"metadata": {"name": name}, "value": value});
        classes.create(&create(), &object(class)).await.unwrap();
    }
    let pod = |name: &str, class: &str, cpu: &str| -> Pod {
        object(json!({
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {"priorityClassName": class, "containers": [
                {"name": "main", "image": "image", "resources": {"requests": {"cpu": cpu}}}]},
        }))
    };
    let budget = json!({
        "metadata": {"name": "guard"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "guarded"}}},
    });
    budgets.create(&create(), &object(budget)).await.unwrap();
    for name in ["guarded", "spare"] {
        pods.create(&create(), &pod(name, "low", "30"))
            .await
            .unwrap();
    }
    let status = async || {
        budgets
            .get("guard")
            .await
            .ok()
            .and_then(|budget| budget.status)
    };
    cluster
        .eventually("the budget counts its pod", async || {
            status().await.is_some_and(|status| {
                status.current_healthy == Some(1)
                    && status.expected_pods == Some(1)
                    && status.disruptions_allowed == Some(0)
            })
        })
        .await;
    pods.create(&create(), &pod("vital", "high", "30"))
        .await
        .unwrap();
    cluster
        .eventually("the important pod runs", async || {
            let found = pods.get("vital").await.ok().and_then(|pod| pod.status);
            found.is_some_and(|status| status.phase.as_deref() == Some("Running"))
        })
        .await;
    assert!(
        pods.get_opt("spare").await.unwrap().is_none(),
        "it made way"
    );
    assert!(
        pods.get_opt("guarded").await.unwrap().is_some(),
        "its budget spared it"
    );
    let events: Api<Event> = cluster.api("default");
    cluster
        .eventually("both are told", async || {
            let list = events
                .list(&ListParams::default())
                .await
                .map(|list| list.items);
            let reasons: Vec<_> = list
                .unwrap_or_default()
                .into_iter()
                .filter_map(|event| event.reason)
                .collect();
            ["Preempted", "FailedScheduling"]
                .iter()
                .all(|wanted| reasons.iter().any(|reason| reason == wanted))
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_are_bound_to_volumes_that_are_there() {
    let cluster = Cluster::start().await;
    let volumes: Api<PersistentVolume> = Api::all(cluster.client.clone());
    let claims: Api<PersistentVolumeClaim> = cluster.api("default");
    let claim = json!({
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "resources": {"requests": {"storage": "1Gi"}}},
    });
    claims.create(&create(), &object(claim)).await.unwrap();
    let volume = json!({
        "metadata": {"name": "disk"},
        "spec": {"capacity": {"storage": "2Gi"}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": "/srv/disk"},
            "persistentVolumeReclaimPolicy": "Retain"},
    });
    volumes.create(&create(), &object(volume)).await.unwrap();
    let phase = async || {
        let found = volumes
            .get("disk")
            .await
            .ok()
            .and_then(|volume| volume.status);
        found.and_then(|status| status.phase).unwrap_or_default()
    };
    cluster
        .eventually("both say Bound", async || {
            let claim = claims.get("data").await.ok().and_then(|claim| claim.status);
            claim.is_some_and(|status| status.phase.as_deref() == Some("Bound"))
                && phase().await == "Bound"
        })
        .await;
    claims
        .delete("data", &DeleteParams::default())
        .await
        .unwrap();
    cluster
        .eventually("the volume is released", async || {
            phase().await == "Released"
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_waits_for_its_pods_and_a_volume_for_its_claim() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(1).await;
    cluster.takes_pods().await;
    let volumes: Api<PersistentVolume> = Api::all(cluster.client.clone());
    let claims: Api<PersistentVolumeClaim> = cluster.api("default");
    let pods: Api<Pod> = cluster.api("default");
    let volume = json!({
        "metadata": {"name": "disk"},
        "spec": {"capacity": {"storage": "2Gi"}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": "/srv/disk"},
            "persistentVolumeReclaimPolicy": "Retain"},
    });
    let made = volumes.create(&create(), &object(volume)).await.unwrap();
    assert_eq!(
        made.metadata.finalizers.unwrap(),
        ["kubernetes.io/pv-protection"]
    );
    let claim = json!({
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "resources": {"requests": {"storage": "1Gi"}}},
    });
    let made = claims.create(&create(), &object(claim)).await.unwrap();
    assert_eq!(
        made.metadata.finalizers.unwrap(),
        ["kubernetes.io/pvc-protection"]
    );
    let pod = json!({
        "metadata": {"name": "user"},
        "spec": {"containers": [{"name": "main", "image": "image"}],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]},
    });
    pods.create(&create(), &object(pod)).await.unwrap();
    cluster
        .eventually("the pod has a node and the claim its volume", async || {
            let pod = pods.get("user").await.ok().and_then(|pod| pod.spec);
            let claim = claims.get("data").await.ok().and_then(|claim| claim.status);
            pod.is_some_and(|spec| spec.node_name.is_some())
                && claim.is_some_and(|status| status.phase.as_deref() == Some("Bound"))
        })
        .await;
    let now = DeleteParams::default();
    volumes.delete("disk", &now).await.unwrap();
    claims.delete("data", &now).await.unwrap();
    // The protection of another claim, made and deleted later, is gone: the first was looked at and kept.
    let other = json!({
        "metadata": {"name": "other"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "9Gi"}}},
    });
    claims.create(&create(), &object(other)).await.unwrap();
    claims.delete("other", &now).await.unwrap();
    cluster
        .eventually("a claim that nobody uses goes", async || {
            matches!(claims.get_opt("other").await, Ok(None))
        })
        .await;
    let kept = claims.get("data").await.unwrap().metadata;
    assert!(kept.deletion_timestamp.is_some() && kept.finalizers.is_some());
    assert!(
        volumes
            .get("disk")
            .await
            .unwrap()
            .metadata
            .deletion_timestamp
            .is_some()
    );
    pods.delete("user", &now).await.unwrap();
    cluster
        .eventually("both go after the pod", async || {
            matches!(claims.get_opt("data").await, Ok(None))
                && matches!(volumes.get_opt("disk").await, Ok(None))
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubelets_certificate_is_approved_and_signed() {
    let cluster = Cluster::start().await;
    let requests: Api<CertificateSigningRequest> = Api::all(cluster.client.clone());
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(rcgen::DnType::OrganizationName, "system:nodes");
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "system:node:n1");
    let pem = params.serialize_request(&key).unwrap().pem().unwrap();
    let request = json!({
        "metadata": {"name": "n1"},
        "spec": {
            "request": ByteString(pem.into_bytes()), "signerName": "kubernetes.io/kube-apiserver-client-kubelet",
            "usages": ["digital signature", "client auth"],
        },
    });
    requests.create(&create(), &object(request)).await.unwrap();
    cluster
        .eventually("it is signed", async || {
            let found = requests
                .get("n1")
                .await
                .ok()
                .and_then(|request| request.status);
            found.is_some_and(|status| {
                status
                    .certificate
                    .is_some_and(|pem| pem.0.starts_with(b"-----BEGIN CERTIFICATE"))
            })
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_is_charged_and_given_back() {
    let cluster = Cluster::start().await;
    let quotas: Api<ResourceQuota> = cluster.api("default");
    let maps: Api<ConfigMap> = cluster.api("default");
    let quota =
        json!({"metadata": {"name": "few"}, "spec": {"hard": {"configmaps": "2", "pods": "1"}}});
    quotas.create(&create(), &object(quota)).await.unwrap();
    let used = async |name: &str| {
        let status = quotas.get("few").await.ok()?.status?;
        Some(status.used?.remove(name)?.0)
    };
    // Every namespace has one, the CA's. When that is made after the quota, it is charged before the rest is counted.
    cluster
        .eventually("what is there is counted", async || {
            used("configmaps").await.as_deref() == Some("1")
                && used("pods").await.as_deref() == Some("0")
        })
        .await;
    let map = |name: &str| -> ConfigMap { object(json!({"metadata": {"name": name}})) };
    maps.create(&create(), &map("a")).await.unwrap();
    let refused = maps
        .create(&create(), &map("b"))
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("exceeded quota: few"), "{refused}");
    maps.delete("a", &DeleteParams::default()).await.unwrap();
    cluster
        .eventually("it is given back", async || {
            used("configmaps").await.as_deref() == Some("1")
        })
        .await;
    maps.create(&create(), &map("b")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_pod_says_so_before_it_goes() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(1).await;
    let pods: Api<Pod> = cluster.api("default");
    cluster.takes_pods().await;
    let pod = json!({
        "metadata": {"name": "held", "finalizers": ["acme.io/counts"]},
        "spec": {"containers": [{"name": "main", "image": "image"}]},
    });
    pods.create(&create(), &object(pod)).await.unwrap();
    pods.evict("held", &kube::api::EvictParams::default())
        .await
        .unwrap();
    let held = pods.get("held").await.unwrap();
    assert!(held.metadata.deletion_timestamp.is_some());
    let conditions = held.status.unwrap().conditions.unwrap();
    let reason = conditions
        .into_iter()
        .find(|condition| condition.type_ == "DisruptionTarget");
    assert_eq!(
        reason.unwrap().reason.as_deref(),
        Some("EvictionByEvictionAPI")
    );
}
