//! The load itself. Nothing here knows of services or namespaces: a peer process is already where it should be (see `peer`), so the
//! same loops measure every path.

mod datagram;
mod many;
mod one;
mod server;

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

#[cfg(test)]
pub use server::bind;
pub use server::serve;

/// What one run measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// One-byte request and response on one connection (netperf's TCP_RR).
    RoundTrip,
    /// A new connection per one-byte request (netperf's TCP_CRR).
    Connect,
    /// Bulk transfer from client to server.
    Throughput,
    /// HTTP/1.1 requests on kept connections, [`HTTP_CONNECTIONS`] at once.
    Http,
    /// Datagrams there and back, [`datagram::WINDOW`] on their way at any time, from a socket that is not connected.
    Datagram,
}

pub const HTTP_CONNECTIONS: usize = 16;

impl Metric {
    pub const ALL: [Metric; 5] = [
        Metric::RoundTrip,
        Metric::Connect,
        Metric::Throughput,
        Metric::Http,
        Metric::Datagram,
    ];

    /// Port the server answers this metric on; a Service maps the same number.
    pub const fn port(self) -> u16 {
        7000 + self as u16
    }

    /// Transport protocol as Kubernetes spells it.
    pub const fn protocol(self) -> &'static str {
        match self {
            Metric::Datagram => "UDP",
            _ => "TCP",
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Metric::RoundTrip => "round-trip",
            Metric::Connect => "connect",
            Metric::Throughput => "throughput",
            Metric::Http => "http",
            Metric::Datagram => "datagram",
        }
    }
}

/// One run of a client.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Order {
    pub metric: Metric,
    pub target: SocketAddr,
    pub duration: Duration,
    /// CPU that the client runs on.
    pub cpu: usize,
    /// Requests per second that come in whether or not the earlier ones are answered; none for a client that waits for each
    /// answer. Only of round trips and HTTP.
    #[serde(default)]
    pub rate: Option<f64>,
}

/// What a client saw in one run.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Operations (round trips, connections, requests, datagrams) or, for throughput, bytes, per second.
    pub per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    /// Datagrams that were not answered.
    pub lost: u64,
}

/// Share of a run that is thrown away at its start: caches, slow start, neighbour look-ups.
const WARM_UP: f64 = 0.1;
/// No operation of a healthy path takes this long; a stuck one must end the run with an error.
const STALL: Duration = Duration::from_secs(5);

/// Carries out an order.
///
/// # Errors
/// When a connection fails, breaks or stalls: a figure with failures in it is no figure.
pub fn run(order: &Order) -> io::Result<Sample> {
    let Order {
        target, duration, ..
    } = *order;
    match (order.metric, order.rate) {
        (Metric::RoundTrip, None) => one::round_trips(target, duration),
        (Metric::RoundTrip, rate) => many::run(target, duration, &many::BYTE, rate),
        (Metric::Connect, _) => one::connections(target, duration),
        (Metric::Throughput, _) => one::throughput(target, duration),
        (Metric::Http, rate) => many::run(target, duration, &many::HTTP, rate),
        (Metric::Datagram, _) => datagram::run(target, duration),
    }
}

fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, STALL)?;
    stream.set_read_timeout(Some(STALL))?;
    stream.set_write_timeout(Some(STALL))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// What happens during a run: a time of its own that passes unmeasured, then what is measured.
struct Clock {
    warm: Instant,
    end: Instant,
}

impl Clock {
    fn start(duration: Duration) -> Self {
        let warm = Instant::now() + duration.mul_f64(WARM_UP);
        Self {
            warm,
            end: warm + duration,
        }
    }
}

/// Latencies in nanoseconds.
struct Latencies(Histogram<u64>);

impl Latencies {
    fn new() -> io::Result<Self> {
        Histogram::new_with_max(60_000_000_000, 3)
            .map(Self)
            .map_err(io::Error::other)
    }

    fn record(&mut self, latency: Duration) {
        self.0
            .saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    fn sample(&self, took: Duration) -> Sample {
        let micros = |quantile| self.0.value_at_quantile(quantile) as f64 / 1000.0;
        Sample {
            per_second: self.0.len() as f64 / took.as_secs_f64(),
            p50_us: micros(0.5),
            p99_us: micros(0.99),
            p999_us: micros(0.999),
            lost: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    #[test]
    fn every_metric_yields_a_figure_over_loopback() {
        let ports = bind(|_free| 0, Duration::ZERO).expect("free ports");
        for (metric, port) in Metric::ALL.into_iter().zip(ports) {
            let order = Order {
                metric,
                target: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
                duration: Duration::from_millis(50),
                cpu: 0,
                rate: None,
            };
            let sample = run(&order).expect("loopback works");
            assert!(sample.per_second > 100.0, "{metric:?}: {sample:?}");
        }
    }

    #[test]
    fn a_refused_connection_is_an_error_not_a_figure() {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .expect("a free port");
        let order = Order {
            metric: Metric::Connect,
            target: free,
            duration: Duration::from_millis(10),
            cpu: 0,
            rate: None,
        };
        assert!(run(&order).is_err());
    }
}
