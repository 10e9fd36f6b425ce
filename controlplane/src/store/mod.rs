//! The store: one ordered key space with one revision counter, compare-and-swap writes, lists at a revision and
//! watches from a revision. Everything above it is stateless.
//!
//! Keys are paths of the form `/<group or "core">/<plural>/[<namespace>/]<name>`; the first two segments are the key's
//! *bucket*, the unit in which watchers are woken. Values are opaque bytes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;

#[cfg(test)]
mod contract;
mod embedded;
mod etcd;
mod replica;
mod sealed;
mod snapshot;

pub use embedded::{Clock, Embedded, EmbeddedConfig};
pub use etcd::{Etcd, EtcdConfig, EtcdMember, EtcdMembership};
pub use sealed::{Keys, KeysError, Sealed};
pub use snapshot::{SERVERS, Snapshot, SnapshotError, lifetime};

/// Where pods are kept: their values alone are looked into for watches.
pub const PODS: &str = "/core/pods/";

/// Revision is a point in the store's history: every write gets the next one. It is what clients see as `resourceVersion`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl std::fmt::Display for Revision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Record is one key's value at one revision. Cloning it copies no bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub key: Arc<str>,
    pub value: Bytes,
    /// Revision of the last write (of a deleted record: of its deletion).
    pub revision: Revision,
    /// Revision of the write that created the key.
    pub created: Revision,
}

/// Expect is the condition under which a write happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Whatever is there, or nothing.
    Any,
    /// The key must not exist; else `StoreError::Exists`.
    Absent,
    /// The key must exist at this revision; else `StoreError::Conflict`.
    Revision(Revision),
}

/// Write is one change of a transaction: a value to put, or None to delete.
#[derive(Clone, Debug)]
pub struct Write {
    pub key: String,
    pub value: Option<Bytes>,
    pub expect: Expect,
}

/// Page is one part of a list, in key order.
#[derive(Clone, Debug)]
pub struct Page {
    pub records: Vec<Record>,
    /// The revision the whole list is consistent at: pass it as `at` to continue, or as `from` to watch.
    pub revision: Revision,
    /// How many more records follow the last one of this page, whether they are wanted or not.
    pub remaining: usize,
}

impl Page {
    /// Whether records follow this page.
    pub fn more(&self) -> bool {
        self.remaining > 0
    }
}

/// Whether a record is wanted: it is called while a list is made, for each record that may be part of it.
pub type Wanted<'a> = &'a (dyn Fn(&Record) -> bool + Sync);

/// Range says what a list returns.
#[derive(Clone, Copy, Default)]
pub struct Range<'a> {
    /// Records whose key starts with this.
    pub prefix: &'a str,
    /// Only keys after this one (the last key of the page before).
    pub after: Option<&'a str>,
    /// At most so many records.
    pub limit: Option<usize>,
    /// The state at this revision rather than the newest.
    pub at: Option<Revision>,
    /// Only these records, of which `limit` then counts.
    pub wanted: Option<Wanted<'a>>,
    /// Only records of these keys, which are in order: no other one is looked at.
    pub keys: Option<&'a [Arc<str>]>,
}

impl<'a> Range<'a> {
    /// All records under a prefix, now.
    pub fn all(prefix: &'a str) -> Self {
        Self {
            prefix,
            ..Self::default()
        }
    }
}

/// Share is which writes under a prefix a watch wants: those of records that are, or were before, one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Share<'a> {
    All,
    /// The one with this key.
    Key(&'a str),
    /// Those whose key ends with this segment.
    Name(&'a str),
    /// The pods of this node; of none, where it is empty.
    Node(&'a str),
}

/// Change is what happened to a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Written; `WatchEvent::previous` is None when it was created.
    Put,
    /// Deleted; `WatchEvent::record` holds the last value and the revision of the deletion.
    Delete,
}

/// WatchEvent is one write under a watched prefix.
#[derive(Clone, Debug)]
pub struct WatchEvent {
    pub change: Change,
    pub record: Record,
    /// The record that this write replaced or deleted.
    pub previous: Option<Record>,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{key} exists already")]
    Exists { key: String, current: Box<Record> },
    #[error("{key} is at revision {}, not at the expected one", .current.revision)]
    Conflict { key: String, current: Box<Record> },
    #[error("{key} does not exist")]
    NotFound { key: String },
    /// The history asked for is gone: list again.
    #[error("revision {wanted} is older than the kept history, which begins after {oldest}")]
    Compacted { wanted: Revision, oldest: Revision },
    /// The revision asked for has not been reached yet.
    #[error("revision {wanted} is newer than the newest, {current}")]
    Future { wanted: Revision, current: Revision },
    #[error("the store is shutting down")]
    Closed,
    #[error("the store cannot {operation} {path}: {reason}")]
    Disk {
        operation: &'static str,
        path: String,
        reason: String,
    },
    #[error("the value of {key} cannot be read: {reason}")]
    Sealed { key: String, reason: String },
    /// Servers that keep the state do not answer. Whether a write happened is not known.
    #[error("cannot {operation}, as etcd says: {reason}")]
    Unavailable {
        operation: &'static str,
        reason: String,
    },
}

/// Store is the seam between the API server and where its state lives. All answers are linearizable: a read sees every
/// write answered before it.
pub trait Store: Send + Sync + 'static {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Record>, StoreError>>;

    /// Writes a value and returns the record as stored. It is on disk when the answer comes.
    fn put<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        expect: Expect,
    ) -> BoxFuture<'a, Result<Record, StoreError>>;

    /// As `put`, and the store deletes the key by itself a `lifetime` after its last write with one (up to 1/64 or a few seconds
    /// later). A plain `put` makes it stay for good.
    fn put_for<'a>(
        &'a self,
        key: &'a str,
        value: Bytes,
        expect: Expect,
        lifetime: Duration,
    ) -> BoxFuture<'a, Result<Record, StoreError>>;

    /// Deletes a key and returns its last value with the deletion's revision. `Expect::Absent` makes no sense here and fails.
    fn delete<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
    ) -> BoxFuture<'a, Result<Record, StoreError>>;

    /// Does all of the writes in one step and at one revision, or none of them: when a condition does not hold, the error is that
    /// of the first such write. Returns the first write's record. No key is written twice; what is deleted `along` whatever is there
    /// may be absent. etcd takes 128 writes at a time unless told otherwise.
    fn commit(&self, first: Write, along: Vec<Write>) -> BoxFuture<'_, Result<Record, StoreError>>;

    /// Lists a range. `StoreError::Compacted` when `at` is too old, `StoreError::Future` when it is not reached yet.
    fn list<'a>(&'a self, range: Range<'a>) -> BoxFuture<'a, Result<Page, StoreError>>;

    /// Every write under `prefix` with a revision greater than `from`, in order, without gaps. The stream ends with
    /// `StoreError::Compacted` when its reader has fallen behind the kept history.
    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        from: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn WatchStream>, StoreError>> {
        self.watch_share(prefix, Share::All, from)
    }

    /// The same for who wants a share of them: others cost such a watch nothing, and may be among what it is told.
    fn watch_share<'a>(
        &'a self,
        prefix: &'a str,
        share: Share<'a>,
        from: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn WatchStream>, StoreError>>;

    /// The newest revision.
    fn revision(&self) -> Revision;

    /// Waits until a revision has been reached.
    fn reached(&self, revision: Revision) -> BoxFuture<'_, ()>;

    /// Waits until the state is another one than what was read of it: nothing that was made of it holds, and it is to be opened anew.
    fn lost(&self) -> BoxFuture<'_, StoreError> {
        Box::pin(std::future::pending())
    }

    /// Whether other processes may write to it too.
    fn is_shared(&self) -> bool;

    /// The store whose values are as they are on disk: this one, or the one below that seals nothing.
    fn kept(&self) -> &dyn Store;
}

/// WatchStream is a running watch.
pub trait WatchStream: Send {
    /// The next events in order, at least one; waits for them. Cancel safe.
    fn next(&mut self) -> BoxFuture<'_, Result<Vec<Arc<WatchEvent>>, StoreError>>;

    /// How many watches were told of what this one was last told of, itself included, or of more.
    fn peers(&self) -> usize;

    /// The revision up to which everything under the prefix has been handed out: what a bookmark may carry.
    fn progress(&self) -> Revision;
}

/// The bucket of a key or prefix: its first two path segments with the slashes around them, or None when it has less.
pub fn bucket_of(key: &str) -> Option<&str> {
    let end = key.match_indices('/').nth(2)?.0;
    Some(&key[..=end])
}
