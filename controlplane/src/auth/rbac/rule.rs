//! One rule of a role.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::auth::{Asked, Attributes, Resource};

/// Rule is a `PolicyRule`: some verbs on some resources, or on some paths.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rule {
    #[serde(deserialize_with = "list")]
    pub verbs: Vec<String>,
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub api_groups: Vec<String>,
    /// `pods`, `pods/log`, `*/scale`, `*`.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub resources: Vec<String>,
    /// Empty means every object.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub resource_names: Vec<String>,
    #[serde(
        rename = "nonResourceURLs",
        deserialize_with = "list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub non_resource_urls: Vec<String>,
}

/// A list; null means none.
fn list<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl Rule {
    pub fn allows(&self, asked: &Attributes<'_>) -> bool {
        has(&self.verbs, asked.verb)
            && match asked.object {
                Asked::Path(path) => self.non_resource_urls.iter().any(|url| reaches(url, path)),
                Asked::Resource(resource) => {
                    has(&self.api_groups, resource.group)
                        && self.names_resource(&resource)
                        && (self.resource_names.is_empty()
                            || self.resource_names.iter().any(|n| n == resource.name))
                }
            }
    }

    fn names_resource(&self, asked: &Resource<'_>) -> bool {
        self.resources.iter().any(|resource| {
            let (plural, subresource) = resource.split_once('/').unwrap_or((resource, ""));
            match (plural, subresource) {
                ("*", "") => true,
                ("*", subresource) => subresource == asked.subresource,
                named => named == (asked.resource, asked.subresource),
            }
        })
    }
}

/// Whether a list names a value, or all.
pub(super) fn has(list: &[String], value: &str) -> bool {
    list.iter().any(|item| item == "*" || item == value)
}

/// Whether a rule's URL covers a path (or, of another rule, a URL): a closing asterisk stands for any rest.
pub(super) fn reaches(url: &str, path: &str) -> bool {
    match url.strip_suffix('*') {
        Some(beginning) => path.starts_with(beginning),
        None => url == path,
    }
}

/// As Kubernetes prints rules in its refusals: `{APIGroups:[""], Resources:["pods"], Verbs:["get"]}`.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lists = [
            ("APIGroups", &self.api_groups),
            ("Resources", &self.resources),
            ("ResourceNames", &self.resource_names),
            ("NonResourceURLs", &self.non_resource_urls),
            ("Verbs", &self.verbs),
        ];
        let parts: Vec<String> = lists
            .iter()
            .filter(|(_, list)| !list.is_empty())
            .map(|(name, list)| format!("{name}:{list:?}"))
            .collect();
        write!(f, "{{{}}}", parts.join(", "))
    }
}
