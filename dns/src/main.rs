//! `keelway-dns`: the cluster DNS server, and a client for looking at its answers.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use clap::Parser;
use cluster_model::watch::client;
use keelway_dns::answer::Policy;
use keelway_dns::ask::Ask;
use keelway_dns::config::{Config, Flags};
use keelway_dns::forward::Forwarder;
use keelway_dns::server::{self, Shared};
use keelway_dns::zone::Zone;
use keelway_dns::{feed, health};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(
    version,
    about = "DNS of a Kubernetes cluster: Services, endpoints, and a forwarder for the rest"
)]
enum Command {
    Serve(Flags),
    /// Ask a server for a name and print the answer.
    Query(Ask),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match Command::parse() {
        Command::Serve(flags) => serve(flags.try_into().context("--domain")?).await,
        Command::Query(ask) => {
            println!("{}", ask.run().await?);
            Ok(())
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut stop = signal(SignalKind::terminate())?;
    let policy = Policy {
        ttl_s: config.ttl_s,
        ..Policy::default()
    };
    let shared = Shared::new(
        Zone::new(config.domain),
        policy,
        Forwarder::new(config.upstreams),
    );
    let address = server::start(&shared, config.listen, config.threads).await?;
    let stopping = Arc::new(AtomicBool::new(false));
    let health = health::start(shared.clone(), stopping.clone(), config.health)
        .await
        .with_context(|| format!("--health {}", config.health))?;
    tracing::info!(%address, %health, threads = config.threads, "serving");
    let api = client(&config.api).await?;
    tokio::select! {
        () = feed::follow(shared, api) => {}
        _ = stop.recv() => {
            // Clients learn of it a little later than this process does: until then they are served.
            stopping.store(true, Ordering::Relaxed);
            tracing::info!(lameduck_s = config.lameduck.as_secs(), "stopping");
            tokio::select! {
                () = tokio::time::sleep(config.lameduck) => {}
                _ = stop.recv() => {}
            }
        }
    }
    Ok(())
}
