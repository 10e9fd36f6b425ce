//! What a run says: a table for people, JSON for programs, and the HELD lines that targets are read from.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::{fs, io};

use serde::{Deserialize, Serialize};

use crate::load::{Metric, Sample};
use crate::stats::Spread;

/// How a client's packets get to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// To the pod's own address: what a Service is compared with.
    Direct,
    /// To the ClusterIP, translated at the socket.
    Socket,
    /// To the ClusterIP, translated per packet.
    Packet,
}

/// Where the two ends are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distance {
    SameNode,
    AcrossNodes,
}

/// What identifies a series of rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Case {
    pub distance: Distance,
    pub metric: Metric,
    pub path: Path,
}

/// Every sample of a run, in the order of its rounds.
#[derive(Debug, Default)]
pub struct Rounds(BTreeMap<Case, Vec<Sample>>);

impl Rounds {
    pub fn push(&mut self, case: Case, sample: Sample) {
        self.0.entry(case).or_default().push(sample);
    }

    fn spread(&self, case: Case, value: impl Fn(&Sample) -> f64) -> Option<Spread> {
        Spread::of(self.0.get(&case)?.iter().map(value))
    }

    /// How the path compares with the direct one, round by round: what disturbs a round disturbs both its halves. Latencies
    /// are compared by their medians, which a stall of the machine does not move; transfers have only their rate.
    fn ratio_to_direct(&self, case: Case) -> Option<Spread> {
        let direct = self.0.get(&Case {
            path: Path::Direct,
            ..case
        })?;
        let ours = self.0.get(&case)?;
        let ratio = |(ours, direct): (&Sample, &Sample)| match case.metric {
            Metric::Throughput => ours.per_second / direct.per_second,
            Metric::RoundTrip | Metric::Connect => direct.p50_us / ours.p50_us,
        };
        Spread::of(ours.iter().zip(direct).map(ratio))
    }
}

/// One row of the table.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    #[serde(flatten)]
    pub case: Case,
    pub per_second: Spread,
    pub p50_us: Spread,
    pub p99_us: Spread,
    /// Share of the direct path's speed, of the same metric and distance; 1 for the direct path itself.
    pub ratio: Spread,
}

/// What one program costs per packet, by `BPF_PROG_TEST_RUN`.
#[derive(Debug, Serialize, Deserialize)]
pub struct ProgramCost {
    pub program: String,
    pub packet: String,
    pub nanos: Spread,
}

/// A figure that the project is held to.
#[derive(Debug, Serialize, Deserialize)]
pub struct Held {
    pub name: String,
    pub target: String,
    pub figure: f64,
    pub ok: bool,
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.ok { "ok" } else { "MISS" };
        write!(
            f,
            "HELD {} target={} figure={:.3} {verdict}",
            self.name, self.target, self.figure
        )
    }
}

/// A whole run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub machine: Machine,
    pub services: usize,
    pub rounds: usize,
    pub rows: Vec<Row>,
    pub programs: Vec<ProgramCost>,
    pub held: Vec<Held>,
}

/// What the figures were measured on.
#[derive(Debug, Serialize, Deserialize)]
pub struct Machine {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    /// CPUs that client and server were pinned to.
    pub pinned: [usize; 2],
}

impl Machine {
    /// This machine, with the CPUs that client and server were pinned to.
    pub fn describe(pinned: [usize; 2]) -> io::Result<Self> {
        let info = fs::read_to_string("/proc/cpuinfo")?;
        let model = info
            .lines()
            .find_map(|line| line.strip_prefix("model name"))
            .unwrap_or("unknown");
        Ok(Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            cpu: model.trim_start_matches([' ', '\t', ':']).to_owned(),
            cpus: std::thread::available_parallelism()?.get(),
            pinned,
        })
    }
}

/// Least share of the direct path's speed that each way through a Service is held to (design.md, "Performance").
const HELD: [(Path, f64); 2] = [(Path::Socket, 0.98), (Path::Packet, 0.9)];

impl Report {
    pub fn new(
        machine: Machine,
        services: usize,
        rounds: &Rounds,
        programs: Vec<ProgramCost>,
    ) -> Self {
        let rows: Vec<Row> = rounds
            .0
            .keys()
            .filter_map(|&case| {
                Some(Row {
                    case,
                    per_second: rounds.spread(case, |sample| sample.per_second)?,
                    p50_us: rounds.spread(case, |sample| sample.p50_us)?,
                    p99_us: rounds.spread(case, |sample| sample.p99_us)?,
                    ratio: rounds.ratio_to_direct(case)?,
                })
            })
            .collect();
        let held = rows.iter().filter_map(held).collect();
        let rounds = rounds.0.values().map(Vec::len).min().unwrap_or_default();
        Self {
            machine,
            services,
            rounds,
            rows,
            programs,
            held,
        }
    }
}

fn held(row: &Row) -> Option<Held> {
    let (_, least) = HELD.into_iter().find(|(path, _)| *path == row.case.path)?;
    let figure = row.ratio.median;
    let name = format!(
        "service.{}.{}.{}",
        word(&row.case.metric),
        word(&row.case.path),
        word(&row.case.distance)
    );
    Some(Held {
        name,
        target: format!(">={least}"),
        figure,
        ok: figure >= least,
    })
}

/// The name that serde gives a unit variant: one spelling in the table, JSON and HELD lines.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine {
            kernel,
            cpu,
            cpus,
            pinned,
        } = &self.machine;
        writeln!(
            f,
            "Linux {kernel}, {cpus} x {cpu}; client on CPU {}, server on CPU {}",
            pinned[0], pinned[1]
        )?;
        writeln!(
            f,
            "{} services, {} interleaved rounds; medians, +- half the spread\n",
            self.services, self.rounds
        )?;
        let mut table = Vec::new();
        for Row {
            case,
            per_second,
            p50_us,
            p99_us,
            ratio,
        } in &self.rows
        {
            let (rate, unit) = match case.metric {
                Metric::Throughput => (per_second.median * 8.0 / 1e9, "Gbit/s"),
                Metric::RoundTrip | Metric::Connect => (per_second.median, "/s"),
            };
            let rate = if rate < 1000.0 {
                format!("{rate:.2} {unit}")
            } else {
                format!("{rate:.0} {unit}")
            };
            let micros = |spread: &Spread| match case.metric {
                Metric::Throughput => "-".to_owned(),
                Metric::RoundTrip | Metric::Connect => format!("{:.1}", spread.median),
            };
            table.push([
                word(&case.distance),
                word(&case.metric),
                word(&case.path),
                rate,
                micros(p50_us),
                micros(p99_us),
                format!(
                    "{:.3} +-{:.1}%",
                    ratio.median,
                    ratio.relative_width() * 50.0
                ),
            ]);
        }
        let head = [
            "ends",
            "metric",
            "path",
            "rate",
            "p50 us",
            "p99 us",
            "to direct",
        ];
        f.write_str(&aligned(&head.map(str::to_owned), &table))?;
        if !self.programs.is_empty() {
            let rows: Vec<_> = self
                .programs
                .iter()
                .map(|cost| {
                    [
                        cost.program.clone(),
                        cost.packet.clone(),
                        format!("{:.0}", cost.nanos.median),
                    ]
                })
                .collect();
            let head = ["program", "packet", "ns per packet"].map(str::to_owned);
            write!(f, "\n{}", aligned(&head, &rows))?;
        }
        writeln!(f)?;
        self.held.iter().try_for_each(|held| writeln!(f, "{held}"))
    }
}

fn aligned<const N: usize>(head: &[String; N], rows: &[[String; N]]) -> String {
    let mut text = String::new();
    let width = |column: usize| {
        rows.iter()
            .chain([head])
            .map(|row| row[column].len())
            .max()
            .unwrap_or_default()
    };
    for row in [head].into_iter().chain(rows) {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let _ = write!(line, "{cell:<width$}  ", width = width(column));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(socket: f64, packet: f64) -> Rounds {
        let mut rounds = Rounds::default();
        for disturbance in [1.0, 0.5, 0.9] {
            for (path, share) in [
                (Path::Direct, 1.0),
                (Path::Socket, socket),
                (Path::Packet, packet),
            ] {
                let case = Case {
                    distance: Distance::SameNode,
                    metric: Metric::RoundTrip,
                    path,
                };
                let p50_us = 16.0 / (disturbance * share);
                rounds.push(
                    case,
                    Sample {
                        per_second: 1e6 / p50_us,
                        p50_us,
                        p99_us: 20.0,
                    },
                );
            }
        }
        rounds
    }

    fn machine() -> Machine {
        Machine {
            kernel: "6.1".into(),
            cpu: "x".into(),
            cpus: 2,
            pinned: [1, 1],
        }
    }

    #[test]
    fn a_disturbed_round_does_not_move_the_ratio() {
        let report = Report::new(machine(), 10, &rounds(1.0, 0.95), Vec::new());
        let ratios: Vec<f64> = report.rows.iter().map(|row| row.ratio.median).collect();
        assert!(
            ratios
                .iter()
                .zip([1.0, 1.0, 0.95])
                .all(|(ratio, share)| (ratio - share).abs() < 1e-9),
            "{ratios:?}"
        );
    }

    #[test]
    fn a_target_that_is_missed_says_so() {
        let report = Report::new(machine(), 10, &rounds(0.97, 0.95), Vec::new());
        let held: Vec<String> = report.held.iter().map(ToString::to_string).collect();
        assert_eq!(
            held,
            [
                "HELD service.round-trip.socket.same-node target=>=0.98 figure=0.970 MISS",
                "HELD service.round-trip.packet.same-node target=>=0.9 figure=0.950 ok",
            ]
        );
    }

    #[test]
    fn a_report_survives_json() {
        let report = Report::new(machine(), 10, &rounds(1.0, 1.0), Vec::new());
        let text = serde_json::to_string(&report).expect("a report is JSON");
        let back: Report = serde_json::from_str(&text).expect("and comes back");
        assert_eq!(back.rows.len(), 3);
        assert_eq!(back.to_string(), report.to_string());
    }
}
