//! Brings keys and Services together at start: a state that was written before there were such keys, or by another version.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt};
use serde_json::Value;

use super::held::{ADDRESSES, Claim, MANAGED_BY, PORTS, SERVICES};
use crate::api::Api;
use crate::api::status::Status;
use crate::store::{Expect, Range, Record, Revision, Store, StoreError, Write};

/// Writes at a time: they share the store's commits.
const PARALLEL: usize = 64;

impl Api {
    /// Makes the keys that Services lack, and takes away those of Services that are gone. Several servers may do so at once.
    pub(in crate::api) async fn repair_allocations(&self) -> Result<(), Status> {
        repair(&*self.store).await.map_err(Status::from)
    }
}

pub(super) async fn repair(store: &dyn Store) -> Result<(), StoreError> {
    // Keys first: one that is written later came in one step with its Service.
    let mut keys: BTreeMap<String, Record> = BTreeMap::new();
    for prefix in [ADDRESSES, PORTS] {
        let page = store.list(Range::all(prefix)).await?;
        keys.extend(page.records.into_iter().map(|r| (r.key.to_string(), r)));
    }
    let services = store.list(Range::all(SERVICES)).await?;
    let mut writes: Vec<Write> = Vec::new();
    let mut held: BTreeMap<String, String> = BTreeMap::new();
    for record in &services.records {
        let path = record.key.strip_prefix(SERVICES).unwrap_or_default();
        let (Some((namespace, name)), Ok(service)) = (
            path.split_once('/'),
            serde_json::from_slice::<Value>(&record.value),
        ) else {
            continue;
        };
        for write in Claim::of(&service).taking(namespace, name) {
            if let Some(other) = held.get(&write.key) {
                let what = &write.key;
                tracing::warn!(what, one = other, another = path, "two Services hold this");
                continue;
            }
            held.insert(write.key.clone(), path.to_owned());
            if !keys.contains_key(&write.key) {
                writes.push(write);
            }
        }
    }
    let lost = keys.values().filter(|record| {
        let (label, value) = MANAGED_BY;
        let ours = || {
            serde_json::from_slice::<Value>(&record.value)
                .is_ok_and(|address| address["metadata"]["labels"][label] == value)
        };
        !held.contains_key(&*record.key) && (record.key.starts_with(PORTS) || ours())
    });
    writes.extend(lost.map(|record| freed(&record.key, record.revision)));
    futures::stream::iter(writes)
        .map(|write| async {
            match store.commit(write, Vec::new()).await {
                Ok(_) => Ok(()),
                // Another server was faster, or the Service is being changed.
                Err(
                    StoreError::Exists { .. }
                    | StoreError::Conflict { .. }
                    | StoreError::NotFound { .. },
                ) => Ok(()),
                Err(error) => Err(error),
            }
        })
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await
}

fn freed(key: &str, revision: Revision) -> Write {
    Write {
        key: key.to_owned(),
        value: None,
        expect: Expect::Revision(revision),
    }
}
