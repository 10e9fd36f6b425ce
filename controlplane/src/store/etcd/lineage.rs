//! Whether etcd has the history that was followed. One that was put back to an earlier state, a backup restored in place, has another
//! one: revisions mean other writes, and what was made of them here and is kept by clients is nowhere any more. Nothing tells
//! which part of it still holds, so all of it is over: the server ends, and starts anew with what there is.

use etcd_client::{Client, GetOptions};
use tokio::sync::watch;

use super::{Members, Replica, Revision, Space, StoreError, fence, signed};

pub(super) struct Lineage {
    /// Why it is another one.
    broken: watch::Sender<Option<String>>,
}

/// What a look at etcd's history found.
pub(super) enum Found {
    Same,
    /// Too much of it is forgotten to tell; what follows has to be read anew in any case.
    Compacted,
    Other,
}

impl Lineage {
    pub fn new() -> Self {
        Self {
            broken: watch::Sender::new(None),
        }
    }

    /// Refuses what is to be done with a history that is not there any more.
    pub fn check(&self) -> Result<(), StoreError> {
        match &*self.broken.borrow() {
            None => Ok(()),
            Some(reason) => Err(refusal(reason)),
        }
    }

    /// Holds what etcd's quorum has named as its newest revision against what was known before it was asked.
    pub fn hold(&self, known: Revision, newest: Revision) -> Result<(), StoreError> {
        if newest < known {
            self.end(format!(
                "it is at revision {newest}, and was at {known} before"
            ));
        }
        self.check()
    }

    /// Looks whether the newest of our records is in etcd as it is here.
    pub async fn look(
        &self,
        members: &Members,
        space: &Space,
        replica: &Replica,
    ) -> Result<Found, StoreError> {
        let (records, known) = replica.newest();
        let newest = fence::ask(members, &space.format_path()).await?;
        if self.hold(known, newest).is_err() {
            return Ok(Found::Other);
        }
        let Some(ours) = records.values().max_by_key(|record| record.revision) else {
            return Ok(Found::Same);
        };
        let (path, at) = (space.path(&ours.key), signed(known));
        let get = |client: Client| async move {
            let options = GetOptions::new().with_revision(at);
            let mut kv = client.kv_client().max_decoding_message_size(usize::MAX);
            kv.get(path, Some(options)).await
        };
        let found = match members.ask("read", get).await {
            Ok(found) => found,
            Err(StoreError::Unavailable { reason, .. }) if reason.contains("compacted") => {
                return Ok(Found::Compacted);
            }
            Err(error) => return Err(error),
        };
        let theirs = found.kvs().first().and_then(|kv| space.record(kv));
        if theirs.as_ref() == Some(ours) {
            return Ok(Found::Same);
        }
        self.end(format!(
            "{} was written at revision {}, and it has not been",
            ours.key, ours.revision
        ));
        Ok(Found::Other)
    }

    fn end(&self, reason: String) {
        self.broken.send_if_modified(|broken| {
            let first = broken.is_none();
            broken.get_or_insert(reason);
            first
        });
    }

    /// Waits until the history is another one.
    pub async fn broken(&self) -> StoreError {
        let mut broken = self.broken.subscribe();
        // It fails when the sender is gone, which is kept here.
        let reason = match broken.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone(),
            Err(_) => None,
        };
        refusal(reason.as_deref().unwrap_or_default())
    }
}

fn refusal(reason: &str) -> StoreError {
    StoreError::Unavailable {
        operation: "go on with a state that was put back to an earlier one",
        reason: reason.to_owned(),
    }
}
