//! `keelway-dns`: the cluster DNS server, and a client for looking at its answers.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use keelway_dns::ask::Ask;
use keelway_dns::config::{Config, Flags};
use keelway_dns::feed::Feed;
use keelway_dns::metrics::Metrics;
use keelway_dns::server::{self, Shared};
use keelway_dns::settings::Settings;
use keelway_dns::{health, reload};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

#[derive(Parser)]
#[command(
    version,
    about = "DNS of a Kubernetes cluster: Services, endpoints, a cache and a forwarder for the rest"
)]
enum Command {
    Serve(Box<Flags>),
    /// Read a Corefile and say what is wrong with it, or nothing.
    Check {
        /// The Corefile.
        file: std::path::PathBuf,
    },
    /// Ask a server for a name and print the answer.
    Query(Ask),
}

/// How long queries that have come may still take when the server ends.
const DRAIN: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    server::prepare_process();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run())
}

async fn run() -> anyhow::Result<()> {
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match Command::parse() {
        Command::Serve(flags) => serve((*flags).try_into()?).await,
        Command::Check { file } => {
            let spec = keelway_dns::config::read_spec(&file)?;
            Settings::build(spec, &Metrics::default(), None)?.warn();
            Ok(())
        }
        Command::Query(ask) => {
            println!("{}", ask.run().await?);
            Ok(())
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut stop = signal(SignalKind::terminate())?;
    let metrics = Metrics::default();
    let settings = Settings::build(config.spec, &metrics, None)?;
    settings.warn();
    let shared = Shared::limited(settings, metrics, config.amplified_s);
    let (settings, new_settings) = watch::channel(shared.settings());
    let address = server::start(&shared, config.listen, config.threads).await?;
    for address in config.http {
        health::start(shared.clone(), address)
            .await
            .with_context(|| format!("health, readiness and metrics at {address}"))?;
    }
    tracing::info!(%address, threads = config.threads, "serving");
    let feed = Feed::start(shared.clone(), config.source).await?;
    server::answers_go_first();
    if let Some(file) = config.file {
        tokio::spawn(reload::follow(shared.clone(), file, config.files, settings));
    } else {
        // Nothing changes the settings; the feed waits for a change all the same.
        tokio::spawn(async move { settings.closed().await });
    }
    tokio::select! {
        () = feed.run(new_settings) => anyhow::bail!("the cluster is not followed any more"),
        _ = stop.recv() => {}
    }
    // Clients learn of it a little later than this process does: until then they are served. The zone stays as it is.
    shared.stop();
    tracing::info!(lameduck_s = config.lameduck.as_secs(), "stopping");
    tokio::select! {
        () = tokio::time::sleep(config.lameduck) => {}
        _ = stop.recv() => {}
    }
    shared.drain(DRAIN).await;
    Ok(())
}
