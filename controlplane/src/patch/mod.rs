//! The patch formats of the API: pure functions from values to values.

use serde_json::Value;

use crate::registry::Type;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// 400: the patch itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// 422: it does not fit the object (JSON patch: a failed test or a missing path).
    #[error("{0}")]
    Unprocessable(String),
    /// 409: other managers own fields that a server-side apply without force would change.
    #[error("{}", conflict_message(.0))]
    Conflict(Vec<FieldConflict>),
}

/// FieldConflict is one field that another manager owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldConflict {
    pub manager: String,
    /// As `.spec.replicas`.
    pub field: String,
}

fn conflict_message(conflicts: &[FieldConflict]) -> String {
    todo!("{}", conflicts.len())
}

/// RFC 7396.
pub fn merge(target: &mut Value, patch: &Value) {
    json_patch::merge(target, patch);
}

/// RFC 6902.
pub fn json(target: &mut Value, patch: &Value) -> Result<(), PatchError> {
    todo!("{target} {patch}")
}

/// Strategic merge patch, by the merge keys of the tables.
pub fn strategic(target: &mut Value, patch: &Value, ty: &'static Type) -> Result<(), PatchError> {
    todo!("{target} {patch} {}", ty.name)
}

/// Manager is who writes, for managedFields.
#[derive(Clone, Copy, Debug)]
pub struct Manager<'a> {
    pub name: &'a str,
    /// "" or `status`, `scale`, ...
    pub subresource: &'a str,
    /// RFC 3339, seconds.
    pub now: &'a str,
}

/// Server-side apply: the live object (None: create) with `applied` merged in, managedFields kept.
pub fn apply(
    live: Option<&Value>,
    applied: &Value,
    ty: &'static Type,
    manager: Manager<'_>,
    force: bool,
) -> Result<Value, PatchError> {
    todo!("{live:?} {applied} {} {manager:?} {force}", ty.name)
}

/// Records in `new.metadata.managedFields` what a plain write (create, update, patch) changed relative to `old`.
pub fn track_update(old: Option<&Value>, new: &mut Value, ty: &'static Type, manager: Manager<'_>) {
    todo!("{old:?} {new} {} {manager:?}", ty.name)
}
