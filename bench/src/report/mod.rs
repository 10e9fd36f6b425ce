//! What a run says: tables for people, JSON for programs (docs/benchmarks.md has its schema), a page with plots, and the HELD lines
//! that targets are read from.

mod html;
mod plot;
mod table;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

pub use crate::held::Held;
use crate::machine::Machine;
use crate::stats::Spread;

/// Version of the JSON; it changes with the meaning of a field, not with new ones.
pub const SCHEMA: u32 = 1;

/// Whether more of a figure is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Better {
    Higher,
    Lower,
}

/// One quantity of one case, with all its rounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Figure {
    /// The table that it belongs to.
    pub section: String,
    /// What tells its case from the others of the section: `[["path", "socket"], ["ends", "same-node"], ...]`.
    pub labels: Vec<(String, String)>,
    pub quantity: String,
    pub unit: String,
    pub better: Better,
    pub rounds: Vec<f64>,
    #[serde(flatten)]
    pub spread: Spread,
    /// The same quantity of another case, round by round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relative: Option<Relative>,
    /// Of somebody that we are compared with: what becomes of it is no doing of ours.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub theirs: bool,
}

/// How good a figure is beside another's of the same rounds: above 1 it is the better one.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Relative {
    pub to: String,
    pub rounds: Vec<f64>,
    #[serde(flatten)]
    pub spread: Spread,
}

impl Better {
    /// How good one value is beside another: above 1 it is the better one.
    fn ratio(self, ours: f64, theirs: f64) -> f64 {
        match self {
            Better::Higher => ours / theirs,
            Better::Lower => theirs / ours,
        }
    }
}

impl Relative {
    /// Ratios of some rounds; none where a value that is not above zero has none.
    fn of(to: &str, rounds: Vec<f64>) -> Option<Self> {
        let are_ratios = rounds.iter().all(|ratio| ratio.is_finite() && *ratio > 0.0);
        let spread = Spread::of(rounds.iter().copied()).filter(|_| are_ratios)?;
        Some(Self {
            to: to.into(),
            rounds,
            spread,
        })
    }
}

impl Figure {
    /// A figure of some rounds; none when there are none.
    pub fn new(
        section: &str,
        labels: &[(&str, String)],
        (quantity, unit, better): (&str, &str, Better),
        rounds: Vec<f64>,
    ) -> Option<Self> {
        let spread = Spread::of(rounds.iter().copied())?;
        Some(Self {
            section: section.into(),
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), value.clone()))
                .collect(),
            quantity: quantity.into(),
            unit: unit.into(),
            better,
            rounds,
            spread,
            relative: None,
            theirs: false,
        })
    }

    /// Says whose it is.
    pub fn of_others(mut self, theirs: bool) -> Self {
        self.theirs = theirs;
        self
    }

    /// Compares with another figure's rounds, pair by pair: what disturbs a round disturbs both.
    pub fn beside(mut self, to: &str, other: &[f64]) -> Self {
        let pairs = self.rounds.iter().zip(other);
        let rounds = pairs
            .map(|(ours, theirs)| self.better.ratio(*ours, *theirs))
            .collect();
        self.relative = Relative::of(to, rounds);
        self
    }

    /// Compares with the median of another figure whose rounds are not these: each was measured after the other was done.
    pub fn beside_median(mut self, to: &str, other: &[f64]) -> Self {
        let middle = Spread::of(other.iter().copied()).map(|spread| spread.median);
        self.relative = middle.and_then(|theirs| {
            let rounds = self.rounds.iter();
            let rounds = rounds.map(|ours| self.better.ratio(*ours, theirs));
            Relative::of(to, rounds.collect())
        });
        self
    }

    /// The case that it is a quantity of, in one word.
    pub fn case(&self) -> String {
        let values = self.labels.iter().map(|(_, value)| value.as_str());
        let words: Vec<&str> = [self.section.as_str()].into_iter().chain(values).collect();
        words.join("/")
    }

    /// What it is, in one word: unique within a report.
    pub fn name(&self) -> String {
        format!("{}/{}", self.case(), self.quantity)
    }

    pub fn label(&self, key: &str) -> Option<&str> {
        let mut labels = self.labels.iter();
        labels.find_map(|(name, value)| (name == key).then_some(value.as_str()))
    }
}

/// How a cost grows with the cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Growth {
    pub of: String,
    /// Exponent of the power law through the sizes: 0 is flat, 1 proportional.
    pub exponent: f64,
}

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub schema: u32,
    pub bench: String,
    pub version: String,
    pub machine: Machine,
    pub settings: BTreeMap<String, String>,
    pub figures: Vec<Figure>,
    pub growth: Vec<Growth>,
    /// What was left out, and why.
    pub notes: Vec<String>,
    pub held: Vec<Held>,
}

impl Report {
    pub fn new(bench: &str, machine: Machine) -> Self {
        Self {
            schema: SCHEMA,
            bench: bench.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            machine,
            settings: BTreeMap::new(),
            figures: Vec::new(),
            growth: Vec::new(),
            notes: Vec::new(),
            held: Vec::new(),
        }
    }

    pub fn set(&mut self, name: &str, value: impl ToString) {
        self.settings.insert(name.into(), value.to_string());
    }

    /// Reads a report that an earlier run wrote.
    pub fn read(path: &Path) -> Result<Self> {
        let shown = || path.display().to_string();
        let text = fs::read_to_string(path).with_context(shown)?;
        let report: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a report of keelway-bench", shown()))?;
        anyhow::ensure!(
            report.schema == SCHEMA,
            "{} is of schema {}, this program reads {SCHEMA}",
            shown(),
            report.schema
        );
        Ok(report)
    }
}

/// How results are shown.
#[derive(Debug, clap::Args)]
pub struct Output {
    /// What is printed.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    output: Format,
    /// Also write the JSON to this file.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Also write a page with plots to this file; it needs nothing beside it.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

impl Output {
    /// Refuses files that cannot be written before anything is measured.
    pub fn check(&self) -> Result<()> {
        for file in self.out.iter().chain(&self.report) {
            fs::File::options()
                .create(true)
                .append(true)
                .open(file)
                .with_context(|| format!("{} cannot be written", file.display()))?;
        }
        Ok(())
    }

    pub fn show(&self, report: &Report) -> Result<()> {
        let write = |file: &PathBuf, text: &str| {
            fs::write(file, text).with_context(|| format!("writing {}", file.display()))
        };
        let json = serde_json::to_string_pretty(report)?;
        if let Some(file) = &self.out {
            write(file, &json)?;
        }
        if let Some(file) = &self.report {
            write(file, &html::page(report))?;
        }
        match self.output {
            Format::Json => println!("{json}"),
            Format::Text => print!("{report}"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disturbed_round_does_not_move_the_ratio() {
        let direct = [10.0, 20.0, 11.0];
        let ours: Vec<f64> = direct.iter().map(|us| us / 0.95).collect();
        let labels = [("path", "socket".to_owned())];
        let figure = Figure::new("traffic", &labels, ("p50", "us", Better::Lower), ours)
            .expect("three rounds")
            .beside("direct", &direct);
        let spread = figure.relative.as_ref().expect("it has another").spread;
        for ratio in [spread.low, spread.median, spread.high] {
            assert!((ratio - 0.95).abs() < 1e-9, "{spread:?}");
        }
        assert_eq!(figure.name(), "traffic/socket/p50");
    }
}
