//! `keelway-bench api`: what API servers can do, side by side, each given by a kubeconfig.

mod beside;
mod connection;
mod endpoint;
mod fleet;
mod restart;
mod work;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;
use indicatif::ProgressBar;

use crate::machine::Machine;
use crate::report::{Better, Figure, Held, Output, Report};
use endpoint::{Endpoint, Named, Pids};
use work::{List, Mix};

#[derive(Debug, clap::Args)]
pub struct Flags {
    /// An API server, and a kubeconfig of its administrator; may be repeated. The first one's figures are held against the others'
    #[arg(long = "endpoint", value_name = "NAME=FILE", required = true)]
    endpoints: Vec<Named<PathBuf>>,
    /// Its processes, and those of its store: for processor time and memory
    #[arg(long, value_name = "NAME=PID[,PID]")]
    pids: Vec<Named<Pids>>,
    /// Pods that are listed
    #[arg(long, default_value_t = 10_000)]
    pods: usize,
    /// Bytes of each pod's JSON; may be repeated [default: 1000, 8000]
    #[arg(long)]
    bytes: Vec<usize>,
    /// Watches of one resource at a time
    #[arg(long, default_value_t = 1000)]
    watchers: usize,
    /// Shorter and fewer rounds
    #[arg(long)]
    quick: bool,
    /// So many simulated kubelets, in place of everything else
    #[arg(long, value_name = "NODES")]
    fleet: Option<usize>,
    /// Pods on each of them
    #[arg(long, default_value_t = 30)]
    fleet_pods: usize,
    /// Services that all of them watch
    #[arg(long, default_value_t = 10_000)]
    fleet_services: usize,
    /// Seconds that they are measured for
    #[arg(long, default_value_t = 60)]
    fleet_seconds: u64,
    /// Kill the --pids of each endpoint and start them again as they were, with so many pods, in place of everything else; they end with
    /// the bench
    #[arg(long, value_name = "PODS", num_args = 0..=1, default_missing_value = "100000", conflicts_with = "fleet")]
    restart: Option<NonZeroUsize>,
    #[command(flatten)]
    output: Output,
}

const CONNECTIONS: [usize; 3] = [1, 16, 64];
const CHANGES: u64 = 20;
/// What the project is held to.
const WRITES_PER_SECOND: f64 = 5000.0;
const READ_P99_MS: f64 = 2.0;
const LIST_TIMES: f64 = 5.0;
const MEMORY_TIMES: f64 = 5.0;

/// Measures and prints.
pub fn run(flags: &Flags) -> Result<()> {
    flags.output.check()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let mut report = Report::new("api", Machine::describe()?);
    report.set("pods", flags.pods);
    report.set("watchers", flags.watchers);
    let findings = runtime.block_on(measure(flags, &mut report))?;
    findings.tell(&mut report);
    flags.output.show(&report)
}

async fn measure(flags: &Flags, report: &mut Report) -> Result<Findings> {
    let mut endpoints = Vec::new();
    for given in &flags.endpoints {
        endpoints.push(Endpoint::open(given, &flags.pids).await?);
    }
    for pids in &flags.pids {
        let known = endpoints.iter().any(|endpoint| endpoint.name == pids.name);
        ensure!(known, "--pids {}: there is no such --endpoint", pids.name);
    }
    let progress = ProgressBar::new_spinner();
    let mut findings = Findings::default();
    if let Some(nodes) = flags.fleet {
        for endpoint in &endpoints {
            let say = |stage| crate::say(&progress, format!("{}: {stage}", endpoint.name));
            measure_fleet(flags, nodes, endpoint, (&say, &mut findings)).await?;
        }
        return Ok(findings);
    }
    let sizes = match flags.bytes.as_slice() {
        [] => vec![1000, 8000],
        sizes => sizes.to_vec(),
    };
    let rounds = if flags.quick { 3 } else { 7 };
    if let Some(pods) = flags.restart {
        let size = (pods.get(), sizes[0]);
        measure_restarts(endpoints, size, rounds, (&progress, &mut findings)).await?;
        return Ok(findings);
    }
    for bytes in sizes {
        for endpoint in &endpoints {
            crate::say(
                &progress,
                format!("{}: {} pods of {bytes} bytes", endpoint.name, flags.pods),
            );
            let before = endpoint.memory()?;
            let (cpu, began) = (endpoint.cpu()?, Instant::now());
            work::fill(endpoint, flags.pods, bytes).await?;
            let pods = flags.pods as f64;
            let case = Case::new(FILL, endpoint, format!("{bytes} bytes"));
            findings.push(case.clone(), RATE, pods / began.elapsed().as_secs_f64());
            if let Some((after, before)) = endpoint.cpu()?.zip(cpu) {
                findings.push(case, PER_CORE, pods / (after - before).as_secs_f64());
            }
            if let Some((after, before)) = endpoint.memory()?.zip(before) {
                let case = Case::new(MEMORY, endpoint, format!("{bytes} bytes"));
                findings.push(case.clone(), PER_OBJECT, (after - before) / pods);
                findings.push(case, ALL, after);
            }
        }
        for round in 0..=rounds {
            let mut order: Vec<&Endpoint> = endpoints.iter().collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for endpoint in order {
                crate::say(
                    &progress,
                    format!("{}: lists, {round} of {rounds}", endpoint.name),
                );
                let caller = endpoint.caller()?;
                for list in List::ALL {
                    // The first round fills what is cached.
                    measure_list(
                        list,
                        (flags.pods, bytes),
                        round > 0,
                        (endpoint, &caller),
                        &mut findings,
                    )
                    .await?;
                }
            }
        }
        if bytes < 2000 {
            for endpoint in &endpoints {
                crate::say(
                    &progress,
                    format!("{}: {} watches", endpoint.name, flags.watchers),
                );
                let fan_out = work::fan_out(endpoint, flags.watchers, CHANGES).await?;
                let case = Case::new(WATCH, endpoint, format!("{} watches", flags.watchers));
                let events = fan_out.events as f64;
                findings.push(case.clone(), RATE, events / fan_out.took.as_secs_f64());
                if let Some(cpu) = fan_out.cpu {
                    findings.push(case, PER_CORE, events / cpu.as_secs_f64());
                }
                measure_mixes(flags, endpoint, &progress, &mut findings).await?;
            }
        }
        for endpoint in &endpoints {
            work::clear(endpoint).await?;
        }
    }
    progress.finish_and_clear();
    if flags.pids.is_empty() {
        let note = "processor time and memory: no --pids were given";
        report.notes.push(note.into());
    }
    Ok(findings)
}

async fn measure_list(
    list: List,
    (pods, bytes): (usize, usize),
    counts: bool,
    (endpoint, caller): (&Endpoint, &endpoint::Caller),
    findings: &mut Findings,
) -> Result<()> {
    let (cpu, began) = (endpoint.cpu()?, Instant::now());
    let (mut times, mut took) = (0, Duration::ZERO);
    // Processor time is counted in hundredths of a second: a short list is made many times.
    while times < 3 || began.elapsed() < Duration::from_millis(500) {
        took += list.once(caller, pods).await?;
        times += 1;
    }
    if !counts {
        return Ok(());
    }
    let each = took.as_secs_f64() / f64::from(times);
    let case = Case::new(LISTS, endpoint, format!("{}, {bytes} bytes", list.name()));
    findings.push(case.clone(), TOOK, each * 1e3);
    if let Some((after, before)) = endpoint.cpu()?.zip(cpu) {
        let used_ms = (after - before).as_secs_f64() * 1e3 / f64::from(times);
        findings.push(case, CPU, used_ms);
    }
    Ok(())
}

async fn measure_mixes(
    flags: &Flags,
    endpoint: &Endpoint,
    progress: &ProgressBar,
    findings: &mut Findings,
) -> Result<()> {
    let duration = Duration::from_secs(if flags.quick { 2 } else { 5 });
    for connections in CONNECTIONS {
        for (reads_of_ten, what) in [(6, "6 of 10 read"), (0, "writes, one reader beside")] {
            crate::say(
                progress,
                format!("{}: {connections} connections, {what}", endpoint.name),
            );
            let mix = Mix {
                connections,
                reads_of_ten,
                reader_beside: reads_of_ten == 0,
            };
            let mixed = work::mixed(endpoint, mix, duration).await?;
            let case = Case::new(
                MIXED,
                endpoint,
                format!("{connections} connections, {what}"),
            );
            let (reads, writes) = (mixed.reads.len() as f64, mixed.writes.len() as f64);
            let seconds = mixed.took.as_secs_f64();
            findings.push(case.clone(), WRITES, writes / seconds);
            findings.push(case.clone(), READS, reads / seconds);
            if let Some(cpu) = mixed.cpu {
                findings.push(case.clone(), PER_CORE, (reads + writes) / cpu.as_secs_f64());
            }
            let ms = |micros: u64| micros as f64 / 1e3;
            findings.push(
                case.clone(),
                WRITE_P99,
                ms(mixed.writes.value_at_quantile(0.99)),
            );
            findings.push(
                case.clone(),
                READ_P99,
                ms(mixed.reads.value_at_quantile(0.99)),
            );
            if let Some(beside) = &mixed.beside {
                let p99 = |times: &Histogram<u64>| ms(times.value_at_quantile(0.99));
                findings.push(case.clone(), VERSION_P99, p99(&beside.version));
                findings.push(case, BARE_P99, p99(&beside.bare));
            }
        }
    }
    Ok(())
}

async fn measure_restarts(
    mut endpoints: Vec<Endpoint>,
    (pods, bytes): (usize, usize),
    rounds: usize,
    (progress, findings): (&ProgressBar, &mut Findings),
) -> Result<()> {
    let servers = endpoints.iter().map(restart::Server::of);
    // Before anything is made: it may be that one cannot be looked into.
    let mut servers = servers.collect::<Result<Vec<_>>>()?;
    for endpoint in &endpoints {
        let name = &endpoint.name;
        crate::say(progress, format!("{name}: {pods} pods of {bytes} bytes"));
        work::fill(endpoint, pods, bytes).await?;
    }
    for round in 1..=rounds {
        for (endpoint, server) in endpoints.iter_mut().zip(&mut servers) {
            let name = &endpoint.name;
            crate::say(progress, format!("{name}: restart {round} of {rounds}"));
            let times = server.again(endpoint, pods).await?;
            let case = Case::new(RESTART, endpoint, format!("{pods} pods, {bytes} bytes"));
            findings.push(case.clone(), FIRST, times.first.as_secs_f64());
            findings.push(case.clone(), WHOLE, times.whole.as_secs_f64());
            if let Some(memory) = endpoint.memory()? {
                findings.push(case, ALL, memory);
            }
        }
    }
    for (endpoint, server) in endpoints.iter().zip(servers) {
        work::clear(endpoint).await?;
        server.stop()?;
    }
    progress.finish_and_clear();
    Ok(())
}

async fn measure_fleet(
    flags: &Flags,
    nodes: usize,
    endpoint: &Endpoint,
    (say, findings): (&dyn Fn(String), &mut Findings),
) -> Result<()> {
    work::fill(endpoint, 0, 0).await?;
    let size = fleet::Size {
        nodes,
        pods_per_node: flags.fleet_pods,
        services: flags.fleet_services,
    };
    let duration = Duration::from_secs(flags.fleet_seconds);
    let times = fleet::run(endpoint, size, duration, say).await?;
    let whole = Case::new(FLEET, endpoint, format!("{nodes} nodes"));
    let seconds = times.took.as_secs_f64();
    if let Some(cpu) = times.cpu {
        findings.push(whole.clone(), CORES, cpu.as_secs_f64() / seconds);
    }
    if let Some(memory) = times.memory {
        findings.push(whole.clone(), ALL, memory);
    }
    findings.push(whole.clone(), EVENTS, times.events as f64);
    findings.push(whole, FAILED, times.failed as f64);
    for (what, histogram) in times.of {
        let case = Case::new(FLEET, endpoint, format!("{nodes} nodes, {what}"));
        findings.push(case.clone(), RATE, histogram.len() as f64 / seconds);
        // None took any time, and no time is held to anything.
        if histogram.is_empty() {
            continue;
        }
        let ms = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        findings.push(case.clone(), P50, ms(0.5));
        findings.push(case, P99, ms(0.99));
    }
    Ok(())
}

const FILL: &str = "pods made, 16 connections";
const LISTS: &str = "lists of all pods";
const MEMORY: &str = "memory of all processes";
const WATCH: &str = "one change to many watches";
const MIXED: &str = "reads and writes";
const FLEET: &str = "simulated kubelets";
const RESTART: &str = "killed, and started again";

type Quantity = (&'static str, &'static str, Better);
const RATE: Quantity = ("rate", "/s", Better::Higher);
const PER_CORE: Quantity = ("per core", "/s", Better::Higher);
const TOOK: Quantity = ("took", "ms", Better::Lower);
const CPU: Quantity = ("processor", "ms", Better::Lower);
const PER_OBJECT: Quantity = ("per object", "B", Better::Lower);
const ALL: Quantity = ("all", "B", Better::Lower);
const WRITES: Quantity = ("writes", "/s", Better::Higher);
const READS: Quantity = ("reads", "/s", Better::Higher);
const WRITE_P99: Quantity = ("write p99", "ms", Better::Lower);
const READ_P99: Quantity = ("read p99", "ms", Better::Lower);
const VERSION_P99: Quantity = ("/version p99", "ms", Better::Lower);
const BARE_P99: Quantity = ("bare exchange p99", "ms", Better::Lower);
const CORES: Quantity = ("cores", "", Better::Lower);
const EVENTS: Quantity = ("events", "", Better::Higher);
const FAILED: Quantity = ("failed", "", Better::Lower);
const P50: Quantity = ("p50", "ms", Better::Lower);
const P99: Quantity = ("p99", "ms", Better::Lower);
const FIRST: Quantity = ("first answer", "s", Better::Lower);
const WHOLE: Quantity = ("all listed", "s", Better::Lower);

/// What a figure is of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Case {
    section: &'static str,
    endpoint: String,
    what: String,
}

impl Case {
    fn new(section: &'static str, endpoint: &Endpoint, what: String) -> Self {
        Self {
            section,
            endpoint: endpoint.name.clone(),
            what,
        }
    }
}

/// Every measurement of a run, in the order in which they were made.
#[derive(Default)]
struct Findings(Vec<(Case, Quantity, Vec<f64>)>);

impl Findings {
    fn push(&mut self, case: Case, quantity: Quantity, value: f64) {
        let known = self.0.iter_mut();
        let mut known = known.filter(|(of, what, _)| *of == case && what.0 == quantity.0);
        match known.next() {
            Some((_, _, rounds)) => rounds.push(value),
            None => self.0.push((case, quantity, vec![value])),
        }
    }

    /// Puts all of it into a report: the first endpoint's figures beside those of the next one.
    fn tell(&self, report: &mut Report) {
        let first = self.0.first().map(|(case, ..)| case.endpoint.clone());
        for (case, quantity, rounds) in &self.0 {
            let labels = [("of", case.what.clone()), ("server", case.endpoint.clone())];
            let figure = Figure::new(case.section, &labels, *quantity, rounds.clone());
            let Some(mut figure) = figure else { continue };
            let is_first = Some(&case.endpoint) == first.as_ref();
            // Who is asked first is who is judged.
            figure = figure.of_others(!is_first);
            let other = self.0.iter().find(|(of, what, _)| {
                of.section == case.section
                    && of.what == case.what
                    && of.endpoint != case.endpoint
                    && what.0 == quantity.0
            });
            if let (true, Some((of, _, theirs))) = (is_first, other) {
                figure = figure.beside(&of.endpoint, theirs);
            }
            if is_first {
                report.held.extend(held(case, quantity, &figure));
            }
            report.figures.push(figure);
        }
    }
}

/// The targets that a figure is one of.
fn held(case: &Case, quantity: &Quantity, figure: &Figure) -> Option<Held> {
    let name = format!("api/{}/{}/{}", case.section, case.what, quantity.0);
    let ratio = figure.relative.as_ref().map(|relative| relative.spread);
    match (case.section, quantity.0) {
        (LISTS, "processor") | (WATCH, "per core") => {
            Some(Held::at_least(name, LIST_TIMES, ratio?))
        }
        (MEMORY, "per object") => Some(Held::at_least(name, MEMORY_TIMES, ratio?)),
        (MIXED, "writes") if case.what == "64 connections, writes, one reader beside" => {
            Some(Held::at_least(name, WRITES_PER_SECOND, figure.spread))
        }
        (MIXED, "read p99") if case.what == "64 connections, writes, one reader beside" => {
            Some(Held::below(name, READ_P99_MS, "ms", figure.spread))
        }
        (FLEET, "cores") => Some(Held::below(name, 1.0, "", figure.spread)),
        (FLEET, "p99") => Some(Held::below(name, 1000.0, "ms", figure.spread)),
        _ => None,
    }
}
