//! The forwarder: the one process of a cluster that opens connections of the machine's own.
//!
//! It is a service of the control plane's node and listens there, so the machine gets no address and no route. Then it
//! moves into the network and mount namespaces that `up` was started in: what it connects to, and how names are resolved, is
//! as for any program of the machine. Nothing is connected to unless the cluster asks.

mod egress;
mod gateway;
pub(crate) mod names;
mod proxy;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use ipnetwork::IpNetwork;
use nix::sched::{CloneFlags, setns};
use tokio::net::{TcpListener, TcpStream};

use crate::sys;

pub use gateway::{GatewayError, NFT};
pub use names::{NAME_SERVERS, NameError};
pub use proxy::Proxy;

use gateway::Gateway;

/// Where nodes find the HTTP proxy, at the control plane's address.
pub const PROXY_PORT: u16 = 3128;
/// Between two tries to accept, when there are no descriptors left.
const ACCEPT_REST: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    #[error("cannot listen on {address}: {source}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("cannot leave the node's {what} namespace: {source}")]
    Namespace {
        what: &'static str,
        source: nix::Error,
    },
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    #[error("cannot start: {0}")]
    Runtime(io::Error),
}

/// The flags of `keelway forward`.
#[derive(Debug, Clone, clap::Args)]
pub struct ForwardArguments {
    /// Where the HTTP proxy listens, in the node's network
    #[arg(long)]
    proxy: Option<SocketAddr>,
    /// An address that may use it: a node's own
    #[arg(long)]
    client: Vec<IpAddr>,
    /// Take what the cluster sends to the outside
    #[arg(long)]
    egress: bool,
    /// A range of addresses of the cluster's own: what is sent there is never for the outside
    #[arg(long)]
    inside: Vec<IpNetwork>,
}

/// Forwards until it is ended. Standard input and output are the machine's network and mount namespaces (as PID 1 of the node
/// passes them); a single thread may change the second, so nothing else runs yet.
///
/// # Errors
/// When a namespace or socket cannot be had.
pub fn run(arguments: &ForwardArguments) -> Result<(), ForwardError> {
    let proxy = arguments.proxy.map(|address| {
        let listen = |source| ForwardError::Listen { address, source };
        let listener = std::net::TcpListener::bind(address).map_err(listen)?;
        listener.set_nonblocking(true).map_err(listen)?;
        Ok::<_, ForwardError>(listener)
    });
    let proxy = proxy.transpose()?;
    let gateway = arguments
        .egress
        .then(|| Gateway::open(&arguments.inside))
        .transpose()?;
    let notice = notice_channel().map_err(ForwardError::Runtime)?;
    leave(io::stdout().as_fd(), CloneFlags::CLONE_NEWNS, "mount")?;
    // From here on there are threads: the gateway's stays in the node's network, all others are the machine's.
    let gateway = gateway.map(Gateway::stay).transpose()?;
    leave(io::stdin().as_fd(), CloneFlags::CLONE_NEWNET, "network")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ForwardError::Runtime)?;
    if let Some(notice) = notice {
        notice.send(b"READY=1").map_err(ForwardError::Runtime)?;
    }
    // Two descriptors for each of thousands of flows are more than shells allow unless asked. Without, fewer are carried at a time.
    let _ = sys::raise_descriptors();
    runtime.block_on(async {
        let proxying = async {
            if let Some(listener) = proxy {
                let clients = arguments.client.iter().copied();
                let listener = TcpListener::from_std(listener)?;
                Proxy::new(clients).serve(listener).await;
            }
            Ok::<(), io::Error>(())
        };
        let relaying = async {
            if let Some(gateway) = gateway {
                egress::relay(gateway).await?;
            }
            Ok::<(), io::Error>(())
        };
        tokio::try_join!(proxying, relaying).map_err(ForwardError::Runtime)?;
        Ok(())
    })
}

/// The next connection, and who it is from; `part` says in the log why one cannot be had yet.
pub async fn accepted(listener: &TcpListener, part: &str) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                eprintln!("{part}: cannot accept: {error}");
                tokio::time::sleep(ACCEPT_REST).await;
            }
        }
    }
}

/// Where it is told that the forwarder is ready (sd_notify), opened while the node's files are still in sight.
fn notice_channel() -> io::Result<Option<UnixDatagram>> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(None);
    };
    let channel = UnixDatagram::unbound()?;
    channel.connect(path)?;
    Ok(Some(channel))
}

fn leave(
    namespace: BorrowedFd<'_>,
    kind: CloneFlags,
    what: &'static str,
) -> Result<(), ForwardError> {
    setns(namespace, kind).map_err(|source| ForwardError::Namespace { what, source })
}
