//! What the command line says, checked once; with a Corefile, what that says.

pub mod corefile;
pub mod files;
mod forwarding;
mod names;
mod plugins;
pub mod spec;

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;
use std::time::Duration;

use cluster_model::watch::ApiOptions;

use crate::cache::CacheRules;
use crate::forward::ForwardRules;
use crate::log::{ErrorRules, LogRule, LogRules};
use crate::name::{BadName, Name};
use crate::server::rates::BYTES_S;
use crate::zone::{Pods, ZoneSettings};
use corefile::SyntaxError;
use files::Files;
pub use plugins::{read_spec, read_spec_of, read_spec_on};
use spec::{
    BlockSpec, ClusterSpec, DNS_PORT, ResolvConfError, RouteSpec, ServerSpec, Spec, everywhere,
    nameservers,
};

const HEALTH_PORT: u16 = 8181;

/// Serve the cluster's names.
#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Address to serve on, UDP and TCP; every address and the Corefile's port (53) by default.
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// Address for /healthz, /readyz, /metrics and /explain, beside those that a Corefile names; every address and port 8181 by default.
    #[arg(long)]
    health: Option<SocketAddr>,
    /// Corefile to serve by, read again when it changes. Without one, the flags below say what is done.
    #[arg(long, env = "KEELWAY_DNS_CONFIG", conflicts_with_all = ["domains", "upstreams", "stubs", "ttl", "pods", "log", "no_cache"])]
    config: Option<PathBuf>,
    /// Domain of the cluster; may be repeated.
    #[arg(long = "domain", default_value = "cluster.local")]
    domains: Vec<String>,
    /// Server for names outside the cluster, as ADDRESS, ADDRESS:PORT or a resolv.conf; may be repeated. Without one such names are refused.
    #[arg(long = "upstream")]
    upstreams: Vec<String>,
    /// Servers for the names of a domain, as DOMAIN=ADDRESS[,ADDRESS]; may be repeated.
    #[arg(long = "stub")]
    stubs: Vec<String>,
    /// Kubeconfig file; without one, the pod's ServiceAccount.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// URL of the API server, in place of the one that the kubeconfig or the environment names.
    #[arg(long)]
    api_server: Option<String>,
    /// Follow this file (what `kubectl get services,endpointslices,pods -A -o json` prints) in place of an API server.
    #[arg(long, conflicts_with_all = ["kubeconfig", "api_server"])]
    snapshot: Option<PathBuf>,
    /// Socket of the node's agent, which is listened to in place of an API server while it is there; empty for none.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/run/keelway/cluster/watch.sock"
    )]
    agent: String,
    /// Time to live of the cluster's records, in seconds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=3600))]
    ttl: u32,
    /// What is told of pods by their addresses: disabled, insecure or verified.
    #[arg(long, default_value = "disabled", value_parser = pods)]
    pods: Pods,
    /// Log every query.
    #[arg(long)]
    log: bool,
    /// Keep no answers of others.
    #[arg(long)]
    no_cache: bool,
    /// Bytes per second by which a client's answers by UDP may be longer than its questions; what is beyond is truncated, so that the
    /// client asks by TCP, where addresses can't be forged. 0 for no limit.
    #[arg(long, value_name = "BYTES", default_value_t = BYTES_S)]
    amplification: u32,
    /// UDP threads; one per CPU by default.
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Seconds to go on serving after SIGTERM, while /readyz says no; 5 by default, or what a Corefile says.
    #[arg(long)]
    lameduck: Option<u64>,
}

/// A server's settings that hold for its life.
#[derive(Debug)]
pub struct Config {
    pub listen: SocketAddr,
    pub http: Vec<SocketAddr>,
    pub source: Source,
    pub threads: usize,
    /// Bytes per second by which a client's answers may be longer than its questions; 0 for no limit.
    pub amplified_s: u32,
    pub lameduck: Duration,
    /// Where `spec` came from, to be read again.
    pub file: Option<PathBuf>,
    /// What it was read from.
    pub files: Files,
    pub spec: Spec,
}

/// Where the cluster is learnt from.
#[derive(Clone, Debug)]
pub enum Source {
    Api {
        options: ApiOptions,
        /// The socket of the agent that is listened to in its place.
        agent: Option<PathBuf>,
    },
    File(PathBuf),
}

/// Why a server can't be configured.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("--domain: {0}")]
    Domain(#[from] BadName),
    #[error("--upstream {0:?} is not ADDRESS, ADDRESS:PORT or a path")]
    Upstream(String),
    #[error("--stub {0:?} is not DOMAIN=ADDRESS[,ADDRESS]")]
    Stub(String),
    #[error("--upstream: {0}")]
    ResolvConf(#[from] ResolvConfError),
    #[error(transparent)]
    Corefile(#[from] SyntaxError),
}

impl TryFrom<Flags> for Config {
    type Error = ConfigError;

    fn try_from(flags: Flags) -> Result<Self, ConfigError> {
        let cpus = || available_parallelism().map_or(1, NonZeroUsize::get);
        let mut files = Files::default();
        let spec = match &flags.config {
            Some(file) => read_spec_of(file, &mut files)?,
            None => spec_of(&flags, &mut files)?,
        };
        let port = spec.port.unwrap_or(DNS_PORT);
        let health = flags.health.unwrap_or_else(|| everywhere(HEALTH_PORT));
        let mut http = vec![health];
        // What listens everywhere has the port alone.
        let other = |address: &&SocketAddr| {
            address.port() != health.port()
                || (address.ip() != health.ip() && !health.ip().is_unspecified())
        };
        http.extend(spec.http.iter().filter(other));
        let lameduck = flags.lameduck.map(Duration::from_secs).or(spec.lameduck);
        let api = Source::Api {
            options: ApiOptions {
                kubeconfig: flags.kubeconfig,
                api_server: flags.api_server,
            },
            agent: Some(flags.agent)
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
        };
        Ok(Self {
            listen: flags.listen.unwrap_or_else(|| everywhere(port)),
            http,
            source: flags.snapshot.map_or(api, Source::File),
            threads: flags.threads.map_or_else(cpus, NonZeroUsize::get),
            amplified_s: flags.amplification,
            lameduck: lameduck.unwrap_or(Duration::from_secs(5)),
            file: flags.config,
            files,
            spec,
        })
    }
}

/// What the flags say, as a Corefile would.
fn spec_of(flags: &Flags, files: &mut Files) -> Result<Spec, ConfigError> {
    let origins: Vec<Name> = flags
        .domains
        .iter()
        .map(|domain| Name::parse(domain))
        .collect::<Result<_, _>>()?;
    let mut zone = ZoneSettings::of(origins[0].clone());
    zone.origins = origins;
    zone.pods = flags.pods;
    let mut block = BlockSpec::of(vec![Name::root()]);
    block.cluster = Some(ClusterSpec {
        ttl_s: flags.ttl,
        fallthrough: zone.reverse.clone(),
        transfer: Vec::new(),
    });
    block.log = LogRules {
        queries: flags.log.then(LogRule::all).into_iter().collect(),
        errors: Some(ErrorRules::default()),
    };
    block.cache = (!flags.no_cache).then(CacheRules::default);
    let mut servers = Vec::new();
    for text in &flags.upstreams {
        if text.starts_with('/') {
            match nameservers(Path::new(text), files) {
                Ok(found) => servers.extend(found),
                // A node without a name server has a cluster all the same.
                Err(error @ ResolvConfError::NoServer(_)) => {
                    tracing::warn!(%error, "names outside the cluster are refused, unless another upstream is named");
                }
                Err(error) => return Err(error.into()),
            }
        } else {
            servers.push(server_address(text).ok_or_else(|| ConfigError::Upstream(text.clone()))?);
        }
    }
    // Some may be named twice, by address and by a file.
    let mut seen = HashSet::new();
    servers.retain(|server| seen.insert(*server));
    if !servers.is_empty() {
        block.routes.push(route(Name::root(), servers));
    }
    for text in &flags.stubs {
        let bad = || ConfigError::Stub(text.clone());
        let (domain, list) = text.split_once('=').ok_or_else(bad)?;
        let servers = list
            .split(',')
            .map(server_address)
            .collect::<Option<Vec<_>>>();
        let zone = Name::parse(domain).map_err(|_| bad())?;
        block.routes.push(route(zone, servers.ok_or_else(bad)?));
    }
    Ok(Spec {
        zone,
        blocks: vec![block],
        port: None,
        http: Vec::new(),
        lameduck: None,
        warnings: Vec::new(),
    })
}

fn route(zone: Name, servers: Vec<SocketAddr>) -> RouteSpec {
    let plain = |address| ServerSpec { address, tls: None };
    RouteSpec {
        zone,
        except: Vec::new(),
        servers: servers.into_iter().map(plain).collect(),
        rules: ForwardRules::default(),
    }
}

fn server_address(text: &str) -> Option<SocketAddr> {
    let bare = || {
        text.parse::<IpAddr>()
            .map(|address| (address, DNS_PORT).into())
    };
    text.parse().or_else(|_| bare()).ok()
}

fn pods(text: &str) -> Result<Pods, String> {
    match text {
        "disabled" => Ok(Pods::Disabled),
        "insecure" => Ok(Pods::Insecure),
        "verified" => Ok(Pods::Verified),
        _ => Err("is not disabled, insecure or verified".into()),
    }
}
