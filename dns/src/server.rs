//! The server: UDP threads over the zone, TCP, and the hand-over of what must be asked upstream.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::answer::{Policy, Transport, Verdict, answer, failure};
use crate::forward::Forwarder;
use crate::metrics::Metrics;
use crate::name::Name;
use crate::sys::{self, Batch};
use crate::zone::Zone;

/// The largest UDP answer; more is what TCP is for.
pub const REPLY_BYTES_MAX: usize = 4096;
/// TCP connections served at once, and how long one may stay silent (RFC 7766, 6.2.3).
const TCP_CONNECTIONS_MAX: usize = 1024;
const TCP_IDLE: Duration = Duration::from_secs(10);
/// Forwarded queries in flight; above it clients get SERVFAIL rather than a growing queue.
const FORWARDED_MAX: usize = 1024;

/// What every part of the server shares.
pub struct Shared {
    pub zone: ArcSwap<Zone>,
    pub policy: Policy,
    pub forwarder: Option<Forwarder>,
    pub metrics: Metrics,
    turn: AtomicUsize,
    forwarded: Arc<Semaphore>,
}

impl Shared {
    pub fn new(zone: Zone, policy: Policy, forwarder: Option<Forwarder>) -> Arc<Self> {
        let policy = Policy {
            forwards: forwarder.is_some(),
            ..policy
        };
        Arc::new(Self {
            zone: ArcSwap::from_pointee(zone),
            policy,
            forwarder,
            metrics: Metrics::default(),
            turn: AtomicUsize::new(0),
            forwarded: Arc::new(Semaphore::new(FORWARDED_MAX)),
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("{transport} {address} can't be bound: {source}")]
    Bind {
        transport: &'static str,
        address: SocketAddr,
        source: io::Error,
    },
}

/// Binds `address` for UDP, once per thread, and for TCP, and serves until the process ends. Must be called within a
/// tokio runtime, which carries TCP and what is forwarded.
pub async fn start(
    shared: &Arc<Shared>,
    address: SocketAddr,
    threads: usize,
) -> Result<SocketAddr, ServerError> {
    let bind = |transport, address| {
        move |source| ServerError::Bind {
            transport,
            address,
            source,
        }
    };
    let first = sys::bind(address).map_err(bind("udp", address))?;
    // With port 0 the kernel chose one; everything else must have the same.
    let address = first.local_addr().map_err(bind("udp", address))?;
    let listener = TcpListener::bind(address)
        .await
        .map_err(bind("tcp", address))?;
    let mut sockets = vec![first];
    while sockets.len() < threads {
        sockets.push(sys::bind(address).map_err(bind("udp", address))?);
    }
    let runtime = tokio::runtime::Handle::current();
    for socket in sockets {
        let (shared, runtime) = (shared.clone(), runtime.clone());
        thread::spawn(move || udp(&shared, Arc::new(socket), &runtime));
    }
    tokio::spawn(tcp(shared.clone(), listener));
    Ok(address)
}

fn udp(shared: &Arc<Shared>, socket: Arc<UdpSocket>, runtime: &tokio::runtime::Handle) {
    let mut batch = Batch::new();
    let mut turn = 0_usize;
    loop {
        let count = match batch.receive(&socket) {
            Ok(count) => count,
            // ICMP errors of earlier replies arrive here; a socket that is broken for good says so each time.
            Err(error) => {
                tracing::debug!(%error, "receiving");
                continue;
            }
        };
        let zone = shared.zone.load();
        for i in 0..count {
            turn = turn.wrapping_add(1);
            let (query, out) = batch.exchange(i);
            let slow = match answer(&zone, &shared.policy, query, Transport::Udp, turn, out) {
                Verdict::Reply { bytes, rcode } => {
                    shared.metrics.udp.count(rcode);
                    batch.reply(i, bytes);
                    continue;
                }
                Verdict::Ignore => continue,
                Verdict::Forward => Slow {
                    query: query.to_vec(),
                    begun: None,
                },
                Verdict::Chase { bytes, target } => Slow {
                    query: query.to_vec(),
                    begun: Some((out[..bytes].to_vec(), target)),
                },
            };
            let (Some(peer), Ok(permit)) =
                (batch.peer(i), shared.forwarded.clone().try_acquire_owned())
            else {
                let (query, out) = batch.exchange(i);
                if let Verdict::Reply { bytes, rcode } = failure(&shared.policy, query, out) {
                    shared.metrics.udp.count(rcode);
                    batch.reply(i, bytes);
                }
                continue;
            };
            let (shared, socket) = (shared.clone(), socket.clone());
            runtime.spawn(async move {
                if let Some(reply) = slow.resolve(&shared, Transport::Udp).await {
                    let _ = socket.send_to(&reply, peer);
                }
                drop(permit);
            });
        }
        if let Err(error) = batch.send(&socket, count) {
            tracing::error!(%error, "sending; this socket is given up");
            return;
        }
    }
}

/// A query that needs an upstream.
struct Slow {
    query: Vec<u8>,
    /// An answer that ends in a CNAME out of the zone, and its target.
    begun: Option<(Vec<u8>, Name)>,
}

impl Slow {
    async fn resolve(self, shared: &Shared, transport: Transport) -> Option<Vec<u8>> {
        let forwarder = shared.forwarder.as_ref()?;
        let answered = match &self.begun {
            None => forwarder.forward(&self.query, transport).await,
            Some((begun, target)) => forwarder.chase(&self.query, begun, target, transport).await,
        };
        match answered {
            Ok(reply) => Some(reply),
            Err(error) => {
                tracing::debug!(%error, "forwarding");
                let mut out = vec![0; REPLY_BYTES_MAX];
                match failure(&shared.policy, &self.query, &mut out) {
                    Verdict::Reply { bytes, .. } => {
                        out.truncate(bytes);
                        Some(out)
                    }
                    _ => None,
                }
            }
        }
    }
}

async fn tcp(shared: Arc<Shared>, listener: TcpListener) {
    let connections = Arc::new(Semaphore::new(TCP_CONNECTIONS_MAX));
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let shared = shared.clone();
                tokio::spawn(async move {
                    if let Err(error) = connection(&shared, stream).await {
                        tracing::debug!(%error, "TCP connection");
                    }
                    drop(permit);
                });
            }
            // Out of descriptors, say: others are being served and will give some back.
            Err(error) => {
                tracing::warn!(%error, "accepting");
                tokio::task::yield_now().await;
            }
        }
    }
}

/// Serves queries of one connection, each answered before the next is read; each with a two-byte length in front.
async fn connection(shared: &Shared, mut stream: TcpStream) -> io::Result<()> {
    let mut out = vec![0; 2 + usize::from(u16::MAX)];
    let mut query = Vec::new();
    loop {
        let length = match timeout(TCP_IDLE, stream.read_u16()).await {
            Ok(Ok(length)) => usize::from(length),
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Err(error)) => return Err(error),
            Err(_) => return Ok(()),
        };
        query.resize(length, 0);
        timeout(TCP_IDLE, stream.read_exact(&mut query)).await??;
        let turn = shared.turn.fetch_add(1, Ordering::Relaxed);
        let verdict = answer(
            &shared.zone.load(),
            &shared.policy,
            &query,
            Transport::Tcp,
            turn,
            &mut out[2..],
        );
        let slow = match verdict {
            Verdict::Ignore => return Ok(()),
            Verdict::Reply { bytes, rcode } => {
                shared.metrics.tcp.count(rcode);
                out[..2].copy_from_slice(&(bytes as u16).to_be_bytes());
                timeout(TCP_IDLE, stream.write_all(&out[..2 + bytes])).await??;
                continue;
            }
            Verdict::Forward => Slow {
                query: query.clone(),
                begun: None,
            },
            Verdict::Chase { bytes, target } => Slow {
                query: query.clone(),
                begun: Some((out[2..2 + bytes].to_vec(), target)),
            },
        };
        if let Some(reply) = slow.resolve(shared, Transport::Tcp).await {
            let mut framed = (reply.len() as u16).to_be_bytes().to_vec();
            framed.extend(reply);
            timeout(TCP_IDLE, stream.write_all(&framed)).await??;
        }
    }
}
