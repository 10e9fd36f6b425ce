//! ResourceQuota status: what the objects of a namespace use of what their quotas limit. Admission counts what comes; this counts
//! what is there, and so gives back what has gone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, ResourceQuota, ResourceQuotaStatus};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as Written;
use k8s_openapi::jiff::SignedDuration;
use serde_json::{Value, json};

use super::object::{Key, Object};
use super::patch::replace_status;
use super::plan::{Controller, Keys, Plan, View, Write};
use super::pods;
use super::snapshot::{Change, Snapshot};
use crate::api::{Usage, covers, usage};
use crate::codec::quantity::Quantity;
use crate::registry;

/// A quota is counted anew after this in any case: upstream's resync period.
const RESYNC: SignedDuration = SignedDuration::from_mins(5);

/// Admission charges a quota before the object is there to be counted: for so long after a charge, a count that misses some of
/// it is not believed. Charges that follow each other put off what is given back only until the quota refuses them.
const CHARGED: Duration = Duration::from_secs(1);

pub const CONTROLLER: Controller = Controller {
    name: "resourcequota",
    affected,
    plan,
};

/// What comes was charged by admission before it was seen here: only what goes or shrinks is worth counting, and new limits.
fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    if let Object::ResourceQuota(quota) = change.object() {
        let spec = |object: &Option<Object>| match object {
            Some(Object::ResourceQuota(quota)) => quota.spec.clone(),
            _ => None,
        };
        // A status that somebody else wrote is put right at once.
        let hard = quota.spec.as_ref().and_then(|spec| spec.hard.as_ref());
        let shown = quota
            .status
            .as_ref()
            .and_then(|status| status.hard.as_ref());
        let differs = change.old.is_none() || spec(&change.old) != spec(&change.new);
        if change.new.is_some() && (differs || hard != shown) {
            keys.insert(Key::of(&quota.metadata));
        }
    }
    let shrinks = match (&change.old, &change.new) {
        (_, None) => true,
        (Some(Object::Pod(old)), Some(Object::Pod(new))) => {
            pods::is_terminal(old) != pods::is_terminal(new) || old.spec != new.spec
        }
        (Some(Object::Service(old)), Some(Object::Service(new))) => old.spec != new.spec,
        (Some(Object::PersistentVolumeClaim(old)), Some(Object::PersistentVolumeClaim(new))) => {
            old.spec != new.spec
        }
        _ => false,
    };
    if shrinks && let Some(namespace) = change.object().meta().namespace.as_deref() {
        keys.extend(
            snapshot
                .quotas
                .namespace(namespace)
                .map(|(key, _)| key.clone()),
        );
    }
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(quota) = view.snapshot.quotas.get(key) else {
        return plan;
    };
    if quota.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let hard = quota
        .spec
        .as_ref()
        .and_then(|spec| spec.hard.clone())
        .unwrap_or_default();
    let used = used(
        view.snapshot,
        quota,
        hard.keys().map(String::as_str).collect(),
    );
    if let Some(charged) = view.snapshot.charged(key)
        && let left = CHARGED.saturating_sub(view.instant.saturating_duration_since(charged))
        && !left.is_zero()
        && let shown = shown(quota)
        && used
            .iter()
            .any(|(name, used)| shown.get(name).is_some_and(|shown| used < shown))
    {
        plan.look_again(view.after(left));
        return plan;
    }
    let status = ResourceQuotaStatus {
        used: Some(
            used.into_iter()
                .map(|(name, used)| (name, Written(used.to_string())))
                .collect(),
        ),
        hard: Some(hard),
    };
    plan.writes.extend(
        replace_status(&**quota, quota.status.as_ref(), &status)
            .map(|action| Write { action, note: None }),
    );
    if let Ok(at) = view.now.checked_add(RESYNC) {
        plan.look_again(at);
    }
    plan
}

/// What the status of a quota says is used.
pub fn shown(quota: &ResourceQuota) -> Usage {
    let used = quota
        .status
        .as_ref()
        .and_then(|status| status.used.as_ref());
    let read = |(name, used): (&String, &Written)| {
        Some((name.clone(), Quantity::of(&Value::from(used.0.as_str()))?))
    };
    used.into_iter().flatten().filter_map(read).collect()
}

/// The limited names, each with what is used of it.
fn used(snapshot: &Snapshot, quota: &ResourceQuota, limited: BTreeSet<&str>) -> Usage {
    let namespace = quota.metadata.namespace.as_deref().unwrap_or_default();
    let mut total: Usage = limited
        .iter()
        .map(|name| ((*name).to_string(), Quantity::ZERO))
        .collect();
    let quota = json!(quota);
    let mut add = |group: &str, plural: &str, object: &Value| {
        let Some(resource) = registry::resource(group, "v1", plural) else {
            return;
        };
        if covers(&quota, resource, object) {
            for (name, amount) in usage(resource, object) {
                if let Some(sum) = total.get_mut(&name) {
                    *sum = *sum + amount;
                }
            }
        }
    };
    for (_, pod) in snapshot.pods.namespace(namespace) {
        add("", "pods", &json!(without_status(pod)));
    }
    for (_, service) in snapshot.services.namespace(namespace) {
        add("", "services", &json!(service));
    }
    for (_, claim) in snapshot.claims.namespace(namespace) {
        add("", "persistentvolumeclaims", &json!(claim));
    }
    // Of the rest, only the number counts.
    let mut others: BTreeMap<(&str, &str), i64> = BTreeMap::new();
    for node in snapshot.graph.of_namespace(namespace) {
        let resource = (node.resource.group.as_str(), node.resource.plural.as_str());
        let counted = matches!(
            resource,
            (
                "",
                "pods" | "services" | "persistentvolumeclaims" | "events"
            )
        );
        if !counted {
            *others.entry(resource).or_default() += 1;
        }
    }
    for ((group, plural), count) in others {
        for _ in 0..count {
            add(group, plural, &json!({}));
        }
    }
    total
}

/// All of the pod that quotas look at.
fn without_status(pod: &Pod) -> Pod {
    let mut pod = pod.clone();
    if let Some(status) = pod.status.as_mut() {
        *status = k8s_openapi::api::core::v1::PodStatus {
            phase: status.phase.clone(),
            ..Default::default()
        };
    }
    pod
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Cluster, namespace, pod};
    use super::*;

    fn cluster(quota: Value) -> Cluster {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.add(namespace("default"));
        let value = json!({"metadata": {"namespace": "default", "name": "limits"}, "spec": quota});
        cluster.add::<ResourceQuota>(serde_json::from_value(value).unwrap());
        cluster
    }

    fn add_pod(cluster: &mut Cluster, name: &str, cpu: Option<&str>) {
        let mut pod = pod("default", name);
        if let Some(cpu) = cpu {
            pod.spec.as_mut().unwrap().containers[0].resources =
                Some(serde_json::from_value(json!({"requests": {"cpu": cpu}})).unwrap());
        }
        cluster.add(pod);
    }

    fn used(cluster: &Cluster) -> Value {
        let quota = cluster.snapshot.quotas.values().next().unwrap();
        json!(quota.status.as_ref().unwrap().used)
    }

    #[test]
    fn what_is_there_is_counted_and_what_goes_is_given_back() {
        let mut cluster = cluster(json!({"hard": {
            "pods": "5", "requests.cpu": "2", "count/configmaps": "10", "configmaps": "10", "services": "3", "services.nodeports": "1",
        }}));
        add_pod(&mut cluster, "a", Some("500m"));
        add_pod(&mut cluster, "b", Some("250m"));
        let map = json!({"metadata": {"namespace": "default", "name": "map"}});
        cluster.add::<k8s_openapi::api::core::v1::ConfigMap>(serde_json::from_value(map).unwrap());
        cluster.settle();
        assert_eq!(
            used(&cluster),
            json!({
                "pods": "2", "requests.cpu": "750m", "count/configmaps": "1", "configmaps": "1", "services": "0", "services.nodeports": "0",
            })
        );
        cluster.advance(1);
        cluster.delete_now("a");
        cluster.edit::<Pod>(&Key::new("default", "b"), |pod| {
            pod.status.get_or_insert_default().phase = Some("Succeeded".into());
        });
        cluster.settle();
        assert_eq!(
            (&used(&cluster)["pods"], &used(&cluster)["requests.cpu"]),
            (&json!("0"), &json!("0"))
        );
    }

    #[test]
    fn what_is_charged_for_an_object_that_has_not_been_seen_yet_is_not_given_back() {
        let mut cluster = cluster(json!({"hard": {"pods": "2"}}));
        add_pod(&mut cluster, "a", None);
        add_pod(&mut cluster, "b", None);
        cluster.settle();
        cluster.advance(60);
        // Admission has let in c by now, which is on its way; what goes meanwhile makes the quota be counted.
        let limits = Key::new("default", "limits");
        cluster.edit::<ResourceQuota>(&limits, |quota| {
            let used = quota.status.as_mut().unwrap().used.as_mut().unwrap();
            used.insert("pods".into(), Written("3".into()));
        });
        cluster.delete_now("a");
        cluster.settle();
        assert_eq!(used(&cluster)["pods"], "3");
        add_pod(&mut cluster, "c", None);
        cluster.advance(1);
        cluster.settle();
        assert_eq!(used(&cluster)["pods"], "2");
    }

    #[test]
    fn scopes_choose_the_pods_that_count() {
        for (scope, expected) in [
            ("BestEffort", "1"),
            ("NotBestEffort", "2"),
            ("Terminating", "0"),
            ("NotTerminating", "3"),
        ] {
            let mut cluster = cluster(json!({"hard": {"pods": "5"}, "scopes": [scope]}));
            add_pod(&mut cluster, "a", Some("1"));
            add_pod(&mut cluster, "b", Some("1"));
            add_pod(&mut cluster, "c", None);
            cluster.settle();
            assert_eq!(used(&cluster)["pods"], expected, "{scope}");
        }
    }
}
