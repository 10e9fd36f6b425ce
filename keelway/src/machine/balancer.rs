//! Where a node reaches the API servers (`keelway balance`, a hidden subcommand and service of each node): connections to a port of its
//! loopback are carried to one of the servers that live, so that kubelet and agent need to know one address only.
//!
//! Which servers there are, `default/kubernetes` says; what it said last is remembered over restarts.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Endpoints;
use kube::config::{AuthInfo, Config};
use kube::{Api, Client};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::net::{TcpListener, TcpStream};

use super::known_authorities;
use crate::forward::accepted;
use crate::node::{BIN_DIR, ServiceSpec};
use crate::up::specs;

/// A server that does not accept within this is passed over.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long what is sent may stay without an answer: a machine that was cut off resets nothing.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// How often it is asked which servers there are.
const LEARN_PERIOD: Duration = Duration::from_secs(10);
const LEARN_TIMEOUT: Duration = Duration::from_secs(5);
/// More than this many servers are not remembered.
const SERVERS_MAX: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum BalancerError {
    #[error("cannot listen at {address}: {source}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("no API server is given (--server)")]
    NoServer,
}

#[derive(Debug, Clone, clap::Args)]
pub struct BalanceArguments {
    /// Where clients of this node connect to
    #[arg(long)]
    listen: SocketAddr,
    /// An API server to begin with
    #[arg(long = "server")]
    servers: Vec<SocketAddr>,
    /// The file that servers are remembered in
    #[arg(long)]
    remember: PathBuf,
    /// The cluster's authority
    #[arg(long)]
    ca: PathBuf,
    /// The node's certificate with its key, once there is one
    #[arg(long)]
    certificate: PathBuf,
}

/// The balancer as a service of a node: its flags say what a node of any kind has.
pub fn service(listen: SocketAddr, servers: &[SocketAddr], certificate: &str) -> ServiceSpec {
    let program = Path::new(BIN_DIR).join("keelway");
    let mut service = specs::service("balancer", &program, &[]);
    service.argv.push("balance".to_owned());
    service.argv.push(format!("--listen={listen}"));
    let servers = servers.iter();
    service
        .argv
        .extend(servers.map(|server| format!("--server={server}")));
    service.argv.extend([
        "--remember=/var/lib/keelway/api-servers".to_owned(),
        "--ca=/etc/keelway/ca.crt".to_owned(),
        format!("--certificate={certificate}"),
    ]);
    service
}

/// The servers, the one that answered last first.
#[derive(Debug, Clone)]
struct Servers(Arc<Mutex<Vec<SocketAddr>>>);

impl Servers {
    fn all(&self) -> Vec<SocketAddr> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn prefer(&self, server: SocketAddr) {
        let mut servers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = servers.iter().position(|known| *known == server) {
            servers[..=at].rotate_right(1);
        }
    }

    /// Takes over what there is now, in the order that is known; false when nothing is new.
    fn replace(&self, now: &[SocketAddr]) -> bool {
        let mut servers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = servers.clone();
        servers.retain(|server| now.contains(server));
        for server in now {
            if !servers.contains(server) {
                servers.push(*server);
            }
        }
        *servers != before
    }
}

/// Carries connections for ever.
///
/// # Errors
/// When it cannot listen, or knows no server.
pub async fn run(arguments: &BalanceArguments) -> Result<(), BalancerError> {
    let mut servers = remembered(&arguments.remember);
    for server in &arguments.servers {
        if !servers.contains(server) {
            servers.push(*server);
        }
    }
    if servers.is_empty() {
        return Err(BalancerError::NoServer);
    }
    let servers = Servers(Arc::new(Mutex::new(servers)));
    let listener = TcpListener::bind(arguments.listen).await;
    let listener = listener.map_err(|source| BalancerError::Listen {
        address: arguments.listen,
        source,
    })?;
    tokio::join!(
        accept(&listener, &servers),
        learn(arguments, servers.clone())
    );
    Ok(())
}

async fn accept(listener: &TcpListener, servers: &Servers) {
    loop {
        let (client, _) = accepted(listener, "balancer").await;
        tokio::spawn(carry(client, servers.clone()));
    }
}

async fn carry(mut client: TcpStream, servers: Servers) {
    for server in servers.all() {
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(server)).await;
        let Ok(Ok(mut stream)) = connected else {
            continue;
        };
        servers.prefer(server);
        let _ = client.set_nodelay(true);
        let _ = stream.set_nodelay(true);
        let silence_ms = u32::try_from(SILENCE_MAX.as_millis()).unwrap_or(u32::MAX);
        // Without these, a connection to a machine that is gone ends later, not wrongly.
        let _ = setsockopt(&stream, sockopt::TcpUserTimeout, &silence_ms);
        let _ = setsockopt(&stream, sockopt::KeepAlive, &true);
        let _ = setsockopt(&stream, sockopt::TcpKeepIdle, &5);
        let _ = setsockopt(&stream, sockopt::TcpKeepInterval, &5);
        let _ = tokio::io::copy_bidirectional(&mut client, &mut stream).await;
        return;
    }
}

async fn learn(arguments: &BalanceArguments, servers: Servers) {
    loop {
        // Before the node has a certificate there is nobody to ask as.
        if arguments.certificate.exists() {
            let asked = tokio::time::timeout(LEARN_TIMEOUT, ask(arguments)).await;
            if let Ok(Ok(found)) = asked
                && !found.is_empty()
                && found.len() <= SERVERS_MAX
                && servers.replace(&found)
            {
                remember(&arguments.remember, &servers.all());
            }
        }
        tokio::time::sleep(LEARN_PERIOD).await;
    }
}

async fn ask(arguments: &BalanceArguments) -> anyhow::Result<Vec<SocketAddr>> {
    let mut config = Config::new(format!("https://{}", arguments.listen).parse()?);
    config.proxy_url = None;
    let ca = known_authorities(&arguments.certificate, arguments.ca.clone());
    let all = CertificateDer::pem_file_iter(ca)?;
    let all = all.map(|certificate| Ok(certificate?.to_vec()));
    config.root_cert = Some(all.collect::<anyhow::Result<_>>()?);
    let certificate = arguments.certificate.display().to_string();
    config.auth_info = AuthInfo {
        client_certificate: Some(certificate.clone()),
        client_key: Some(certificate),
        ..AuthInfo::default()
    };
    let api: Api<Endpoints> = Api::namespaced(Client::try_from(config)?, "default");
    Ok(addresses(&api.get("kubernetes").await?))
}

/// Where API servers are, as `default/kubernetes` says, in order.
pub fn addresses(endpoints: &Endpoints) -> Vec<SocketAddr> {
    let subsets = endpoints.subsets.iter().flatten();
    let mut found: Vec<SocketAddr> = subsets
        .flat_map(|subset| {
            let ports = subset.ports.iter().flatten();
            let port = ports.map(|port| port.port).next().unwrap_or_default();
            let port = u16::try_from(port).unwrap_or_default();
            let addresses = subset.addresses.iter().flatten();
            addresses
                .filter_map(move |address| Some(SocketAddr::new(address.ip.parse().ok()?, port)))
        })
        .collect();
    found.sort();
    found.dedup();
    found
}

fn remembered(path: &Path) -> Vec<SocketAddr> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let servers = text.lines().filter_map(|line| line.trim().parse().ok());
    servers.take(SERVERS_MAX).collect()
}

/// What is not remembered is learned again, as long as one of those known lives.
fn remember(path: &Path, servers: &[SocketAddr]) {
    let new = path.with_extension("new");
    let text: String = servers.iter().map(|server| format!("{server}\n")).collect();
    let written = fs::write(&new, text).and_then(|()| fs::rename(&new, path));
    if let Err(error) = written {
        eprintln!("cannot write {}: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn servers_keep_their_order_and_the_last_good_one_comes_first() {
        let (a, b, c) = (at("10.0.0.1:1"), at("10.0.0.2:1"), at("10.0.0.3:1"));
        let servers = Servers(Arc::new(Mutex::new(vec![a, b])));
        servers.prefer(b);
        assert_eq!(servers.all(), [b, a]);
        assert!(servers.replace(&[a, b, c]));
        assert_eq!(servers.all(), [b, a, c]);
        assert!(!servers.replace(&[a, b, c]));
        assert!(servers.replace(&[a, c]));
        assert_eq!(servers.all(), [a, c]);
    }

    #[test]
    fn servers_are_remembered() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("servers");
        assert!(remembered(&path).is_empty());
        let servers = [at("10.0.0.1:6443"), at("[fd00::1]:6443")];
        remember(&path, &servers);
        assert_eq!(remembered(&path), servers);
    }

    #[tokio::test]
    async fn a_server_that_is_gone_is_passed_over() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let server = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let alive = server.local_addr().expect("an address");
        let gone = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let dead = gone.local_addr().expect("an address");
        drop(gone);
        let servers = Servers(Arc::new(Mutex::new(vec![dead, alive])));
        let front = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = front.local_addr().expect("an address");
        let talk = async {
            let mut client = TcpStream::connect(address).await.expect("connected");
            client.write_all(b"hello").await.expect("sent");
            let mut answer = [0; 5];
            client.read_exact(&mut answer).await.expect("answered");
            answer
        };
        let echo = async {
            let (mut stream, _) = server.accept().await.expect("accepted");
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        };
        let carried = accept(&front, &servers);
        tokio::select! {
            answer = talk => assert_eq!(&answer, b"hello"),
            () = carried => {}
            () = echo => panic!("the client was not carried"),
        }
        assert_eq!(servers.all(), [alive, dead]);
    }
}
