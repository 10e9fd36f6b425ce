//! outcome: whether a pod is over, and how.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

use super::seen;
use crate::pod::admission::refusal;
use crate::pod::memory::Memory;
use crate::pod::{RestartPolicy, is_sidecar};
use crate::runtime::{ContainerPhase, ContainerView, PodView};

/// How a pod ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Succeeded,
    Failed,
    DeadlineExceeded,
    /// It was never let run.
    Refused,
    /// It used more of the node's disk than it may.
    Evicted,
}

/// Whether the pod has ended by itself: no container of it will ever run again.
pub fn outcome(pod: &Pod, view: &PodView, memory: &Memory, now: Timestamp) -> Option<Outcome> {
    let spec = pod.spec.as_ref()?;
    if memory.refused.is_some() || refusal(pod).is_some() {
        return Some(Outcome::Refused);
    }
    if memory.evicted.is_some() {
        return Some(Outcome::Evicted);
    }
    if deadline(pod).is_some_and(|at| at <= now) {
        return Some(Outcome::DeadlineExceeded);
    }
    let policy = RestartPolicy::of(spec);
    let runs: Option<Vec<_>> = spec
        .containers
        .iter()
        .map(|c| seen(view, memory, &c.name))
        .collect();
    if let Some(runs) = runs {
        let over =
            |c: &&ContainerView| c.phase == ContainerPhase::Exited && !policy.restarts(c.exit_code);
        return match (runs.iter().all(over), runs.iter().all(|c| c.exit_code == 0)) {
            (true, true) => Some(Outcome::Succeeded),
            (true, false) => Some(Outcome::Failed),
            (false, _) => None,
        };
    }
    let steps = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|c| !is_sidecar(c));
    let failed = steps
        .filter_map(|c| seen(view, memory, &c.name))
        .any(|c| c.phase == ContainerPhase::Exited && c.exit_code != 0);
    let started = spec
        .containers
        .iter()
        .any(|c| seen(view, memory, &c.name).is_some());
    (failed && !started && policy == RestartPolicy::Never).then_some(Outcome::Failed)
}

/// When the pod has been active for as long as it may.
pub(super) fn deadline(pod: &Pod) -> Option<Timestamp> {
    let seconds = pod.spec.as_ref()?.active_deadline_seconds?;
    let start = pod.status.as_ref()?.start_time.as_ref()?.0;
    Some(start + SignedDuration::from_secs(seconds))
}
