//! CronJob: makes a Job of a template at the times of a schedule.

mod schedule;
#[cfg(test)]
mod tests;

use k8s_openapi::api::batch::v1::{CronJob, CronJobStatus, Job};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::tz::TimeZone;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use self::schedule::MISSED_MAX;
pub use self::schedule::{Error as ScheduleError, Schedule};
use super::job;
use super::object::{Key, Object, Target};
use super::patch::replace_status;
use super::plan::{Action, Controller, Keys, Note, Plan, Propagation, View, Write};
use super::pods;
use super::snapshot::{Change, Snapshot};

const REPORTER: &str = "cronjob-controller";
/// Annotation of a Job: the time it was made for.
const SCHEDULED_AT: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";

pub const CONTROLLER: Controller = Controller {
    name: "cronjob",
    affected,
    plan,
};

fn affected(_: &Snapshot, change: &Change, keys: &mut Keys) {
    match change.object() {
        Object::CronJob(cron) => {
            keys.insert(Key::of(&cron.metadata));
        }
        Object::Job(job) => keys.extend(pods::controller_key(&job.metadata, "CronJob")),
        _ => {}
    }
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(cron) = view.snapshot.cron_jobs.get(key) else {
        return plan;
    };
    let spec = &cron.spec;
    if cron.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let uid = cron.metadata.uid.as_deref().unwrap_or_default();
    let mut jobs: Vec<&Job> = view.snapshot.jobs_owned_by(uid).map(|job| &**job).collect();
    jobs.sort_by_key(|job| {
        (
            job.metadata.creation_timestamp.clone(),
            job.metadata.name.clone(),
        )
    });
    let old = cron.status.clone().unwrap_or_default();
    let mut status = refreshed(cron, &old, &jobs, &mut plan);
    clear_history(cron, &jobs, &mut plan);
    if spec.suspend != Some(true) && !view.snapshot.namespace_is_terminating(&key.namespace) {
        match Schedule::parse(&spec.schedule, spec.time_zone.as_deref()) {
            Ok(schedule) => start_due(view, cron, &schedule, &jobs, &mut status, &mut plan),
            Err(error) => warn(cron, "UnparseableSchedule", error.to_string(), &mut plan),
        }
    }
    plan.writes.extend(
        replace_status(&**cron, cron.status.as_ref(), &status)
            .map(|action| Write { action, note: None }),
    );
    plan
}

fn warn(cron: &CronJob, reason: &'static str, message: String, plan: &mut Plan) {
    plan.note(Note::warning(&Target::of(cron), REPORTER, reason, message));
}

fn say(cron: &CronJob, reason: &'static str, message: String, plan: &mut Plan) {
    plan.note(Note::normal(&Target::of(cron), REPORTER, reason, message));
}

fn is_running(job: &Job) -> bool {
    job::end(job).is_none()
}

fn reference(job: &Job) -> ObjectReference {
    Target::of(job).reference()
}

/// The status as the Jobs that are there make it; tells of Jobs that have ended or vanished.
fn refreshed(cron: &CronJob, old: &CronJobStatus, jobs: &[&Job], plan: &mut Plan) -> CronJobStatus {
    let mut status = old.clone();
    for known in old.active.iter().flatten() {
        let name = known.name.as_deref().unwrap_or_default();
        match jobs.iter().find(|job| job.metadata.uid == known.uid) {
            None => say(
                cron,
                "MissingJob",
                format!("Active job went missing: {name}"),
                plan,
            ),
            Some(job) => {
                if let Some(end) = job::end(job) {
                    let message = format!("Saw completed job: {name}, condition: {}", end.type_);
                    say(cron, "SawCompletedJob", message, plan);
                }
            }
        }
    }
    let running: Vec<_> = jobs
        .iter()
        .filter(|job| is_running(job))
        .map(|job| reference(job))
        .collect();
    status.active = (!running.is_empty()).then_some(running);
    let succeeded = jobs
        .iter()
        .filter_map(|job| job.status.as_ref())
        .filter(|status| job::condition(status, "Complete").is_some())
        .filter_map(|status| status.completion_time.clone())
        .max();
    status.last_successful_time = status.last_successful_time.max(succeeded);
    status
}

/// Deletes the oldest ended Jobs past the history limits.
fn clear_history(cron: &CronJob, jobs: &[&Job], plan: &mut Plan) {
    let spec = &cron.spec;
    for (type_, limit) in [
        ("Complete", spec.successful_jobs_history_limit.unwrap_or(3)),
        ("Failed", spec.failed_jobs_history_limit.unwrap_or(1)),
    ] {
        let ended: Vec<_> = jobs
            .iter()
            .filter(|job| job::end(job).is_some_and(|end| end.type_ == type_))
            .filter(|job| job.metadata.deletion_timestamp.is_none())
            .collect();
        let surplus = ended
            .len()
            .saturating_sub(usize::try_from(limit).unwrap_or(0));
        for job in ended.into_iter().take(surplus) {
            delete(cron, job, plan);
        }
    }
}

fn delete(cron: &CronJob, job: &Job, plan: &mut Plan) {
    let note = Note::normal(
        &Target::of(cron),
        REPORTER,
        "SuccessfulDelete",
        "Deleted job {name}",
    )
    .or_failure("FailedDelete", "Deleted job: ");
    let action = Action::Delete {
        target: Target::of(job),
        propagation: Some(Propagation::Background),
        grace_seconds: None,
    };
    plan.push_noted(action, note);
}

/// Starts the Job that is due, if one is, and sets the timer for the next.
fn start_due(
    view: &View<'_>,
    cron: &CronJob,
    schedule: &Schedule,
    jobs: &[&Job],
    status: &mut CronJobStatus,
    plan: &mut Plan,
) {
    let spec = &cron.spec;
    let now = view.now;
    let since = status
        .last_schedule_time
        .as_ref()
        .or(cron.metadata.creation_timestamp.as_ref())
        .map_or(now, |Time(at)| *at);
    let deadline = spec
        .starting_deadline_seconds
        .map(SignedDuration::from_secs);
    let earliest = deadline
        .and_then(|deadline| now.checked_sub(deadline).ok())
        .map_or(since, |oldest| oldest.max(since));
    let next = match schedule {
        // Counted from the last start, not from whenever this is looked at.
        Schedule::Every(_) => schedule.next(since.max(earliest)),
        Schedule::Cron(_) => schedule.next(now),
    };
    if let Some(next) = next.filter(|next| *next > now) {
        plan.look_again(next);
    }
    let Some(missed) = schedule.missed(earliest, now) else {
        return;
    };
    if missed.too_many {
        let message = format!(
            "too many missed start times (> {MISSED_MAX}). Set or decrease .spec.startingDeadlineSeconds or check clock skew"
        );
        warn(cron, "TooManyMissedTimes", message, plan);
    }
    let name = job_name(cron, missed.latest);
    let namespace = cron.metadata.namespace.as_deref().unwrap_or_default();
    if view.snapshot.jobs.contains(&Key::new(namespace, &name)) {
        // Started, and not yet written down.
        status.last_schedule_time = Some(Time(missed.latest));
        if let Some(next) = schedule.next(missed.latest).filter(|next| *next > now) {
            plan.look_again(next);
        }
        return;
    }
    let running: Vec<_> = jobs.iter().filter(|job| is_running(job)).collect();
    match spec.concurrency_policy.as_deref() {
        Some("Forbid") if !running.is_empty() => {
            let message = "Not starting job because prior execution is running and concurrency policy is Forbid";
            say(cron, "JobAlreadyActive", message.into(), plan);
            return;
        }
        Some("Replace") => {
            let mut waits = false;
            for job in &running {
                if job.metadata.deletion_timestamp.is_none() {
                    delete(cron, job, plan);
                    waits = true;
                }
            }
            if waits {
                return;
            }
        }
        _ => {}
    }
    let note = Note::normal(
        &Target::of(cron),
        REPORTER,
        "SuccessfulCreate",
        "Created job {name}",
    )
    .or_failure("FailedCreate", "Error creating job: ");
    let job = job_of(cron, name, missed.latest);
    plan.push_noted(Action::Create(Object::of(job)), note);
}

/// One name per scheduled time: a Job cannot be started twice for it.
fn job_name(cron: &CronJob, scheduled: Timestamp) -> String {
    let name = cron.metadata.name.as_deref().unwrap_or_default();
    // Intervals can be shorter than a minute; their last digits are seconds then.
    let minutes = scheduled.as_second() / 60;
    match scheduled.as_second() % 60 {
        0 => format!("{name}-{minutes}"),
        seconds => format!("{name}-{minutes}{seconds:02}"),
    }
}

fn job_of(cron: &CronJob, name: String, scheduled: Timestamp) -> Job {
    let template = cron.spec.job_template.clone();
    let meta = template.metadata.unwrap_or_default();
    let mut annotations = meta.annotations.unwrap_or_default();
    let zone = cron
        .spec
        .time_zone
        .as_deref()
        .and_then(|zone| TimeZone::get(zone).ok())
        .unwrap_or(TimeZone::UTC);
    let offset = zone.to_offset(scheduled);
    let written = if offset.is_zero() {
        scheduled.to_string()
    } else {
        scheduled.display_with_offset(offset).to_string()
    };
    annotations.insert(SCHEDULED_AT.into(), written);
    Job {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: cron.metadata.namespace.clone(),
            labels: meta.labels,
            annotations: Some(annotations),
            owner_references: Some(vec![pods::controller_reference(cron)]),
            ..Default::default()
        },
        spec: template.spec,
        status: None,
    }
}
