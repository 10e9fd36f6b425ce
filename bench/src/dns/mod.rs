//! `keelway-bench dns`: what a cluster DNS server can do, and how long its clients wait.

mod load;
mod subject;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use keelway_tests::lists::{ListServer, services};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::report::Held;
use crate::stats::Spread;
use load::{Pace, Questions, Sample, run as ask};
use subject::Subject;

#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Shorter and fewer rounds.
    #[arg(long)]
    quick: bool,
    /// Services in the cluster, each with five endpoints; may be repeated.
    #[arg(long, default_values_t = [100, 10_000])]
    services: Vec<usize>,
    /// Measure the server at this address in place of ours; it has to know the cluster that --list-only serves.
    #[arg(long)]
    server: Option<SocketAddr>,
    /// Process of that server, for its memory and CPU time.
    #[arg(long, requires = "server")]
    pid: Option<u32>,
    /// Only serve the cluster of the first --services, for a server to be measured with --server, until a key is pressed.
    #[arg(long)]
    list_only: bool,
    /// Folder with keelway-dns; where this program is by default.
    #[arg(long, env = "KEELWAY_BIN_DIR")]
    bin_dir: Option<PathBuf>,
}

/// What is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Workload {
    Cluster,
    SearchPath,
    Cached,
    Uncached,
}

const WORKLOADS: [Workload; 4] = [
    Workload::Cluster,
    Workload::SearchPath,
    Workload::Cached,
    Workload::Uncached,
];

impl Workload {
    fn name(self) -> &'static str {
        match self {
            Workload::Cluster => "cluster",
            Workload::SearchPath => "nxdomain-search",
            Workload::Cached => "outside-cached",
            Workload::Uncached => "outside-uncached",
        }
    }

    fn questions(self, services: usize) -> Questions {
        let wires = |name: &dyn Fn(usize) -> String, count: usize| {
            (0..count).map(|i| question(&name(i))).collect()
        };
        let service = |i: usize| format!("svc-{i}.ns-{}.svc.cluster.local", i % 50);
        match self {
            // Not in order, so that neighbours in memory do not follow each other.
            Workload::Cluster => Questions {
                wires: wires(&|i| service(i * 7919 % services), services.min(20_000)),
                unique: None,
            },
            Workload::SearchPath => Questions {
                wires: wires(
                    &|i| format!("www.site-{i}.example.ns-{}.svc.cluster.local", i % 50),
                    1000,
                ),
                unique: None,
            },
            Workload::Cached => Questions {
                wires: wires(&|i| format!("cached-{i}.example.org"), 100),
                unique: None,
            },
            Workload::Uncached => Questions {
                wires: vec![question("u00000000.once.example.org")],
                // Behind the header, the length and the letter.
                unique: Some(14),
            },
        }
    }
}

fn question(name: &str) -> Vec<u8> {
    let mut wire = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        wire.push(label.len() as u8);
        wire.extend(label.bytes());
    }
    wire.extend([0, 0, 1, 0, 1]);
    wire
}

/// An upstream that knows every name: it answers as fast as anything can, so that the figure is the server's.
fn upstream() -> Result<SocketAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = socket.local_addr()?;
    thread::spawn(move || {
        let mut message = [0; 1500];
        while let Ok((bytes, peer)) = socket.recv_from(&mut message) {
            // The question ends with its type and class, before any OPT record.
            let name_end = message[12..bytes].iter().position(|byte| *byte == 0);
            let Some(end) = name_end.map(|at| 12 + at + 5).filter(|end| *end <= bytes) else {
                continue;
            };
            let mut reply = message[..end].to_vec();
            reply[2] = 0x81;
            reply[3] = 0x80;
            reply[7] = 1;
            reply[11] = 0;
            reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4, 192, 0, 2, 1]);
            let _ = socket.send_to(&reply, peer);
        }
    });
    Ok(address)
}

/// One row of the table.
struct Row {
    services: usize,
    cpus: usize,
    workload: Workload,
    per_second: Spread,
    /// Queries per second of the server's CPU time: what one core does when the generator keeps it busy.
    per_core: Option<Spread>,
    p50_us: Spread,
    p99_us: Spread,
    /// Of open load at 70 % of what closed load gave.
    p99_to_p50: Spread,
    lost: u64,
}

/// Measures and prints.
pub fn run(flags: &Flags) -> Result<()> {
    if flags.list_only {
        return list_only(flags);
    }
    let bin_dir = match &flags.bin_dir {
        Some(folder) => folder.clone(),
        None => std::env::current_exe()?
            .parent()
            .context("this program is in no folder")?
            .to_owned(),
    };
    let (rounds, duration) = if flags.quick { (3, 500) } else { (5, 2000) };
    let duration = Duration::from_millis(duration);
    let cpus = thread::available_parallelism()?.get();
    let upstream = upstream()?;
    let api = ListServer::start()?;
    let folder = tempfile::tempdir()?;
    let kubeconfig = api.kubeconfig(folder.path())?;
    let mut cpu_sets = vec![vec![0]];
    if cpus > 1 {
        cpu_sets.push(vec![0, 1]);
        // The generator's place; with one server thread that is a CPU of its own.
        pin(cpus - 1)?;
    }
    let (mut rows, mut memory) = (Vec::new(), Vec::new());
    for &count in &flags.services {
        let [listed, slices] = services(count, 5);
        api.set("services", listed);
        api.set("endpointslices", slices);
        for cpus in &cpu_sets {
            let mut subject = match flags.server {
                Some(address) => Subject::given(address, flags.pid),
                None => Subject::start(&bin_dir.join("keelway-dns"), &kubeconfig, upstream, cpus)?,
            };
            let last = format!(
                "svc-{}.ns-{}.svc.cluster.local",
                count - 2,
                (count - 2) % 50
            );
            let ready = subject.wait(&question(&last))?;
            let before = subject.memory_mb();
            for workload in WORKLOADS {
                rows.push(measure(
                    &subject,
                    workload,
                    count,
                    cpus.len(),
                    rounds,
                    duration,
                )?);
            }
            memory.push((count, cpus.len(), ready, before, subject.memory_mb()));
            if flags.server.is_some() {
                break;
            }
        }
    }
    print(&rows, &memory);
    Ok(())
}

fn list_only(flags: &Flags) -> Result<()> {
    let api = ListServer::start()?;
    let count = *flags.services.first().context("--services")?;
    let [listed, slices] = services(count, 5);
    api.set("services", listed);
    api.set("endpointslices", slices);
    let namespace = |i: usize| serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": format!("ns-{i}"), "resourceVersion": "1"}});
    api.set("namespaces", (0..50).map(namespace).collect());
    println!("http://{} {}", api.address, upstream()?);
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).context("pinning the generator")
}

fn measure(
    subject: &Subject,
    workload: Workload,
    services: usize,
    cpus: usize,
    rounds: usize,
    duration: Duration,
) -> Result<Row> {
    /// As many as sixteen clients of dnsperf keep in flight.
    const WINDOW: usize = 256;
    const LOAD: f64 = 0.7;
    let questions = workload.questions(services);
    // The first answers fill the cache.
    ask(subject.address, &questions, Pace::Closed(16), duration / 10)?;
    let (mut closed, mut per_core, mut open): (Vec<Sample>, Vec<f64>, Vec<Sample>) =
        Default::default();
    for _ in 0..rounds {
        let before = subject.cpu();
        let sample = ask(subject.address, &questions, Pace::Closed(WINDOW), duration)?;
        ensure!(sample.answered > 0, "{}: no answers", workload.name());
        ensure!(
            sample.odd == 0,
            "{}: {} answers of another code",
            workload.name(),
            sample.odd
        );
        if let (Some(before), Some(after)) = (before, subject.cpu()) {
            per_core.push(sample.answered as f64 / (after - before).as_secs_f64());
        }
        open.push(ask(
            subject.address,
            &questions,
            Pace::Open(sample.per_second * LOAD),
            duration,
        )?);
        closed.push(sample);
    }
    let spread = |values: &mut dyn Iterator<Item = f64>| Spread::of(values).context("no rounds");
    Ok(Row {
        services,
        cpus,
        workload,
        per_second: spread(&mut closed.iter().map(|sample| sample.per_second))?,
        per_core: Spread::of(per_core),
        p50_us: spread(&mut open.iter().map(|sample| sample.p50_us))?,
        p99_us: spread(&mut open.iter().map(|sample| sample.p99_us))?,
        p99_to_p50: spread(&mut open.iter().map(|sample| sample.p99_us / sample.p50_us))?,
        lost: closed.iter().chain(&open).map(|sample| sample.lost).sum(),
    })
}

/// Services, CPUs, time until it knew them, and its memory before and after the load.
type Memory = (usize, usize, Duration, Option<[f64; 2]>, Option<[f64; 2]>);

fn print(rows: &[Row], memory: &[Memory]) {
    println!(
        "services  cpus  workload           q/s        per core   p50 us   p99 us   lost   (latency: open load at 70 %)"
    );
    for row in rows {
        let per_core = row
            .per_core
            .map_or("-".into(), |spread| format!("{:.0}", spread.median));
        println!(
            "{:<9} {:<5} {:<18} {:<10.0} {per_core:<10} {:<8.1} {:<8.1} {}",
            row.services,
            row.cpus,
            row.workload.name(),
            row.per_second.median,
            row.p50_us.median,
            row.p99_us.median,
            row.lost
        );
    }
    println!("\nservices  cpus  ready s  MB idle  MB after load  MB most");
    let figure = |value: Option<f64>| value.map_or("-".into(), |mb| format!("{mb:.1}"));
    for (services, cpus, ready, before, after) in memory {
        println!(
            "{services:<9} {cpus:<5} {:<8.2} {:<8} {:<14} {}",
            ready.as_secs_f64(),
            figure(before.map(|memory| memory[0])),
            figure(after.map(|memory| memory[0])),
            figure(after.map(|memory| memory[1]))
        );
    }
    println!();
    for held in held(rows, memory) {
        println!("{held}");
    }
}

/// What the project is held to: five times CoreDNS 1.13.1's 36,500 per core, a sixth of its memory.
fn held(rows: &[Row], memory: &[Memory]) -> Vec<Held> {
    const PER_CORE: f64 = 180_000.0;
    const MEMORY_MB: f64 = 30.0;
    const P99_TO_P50: f64 = 3.0;
    let mut held = Vec::new();
    for row in rows
        .iter()
        .filter(|row| row.workload == Workload::Cluster && row.cpus == 1)
    {
        let figure = row.per_core.unwrap_or(row.per_second).median;
        held.push(Held {
            name: format!("dns.cluster.per-core.{}", row.services),
            target: format!(">={PER_CORE}"),
            figure,
            spread: None,
            ok: figure >= PER_CORE,
        });
        let figure = row.p99_to_p50.median;
        held.push(Held {
            name: format!("dns.cluster.p99-to-p50.{}", row.services),
            target: format!("<={P99_TO_P50}"),
            figure,
            spread: None,
            ok: figure <= P99_TO_P50,
        });
    }
    for (services, cpus, _, _, after) in memory.iter().filter(|row| row.1 == 1) {
        if let Some([figure, _]) = *after {
            debug_assert_eq!(*cpus, 1);
            held.push(Held {
                name: format!("dns.memory-mb.{services}"),
                target: format!("<{MEMORY_MB}"),
                figure,
                spread: None,
                ok: figure < MEMORY_MB,
            });
        }
    }
    held
}
