//! Admission: what a write depends on besides its own object. Built in, in upstream's order: NodeRestriction, NamespaceLifecycle,
//! LimitRanger, ServiceAccount, TaintNodesByCondition, PodSecurity, Priority, DefaultTolerationSeconds, DefaultStorageClass,
//! StorageObjectInUseProtection, RuntimeClass, CertificateSubjectRestriction, and after validation ResourceQuota. Nobody hands out rights that they do not
//! hold (`escalation.rs`).

mod certificate;
mod escalation;
mod levels;
mod limits;
mod node;
mod pod;
mod quota;
mod security;
mod storage;

use serde_json::{Value, json};

use super::fields::{self, Fields};
use super::request::{Target, WriteOptions};
use super::status::{Status, Subject};
use super::{Api, object};
use crate::auth::node::node_of;
use crate::registry;
use crate::store::Range;

pub use node::check_token;
pub use quota::{Usage, charge, covers, usage};

/// What a node is tainted with until it is known to be ready.
const NOT_READY: &str = "node.kubernetes.io/not-ready";

/// Admits a new object or a change of one, and fills in what depends on others.
pub async fn admit(
    api: &Api,
    options: &WriteOptions,
    target: &Target,
    object: &mut Value,
    old: Option<&Value>,
) -> Result<(), Status> {
    let creates = old.is_none();
    let caller = options.caller.as_deref();
    if let Some(caller) = caller.filter(|_| api.decides()) {
        if let Some(node) = node_of(caller) {
            node::restrict(node, target, object, old)?;
        }
        escalation::check(api, caller, target, object, old).await?;
    }
    if creates {
        check_namespace(api, target, object).await?;
        if let Some(finalizer) = storage::protection_of(target.resource) {
            storage::protect(object, finalizer);
        }
    }
    match (target.resource.group, target.resource.plural) {
        ("", "pods") if creates => {
            limits::default_pod(api, target, object).await?;
            pod::service_account(api, target, object).await?;
            pod::priority(api, target, object).await?;
            pod::tolerate_absent_nodes(object);
            pod::runtime_class(api, target, object).await?;
            security::check_pod(api, options, target, object).await?;
            limits::check_pod(api, target, object).await?;
        }
        ("", "pods") => {
            // A client that sends its own list in place of all leaves them out.
            pod::tolerate_absent_nodes(object);
            if old.is_some_and(|old| security::matters(object, old)) {
                security::check_pod(api, options, target, object).await?;
            }
        }
        ("", "namespaces") => {
            security::check_namespace(api, object, old, &options.warnings).await?
        }
        ("", "nodes") if creates => taint_until_ready(object),
        ("", "persistentvolumeclaims") => {
            if creates {
                storage::default_class(api, object).await?;
            }
            limits::check_claim(api, target, object).await?;
        }
        ("scheduling.k8s.io", "priorityclasses")
            if object.flag("/globalDefault")
                && !old.is_some_and(|old| old.flag("/globalDefault")) =>
        {
            pod::check_single_default(api, target, object).await?;
        }
        ("certificates.k8s.io", "certificatesigningrequests") if creates => {
            certificate::check_subject(target, object)?;
        }
        ("networking.k8s.io", "ingresses") if creates => {
            storage::default_ingress_class(api, object).await?;
        }
        _ => security::check_template(api, options, target, object).await?,
    }
    Ok(())
}

/// Admits what is said of an object's state.
pub fn admit_status(
    api: &Api,
    options: &WriteOptions,
    target: &Target,
    object: &Value,
    old: &Value,
) -> Result<(), Status> {
    let caller = options.caller.as_deref().filter(|_| api.decides());
    match caller.and_then(node_of) {
        Some(node) => node::restrict_status(node, target, object, old),
        None => Ok(()),
    }
}

/// Admits other requests and limits of a pod that runs.
pub async fn admit_resize(api: &Api, target: &Target, pod: &Value) -> Result<(), Status> {
    limits::check_pod(api, target, pod).await
}

/// Admits containers that are added to a pod that runs.
pub async fn admit_containers(
    api: &Api,
    options: &WriteOptions,
    target: &Target,
    pod: &Value,
) -> Result<(), Status> {
    security::check_pod(api, options, target, pod).await
}

/// All stored objects of a resource (of version v1), as clients see them.
async fn stored(
    api: &Api,
    group: &str,
    plural: &str,
    namespace: Option<&str>,
) -> Result<Vec<Value>, Status> {
    let Some(resource) = registry::resource(group, "v1", plural) else {
        return Ok(Vec::new());
    };
    let prefix = object::prefix(resource, namespace);
    let page = api.store.list(Range::all(&prefix)).await?;
    let decode = |record| object::decode(record, resource.kind, &resource.api_version());
    page.records.iter().map(decode).collect()
}

/// The namespace must exist and must not be going away.
async fn check_namespace(api: &Api, target: &Target, object: &Value) -> Result<(), Status> {
    let Some(namespace) = target.namespace.as_deref() else {
        return Ok(());
    };
    let found = api.lookup("", "namespaces", None, namespace).await?;
    let Some(found) = found else {
        let subject = Subject {
            group: "",
            resource: "namespaces",
            name: namespace,
        };
        return Err(Status::not_found(subject));
    };
    // Events tell about the going away itself.
    if found.has("/metadata/deletionTimestamp") && target.resource.plural != "events" {
        let why = format!(
            "unable to create new content in namespace {namespace} because it is being terminated"
        );
        let mut status = Status::forbidden(target.subject_named(fields::name(object)), why);
        let cause = json!({"reason": "NamespaceTerminating", "field": "metadata.namespace",
            "message": format!("namespace {namespace} is being terminated")});
        status.details.insert("causes".into(), json!([cause]));
        return Err(status);
    }
    Ok(())
}

/// A new node takes no pods before it has said that it is ready.
fn taint_until_ready(node: &mut Value) {
    let tainted = node
        .items("/spec/taints")
        .iter()
        .any(|taint| taint.text("/key") == NOT_READY && taint.text("/effect") == "NoSchedule");
    if !tainted {
        let mut taints = node.items("/spec/taints").to_vec();
        taints.push(json!({"key": NOT_READY, "effect": "NoSchedule"}));
        node.set("/spec/taints", taints);
    }
}
