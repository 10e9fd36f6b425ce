//! A Job and its pods, sorted by what they mean to it.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec, JobStatus};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::super::pods;

/// Finalizer of pods that are not yet counted in their Job's status.
pub const TRACKING: &str = "batch.kubernetes.io/job-tracking";
/// Annotation and label of a pod of an Indexed Job.
pub const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// How often the pod's index has failed, and how often that did not count, before this pod.
pub const FAILURES: &str = "batch.kubernetes.io/job-index-failure-count";
pub const IGNORED: &str = "batch.kubernetes.io/job-index-ignored-failure-count";

pub struct Facts<'a> {
    pub job: &'a Job,
    pub spec: &'a JobSpec,
    pub status: JobStatus,
    /// All pods of the Job.
    pub pods: Vec<&'a Pod>,
    /// Neither ended nor on their way out.
    pub active: Vec<&'a Pod>,
    /// On their way out, not ended yet.
    pub terminating: Vec<&'a Pod>,
}

impl<'a> Facts<'a> {
    pub fn new(job: &'a Job, spec: &'a JobSpec, pods: Vec<&'a Pod>) -> Self {
        let active = pods
            .iter()
            .copied()
            .filter(|pod| pods::is_active(pod))
            .collect();
        let terminating = pods
            .iter()
            .copied()
            .filter(|pod| pods::is_terminating(pod) && !pods::is_terminal(pod))
            .collect();
        Self {
            job,
            spec,
            status: job.status.clone().unwrap_or_default(),
            pods,
            active,
            terminating,
        }
    }

    pub fn is_indexed(&self) -> bool {
        self.spec.completion_mode.as_deref() == Some("Indexed")
    }

    /// End of the indexes: an Indexed Job has its completions set.
    pub fn index_end(&self) -> i32 {
        self.spec.completions.unwrap_or(0)
    }

    pub fn is_suspended(&self) -> bool {
        self.spec.suspend == Some(true)
    }

    pub fn parallelism(&self) -> i32 {
        self.spec.parallelism.unwrap_or(1)
    }

    /// Whether a pod is replaced only when it has failed, not when it is on its way out.
    pub fn replaces_only_failed(&self) -> bool {
        match self.spec.pod_replacement_policy.as_deref() {
            Some(policy) => policy == "Failed",
            None => self.spec.pod_failure_policy.is_some(),
        }
    }

    /// Whether the pod counts as a failure now. A pod on its way out does where it is replaced at once: it might vanish
    /// without ever being seen to fail.
    pub fn has_failed(&self, pod: &Pod) -> bool {
        match pods::phase(pod) {
            "Failed" => true,
            "Succeeded" => false,
            _ => pods::is_terminating(pod) && !self.replaces_only_failed(),
        }
    }

    /// Whether the pod was stopped because the Job is suspended: that is nobody's failure.
    pub fn is_stopped_by_suspension(&self, pod: &Pod) -> bool {
        self.is_suspended() && pods::is_terminating(pod) && pods::phase(pod) != "Succeeded"
    }

    pub fn condition(&self, type_: &str) -> Option<&JobCondition> {
        condition(&self.status, type_)
    }
}

/// A condition of a Job that is true.
pub fn condition<'a>(status: &'a JobStatus, type_: &str) -> Option<&'a JobCondition> {
    status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == type_ && condition.status == "True")
}

/// The condition that says how the Job has ended, if it has.
pub fn end(job: &Job) -> Option<&JobCondition> {
    let status = job.status.as_ref()?;
    condition(status, "Complete").or_else(|| condition(status, "Failed"))
}

pub fn is_tracked(pod: &Pod) -> bool {
    pod.metadata
        .finalizers
        .iter()
        .flatten()
        .any(|held| held == TRACKING)
}

/// The pod's completion index.
pub fn index_of(pod: &Pod) -> Option<i32> {
    annotation(pod, INDEX).and_then(|index| index.parse().ok())
}

pub fn number(pod: &Pod, name: &str) -> i32 {
    annotation(pod, name)
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

fn annotation<'a>(pod: &'a Pod, name: &str) -> Option<&'a String> {
    pod.metadata.annotations.as_ref()?.get(name)
}

/// Pods by index, of those that have one.
pub fn by_index<'a>(pods: &[&'a Pod]) -> BTreeMap<i32, Vec<&'a Pod>> {
    let mut found: BTreeMap<i32, Vec<&Pod>> = BTreeMap::new();
    for pod in pods {
        if let Some(index) = index_of(pod) {
            found.entry(index).or_default().push(pod);
        }
    }
    found
}

/// When the pod's last container ended; failing that, the latest thing known of the pod.
pub fn ended_at(pod: &Pod) -> Option<Timestamp> {
    let status = pod.status.as_ref();
    let ends = |containers: Option<&Vec<ContainerStatus>>| {
        containers
            .into_iter()
            .flatten()
            .filter_map(|container| {
                let Time(at) = container
                    .state
                    .as_ref()?
                    .terminated
                    .as_ref()?
                    .finished_at
                    .as_ref()?;
                Some(*at)
            })
            .max()
    };
    let main = ends(status.and_then(|status| status.container_statuses.as_ref()));
    let init = ends(status.and_then(|status| status.init_container_statuses.as_ref()));
    let not_ready = pods::condition(pod, "Ready")
        .and_then(|ready| ready.last_transition_time.as_ref())
        .map(|Time(at)| *at);
    main.max(init).or(not_ready).or_else(|| {
        let Time(at) = pod.metadata.creation_timestamp.as_ref()?;
        Some(*at)
    })
}
