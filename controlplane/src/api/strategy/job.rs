//! Jobs and CronJobs: defaults, the selector that a Job gets, and what stays as it was made.

use serde_json::{Value, json};

use super::{Errors, Strategy, immutable, not_negative, one_of, pod_spec, required};
use crate::api::fields::{self, Fields};
use crate::api::status::FieldError;

/// Labels of a Job's pods, each with the name it had before it got a prefix.
const UID_LABELS: [&str; 2] = ["batch.kubernetes.io/controller-uid", "controller-uid"];
const NAME_LABELS: [&str; 2] = ["batch.kubernetes.io/job-name", "job-name"];
/// Job controllers make host names of a CronJob's name, a dash and ten digits.
const CRON_NAME_MAX: usize = 52;
/// Fields of a Job's spec that are fixed once it exists.
const FIXED: [&str; 5] = [
    "/spec/selector",
    "/spec/completionMode",
    "/spec/podFailurePolicy",
    "/spec/backoffLimitPerIndex",
    "/spec/managedBy",
];

/// Fills in a Job's spec at a path.
fn default_spec(object: &mut Value, at: &str) {
    let path = |field: &str| format!("{at}/{field}");
    if !object.has(&path("completions")) && !object.has(&path("parallelism")) {
        object.default(&path("completions"), 1);
    }
    object.default(&path("parallelism"), 1);
    let per_index = object.has(&path("backoffLimitPerIndex"));
    object.default(&path("backoffLimit"), if per_index { i32::MAX } else { 6 });
    object.default(&path("completionMode"), "NonIndexed");
    object.default(&path("suspend"), false);
    let judged = object.has(&path("podFailurePolicy"));
    let policy = if judged {
        "Failed"
    } else {
        "TerminatingOrFailed"
    };
    object.default(&path("podReplacementPolicy"), policy);
    for rule in object.items_mut(&path("podFailurePolicy/rules")) {
        for condition in rule.items_mut("/onPodConditions") {
            condition.default("/status", "True");
        }
    }
    object.object_mut(&path("template/metadata"));
    if let Some(spec) = object.pointer_mut(&path("template/spec")) {
        pod_spec::default(spec);
    }
}

fn validate_spec(object: &Value, at: &str, errors: &mut Errors) {
    let field = |name: &str| {
        format!("{at}/{name}")
            .trim_start_matches('/')
            .replace('/', ".")
    };
    for number in [
        "parallelism",
        "completions",
        "backoffLimit",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
        "activeDeadlineSeconds",
        "ttlSecondsAfterFinished",
    ] {
        not_negative(object, &format!("{at}/{number}"), errors);
    }
    one_of(
        object,
        &format!("{at}/completionMode"),
        "",
        &["NonIndexed", "Indexed"],
        errors,
    );
    one_of(
        object,
        &format!("{at}/podReplacementPolicy"),
        "",
        &["Failed", "TerminatingOrFailed"],
        errors,
    );
    let indexed = object.text(&format!("{at}/completionMode")) == "Indexed";
    if indexed {
        if !object.has(&format!("{at}/completions")) {
            let why = "when completion mode is Indexed";
            errors.push(FieldError::required(field("completions"), why));
        }
    } else {
        for only in ["backoffLimitPerIndex", "successPolicy"] {
            if object.has(&format!("{at}/{only}")) {
                let why = "may not be used with non-indexed jobs: requires indexed completion mode";
                let given = object
                    .pointer(&format!("{at}/{only}"))
                    .cloned()
                    .unwrap_or_default();
                errors.push(FieldError::invalid(field(only), given, why));
            }
        }
    }
    let restarts = object.text(&format!("{at}/template/spec/restartPolicy"));
    let allowed: &[&str] = if object.has(&format!("{at}/podFailurePolicy")) {
        &["Never"]
    } else {
        &["OnFailure", "Never"]
    };
    if !allowed.contains(&restarts) {
        let name = field("template.spec.restartPolicy");
        errors.push(FieldError::unsupported(name, restarts, allowed));
    }
    let template = object
        .pointer(&format!("{at}/template"))
        .unwrap_or(&Value::Null);
    pod_spec::validate_template(template, &field("template"), errors);
}

pub struct Job;

impl Strategy for Job {
    fn default(&self, job: &mut Value) {
        default_spec(job, "/spec");
    }

    /// The Job's pods are told apart from all others by its UID, unless the user has chosen otherwise.
    fn prepare_create(&self, job: &mut Value) {
        let (uid, name) = (
            job.text("/metadata/uid").to_owned(),
            fields::name(job).to_owned(),
        );
        if job.flag("/spec/manualSelector") || uid.is_empty() {
            return;
        }
        let labels = job.object_mut("/spec/template/metadata/labels");
        for label in NAME_LABELS {
            labels.insert(label.into(), json!(name));
        }
        for label in UID_LABELS {
            labels.insert(label.into(), json!(uid));
        }
        let selector = job.object_mut("/spec/selector/matchLabels");
        selector.entry(UID_LABELS[0]).or_insert(json!(uid));
    }

    fn validate(&self, job: &Value, errors: &mut Errors) {
        required(job, "/spec/selector", errors);
        validate_spec(job, "/spec", errors);
    }

    fn validate_update(&self, job: &Value, old: &Value, errors: &mut Errors) {
        for pointer in FIXED {
            immutable(job, old, pointer, errors);
        }
        // Where pods go may still be said while the Job is suspended and has never started; so may an Indexed Job grow.
        let unstarted = old.flag("/spec/suspend") && !old.has("/status/startTime");
        if !unstarted {
            immutable(job, old, "/spec/template", errors);
        }
        let grows = job.text("/spec/completionMode") == "Indexed"
            && job.int("/spec/completions") == job.int("/spec/parallelism");
        if !grows {
            immutable(job, old, "/spec/completions", errors);
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["status.successful"]
    }
}

pub struct CronJob;

impl Strategy for CronJob {
    fn default(&self, cron: &mut Value) {
        cron.default("/spec/concurrencyPolicy", "Allow");
        cron.default("/spec/suspend", false);
        cron.default("/spec/successfulJobsHistoryLimit", 3);
        cron.default("/spec/failedJobsHistoryLimit", 1);
        cron.object_mut("/spec/jobTemplate/metadata");
        default_spec(cron, "/spec/jobTemplate/spec");
    }

    fn validate(&self, cron: &Value, errors: &mut Errors) {
        required(cron, "/spec/schedule", errors);
        let (schedule, zone) = (
            cron.text("/spec/schedule"),
            cron.pointer("/spec/timeZone").and_then(Value::as_str),
        );
        if schedule.contains("TZ") {
            let why = "cannot use TZ or CRON_TZ in schedule, use timeZone field instead";
            errors.push(FieldError::invalid("spec.schedule", schedule, why));
        } else if !schedule.is_empty() {
            match crate::controllers::Schedule::parse(schedule, zone) {
                Ok(_) => {}
                Err(crate::controllers::ScheduleError::TimeZone(name)) => {
                    let why = format!("unknown time zone {name}");
                    errors.push(FieldError::invalid("spec.timeZone", name, why));
                }
                Err(crate::controllers::ScheduleError::Schedule { why, .. }) => {
                    errors.push(FieldError::invalid("spec.schedule", schedule, why));
                }
            }
        }
        one_of(
            cron,
            "/spec/concurrencyPolicy",
            "",
            &["Allow", "Forbid", "Replace"],
            errors,
        );
        for number in [
            "/spec/startingDeadlineSeconds",
            "/spec/successfulJobsHistoryLimit",
            "/spec/failedJobsHistoryLimit",
        ] {
            not_negative(cron, number, errors);
        }
        let name = fields::name(cron);
        if name.len() > CRON_NAME_MAX {
            let why = format!("must be no more than {CRON_NAME_MAX} characters");
            errors.push(FieldError::invalid("metadata.name", name, why));
        }
        validate_spec(cron, "/spec/jobTemplate/spec", errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(spec: Value) -> Value {
        let mut job = json!({"metadata": {"name": "sum", "uid": "u-1"}, "spec": {
            "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}}});
        json_patch::merge(&mut job, &json!({"spec": spec}));
        Job.prepare_create(&mut job);
        Job.default(&mut job);
        job
    }

    fn fields(job: &Value) -> Vec<String> {
        let mut errors = Vec::new();
        Job.validate(job, &mut errors);
        errors.into_iter().map(|error| error.field).collect()
    }

    #[test]
    fn a_job_selects_its_pods_by_its_uid() {
        let made = job(json!({}));
        assert_eq!(
            made["spec"]["selector"]["matchLabels"],
            json!({UID_LABELS[0]: "u-1"})
        );
        let labels = &made["spec"]["template"]["metadata"]["labels"];
        assert_eq!(
            (&labels["job-name"], &labels["controller-uid"]),
            (&json!("sum"), &json!("u-1"))
        );
        assert_eq!(
            (&made["spec"]["completions"], &made["spec"]["backoffLimit"]),
            (&json!(1), &json!(6))
        );
        assert!(fields(&made).is_empty());
        let manual = job(json!({"manualSelector": true, "selector": {"matchLabels": {"a": "b"}}}));
        assert_eq!(
            manual["spec"]["selector"],
            json!({"matchLabels": {"a": "b"}})
        );
    }

    #[test]
    fn what_a_job_cannot_be_is_refused_by_field() {
        for (spec, field) in [
            (
                json!({"completionMode": "Indexed", "parallelism": 2}),
                "spec.completions",
            ),
            (
                json!({"backoffLimitPerIndex": 1}),
                "spec.backoffLimitPerIndex",
            ),
            (json!({"parallelism": -1}), "spec.parallelism"),
            (
                json!({"template": {"spec": {"restartPolicy": "Always"}}}),
                "spec.template.spec.restartPolicy",
            ),
        ] {
            assert_eq!(fields(&job(spec.clone())), [field], "{spec}");
        }
    }

    #[test]
    fn a_schedule_is_checked_when_it_is_written() {
        for (schedule, zone, field) in [
            ("*/5 * * * *", "Europe/Vienna", None),
            ("@daily", "UTC", None),
            ("at noon", "UTC", Some("spec.schedule")),
            ("TZ=UTC 0 0 * * *", "UTC", Some("spec.schedule")),
            ("0 0 * * *", "Mars/Olympus", Some("spec.timeZone")),
        ] {
            let mut cron = json!({"metadata": {"name": "tick"}, "spec": {
                "schedule": schedule, "timeZone": zone, "jobTemplate": {"spec": job(json!({}))["spec"]}}});
            CronJob.default(&mut cron);
            let mut errors = Vec::new();
            CronJob.validate(&cron, &mut errors);
            let found: Vec<_> = errors.iter().map(|error| error.field.as_str()).collect();
            assert_eq!(found, Vec::from_iter(field), "{schedule} {zone}");
        }
    }
}
