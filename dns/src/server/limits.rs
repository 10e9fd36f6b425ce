//! What one client may have at once, and all together: a client that asks for much is refused before others feel it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Queries that wait for others, of everyone and of one client.
const SLOW_MAX: usize = 4096;
const SLOW_EACH: usize = 1024;
/// Connections, of everyone and of one client.
const CONNECTIONS_MAX: usize = 1024;
const CONNECTIONS_EACH: usize = 128;

/// Counts of what is going on.
#[derive(Default)]
pub(super) struct Limits {
    slow: Mutex<Counts>,
    connections: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    all: usize,
    of: HashMap<IpAddr, usize>,
}

#[derive(Clone, Copy)]
enum What {
    Slow,
    Connection,
}

/// A place that is given back when this is dropped.
pub(super) struct Place {
    limits: Arc<Limits>,
    what: What,
    client: IpAddr,
}

impl Limits {
    fn counts(&self, what: What) -> std::sync::MutexGuard<'_, Counts> {
        let counts = match what {
            What::Slow => &self.slow,
            What::Connection => &self.connections,
        };
        counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(
        self: &Arc<Self>,
        what: What,
        client: IpAddr,
        [all, each]: [usize; 2],
    ) -> Option<Place> {
        let mut counts = self.counts(what);
        if counts.all >= all || counts.of.get(&client).is_some_and(|count| *count >= each) {
            return None;
        }
        counts.all += 1;
        *counts.of.entry(client).or_default() += 1;
        let limits = self.clone();
        Some(Place {
            limits,
            what,
            client,
        })
    }

    /// A place for a query that waits for others.
    pub fn slow(self: &Arc<Self>, client: IpAddr) -> Option<Place> {
        self.take(What::Slow, client, [SLOW_MAX, SLOW_EACH])
    }

    /// A place for a connection.
    pub fn connection(self: &Arc<Self>, client: IpAddr) -> Option<Place> {
        self.take(
            What::Connection,
            client,
            [CONNECTIONS_MAX, CONNECTIONS_EACH],
        )
    }

    pub fn slow_queries(&self) -> usize {
        self.counts(What::Slow).all
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.limits.counts(self.what);
        counts.all -= 1;
        if let Some(count) = counts.of.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                counts.of.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_can_not_take_every_place_and_places_come_back() {
        let limits = Arc::new(Limits::default());
        let [greedy, other] = [[10, 0, 0, 1], [10, 0, 0, 2]].map(IpAddr::from);
        let places: Vec<_> = (0..SLOW_EACH + 1)
            .map_while(|_| limits.slow(greedy))
            .collect();
        assert_eq!(places.len(), SLOW_EACH);
        assert!(limits.slow(other).is_some());
        drop(places);
        assert_eq!(limits.slow_queries(), 0);
        assert!(limits.slow(greedy).is_some());
        assert!(limits.counts(What::Slow).of.is_empty());
    }
}
