//! What was measured, and what follows from it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Churn;
use super::api::Cluster;
use super::process::Cost;
use crate::report::{Better, Figure, Growth, Held, Report};
use crate::stats::{Spread, growth};

const KEELWAY: &str = "keelway";
const PROCESS: &str = "memory and CPU time";
const TIME: &str = "from the cluster to the maps";
const CHURN: &str = "250 changes per second";

/// A quantity of a subject at a size.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Case {
    section: &'static str,
    services: usize,
    endpoints: usize,
    what: &'static str,
    subject: String,
    quantity: &'static str,
    unit: &'static str,
}

/// Every measurement of a run.
#[derive(Debug, Default)]
pub struct Findings(BTreeMap<Case, Vec<f64>>);

impl Findings {
    fn push(
        &mut self,
        (section, what, quantity, unit): (&'static str, &'static str, &'static str, &'static str),
        cluster: Cluster,
        subject: &str,
        values: impl IntoIterator<Item = f64>,
    ) {
        let case = Case {
            section,
            services: cluster.services,
            endpoints: cluster.endpoints,
            what,
            subject: subject.into(),
            quantity,
            unit,
        };
        self.0.entry(case).or_default().extend(values);
    }

    pub fn cold_start(
        &mut self,
        cluster: Cluster,
        subject: &str,
        took: Duration,
        cost: Cost,
        map_bytes: f64,
    ) {
        let time = (TIME, "cold start", "p50", "s");
        self.push(time, cluster, subject, [took.as_secs_f64()]);
        let mut process = |what, unit, value| {
            self.push((PROCESS, what, "value", unit), cluster, subject, [value]);
        };
        process("peak memory", "B", cost.peak_bytes);
        process("memory after", "B", cost.resident_bytes);
        process("CPU time of the start", "s", cost.cpu_seconds);
        if map_bytes > 0.0 {
            process("maps in the kernel", "B", map_bytes);
        }
    }

    /// A round of changes; `own` is the part from the arrival at the subject on, the mean.
    pub fn changes(&mut self, cluster: Cluster, subject: &str, took: &[f64], own: Option<f64>) {
        let mut sorted = took.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = (sorted.len() as f64 * share).ceil() as usize;
            sorted.get(place.saturating_sub(1)).copied()
        };
        let what = "one change";
        self.push((TIME, what, "p50", "s"), cluster, subject, at(0.5));
        self.push((TIME, what, "p99", "s"), cluster, subject, at(0.99));
        let what = "one change, from its arrival";
        self.push((TIME, what, "p50", "s"), cluster, subject, own);
    }

    pub fn restart(&mut self, cluster: Cluster, subject: &str, took: Duration) {
        let what = (TIME, "restart over full maps", "p50", "s");
        self.push(what, cluster, subject, [took.as_secs_f64()]);
    }

    pub fn outage(&mut self, cluster: Cluster, subject: &str, took: f64) {
        let what = (
            TIME,
            "first change after the API server's return",
            "p50",
            "s",
        );
        self.push(what, cluster, subject, [took]);
    }

    pub(super) fn churn(&mut self, cluster: Cluster, subject: &str, churn: &Churn) {
        for (what, unit, value) in [
            ("changes made", "/s", churn.per_second),
            ("share of a core", "", churn.core),
            ("memory grown", "B", churn.grown_bytes),
            ("a change, from its arrival", "s", churn.latency),
            ("a change right after", "s", churn.behind),
        ] {
            self.push((CHURN, what, "value", unit), cluster, subject, [value]);
        }
    }

    /// Adds everything to a report.
    pub fn fill(&self, report: &mut Report) {
        for (case, rounds) in &self.0 {
            let labels = [
                ("services", case.services.to_string()),
                ("endpoints", case.endpoints.to_string()),
                ("what", case.what.to_owned()),
                ("subject", case.subject.clone()),
            ];
            let better = if case.unit == "/s" {
                Better::Higher
            } else {
                Better::Lower
            };
            let figure = Figure::new(
                case.section,
                &labels,
                (case.quantity, case.unit, better),
                rounds.clone(),
            );
            let ours = Case {
                subject: KEELWAY.into(),
                ..case.clone()
            };
            report.figures.extend(figure.map(|figure| {
                match self.0.get(&ours).filter(|_| case.subject != KEELWAY) {
                    Some(ours) => figure.beside(KEELWAY, ours),
                    None => figure,
                }
            }));
        }
        report.figures.extend(self.memory_per_object());
        report.growth = self.growth();
        report.held = self.held();
    }

    fn spread(&self, services: usize, what: &str, quantity: &str) -> Option<Spread> {
        let mut ours = self.0.iter().filter(|(case, _)| {
            let is_it = case.services == services && case.what == what;
            is_it && case.subject == KEELWAY && case.quantity == quantity
        });
        ours.next()
            .and_then(|(_, rounds)| Spread::of(rounds.iter().copied()))
    }

    fn sizes(&self) -> Vec<(usize, usize)> {
        let mut sizes: Vec<_> = self
            .0
            .keys()
            .map(|case| (case.services, case.endpoints))
            .collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    /// Those whose Services are of the usual size, so that what they take can be compared.
    fn alike(&self) -> Vec<(usize, usize)> {
        let mut sizes = self.sizes();
        sizes.retain(|(services, endpoints)| !is_of_many(*services, *endpoints));
        sizes
    }

    /// What a Service with its endpoints takes, from the difference between the smallest cluster and each other.
    fn memory_per_object(&self) -> Vec<Figure> {
        let sizes = self.alike();
        let Some((&(small, _), rest)) = sizes.split_first() else {
            return Vec::new();
        };
        let memory = |services| self.spread(services, "memory after", "value");
        rest.iter()
            .filter_map(|&(services, endpoints)| {
                let grown = memory(services)?.median - memory(small)?.median;
                let labels = [
                    ("services", services.to_string()),
                    ("endpoints", endpoints.to_string()),
                    (
                        "what",
                        format!("a Service with {} endpoints", endpoints / services),
                    ),
                    ("subject", KEELWAY.to_owned()),
                ];
                let each = grown / (services - small) as f64;
                let kind = ("value", "B", Better::Lower);
                Figure::new(PROCESS, &labels, kind, vec![each])
            })
            .collect()
    }

    fn growth(&self) -> Vec<Growth> {
        let sizes = self.alike();
        [
            ("cold start", "p50"),
            ("one change", "p50"),
            ("memory after", "value"),
        ]
        .into_iter()
        .filter_map(|(what, quantity)| {
            let points: Vec<(f64, f64)> = sizes
                .iter()
                .filter_map(|(services, _)| {
                    let spread = self.spread(*services, what, quantity)?;
                    Some((*services as f64, spread.median))
                })
                .collect();
            Some(Growth {
                of: what.into(),
                exponent: growth(&points)?,
            })
        })
        .collect()
    }

    fn held(&self) -> Vec<Held> {
        let mut held = Vec::new();
        for (services, endpoints) in self.sizes() {
            let mut below = |what, quantity, name: &str, limit, unit: &str, factor: f64| {
                if let Some(spread) = self.spread(services, what, quantity) {
                    let scaled = Spread {
                        median: spread.median * factor,
                        low: spread.low * factor,
                        high: spread.high * factor,
                    };
                    let name = match is_of_many(services, endpoints) {
                        true => format!("sync.{name}.service-of-{endpoints}"),
                        false => format!("sync.{name}.{services}-services"),
                    };
                    held.push(Held::below(name, limit, unit, scaled));
                }
            };
            below("one change", "p50", "one-change", 5.0, "ms", 1e3);
            below("one change", "p99", "one-change.p99", 20.0, "ms", 1e3);
            match services {
                10_000 => {
                    below("cold start", "p50", "cold-start", 0.5, "s", 1.0);
                    below("peak memory", "value", "memory", 100.0, "MB", 1e-6);
                    below("share of a core", "value", "churn.core", 0.1, "", 1.0);
                    // Flat: allocators keep a little of what came and went.
                    below("memory grown", "value", "churn.memory", 5.0, "MB", 1e-6);
                }
                44_000 => {
                    below("cold start", "p50", "cold-start", 2.0, "s", 1.0);
                    below("peak memory", "value", "memory", 500.0, "MB", 1e-6);
                }
                _ => {}
            }
        }
        held
    }
}

/// Whether a cluster is about Services with very many endpoints.
fn is_of_many(services: usize, endpoints: usize) -> bool {
    endpoints > 100 * services
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;

    #[test]
    fn targets_and_memory_per_service_follow_from_what_was_measured() {
        let mut findings = Findings::default();
        for (services, start_ms, bytes) in [(10, 20, 20e6), (10_000, 600, 60e6)] {
            let cluster = Cluster {
                services,
                endpoints: 5 * services,
            };
            let cost = Cost {
                resident_bytes: bytes,
                peak_bytes: bytes,
                cpu_seconds: 0.1,
            };
            let took = Duration::from_millis(start_ms);
            findings.cold_start(cluster, KEELWAY, took, cost, 0.0);
            findings.changes(cluster, KEELWAY, &[0.001, 0.002, 0.003], Some(0.0001));
        }
        let mut report = Report::new("sync", Machine::of_nobody());
        findings.fill(&mut report);
        let verdicts: Vec<(&str, bool)> = report
            .held
            .iter()
            .map(|held| (held.name.as_str(), held.ok))
            .collect();
        assert_eq!(
            verdicts,
            [
                ("sync.one-change.10-services", true),
                ("sync.one-change.p99.10-services", true),
                ("sync.one-change.10000-services", true),
                ("sync.one-change.p99.10000-services", true),
                ("sync.cold-start.10000-services", false),
                ("sync.memory.10000-services", true),
            ]
        );
        let each = report
            .figures
            .iter()
            .find(|figure| figure.label("what") == Some("a Service with 5 endpoints"));
        let each = each.expect("it is told").spread.median;
        assert!((each - 40e6 / 9990.0).abs() < 1.0, "{each}");
    }
}
