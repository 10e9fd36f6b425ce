//! The durable copy: one redb table of records, one with the revision.

use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use redb::backends::FileBackend;
use redb::{
    Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageError,
    TableDefinition,
};

use super::integrity;
use super::{Change, Event, Instant, Record, Revision, StoreError};

/// Key -> 16 bytes (revision and created revision, little endian), then the value.
const RECORDS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("records");
/// Key -> milliseconds since the epoch, for records that are to be deleted then.
const EXPIRIES: TableDefinition<'_, &str, u64> = TableDefinition::new("expiries");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const HEADER_BYTES: usize = 16;
/// Of the tables. One that changes what is kept counts up, and brings files of the one before up to date when it opens them.
const FORMAT: u64 = 1;
/// A file that is smaller may have as much free room as it likes.
const RECLAIM_BYTES_MIN: u64 = 16 << 20;
/// Values are served from memory, so redb's cache only helps the writer find its pages.
const CACHE_BYTES: usize = 8 << 20;
/// The revision of an empty store: 0 means "any" to clients.
const FIRST_REVISION: Revision = Revision(1);

/// Loaded is what the file held.
pub(super) struct Loaded {
    /// In key order.
    pub records: Vec<Record>,
    pub expiries: Vec<(Arc<str>, Instant)>,
    pub revision: Revision,
}

/// Group is what one transaction writes.
pub(super) struct Group {
    /// In this order.
    pub events: Vec<Arc<Event>>,
    /// Keys and when they end from now on; None for good.
    pub expiries: Vec<(Arc<str>, Option<Instant>)>,
    /// The newest revision after it.
    pub revision: Revision,
}

pub(super) struct Disk {
    database: Database,
    path: String,
}

/// Makes the file, or what it may be read by, its owner's alone: there are Secrets in it. What hinders that hinders opening it, which says so.
fn own(path: &Path) {
    let made = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    if made.is_err() {
        drop(std::fs::set_permissions(
            path,
            std::fs::Permissions::from_mode(0o600),
        ));
    }
}

impl Disk {
    /// Opens or makes the file. One that is damaged stays as it is, for whoever wants to save what is left.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let (failed, refused) = (failed_at(path), refused_at(path));
        // A file that is there and empty is one that was made and never written to.
        if std::fs::metadata(path).is_ok_and(|file| file.len() > 0) {
            // Its lock is one for writing, though nothing is written.
            let file = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(path);
            let file = file.map_err(|error| failed(error.to_string()))?;
            let file = FileBackend::new(file).map_err(&refused)?;
            if !integrity::is_whole(file, CACHE_BYTES).map_err(&refused)? {
                return Err(failed(damaged("checksums of pages are others")));
            }
        }
        own(path);
        let database = builder().create(path).map_err(refused)?;
        let mut disk = Self {
            database,
            path: path.display().to_string(),
        };
        disk.settle_format()?;
        let length = std::fs::metadata(path).map_or(0, |file| file.len());
        match disk.try_reclaim(length) {
            Ok(()) => Ok(disk),
            Err(error) => {
                // What is there is as good as before; it only takes more room.
                tracing::warn!(%error, path = disk.path, "unused room is not given back");
                drop(disk);
                Self::reopen(path)
            }
        }
    }

    /// Gives back room that nothing uses any more, where that is most of a large file: redb itself only cuts off free pages at its end.
    fn try_reclaim(&mut self, length: u64) -> Result<(), redb::Error> {
        if length < RECLAIM_BYTES_MIN {
            return Ok(());
        }
        // What the last commits have let go of counts as used until the next one.
        self.database.begin_write()?.commit()?;
        let write = self.database.begin_write()?;
        let stats = write.stats()?;
        write.abort()?;
        let used = stats.allocated_pages() * stats.page_size() as u64;
        if length > used * 2 {
            self.database.compact()?;
            tracing::info!(path = self.path, length, used, "unused room is given back");
        }
        Ok(())
    }

    /// Opens the file again that this process had open a moment ago.
    pub fn reopen(path: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            database: builder().open(path).map_err(refused_at(path))?,
            path: path.display().to_string(),
        })
    }

    /// The newest revision that is on disk.
    pub fn revision(&self) -> Result<Revision, StoreError> {
        self.try_revision().map_err(|e| self.error("read", e))
    }

    fn try_revision(&self) -> Result<Revision, redb::Error> {
        let read = self.database.begin_read()?;
        let revision = read.open_table(META)?.get("revision")?;
        Ok(revision.map_or(FIRST_REVISION, |revision| Revision(revision.value())))
    }

    /// What is said of a file that somebody else has written to.
    pub fn changed_elsewhere(&self) -> StoreError {
        StoreError::Disk {
            operation: "go on with",
            path: self.path.clone(),
            reason: "another process has written to it: start the control plane anew".to_owned(),
        }
    }

    /// Writes down which format the file has, or refuses one of later versions.
    fn settle_format(&self) -> Result<(), StoreError> {
        let found = self.try_format().map_err(|e| self.error("read", e))?;
        match found {
            Some(FORMAT) => Ok(()),
            Some(later) => Err(StoreError::Disk {
                operation: "use",
                path: self.path.clone(),
                reason: format!("its format is {later}, and this version reads {FORMAT}"),
            }),
            // Files had none at first, and are of the first format.
            None => self.try_set_format().map_err(|e| self.error("write to", e)),
        }
    }

    fn try_format(&self) -> Result<Option<u64>, redb::Error> {
        let read = self.database.begin_read()?;
        match read.open_table(META) {
            Ok(meta) => Ok(meta.get("format")?.map(|format| format.value())),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn try_set_format(&self) -> Result<(), redb::Error> {
        let write = self.database.begin_write()?;
        write.open_table(META)?.insert("format", FORMAT)?;
        // All tables are there from the beginning: `load` reads them as soon as one is.
        write.open_table(RECORDS)?;
        write.open_table(EXPIRIES)?;
        write.commit()?;
        Ok(())
    }

    #[cfg(test)]
    pub fn with_backend(backend: impl redb::StorageBackend) -> Result<Self, StoreError> {
        let database = builder().create_with_backend(backend);
        let database = database.map_err(|e| StoreError::Disk {
            operation: "open",
            path: String::new(),
            reason: e.to_string(),
        })?;
        Ok(Self {
            database,
            path: String::new(),
        })
    }

    fn error(&self, operation: &'static str, error: impl Into<redb::Error>) -> StoreError {
        let error: redb::Error = error.into();
        StoreError::Disk {
            operation,
            path: self.path.clone(),
            reason: error.to_string(),
        }
    }

    pub fn load(&self) -> Result<Loaded, StoreError> {
        self.try_load().map_err(|e| self.error("read", e))
    }

    fn try_load(&self) -> Result<Loaded, redb::Error> {
        let mut loaded = Loaded {
            records: Vec::new(),
            expiries: Vec::new(),
            revision: FIRST_REVISION,
        };
        let read = self.database.begin_read()?;
        let meta = match read.open_table(META) {
            Ok(meta) => meta,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(loaded),
            Err(e) => return Err(e.into()),
        };
        if let Some(revision) = meta.get("revision")? {
            loaded.revision = Revision(revision.value());
        }
        for entry in read.open_table(RECORDS)?.iter()? {
            let (key, stored) = entry?;
            let (header, value) = stored
                .value()
                .split_at_checked(HEADER_BYTES)
                .ok_or_else(|| corrupted(key.value()))?;
            let number = |at: usize| {
                u64::from_le_bytes(
                    header[at..at + 8]
                        .try_into()
                        .expect("eight of sixteen bytes"),
                )
            };
            loaded.records.push(Record {
                key: key.value().into(),
                value: Bytes::copy_from_slice(value),
                revision: Revision(number(0)),
                created: Revision(number(8)),
            });
        }
        for entry in read.open_table(EXPIRIES)?.iter()? {
            let (key, expires) = entry?;
            loaded
                .expiries
                .push((key.value().into(), Instant(expires.value())));
        }
        Ok(loaded)
    }

    /// Writes a group and returns once it is on disk. After an error the disk takes nothing more.
    pub fn commit(&self, group: &Group) -> Result<(), StoreError> {
        self.try_commit(group)
            .map_err(|e| self.error("write to", e))
    }

    fn try_commit(&self, group: &Group) -> Result<(), redb::Error> {
        let mut write = self.database.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        {
            let mut records = write.open_table(RECORDS)?;
            for event in &group.events {
                let record = &event.record;
                match event.change {
                    Change::Put => {
                        let mut stored = records
                            .insert_reserve(&*record.key, HEADER_BYTES + record.value.len())?;
                        let (header, value) = stored.as_mut().split_at_mut(HEADER_BYTES);
                        header[..8].copy_from_slice(&record.revision.0.to_le_bytes());
                        header[8..].copy_from_slice(&record.created.0.to_le_bytes());
                        value.copy_from_slice(&record.value);
                    }
                    Change::Delete => {
                        records.remove(&*record.key)?;
                    }
                }
            }
            let mut table = write.open_table(EXPIRIES)?;
            for (key, expires) in &group.expiries {
                match expires {
                    Some(at) => table.insert(&**key, at.0)?,
                    None => table.remove(&**key)?,
                };
            }
            write
                .open_table(META)?
                .insert("revision", group.revision.0)?;
        }
        write.commit()?;
        Ok(())
    }
}

fn builder() -> redb::Builder {
    let mut builder = redb::Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

fn failed_at(path: &Path) -> impl Fn(String) -> StoreError {
    let path = path.display().to_string();
    move |reason| StoreError::Disk {
        operation: "open",
        path: path.clone(),
        reason,
    }
}

fn refused_at(path: &Path) -> impl Fn(DatabaseError) -> StoreError {
    let failed = failed_at(path);
    move |error| match error {
        DatabaseError::DatabaseAlreadyOpen => failed("another process has it open".to_owned()),
        DatabaseError::Storage(StorageError::Corrupted(why)) => failed(damaged(&why)),
        error => failed(error.to_string()),
    }
}

fn damaged(why: &str) -> String {
    format!(
        "it is damaged ({why}); nothing was changed: restore a backup (`store restore`), or put the file back as it was"
    )
}

fn corrupted(key: &str) -> redb::Error {
    redb::Error::Corrupted(format!("the record of {key} is shorter than its header"))
}
