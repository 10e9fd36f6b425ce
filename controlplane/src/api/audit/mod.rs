//! The audit log: who did what, when, and what the answer was, as far as a policy wants to know.
//!
//! Policy and events are in the form of Kubernetes (audit.k8s.io/v1). Bodies are not recorded: where a policy asks for them
//! (`Request`, `RequestResponse`) an event has the rest, at level `Metadata`. Nothing is lost: when the log cannot keep up,
//! requests wait for it.

mod policy;
mod writer;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::StatusCode;
use http::request::Parts;
use serde_json::{Map, Value, json};

use super::request::{self, Query, Target};
use crate::auth::{ANONYMOUS, Identity, UNAUTHENTICATED};

pub use policy::{Policy, PolicyError};
pub use writer::Writer;

/// What is known of a request beside itself, noted as it becomes known.
#[derive(Debug, Default)]
pub struct Trail {
    callers: Mutex<Callers>,
    notes: Notes,
}

/// What admission finds out for the log alone, by annotation; shared with those who find it.
#[derive(Debug, Clone, Default)]
pub struct Notes(Arc<Mutex<BTreeMap<&'static str, String>>>);

impl Notes {
    /// A write that is tried again notes the same again.
    pub fn note(&self, annotation: &'static str, text: String) {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        notes.insert(annotation, text);
    }

    fn take(&self) -> BTreeMap<&'static str, String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[derive(Debug, Default)]
struct Callers {
    caller: Option<Arc<Identity>>,
    acting_as: Option<Arc<Identity>>,
}

impl Trail {
    pub fn caller(&self, caller: &Arc<Identity>) {
        self.known().caller = Some(caller.clone());
    }

    pub fn acting_as(&self, identity: &Arc<Identity>) {
        self.known().acting_as = Some(identity.clone());
    }

    pub fn notes(&self) -> Notes {
        self.notes.clone()
    }

    fn known(&self) -> MutexGuard<'_, Callers> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Audit records requests.
pub struct Audit {
    policy: Policy,
    writer: Writer,
}

/// What of a request its event tells, taken before the request is used up.
pub struct Asked {
    id: String,
    verb: String,
    uri: String,
    target: Option<Target>,
    agent: String,
    received: jiff::Timestamp,
}

impl Asked {
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Of a request for the resource at `path`.
    pub fn of(parts: &Parts, path: &str, query: &Query) -> Self {
        let target = Target::parse(path);
        let verb = match &target {
            Some(target) => request::verb(&parts.method, target, query).to_owned(),
            None => parts.method.as_str().to_ascii_lowercase(),
        };
        let header = |name: &str| {
            parts
                .headers
                .get(name)
                .and_then(|value| value.to_str().ok())
        };
        // Clients may name their requests, so that they are found in both logs; not at any length.
        let id = header("audit-id").filter(|id| (1..=64).contains(&id.len()));
        Self {
            id: id.map_or_else(|| uuid::Uuid::new_v4().to_string(), str::to_owned),
            verb,
            uri: parts
                .uri
                .path_and_query()
                .map_or_else(String::new, ToString::to_string),
            target,
            agent: header("user-agent").unwrap_or_default().to_owned(),
            received: jiff::Timestamp::now(),
        }
    }
}

impl Audit {
    pub fn new(policy: Policy, writer: Writer) -> Self {
        Self { policy, writer }
    }

    /// Records a request with its answer; waits when the log is behind.
    pub async fn record(
        &self,
        asked: Asked,
        trail: Trail,
        peer: Option<SocketAddr>,
        code: StatusCode,
    ) {
        let notes = trail.notes.take();
        let callers = trail
            .callers
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let anonymous = Identity {
            user: ANONYMOUS.to_owned(),
            groups: vec![UNAUTHENTICATED.to_owned()],
            ..Identity::default()
        };
        let caller = callers.caller.unwrap_or_else(|| Arc::new(anonymous));
        // Rules are about the identity that the request was done as.
        let acting = callers.acting_as.as_ref().unwrap_or(&caller);
        let path = asked.uri.split('?').next().unwrap_or_default();
        let stays = asked.verb == "watch"
            || asked.target.as_ref().is_some_and(|target| {
                let part = target.subresource.as_deref().unwrap_or_default();
                matches!(part, "exec" | "attach" | "portforward" | "proxy")
            });
        let stage = if stays {
            "ResponseStarted"
        } else {
            "ResponseComplete"
        };
        let subject = policy::Subject {
            caller: acting,
            verb: &asked.verb,
            target: asked.target.as_ref(),
            path,
            stage,
        };
        if !self.policy.wants(&subject) {
            return;
        }
        let mut event = json!({
            "kind": "Event", "apiVersion": "audit.k8s.io/v1", "level": "Metadata",
            "auditID": asked.id, "stage": stage, "requestURI": asked.uri, "verb": asked.verb,
            "user": caller.user_info(),
        });
        if let Some(acting) = &callers.acting_as {
            event["impersonatedUser"] = acting.user_info();
        }
        if let Some(peer) = peer {
            event["sourceIPs"] = json!([peer.ip().to_canonical().to_string()]);
        }
        event["userAgent"] = asked.agent.into();
        if let Some(target) = &asked.target {
            event["objectRef"] = object_ref(target);
        }
        event["responseStatus"] = json!({"metadata": {}, "code": code.as_u16()});
        event["requestReceivedTimestamp"] = micros(asked.received).into();
        event["stageTimestamp"] = micros(jiff::Timestamp::now()).into();
        let decision = match code {
            StatusCode::UNAUTHORIZED => None,
            StatusCode::FORBIDDEN => Some("forbid"),
            _ => Some("allow"),
        };
        let decision =
            decision.map(|decision| ("authorization.k8s.io/decision", decision.to_owned()));
        let annotations: Map<String, Value> = decision
            .into_iter()
            .chain(notes)
            .map(|(annotation, text)| (annotation.to_owned(), text.into()))
            .collect();
        if !annotations.is_empty() {
            event["annotations"] = annotations.into();
        }
        self.writer.write(event.to_string()).await;
    }
}

fn micros(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}

fn object_ref(target: &Target) -> Value {
    let resource = target.resource;
    let mut object = json!({"resource": resource.plural, "apiVersion": resource.version});
    let parts = [
        ("namespace", target.namespace.as_deref()),
        ("name", target.name.as_deref()),
        ("subresource", target.subresource.as_deref()),
        ("apiGroup", Some(resource.group)),
    ];
    for (field, value) in parts {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            object[field] = value.into();
        }
    }
    object
}
