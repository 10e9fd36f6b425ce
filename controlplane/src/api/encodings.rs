//! Objects as protobuf, kept between the lists that they are part of, and the watches that begin with them: an informer that comes
//! costs a copy of bytes.
//!
//! What is kept is bounded, and goes when nobody lists it any more. What a list brings never pushes out what lists still ask for:
//! one that is longer than all that may be kept would find nothing of itself when it comes again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::object;
use crate::codec::transcode::{self, Frames};
use crate::registry::Resource;
use crate::store::{Record, Revision};

/// What is kept of all resources together.
const BYTES_MAX: usize = 128 << 20;
/// What one object costs beside its bytes, about: its entry, and what counts who has its bytes.
const OBJECT_BYTES: usize = 160;
/// How long an object is kept that is part of no list.
pub(super) const UNUSED_MAX: Duration = Duration::from_secs(300);
/// How often what is unused is looked for when there is no room.
const SWEEP_PAUSE: Duration = Duration::from_secs(10);
/// What a frame has around a message, about.
pub(super) const FRAME_BYTES: usize = 64;
/// Records that are looked up in one go, while others wait.
const LOOK_UPS: usize = 256;

pub(super) struct Encodings {
    bytes_max: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// By the key of the record: each resource that is served as it is stored has keys of its own.
    objects: HashMap<Arc<str>, Object>,
    bytes: usize,
    swept: Option<Instant>,
}

struct Object {
    revision: Revision,
    message: Bytes,
    used: Instant,
}

impl Object {
    fn bytes(&self) -> usize {
        self.message.len() + OBJECT_BYTES
    }
}

impl Default for Encodings {
    fn default() -> Self {
        Self {
            bytes_max: BYTES_MAX,
            kept: Mutex::default(),
        }
    }
}

/// What nearly everybody keeps sealed is not to lie around open.
pub fn may_be_kept(resource: &Resource) -> bool {
    resource.plural != "secrets"
}

impl Encodings {
    /// Records of a resource that is served as it is stored, each as its message. None when one does not fit its type.
    pub fn messages(&self, resource: &Resource, records: &[Record]) -> Option<Vec<Bytes>> {
        let now = Instant::now();
        let keeps = may_be_kept(resource);
        let mut messages = Vec::with_capacity(records.len());
        let mut json = Vec::new();
        for records in records.chunks(LOOK_UPS) {
            let known = self.kept().find(records, now);
            let mut made = Vec::new();
            for (record, known) in records.iter().zip(known) {
                let message = match known {
                    Some(message) => message,
                    None => {
                        json.clear();
                        object::write_item(&mut json, record);
                        let message = transcode::message(resource.ty.get(), &json)?;
                        let message = Bytes::copy_from_slice(&message);
                        made.push((record, message.clone()));
                        message
                    }
                };
                messages.push(message);
            }
            if keeps && !made.is_empty() {
                self.kept().keep(made, now, self.bytes_max);
            }
        }
        Some(messages)
    }

    /// Such records as events of a watch, one frame after the other. None when one does not fit its type.
    pub fn frames(&self, resource: &Resource, records: &[Record], event: &str) -> Option<Vec<u8>> {
        let messages = self.messages(resource, records)?;
        let frames = Frames::new(&resource.api_version(), resource.kind);
        let mut out = Vec::with_capacity(messages.iter().map(|one| one.len() + FRAME_BYTES).sum());
        for message in &messages {
            frames.write(&mut out, event, message)?;
        }
        Some(out)
    }

    /// Lets go of what has been part of no list for a while.
    pub fn forget_unused(&self, now: Instant) {
        self.kept().sweep(now);
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn find(&mut self, records: &[Record], now: Instant) -> Vec<Option<Bytes>> {
        let find = |record: &Record| {
            let known = self.objects.get_mut(&record.key)?;
            (known.revision == record.revision).then(|| {
                known.used = now;
                known.message.clone()
            })
        };
        records.iter().map(find).collect()
    }

    fn keep(&mut self, made: Vec<(&Record, Bytes)>, now: Instant, bytes_max: usize) {
        for (record, message) in made {
            let object = Object {
                revision: record.revision,
                message,
                used: now,
            };
            let known = self.objects.get(&record.key);
            if known.is_some_and(|known| known.revision > object.revision) {
                continue;
            }
            let replaced = known.map_or(0, Object::bytes);
            let has_room = |kept: usize| kept - replaced + object.bytes() <= bytes_max;
            if !has_room(self.bytes) {
                let swept = self.swept.is_some_and(|at| now < at + SWEEP_PAUSE);
                if swept || replaced > 0 {
                    // An older state of it is of no use to anybody.
                    self.remove(&record.key);
                    continue;
                }
                self.sweep(now);
                if self.bytes + object.bytes() > bytes_max {
                    continue;
                }
            }
            self.bytes += object.bytes();
            if let Some(replaced) = self.objects.insert(record.key.clone(), object) {
                self.bytes -= replaced.bytes();
            }
        }
    }

    fn remove(&mut self, key: &str) {
        if let Some(removed) = self.objects.remove(key) {
            self.bytes -= removed.bytes();
        }
    }

    fn sweep(&mut self, now: Instant) {
        self.swept = Some(now);
        self.objects
            .retain(|_, object| now.duration_since(object.used) < UNUSED_MAX);
        self.bytes = self.objects.values().map(Object::bytes).sum();
        self.objects.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::registry;

    fn record(name: &str, revision: u64, data: &str) -> Record {
        Record {
            key: format!("/core/configmaps/a/{name}").into(),
            value: object::encode(json!({"metadata": {"name": name}, "data": {"a": data}})),
            revision: Revision(revision),
            created: Revision(1),
        }
    }

    fn maps() -> &'static Resource {
        registry::resource("", "v1", "configmaps").expect("a row of the tables")
    }

    fn bounded(bytes_max: usize) -> Encodings {
        Encodings {
            bytes_max,
            ..Encodings::default()
        }
    }

    /// What is kept, counted anew.
    fn bytes(encodings: &Encodings) -> usize {
        let kept = encodings.kept();
        let bytes = kept.objects.values().map(Object::bytes).sum();
        assert_eq!(kept.bytes, bytes);
        bytes
    }

    #[test]
    fn an_object_is_encoded_once_for_each_of_its_revisions() {
        let encodings = Encodings::default();
        let first = [record("x", 5, "one"), record("y", 6, "two")];
        let messages = encodings.messages(maps(), &first).expect("messages");
        let again = encodings.messages(maps(), &first).expect("messages");
        assert_eq!(messages, again);
        assert_eq!(messages[0].as_ptr(), again[0].as_ptr(), "the same bytes");
        // A list of an older state leaves the newer one in place.
        let second = [record("x", 7, "three"), first[1].clone()];
        let newer = encodings.messages(maps(), &second).expect("messages");
        assert_ne!(newer[0], messages[0]);
        assert_eq!(
            encodings.messages(maps(), &first).expect("messages"),
            messages
        );
        let again = encodings.messages(maps(), &second).expect("messages");
        assert_eq!(newer[0].as_ptr(), again[0].as_ptr());
        assert_eq!(encodings.kept().objects.len(), 2);
        bytes(&encodings);
    }

    #[test]
    fn a_watch_begins_with_what_lists_have_kept() {
        let encodings = Encodings::default();
        let records = [record("x", 5, "one"), record("y", 6, "two")];
        let frames = encodings.frames(maps(), &records, "ADDED");
        let whole = records.iter().map(|record| {
            let mut json = Vec::new();
            object::write(&mut json, record, record.revision, "ConfigMap", "v1");
            transcode::watch_frame("ADDED", &json).expect("a frame")
        });
        assert_eq!(frames.expect("frames"), whole.collect::<Vec<_>>().concat());
        assert_eq!(encodings.kept().objects.len(), 2);
        let none = encodings.frames(maps(), &[], "ADDED");
        assert_eq!(none, Some(Vec::new()));
    }

    #[test]
    fn what_is_kept_is_bounded_and_goes_when_it_is_unused() {
        let records: Vec<Record> = (0..100)
            .map(|at| record(&format!("n{at}"), at + 2, &"x".repeat(1000)))
            .collect();
        let encodings = bounded(50_000);
        let messages = encodings.messages(maps(), &records).expect("messages");
        assert!(bytes(&encodings) <= 50_000);
        let kept = encodings.kept().objects.len();
        assert!(kept > 30 && kept < 60, "{kept}");
        // The same ones are found when the list comes again.
        let again = encodings.messages(maps(), &records).expect("messages");
        let same = messages.iter().zip(&again);
        let same = same.filter(|(one, other)| one.as_ptr() == other.as_ptr());
        assert_eq!(same.count(), kept);
        assert_eq!(messages, again);
        let now = Instant::now();
        encodings.forget_unused(now);
        assert_eq!(encodings.kept().objects.len(), kept);
        encodings.forget_unused(now + UNUSED_MAX);
        assert_eq!(bytes(&encodings), 0);
    }

    #[test]
    fn secrets_are_not_kept() {
        let secrets = registry::resource("", "v1", "secrets").expect("a row of the tables");
        let encodings = Encodings::default();
        let secret = Record {
            value: object::encode(json!({"metadata": {"name": "s"}, "data": {"a": "aGk="}})),
            ..record("s", 3, "")
        };
        assert!(encodings.messages(secrets, &[secret]).is_some());
        assert_eq!(bytes(&encodings), 0);
    }
}
