//! Memory: what a worker knows of its pod beyond what API and runtime say. Everything here may be lost with the process:
//! what must survive is kept in the runtime (labels, annotations) or in the pod's status.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use crate::clock::Wait;
use crate::pod::admission::Refusal;
use crate::runtime::ContainerView;

/// First wait after a failed attempt; it doubles up to the longest (upstream's figures).
pub const BACKOFF_S_FIRST: u64 = 10;
pub const BACKOFF_S_MAX: u64 = 300;
/// A container that ran for this long starts over with its back-off.
pub const BACKOFF_RESET_S: i64 = 600;

/// An OpKey names what an operation works on: one operation per key at a time.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OpKey {
    Volumes,
    Sandbox,
    Start(String),
    Stop(String),
    Kill(String),
    Remove(String),
    Resize(String),
    Clean,
}

/// A Failure is why an operation did not succeed, in the words of the API, and when to try again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub reason: &'static str,
    pub message: String,
    pub count: u32,
    /// Until it is tried again.
    pub wait: Wait,
}

/// What probes have found out about one run of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Verdicts {
    /// None: the probe exists and has not decided yet.
    pub startup: Option<bool>,
    pub readiness: Option<bool>,
    pub liveness_failed: bool,
    pub startup_failed: bool,
}

/// A Memory is kept per worker.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    pub in_flight: BTreeSet<OpKey>,
    /// Deadline of each stop in flight, so that a shorter grace period can overtake it.
    pub stop_deadlines: BTreeMap<String, Timestamp>,
    pub failures: BTreeMap<OpKey, Failure>,
    pub volumes_ready: bool,
    /// Something that generated volumes are made from has changed.
    pub volumes_stale: bool,
    /// For how long the tokens in the volumes need no renewal.
    pub volumes_fresh: Option<Wait>,
    /// By container id.
    pub verdicts: BTreeMap<String, Verdicts>,
    /// Container ids whose postStart hook has not ended yet.
    pub post_start: BTreeSet<String>,
    /// By container id: why it was stopped by us, if it was.
    pub killed: BTreeMap<String, &'static str>,
    /// By container id: the limits that it was resized to, as `Limits` prints them.
    pub limits: BTreeMap<String, String>,
    /// Since when the pod is being ended.
    pub ending_since: Option<Timestamp>,
    /// The last view of each container, kept when the runtime forgets it.
    pub last_seen: BTreeMap<String, ContainerView>,
    /// By container id: what it left in its termination message file.
    pub termination_messages: BTreeMap<String, String>,
    /// Why the pod was not let in beside others, if it was not.
    pub refused: Option<Refusal>,
    /// What the pod used more of than it may, if it was ended for that.
    pub evicted: Option<String>,
    /// Nothing of the pod is left in the runtime, and its volumes are gone.
    pub cleaned: bool,
}

impl Memory {
    pub fn fail(
        &mut self,
        key: OpKey,
        reason: &'static str,
        message: String,
        now: Timestamp,
        first_s: u64,
        max_s: u64,
    ) {
        let count = self.failures.get(&key).map_or(0, |f| f.count) + 1;
        let wait_s = first_s.saturating_mul(1 << (count - 1).min(16)).min(max_s);
        self.failures.insert(
            key,
            Failure {
                reason,
                message,
                count,
                wait: Wait::new(now, wait_s),
            },
        );
    }

    /// Time at which a failed operation may be tried again; None when it may be tried now.
    pub fn held_until(&self, key: &OpKey, now: Timestamp) -> Option<Timestamp> {
        self.failures.get(key).and_then(|f| f.wait.end(now))
    }
}

/// The back-off that a container's successor starts with: nothing before the first restart, then 10 s doubling to 300 s.
pub fn next_backoff_s(ended: &ContainerView) -> u64 {
    let ran_s = (ended.finished_at_ns - ended.started_at_ns) / 1_000_000_000;
    match ended.backoff_s {
        _ if ran_s >= BACKOFF_RESET_S => BACKOFF_S_FIRST,
        0 => BACKOFF_S_FIRST,
        seconds => (seconds * 2).min(BACKOFF_S_MAX),
    }
}

/// How long a container that ended must wait before it may start again.
pub fn restart_wait(ended: &ContainerView) -> Wait {
    let ran_s = (ended.finished_at_ns - ended.started_at_ns) / 1_000_000_000;
    let wait_s = if ran_s >= BACKOFF_RESET_S {
        0
    } else {
        ended.backoff_s
    };
    Wait::new(at_ns(ended.finished_at_ns), wait_s)
}

/// A time of the runtime, which counts nanoseconds since 1970.
pub fn at_ns(nanoseconds: i64) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(nanoseconds)).unwrap_or(Timestamp::UNIX_EPOCH)
}
