//! Places that are few, for clients that may want all of them: a client may have no more than are still free, so that however many ask
//! for much, whoever asks for little finds a place.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// A number of places.
pub struct Shares {
    places: usize,
    /// What one client may have, however many are free.
    each_max: usize,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    all: usize,
    of: HashMap<IpAddr, usize>,
}

/// A place that is given back when this is dropped.
pub struct Place {
    shares: Arc<Shares>,
    client: IpAddr,
}

impl Shares {
    pub fn new(places: usize, each_max: usize) -> Arc<Self> {
        Arc::new(Self {
            places,
            each_max,
            counts: Mutex::default(),
        })
    }

    fn counts(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a client; `None` where it has its share.
    pub fn take(self: &Arc<Self>, client: IpAddr) -> Option<Place> {
        let mut counts = self.counts();
        let own = counts.of.get(&client).copied().unwrap_or_default();
        if own >= self.each_max || own >= self.places.saturating_sub(counts.all) {
            return None;
        }
        counts.all += 1;
        *counts.of.entry(client).or_default() += 1;
        Some(Place {
            shares: self.clone(),
            client,
        })
    }

    /// Places that are taken.
    pub fn taken(&self) -> usize {
        self.counts().all
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.shares.counts();
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

    fn all_of(shares: &Arc<Shares>, client: u8) -> Vec<Place> {
        let client = IpAddr::from([10, 0, 0, client]);
        std::iter::from_fn(|| shares.take(client)).collect()
    }

    #[test]
    fn however_many_take_all_they_can_there_is_a_place_for_the_next() {
        let shares = Shares::new(1000, 1000);
        let first = all_of(&shares, 0);
        assert_eq!(
            first.len(),
            500,
            "the half, since the other half is free then"
        );
        let greedy: Vec<Vec<Place>> = (1..=8).map(|client| all_of(&shares, client)).collect();
        assert!(greedy.iter().all(|places| !places.is_empty()));
        assert!(shares.take([10, 0, 0, 99].into()).is_some());
        // Those that had more than their share get nothing until they have less.
        assert!(all_of(&shares, 0).is_empty());
        drop((first, greedy));
        assert_eq!(shares.taken(), 0);
        assert!(shares.counts().of.is_empty());
    }

    #[test]
    fn a_client_has_a_bound_of_its_own_too() {
        let shares = Shares::new(1000, 100);
        assert_eq!(all_of(&shares, 0).len(), 100);
        assert!(Shares::new(0, 100).take([10, 0, 0, 1].into()).is_none());
        assert_eq!(all_of(&Shares::new(1, 1), 0).len(), 1);
    }
}
