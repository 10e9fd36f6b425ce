//! What was measured, and what follows from it: figures, how they grow, what they are held to.

use std::collections::BTreeMap;

use super::route::{
    Cpus, DIRECT, EMPTY_HOOKS, Ends, NODE_PORT, NODE_PORT_DSR, NODE_PORT_PASSED, NODE_PORT_XDP,
    Route, Task, VETH, is_theirs, reference, rivals,
};
use crate::load::{Metric, Sample};
use crate::report::{Better, Figure, Growth, Held, Report};
use crate::stats::{Spread, growth};

/// What identifies a series of rounds. The order is that of the tables.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Case {
    size: usize,
    is_open: bool,
    cpus: Cpus,
    metric: Metric,
    ends: Ends,
    path: String,
}

/// Every sample of a run.
#[derive(Debug, Default)]
pub struct Findings(BTreeMap<Case, Vec<Sample>>);

impl Findings {
    pub fn push(&mut self, size: usize, route: &Route, task: Task, sample: Sample) {
        let case = case(size, &route.path, route.ends, task);
        self.0.entry(case).or_default().push(sample);
    }

    /// The median rate of what was measured so far.
    pub fn rate(&self, size: usize, path: &str, ends: Ends, task: Task) -> Option<f64> {
        let samples = self.0.get(&case(size, path, ends, task))?;
        Some(Spread::of(samples.iter().map(|sample| sample.per_second))?.median)
    }

    /// Adds everything to a report.
    pub fn fill(&self, report: &mut Report) {
        for (case, samples) in &self.0 {
            report.figures.extend(self.figures(case, samples));
        }
        report.growth = self.growth();
        report.held = self.held();
    }

    fn figures(&self, case: &Case, samples: &[Sample]) -> Vec<Figure> {
        let section = match (case.is_open, case.cpus) {
            (true, _) => "open load, half of what the direct path can do",
            (false, Cpus::One) => "both ends on one CPU",
            (false, Cpus::Two) => "each end on a CPU of its own",
        };
        let labels = [
            ("services", case.size.to_string()),
            ("metric", case.metric.name().to_owned()),
            ("ends", case.ends.name().to_owned()),
            ("path", case.path.clone()),
        ];
        let unit = match case.metric {
            Metric::Throughput => "B/s",
            _ => "/s",
        };
        type Value = fn(&Sample) -> f64;
        let mut quantities: Vec<(&str, &str, Better, Value)> =
            vec![("rate", unit, Better::Higher, |sample| sample.per_second)];
        if case.metric != Metric::Throughput {
            quantities.extend([
                ("p50", "us", Better::Lower, (|s| s.p50_us) as Value),
                ("p99", "us", Better::Lower, |s| s.p99_us),
            ]);
        }
        if case.is_open {
            quantities.push(("p99.9", "us", Better::Lower, |s| s.p999_us));
        }
        if case.metric == Metric::Datagram {
            let lost = (|sample: &Sample| sample.lost as f64) as Value;
            quantities.push(("lost", "", Better::Lower, lost));
        }
        let (ends, path) = reference(case.ends, &case.path);
        let to = match ends == case.ends {
            true => path.to_owned(),
            false => format!("{path} {}", ends.name()),
        };
        let reference = self.0.get(&Case {
            ends,
            path: path.into(),
            ..case.clone()
        });
        quantities
            .into_iter()
            .filter_map(|(quantity, unit, better, value)| {
                let rounds = samples.iter().map(value).collect();
                let figure = Figure::new(section, &labels, (quantity, unit, better), rounds)?
                    .of_others(is_theirs(&case.path));
                let compared = quantity == compared(case).0;
                Some(match reference.filter(|_| compared) {
                    Some(reference) => {
                        let reference: Vec<f64> = reference.iter().map(value).collect();
                        figure.beside(&to, &reference)
                    }
                    None => figure,
                })
            })
            .collect()
    }

    /// Speed of one case beside another's, round by round; above 1 the first one is faster.
    fn ratio(&self, ours: &Case, theirs: &Case) -> Option<Spread> {
        let (_, value) = compared(ours);
        let pairs = self.0.get(ours)?.iter().zip(self.0.get(theirs)?);
        Spread::of(pairs.map(|(ours, theirs)| value(ours) / value(theirs)))
    }

    fn growth(&self) -> Vec<Growth> {
        let mut series: BTreeMap<(Metric, String), Vec<(f64, f64)>> = BTreeMap::new();
        for case in self.0.keys().filter(|case| is_flatness(case)) {
            let direct = Case {
                path: DIRECT.into(),
                ..case.clone()
            };
            if let Some(ratio) = self.ratio(case, &direct).filter(|_| case.path != DIRECT) {
                let key = (case.metric, case.path.clone());
                let point = (case.size as f64, 1.0 / ratio.median);
                series.entry(key).or_default().push(point);
            }
        }
        let fit = |((metric, path), points): ((Metric, String), Vec<(f64, f64)>)| {
            Some(Growth {
                of: format!("{} by {path}, beside the direct path", metric.name()),
                exponent: growth(&points)?,
            })
        };
        series.into_iter().filter_map(fit).collect()
    }

    fn held(&self) -> Vec<Held> {
        let mut held = Vec::new();
        let first = self.0.keys().map(|case| case.size).min().unwrap_or(0);
        for case in self.0.keys() {
            if case.is_open || case.cpus == Cpus::Two {
                continue;
            }
            let name = |what: &str, to: &str| {
                let (metric, ends) = (case.metric.name(), case.ends.name());
                let at = if case.size == first {
                    String::new()
                } else {
                    format!(".{}-services", case.size)
                };
                format!("service.{what}.{metric}.{ends}{at}{to}")
            };
            let beside = |path: &str| Case {
                path: path.into(),
                ..case.clone()
            };
            let least = match case.path.as_str() {
                "socket" => 0.98,
                "packet" | NODE_PORT => 0.9,
                // By one node less on the way back.
                NODE_PORT_DSR => {
                    let ratio = self.ratio(case, &beside(NODE_PORT));
                    let name = name(&case.path, ".beside-the-way-back");
                    held.extend(ratio.map(|ratio| Held::at_least(name, 1.0, ratio)));
                    continue;
                }
                // Earlier than at tc, so faster: else there is no use for it.
                NODE_PORT_XDP => {
                    // And than the same beneath a driver's program that does nothing: a veth's driver copies frames for any.
                    for (to, theirs) in [
                        (".beside-tc", NODE_PORT),
                        (".beside-tc-and-empty-xdp", NODE_PORT_PASSED),
                    ] {
                        let ratio = self.ratio(case, &beside(theirs));
                        let name = name(&case.path, to);
                        held.extend(ratio.map(|ratio| Held::at_least(name, 1.0, ratio)));
                    }
                    continue;
                }
                DIRECT => {
                    held.extend(self.floor(case, &name("pod-to-pod", "")));
                    continue;
                }
                _ => continue,
            };
            if let Some(ratio) = self.ratio(case, &beside(DIRECT)) {
                held.push(Held::at_least(name(&case.path, ""), least, ratio));
            }
            if case.path == "socket"
                && let Some(ratio) = self.ratio(case, &beside(EMPTY_HOOKS))
            {
                let name = name(&case.path, ".beside-empty-hooks");
                held.push(Held::at_least(name, least, ratio));
            }
            for rival in rivals() {
                let to = format!(".beside-{rival}");
                if let Some(ratio) = self.ratio(case, &beside(rival)) {
                    held.push(Held::at_least(name(&case.path, &to), 1.0, ratio));
                }
            }
            if case.size != first
                && let Some(flat) = self.flatness(case, first)
            {
                let name = name(&case.path, &format!(".beside-{first}-services"));
                held.push(Held::at_least(name, 0.97, flat));
            }
        }
        held
    }

    /// Pod to pod beside a bare veth pair.
    fn floor(&self, case: &Case, name: &str) -> Option<Held> {
        let veth = Case {
            path: VETH.into(),
            ..case.clone()
        };
        let is_latency = matches!(case.metric, Metric::RoundTrip | Metric::Connect);
        let ratio = self.ratio(case, &veth).filter(|_| is_latency)?;
        Some(Held::at_least(format!("{name}.beside-veth"), 0.97, ratio))
    }

    /// Share of the direct path's speed beside that share at the first size. Sizes follow each other in time, so what disturbs one
    /// must not count against it: the direct path of the same rounds stands between.
    fn flatness(&self, case: &Case, first: usize) -> Option<Spread> {
        let small = Case {
            size: first,
            ..case.clone()
        };
        let shares = |case: &Case| -> Option<Vec<f64>> {
            let direct = Case {
                path: DIRECT.into(),
                ..case.clone()
            };
            let (_, value) = compared(case);
            let pairs = self.0.get(case)?.iter().zip(self.0.get(&direct)?);
            Some(
                pairs
                    .map(|(ours, theirs)| value(ours) / value(theirs))
                    .collect(),
            )
        };
        let (now, before) = (shares(case)?, shares(&small)?);
        let middle = Spread::of(before)?.median;
        Spread::of(now.into_iter().map(|share| share / middle))
    }
}

/// Flatness is looked at where only the Service differs.
fn is_flatness(case: &Case) -> bool {
    let metrics = [Metric::RoundTrip, Metric::Connect];
    !case.is_open
        && case.cpus == Cpus::One
        && case.ends == Ends::SameNode
        && metrics.contains(&case.metric)
}

/// The quantity by which cases are compared, and their speed by it. Latencies are compared by their medians, which a stall of the
/// machine does not move; transfers have only their rate, and several connections are about it.
fn compared(case: &Case) -> (&'static str, fn(&Sample) -> f64) {
    match case.metric {
        Metric::RoundTrip | Metric::Connect => ("p50", |sample| 1.0 / sample.p50_us),
        _ if case.is_open => ("p50", |sample| 1.0 / sample.p50_us),
        _ => ("rate", |sample| sample.per_second),
    }
}

fn case(size: usize, path: &str, ends: Ends, task: Task) -> Case {
    Case {
        size,
        is_open: task.open.is_some(),
        cpus: task.cpus,
        metric: task.metric,
        ends,
        path: path.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::Comparison;
    use crate::machine::Machine;
    use crate::service::route::ROUTED;

    fn findings(shares: &[(usize, &str, f64)]) -> Findings {
        findings_between(Ends::SameNode, shares)
    }

    fn findings_between(ends: Ends, shares: &[(usize, &str, f64)]) -> Findings {
        let mut findings = Findings::default();
        // What disturbs a round disturbs all paths in it.
        for disturbance in [1.0, 0.5, 0.9] {
            for (size, path, share) in shares {
                let p50_us = 16.0 / (disturbance * share);
                let route = Route {
                    path: (*path).into(),
                    ends,
                    client: 0,
                    address: std::net::Ipv4Addr::LOCALHOST,
                    by_node_port: false,
                    is_constant: false,
                };
                let sample = Sample {
                    per_second: 1e6 / p50_us,
                    p50_us,
                    ..Sample::default()
                };
                let task = Task::closed(Metric::RoundTrip, Cpus::One);
                findings.push(*size, &route, task, sample);
            }
        }
        findings
    }

    #[test]
    fn targets_are_met_or_missed_by_ratios() {
        let findings = findings(&[
            (10, DIRECT, 1.0),
            (10, "veth", 1.02),
            (10, EMPTY_HOOKS, 0.98),
            (10, "socket", 0.97),
            (10, "packet", 0.95),
            (10, "nftables", 0.8),
            (10, "kube-proxy-nftables", 0.75),
            (1000, DIRECT, 0.5),
            (1000, "socket", 0.48),
            (1000, "packet", 0.4),
        ]);
        let held: Vec<String> = findings
            .held()
            .iter()
            .map(|held| format!("{} {:.2} {}", held.name, held.figure, held.ok))
            .collect();
        assert_eq!(
            held,
            [
                "service.pod-to-pod.round-trip.same-node.beside-veth 0.98 true",
                "service.packet.round-trip.same-node 0.95 true",
                "service.packet.round-trip.same-node.beside-nftables 1.19 true",
                "service.packet.round-trip.same-node.beside-kube-proxy-nftables 1.27 true",
                "service.socket.round-trip.same-node 0.97 false",
                "service.socket.round-trip.same-node.beside-empty-hooks 0.99 true",
                "service.socket.round-trip.same-node.beside-nftables 1.21 true",
                "service.socket.round-trip.same-node.beside-kube-proxy-nftables 1.29 true",
                "service.packet.round-trip.same-node.1000-services 0.80 false",
                "service.packet.round-trip.same-node.1000-services.beside-10-services 0.84 false",
                "service.socket.round-trip.same-node.1000-services 0.96 false",
                "service.socket.round-trip.same-node.1000-services.beside-10-services 0.99 true",
            ]
        );
    }

    #[test]
    fn what_is_sent_on_by_the_driver_is_held_against_the_hook_at_tc() {
        let shares = [
            (10, NODE_PORT, 0.8),
            (10, NODE_PORT_PASSED, 0.75),
            (10, NODE_PORT_XDP, 0.9),
        ];
        let findings = findings_between(Ends::Forwarded, &shares);
        let held: Vec<String> = findings
            .held()
            .iter()
            .map(|held| format!("{} {:.3} {}", held.name, held.figure, held.ok))
            .collect();
        assert_eq!(
            held,
            [
                "service.node-port-xdp.round-trip.forwarded.beside-tc 1.125 true",
                "service.node-port-xdp.round-trip.forwarded.beside-tc-and-empty-xdp 1.200 true",
            ]
        );
        let mut report = Report::new("service", Machine::of_nobody());
        findings.fill(&mut report);
        let relative = |figure: &&Figure| figure.label("path") == Some(NODE_PORT_XDP);
        let driver: Vec<&Figure> = report.figures.iter().filter(relative).collect();
        let compared = driver.iter().filter_map(|figure| figure.relative.as_ref());
        let compared: Vec<&str> = compared.map(|relative| relative.to.as_str()).collect();
        assert_eq!(compared, [NODE_PORT]);
    }

    /// What `compare` says of two runs, with Services looked for in each packet between pods in the second one.
    #[test]
    fn a_lookup_more_per_packet_is_seen_by_compare_and_others_never_decide() {
        let run = |ours: f64, others: f64| {
            let findings = findings(&[
                (10, DIRECT, ours),
                (10, "packet", 0.97 * ours),
                (10, "socket", 0.99 * ours),
                (10, VETH, 1.05 * others),
                (10, ROUTED, 0.95 * others),
                (10, "nftables", 0.8 * others),
                (10, "kube-proxy-iptables", 0.7 * others),
            ]);
            let mut report = Report::new("service", Machine::of_nobody());
            findings.fill(&mut report);
            report
        };
        let compared = |old: &Report, new: &Report| Comparison::of(old, new, 0.05, false);
        let (before, slower, faster) = (run(1.0, 1.0), run(0.9, 1.0), run(1.1, 1.0));
        assert!(compared(&before, &run(1.0, 1.0)).holds());
        let direct = "both ends on one CPU/10/round-trip/same-node/direct/p50, beside routed";
        assert_eq!(compared(&before, &slower).complaints(), [direct]);
        assert!(!compared(&before, &slower).holds());
        // As fast as before, beside others that have become slower by the code of somebody else, or faster: they are not ours.
        assert_eq!(compared(&before, &faster).complaints(), [""; 0]);
        let (mut gone, mut none) = (run(1.0, 1.0), run(1.0, 1.0));
        gone.figures
            .retain(|figure| figure.label("path") != Some("socket"));
        assert!(!compared(&before, &gone).holds());
        none.figures
            .retain(|figure| figure.label("path") != Some("kube-proxy-iptables"));
        assert!(compared(&before, &none).holds());
    }

    #[test]
    fn growth_is_told_of_what_depends_on_the_size() {
        let findings = findings(&[
            (10, DIRECT, 1.0),
            (10, "packet", 0.9),
            (10, "iptables", 0.8),
            (1000, DIRECT, 1.0),
            (1000, "packet", 0.9),
            (1000, "iptables", 0.08),
        ]);
        let growth: Vec<String> = findings
            .growth()
            .iter()
            .map(|growth| format!("{} {:.1}", growth.of, growth.exponent))
            .collect();
        assert_eq!(
            growth,
            [
                "round-trip by iptables, beside the direct path 0.5",
                "round-trip by packet, beside the direct path 0.0",
            ]
        );
    }
}
