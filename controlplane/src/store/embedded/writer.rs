//! The writer thread: group commit.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::durable;
use super::{
    Change, Clock, Durable, Event, Expect, Expiries, Group, Instant, Record, Records, Replica,
    Revision, StoreError,
};

/// Writes that one transaction may hold: bounds the latency of the first of them.
const GROUP_WRITES_MAX: usize = 1024;
/// Bytes of values that one transaction may hold, beyond the write that reaches the bound.
const GROUP_BYTES_MAX: usize = 8 << 20;

/// How long expired keys wait when the disk refuses their deletion.
const EXPIRY_RETRY: Duration = Duration::from_secs(5);
/// How often the clock is looked at while keys wait for their end: it may have been set.
const CLOCK_LOOK: Duration = Duration::from_secs(60);

/// Wish is a write with the time at which it is to end.
pub(super) struct Wish {
    pub key: Arc<str>,
    pub value: Option<Bytes>,
    pub expect: Expect,
    pub expires: Option<Instant>,
}

impl Wish {
    /// A write that stays.
    pub fn new(key: &str, value: Option<Bytes>, expect: Expect) -> Self {
        Self {
            key: key.into(),
            value,
            expect,
            expires: None,
        }
    }
}

/// Request is a wish and what is to be done along with it, all or nothing.
pub(super) struct Request {
    pub first: Wish,
    pub along: Vec<Wish>,
    pub answer: oneshot::Sender<Result<Record, StoreError>>,
}

impl Request {
    fn bytes(&self) -> usize {
        let wishes = std::iter::once(&self.first).chain(&self.along);
        wishes
            .map(|wish| wish.value.as_ref().map_or(0, Bytes::len))
            .sum()
    }
}

/// Runs until every sender is gone.
pub(super) fn run(
    mut disk: Durable,
    replica: &Replica,
    mut requests: mpsc::Receiver<Request>,
    (mut expiries, clock): (Expiries, Clock),
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
            if wake.is_some_and(|at| at <= clock.now()) {
                let gone = expiries.due(clock.now(), GROUP_WRITES_MAX);
                let delete = |key| Wish {
                    key,
                    value: None,
                    expect: Expect::Any,
                    expires: None,
                };
                let group = gone.into_iter().map(|key| Request {
                    first: delete(key),
                    along: Vec::new(),
                    answer: oneshot::channel().0,
                });
                if !commit(&mut disk, replica, &mut expiries, group.collect()) {
                    not_before = clock.after(EXPIRY_RETRY);
                }
                continue;
            }
            let first = match wake {
                None => requests.recv().await,
                Some(at) => tokio::select! {
                    first = requests.recv() => first,
                    () = tokio::time::sleep(clock.left(at).min(CLOCK_LOOK)) => continue,
                },
            };
            let Some(first) = first else { return };
            let mut bytes = first.bytes();
            let mut group = vec![first];
            while group.len() < GROUP_WRITES_MAX && bytes < GROUP_BYTES_MAX {
                let Ok(next) = requests.try_recv() else { break };
                bytes += next.bytes();
                group.push(next);
            }
            commit(&mut disk, replica, &mut expiries, group);
        }
    });
}

/// Whether the disk took the group.
fn commit(
    disk: &mut Durable,
    replica: &Replica,
    expiries: &mut Expiries,
    group: Vec<Request>,
) -> bool {
    // Only this thread writes, so what is read here cannot change before it is replaced below.
    let (mut records, from) = replica.newest();
    let mut revision = from;
    let mut events: Vec<Arc<Event>> = Vec::with_capacity(group.len());
    let mut answers = Vec::with_capacity(group.len());
    let mut changes: Vec<(Arc<str>, Option<Instant>)> = Vec::new();
    for Request {
        first,
        along,
        answer,
    } in group
    {
        let next = Revision(revision.0 + 1);
        let outcome = transact(&mut records, first, along, next).map(|done| {
            revision = next;
            let record = done[0].0.record.clone();
            for (event, expires) in done {
                let key = &event.record.key;
                let listed = expiries.of(key).is_some() || changes.iter().any(|(k, _)| k == key);
                if expires.is_some() || listed {
                    changes.push((key.clone(), expires));
                }
                events.push(Arc::new(event));
            }
            record
        });
        answers.push((answer, outcome));
    }
    if !events.is_empty() {
        let group = Group {
            events,
            expiries: changes,
            revision,
        };
        let undo = || {
            let ended = group.expiries.iter();
            Group {
                events: durable::undo(&group.events),
                expiries: ended
                    .map(|(key, _)| (key.clone(), expiries.of(key)))
                    .collect(),
                revision: from,
            }
        };
        if let Err(error) = disk.commit(&group, undo) {
            // Nothing of the group happened, so its refusals may be wrong as well: all get the disk's error.
            tracing::error!(%error, writes = group.events.len(), "the store cannot commit");
            for (answer, _) in answers {
                let _ = answer.send(Err(error.clone()));
            }
            return false;
        }
        for (key, expires) in group.expiries {
            expiries.set(key, expires);
        }
        replica.publish(records, revision, &group.events);
    }
    for (answer, outcome) in answers {
        // A caller that has gone away does not undo its write.
        let _ = answer.send(outcome);
    }
    true
}

/// Does all wishes of a request, at one revision, or none of them. The first one's event comes first.
fn transact(
    records: &mut Records,
    first: Wish,
    along: Vec<Wish>,
    revision: Revision,
) -> Result<Vec<(Event, Option<Instant>)>, StoreError> {
    let mut done: Vec<(Event, Option<Instant>)> = Vec::with_capacity(1 + along.len());
    for wish in std::iter::once(first).chain(along) {
        let current = records.get(&*wish.key);
        let unconditional = wish.value.is_none() && wish.expect == Expect::Any;
        if unconditional && current.is_none() && !done.is_empty() {
            continue;
        }
        let expires = wish.expires;
        match decide(current, wish, revision) {
            Ok(event) => {
                event.apply(records);
                done.push((event, expires));
            }
            Err(error) => {
                for (event, _) in done.iter().rev() {
                    event.undo(records);
                }
                return Err(error);
            }
        }
    }
    Ok(done)
}

/// Decides a wish against the record that is there.
fn decide(current: Option<&Record>, wish: Wish, revision: Revision) -> Result<Event, StoreError> {
    let Wish {
        key, value, expect, ..
    } = wish;
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
