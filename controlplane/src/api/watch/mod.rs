//! Watch: initial state, then every change, as selectors and the asked form have it.

mod beginnings;
mod event;

use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use http::{StatusCode, header};
use rand::RngExt;
use serde_json::Value;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::encodings::Encodings;
use super::reply::Answer;
use super::request::{Encoding, Form, ListOptions, Target};
use super::selection::Selectable;
use super::status::Status;
use super::{Api, Call, object, reply};
use crate::registry::Resource;
use crate::store::{Change, Record, Revision, StoreError, WatchEvent, WatchStream};
use beginnings::Beginning;
pub(super) use beginnings::Beginnings;
use event::{Kind, bookmark, error_event, from_record, plain, shaped};

/// A watch without timeoutSeconds ends after this to twice this, as upstream's min-request-timeout.
const TIMEOUT_S_MIN: u64 = 1800;
/// Longer than any connection lasts, and no overflow of the clock.
const TIMEOUT_S_MAX: u64 = 365 * 24 * 3600;
/// Clients that can take them get a bookmark this often.
const BOOKMARK_PERIOD: Duration = Duration::from_secs(60);
/// How many initial events go in one chunk of the body.
const INITIAL_EVENTS_PER_CHUNK: usize = 200;
/// How many recent events are kept encoded for the other watchers of the same change.
const ENCODED_EVENTS: usize = 256;
/// How long a watch rests after it has sent something, for each watch that is told the same: about as long as a write to one of them
/// takes a processor. These writes cost more than all else that a change does, and what happens while the watches rest goes in one; so
/// no resource has more than one processor write to its watches. Few watches do not rest, and a change that comes after a rest is sent
/// at once.
const REST_PER_WATCH: Duration = Duration::from_micros(20);
/// Shorter ones are not worth a timer.
const REST_MIN: Duration = Duration::from_millis(2);
const REST_MAX: Duration = Duration::from_millis(40);

/// One change with what watchers of a resource have worked out about it: each part once for all of them.
pub(super) struct Encoded {
    event: Arc<WatchEvent>,
    /// Versions of a kind share their records, and differ in how these are sent.
    resource: &'static Resource,
    current: OnceLock<Option<Value>>,
    previous: OnceLock<Option<Value>>,
    /// What selectors look at, of the object after the change and before it.
    selectable: [OnceLock<Selectable>; 2],
    /// The whole event, by kind: as a line of JSON, and as a frame of protobuf.
    lines: [OnceLock<Bytes>; 3],
    frames: [OnceLock<Bytes>; 3],
}

/// The recent changes, encoded. A slot has those of one revision: a write takes what goes along with it into the same (a Service
/// its addresses), and each is watched under its own kind and versions.
pub(super) struct EncodedEvents {
    slots: Vec<Mutex<Vec<Arc<Encoded>>>>,
}

impl Default for EncodedEvents {
    fn default() -> Self {
        Self {
            slots: (0..ENCODED_EVENTS).map(|_| Mutex::default()).collect(),
        }
    }
}

impl EncodedEvents {
    fn share(&self, event: Arc<WatchEvent>, resource: &'static Resource) -> Arc<Encoded> {
        let revision = event.record.revision;
        let slot = &self.slots[usize::try_from(revision.0 % ENCODED_EVENTS as u64).unwrap_or(0)];
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        // Of what is kept sealed each watch has an event of its own.
        let same = |known: &&Arc<Encoded>| {
            let same_event = Arc::ptr_eq(&known.event, &event)
                || known.revision() == revision && known.event.record.key == event.record.key;
            same_event && std::ptr::eq(known.resource, resource)
        };
        if let Some(known) = slot.iter().find(same) {
            return known.clone();
        }
        let encoded = Arc::new(Encoded {
            event,
            resource,
            current: OnceLock::new(),
            previous: OnceLock::new(),
            selectable: Default::default(),
            lines: Default::default(),
            frames: Default::default(),
        });
        // A watcher that lags must not push out what the others are about to read.
        let kept = slot.first().map(|known| known.revision());
        if kept.is_none_or(|kept| kept < revision) {
            slot.clear();
        }
        if kept.is_none_or(|kept| kept <= revision) {
            slot.push(encoded.clone());
        }
        encoded
    }
}

impl Encoded {
    fn revision(&self) -> Revision {
        self.event.record.revision
    }

    /// The object after the change; the last one for a deletion.
    fn current(&self, target: &Target) -> Option<&Value> {
        self.current
            .get_or_init(|| target.decode(&self.event.record).ok())
            .as_ref()
    }

    /// The object before the change, with the revision of the change: what a watcher sees of one that left its selector.
    fn previous(&self, target: &Target) -> Option<&Value> {
        let decode = || {
            let previous = self.event.previous.as_ref()?;
            let resource = target.resource;
            object::decode_at(
                previous,
                self.revision(),
                resource.kind,
                &resource.api_version(),
            )
            .ok()
        };
        self.previous.get_or_init(decode).as_ref()
    }

    /// Whether the options select the object before the change, and after it; an object that is not there is not selected.
    fn selected(&self, options: &ListOptions) -> (bool, bool) {
        let deleted = self.event.change == Change::Delete;
        let (previous, current) = (self.event.previous.as_ref(), &self.event.record);
        if options.selects_all() {
            return (deleted || previous.is_some(), !deleted);
        }
        let selects = |at: usize, record: &Record| {
            let found =
                self.selectable[at].get_or_init(|| Selectable::of(&record.value, self.resource));
            options.selects(found)
        };
        match deleted {
            true => (selects(0, current), false),
            false => {
                let was = previous.is_some_and(|previous| selects(1, previous));
                (was, selects(0, current))
            }
        }
    }

    fn whole(&self, kind: Kind, encoding: Encoding, target: &Target) -> Bytes {
        let encode = || {
            let left = kind == Kind::Deleted && self.event.change == Change::Put;
            let record = if left {
                self.event.previous.as_ref()
            } else {
                None
            };
            let record = record.unwrap_or(&self.event.record);
            from_record(kind, record, self.revision(), target, encoding)
        };
        let kept = match encoding {
            Encoding::Protobuf => &self.frames,
            Encoding::Json | Encoding::Yaml => &self.lines,
        };
        kept[kind as usize].get_or_init(encode).clone()
    }
}

impl Api {
    pub(super) async fn watch(
        &self,
        call: &Call,
        (form, encoding): (Form, Encoding),
        options: ListOptions,
    ) -> Result<Answer, Status> {
        let prefix = call.target.prefix_of(&options);
        // Without a revision to start from, a watch begins with the present state, as one asked for with sendInitialEvents.
        let initial = match options.initial_events {
            Some(initial) => initial,
            None => options.resource_version.unwrap_or(0) == 0,
        };
        // Most begin with everything, and thousands of them together.
        let keeps = initial && options.selects_all() && encoding == Encoding::Protobuf;
        let begun = match keeps && plain(form, &call.target) {
            true => {
                self.reach(options.resource_version).await?;
                let parts = (&*self.store, &*self.encodings);
                let begun = self.beginnings.begin(parts, call.target.resource, &prefix);
                begun.await?
            }
            false => None,
        };
        let told = options.initial_events == Some(true) && options.bookmarks;
        let (initial, from, stream) = match begun {
            Some(begun) => (
                Initial::Kept(begun.beginning, 0),
                begun.from,
                Ok(begun.stream),
            ),
            None => {
                let (records, from) = self.initial(call, initial, &options).await?;
                let share = call.target.share_of(&options, &prefix);
                let stream = self.store.watch_share(&prefix, share, from).await;
                (Initial::Records(records.into_iter()), from, stream)
            }
        };
        let stream = match stream {
            Ok(stream) => stream,
            Err(error @ StoreError::Future { .. }) => return Err(error.into()),
            // Upstream tells of an expired revision inside the stream, and clients look for it there.
            Err(error) => {
                let error = error_event(&error.into(), encoding);
                return Ok(events_answer(encoding, futures::stream::iter([error])));
            }
        };
        let timeout_s = options
            .timeout_s
            .unwrap_or_else(|| rand::rng().random_range(TIMEOUT_S_MIN..2 * TIMEOUT_S_MIN));
        let now = Instant::now();
        let next_bookmark = now + BOOKMARK_PERIOD;
        let ends = now + Duration::from_secs(timeout_s.min(TIMEOUT_S_MAX));
        let wakes = wakes(options.bookmarks, next_bookmark, ends);
        let watcher = Watcher {
            target: call.target.clone(),
            form: (form, encoding),
            headed: false,
            initial,
            initial_end: told.then_some(from),
            bookmarked: from,
            next_bookmark,
            ends,
            wakes: Box::pin(tokio::time::sleep_until(wakes)),
            options,
            stream,
            stop: Box::pin(self.stop.clone().cancelled_owned()),
            rests: now,
            events: self.events.clone(),
            encodings: self.encodings.clone(),
            _counted: self.metrics.watching(call.target.resource),
        };
        // It is passed on with every chunk.
        let watcher = Some(Box::new(watcher));
        let chunks = futures::stream::unfold(watcher, move |watcher| async move {
            let mut watcher = watcher?;
            match watcher.next().await {
                Some(Ok(chunk)) => Some((chunk, Some(watcher))),
                Some(Err(status)) => Some((error_event(&status, encoding), None)),
                None => None,
            }
        });
        Ok(events_answer(encoding, chunks))
    }

    /// What a watch begins with, if with anything, and the revision that it goes on from.
    async fn initial(
        &self,
        call: &Call,
        initial: bool,
        options: &ListOptions,
    ) -> Result<(Vec<Record>, Revision), Status> {
        if !initial {
            let from = options.resource_version;
            self.reach(from).await?;
            return Ok((Vec::new(), from.map_or(self.store.revision(), Revision)));
        }
        let everything = ListOptions {
            labels: options.labels.clone(),
            fields: options.fields.clone(),
            resource_version: options.resource_version,
            ..ListOptions::default()
        };
        let listing = self.select(&call.target, &everything).await?;
        Ok((listing.records, listing.revision))
    }
}

fn events_answer(
    encoding: Encoding,
    stream: impl futures::Stream<Item = Bytes> + Send + 'static,
) -> Answer {
    let content_type = match encoding {
        Encoding::Protobuf => "application/vnd.kubernetes.protobuf;stream=watch",
        Encoding::Json | Encoding::Yaml => "application/json",
    };
    let mut answer = reply::text(StatusCode::OK, Bytes::new());
    answer.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(content_type),
    );
    *answer.body_mut() = reply::streamed(stream);
    answer
}

/// A running watch of one client.
struct Watcher {
    target: Target,
    form: (Form, Encoding),
    options: ListOptions,
    /// Whether a table's columns have been sent.
    headed: bool,
    initial: Initial,
    /// The revision of the bookmark that ends it, where one was asked for.
    initial_end: Option<Revision>,
    stream: Box<dyn WatchStream>,
    bookmarked: Revision,
    next_bookmark: Instant,
    ends: Instant,
    /// Fires at the next bookmark or the end. This and `stop` are waited for with every event: they stay with the watch, since to take
    /// one's place in a line and leave it again costs more than the event.
    wakes: Pin<Box<Sleep>>,
    stop: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Until when it rests.
    rests: Instant,
    events: Arc<EncodedEvents>,
    encodings: Arc<Encodings>,
    _counted: super::metrics::Watching,
}

/// When a watch has something to do without an event.
fn wakes(bookmarks: bool, next_bookmark: Instant, ends: Instant) -> Instant {
    match bookmarks {
        true => ends.min(next_bookmark),
        false => ends,
    }
}

/// What was there when a watch began, as far as it has not been sent.
enum Initial {
    /// Encoded as it is sent: a slow client holds records that others hold too, not bytes.
    Records(std::vec::IntoIter<Record>),
    /// From a chunk on.
    Kept(Arc<Beginning>, usize),
}

/// How long each of so many watches rests.
fn rest(watches: usize) -> Duration {
    let rest = REST_PER_WATCH.saturating_mul(u32::try_from(watches).unwrap_or(u32::MAX));
    match rest < REST_MIN {
        true => Duration::ZERO,
        false => rest.min(REST_MAX),
    }
}

impl Watcher {
    /// Some more of what was there when the watch began; None when all of it has been sent.
    fn next_initial(&mut self) -> Result<Option<Bytes>, Status> {
        let (target, form, added) = (&self.target, self.form, Kind::Added);
        let encodings = &self.encodings;
        if let Initial::Kept(beginning, number) = &mut self.initial {
            if let Some(chunk) = beginning.chunk(*number) {
                *number += 1;
                return Ok(Some(chunk));
            }
            self.initial = Initial::Records(Vec::new().into_iter());
        }
        let Initial::Records(initial) = &mut self.initial else {
            return Ok(None);
        };
        let records = initial.by_ref().take(INITIAL_EVENTS_PER_CHUNK);
        let records: Vec<Record> = records.collect();
        let plain = plain(form.0, target);
        // After a start of the server each informer of the cluster comes for what is there.
        let kept = (plain && form.1 == Encoding::Protobuf)
            .then(|| encodings.frames(target.resource, &records, added.name()));
        let mut chunk = Vec::new();
        match kept.flatten() {
            Some(frames) => chunk = frames,
            None => {
                for record in &records {
                    let event = match plain {
                        true => from_record(added, record, record.revision, target, form.1),
                        false => {
                            let object = target.decode(record)?;
                            shaped(added, object, form, target, &mut self.headed)
                        }
                    };
                    chunk.extend_from_slice(&event);
                }
            }
        }
        if initial.as_slice().is_empty() {
            // The watch may live on for an hour: without the room that the records had.
            *initial = Vec::new().into_iter();
            if let Some(revision) = self.initial_end.take() {
                chunk.extend_from_slice(&bookmark(target, form, revision, true));
            }
        }
        Ok(Some(chunk)
            .filter(|chunk| !chunk.is_empty())
            .map(Bytes::from))
    }

    /// The next chunk of the body; None when the watch is over.
    async fn next(&mut self) -> Option<Result<Bytes, Status>> {
        if let Some(chunk) = self.next_initial().transpose() {
            return Some(chunk);
        }
        loop {
            let batch = tokio::select! {
                () = &mut self.stop => return None,
                batch = self.stream.next() => batch,
                () = &mut self.wakes => {
                    let progress = self.stream.progress();
                    let now = Instant::now();
                    let over = now >= self.ends;
                    self.next_bookmark = now + BOOKMARK_PERIOD;
                    let wakes = wakes(self.options.bookmarks, self.next_bookmark, self.ends);
                    self.wakes.as_mut().reset(wakes);
                    if self.options.bookmarks && progress > self.bookmarked {
                        self.bookmarked = progress;
                        return Some(Ok(bookmark(&self.target, self.form, progress, false)));
                    }
                    if over {
                        return None;
                    }
                    continue;
                }
            };
            let batch = match batch {
                Ok(batch) => self.with_what_follows(batch).await,
                error => error,
            };
            let batch = match batch {
                Ok(batch) => batch,
                Err(error) => return Some(Err(error.into())),
            };
            let mut chunk: Vec<Bytes> = Vec::new();
            for event in batch {
                let encoded = self.events.share(event, self.target.resource);
                if let Some(kind) = self.seen_as(&encoded) {
                    chunk.push(self.write(kind, &encoded));
                }
            }
            if !chunk.is_empty() {
                self.rests = Instant::now() + rest(self.stream.peers());
            }
            match chunk.len() {
                0 => {}
                1 => return chunk.pop().map(Ok),
                _ => return Some(Ok(Bytes::from(chunk.concat()))),
            }
        }
    }

    /// The events, with those that happen while the watch still rests.
    async fn with_what_follows(
        &mut self,
        mut events: Vec<Arc<WatchEvent>>,
    ) -> Result<Vec<Arc<WatchEvent>>, StoreError> {
        if Instant::now() < self.rests {
            tokio::time::sleep_until(self.rests).await;
            if let Some(more) = self.stream.next().now_or_never() {
                events.extend(more?);
            }
        }
        Ok(events)
    }

    /// What the change is to this watcher; None when it does not concern it.
    fn seen_as(&self, encoded: &Encoded) -> Option<Kind> {
        match encoded.selected(&self.options) {
            (false, true) => Some(Kind::Added),
            (true, true) => Some(Kind::Modified),
            (true, false) => Some(Kind::Deleted),
            (false, false) => None,
        }
    }

    fn write(&mut self, kind: Kind, encoded: &Encoded) -> Bytes {
        let (form, encoding) = self.form;
        if plain(form, &self.target) {
            return encoded.whole(kind, encoding, &self.target);
        }
        let left = kind == Kind::Deleted && encoded.event.change == Change::Put;
        let object = if left {
            encoded.previous(&self.target)
        } else {
            encoded.current(&self.target)
        };
        shaped(
            kind,
            object.cloned().unwrap_or_default(),
            self.form,
            &self.target,
            &mut self.headed,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_watches_that_are_many_rest() {
        assert_eq!([0, 1, 50, 99].map(rest), [Duration::ZERO; 4]);
        assert_eq!(rest(100), REST_MIN);
        assert_eq!(rest(1000), Duration::from_millis(20));
        assert_eq!([2000, 5000, usize::MAX].map(rest), [REST_MAX; 3]);
    }
}
