//! The embedded store: a replica in memory, and the durable copy in redb.
//!
//! One writer thread owns all change. It takes whatever writes have queued up, decides each one's condition in order,
//! commits them to disk in one transaction (one fsync for the whole group), then publishes the new state and answers.
//! Readers never wait for a disk.

mod disk;
mod durable;
mod expiry;
mod integrity;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};

use super::replica::{Bounds, Event, Records, Replica};
use super::snapshot::{Snapshot, lifetime};
use super::{
    Change, Expect, Page, Range, Record, Revision, Share, Store, StoreError, WatchStream, Write,
};
use disk::{Disk, Group};
use durable::{Durable, Reopen};
pub use expiry::Clock;
use expiry::{Expiries, Instant};
use writer::{Request, Wish};

/// Writes that may wait for the writer before callers are held back.
const QUEUE_WRITES_MAX: usize = 4096;

/// Records of a snapshot that are written at a time.
const IMPORT_RECORDS: usize = 1024;

/// EmbeddedConfig says where the state lives and how much history is kept.
#[derive(Clone, Debug)]
pub struct EmbeddedConfig {
    /// The database file; its folder must exist.
    pub path: PathBuf,
    pub history: Bounds,
    /// What lifetimes are counted by.
    pub clock: Clock,
}

impl EmbeddedConfig {
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            history: Bounds::default(),
            clock: Clock::default(),
        }
    }
}

/// Embedded is the store of one process over one file.
pub struct Embedded {
    replica: Replica,
    clock: Clock,
    queue: Option<mpsc::Sender<Request>>,
    writer: Option<JoinHandle<()>>,
}

impl Embedded {
    /// Opens or creates the database and loads it. Blocks for as long as reading the file takes.
    pub fn open(config: &EmbeddedConfig) -> Result<Self, StoreError> {
        let path = config.path.clone();
        let reopen = Box::new(move || Disk::reopen(&path));
        Self::start(Disk::open(&config.path)?, reopen, config)
    }

    /// Makes a database of a snapshot, whole or not at all. There must be none yet.
    pub fn import(path: &Path, snapshot: &Snapshot) -> Result<(), StoreError> {
        let failed = |reason: String| StoreError::Disk {
            operation: "restore to",
            path: path.display().to_string(),
            reason,
        };
        if path.exists() {
            return Err(failed("there is a state already".to_owned()));
        }
        let partial = path.with_extension("partial");
        if partial.exists() {
            std::fs::remove_file(&partial).map_err(|error| failed(error.to_string()))?;
        }
        let (disk, clock) = (Disk::open(&partial)?, Clock::default());
        for group in snapshot.records.chunks(IMPORT_RECORDS) {
            let event = |record: &Record| Event {
                change: Change::Put,
                record: record.clone(),
                previous: None,
            };
            let ends = |record: &Record| {
                let lifetime = lifetime(&record.key)?;
                Some((record.key.clone(), Some(clock.after(lifetime))))
            };
            disk.commit(&Group {
                events: group.iter().map(event).map(Arc::new).collect(),
                expiries: group.iter().filter_map(ends).collect(),
                revision: snapshot.revision,
            })?;
        }
        disk.commit(&Group {
            events: Vec::new(),
            expiries: Vec::new(),
            revision: snapshot.revision,
        })?;
        drop(disk);
        std::fs::rename(&partial, path)
            .and_then(|()| std::fs::File::open(path.parent().unwrap_or(path))?.sync_all())
            .map_err(|error| failed(error.to_string()))
    }

    fn start(disk: Disk, reopen: Reopen, config: &EmbeddedConfig) -> Result<Self, StoreError> {
        let loaded = disk.load()?;
        let expiries = Expiries::new(loaded.expiries);
        let records = loaded
            .records
            .into_iter()
            .map(|r| (r.key.clone(), r))
            .collect();
        let replica = Replica::new(records, loaded.revision, config.history);
        let (queue, requests) = mpsc::channel(QUEUE_WRITES_MAX);
        let (shared, path) = (replica.clone(), config.path.display().to_string());
        let clock = config.clock.clone();
        let writer = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || {
                let disk = Durable::new(disk, reopen);
                writer::run(disk, &shared, requests, (expiries, clock));
            })
            .map_err(|e| StoreError::Disk {
                operation: "start the writer of",
                path,
                reason: e.to_string(),
            })?;
        Ok(Self {
            replica,
            clock: config.clock.clone(),
            queue: Some(queue),
            writer: Some(writer),
        })
    }

    async fn write(&self, first: Wish, along: Vec<Wish>) -> Result<Record, StoreError> {
        let (answer, outcome) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or(StoreError::Closed)?;
        queue
            .send(Request {
                first,
                along,
                answer,
            })
            .await
            .map_err(|_| StoreError::Closed)?;
        outcome.await.map_err(|_| StoreError::Closed)?
    }
}

impl Store for Embedded {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(async move { Ok(self.replica.get(key)) })
    }

    fn put<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        expect: Expect,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        let wish = Wish::new(key, Some(value), expect);
        Box::pin(self.write(wish, Vec::new()))
    }

    fn put_for<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        expect: Expect,
        lifetime: Duration,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        let wish = Wish {
            expires: Some(self.clock.after(lifetime)),
            ..Wish::new(key, Some(value), expect)
        };
        Box::pin(self.write(wish, Vec::new()))
    }

    fn delete<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
    ) -> BoxFuture<'a, Result<Record, StoreError>> {
        Box::pin(self.write(Wish::new(key, None, expect), Vec::new()))
    }

    fn commit(&self, first: Write, along: Vec<Write>) -> BoxFuture<'_, Result<Record, StoreError>> {
        let wish = |write: Write| Wish::new(&write.key, write.value, write.expect);
        Box::pin(self.write(wish(first), along.into_iter().map(wish).collect()))
    }

    fn list<'a>(&'a self, range: Range<'a>) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(async move { self.replica.range(range) })
    }

    fn watch_share<'a>(
        &'a self,
        prefix: &'a str,
        share: Share<'a>,
        from: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn WatchStream>, StoreError>> {
        Box::pin(async move { self.replica.watch(prefix, share, from) })
    }

    fn revision(&self) -> Revision {
        self.replica.revision()
    }

    fn reached(&self, revision: Revision) -> BoxFuture<'_, ()> {
        Box::pin(self.replica.reached(revision))
    }

    fn is_shared(&self) -> bool {
        false
    }

    fn kept(&self) -> &dyn Store {
        self
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

#[cfg(test)]
mod tests;
