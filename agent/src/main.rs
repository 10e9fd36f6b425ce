//! `keelway-agent`: the per-node daemon and what belongs to it.

mod command;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use keelway_agent::balancer;
use keelway_agent::config::{Config, RunFlags, Source};
use keelway_agent::event::Event;
use keelway_agent::health::{listen, serve_proxy};
use keelway_agent::net::{AddressNews, NetlinkError};
use keelway_agent::source::Feed;
use keelway_agent::supervisor::Predecessors;
use keelway_agent::worker::{LastWords, Worker, reason};
use keelway_agent::{
    install, metrics, node_ranges, record, sandboxes, service_ranges, share, socket, source,
    supervisor, uninstall,
};
use nix::sys::signal::{SigSet, Signal};
use tokio::signal::unix::{SignalKind, signal};

/// Keelway's agent: Services, pod networks and routes of one node.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run on this node: a supervisor that keeps a worker alive.
    Run(RunFlags),
    /// Run one worker, without a supervisor when called by hand.
    #[command(hide = true)]
    Worker(RunFlags),
    #[command(flatten)]
    Look(command::Look),
    /// Copy the CNI plugin to where container runtimes look for it.
    Install {
        #[arg(long, default_value = "/opt/cni/bin")]
        bin_dir: PathBuf,
    },
    /// Take away what agents have left on this node: plugin, configuration, programs, maps, interfaces, routes and state.
    Uninstall(uninstall::Places),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .init();
    let outcome = match cli.command {
        Command::Run(flags) => run(flags),
        Command::Worker(flags) => work(flags),
        Command::Look(look) => command::run(look),
        Command::Install { bin_dir } => install::install_plugin(&bin_dir)
            .map(|path| {
                println!("{}", path.display());
                ExitCode::SUCCESS
            })
            .map_err(Into::into),
        Command::Uninstall(places) => uninstall::uninstall(&places)
            .map(|removed| {
                for one in removed {
                    println!("removed {one}");
                }
                ExitCode::SUCCESS
            })
            .map_err(Into::into),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("keelway-agent: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(flags: RunFlags) -> anyhow::Result<ExitCode> {
    // Wrong flags end here, before anything is begun; the worker validates its own copy again.
    let Ok(config) = validated(flags) else {
        return Ok(ExitCode::from(supervisor::EXIT_CONFIG));
    };
    let arguments: Vec<OsString> = std::env::args_os().skip(2).collect();
    Ok(supervisor::run(&config.socket, &arguments)?)
}

fn validated(flags: RunFlags) -> Result<Config, ()> {
    flags
        .validate()
        .map_err(|error| eprintln!("keelway-agent: {error}"))
}

fn work(flags: RunFlags) -> anyhow::Result<ExitCode> {
    let Ok(config) = validated(flags) else {
        return Ok(ExitCode::from(supervisor::EXIT_CONFIG));
    };
    // The supervisor waits for these with the mask that a child inherits.
    SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD])
        .thread_unblock()
        .context("unblock signals")?;
    // A supervisor hands its listening socket over as standard input; by hand there is a terminal, or nothing.
    let inherited =
        nix::sys::socket::getsockopt(&std::io::stdin(), nix::sys::socket::sockopt::AcceptConn);
    let (listener, _lock) = if inherited.is_ok_and(|listening| listening) {
        // Nobody may outlive the supervisor: two agents would undo each other's work.
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
            .context("tie the worker to its supervisor")?;
        if nix::unistd::getppid().as_raw() == 1 && std::process::id() != 1 && !supervised_by_init()
        {
            bail!("the supervisor is gone");
        }
        (
            UnixListener::from(std::io::stdin().as_fd().try_clone_to_owned()?),
            None,
        )
    } else {
        let lock = supervisor::lock(&config.socket)?;
        let listener =
            socket::listen(&config.socket).with_context(|| config.socket.display().to_string())?;
        (listener, Some(lock))
    };

    let (events, inbox) = mpsc::channel();
    let mut worker = Worker::new(config.clone(), events.clone())?;
    let predecessors = std::env::var(supervisor::PREDECESSORS).unwrap_or_default();
    worker.follow(
        Predecessors::parse(&predecessors),
        LastWords::new(&config.state_dir).take(),
    );
    socket::serve(listener, events.clone()).context("serve the agent's socket")?;
    // Nobody's network depends on it: others of the node can watch the cluster by themselves.
    if let Err(error) = share::serve(&config.share, events.clone()) {
        tracing::warn!(socket = %config.share.display(), %error, "the cluster is not shared");
    }
    follow_addresses(events.clone());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let complaints = events.clone();
    worker.serve_health(runtime.handle().clone(), move |complaint| {
        // The loop has ended already when this fails.
        let _ = complaints.send(Event::HealthPort(complaint));
    });
    let feed = Feed {
        events: events.clone(),
        health: worker.health(),
    };
    let measures = worker.measures();
    if let Some(pools) = &config.pools {
        // The loop has not begun, so it is there to hear.
        feed.pools(Ok(pools.clone()));
    }
    if let Source::Api(options) = &config.source {
        let (notes, happenings) = record::notes();
        worker.set_notes(notes);
        runtime.spawn(record::write(
            options.clone(),
            config.node_name.clone(),
            happenings,
        ));
        let (options, identity) = (options.clone(), config.node_name.clone());
        if !config.cluster_ranges.is_empty() {
            runtime.spawn(node_ranges::run(
                options.clone(),
                identity.clone(),
                config.cluster_ranges.clone(),
            ));
        }
        runtime.spawn(service_ranges::follow(options.clone(), feed.clone()));
        runtime.spawn(balancer::run(
            options,
            identity,
            config.pools.clone(),
            feed.clone(),
        ));
    }
    runtime.block_on(async {
        if let Some(address) = config.healthz {
            tokio::spawn(serve_proxy(address, feed.health.clone(), measures));
        }
        if let Some(address) = config.metrics {
            let events = events.clone();
            tokio::spawn(async move {
                // An address that somebody else has is waited for: nobody's traffic depends on metrics.
                let listener = listen("metrics", address).await;
                metrics::serve(listener, events).await;
            });
        }
        if !config.runtimes.is_empty() {
            tokio::spawn(sandboxes::follow(config.runtimes.clone(), events.clone()));
        }
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = events.clone();
        tokio::spawn(async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            // The loop has ended already when this fails.
            let _ = stop.send(Event::Stop);
        });
        tokio::spawn(source::feed(config.source.clone(), feed));
        anyhow::Ok(())
    })?;
    let ended = worker.run(&inbox);
    if let Err(error) = &ended {
        LastWords::new(&config.state_dir).leave(&reason(error));
    }
    // Watches and sockets end with the process; what flows does not depend on them.
    runtime.shutdown_background();
    ended?;
    Ok(ExitCode::SUCCESS)
}

/// Tells the loop whenever the node's addresses or default routes may have changed. What cannot be followed is looked at every 10 s all the same.
fn follow_addresses(events: mpsc::Sender<Event>) {
    let follow = move || -> Result<(), NetlinkError> {
        let news = AddressNews::open()?;
        loop {
            // What came before this was followed is news as well.
            if events.send(Event::AddressesChanged).is_err() {
                return Ok(());
            }
            news.wait()?;
        }
    };
    let followed = std::thread::Builder::new()
        .name("addresses".to_owned())
        .spawn(move || {
            if let Err(error) = follow() {
                tracing::warn!(%error, "addresses are looked at every 10 s only");
            }
        });
    if let Err(error) = followed {
        tracing::warn!(%error, "addresses are looked at every 10 s only");
    }
}

/// Whether the parent with id 1 is a supervisor of ours, as in a container without an init of its own.
fn supervised_by_init() -> bool {
    let same = |a: &str, b: &str| {
        std::fs::read_link(a)
            .ok()
            .is_some_and(|a| std::fs::read_link(b).ok() == Some(a))
    };
    same("/proc/1/exe", "/proc/self/exe")
}
