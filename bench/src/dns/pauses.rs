//! When a CPU does not run whoever has it to itself: its interrupts, the kernel's own threads, and a hypervisor that runs others. No server
//! answers meanwhile, and none catches up at once.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::load::{SLICE, middle};
use super::pin;

/// Shorter ones are the look at the clock itself.
const SHORTEST: Duration = Duration::from_micros(2);
/// So long, a pause is longer than what most answers take.
const LONG: Duration = Duration::from_micros(20);

/// The pauses of a while: when they began, counted from its beginning, and how long they were.
#[derive(Debug)]
pub struct Pauses {
    all: Vec<(Duration, Duration)>,
    during: Duration,
}

impl Pauses {
    /// Those of a CPU, seen by a thread that does nothing but look at the clock, while the calling thread's CPU is as busy.
    pub fn watch(cpu: usize, during: Duration) -> Result<Self> {
        let watching = thread::spawn(move || {
            pin(cpu)?;
            Ok(look(during))
        });
        look(during);
        let all: Result<_> = watching.join().ok().context("looking at the clock")?;
        Ok(Self { all: all?, during })
    }

    /// Those of 20 us and more.
    pub fn long_per_second(&self) -> f64 {
        let long = self.all.iter().filter(|(_, took)| *took >= LONG).count();
        long as f64 / self.during.as_secs_f64()
    }

    /// p99 to p50 within the middle slice of a load, for who loses nothing but these pauses: `service` is what an answer keeps it busy for,
    /// questions come evenly and keep it busy for `load` of the time, and an answer without a pause takes `p50`.
    pub fn p99_to_p50(&self, service: Duration, load: f64, p50: Duration) -> Option<f64> {
        let nanos = |duration: Duration| duration.as_nanos() as f64;
        let (service, p50, slice) = (nanos(service), nanos(p50), nanos(SLICE));
        let pauses = || self.all.iter().map(|&(at, took)| (nanos(at), nanos(took)));
        let mut pauses = pauses().peekable();
        let (mut free, mut ratios) = (0.0_f64, Vec::new());
        let mut due = 0.0;
        while due + slice <= nanos(self.during) {
            let mut took = Vec::new();
            let end = due + slice;
            while due < end {
                let begun = free.max(due);
                free = begun + service;
                while let Some((at, lasts)) =
                    pauses.next_if(|(at, lasts)| at + lasts <= begun || *at < free)
                {
                    free += (at + lasts - at.max(begun)).max(0.0);
                }
                took.push(p50 + free - due - service);
                due += service / load;
            }
            took.sort_by(f64::total_cmp);
            ratios.push(took[took.len() * 99 / 100] / took[took.len() / 2]);
        }
        middle(ratios)
    }
}

fn look(during: Duration) -> Vec<(Duration, Duration)> {
    let mut pauses = Vec::new();
    let begun = Instant::now();
    let mut last = begun;
    while last - begun < during {
        let now = Instant::now();
        if now - last >= SHORTEST {
            pauses.push((last - begun, now - last));
        }
        last = now;
    }
    pauses
}

#[cfg(test)]
mod tests {
    use super::*;

    const MICRO: Duration = Duration::from_micros(1);

    fn ratio(all: Vec<(Duration, Duration)>) -> f64 {
        let pauses = Pauses {
            all,
            during: 4 * SLICE,
        };
        let ratio = pauses.p99_to_p50(2 * MICRO, 0.7, 20 * MICRO);
        ratio.expect("four slices")
    }

    #[test]
    fn who_is_never_paused_answers_all_alike() {
        assert_eq!(ratio(Vec::new()), 1.0);
    }

    #[test]
    fn a_pause_is_in_what_it_delays_until_that_is_made_up_for() {
        // One of a millisecond in each slice: at 70 %, all of 3.3 ms are late, by from nothing to the whole of it, so that a hundredth of
        // the slice's 50 ms is later than 0.85 ms.
        let long = (0..4).map(|i| (i * SLICE + 10_000 * MICRO, 1000 * MICRO));
        let with_long = ratio(long.collect());
        assert!((42.0..45.0).contains(&with_long), "{with_long}");
        // Short ones whose answers are fewer than a hundredth are not in it.
        let short = (0..4).map(|i| (i * SLICE + 10_000 * MICRO, 100 * MICRO));
        assert_eq!(ratio(short.collect()), 1.0);
    }

    #[test]
    fn a_pause_while_nothing_was_asked_delays_nothing() {
        let idle = (0..60_000).map(|i| (i * 3 * MICRO, Duration::from_nanos(1)));
        assert!(ratio(idle.collect()) < 1.01);
    }
}
