//! What both stores serve reads and watches from: every record in memory in a persistent ordered map, and the recent writes.
//!
//! One writer publishes; readers take the published map by an O(1) clone. Watches hold a position in the history and
//! nothing else, so a slow one costs no memory: when the history has moved past it, it gets `StoreError::Compacted`.

mod history;
mod shares;

use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use futures::future::BoxFuture;
use im::OrdMap;
use tokio::sync::watch;

use super::{Page, Range, Record, Revision, Share, StoreError, WatchEvent, WatchStream, bucket_of};
pub(super) use history::{Bounds, Event};
use history::{History, Shared};
use shares::{Id, Ids};

/// Events that a watch hands out at once, beyond those of one revision.
const WATCH_BATCH_MAX: usize = 512;

pub(super) type Records = OrdMap<Arc<str>, Record>;

/// State is what readers see: published as a whole, under one lock.
struct State {
    records: Records,
    revision: Revision,
    history: History,
}

/// Replica is the store's state in memory. Clones share it.
#[derive(Clone)]
pub(super) struct Replica {
    state: Arc<RwLock<State>>,
    /// Tells of new revisions.
    revision: Arc<watch::Sender<Revision>>,
    ids: Ids,
}

impl Replica {
    pub fn new(records: Records, revision: Revision, bounds: Bounds) -> Self {
        let history = History::new(revision, bounds);
        Self {
            state: Arc::new(RwLock::new(State {
                records,
                revision,
                history,
            })),
            revision: Arc::new(watch::Sender::new(revision)),
            ids: Ids::default(),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        // A panic cannot leave the state half published: it is replaced by infallible moves.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, key: &str) -> Option<Record> {
        self.read().records.get(key).cloned()
    }

    pub fn revision(&self) -> Revision {
        self.read().revision
    }

    /// The newest state, for the one writer to change and publish.
    pub fn newest(&self) -> (Records, Revision) {
        let state = self.read();
        (state.records.clone(), state.revision)
    }

    /// Shows a new state to readers, and the events that led to it to watches.
    pub fn publish(&self, records: Records, revision: Revision, events: &[Arc<Event>]) {
        let shared = |event: &Arc<Event>| (event.clone(), self.ids.of_event(event));
        let events: Vec<Shared> = events.iter().map(shared).collect();
        let mut state = self.write();
        state.records = records;
        state.revision = revision;
        for event in &events {
            state.history.append(event.clone());
        }
        drop(state);
        // Those who wake look at once: they do not wait for each other as they would for who writes.
        self.read().history.wake(&events);
        self.revision.send_replace(revision);
    }

    /// Shows a state that nobody knows the way to: watches from before it are told to list again.
    pub fn replace(&self, records: Records, revision: Revision) {
        let mut state = self.write();
        state.records = records;
        state.revision = revision;
        state.history.forget(revision);
        drop(state);
        self.revision.send_replace(revision);
    }

    /// Waits until a revision has been published.
    pub async fn reached(&self, wanted: Revision) {
        // It fails when the sender is gone, which is kept here.
        let _ = self
            .revision
            .subscribe()
            .wait_for(|revision| *revision >= wanted)
            .await;
    }

    pub fn range(&self, range: Range<'_>) -> Result<Page, StoreError> {
        let (records, revision) = self.records_at(range.prefix, range.at)?;
        let mut page = Page {
            records: Vec::new(),
            revision,
            remaining: 0,
        };
        let start = match range.after {
            Some(after) if after >= range.prefix => Bound::Excluded(after),
            _ => Bound::Included(range.prefix),
        };
        // No key is looked at for its end: each look is at memory of its own.
        let end = past(range.prefix);
        let end = match (&end, start) {
            (Some(end), Bound::Excluded(after)) if after >= end.as_str() => return Ok(page),
            (Some(end), _) => Bound::Excluded(end.as_str()),
            (None, _) => Bound::Unbounded,
        };
        let bounds: (Bound<&str>, Bound<&str>) = (start, end);
        match range.keys {
            Some(keys) => {
                let within = keys
                    .iter()
                    .filter(|key| RangeBounds::<str>::contains(&bounds, &***key));
                page.take(within.filter_map(|key| records.get(&**key)), &range);
            }
            None => {
                let within = records.range::<(Bound<&str>, Bound<&str>), str>(bounds);
                page.take(within.map(|(_, record)| record), &range);
            }
        }
        Ok(page)
    }

    /// The map as it was at a revision: the newest one with the later events of the prefix undone.
    fn records_at(
        &self,
        prefix: &str,
        at: Option<Revision>,
    ) -> Result<(Records, Revision), StoreError> {
        let state = self.read();
        let at = at.unwrap_or(state.revision);
        if at > state.revision {
            return Err(StoreError::Future {
                wanted: at,
                current: state.revision,
            });
        }
        let mut records = state.records.clone();
        if at < state.revision {
            for event in state.history.after(prefix, at, usize::MAX)?.iter().rev() {
                event.undo(&mut records);
            }
        }
        Ok((records, at))
    }

    /// A watch of a share of what is under a prefix. What is wider than a bucket has no shares.
    pub fn watch(
        &self,
        prefix: &str,
        share: Share<'_>,
        from: Revision,
    ) -> Result<Box<dyn WatchStream>, StoreError> {
        let share = bucket_of(prefix).zip(self.ids.of(share));
        let known = {
            let state = self.read();
            state.check(prefix, from)?;
            match share {
                Some(_) => None,
                None => state.history.subscribe(prefix),
            }
        };
        let changed = match (known, share) {
            (Some(changed), _) => changed,
            (None, Some((bucket, share))) => {
                let mut state = self.write();
                state.check(prefix, from)?;
                state.history.subscribe_share(bucket, share, from)
            }
            // The bucket has never been written to: its place in the history is made now.
            (None, None) => self.write().history.subscribe_new(prefix),
        };
        Ok(Box::new(Watch {
            replica: self.clone(),
            prefix: prefix.into(),
            share: share.map(|(_, share)| share),
            position: from,
            changed,
            peers: 1,
        }))
    }
}

impl State {
    /// Whether all writes under the prefix after a revision, which has been reached, are known.
    fn check(&self, prefix: &str, from: Revision) -> Result<(), StoreError> {
        if from > self.revision {
            return Err(StoreError::Future {
                wanted: from,
                current: self.revision,
            });
        }
        self.history.check(prefix, from)
    }
}

impl Page {
    /// Takes what is wanted of the records within a range, and counts the rest.
    fn take<'a>(&mut self, mut within: impl Iterator<Item = &'a Record>, range: &Range<'_>) {
        let wanted = within
            .by_ref()
            .filter(|record| range.wanted.is_none_or(|wanted| wanted(record)))
            .cloned();
        self.records = match range.limit {
            Some(limit) => wanted.take(limit).collect(),
            None => wanted.collect(),
        };
        self.remaining = within.count();
    }
}

/// The first text after all that begin with a prefix; None when there is none.
fn past(prefix: &str) -> Option<String> {
    let kept = prefix.trim_end_matches(char::MAX);
    let last = kept.chars().next_back()?;
    let next = (last..=char::MAX).nth(1)?;
    let mut end = kept[..kept.len() - last.len_utf8()].to_owned();
    end.push(next);
    Some(end)
}

/// Watch is a position in the history of a prefix.
struct Watch {
    replica: Replica,
    prefix: Arc<str>,
    /// None for all of it.
    share: Option<Id>,
    /// Everything up to here has been handed out.
    position: Revision,
    changed: watch::Receiver<()>,
    /// As many watches wait for what this one waits for.
    peers: usize,
}

impl Watch {
    /// The first events that have not been handed out.
    fn after(&self, state: &State, max: usize) -> Result<Vec<Arc<Event>>, StoreError> {
        let (prefix, from) = (&self.prefix, self.position);
        match self.share {
            Some(share) => state.history.after_of(prefix, share, from, max),
            None => state.history.after(prefix, from, max),
        }
    }

    fn pending(&mut self) -> Result<Vec<Arc<Event>>, StoreError> {
        let state = self.replica.read();
        let events = self.after(&state, WATCH_BATCH_MAX)?;
        self.peers = state.history.watches(&self.prefix, self.share);
        self.position = match events.last() {
            Some(last) => last.record.revision,
            None => state.revision,
        };
        Ok(events)
    }
}

impl WatchStream for Watch {
    fn next(&mut self) -> BoxFuture<'_, Result<Vec<Arc<WatchEvent>>, StoreError>> {
        Box::pin(async move {
            loop {
                self.changed.borrow_and_update();
                let events = self.pending()?;
                if !events.is_empty() {
                    return Ok(events);
                }
                self.changed
                    .changed()
                    .await
                    .map_err(|_| StoreError::Closed)?;
            }
        })
    }

    fn peers(&self) -> usize {
        self.peers
    }

    fn progress(&self) -> Revision {
        let state = self.replica.read();
        match self.after(&state, 1) {
            Ok(events) if events.is_empty() => state.revision,
            _ => self.position,
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some((bucket, share)) = bucket_of(&self.prefix).zip(self.share) {
            self.replica.write().history.leave(bucket, share);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn replica(keys: &[String]) -> Replica {
        let record = |key: &String| Record {
            key: key.as_str().into(),
            value: Bytes::copy_from_slice(key.as_bytes()),
            revision: Revision(3),
            created: Revision(2),
        };
        let records = keys.iter().map(record).map(|r| (r.key.clone(), r));
        Replica::new(records.collect(), Revision(3), Bounds::default())
    }

    proptest! {
        #[test]
        fn a_range_is_what_begins_with_its_prefix_and_is_wanted(
            keys in prop::collection::btree_set("[a/\u{7f}\u{10ffff}]{0,4}", 0..20),
            prefix in "[a/\u{7f}\u{10ffff}]{0,3}",
            after in prop::option::of("[a/\u{7f}\u{10ffff}]{0,4}"),
            limit in prop::option::of(0_usize..5),
            odd in any::<bool>(),
            named in prop::option::of(prop::collection::btree_set("[a/\u{7f}\u{10ffff}]{0,4}", 0..20)),
        ) {
            let keys: Vec<String> = keys.into_iter().collect();
            let wanted = |key: &str| !odd || key.len() % 2 == 1;
            let follows = |key: &&String| after.as_ref().is_none_or(|after| *key > after);
            let is_named = |key: &&String| named.as_ref().is_none_or(|named| named.contains(*key));
            let within: Vec<&String> = keys.iter().filter(|key| key.starts_with(&prefix)).filter(follows).filter(is_named).collect();
            let named: Option<Vec<Arc<str>>> =
                named.as_ref().map(|named| named.iter().map(|key| key.as_str().into()).collect());
            let most = limit.unwrap_or(usize::MAX);
            let expected: Vec<&String> = within.iter().copied().filter(|key| wanted(key)).take(most).collect();
            let page = replica(&keys)
                .range(Range {
                    prefix: &prefix,
                    after: after.as_deref(),
                    limit,
                    at: None,
                    wanted: Some(&|record| wanted(&record.key)),
                    keys: named.as_deref(),
                })
                .unwrap();
            let found: Vec<&str> = page.records.iter().map(|record| &*record.key).collect();
            prop_assert_eq!(&found, &expected);
            let remaining = match expected.last() {
                _ if expected.len() < most => 0,
                Some(last) => within.iter().filter(|key| *key > last).count(),
                None => within.len(),
            };
            prop_assert_eq!(page.remaining, remaining);
        }
    }
}
