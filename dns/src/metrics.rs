//! Counters, under CoreDNS's names where they mean the same.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder,
    NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry, Unit};

use crate::answer::{Rcode, Transport};
use crate::query::rtype;

impl EncodeLabelValue for Rcode {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.name().encode(encoder)
    }
}

/// Types that are counted by name; everything else is "other".
const TYPES: [(u16, &str); 10] = [
    (rtype::A, "A"),
    (rtype::AAAA, "AAAA"),
    (rtype::CNAME, "CNAME"),
    (rtype::SRV, "SRV"),
    (rtype::PTR, "PTR"),
    (rtype::TXT, "TXT"),
    (rtype::SOA, "SOA"),
    (rtype::NS, "NS"),
    (rtype::ANY, "ANY"),
    (0, "other"),
];
/// Upper bounds of answer times, in microseconds: an answer from the zone takes a few.
const TIME_BOUNDS_US: [u64; 12] = [
    5, 10, 25, 50, 100, 250, 1000, 5000, 25_000, 100_000, 500_000, 2_500_000,
];
/// Upper bounds of message sizes.
const SIZE_BOUNDS: [u64; 8] = [100, 200, 300, 400, 511, 1023, 4095, 65_535];

/// A histogram that threads write to without a lock: they do so with every query.
struct Buckets<const N: usize> {
    bounds: [u64; N],
    counts: Vec<AtomicU64>,
    sum: AtomicU64,
}

impl<const N: usize> Buckets<N> {
    fn new(bounds: [u64; N]) -> Self {
        Self {
            bounds,
            counts: (0..=N).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
        }
    }

    fn observe(&self, value: u64) {
        let at = self.bounds.iter().position(|bound| value <= *bound);
        self.counts[at.unwrap_or(N)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// Shows the sum of what several threads have counted.
    fn encode(
        all: &[&Self],
        encoder: &mut DescriptorEncoder<'_>,
        (name, help): (&str, &str),
        unit: Unit,
        scale: f64,
    ) -> Result<(), std::fmt::Error> {
        let bounds = all.iter().take(1).flat_map(|one| one.bounds);
        let bounds = bounds.map(|bound| bound as f64 * scale);
        let count = |at: usize| {
            let counts = all.iter().map(|one| one.counts[at].load(Ordering::Relaxed));
            counts.sum()
        };
        let buckets: Vec<(f64, u64)> = bounds.chain([f64::MAX]).zip((0..=N).map(count)).collect();
        let total = buckets.iter().map(|(_, count)| count).sum();
        let sums = all.iter().map(|one| one.sum.load(Ordering::Relaxed));
        let sum = sums.sum::<u64>() as f64 * scale;
        encoder
            .encode_descriptor(name, help, Some(&unit), MetricType::Histogram)?
            .encode_histogram::<NoLabelSet>(sum, total, &buckets, None)
    }
}

/// What is counted of each query, without locks.
pub struct Queries {
    requests: [[AtomicU64; TYPES.len()]; 2],
    responses: [[AtomicU64; Rcode::ALL.len()]; 2],
    times: Buckets<{ TIME_BOUNDS_US.len() }>,
    request_bytes: Buckets<{ SIZE_BOUNDS.len() }>,
    response_bytes: Buckets<{ SIZE_BOUNDS.len() }>,
}

const TRANSPORTS: [&str; 2] = ["udp", "tcp"];

fn index(transport: Transport) -> usize {
    match transport {
        Transport::Udp => 0,
        Transport::Tcp => 1,
    }
}

impl Default for Queries {
    fn default() -> Self {
        let zeroes = || std::array::from_fn(|_| AtomicU64::new(0));
        let more = || std::array::from_fn(|_| AtomicU64::new(0));
        Self {
            requests: [zeroes(), zeroes()],
            responses: [more(), more()],
            times: Buckets::new(TIME_BOUNDS_US),
            request_bytes: Buckets::new(SIZE_BOUNDS),
            response_bytes: Buckets::new(SIZE_BOUNDS),
        }
    }
}

impl Queries {
    /// Counts an answered query. `rtype` is what was asked for, 0 when that could not be read.
    pub fn count(
        &self,
        transport: Transport,
        rtype: u16,
        rcode: Rcode,
        [request_bytes, response_bytes]: [usize; 2],
        took: Duration,
    ) {
        let of = index(transport);
        let kind = TYPES.iter().position(|(number, _)| *number == rtype);
        let kind = kind.unwrap_or(TYPES.len() - 1);
        self.requests[of][kind].fetch_add(1, Ordering::Relaxed);
        self.responses[of][rcode.index()].fetch_add(1, Ordering::Relaxed);
        self.times.observe(took.as_micros() as u64);
        self.request_bytes.observe(request_bytes as u64);
        self.response_bytes.observe(response_bytes as u64);
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    proto: &'static str,
    r#type: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResponseLabels {
    proto: &'static str,
    rcode: Rcode,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct UpstreamLabels {
    to: String,
    rcode: Rcode,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ToLabels {
    to: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TypeLabels {
    r#type: &'static str,
}

/// Shows the [`Queries`] of all threads to Prometheus.
#[derive(Clone, Debug, Default)]
struct Shown(Arc<Mutex<Vec<Arc<Queries>>>>);

impl std::fmt::Debug for Queries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Queries")
    }
}

impl Collector for Shown {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |count: &dyn Fn(&Queries) -> u64| -> ConstCounter<u64> {
            ConstCounter::new(all.iter().map(|queries| count(queries)).sum())
        };
        let mut requests = encoder.encode_descriptor(
            "coredns_dns_requests",
            "Queries, by transport and type",
            None,
            MetricType::Counter,
        )?;
        for (of, proto) in TRANSPORTS.into_iter().enumerate() {
            for (at, (_, name)) in TYPES.into_iter().enumerate() {
                let labels = RequestLabels {
                    proto,
                    r#type: name,
                };
                let value = sum(&|queries| queries.requests[of][at].load(Ordering::Relaxed));
                value.encode(requests.encode_family(&labels)?)?;
            }
        }
        let mut responses = encoder.encode_descriptor(
            "coredns_dns_responses",
            "Answers, by transport and response code",
            None,
            MetricType::Counter,
        )?;
        for (of, proto) in TRANSPORTS.into_iter().enumerate() {
            for (at, rcode) in Rcode::ALL.into_iter().enumerate() {
                let labels = ResponseLabels { proto, rcode };
                let value = sum(&|queries| queries.responses[of][at].load(Ordering::Relaxed));
                value.encode(responses.encode_family(&labels)?)?;
            }
        }
        let times: Vec<_> = all.iter().map(|queries| &queries.times).collect();
        let text = (
            "coredns_dns_request_duration",
            "Time from reading a query to its answer",
        );
        Buckets::encode(&times, &mut encoder, text, Unit::Seconds, 1e-6)?;
        let sizes: Vec<_> = all.iter().map(|queries| &queries.request_bytes).collect();
        let text = ("coredns_dns_request_size", "Size of queries");
        Buckets::encode(&sizes, &mut encoder, text, Unit::Bytes, 1.0)?;
        let sizes: Vec<_> = all.iter().map(|queries| &queries.response_bytes).collect();
        let text = ("coredns_dns_response_size", "Size of answers");
        Buckets::encode(&sizes, &mut encoder, text, Unit::Bytes, 1.0)
    }
}

/// What is counted of the caches.
#[derive(Clone)]
pub struct Caching {
    hits: Family<TypeLabels, Counter>,
    pub misses: Counter,
    pub prefetches: Counter,
    pub served_stale: Counter,
    pub evictions: Gauge<i64, AtomicI64>,
    entries: Family<TypeLabels, Gauge>,
}

const SUCCESS: TypeLabels = TypeLabels { r#type: "success" };
const DENIAL: TypeLabels = TypeLabels { r#type: "denial" };

impl Caching {
    fn registered(all: &mut Registering) -> Self {
        Self {
            hits: all.metric("coredns_cache_hits", "Answers from the cache"),
            misses: all.metric(
                "coredns_cache_misses",
                "Questions that the cache could not answer",
            ),
            prefetches: all.metric("coredns_cache_prefetch", "Entries renewed before their end"),
            served_stale: all.metric(
                "coredns_cache_served_stale",
                "Answers from entries past their end",
            ),
            entries: all.metric("coredns_cache_entries", "Entries of the caches"),
            evictions: all.metric(
                "keelway_dns_cache_evictions",
                "Entries that had to make room since the last reload",
            ),
        }
    }

    pub fn hit(&self, rcode: Rcode) {
        let labels = if rcode == Rcode::NoError {
            &SUCCESS
        } else {
            &DENIAL
        };
        self.hits.get_or_create(labels).inc();
    }

    pub fn entries(&self, [success, denial]: [usize; 2]) {
        self.entries.get_or_create(&SUCCESS).set(success as i64);
        self.entries.get_or_create(&DENIAL).set(denial as i64);
    }
}

/// What is counted of forwarding.
#[derive(Clone)]
pub struct Forwarding {
    answers: Family<UpstreamLabels, Histogram, fn() -> Histogram>,
    failed_checks: Family<ToLabels, Counter>,
    pub rejected: Counter,
    pub all_down: Counter,
}

/// [`Forwarding`] for one upstream.
pub struct UpstreamMetrics {
    to: String,
    of: Forwarding,
}

impl Forwarding {
    fn registered(all: &mut Registering) -> Self {
        fn histogram() -> Histogram {
            Histogram::new([0.001, 0.004, 0.016, 0.064, 0.256, 1.024, 4.096])
        }
        Self {
            answers: all.add(
                "coredns_proxy_request_duration_seconds",
                "Time that upstreams took to answer",
                Family::new_with_constructor(histogram as fn() -> Histogram),
            ),
            failed_checks: all.metric(
                "coredns_proxy_healthcheck_failures",
                "Health checks of upstreams that failed",
            ),
            rejected: all.metric(
                "coredns_forward_max_concurrent_rejects",
                "Queries refused because too many were in flight",
            ),
            all_down: all.metric(
                "coredns_forward_healthcheck_broken",
                "Questions asked while every upstream counted as down",
            ),
        }
    }

    pub fn upstream(&self, address: SocketAddr) -> UpstreamMetrics {
        UpstreamMetrics {
            to: address.to_string(),
            of: self.clone(),
        }
    }
}

impl UpstreamMetrics {
    pub fn answered(&self, took: Duration, rcode: Rcode) {
        let labels = UpstreamLabels {
            to: self.to.clone(),
            rcode,
        };
        let histogram = self.of.answers.get_or_create(&labels);
        histogram.observe(took.as_secs_f64());
    }

    pub fn check_failed(&self) {
        let to = self.to.clone();
        self.of.failed_checks.get_or_create(&ToLabels { to }).inc();
    }
}

/// Everything that is counted.
pub struct Metrics {
    registry: Registry,
    queries: Shown,
    pub caching: Caching,
    pub forwarding: Forwarding,
    pub reloads: Counter,
    pub failed_reloads: Counter,
    /// Queries that were not answered: no query, or their client has too many.
    pub dropped: Counter,
    /// Answers that were cut because their client had been sent enough.
    pub limited: Counter,
    pub queue_drops: Counter,
    pub held_back: Counter,
    pub unlogged: Counter,
    pub services: Gauge,
    pub synced: Gauge,
    pub from_agent: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut all = Registering(Registry::default());
        let queries = Shown::default();
        all.0.register_collector(Box::new(queries.clone()));
        Self {
            caching: Caching::registered(&mut all),
            forwarding: Forwarding::registered(&mut all),
            reloads: all.metric("keelway_dns_reloads", "Configurations taken over"),
            failed_reloads: all.metric(
                "coredns_reload_failed",
                "Configurations that were not taken over because of an error",
            ),
            dropped: all.metric(
                "keelway_dns_dropped",
                "Messages that were deliberately not answered",
            ),
            limited: all.metric(
                "keelway_dns_rate_limited",
                "Answers that were cut to send the client to TCP, since it had been sent much more than it sent",
            ),
            queue_drops: all.metric(
                "keelway_dns_queue_drops",
                "Datagrams that the kernel dropped because they came faster than they were read",
            ),
            held_back: all.metric(
                "keelway_dns_held_back",
                "Times that a client was kept from filling the queue",
            ),
            unlogged: all.metric(
                "keelway_dns_unlogged",
                "Lines of the query log that were left out because the log is too slow",
            ),
            services: all.metric("keelway_dns_services", "Services in the zone"),
            synced: all.metric("keelway_dns_synced", "Whether the zone is complete"),
            from_agent: all.metric(
                "keelway_dns_from_agent",
                "Whether the agent of the node tells of the cluster, so that it is not watched from here",
            ),
            queries,
            registry: all.0,
        }
    }
}

/// A registry that is being filled.
struct Registering(Registry);

impl Registering {
    fn metric<M: Metric + Clone + Default>(&mut self, name: &str, help: &str) -> M {
        self.add(name, help, M::default())
    }

    fn add<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }
}

impl Metrics {
    /// Counters for one thread: those of all are shown as one sum, and no two threads write to the same memory.
    pub fn queries(&self) -> Arc<Queries> {
        let queries = Arc::new(Queries::default());
        let mut all = self
            .queries
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.push(queries.clone());
        queries
    }

    /// All metrics in the OpenMetrics text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String can't fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
