//! Which keys are to be deleted when.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Instant is a time of the machine's clock, in milliseconds since the epoch: lifetimes go on while the process is down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Instant(pub u64);

/// Clock says what time the machine has. It may be set, forwards and backwards.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Default for Clock {
    fn default() -> Self {
        Self(Arc::new(SystemTime::now))
    }
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", (self.0)())
    }
}

impl Clock {
    #[cfg(test)]
    pub fn of(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    pub(super) fn now(&self) -> Instant {
        let since = (self.0)().duration_since(UNIX_EPOCH).unwrap_or_default();
        Instant(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    /// When a lifetime that begins now is over, rounded up so that neighbours share a commit.
    pub(super) fn after(&self, lifetime: Duration) -> Instant {
        let lifetime = u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX);
        let step = (lifetime / 64).max(1);
        let end = self.now().0.saturating_add(lifetime);
        Instant(end.div_ceil(step).saturating_mul(step))
    }

    /// How long it is until then.
    pub(super) fn left(&self, until: Instant) -> Duration {
        Duration::from_millis(until.0.saturating_sub(self.now().0))
    }
}

/// Expiries is kept by the writer alone, for the keys that have one.
pub(super) struct Expiries {
    at: HashMap<Arc<str>, Instant>,
    order: BTreeSet<(Instant, Arc<str>)>,
}

impl Expiries {
    pub fn new(loaded: Vec<(Arc<str>, Instant)>) -> Self {
        let order = loaded.iter().map(|(key, at)| (*at, key.clone())).collect();
        Self {
            at: loaded.into_iter().collect(),
            order,
        }
    }

    /// When a key ends.
    pub fn of(&self, key: &str) -> Option<Instant> {
        self.at.get(key).copied()
    }

    /// The first one.
    pub fn next(&self) -> Option<Instant> {
        self.order.first().map(|(at, _)| *at)
    }

    /// The first `max` keys whose time has come.
    pub fn due(&self, now: Instant, max: usize) -> Vec<Arc<str>> {
        self.order
            .iter()
            .take_while(|(at, _)| *at <= now)
            .take(max)
            .map(|(_, key)| key.clone())
            .collect()
    }

    pub fn set(&mut self, key: Arc<str>, expires: Option<Instant>) {
        if let Some(before) = self.at.remove(&key) {
            self.order.remove(&(before, key.clone()));
        }
        if let Some(at) = expires {
            self.order.insert((at, key.clone()));
            self.at.insert(key, at);
        }
    }
}
