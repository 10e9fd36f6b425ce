//! Names of others: asked of upstream servers, several where one is slow, so that one that is dead is hardly noticed.

mod exchange;
mod rules;
mod upstream;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::time::{Instant, sleep, sleep_until};

use crate::answer::Rcode;
use crate::config::spec::DNS_PORT;
use crate::message::{BadReply, Reply};
use crate::metrics::Forwarding;
use crate::shares::{Place, Shares};

pub use exchange::Question;
pub use rules::{ForwardRules, Order};
pub use upstream::{Tls, TlsError, Upstream};

/// An upstream that has not answered after some times its usual delay, within these bounds, has another one asked beside it.
const HEDGE_MIN: Duration = Duration::from_millis(300);
const HEDGE_MAX: Duration = Duration::from_secs(1);
/// Attempts for one question, over all upstreams; and of one upstream.
const ATTEMPTS_MAX: usize = 8;
const ATTEMPTS_EACH: usize = 2;

#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    #[error("upstream {server}: {source}")]
    Io {
        server: SocketAddr,
        source: io::Error,
    },
    #[error("upstream {server}: the answer {source}")]
    Reply {
        server: SocketAddr,
        source: BadReply,
    },
    #[error("no upstream answered within {} ms", .0.as_millis())]
    Silence(Duration),
    #[error("{0} queries are in flight already, and this client has its share of them")]
    Busy(usize),
    #[error("no upstream is configured for this name")]
    NoRoute,
    #[error("every upstream leads back to this server")]
    Loop,
}

impl ForwardError {
    /// The upstream that it is about.
    pub fn server(&self) -> Option<SocketAddr> {
        match self {
            Self::Io { server, .. } | Self::Reply { server, .. } => Some(*server),
            _ => None,
        }
    }

    /// How CoreDNS words such a failure, which is what expressions in Corefiles look for. Which ports were used is not known any more.
    pub fn as_coredns_has_it(&self) -> String {
        let read = |server: SocketAddr, why: &str| format!("read udp 0.0.0.0:0->{server}: {why}");
        match self {
            Self::Io { server, source } => match source.kind() {
                io::ErrorKind::TimedOut => read(*server, "i/o timeout"),
                io::ErrorKind::ConnectionRefused => read(*server, "read: connection refused"),
                _ => read(*server, &source.to_string()),
            },
            Self::Silence(_) => read((Ipv4Addr::UNSPECIFIED, DNS_PORT).into(), "i/o timeout"),
            Self::Busy(most) => format!("concurrent queries exceeded maximum {most}"),
            Self::Loop => "no healthy proxies".into(),
            Self::Reply { .. } | Self::NoRoute => self.to_string(),
        }
    }
}

/// Upstream servers; never empty.
pub struct Forwarder {
    upstreams: Vec<Arc<Upstream>>,
    rules: ForwardRules,
    next: AtomicUsize,
    places: Arc<Shares>,
    metrics: Forwarding,
}

impl Forwarder {
    /// A forwarder to `upstreams`; `None` when there are none.
    pub fn new(
        upstreams: Vec<Arc<Upstream>>,
        rules: ForwardRules,
        metrics: Forwarding,
    ) -> Option<Self> {
        (!upstreams.is_empty()).then(|| Self {
            next: AtomicUsize::new(0),
            places: Shares::new(rules.concurrent_max, rules.concurrent_max),
            upstreams,
            rules,
            metrics,
        })
    }

    pub fn upstreams(&self) -> &[Arc<Upstream>] {
        &self.upstreams
    }

    /// Those that may be asked, in the order in which they are: those that are down last, since all may be.
    fn order(&self) -> Vec<Arc<Upstream>> {
        let count = self.upstreams.len();
        let first = match self.rules.order {
            Order::Sequential => 0,
            Order::RoundRobin => self.next.fetch_add(1, Ordering::Relaxed) % count,
            Order::Random => rand::random_range(0..count),
        };
        let mut order: Vec<_> = (0..count)
            .map(|i| self.upstreams[(first + i) % count].clone())
            .filter(|upstream| !upstream.leads_back())
            .collect();
        order.sort_by_key(|upstream| upstream.is_down(self.rules.failures_max));
        order
    }

    /// A place among the questions in flight.
    pub fn place(&self, client: IpAddr) -> Result<Place, ForwardError> {
        self.places.take(client).ok_or_else(|| {
            self.metrics.rejected.inc();
            ForwardError::Busy(self.places.taken())
        })
    }

    /// Asks until there is an answer. A failure that an upstream tells of is an answer when no other one knows better.
    pub async fn ask(&self, question: &Question, _place: Place) -> Result<Reply, ForwardError> {
        let order = self.order();
        if order.is_empty() {
            return Err(ForwardError::Loop);
        }
        if order[0].is_down(self.rules.failures_max) {
            self.metrics.all_down.inc();
        }
        let attempts = (order.len() * ATTEMPTS_EACH).min(ATTEMPTS_MAX);
        let mut waiting = order.iter().cycle().take(attempts);
        let end = Instant::now() + self.rules.patience;
        let mut asked: Vec<Arc<Upstream>> = Vec::new();
        let mut running = FuturesUnordered::new();
        let mut told = None;
        let mut error = ForwardError::Silence(self.rules.patience);
        let mut next = waiting.next().cloned();
        loop {
            if let Some(upstream) = next.take() {
                asked.push(upstream.clone());
                running.push(async move {
                    let begun = Instant::now();
                    let answer = upstream.ask(question, self.rules.tcp_only).await;
                    (upstream, begun.elapsed(), answer)
                });
            }
            if running.is_empty() {
                break;
            }
            let hedge = asked.last().map_or(HEDGE_MAX, |last| {
                (last.usual_delay() * 4).clamp(HEDGE_MIN, HEDGE_MAX)
            });
            tokio::select! {
                Some((upstream, took, answer)) = running.next() => match answer {
                    Ok(reply) => {
                        upstream.answered(took, reply.rcode);
                        if matches!(reply.rcode, Rcode::NoError | Rcode::NxDomain) && !reply.is_truncated() {
                            // Whoever was asked before and is silent has failed, as far as anyone can tell.
                            let silent = asked.iter().take_while(|one| !Arc::ptr_eq(one, &upstream));
                            silent.for_each(|one| one.failed(&self.rules));
                            return Ok(reply);
                        }
                        told = Some(reply);
                        next = waiting.next().cloned();
                    }
                    Err(failure) => {
                        upstream.failed(&self.rules);
                        error = failure;
                        next = waiting.next().cloned();
                    }
                },
                () = sleep(hedge), if asked.len() < attempts => next = waiting.next().cloned(),
                () = sleep_until(end) => {
                    asked.iter().for_each(|one| one.failed(&self.rules));
                    break;
                }
            }
        }
        told.ok_or(error)
    }
}
