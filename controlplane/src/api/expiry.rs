//! Events are told for an hour and then forgotten, as upstream.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tokio::time::MissedTickBehavior;

use super::fields::Fields;
use super::status::Status;
use super::{Api, object};
use crate::registry;
use crate::store::{Expect, Range, StoreError};

/// How long an event is kept after it was last seen.
const EVENT_TTL: SignedDuration = SignedDuration::from_secs(3600);
/// How often old events are looked for.
const SWEEP_PERIOD: Duration = Duration::from_secs(300);
/// How many events are looked at before others get a turn.
const PAGE: usize = 500;

/// Forgets old events until the server stops.
pub async fn run(api: Arc<Api>) {
    let mut ticks = tokio::time::interval(SWEEP_PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = api.stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        match sweep(&api, Timestamp::now() - EVENT_TTL).await {
            Ok(0) => {}
            Ok(count) => tracing::debug!(count, "old events forgotten"),
            Err(status) => {
                tracing::warn!(message = %status.message, "old events cannot be forgotten")
            }
        }
    }
}

/// Deletes all events that were last seen before a moment, and returns how many.
async fn sweep(api: &Api, before: Timestamp) -> Result<usize, Status> {
    let Some(resource) = registry::resource("", "v1", "events") else {
        return Ok(0);
    };
    let prefix = object::prefix(resource, None);
    let mut after: Option<String> = None;
    let mut count = 0;
    loop {
        let range = Range {
            prefix: &prefix,
            after: after.as_deref(),
            limit: Some(PAGE),
            at: None,
        };
        let page = api.store.list(range).await?;
        for record in &page.records {
            let event = object::decode(record, resource.kind, "v1")?;
            if last_seen(&event).is_some_and(|seen| seen < before) {
                match api
                    .store
                    .delete(&record.key, Expect::Revision(record.revision))
                    .await
                {
                    Ok(_) => count += 1,
                    // Seen again, or deleted, meanwhile.
                    Err(StoreError::Conflict { .. } | StoreError::NotFound { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        after = page.records.last().map(|record| record.key.to_string());
        if !page.more() {
            return Ok(count);
        }
    }
}

/// The latest moment that an event speaks of.
fn last_seen(event: &Value) -> Option<Timestamp> {
    [
        "/metadata/creationTimestamp",
        "/lastTimestamp",
        "/series/lastObservedTime",
    ]
    .into_iter()
    .filter_map(|pointer| event.text(pointer).parse().ok())
    .max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_event_that_goes_on_is_as_young_as_its_last_sighting() {
        let event = json!({"metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}, "lastTimestamp": "2026-01-01T05:00:00Z",
            "series": {"lastObservedTime": "2026-01-01T06:00:00.000001Z"}});
        let seen = last_seen(&event).expect("a moment");
        assert_eq!(
            seen.as_second(),
            "2026-01-01T06:00:00Z"
                .parse::<Timestamp>()
                .expect("a moment")
                .as_second()
        );
        assert_eq!(last_seen(&json!({})), None);
    }
}
