//! A configuration at work: its rules, and the upstreams that are asked by them.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use ipnetwork::IpNetwork;
use tokio::sync::watch;

use crate::cache::Entry;
use crate::config::spec::{BlockSpec, RouteSpec, Spec};
use crate::failures::Failures;
use crate::forward::{ForwardError, Forwarder, Tls, TlsError, Upstream};
use crate::metrics::Metrics;
use crate::rules::{BlockRules, Rules};
use crate::zone::ZoneSettings;

/// What a question to upstreams came to, for all who asked it.
pub type Outcome = Result<Arc<Entry>, Arc<ForwardError>>;

/// Questions that are being asked, and where their answer will be.
pub type Flights = HashMap<Box<[u8]>, watch::Receiver<Option<Outcome>>>;

/// Everything that a reload replaces.
pub struct Settings {
    pub spec: Spec,
    pub rules: Rules,
    /// Those of the rules, one for one.
    blocks: Vec<Arc<Block>>,
    logs: bool,
}

/// What is done for the names of some zones, and who is asked about them.
pub struct Block {
    rules: Arc<BlockRules>,
    /// Those of the rules, one for one.
    routes: Vec<Route>,
    /// Questions that are being asked: whoever comes later waits for the same answer.
    pub flights: Mutex<Flights>,
    /// What became of those that came to nothing.
    pub failures: Failures,
}

/// Where names of a zone are asked for.
pub struct Route {
    pub spec: RouteSpec,
    pub forwarder: Forwarder,
}

impl Deref for Block {
    type Target = BlockRules;

    fn deref(&self) -> &BlockRules {
        &self.rules
    }
}

impl Settings {
    /// Puts a configuration to work. Caches of blocks that are as before are kept.
    pub fn build(
        spec: Spec,
        metrics: &Metrics,
        previous: Option<&Settings>,
    ) -> Result<Self, TlsError> {
        let kept = |spec: &BlockSpec| {
            let mut all = previous?.rules.blocks().iter();
            let same = all.find(|block| {
                block.spec.zones == spec.zones
                    && block.spec.routes == spec.routes
                    && block.spec.cache == spec.cache
            });
            same.map(|block| block.cache.clone())
        };
        let rules = Rules::new(&spec, kept);
        let blocks = rules.blocks().iter();
        let blocks = blocks.map(|block| Block::build(block, metrics).map(Arc::new));
        let blocks = blocks.collect::<Result<Vec<_>, _>>()?;
        let logs = spec.blocks.iter().any(|block| block.log.is_on());
        Ok(Self {
            spec,
            rules,
            blocks,
            logs,
        })
    }

    /// Tells of what the configuration says and is not done.
    pub fn warn(&self) {
        for warning in &self.spec.warnings {
            tracing::warn!("{warning}");
        }
    }

    /// The block that a name in lower-case wire format belongs to.
    pub fn block(&self, name: &[u8]) -> Option<&Arc<Block>> {
        self.rules.find(name).map(|(at, _)| &self.blocks[at])
    }

    pub fn blocks(&self) -> impl Iterator<Item = &Arc<Block>> {
        self.blocks.iter()
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
        let routes = self.blocks.iter().flat_map(|block| &block.routes);
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
    fn build(rules: &Arc<BlockRules>, metrics: &Metrics) -> Result<Self, TlsError> {
        let mut routes = Vec::new();
        for route in rules.routes() {
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
            // A route of the rules has a server.
            if let Some(forwarder) = Forwarder::new(upstreams, rules, metrics.forwarding.clone()) {
                routes.push(Route {
                    spec: route.clone(),
                    forwarder,
                });
            }
        }
        Ok(Self {
            rules: rules.clone(),
            routes,
            flights: Mutex::default(),
            failures: Failures::by(rules.spec.log.errors.as_ref()),
        })
    }

    /// Who is asked about a name in lower-case wire format.
    pub fn route(&self, name: &[u8]) -> Option<&Route> {
        self.routes.get(self.rules.route(name)?)
    }

    /// Questions in flight.
    pub fn in_flight(&self) -> usize {
        self.flights
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }
}
