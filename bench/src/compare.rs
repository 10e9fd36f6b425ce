//! `keelway-bench compare OLD NEW`: what became slower, and what only seems so.
//!
//! A figure has changed when the 95 % intervals of both runs have no value in common and the medians differ by more than the
//! threshold. When only one of the two holds, the run says that it cannot tell, or that it does not matter. Ratios that a run took
//! within itself are compared on any machine. Absolute figures are compared on machines of one kind only, and are a hint where there
//! is a ratio: between two runs a shared machine changes more than a code change does. Where nothing stands beside a case of ours,
//! they are all there is, and decide. Figures of those that we are compared with never do.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};

use crate::report::{Better, Figure, Relative, Report};
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
    /// Let absolute figures decide too where there are ratios.
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

/// Fewer rounds have no interval that is worth the name, and decide nothing.
const ROUNDS_MIN: usize = 3;

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
    is_absolute: bool,
    verdict: Verdict,
    /// New beside old; above 1 it is better. Values that are not above zero have none.
    factor: Option<f64>,
    old: Spread,
    new: Spread,
}

/// Compares and prints. Regressions end with exit code 1, and so does a comparison that says nothing.
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
    Ok(if comparison.holds() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// All changes between two reports.
#[derive(Debug)]
pub struct Comparison {
    changes: Vec<Change>,
    missing: Vec<Missing>,
    same_machine: bool,
}

/// A figure, or the ratio of one, that only the old report has.
#[derive(Debug)]
struct Missing {
    name: String,
    theirs: bool,
}

impl Comparison {
    pub fn of(old: &Report, new: &Report, threshold: f64, absolute: bool) -> Self {
        let same_machine = old.machine.is_like(&new.machine);
        let before: BTreeMap<String, &Figure> = old
            .figures
            .iter()
            .map(|figure| (figure.name(), figure))
            .collect();
        let pairs: Vec<Pair<'_>> = new
            .figures
            .iter()
            .filter_map(|now| {
                let before = before.get(&now.name())?;
                Some(Pair { before, now })
            })
            .collect();
        let beside_others: BTreeSet<String> = pairs
            .iter()
            .filter(|pair| pair.ratio_decides())
            .map(|pair| pair.now.case())
            .collect();
        let (mut changes, mut missing) = (Vec::new(), Vec::new());
        for pair in &pairs {
            let (before, now, name) = (pair.before, pair.now, pair.now.name());
            match (pair.ratios(), &before.relative) {
                (Some((before, now)), _) => changes.push(Change {
                    counts: pair.ratio_decides(),
                    ..Change::of(
                        format!("{name}, beside {}", now.to),
                        Better::Higher,
                        threshold,
                        before.spread,
                        now.spread,
                    )
                }),
                (None, Some(relative)) if !same_machine => missing.push(Missing {
                    name: format!("{name}, beside {}", relative.to),
                    theirs: pair.theirs(),
                }),
                (None, _) => {}
            }
            if same_machine {
                let alone = !beside_others.contains(&now.case());
                let name = format!("{name} ({})", now.unit);
                changes.push(Change {
                    counts: pair.is_sure() && (absolute || alone),
                    is_absolute: true,
                    ..Change::of(name, now.better, threshold, before.spread, now.spread)
                });
            }
        }
        // What decides comes first, the worst of it at the top.
        changes.sort_by(|a: &Change, b: &Change| {
            let rank = |change: &Change| (!change.counts, change.verdict);
            let factor = |change: &Change| change.factor.unwrap_or_default();
            rank(a).cmp(&rank(b)).then(factor(a).total_cmp(&factor(b)))
        });
        let after: BTreeSet<String> = new.figures.iter().map(Figure::name).collect();
        let gone = before.into_iter().filter(|(name, _)| !after.contains(name));
        missing.extend(gone.map(|(name, figure)| Missing {
            name,
            theirs: figure.theirs,
        }));
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

    /// Why this says less than it seems to.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let gone = self.missing.iter().filter(|missing| !missing.theirs);
        match gone.count() {
            0 => {}
            gone => faults.push(format!(
                "{gone} figures of ours are gone: what they would say is not known. Were both runs made with the same flags, on machines with the same tools?"
            )),
        }
        if !self.changes.iter().any(|change| change.counts) {
            faults.push(format!(
                "Nothing decides: no figure of ours is in both reports with {ROUNDS_MIN} rounds and a ratio to another of its run{}.",
                if self.same_machine { "" } else { ", and the machines differ" }
            ));
        }
        faults
    }

    /// Whether something was compared, nothing is gone, and nothing became worse.
    pub fn holds(&self) -> bool {
        self.regressions().count() == 0 && self.faults().is_empty()
    }

    /// What became worse, and which figures of ours are gone.
    #[cfg(test)]
    pub fn complaints(&self) -> Vec<&str> {
        let worse = self.regressions().map(|change| change.name.as_str());
        let gone = self.missing.iter().filter(|missing| !missing.theirs);
        worse
            .chain(gone.map(|missing| missing.name.as_str()))
            .collect()
    }

    fn shown(&self, all: bool) -> Shown<'_> {
        Shown {
            comparison: self,
            all,
        }
    }
}

/// One figure in both reports.
struct Pair<'a> {
    before: &'a Figure,
    now: &'a Figure,
}

impl<'a> Pair<'a> {
    fn theirs(&self) -> bool {
        self.before.theirs || self.now.theirs
    }

    /// Whether it is ours, and of enough rounds.
    fn is_sure(&self) -> bool {
        let rounds = self.before.rounds.len().min(self.now.rounds.len());
        !self.theirs() && rounds >= ROUNDS_MIN
    }

    /// Both ratios, where they are to the same.
    fn ratios(&self) -> Option<(&'a Relative, &'a Relative)> {
        let ratios = self
            .before
            .relative
            .as_ref()
            .zip(self.now.relative.as_ref());
        ratios.filter(|(before, now)| before.to == now.to)
    }

    fn ratio_decides(&self) -> bool {
        let is_sure = |(before, now): (&Relative, &Relative)| {
            before.rounds.len().min(now.rounds.len()) >= ROUNDS_MIN
        };
        self.is_sure() && self.ratios().is_some_and(is_sure)
    }
}

impl Change {
    /// One that does not decide.
    fn of(name: String, better: Better, threshold: f64, old: Spread, new: Spread) -> Self {
        let (was, is) = (old.median, new.median);
        let (grew, are_positive) = (is > was, was > 0.0 && is > 0.0);
        let factor = match better {
            Better::Higher => is / was,
            Better::Lower => was / is,
        };
        // By how much of the greater one: that of nothing and of what was given back is known, too.
        let matters = (is - was).abs() > threshold * is.abs().max(was.abs());
        let verdict = match (matters, old.overlaps(&new)) {
            (true, false) if grew == (better == Better::Higher) => Verdict::Better,
            (true, false) => Verdict::Worse,
            (true, true) => Verdict::Unclear,
            (false, _) => Verdict::Same,
        };
        let factor = are_positive.then_some(factor);
        Self {
            name,
            counts: false,
            is_absolute: false,
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
            let factor = match change.factor {
                Some(factor) => format!("x{factor:.3}"),
                None => "x-".into(),
            };
            writeln!(
                f,
                "{word:<8} {factor:<6}  {:.3} [{:.3}, {:.3}] -> {:.3} [{:.3}, {:.3}]  {}",
                change.old.median,
                change.old.low,
                change.old.high,
                change.new.median,
                change.new.low,
                change.new.high,
                change.name
            )?;
        }
        for Missing { name, theirs } in missing {
            let whose = if *theirs { "gone?" } else { "GONE" };
            writeln!(f, "{whose:<8} {name}")?;
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
        )?;
        let alone = |change: &&Change| change.counts && change.is_absolute;
        match changes.iter().filter(alone).count() {
            0 => {}
            absolute => writeln!(
                f,
                "{absolute} of those that decide are absolute figures: the machines are of one kind, but what else it did is in them."
            )?,
        }
        for fault in self.comparison.faults() {
            writeln!(f, "{fault}")?;
        }
        Ok(())
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
