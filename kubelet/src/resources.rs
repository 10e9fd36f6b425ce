//! Resources: QoS classes, and the cgroup numbers that requests and limits become.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::quantity::{milli, whole};

/// CFS period of every CPU limit, in microseconds (upstream's default).
pub const CPU_PERIOD_US: i64 = 100_000;
/// Least value that the kernel takes for cpu.shares.
pub const CPU_SHARES_MIN: i64 = 2;
/// Least CPU quota that the kernel takes, in microseconds.
const CPU_QUOTA_US_MIN: i64 = 1000;

/// A QosClass decides the cgroup parent and the OOM score of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QosClass {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl QosClass {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

fn quantities<'a>(map: &'a Option<BTreeMap<String, Quantity>>, name: &str) -> Option<&'a Quantity> {
    map.as_ref()?.get(name)
}

pub fn limit<'a>(resources: Option<&'a ResourceRequirements>, name: &str) -> Option<&'a Quantity> {
    quantities(&resources?.limits, name)
}

/// A request; a missing one is the limit, as the API server's defaulting has it.
fn request<'a>(resources: Option<&'a ResourceRequirements>, name: &str) -> Option<&'a Quantity> {
    quantities(&resources?.requests, name).or_else(|| limit(resources, name))
}

pub fn containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    spec.init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
}

/// The QoS class of a pod: from requests and limits of CPU and memory of all its containers.
pub fn qos_class(pod: &Pod) -> QosClass {
    let Some(spec) = &pod.spec else {
        return QosClass::BestEffort;
    };
    let mut any = false;
    let mut guaranteed = true;
    for container in containers(spec) {
        for name in ["cpu", "memory"] {
            let positive = |q: Option<&Quantity>| q.and_then(milli).filter(|v| *v > 0);
            let request = positive(request(container.resources.as_ref(), name));
            let limit = positive(limit(container.resources.as_ref(), name));
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request == limit;
        }
    }
    match (any, guaranteed) {
        (false, _) => QosClass::BestEffort,
        (true, true) => QosClass::Guaranteed,
        (true, false) => QosClass::Burstable,
    }
}

/// Limits are cgroup numbers; zero or None means "no limit".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub cpu_shares: i64,
    /// Microseconds per CPU_PERIOD_US.
    pub cpu_quota_us: Option<i64>,
    pub memory_bytes: Option<i64>,
}

impl std::fmt::Display for Limits {
    /// As an annotation of a container keeps them.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (quota, memory) = (
            self.cpu_quota_us.unwrap_or(0),
            self.memory_bytes.unwrap_or(0),
        );
        write!(f, "{}/{quota}/{memory}", self.cpu_shares)
    }
}

fn shares(cpu_milli: i64) -> i64 {
    (cpu_milli * 1024 / 1000).clamp(CPU_SHARES_MIN, 262_144)
}

fn quota(cpu_milli: i64) -> i64 {
    (cpu_milli * CPU_PERIOD_US / 1000).max(CPU_QUOTA_US_MIN)
}

/// The cgroup numbers of one container.
pub fn container_limits(resources: Option<&ResourceRequirements>) -> Limits {
    Limits {
        cpu_shares: shares(request(resources, "cpu").and_then(milli).unwrap_or(0)),
        cpu_quota_us: limit(resources, "cpu")
            .and_then(milli)
            .filter(|v| *v > 0)
            .map(quota),
        memory_bytes: limit(resources, "memory")
            .and_then(whole)
            .filter(|v| *v > 0),
    }
}

/// The cgroup numbers of a pod's own cgroup: sums over its containers; a limit only if all have one.
pub fn pod_limits(spec: &PodSpec) -> Limits {
    let sum = |pick: &dyn Fn(&Container) -> Option<i64>| -> Option<i64> {
        let main = spec.containers.iter().map(pick).sum::<Option<i64>>()?;
        let init = spec.init_containers.iter().flatten();
        let (sidecars, steps): (Vec<_>, Vec<_>) =
            init.partition(|c| c.restart_policy.as_deref() == Some("Always"));
        let sidecars = sidecars.into_iter().map(pick).sum::<Option<i64>>()?;
        let steps = steps
            .into_iter()
            .map(pick)
            .collect::<Option<Vec<_>>>()?
            .into_iter()
            .max()
            .unwrap_or(0);
        Some((main + sidecars).max(steps + sidecars))
    };
    let cpu_request = sum(&|c| {
        Some(
            request(c.resources.as_ref(), "cpu")
                .and_then(milli)
                .unwrap_or(0),
        )
    })
    .unwrap_or(0);
    Limits {
        cpu_shares: shares(cpu_request),
        cpu_quota_us: sum(&|c| {
            limit(c.resources.as_ref(), "cpu")
                .and_then(milli)
                .filter(|v| *v > 0)
        })
        .map(quota),
        memory_bytes: sum(&|c| {
            limit(c.resources.as_ref(), "memory")
                .and_then(whole)
                .filter(|v| *v > 0)
        }),
    }
}

/// Whether nothing of the node may end the pod to make room: from this priority on (system-cluster-critical).
pub fn is_critical(pod: &Pod) -> bool {
    let priority = pod.spec.as_ref().and_then(|spec| spec.priority);
    priority.is_some_and(|priority| priority >= 2_000_000_000)
}

/// The OOM score of a container: the less memory a burstable one asks for, the sooner it is killed (upstream's formula).
pub fn oom_score_adj(pod: &Pod, container: &Container, node_memory_bytes: i64) -> i64 {
    if is_critical(pod) {
        return -997;
    }
    match qos_class(pod) {
        QosClass::Guaranteed => -997,
        QosClass::BestEffort => 1000,
        QosClass::Burstable => {
            let asked = request(container.resources.as_ref(), "memory")
                .and_then(whole)
                .unwrap_or(0);
            (1000 - 1000 * asked / node_memory_bytes.max(1)).clamp(3, 999)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(containers: serde_json::Value) -> Pod {
        serde_json::from_value(
            json!({"metadata": {"name": "p"}, "spec": {"containers": containers}}),
        )
        .unwrap()
    }

    #[test]
    fn the_qos_class_follows_requests_and_limits() {
        let same = json!({"cpu": "1", "memory": "1Gi"});
        for (containers, class) in [
            (json!([{"name": "a"}]), QosClass::BestEffort),
            (
                json!([{"name": "a", "resources": {"limits": same, "requests": same}}]),
                QosClass::Guaranteed,
            ),
            (
                json!([{"name": "a", "resources": {"limits": same}}]),
                QosClass::Guaranteed,
            ),
            (
                json!([{"name": "a", "resources": {"limits": same}}, {"name": "b"}]),
                QosClass::Burstable,
            ),
            (
                json!([{"name": "a", "resources": {"requests": {"cpu": "1m"}}}]),
                QosClass::Burstable,
            ),
            (
                json!([{"name": "a", "resources": {"limits": same, "requests": {"cpu": "1", "memory": "1Mi"}}}]),
                QosClass::Burstable,
            ),
            (
                json!([{"name": "a", "resources": {"requests": {"cpu": "0"}}}]),
                QosClass::BestEffort,
            ),
        ] {
            assert_eq!(qos_class(&pod(containers.clone())), class, "{containers}");
        }
    }

    #[test]
    fn limits_become_cgroup_numbers_and_pod_limits_need_every_container() {
        let one =
            pod(json!([{"name": "a", "resources": {"limits": {"cpu": "500m", "memory": "64Mi"}}}]));
        let spec = one.spec.unwrap();
        let expected = Limits {
            cpu_shares: 512,
            cpu_quota_us: Some(50_000),
            memory_bytes: Some(64 << 20),
        };
        assert_eq!(
            container_limits(spec.containers[0].resources.as_ref()),
            expected
        );
        assert_eq!(pod_limits(&spec), expected);
        let two = pod(
            json!([{"name": "a", "resources": {"limits": {"cpu": "500m", "memory": "64Mi"}}}, {"name": "b"}]),
        );
        assert_eq!(
            pod_limits(&two.spec.unwrap()),
            Limits {
                cpu_shares: 512,
                cpu_quota_us: None,
                memory_bytes: None
            }
        );
    }
}
