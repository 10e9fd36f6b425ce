//! Probes: asking a container whether it lives, is started, takes traffic.
//!
//! `Counter` is the pure part (thresholds); `check` asks once; `spawn` repeats it for one run of one container.

mod ask;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe};

pub use ask::{Target, http_get, run_handler};

use crate::runtime::Runtime;
use crate::task::Scoped;

/// While a container is not ready its readiness probe runs more often than its period, so that it gets traffic as soon
/// as it can take it (the API reserves the right to). Starts here and doubles up to the period.
const EAGER_FIRST: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProbeKind {
    Startup,
    Readiness,
    Liveness,
}

impl ProbeKind {
    pub fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            Self::Startup => container.startup_probe.as_ref(),
            Self::Readiness => container.readiness_probe.as_ref(),
            Self::Liveness => container.liveness_probe.as_ref(),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Readiness => "Readiness",
            Self::Liveness => "Liveness",
        }
    }
}

/// A Counter turns single answers into verdicts: so many in a row make one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    success_threshold: u32,
    failure_threshold: u32,
    in_a_row: u32,
    last: Option<bool>,
    verdict: Option<bool>,
}

impl Counter {
    pub fn new(probe: &Probe, verdict: Option<bool>) -> Self {
        let threshold = |value: Option<i32>, default: u32| {
            value
                .and_then(|v| u32::try_from(v).ok())
                .filter(|v| *v > 0)
                .unwrap_or(default)
        };
        Self {
            success_threshold: threshold(probe.success_threshold, 1),
            failure_threshold: threshold(probe.failure_threshold, 3),
            in_a_row: 0,
            last: None,
            verdict,
        }
    }

    /// Takes one answer; the new verdict if it changed.
    pub fn record(&mut self, success: bool) -> Option<bool> {
        self.in_a_row = if self.last == Some(success) {
            self.in_a_row + 1
        } else {
            1
        };
        self.last = Some(success);
        let threshold = if success {
            self.success_threshold
        } else {
            self.failure_threshold
        };
        if self.in_a_row < threshold || self.verdict == Some(success) {
            return None;
        }
        self.verdict = Some(success);
        Some(success)
    }
}

/// A Finding is what a probe tells the worker of its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub container_id: String,
    pub kind: ProbeKind,
    /// A verdict, when it changed.
    pub verdict: Option<bool>,
    /// What went wrong, for an event.
    pub failure: Option<String>,
}

/// A Subject is one run of a container that is probed.
#[derive(Debug, Clone)]
pub struct Subject {
    pub container_id: String,
    pub container: Container,
    pub pod_ip: String,
    /// Time since the container was started.
    pub age: Duration,
}

fn seconds(value: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(
        value
            .and_then(|v| u64::try_from(v).ok())
            .filter(|v| *v > 0)
            .unwrap_or(default),
    )
}

/// Runs a probe until it is dropped. `known` is the verdict that holds so far.
pub fn spawn(
    runtime: Arc<dyn Runtime>,
    subject: Subject,
    kind: ProbeKind,
    known: Option<bool>,
    report: impl Fn(Finding) + Send + Sync + 'static,
) -> Option<Scoped> {
    let probe = kind.of(&subject.container)?.clone();
    Some(Scoped::spawn(async move {
        let period = seconds(probe.period_seconds, 10);
        let timeout = seconds(probe.timeout_seconds, 1);
        let delay = Duration::from_secs(
            probe
                .initial_delay_seconds
                .and_then(|v| u64::try_from(v).ok())
                .unwrap_or(0),
        );
        tokio::time::sleep(delay.saturating_sub(subject.age)).await;
        let mut counter = Counter::new(&probe, known);
        let mut eager =
            (kind == ProbeKind::Readiness && known != Some(true)).then_some(EAGER_FIRST);
        loop {
            let started = tokio::time::Instant::now();
            let target = Target {
                runtime: runtime.as_ref(),
                container_id: &subject.container_id,
                container: &subject.container,
                pod_ip: &subject.pod_ip,
            };
            let answer = ask::check(&target, &probe, timeout).await;
            let verdict = counter.record(answer.is_ok());
            // Being not ready yet, while starting, is not news; having failed is.
            let failure = answer.err().filter(|_| eager.is_none());
            if verdict.is_some() || failure.is_some() {
                report(Finding {
                    container_id: subject.container_id.clone(),
                    kind,
                    verdict,
                    failure,
                });
            }
            if kind == ProbeKind::Startup && counter.verdict == Some(true) {
                return;
            }
            let ready = counter.verdict == Some(true);
            let wait = eager
                .filter(|wait| !ready && *wait < period)
                .unwrap_or(period);
            // Once ready, or after as long as a period, the probe runs as its spec says.
            eager = eager
                .map(|wait| wait * 2)
                .filter(|wait| !ready && *wait < period);
            tokio::time::sleep_until(started + wait).await;
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(
        success: i32,
        failure: i32,
        known: Option<bool>,
        answers: &[bool],
    ) -> Vec<Option<bool>> {
        let probe = Probe {
            success_threshold: Some(success),
            failure_threshold: Some(failure),
            ..Default::default()
        };
        let mut counter = Counter::new(&probe, known);
        answers
            .iter()
            .map(|answer| counter.record(*answer))
            .collect()
    }

    #[test]
    fn verdicts_need_as_many_answers_in_a_row_as_the_thresholds_say() {
        for (success, failure, known, answers, expected) in [
            (1, 3, None, vec![true], vec![Some(true)]),
            (
                1,
                3,
                None,
                vec![false, false, false, false],
                vec![None, None, Some(false), None],
            ),
            (
                2,
                3,
                None,
                vec![true, false, true, true],
                vec![None, None, None, Some(true)],
            ),
            (
                1,
                2,
                Some(true),
                vec![true, false, true, false, false],
                vec![None, None, None, None, Some(false)],
            ),
            (
                1,
                1,
                Some(true),
                vec![false, true],
                vec![Some(false), Some(true)],
            ),
        ] {
            assert_eq!(
                verdicts(success, failure, known, &answers),
                expected,
                "{answers:?}"
            );
        }
    }
}
