//! Snapshot: the whole state at one revision, as a backup keeps it and as it moves from one store to another.
//!
//! The file: a line that names the format, the revision and the number of records (8 bytes each, little endian as all
//! numbers), the records, and a SHA-256 of all before. A record is the lengths of key and value (4 bytes each), how long it lives in
//! seconds (8 bytes; 0 for good), its revision and that of its creation (8 bytes each), key and value.

use std::io::{self, Read};
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::{Range, Record, Revision, Store, StoreError};

const FORMAT: &[u8] = b"keelway state 1\n";
const DIGEST_BYTES: usize = 32;
/// No key or value is larger: what says so is damaged.
const PART_BYTES_MAX: u32 = 64 << 20;
/// As much goes into one chunk of a file, give or take a record.
const CHUNK_BYTES: usize = 256 << 10;
/// Where servers say that they are there: it only means something while they live.
pub const SERVERS: &str = "/keelway/servers/";
/// Where Events are kept, of whichever API group.
const EVENTS: &str = "/core/events/";
/// Upstream's default.
const EVENT_LIFETIME: Duration = Duration::from_secs(3600);

/// Snapshot is all records of a store at one revision.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub revision: Revision,
    pub records: Vec<Record>,
}

/// A SnapshotError says why a file is no whole snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error("it is no backup of Keelway, or of a newer version")]
    Format,
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
}

/// How long a record of this key lives, from each time that it is written; None for good.
pub fn lifetime(key: &str) -> Option<Duration> {
    key.starts_with(EVENTS).then_some(EVENT_LIFETIME)
}

impl Snapshot {
    pub async fn of(store: &dyn Store) -> Result<Self, StoreError> {
        let page = store.list(Range::all("/")).await?;
        let records = page.records.into_iter();
        Ok(Self {
            revision: page.revision,
            records: records
                .filter(|record| !record.key.starts_with(SERVERS))
                .collect(),
        })
    }

    /// The file, in chunks.
    pub fn into_chunks(self) -> impl Iterator<Item = Bytes> {
        let mut digest = Sha256::new();
        let mut head = FORMAT.to_vec();
        head.extend_from_slice(&self.revision.0.to_le_bytes());
        head.extend_from_slice(&(self.records.len() as u64).to_le_bytes());
        let (mut records, mut head, mut ended) = (self.records.into_iter(), Some(head), false);
        std::iter::from_fn(move || {
            if ended {
                return None;
            }
            let mut chunk = head.take().unwrap_or_default();
            while chunk.len() < CHUNK_BYTES && !ended {
                match records.next() {
                    Some(record) => write_record(&mut chunk, &record),
                    None => ended = true,
                }
            }
            digest.update(&chunk);
            if ended {
                chunk.extend_from_slice(&digest.finalize_reset());
            }
            Some(chunk.into())
        })
    }

    pub fn read(from: impl Read) -> Result<Self, SnapshotError> {
        let mut from = Digesting {
            from: io::BufReader::new(from),
            digest: Sha256::new(),
        };
        let mut format = [0; FORMAT.len()];
        from.fill(&mut format).map_err(|_| SnapshotError::Format)?;
        if format != FORMAT {
            return Err(SnapshotError::Format);
        }
        let revision = Revision(from.number()?);
        let count = from.number()?;
        let mut records = Vec::new();
        for _ in 0..count {
            records.push(read_record(&mut from)?);
        }
        let expected = from.digest.finalize_reset();
        let mut found = [0; DIGEST_BYTES];
        from.fill(&mut found)?;
        if found[..] != expected[..] {
            return Err(SnapshotError::Damaged("its checksum is another one"));
        }
        if from.from.read(&mut [0])? != 0 {
            return Err(SnapshotError::Damaged("something follows its end"));
        }
        Ok(Self { revision, records })
    }
}

fn write_record(out: &mut Vec<u8>, record: &Record) {
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes();
    out.extend_from_slice(&length(record.key.len()));
    out.extend_from_slice(&length(record.value.len()));
    let lifetime = lifetime(&record.key).unwrap_or_default().as_secs();
    for number in [lifetime, record.revision.0, record.created.0] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(record.key.as_bytes());
    out.extend_from_slice(&record.value);
}

fn read_record<R: Read>(from: &mut Digesting<R>) -> Result<Record, SnapshotError> {
    let (key, value) = (from.length()?, from.length()?);
    let (_lifetime, revision, created) = (from.number()?, from.number()?, from.number()?);
    let key = String::from_utf8(from.part(key)?)
        .map_err(|_| SnapshotError::Damaged("a key is no text"))?;
    Ok(Record {
        key: key.into(),
        value: from.part(value)?.into(),
        revision: Revision(revision),
        created: Revision(created),
    })
}

/// A reader that sums up what it has read.
struct Digesting<R> {
    from: io::BufReader<R>,
    digest: Sha256,
}

impl<R: Read> Digesting<R> {
    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), SnapshotError> {
        self.from
            .read_exact(buffer)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => SnapshotError::Damaged("it ends too early"),
                _ => SnapshotError::Read(error),
            })?;
        self.digest.update(buffer);
        Ok(())
    }

    fn number(&mut self) -> Result<u64, SnapshotError> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn length(&mut self) -> Result<usize, SnapshotError> {
        let mut bytes = [0; 4];
        self.fill(&mut bytes)?;
        match u32::from_le_bytes(bytes) {
            length if length <= PART_BYTES_MAX => Ok(length as usize),
            _ => Err(SnapshotError::Damaged("a length is beyond reason")),
        }
    }

    fn part(&mut self, length: usize) -> Result<Vec<u8>, SnapshotError> {
        let mut bytes = vec![0; length];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
pub mod tests {
    use proptest::prelude::*;

    use super::*;

    pub fn snapshot(count: usize) -> Snapshot {
        let records = (0..count).map(|at| Record {
            key: format!("/core/pods/default/{at:06}").into(),
            value: Bytes::from(format!("{{\"metadata\":{{\"name\":\"{at}\"}}}}")),
            revision: Revision(at as u64 + 7),
            created: Revision(at as u64 + 3),
        });
        Snapshot {
            revision: Revision(count as u64 + 100),
            records: records.collect(),
        }
    }

    fn file(snapshot: Snapshot) -> Vec<u8> {
        snapshot.into_chunks().flatten().collect()
    }

    #[test]
    fn a_file_is_read_as_it_was_written() {
        for count in [0, 1, 10_000] {
            let read = Snapshot::read(&*file(snapshot(count))).expect("whole");
            assert_eq!(read, snapshot(count));
        }
        assert!(snapshot(10_000).into_chunks().count() > 2, "it is streamed");
    }

    proptest! {
        #[test]
        fn a_file_that_is_not_whole_is_refused(at in any::<prop::sample::Index>(), bit in 0..8, cut in any::<bool>()) {
            let mut bytes = file(snapshot(20));
            let at = at.index(bytes.len());
            match cut {
                true => bytes.truncate(at),
                false => bytes[at] ^= 1u8 << bit,
            }
            prop_assert!(Snapshot::read(&*bytes).is_err());
        }
    }

    #[test]
    fn what_is_no_backup_is_told_so() {
        assert!(matches!(
            Snapshot::read(&b"hello"[..]),
            Err(SnapshotError::Format)
        ));
        let mut more = file(snapshot(1));
        more.push(0);
        assert!(matches!(
            Snapshot::read(&*more),
            Err(SnapshotError::Damaged(_))
        ));
    }
}
