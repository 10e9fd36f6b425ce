//! One connection at a time, blocking: nothing but the path and two wake-ups is in the figure.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt::Linger};

use super::{Clock, Latencies, Sample, connect};

pub(super) const CHUNK_BYTES: usize = 128 * 1024;

pub(super) fn round_trips(target: SocketAddr, duration: Duration) -> io::Result<Sample> {
    let mut stream = connect(target)?;
    let mut byte = [1];
    timed(duration, || {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)
    })
}

pub(super) fn connections(target: SocketAddr, duration: Duration) -> io::Result<Sample> {
    let mut byte = [1];
    timed(duration, || {
        // Plain connect: connect_timeout's extra poll and fcntl calls would be in the figure.
        let mut stream = TcpStream::connect(target)?;
        end_by_reset(&stream)?;
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)
    })
}

/// Lets a socket end by RST. Neither end keeps TIME_WAIT then, whose port may come by another path next: a server compares the
/// clocks of both connections, which a client's kernel keeps per destination, and would turn the later one away.
fn end_by_reset(stream: &TcpStream) -> io::Result<()> {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    Ok(setsockopt(stream, Linger, &linger)?)
}

fn timed(duration: Duration, mut operation: impl FnMut() -> io::Result<()>) -> io::Result<Sample> {
    let mut latencies = Latencies::new()?;
    let clock = Clock::start(duration);
    while Instant::now() < clock.warm {
        operation()?;
    }
    let start = Instant::now();
    let mut last = start;
    while last < clock.end {
        operation()?;
        let now = Instant::now();
        latencies.record(now - last);
        last = now;
    }
    Ok(latencies.sample(last - start))
}

pub(super) fn throughput(target: SocketAddr, duration: Duration) -> io::Result<Sample> {
    let mut stream = connect(target)?;
    let chunk = vec![0; CHUNK_BYTES];
    let clock = Clock::start(duration);
    while Instant::now() < clock.warm {
        stream.write_all(&chunk)?;
    }
    let start = Instant::now();
    let mut bytes = 0_u64;
    while Instant::now() < clock.end {
        stream.write_all(&chunk)?;
        bytes += CHUNK_BYTES as u64;
    }
    Ok(Sample {
        per_second: bytes as f64 / start.elapsed().as_secs_f64(),
        ..Sample::default()
    })
}
