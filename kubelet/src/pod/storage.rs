//! storage: how much of its node's disk a pod may use, and whether it uses more. The rules and words are upstream's for local ephemeral
//! storage.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, Volume};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::all_containers;
use crate::quantity::whole;
use crate::resources;
use crate::volume::VolumeKind;

/// The reason that the API is told of a pod that was ended for what it used.
pub const EVICTED: &str = "Evicted";
const RESOURCE: &str = "ephemeral-storage";

/// What a pod uses, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// By container: what it wrote to its own file system, and its logs.
    pub containers: BTreeMap<String, u64>,
    /// By volume: emptyDirs on disk.
    pub volumes: BTreeMap<String, u64>,
}

/// The volumes of a pod that are folders of the node's disk.
pub fn on_disk(pod: &Pod) -> impl Iterator<Item = &Volume> {
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    volumes.filter(|v| VolumeKind::of(v) == Some(VolumeKind::EmptyDir { memory: false }))
}

/// Whether something limits what the pod may use.
pub fn is_limited(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let limited = |(container, _)| limit(container).is_some();
    !resources::is_critical(pod)
        && (on_disk(pod).any(|v| size_limit(v).is_some()) || all_containers(spec).any(limited))
}

/// Which limit the pod exceeds, in the words of the API.
pub fn excess(pod: &Pod, usage: &Usage) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let exceeds = |used: u64, limit: &Quantity| {
        let limit = whole(limit).and_then(|limit| u64::try_from(limit).ok());
        limit.is_some_and(|limit| used > limit)
    };
    for volume in on_disk(pod) {
        let used = usage.volumes.get(&volume.name).copied().unwrap_or(0);
        if let Some(limit) = size_limit(volume).filter(|limit| exceeds(used, limit)) {
            let (name, limit) = (&volume.name, &limit.0);
            return Some(format!(
                "Usage of EmptyDir volume {name:?} exceeds the limit {limit:?}. "
            ));
        }
    }
    let used: u64 = usage
        .containers
        .values()
        .chain(usage.volumes.values())
        .sum();
    let limits = spec.containers.iter().filter_map(limit).filter_map(whole);
    let total = limits.reduce(i64::saturating_add);
    if let Some(total) = total.filter(|total| used > total.unsigned_abs()) {
        return Some(format!(
            "Pod ephemeral local storage usage exceeds the total limit of containers {total}. "
        ));
    }
    all_containers(spec).find_map(|(container, _)| {
        let used = usage.containers.get(&container.name).copied().unwrap_or(0);
        let limit = limit(container).filter(|limit| exceeds(used, limit))?;
        let (name, limit) = (&container.name, &limit.0);
        Some(format!(
            "Container {name} exceeded its local ephemeral storage limit {limit:?}. "
        ))
    })
}

fn limit(container: &Container) -> Option<&Quantity> {
    let limit = resources::limit(container.resources.as_ref(), RESOURCE);
    limit.filter(|limit| is_positive(limit))
}

fn size_limit(volume: &Volume) -> Option<&Quantity> {
    let limit = volume.empty_dir.as_ref()?.size_limit.as_ref()?;
    Some(limit).filter(|limit| is_positive(limit))
}

fn is_positive(limit: &Quantity) -> bool {
    whole(limit).is_some_and(|limit| limit > 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_exceeds_a_limit_is_told_and_what_has_none_may_grow() {
        let pod: Pod = serde_json::from_value(json!({"spec": {
            "containers": [
                {"name": "a", "resources": {"limits": {"ephemeral-storage": "5Mi"}}},
                {"name": "b", "resources": {"limits": {"ephemeral-storage": "1Mi", "cpu": "1"}}},
            ],
            "volumes": [
                {"name": "disk", "emptyDir": {"sizeLimit": "2Mi"}},
                {"name": "free", "emptyDir": {}},
                {"name": "tmpfs", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
            ],
        }}))
        .unwrap();
        assert!(is_limited(&pod));
        let usage = |a: u64, b: u64, disk: u64, free: u64| Usage {
            containers: [("a".to_owned(), a), ("b".to_owned(), b)].into(),
            volumes: [("disk".to_owned(), disk), ("free".to_owned(), free)].into(),
        };
        const MI: u64 = 1 << 20;
        for (usage, told) in [
            (usage(0, 0, 0, 0), None),
            (usage(3 * MI, MI, 2 * MI, 0), None),
            (
                usage(0, 0, 2 * MI + 1, 0),
                Some(r#"Usage of EmptyDir volume "disk" exceeds the limit "2Mi". "#),
            ),
            (
                usage(3 * MI, MI, 2 * MI, 1),
                Some(
                    "Pod ephemeral local storage usage exceeds the total limit of containers 6291456. ",
                ),
            ),
            (
                usage(0, MI + 1, 0, 0),
                Some(r#"Container b exceeded its local ephemeral storage limit "1Mi". "#),
            ),
        ] {
            assert_eq!(excess(&pod, &usage).as_deref(), told, "{usage:?}");
        }
        let unlimited = json!({"spec": {"containers": [{"name": "a"}], "volumes": [{"name": "free", "emptyDir": {}}]}});
        let unlimited: Pod = serde_json::from_value(unlimited).unwrap();
        assert!(!is_limited(&unlimited));
        assert_eq!(excess(&unlimited, &usage(MI, MI, MI, MI)), None);
        let mut critical = pod;
        critical.spec.as_mut().unwrap().priority = Some(2_000_000_000);
        assert!(!is_limited(&critical));
    }
}
