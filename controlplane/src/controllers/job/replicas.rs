//! Which pods of a Job to make and which to stop.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::super::object::{Object, Target};
use super::super::plan::{Action, Note, Plan};
use super::super::pods;
use super::REPORTER;
use super::facts::{self, FAILURES, Facts, IGNORED, INDEX, TRACKING};
use super::policy::{self, Failure};
use super::tally::Tally;

/// Pods created or deleted in one plan: upstream's burst.
const BURST_MAX: usize = 500;
/// How long after a failure a pod is replaced; doubles with each failure since the last success.
const BACKOFF_MIN: SignedDuration = SignedDuration::from_secs(10);
const BACKOFF_MAX: SignedDuration = SignedDuration::from_secs(600);
const INDEX_VARIABLE: &str = "JOB_COMPLETION_INDEX";

/// Deletes pods that are too many, or creates those that are missing. Gives the number of active pods that will be left
/// of those that are there: what is created is counted when it is seen.
pub fn plan<'a>(facts: &Facts<'a>, tally: &Tally<'a>, now: Timestamp, plan: &mut Plan) -> i32 {
    let active = number(facts.active.len());
    if facts.is_suspended() {
        stop(facts, &facts.active, plan);
        return 0;
    }
    let wanted = match facts.spec.completions {
        // Once one has succeeded, the others know that there is no more work.
        None if tally.succeeded > 0 => active,
        None => facts.parallelism(),
        Some(completions) => (completions - tally.succeeded - tally.failed_indexes.len())
            .min(facts.parallelism())
            .max(0),
    };
    let surplus = surplus(facts, tally, usize::try_from(active - wanted).unwrap_or(0));
    if !surplus.is_empty() {
        stop(facts, &surplus, plan);
        return active - number(surplus.len().min(BURST_MAX));
    }
    let waited_for = if facts.replaces_only_failed() {
        number(facts.terminating.len())
    } else {
        0
    };
    let missing = usize::try_from(wanted - active - waited_for)
        .unwrap_or(0)
        .min(BURST_MAX);
    if missing > 0 {
        if facts.is_indexed() {
            create_indexed(facts, tally, missing, now, plan);
        } else if let Some(at) = backoff_end(&facts.pods, facts).filter(|at| *at > now) {
            plan.look_again(at);
        } else {
            let pod = pod_of(facts, None);
            for _ in 0..missing {
                create(facts, pod.clone(), plan);
            }
        }
    }
    active
}

fn number(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

/// Deletes pods of the Job, each with an event.
pub fn stop(facts: &Facts<'_>, pods: &[&Pod], plan: &mut Plan) {
    for pod in pods.iter().take(BURST_MAX) {
        let note = Note::normal(
            &Target::of(facts.job),
            REPORTER,
            "SuccessfulDelete",
            "Deleted pod: {name}",
        )
        .or_failure("FailedDelete", "Error deleting: ");
        let delete = Action::Delete {
            target: Target::of(*pod),
            propagation: None,
            grace_seconds: None,
        };
        plan.push_noted(delete, note);
    }
}

/// Active pods to give up: those that can never count, then `at_least` as many as are too many in all.
fn surplus<'a>(facts: &Facts<'a>, tally: &Tally<'_>, at_least: usize) -> Vec<&'a Pod> {
    let mut sorted = facts.active.clone();
    sorted.sort_by_cached_key(|pod| {
        (
            pods::node_name(pod).is_some(),
            pods::phase(pod) == "Running",
            pods::is_ready(pod),
            std::cmp::Reverse(pod.metadata.creation_timestamp.clone()),
            pod.metadata.name.clone(),
        )
    });
    if !facts.is_indexed() {
        sorted.truncate(at_least);
        return sorted;
    }
    // Of several pods of an index, the one that would be given up last stays.
    let mut taken = BTreeSet::new();
    let (mut useful, mut useless) = (Vec::new(), Vec::new());
    for pod in sorted.into_iter().rev() {
        let index = facts::index_of(pod).filter(|index| {
            (0..facts.index_end()).contains(index)
                && !tally.completed.contains(*index)
                && !tally.failed_indexes.contains(*index)
        });
        match index {
            Some(index) if taken.insert(index) => useful.push(pod),
            _ => useless.push(pod),
        }
    }
    let more = at_least.saturating_sub(useless.len());
    useless.extend(useful.into_iter().rev().take(more));
    useless
}

fn create_indexed<'a>(
    facts: &Facts<'a>,
    tally: &Tally<'a>,
    missing: usize,
    now: Timestamp,
    plan: &mut Plan,
) {
    let mut taken: BTreeSet<i32> = facts
        .active
        .iter()
        .filter_map(|pod| facts::index_of(pod))
        .collect();
    if facts.replaces_only_failed() {
        taken.extend(
            facts
                .terminating
                .iter()
                .filter_map(|pod| facts::index_of(pod)),
        );
    }
    let each_for_itself = facts.spec.backoff_limit_per_index.is_some();
    if !each_for_itself && let Some(at) = backoff_end(&facts.pods, facts).filter(|at| *at > now) {
        plan.look_again(at);
        return;
    }
    let open = (0..facts.index_end()).filter(|index| {
        !taken.contains(index)
            && !tally.completed.contains(*index)
            && !tally.failed_indexes.contains(*index)
    });
    let mut left = missing;
    for index in open {
        if left == 0 {
            break;
        }
        let last = tally.kept.get(&index).copied();
        if let Some(last) = last {
            let failures = facts::number(last, FAILURES).saturating_add(1);
            let at = facts::ended_at(last).map(|at| delayed(at, failures));
            if let Some(at) = at.filter(|at| *at > now) {
                plan.look_again(at);
                continue;
            }
        }
        create(facts, indexed_pod(facts, index, last), plan);
        left -= 1;
    }
}

/// Until when no pod is made, for the failures since the last success. Pods that were stopped are no failures here: whoever
/// deletes one wants another.
fn backoff_end(all: &[&Pod], facts: &Facts<'_>) -> Option<Timestamp> {
    let ended: BTreeMap<_, _> = all
        .iter()
        .filter(|pod| pods::is_terminal(pod) && !facts.is_stopped_by_suspension(pod))
        .filter_map(|pod| {
            let at = facts::ended_at(pod)?;
            Some(((at, pod.metadata.uid.clone()), pods::phase(pod) == "Failed"))
        })
        .collect();
    let failures = ended.values().rev().take_while(|failed| **failed).count();
    let ((last, _), _) = ended.last_key_value().filter(|(_, failed)| **failed)?;
    Some(delayed(*last, number(failures)))
}

fn delayed(last: Timestamp, failures: i32) -> Timestamp {
    let doublings = u32::try_from(failures.saturating_sub(1))
        .unwrap_or(0)
        .min(16);
    let wait = BACKOFF_MIN
        .checked_mul(1 << doublings)
        .map_or(BACKOFF_MAX, |wait| wait.min(BACKOFF_MAX));
    last.saturating_add(wait).unwrap_or(Timestamp::MAX)
}

fn create(facts: &Facts<'_>, pod: Pod, plan: &mut Plan) {
    let note = Note::normal(
        &Target::of(facts.job),
        REPORTER,
        "SuccessfulCreate",
        "Created pod: {name}",
    )
    .or_failure("FailedCreate", "Error creating: ");
    plan.push_noted(Action::Create(Object::of(pod)), note);
}

/// A pod of the Job that is counted before it may vanish.
fn pod_of(facts: &Facts<'_>, name_part: Option<&str>) -> Pod {
    let mut pod = pods::from_template(&facts.spec.template, facts.job);
    let finalizers = pod.metadata.finalizers.get_or_insert_default();
    if !finalizers.iter().any(|held| held == TRACKING) {
        finalizers.push(TRACKING.into());
    }
    if let Some(part) = name_part {
        let owner = facts.job.metadata.name.as_deref().unwrap_or_default();
        pod.metadata.generate_name = Some(pods::name_prefix(&format!("{owner}-{part}")));
    }
    pod
}

/// The pod of an index: it knows its index by annotation, label, host name and variable.
fn indexed_pod(facts: &Facts<'_>, index: i32, last: Option<&Pod>) -> Pod {
    let text = index.to_string();
    let mut pod = pod_of(facts, Some(&text));
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert(INDEX.into(), text.clone());
    if facts.spec.backoff_limit_per_index.is_some() {
        let (mut failures, mut ignored) = (0, 0);
        if let Some(last) = last {
            failures = facts::number(last, FAILURES);
            ignored = facts::number(last, IGNORED);
            match policy::judge(facts.job, last) {
                Failure::Ignored => ignored += 1,
                _ => failures += 1,
            }
        }
        annotations.insert(FAILURES.into(), failures.to_string());
        if ignored > 0 {
            annotations.insert(IGNORED.into(), ignored.to_string());
        }
    }
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(INDEX.into(), text.clone());
    let job = facts.job.metadata.name.as_deref().unwrap_or_default();
    let spec = pod.spec.get_or_insert_default();
    spec.hostname = Some(format!("{job}-{index}"));
    let variable = EnvVar {
        name: INDEX_VARIABLE.into(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                api_version: None,
                field_path: format!("metadata.annotations['{INDEX}']"),
            }),
            ..Default::default()
        }),
    };
    let init = spec.init_containers.iter_mut().flatten();
    for container in init.chain(&mut spec.containers) {
        let variables = container.env.get_or_insert_default();
        if !variables.iter().any(|known| known.name == INDEX_VARIABLE) {
            variables.push(variable.clone());
        }
    }
    pod
}
