//! Admission: what a write depends on besides its own object. Built in, in upstream's order: NamespaceLifecycle,
//! LimitRanger, ServiceAccount, TaintNodesByCondition, PodSecurity, Priority, DefaultTolerationSeconds, DefaultStorageClass,
//! RuntimeClass, and after validation ResourceQuota.

mod limits;
mod pod;
mod quota;
mod security;
mod storage;

use serde_json::{Value, json};

use super::fields::{self, Fields};
use super::request::Target;
use super::status::{Status, Subject};
use super::{Api, object};
use crate::registry;
use crate::store::Range;

pub use quota::{Usage, charge, covers, usage};

/// What a node is tainted with until it is known to be ready.
const NOT_READY: &str = "node.kubernetes.io/not-ready";

/// Admits a new object or a change of one, and fills in what depends on others.
pub async fn admit(
    api: &Api,
    target: &Target,
    object: &mut Value,
    old: Option<&Value>,
) -> Result<(), Status> {
    let creates = old.is_none();
    let namespace = match creates {
        true => check_namespace(api, target, object).await?,
        false => Value::Null,
    };
    match (target.resource.group, target.resource.plural) {
        ("", "pods") if creates => {
            limits::default_pod(api, target, object).await?;
            pod::service_account(api, target, object).await?;
            pod::priority(api, target, object).await?;
            pod::tolerate_absent_nodes(object);
            pod::runtime_class(api, target, object).await?;
            security::check(target, &namespace, object)?;
            limits::check_pod(api, target, object).await?;
        }
        // A client that sends its own list in place of all leaves them out.
        ("", "pods") => pod::tolerate_absent_nodes(object),
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
        ("networking.k8s.io", "ingresses") if creates => {
            storage::default_ingress_class(api, object).await?;
        }
        _ => {}
    }
    Ok(())
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

/// The namespace, which must exist and must not be going away; null of what has none.
async fn check_namespace(api: &Api, target: &Target, object: &Value) -> Result<Value, Status> {
    let Some(namespace) = target.namespace.as_deref() else {
        return Ok(Value::Null);
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
    Ok(found)
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
