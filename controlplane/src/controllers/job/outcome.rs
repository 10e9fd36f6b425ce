//! How a Job ends. The outcome is announced first (FailureTarget, SuccessCriteriaMet), then its pods are stopped, and when all
//! of them are gone and counted the Job has ended (Failed, Complete).

use k8s_openapi::api::batch::v1::{JobCondition, JobStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::super::pods;
use super::facts::Facts;
use super::policy;
use super::tally::Tally;

pub const FAILURE: &str = "FailureTarget";
pub const SUCCESS: &str = "SuccessCriteriaMet";

/// An outcome that is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The condition that announces it.
    pub announced: &'static str,
    pub reason: String,
    pub message: String,
}

impl Verdict {
    fn new(announced: &'static str, reason: &str, message: impl Into<String>) -> Self {
        Self {
            announced,
            reason: reason.into(),
            message: message.into(),
        }
    }

    pub fn succeeded(&self) -> bool {
        self.announced == SUCCESS
    }

    /// The condition of the Job that has ended so.
    pub fn end(&self) -> &'static str {
        if self.succeeded() {
            "Complete"
        } else {
            "Failed"
        }
    }
}

/// The outcome that the status already announces: it is never taken back.
pub fn announced(facts: &Facts<'_>) -> Option<Verdict> {
    [FAILURE, SUCCESS].into_iter().find_map(|type_| {
        let known = facts.condition(type_)?;
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        Some(Verdict {
            announced: type_,
            reason: text(&known.reason),
            message: text(&known.message),
        })
    })
}

/// When the Job has been active for as long as it may.
pub fn deadline(facts: &Facts<'_>) -> Option<Timestamp> {
    let Time(start) = facts.status.start_time.as_ref()?;
    let seconds = facts.spec.active_deadline_seconds?;
    let at = start.saturating_add(SignedDuration::from_secs(seconds));
    (!facts.is_suspended()).then(|| at.unwrap_or(Timestamp::MAX))
}

/// The outcome that follows from the pods as they are now, beside plain completion.
pub fn decide(facts: &Facts<'_>, tally: &Tally<'_>, now: Timestamp) -> Option<Verdict> {
    if let Some(why) = &tally.fails_job {
        return Some(Verdict::new(FAILURE, "PodFailurePolicy", why));
    }
    let per_index = facts.spec.backoff_limit_per_index.is_some();
    let limit = facts
        .spec
        .backoff_limit
        .unwrap_or(if per_index { i32::MAX } else { 6 });
    if tally.failed > limit || restarts_exceed(facts, limit) {
        let message = "Job has reached the specified backoff limit";
        return Some(Verdict::new(FAILURE, "BackoffLimitExceeded", message));
    }
    if deadline(facts).is_some_and(|at| at <= now) {
        let message = "Job was active longer than specified deadline";
        return Some(Verdict::new(FAILURE, "DeadlineExceeded", message));
    }
    if per_index {
        let failed = tally.failed_indexes.len();
        let allowed = facts.spec.max_failed_indexes;
        if allowed.is_some_and(|allowed| failed > allowed) {
            let message = "Job has exceeded the specified maximal number of failed indexes";
            return Some(Verdict::new(FAILURE, "MaxFailedIndexesExceeded", message));
        }
        if failed > 0 && failed + tally.completed.len() >= facts.index_end() {
            return Some(Verdict::new(
                FAILURE,
                "FailedIndexes",
                "Job has failed indexes",
            ));
        }
    }
    let policy = facts.spec.success_policy.as_ref()?;
    let why = policy::success(policy, &tally.completed, facts.index_end())?;
    Some(Verdict::new(SUCCESS, "SuccessPolicy", why))
}

/// Plain completion: as many successes as asked for, and nothing runs any more.
pub fn completed(
    facts: &Facts<'_>,
    tally: &Tally<'_>,
    active: i32,
    created: bool,
) -> Option<Verdict> {
    let enough = match facts.spec.completions {
        None => tally.succeeded > 0,
        Some(completions) => tally.succeeded >= completions,
    };
    (enough && active == 0 && !created).then(|| {
        Verdict::new(
            SUCCESS,
            "CompletionsReached",
            "Reached expected number of succeeded pods",
        )
    })
}

/// Pods that restart in place count by their restarts.
fn restarts_exceed(facts: &Facts<'_>, limit: i32) -> bool {
    let template = facts.spec.template.spec.as_ref();
    if template.and_then(|spec| spec.restart_policy.as_deref()) != Some("OnFailure") {
        return false;
    }
    let restarts = facts
        .pods
        .iter()
        .filter(|pod| matches!(pods::phase(pod), "Running" | "Pending"))
        .flat_map(|pod| pod.status.iter())
        .flat_map(|status| {
            let main = status.container_statuses.iter().flatten();
            main.chain(status.init_container_statuses.iter().flatten())
        })
        .fold(0_i32, |sum, container| {
            sum.saturating_add(container.restart_count)
        });
    if limit == 0 {
        restarts > 0
    } else {
        restarts >= limit
    }
}

/// Sets a condition; gives whether that changed it.
pub fn set_condition(
    status: &mut JobStatus,
    type_: &str,
    holds: bool,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> bool {
    let conditions = status.conditions.get_or_insert_default();
    let wanted = if holds { "True" } else { "False" };
    let new = JobCondition {
        type_: type_.into(),
        status: wanted.into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        last_probe_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    };
    match conditions
        .iter_mut()
        .find(|condition| condition.type_ == type_)
    {
        Some(known) if known.status == wanted => false,
        Some(known) => {
            *known = new;
            true
        }
        // What has never held need not be said.
        None if !holds => false,
        None => {
            conditions.push(new);
            true
        }
    }
}
