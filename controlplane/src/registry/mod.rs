//! The registry: what kinds exist, what resources serve them, and what their fields are. Tables generated from the
//! published Kubernetes v1.36 definitions (`cargo xtask generate-registry`), as statics: nothing is parsed at start.

mod descriptions;
mod generated;

pub mod discovery;
pub mod openapi;
mod types;

pub use types::*;

/// All built-in resources, by group, version and plural.
pub fn resources() -> &'static [Resource] {
    generated::RESOURCES
}

/// Groups and their versions in the order clients prefer them: the core group first, stable versions before others.
pub fn groups() -> &'static [(&'static str, &'static [&'static str])] {
    generated::GROUPS
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

/// Kinds that every group and version has.
const EVERYWHERE: &[&str] = &["DeleteOptions", "WatchEvent"];

/// The type of a kind: served ones, and those that are only sent (`DeleteOptions`, `TokenRequest`, `Scale`, ...).
pub fn type_of(group: &str, version: &str, kind: &str) -> Option<&'static Type> {
    let (group, version) = if EVERYWHERE.contains(&kind) {
        ("", "v1")
    } else {
        (group, version)
    };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_sorted_as_the_look_ups_need_them() {
        assert!(resources().is_sorted_by_key(|r| (r.group, r.version, r.plural)));
        assert!(generated::TYPES.is_sorted_by_key(|t| t.name));
        assert!(generated::KINDS.is_sorted_by_key(|(g, v, k, _)| (*g, *v, *k)));
        for ty in generated::TYPES {
            assert!(ty.fields.is_sorted_by_key(|f| f.name), "{}", ty.name);
            assert!(ty.wire.is_sorted_by_key(|w| w.tag), "{}", ty.name);
        }
    }

    #[test]
    fn every_resource_is_found_and_in_the_order_of_groups() {
        for r in resources() {
            assert!(std::ptr::eq(
                resource(r.group, r.version, r.plural).unwrap(),
                r
            ));
            assert!(
                groups()
                    .iter()
                    .any(|(g, versions)| *g == r.group && versions.contains(&r.version)),
                "{}",
                r.qualified()
            );
            assert_eq!(
                type_of(r.group, r.version, r.kind).unwrap().name,
                r.ty.get().name
            );
        }
    }

    #[test]
    fn rows_say_what_the_published_definitions_say() {
        let pods = resource("", "v1", "pods").unwrap();
        assert!(
            pods.namespaced
                && pods.verbs.contains(&"watch")
                && pods.short_names == ["po"]
                && pods.categories == ["all"]
        );
        assert_eq!(
            pods.subresource("eviction").map(|s| (s.group, s.kind)),
            Some(("policy", "Eviction"))
        );
        assert_eq!(
            resource("apps", "v1", "deployments")
                .unwrap()
                .subresource("scale")
                .unwrap()
                .group,
            "autoscaling"
        );
        assert!(!resource("", "v1", "nodes").unwrap().namespaced);
        let service = type_named("io.k8s.api.core.v1.ServiceSpec").unwrap();
        let ports = service.field("ports").unwrap();
        assert_eq!(
            (
                ports.merge,
                ports.merge_key,
                ports.list_type,
                ports.list_keys
            ),
            (true, "port", ListType::Map, &["port", "protocol"][..])
        );
        let volumes = type_named("io.k8s.api.core.v1.PodSpec")
            .unwrap()
            .field("volumes")
            .unwrap();
        assert!(volumes.merge && volumes.retain_keys);
        let volume = type_named("io.k8s.api.core.v1.Volume").unwrap();
        assert!(
            volume.wire.iter().any(
                |w| matches!(w.to, Wire::Inline(id) if id.get().short_name() == "VolumeSource")
            )
        );
        assert_eq!(
            type_of("apps", "v1", "DeleteOptions").unwrap().short_name(),
            "DeleteOptions"
        );
        assert!(
            type_of("meta.k8s.io", "v1", "PartialObjectMetadata")
                .unwrap()
                .field("metadata")
                .is_some()
        );
        assert!(type_of("apps", "v1", "Nonsense").is_none());
    }
}
