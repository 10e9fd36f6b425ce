//! Events that the API server records itself.

use serde_json::{Value, json};

use super::fields::{self, Fields};
use super::{Api, bootstrap};

/// Warnings that are told at a time: a state that was written before IPAddresses were kept lacks all of them.
const TOLD_MAX: usize = 100;

/// What is to be told of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// A reference to the object.
    pub about: Value,
    /// Which of the object's faults it is, where it may have several for one reason.
    pub what: String,
    pub reason: String,
    pub message: String,
    pub reporter: &'static str,
}

impl Api {
    /// Puts warnings on record. What is told already, and not forgotten yet, is not told again.
    pub(super) async fn warn(&self, notices: &[Notice]) {
        for notice in notices.iter().take(TOLD_MAX) {
            let event = event(notice);
            let namespace = fields::namespace(&event);
            let path = format!("/api/v1/namespaces/{namespace}/events");
            match bootstrap::ensure(self, &path, event).await {
                Ok(true) => {
                    let Notice {
                        reason, message, ..
                    } = notice;
                    tracing::warn!(reason, message, "recorded");
                }
                Ok(false) => {}
                Err(status) => {
                    tracing::debug!(reason = status.message, "an event could not be written");
                }
            }
        }
    }
}

fn event(notice: &Notice) -> Value {
    let Notice {
        about,
        what,
        reason,
        message,
        reporter,
    } = notice;
    let namespace = match about.text("/namespace") {
        "" => "default",
        namespace => namespace,
    };
    // The same fault has the same name, so that it is told once.
    let parts = [about.text("/name"), what, &reason.to_lowercase()];
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    let name = parts.join(".").replace(':', "-");
    let now = fields::now();
    json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": name, "namespace": namespace},
        "involvedObject": about, "type": "Warning", "reason": reason, "message": message,
        "source": {"component": reporter}, "reportingComponent": reporter,
        "firstTimestamp": now, "lastTimestamp": now, "count": 1})
}
