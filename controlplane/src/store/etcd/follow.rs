//! Copies etcd into the replica: whole at first, then change by change.
//!
//! Every key of etcd is watched, not only ours: so each revision arrives as an event, and the replica's revision can
//! be compared with etcd's.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, Event as EtcdEvent, EventType, GetOptions, WatchOptions};
use tokio::sync::Notify;

use super::lineage::{Found, Lineage};
use super::{Members, Record, Replica, Revision, Space, StoreError, revision_of, signed, unsigned};
use crate::store::Change;
use crate::store::replica::{Event, Records};

/// Records that are asked for at once.
const PAGE: i64 = 1000;
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

pub(super) struct Follower {
    pub members: Arc<Members>,
    pub space: Space,
    pub replica: Replica,
    /// Somebody waits for a revision that does not come.
    pub doubt: Arc<Notify>,
    pub lineage: Arc<Lineage>,
}

/// Why a watch ended.
enum Ended {
    /// What should come next is forgotten.
    Compacted,
    /// It is another history.
    Replaced,
    Lost(String),
}

impl Follower {
    /// Follows for as long as the store lives.
    pub async fn run(self) {
        let mut pause = PAUSE_MIN;
        loop {
            let (before, turn) = (self.replica.revision(), self.members.turn());
            let outcome = match self.follow().await {
                Ended::Lost(reason) => Err(reason),
                Ended::Compacted => self.reload().await.map_err(|error| error.to_string()),
                Ended::Replaced => return,
            };
            if let Err(reason) = outcome {
                tracing::warn!(%reason, "etcd's changes do not arrive; asking the next member");
                self.members.leave(turn);
            }
            pause = match self.replica.revision() > before {
                true => PAUSE_MIN,
                false => (pause * 2).min(PAUSE_MAX),
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn follow(&self) -> Ended {
        let from = signed(self.replica.revision()) + 1;
        let options = WatchOptions::new()
            .with_all_keys()
            .with_start_revision(from);
        let watch = |client: Client| async move {
            // The changes of one revision come in one message, whatever their size.
            let watches = client.watch_client();
            let mut watches = watches.max_decoding_message_size(usize::MAX);
            watches.watch("", Some(options)).await
        };
        let mut stream = match self.members.ask("watch", watch).await {
            Ok(stream) => stream,
            Err(error) => return Ended::Lost(error.to_string()),
        };
        // Once it watches: what is put back from now on ends the watch.
        let look = self.lineage.look(&self.members, &self.space, &self.replica);
        match look.await {
            Ok(Found::Same) => {}
            Ok(Found::Compacted) => return Ended::Compacted,
            Ok(Found::Other) => return Ended::Replaced,
            Err(error) => return Ended::Lost(error.to_string()),
        }
        loop {
            let message = tokio::select! {
                message = stream.message() => message,
                () = self.doubt.notified() => return Ended::Lost("nothing came for too long".to_owned()),
            };
            match message {
                Ok(Some(message)) if message.compact_revision() > 0 => return Ended::Compacted,
                Ok(Some(message)) if message.canceled() => {
                    return Ended::Lost(message.cancel_reason().to_owned());
                }
                Ok(Some(message)) => self.apply(message.events()),
                Ok(None) => return Ended::Lost("the server ended it".to_owned()),
                Err(error) => return Ended::Lost(error.to_string()),
            }
        }
    }

    fn apply(&self, changes: &[EtcdEvent]) {
        let (mut records, known) = self.replica.newest();
        let mut revision = known;
        let mut events = Vec::with_capacity(changes.len());
        for change in changes {
            let Some(kv) = change.kv() else { continue };
            let at = unsigned(kv.mod_revision());
            if at <= known {
                continue;
            }
            revision = at;
            let Some(key) = self.space.key(kv.key()) else {
                continue;
            };
            let previous = records.get(key).cloned();
            let (change, record) = match (change.event_type(), &previous) {
                (EventType::Put, _) => match self.space.record(kv) {
                    Some(record) => (Change::Put, record),
                    None => continue,
                },
                (EventType::Delete, Some(last)) => {
                    let record = Record {
                        revision: at,
                        ..last.clone()
                    };
                    (Change::Delete, record)
                }
                (EventType::Delete, None) => continue,
            };
            let event = Event {
                change,
                record,
                previous,
            };
            event.apply(&mut records);
            events.push(Arc::new(event));
        }
        self.replica.publish(records, revision, &events);
    }

    /// Starts over. Watches learn that their history is gone.
    async fn reload(&self) -> Result<(), StoreError> {
        let (records, revision) = load(&self.members, &self.space).await?;
        tracing::warn!(%revision, "etcd has forgotten what happened since; the state was read anew");
        self.replica.replace(records, revision);
        Ok(())
    }
}

/// All records, as of one revision.
pub(super) async fn load(
    members: &Members,
    space: &Space,
) -> Result<(Records, Revision), StoreError> {
    let mut records = Records::new();
    let mut revision = None;
    // Keys go on with a slash; the next character ends their range.
    let (mut from, end) = (space.path("/").into_bytes(), space.path("0"));
    loop {
        let mut options = GetOptions::new().with_range(end.clone()).with_limit(PAGE);
        if let Some(at) = revision {
            options = options.with_revision(signed(at));
        }
        let get = |client: Client| {
            let (from, options) = (from.clone(), options.clone());
            async move {
                let mut kv = client.kv_client().max_decoding_message_size(usize::MAX);
                kv.get(from, Some(options)).await
            }
        };
        let page = members.ask_any("list", get).await?;
        let at = *revision.get_or_insert_with(|| revision_of(page.header()));
        for record in page.kvs().iter().filter_map(|kv| space.record(kv)) {
            records.insert(record.key.clone(), record);
        }
        match page.kvs().last() {
            Some(last) if page.more() => {
                from = last.key().to_vec();
                from.push(0);
            }
            _ => return Ok((records, at)),
        }
    }
}
