//! KubeCluster: the `Cluster` over a Kubernetes API server.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use async_trait::async_trait;
use futures::StreamExt;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, ObjectReference, Pod, PodStatus, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::sync::{broadcast, watch};

use super::events::{Note, Recorder};
use super::{Cluster, ClusterError, EventKind, Interest, Reference, Token};
use crate::backoff::Quick;
use crate::clock::Wait;
use crate::pod::PodKey;
use crate::pod::status::is_own_condition;
use crate::task::Scoped;

/// Announcements that a slow worker may fall behind; it looks at everything when it has.
const CHANGES_MAX: usize = 1024;
/// A token is renewed when this part of its life is over, or after a day (upstream's rule).
const TOKEN_LIFE_PERCENT: i32 = 80;

/// A KubeCluster uses one client for everything.
#[derive(Clone)]
pub struct KubeCluster {
    client: Client,
    recorder: Recorder,
    services: watch::Receiver<Option<Arc<ServiceMap>>>,
    followed: Arc<Mutex<HashMap<Reference, Weak<Followed>>>>,
    changes: broadcast::Sender<Reference>,
}

type ServiceMap = HashMap<(String, String), Service>;

/// A Followed object has a watch of its own, which ends with the last pod that refers to it.
struct Followed {
    _task: Scoped,
}

impl KubeCluster {
    /// Starts the event recorder and the watch on Services.
    pub fn start(client: Client, node_name: &str) -> Self {
        let (send, services) = watch::channel(None);
        tokio::spawn(watch_services(client.clone(), send));
        Self {
            recorder: Recorder::start(client.clone(), node_name),
            services,
            followed: Arc::default(),
            changes: broadcast::channel(CHANGES_MAX).0,
            client,
        }
    }

    pub fn recorder(&self) -> Recorder {
        self.recorder.clone()
    }

    async fn get<K>(
        &self,
        namespace: &str,
        name: &str,
        kind: &'static str,
    ) -> Result<Option<K>, ClusterError>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        api.get_opt(name)
            .await
            .map_err(failed("get", format!("{kind} {namespace}/{name}")))
    }

    fn watch_one<K>(&self, namespace: &str, name: &str, reference: Reference) -> Followed
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug
            + Send
            + 'static,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let events = watcher(
            api,
            watcher::Config::default().fields(&format!("metadata.name={name}")),
        )
        .backoff(Quick::default());
        let changes = self.changes.clone();
        let task = Scoped::spawn(async move {
            let mut events = std::pin::pin!(events);
            while let Some(event) = events.next().await {
                // What was listed at the start counts too: it may differ from what the pod was started with.
                if matches!(
                    event,
                    Ok(Event::Apply(_) | Event::InitApply(_) | Event::Delete(_))
                ) {
                    let _ = changes.send(reference.clone());
                }
            }
        });
        Followed { _task: task }
    }
}

fn failed(operation: &'static str, object: String) -> impl FnOnce(kube::Error) -> ClusterError {
    move |error| match error {
        kube::Error::Api(status) if status.code == 404 => ClusterError::Gone { operation, object },
        error => ClusterError::Request {
            operation,
            object,
            message: error.to_string(),
        },
    }
}

async fn watch_services(client: Client, send: watch::Sender<Option<Arc<ServiceMap>>>) {
    let events =
        watcher(Api::<Service>::all(client), watcher::Config::default()).backoff(Quick::default());
    let mut events = std::pin::pin!(events);
    let (mut services, mut listing) = (ServiceMap::new(), ServiceMap::new());
    let key = |s: &Service| {
        (
            s.metadata.namespace.clone().unwrap_or_default(),
            s.metadata.name.clone().unwrap_or_default(),
        )
    };
    let mut synced = false;
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listing.clear(),
            Ok(Event::InitApply(service)) => {
                listing.insert(key(&service), service);
            }
            Ok(Event::InitDone) => {
                services = std::mem::take(&mut listing);
                synced = true;
            }
            Ok(Event::Apply(service)) => {
                services.insert(key(&service), service);
            }
            Ok(Event::Delete(service)) => {
                services.remove(&key(&service));
            }
            Err(error) => {
                tracing::debug!(%error, "the watch on Services broke; it is started again")
            }
        }
        if synced && listing.is_empty() {
            let _ = send.send(Some(Arc::new(services.clone())));
        }
    }
}

/// Lets a patch remove the fields that an object had and does not have any more.
fn remove_what_is_gone(old: &Map<String, Value>, patch: &mut Map<String, Value>) {
    for field in old.keys() {
        patch.entry(field.clone()).or_insert(Value::Null);
    }
}

/// The strategic merge patch from one status to another. `null` removes what is no longer there. Conditions merge by
/// their type and field by field, and only our own are sent: others belong to those who set them, who may have changed them meanwhile.
fn status_patch(key: &PodKey, old: &PodStatus, new: &PodStatus) -> Value {
    let object = |status: &PodStatus| match serde_json::to_value(status) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    };
    let mut own = new.clone();
    if let Some(conditions) = &mut own.conditions {
        let known = |kind: &str| old.conditions.iter().flatten().any(|c| c.type_ == kind);
        conditions.retain(|c| is_own_condition(&c.type_) || !known(&c.type_));
    }
    let known_conditions = old.conditions.iter().flatten();
    let (old, mut changed) = (object(old), object(&own));
    if let Some(Value::Array(conditions)) = changed.get_mut("conditions") {
        let known = old.get("conditions").and_then(Value::as_array);
        for condition in conditions.iter_mut().filter_map(Value::as_object_mut) {
            let mut known = known.into_iter().flatten().filter_map(Value::as_object);
            if let Some(known) = known.find(|known| known.get("type") == condition.get("type")) {
                remove_what_is_gone(known, condition);
            }
        }
        // They merge by type: one of ours that no longer holds must be taken out by name.
        let kept = |kind: &str| new.conditions.iter().flatten().any(|c| c.type_ == kind);
        let gone = known_conditions.filter(|c| is_own_condition(&c.type_) && !kept(&c.type_));
        conditions.extend(gone.map(|c| json!({"$patch": "delete", "type": c.type_})));
    }
    for list in ["podIPs", "hostIPs"] {
        // These would merge by address, and an address that is gone would stay.
        if let Some(Value::Array(items)) = changed.get_mut(list) {
            items.insert(0, json!({"$patch": "replace"}));
        }
    }
    remove_what_is_gone(&old, &mut changed);
    // The uid makes the server refuse a report about an earlier pod of the same name.
    json!({"metadata": {"uid": key.uid}, "status": changed})
}

#[async_trait]
impl Cluster for KubeCluster {
    async fn config_map(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<ConfigMap>, ClusterError> {
        self.get(namespace, name, "ConfigMap").await
    }

    async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Secret>, ClusterError> {
        self.get(namespace, name, "Secret").await
    }

    async fn token(
        &self,
        pod: &Pod,
        audience: Option<&str>,
        expiration_s: i64,
    ) -> Result<Token, ClusterError> {
        let key = PodKey::of(pod);
        let account = pod
            .spec
            .as_ref()
            .and_then(|s| s.service_account_name.clone())
            .filter(|n| !n.is_empty())
            .unwrap_or("default".into());
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(audience.map(str::to_owned).into_iter().collect()),
                expiration_seconds: Some(expiration_s),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(key.name.clone()),
                    uid: Some(key.uid.clone()),
                }),
            }),
            ..Default::default()
        };
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &key.namespace);
        let asked_at = Timestamp::now();
        let object = format!("token of ServiceAccount {}/{account}", key.namespace);
        let answer = api
            .create_token_request(&account, &PostParams::default(), &request)
            .await
            .map_err(failed("create", object.clone()))?;
        let status = answer
            .status
            .and_then(|status| Some((status.token?, status.expiration_timestamp?.0)));
        let (value, expires_at) = status.ok_or(ClusterError::Request {
            operation: "create",
            object,
            message: "the answer has no token".to_owned(),
        })?;
        let life = expires_at.duration_since(asked_at);
        let refresh = (life * TOKEN_LIFE_PERCENT / 100).min(SignedDuration::from_hours(24));
        Ok(Token {
            value,
            fresh: Wait {
                since: asked_at,
                until: asked_at + refresh,
            },
        })
    }

    async fn runtime_handler(&self, class: &str) -> Result<Option<String>, ClusterError> {
        let api: Api<RuntimeClass> = Api::all(self.client.clone());
        let found = api.get_opt(class).await;
        let found = found.map_err(failed("get", format!("RuntimeClass {class}")))?;
        Ok(found.map(|class| class.handler))
    }

    async fn services(&self) -> Vec<Service> {
        let mut receiver = self.services.clone();
        match receiver.wait_for(Option::is_some).await {
            Ok(services) => services
                .iter()
                .flat_map(|map| map.values().cloned())
                .collect(),
            Err(_) => Vec::new(),
        }
    }

    async fn report(
        &self,
        key: &PodKey,
        old: &PodStatus,
        new: &PodStatus,
    ) -> Result<(), ClusterError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        let patch = Patch::Strategic(status_patch(key, old, new));
        match api
            .patch_status(&key.name, &PatchParams::default(), &patch)
            .await
        {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 || status.code == 422 => {
                match api.get_opt(&key.name).await {
                    Ok(Some(pod)) if pod.metadata.uid.as_deref() == Some(&key.uid) => {
                        Err(ClusterError::Request {
                            operation: "report",
                            object: key.to_string(),
                            message: status.message,
                        })
                    }
                    _ => Err(ClusterError::Gone {
                        operation: "report",
                        object: key.to_string(),
                    }),
                }
            }
            Err(error) => Err(failed("report", key.to_string())(error)),
        }
    }

    async fn delete(&self, key: &PodKey) -> Result<(), ClusterError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: Some(key.uid.clone()),
                resource_version: None,
            }),
            ..Default::default()
        };
        match api.delete(&key.name, &params).await {
            Ok(_) => Ok(()),
            // 409: the name belongs to another pod by now.
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
            Err(error) => Err(failed("delete", key.to_string())(error)),
        }
    }

    fn event(
        &self,
        pod: &Pod,
        container: Option<&str>,
        kind: EventKind,
        reason: &'static str,
        message: String,
    ) {
        let init = |name: &str| {
            let spec = pod.spec.as_ref();
            spec.is_some_and(|s| s.init_containers.iter().flatten().any(|c| c.name == name))
        };
        let object = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: pod.metadata.uid.clone(),
            resource_version: pod.metadata.resource_version.clone(),
            field_path: container.map(|name| match init(name) {
                true => format!("spec.initContainers{{{name}}}"),
                false => format!("spec.containers{{{name}}}"),
            }),
        };
        self.recorder.record(Note {
            object,
            kind,
            reason,
            message,
        });
    }

    fn follow(&self, references: Vec<Reference>) -> Interest {
        let mut followed = self
            .followed
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        followed.retain(|_, watch| watch.strong_count() > 0);
        let follow = |reference: Reference| {
            if let Some(known) = followed.get(&reference).and_then(Weak::upgrade) {
                return known;
            }
            let new = Arc::new(match &reference {
                Reference::ConfigMap { namespace, name } => {
                    self.watch_one::<ConfigMap>(namespace, name, reference.clone())
                }
                Reference::Secret { namespace, name } => {
                    self.watch_one::<Secret>(namespace, name, reference.clone())
                }
            });
            followed.insert(reference, Arc::downgrade(&new));
            new
        };
        let interest: Vec<Arc<Followed>> = references.into_iter().map(follow).collect();
        Box::new(interest)
    }

    fn changes(&self) -> broadcast::Receiver<Reference> {
        self.changes.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(fields: Value) -> PodStatus {
        serde_json::from_value(fields).unwrap()
    }

    #[test]
    fn a_status_patch_removes_what_is_gone_names_the_uid_and_leaves_others_conditions_alone() {
        let key = PodKey {
            namespace: "ns".to_owned(),
            name: "p".to_owned(),
            uid: "u".to_owned(),
        };
        let condition = |kind: &str| json!({"type": kind, "status": "True"});
        let old = status(
            json!({"phase": "Pending", "reason": "x", "conditions": [condition("example.com/gate"), condition("PodResizeInProgress"),
                {"type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "containers with unready status: [c]"}]}),
        );
        let new = status(json!({
            "phase": "Running",
            "podIPs": [{"ip": "10.0.0.1"}],
            "conditions": [condition("Ready"), condition("example.com/gate"), condition("PodScheduled")],
        }));
        let ready = json!({"type": "Ready", "status": "True", "reason": null, "message": null});
        let expected = json!({"metadata": {"uid": "u"}, "status": {
            "phase": "Running",
            "reason": null,
            "podIPs": [{"$patch": "replace"}, {"ip": "10.0.0.1"}],
            "conditions": [ready, condition("PodScheduled"), {"$patch": "delete", "type": "PodResizeInProgress"}],
        }});
        assert_eq!(status_patch(&key, &old, &new), expected);
    }
}
