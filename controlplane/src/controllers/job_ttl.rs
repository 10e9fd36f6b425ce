//! Deletes Jobs that have ended, `ttlSecondsAfterFinished` later.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::job;
use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Plan, Propagation, View};
use super::snapshot::{Change, Snapshot};

pub const CONTROLLER: Controller = Controller {
    name: "ttl-after-finished",
    affected,
    plan,
};

fn affected(_: &Snapshot, change: &Change, keys: &mut Keys) {
    if let Some(Object::Job(job)) = &change.new {
        keys.insert(Key::of(&job.metadata));
    }
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(job) = view.snapshot.jobs.get(key) else {
        return plan;
    };
    let seconds = job
        .spec
        .as_ref()
        .and_then(|spec| spec.ttl_seconds_after_finished);
    let ended = job::end(job).and_then(|end| end.last_transition_time.clone());
    let (Some(seconds), Some(Time(ended)), None) =
        (seconds, ended, &job.metadata.deletion_timestamp)
    else {
        return plan;
    };
    let due = ended
        .saturating_add(SignedDuration::from_secs(seconds.into()))
        .unwrap_or(Timestamp::MAX);
    if due > view.now {
        plan.look_again(due);
    } else {
        plan.push(Action::Delete {
            target: Target::of(&**job),
            propagation: Some(Propagation::Foreground),
            grace_seconds: None,
        });
    }
    plan
}
