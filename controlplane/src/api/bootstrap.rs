//! What every cluster has from its first moment: namespaces, priority classes, the API's own Service, roles.

use serde_json::{Value, json};

use super::fields::Fields;
use super::request::{Target, WriteOptions};
use super::status::Status;
use super::write::Part;
use super::{Api, roles, service_range};

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
    service_range::keep(api).await?;
    extension_authentication(api).await?;
    match kubernetes_service(api).await {
        // Its address is another's, or of no ServiceCIDR: whoever is to mend that needs a server.
        Err(status) if status.reason == "Invalid" => {
            let reason = status.message;
            tracing::error!(reason, "the Service default/kubernetes cannot be made");
        }
        outcome => outcome?,
    }
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

/// The Service `default/kubernetes`, unless it is there.
pub async fn kubernetes_service(api: &Api) -> Result<(), Status> {
    let port = api.config.advertise_port;
    let service = json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kubernetes", "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {"clusterIP": api.config.kubernetes_ip().map(|ip| ip.to_string()), "type": "ClusterIP",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}]}});
    ensure(api, "/api/v1/namespaces/default/services", service)
        .await
        .map(drop)
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

/// Creates an object unless it is there; true when it was created.
pub async fn ensure(api: &Api, path: &str, object: Value) -> Result<bool, Status> {
    let target = target(path, &object)?;
    if api.store.get(&target.key()?).await?.is_some() {
        return Ok(false);
    }
    match api.insert(&target, object, &options()).await {
        Err(status) if status.reason == "AlreadyExists" => Ok(false),
        outcome => outcome.map(|_| true),
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
