//! What watches without selectors begin with, kept whole: every object of a resource as a frame of protobuf, in the chunks of the body.
//!
//! Thousands of kubelets and proxies watch all Services. When they, or we, start again, each is to cost the bytes on its
//! connection, and no look at the objects. A beginning holds for as long as nothing of it is written to, which the store's own watch
//! says: the one that is opened from its revision, and has nothing to tell.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use tokio::sync::Mutex as Gate;

use super::INITIAL_EVENTS_PER_CHUNK;
use crate::api::encodings::{Encodings, FRAME_BYTES, UNUSED_MAX, may_be_kept};
use crate::registry::Resource;
use crate::store::{Range, Record, Revision, Store, StoreError, WatchStream};

/// Fewer are soon looked at.
const RECORDS_MIN: usize = 500;
/// Of all beginnings together, those included that are of no use any more but for a client that is slow to take them.
const BYTES_MAX: usize = 64 << 20;
/// What is watched and kept, or known to be too little or too much for it.
const KEPT_MAX: usize = 256;
/// How long it is known without another look.
const UNFIT_FOR: Duration = Duration::from_secs(10);

pub struct Beginnings {
    records_min: usize,
    room: Arc<Room>,
    /// By version and prefix.
    kept: Mutex<HashMap<String, Kept>>,
}

struct Kept {
    used: Instant,
    /// One who comes makes it, and others wait for that rather than do the same.
    gate: Arc<Gate<Place>>,
}

#[derive(Default)]
enum Place {
    #[default]
    Unknown,
    Kept(Arc<Beginning>),
    /// Until then.
    Unfit(Instant),
}

/// All objects of a resource at a revision, as events.
pub struct Beginning {
    revision: Revision,
    chunks: Vec<Bytes>,
    _room: Taken,
}

/// A watch that begins with a beginning: with what it goes on, and from which revision.
pub struct Begun {
    pub beginning: Arc<Beginning>,
    pub stream: Box<dyn WatchStream>,
    pub from: Revision,
}

impl Beginning {
    /// A chunk of the body, by its number; None when it is over.
    pub fn chunk(&self, number: usize) -> Option<Bytes> {
        self.chunks.get(number).cloned()
    }
}

/// Bytes that may still be kept.
struct Room(AtomicUsize);

impl Room {
    fn take(self: &Arc<Self>, bytes: usize) -> Option<Taken> {
        let left = |room: usize| room.checked_sub(bytes);
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, left);
        taken.is_ok().then(|| Taken {
            room: self.clone(),
            bytes,
        })
    }
}

struct Taken {
    room: Arc<Room>,
    bytes: usize,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.room.0.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

impl Default for Beginnings {
    fn default() -> Self {
        Self::bounded(RECORDS_MIN, BYTES_MAX)
    }
}

impl Beginnings {
    fn bounded(records_min: usize, bytes_max: usize) -> Self {
        Self {
            records_min,
            room: Arc::new(Room(AtomicUsize::new(bytes_max))),
            kept: Mutex::default(),
        }
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<String, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a watch of all that is under a prefix, of a resource that is served as it is stored. None where that is better looked at anew.
    pub async fn begin(
        &self,
        (store, encodings): (&dyn Store, &Encodings),
        resource: &Resource,
        prefix: &str,
    ) -> Result<Option<Begun>, StoreError> {
        if !may_be_kept(resource) {
            return Ok(None);
        }
        let Some(gate) = self.gate(format!("{} {prefix}", resource.api_version())) else {
            return Ok(None);
        };
        // Where others write to the store too, this waits until all that was answered is seen.
        store.get(prefix).await?;
        let mut place = gate.lock().await;
        match &*place {
            Place::Unfit(until) if Instant::now() < *until => return Ok(None),
            Place::Kept(beginning) => {
                if let Some(begun) = go_on(store, beginning, prefix).await {
                    return Ok(Some(begun));
                }
            }
            _ => {}
        }
        *place = Place::Unknown;
        let page = store.list(Range::all(prefix)).await?;
        let (records, revision) = (page.records, page.revision);
        let made = match records.len() < self.records_min {
            true => None,
            false => self.make(encodings, resource, &records, revision).await,
        };
        let Some(beginning) = made else {
            *place = Place::Unfit(Instant::now() + UNFIT_FOR);
            return Ok(None);
        };
        let beginning = Arc::new(beginning);
        *place = Place::Kept(beginning.clone());
        // When something is written meanwhile this one is not of the present any more, but of a moment ago.
        let stream = store.watch(prefix, revision).await?;
        Ok(Some(Begun {
            beginning,
            stream,
            from: revision,
        }))
    }

    fn gate(&self, name: String) -> Option<Arc<Gate<Place>>> {
        let mut kept = self.kept();
        if !kept.contains_key(&name) && kept.len() >= KEPT_MAX {
            return None;
        }
        let used = Instant::now();
        let gate = Arc::default();
        let kept = kept.entry(name).or_insert(Kept { used, gate });
        kept.used = used;
        Some(kept.gate.clone())
    }

    async fn make(
        &self,
        encodings: &Encodings,
        resource: &Resource,
        records: &[Record],
        revision: Revision,
    ) -> Option<Beginning> {
        // Protobuf is the smaller form.
        let bytes = records
            .iter()
            .map(|record| record.value.len() + FRAME_BYTES);
        let room = self.room.take(bytes.sum())?;
        let mut chunks = Vec::with_capacity(records.len().div_ceil(INITIAL_EVENTS_PER_CHUNK));
        for records in records.chunks(INITIAL_EVENTS_PER_CHUNK) {
            chunks.push(encodings.frames(resource, records, "ADDED")?.into());
            tokio::task::yield_now().await;
        }
        Some(Beginning {
            revision,
            chunks,
            _room: room,
        })
    }

    /// Lets go of what no watch has begun with for a while.
    pub fn forget_unused(&self, now: Instant) {
        self.kept()
            .retain(|_, kept| now.duration_since(kept.used) < UNUSED_MAX);
    }
}

/// What a watch goes on with that begins with something kept. None when it is not what is there now.
async fn go_on(store: &dyn Store, beginning: &Arc<Beginning>, prefix: &str) -> Option<Begun> {
    let mut stream = store.watch(prefix, beginning.revision).await.ok()?;
    if stream.next().now_or_never().is_some() {
        return None;
    }
    let from = stream.progress().max(beginning.revision);
    Some(Begun {
        beginning: beginning.clone(),
        stream,
        from,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::object;
    use crate::registry;
    use crate::store::{Embedded, EmbeddedConfig, Expect};

    const PREFIX: &str = "/core/configmaps/";

    struct Stage {
        store: Embedded,
        encodings: Encodings,
        beginnings: Beginnings,
        _folder: tempfile::TempDir,
    }

    impl Stage {
        async fn new(objects: usize, beginnings: Beginnings) -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let config = EmbeddedConfig::at(folder.path().join("state.redb"));
            let stage = Self {
                store: Embedded::open(&config).expect("a store"),
                encodings: Encodings::default(),
                beginnings,
                _folder: folder,
            };
            for number in 0..objects {
                stage.write(&format!("m-{number}"), "first").await;
            }
            stage
        }

        async fn write(&self, name: &str, text: &str) -> Revision {
            let value = object::encode(json!({"metadata": {"name": name}, "data": {"a": text}}));
            let key = format!("{PREFIX}a/{name}");
            let written = self.store.put(&key, value, Expect::Any).await;
            written.expect("written").revision
        }

        async fn begin_of(&self, plural: &str, prefix: &str) -> Option<Begun> {
            let resource = registry::resource("", "v1", plural).expect("a row of the tables");
            let parts = (&self.store as &dyn Store, &self.encodings);
            let begun = self.beginnings.begin(parts, resource, prefix).await;
            begun.expect("a store that answers")
        }

        async fn begin(&self) -> Option<Begun> {
            self.begin_of("configmaps", PREFIX).await
        }

        /// The bytes that are left to keep.
        fn room(&self) -> usize {
            self.beginnings.room.0.load(Ordering::Relaxed)
        }
    }

    fn bytes(begun: &Begun) -> Vec<u8> {
        (0..)
            .map_while(|number| begun.beginning.chunk(number))
            .flatten()
            .collect()
    }

    #[tokio::test]
    async fn watches_begin_with_the_same_bytes_until_something_is_written() {
        let stage = Stage::new(
            INITIAL_EVENTS_PER_CHUNK + 1,
            Beginnings::bounded(2, 1 << 20),
        )
        .await;
        let first = stage.begin().await.expect("enough to be kept");
        assert_eq!(first.beginning.chunks.len(), 2);
        let listed = stage.store.list(Range::all(PREFIX)).await.expect("a list");
        let configmaps = registry::resource("", "v1", "configmaps").expect("a row");
        let frames = stage.encodings.frames(configmaps, &listed.records, "ADDED");
        assert_eq!(Some(bytes(&first)), frames);
        // What is written elsewhere is no matter, but the watch has seen it.
        let other = stage
            .store
            .put("/core/pods/a/x", Bytes::from("{}"), Expect::Any);
        let other = other.await.expect("written").revision;
        let mut second = stage.begin().await.expect("kept");
        assert!(Arc::ptr_eq(&first.beginning, &second.beginning));
        assert_eq!((first.from, second.from), (listed.revision, other));
        // What is written is an event to who has begun, and there for who comes.
        let changed = stage.write("m-7", "second").await;
        let events = second.stream.next().await.expect("an event");
        assert_eq!(events[0].record.revision, changed);
        let third = stage.begin().await.expect("enough to be kept");
        assert!(!Arc::ptr_eq(&first.beginning, &third.beginning));
        assert_eq!(third.from, changed);
        assert_ne!(bytes(&first), bytes(&third));
    }

    #[tokio::test]
    async fn what_is_kept_is_bounded_with_what_slow_clients_hold() {
        let stage = Stage::new(3, Beginnings::bounded(2, 600)).await;
        let slow = stage.begin().await.expect("kept");
        let left = stage.room();
        assert!((1..300).contains(&left), "{left}");
        stage.write("m-1", "second").await;
        assert!(stage.begin().await.is_none(), "there is no room for two");
        drop(slow);
        assert!(stage.begin().await.is_none(), "it is not tried at once");
        stage.beginnings.forget_unused(Instant::now() + UNUSED_MAX);
        let kept = stage.begin().await.expect("there is room now");
        stage.beginnings.forget_unused(Instant::now());
        assert_eq!(stage.beginnings.kept().len(), 1, "it was used just now");
        stage.beginnings.forget_unused(Instant::now() + UNUSED_MAX);
        drop(kept);
        assert_eq!(stage.room(), 600);
    }

    #[tokio::test]
    async fn little_and_secrets_are_not_kept() {
        let stage = Stage::new(3, Beginnings::bounded(4, 1 << 20)).await;
        assert!(stage.begin().await.is_none(), "there are three");
        assert!(stage.begin_of("secrets", "/core/secrets/").await.is_none());
        for number in 0..KEPT_MAX + 5 {
            let prefix = format!("{PREFIX}n-{number}/");
            assert!(stage.begin_of("configmaps", &prefix).await.is_none());
        }
        assert_eq!(stage.beginnings.kept().len(), KEPT_MAX);
    }
}
