//! Many changes per second, for a while.

use std::cell::Cell;
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;

use super::api::{ApiServer, Cluster, Writer};
use super::map::ServiceWord;
use super::node::Subject;
use super::process::{self, Cost};
use super::{Bench, change};

/// Changes per second of the churn: those of a cluster with 10,000 Services in a bad hour.
const CHURN_PER_SECOND: u32 = 250;

/// Services of the cluster that is changed for minutes.
pub const CHURNED: usize = 10_000;
/// A churn is looked at so many times, at equal distances.
const CHURN_WINDOWS: u32 = 10;

impl Bench {
    /// Many changes per second, for a while: what of a CPU they cost, and whether memory grows.
    pub(super) fn churn(
        &mut self,
        subject: &Subject,
        server: &ApiServer,
        cluster: Cluster,
        name: &str,
    ) -> Result<()> {
        let duration = match cluster.services {
            CHURNED => self.extent.long_churn,
            _ => self.extent.churn,
        };
        let index = cluster.services / 2;
        let worker = subject.worker()?;
        let (counted, failed) = (subject.programming()?, subject.failed_batches()?);
        let moments = server.with_writer(cluster, async move |writer| {
            let made = Cell::new(0);
            let mut moments = vec![Moment::now(worker, 0)?];
            let mut churn = pin!(writer.churn(CHURN_PER_SECOND, duration, index, || {
                made.set(made.get() + 1);
            }));
            let window = duration / CHURN_WINDOWS;
            let first = tokio::time::Instant::now() + window;
            let mut pace = tokio::time::interval_at(first, window);
            loop {
                tokio::select! {
                    biased;
                    _ = pace.tick() => moments.push(Moment::now(worker, made.get())?),
                    ended = &mut churn => break ended?,
                }
            }
            Ok(moments)
        })?;
        let behind = match cluster.services {
            // What is seen could be any of the changes before it.
            1 => None,
            _ => {
                let word = Arc::new(ServiceWord::of(subject.pin_root(), index)?);
                let behind =
                    async move |writer: Writer| change(&writer, &word, index, 900_000).await;
                Some(server.with_writer(cluster, behind)?)
            }
        };
        let programmed = subject.programming()?;
        let churn = Churn {
            latency: (programmed.0 - counted.0) / (programmed.1 - counted.1).max(1.0),
            behind,
            failed: subject.failed_batches()? - failed,
            ..Churn::of(&moments)
        };
        self.findings.churn(cluster, name, &churn);
        Ok(())
    }
}

/// A subject during a churn.
#[derive(Clone, Copy)]
struct Moment {
    at: Instant,
    /// Changes that were made until then.
    made: u32,
    cost: Cost,
}

impl Moment {
    fn now(worker: u32, made: u32) -> Result<Self> {
        Ok(Self {
            at: Instant::now(),
            made,
            cost: process::cost(worker)?,
        })
    }
}

/// What a churn cost.
#[derive(Debug, Default)]
pub struct Churn {
    /// Of each part of it: changes per second, and share of one core.
    pub per_second: Vec<f64>,
    pub core: Vec<f64>,
    /// What the process had grown by, at each of the moments of the second half: what came with the first changes to stay is in all of
    /// them, and what leaks makes them rise.
    pub grown_bytes: Vec<f64>,
    /// Seconds from the arrival of a change to the maps, the mean.
    pub latency: f64,
    /// Seconds that a change took right after it.
    pub behind: Option<f64>,
    /// Batches that failed meanwhile.
    pub failed: f64,
}

impl Churn {
    fn of(moments: &[Moment]) -> Self {
        let mut churn = Self::default();
        for (before, after) in moments.iter().zip(moments.iter().skip(1)) {
            let took = (after.at - before.at).as_secs_f64();
            let spent = after.cost.cpu_seconds - before.cost.cpu_seconds;
            churn
                .per_second
                .push(f64::from(after.made - before.made) / took);
            churn.core.push(spent / took);
        }
        if let Some((first, later)) = moments.split_first() {
            let grown = |moment: &Moment| moment.cost.resident_bytes - first.cost.resident_bytes;
            churn.grown_bytes = later[later.len() / 2..].iter().map(grown).collect();
        }
        churn
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_leak_is_seen_and_what_the_first_changes_leave_is_no_leak() {
        let begun = Instant::now();
        let moments = |resident: fn(u32) -> f64| -> Vec<Moment> {
            let moment = |second: u32| Moment {
                at: begun + Duration::from_secs(second.into()),
                made: 250 * second,
                cost: Cost {
                    resident_bytes: resident(second),
                    peak_bytes: 0.0,
                    cpu_seconds: 0.05 * f64::from(second),
                },
            };
            (0..=10).map(moment).collect()
        };
        let flat = Churn::of(&moments(|second| 5e7 + 1e6 * f64::from(second.min(1))));
        assert_eq!(flat.per_second, [250.0; 10]);
        assert!(flat.core.iter().all(|core| (core - 0.05).abs() < 1e-9));
        assert_eq!(flat.grown_bytes, [1e6; 5]);
        let leak = Churn::of(&moments(|second| 5e7 + 1e6 * f64::from(second)));
        assert_eq!(leak.grown_bytes, [6e6, 7e6, 8e6, 9e6, 10e6]);
    }
}
