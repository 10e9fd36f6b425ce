//! `keelway-controlplane`: flags become a configuration, and the parts that were asked for run until a signal.

mod certs;
mod front_proxies;
mod maintenance;
mod members;
mod state;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use ipnetwork::IpNetwork;
use keelway_controlplane::{api, controllers, pki, scheduler, sys};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The Kubernetes control plane of Keelway: API server with its store, controllers, scheduler.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "`store --help` tells how a state is backed up, restored and moved, `certs --help` how certificates are renewed."
)]
struct Flags {
    #[command(flatten)]
    state: state::StateFlags,
    /// Where certificates and keys are: ca.crt, apiserver.crt and .key, sa.key and .pub, controllers.kubeconfig,
    /// scheduler.kubeconfig, ...
    #[arg(long, value_name = "DIR", default_value = "/etc/keelway")]
    pki_dir: PathBuf,
    /// The address that the API server listens at, beside sockets passed by LISTEN_FDS.
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:6443")]
    bind: SocketAddr,
    /// The address at which the cluster reaches the API server.
    #[arg(long, value_name = "IP")]
    advertise_address: IpAddr,
    /// The range of Service addresses; with two, one of each family, the first is the primary one.
    #[arg(
        long,
        value_name = "CIDR[,CIDR]",
        value_delimiter = ',',
        default_value = "10.96.0.0/16"
    )]
    service_cidr: Vec<IpNetwork>,
    /// The range of pod addresses; with two, one of each family, every node gets a part of both.
    #[arg(
        long,
        value_name = "CIDR[,CIDR]",
        value_delimiter = ',',
        default_value = "10.244.0.0/16"
    )]
    cluster_cidr: Vec<IpNetwork>,
    /// Which parts run in this process.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "api,controllers,scheduler"
    )]
    components: Vec<Component>,
    /// What authenticated callers may do: what the Node authorizer and RBAC allow, or everything.
    #[arg(long, value_name = "MODE", default_value = "rules")]
    authorization: AuthorizationMode,
    /// Requests that are worked on at a time, of all callers but administrators; others wait their turn.
    #[arg(long, value_name = "NUMBER", default_value_t = 600)]
    max_requests_inflight: usize,
    /// Which requests go into the audit log: a Policy of audit.k8s.io/v1.
    #[arg(long, value_name = "FILE", requires = "audit_log_path")]
    audit_policy_file: Option<PathBuf>,
    /// The audit log.
    #[arg(long, value_name = "FILE", requires = "audit_policy_file")]
    audit_log_path: Option<PathBuf>,
    /// Megabytes after which the audit log is put aside and begun anew.
    #[arg(long, value_name = "MB", default_value_t = 100)]
    audit_log_maxsize: u64,
    /// How many audit logs are kept aside.
    #[arg(long, value_name = "NUMBER", default_value_t = 10)]
    audit_log_maxbackup: usize,
    #[command(flatten)]
    front_proxies: front_proxies::FrontProxyFlags,
}

/// After so many tasks it is looked what has come from the network. A part of a list is many times the work that tokio's own figure
/// (61) is made for: what comes meanwhile would not even be seen.
const EVENT_INTERVAL: u32 = 4;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AuthorizationMode {
    Rules,
    AlwaysAllow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Component {
    Api,
    Controllers,
    Scheduler,
}

fn main() -> Result<()> {
    // Before the runtime opens descriptors of its own.
    let passed = sys::passed_listeners().context("taking over the sockets of LISTEN_FDS")?;
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .event_interval(EVENT_INTERVAL)
        .enable_all()
        .build()?;
    if std::env::args().nth(1).as_deref() == Some("store") {
        let arguments = std::env::args_os().skip(1);
        return runtime.block_on(maintenance::StoreCli::parse_from(arguments).run());
    }
    if std::env::args().nth(1).as_deref() == Some("certs") {
        return certs::CertsCli::parse_from(std::env::args_os().skip(1)).run();
    }
    let flags = Flags::parse();
    if let Err(error) = sys::raise_descriptor_limit() {
        tracing::warn!(%error, "the limit of open files stays low");
    }
    check_ranges("--service-cidr", &flags.service_cidr, (28, 64..=124))?;
    check_ranges("--cluster-cidr", &flags.cluster_cidr, (24, 48..=64))?;
    ensure!(
        flags.advertise_address.is_ipv4() == flags.service_cidr[0].is_ipv4(),
        "--advertise-address {} is not of the family of the first --service-cidr {}",
        flags.advertise_address,
        flags.service_cidr[0]
    );
    let write_threads = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(write_threads())
        .thread_name("writes")
        .enable_all()
        .build()?;
    runtime.block_on(run(flags, passed, write_threads.handle()))
}

/// How many threads do writes: for half of the processors, so that reads find another one.
fn write_threads() -> usize {
    let processors = std::thread::available_parallelism();
    (processors.map_or(1, std::num::NonZero::get) / 2).max(1)
}

/// One range, or one of each family, of prefixes that make sense: at most so long with IPv4, so long with IPv6.
fn check_ranges(
    flag: &str,
    ranges: &[IpNetwork],
    (v4, v6): (u8, std::ops::RangeInclusive<u8>),
) -> Result<()> {
    let families = ranges.iter().filter(|range| range.is_ipv4()).count();
    ensure!(
        matches!((ranges.len(), families), (1, _) | (2, 1)),
        "{flag} takes one range, or one of each family"
    );
    for range in ranges {
        ensure!(
            range.ip() == range.network(),
            "{flag} {range} has bits set behind its prefix; the range is {}/{}",
            range.network(),
            range.prefix()
        );
        let fits = match range {
            IpNetwork::V4(range) => (1..=v4).contains(&range.prefix()),
            IpNetwork::V6(range) => v6.contains(&range.prefix()),
        };
        ensure!(
            fits,
            "{flag} {range}: its prefix is to be at most /{v4} with IPv4, /{} to /{} with IPv6",
            v6.start(),
            v6.end()
        );
    }
    Ok(())
}

async fn run(
    flags: Flags,
    passed: Vec<std::net::TcpListener>,
    write_threads: &Handle,
) -> Result<()> {
    // The API server goes on until its own clients have ended: they give their leases back by it.
    let (stop, last) = (CancellationToken::new(), CancellationToken::new());
    tokio::spawn(stop_on_signal(stop.clone())?);
    let mut parts = tokio::task::JoinSet::new();
    pki::finish(&flags.pki_dir);
    if flags.components.contains(&Component::Api) {
        let (server, listeners) = start_api(&flags, passed, write_threads, &last).await?;
        parts.spawn(async move { server.serve(listeners).await.context("the API server") });
    }
    tokio::spawn(pki::keep(flags.pki_dir.clone()));
    // Both are clients of the API like any other, and wait until it answers.
    let identity = SocketAddr::new(flags.advertise_address, flags.bind.port()).to_string();
    let mut clients = tokio::task::JoinSet::new();
    if flags.components.contains(&Component::Controllers) {
        let config = controllers::Config {
            kubeconfig: flags.pki_dir.join("controllers.kubeconfig"),
            ca_file: flags.pki_dir.join("ca.crt"),
            ca_key_file: flags.pki_dir.join("ca.key"),
            cluster_cidrs: flags.cluster_cidr,
            identity: identity.clone(),
        };
        let stop = stop.clone();
        clients.spawn(async move {
            let ended = controllers::run(config, stop).await;
            ended.context("the controllers")
        });
    }
    if flags.components.contains(&Component::Scheduler) {
        let config = scheduler::Config {
            kubeconfig: flags.pki_dir.join("scheduler.kubeconfig"),
            identity,
        };
        let stop = stop.clone();
        clients.spawn(async move {
            let ended = scheduler::run(config, stop).await;
            ended.context("the scheduler")
        });
    }
    let told = stop.clone();
    parts.spawn(async move {
        let mut outcome = Ok(());
        while let Some(ended) = clients.join_next().await {
            outcome = outcome.and(ended.context("it panicked").and_then(|outcome| outcome));
            if outcome.is_err() {
                break;
            }
        }
        if outcome.is_ok() {
            // Where there are none, and when they ended as they were told.
            told.cancelled().await;
        }
        last.cancel();
        outcome
    });
    while let Some(ended) = parts.join_next().await {
        let outcome = ended
            .context("a part of the control plane panicked")
            .and_then(|outcome| outcome);
        if !stop.is_cancelled() {
            stop.cancel();
            outcome?;
            anyhow::bail!("a part of the control plane ended by itself");
        }
        outcome?;
    }
    Ok(())
}

async fn start_api(
    flags: &Flags,
    passed: Vec<std::net::TcpListener>,
    write_threads: &Handle,
    stop: &CancellationToken,
) -> Result<(Arc<api::Api>, Vec<TcpListener>)> {
    let store = flags.state.open().await?;
    let bound = TcpListener::bind(flags.bind)
        .await
        .with_context(|| format!("listening at {}", flags.bind))?;
    let config = api::Config {
        bind: flags.bind,
        pki_dir: flags.pki_dir.clone(),
        advertise_address: flags.advertise_address,
        advertise_port: bound.local_addr()?.port(),
        service_cidrs: flags.service_cidr.clone(),
        authorization: match flags.authorization {
            AuthorizationMode::Rules => api::Authorization::Rules,
            AuthorizationMode::AlwaysAllow => api::Authorization::AlwaysAllow,
        },
        requests_max: flags.max_requests_inflight,
        write_threads: write_threads.clone(),
        front_proxies: flags.front_proxies.config()?,
        audit: flags
            .audit_policy_file
            .clone()
            .zip(flags.audit_log_path.clone())
            .map(|(policy, log)| api::AuditFiles {
                policy,
                log,
                bytes_max: flags.audit_log_maxsize << 20,
                kept: flags.audit_log_maxbackup,
            }),
    };
    let server = api::Api::start(config, store, stop.clone()).await?;
    tracing::info!(address = %bound.local_addr()?, passed = passed.len(), "the API server listens");
    let mut listeners = vec![bound];
    for listener in passed {
        listeners.push(TcpListener::from_std(listener).context("using a socket of LISTEN_FDS")?);
    }
    Ok((server, listeners))
}

/// Waits for SIGTERM or SIGINT, then fires the token.
fn stop_on_signal(stop: CancellationToken) -> Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        stop.cancel();
    })
}
