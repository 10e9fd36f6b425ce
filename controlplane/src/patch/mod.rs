//! The patch formats of the API: pure functions from values to values.

mod apply;
mod strategic;

pub use apply::{FieldConflict, Manager, apply, track_update};
pub use strategic::strategic;

use serde_json::Value;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// 400: the patch itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// 422: it does not fit the object (JSON patch: a failed test or a missing path).
    #[error("{0}")]
    Unprocessable(String),
    /// 409: other managers own fields that a server-side apply without force would change.
    #[error("{}", apply::conflict_message(.0))]
    Conflict(Vec<FieldConflict>),
}

/// RFC 7396.
pub fn merge(target: &mut Value, patch: &Value) {
    json_patch::merge(target, patch);
}

/// Operations that one JSON patch may have, as upstream limits them.
const OPERATIONS_MAX: usize = 10_000;

/// RFC 6902. The target is unchanged when the patch fails.
pub fn json(target: &mut Value, patch: &Value) -> Result<(), PatchError> {
    if patch
        .as_array()
        .is_some_and(|operations| operations.len() > OPERATIONS_MAX)
    {
        let message = format!("the allowed maximum operations in a JSON patch is {OPERATIONS_MAX}");
        return Err(PatchError::Invalid(message));
    }
    let patch: json_patch::Patch = serde_json::from_value(patch.clone())
        .map_err(|e| PatchError::Invalid(format!("the body is not a JSON patch: {e}")))?;
    json_patch::patch(target, &patch).map_err(|e| PatchError::Unprocessable(e.to_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_json_patch_happens_as_a_whole_or_not_at_all() {
        let mut target = json!({"a": 1, "l": [1, 2]});
        json(
            &mut target,
            &json!([{"op": "add", "path": "/l/-", "value": 3}, {"op": "remove", "path": "/a"}]),
        )
        .unwrap();
        assert_eq!(target, json!({"l": [1, 2, 3]}));
        let failing = json!([{"op": "add", "path": "/b", "value": 1}, {"op": "test", "path": "/l/0", "value": 9}]);
        assert!(matches!(
            json(&mut target, &failing),
            Err(PatchError::Unprocessable(_))
        ));
        assert_eq!(target, json!({"l": [1, 2, 3]}));
        assert!(matches!(
            json(&mut target, &json!({"op": "add"})),
            Err(PatchError::Invalid(_))
        ));
        assert!(matches!(
            json(&mut target, &json!([{"op": "fly", "path": "/a"}])),
            Err(PatchError::Invalid(_))
        ));
    }

    #[test]
    fn a_merge_patch_removes_by_null() {
        let mut target = json!({"a": {"b": 1, "c": 2}, "l": [1]});
        merge(&mut target, &json!({"a": {"b": null, "d": 3}, "l": [2]}));
        assert_eq!(target, json!({"a": {"c": 2, "d": 3}, "l": [2]}));
    }
}
