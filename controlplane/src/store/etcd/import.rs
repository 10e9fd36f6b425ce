//! Fills an etcd from a snapshot. A mark says that it is under way: what was filled in part is used by nobody, and filled anew.

use std::collections::HashSet;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};

use super::{Etcd, EtcdConfig};
use crate::store::snapshot::{Snapshot, lifetime};
use crate::store::{Expect, Range, Record, Store, StoreError, Write};

pub(super) const MARK: &str = "/keelway/importing";
/// What one transaction may hold: etcd takes 128 writes and 1.5 MB unless told otherwise.
const RECORDS_MAX: usize = 64;
const BYTES_MAX: usize = 512 << 10;
/// Writes at a time.
const PARALLEL: usize = 128;

fn put(key: &str, value: Bytes) -> Write {
    Write {
        key: key.to_owned(),
        value: Some(value),
        expect: Expect::Any,
    }
}

impl Etcd {
    /// Writes a snapshot into an etcd that has nothing of this cluster yet. Revisions are etcd's own; they go on from the
    /// snapshot's, so that none is used twice.
    pub async fn import(config: &EtcdConfig, snapshot: &Snapshot) -> Result<(), StoreError> {
        let store = Self::open(config).await?;
        let found = store.list(Range::all("/")).await?.records;
        let begun = found.iter().any(|record| &*record.key == MARK);
        if !found.is_empty() && !begun {
            return Err(StoreError::Disk {
                operation: "import into",
                path: config.prefix.clone(),
                reason: "there is a state already".to_owned(),
            });
        }
        let mark = Bytes::from_static(b"{}");
        store.put(MARK, mark.clone(), Expect::Any).await?;
        let wanted: HashSet<&str> = snapshot.records.iter().map(|r| &*r.key).collect();
        for record in &found {
            if &*record.key != MARK && !wanted.contains(&*record.key) {
                store.delete(&record.key, Expect::Any).await?;
            }
        }
        let (passing, lasting): (Vec<&Record>, Vec<&Record>) = snapshot
            .records
            .iter()
            .partition(|record| lifetime(&record.key).is_some());
        for group in groups(&lasting) {
            let mut writes = group.iter().map(|r| put(&r.key, r.value.clone()));
            if let Some(first) = writes.next() {
                store.commit(first, writes.collect()).await?;
            }
        }
        futures::stream::iter(passing)
            .map(|record| {
                let lifetime = lifetime(&record.key).unwrap_or_default();
                store.put_for(&record.key, record.value.clone(), Expect::Any, lifetime)
            })
            .buffer_unordered(PARALLEL)
            .try_for_each(|_| std::future::ready(Ok(())))
            .await?;
        // Each write is one revision; clients that knew a later one would wait for it.
        while store.revision() < snapshot.revision {
            let missing = snapshot.revision.0 - store.revision().0;
            let writes = (0..missing.min(PARALLEL as u64 * 16))
                .map(|_| store.put(MARK, mark.clone(), Expect::Any));
            futures::stream::iter(writes)
                .buffer_unordered(PARALLEL)
                .try_for_each(|_| std::future::ready(Ok(())))
                .await?;
        }
        store.delete(MARK, Expect::Any).await.map(drop)
    }
}

/// In order, as many together as one transaction takes.
fn groups<'a, 'b>(records: &'b [&'a Record]) -> Vec<&'b [&'a Record]> {
    let mut groups = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (at, record) in records.iter().enumerate() {
        let more = record.key.len() + record.value.len();
        if at > start && (at - start >= RECORDS_MAX || bytes + more > BYTES_MAX) {
            groups.push(&records[start..at]);
            (start, bytes) = (at, 0);
        }
        bytes += more;
    }
    if start < records.len() {
        groups.push(&records[start..]);
    }
    groups
}
