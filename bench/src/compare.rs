//! `keelway-bench compare OLD NEW`: what became slower, and what only seems so.
//!
//! A figure has changed when the 95 % intervals of both runs have no value in common and the medians differ by more than the
//! threshold. When only one of the two holds, the run says that it cannot tell, or that it does not matter. Ratios that a run took
//! within itself are compared on any machine; absolute figures only on machines of one kind, and as a hint: between two runs a
//! shared machine changes more than a code change does.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};

use crate::report::{Better, Figure, Report};
use crate::stats::Spread;

#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Report of the run to compare with, as `--out` wrote it.
    old: PathBuf,
    /// Report of the run to judge.
    new: PathBuf,
    /// Change of a median, in percent, that matters.
    #[arg(long, default_value_t = 5.0, value_parser = percent)]
    threshold: f64,
    /// Let absolute figures decide too, not only ratios.
    #[arg(long)]
    absolute: bool,
    /// Show what has not changed, too.
    #[arg(long)]
    all: bool,
}

fn percent(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(percent) if (0.1..=1000.0).contains(&percent) => Ok(percent),
        _ => Err("a percentage between 0.1 and 1000".into()),
    }
}

/// What became of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Worse,
    /// More than the threshold apart, by rounds that are too.
    Unclear,
    Better,
    Same,
}

#[derive(Debug)]
struct Change {
    name: String,
    /// Whether it decides on the outcome.
    counts: bool,
    verdict: Verdict,
    /// New beside old; above 1 it is better.
    factor: f64,
    old: Spread,
    new: Spread,
}

/// Compares and prints. Regressions end with exit code 1.
pub fn run(flags: &Flags) -> Result<ExitCode> {
    let (old, new) = (Report::read(&flags.old)?, Report::read(&flags.new)?);
    ensure!(
        old.bench == new.bench,
        "{} is a report of `{}`, {} of `{}`",
        flags.old.display(),
        old.bench,
        flags.new.display(),
        new.bench
    );
    let comparison = Comparison::of(&old, &new, flags.threshold / 100.0, flags.absolute);
    print!("{}", comparison.shown(flags.all));
    Ok(if comparison.regressions().count() == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// All changes between two reports.
#[derive(Debug)]
pub struct Comparison {
    changes: Vec<Change>,
    /// Figures that one of both lacks.
    missing: Vec<String>,
    same_machine: bool,
}

impl Comparison {
    pub fn of(old: &Report, new: &Report, threshold: f64, absolute: bool) -> Self {
        let same_machine = old.machine.is_like(&new.machine);
        let before: BTreeMap<String, &Figure> = old
            .figures
            .iter()
            .map(|figure| (figure.name(), figure))
            .collect();
        let after: Vec<String> = new.figures.iter().map(Figure::name).collect();
        let mut changes = Vec::new();
        for (figure, name) in new.figures.iter().zip(&after) {
            let Some(earlier) = before.get(name) else {
                continue;
            };
            let ratios = earlier.relative.as_ref().zip(figure.relative.as_ref());
            if let Some((before, now)) = ratios.filter(|(before, now)| before.to == now.to) {
                let name = format!("{name}, beside {}", now.to);
                let (old, new) = (before.spread, now.spread);
                changes.push(Change::of(name, true, Better::Higher, threshold, old, new));
            }
            if same_machine {
                let name = format!("{name} ({})", figure.unit);
                let (old, new) = (earlier.spread, figure.spread);
                let change = Change::of(name, absolute, figure.better, threshold, old, new);
                changes.push(change);
            }
        }
        // What decides comes first, the worst of it at the top.
        changes.sort_by(|a: &Change, b: &Change| {
            let rank = |change: &Change| (!change.counts, change.verdict);
            rank(a).cmp(&rank(b)).then(a.factor.total_cmp(&b.factor))
        });
        let missing = before
            .into_keys()
            .filter(|name| !after.contains(name))
            .collect();
        Self {
            changes,
            missing,
            same_machine,
        }
    }

    fn regressions(&self) -> impl Iterator<Item = &Change> {
        self.changes
            .iter()
            .filter(|change| change.counts && change.verdict == Verdict::Worse)
    }

    fn shown(&self, all: bool) -> Shown<'_> {
        Shown {
            comparison: self,
            all,
        }
    }
}

impl Change {
    fn of(
        name: String,
        counts: bool,
        better: Better,
        threshold: f64,
        old: Spread,
        new: Spread,
    ) -> Self {
        let factor = match better {
            Better::Higher => new.median / old.median,
            Better::Lower => old.median / new.median,
        };
        let matters = factor < 1.0 - threshold || factor > 1.0 / (1.0 - threshold);
        let verdict = match (matters, old.overlaps(&new)) {
            (true, false) if factor < 1.0 => Verdict::Worse,
            (true, false) => Verdict::Better,
            (true, true) => Verdict::Unclear,
            (false, _) => Verdict::Same,
        };
        Self {
            name,
            counts,
            verdict,
            factor,
            old,
            new,
        }
    }
}

struct Shown<'a> {
    comparison: &'a Comparison,
    all: bool,
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Comparison {
            changes,
            missing,
            same_machine,
        } = self.comparison;
        if !same_machine {
            writeln!(
                f,
                "The machines differ: only ratios taken within each run are compared."
            )?;
        }
        for change in changes {
            let word = match (change.verdict, change.counts) {
                (Verdict::Same, _) if !self.all => continue,
                (Verdict::Worse, true) => "WORSE",
                (Verdict::Worse, false) => "worse?",
                (Verdict::Better, true) => "better",
                (Verdict::Better, false) => "better?",
                (Verdict::Unclear, _) => "unclear",
                (Verdict::Same, _) => "same",
            };
            writeln!(
                f,
                "{word:<8} x{:.3}  {:.3} [{:.3}, {:.3}] -> {:.3} [{:.3}, {:.3}]  {}",
                change.factor,
                change.old.median,
                change.old.low,
                change.old.high,
                change.new.median,
                change.new.low,
                change.new.high,
                change.name
            )?;
        }
        for name in missing {
            writeln!(f, "gone     {name}")?;
        }
        let count = |verdict| {
            let mut all = 0;
            for change in changes {
                all += usize::from(change.counts && change.verdict == verdict);
            }
            all
        };
        writeln!(
            f,
            "{} worse, {} better, {} unclear, {} the same; {} figures that do not decide",
            count(Verdict::Worse),
            count(Verdict::Better),
            count(Verdict::Unclear),
            count(Verdict::Same),
            changes.iter().filter(|change| !change.counts).count()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};
    use std::time::Duration;

    use super::*;
    use crate::load::{Metric, Order, bind, run};
    use crate::machine::Machine;

    fn machine(cpus: usize) -> Machine {
        Machine {
            kernel: "6.1".into(),
            cpu: "x".into(),
            cpus,
            memory_mb: 1000,
            is_virtual: false,
            load_before: 0.0,
        }
    }

    fn report(machine: Machine, rounds: Vec<f64>, direct: &[f64]) -> Report {
        let mut report = Report::new("service", machine);
        let labels = [("path", "socket".to_owned())];
        let figure = Figure::new("traffic", &labels, ("p50", "us", Better::Lower), rounds);
        report
            .figures
            .extend(figure.map(|figure| figure.beside("direct", direct)));
        report
    }

    fn verdicts(old: &Report, new: &Report) -> Vec<(bool, Verdict)> {
        Comparison::of(old, new, 0.05, false)
            .changes
            .iter()
            .map(|change| (change.counts, change.verdict))
            .collect()
    }

    #[test]
    fn noise_is_no_regression_and_a_busy_machine_is_none_either() {
        let direct = [16.0, 15.0, 17.0, 16.0, 16.5];
        let old = report(machine(2), direct.to_vec(), &direct);
        // Twice as slow, and so is the direct path of each round.
        let busy: Vec<f64> = direct.iter().map(|us| us * 2.0).collect();
        let new = report(machine(2), busy.clone(), &busy);
        assert_eq!(
            verdicts(&old, &new),
            [(true, Verdict::Same), (false, Verdict::Worse)]
        );
        // Of another machine, only ratios are comparable.
        let other = report(machine(8), busy.clone(), &busy);
        assert_eq!(verdicts(&old, &other), [(true, Verdict::Same)]);
        // Slower by the median, within what the rounds differ by.
        let wide = report(machine(8), vec![14.0, 30.0, 19.0, 18.0, 19.0], &direct);
        assert_eq!(verdicts(&old, &wide), [(true, Verdict::Unclear)]);
    }

    /// Rounds of real load on two servers, the second of which spends more on each answer.
    fn measured(handicap: Duration) -> Report {
        let [plain, handicapped] = [Duration::ZERO, handicap].map(|handicap| {
            let [round_trips, ..] = bind(|_free| 0, handicap).expect("free ports");
            round_trips
        });
        let p50 = |port: u16| {
            let order = Order {
                metric: Metric::RoundTrip,
                target: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
                duration: Duration::from_millis(100),
                cpu: 0,
                rate: None,
            };
            run(&order).expect("loopback works").p50_us
        };
        let (mut rounds, mut direct) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            rounds.push(p50(handicapped));
            direct.push(p50(plain));
        }
        report(machine(2), rounds, &direct)
    }

    #[test]
    fn a_deliberate_slowdown_is_caught() {
        let old = measured(Duration::ZERO);
        // More than what a busy machine makes a round trip wait.
        let slow = measured(Duration::from_millis(20));
        let comparison = Comparison::of(&old, &slow, 0.05, false);
        assert_eq!(
            comparison.regressions().count(),
            1,
            "{}",
            comparison.shown(true)
        );
        let shown = comparison.shown(false).to_string();
        assert!(shown.starts_with("WORSE"), "{shown}");
    }
}
