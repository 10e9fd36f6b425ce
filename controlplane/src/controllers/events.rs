//! Events: what was done, said once per object and counted after that.

use std::collections::{BTreeSet, HashMap, VecDeque};

use http::Method;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tokio::sync::mpsc;

use super::object::ResourceType;
use super::watch::Api;

/// Events that wait to be written; more than that are lost rather than waited for.
const QUEUE_MAX: usize = 4096;
/// Series of events that are remembered.
const SERIES_MAX: usize = 4096;
/// Different messages of one reason about one object within `SIMILAR_WITHIN`, before they are told as one.
const SIMILAR_MAX: usize = 10;
const SIMILAR_WITHIN: SignedDuration = SignedDuration::from_mins(10);
/// A repeated event is written at most this often; what happens in between is counted.
const REPEAT_EVERY: SignedDuration = SignedDuration::from_secs(1);

/// Something that happened to an object.
#[derive(Clone, Debug)]
pub struct Happening {
    pub about: ObjectReference,
    pub reporter: &'static str,
    pub type_: &'static str,
    pub reason: &'static str,
    pub message: String,
}

/// Where happenings are handed in; never waits.
#[derive(Clone)]
pub struct Recorder(mpsc::Sender<Happening>);

impl Recorder {
    /// A recorder and the task that writes what it is given; the task ends with the last recorder.
    pub fn new(api: Api) -> (Self, impl Future<Output = ()>) {
        let (sender, mut receiver) = mpsc::channel::<Happening>(QUEUE_MAX);
        let write = async move {
            let mut series = Series::default();
            while let Some(happening) = receiver.recv().await {
                let Some(written) = series.next(happening, Timestamp::now(), rand::random()) else {
                    continue;
                };
                write(&api, written).await;
            }
        };
        (Self(sender), write)
    }

    pub fn record(&self, happening: Happening) {
        if self.0.try_send(happening).is_err() {
            tracing::debug!("an event is lost: too many are waiting");
        }
    }
}

async fn write(api: &Api, written: Written) {
    let events = ResourceType {
        group: String::new(),
        version: "v1".into(),
        kind: "Event".into(),
        plural: "events".into(),
        namespaced: true,
    };
    let namespace = written.event.metadata.namespace.clone().unwrap_or_default();
    let collection = events.path(&namespace);
    if written.repeats {
        let path = format!(
            "{collection}/{}",
            written.event.metadata.name.as_deref().unwrap_or_default()
        );
        let body = json!({
            "count": written.event.count,
            "lastTimestamp": written.event.last_timestamp,
            "message": written.event.message,
        });
        match api.call(Method::PATCH, &path, Some(&body)).await {
            // Events expire: then the series starts anew under its name.
            Err(error) if error.code() == Some(404) => {}
            _ => return,
        }
    }
    let body = serde_json::to_value(&written.event).unwrap_or_default();
    if let Err(error) = api.call(Method::POST, &collection, Some(&body)).await {
        tracing::debug!(%error, "an event could not be written");
    }
}

/// An event to be created, or, when it repeats one, to be counted up.
#[derive(Debug)]
struct Written {
    event: Event,
    repeats: bool,
}

/// The series of events so far. Pure: time and randomness are given.
#[derive(Default)]
struct Series {
    known: HashMap<(String, String), Known>,
    order: VecDeque<(String, String)>,
    similar: HashMap<String, (BTreeSet<String>, Timestamp)>,
}

struct Known {
    name: String,
    count: i32,
    first: Timestamp,
    written: Timestamp,
}

impl Series {
    fn next(&mut self, happening: Happening, now: Timestamp, random: u64) -> Option<Written> {
        let about = &happening.about;
        let subject = format!(
            "{}/{}/{}/{}/{}",
            about.uid.as_deref().unwrap_or_default(),
            about.name.as_deref().unwrap_or_default(),
            happening.reporter,
            happening.type_,
            happening.reason
        );
        let combined = self.is_one_of_many(&subject, &happening.message, now);
        let message = if combined {
            format!("(combined from similar events): {}", happening.message)
        } else {
            happening.message.clone()
        };
        let key = (
            subject,
            if combined {
                String::new()
            } else {
                message.clone()
            },
        );
        let repeats = self.known.contains_key(&key);
        if !repeats {
            if self.order.len() >= SERIES_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.known.remove(&oldest);
                self.similar.remove(&oldest.0);
            }
            self.order.push_back(key.clone());
        }
        let known = self.known.entry(key).or_insert_with(|| Known {
            name: format!(
                "{}.{random:016x}",
                about.name.as_deref().unwrap_or_default()
            ),
            count: 0,
            first: now,
            written: Timestamp::MIN,
        });
        known.count += 1;
        if repeats && now.duration_since(known.written) < REPEAT_EVERY {
            return None;
        }
        known.written = now;
        let event = Event {
            metadata: ObjectMeta {
                name: Some(known.name.clone()),
                // Events about cluster-scoped objects are kept in `default`.
                namespace: Some(about.namespace.clone().unwrap_or_else(|| "default".into())),
                ..Default::default()
            },
            involved_object: happening.about,
            type_: Some(happening.type_.into()),
            reason: Some(happening.reason.into()),
            message: Some(message),
            count: Some(known.count),
            first_timestamp: Some(Time(known.first)),
            last_timestamp: Some(Time(now)),
            source: Some(EventSource {
                component: Some(happening.reporter.into()),
                host: None,
            }),
            reporting_component: Some(happening.reporter.into()),
            reporting_instance: Some(String::new()),
            ..Default::default()
        };
        Some(Written { event, repeats })
    }

    fn is_one_of_many(&mut self, subject: &str, message: &str, now: Timestamp) -> bool {
        let (messages, since) = self
            .similar
            .entry(subject.into())
            .or_insert_with(|| (BTreeSet::new(), now));
        if now.duration_since(*since) > SIMILAR_WITHIN {
            messages.clear();
            *since = now;
        }
        if messages.contains(message) {
            return false;
        }
        if messages.len() >= SIMILAR_MAX {
            return true;
        }
        messages.insert(message.into());
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn happening(message: &str) -> Happening {
        Happening {
            about: ObjectReference {
                kind: Some("Pod".into()),
                namespace: Some("default".into()),
                name: Some("web".into()),
                uid: Some("u".into()),
                ..Default::default()
            },
            reporter: "test",
            type_: "Normal",
            reason: "Created",
            message: message.into(),
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).unwrap()
    }

    #[test]
    fn a_repeated_event_is_counted_not_created_again() {
        let mut series = Series::default();
        let first = series.next(happening("x"), at(0), 1).unwrap();
        assert!(!first.repeats);
        assert!(
            series.next(happening("x"), at(0), 2).is_none(),
            "too soon to be written"
        );
        let third = series.next(happening("x"), at(5), 3).unwrap();
        assert!(third.repeats);
        assert_eq!(third.event.count, Some(3));
        assert_eq!(third.event.metadata.name, first.event.metadata.name);
        assert_eq!(third.event.first_timestamp, first.event.first_timestamp);
    }

    #[test]
    fn many_similar_events_become_one() {
        let mut series = Series::default();
        let names: BTreeSet<_> = (0..100)
            .filter_map(|index| {
                series.next(happening(&format!("pod {index}")), at(index), index as u64)
            })
            .map(|written| written.event.metadata.name)
            .collect();
        assert_eq!(names.len(), SIMILAR_MAX + 1);
        let last = series.next(happening("pod 100"), at(200), 7).unwrap();
        assert_eq!(
            last.event.message.as_deref(),
            Some("(combined from similar events): pod 100")
        );
    }

    #[test]
    fn events_of_cluster_scoped_objects_live_in_default() {
        let mut node = happening("x");
        node.about.namespace = None;
        let written = Series::default().next(node, at(0), 1).unwrap();
        assert_eq!(written.event.metadata.namespace.as_deref(), Some("default"));
    }
}
