//! Claims and ingresses that name no class get the default one; what can be in use is held until it is not.

use serde_json::Value;

use super::stored;
use crate::api::Api;
use crate::api::fields::{self, Fields};
use crate::api::status::Status;
use crate::controllers::volumes::protection;
use crate::registry::Resource;

/// What marks the default class, by kind.
const DEFAULT_STORAGE: &str = "/metadata/annotations/storageclass.kubernetes.io~1is-default-class";
const DEFAULT_INGRESS: &str = "/metadata/annotations/ingressclass.kubernetes.io~1is-default-class";
/// The older ways to name a class.
const CLAIM_CLASS: &str = "/metadata/annotations/volume.beta.kubernetes.io~1storage-class";
const INGRESS_CLASS: &str = "/metadata/annotations/kubernetes.io~1ingress.class";

/// What holds back the deletion of an object that may be in use (`controllers/volumes/protection.rs` takes it away).
pub fn protection_of(resource: &Resource) -> Option<&'static str> {
    match (resource.group, resource.plural) {
        ("", "persistentvolumeclaims") => Some(protection::CLAIM),
        ("", "persistentvolumes") => Some(protection::VOLUME),
        ("storage.k8s.io", "volumeattributesclasses") => Some(protection::CLASS),
        _ => None,
    }
}

/// Gives a new object a finalizer, unless it has it.
pub fn protect(object: &mut Value, finalizer: &str) {
    let mut held = object.items("/metadata/finalizers").to_vec();
    if !held.iter().any(|found| found == finalizer) {
        held.push(finalizer.into());
        object.set("/metadata/finalizers", held);
    }
}

/// Gives a claim that names no StorageClass the default one. An empty name is a choice: no class.
pub async fn default_class(api: &Api, claim: &mut Value) -> Result<(), Status> {
    if claim.has("/spec/storageClassName") || claim.has(CLAIM_CLASS) {
        return Ok(());
    }
    let classes = stored(api, "storage.k8s.io", "storageclasses", None).await?;
    if let Some(class) = newest_default(&classes, DEFAULT_STORAGE) {
        claim.set("/spec/storageClassName", class);
    }
    Ok(())
}

/// The same for ingresses and IngressClasses.
pub async fn default_ingress_class(api: &Api, ingress: &mut Value) -> Result<(), Status> {
    if ingress.has("/spec/ingressClassName") || ingress.has(INGRESS_CLASS) {
        return Ok(());
    }
    let classes = stored(api, "networking.k8s.io", "ingressclasses", None).await?;
    if let Some(class) = newest_default(&classes, DEFAULT_INGRESS) {
        ingress.set("/spec/ingressClassName", class);
    }
    Ok(())
}

/// Of several defaults, the newest, and of those made in the same second the first by name.
fn newest_default<'a>(classes: &'a [Value], mark: &str) -> Option<&'a str> {
    let made = |class: &'a Value| class.text("/metadata/creationTimestamp");
    classes
        .iter()
        .filter(|class| class.text(mark) == "true")
        .min_by_key(|class| (std::cmp::Reverse(made(class)), fields::name(class)))
        .map(fields::name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_newest_default_wins() {
        let class = |name: &str, made: &str, default: &str| {
            json!({"metadata": {"name": name, "creationTimestamp": made,
                "annotations": {"storageclass.kubernetes.io/is-default-class": default}}})
        };
        let classes = [
            class("a", "2026-01-01T00:00:00Z", "true"),
            class("c", "2026-01-02T00:00:00Z", "true"),
            class("b", "2026-01-02T00:00:00Z", "true"),
            class("d", "2026-01-03T00:00:00Z", "false"),
        ];
        assert_eq!(newest_default(&classes, DEFAULT_STORAGE), Some("b"));
        assert_eq!(newest_default(&[], DEFAULT_STORAGE), None);
    }
}
