//! The writer thread: group commit.

use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::{Change, Disk, Event, Expect, Record, Revision, SharedState, StoreError};

/// Writes that one transaction may hold: bounds the latency of the first of them.
const GROUP_WRITES_MAX: usize = 1024;
/// Bytes of values that one transaction may hold, beyond the write that reaches the bound.
const GROUP_BYTES_MAX: usize = 8 << 20;

/// Write is a wish: a value to put, or None to delete.
pub(super) struct Write {
    pub key: Arc<str>,
    pub value: Option<Bytes>,
    pub expect: Expect,
}

pub(super) struct Request {
    pub write: Write,
    pub answer: oneshot::Sender<Result<Record, StoreError>>,
}

/// Runs until every sender is gone.
pub(super) fn run(disk: &Disk, state: &SharedState, mut requests: mpsc::Receiver<Request>) {
    while let Some(first) = requests.blocking_recv() {
        let mut bytes = first.write.value.as_ref().map_or(0, Bytes::len);
        let mut group = vec![first];
        while group.len() < GROUP_WRITES_MAX && bytes < GROUP_BYTES_MAX {
            let Ok(next) = requests.try_recv() else { break };
            bytes += next.write.value.as_ref().map_or(0, Bytes::len);
            group.push(next);
        }
        commit(disk, state, group);
    }
}

fn commit(disk: &Disk, state: &SharedState, group: Vec<Request>) {
    // Only this thread writes, so what is read here cannot change before it is replaced below.
    let (mut records, mut revision) = {
        let state = super::read(state);
        (state.records.clone(), state.revision)
    };
    let mut events: Vec<Arc<Event>> = Vec::with_capacity(group.len());
    let mut answers = Vec::with_capacity(group.len());
    for Request { write, answer } in group {
        let outcome =
            decide(records.get(&*write.key), write, Revision(revision.0 + 1)).map(|event| {
                revision = event.record.revision;
                match event.change {
                    Change::Put => records.insert(event.record.key.clone(), event.record.clone()),
                    Change::Delete => records.remove(&*event.record.key),
                };
                let record = event.record.clone();
                events.push(Arc::new(event));
                record
            });
        answers.push((answer, outcome));
    }
    if !events.is_empty() {
        if let Err(error) = disk.commit(&events, revision) {
            // Nothing of the group happened, so its refusals may be wrong as well: all get the disk's error.
            tracing::error!(%error, writes = events.len(), "the store cannot commit");
            for (answer, _) in answers {
                let _ = answer.send(Err(error.clone()));
            }
            return;
        }
        let mut state = state.write().unwrap_or_else(PoisonError::into_inner);
        state.records = records;
        state.revision = revision;
        for event in &events {
            state.history.append(event.clone());
        }
        state.history.wake(&events);
    }
    for (answer, outcome) in answers {
        // A caller that has gone away does not undo its write.
        let _ = answer.send(outcome);
    }
}

/// Decides a write against the record that is there.
fn decide(current: Option<&Record>, write: Write, revision: Revision) -> Result<Event, StoreError> {
    let Write { key, value, expect } = write;
    match (expect, current) {
        (Expect::Absent, Some(current)) => {
            return Err(StoreError::Exists {
                key: key.to_string(),
                current: Box::new(current.clone()),
            });
        }
        (Expect::Revision(wanted), Some(current)) if wanted != current.revision => {
            return Err(StoreError::Conflict {
                key: key.to_string(),
                current: Box::new(current.clone()),
            });
        }
        (Expect::Revision(_), None) => {
            return Err(StoreError::NotFound {
                key: key.to_string(),
            });
        }
        _ => {}
    }
    let previous = current.cloned();
    match (value, &previous) {
        (Some(value), _) => {
            // One copy, so that no record pins the larger buffer its value was cut from.
            let value = Bytes::copy_from_slice(&value);
            let key = previous.as_ref().map_or(key, |p| p.key.clone());
            let created = previous.as_ref().map_or(revision, |p| p.created);
            Ok(Event {
                change: Change::Put,
                record: Record {
                    key,
                    value,
                    revision,
                    created,
                },
                previous,
            })
        }
        (None, Some(current)) => {
            let record = Record {
                revision,
                ..current.clone()
            };
            Ok(Event {
                change: Change::Delete,
                record,
                previous,
            })
        }
        (None, None) => Err(StoreError::NotFound {
            key: key.to_string(),
        }),
    }
}
