//! Jobs and CronJobs.

use serde_json::{Value, json};

use super::place::Place;
use super::{Errors, Strategy, pod_spec, workload};
use crate::api::fields::{self, Fields};
use crate::api::status::FieldError;
use crate::controllers::{Schedule, ScheduleError};

/// Labels of a job's pods, and the older names of the first two.
const CONTROLLER_UID: &str = "batch.kubernetes.io/controller-uid";
const JOB_NAME: &str = "batch.kubernetes.io/job-name";
const CONTROLLER_UID_OLD: &str = "controller-uid";
const JOB_NAME_OLD: &str = "job-name";
/// Names of the pods of a job with indexes end in these digits, and must stay within a label.
const CRON_NAME_BYTES_MAX: usize = 52;

pub struct Job;

fn default_spec(object: &mut Value, pointer: &str) {
    let Some(spec) = object.pointer_mut(pointer).filter(|spec| spec.is_object()) else {
        return;
    };
    if !spec.has("/completions") && !spec.has("/parallelism") {
        spec.set("/completions", 1);
        spec.set("/parallelism", 1);
    }
    spec.default("/parallelism", 1);
    spec.default("/completionMode", "NonIndexed");
    spec.default("/suspend", false);
    if spec.has("/backoffLimitPerIndex") {
        spec.default("/backoffLimit", i64::from(i32::MAX));
    } else {
        spec.default("/backoffLimit", 6);
    }
    let replaces = if spec.has("/podFailurePolicy") {
        "Failed"
    } else {
        "TerminatingOrFailed"
    };
    spec.default("/podReplacementPolicy", replaces);
    for rule in spec.items_mut("/podFailurePolicy/rules") {
        for pattern in rule.items_mut("/onPodConditions") {
            pattern.default("/status", "True");
        }
    }
    workload::default_template(spec, "/template");
}

/// Whether the job says itself which pods are its own.
fn chooses_selector(job: &Value) -> bool {
    job.flag("/spec/manualSelector")
}

impl Strategy for Job {
    fn default(&self, job: &mut Value) {
        default_spec(job, "/spec");
        // A job without labels of its own has those of its pods.
        let labels = job.object("/spec/template/metadata/labels").cloned();
        let unlabelled = job
            .object("/metadata/labels")
            .is_none_or(serde_json::Map::is_empty);
        if let Some(labels) = labels.filter(|labels| unlabelled && !labels.is_empty()) {
            job.set("/metadata/labels", labels);
        }
    }

    /// Pods of a job are told from those of others by its uid, which is known only now.
    fn assign(&self, job: &mut Value) {
        if chooses_selector(job) {
            return;
        }
        let (uid, name) = (
            job.text("/metadata/uid").to_owned(),
            fields::name(job).to_owned(),
        );
        // A job with the labels of its pods, or none, shows these too.
        let own = job.object("/metadata/labels").cloned().unwrap_or_default();
        let shares = own.is_empty() || job.object("/spec/template/metadata/labels") == Some(&own);
        let labels = job.object_mut("/spec/template/metadata/labels");
        for (key, value) in [
            (CONTROLLER_UID, &uid),
            (CONTROLLER_UID_OLD, &uid),
            (JOB_NAME, &name),
            (JOB_NAME_OLD, &name),
        ] {
            labels.insert(key.to_owned(), value.as_str().into());
        }
        if shares {
            let labels = job["spec"]["template"]["metadata"]["labels"].clone();
            job.set("/metadata/labels", labels);
        }
        job.default("/spec/manualSelector", false);
        job.set(
            "/spec/selector",
            json!({"matchLabels": {CONTROLLER_UID: uid}}),
        );
    }

    fn validate(&self, job: &Value, errors: &mut Errors) {
        let spec = Place::root(job).field("spec");
        validate_spec(&spec, errors);
        let selector = spec.field("selector");
        if chooses_selector(job) {
            if selector.is_empty() {
                selector.missing("", errors);
            }
            super::metadata::validate_selector(&selector, errors);
            let labels = spec.field("template.metadata.labels");
            let parsed = crate::selector::LabelSelector::from_object(selector.value());
            if parsed.is_ok_and(|parsed| !parsed.matches_labels(labels.value().as_object())) {
                let why = "`selector` does not match template `labels`";
                errors.push(FieldError::invalid(
                    labels.path(),
                    labels.value().clone(),
                    why,
                ));
            }
        } else if !selector.is_empty() && !job.has("/metadata/uid") {
            selector.invalid("`selector` not auto-generated", errors);
        }
    }

    fn validate_update(&self, job: &Value, old: &Value, errors: &mut Errors) {
        let (spec, before) = (
            Place::root(job).field("spec"),
            Place::root(old).field("spec"),
        );
        for field in [
            "selector",
            "completionMode",
            "podFailurePolicy",
            "backoffLimitPerIndex",
            "managedBy",
            "successPolicy",
        ] {
            spec.field(field).unchanged(&before.field(field), errors);
        }
        let completions = spec.field("completions");
        let elastic = spec.field("completionMode").text() == "Indexed"
            && completions.value() == spec.field("parallelism").value();
        if !elastic {
            completions.unchanged(&before.field("completions"), errors);
        }
        // A job that has not begun, or of which nothing runs any more, may be made to fit where it can run.
        let stopped = old.int("/status/active") == 0
            && old
                .items("/status/conditions")
                .iter()
                .any(|c| c.text("/type") == "Suspended" && c.text("/status") == "True");
        let waits = before.field("suspend").flag() && (stopped || !old.has("/status/startTime"));
        let fixed = |spec: &Place<'_>| {
            let mut template = spec.field("template").value().clone();
            if waits {
                for field in ["nodeSelector", "affinity", "tolerations", "schedulingGates"] {
                    template.remove(&format!("/spec/{field}"));
                }
                template.remove("/metadata/annotations");
                template.remove("/metadata/labels");
                for list in ["containers", "initContainers"] {
                    for container in template.items_mut(&format!("/spec/{list}")) {
                        container.remove("/resources");
                    }
                }
            }
            template
        };
        if fixed(&spec) != fixed(&before) {
            spec.field("template").invalid("field is immutable", errors);
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["status.successful"]
    }
}

fn validate_spec(spec: &Place<'_>, errors: &mut Errors) {
    for field in [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ] {
        spec.field(field).not_negative(errors);
    }
    let mode = spec.field("completionMode");
    mode.one_of(&["Indexed", "NonIndexed"], errors);
    if mode.text() == "Indexed" && !spec.field("completions").is_there() {
        let why = "when completion mode is Indexed";
        spec.field("completions").missing(why, errors);
    }
    if mode.text() != "Indexed" {
        for only in ["backoffLimitPerIndex", "successPolicy"] {
            if spec.field(only).is_there() {
                let why = "requires indexed completion mode";
                spec.field(only).invalid(why, errors);
            }
        }
    }
    spec.field("podReplacementPolicy")
        .one_of(&["Failed", "TerminatingOrFailed"], errors);
    for rule in spec.field("podFailurePolicy.rules").items() {
        rule.field("action")
            .require_one_of(&["Count", "FailIndex", "FailJob", "Ignore"], errors);
    }
    let template = spec.field("template");
    pod_spec::validate_template(&template, errors);
    let policy = template.field("spec.restartPolicy");
    if !["Never", "OnFailure"].contains(&policy.text()) {
        errors.push(FieldError {
            message: if policy.text().is_empty() || policy.text() == "Always" {
                "Required value: valid values: \"OnFailure\", \"Never\"".to_owned()
            } else {
                format!(
                    "Unsupported value: {:?}: supported values: \"OnFailure\", \"Never\"",
                    policy.text()
                )
            },
            field: policy.path().to_owned(),
            reason: "FieldValueRequired",
        });
    }
    if spec.field("podFailurePolicy").is_there() && policy.text() != "Never" {
        let why = "only \"Never\" is supported when podFailurePolicy is specified";
        policy.invalid(why, errors);
    }
}

pub struct CronJob;

impl Strategy for CronJob {
    fn default(&self, cron: &mut Value) {
        cron.default("/spec/concurrencyPolicy", "Allow");
        cron.default("/spec/suspend", false);
        cron.default("/spec/successfulJobsHistoryLimit", 3);
        cron.default("/spec/failedJobsHistoryLimit", 1);
        default_cron_template(cron);
    }

    fn validate(&self, cron: &Value, errors: &mut Errors) {
        let root = Place::root(cron);
        let name = root.field("metadata.name");
        if name.text().len() > CRON_NAME_BYTES_MAX {
            name.invalid(
                format!("must be no more than {CRON_NAME_BYTES_MAX} characters"),
                errors,
            );
        }
        let spec = root.field("spec");
        let (schedule, zone) = (spec.field("schedule"), spec.field("timeZone"));
        if schedule.text().contains("TZ") {
            let why = "cannot use TZ or CRON_TZ in schedule, use timeZone field instead";
            schedule.invalid(why, errors);
        } else if schedule.require(errors) {
            match Schedule::parse(schedule.text(), zone.value().as_str()) {
                Ok(_) => {}
                Err(ScheduleError::TimeZone(name)) => {
                    zone.invalid(format!("unknown time zone {name}"), errors);
                }
                Err(ScheduleError::Schedule { why, .. }) => schedule.invalid(why, errors),
            }
        }
        spec.field("concurrencyPolicy")
            .require_one_of(&["Allow", "Forbid", "Replace"], errors);
        for field in [
            "startingDeadlineSeconds",
            "successfulJobsHistoryLimit",
            "failedJobsHistoryLimit",
        ] {
            spec.field(field).not_negative(errors);
        }
        let template = spec.field("jobTemplate.spec");
        validate_spec(&template, errors);
        if template.field("manualSelector").flag() {
            errors.push(FieldError::unsupported(
                template.field("manualSelector").path(),
                true,
                &["nil", "false"],
            ));
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

/// The template of a CronJob's jobs is defaulted in its pods alone: what a Job's own fields default to is decided when one
/// is made.
fn default_cron_template(cron: &mut Value) {
    if let Some(spec) = cron.pointer_mut("/spec/jobTemplate/spec") {
        workload::default_template(spec, "/template");
    }
    if cron.has("/spec/jobTemplate") {
        cron.object_mut("/spec/jobTemplate/metadata");
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::told;
    use super::*;

    fn job() -> Value {
        json!({"metadata": {"name": "j", "uid": "u"}, "spec": {"template": {"metadata": {},
            "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}}})
    }

    #[test]
    fn a_job_is_defaulted_and_given_a_selector_of_its_own() {
        let mut job = job();
        Job.default(&mut job);
        Job.assign(&mut job);
        assert_eq!(job["spec"]["completions"], 1);
        assert_eq!(job["spec"]["backoffLimit"], 6);
        assert_eq!(
            job["spec"]["selector"],
            json!({"matchLabels": {CONTROLLER_UID: "u"}})
        );
        assert_eq!(
            job["spec"]["template"]["metadata"]["labels"][JOB_NAME_OLD],
            "j"
        );
        assert_eq!(told(&Job, &job), Vec::<String>::new());
    }

    #[test]
    fn a_jobs_pods_end() {
        let mut job = job();
        job.remove("/spec/template/spec/restartPolicy");
        Job.default(&mut job);
        assert_eq!(
            told(&Job, &job),
            [
                r#"spec.template.spec.restartPolicy: Required value: valid values: "OnFailure", "Never""#
            ]
        );
    }

    #[test]
    fn a_running_job_keeps_its_template() {
        let mut old = job();
        Job.default(&mut old);
        let mut new = old.clone();
        new.set("/spec/parallelism", 4);
        let mut errors = Vec::new();
        Job.validate_update(&new, &old, &mut errors);
        assert_eq!(errors, []);
        new.set("/spec/template/spec/nodeSelector", json!({"a": "b"}));
        Job.validate_update(&new, &old, &mut errors);
        assert_eq!(errors[0].field, "spec.template");
        old.set("/spec/suspend", true);
        new.set("/spec/suspend", true);
        errors.clear();
        Job.validate_update(&new, &old, &mut errors);
        assert_eq!(errors, []);
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
                "schedule": schedule, "timeZone": zone, "jobTemplate": {"spec": job()["spec"]}}});
            CronJob.default(&mut cron);
            let mut errors = Vec::new();
            CronJob.validate(&cron, &mut errors);
            let found: Vec<_> = errors.iter().map(|error| error.field.as_str()).collect();
            assert_eq!(found, Vec::from_iter(field), "{schedule} {zone}");
        }
    }
}
