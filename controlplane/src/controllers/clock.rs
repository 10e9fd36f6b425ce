//! Notices that the clock was set: what is due by the time of day is then due at another moment than it was waited for.

use std::time::{Duration, Instant};

use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// How often to look.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
/// More than a clock that is kept right gradually goes wrong between two looks.
const JUMP_MIN: SignedDuration = SignedDuration::from_millis(500);

/// The time of day and the time that nobody sets, as they last were side by side.
#[derive(Debug)]
pub struct Clock {
    time: Timestamp,
    at: Instant,
}

impl Clock {
    pub fn new(time: Timestamp, at: Instant) -> Self {
        Self { time, at }
    }

    /// By how much the clock was set since the last look, forward or back; None when it was not. A machine that has slept finds it
    /// set forward.
    pub fn look(&mut self, time: Timestamp, at: Instant) -> Option<SignedDuration> {
        let passed = at.saturating_duration_since(self.at);
        let passed = SignedDuration::try_from(passed).unwrap_or(SignedDuration::MAX);
        let by = time.duration_since(self.time).saturating_sub(passed);
        *self = Self::new(time, at);
        (by.abs() >= JUMP_MIN).then_some(by)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_is_noticed_once_and_one_that_is_kept_right_never() {
        let (began, start) = (Timestamp::UNIX_EPOCH, Instant::now());
        let mut clock = Clock::new(began, start);
        let mut look = |time_ms, passed_ms| {
            let time = began + SignedDuration::from_millis(time_ms);
            let by = clock.look(time, start + Duration::from_millis(passed_ms));
            by.map(|by| by.as_millis())
        };
        assert_eq!(look(1_000, 1_000), None);
        // NTP slews by half a thousandth at most.
        assert_eq!(look(2_001, 2_000), None);
        assert_eq!(look(3_603_001, 3_000), Some(3_600_000));
        assert_eq!(look(3_604_001, 4_000), None);
        assert_eq!(look(5_001, 5_000), Some(-3_600_000));
        assert_eq!(look(6_001, 6_000), None);
    }
}
