//! What a configuration says, as plain data: the outcome of reading a Corefile or the command line.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnetwork::IpNetwork;

use super::files::Files;
use crate::cache::CacheRules;
use crate::forward::ForwardRules;
use crate::hosts::Hosts;
use crate::log::LogRules;
use crate::name::{Name, in_any_or_all};
use crate::rewrite::Rewrite;
use crate::zone::ZoneSettings;

/// A whole configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// How the cluster's zone is made; whether it is served, a block says.
    pub zone: ZoneSettings,
    pub blocks: Vec<BlockSpec>,
    /// The port that all blocks share, if they name one.
    pub port: Option<u16>,
    /// Addresses for health, readiness and metrics that the configuration names.
    pub http: Vec<SocketAddr>,
    pub lameduck: Option<Duration>,
    /// What it says that is not done, where that changes no answer.
    pub warnings: Vec<String>,
}

/// What is done for the names of some zones.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSpec {
    /// Names in these zones; never empty.
    pub zones: Vec<Name>,
    pub cluster: Option<ClusterSpec>,
    pub hosts: Option<Hosts>,
    pub rewrites: Vec<Rewrite>,
    pub autopath: Option<AutopathSpec>,
    pub routes: Vec<RouteSpec>,
    pub cache: Option<CacheRules>,
    pub log: LogRules,
    /// The server's bound on UDP answers.
    pub udp_bytes_max: usize,
}

/// How the search path is followed for clients.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AutopathSpec {
    /// For names of these zones; of all, where none is named.
    pub zones: Vec<Name>,
    /// The domains after the cluster's own.
    pub search: Vec<Name>,
}

impl AutopathSpec {
    /// Whether it is done for a name in lower-case wire format.
    pub fn is_about(&self, name: &[u8]) -> bool {
        in_any_or_all(name, &self.zones)
    }
}

/// How the cluster's names are served.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterSpec {
    pub ttl_s: u32,
    pub fallthrough: Vec<Name>,
    /// Who may have the whole zone.
    pub transfer: Vec<IpNetwork>,
}

/// Where names of a zone are asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteSpec {
    pub zone: Name,
    pub except: Vec<Name>,
    pub servers: Vec<ServerSpec>,
    pub rules: ForwardRules,
}

/// An upstream server.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerSpec {
    pub address: SocketAddr,
    pub tls: Option<TlsSpec>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsSpec {
    pub name: String,
    pub authorities: Option<PathBuf>,
    /// Certificate and key of our own.
    pub own: Option<(PathBuf, PathBuf)>,
}

impl BlockSpec {
    /// A block that does nothing for its zones yet.
    pub fn of(zones: Vec<Name>) -> Self {
        Self {
            zones,
            cluster: None,
            hosts: None,
            rewrites: Vec::new(),
            autopath: None,
            routes: Vec::new(),
            cache: None,
            log: LogRules::default(),
            udp_bytes_max: UDP_BYTES_MAX,
        }
    }
}

/// Bound on UDP answers (DNS flag day 2020).
pub const UDP_BYTES_MAX: usize = 1232;
pub const DNS_PORT: u16 = 53;
pub const TLS_PORT: u16 = 853;

/// Why the system's resolver configuration does not help.
#[derive(Debug, thiserror::Error)]
pub enum ResolvConfError {
    #[error("{}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{} names no server", .0.display())]
    NoServer(PathBuf),
}

/// The name servers of a resolv.conf.
pub fn nameservers(path: &Path, files: &mut Files) -> Result<Vec<SocketAddr>, ResolvConfError> {
    let text = text(path, files)?;
    let servers: Vec<SocketAddr> = words_after(&text, "nameserver")
        .filter_map(|word| word.split('%').next()?.parse::<IpAddr>().ok())
        .map(|address| (address, DNS_PORT).into())
        .collect();
    if servers.is_empty() {
        return Err(ResolvConfError::NoServer(path.into()));
    }
    Ok(servers)
}

/// The search domains of a resolv.conf.
pub fn search_domains(path: &Path, files: &mut Files) -> Result<Vec<Name>, ResolvConfError> {
    let text = text(path, files)?;
    // The last line of several counts (resolv.conf(5)).
    let lines = text.lines().rev();
    let mut searches = lines.map(|line| words_after(line, "search").collect::<Vec<_>>());
    let last = searches.find(|words| !words.is_empty());
    let names = last.into_iter().flatten();
    Ok(names.filter_map(|word| Name::parse(word).ok()).collect())
}

fn text(path: &Path, files: &mut Files) -> Result<String, ResolvConfError> {
    files.text(path).map_err(|source| ResolvConfError::Read {
        path: path.into(),
        source,
    })
}

fn words_after<'t>(text: &'t str, keyword: &str) -> impl Iterator<Item = &'t str> {
    text.lines()
        .map(str::split_whitespace)
        .filter_map(move |mut words| (words.next()? == keyword).then_some(words))
        .flatten()
}

/// Every address of this machine, of both families where the kernel has both.
pub fn everywhere(port: u16) -> SocketAddr {
    let both = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok();
    match both {
        true => (Ipv6Addr::UNSPECIFIED, port).into(),
        false => (Ipv4Addr::UNSPECIFIED, port).into(),
    }
}
