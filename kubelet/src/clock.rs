//! Clock: where the kubelet takes the time of day from, so that tests can drive it.

use jiff::{SignedDuration, Timestamp};

/// A Clock tells the time of day.
pub trait Clock: Send + Sync {
    fn now(&self) -> Timestamp;
}

/// The machine's own clock.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }
}

/// A Wait is a span of the time of day, which goes by a clock that may be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    pub since: Timestamp,
    pub until: Timestamp,
}

impl Wait {
    pub fn new(since: Timestamp, seconds: u64) -> Self {
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        let until = since.saturating_add(SignedDuration::from_secs(seconds));
        Self {
            since,
            until: until.unwrap_or(Timestamp::MAX),
        }
    }

    /// Until when it goes on; None when it is over. It also is when it has not begun by the clock as it now is: that was set back, and
    /// nobody shall wait until it has caught up.
    pub fn end(self, now: Timestamp) -> Option<Timestamp> {
        (self.since <= now && now < self.until).then_some(self.until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_in_time_and_at_once_when_the_clock_is_set_before_its_beginning() {
        let at = |second: i64| Timestamp::from_second(1_000_000 + second).unwrap();
        let wait = Wait::new(at(0), 300);
        for (now, end) in [
            (0, Some(300)),
            (299, Some(300)),
            (300, None),
            (3_600, None),
            (-1, None),
            (-31_536_000, None),
        ] {
            assert_eq!(wait.end(at(now)), end.map(at), "{now}");
        }
        assert_eq!(Wait::new(at(0), u64::MAX).until, Timestamp::MAX);
    }
}
