//! The embedded store: every record in memory in a persistent ordered map, and on disk in redb.
//!
//! One writer thread owns all change. It takes whatever writes have queued up, decides each one's condition in order,
//! commits them to disk in one transaction (one fsync for the whole group), then publishes the new map, appends the
//! events to their buckets' history, wakes the watchers and answers. Readers take the published map by an O(1) clone and
//! never wait for a disk. Watchers hold a position in the history and nothing else, so a slow one costs no memory: when
//! the history has moved past it, it gets `StoreError::Compacted`.

mod disk;
mod expiry;
mod history;
mod writer;

use std::ops::Bound;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use im::OrdMap;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    Change, Expect, Page, Range, Record, Revision, Store, StoreError, WatchEvent, WatchStream,
};
use disk::Disk;
use expiry::{Expiries, Instant};
use history::{Event, History};
use writer::{Request, Write};

/// Writes that may wait for the writer before callers are held back.
const QUEUE_WRITES_MAX: usize = 4096;
/// Events that a watch hands out at once.
const WATCH_BATCH_MAX: usize = 512;

/// EmbeddedConfig says where the state lives and how much history is kept.
#[derive(Clone, Debug)]
pub struct EmbeddedConfig {
    /// The database file; its folder must exist.
    pub path: PathBuf,
    /// Events kept per bucket.
    pub history_events_max: usize,
    /// Bytes of values kept per bucket's history.
    pub history_bytes_max: usize,
}

impl EmbeddedConfig {
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            history_events_max: 8192,
            history_bytes_max: 16 << 20,
        }
    }
}

/// State is what readers see: published as a whole, under one lock.
struct State {
    records: OrdMap<Arc<str>, Record>,
    revision: Revision,
    history: History,
}

type SharedState = Arc<RwLock<State>>;

/// Embedded is the store of one process over one file.
pub struct Embedded {
    state: SharedState,
    queue: Option<mpsc::Sender<Request>>,
    writer: Option<JoinHandle<()>>,
}

impl Embedded {
    /// Opens or creates the database and loads it. Blocks for as long as reading the file takes.
    pub fn open(config: &EmbeddedConfig) -> Result<Self, StoreError> {
        Self::start(Disk::open(&config.path)?, config)
    }

    fn start(disk: Disk, config: &EmbeddedConfig) -> Result<Self, StoreError> {
        let loaded = disk.load()?;
        let revision = loaded.revision;
        let expiries = Expiries::new(loaded.expiries);
        let records: OrdMap<Arc<str>, Record> = loaded
            .records
            .into_iter()
            .map(|r| (r.key.clone(), r))
            .collect();
        let history = History::new(
            revision,
            config.history_events_max,
            config.history_bytes_max,
        );
        let state = Arc::new(RwLock::new(State {
            records,
            revision,
            history,
        }));
        let (queue, requests) = mpsc::channel(QUEUE_WRITES_MAX);
        let (shared, path) = (state.clone(), config.path.display().to_string());
        let writer = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer::run(&disk, &shared, requests, expiries))
            .map_err(|e| StoreError::Disk {
                operation: "start the writer of",
                path,
                reason: e.to_string(),
            })?;
        Ok(Self {
            state,
            queue: Some(queue),
            writer: Some(writer),
        })
    }

    async fn write(&self, write: Write) -> Result<Record, StoreError> {
        let (answer, outcome) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or(StoreError::Closed)?;
        queue
            .send(Request { write, answer })
            .await
            .map_err(|_| StoreError::Closed)?;
        outcome.await.map_err(|_| StoreError::Closed)?
    }

    fn range(&self, range: Range<'_>) -> Result<Page, StoreError> {
        let (records, revision) = self.records_at(range.prefix, range.at)?;
        let start = match range.after {
            Some(after) if after >= range.prefix => Bound::Excluded(after),
            _ => Bound::Included(range.prefix),
        };
        let mut matching = records
            .range::<(Bound<&str>, Bound<&str>), str>((start, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(range.prefix))
            .map(|(_, record)| record);
        let records: Vec<Record> = match range.limit {
            Some(limit) => matching.by_ref().take(limit).cloned().collect(),
            None => matching.by_ref().cloned().collect(),
        };
        Ok(Page {
            records,
            revision,
            remaining: matching.count(),
        })
    }

    /// The map as it was at a revision: the newest one with the later events of the prefix undone.
    fn records_at(
        &self,
        prefix: &str,
        at: Option<Revision>,
    ) -> Result<(OrdMap<Arc<str>, Record>, Revision), StoreError> {
        let state = read(&self.state);
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
                match &event.previous {
                    Some(previous) => records.insert(previous.key.clone(), previous.clone()),
                    None => records.remove(&*event.record.key),
                };
            }
        }
        Ok((records, at))
    }
}

fn read(state: &RwLock<State>) -> RwLockReadGuard<'_, State> {
    // A panic cannot leave the state half published: it is replaced by infallible moves.
    state.read().unwrap_or_else(PoisonError::into_inner)
}

impl Store for Embedded {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(async move { Ok(read(&self.state).records.get(key).cloned()) })
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        expect: Expect,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        Box::pin(self.write(Write {
            key: key.into(),
            value: Some(value),
            expect,
            expires: None,
        }))
    }

    fn put_for<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        expect: Expect,
        lifetime: Duration,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        let expires = Some(Instant::after(lifetime));
        Box::pin(self.write(Write {
            key: key.into(),
            value: Some(value),
            expect,
            expires,
        }))
    }

    fn delete<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        Box::pin(self.write(Write {
            key: key.into(),
            value: None,
            expect,
            expires: None,
        }))
    }

    fn list<'a>(&'a self, range: Range<'a>) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(async move { self.range(range) })
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        from: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn WatchStream>, StoreError>> {
        Box::pin(async move {
            let changed = {
                let state = read(&self.state);
                if from > state.revision {
                    return Err(StoreError::Future {
                        wanted: from,
                        current: state.revision,
                    });
                }
                state.history.check(prefix, from)?;
                state.history.subscribe(prefix)
            };
            let changed = match changed {
                Some(changed) => changed,
                // The bucket has never been written to: its place in the history is made now.
                None => self
                    .state
                    .write()
                    .unwrap_or_else(PoisonError::into_inner)
                    .history
                    .subscribe_new(prefix),
            };
            let watch = Watch {
                state: self.state.clone(),
                prefix: prefix.into(),
                position: from,
                changed,
            };
            Ok(Box::new(watch) as Box<dyn WatchStream>)
        })
    }

    fn revision(&self) -> Revision {
        read(&self.state).revision
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        // The writer answers what is queued, then sees the queue closed and lets go of the file.
        self.queue.take();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// Watch is a position in the history of a prefix.
struct Watch {
    state: SharedState,
    prefix: Arc<str>,
    /// Everything up to here has been handed out.
    position: Revision,
    changed: watch::Receiver<()>,
}

impl Watch {
    fn pending(&mut self) -> Result<Vec<Arc<Event>>, StoreError> {
        let state = read(&self.state);
        let events = state
            .history
            .after(&self.prefix, self.position, WATCH_BATCH_MAX)?;
        self.position = match events.last() {
            Some(last) => last.record.revision,
            None => state.revision,
        };
        Ok(events)
    }
}

impl WatchStream for Watch {
    fn next(&mut self) -> BoxFuture<'_, Result<Vec<WatchEvent>, StoreError>> {
        Box::pin(async move {
            loop {
                self.changed.borrow_and_update();
                let events = self.pending()?;
                if !events.is_empty() {
                    return Ok(events.iter().map(|event| event.to_watch_event()).collect());
                }
                self.changed
                    .changed()
                    .await
                    .map_err(|_| StoreError::Closed)?;
            }
        })
    }

    fn progress(&self) -> Revision {
        let state = read(&self.state);
        match state.history.after(&self.prefix, self.position, 1) {
            Ok(events) if events.is_empty() => state.revision,
            _ => self.position,
        }
    }
}

#[cfg(test)]
mod tests;
