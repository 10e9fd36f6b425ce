//! OpenAPI documents from the tables.

use serde_json::Value;

use super::Resource;

/// The index at `/openapi/v3`: path -> server-relative URL with a hash.
pub fn v3_index(served: &[&Resource]) -> Value {
    todo!("{}", served.len())
}

/// The document at `/openapi/v3/api/v1` (group "") or `/openapi/v3/apis/<group>/<version>`; None when nothing of it is served.
pub fn v3(served: &[&Resource], group: &str, version: &str) -> Option<Value> {
    todo!("{} {group} {version}", served.len())
}

/// `/openapi/v2` as JSON.
pub fn v2(served: &[&Resource]) -> Value {
    todo!("{}", served.len())
}
