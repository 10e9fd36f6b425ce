//! News from the API server, taken into a snapshot: what the controllers' runner and the scheduler share.

use std::collections::HashSet;
use std::time::Instant;

use super::object::{Kind, Object, Target};
use super::snapshot::{Change, Snapshot};
use super::watch::Feed;

/// A snapshot that is being fed.
pub struct Intake {
    pub snapshot: Snapshot,
    /// Kinds whose first list is outstanding: nothing may be decided before all are known.
    awaited: HashSet<Kind>,
}

impl Intake {
    pub fn of(kinds: impl IntoIterator<Item = Kind>) -> Self {
        Self {
            snapshot: Snapshot::default(),
            awaited: kinds.into_iter().collect(),
        }
    }

    /// Whether everything that is there has been seen once.
    pub fn is_synced(&self) -> bool {
        self.awaited.is_empty()
    }

    /// Takes in news; gives what has changed by it. A list is complete: what it lacks is gone.
    pub fn take_in(&mut self, feed: Feed) -> Vec<Change> {
        match feed {
            Feed::Listed {
                resource,
                objects,
                revision,
            } => {
                let listed: HashSet<String> = objects
                    .iter()
                    .map(|object| object.uid().to_string())
                    .collect();
                let missing = self.snapshot.missing(&resource, &listed, revision);
                if let Some(kind) = Kind::of(&resource) {
                    self.awaited.remove(&kind);
                }
                let gone = missing
                    .iter()
                    .filter_map(|object| self.snapshot.remove(object));
                let mut changes: Vec<Change> = gone.collect();
                changes.extend(objects.into_iter().filter_map(|object| self.apply(object)));
                changes
            }
            Feed::Changed(object) => self.apply(object).into_iter().collect(),
            Feed::Gone(object) => self.snapshot.remove(&object).into_iter().collect(),
            Feed::Unserved(resource) => {
                if let Some(kind) = Kind::of(&resource) {
                    self.awaited.remove(&kind);
                }
                Vec::new()
            }
            Feed::Resources(resources) => {
                self.snapshot.resources = std::sync::Arc::new(resources);
                Vec::new()
            }
        }
    }

    /// Takes in what a write of our own has brought to light.
    pub fn answered(&mut self, seen: Vec<Object>, gone: Vec<Target>) -> Vec<Change> {
        let mut changes: Vec<Change> = seen
            .into_iter()
            .filter_map(|object| self.apply(object))
            .collect();
        for target in gone {
            let found = self.snapshot.object(&target.resource, &target.key);
            if let Some(object) = found.filter(|found| found.uid() == &*target.uid) {
                changes.extend(self.snapshot.remove(&object));
            }
        }
        changes
    }

    fn apply(&mut self, object: Object) -> Option<Change> {
        self.snapshot.apply(object, Instant::now())
    }
}
