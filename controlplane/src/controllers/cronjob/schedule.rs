//! When a CronJob is due.

use cronexpr::Crontab;
use k8s_openapi::jiff::tz::TimeZone;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// More missed times than this are worth a warning: upstream's bound.
pub const MISSED_MAX: usize = 100;

/// A cron schedule in its time zone, or a fixed interval (`@every 5m`).
#[derive(Debug)]
pub enum Schedule {
    Cron(Box<Crontab>),
    Every(SignedDuration),
}

/// Why a schedule cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("unparseable schedule: {schedule:?} : {why}")]
    Schedule { schedule: String, why: String },
    #[error("unknown time zone {0:?}")]
    TimeZone(String),
}

/// Times of a schedule that have passed without a start.
#[derive(Debug, PartialEq, Eq)]
pub struct Missed {
    pub latest: Timestamp,
    /// More than `MISSED_MAX` have passed.
    pub too_many: bool,
}

impl Schedule {
    /// A schedule as `spec.schedule` has it, in a zone of the IANA database; none is UTC.
    pub fn parse(schedule: &str, zone: Option<&str>) -> Result<Self, Error> {
        let error = |why: String| Error::Schedule {
            schedule: schedule.into(),
            why,
        };
        let zone = zone.unwrap_or("UTC");
        if TimeZone::get(zone).is_err() {
            return Err(Error::TimeZone(zone.into()));
        }
        if let Some(interval) = schedule.strip_prefix("@every ") {
            let interval: SignedDuration = interval
                .trim()
                .parse()
                .map_err(|why| error(format!("{why}")))?;
            // Below a second there is nothing to wait for.
            let interval = SignedDuration::from_secs(interval.as_secs().max(1));
            return Ok(Schedule::Every(interval));
        }
        let fields = match schedule.trim() {
            "@yearly" | "@annually" => "0 0 1 1 *".to_string(),
            "@monthly" => "0 0 1 * *".to_string(),
            "@weekly" => "0 0 * * 0".to_string(),
            "@daily" | "@midnight" => "0 0 * * *".to_string(),
            "@hourly" => "0 * * * *".to_string(),
            // A question mark leaves a day open, which a star does as well.
            other => other.replace('?', "*"),
        };
        let count = fields.split_whitespace().count();
        if count != 5 {
            return Err(error(format!("expected exactly 5 fields, found {count}")));
        }
        cronexpr::parse_crontab(&format!("{fields} {zone}"))
            .map(|crontab| Schedule::Cron(Box::new(crontab)))
            .map_err(|why| error(why.to_string()))
    }

    /// The first time after `since`; none for a date that never comes.
    pub fn next(&self, since: Timestamp) -> Option<Timestamp> {
        match self {
            Schedule::Cron(crontab) => {
                let next = crontab.find_next(cronexpr::MakeTimestamp(since)).ok()?;
                Some(next.timestamp())
            }
            Schedule::Every(interval) => {
                let whole = Timestamp::from_second(since.as_second()).ok()?;
                whole.checked_add(*interval).ok()
            }
        }
    }

    /// The times in (`since`, `now`], of which only the last one counts.
    pub fn missed(&self, since: Timestamp, now: Timestamp) -> Option<Missed> {
        let first = self.next(since).filter(|first| *first <= now)?;
        let mut latest = first;
        let mut count = 1;
        while let Some(next) = self.next(latest).filter(|next| *next <= now) {
            latest = next;
            count += 1;
            if count > MISSED_MAX {
                return Some(Missed {
                    latest: self.last_before(latest, now),
                    too_many: true,
                });
            }
        }
        Some(Missed {
            latest,
            too_many: false,
        })
    }

    /// The last time up to `now`, looked for backwards in growing steps: a schedule of minutes that rested for a year has
    /// half a million of them. `known` is one of them.
    fn last_before(&self, known: Timestamp, now: Timestamp) -> Timestamp {
        if let Schedule::Every(interval) = self {
            let seconds = interval.as_secs();
            let passed = (now.as_second() - known.as_second()) / seconds * seconds;
            return known
                .checked_add(SignedDuration::from_secs(passed))
                .unwrap_or(known);
        }
        let mut window = SignedDuration::from_secs(60);
        loop {
            let start = now.checked_sub(window).unwrap_or(known).max(known);
            if let Some(first) = self.next(start).filter(|first| *first <= now) {
                let mut latest = first;
                while let Some(next) = self.next(latest).filter(|next| *next <= now) {
                    latest = next;
                }
                return latest;
            }
            if start <= known {
                return known;
            }
            window = window.checked_mul(2).unwrap_or(SignedDuration::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn schedules_give_their_next_time() {
        for (schedule, zone, since, next) in [
            (
                "*/5 * * * *",
                None,
                "2026-01-01T00:00:00Z",
                "2026-01-01T00:05:00Z",
            ),
            (
                "*/5 * * * *",
                None,
                "2026-01-01T00:03:20Z",
                "2026-01-01T00:05:00Z",
            ),
            (
                "@hourly",
                None,
                "2026-01-01T00:03:20Z",
                "2026-01-01T01:00:00Z",
            ),
            (
                "0 9 * * MON",
                None,
                "2026-01-01T00:00:00Z",
                "2026-01-05T09:00:00Z",
            ),
            (
                "0 0 ? * 0",
                None,
                "2026-01-01T00:00:00Z",
                "2026-01-04T00:00:00Z",
            ),
            // Either of the two days, when both are given.
            (
                "0 0 13 * 5",
                None,
                "2026-01-01T00:00:00Z",
                "2026-01-02T00:00:00Z",
            ),
            (
                "0 9 * * *",
                Some("Europe/Vienna"),
                "2026-01-01T00:00:00Z",
                "2026-01-01T08:00:00Z",
            ),
            (
                "0 9 * * *",
                Some("Europe/Vienna"),
                "2026-07-01T00:00:00Z",
                "2026-07-01T07:00:00Z",
            ),
            (
                "@every 90s",
                None,
                "2026-01-01T00:00:00Z",
                "2026-01-01T00:01:30Z",
            ),
        ] {
            let parsed = Schedule::parse(schedule, zone).unwrap();
            assert_eq!(
                parsed.next(at(since)),
                Some(at(next)),
                "{schedule} {zone:?}"
            );
        }
    }

    #[test]
    fn what_is_no_schedule_is_refused_with_a_reason() {
        for (schedule, zone, part) in [
            ("", None, "expected exactly 5 fields, found 0"),
            ("* * * *", None, "expected exactly 5 fields, found 4"),
            ("61 * * * *", None, "unparseable schedule"),
            ("@sometimes", None, "expected exactly 5 fields"),
            ("@every soon", None, "unparseable schedule"),
            ("* * * * *", Some("Mars/Olympus"), "unknown time zone"),
        ] {
            let error = Schedule::parse(schedule, zone).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn of_many_missed_times_the_last_one_is_found() {
        let minutes = Schedule::parse("* * * * *", None).unwrap();
        let (since, now) = (at("2025-01-01T00:00:00Z"), at("2026-01-01T00:00:30Z"));
        assert_eq!(
            minutes.missed(since, now),
            Some(Missed {
                latest: at("2026-01-01T00:00:00Z"),
                too_many: true
            })
        );
        assert_eq!(minutes.missed(now, at("2026-01-01T00:00:59Z")), None);
        assert_eq!(
            minutes.missed(now, at("2026-01-01T00:03:00Z")),
            Some(Missed {
                latest: at("2026-01-01T00:03:00Z"),
                too_many: false
            })
        );
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "[-*/@?,0-9A-Za-z ]{0,30}") {
            let _ = Schedule::parse(&text, None);
        }
    }
}
