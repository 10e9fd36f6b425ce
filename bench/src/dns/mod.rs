//! `keelway-bench dns`: what a cluster DNS server can do, and how long its clients wait.

mod bare;
mod dnsperf;
mod findings;
mod load;
mod pauses;
mod pods;
mod subject;
mod workload;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use indicatif::ProgressBar;
use keelway_tests::lists::{ListServer, services};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::machine::Machine;
use crate::report::{Output, Report};
use bare::{BARE, BARE_ALONE};
use findings::{Findings, Place};
use load::{Pace, Sample, run as ask};
use pauses::Pauses;
use subject::{KEELWAY, Subject, Surroundings};
use workload::{Workload, question, service_name, upstream};

#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Shorter and fewer rounds.
    #[arg(long)]
    quick: bool,
    /// Services in the cluster, each with five endpoints; may be repeated. [default: 100, 10000]
    #[arg(long)]
    services: Vec<usize>,
    /// Rounds of each measurement, in place of five, or of three by --quick.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: Option<u32>,
    /// The real CoreDNS, measured beside ours.
    #[arg(long, value_name = "PATH", conflicts_with = "server")]
    coredns: Option<PathBuf>,
    /// Measure the server at this address in place of ours; it has to know the cluster that --list-only serves.
    #[arg(long)]
    server: Option<SocketAddr>,
    /// Process of that server, for its memory and CPU time.
    #[arg(long, requires = "server")]
    pid: Option<u32>,
    /// Ask from a pod, at its Service's address, what is answered at the pod's interface, and what servers in other pods answer. Needs root,
    /// and KEELWAY_BIN_DIR.
    #[arg(long, conflicts_with_all = ["server", "list_only"])]
    pods: bool,
    /// Only serve the cluster of the first --services, for a server to be measured with --server, until a key is pressed.
    #[arg(long)]
    list_only: bool,
    #[command(flatten)]
    output: Output,
    /// Folder with keelway-dns; where this program is by default.
    #[arg(long, env = "KEELWAY_BIN_DIR")]
    bin_dir: Option<PathBuf>,
}

const SERVICES: [usize; 2] = [100, 10_000];
const ENDPOINTS: usize = 5;

/// How much is measured.
struct Extent {
    rounds: u32,
    duration: Duration,
    dnsperf: bool,
}

/// Measures and prints.
pub fn run(flags: &Flags) -> Result<()> {
    flags.output.check()?;
    let sizes = match flags.services.as_slice() {
        [] => SERVICES.to_vec(),
        sizes => sizes.to_vec(),
    };
    if flags.list_only {
        return list_only(sizes[0]);
    }
    let bin_dir = match &flags.bin_dir {
        Some(folder) => folder.clone(),
        None => crate::beside_this_program()?,
    };
    let extent = Extent {
        rounds: flags.rounds.unwrap_or(if flags.quick { 3 } else { 5 }),
        duration: Duration::from_millis(if flags.quick { 500 } else { 2000 }),
        dnsperf: dnsperf::is_installed(),
    };
    let mut report = Report::new("dns", Machine::describe()?);
    report.set("rounds", extent.rounds);
    report.set("milliseconds", extent.duration.as_millis());
    if !extent.dnsperf {
        report.notes.push("dnsperf: it is not installed".into());
    }
    let mut findings = Findings::default();
    if flags.pods {
        for &count in &sizes {
            pods::measure(count, flags.coredns.as_deref(), &extent, &mut findings)?;
        }
        findings.tell(&mut report);
        return flags.output.show(&report);
    }
    let cpus = thread::available_parallelism()?.get();
    let mut cpu_sets = vec![vec![0]];
    if cpus > 1 {
        cpu_sets.push(vec![0, 1]);
        // The generator's place; with one server thread that is a CPU of its own.
        pin(cpus - 1)?;
    } else {
        let note = "two CPUs: the machine has one, which the generator takes its part of";
        report.notes.push(note.into());
    }
    let bare = bare::start(0)?;
    let progress = ProgressBar::new_spinner();
    let upstream = upstream()?;
    let api = ListServer::start()?;
    let folder = tempfile::tempdir()?;
    let kubeconfig = api.kubeconfig(folder.path())?;
    let around = Surroundings {
        api: api.address,
        upstream,
        folder: folder.path(),
        kubeconfig: &kubeconfig,
    };
    for &count in &sizes {
        fill(&api, count);
        for cpus in &cpu_sets {
            let mut subjects = match (flags.server, &flags.coredns) {
                (Some(address), _) => vec![Subject::given(address, flags.pid)],
                (None, coredns) => {
                    let mut all = vec![Subject::ours(&bin_dir.join("keelway-dns"), &around, cpus)?];
                    if let Some(program) = coredns {
                        all.push(Subject::coredns(program, &around, cpus)?);
                    }
                    all
                }
            };
            crate::say(&progress, format!("{count} Services, {} CPUs", cpus.len()));
            let place = (count, cpus.len());
            measure(&mut subjects, place, bare, &extent, &mut findings)?;
            if flags.server.is_some() {
                break;
            }
        }
    }
    progress.finish_and_clear();
    findings.tell(&mut report);
    flags.output.show(&report)
}

fn fill(api: &ListServer, count: usize) {
    let [listed, slices] = services(count, ENDPOINTS);
    api.set("services", listed);
    api.set("endpointslices", slices);
    let namespace = |i: usize| serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": format!("ns-{i}"), "resourceVersion": "1"}});
    api.set("namespaces", (0..50).map(namespace).collect());
}

fn list_only(count: usize) -> Result<()> {
    let api = ListServer::start()?;
    fill(&api, count);
    println!("http://{} {}", api.address, upstream()?);
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).context("pinning the generator")
}

/// CPU time that the hypervisor has kept from this machine so far, all CPUs together.
fn stolen() -> Duration {
    const STEAL: usize = 8;
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let field = stat.split_whitespace().nth(STEAL);
    let ticks = field.and_then(|ticks| ticks.parse::<u64>().ok());
    // In hundredths of a second, whatever the kernel counts in (proc(5), USER_HZ).
    Duration::from_millis(10 * ticks.unwrap_or_default())
}

/// Every workload over some servers of one cluster, round by round, each round in the opposite order.
fn measure(
    subjects: &mut [Subject],
    (services, cpus): (usize, usize),
    bare: SocketAddr,
    extent: &Extent,
    findings: &mut Findings,
) -> Result<()> {
    let last = question(&service_name(services - 2));
    let mut known = Vec::new();
    for subject in subjects.iter_mut() {
        known.push(subject.wait(&last)?);
    }
    let mut idle = Vec::new();
    for subject in subjects.iter() {
        idle.push(subject.settled_memory());
    }
    for workload in Workload::ALL {
        for subject in subjects.iter() {
            // The first answers fill the cache.
            let questions = workload.questions(services);
            let pace = Pace::Closed(16);
            ask(subject.address, &questions, pace, extent.duration / 10)?;
        }
        for round in 0..extent.rounds {
            let mut order: Vec<&Subject> = subjects.iter().collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for subject in order {
                let place = Place {
                    services,
                    cpus,
                    subject: subject.name,
                };
                measure_once(subject, workload, place, bare, extent, findings)?;
            }
        }
    }
    for (subject, (ready, before)) in subjects.iter().zip(known.into_iter().zip(idle)) {
        let place = Place {
            services,
            cpus,
            subject: subject.name,
        };
        if let (Some(before), Some(after)) = (before, subject.memory()) {
            findings.memory(place, ready, before, after);
        }
    }
    Ok(())
}

fn measure_once(
    subject: &Subject,
    workload: Workload,
    place: Place,
    bare: SocketAddr,
    extent: &Extent,
    findings: &mut Findings,
) -> Result<()> {
    /// As many as sixteen clients of dnsperf keep in flight.
    const WINDOW: usize = 256;
    const LOAD: f64 = 0.7;
    let questions = workload.questions(place.services);
    let used = |before: Option<Duration>| Some(subject.cpu()?.saturating_sub(before?));
    let before = subject.cpu();
    let pace = Pace::Closed(WINDOW);
    let closed = ask(subject.address, &questions, pace, extent.duration)?;
    let cpu = used(before);
    ensure!(
        closed.answered > 0 && closed.odd == 0,
        "{}: {} answers, of which {} of another code",
        workload.name(),
        closed.answered,
        closed.odd
    );
    let open = |address, rate: f64| -> Result<(Sample, f64)> {
        let before = stolen();
        let pace = Pace::Open(rate * LOAD);
        let sample = ask(address, &questions, pace, extent.duration)?;
        Ok((
            sample,
            100.0 * stolen().saturating_sub(before).as_secs_f64() / extent.duration.as_secs_f64(),
        ))
    };
    let (sample, stolen) = open(subject.address, closed.per_second)?;
    findings.round(place, workload.name(), &closed, cpu, &sample);
    findings.machine(place, workload.name(), &sample, stolen);
    if subject.name == KEELWAY && workload == Workload::Cluster {
        let (floor, stolen) = open(bare, closed.per_second)?;
        findings.beside_bare(place, workload.name(), &sample, &floor);
        let bare_closed = ask(bare, &questions, Pace::Closed(WINDOW), extent.duration)?;
        let (alone, alone_stolen) = open(bare, bare_closed.per_second)?;
        for (subject, sample, stolen) in
            [(BARE, &floor, stolen), (BARE_ALONE, &alone, alone_stolen)]
        {
            let place = Place { subject, ..place };
            findings.open(place, workload.name(), sample);
            findings.machine(place, workload.name(), sample, stolen);
        }
        // The first CPU is the server's.
        let pauses = Pauses::watch(0, extent.duration)?;
        let service = Duration::from_secs_f64(1.0 / closed.per_second);
        let p50 = Duration::from_secs_f64(sample.p50_us / 1e6);
        let ratio = pauses.p99_to_p50(service, LOAD, p50);
        findings.pauses(place, workload.name(), pauses.long_per_second(), ratio);
    }
    if extent.dnsperf && matches!(workload, Workload::Cluster | Workload::SearchPath) {
        let before = subject.cpu();
        let names = workload.names(place.services);
        let sample = dnsperf::run(subject.address, &names, extent.duration)?;
        findings.dnsperf(place, workload.name(), &sample, used(before));
    }
    Ok(())
}
