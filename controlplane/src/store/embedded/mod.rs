//! The embedded store: a replica in memory, and the durable copy in redb.
//!
//! One writer thread owns all change. It takes whatever writes have queued up, decides each one's condition in order,
//! commits them to disk in one transaction (one fsync for the whole group), then publishes the new state and answers.
//! Readers never wait for a disk.

mod disk;
mod expiry;
mod writer;

use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};

use super::replica::{Bounds, Event, Replica};
use super::{Change, Expect, Page, Range, Record, Revision, Store, StoreError, WatchStream};
use disk::Disk;
use expiry::{Expiries, Instant};
use writer::{Request, Write};

/// Writes that may wait for the writer before callers are held back.
const QUEUE_WRITES_MAX: usize = 4096;

/// EmbeddedConfig says where the state lives and how much history is kept.
#[derive(Clone, Debug)]
pub struct EmbeddedConfig {
    /// The database file; its folder must exist.
    pub path: PathBuf,
    pub history: Bounds,
}

impl EmbeddedConfig {
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            history: Bounds::default(),
        }
    }
}

/// Embedded is the store of one process over one file.
pub struct Embedded {
    replica: Replica,
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
        let expiries = Expiries::new(loaded.expiries);
        let records = loaded
            .records
            .into_iter()
            .map(|r| (r.key.clone(), r))
            .collect();
        let replica = Replica::new(records, loaded.revision, config.history);
        let (queue, requests) = mpsc::channel(QUEUE_WRITES_MAX);
        let (shared, path) = (replica.clone(), config.path.display().to_string());
        let writer = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer::run(&disk, &shared, requests, expiries))
            .map_err(|e| StoreError::Disk {
                operation: "start the writer of",
                path,
                reason: e.to_string(),
            })?;
        Ok(Self {
            replica,
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
        Box::pin(async move { self.replica.range(range) })
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        from: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn WatchStream>, StoreError>> {
        Box::pin(async move { self.replica.watch(prefix, from) })
    }

    fn revision(&self) -> Revision {
        self.replica.revision()
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
