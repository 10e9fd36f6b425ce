//! Watch: initial state, then every change, as selectors and the asked form have it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use rand::RngExt;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::reply::Answer;
use super::request::{Form, ListOptions, Target};
use super::status::Status;
use super::{Api, Call, object, reply, table};
use crate::store::{Change, Record, Revision, WatchEvent, WatchStream};

/// A watch without timeoutSeconds ends after this to twice this, as upstream's min-request-timeout.
const TIMEOUT_S_MIN: u64 = 1800;
/// Clients that can take them get a bookmark this often.
const BOOKMARK_PERIOD: Duration = Duration::from_secs(60);
/// How many initial events go in one chunk of the body.
const INITIAL_EVENTS_PER_CHUNK: usize = 200;
/// How many recent events are kept encoded for the other watchers of the same change.
const ENCODED_EVENTS: usize = 256;
/// What marks the bookmark that ends the initial events (KEP-3157).
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// What happened to an object from a watcher's view: it may enter and leave a selector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Added,
    Modified,
    Deleted,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

/// One change with what watchers have worked out about it: each part once for all of them.
pub(super) struct Encoded {
    event: WatchEvent,
    current: OnceLock<Option<Value>>,
    previous: OnceLock<Option<Value>>,
    /// The whole event as a line, by kind.
    lines: [OnceLock<Bytes>; 3],
}

/// The recent changes, encoded. A revision is one write, so its number finds it.
pub(super) struct EncodedEvents {
    slots: Vec<Mutex<Option<Arc<Encoded>>>>,
}

impl Default for EncodedEvents {
    fn default() -> Self {
        Self {
            slots: (0..ENCODED_EVENTS).map(|_| Mutex::new(None)).collect(),
        }
    }
}

impl EncodedEvents {
    fn share(&self, event: WatchEvent) -> Arc<Encoded> {
        let revision = event.record.revision;
        let slot = &self.slots[usize::try_from(revision.0 % ENCODED_EVENTS as u64).unwrap_or(0)];
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = slot
            .as_ref()
            .filter(|known| known.event.record.revision == revision)
        {
            return known.clone();
        }
        let encoded = Arc::new(Encoded {
            event,
            current: OnceLock::new(),
            previous: OnceLock::new(),
            lines: Default::default(),
        });
        // A watcher that lags must not push out what the others are about to read.
        if slot
            .as_ref()
            .is_none_or(|known| known.event.record.revision < revision)
        {
            *slot = Some(encoded.clone());
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

    fn line(&self, kind: Kind, target: &Target) -> Bytes {
        let encode = || {
            let left = kind == Kind::Deleted && self.event.change == Change::Put;
            let record = if left {
                self.event.previous.as_ref()
            } else {
                None
            };
            line(
                kind,
                record.unwrap_or(&self.event.record),
                self.revision(),
                target,
            )
        };
        self.lines[kind as usize].get_or_init(encode).clone()
    }
}

/// An event as one line of JSON, from a record.
fn line(kind: Kind, record: &Record, revision: Revision, target: &Target) -> Bytes {
    let mut out = Vec::with_capacity(record.value.len() + 160);
    out.extend_from_slice(br#"{"type":""#);
    out.extend_from_slice(kind.name().as_bytes());
    out.extend_from_slice(br#"","object":"#);
    object::write(
        &mut out,
        record,
        revision,
        target.resource.kind,
        &target.resource.api_version(),
    );
    out.extend_from_slice(b"}\n");
    Bytes::from(out)
}

fn event_line(kind: &str, object: &Value) -> Bytes {
    let mut line = json!({"type": kind, "object": object}).to_string();
    line.push('\n');
    Bytes::from(line)
}

impl Api {
    pub(super) async fn watch(
        &self,
        call: &Call,
        form: Form,
        options: ListOptions,
    ) -> Result<Answer, Status> {
        let prefix = call.target.prefix();
        // Without a revision to start from, a watch begins with the present state, as one asked for with sendInitialEvents.
        let initial = match options.initial_events {
            Some(initial) => initial,
            None => options.resource_version.unwrap_or(0) == 0,
        };
        let mut pending = VecDeque::new();
        let mut headed = false;
        let from = if initial {
            let everything = ListOptions {
                labels: options.labels.clone(),
                fields: options.fields.clone(),
                resource_version: options.resource_version,
                ..ListOptions::default()
            };
            let listing = self.select(&call.target, &everything).await?;
            for records in listing.records.chunks(INITIAL_EVENTS_PER_CHUNK) {
                let mut chunk = Vec::new();
                for record in records {
                    let line = match plain(form, &call.target) {
                        true => line(Kind::Added, record, record.revision, &call.target),
                        false => shaped(
                            Kind::Added,
                            call.target.decode(record)?,
                            form,
                            &call.target,
                            &mut headed,
                        ),
                    };
                    chunk.extend_from_slice(&line);
                }
                pending.push_back(Bytes::from(chunk));
            }
            if options.initial_events == Some(true) && options.bookmarks {
                pending.push_back(bookmark(&call.target, form, listing.revision, true));
            }
            listing.revision
        } else {
            options
                .resource_version
                .map_or(self.store.revision(), Revision)
        };
        let stream = match self.store.watch(&prefix, from).await {
            Ok(stream) => stream,
            Err(error @ crate::store::StoreError::Future { .. }) => return Err(error.into()),
            // Upstream tells of an expired revision inside the stream, and clients look for it there.
            Err(error) => {
                return Ok(events_answer(futures::stream::iter([error_line(
                    &error.into(),
                )])));
            }
        };
        let timeout_s = options
            .timeout_s
            .unwrap_or_else(|| rand::rng().random_range(TIMEOUT_S_MIN..2 * TIMEOUT_S_MIN));
        let watcher = Watcher {
            target: call.target.clone(),
            form,
            headed,
            bookmarked: from,
            next_bookmark: Instant::now() + BOOKMARK_PERIOD,
            ends: Instant::now() + Duration::from_secs(timeout_s),
            options,
            pending,
            stream,
            stop: self.stop.clone(),
            _counted: self.metrics.watching(call.target.resource),
        };
        let events = self.events.clone();
        Ok(events_answer(futures::stream::unfold(
            Some(watcher),
            move |watcher| {
                let events = events.clone();
                async move {
                    let mut watcher = watcher?;
                    match watcher.next(&events).await {
                        Some(Ok(chunk)) => Some((chunk, Some(watcher))),
                        Some(Err(status)) => Some((error_line(&status), None)),
                        None => None,
                    }
                }
            },
        )))
    }
}

fn events_answer(stream: impl futures::Stream<Item = Bytes> + Send + 'static) -> Answer {
    let mut answer = reply::bytes(StatusCode::OK, "application/json", Bytes::new());
    *answer.body_mut() = reply::streamed(stream);
    answer
}

fn error_line(status: &Status) -> Bytes {
    event_line("ERROR", &status.to_value())
}

/// Whether objects go out as their stored bytes.
fn plain(form: Form, target: &Target) -> bool {
    form == Form::Object && !object::converts(target.resource)
}

/// An event of a decoded object, in the form asked for.
fn shaped(kind: Kind, object: Value, form: Form, target: &Target, headed: &mut bool) -> Bytes {
    let object = object::from_stored(object, target.resource);
    let shaped = match form {
        Form::Object => object,
        Form::Partial(version) => table::partial(&object, version),
        Form::Table(version, include) => {
            let printer = table::printer(target.resource.group, target.resource.kind);
            let first = !std::mem::replace(headed, true);
            let mut table = table::table(printer, version, [&object], include, first);
            table["metadata"]["resourceVersion"] = object["metadata"]["resourceVersion"].clone();
            table
        }
    };
    event_line(kind.name(), &shaped)
}

/// An event that only says how far the watch has come.
fn bookmark(target: &Target, form: Form, revision: Revision, ends_initial: bool) -> Bytes {
    let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
    if ends_initial {
        metadata["annotations"] = json!({ INITIAL_EVENTS_END: "true" });
    }
    let object = match form {
        Form::Object => {
            let resource = target.resource;
            json!({"kind": resource.kind, "apiVersion": resource.api_version(), "metadata": metadata})
        }
        Form::Partial(version) => {
            let api_version = format!("meta.k8s.io/{version}");
            json!({"kind": "PartialObjectMetadata", "apiVersion": api_version, "metadata": metadata})
        }
        Form::Table(version, _) => {
            let row = json!({"cells": [], "object": {"kind": "PartialObjectMetadata",
                "apiVersion": format!("meta.k8s.io/{version}"), "metadata": metadata}});
            json!({"kind": "Table", "apiVersion": format!("meta.k8s.io/{version}"), "columnDefinitions": [],
                "metadata": {"resourceVersion": revision.to_string()}, "rows": [row]})
        }
    };
    event_line("BOOKMARK", &object)
}

/// A running watch of one client.
struct Watcher {
    target: Target,
    form: Form,
    options: ListOptions,
    /// Whether a table's columns have been sent.
    headed: bool,
    pending: VecDeque<Bytes>,
    stream: Box<dyn WatchStream>,
    bookmarked: Revision,
    next_bookmark: Instant,
    ends: Instant,
    stop: CancellationToken,
    _counted: super::metrics::Watching,
}

impl Watcher {
    /// The next chunk of the body; None when the watch is over.
    async fn next(&mut self, events: &EncodedEvents) -> Option<Result<Bytes, Status>> {
        loop {
            if let Some(chunk) = self.pending.pop_front() {
                return Some(Ok(chunk));
            }
            let wake = if self.options.bookmarks {
                self.ends.min(self.next_bookmark)
            } else {
                self.ends
            };
            let batch = tokio::select! {
                () = self.stop.cancelled() => return None,
                batch = self.stream.next() => batch,
                () = tokio::time::sleep_until(wake) => {
                    let progress = self.stream.progress();
                    let over = Instant::now() >= self.ends;
                    self.next_bookmark = Instant::now() + BOOKMARK_PERIOD;
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
                Ok(batch) => batch,
                Err(error) => return Some(Err(error.into())),
            };
            let mut chunk: Vec<Bytes> = Vec::new();
            for event in batch {
                let encoded = events.share(event);
                if let Some(kind) = self.seen_as(&encoded) {
                    chunk.push(self.write(kind, &encoded));
                }
            }
            match chunk.len() {
                0 => {}
                1 => return chunk.pop().map(Ok),
                _ => return Some(Ok(Bytes::from(chunk.concat()))),
            }
        }
    }

    /// What the change is to this watcher; None when it does not concern it.
    fn seen_as(&self, encoded: &Encoded) -> Option<Kind> {
        let deleted = encoded.event.change == Change::Delete;
        let existed = deleted || encoded.event.previous.is_some();
        let (was, is) = if self.options.selects_all() {
            (existed, !deleted)
        } else {
            let selects =
                |object: Option<&Value>| object.is_some_and(|object| self.options.selects(object));
            if deleted {
                (selects(encoded.current(&self.target)), false)
            } else {
                let was =
                    encoded.event.previous.is_some() && selects(encoded.previous(&self.target));
                (was, selects(encoded.current(&self.target)))
            }
        };
        match (was, is) {
            (false, true) => Some(Kind::Added),
            (true, true) => Some(Kind::Modified),
            (true, false) => Some(Kind::Deleted),
            (false, false) => None,
        }
    }

    fn write(&mut self, kind: Kind, encoded: &Encoded) -> Bytes {
        if plain(self.form, &self.target) {
            return encoded.line(kind, &self.target);
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
