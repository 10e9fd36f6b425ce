//! Whether a database is whole, found out without changing it.
//!
//! redb's pages carry checksums, which it looks at only when it was not closed well: then it goes back to the commit before the last,
//! if the last one does not agree with its own. That is right for a commit that power was lost in, since nobody was answered; of
//! any other file it would take answered writes without a word. So everything is looked at before the database is opened, with what
//! redb would repair kept in memory and thrown away.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::{BackendError, DatabaseError, StorageBackend};

const BLOCK_BYTES: usize = 4096;

/// Looks at every page. False when some are not what was written.
///
/// # Errors
/// When it cannot be read, is open elsewhere, or is no database.
pub(super) fn is_whole(
    kept: impl StorageBackend,
    cache_bytes: usize,
) -> Result<bool, DatabaseError> {
    let overlay = Overlay::over(kept).map_err(|error| DatabaseError::Storage(error.into()))?;
    let mut builder = redb::Builder::new();
    builder.set_cache_size(cache_bytes);
    builder.create_with_backend(overlay)?.check_integrity()
}

/// What is written to it stays in memory; what lies below is read only.
#[derive(Debug)]
struct Overlay<B> {
    below: B,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    blocks: BTreeMap<u64, Box<[u8; BLOCK_BYTES]>>,
    length: u64,
    /// What lies below counts up to here: what was cut off once is zero when it is there again.
    kept: u64,
}

impl<B: StorageBackend> Overlay<B> {
    fn over(below: B) -> io::Result<Self> {
        let length = below.len()?;
        let written = Mutex::new(Written {
            blocks: BTreeMap::new(),
            length,
            kept: length,
        });
        Ok(Self { below, written })
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block as it lies below.
    fn block(&self, number: u64, kept: u64) -> io::Result<Box<[u8; BLOCK_BYTES]>> {
        let mut block = Box::new([0; BLOCK_BYTES]);
        let start = number * BLOCK_BYTES as u64;
        let there = kept.saturating_sub(start).min(BLOCK_BYTES as u64);
        let there = usize::try_from(there).unwrap_or(BLOCK_BYTES);
        if there > 0 {
            self.below.read(start, &mut block[..there])?;
        }
        Ok(block)
    }

    /// Calls `each` with every block that a range touches, the place in it, and the place in the range.
    fn walk(
        offset: u64,
        length: usize,
        mut each: impl FnMut(u64, std::ops::Range<usize>, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let at = offset + done as u64;
            let within = usize::try_from(at % BLOCK_BYTES as u64).unwrap_or(0);
            let part = (BLOCK_BYTES - within).min(length - done);
            each(
                at / BLOCK_BYTES as u64,
                within..within + part,
                done..done + part,
            )?;
            done += part;
        }
        Ok(())
    }
}

impl<B: StorageBackend> StorageBackend for Overlay<B> {
    fn len(&self) -> io::Result<u64> {
        Ok(self.written().length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let written = self.written();
        if offset.saturating_add(out.len() as u64) > written.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Self::walk(offset, out.len(), |number, within, place| {
            match written.blocks.get(&number) {
                Some(block) => out[place].copy_from_slice(&block[within]),
                None => out[place].copy_from_slice(&self.block(number, written.kept)?[within]),
            }
            Ok(())
        })
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut written = self.written();
        if length < written.length {
            let last = length / BLOCK_BYTES as u64;
            let within = usize::try_from(length % BLOCK_BYTES as u64).unwrap_or(0);
            written.blocks.split_off(&(last + 1));
            if let Some(block) = written.blocks.get_mut(&last) {
                block[within..].fill(0);
            }
            written.kept = written.kept.min(length);
        }
        written.length = length;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.written();
        let kept = written.kept;
        Self::walk(offset, data.len(), |number, within, place| {
            let block = match written.blocks.entry(number) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(self.block(number, kept)?),
            };
            block[within].copy_from_slice(&data[place]);
            Ok(())
        })
    }

    fn close(&self) -> io::Result<()> {
        self.below.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.below.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.below.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.below.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.below.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.below.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.below.query_lock_range(start, end)
    }
}
