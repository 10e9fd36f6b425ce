//! A way out for pods (`--egress`): their connections and datagrams end in sockets of this process ([`super::gateway`]) and go on by
//! sockets of the machine's. Neither the machine nor the outside sees an address of the cluster.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt,
};
use tokio::io::{Interest, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::accepted;
use super::gateway::Staying;
use super::names::{self, NAME_SERVERS};

const DNS_PORT: u16 = 53;
/// Connections, and datagram flows, at a time; those beyond are refused, or lost.
const FLOWS_MAX: usize = 4096;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// A datagram flow without datagrams is forgotten (RFC 4787).
const UDP_IDLE: Duration = Duration::from_secs(120);
/// A question for a name has a flow of its own, which is of no use for long, once it is answered still less.
const DNS_IDLE: Duration = Duration::from_secs(10);
const DNS_ANSWERED_IDLE: Duration = Duration::from_secs(2);
const DATAGRAM_BYTES_MAX: usize = 65_535;
/// First datagrams of a flow that may wait for its sockets.
const FLOW_QUEUE: usize = 64;

/// Relays what the cluster sends to the outside, for ever.
///
/// # Errors
/// When a socket cannot be waited for, or the gateway is gone.
pub async fn relay(mut gateway: Staying) -> io::Result<()> {
    let connections = std::mem::take(&mut gateway.gateway.connections);
    let datagrams = std::mem::take(&mut gateway.gateway.datagrams);
    let gateway = Arc::new(gateway);
    let places = Arc::new(Semaphore::new(FLOWS_MAX));
    let accepting = connections
        .into_iter()
        .map(|listener| accept(listener, &gateway, &places));
    let receiving = datagrams
        .into_iter()
        .map(|socket| receive(socket, &gateway));
    tokio::try_join!(try_join_all(accepting), try_join_all(receiving))?;
    Ok(())
}

async fn accept(
    listener: std::net::TcpListener,
    gateway: &Arc<Staying>,
    places: &Arc<Semaphore>,
) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (pod, _) = accepted(&listener, "egress").await;
        // The socket has the address that the pod has asked for.
        let wanted = pod.local_addr().ok();
        let wanted = wanted.filter(|wanted| gateway.gateway.is_outside(wanted.ip()));
        match (wanted, places.clone().try_acquire_owned()) {
            (Some(wanted), Ok(place)) => {
                tokio::spawn(connection(pod, wanted, place));
            }
            _ => reset(pod),
        }
    }
}

/// Closes a connection so that the pod sees it broken, not ended.
fn reset(pod: TcpStream) {
    let _ = pod.set_zero_linger();
}

async fn connection(mut pod: TcpStream, wanted: SocketAddr, _place: OwnedSemaphorePermit) {
    let connect = async { TcpStream::connect(target(wanted)?).await };
    let Ok(Ok(mut server)) = tokio::time::timeout(CONNECT_TIMEOUT, connect).await else {
        reset(pod);
        return;
    };
    for stream in [&pod, &server] {
        let _ = stream.set_nodelay(true);
        // A pod that is gone sends no end.
        let _ = setsockopt(stream, sockopt::KeepAlive, &true);
    }
    if copy_bidirectional(&mut pod, &mut server).await.is_err() {
        // Either end may break at any time; so it does for the other.
        reset(pod);
        reset(server);
    }
}

/// Gives every pair of addresses a pair of sockets, as long as something passes between them.
async fn receive(socket: std::net::UdpSocket, gateway: &Arc<Staying>) -> io::Result<()> {
    let socket = UdpSocket::from_std(socket)?;
    let mut flows: HashMap<(SocketAddr, SocketAddr), mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let received = socket
            .async_io(Interest::READABLE, || addressed(&socket, &mut buffer))
            .await;
        let Ok((length, Some(pod), Some(wanted))) = received else {
            continue;
        };
        if !gateway.gateway.is_outside(wanted.ip()) {
            continue;
        }
        let key = (pod, wanted);
        if flows.get(&key).is_none_or(mpsc::Sender::is_closed) {
            flows.retain(|_, flow| !flow.is_closed());
            if flows.len() >= FLOWS_MAX {
                continue;
            }
            let (sender, queue) = mpsc::channel(FLOW_QUEUE);
            let gateway = gateway.clone();
            tokio::spawn(async move { flow(&gateway, pod, wanted, queue).await });
            flows.insert(key, sender);
        }
        let payload = buffer.get(..length).unwrap_or_default().to_vec();
        if let Some(flow) = flows.get(&key) {
            // A queue that is full loses datagrams, as any link does.
            let _ = flow.try_send(payload);
        }
    }
}

/// Reads a datagram: its length, who has sent it, and to whom.
fn addressed(
    socket: &UdpSocket,
    buffer: &mut [u8],
) -> io::Result<(usize, Option<SocketAddr>, Option<SocketAddr>)> {
    let mut space = nix::cmsg_space!(libc::sockaddr_in6);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::empty(),
    )?;
    let sender = message.address.as_ref().and_then(address);
    let mut wanted = None;
    for part in message.cmsgs()? {
        wanted = match part {
            ControlMessageOwned::Ipv4OrigDstAddr(to) => {
                let ip = Ipv4Addr::from(u32::from_be(to.sin_addr.s_addr));
                Some(SocketAddrV4::new(ip, u16::from_be(to.sin_port)).into())
            }
            ControlMessageOwned::Ipv6OrigDstAddr(to) => {
                let ip = Ipv6Addr::from(to.sin6_addr.s6_addr);
                Some(SocketAddrV6::new(ip, u16::from_be(to.sin6_port), 0, 0).into())
            }
            _ => wanted,
        };
    }
    Ok((message.bytes, sender, wanted))
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(SocketAddrV4::new(v4.ip(), v4.port()).into());
    }
    let v6 = storage.as_sockaddr_in6()?;
    Some(SocketAddrV6::new(v6.ip(), v6.port(), 0, 0).into())
}

async fn flow(
    gateway: &Staying,
    pod: SocketAddr,
    wanted: SocketAddr,
    mut queue: mpsc::Receiver<Vec<u8>>,
) -> io::Result<()> {
    let server = target(wanted)?;
    let any: IpAddr = if server.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let out = UdpSocket::bind((any, 0)).await?;
    out.connect(server).await?;
    let into = UdpSocket::from_std(gateway.answering(wanted, pod).await?)?;
    let (mut sent, mut answered) = (vec![0; DATAGRAM_BYTES_MAX], vec![0; DATAGRAM_BYTES_MAX]);
    let is_dns = wanted.port() == DNS_PORT;
    let mut idle = if is_dns { DNS_IDLE } else { UDP_IDLE };
    loop {
        tokio::select! {
            // Those that came before there was a socket for them.
            Some(payload) = queue.recv() => drop(out.send(&payload).await),
            length = into.recv(&mut sent) => {
                // A refusal is told by ICMP; the next datagram may be taken.
                if let Some(payload) = length.ok().and_then(|length| sent.get(..length)) {
                    let _ = out.send(payload).await;
                }
            }
            length = out.recv(&mut answered) => {
                if let Some(payload) = length.ok().and_then(|length| answered.get(..length)) {
                    let _ = into.send(payload).await;
                    if is_dns {
                        idle = DNS_ANSWERED_IDLE;
                    }
                }
            }
            () = tokio::time::sleep(idle) => return Ok(()),
        }
    }
}

/// Where a pod's destination is for the machine.
fn target(wanted: SocketAddr) -> io::Result<SocketAddr> {
    if NAME_SERVERS.contains(&wanted.ip()) && wanted.port() == DNS_PORT {
        return names::name_server().map_err(io::Error::other);
    }
    Ok(wanted)
}
