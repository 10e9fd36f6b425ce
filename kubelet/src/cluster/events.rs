//! Events: what happened to pods and to the node, on record in the API.
//!
//! An event that repeats is counted up instead of written again, as kubectl expects. Recording never delays a pod: a
//! bounded queue feeds one writer, and what does not fit is dropped and counted in the log.

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use tokio::sync::mpsc;

use super::EventKind;

/// Events that wait to be written at most.
const QUEUE_MAX: usize = 1000;
/// Events whose repetition is recognised at most.
const KNOWN_MAX: usize = 4096;

/// A Note is an event before it has a name.
#[derive(Debug, Clone)]
pub struct Note {
    pub object: ObjectReference,
    pub kind: EventKind,
    pub reason: &'static str,
    pub message: String,
}

/// A Recorder takes notes. Clones share one queue.
#[derive(Debug, Clone)]
pub struct Recorder {
    queue: mpsc::Sender<Note>,
}

/// What makes two events the same one again: object, part of it, reason, message.
type Identity = (Option<String>, Option<String>, &'static str, String);

struct Known {
    name: String,
    count: i32,
}

impl Recorder {
    /// Starts the writer.
    pub fn start(client: Client, node_name: &str) -> Self {
        let (queue, mut notes) = mpsc::channel::<Note>(QUEUE_MAX);
        let node_name = node_name.to_owned();
        tokio::spawn(async move {
            let mut known: HashMap<Identity, Known> = HashMap::new();
            while let Some(note) = notes.recv().await {
                if known.len() >= KNOWN_MAX {
                    known.clear();
                }
                let key = (
                    note.object.uid.clone(),
                    note.object.field_path.clone(),
                    note.reason,
                    note.message.clone(),
                );
                match known.get_mut(&key) {
                    Some(before) => {
                        before.count += 1;
                        if !repeat(&client, &note, before).await {
                            known.remove(&key);
                        }
                    }
                    None => {
                        if let Some(name) = create(&client, &note, &node_name).await {
                            known.insert(key, Known { name, count: 1 });
                        }
                    }
                }
            }
        });
        Self { queue }
    }

    pub fn record(&self, note: Note) {
        if let Err(error) = self.queue.try_send(note) {
            tracing::warn!(%error, "an event is lost");
        }
    }
}

fn namespace(note: &Note) -> &str {
    note.object
        .namespace
        .as_deref()
        .filter(|ns| !ns.is_empty())
        .unwrap_or("default")
}

async fn create(client: &Client, note: &Note, node_name: &str) -> Option<String> {
    let now = Timestamp::now();
    let name = format!(
        "{}.{:x}",
        note.object.name.as_deref().unwrap_or("unknown"),
        now.as_nanosecond()
    );
    let event = Event {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(namespace(note).to_owned()),
            ..Default::default()
        },
        involved_object: note.object.clone(),
        type_: Some(match note.kind {
            EventKind::Normal => "Normal".to_owned(),
            EventKind::Warning => "Warning".to_owned(),
        }),
        reason: Some(note.reason.to_owned()),
        message: Some(note.message.clone()),
        source: Some(EventSource {
            component: Some("kubelet".to_owned()),
            host: Some(node_name.to_owned()),
        }),
        reporting_component: Some("kubelet".to_owned()),
        reporting_instance: Some(node_name.to_owned()),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        count: Some(1),
        ..Default::default()
    };
    let api: Api<Event> = Api::namespaced(client.clone(), namespace(note));
    match api.create(&PostParams::default(), &event).await {
        Ok(_) => Some(name),
        Err(error) => {
            tracing::debug!(%error, reason = note.reason, "cannot record an event");
            None
        }
    }
}

async fn repeat(client: &Client, note: &Note, known: &Known) -> bool {
    let api: Api<Event> = Api::namespaced(client.clone(), namespace(note));
    let patch = serde_json::json!({"count": known.count, "lastTimestamp": Time(Timestamp::now())});
    let answer = api
        .patch(&known.name, &PatchParams::default(), &Patch::Merge(patch))
        .await;
    answer
        .inspect_err(|error| tracing::debug!(%error, reason = note.reason, "cannot count an event"))
        .is_ok()
}
