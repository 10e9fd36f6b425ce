//! Discovery documents from the tables, for the resources that a server chooses to serve.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{Resource, Subresource, api_version, groups};

/// Groups with something served, in order, each with its served versions.
fn served_groups<'a>(
    served: &'a [&Resource],
) -> impl Iterator<Item = (&'static str, Vec<&'static str>)> + 'a {
    groups().iter().filter_map(|(group, versions)| {
        let has = |version: &&str| {
            served
                .iter()
                .any(|r| r.group == *group && r.version == *version)
        };
        let versions: Vec<_> = versions.iter().copied().filter(has).collect();
        (!versions.is_empty()).then_some((*group, versions))
    })
}

fn of<'a>(
    served: &'a [&'a Resource],
    group: &'a str,
    version: &'a str,
) -> impl Iterator<Item = &'a Resource> {
    served
        .iter()
        .copied()
        .filter(move |r| r.group == group && r.version == version)
}

/// `APIGroupDiscoveryList` (`apidiscovery.k8s.io/v2`) of `/apis`, or of `/api` when `core`.
pub fn aggregated(served: &[&Resource], core: bool) -> Value {
    let items: Vec<Value> = served_groups(served)
        .filter(|(group, _)| group.is_empty() == core)
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| discovered_version(served, group, version))
                .collect();
            json!({"metadata": {"name": group, "creationTimestamp": null}, "versions": versions})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items})
}

fn discovered_version(served: &[&Resource], group: &str, version: &str) -> Value {
    let resources: Vec<Value> = of(served, group, version)
        .map(discovered_resource)
        .collect();
    json!({"version": version, "resources": resources, "freshness": "Current"})
}

fn discovered_resource(resource: &Resource) -> Value {
    let mut out = json!({
        "resource": resource.plural,
        "responseKind": {"group": resource.group, "version": resource.version, "kind": resource.kind},
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": resource.singular,
        "verbs": resource.verbs,
    });
    if !resource.short_names.is_empty() {
        out["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        out["categories"] = json!(resource.categories);
    }
    if !resource.subresources.is_empty() {
        let discovered = |s: &Subresource| {
            json!({
                "subresource": s.name,
                "responseKind": {"group": s.group, "version": s.version, "kind": s.kind},
                "verbs": s.verbs,
            })
        };
        out["subresources"] = resource.subresources.iter().map(discovered).collect();
    }
    out
}

/// `APIVersions` of `/api`.
pub fn core_versions(server_address: &str) -> Value {
    json!({
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": server_address}],
    })
}

/// `APIGroupList` of `/apis`.
pub fn group_list(served: &[&Resource]) -> Value {
    let named = served_groups(served).filter(|(group, _)| !group.is_empty());
    let groups: Vec<Value> = named
        .map(|(group, versions)| Value::Object(api_group(group, &versions)))
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `APIGroup` of `/apis/<group>`; None when nothing of it is served.
pub fn group(served: &[&Resource], group: &str) -> Option<Value> {
    let (name, versions) =
        served_groups(served).find(|(name, _)| *name == group && !group.is_empty())?;
    let mut out = json!({"kind": "APIGroup", "apiVersion": "v1"});
    out.as_object_mut()?.extend(api_group(name, &versions));
    Some(out)
}

fn api_group(group: &str, versions: &[&str]) -> Map<String, Value> {
    let versions: Vec<Value> = versions
        .iter()
        .map(|version| json!({"groupVersion": api_version(group, version), "version": version}))
        .collect();
    let mut out = Map::new();
    out.insert("name".into(), group.into());
    out.insert(
        "preferredVersion".into(),
        versions.first().cloned().unwrap_or_default(),
    );
    out.insert("versions".into(), versions.into());
    out
}

/// What tells clients in which form objects are stored, as upstream makes it: a digest of group, version and kind. Two forms of
/// one kind have the same; what is not stored has none.
fn storage_version_hash(resource: &Resource) -> Option<String> {
    if !resource.verbs.contains(&"watch") {
        return None;
    }
    let (group, version) = match (resource.group, resource.kind) {
        ("events.k8s.io", "Event") => ("", "v1"),
        ("autoscaling", _) => ("autoscaling", "v2"),
        _ => (resource.group, resource.version),
    };
    let digest = Sha256::digest(format!("{group}/{version}/{}", resource.kind));
    Some(STANDARD.encode(&digest[..8]))
}

/// `APIResourceList` of `/api/v1` or `/apis/<group>/<version>`; None when nothing of it is served.
pub fn resource_list(served: &[&Resource], group: &str, version: &str) -> Option<Value> {
    let mut resources = Vec::new();
    for resource in of(served, group, version) {
        let mut out = json!({
            "name": resource.plural,
            "singularName": resource.singular,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": resource.verbs,
        });
        if !resource.short_names.is_empty() {
            out["shortNames"] = json!(resource.short_names);
        }
        if !resource.categories.is_empty() {
            out["categories"] = json!(resource.categories);
        }
        if let Some(hash) = storage_version_hash(resource) {
            out["storageVersionHash"] = hash.into();
        }
        resources.push(out);
        for sub in resource.subresources {
            let mut out = json!({
                "name": format!("{}/{}", resource.plural, sub.name),
                "singularName": "",
                "namespaced": resource.namespaced,
                "kind": sub.kind,
                "verbs": sub.verbs,
            });
            if (sub.group, sub.version) != (resource.group, resource.version) {
                out["group"] = sub.group.into();
                out["version"] = sub.version.into();
            }
            resources.push(out);
        }
    }
    if resources.is_empty() {
        return None;
    }
    let group_version = api_version(group, version);
    Some(
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}),
    )
}

#[cfg(test)]
mod tests {
    use super::super::{resource, resources};
    use super::*;

    fn some() -> Vec<&'static Resource> {
        [
            ("apps", "v1", "deployments"),
            ("", "v1", "pods"),
            ("autoscaling", "v1", "horizontalpodautoscalers"),
        ]
        .iter()
        .map(|(g, v, p)| resource(g, v, p).unwrap())
        .collect()
    }

    #[test]
    fn only_what_is_served_is_discovered() {
        let core = aggregated(&some(), true);
        assert_eq!(core["items"].as_array().unwrap().len(), 1);
        assert_eq!(
            core["items"][0]["versions"][0]["resources"]
                .as_array()
                .unwrap()
                .len(),
            1
        );
        let apis = aggregated(&some(), false);
        let names: Vec<_> = apis["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|i| i["metadata"]["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["apps", "autoscaling"]);
        assert_eq!(
            apis["items"][1]["versions"].as_array().unwrap().len(),
            1,
            "autoscaling/v2 is not served"
        );
        assert_eq!(
            group_list(&some())["groups"][1]["preferredVersion"]["groupVersion"],
            "autoscaling/v1"
        );
        assert!(group(&some(), "batch").is_none());
        assert!(resource_list(&some(), "apps", "v2").is_none());
    }

    #[test]
    fn what_is_stored_says_in_which_form() {
        let hash = |group, version, plural: &str| {
            let list = resource_list(&resources().iter().collect::<Vec<_>>(), group, version);
            let list = list.expect("a list");
            let mut all = list["resources"].as_array().expect("resources").iter();
            let found = all.find(|resource| resource["name"] == plural);
            found.expect("the resource")["storageVersionHash"].clone()
        };
        // As servers of v1.36 give them.
        assert_eq!(hash("", "v1", "pods"), "xPOwRZ+Yhw8=");
        assert_eq!(hash("events.k8s.io", "v1", "events"), "r2yiGXH7wu8=");
        assert_eq!(
            hash("autoscaling", "v1", "horizontalpodautoscalers"),
            "qwQve8ut294="
        );
        assert_eq!(hash("", "v1", "bindings"), Value::Null);
    }

    #[test]
    fn subresources_name_the_kind_they_speak() {
        let list = resource_list(&some(), "apps", "v1").unwrap();
        let scale = list["resources"]
            .as_array()
            .unwrap()
            .iter()
            .find(|r| r["name"] == "deployments/scale")
            .unwrap();
        assert_eq!(
            (&scale["group"], &scale["kind"]),
            (&json!("autoscaling"), &json!("Scale"))
        );
        let apis = aggregated(&some(), false);
        let deployments = &apis["items"][0]["versions"][0]["resources"][0];
        assert_eq!(
            deployments["subresources"][0]["responseKind"]["group"],
            "autoscaling"
        );
        assert_eq!(deployments["shortNames"], json!(["deploy"]));
    }

    #[test]
    fn stable_versions_are_preferred() {
        let all: Vec<&Resource> = resources().iter().collect();
        let preferred =
            group(&all, "resource.k8s.io").unwrap()["preferredVersion"]["version"].clone();
        assert_eq!(preferred, "v1");
        assert_eq!(aggregated(&all, true)["items"][0]["metadata"]["name"], "");
    }
}
