//! The ReplicaSets of a Deployment: which one is of its current template, and what they say about themselves.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};

use super::super::plan::View;
use super::super::pods::{self, Availability};
use super::{HASH_LABEL, NOT_COPIED, REVISION};

pub struct Sets {
    /// The one whose template is the Deployment's.
    pub current: Option<Arc<ReplicaSet>>,
    /// All others, oldest first.
    pub old: Vec<Arc<ReplicaSet>>,
    /// Pods of each set, by the set's UID.
    pods: HashMap<String, Pods>,
}

#[derive(Clone, Copy, Default)]
struct Pods {
    running: i32,
    available: i32,
}

impl Sets {
    pub fn of(view: &View<'_>, deployment: &Deployment, mut sets: Vec<Arc<ReplicaSet>>) -> Self {
        let pods = sets.iter().map(|set| {
            // The set's own, as its status has it: an older set whose pods have served all the time is not to be held to what the
            // Deployment asks of its next template.
            let seconds = set.spec.as_ref().and_then(|spec| spec.min_ready_seconds);
            let seconds = seconds.unwrap_or(0);
            let uid = set.metadata.uid.clone().unwrap_or_default();
            let mut count = Pods::default();
            for pod in view.snapshot.pods_owned_by(&uid) {
                if pods::is_active(pod) {
                    count.running += 1;
                    let now = pods::availability(pod, seconds, view.now) == Availability::Now;
                    count.available += i32::from(now);
                }
            }
            (uid, count)
        });
        let pods = pods.collect();
        sets.sort_by(|a, b| {
            let age = |set: &ReplicaSet| {
                (
                    set.metadata.creation_timestamp.clone(),
                    set.metadata.name.clone(),
                )
            };
            age(a).cmp(&age(b))
        });
        let current = deployment.spec.as_ref().and_then(|spec| {
            let template = pods::without_label(&spec.template, HASH_LABEL);
            let collisions = deployment
                .status
                .as_ref()
                .and_then(|status| status.collision_count);
            let equal = sets.iter().position(|set| {
                let other = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
                other.is_some_and(|other| pods::without_label(other, HASH_LABEL) == template)
            });
            // A server that fills in defaults differently for the two kinds must not make us create sets for ever.
            equal.or_else(|| {
                let hash = pods::template_hash(&spec.template, collisions);
                let name = format!(
                    "{}-{hash}",
                    deployment.metadata.name.as_deref().unwrap_or_default()
                );
                sets.iter().position(|set| {
                    let labels = set.metadata.labels.as_ref();
                    set.metadata.name.as_deref() == Some(&name)
                        && labels.and_then(|labels| labels.get(HASH_LABEL)) == Some(&hash)
                })
            })
        });
        let current = current.map(|index| sets.remove(index));
        Self {
            current,
            old: sets,
            pods,
        }
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<ReplicaSet>> {
        self.old.iter().chain(&self.current)
    }

    /// Sets that have or should have pods.
    pub fn active(&self) -> impl Iterator<Item = &Arc<ReplicaSet>> {
        self.all().filter(|set| replicas(set) > 0)
    }

    /// Revision that the current template has or gets.
    pub fn next_revision(&self) -> i64 {
        self.old
            .iter()
            .map(|set| revision_of(set))
            .max()
            .unwrap_or(0)
            + 1
    }

    pub fn total(&self) -> i32 {
        self.all().map(|set| replicas(set)).sum()
    }

    pub fn available(&self) -> i32 {
        self.all().map(|set| available(set)).sum()
    }

    /// Places that a set takes up: pods that it should have, or still has after it was told to have fewer. Counting wishes
    /// alone, as upstream does, would start new pods before the old ones have been told to go.
    pub fn occupied(&self, set: &ReplicaSet) -> i32 {
        replicas(set).max(self.pods_of(set).running)
    }

    /// Pods of a set that serve, and will when the set has done as it was told: it gives up those first that do not serve.
    /// The set's own status may be older than the last change of its replicas, and would count pods that are about to go.
    pub fn serving(&self, set: &ReplicaSet) -> i32 {
        replicas(set).min(self.pods_of(set).available)
    }

    pub fn serving_total(&self) -> i32 {
        self.all().map(|set| self.serving(set)).sum()
    }

    fn pods_of(&self, set: &ReplicaSet) -> Pods {
        let found = set.metadata.uid.as_ref().and_then(|uid| self.pods.get(uid));
        found.copied().unwrap_or_default()
    }

    pub fn occupied_total(&self) -> i32 {
        self.all().map(|set| self.occupied(set)).sum()
    }
}

pub fn replicas(set: &ReplicaSet) -> i32 {
    set.spec
        .as_ref()
        .and_then(|spec| spec.replicas)
        .unwrap_or(1)
}

pub fn available(set: &ReplicaSet) -> i32 {
    set.status
        .as_ref()
        .and_then(|status| status.available_replicas)
        .unwrap_or(0)
}

pub fn revision_of(set: &ReplicaSet) -> i64 {
    annotation(set, REVISION)
        .and_then(|revision| revision.parse().ok())
        .unwrap_or(0)
}

pub fn annotation<'a>(set: &'a ReplicaSet, name: &str) -> Option<&'a str> {
    set.metadata
        .annotations
        .as_ref()?
        .get(name)
        .map(String::as_str)
}

/// Whether a set has no pods, should have none, and has said so about its current spec.
pub fn is_idle(set: &ReplicaSet) -> bool {
    let status = set.status.clone().unwrap_or_default();
    replicas(set) == 0
        && status.replicas == 0
        && set.metadata.deletion_timestamp.is_none()
        && set.metadata.generation.unwrap_or(0) <= status.observed_generation.unwrap_or(0)
}

/// The Deployment's annotations as its ReplicaSets carry them.
pub fn copied_annotations(deployment: &Deployment) -> BTreeMap<String, String> {
    let annotations = deployment.metadata.annotations.iter().flatten();
    annotations
        .filter(|(name, _)| !NOT_COPIED.contains(&name.as_str()))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}
