//! Discovery documents from the tables, for the resources that a server chooses to serve.

use serde_json::Value;

use super::Resource;

/// `APIGroupDiscoveryList` (`apidiscovery.k8s.io/v2`) of `/apis`, or of `/api` when `core`.
pub fn aggregated(served: &[&Resource], core: bool) -> Value {
    todo!("{} {core}", served.len())
}

/// `APIGroupList` of `/apis`.
pub fn group_list(served: &[&Resource]) -> Value {
    todo!("{}", served.len())
}

/// `APIGroup` of `/apis/<group>`; None when nothing of it is served.
pub fn group(served: &[&Resource], group: &str) -> Option<Value> {
    todo!("{} {group}", served.len())
}

/// `APIResourceList` of `/api/v1` or `/apis/<group>/<version>`; None when nothing of it is served.
pub fn resource_list(served: &[&Resource], group: &str, version: &str) -> Option<Value> {
    todo!("{} {group} {version}", served.len())
}
