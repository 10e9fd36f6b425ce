//! Job: runs pods of a template until enough of them have succeeded.

mod facts;
mod indexes;
mod outcome;
mod policy;
mod replicas;
mod tally;
#[cfg(test)]
mod tests;

use k8s_openapi::api::batch::v1::{Job, JobStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;

use self::facts::{Facts, TRACKING};
pub use self::facts::{condition, end};
use self::outcome::{Verdict, set_condition};
use self::tally::Tally;
use super::labels;
use super::object::{Key, Object, Target};
use super::patch::replace_status;
use super::plan::{Action, Controller, Keys, Note, Plan, View, Write};
use super::pods;
use super::snapshot::{Change, Snapshot};

const REPORTER: &str = "job-controller";
/// Value of `managedBy` of the Jobs that are ours, besides none.
const MANAGER: &str = "kubernetes.io/job-controller";
/// Keys of pods whose Job is not there to count them; names of Jobs hold no slash.
const STRAY: &str = "pod/";

pub const CONTROLLER: Controller = Controller {
    name: "job",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    for state in change.states() {
        match state {
            Object::Job(job) => {
                keys.insert(Key::of(&job.metadata));
                let uid = job.metadata.uid.as_deref().unwrap_or_default();
                if change.new.is_none() {
                    keys.extend(snapshot.pods_owned_by(uid).map(|pod| stray_key(pod)));
                }
            }
            Object::Pod(pod) => {
                if facts::is_tracked(pod) && job_of(snapshot, pod).is_none() {
                    keys.insert(stray_key(pod));
                }
                match pods::controller_of(&pod.metadata) {
                    Some(_) => keys.extend(pods::controller_key(&pod.metadata, "Job")),
                    None => keys.extend(
                        snapshot
                            .jobs
                            .namespace(pod.metadata.namespace.as_deref().unwrap_or_default())
                            .filter(|(_, job)| selects(job, pod))
                            .map(|(key, _)| key.clone()),
                    ),
                }
            }
            _ => {}
        }
    }
}

fn stray_key(pod: &Pod) -> Key {
    let key = Key::of(&pod.metadata);
    Key::new(&key.namespace, &format!("{STRAY}{}", key.name))
}

/// The Job that the pod says it belongs to, if it is there.
fn job_of<'a>(snapshot: &'a Snapshot, pod: &Pod) -> Option<&'a Job> {
    let owner = pods::controller_of(&pod.metadata)?;
    let job = snapshot
        .jobs
        .get(&pods::controller_key(&pod.metadata, "Job")?)?;
    (job.metadata.uid.as_ref() == Some(&owner.uid)).then_some(&**job)
}

fn selects(job: &Job, pod: &Pod) -> bool {
    let selector = job.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| {
        !labels::is_empty(selector)
            && labels::selector_matches(selector, pod.metadata.labels.as_ref())
    })
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    if let Some(pod) = key.name.strip_prefix(STRAY) {
        return let_go_of_stray(view.snapshot, &Key::new(&key.namespace, pod));
    }
    let Some(job) = view.snapshot.jobs.get(key) else {
        return Plan::nothing();
    };
    let Some(spec) = job.spec.as_ref() else {
        return Plan::nothing();
    };
    let mut plan = Plan::nothing();
    if spec
        .managed_by
        .as_deref()
        .is_some_and(|name| name != MANAGER)
    {
        return plan;
    }
    let ended = end(job).is_some();
    let deleting = job.metadata.deletion_timestamp.is_some();
    let owned = owned_pods(view.snapshot, job, key, !ended && !deleting, &mut plan);
    if ended || deleting {
        // Nobody counts them any more.
        let done = |pod: &&&Pod| ended || pods::is_terminating(pod) || pods::is_terminal(pod);
        for pod in owned
            .iter()
            .filter(done)
            .filter(|pod| facts::is_tracked(pod))
        {
            plan.push(let_go(pod));
        }
        return plan;
    }
    let facts = Facts::new(job, spec, owned);
    proceed(view, &facts, &mut plan);
    plan
}

/// The Job's pods; adopts and releases where labels say so.
fn owned_pods<'a>(
    snapshot: &'a Snapshot,
    job: &Job,
    key: &Key,
    claims: bool,
    plan: &mut Plan,
) -> Vec<&'a Pod> {
    let uid = job.metadata.uid.as_deref().unwrap_or_default();
    let mut owned: Vec<&Pod> = Vec::new();
    for pod in snapshot.pods_owned_by(uid) {
        if selects(job, pod) || !claims || pods::is_terminating(pod) {
            owned.push(pod);
        } else {
            plan.push(pods::release(&**pod, uid));
        }
    }
    if claims {
        for pod in snapshot.orphan_pods(&key.namespace) {
            if selects(job, pod) && pods::is_active(pod) {
                plan.push(pods::adopt(&**pod, job));
                owned.push(pod);
            }
        }
    }
    owned
}

/// One step of a Job that has not ended.
fn proceed(view: &View<'_>, facts: &Facts<'_>, plan: &mut Plan) {
    let now = view.now;
    let known = outcome::announced(facts);
    let tally = tally::count(facts, known.is_some());
    let mut verdict = known.or_else(|| outcome::decide(facts, &tally, now));
    let mut status = facts.status.clone();
    let mut resumed = false;
    let active = if verdict.is_some() {
        replicas::stop(facts, &facts.active, plan);
        0
    } else {
        let terminating = view
            .snapshot
            .namespace_is_terminating(facts.job.metadata.namespace.as_deref().unwrap_or_default());
        let before = plan.writes.len();
        let active = if terminating {
            i32::try_from(facts.active.len()).unwrap_or(i32::MAX)
        } else {
            replicas::plan(facts, &tally, now, plan)
        };
        let created = plan.writes[before..]
            .iter()
            .any(|write| matches!(write.action, Action::Create(_)));
        verdict = outcome::completed(facts, &tally, active, created);
        if verdict.is_none() {
            resumed = tell_suspension(facts, &mut status, now, plan);
        }
        if let Some(at) = outcome::deadline(facts) {
            plan.look_again(at);
        }
        active
    };
    for pod in &tally.release {
        plan.push(let_go(pod));
    }
    if resumed || (status.start_time.is_none() && !facts.is_suspended()) {
        status.start_time = Some(Time(now));
    }
    write_counts(facts, &tally, active, &mut status);
    if let Some(verdict) = &verdict {
        let announced = verdict.announced;
        set_condition(
            &mut status,
            announced,
            true,
            &verdict.reason,
            &verdict.message,
            now,
        );
        if tally.is_settled() && facts.active.is_empty() && facts.terminating.is_empty() {
            finish(facts, verdict, &mut status, now, plan);
            return;
        }
    }
    plan.writes.extend(
        replace_status(facts.job, facts.job.status.as_ref(), &status)
            .map(|action| Write { action, note: None }),
    );
}

fn write_counts(facts: &Facts<'_>, tally: &Tally<'_>, active: i32, status: &mut JobStatus) {
    let ready = facts
        .active
        .iter()
        .filter(|pod| pods::is_ready(pod))
        .count();
    let count = |number: usize| Some(i32::try_from(number).unwrap_or(i32::MAX));
    status.active = Some(active);
    status.ready = count(ready).map(|ready| ready.min(active));
    status.terminating = count(facts.terminating.len());
    status.succeeded = Some(tally.counted_succeeded);
    status.failed = Some(tally.counted_failed);
    status.uncounted_terminated_pods = Some(tally.uncounted.clone());
    if facts.is_indexed() {
        let written = tally.completed.to_string();
        status.completed_indexes = (!tally.completed.is_empty()).then_some(written);
        if facts.spec.backoff_limit_per_index.is_some() {
            status.failed_indexes = Some(tally.failed_indexes.to_string());
        }
    }
}

/// Keeps the condition Suspended. Gives whether the Job goes on after a suspension.
fn tell_suspension(
    facts: &Facts<'_>,
    status: &mut JobStatus,
    now: Timestamp,
    plan: &mut Plan,
) -> bool {
    let suspended = facts.is_suspended();
    let (reason, message) = if suspended {
        ("JobSuspended", "Job suspended")
    } else {
        ("JobResumed", "Job resumed")
    };
    if !set_condition(status, "Suspended", suspended, reason, message, now) {
        return false;
    }
    let event = if suspended { "Suspended" } else { "Resumed" };
    plan.note(Note::normal(
        &Target::of(facts.job),
        REPORTER,
        event,
        message,
    ));
    !suspended
}

/// Writes the end of the Job.
fn finish(
    facts: &Facts<'_>,
    verdict: &Verdict,
    status: &mut JobStatus,
    now: Timestamp,
    plan: &mut Plan,
) {
    set_condition(
        status,
        verdict.end(),
        true,
        &verdict.reason,
        &verdict.message,
        now,
    );
    let target = Target::of(facts.job);
    let note = if verdict.succeeded() {
        status.completion_time = Some(Time(now));
        Note::normal(&target, REPORTER, "Completed", "Job completed")
    } else {
        let reason = match verdict.reason.as_str() {
            "PodFailurePolicy" => "PodFailurePolicy",
            "DeadlineExceeded" => "DeadlineExceeded",
            "MaxFailedIndexesExceeded" => "MaxFailedIndexesExceeded",
            "FailedIndexes" => "FailedIndexes",
            _ => "BackoffLimitExceeded",
        };
        Note::warning(&target, REPORTER, reason, verdict.message.as_str())
    };
    if let Some(action) = replace_status(facts.job, facts.job.status.as_ref(), status) {
        plan.push_noted(action, note);
    }
}

/// Takes the tracking finalizer off a pod.
fn let_go(pod: &Pod) -> Action {
    let mut finalizers = pod.metadata.finalizers.clone().unwrap_or_default();
    finalizers.retain(|held| held != TRACKING);
    Action::Patch {
        target: Target::of(pod),
        subresource: None,
        body: json!({"metadata": {
            "uid": pod.metadata.uid, "resourceVersion": pod.metadata.resource_version,
            "finalizers": finalizers,
        }}),
    }
}

/// A pod whose Job is gone, or that belongs to none any more, is held by nobody.
fn let_go_of_stray(snapshot: &Snapshot, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    if let Some(pod) = snapshot.pods.get(key)
        && facts::is_tracked(pod)
        && job_of(snapshot, pod).is_none()
    {
        plan.push(let_go(pod));
    }
    plan
}
