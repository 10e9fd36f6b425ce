//! From client-side to server-side apply: kubectl keeps what it applied itself in an annotation. What it says and nobody has
//! changed since is kubectl's own when kubectl applies by the server, and the annotation goes along with what is applied.

use serde_json::Value;

use super::set::Set;
use super::typed::{self, Kind};
use super::{Manager, managed};

const ANNOTATION: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Only this manager takes over: whoever gives another name wants the conflicts.
const KUBECTL: &str = "kubectl";

fn last_applied(object: &Value) -> Option<&str> {
    object["metadata"]["annotations"][ANNOTATION].as_str()
}

/// The fields that client-side apply set and that are still as it set them.
pub fn applied_and_unchanged(live: &Value, kind: Kind, manager: Manager<'_>) -> Set {
    let text = Some(live).filter(|_| manager.name == KUBECTL);
    let Some(applied) = text
        .and_then(last_applied)
        .and_then(|text| serde_json::from_str::<Value>(text).ok())
    else {
        return Set::default();
    };
    let mut own = managed(typed::changed(None, &applied, kind));
    own.subtract(&managed(typed::changed(Some(live), &applied, kind)));
    own
}

/// Keeps the annotation, where there is one, at what kubectl has applied.
pub fn sync(object: &mut Value, applied: &Value, manager: Manager<'_>) {
    if manager.name != KUBECTL || !manager.subresource.is_empty() || last_applied(object).is_none()
    {
        return;
    }
    let mut kept = applied.clone();
    if let Some(annotations) = kept
        .pointer_mut("/metadata/annotations")
        .and_then(Value::as_object_mut)
    {
        annotations.shift_remove(ANNOTATION);
    }
    // With the line break that kubectl itself writes.
    object["metadata"]["annotations"][ANNOTATION] = format!("{kept}\n").into();
}
