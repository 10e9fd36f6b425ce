//! What was measured, and what follows from it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::api::Cluster;
use super::churn::{CHURNED, Churn};
use super::node::KUBE_PROXIES;
use super::process::Cost;
use crate::report::{Better, Figure, Growth, Held, Report};
use crate::stats::{Spread, growth};

const KEELWAY: &str = "keelway";
const PROCESS: &str = "memory and CPU time";
const TIME: &str = "from the cluster to the maps";
const CHURN: &str = "250 changes per second";

/// Of 250 a second; a tick may be late.
const CHURN_RATE: f64 = 245.0;

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
        // Of one alone there is no other.
        let p99 = at(0.99).filter(|_| took.len() > 1);
        self.push((TIME, what, "p99", "s"), cluster, subject, p99);
        let what = "one change, from its arrival";
        self.push((TIME, what, "mean", "s"), cluster, subject, own);
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
        let mut push = |what, quantity, unit, values: &[f64]| {
            let what = (CHURN, what, quantity, unit);
            self.push(what, cluster, subject, values.iter().copied());
        };
        push("changes made", "value", "/s", &churn.per_second);
        push("share of a core", "value", "", &churn.core);
        push("memory grown", "value", "B", &churn.grown_bytes);
        push("batches that failed", "value", "", &[churn.failed]);
        push("a change, from its arrival", "mean", "s", &[churn.latency]);
        push(
            "a change right after",
            "value",
            "s",
            churn.behind.as_slice(),
        );
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
            let theirs = case.subject != KEELWAY;
            // The first of them that was measured.
            let to: &[&str] = if theirs { &[KEELWAY] } else { &KUBE_PROXIES };
            // Subjects follow each other, so no round of one is beside a round of another.
            let other = to.iter().find_map(|subject| {
                let case = Case {
                    subject: (*subject).into(),
                    ..case.clone()
                };
                Some((subject, self.0.get(&case)?))
            });
            report.figures.extend(figure.map(|figure| {
                let figure = figure.of_others(theirs);
                match other {
                    Some((to, rounds)) => figure.beside_median(to, rounds),
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
                    let name = match is_of_many(services, endpoints) {
                        true => format!("sync.{name}.service-of-{endpoints}"),
                        false => format!("sync.{name}.{services}-services"),
                    };
                    held.push(Held::below(name, limit, unit, spread.times(factor)));
                }
            };
            below("one change", "p50", "one-change", 5.0, "ms", 1e3);
            below("one change", "p99", "one-change.p99", 20.0, "ms", 1e3);
            let failed = "batches that failed";
            below(failed, "value", "churn.failed-batches", 1.0, "", 1.0);
            match services {
                CHURNED => {
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
            // Else what it cost is the cost of less.
            let rate = self.spread(services, "changes made", "value");
            if let Some(rate) = rate.filter(|_| services == CHURNED) {
                let name = format!("sync.churn.rate.{services}-services");
                held.push(Held::at_least(name, CHURN_RATE, rate));
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
    use crate::compare::Comparison;
    use crate::machine::Machine;

    const SMALL: Cluster = Cluster {
        services: 10,
        endpoints: 50,
    };

    /// A run whose agent needs so much longer for what it does, beside kube-proxy or alone.
    fn run(delay_s: f64, beside: Option<f64>) -> Report {
        let mut findings = Findings::default();
        for disturbance in [1.0, 1.2, 0.9] {
            let mut push = |subject: &str, change_s: f64| {
                let changes = [change_s * disturbance; 20];
                findings.changes(SMALL, subject, &changes, None);
                let took = Duration::from_secs_f64(disturbance * (0.4 + change_s));
                findings.cold_start(SMALL, subject, took, Cost::default(), 0.0);
            };
            push(KEELWAY, 0.001 + delay_s);
            if let Some(theirs_s) = beside {
                push(KUBE_PROXIES[0], theirs_s);
            }
        }
        let mut report = Report::new("sync", Machine::of_nobody());
        findings.fill(&mut report);
        report
    }

    fn compared(old: &Report, new: &Report) -> (bool, Vec<String>) {
        let comparison = Comparison::of(old, new, 0.05, false);
        let complaints = comparison.complaints().into_iter().map(str::to_owned);
        (comparison.holds(), complaints.collect())
    }

    #[test]
    fn a_sleep_in_the_loop_is_seen_by_compare_with_and_without_others() {
        let slower = |beside: &str| {
            let time = format!("{TIME}/10/50");
            vec![
                format!("{time}/one change/keelway/p50{beside}"),
                format!("{time}/one change/keelway/p99{beside}"),
                format!("{time}/cold start/keelway/p50{beside}"),
            ]
        };
        let alone = compared(&run(0.0, None), &run(1.0, None));
        assert_eq!(alone, (false, slower(" (s)")));
        assert!(compared(&run(0.0, None), &run(0.0, None)).0);
        let beside = compared(&run(0.0, Some(1.0)), &run(1.0, Some(1.0)));
        assert_eq!(beside, (false, slower(", beside kube-proxy-nftables")));
        // Who is faster, alone or because the others are not what they were, is no worse.
        for faster in [run(-0.0005, Some(1.0)), run(0.0, Some(2.0))] {
            let judged = compared(&run(0.0, Some(1.0)), &faster);
            assert_eq!(judged, (true, Vec::new()));
        }
        // Of another machine nothing can be said without others.
        let mut elsewhere = run(0.0, None);
        elsewhere.machine.cpus = 64;
        assert_eq!(compared(&run(0.0, None), &elsewhere), (false, Vec::new()));
    }

    #[test]
    fn a_churn_that_was_not_made_or_failed_is_a_miss() {
        let held = |churn: &Churn| -> Vec<(String, bool)> {
            let cluster = Cluster {
                services: CHURNED,
                endpoints: 5 * CHURNED,
            };
            let mut findings = Findings::default();
            findings.churn(cluster, KEELWAY, churn);
            let held = findings.held().into_iter();
            held.map(|held| (held.name, held.ok)).collect()
        };
        let named = |oks: [bool; 4]| {
            let names = [
                "churn.failed-batches",
                "churn.core",
                "churn.memory",
                "churn.rate",
            ];
            let named = names.iter().zip(oks);
            named
                .map(|(name, ok)| (format!("sync.{name}.10000-services"), ok))
                .collect::<Vec<_>>()
        };
        let fine = || Churn {
            per_second: vec![250.0, 249.0, 251.0],
            core: vec![0.05; 3],
            grown_bytes: vec![-1e6, 0.0, 1e6],
            latency: 0.001,
            behind: Some(0.002),
            failed: 0.0,
        };
        assert_eq!(held(&fine()), named([true; 4]));
        let slow = Churn {
            per_second: vec![100.0; 3],
            ..fine()
        };
        assert_eq!(held(&slow), named([true, true, true, false]));
        let failed = Churn {
            failed: 1.0,
            ..fine()
        };
        assert_eq!(held(&failed), named([false, true, true, true]));
        let leaking = Churn {
            grown_bytes: vec![6e6, 8e6, 10e6],
            ..fine()
        };
        assert_eq!(held(&leaking), named([true, true, false, true]));
    }

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
