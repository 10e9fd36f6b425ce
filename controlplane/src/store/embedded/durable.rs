//! The disk as the writer has it. redb takes nothing more after an error, also when what caused it is over (a disk that was
//! full): then it is opened again.

use std::sync::Arc;
use std::time::{Duration, Instant as Moment};

use super::disk::{Disk, Group};
use super::{Change, Event, Revision, StoreError};

/// How long nobody tries to open a disk again that has just refused to be: each try may read all of it.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);

/// Opens the disk again.
pub(super) type Reopen = Box<dyn Fn() -> Result<Disk, StoreError> + Send>;

pub(super) struct Durable {
    /// None once it has failed.
    disk: Option<Disk>,
    reopen: Reopen,
    /// A group that failed. It may have reached the disk all the same, and nobody was told that it did.
    failed: Option<Failed>,
    /// When it was last opened in vain, and why.
    refused: Option<(Moment, StoreError)>,
}

struct Failed {
    /// The revision that it would have led to.
    revision: Revision,
    /// What makes the disk what it was before.
    undo: Group,
}

impl Durable {
    pub fn new(disk: Disk, reopen: Reopen) -> Self {
        Self {
            disk: Some(disk),
            reopen,
            failed: None,
            refused: None,
        }
    }

    /// Writes a group, and returns once it is on disk. After an error nothing of it happened; `undo` is what takes it back.
    pub fn commit(
        &mut self,
        group: &Group,
        undo: impl FnOnce() -> Group,
    ) -> Result<(), StoreError> {
        let outcome = self.opened()?.commit(group);
        if outcome.is_err() {
            self.disk = None;
            self.failed = Some(Failed {
                revision: group.revision,
                undo: undo(),
            });
        }
        outcome
    }

    fn opened(&mut self) -> Result<&Disk, StoreError> {
        if let Some((at, error)) = &self.refused
            && at.elapsed() < REOPEN_PAUSE
        {
            return Err(error.clone());
        }
        let disk = match self.disk.take() {
            Some(disk) => disk,
            None => match self.open_again() {
                Ok(disk) => disk,
                Err(error) => {
                    self.refused = Some((Moment::now(), error.clone()));
                    return Err(error);
                }
            },
        };
        Ok(self.disk.insert(disk))
    }

    fn open_again(&mut self) -> Result<Disk, StoreError> {
        let disk = (self.reopen)()?;
        if let Some(failed) = &self.failed {
            let found = disk.revision()?;
            // Its lock was open for a moment.
            if found != failed.undo.revision && found != failed.revision {
                return Err(disk.changed_elsewhere());
            }
            disk.commit(&failed.undo)?;
        }
        (self.failed, self.refused) = (None, None);
        tracing::info!("the store's file is open again, as it was before the error");
        Ok(disk)
    }
}

/// What takes events back, the last one first.
pub(super) fn undo(events: &[Arc<Event>]) -> Vec<Arc<Event>> {
    let back = |event: &Arc<Event>| {
        let (change, record) = match &event.previous {
            Some(previous) => (Change::Put, previous),
            None => (Change::Delete, &event.record),
        };
        Arc::new(Event {
            change,
            record: record.clone(),
            previous: None,
        })
    };
    events.iter().rev().map(back).collect()
}
