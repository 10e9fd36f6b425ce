//! Counts every ended pod exactly once. A pod holds a finalizer until the Job's status accounts for it: its UID is first
//! written down as uncounted, then the finalizer goes, then the UID turns into a count (KEP-2307). An index that has
//! completed is its own account.

use std::collections::{BTreeSet, HashMap};

use k8s_openapi::api::batch::v1::UncountedTerminatedPods;
use k8s_openapi::api::core::v1::Pod;

use super::super::pods;
use super::facts::{self, FAILURES, Facts, IGNORED};
use super::indexes::Indexes;
use super::policy::{self, Failure};

/// UIDs written down at a time: bounds the status.
const UNCOUNTED_MAX: usize = 500;

/// The counts that the next status holds.
#[derive(Debug, Default)]
pub struct Tally<'a> {
    /// Pods, or completed indexes, and failed pods, whether or not their finalizers are gone yet.
    pub succeeded: i32,
    pub failed: i32,
    /// The parts of these that are final.
    pub counted_succeeded: i32,
    pub counted_failed: i32,
    pub uncounted: UncountedTerminatedPods,
    pub completed: Indexes,
    pub failed_indexes: Indexes,
    /// What a failed pod says about the whole Job, by its podFailurePolicy.
    pub fails_job: Option<String>,
    /// Accounted for in the status as it is stored: their finalizers may go.
    pub release: Vec<&'a Pod>,
    /// Accounted for only in the status that comes next.
    pub pending: usize,
    /// Failed pods kept until their index is tried again: they carry how often it has failed.
    pub kept: HashMap<i32, &'a Pod>,
}

impl Tally<'_> {
    /// Whether the status accounts for all pods that have ended, and none of them is held any more.
    pub fn is_settled(&self) -> bool {
        let none = |uids: &Option<Vec<String>>| uids.as_ref().is_none_or(Vec::is_empty);
        self.release.is_empty()
            && self.pending == 0
            && none(&self.uncounted.succeeded)
            && none(&self.uncounted.failed)
    }
}

/// Counts the Job's pods. `ending` says that the Job's outcome is decided: nothing is kept for another attempt.
pub fn count<'a>(facts: &Facts<'a>, ending: bool) -> Tally<'a> {
    let status = &facts.status;
    let end = facts.index_end();
    let stored = |text: &Option<String>| Indexes::parse(text.as_deref().unwrap_or_default(), end);
    let stored_completed = stored(&status.completed_indexes);
    let mut tally = Tally {
        counted_succeeded: status.succeeded.unwrap_or(0),
        counted_failed: status.failed.unwrap_or(0),
        completed: stored_completed.clone(),
        failed_indexes: stored(&status.failed_indexes),
        ..Default::default()
    };
    if facts.is_indexed() {
        for pod in succeeded_in_range(facts) {
            tally.completed.insert(facts::index_of(pod).unwrap_or(0));
        }
        if facts.spec.backoff_limit_per_index.is_some() {
            fail_indexes(facts, &mut tally);
            if !ending {
                keep_last_failures(facts, &mut tally);
            }
        }
    }
    let tracked: HashMap<&str, &Pod> = facts
        .pods
        .iter()
        .filter(|pod| facts::is_tracked(pod))
        .map(|pod| (pod.metadata.uid.as_deref().unwrap_or_default(), *pod))
        .collect();
    let uncounted = status.uncounted_terminated_pods.clone().unwrap_or_default();
    let mut known = BTreeSet::new();
    let mut carry = |uids: Option<Vec<String>>, counted: &mut i32, release: &mut Vec<&'a Pod>| {
        let mut still_held = Vec::new();
        for uid in uids.into_iter().flatten() {
            match tracked.get(uid.as_str()) {
                Some(pod) => {
                    release.push(pod);
                    known.insert(uid.clone());
                    still_held.push(uid);
                }
                None => *counted += 1,
            }
        }
        still_held
    };
    let mut succeeded = carry(
        uncounted.succeeded,
        &mut tally.counted_succeeded,
        &mut tally.release,
    );
    let mut failed = carry(
        uncounted.failed,
        &mut tally.counted_failed,
        &mut tally.release,
    );
    for pod in facts.pods.iter().copied() {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        if !facts::is_tracked(pod) || known.contains(uid) {
            continue;
        }
        let index = facts::index_of(pod).filter(|index| (0..end).contains(index));
        if facts.is_stopped_by_suspension(pod) {
            tally.release.push(pod);
        } else if pods::phase(pod) == "Succeeded" {
            if !facts.is_indexed() {
                tally.pending += 1;
                if succeeded.len() + failed.len() < UNCOUNTED_MAX {
                    succeeded.push(uid.into());
                }
            } else if index.is_none_or(|index| stored_completed.contains(index)) {
                tally.release.push(pod);
            } else {
                tally.pending += 1;
            }
        } else if facts.has_failed(pod) || (ending && pods::is_terminal(pod)) {
            let verdict = policy::judge(facts.job, pod);
            if let Failure::FailsJob(why) = &verdict {
                tally.fails_job.get_or_insert_with(|| why.clone());
            }
            if index.is_some_and(|index| {
                tally
                    .kept
                    .get(&index)
                    .is_some_and(|kept| std::ptr::eq(*kept, pod))
            }) {
                continue;
            }
            if verdict == Failure::Ignored || (facts.is_indexed() && index.is_none()) {
                tally.release.push(pod);
            } else {
                tally.pending += 1;
                if succeeded.len() + failed.len() < UNCOUNTED_MAX {
                    failed.push(uid.into());
                }
            }
        }
    }
    let count = |uids: &Vec<String>| i32::try_from(uids.len()).unwrap_or(i32::MAX);
    tally.succeeded = tally.counted_succeeded + count(&succeeded);
    tally.failed = tally.counted_failed + count(&failed);
    if facts.is_indexed() {
        tally.counted_succeeded = tally.completed.len();
        tally.succeeded = tally.completed.len();
    }
    let some = |uids: Vec<String>| (!uids.is_empty()).then_some(uids);
    tally.uncounted = UncountedTerminatedPods {
        succeeded: some(succeeded),
        failed: some(failed),
    };
    tally
}

fn succeeded_in_range<'a, 'f>(facts: &'f Facts<'a>) -> impl Iterator<Item = &'a Pod> + 'f {
    facts.pods.iter().copied().filter(|pod| {
        pods::phase(pod) == "Succeeded"
            && facts::is_tracked(pod)
            && facts::index_of(pod).is_some_and(|index| (0..facts.index_end()).contains(&index))
    })
}

/// Adds the indexes that have used up their attempts.
fn fail_indexes(facts: &Facts<'_>, tally: &mut Tally<'_>) {
    let limit = facts.spec.backoff_limit_per_index.unwrap_or(i32::MAX);
    for (index, pods) in facts::by_index(&facts.pods) {
        if !(0..facts.index_end()).contains(&index) || tally.completed.contains(index) {
            continue;
        }
        let gives_up = pods.iter().any(|pod| {
            facts::is_tracked(pod)
                && facts.has_failed(pod)
                && !facts.is_stopped_by_suspension(pod)
                && match policy::judge(facts.job, pod) {
                    Failure::FailsIndex => true,
                    Failure::Ignored => false,
                    _ => facts::number(pod, FAILURES) >= limit,
                }
        });
        if gives_up {
            tally.failed_indexes.insert(index);
        }
    }
}

/// Attempts of the pod's index before it, counted and ignored ones.
fn attempt(pod: &Pod) -> i32 {
    facts::number(pod, FAILURES).saturating_add(facts::number(pod, IGNORED))
}

/// Of each index that is to be tried again, the last failed pod stays until the next one is there.
fn keep_last_failures<'a>(facts: &Facts<'a>, tally: &mut Tally<'a>) {
    for (index, pods) in facts::by_index(&facts.pods) {
        if !(0..facts.index_end()).contains(&index)
            || tally.completed.contains(index)
            || tally.failed_indexes.contains(index)
        {
            continue;
        }
        let last = pods
            .iter()
            .copied()
            .filter(|pod| {
                facts::is_tracked(pod)
                    && facts.has_failed(pod)
                    && !facts.is_stopped_by_suspension(pod)
            })
            .max_by_key(|pod| (attempt(pod), facts::ended_at(pod)));
        let Some(last) = last else { continue };
        let replaced = pods
            .iter()
            .any(|pod| pods::is_active(pod) && attempt(pod) > attempt(last));
        if !replaced {
            tally.kept.insert(index, last);
        }
    }
}
