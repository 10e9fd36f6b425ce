//! What a configuration says about names, ready to be looked up. Pure: whoever has to be asked is for [`crate::settings`].

use std::cmp::Reverse;
use std::sync::Arc;

use crate::answer::Policy;
use crate::cache::Cache;
use crate::config::spec::{BlockSpec, RouteSpec, Spec};
use crate::name::{Name, before};

/// What is done for names, by their zones.
pub struct Rules {
    /// The longest zone first, each with the index of its block.
    zones: Vec<(Name, usize)>,
    blocks: Vec<Arc<BlockRules>>,
}

/// What is done for the names of some zones.
pub struct BlockRules {
    pub spec: BlockSpec,
    pub policy: Policy,
    pub cache: Option<Arc<Cache>>,
    /// Indexes of the block's routes, that of the longest zone first.
    routes: Vec<usize>,
}

impl Rules {
    /// The rules of a configuration. `kept` gives a block the cache, or the lack of one, that it has had so far.
    pub fn new(spec: &Spec, kept: impl Fn(&BlockSpec) -> Option<Option<Arc<Cache>>>) -> Self {
        let mut zones = Vec::new();
        for (at, block) in spec.blocks.iter().enumerate() {
            zones.extend(block.zones.iter().map(|zone| (zone.clone(), at)));
        }
        // The longest zone that a name is in decides.
        zones.sort_by_key(|(zone, _)| Reverse(zone.labels()));
        let of = |block: &BlockSpec| Arc::new(BlockRules::new(block, kept(block)));
        Self {
            zones,
            blocks: spec.blocks.iter().map(of).collect(),
        }
    }

    /// The rules for a name in lower-case wire format, and the index of their block.
    pub fn find(&self, name: &[u8]) -> Option<(usize, &Arc<BlockRules>)> {
        let mut zones = self.zones.iter();
        let (_, at) = zones.find(|(zone, _)| before(name, zone.wire()).is_some())?;
        Some((*at, &self.blocks[*at]))
    }

    pub fn blocks(&self) -> &[Arc<BlockRules>] {
        &self.blocks
    }
}

impl BlockRules {
    fn new(spec: &BlockSpec, kept: Option<Option<Arc<Cache>>>) -> Self {
        let routes = spec.routes.iter().enumerate();
        let routes = routes.filter(|(_, route)| !route.servers.is_empty());
        let mut routes: Vec<usize> = routes.map(|(at, _)| at).collect();
        routes.sort_by_key(|at| Reverse(spec.routes[*at].zone.labels()));
        let cluster = spec.cluster.as_ref();
        Self {
            policy: Policy {
                ttl_s: cluster.map_or(5, |cluster| cluster.ttl_s),
                recursion: !routes.is_empty(),
                fallthrough: cluster.map_or_else(Vec::new, |cluster| cluster.fallthrough.clone()),
                udp_bytes_max: spec.udp_bytes_max,
                others_first: spec.hosts.is_some(),
            },
            cache: kept
                .unwrap_or_else(|| spec.cache.clone().map(|rules| Arc::new(Cache::new(rules)))),
            routes,
            spec: spec.clone(),
        }
    }

    /// Where names are asked for, in the order in which that is decided.
    pub fn routes(&self) -> impl Iterator<Item = &RouteSpec> {
        self.routes.iter().map(|at| &self.spec.routes[*at])
    }

    /// Which of [`BlockRules::routes`] a name in lower-case wire format is asked for by; `None` where it is nobody's to know.
    pub fn route(&self, name: &[u8]) -> Option<usize> {
        let is_in = |zone: &Name| before(name, zone.wire()).is_some();
        self.routes()
            .position(|route| is_in(&route.zone) && !route.except.iter().any(is_in))
    }
}
