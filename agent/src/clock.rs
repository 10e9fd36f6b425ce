//! Notices that the clock was set. Nothing here waits by it, but whoever wonders why logs skip an hour, or why the API server takes a
//! certificate no longer, finds it in `status`.

use std::time::Instant;

use jiff::{SignedDuration, Timestamp, Unit};

/// More than a clock that is kept right gradually goes wrong between two looks.
const JUMP_MIN: SignedDuration = SignedDuration::from_secs(1);

/// The time of day and the time that nobody sets, as they last were side by side.
#[derive(Debug)]
pub struct Clock {
    looked: (Timestamp, Instant),
    /// The last time that it was set: by how much, and what it said then.
    set: Option<(SignedDuration, Timestamp)>,
}

impl Clock {
    pub fn new(time: Timestamp, now: Instant) -> Self {
        Self {
            looked: (time, now),
            set: None,
        }
    }

    /// Compares the two. Says whether the clock was set since the last look; a machine that has slept finds it set forward.
    pub fn look(&mut self, time: Timestamp, now: Instant) -> bool {
        let (time_before, before) = std::mem::replace(&mut self.looked, (time, now));
        let passed = SignedDuration::try_from(now.saturating_duration_since(before))
            .unwrap_or(SignedDuration::MAX);
        let by = time.duration_since(time_before).saturating_sub(passed);
        let is_set = by.abs() >= JUMP_MIN;
        if is_set {
            self.set = Some((by, time));
        }
        is_set
    }

    /// The last time that the clock was set, in words.
    pub fn note(&self) -> Option<String> {
        let (by, to) = self.set?;
        let way = if by.is_negative() { "back" } else { "forward" };
        let by = by.abs().round(Unit::Second).unwrap_or(by.abs());
        let to = to.round(Unit::Second).unwrap_or(to);
        Some(format!(
            "the clock was set {way} by {by:#}, to {to}: traffic does not go by it, but certificates and tokens do"
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_clock_that_is_set_is_told_of_and_one_that_is_kept_right_is_not() {
        let (began, start) = (Timestamp::UNIX_EPOCH, Instant::now());
        let mut clock = Clock::new(began, start);
        let mut look = |time_s: f64, passed_s| {
            let time = began + SignedDuration::from_secs_f64(time_s);
            let is_set = clock.look(time, start + Duration::from_secs(passed_s));
            (is_set, clock.note().unwrap_or_default())
        };
        // NTP slews by half a thousandth at most.
        assert_eq!(look(10.005, 10), (false, String::new()));
        let (is_set, note) = look(3_620.0, 20);
        assert!(is_set);
        let told = "the clock was set forward by 1h, to 1970-01-01T01:00:20Z";
        assert!(note.starts_with(told), "{note}");
        assert_eq!(look(3_630.0, 30), (false, note), "it stays to be seen");
        let (is_set, note) = look(3_630.0 - 31_536_000.0, 40);
        assert!(is_set);
        let told = "the clock was set back by 8760h 10s, to 1969-01-01T01:00:30Z";
        assert!(note.starts_with(told), "{note}");
    }
}
