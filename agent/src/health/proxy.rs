//! Whether this node's proxy works, as kube-proxy says it of itself.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A change that is not in the maps after so long makes the proxy unhealthy: twice kube-proxy's default sync period.
const LATE: Duration = Duration::from_secs(60);

/// The health of the proxy. Written where changes come in and where they are in the maps, so that a loop that is stuck in
/// between shows.
#[derive(Debug, Default)]
pub struct ProxyHealth {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When the oldest change came in that is not in the maps.
    pending_since: Option<Instant>,
    /// The node is being taken away: balancers shall send nothing new.
    leaving: bool,
    last_updated: Option<jiff::Timestamp>,
}

/// What is said to whoever asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthAnswer {
    pub healthy: bool,
    pub node_eligible: bool,
    pub last_updated: Option<jiff::Timestamp>,
}

impl ProxyHealth {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Plain values: whoever panicked with the lock left them whole.
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A change came in that the maps may lack.
    pub fn queued(&self, now: Instant) {
        let mut state = self.state();
        state.pending_since = state.pending_since.or(Some(now));
    }

    /// The maps have everything that came in before `taken`.
    pub fn updated(&self, taken: Instant) {
        let mut state = self.state();
        // What came in since then is at least as young as that.
        state.pending_since = state.pending_since.filter(|since| *since > taken);
        state.last_updated = Some(jiff::Timestamp::now());
    }

    /// The node is deleted, or about to be.
    pub fn set_leaving(&self, leaving: bool) {
        self.state().leaving = leaving;
    }

    pub fn answer(&self, now: Instant) -> HealthAnswer {
        let state = self.state();
        let late = |since: Instant| now.saturating_duration_since(since) >= LATE;
        HealthAnswer {
            healthy: !state.pending_since.is_some_and(late),
            node_eligible: !state.leaving,
            last_updated: state.last_updated,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_that_is_late_makes_it_unhealthy_until_it_is_in() {
        let health = ProxyHealth::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(health.answer(at(1000)).healthy, "while it starts");
        health.queued(at(0));
        health.queued(at(50));
        assert!(health.answer(at(59)).healthy);
        assert!(!health.answer(at(60)).healthy);
        health.updated(at(60));
        assert!(health.answer(at(60)).healthy);
    }

    #[test]
    fn what_comes_in_while_a_batch_is_applied_still_waits() {
        let health = ProxyHealth::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        health.queued(at(2));
        health.updated(at(1));
        assert!(!health.answer(at(100)).healthy);
    }

    #[test]
    fn a_node_that_leaves_is_not_eligible_and_its_proxy_healthy() {
        let health = ProxyHealth::default();
        health.set_leaving(true);
        let answer = health.answer(Instant::now());
        assert!(answer.healthy && !answer.node_eligible);
    }
}
