//! How far behind the cluster the maps are: changes that came in and are not in the maps yet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster_model::{Change, Kind, Object};
use jiff::Timestamp;

use crate::health::ProxyHealth;
use crate::metrics::{Extent, Measures};
use crate::source::concerns_maps;

/// Changes of which the arrival is remembered: a cluster that is listed is one batch of any size, and needs no more.
const WAITING_MAX: usize = 10_000;

/// The changes that wait, and who is told when they do not any more.
#[derive(Debug)]
pub struct Progress {
    pub measures: Measures,
    pub health: Arc<ProxyHealth>,
    /// What happened before is not this process's latency.
    started: Timestamp,
    /// When each change came in.
    waiting: Vec<Instant>,
    /// When what the slices' controllers acted on happened.
    triggers: Vec<Timestamp>,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            measures: Measures::default(),
            health: Arc::default(),
            started: Timestamp::now(),
            waiting: Vec::new(),
            triggers: Vec::new(),
        }
    }
}

impl Progress {
    /// A change came in.
    pub fn change(&mut self, change: &Change, seen: Instant) {
        let (kind, count) = match change {
            Change::Upsert(object) => (object.kind(), 1),
            Change::Remove(gone) => (gone.kind, 1),
            Change::Replace(kind, objects) => (*kind, objects.len()),
        };
        if !concerns_maps(kind) {
            return;
        }
        match kind {
            Kind::Service => self.measures.services_changed(count),
            _ => self.measures.slices_changed(count),
        }
        if self.waiting.len() < WAITING_MAX {
            self.waiting.push(seen);
        }
        let changed = match change {
            Change::Upsert(object) => std::slice::from_ref(object),
            Change::Replace(_, objects) => objects,
            Change::Remove(_) => &[],
        };
        let happened = changed.iter().filter_map(|object| match object {
            Object::EndpointSlice(slice) => slice.last_change.filter(|when| *when > self.started),
            _ => None,
        });
        let room = WAITING_MAX.saturating_sub(self.triggers.len());
        self.triggers.extend(happened.take(room));
    }

    /// Everything that came in is in the maps; `took` says since when it has been worked on.
    pub fn synced(&mut self, extent: Extent, began: Instant) {
        self.measures.synced(extent, began, self.waiting.drain(..));
        let now = Timestamp::now();
        for happened in self.triggers.drain(..) {
            // Clocks of two machines: what seems to lie ahead took no time.
            let latency = Duration::try_from(now.duration_since(happened)).unwrap_or_default();
            self.measures.network_programmed(latency);
        }
        self.health.updated(began);
    }

    /// What came in changed nothing that the maps hold.
    pub fn nothing_to_do(&mut self, taken: Instant) {
        self.measures.nothing_pending();
        self.waiting.clear();
        self.triggers.clear();
        self.health.updated(taken);
    }
}
