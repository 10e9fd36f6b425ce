//! `keelway-bench`: measures Keelway beside what it replaces; every figure is a ratio or comes with one from the same run.
#![forbid(unsafe_code)]

mod api;
mod cni;
mod compare;
mod control_groups;
mod dns;
mod gate;
mod held;
mod load;
mod machine;
mod peer;
mod report;
mod service;
mod stats;
mod sync;
mod yardstick;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    version,
    about = "Measures Keelway; every figure is a ratio or comes with one from the same run"
)]
struct Cli {
    /// Service traffic and the agent's lag, both in full, when none is named
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Service traffic, on one node, across two and from outside, beside direct traffic and other ways to do it
    Service(service::Flags),
    /// How long the maps lag behind the cluster, and what keeping them costs
    Sync(sync::Flags),
    /// ADD and DEL of a pod's network, beside ptp and bridge with host-local
    Cni(cni::Flags),
    /// Queries per second, latency and memory of the cluster DNS, or of any other server beside it
    Dns(dns::Flags),
    /// API servers, each given by a kubeconfig: lists, watches, reads and writes, memory, and fleets of kubelets
    Api(api::Flags),
    /// Two reports of one bench: what became worse; exit code 1 when something did, or when nothing can be said
    Compare(compare::Flags),
    /// Instructions, calls, stack and map operations against the project's baseline; exit code 1 when something grew
    Gate(gate::Flags),
    /// One end of a measurement, in its namespace
    #[command(hide = true)]
    Peer {
        role: peer::Role,
        #[command(flatten)]
        place: peer::Place,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    match Cli::parse().command {
        Some(command) => run(command),
        None => {
            for name in ["service", "sync"] {
                let whole = Cli::parse_from(["keelway-bench", name]);
                whole.command.map_or(Ok(ExitCode::SUCCESS), run)?;
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Service(flags) => service::run(&flags)?,
        Command::Sync(flags) => sync::run(&flags)?,
        Command::Cni(flags) => cni::run(&flags)?,
        Command::Dns(flags) => dns::run(&flags)?,
        Command::Api(flags) => api::run(&flags)?,
        Command::Compare(flags) => return compare::run(&flags),
        Command::Gate(flags) => return gate::run(&flags),
        Command::Peer { role, place } => peer::live(&place, role)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The folder that this program is in, where the others of its build are too.
fn beside_this_program() -> anyhow::Result<std::path::PathBuf> {
    use anyhow::Context as _;
    let program = std::env::current_exe()?;
    let folder = program.parent().context("this program is in no folder")?;
    Ok(folder.to_owned())
}

/// Says what is done now: on the bar, or on a line where there is no terminal to draw one.
fn say(progress: &indicatif::ProgressBar, stage: String) {
    if progress.is_hidden() {
        eprintln!("{stage}");
    }
    progress.set_message(stage);
}
