//! Counters of the API server, named as upstream names them where it has the same.

use std::sync::atomic::AtomicI64;
use std::time::Duration;

use http::{Method, StatusCode, request::Parts};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::request::{self, Query, Target};
use crate::registry::Resource;
use crate::store::Revision;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    verb: &'static str,
    resource: &'static str,
    subresource: String,
    code: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerbLabels {
    verb: &'static str,
    resource: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResourceLabels {
    resource: &'static str,
}

/// What a request was about, for counting and logging.
#[derive(Debug)]
pub struct Seen {
    pub path: String,
    verb: &'static str,
    resource: &'static str,
    subresource: String,
}

impl Seen {
    pub fn of(parts: &Parts) -> Self {
        let path = parts.uri.path().to_owned();
        let Some(target) = Target::parse(&path) else {
            let verb = if parts.method == Method::GET {
                "get"
            } else {
                "other"
            };
            return Self {
                path,
                verb,
                resource: "",
                subresource: String::new(),
            };
        };
        let verb = request::verb(
            &parts.method,
            &target,
            &Query::parse(parts.uri.query().unwrap_or("")),
        );
        // Only subresources that exist become label values: clients must not be able to invent any.
        let known = target
            .subresource
            .filter(|name| target.resource.subresource(name).is_some());
        Self {
            path,
            verb,
            resource: target.resource.plural,
            subresource: known.unwrap_or_default(),
        }
    }
}

type Histograms = Family<VerbLabels, Histogram, fn() -> Histogram>;

/// The API server's metrics.
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    durations: Histograms,
    watchers: Family<ResourceLabels, Gauge>,
    revision: Gauge<i64, AtomicI64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let requests = Family::default();
        let durations: Histograms =
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.0005, 2.0, 16)));
        let watchers = Family::default();
        let revision = Gauge::default();
        registry.register(
            "apiserver_request",
            "Requests by verb, resource and code",
            requests.clone(),
        );
        let help = "Time from request to the start of its answer, by verb and resource";
        registry.register(
            "apiserver_request_duration_seconds",
            help,
            durations.clone(),
        );
        registry.register(
            "apiserver_registered_watchers",
            "Open watches by resource",
            watchers.clone(),
        );
        registry.register(
            "keelway_store_revision",
            "Newest revision of the store",
            revision.clone(),
        );
        Self {
            registry,
            requests,
            durations,
            watchers,
            revision,
        }
    }
}

impl Metrics {
    pub fn observe(&self, seen: &Seen, code: StatusCode, took: Duration) {
        let labels = RequestLabels {
            verb: seen.verb,
            resource: seen.resource,
            subresource: seen.subresource.clone(),
            code: code.as_u16(),
        };
        self.requests.get_or_create(&labels).inc();
        let labels = VerbLabels {
            verb: seen.verb,
            resource: seen.resource,
        };
        self.durations
            .get_or_create(&labels)
            .observe(took.as_secs_f64());
    }

    /// Counts a watch for as long as the answer lives.
    pub fn watching(&self, resource: &'static Resource) -> Watching {
        let gauge = self
            .watchers
            .get_or_create(&ResourceLabels {
                resource: resource.plural,
            })
            .clone();
        gauge.inc();
        Watching(gauge)
    }

    pub fn encode(&self, revision: Revision) -> String {
        self.revision
            .set(i64::try_from(revision.0).unwrap_or(i64::MAX));
        let mut out = String::new();
        // Writing into a String does not fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }
}

/// A running watch, counted.
pub struct Watching(Gauge);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.dec();
    }
}
