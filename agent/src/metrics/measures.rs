//! What is measured while the agent works, rather than read from its state when somebody asks.

use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

type Seconds = Gauge<f64, AtomicU64>;

/// Measurements, shared by whoever takes them and whoever tells them.
#[derive(Clone, Debug)]
pub struct Measures {
    sync: Histogram,
    full_sync: Histogram,
    partial_sync: Histogram,
    network_programming: Histogram,
    programming: Histogram,
    last_sync: Seconds,
    last_queued: Seconds,
    service_changes: Counter,
    endpoint_changes: Counter,
    service_changes_pending: Gauge,
    endpoint_changes_pending: Gauge,
    health: Family<CodeLabel, Counter>,
    live: Family<CodeLabel, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

/// Whether a batch compared everything, as the first one does, or what had changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    Full,
    Partial,
}

/// kube-proxy's buckets begin at a millisecond, which is slow here; its own are all among these.
fn sync_buckets() -> impl Iterator<Item = f64> {
    [0.0001, 0.0002, 0.0005]
        .into_iter()
        .chain((0..15).map(|power| 0.001 * f64::from(1 << power)))
}

/// kube-proxy's: a quarter and half a second, every second to a minute, every five to two, every thirty to five.
fn network_buckets() -> impl Iterator<Item = f64> {
    [0.25, 0.5]
        .into_iter()
        .chain((1..60).map(f64::from))
        .chain((12..24).map(|step| 5.0 * f64::from(step)))
        .chain((4..11).map(|step| 30.0 * f64::from(step)))
}

impl Default for Measures {
    fn default() -> Self {
        Self {
            sync: Histogram::new(sync_buckets()),
            full_sync: Histogram::new(sync_buckets()),
            partial_sync: Histogram::new(sync_buckets()),
            network_programming: Histogram::new(network_buckets()),
            programming: Histogram::new(sync_buckets()),
            last_sync: Seconds::default(),
            last_queued: Seconds::default(),
            service_changes: Counter::default(),
            endpoint_changes: Counter::default(),
            service_changes_pending: Gauge::default(),
            endpoint_changes_pending: Gauge::default(),
            health: Family::default(),
            live: Family::default(),
        }
    }
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

impl Measures {
    /// Services changed, so many of them.
    pub fn services_changed(&self, count: usize) {
        self.last_queued.set(now());
        self.service_changes.inc_by(count as u64);
        self.service_changes_pending
            .inc_by(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// EndpointSlices changed, so many of them.
    pub fn slices_changed(&self, count: usize) {
        self.last_queued.set(now());
        self.endpoint_changes.inc_by(count as u64);
        self.endpoint_changes_pending
            .inc_by(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// What came in is in the maps, or changes nothing that they hold.
    pub fn nothing_pending(&self) {
        self.service_changes_pending.set(0);
        self.endpoint_changes_pending.set(0);
    }

    /// A batch is in the maps. `seen` is when each of its changes came in.
    pub fn synced(&self, extent: Extent, began: Instant, seen: impl Iterator<Item = Instant>) {
        let took = began.elapsed().as_secs_f64();
        self.sync.observe(took);
        match extent {
            Extent::Full => self.full_sync.observe(took),
            Extent::Partial => self.partial_sync.observe(took),
        }
        self.last_sync.set(now());
        for seen in seen {
            self.programming.observe(seen.elapsed().as_secs_f64());
        }
        self.nothing_pending();
    }

    /// What made endpoints change, as their controller has noted it, is in the maps after so long.
    pub fn network_programmed(&self, latency: Duration) {
        self.network_programming.observe(latency.as_secs_f64());
    }

    /// Somebody asked `/healthz` or `/livez` of the proxy.
    pub fn health_asked(&self, path: &str, healthy: bool) {
        let code = if healthy { "200" } else { "503" };
        let asked = if path == "/livez" {
            &self.live
        } else {
            &self.health
        };
        asked.get_or_create(&CodeLabel { code }).inc();
    }

    /// Puts all of it into a registry without a prefix.
    pub(super) fn register(&self, registry: &mut Registry) {
        let rules = "kubeproxy_sync_proxy_rules";
        for (name, help, histogram) in [
            (
                format!("{rules}_duration_seconds"),
                "Time to plan a batch of changes and bring the maps to it",
                &self.sync,
            ),
            (
                "kubeproxy_sync_full_proxy_rules_duration_seconds".into(),
                "The same, of batches that compared everything",
                &self.full_sync,
            ),
            (
                "kubeproxy_sync_partial_proxy_rules_duration_seconds".into(),
                "The same, of batches of what had changed",
                &self.partial_sync,
            ),
            (
                "kubeproxy_network_programming_duration_seconds".into(),
                "Time from what made endpoints change, as their controller noted it, to the maps",
                &self.network_programming,
            ),
            (
                "keelway_programming_duration_seconds".into(),
                "Time from a change's arrival from the API server to the maps",
                &self.programming,
            ),
        ] {
            registry.register(name, help, histogram.clone());
        }
        for (name, help, gauge) in [
            (
                "last_timestamp_seconds",
                "When the maps last had everything",
                &self.last_sync,
            ),
            (
                "last_queued_timestamp_seconds",
                "When a change last came in",
                &self.last_queued,
            ),
        ] {
            registry.register(format!("{rules}_{name}"), help, gauge.clone());
        }
        for (name, help, counter, pending) in [
            (
                "service_changes",
                "Changes of Services",
                &self.service_changes,
                &self.service_changes_pending,
            ),
            (
                "endpoint_changes",
                "Changes of EndpointSlices",
                &self.endpoint_changes,
                &self.endpoint_changes_pending,
            ),
        ] {
            registry.register(format!("{rules}_{name}"), help, counter.clone());
            let waiting = format!("{help} that the maps lack");
            registry.register(format!("{rules}_{name}_pending"), waiting, pending.clone());
        }
        for (name, help, family) in [
            (
                "kubeproxy_proxy_healthz",
                "Answers of the proxy's /healthz, by status code",
                &self.health,
            ),
            (
                "kubeproxy_proxy_livez",
                "Answers of the proxy's /livez, by status code",
                &self.live,
            ),
        ] {
            registry.register(name, help, family.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn buckets_rise() {
        for buckets in [
            sync_buckets().collect::<Vec<f64>>(),
            network_buckets().collect(),
        ] {
            assert!(buckets.is_sorted_by(|a, b| a < b), "{buckets:?}");
        }
        assert_eq!(network_buckets().last(), Some(300.0));
    }

    #[test]
    fn what_was_measured_is_told_by_kube_proxys_names() {
        let measures = Measures::default();
        measures.services_changed(2);
        measures.slices_changed(1);
        measures.synced(Extent::Full, Instant::now(), [Instant::now()].into_iter());
        measures.slices_changed(3);
        measures.network_programmed(Duration::from_millis(300));
        measures.health_asked("/livez", false);
        let mut registry = Registry::default();
        measures.register(&mut registry);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in [
            "kubeproxy_sync_proxy_rules_duration_seconds_count 1",
            "kubeproxy_sync_full_proxy_rules_duration_seconds_count 1",
            "kubeproxy_sync_partial_proxy_rules_duration_seconds_count 0",
            "kubeproxy_sync_proxy_rules_service_changes_total 2",
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 4",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 3",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"0.5\"} 1",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"0.25\"} 0",
            "keelway_programming_duration_seconds_count 1",
            "kubeproxy_proxy_livez_total{code=\"503\"} 1",
        ] {
            assert!(text.contains(&format!("\n{line}\n")), "{line} in\n{text}");
        }
    }
}
