//! `keelway-bench`: throughput and latency of service traffic, as ratios to the direct path.
#![forbid(unsafe_code)]

mod cni;
mod dns;
mod lab;
mod load;
mod peer;
mod programs;
mod report;
mod service;
mod stats;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    version,
    about = "Measures Keelway; every figure is a ratio or comes with one from the same run"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Service traffic between two pods, on one node and on two, beside direct traffic
    Service(service::Flags),
    /// ADD and DEL of a pod's network, beside ptp and bridge with host-local
    Cni(cni::Flags),
    /// Queries per second, latency and memory of the cluster DNS, or of any other server beside it
    Dns(dns::Flags),
    /// One end of a measurement, in its namespace
    #[command(hide = true)]
    Peer {
        role: peer::Role,
        #[command(flatten)]
        place: peer::Place,
    },
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Service(flags) => service::run(&flags),
        Command::Cni(flags) => cni::run(&flags),
        Command::Dns(flags) => dns::run(&flags),
        Command::Peer { role, place } => peer::live(&place, role),
    }
}
