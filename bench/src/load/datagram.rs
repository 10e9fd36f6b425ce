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
    let mut on_way = OnWay::default();
    let mut silent = 0;
    let mut now = begun;
    while now < clock.end {
        // Each carries when it was sent: no more has to be known of it.
        let age = now - begun;
        let free = WINDOW - on_way.count(age);
        let mut message = [0; BYTES];
        message[..8].copy_from_slice(&(age.as_nanos() as u64).to_le_bytes());
        let batch: Vec<&[u8]> = vec![&message; free];
        send(&socket, &batch, &to[..free])?;
        on_way.sent(age, free);
        let received = receive(&socket, &mut buffers, MsgFlags::MSG_WAITFORONE)?;
        now = Instant::now();
        if received.is_empty() {
            silent += 1;
            if silent == 20 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            continue;
        }
        silent = 0;
        for (buffer, _) in buffers.iter().zip(&received) {
            let sent = stamp(buffer);
            on_way.answered(sent);
            if begun + sent >= clock.warm {
                latencies.record(now.saturating_duration_since(begun + sent));
            }
        }
    }
    // What is still on its way is not lost.
    while on_way.unanswered > 0 {
        let received = receive(&socket, &mut buffers, MsgFlags::MSG_WAITFORONE)?;
        if received.is_empty() {
            break;
        }
        for (buffer, _) in buffers.iter().zip(&received) {
            on_way.answered(stamp(buffer));
        }
    }
    Ok(Sample {
        lost: on_way.unanswered as u64,
        ..latencies.sample(clock.end - clock.warm)
    })
}

/// How long after the start of the run a datagram was sent.
fn stamp(datagram: &[u8; BYTES]) -> Duration {
    Duration::from_nanos(
        datagram
            .first_chunk()
            .copied()
            .map_or(0, u64::from_le_bytes),
    )
}

/// Datagrams that were sent and are not answered, by the time at which they were sent.
#[derive(Default)]
struct OnWay {
    /// Of the latest moments of [`Self::MOMENT`]; with a later one the oldest is given up, and takes no place in the window any more.
    by_moment: [usize; Self::MOMENTS],
    latest: u128,
    /// All of them, given up or not: an answer may come late.
    unanswered: usize,
}

impl OnWay {
    const MOMENTS: usize = 8;
    const MOMENT: Duration = Duration::from_nanos(LOST.as_nanos() as u64 / Self::MOMENTS as u64);

    fn moment(age: Duration) -> u128 {
        age.as_nanos() / Self::MOMENT.as_nanos()
    }

    /// Those that may still be answered.
    fn count(&mut self, age: Duration) -> usize {
        let now = Self::moment(age);
        for moment in (self.latest + 1..=now).rev().take(Self::MOMENTS) {
            self.by_moment[Self::place(moment)] = 0;
        }
        self.latest = self.latest.max(now);
        self.by_moment.iter().sum()
    }

    /// Right after [`Self::count`] at the same age.
    fn sent(&mut self, age: Duration, datagrams: usize) {
        self.by_moment[Self::place(Self::moment(age))] += datagrams;
        self.unanswered += datagrams;
    }

    fn answered(&mut self, sent: Duration) {
        let moment = Self::moment(sent);
        // An earlier run's answer may come by a port that was used again: it is none of these.
        if moment + Self::MOMENTS as u128 > self.latest {
            let place = &mut self.by_moment[Self::place(moment)];
            *place = place.saturating_sub(1);
        }
        self.unanswered = self.unanswered.saturating_sub(1);
    }

    fn place(moment: u128) -> usize {
        (moment % Self::MOMENTS as u128) as usize
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_counted_and_gives_its_place_in_the_window_back() {
        let at = |milliseconds| Duration::from_millis(milliseconds);
        let mut on_way = OnWay::default();
        assert_eq!(on_way.count(at(0)), 0);
        on_way.sent(at(0), WINDOW);
        for _ in 0..WINDOW - 3 {
            on_way.answered(at(0));
        }
        assert_eq!(on_way.count(at(50)), 3);
        on_way.sent(at(50), WINDOW - 3);
        // Three are given up, and the rest of the window is on its way.
        assert_eq!(on_way.count(at(110)), WINDOW - 3);
        on_way.sent(at(110), 3);
        assert_eq!(on_way.unanswered, WINDOW + 3);
        // One comes late, when its place is another's.
        on_way.answered(at(0));
        assert_eq!(on_way.count(at(110)), WINDOW);
        for _ in 0..WINDOW - 3 {
            on_way.answered(at(50));
        }
        for _ in 0..3 {
            on_way.answered(at(110));
        }
        assert_eq!((on_way.count(at(120)), on_way.unanswered), (0, 2));
        assert_eq!(on_way.count(at(10_000)), 0);
    }
}
