//! The next step of a StatefulSet: which pods to make, stop or replace now. Ordered, each step waits for the one before;
//! in parallel, scaling does not wait, updates still do.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{RollingUpdateStatefulSetStrategy, StatefulSet, StatefulSetSpec};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};

use super::super::object::{Key, Object, Target};
use super::super::plan::{Action, Note, Plan, View, Write};
use super::super::pods::{self, Availability, scaled};
use super::REPORTER;
use super::identity::{self, revision_of};

/// A template with the name of the revision that holds it.
pub struct Version<'a> {
    pub name: &'a str,
    pub template: &'a PodTemplateSpec,
}

pub struct Step<'a> {
    pub view: &'a View<'a>,
    pub set: &'a StatefulSet,
    pub spec: &'a StatefulSetSpec,
    /// The set's pods by ordinal.
    pub pods: &'a BTreeMap<i32, &'a Pod>,
    pub current: Version<'a>,
    pub update: Version<'a>,
}

pub fn start(spec: &StatefulSetSpec) -> i32 {
    spec.ordinals
        .as_ref()
        .and_then(|ordinals| ordinals.start)
        .unwrap_or(0)
}

pub fn end(spec: &StatefulSetSpec) -> i32 {
    start(spec).saturating_add(spec.replicas.unwrap_or(1))
}

fn rolling(spec: &StatefulSetSpec) -> Option<&RollingUpdateStatefulSetStrategy> {
    spec.update_strategy.as_ref()?.rolling_update.as_ref()
}

fn is_on_delete(spec: &StatefulSetSpec) -> bool {
    spec.update_strategy
        .as_ref()
        .and_then(|strategy| strategy.type_.as_deref())
        == Some("OnDelete")
}

pub fn is_running_and_ready(pod: &Pod) -> bool {
    pods::phase(pod) == "Running" && pods::is_ready(pod)
}

impl<'a> Step<'a> {
    pub fn plan(&self, plan: &mut Plan) {
        let ordered = self.spec.pod_management_policy.as_deref() != Some("Parallel");
        if !self.fill(ordered, plan) || !self.shrink(ordered, plan) {
            return;
        }
        if !is_on_delete(self.spec) {
            self.replace(plan);
        }
    }

    fn is_available(&self, pod: &Pod, plan: &mut Plan) -> bool {
        if !is_running_and_ready(pod) || pods::is_terminating(pod) {
            return false;
        }
        let seconds = self.spec.min_ready_seconds.unwrap_or(0);
        match pods::availability(pod, seconds, self.view.now) {
            Availability::Now => true,
            Availability::At(at) => {
                plan.look_again(at);
                false
            }
            Availability::No => false,
        }
    }

    /// Makes the pods that are missing, and those again that have ended. Gives whether the next part may go on.
    fn fill(&self, ordered: bool, plan: &mut Plan) -> bool {
        for ordinal in start(self.spec)..end(self.spec) {
            let done = match self.pods.get(&ordinal) {
                None => {
                    self.create(ordinal, plan);
                    false
                }
                Some(pod) => {
                    plan.writes.extend(
                        identity::missing_labels(pod, ordinal)
                            .map(|action| Write { action, note: None }),
                    );
                    let claims_there = self.keep_claims(ordinal, None, plan);
                    if pods::is_terminal(pod) && !pods::is_terminating(pod) {
                        self.recreate(pod, plan);
                        false
                    } else {
                        claims_there && self.is_available(pod, plan)
                    }
                }
            };
            if ordered && !done {
                return false;
            }
        }
        true
    }

    /// Makes the pod of an ordinal, its claims first.
    fn create(&self, ordinal: i32, plan: &mut Plan) {
        let name = identity::pod_name(self.set, ordinal);
        let namespace = self.set.metadata.namespace.as_deref().unwrap_or_default();
        if let Some(other) = self.view.snapshot.pods.get(&Key::new(namespace, &name)) {
            // Somebody else's; it is told of once, and looked at when it changes.
            if pods::controller_of(&other.metadata).is_some() || !pods::is_terminating(other) {
                let message = format!(
                    "create Pod {name} in StatefulSet {} failed error: pods {name:?} already exists",
                    identity::set_name(self.set)
                );
                let target = Target::of(self.set);
                plan.note(Note::warning(&target, REPORTER, "FailedCreate", message));
            }
            return;
        }
        if !self.keep_claims(ordinal, None, plan) {
            return;
        }
        let version = self.version_of_new(ordinal);
        let pod = identity::pod_for(self.set, version.template, version.name, ordinal);
        self.write(
            Action::Create(Object::of(pod)),
            "Create",
            "create",
            &name,
            plan,
        );
    }

    /// A new pod is of the current template below the partition, and of the updated one from there on.
    fn version_of_new(&self, ordinal: i32) -> &Version<'a> {
        let partition = rolling(self.spec)
            .and_then(|rolling| rolling.partition)
            .unwrap_or(0);
        let keeps =
            !is_on_delete(self.spec) && ordinal < start(self.spec).saturating_add(partition);
        if keeps { &self.current } else { &self.update }
    }

    /// Makes an ordinal's claims, or corrects their owners; gives whether all are there as they should be.
    fn keep_claims(&self, ordinal: i32, condemned: Option<&Pod>, plan: &mut Plan) -> bool {
        let mut there = true;
        for claim in identity::claims(self.set, ordinal) {
            let key = Key::of(&claim.metadata);
            match self.view.snapshot.claims.get(&key) {
                Some(found) => {
                    if let Some(action) = identity::claim_update(self.set, found, condemned) {
                        plan.push(action);
                        there = false;
                    }
                }
                None if condemned.is_some() => {}
                None => {
                    let pod = identity::pod_name(self.set, ordinal);
                    let what = format!(
                        "Claim {} Pod {pod} in StatefulSet {}",
                        key.name,
                        identity::set_name(self.set)
                    );
                    let note = Note::normal(
                        &Target::of(self.set),
                        REPORTER,
                        "SuccessfulCreate",
                        format!("create {what} success"),
                    )
                    .or_failure("FailedCreate", "create Claim failed error: ");
                    plan.push_noted(Action::Create(Object::of(claim)), note);
                    there = false;
                }
            }
        }
        there
    }

    /// A pod that has ended goes, so that its name is free for the next.
    fn recreate(&self, pod: &Pod, plan: &mut Plan) {
        let failed = pods::phase(pod) == "Failed";
        let key = Key::of(&pod.metadata);
        let message = format!(
            "StatefulSet {}/{} is recreating {} Pod {}",
            key.namespace,
            identity::set_name(self.set),
            if failed { "failed" } else { "terminated" },
            key.name
        );
        let reason = if failed {
            "RecreatingFailedPod"
        } else {
            "RecreatingTerminatedPod"
        };
        plan.note(Note::warning(
            &Target::of(self.set),
            REPORTER,
            reason,
            message,
        ));
        self.delete(pod, plan);
    }

    /// Stops the pods outside the range, highest ordinal first. Gives whether the next part may go on.
    fn shrink(&self, ordered: bool, plan: &mut Plan) -> bool {
        let wanted = start(self.spec)..end(self.spec);
        let first_unhealthy = self
            .pods
            .iter()
            .filter(|(ordinal, _)| !wanted.contains(ordinal))
            .find(|(_, pod)| !is_running_and_ready(pod) || pods::is_terminating(pod))
            .map(|(ordinal, _)| *ordinal);
        let condemned = self
            .pods
            .iter()
            .rev()
            .filter(|(ordinal, _)| !wanted.contains(ordinal));
        for (ordinal, pod) in condemned {
            if pods::is_terminating(pod) {
                if ordered {
                    return false;
                }
                continue;
            }
            if ordered && !self.is_available(pod, plan) && first_unhealthy != Some(*ordinal) {
                return false;
            }
            // The claims learn to go with the pod before it does.
            if self.keep_claims(*ordinal, Some(pod), plan) {
                self.delete(pod, plan);
            }
            if ordered {
                return false;
            }
        }
        true
    }

    /// Replaces pods of older revisions from the highest ordinal down to the partition, at most `maxUnavailable` at a time.
    fn replace(&self, plan: &mut Plan) {
        let rolling = rolling(self.spec);
        let replicas = self.spec.replicas.unwrap_or(1);
        let unavailable_max = scaled(
            rolling.and_then(|rolling| rolling.max_unavailable.as_ref()),
            replicas,
            true,
            "1",
        )
        .max(1);
        let partition = rolling.and_then(|rolling| rolling.partition).unwrap_or(0);
        let in_range = || {
            self.pods
                .range(start(self.spec)..end(self.spec))
                .map(|(ordinal, pod)| (*ordinal, *pod))
        };
        let mut unavailable = replicas - i32::try_from(in_range().count()).unwrap_or(i32::MAX);
        for (_, pod) in in_range() {
            if !self.is_available(pod, plan) {
                unavailable += 1;
            }
        }
        let from = start(self.spec).saturating_add(partition);
        for (_, pod) in in_range()
            .filter(|(ordinal, _)| *ordinal >= from)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
        {
            let available = self.is_available(pod, plan);
            if revision_of(pod).is_some_and(|revision| revision == self.update.name) {
                if !available && unavailable_max == 1 {
                    // The order holds: nothing below is touched before this one serves.
                    return;
                }
                continue;
            }
            if pods::is_terminating(pod) {
                if unavailable_max == 1 {
                    return;
                }
                continue;
            }
            // Replacing one that does not serve costs nothing.
            if available {
                if unavailable >= unavailable_max {
                    return;
                }
                unavailable += 1;
            }
            self.delete(pod, plan);
            if unavailable_max == 1 {
                return;
            }
        }
    }

    fn delete(&self, pod: &Pod, plan: &mut Plan) {
        let name = pod.metadata.name.clone().unwrap_or_default();
        let delete = Action::Delete {
            target: Target::of(pod),
            propagation: None,
            grace_seconds: None,
        };
        self.write(delete, "Delete", "delete", &name, plan);
    }

    fn write(&self, action: Action, reason: &str, verb: &str, pod: &str, plan: &mut Plan) {
        let what = format!(
            "{verb} Pod {pod} in StatefulSet {}",
            identity::set_name(self.set)
        );
        let (success, failure, beginning) = match reason {
            "Create" => (
                "SuccessfulCreate",
                "FailedCreate",
                "create Pod failed error: ",
            ),
            _ => (
                "SuccessfulDelete",
                "FailedDelete",
                "delete Pod failed error: ",
            ),
        };
        let note = Note::normal(
            &Target::of(self.set),
            REPORTER,
            success,
            format!("{what} successful"),
        )
        .or_failure(failure, beginning);
        plan.push_noted(action, note);
    }
}
