//! The writer thread: group commit.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::{
    Change, Disk, Event, Expect, Expiries, Instant, Record, Replica, Revision, StoreError,
};

/// Writes that one transaction may hold: bounds the latency of the first of them.
const GROUP_WRITES_MAX: usize = 1024;
/// Bytes of values that one transaction may hold, beyond the write that reaches the bound.
const GROUP_BYTES_MAX: usize = 8 << 20;

/// How long expired keys wait when the disk refuses their deletion.
const EXPIRY_RETRY: Duration = Duration::from_secs(5);

/// Write is a wish: a value to put, or None to delete.
pub(super) struct Write {
    pub key: Arc<str>,
    pub value: Option<Bytes>,
    pub expect: Expect,
    pub expires: Option<Instant>,
}

pub(super) struct Request {
    pub write: Write,
    pub answer: oneshot::Sender<Result<Record, StoreError>>,
}

/// Runs until every sender is gone.
pub(super) fn run(
    disk: &Disk,
    replica: &Replica,
    mut requests: mpsc::Receiver<Request>,
    mut expiries: Expiries,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        // Its queue closes, and every write says so.
        Err(error) => return tracing::error!(%error, "the store's writer has no timer"),
    };
    runtime.block_on(async {
        let mut not_before = Instant::default();
        loop {
            let wake = expiries.next().map(|at| at.max(not_before));
            if wake.is_some_and(|at| at <= Instant::now()) {
                let gone = expiries.due(Instant::now(), GROUP_WRITES_MAX);
                let delete = |key| Write {
                    key,
                    value: None,
                    expect: Expect::Any,
                    expires: None,
                };
                let group = gone.into_iter().map(|key| Request {
                    write: delete(key),
                    answer: oneshot::channel().0,
                });
                if !commit(disk, replica, &mut expiries, group.collect()) {
                    not_before = Instant::after(EXPIRY_RETRY);
                }
                continue;
            }
            let first = match wake {
                None => requests.recv().await,
                Some(at) => tokio::select! {
                    first = requests.recv() => first,
                    () = tokio::time::sleep(at.left()) => continue,
                },
            };
            let Some(first) = first else { return };
            let mut bytes = first.write.value.as_ref().map_or(0, Bytes::len);
            let mut group = vec![first];
            while group.len() < GROUP_WRITES_MAX && bytes < GROUP_BYTES_MAX {
                let Ok(next) = requests.try_recv() else { break };
                bytes += next.write.value.as_ref().map_or(0, Bytes::len);
                group.push(next);
            }
            commit(disk, replica, &mut expiries, group);
        }
    });
}

/// Whether the disk took the group.
fn commit(disk: &Disk, replica: &Replica, expiries: &mut Expiries, group: Vec<Request>) -> bool {
    // Only this thread writes, so what is read here cannot change before it is replaced below.
    let (mut records, mut revision) = replica.newest();
    let mut events: Vec<Arc<Event>> = Vec::with_capacity(group.len());
    let mut answers = Vec::with_capacity(group.len());
    let mut changes: Vec<(Arc<str>, Option<Instant>)> = Vec::new();
    for Request { write, answer } in group {
        let expires = write.expires;
        let outcome =
            decide(records.get(&*write.key), write, Revision(revision.0 + 1)).map(|event| {
                revision = event.record.revision;
                event.apply(&mut records);
                let record = event.record.clone();
                if expires.is_some()
                    || expiries.has(&record.key)
                    || changes.iter().any(|(k, _)| *k == record.key)
                {
                    changes.push((record.key.clone(), expires));
                }
                events.push(Arc::new(event));
                record
            });
        answers.push((answer, outcome));
    }
    if !events.is_empty() {
        if let Err(error) = disk.commit(&events, &changes, revision) {
            // Nothing of the group happened, so its refusals may be wrong as well: all get the disk's error.
            tracing::error!(%error, writes = events.len(), "the store cannot commit");
            for (answer, _) in answers {
                let _ = answer.send(Err(error.clone()));
            }
            return false;
        }
        for (key, expires) in changes {
            expiries.set(key, expires);
        }
        replica.publish(records, revision, &events);
    }
    for (answer, outcome) in answers {
        // A caller that has gone away does not undo its write.
        let _ = answer.send(outcome);
    }
    true
}

/// Decides a write against the record that is there.
fn decide(current: Option<&Record>, write: Write, revision: Revision) -> Result<Event, StoreError> {
    let Write {
        key, value, expect, ..
    } = write;
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
