//! ResourceQuotas: what an object uses, which quotas that counts against, and the refusal when one would be exceeded.
//!
//! Usage is written to the quota before the object is stored, by compare and swap: of two writes at once, only as many
//! pass as fit. What a failed write has used up is given back when the quota controller counts again.

use std::collections::BTreeMap;

use serde_json::Value;

use super::limits::pod_total;
use super::stored;
use crate::api::fields::{self, Fields};
use crate::api::request::Target;
use crate::api::status::Status;
use crate::api::write::Write;
use crate::api::{Api, object};
use crate::codec::quantity::Quantity;
use crate::registry::{self, Resource};
use crate::store::{Expect, StoreError};

/// How often a quota is charged again when others charge it at the same time.
const CONFLICT_RETRIES: usize = 64;
/// What of a pod's resources counts, under `requests.` and `limits.`.
const COMPUTE: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];

pub type Usage = BTreeMap<String, Quantity>;

/// Counts a write against the quotas of its namespace; 403 when one would be exceeded.
pub async fn charge(
    api: &Api,
    write: Write<'_>,
    new: &Value,
    old: Option<&Value>,
) -> Result<(), Status> {
    let target = write.target;
    let Some(namespace) = target.namespace.as_deref() else {
        return Ok(());
    };
    if !counts(target.resource) {
        return Ok(());
    }
    for quota in stored(api, "", "resourcequotas", Some(namespace)).await? {
        if !covers(&quota, target.resource, new) {
            continue;
        }
        let mut delta = usage(target.resource, new);
        if let Some(old) = old.filter(|old| covers(&quota, target.resource, old)) {
            for (name, quantity) in usage(target.resource, old) {
                let entry = delta.entry(name).or_insert(Quantity::ZERO);
                *entry = *entry - quantity;
            }
        }
        delta.retain(|name, quantity| !quantity.is_zero() && quota.has(&hard_pointer(name)));
        require_compute(target, &quota, new)?;
        // Giving back is the controller's: an update that shrinks is never refused.
        if delta.values().any(|quantity| *quantity > Quantity::ZERO) {
            charge_one(api, write, fields::name(&quota), &delta, new).await?;
        }
    }
    Ok(())
}

/// Whether anything of a resource can be limited by a quota. Events would never be: they tell about it.
fn counts(resource: &Resource) -> bool {
    resource.namespaced && resource.plural != "events" && resource.verbs.contains(&"list")
}

fn hard_pointer(name: &str) -> String {
    format!("/spec/hard/{}", name.replace('~', "~0").replace('/', "~1"))
}

async fn charge_one(
    api: &Api,
    write: Write<'_>,
    quota: &str,
    delta: &Usage,
    object: &Value,
) -> Result<(), Status> {
    let target = write.target;
    let Some(resource) = registry::resource("", "v1", "resourcequotas") else {
        return Ok(());
    };
    let key = object::key(resource, target.namespace.as_deref(), quota);
    let mut place = api.contention.place(&key);
    for attempt in 0..CONFLICT_RETRIES {
        place.wait(attempt > 0).await;
        let Some(record) = api.store.get(&key).await? else {
            return Ok(());
        };
        let mut quota = object::decode(&record, resource.kind, &resource.api_version())?;
        let mut used = Usage::new();
        for name in delta.keys() {
            let known = quota.object("/status/used").and_then(|used| used.get(name));
            let quantity = match known.and_then(Quantity::of) {
                Some(quantity) => quantity,
                // Not counted yet: the quota is younger than its controller's last look.
                None => count(api, target, &quota, name).await?,
            };
            used.insert(name.clone(), quantity);
        }
        let hard = |name: &str| quota.object("/spec/hard")?.get(name).and_then(Quantity::of);
        let exceeded: Vec<&String> = delta
            .iter()
            .filter(|(_, asked)| **asked > Quantity::ZERO)
            .filter(|(name, asked)| hard(name).is_some_and(|hard| used[*name] + **asked > hard))
            .map(|(name, _)| name)
            .collect();
        if !exceeded.is_empty() {
            let list = |of: &dyn Fn(&str) -> Option<Quantity>| {
                let parts = exceeded
                    .iter()
                    .filter_map(|name| Some(format!("{name}={}", of(name)?)));
                parts.collect::<Vec<_>>().join(",")
            };
            let why = format!(
                "exceeded quota: {}, requested: {}, used: {}, limited: {}",
                fields::name(&quota),
                list(&|name| delta.get(name).copied()),
                list(&|name| used.get(name).copied()),
                list(&hard)
            );
            return Err(Status::forbidden(
                target.subject_named(fields::name(object)),
                why,
            ));
        }
        if write.options.dry_run {
            return Ok(());
        }
        for (name, asked) in delta {
            let total = (used[name] + *asked).to_string();
            quota
                .object_mut("/status/used")
                .insert(name.clone(), total.into());
        }
        let hard = quota.pointer("/spec/hard").cloned().unwrap_or_default();
        quota.set("/status/hard", hard);
        let expect = Expect::Revision(record.revision);
        match api.store.put(&key, object::encode(quota), expect).await {
            Ok(_) => return Ok(()),
            Err(StoreError::Conflict { .. } | StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Status::too_many_requests(
        "the quota of the namespace is charged by too many writes at once; try again",
        1,
    ))
}

/// What the objects of the target's resource use of one limited resource.
async fn count(api: &Api, target: &Target, quota: &Value, name: &str) -> Result<Quantity, Status> {
    let resource = target.resource;
    let objects = stored(
        api,
        resource.group,
        resource.plural,
        target.namespace.as_deref(),
    )
    .await?;
    let used = objects
        .iter()
        .filter(|object| covers(quota, resource, object))
        .filter_map(|object| usage(resource, object).remove(name));
    Ok(used.fold(Quantity::ZERO, |total, quantity| total + quantity))
}

/// A quota on compute resources wants every container to say what it asks for.
fn require_compute(target: &Target, quota: &Value, pod: &Value) -> Result<(), Status> {
    if !is_pods(target.resource) || is_over(pod) {
        return Ok(());
    }
    let mut missing: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in quota
        .object("/spec/hard")
        .into_iter()
        .flatten()
        .map(|(name, _)| name)
    {
        let (kind, resource) = match name.split_once('.') {
            Some((kind @ ("requests" | "limits"), resource)) => (kind, resource),
            _ => ("requests", name.as_str()),
        };
        if !["cpu", "memory"].contains(&resource) {
            continue;
        }
        for list in ["/spec/initContainers", "/spec/containers"] {
            for container in pod.items(list) {
                if !container.has(&format!("/resources/{kind}/{resource}")) {
                    missing
                        .entry(name)
                        .or_default()
                        .push(container.text("/name"));
                }
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let missing: Vec<String> = missing
        .into_iter()
        .map(|(resource, containers)| format!("{resource} for: {}", containers.join(",")))
        .collect();
    let why = format!(
        "failed quota: {}: must specify {}",
        fields::name(quota),
        missing.join("; ")
    );
    Err(Status::forbidden(
        target.subject_named(fields::name(pod)),
        why,
    ))
}

fn is_pods(resource: &Resource) -> bool {
    resource.group.is_empty() && resource.plural == "pods"
}

fn is_over(pod: &Value) -> bool {
    matches!(pod.text("/status/phase"), "Succeeded" | "Failed")
}

/// What an object uses, by the names that quotas limit.
pub fn usage(resource: &Resource, object: &Value) -> Usage {
    let mut usage = Usage::new();
    let one = Quantity::count(1);
    usage.insert(format!("count/{}", resource.qualified()), one);
    if resource.group == "resource.k8s.io" && resource.plural == "resourceclaims" {
        devices(object, &mut usage);
    }
    if !resource.group.is_empty() {
        return usage;
    }
    match resource.plural {
        "pods" => {
            if is_over(object) {
                return usage;
            }
            usage.insert("pods".to_owned(), one);
            pod_usage(object, &mut usage);
        }
        "services" => {
            usage.insert("services".to_owned(), one);
            let ports = object.items("/spec/ports");
            let node_ports = match object.text("/spec/type") {
                "NodePort" => ports.len(),
                "LoadBalancer" => ports
                    .iter()
                    .filter(|port| port.int("/nodePort") != 0)
                    .count(),
                _ => 0,
            };
            let node_ports = i64::try_from(node_ports).unwrap_or(i64::MAX);
            usage.insert("services.nodeports".to_owned(), Quantity::count(node_ports));
            if object.text("/spec/type") == "LoadBalancer" {
                usage.insert("services.loadbalancers".to_owned(), one);
            }
        }
        "persistentvolumeclaims" => {
            usage.insert("persistentvolumeclaims".to_owned(), one);
            let class = object.text("/spec/storageClassName");
            let by_class = |name: &str| format!("{class}.storageclass.storage.k8s.io/{name}");
            if !class.is_empty() {
                usage.insert(by_class("persistentvolumeclaims"), one);
            }
            let asked = object
                .pointer("/spec/resources/requests/storage")
                .and_then(Quantity::of);
            if let Some(asked) = asked {
                usage.insert("requests.storage".to_owned(), asked);
                if !class.is_empty() {
                    usage.insert(by_class("requests.storage"), asked);
                }
            }
        }
        "replicationcontrollers" | "resourcequotas" | "secrets" | "configmaps" => {
            usage.insert(resource.plural.to_owned(), one);
        }
        _ => {}
    }
    usage
}

fn pod_usage(pod: &Value, usage: &mut Usage) {
    for resource in COMPUTE {
        if let Some(requests) = pod_total(pod, "requests", resource) {
            usage.insert(resource.to_owned(), requests);
            usage.insert(format!("requests.{resource}"), requests);
        }
        if let Some(limits) = pod_total(pod, "limits", resource) {
            usage.insert(format!("limits.{resource}"), limits);
        }
    }
    // Devices and huge pages are asked for by name.
    for container in pod.items("/spec/containers") {
        let asked = container
            .object("/resources/requests")
            .into_iter()
            .flatten();
        for (resource, _) in
            asked.filter(|(name, _)| name.contains('/') || name.starts_with("hugepages-"))
        {
            if let Some(requests) = pod_total(pod, "requests", resource) {
                usage.insert(format!("requests.{resource}"), requests);
                if resource.starts_with("hugepages-") {
                    usage.insert(resource.clone(), requests);
                }
            }
        }
    }
}

/// The most devices that one claim can be given: what a request for all of them counts as.
const DEVICES_MAX: i64 = 32;

/// Devices that a claim asks for, by class. Of alternatives, the one that asks for most counts.
fn devices(claim: &Value, usage: &mut Usage) {
    let asked = |request: &Value| {
        let count = match request.text("/allocationMode") {
            "All" => DEVICES_MAX,
            _ => request.int("/count").max(1),
        };
        let class = request.text("/deviceClassName");
        (
            format!("{class}.deviceclass.resource.k8s.io/devices"),
            count,
        )
    };
    for request in claim.items("/spec/devices/requests") {
        let mut most: BTreeMap<String, i64> = BTreeMap::new();
        let exactly = request.pointer("/exactly").into_iter();
        for (class, count) in exactly.chain(request.items("/firstAvailable")).map(asked) {
            let entry = most.entry(class).or_default();
            *entry = count.max(*entry);
        }
        for (class, count) in most {
            let entry = usage.entry(class).or_insert(Quantity::ZERO);
            *entry = *entry + Quantity::count(count);
        }
    }
}

/// Whether all scopes of a quota hold of an object. Only pods, and claims by their class, have scopes.
pub fn covers(quota: &Value, resource: &Resource, object: &Value) -> bool {
    let scopes = quota.items("/spec/scopes");
    let expressions = quota.items("/spec/scopeSelector/matchExpressions");
    if scopes.is_empty() && expressions.is_empty() {
        return true;
    }
    if resource.group.is_empty() && resource.plural == "persistentvolumeclaims" {
        let of_class = |scope: &str| scope == "VolumeAttributesClass";
        let class = object.text("/spec/volumeAttributesClassName");
        let mut plain = scopes.iter().filter_map(Value::as_str);
        return plain.all(|scope| of_class(scope) && !class.is_empty())
            && expressions.iter().all(|expression| {
                of_class(expression.text("/scopeName")) && in_class(expression, class)
            });
    }
    if !is_pods(resource) {
        return false;
    }
    scopes
        .iter()
        .filter_map(Value::as_str)
        .all(|scope| in_scope(scope, object))
        && expressions.iter().all(|expression| {
            let scope = expression.text("/scopeName");
            if scope == "PriorityClass" {
                in_class(expression, object.text("/spec/priorityClassName"))
            } else {
                in_scope(scope, object) != (expression.text("/operator") == "DoesNotExist")
            }
        })
}

fn in_class(expression: &Value, class: &str) -> bool {
    let listed = expression
        .items("/values")
        .iter()
        .any(|value| value == class);
    match expression.text("/operator") {
        "In" => listed,
        "NotIn" => !listed,
        "DoesNotExist" => class.is_empty(),
        _ => !class.is_empty(),
    }
}

fn in_scope(scope: &str, pod: &Value) -> bool {
    let ends = pod.int("/spec/activeDeadlineSeconds") > 0 || pod.has("/spec/activeDeadlineSeconds");
    let asks = ["/spec/containers", "/spec/initContainers"]
        .iter()
        .any(|list| {
            pod.items(list).iter().any(|container| {
                ["cpu", "memory"].iter().any(|resource| {
                    container.has(&format!("/resources/requests/{resource}"))
                        || container.has(&format!("/resources/limits/{resource}"))
                })
            })
        });
    match scope {
        "Terminating" => ends,
        "NotTerminating" => !ends,
        "BestEffort" => !asks,
        "NotBestEffort" => asks,
        "PriorityClass" => !pod.text("/spec/priorityClassName").is_empty(),
        "CrossNamespacePodAffinity" => reaches_other_namespaces(pod),
        _ => false,
    }
}

/// Whether a pod's affinity looks at pods of other namespaces.
fn reaches_other_namespaces(pod: &Value) -> bool {
    ["podAffinity", "podAntiAffinity"].iter().any(|kind| {
        let at = format!("/spec/affinity/{kind}");
        let required = pod.items(&format!(
            "{at}/requiredDuringSchedulingIgnoredDuringExecution"
        ));
        let preferred = pod
            .items(&format!(
                "{at}/preferredDuringSchedulingIgnoredDuringExecution"
            ))
            .iter()
            .filter_map(|term| term.pointer("/podAffinityTerm"));
        required
            .iter()
            .chain(preferred)
            .any(|term| !term.items("/namespaces").is_empty() || term.has("/namespaceSelector"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, json};

    fn resource(plural: &str) -> &'static Resource {
        registry::resource("", "v1", plural).expect("a table row")
    }

    fn shown(usage: &Usage) -> Map<String, Value> {
        let shown = usage
            .iter()
            .map(|(name, quantity)| (name.clone(), quantity.to_string().into()));
        shown.collect()
    }

    #[test]
    fn a_pod_uses_its_requests_and_limits_until_it_is_over() {
        let mut pod = json!({"spec": {"containers": [
            {"resources": {"requests": {"cpu": "1", "example.com/gpu": "2"}, "limits": {"memory": "1Gi"}}},
            {"resources": {"requests": {"cpu": "500m"}}}]}});
        assert_eq!(
            Value::Object(shown(&usage(resource("pods"), &pod))),
            json!({"count/pods": "1", "cpu": "1500m", "limits.memory": "1Gi", "pods": "1",
                "requests.cpu": "1500m", "requests.example.com/gpu": "2"})
        );
        pod.set("/status/phase", "Succeeded");
        assert_eq!(
            Value::Object(shown(&usage(resource("pods"), &pod))),
            json!({"count/pods": "1"})
        );
    }

    #[test]
    fn services_and_claims_use_ports_and_storage() {
        let service = json!({"spec": {"type": "NodePort", "ports": [{"port": 1}, {"port": 2}]}});
        let used = usage(resource("services"), &service);
        assert_eq!(used["services.nodeports"], Quantity::count(2));
        let claim = json!({"spec": {"storageClassName": "fast", "resources": {"requests": {"storage": "2Gi"}}}});
        let used = usage(resource("persistentvolumeclaims"), &claim);
        assert_eq!(used["requests.storage"].to_string(), "2Gi");
        assert_eq!(
            used["fast.storageclass.storage.k8s.io/requests.storage"].to_string(),
            "2Gi"
        );
    }

    #[test]
    fn scopes_choose_pods() {
        let pod = |spec: Value| json!({ "spec": spec });
        let scoped = |scope: &str| json!({"spec": {"scopes": [scope]}});
        let plain = pod(json!({"containers": [{"name": "a"}]}));
        let asking = pod(
            json!({"containers": [{"resources": {"requests": {"cpu": "1"}}}], "activeDeadlineSeconds": 5}),
        );
        for (scope, of_plain, of_asking) in [
            ("BestEffort", true, false),
            ("NotBestEffort", false, true),
            ("Terminating", false, true),
            ("NotTerminating", true, false),
        ] {
            assert_eq!(
                covers(&scoped(scope), resource("pods"), &plain),
                of_plain,
                "{scope}"
            );
            assert_eq!(
                covers(&scoped(scope), resource("pods"), &asking),
                of_asking,
                "{scope}"
            );
            assert!(!covers(&scoped(scope), resource("services"), &plain));
        }
        let class = json!({"spec": {"scopeSelector": {"matchExpressions": [
            {"scopeName": "PriorityClass", "operator": "In", "values": ["high"]}]}}});
        assert!(!covers(&class, resource("pods"), &plain));
        assert!(covers(
            &class,
            resource("pods"),
            &pod(json!({"priorityClassName": "high"}))
        ));
    }

    #[test]
    fn claims_count_by_the_class_of_their_volume_and_devices_by_theirs() {
        let quota = json!({"spec": {"scopeSelector": {"matchExpressions": [
            {"scopeName": "VolumeAttributesClass", "operator": "In", "values": ["gold"]}]}}});
        let claim = |class: &str| json!({"spec": {"volumeAttributesClassName": class}});
        let claims = resource("persistentvolumeclaims");
        assert!(covers(&quota, claims, &claim("gold")));
        assert!(!covers(&quota, claims, &claim("silver")));
        assert!(!covers(&quota, resource("pods"), &json!({})));
        let devices = registry::resource("resource.k8s.io", "v1", "resourceclaims").expect("a row");
        let claim = json!({"spec": {"devices": {"requests": [
            {"exactly": {"deviceClassName": "gpu", "count": 2}},
            {"firstAvailable": [{"deviceClassName": "gpu"}, {"deviceClassName": "gpu", "allocationMode": "All"}]}]}}});
        let used = usage(devices, &claim);
        assert_eq!(
            used["gpu.deviceclass.resource.k8s.io/devices"],
            Quantity::count(34)
        );
    }

    #[test]
    fn a_quota_on_compute_wants_every_container_to_ask() {
        let target = Target::parse("/api/v1/namespaces/a/pods").expect("pods");
        let quota = json!({"metadata": {"name": "q"}, "spec": {"hard": {"requests.cpu": "1", "pods": "3"}}});
        let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c"}]}});
        let refused = require_compute(&target, &quota, &pod).expect_err("refused");
        assert_eq!(
            refused.message,
            r#"pods "p" is forbidden: failed quota: q: must specify requests.cpu for: c"#
        );
    }
}
