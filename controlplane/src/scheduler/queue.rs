//! The pods that wait for a node: ready to be tried, backing off, or waiting for something to change. Waiting is counted by a clock
//! that nobody can set.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use crate::controllers::object::Key;

/// Upstream's back-off.
const BACKOFF_MIN: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A pod that no event wakes is tried again after this all the same.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    ForTurn,
    Until(Instant),
    ForEvent { since: Instant },
}

#[derive(Clone, Debug)]
struct Entry {
    priority: i32,
    /// Order of arrival.
    serial: u64,
    failures: u32,
    /// None before the first one.
    last_failure: Option<Instant>,
    waits: Waits,
}

/// Pods by priority, then by arrival.
#[derive(Debug, Default)]
pub struct Queue {
    entries: HashMap<Key, Entry>,
    turn: BTreeSet<(Reverse<i32>, u64, Key)>,
    timed: BTreeSet<(Instant, Key)>,
    /// Those that wait for an event: every binding is one, so they must not be searched for.
    parked: BTreeSet<Key>,
    serial: u64,
}

impl Queue {
    /// Adds a pod, or has one that is known tried again at once because it was changed.
    pub fn add(&mut self, key: &Key, priority: i32) {
        let serial = match self.entries.get(key) {
            Some(entry) => entry.serial,
            None => {
                self.serial += 1;
                self.serial
            }
        };
        let (failures, last_failure) = self
            .entries
            .get(key)
            .map_or((0, None), |entry| (entry.failures, entry.last_failure));
        self.remove(key);
        self.insert(
            key,
            Entry {
                priority,
                serial,
                failures,
                last_failure,
                waits: Waits::ForTurn,
            },
        );
    }

    pub fn contains(&self, key: &Key) -> bool {
        self.entries.contains_key(key)
    }

    pub fn remove(&mut self, key: &Key) {
        let Some(entry) = self.entries.remove(key) else {
            return;
        };
        match entry.waits {
            Waits::ForTurn => {
                self.turn
                    .remove(&(Reverse(entry.priority), entry.serial, key.clone()));
            }
            Waits::Until(at) => {
                self.timed.remove(&(at, key.clone()));
            }
            Waits::ForEvent { since } => {
                self.parked.remove(key);
                self.timed.remove(&(forgotten(since), key.clone()));
            }
        }
    }

    fn insert(&mut self, key: &Key, entry: Entry) {
        match entry.waits {
            Waits::ForTurn => {
                self.turn
                    .insert((Reverse(entry.priority), entry.serial, key.clone()));
            }
            Waits::Until(at) => {
                self.timed.insert((at, key.clone()));
            }
            Waits::ForEvent { since } => {
                self.parked.insert(key.clone());
                self.timed.insert((forgotten(since), key.clone()));
            }
        }
        self.entries.insert(key.clone(), entry);
    }

    /// The pod to be tried next. It stays known until it is removed; `failed` puts it back.
    pub fn next(&mut self) -> Option<Key> {
        self.turn.pop_first().map(|(_, _, key)| key)
    }

    /// No node takes the pod: it waits for an event.
    pub fn unschedulable(&mut self, key: &Key, now: Instant) {
        self.put_back(key, now, |_| Waits::ForEvent { since: now });
    }

    /// Something went wrong with the pod: it is tried again after a while.
    pub fn failed(&mut self, key: &Key, now: Instant) {
        self.put_back(key, now, |entry| {
            backoff_end(entry).map_or(Waits::ForTurn, Waits::Until)
        });
    }

    fn put_back(&mut self, key: &Key, now: Instant, waits: impl Fn(&Entry) -> Waits) {
        let Some(mut entry) = self.entries.get(key).cloned() else {
            return;
        };
        self.remove(key);
        entry.failures += 1;
        entry.last_failure = Some(now);
        entry.waits = waits(&entry);
        self.insert(key, entry);
    }

    /// Something changed that may let waiting pods in: each is tried as soon as its back-off is over.
    pub fn wake(&mut self, now: Instant) {
        for key in std::mem::take(&mut self.parked) {
            let Some(mut entry) = self.entries.get(&key).cloned() else {
                continue;
            };
            self.remove(&key);
            entry.waits = match backoff_end(&entry) {
                Some(end) if end > now => Waits::Until(end),
                _ => Waits::ForTurn,
            };
            self.insert(&key, entry);
        }
    }

    /// Gives those their turn whose time has come.
    pub fn tick(&mut self, now: Instant) {
        while self.timed.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, key)) = self.timed.pop_first() else {
                return;
            };
            self.parked.remove(&key);
            if let Some(mut entry) = self.entries.remove(&key) {
                entry.waits = Waits::ForTurn;
                self.insert(&key, entry);
            }
        }
    }

    /// When `tick` has something to do next.
    pub fn next_tick(&self) -> Option<Instant> {
        self.timed.first().map(|(at, _)| *at)
    }
}

fn forgotten(since: Instant) -> Instant {
    since + FORGOTTEN_AFTER
}

fn backoff_end(entry: &Entry) -> Option<Instant> {
    let doublings = entry.failures.saturating_sub(1).min(10);
    let wait = BACKOFF_MIN.saturating_mul(1 << doublings).min(BACKOFF_MAX);
    entry.last_failure.map(|at| at + wait)
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;

    fn at(second: u64) -> Instant {
        static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
        *BEGAN + Duration::from_secs(second)
    }

    fn key(name: &str) -> Key {
        Key::new("default", name)
    }

    #[test]
    fn higher_priority_goes_first_then_who_came_first() {
        let mut queue = Queue::default();
        for (name, priority) in [("a", 0), ("b", 10), ("c", 0), ("d", 10)] {
            queue.add(&key(name), priority);
        }
        let order: Vec<_> = std::iter::from_fn(|| queue.next())
            .map(|key| key.name.to_string())
            .collect();
        assert_eq!(order, ["b", "d", "a", "c"]);
    }

    #[test]
    fn an_unschedulable_pod_waits_for_an_event_and_its_back_off() {
        let mut queue = Queue::default();
        queue.add(&key("a"), 0);
        assert_eq!(queue.next(), Some(key("a")));
        queue.unschedulable(&key("a"), at(0));
        queue.tick(at(200));
        assert_eq!(queue.next(), None, "time alone does not help");
        queue.wake(at(200));
        assert_eq!(queue.next(), Some(key("a")));
        queue.unschedulable(&key("a"), at(200));
        queue.wake(at(200));
        assert_eq!(queue.next(), None, "the back-off is not over");
        queue.tick(at(201));
        assert_eq!(queue.next(), None, "twice as long the second time");
        queue.tick(at(202));
        assert_eq!(queue.next(), Some(key("a")));
    }

    #[test]
    fn a_pod_is_not_forgotten_without_events_and_a_removed_one_does_not_return() {
        let mut queue = Queue::default();
        for name in ["a", "b"] {
            queue.add(&key(name), 0);
            queue.next();
            queue.unschedulable(&key(name), at(0));
        }
        queue.remove(&key("b"));
        queue.tick(at(301));
        assert_eq!(queue.next(), Some(key("a")));
        assert_eq!(queue.next(), None);
        assert!(!queue.contains(&key("b")));
    }
}
