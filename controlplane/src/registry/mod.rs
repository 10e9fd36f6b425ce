//! The registry: what kinds exist, what resources serve them, and what their fields are. Tables generated from the
//! published Kubernetes v1.36 definitions (`cargo xtask generate-registry`), as statics: nothing is parsed at start.

mod generated;

pub mod discovery;
pub mod openapi;
mod types;

pub use types::*;

/// All built-in resources, by group, version and plural.
pub fn resources() -> &'static [Resource] {
    generated::RESOURCES
}

/// The resource at `/apis/<group>/<version>/.../<plural>` (group "" is the core group).
pub fn resource(group: &str, version: &str, plural: &str) -> Option<&'static Resource> {
    resources()
        .binary_search_by(|r| (r.group, r.version, r.plural).cmp(&(group, version, plural)))
        .ok()
        .map(|i| &resources()[i])
}

/// The resource that serves a kind.
pub fn resource_of_kind(group: &str, version: &str, kind: &str) -> Option<&'static Resource> {
    resources()
        .iter()
        .find(|r| r.group == group && r.version == version && r.kind == kind)
}

/// The type of a kind: served ones, and those that are only sent (`DeleteOptions`, `TokenRequest`, `Scale`, ...).
pub fn type_of(group: &str, version: &str, kind: &str) -> Option<&'static Type> {
    let i = generated::KINDS
        .binary_search_by(|(g, v, k, _)| (*g, *v, *k).cmp(&(group, version, kind)))
        .ok()?;
    Some(generated::KINDS[i].3.get())
}

/// The type by its definition's name, as `io.k8s.api.core.v1.Pod`.
pub fn type_named(name: &str) -> Option<&'static Type> {
    let types = generated::TYPES;
    types
        .binary_search_by(|t| t.name.cmp(name))
        .ok()
        .map(|i| &types[i])
}

/// Splits an apiVersion into group and version: `v1` is ("", "v1"), `apps/v1` is ("apps", "v1").
pub fn split_api_version(api_version: &str) -> (&str, &str) {
    api_version.split_once('/').unwrap_or(("", api_version))
}

/// Joins group and version into an apiVersion.
pub fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    }
}
