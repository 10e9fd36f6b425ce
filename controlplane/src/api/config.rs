//! What the API server is told at start.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ipnetwork::IpNetwork;
use tokio::runtime::Handle;

/// The issuer and the default audience of ServiceAccount tokens.
pub const TOKEN_ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// Node ports are given out of this range, as upstream's default.
pub const NODE_PORTS: std::ops::RangeInclusive<u16> = 30000..=32767;

/// Bodies larger than this are refused with 413, as upstream.
pub const BODY_BYTES_MAX: usize = 3 << 20;

/// The validated settings of the API server.
#[derive(Debug, Clone)]
pub struct Config {
    pub bind: SocketAddr,
    /// Where the file names of docs/ARCHITECTURE.md are found: `ca.crt`, `apiserver.crt`, `sa.key` and so on.
    pub pki_dir: PathBuf,
    /// The address that `default/kubernetes` leads to.
    pub advertise_address: IpAddr,
    /// The port at that address.
    pub advertise_port: u16,
    /// Ranges of Service addresses: one, or one of each family, the primary family's first.
    pub service_cidrs: Vec<IpNetwork>,
    pub authorization: Authorization,
    /// Requests that are worked on at a time, of all callers but administrators.
    pub requests_max: usize,
    /// The runtime whose threads do writes, and nothing else.
    pub write_threads: Handle,
    pub audit: Option<AuditFiles>,
    /// Proxies that say whom they speak for; none, unless they are known.
    pub front_proxies: Option<super::FrontProxyConfig>,
}

/// Where the audit log is, and what goes into it.
#[derive(Debug, Clone)]
pub struct AuditFiles {
    pub policy: PathBuf,
    pub log: PathBuf,
    /// A log that has grown beyond this is put aside.
    pub bytes_max: u64,
    /// How many are kept aside.
    pub kept: usize,
}

/// How it is decided what an authenticated caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authorization {
    /// By the Node authorizer, then by RBAC.
    Rules,
    /// Everybody may do everything.
    AlwaysAllow,
}

impl Config {
    /// The ClusterIP of `default/kubernetes`: the first address of the first range.
    pub fn kubernetes_ip(&self) -> Option<IpAddr> {
        self.service_cidrs.first()?.iter().nth(1)
    }
}
