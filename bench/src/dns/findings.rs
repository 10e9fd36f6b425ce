//! What was measured, and what follows from it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::bare::{BARE, BARE_ALONE};
use super::dnsperf;
use super::load::Sample;
use super::pods::IN_KERNEL;
use super::subject::{COREDNS, KEELWAY};
use crate::report::{Better, Figure, Held, Report};

const QUERIES: &str = "queries; latency by open load at 70 %";
const DNSPERF: &str = "queries by dnsperf, 16 clients";
const MEMORY: &str = "memory";
const PODS: &str = "queries from a pod";
const MACHINE: &str = "the machine meanwhile";

/// Where a figure belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub services: usize,
    pub cpus: usize,
    pub subject: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Case {
    section: &'static str,
    services: usize,
    cpus: usize,
    what: &'static str,
    subject: &'static str,
    /// Order within the table, and name.
    quantity: (usize, &'static str),
    unit: &'static str,
}

/// Every measurement of a run.
#[derive(Debug, Default)]
pub struct Findings(BTreeMap<Case, Vec<f64>>);

impl Findings {
    fn push(
        &mut self,
        (section, what): (&'static str, &'static str),
        place: Place,
        quantity: (usize, &'static str),
        unit: &'static str,
        value: f64,
    ) {
        let case = Case {
            section,
            services: place.services,
            cpus: place.cpus,
            what,
            subject: place.subject,
            quantity,
            unit,
        };
        self.0.entry(case).or_default().push(value);
    }

    /// One round: closed load, with the CPU time that the server used for it, and open load.
    pub fn round(
        &mut self,
        place: Place,
        workload: &'static str,
        closed: &Sample,
        cpu: Option<Duration>,
        open: &Sample,
    ) {
        let what = (QUERIES, workload);
        if let Some(cpu) = cpu {
            let per_core = closed.answered as f64 / cpu.as_secs_f64();
            self.push(what, place, PER_CORE, "/s", per_core);
        }
        self.push(what, place, (1, "rate"), "/s", closed.per_second);
        self.open(place, workload, open);
        let lost = closed.lost + open.lost;
        self.push(what, place, (6, "lost"), "", lost as f64);
    }

    /// How long clients waited at a rate.
    pub fn open(&mut self, place: Place, workload: &'static str, open: &Sample) {
        let what = (QUERIES, workload);
        self.push(what, place, (2, "p50"), "us", open.p50_us);
        self.push(what, place, (3, "p99"), "us", open.p99_us);
        self.push(what, place, P99_TO_P50, "", open.p99_us / open.p50_us);
        // Where the generator saw too little of every slice, nothing is held, and nothing kept.
        if let Some(ratio) = open.slice_p99_to_p50 {
            self.push(what, place, SLICE_P99_TO_P50, "", ratio);
        }
    }

    /// What the machine did meanwhile: how late the generator was, and how much of a CPU's time the hypervisor kept.
    pub fn machine(
        &mut self,
        place: Place,
        workload: &'static str,
        open: &Sample,
        stolen_percent: f64,
    ) {
        let what = (MACHINE, workload);
        self.push(what, place, (0, "sent late, p99"), "us", open.late_p99_us);
        self.push(what, place, (1, "not seen"), "%", open.unseen_percent);
        self.push(what, place, (2, "stolen"), "%", stolen_percent);
    }

    /// The server's waiting time beside that of who looks nothing up, at the same rate, one right after the other.
    pub fn beside_bare(
        &mut self,
        place: Place,
        workload: &'static str,
        open: &Sample,
        bare: &Sample,
    ) {
        let what = (MACHINE, workload);
        let place = Place {
            subject: KEELWAY,
            ..place
        };
        // Of slices: in half a second, a pause of the machine decides.
        if let (Some(ours), Some(bare)) = (open.slice_p99_us, bare.slice_p99_us) {
            self.push(what, place, P99_TO_BARE, "", ours / bare);
        }
    }

    /// How often the server's CPU ran nobody right after, and what that alone makes of p99 to p50.
    pub fn pauses(
        &mut self,
        place: Place,
        workload: &'static str,
        long_per_second: f64,
        p99_to_p50: Option<f64>,
    ) {
        let what = (MACHINE, workload);
        let quantity = (4, "pauses over 20 us");
        self.push(what, place, quantity, "/s", long_per_second);
        if let Some(ratio) = p99_to_p50 {
            self.push(what, place, (5, "p99/p50 of those alone"), "", ratio);
        }
    }

    pub fn dnsperf(
        &mut self,
        place: Place,
        workload: &'static str,
        sample: &dnsperf::Sample,
        cpu: Option<Duration>,
    ) {
        let what = (DNSPERF, workload);
        if let Some(cpu) = cpu {
            let per_core = sample.answered as f64 / cpu.as_secs_f64();
            self.push(what, place, PER_CORE, "/s", per_core);
        }
        self.push(what, place, (1, "rate"), "/s", sample.per_second);
        self.push(what, place, (5, "lost"), "", sample.lost as f64);
    }

    /// One round from a pod: a question at a time, and many.
    pub fn pod(&mut self, place: Place, workload: &'static str, one: &Sample, many: &Sample) {
        let what = (PODS, workload);
        self.push(what, place, ONE, "/s", one.per_second);
        self.push(what, place, (2, "p50"), "us", one.p50_us);
        self.push(what, place, (3, "p99"), "us", one.p99_us);
        self.push(what, place, (4, "32 at a time"), "/s", many.per_second);
        let lost = one.lost + many.lost;
        self.push(what, place, (6, "lost"), "", lost as f64);
    }

    /// Memory of the process, in bytes: before the load, after it, and the most that it ever was.
    pub fn memory(
        &mut self,
        place: Place,
        ready: Duration,
        before: [f64; 2],
        [after, most]: [f64; 2],
    ) {
        let what = (MEMORY, "process");
        self.push(what, place, (0, "ready after"), "s", ready.as_secs_f64());
        self.push(what, place, (1, "idle"), "B", before[0]);
        self.push(what, place, AFTER_LOAD, "B", after);
        self.push(what, place, (3, "most"), "B", most);
    }

    /// Puts all of it into a report.
    pub fn tell(&self, report: &mut Report) {
        for (case, rounds) in &self.0 {
            let labels = [
                ("services", case.services.to_string()),
                ("cpus", case.cpus.to_string()),
                ("workload", case.what.to_owned()),
                ("server", case.subject.to_owned()),
            ];
            let better = match case.unit {
                "/s" => Better::Higher,
                _ => Better::Lower,
            };
            let quantity = (case.quantity.1, case.unit, better);
            let Some(figure) = Figure::new(case.section, &labels, quantity, rounds.clone()) else {
                continue;
            };
            // What the machine did is nobody's doing.
            let is_machines = case.section == MACHINE && case.quantity != P99_TO_BARE;
            let is_others = [COREDNS, BARE, BARE_ALONE].contains(&case.subject);
            let figure = figure.of_others(is_others || is_machines);
            let compared = [PER_CORE, AFTER_LOAD, ONE].contains(&case.quantity);
            let other = self.0.get(&Case {
                subject: COREDNS,
                ..case.clone()
            });
            let figure = match other {
                Some(other) if compared && case.subject != COREDNS => figure.beside(COREDNS, other),
                _ => figure,
            };
            report.held.extend(held(case, &figure));
            report.figures.push(figure);
        }
    }
}

const PER_CORE: (usize, &str) = (0, "per core");
const P99_TO_P50: (usize, &str) = (4, "p99/p50");
const SLICE_P99_TO_P50: (usize, &str) = (5, "p99/p50 of the middle 50 ms");
const P99_TO_BARE: (usize, &str) = (3, "p99 to bare, middle 50 ms");
const ONE: (usize, &str) = (1, "one at a time");
const AFTER_LOAD: (usize, &str) = (2, "after load");

/// What the project is held to: five times CoreDNS 1.13.1, whose figures were 36,500 per core and 187 MB; and clients that wait alike.
fn held(case: &Case, figure: &Figure) -> Vec<Held> {
    const PER_CORE_MIN: f64 = 180_000.0;
    const TIMES_COREDNS: f64 = 5.0;
    const BYTES_MAX: f64 = 30e6;
    const P99_TO_P50_MAX: f64 = 3.0;
    // What the machine and the generator do to clients, they do to those of a bare responder too.
    const P99_TO_BARE_MAX: f64 = 2.0;
    let name = |what: &str| format!("dns.{what}.{}", case.services);
    let mut held = Vec::new();
    if (case.section, case.subject, case.quantity) == (PODS, IN_KERNEL, ONE)
        && let Some(relative) = &figure.relative
        && case.what == "cluster"
    {
        // Per core, whoever uses it: client and server share one.
        held.push(Held::at_least(
            name("pods.cluster.times-coredns"),
            TIMES_COREDNS,
            relative.spread,
        ));
    }
    if case.subject != KEELWAY || case.cpus != 1 {
        return held;
    }
    match (case.section, case.what, case.quantity) {
        (QUERIES, "cluster", PER_CORE) => {
            held.push(Held::at_least(
                name("cluster.per-core"),
                PER_CORE_MIN,
                figure.spread,
            ));
        }
        // A pause of the machine is more than a hundredth of a round: it is in the other columns, for the bare responder too.
        (QUERIES, "cluster", SLICE_P99_TO_P50) => {
            held.push(Held::below(
                name("cluster.p99-to-p50"),
                P99_TO_P50_MAX,
                "",
                figure.spread,
            ));
        }
        (MACHINE, "cluster", P99_TO_BARE) => {
            held.push(Held::below(
                name("cluster.p99-to-bare"),
                P99_TO_BARE_MAX,
                "",
                figure.spread,
            ));
        }
        (MEMORY, _, AFTER_LOAD) => {
            held.push(Held::below(name("memory"), BYTES_MAX, "B", figure.spread));
        }
        _ => {}
    }
    if let Some(relative) = &figure.relative
        && case.what == "cluster"
        && case.section == QUERIES
    {
        held.push(Held::at_least(
            name("cluster.times-coredns"),
            TIMES_COREDNS,
            relative.spread,
        ));
    }
    held
}
