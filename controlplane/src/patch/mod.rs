//! The patch formats of the API: pure functions from values to values.

mod apply;
mod strategic;

pub use apply::{FieldConflict, Manager, apply, track_update};
pub use strategic::strategic;

use json_patch::PatchOperation;
use serde_json::Value;

use crate::codec::{DEPTH_MAX, TOO_DEEP, is_deeper_than};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// 400: the patch itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// 422: it does not fit the object (JSON patch: a failed test or a missing path).
    #[error("{0}")]
    Unprocessable(String),
    /// 413: more than there may be.
    #[error("{0}")]
    TooLarge(String),
    /// 409: other managers own fields that a server-side apply without force would change.
    #[error("{}", apply::conflict_message(.0))]
    Conflict(Vec<FieldConflict>),
}

/// RFC 7396, for objects.
pub fn merge(target: &mut Value, patch: &Value) -> Result<(), PatchError> {
    if !patch.is_object() {
        return Err(PatchError::Invalid(format!(
            "error decoding patch: json: cannot unmarshal {} into Go value of type map[string]interface {{}}",
            described(patch)
        )));
    }
    json_patch::merge(target, patch);
    Ok(())
}

/// How Go's decoder names a value.
fn described(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Operations that one JSON patch may have, as upstream limits them.
const OPERATIONS_MAX: usize = 10_000;

/// Bytes that all copies of one JSON patch may add, as upstream limits them: each can double what is there.
const COPIED_BYTES_MAX: usize = 3 << 20;

/// RFC 6902. The target is unchanged when the patch fails.
pub fn json(target: &mut Value, patch: &Value) -> Result<(), PatchError> {
    let count = match patch {
        Value::Array(operations) => operations.len(),
        other => {
            return Err(PatchError::Invalid(format!(
                "error decoding patch: json: cannot unmarshal {} into Go value of type []handlers.jsonPatchOp",
                described(other)
            )));
        }
    };
    if count > OPERATIONS_MAX {
        return Err(PatchError::TooLarge(format!(
            "The allowed maximum operations in a JSON patch is {OPERATIONS_MAX}, got {count}"
        )));
    }
    let mut patch = patch.clone();
    for operation in patch.as_array_mut().into_iter().flatten() {
        complete(operation);
    }
    let patch: json_patch::Patch = serde_json::from_value(patch)
        .map_err(|e| PatchError::Unprocessable(format!("error decoding patch: {e}")))?;
    let mut patched = target.clone();
    let mut copied = 0;
    for (index, operation) in patch.0.iter().enumerate() {
        hold(&patched, operation, &mut copied).map_err(PatchError::Unprocessable)?;
        let operation = &addition(&patched, operation);
        let done = json_patch::patch_unsafe(&mut patched, std::slice::from_ref(operation));
        done.map_err(|mut e| {
            e.operation = index;
            PatchError::Unprocessable(e.to_string())
        })?;
    }
    *target = patched;
    Ok(())
}

/// An operation that gives no value gives null, as upstream's patcher reads it.
fn complete(operation: &mut Value) {
    let takes = matches!(operation["op"].as_str(), Some("add" | "replace" | "test"));
    if let Some(fields) = operation.as_object_mut().filter(|_| takes) {
        fields.entry("value").or_insert(Value::Null);
    }
}

/// An operation as upstream's patcher means it: to replace a member that an object does not have is to add it.
fn addition(target: &Value, operation: &PatchOperation) -> PatchOperation {
    if let PatchOperation::Replace(replace) = operation
        && let Some((parent, _)) = replace.path.split_back()
        && target
            .pointer(parent.as_str())
            .is_some_and(Value::is_object)
    {
        return PatchOperation::Add(json_patch::AddOperation {
            path: replace.path.clone(),
            value: replace.value.clone(),
        });
    }
    operation.clone()
}

/// Holds an operation to the limits of depth and of copies. Each can build on the one before, so a small patch could
/// otherwise make an object of any depth or size.
fn hold(
    target: &Value,
    operation: &PatchOperation,
    copied_bytes: &mut usize,
) -> Result<(), String> {
    let value = match operation {
        PatchOperation::Add(add) => Some(&add.value),
        PatchOperation::Replace(replace) => Some(&replace.value),
        PatchOperation::Move(from) => target.pointer(from.from.as_str()),
        PatchOperation::Copy(from) => {
            let value = target.pointer(from.from.as_str());
            *copied_bytes += value.map_or(0, |value| value.to_string().len());
            if *copied_bytes > COPIED_BYTES_MAX {
                return Err(format!(
                    "Unable to complete the copy, the accumulated size increase of copy is {copied_bytes}, exceeding the \
                     limit {COPIED_BYTES_MAX}"
                ));
            }
            value
        }
        PatchOperation::Remove(_) | PatchOperation::Test(_) => None,
    };
    let levels = DEPTH_MAX.saturating_sub(operation.path().tokens().count());
    match value {
        Some(value) if is_deeper_than(value, levels) => Err(TOO_DEEP.to_owned()),
        _ => Ok(()),
    }
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
            Err(PatchError::Unprocessable(_))
        ));
        let lax =
            json!([{"op": "replace", "path": "/new", "value": 1}, {"op": "add", "path": "/null"}]);
        json(&mut target, &lax).expect("upstream takes these");
        assert_eq!(target, json!({"l": [1, 2, 3], "new": 1, "null": null}));
        let strict = json!([{"op": "replace", "path": "/l/7", "value": 1}]);
        assert!(json(&mut target, &strict).is_err());
    }

    /// Each operation builds on the one before: followed, the first would take the stack, the second all memory.
    #[test]
    fn a_json_patch_makes_nothing_of_any_depth_or_size() {
        let level = json!({"a": {"a": {"a": {"a": {}}}}});
        let deep: Vec<Value> = (0..200)
            .map(|at| json!({"op": "add", "path": format!("/l{}", "/a".repeat(4 * at)), "value": level}))
            .collect();
        let wide: Vec<Value> = (0..40)
            .map(|at| json!({"op": "copy", "from": "", "path": format!("/c{at}")}))
            .collect();
        let mut same = vec![json!({"op": "add", "path": "/big", "value": "x".repeat(1 << 20)})];
        same.extend(vec![json!({"op": "copy", "from": "/big", "path": "/b"}); 3]);
        let limit = "exceeding the limit";
        for (patch, said) in [(deep, TOO_DEEP), (wide, limit), (same, limit)] {
            let mut target = json!({"l": {}});
            let error = json(&mut target, &json!(patch)).expect_err("refused");
            assert!(matches!(&error, PatchError::Unprocessable(_)), "{error}");
            assert!(error.to_string().contains(said), "{error}");
            assert_eq!(target, json!({"l": {}}));
        }
    }

    #[test]
    fn a_merge_patch_removes_by_null() {
        let mut target = json!({"a": {"b": 1, "c": 2}, "l": [1]});
        let patch = json!({"a": {"b": null, "d": 3}, "l": [2]});
        merge(&mut target, &patch).expect("an object");
        assert_eq!(target, json!({"a": {"c": 2, "d": 3}, "l": [2]}));
        let error = merge(&mut target, &json!([])).expect_err("refused");
        assert!(error.to_string().contains("cannot unmarshal array"));
    }
}
