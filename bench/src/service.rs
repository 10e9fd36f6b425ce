//! `keelway-bench service`: what it costs to reach a server through a Service, beside reaching it directly.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use crate::lab::Lab;
use crate::load::Metric;
use crate::peer::{Peer, Place, Role};
use crate::programs;
use crate::report::{Case, Distance, Machine, Path, Report, Rounds};

#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Three short rounds instead of nine long ones: under two minutes.
    #[arg(long)]
    quick: bool,
    /// Services in the cluster.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(2..=20_000))]
    services: u32,
    /// Rounds, in place of what --quick says.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// CPUs for the client and the server; both on one by default, because waking another CPU hides the path.
    #[arg(long, num_args = 2, value_names = ["CLIENT", "SERVER"])]
    cpus: Option<Vec<usize>>,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
    /// Also write the JSON to this file.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Folder with keelway-agent and keelway-cni; where this program is by default.
    #[arg(long, env = "KEELWAY_BIN_DIR")]
    bin_dir: Option<PathBuf>,
}

const PATHS: [Path; 3] = [Path::Direct, Path::Socket, Path::Packet];
const DISTANCES: [Distance; 2] = [Distance::SameNode, Distance::AcrossNodes];

/// Measures and prints.
pub fn run(flags: &Flags) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "this needs root: it makes namespaces and loads eBPF programs"
    );
    let (rounds, duration) = if flags.quick {
        (3, Duration::from_millis(400))
    } else {
        (9, Duration::from_secs(2))
    };
    let rounds = flags.rounds.unwrap_or(rounds);
    let [client_cpu, server_cpu] = match flags.cpus.as_deref() {
        Some(&[client, server]) => [client, server],
        _ => [last_cpu()?; 2],
    };
    let bin_dir = match &flags.bin_dir {
        Some(folder) => folder.clone(),
        None => std::env::current_exe()?
            .parent()
            .context("this program is in no folder")?
            .to_owned(),
    };

    let progress = ProgressBar::new(
        u64::from(rounds) * (DISTANCES.len() * Metric::ALL.len() * PATHS.len()) as u64,
    );
    progress.set_style(ProgressStyle::with_template(
        "{msg:28} {bar:30} {pos}/{len} {eta}",
    )?);
    progress.set_message("building two nodes");
    let lab = Lab::build(&bin_dir, flags.services as usize)?;

    let place = |network: PathBuf, hooked: bool, cpu| Place {
        netns: network,
        cgroup: lab.group(hooked),
        cpu,
    };
    let _servers = lab
        .servers
        .iter()
        .map(|server| {
            Peer::start(
                &place(server.network.path(), false, server_cpu),
                Role::Server,
            )
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut hooked = Peer::start(
        &place(lab.client.network.path(), true, client_cpu),
        Role::Client,
    )?;
    let mut plain = Peer::start(
        &place(lab.client.network.path(), false, client_cpu),
        Role::Client,
    )?;

    let mut results = Rounds::default();
    for _ in 0..rounds {
        for (index, distance) in DISTANCES.into_iter().enumerate() {
            for metric in Metric::ALL {
                for path in PATHS {
                    progress.set_message(format!("{metric:?}, {path:?}"));
                    let (client, address): (_, Ipv4Addr) = match path {
                        Path::Direct => (&mut plain, lab.servers[index].address),
                        Path::Socket => (&mut hooked, lab.service_address(index)),
                        Path::Packet => (&mut plain, lab.service_address(index)),
                    };
                    let target = SocketAddr::from((address, metric.port()));
                    let sample = client.measure(metric, target, duration)?;
                    results.push(
                        Case {
                            distance,
                            metric,
                            path,
                        },
                        sample,
                    );
                    progress.inc(1);
                }
            }
        }
    }
    progress.finish_and_clear();

    let machine = Machine::describe([client_cpu, server_cpu])?;
    let report = Report::new(
        machine,
        flags.services as usize,
        &results,
        programs::measure()?,
    );
    let json = serde_json::to_string_pretty(&report)?;
    if let Some(file) = &flags.out {
        fs::write(file, &json).with_context(|| format!("writing {}", file.display()))?;
    }
    if flags.json {
        println!("{json}");
    } else {
        print!("{report}");
    }
    Ok(())
}

fn last_cpu() -> Result<usize> {
    Ok(std::thread::available_parallelism()?.get() - 1)
}
