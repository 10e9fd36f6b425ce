//! The load itself: one client and one server, blocking sockets, one connection at a time.
//!
//! Nothing here knows of services or namespaces: a peer process is already where it should be
//! (see `peer`), so the same loops measure every path.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use hdrhistogram::Histogram;
use nix::sys::socket::{setsockopt, sockopt::Linger};
use serde::{Deserialize, Serialize};

/// What one run measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// One-byte request and response on one connection (netperf's TCP_RR).
    RoundTrip,
    /// A new connection per one-byte request (netperf's TCP_CRR).
    Connect,
    /// Bulk transfer from client to server.
    Throughput,
}

impl Metric {
    pub const ALL: [Metric; 3] = [Metric::RoundTrip, Metric::Connect, Metric::Throughput];

    /// Port the server answers this metric on; a Service maps the same number.
    pub fn port(self) -> u16 {
        match self {
            Metric::RoundTrip => 7000,
            Metric::Connect => 7001,
            Metric::Throughput => 7002,
        }
    }
}

/// What a client saw in one run.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Operations (round trips, connections) or, for throughput, bytes, per second.
    pub per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

const CHUNK_BYTES: usize = 128 * 1024;
/// Share of a run that is thrown away at its start: caches, slow start, neighbour look-ups.
const WARM_UP: f64 = 0.1;
/// No operation of a healthy path takes this long; a stuck one must end the run with an error.
const STALL: Duration = Duration::from_secs(5);

/// Serves all metrics on all addresses until the process is ended.
///
/// # Errors
/// When a port can't be bound.
pub fn serve() -> io::Result<Vec<thread::JoinHandle<()>>> {
    Metric::ALL
        .into_iter()
        .map(|metric| {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, metric.port()))?;
            Ok(thread::spawn(move || accept_loop(&listener, metric)))
        })
        .collect()
}

fn accept_loop(listener: &TcpListener, metric: Metric) {
    for stream in listener.incoming().flatten() {
        match metric {
            // Answered in this thread: a hand-over to another would be part of the figure.
            Metric::Connect => drop(answer_once(stream)),
            Metric::RoundTrip => drop(thread::spawn(move || echo(stream))),
            Metric::Throughput => drop(thread::spawn(move || sink(stream))),
        }
    }
}

fn answer_once(mut stream: TcpStream) -> io::Result<()> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    stream.write_all(&byte)?;
    stream.shutdown(Shutdown::Both)
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

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
    }
}

fn sink(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    while stream.read(&mut buffer)? > 0 {}
    Ok(())
}

/// Runs one client against `target` for `duration`.
///
/// # Errors
/// When a connection fails, breaks or stalls: a figure with failures in it is no figure.
pub fn run(metric: Metric, target: SocketAddr, duration: Duration) -> io::Result<Sample> {
    match metric {
        Metric::RoundTrip => round_trips(target, duration),
        Metric::Connect => connections(target, duration),
        Metric::Throughput => throughput(target, duration),
    }
}

fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, STALL)?;
    stream.set_read_timeout(Some(STALL))?;
    stream.set_write_timeout(Some(STALL))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn round_trips(target: SocketAddr, duration: Duration) -> io::Result<Sample> {
    let mut stream = connect(target)?;
    let mut byte = [1];
    timed(duration, || {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)
    })
}

fn connections(target: SocketAddr, duration: Duration) -> io::Result<Sample> {
    let mut byte = [1];
    timed(duration, || {
        // Plain connect: connect_timeout's extra poll and fcntl calls would be in the figure.
        let mut stream = TcpStream::connect(target)?;
        end_by_reset(&stream)?;
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)
    })
}

fn timed(duration: Duration, mut operation: impl FnMut() -> io::Result<()>) -> io::Result<Sample> {
    let mut nanos = Histogram::<u64>::new_with_max(60_000_000_000, 3).map_err(io::Error::other)?;
    let warm = Instant::now() + duration.mul_f64(WARM_UP);
    while Instant::now() < warm {
        operation()?;
    }
    let start = Instant::now();
    let mut last = start;
    while last - start < duration {
        operation()?;
        let now = Instant::now();
        nanos.saturating_record((now - last).as_nanos() as u64);
        last = now;
    }
    let micros = |quantile| nanos.value_at_quantile(quantile) as f64 / 1000.0;
    Ok(Sample {
        per_second: nanos.len() as f64 / (last - start).as_secs_f64(),
        p50_us: micros(0.5),
        p99_us: micros(0.99),
    })
}

fn throughput(target: SocketAddr, duration: Duration) -> io::Result<Sample> {
    let mut stream = connect(target)?;
    let chunk = vec![0; CHUNK_BYTES];
    let warm = Instant::now() + duration.mul_f64(WARM_UP);
    while Instant::now() < warm {
        stream.write_all(&chunk)?;
    }
    let start = Instant::now();
    let mut bytes = 0_u64;
    while start.elapsed() < duration {
        stream.write_all(&chunk)?;
        bytes += CHUNK_BYTES as u64;
    }
    let per_second = bytes as f64 / start.elapsed().as_secs_f64();
    Ok(Sample {
        per_second,
        ..Sample::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_yields_a_figure_over_loopback() {
        let servers = serve().expect("ports 7000 to 7002 are free");
        assert_eq!(servers.len(), Metric::ALL.len());
        for metric in Metric::ALL {
            let target = SocketAddr::from((Ipv4Addr::LOCALHOST, metric.port()));
            let sample = run(metric, target, Duration::from_millis(50)).expect("loopback works");
            assert!(sample.per_second > 100.0, "{metric:?}: {sample:?}");
        }
    }

    #[test]
    fn a_refused_connection_is_an_error_not_a_figure() {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|l| l.local_addr())
            .expect("a free port");
        assert!(run(Metric::Connect, free, Duration::from_millis(10)).is_err());
    }
}
