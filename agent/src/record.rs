//! Events of the API about Services that cannot have what they want, so that `kubectl describe` says it.
//!
//! Every agent sees the same contradictions. Of those that concern the whole cluster one node writes the event, chosen by the
//! Service's name; of those that concern a node, such as a port that is taken there, that node does.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster_model::ServiceKey;
use cluster_model::api::api::core::v1::Service;
use cluster_model::watch::ApiOptions;
use cluster_model::watch::kube::api::Api;
use cluster_model::watch::kube::runtime::events::{Event, EventType, Recorder, Reporter};
use cluster_model::watch::kube::{Client, Resource};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::source;

/// Happenings that may wait to be written; beyond them they are counted as refusals alone.
const QUEUE: usize = 256;
/// The same thing is not written again within this.
const REPEAT_AFTER: Duration = Duration::from_secs(600);
/// Events that may be written at once, and the pause after which one more may.
const BURST: u32 = 25;
const REFILL: Duration = Duration::from_secs(10);
/// Things remembered as written.
const REMEMBERED_MAX: usize = 4096;

/// Something that the owner of a Service should know.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Happening {
    pub service: ServiceKey,
    /// In one word, as `kubectl get events` shows it.
    pub reason: &'static str,
    pub note: String,
}

/// Where happenings are handed in; never waits, and loses what cannot be written in time.
#[derive(Clone, Debug)]
pub struct Notes(mpsc::Sender<Happening>);

/// A pair of ends.
pub fn notes() -> (Notes, mpsc::Receiver<Happening>) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (Notes(sender), receiver)
}

impl Notes {
    pub fn tell(&self, happening: Happening) {
        if let Err(error) = self.0.try_send(happening) {
            tracing::debug!(%error, "an event is lost");
        }
    }
}

/// The node that tells of what all nodes see.
pub fn chosen<'a>(
    service: &ServiceKey,
    nodes: impl Iterator<Item = &'a Arc<str>>,
) -> Option<&'a Arc<str>> {
    nodes.max_by_key(|node| {
        let digest = Sha256::digest(format!("{service} {node}"));
        (digest.first_chunk::<8>().copied(), *node)
    })
}

/// Writes what is handed in, for as long as somebody may hand something in.
pub async fn write(options: ApiOptions, node: String, mut happenings: mpsc::Receiver<Happening>) {
    let client = source::client(&options, "events").await;
    let reporter = Reporter {
        controller: "keelway-agent".into(),
        instance: Some(node),
    };
    let recorder = Recorder::new(client.clone(), reporter);
    let mut limiter = Limiter::new(Instant::now());
    while let Some(happening) = happenings.recv().await {
        if limiter.allows(&happening, Instant::now()) {
            publish(&client, &recorder, &happening).await;
        }
    }
}

async fn publish(client: &Client, recorder: &Recorder, happening: &Happening) {
    let services: Api<Service> = Api::namespaced(client.clone(), &happening.service.namespace);
    // Its UID is what kubectl looks events up by.
    let service = match services.get_opt(&happening.service.name).await {
        Ok(Some(service)) => service,
        Ok(None) => return,
        Err(error) => {
            tracing::debug!(service = %happening.service, %error, "events: the Service cannot be read");
            return;
        }
    };
    let event = Event {
        type_: EventType::Warning,
        reason: happening.reason.into(),
        note: Some(happening.note.clone()),
        action: "ProgramService".into(),
        secondary: None,
    };
    if let Err(error) = recorder.publish(&event, &service.object_ref(&())).await {
        tracing::debug!(service = %happening.service, %error, "an event cannot be written");
    }
}

/// What may be written. Pure: time is given.
struct Limiter {
    written: HashMap<Happening, Instant>,
    tokens: u32,
    refilled: Instant,
}

impl Limiter {
    fn new(now: Instant) -> Self {
        Self {
            written: HashMap::new(),
            tokens: BURST,
            refilled: now,
        }
    }

    fn allows(&mut self, happening: &Happening, now: Instant) -> bool {
        let recent = |when: &Instant| now.saturating_duration_since(*when) < REPEAT_AFTER;
        if self.written.get(happening).is_some_and(recent) {
            return false;
        }
        let earned = now.saturating_duration_since(self.refilled).as_secs() / REFILL.as_secs();
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(BURST);
            self.tokens = self.tokens.saturating_add(earned).min(BURST);
            self.refilled = now;
        }
        if self.tokens == 0 {
            return false;
        }
        self.tokens -= 1;
        if self.written.len() >= REMEMBERED_MAX {
            self.written.retain(|_, when| recent(when));
        }
        if self.written.len() < REMEMBERED_MAX {
            self.written.insert(happening.clone(), now);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn happening(note: &str) -> Happening {
        Happening {
            service: ServiceKey::new("default", "web"),
            reason: "FrontendTaken",
            note: note.into(),
        }
    }

    #[test]
    fn the_same_is_not_written_again_soon() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        assert!(limiter.allows(&happening("a"), start));
        assert!(!limiter.allows(&happening("a"), start + Duration::from_secs(599)));
        assert!(limiter.allows(&happening("b"), start));
        assert!(limiter.allows(&happening("a"), start + REPEAT_AFTER));
    }

    #[test]
    fn many_are_written_slowly() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        let mut allowed = |count: usize, from: usize, now: Instant| {
            (from..from + count)
                .filter(|index| limiter.allows(&happening(&index.to_string()), now))
                .count()
        };
        assert_eq!(allowed(100, 0, start), BURST as usize);
        assert_eq!(allowed(100, 100, start + REFILL * 3), 3);
        assert_eq!(allowed(100, 200, start + REFILL * 1000), BURST as usize);
    }
}
