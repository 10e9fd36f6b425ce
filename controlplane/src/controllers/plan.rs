//! What a controller is: a pure function from the snapshot and a key to writes, and the rule that says which keys a
//! change makes worth planning again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolumeClaim};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use super::Settings;
use super::object::{Key, Object, Target};
use super::snapshot::{Change, Snapshot};

/// What a plan may look at.
pub struct View<'a> {
    pub snapshot: &'a Snapshot,
    pub settings: &'a Settings,
    /// The time of day, which goes by a clock that can be set.
    pub now: Timestamp,
    /// The same moment by one that cannot: how long ago something was that this process saw.
    pub instant: Instant,
    /// What the last attempt to create something for this key failed with, if it failed.
    pub last_failure: Option<&'a str>,
}

impl View<'_> {
    /// The time of day so much later.
    pub fn after(&self, wait: Duration) -> Timestamp {
        self.now.saturating_add(wait).unwrap_or(Timestamp::MAX)
    }
}

/// Writes that may be done at the same time, and when to look again if nothing changes until then. What depends on the
/// outcome of these writes is left to the next plan: it sees their outcome in its snapshot. What only has to come after them is
/// in `then`.
#[derive(Debug, Default)]
pub struct Plan {
    pub writes: Vec<Write>,
    /// Writes that begin when all before them have succeeded, a stage after the other.
    pub then: Vec<Vec<Write>>,
    pub again_at: Option<Timestamp>,
}

impl Plan {
    pub fn nothing() -> Self {
        Self::default()
    }

    pub fn push(&mut self, action: Action) {
        self.writes.push(Write { action, note: None });
    }

    pub fn push_noted(&mut self, action: Action, note: Note) {
        self.writes.push(Write {
            action,
            note: Some(note),
        });
    }

    /// Records an event without writing anything else.
    pub fn note(&mut self, note: Note) {
        self.writes.push(Write {
            action: Action::None,
            note: Some(note),
        });
    }

    pub fn look_again(&mut self, at: Timestamp) {
        self.again_at = Some(self.again_at.map_or(at, |earlier| earlier.min(at)));
    }

    pub fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.then.is_empty()
    }
}

#[derive(Debug)]
pub struct Write {
    pub action: Action,
    pub note: Option<Note>,
}

/// One request to the API server.
#[derive(Debug)]
pub enum Action {
    /// Nothing but the note.
    None,
    /// POST. With `generateName` and no name, whoever executes it chooses the name, once: a request that is repeated
    /// because its answer was lost cannot make a second object.
    Create(Object),
    /// JSON merge patch. A resourceVersion in the body makes it fail when the object has changed since.
    Patch {
        target: Target,
        subresource: Option<&'static str>,
        body: Value,
    },
    /// DELETE with the UID as precondition.
    Delete {
        target: Target,
        propagation: Option<Propagation>,
        grace_seconds: Option<i64>,
    },
    /// DELETE of a dependent whose owners are all gone, after each has been asked for by name.
    Collect {
        target: Target,
        revision: u64,
        owners: Vec<OwnerReference>,
        propagation: Propagation,
    },
    /// POST of a Binding.
    Bind { pod: Target, node: String },
    /// Fills a token Secret: with a token of the account that is bound to the Secret, unless it has one.
    FillToken {
        secret: Target,
        account: Target,
        has_token: bool,
        root_ca: String,
    },
    /// Removes the finalizer `kubernetes` of a namespace once every resource has been listed and found empty there.
    FinalizeNamespace(Target),
    /// Takes its protection from a claim that is to go, once the namespace's pods have been listed and none uses it: a pod
    /// may have been bound that the snapshot does not have yet.
    ReleaseClaim(Arc<PersistentVolumeClaim>),
}

/// What happens to the dependents of an object that is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    Background,
    Foreground,
    Orphan,
}

impl Propagation {
    pub fn as_str(self) -> &'static str {
        match self {
            Propagation::Background => "Background",
            Propagation::Foreground => "Foreground",
            Propagation::Orphan => "Orphan",
        }
    }
}

/// An event to be recorded about an object when a write has come out.
#[derive(Clone, Debug)]
pub struct Note {
    pub about: ObjectReference,
    pub reporter: &'static str,
    /// `Normal` or `Warning`, when the write succeeds.
    pub type_: &'static str,
    pub reason: &'static str,
    /// `{name}` stands for the name of the object written.
    pub message: String,
    /// Reason and beginning of the message of the warning recorded when the write fails; None records nothing.
    pub failure: Option<(&'static str, &'static str)>,
}

impl Note {
    pub fn normal(
        about: &Target,
        reporter: &'static str,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            about: about.reference(),
            reporter,
            type_: "Normal",
            reason,
            message: message.into(),
            failure: None,
        }
    }

    pub fn warning(
        about: &Target,
        reporter: &'static str,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            type_: "Warning",
            ..Self::normal(about, reporter, reason, message)
        }
    }

    pub fn or_failure(mut self, reason: &'static str, message: &'static str) -> Self {
        self.failure = Some((reason, message));
        self
    }
}

/// Keys that a change touches, of one controller.
pub type Keys = BTreeSet<Key>;

/// One controller, as the runner sees it.
pub struct Controller {
    pub name: &'static str,
    /// Adds the keys whose plan may differ after the change. The snapshot is the one after the change.
    pub affected: fn(&Snapshot, &Change, &mut Keys),
    pub plan: fn(&View<'_>, &Key) -> Plan,
}
