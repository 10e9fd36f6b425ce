//! What the command line says, checked once.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::thread::available_parallelism;
use std::time::Duration;

use cluster_model::watch::ApiOptions;

use crate::name::{BadName, Name};

/// Serve the cluster's names.
#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Address to serve on, UDP and TCP.
    #[arg(long, default_value = "0.0.0.0:53")]
    listen: SocketAddr,
    /// Address for /healthz, /readyz and /metrics.
    #[arg(long, default_value = "0.0.0.0:8181")]
    health: SocketAddr,
    /// Domain of the cluster.
    #[arg(long, default_value = "cluster.local")]
    domain: String,
    /// Server for names outside the cluster, as ADDRESS or ADDRESS:PORT; may be repeated. Without one such names are refused.
    #[arg(long = "upstream", value_parser = server_address)]
    upstreams: Vec<SocketAddr>,
    /// Kubeconfig file; without one, the pod's ServiceAccount.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// URL of the API server, in place of the one that the kubeconfig or the environment names.
    #[arg(long)]
    api_server: Option<String>,
    /// Time to live of every record, in seconds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=3600))]
    ttl: u32,
    /// UDP threads; one per CPU by default.
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Seconds to go on serving after SIGTERM, while /readyz says no.
    #[arg(long, default_value_t = 5)]
    lameduck: u64,
}

/// A server's settings.
#[derive(Debug)]
pub struct Config {
    pub listen: SocketAddr,
    pub health: SocketAddr,
    pub domain: Name,
    pub upstreams: Vec<SocketAddr>,
    pub api: ApiOptions,
    pub ttl_s: u32,
    pub threads: usize,
    pub lameduck: Duration,
}

impl TryFrom<Flags> for Config {
    type Error = BadName;

    fn try_from(flags: Flags) -> Result<Self, BadName> {
        let cpus = || available_parallelism().map_or(1, NonZeroUsize::get);
        Ok(Self {
            listen: flags.listen,
            health: flags.health,
            domain: Name::parse(&flags.domain)?,
            upstreams: flags.upstreams,
            api: ApiOptions {
                kubeconfig: flags.kubeconfig,
                api_server: flags.api_server,
            },
            ttl_s: flags.ttl,
            threads: flags.threads.map_or_else(cpus, NonZeroUsize::get),
            lameduck: Duration::from_secs(flags.lameduck),
        })
    }
}

fn server_address(text: &str) -> Result<SocketAddr, String> {
    const DNS_PORT: u16 = 53;
    let bare = || {
        text.parse::<IpAddr>()
            .map(|address| (address, DNS_PORT).into())
    };
    text.parse()
        .or_else(|_| bare())
        .map_err(|_| "is not ADDRESS or ADDRESS:PORT".into())
}
