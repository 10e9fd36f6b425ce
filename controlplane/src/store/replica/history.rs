//! The recent writes, per bucket, bounded: what watches and lists at a revision are served from.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::watch;

use super::super::{Change, Revision, StoreError, bucket_of};
use super::Records;
use super::shares::{EventIds, Id, Watched};

/// One write.
pub(in crate::store) use super::super::WatchEvent as Event;

impl Event {
    /// Makes the records what they are after it.
    pub(in crate::store) fn apply(&self, records: &mut Records) {
        match self.change {
            Change::Put => records.insert(self.record.key.clone(), self.record.clone()),
            Change::Delete => records.remove(&*self.record.key),
        };
    }

    /// Makes the records what they were before it.
    pub(in crate::store) fn undo(&self, records: &mut Records) {
        match &self.previous {
            Some(previous) => records.insert(previous.key.clone(), previous.clone()),
            None => records.remove(&*self.record.key),
        };
    }

    /// What keeping this event holds on to beyond the live records: a put keeps what it replaced, a delete its own value.
    fn bytes(&self) -> usize {
        let previous = self.previous.as_ref().map_or(0, |r| r.value.len());
        previous + self.record.key.len() + size_of::<Self>() + size_of::<EventIds>()
    }
}

/// An event, with the shares that it is of.
pub(super) type Shared = (Arc<Event>, EventIds);

/// Bucket is the history of one bucket. A bucket that is written often does not shorten another one's history.
struct Bucket {
    events: VecDeque<Shared>,
    bytes: usize,
    /// Everything after this revision is still here.
    compacted: Revision,
    /// Wakes watches of all that is in it.
    changed: watch::Sender<()>,
    /// Wakes the others.
    watched: Watched,
}

impl Bucket {
    fn new(compacted: Revision) -> Self {
        Self {
            events: VecDeque::new(),
            bytes: 0,
            compacted,
            changed: watch::Sender::new(()),
            watched: Watched::default(),
        }
    }

    fn after(&self, revision: Revision) -> impl Iterator<Item = &Arc<Event>> {
        after(&self.events, revision).map(|(event, _)| event)
    }
}

fn after(events: &VecDeque<Shared>, revision: Revision) -> impl Iterator<Item = &Shared> {
    let start = events.partition_point(|(event, _)| event.record.revision <= revision);
    events.range(start..)
}

/// Bounds say how much history is kept.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Events per bucket.
    pub events_max: usize,
    /// Bytes of values per bucket.
    pub bytes_max: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            events_max: 8192,
            bytes_max: 16 << 20,
        }
    }
}

pub(super) struct History {
    buckets: HashMap<Box<str>, Bucket>,
    /// Wakes watches of prefixes that are wider than a bucket.
    changed: watch::Sender<()>,
    /// The revision at start: older ones were never in memory.
    origin: Revision,
    bounds: Bounds,
}

impl History {
    pub fn new(origin: Revision, bounds: Bounds) -> Self {
        Self {
            buckets: HashMap::new(),
            changed: watch::Sender::new(()),
            origin,
            bounds,
        }
    }

    /// Drops every event: the history begins after a revision. Whoever waits looks, and finds that it has fallen behind.
    pub fn forget(&mut self, origin: Revision) {
        self.origin = origin;
        for bucket in self.buckets.values_mut() {
            bucket.events.clear();
            bucket.bytes = 0;
            bucket.compacted = origin;
            bucket.changed.send_replace(());
            bucket.watched.forget(origin);
        }
        self.changed.send_replace(());
    }

    /// Appends events, in order of revision. Call `wake` for them once they are visible.
    pub fn append(&mut self, (event, ids): Shared) {
        let (origin, bounds) = (self.origin, self.bounds);
        let bucket = self.bucket(bucket_of(&event.record.key).unwrap_or_default(), origin);
        bucket.bytes += event.bytes();
        bucket.watched.append(&event, ids);
        bucket.events.push_back((event, ids));
        // The newest event stays whatever its size: a watcher that keeps up must see it.
        while bucket.events.len() > 1
            && (bucket.events.len() > bounds.events_max || bucket.bytes > bounds.bytes_max)
        {
            if let Some((old, ids)) = bucket.events.pop_front() {
                bucket.bytes -= old.bytes();
                bucket.compacted = old.record.revision;
                bucket.watched.trim(old.record.revision, ids);
            }
        }
    }

    pub fn wake(&self, events: &[Shared]) {
        let mut woken: Option<&str> = None;
        for (event, ids) in events {
            let name = bucket_of(&event.record.key).unwrap_or_default();
            let Some(bucket) = self.buckets.get(name) else {
                continue;
            };
            bucket.watched.wake(*ids);
            if woken != Some(name) {
                bucket.changed.send_replace(());
                woken = Some(name);
            }
        }
        self.changed.send_replace(());
    }

    /// Whether all writes under the prefix after a revision are still here.
    pub fn check(&self, prefix: &str, after: Revision) -> Result<(), StoreError> {
        let oldest = match bucket_of(prefix) {
            Some(name) => self.buckets.get(name).map_or(self.origin, |b| b.compacted),
            None => self
                .buckets
                .values()
                .map(|b| b.compacted)
                .max()
                .unwrap_or(self.origin)
                .max(self.origin),
        };
        if after < oldest {
            Err(StoreError::Compacted {
                wanted: after,
                oldest,
            })
        } else {
            Ok(())
        }
    }

    /// The first `max` writes under the prefix after a revision, and those that share the last one's revision.
    pub fn after(
        &self,
        prefix: &str,
        revision: Revision,
        max: usize,
    ) -> Result<Vec<Arc<Event>>, StoreError> {
        self.check(prefix, revision)?;
        let wanted = |event: &&Arc<Event>| event.record.key.starts_with(prefix);
        if let Some(name) = bucket_of(prefix) {
            let Some(bucket) = self.buckets.get(name) else {
                return Ok(Vec::new());
            };
            return Ok(whole(bucket.after(revision).filter(wanted), max));
        }
        let mut events: Vec<_> = self
            .buckets
            .values()
            .flat_map(|b| b.after(revision))
            .filter(wanted)
            .collect();
        events.sort_by_key(|e| e.record.revision);
        Ok(whole(events.into_iter(), max))
    }

    /// What wakes a watch of the prefix; None when the bucket is not there yet.
    pub fn subscribe(&self, prefix: &str) -> Option<watch::Receiver<()>> {
        match bucket_of(prefix) {
            Some(name) => self.buckets.get(name).map(|b| b.changed.subscribe()),
            None => Some(self.changed.subscribe()),
        }
    }

    pub fn subscribe_new(&mut self, prefix: &str) -> watch::Receiver<()> {
        let origin = self.origin;
        match bucket_of(prefix) {
            Some(name) => self.bucket(name, origin).changed.subscribe(),
            None => self.changed.subscribe(),
        }
    }

    /// What wakes a watch of a share of a bucket. Whoever has it says when it `leaves`.
    pub fn subscribe_share(
        &mut self,
        bucket: &str,
        share: Id,
        from: Revision,
    ) -> watch::Receiver<()> {
        let origin = self.origin;
        let bucket = self.bucket(bucket, origin);
        let events = &bucket.events;
        bucket.watched.subscribe(share, from, || {
            let of_it = after(events, from).filter(move |(_, ids)| ids.contains(share));
            of_it.map(|(event, _)| event)
        })
    }

    /// How many watches are woken together: all of a share, or all that look at everything.
    pub fn watches(&self, prefix: &str, share: Option<Id>) -> usize {
        let Some(name) = bucket_of(prefix) else {
            return self.changed.receiver_count();
        };
        self.buckets.get(name).map_or(0, |bucket| match share {
            Some(share) => bucket.watched.watches(share),
            None => bucket.changed.receiver_count(),
        })
    }

    #[cfg(test)]
    pub fn watched(&self) -> impl Iterator<Item = &Watched> {
        self.buckets.values().map(|bucket| &bucket.watched)
    }

    pub fn leave(&mut self, bucket: &str, share: Id) {
        if let Some(bucket) = self.buckets.get_mut(bucket) {
            bucket.watched.leave(share);
        }
    }

    /// As `after`, of a share that is subscribed to: what was forgotten of others is no matter.
    pub fn after_of(
        &self,
        prefix: &str,
        share: Id,
        revision: Revision,
        max: usize,
    ) -> Result<Vec<Arc<Event>>, StoreError> {
        let bucket = bucket_of(prefix).and_then(|name| self.buckets.get(name));
        let Some(bucket) = bucket else {
            return Ok(Vec::new());
        };
        let events = bucket.watched.after(share, revision)?;
        let wanted = events.filter(|event| event.record.key.starts_with(prefix));
        Ok(whole(wanted, max))
    }

    fn bucket(&mut self, name: &str, origin: Revision) -> &mut Bucket {
        if !self.buckets.contains_key(name) {
            self.buckets.insert(name.into(), Bucket::new(origin));
        }
        self.buckets
            .get_mut(name)
            .expect("inserted above when it was absent")
    }
}

/// So many events, and the rest of the last one's revision: a position can only be between revisions.
fn whole<'a>(events: impl Iterator<Item = &'a Arc<Event>>, max: usize) -> Vec<Arc<Event>> {
    let mut taken: Vec<Arc<Event>> = Vec::new();
    for event in events {
        let begins = taken
            .last()
            .is_none_or(|last| last.record.revision != event.record.revision);
        if begins && taken.len() >= max {
            break;
        }
        taken.push(event.clone());
    }
    taken
}
