//! A configuration at work: what is done for the names of each zone, with its cache and its upstreams.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use ipnetwork::IpNetwork;
use tokio::sync::watch;

use crate::answer::Policy;
use crate::cache::{Cache, Entry};
use crate::config::spec::{BlockSpec, RouteSpec, Spec};
use crate::forward::{ForwardError, Forwarder, Tls, TlsError, Upstream};
use crate::metrics::Metrics;
use crate::name::{Name, before};
use crate::zone::ZoneSettings;

/// What a question to upstreams came to, for all who asked it.
pub type Outcome = Result<Arc<Entry>, Arc<ForwardError>>;

/// Questions that are being asked, and where their answer will be.
pub type Flights = HashMap<Box<[u8]>, watch::Receiver<Option<Outcome>>>;

/// Everything that a reload replaces.
pub struct Settings {
    pub spec: Spec,
    blocks: Vec<(Name, Arc<Block>)>,
    logs: bool,
}

/// What is done for the names of some zones.
pub struct Block {
    pub spec: BlockSpec,
    pub policy: Policy,
    pub cache: Option<Arc<Cache>>,
    routes: Vec<Route>,
    /// Questions that are being asked: whoever comes later waits for the same answer.
    pub flights: Mutex<Flights>,
}

/// Where names of a zone are asked for.
pub struct Route {
    pub spec: RouteSpec,
    pub forwarder: Forwarder,
}

impl Settings {
    /// Puts a configuration to work. Caches of blocks that are as before are kept.
    pub fn build(
        spec: Spec,
        metrics: &Metrics,
        previous: Option<&Settings>,
    ) -> Result<Self, TlsError> {
        let mut blocks = Vec::new();
        for block_spec in &spec.blocks {
            let same = previous.and_then(|previous| {
                let mut all = previous.blocks.iter().map(|(_, block)| block);
                all.find(|block| {
                    block.spec.zones == block_spec.zones
                        && block.spec.routes == block_spec.routes
                        && block.spec.cache == block_spec.cache
                })
            });
            let cache = same.map(|block| block.cache.clone());
            let block = Arc::new(Block::build(block_spec, metrics, cache)?);
            blocks.extend(
                block_spec
                    .zones
                    .iter()
                    .map(|zone| (zone.clone(), block.clone())),
            );
        }
        // The longest zone that a name is in decides.
        blocks.sort_by_key(|(zone, _)| std::cmp::Reverse(zone.labels()));
        let logs = spec.blocks.iter().any(|block| block.log.is_on());
        Ok(Self { spec, blocks, logs })
    }

    /// Tells of what the configuration says and is not done.
    pub fn warn(&self) {
        for warning in &self.spec.warnings {
            tracing::warn!("{warning}");
        }
    }

    /// The block that a name in lower-case wire format belongs to.
    pub fn block(&self, name: &[u8]) -> Option<&Arc<Block>> {
        self.blocks
            .iter()
            .find(|(zone, _)| before(name, zone.wire()).is_some())
            .map(|(_, block)| block)
    }

    pub fn blocks(&self) -> impl Iterator<Item = &Arc<Block>> {
        self.blocks.iter().map(|(_, block)| block)
    }

    /// Whether any query is logged.
    pub fn logs(&self) -> bool {
        self.logs
    }

    pub fn zone(&self) -> &ZoneSettings {
        &self.spec.zone
    }

    /// Whether pods have to be watched.
    pub fn needs_pods(&self) -> bool {
        self.spec.zone.pods == crate::zone::Pods::Verified
            || self
                .spec
                .blocks
                .iter()
                .any(|block| block.autopath.is_some())
    }

    /// Who may have the whole zone.
    pub fn transfer_peers(&self) -> impl Iterator<Item = &IpNetwork> {
        self.spec
            .blocks
            .iter()
            .filter_map(|block| block.cluster.as_ref())
            .flat_map(|cluster| &cluster.transfer)
    }

    /// Sends a question to each upstream of the root that must not come back. Returns the names, with who was asked.
    pub fn probe_loops(&self) -> Vec<(Vec<u8>, Arc<Upstream>)> {
        let mut probes = Vec::new();
        let routes = self.blocks.iter().flat_map(|(_, block)| &block.routes);
        for upstream in routes.flat_map(|route| route.forwarder.upstreams()) {
            let mut name = Vec::new();
            for _ in 0..2 {
                let label = format!("{:016x}", rand::random::<u64>());
                name.push(label.len() as u8);
                name.extend(label.into_bytes());
            }
            name.push(0);
            probes.push((name, upstream.clone()));
        }
        probes
    }
}

impl Block {
    fn build(
        spec: &BlockSpec,
        metrics: &Metrics,
        cache: Option<Option<Arc<Cache>>>,
    ) -> Result<Self, TlsError> {
        let mut routes = Vec::new();
        for route in &spec.routes {
            let mut upstreams = Vec::new();
            for server in &route.servers {
                let tls = server.tls.as_ref().map(|tls| {
                    let own = tls.own.as_ref();
                    let own = own.map(|(certificate, key)| (certificate.as_path(), key.as_path()));
                    Tls::new(&tls.name, tls.authorities.as_deref(), own)
                });
                upstreams.push(Upstream::new(
                    server.address,
                    tls.transpose()?,
                    &metrics.forwarding,
                ));
            }
            let rules = route.rules.clone();
            if let Some(forwarder) = Forwarder::new(upstreams, rules, metrics.forwarding.clone()) {
                routes.push(Route {
                    spec: route.clone(),
                    forwarder,
                });
            }
        }
        routes.sort_by_key(|route| std::cmp::Reverse(route.spec.zone.labels()));
        let cluster = spec.cluster.as_ref();
        Ok(Self {
            policy: Policy {
                ttl_s: cluster.map_or(5, |cluster| cluster.ttl_s),
                recursion: !routes.is_empty(),
                fallthrough: cluster.map_or_else(Vec::new, |cluster| cluster.fallthrough.clone()),
                udp_bytes_max: spec.udp_bytes_max,
                others_first: spec.hosts.is_some(),
            },
            cache: cache
                .unwrap_or_else(|| spec.cache.clone().map(|rules| Arc::new(Cache::new(rules)))),
            routes,
            flights: Mutex::default(),
            spec: spec.clone(),
        })
    }

    /// Who is asked about a name in lower-case wire format.
    pub fn route(&self, name: &[u8]) -> Option<&Route> {
        let is_in = |zone: &Name| before(name, zone.wire()).is_some();
        self.routes
            .iter()
            .find(|route| is_in(&route.spec.zone) && !route.spec.except.iter().any(is_in))
    }

    /// Questions in flight.
    pub fn in_flight(&self) -> usize {
        self.flights
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }
}
