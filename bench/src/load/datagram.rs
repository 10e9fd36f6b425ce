//! Datagrams there and back by batches, from a socket that names the destination of each: what resolvers and logging agents do.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg};

use super::{Clock, Latencies, Sample};

/// Datagrams on their way at any time.
pub const WINDOW: usize = 32;
const BYTES: usize = 64;
/// An answer that takes longer is none.
const LOST: Duration = Duration::from_millis(100);

type Buffers = Vec<[u8; BYTES]>;

/// Answers every datagram by itself.
pub(super) fn echo(socket: &UdpSocket) -> io::Result<()> {
    let mut buffers: Buffers = vec![[0; BYTES]; WINDOW];
    loop {
        let received = receive(socket, &mut buffers, MsgFlags::MSG_WAITFORONE)?;
        let to: Vec<Option<SockaddrIn>> = received.iter().map(|(_, from)| *from).collect();
        let bytes: Vec<&[u8]> = buffers
            .iter()
            .zip(&received)
            .map(|(buffer, (bytes, _))| &buffer[..*bytes])
            .collect();
        send(socket, &bytes, &to)?;
    }
}

pub(super) fn run(target: SocketAddr, duration: Duration) -> io::Result<Sample> {
    let SocketAddr::V4(target) = target else {
        return Err(io::Error::other("datagrams are measured over IPv4"));
    };
    let socket = UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(LOST))?;
    let mut latencies = Latencies::new()?;
    let mut buffers: Buffers = vec![[0; BYTES]; WINDOW];
    let to = vec![
        Some(SockaddrIn::from(SocketAddrV4::new(
            *target.ip(),
            target.port()
        )));
        WINDOW
    ];
    let begun = Instant::now();
    let clock = Clock::start(duration);
    let (mut lost, mut silent) = (0, 0);
    let mut free = WINDOW;
    let mut now = begun;
    while now < clock.end {
        // Each carries when it was sent, so no book is kept of those that are lost.
        let stamp = (now - begun).as_nanos() as u64;
        let mut message = [0; BYTES];
        message[..8].copy_from_slice(&stamp.to_le_bytes());
        let batch: Vec<&[u8]> = vec![&message; free];
        send(&socket, &batch, &to[..free])?;
        let received = receive(&socket, &mut buffers, MsgFlags::MSG_WAITFORONE)?;
        now = Instant::now();
        if received.is_empty() {
            silent += 1;
            if silent == 20 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            lost += WINDOW as u64;
            free = WINDOW;
            continue;
        }
        silent = 0;
        free = received.len();
        for (buffer, _) in buffers.iter().zip(&received) {
            let stamp = buffer.first_chunk().copied().map_or(0, u64::from_le_bytes);
            let sent = begun + Duration::from_nanos(stamp);
            if sent >= clock.warm {
                latencies.record(now.saturating_duration_since(sent));
            }
        }
    }
    Ok(Sample {
        lost,
        ..latencies.sample(clock.end - clock.warm)
    })
}

fn send(socket: &UdpSocket, messages: &[&[u8]], to: &[Option<SockaddrIn>]) -> io::Result<()> {
    let mut done = 0;
    while done < messages.len() {
        let slices: Vec<[IoSlice<'_>; 1]> = messages[done..]
            .iter()
            .map(|message| [IoSlice::new(message)])
            .collect();
        let mut headers = MultiHeaders::<SockaddrIn>::preallocate(slices.len(), None);
        match sendmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &slices,
            &to[done..],
            [],
            MsgFlags::empty(),
        ) {
            Ok(sent) => done += sent.count(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// What has arrived, in the order of the buffers; nothing when the socket's time is up.
fn receive(
    socket: &UdpSocket,
    buffers: &mut Buffers,
    flags: MsgFlags,
) -> io::Result<Vec<(usize, Option<SockaddrIn>)>> {
    let mut slices: Vec<[IoSliceMut<'_>; 1]> = buffers
        .iter_mut()
        .map(|buffer| [IoSliceMut::new(buffer)])
        .collect();
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(slices.len(), None);
    match recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, flags, None) {
        Ok(messages) => Ok(messages
            .map(|message| (message.bytes, message.address))
            .collect()),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(Vec::new()),
        Err(errno) => Err(errno.into()),
    }
}
