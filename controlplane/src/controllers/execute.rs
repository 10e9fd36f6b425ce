//! The way out: does one write, and tells what it knows of the objects afterwards.

use std::sync::Arc;

use base64::Engine;
use futures::StreamExt;
use http::Method;
use k8s_openapi::List;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde::Deserialize;
use serde_json::{Value, json};

use super::namespace::FINALIZER;
use super::object::{Key, Kind, Object, ResourceType, Target};
use super::plan::{Action, Propagation};
use super::pods::{NAME_ALPHABET, controller_of};
use super::tokens;
use super::volumes::protection;
use super::watch::{Api, CallError, decode};

/// Attempts of a create whose answers get lost.
const CREATE_ATTEMPTS: u32 = 4;
/// Requests at a time to see whether a namespace is empty.
const PARALLEL_LISTS: usize = 16;

/// How long a token in a Secret lasts: as long as the API grants, 136 years.
const TOKEN_SECONDS: u64 = 1 << 32;

/// What a write has brought to light.
#[derive(Debug, Default)]
pub struct Outcome {
    /// States of objects as the server answered them.
    pub seen: Vec<Object>,
    /// Objects that are gone.
    pub gone: Vec<Target>,
    pub failure: Option<Failure>,
    /// Name of the object written, for the note.
    pub name: Option<String>,
}

#[derive(Debug)]
pub struct Failure {
    pub message: String,
    /// The snapshot was behind, and the next plan will know better: nobody needs to be told.
    pub stale: bool,
}

impl Outcome {
    fn failed(error: &CallError) -> Self {
        let stale = matches!(error.code(), Some(404 | 409)) && !error.is_already_there();
        Self {
            failure: Some(Failure {
                message: error.to_string(),
                stale,
            }),
            ..Self::default()
        }
    }

    fn stale(message: impl Into<String>) -> Self {
        Self {
            failure: Some(Failure {
                message: message.into(),
                stale: true,
            }),
            ..Self::default()
        }
    }

    fn seen(object: Object) -> Self {
        Self {
            name: object.meta().name.clone(),
            seen: vec![object],
            ..Self::default()
        }
    }
}

pub async fn execute(api: &Api, resources: &[Arc<ResourceType>], action: Action) -> Outcome {
    match action {
        Action::None => Outcome::default(),
        Action::Create(object) => create(api, &object).await,
        Action::Patch {
            target,
            subresource,
            body,
        } => patch(api, &target, subresource, &body).await,
        Action::Delete {
            target,
            propagation,
            grace_seconds,
        } => delete(api, &target, propagation, grace_seconds, None).await,
        Action::Collect {
            target,
            revision,
            owners,
            propagation,
        } => collect(api, resources, &target, revision, &owners, propagation).await,
        Action::Bind { pod, node } => bind(api, &pod, &node).await,
        Action::FillToken {
            secret,
            account,
            has_token,
            root_ca,
        } => fill_token(api, &secret, &account, has_token, &root_ca).await,
        Action::FinalizeNamespace(target) => finalize(api, resources, &target).await,
        Action::ReleaseClaim(claim) => release_claim(api, &claim).await,
    }
}

async fn create(api: &Api, object: &Object) -> Outcome {
    let resource = object.resource().clone();
    let mut value = match object.encode() {
        Ok(value) => value,
        Err(error) => return Outcome::stale(format!("cannot encode a {}: {error}", resource.kind)),
    };
    let namespace = object.meta().namespace.as_deref().unwrap_or_default();
    let path = resource.path(namespace);
    let prefix = object
        .meta()
        .generate_name
        .clone()
        .filter(|_| object.meta().name.is_none());
    let mut name = match &prefix {
        Some(prefix) => generated_name(prefix),
        None => object.meta().name.clone().unwrap_or_default(),
    };
    let mut lost = false;
    for attempt in 1..=CREATE_ATTEMPTS {
        value["metadata"]["name"] = json!(name);
        match api.call(Method::POST, &path, Some(&value)).await {
            Ok(text) => {
                return match decode(&resource, &path, &text) {
                    Ok(created) => Outcome::seen(created),
                    Err(error) => Outcome::failed(&error),
                };
            }
            Err(error) if error.is_already_there() => {
                let found = match api.get(&resource, &Key::new(namespace, &name)).await {
                    Ok(Some(found)) => found,
                    Ok(None) => continue,
                    Err(error) => return Outcome::failed(&error),
                };
                // Ours from an attempt whose answer was lost, or wanted under this very name and there already.
                if (lost && same_controller(&found, object)) || prefix.is_none() {
                    return Outcome::seen(found);
                }
                if let Some(prefix) = &prefix {
                    name = generated_name(prefix);
                    lost = false;
                }
            }
            Err(CallError::Unknown { .. }) if attempt < CREATE_ATTEMPTS => lost = true,
            Err(error) => return Outcome::failed(&error),
        }
    }
    Outcome::stale(format!(
        "no {} could be created in {CREATE_ATTEMPTS} attempts",
        resource.kind
    ))
}

fn same_controller(a: &Object, b: &Object) -> bool {
    let uid = |object: &Object| controller_of(object.meta()).map(|owner| owner.uid.clone());
    uid(a).is_some() && uid(a) == uid(b)
}

fn generated_name(prefix: &str) -> String {
    let suffix = (0..5).map(|_| NAME_ALPHABET[rand::random_range(0..NAME_ALPHABET.len())] as char);
    prefix.chars().chain(suffix).collect()
}

async fn patch(api: &Api, target: &Target, subresource: Option<&str>, body: &Value) -> Outcome {
    let mut path = target.resource.object_path(&target.key);
    if let Some(subresource) = subresource {
        path.push('/');
        path.push_str(subresource);
    }
    match api.call(Method::PATCH, &path, Some(body)).await {
        Ok(text) => match decode(&target.resource, &path, &text) {
            // A patch that takes off the last finalizer of a deleted object answers with the object, and the object is gone.
            Ok(object) => after_delete(object, target),
            Err(error) => Outcome::failed(&error),
        },
        Err(error) if error.code() == Some(404) => Outcome {
            gone: vec![target.clone()],
            ..Outcome::default()
        },
        Err(error) => Outcome::failed(&error),
    }
}

fn after_delete(object: Object, target: &Target) -> Outcome {
    let meta = object.meta();
    let held = meta
        .finalizers
        .as_ref()
        .is_some_and(|finalizers| !finalizers.is_empty())
        || meta.deletion_grace_period_seconds.unwrap_or(0) > 0
        || matches!(&object, Object::Namespace(namespace) if has_spec_finalizer(namespace));
    if meta.deletion_timestamp.is_none() || held {
        return Outcome::seen(object);
    }
    Outcome {
        name: meta.name.clone(),
        gone: vec![target.clone()],
        ..Outcome::default()
    }
}

fn has_spec_finalizer(namespace: &k8s_openapi::api::core::v1::Namespace) -> bool {
    namespace
        .spec
        .as_ref()
        .and_then(|spec| spec.finalizers.as_ref())
        .is_some_and(|held| !held.is_empty())
}

async fn delete(
    api: &Api,
    target: &Target,
    propagation: Option<Propagation>,
    grace_seconds: Option<i64>,
    revision: Option<u64>,
) -> Outcome {
    let mut preconditions = json!({"uid": &*target.uid});
    if let Some(revision) = revision {
        preconditions["resourceVersion"] = json!(revision.to_string());
    }
    let mut options =
        json!({"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": preconditions});
    if let Some(propagation) = propagation {
        options["propagationPolicy"] = json!(propagation.as_str());
    }
    if let Some(grace_seconds) = grace_seconds {
        options["gracePeriodSeconds"] = json!(grace_seconds);
    }
    let path = target.resource.object_path(&target.key);
    let name = Some(target.key.name.to_string());
    match api.call(Method::DELETE, &path, Some(&options)).await {
        Ok(text) => {
            #[derive(Deserialize)]
            struct Answer {
                kind: Option<String>,
            }
            let is_status = serde_json::from_str::<Answer>(&text)
                .is_ok_and(|answer| answer.kind.as_deref() == Some("Status"));
            if is_status {
                return Outcome {
                    name,
                    gone: vec![target.clone()],
                    ..Outcome::default()
                };
            }
            match decode(&target.resource, &path, &text) {
                // Without a deletion timestamp it is the last state of an object that went at once.
                Ok(object) if object.meta().deletion_timestamp.is_none() => Outcome {
                    name,
                    gone: vec![target.clone()],
                    ..Outcome::default()
                },
                Ok(object) => after_delete(object, target),
                Err(error) => Outcome::failed(&error),
            }
        }
        Err(error) if error.code() == Some(404) => Outcome {
            name,
            gone: vec![target.clone()],
            ..Outcome::default()
        },
        Err(error) => Outcome::failed(&error),
    }
}

/// Deletes a dependent unless one of the owners that the graph lacks turns out to be there.
async fn collect(
    api: &Api,
    resources: &[Arc<ResourceType>],
    target: &Target,
    revision: u64,
    owners: &[OwnerReference],
    propagation: Propagation,
) -> Outcome {
    for owner in owners {
        let known = resources
            .iter()
            .find(|found| found.kind == owner.kind && found.api_version() == owner.api_version);
        let Some(resource) = known else {
            let (kind, version) = (&owner.kind, &owner.api_version);
            return Outcome::stale(format!(
                "owner {} is of a kind that is not served: {kind} of {version}",
                owner.name
            ));
        };
        let namespace = if resource.namespaced {
            &*target.key.namespace
        } else {
            ""
        };
        if resource.namespaced && namespace.is_empty() {
            // Whose it is cannot be known: upstream leaves such an object alone too.
            return Outcome::stale(format!(
                "{} is cluster-scoped and names an owner in a namespace",
                target.key
            ));
        }
        match api.get(resource, &Key::new(namespace, &owner.name)).await {
            Ok(Some(found)) if found.uid() == owner.uid => {
                let mut outcome =
                    Outcome::stale(format!("owner {} is there after all", owner.name));
                outcome.seen.push(found);
                return outcome;
            }
            Ok(_) => {}
            Err(error) => return Outcome::failed(&error),
        }
    }
    delete(api, target, Some(propagation), None, Some(revision)).await
}

async fn bind(api: &Api, pod: &Target, node: &str) -> Outcome {
    let path = format!("{}/binding", pod.resource.object_path(&pod.key));
    let body = json!({
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"namespace": &*pod.key.namespace, "name": &*pod.key.name, "uid": &*pod.uid},
        "target": {"apiVersion": "v1", "kind": "Node", "name": node},
    });
    match api.call(Method::POST, &path, Some(&body)).await {
        Ok(_) => Outcome {
            name: Some(pod.key.name.to_string()),
            ..Outcome::default()
        },
        Err(error) => Outcome::failed(&error),
    }
}

/// Asks for a token that lasts until its Secret or account goes, and writes it into the Secret.
async fn fill_token(
    api: &Api,
    secret: &Target,
    account: &Target,
    has_token: bool,
    root_ca: &str,
) -> Outcome {
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let mut data = json!({
        tokens::CA: encode(root_ca),
        tokens::NAMESPACE: encode(&secret.key.namespace),
    });
    if !has_token {
        let path = format!("{}/token", account.resource.object_path(&account.key));
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [],
                "expirationSeconds": TOKEN_SECONDS,
                "boundObjectRef": {
                    "apiVersion": "v1", "kind": "Secret", "name": &*secret.key.name, "uid": &*secret.uid,
                },
            },
        });
        let granted = match api.call(Method::POST, &path, Some(&request)).await {
            Ok(text) => serde_json::from_str::<Value>(&text).unwrap_or_default(),
            Err(error) => return Outcome::failed(&error),
        };
        let Some(token) = granted["status"]["token"].as_str() else {
            return Outcome::stale(format!("no token was granted for {}", account.key));
        };
        data[tokens::TOKEN] = json!(encode(token));
    }
    let body = json!({
        "metadata": {"uid": &*secret.uid, "annotations": {tokens::ACCOUNT_UID: &*account.uid}},
        "data": data,
    });
    patch(api, secret, None, &body).await
}

/// Lets a namespace go if nothing is left in it; deletes what is.
async fn finalize(api: &Api, resources: &[Arc<ResourceType>], target: &Target) -> Outcome {
    let namespace = &target.key.name;
    let mut checks = Vec::new();
    for resource in resources.iter().filter(|resource| resource.namespaced) {
        checks.push(empty(api.clone(), resource.clone(), namespace.clone()));
    }
    let emptied: Vec<_> = futures::stream::iter(checks)
        .buffer_unordered(PARALLEL_LISTS)
        .collect()
        .await;
    let mut left = Vec::new();
    for result in emptied {
        match result {
            Ok(None) => {}
            Ok(Some(resource)) => left.push(resource),
            Err(error) => return Outcome::failed(&error),
        }
    }
    if !left.is_empty() {
        return Outcome::stale(format!(
            "namespace {namespace} still has {}",
            left.join(", ")
        ));
    }
    let current = match api.get(&target.resource, &target.key).await {
        Ok(Some(Object::Namespace(current)))
            if current.metadata.uid.as_deref() == Some(&*target.uid) =>
        {
            current
        }
        Ok(_) => {
            return Outcome {
                gone: vec![target.clone()],
                ..Outcome::default()
            };
        }
        Err(error) => return Outcome::failed(&error),
    };
    let mut namespace = (*current).clone();
    if let Some(held) = namespace
        .spec
        .as_mut()
        .and_then(|spec| spec.finalizers.as_mut())
    {
        held.retain(|finalizer| finalizer != FINALIZER);
    }
    let path = format!("{}/finalize", target.resource.object_path(&target.key));
    let body = match serde_json::to_value(&namespace) {
        Ok(body) => body,
        Err(error) => return Outcome::stale(error.to_string()),
    };
    match api.call(Method::PUT, &path, Some(&body)).await {
        Ok(text) => match decode(&target.resource, &path, &text) {
            Ok(object) => after_delete(object, target),
            Err(error) => Outcome::failed(&error),
        },
        Err(error) if error.code() == Some(404) => Outcome {
            gone: vec![target.clone()],
            ..Outcome::default()
        },
        Err(error) => Outcome::failed(&error),
    }
}

/// Takes its protection from a claim, unless a pod uses it after all.
async fn release_claim(api: &Api, claim: &PersistentVolumeClaim) -> Outcome {
    let target = Target::of(claim);
    let path = Kind::Pod.resource().path(&target.key.namespace);
    let pods = match api.call(Method::GET, &path, None).await {
        Ok(text) => serde_json::from_str::<List<Pod>>(&text),
        Err(error) => return Outcome::failed(&error),
    };
    match pods {
        Ok(pods) => match pods.items.iter().find(|pod| protection::uses(pod, claim)) {
            Some(pod) => Outcome::stale(format!(
                "claim {} is in use by pod {}",
                target.key,
                Key::of(&pod.metadata)
            )),
            None => {
                let body = protection::release(&claim.metadata, protection::CLAIM);
                patch(api, &target, None, &body).await
            }
        },
        Err(error) => Outcome::stale(format!("cannot read the list of pods: {error}")),
    }
}

/// The name of the resource if the namespace has objects of it, which are then told to go.
async fn empty(
    api: Api,
    resource: Arc<ResourceType>,
    namespace: Arc<str>,
) -> Result<Option<String>, CallError> {
    #[derive(Deserialize)]
    struct List {
        items: Option<Vec<Value>>,
    }
    let path = resource.path(&namespace);
    let text = match api
        .call(Method::GET, &format!("{path}?limit=1"), None)
        .await
    {
        Ok(text) => text,
        // Discovered a moment ago and gone since.
        Err(error) if error.code() == Some(404) => return Ok(None),
        Err(error) => return Err(error),
    };
    let list: List = serde_json::from_str(&text).map_err(|error| CallError::Unknown {
        method: Method::GET,
        path: path.clone(),
        message: error.to_string(),
    })?;
    if list.items.is_none_or(|items| items.is_empty()) {
        return Ok(None);
    }
    let options =
        json!({"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"});
    api.call(Method::DELETE, &path, Some(&options)).await?;
    Ok(Some(resource.plural.clone()))
}
