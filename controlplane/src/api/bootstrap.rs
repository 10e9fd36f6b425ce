//! What every cluster has from its first moment: namespaces, priority classes, the API's own Service, roles.

use serde_json::{Value, json};

use super::fields::{self, Fields};
use super::request::{Target, WriteOptions};
use super::status::Status;
use super::write::Part;
use super::{Api, roles};

/// Creates what is missing and brings the API's own endpoints up to date.
pub async fn run(api: &Api) -> Result<(), Status> {
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        ensure(api, "/api/v1/namespaces", namespace).await?;
    }
    let classes = [
        (
            "system-cluster-critical",
            2_000_000_000,
            "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
        ),
        (
            "system-node-critical",
            2_000_001_000,
            "Used for system critical pods that must not be moved from their current node.",
        ),
    ];
    for (name, value, description) in classes {
        let class = json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name},
            "value": value, "description": description});
        ensure(api, "/apis/scheduling.k8s.io/v1/priorityclasses", class).await?;
    }
    roles::reconcile(api).await?;
    service_range(api).await?;
    extension_authentication(api).await?;
    kubernetes_service(api).await?;
    api.announce().await
}

/// By what extension servers know their callers, as this one does; who may read it, a Role of Kubernetes says.
pub async fn extension_authentication(api: &Api) -> Result<(), Status> {
    let client_ca = api.config.pki_dir.join("ca.crt");
    let client_ca = std::fs::read_to_string(client_ca).map_err(Status::internal)?;
    let mut data = match &api.proxies {
        Some(proxies) => proxies.published().map_err(Status::internal)?,
        None => json!({}),
    };
    data["client-ca-file"] = client_ca.into();
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "extension-apiserver-authentication", "namespace": "kube-system"}, "data": data});
    let path = "/api/v1/namespaces/kube-system/configmaps";
    hold(api, path, map, &["data"]).await
}

/// The ranges that Services get their addresses from, as an object that clients can read. A cluster may gain a second family;
/// its first range stays.
async fn service_range(api: &Api) -> Result<(), Status> {
    let path = "/apis/networking.k8s.io/v1/servicecidrs";
    let ranges = api.config.service_cidrs.iter().map(ToString::to_string);
    let cidrs: Vec<String> = ranges.collect();
    let range = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": cidrs}});
    ensure(api, path, range.clone()).await?;
    let grow = |old: &Value| {
        let mut new = old.clone();
        let known = old.items("/spec/cidrs");
        if known.len() < cidrs.len() && known.iter().zip(&cidrs).all(|(known, cidr)| known == cidr)
        {
            new.set("/spec/cidrs", cidrs.clone());
        } else if known != cidrs {
            tracing::warn!(known = %json!(known), given = ?cidrs, "ServiceCIDR kubernetes has other ranges than --service-cidr; it stays as it is");
        }
        Ok(new)
    };
    api.modify(&target(path, &range)?, &options(), Part::Main, grow)
        .await?;
    let change = |old: &Value| {
        let mut new = old.clone();
        if new.items("/status/conditions").is_empty() {
            let ready = json!({"type": "Ready", "status": "True", "reason": "",
                "message": "Kubernetes Service CIDR is ready", "lastTransitionTime": fields::now()});
            new.set("/status", json!({"conditions": [ready]}));
        }
        Ok(new)
    };
    api.modify(&target(path, &range)?, &options(), Part::Status, change)
        .await
        .map(drop)
}

/// The Service `default/kubernetes`, unless it is there.
pub async fn kubernetes_service(api: &Api) -> Result<(), Status> {
    let port = api.config.advertise_port;
    let service = json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kubernetes", "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {"clusterIP": api.config.kubernetes_ip().map(|ip| ip.to_string()), "type": "ClusterIP",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}]}});
    ensure(api, "/api/v1/namespaces/default/services", service).await
}

pub fn options() -> WriteOptions {
    WriteOptions {
        manager: "keelway-controlplane".to_owned(),
        ..WriteOptions::default()
    }
}

pub fn target(path: &str, object: &Value) -> Result<Target, Status> {
    let name = object.text("/metadata/name").to_owned();
    let target = Target::parse(path)
        .ok_or_else(|| Status::internal(format!("{path} is not in the tables")))?;
    Ok(Target {
        name: Some(name),
        ..target
    })
}

/// Creates an object unless it is there.
pub async fn ensure(api: &Api, path: &str, object: Value) -> Result<(), Status> {
    let target = target(path, &object)?;
    if api.store.get(&target.key()?).await?.is_some() {
        return Ok(());
    }
    match api.insert(&target, object, &options()).await {
        Err(status) if status.reason == "AlreadyExists" => Ok(()),
        outcome => outcome.map(drop),
    }
}

/// Creates an object, or sets the given fields of the one that is there.
pub async fn hold(api: &Api, path: &str, object: Value, fields: &[&str]) -> Result<(), Status> {
    ensure(api, path, object.clone()).await?;
    let change = |old: &Value| {
        let mut new = old.clone();
        for field in fields {
            new[*field] = object[*field].clone();
        }
        Ok(new)
    };
    api.modify(&target(path, &object)?, &options(), Part::Main, change)
        .await
        .map(drop)
}
