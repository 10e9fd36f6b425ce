//! Selectors held against stored objects, which are not decoded for it: labels and fields are found in their text. Labels come first
//! there (see [`super::object::encode`]), so a list by label looks at the beginning of each object.

use bytes::Bytes;

use super::request::{ListOptions, Target};
use super::{object, strategy};
use crate::codec::scan::Raw;
use crate::registry::Resource;
use crate::selector::Field;
use crate::store::{PODS, Share};

impl ListOptions {
    /// Whether a stored object is selected.
    pub fn selects_stored(&self, value: &[u8]) -> bool {
        let object = Raw::new(value);
        self.labels
            .matches_by(|key| object.at(["metadata", "labels", key])?.text())
            && self
                .fields
                .matches_by(|path| field(object.at(path.split('.'))))
    }

    /// Whether an object is selected that has been looked at for all who ask.
    pub fn selects(&self, object: &Selectable) -> bool {
        let labels = Raw::new(&object.labels);
        self.labels.matches_by(|key| labels.field(key)?.text())
            && self.fields.matches_by(|path| {
                let found = object.fields.iter().find(|(known, _)| *known == path);
                field(found.map(|(_, value)| Raw::new(value)))
            })
    }
}

fn field(found: Option<Raw<'_>>) -> Field<'_> {
    match found {
        None => Field::Absent,
        Some(raw) if raw.is_null() => Field::Absent,
        Some(raw) => raw.text().map_or(Field::Whole, Field::Text),
    }
}

/// Selectable is what selectors can look at in one stored object, found once for all watches of its change.
pub struct Selectable {
    labels: Bytes,
    fields: Vec<(&'static str, Bytes)>,
}

impl Selectable {
    pub fn of(value: &Bytes, resource: &'static Resource) -> Self {
        let known = strategy::of(object::stored_resource(resource)).selectable();
        let paths = ["metadata.name", "metadata.namespace"].iter().chain(known);
        let (mut labels, mut fields) = (Bytes::new(), Vec::new());
        // Each part of the object is walked once, however many paths lead into it.
        for (key, part) in Raw::new(value).fields() {
            for path in paths.clone() {
                let found = match path.split_once('.') {
                    Some((first, rest)) if key.is(first) => part.field(rest),
                    None if key.is(path) => Some(part),
                    _ => None,
                };
                if let Some(found) = found {
                    fields.push((*path, value.slice_ref(found.bytes())));
                }
            }
            if key.is("metadata")
                && let Some(found) = part.field("labels")
            {
                labels = value.slice_ref(found.bytes());
            }
        }
        Self { labels, fields }
    }
}

impl Target {
    /// What the keys of all objects begin with that the options may select: of one name or one namespace, where they ask for it.
    pub fn prefix_of(&self, options: &ListOptions) -> String {
        let exact = |path: &str| options.fields.exact(path).filter(|value| !value.is_empty());
        let everywhere = self.resource.namespaced && self.namespace.is_none();
        if everywhere {
            let namespace = exact("metadata.namespace");
            return match (namespace, exact("metadata.name")) {
                (Some(namespace), Some(name)) => object::key(self.resource, Some(namespace), name),
                (namespace, _) => object::prefix(self.resource, namespace),
            };
        }
        match exact("metadata.name") {
            Some(name) => self.key_of(name),
            None => self.prefix(),
        }
    }

    /// Which of the objects under that prefix the options may select, as far as a watch of the store can be told.
    pub fn share_of<'a>(&self, options: &'a ListOptions, prefix: &'a str) -> Share<'a> {
        if !prefix.ends_with('/') {
            return Share::Key(prefix);
        }
        let exact = |path| options.fields.exact(path);
        let name = exact("metadata.name").filter(|name| !name.is_empty());
        let node = exact("spec.nodeName").filter(|_| prefix.starts_with(PODS));
        match (name, node) {
            (Some(name), _) => Share::Name(name),
            (None, Some(node)) => Share::Node(node),
            (None, None) => Share::All,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::codec::arbitrary::object_of;
    use crate::registry::{self, resources};
    use crate::selector::{FieldSelector, LabelSelector};

    fn asked(labels: &str, fields: &str) -> ListOptions {
        ListOptions {
            labels: LabelSelector::parse(labels).expect("a label selector"),
            fields: FieldSelector::parse(fields).expect("a field selector"),
            ..ListOptions::default()
        }
    }

    fn resource(plural: &str) -> &'static Resource {
        registry::resource("", "v1", plural).expect("a resource of the tables")
    }

    /// Both ways of looking at a stored object, which are to be one.
    fn selects(options: &ListOptions, stored: &Bytes, resource: &'static Resource) -> bool {
        let found = options.selects_stored(stored);
        assert_eq!(options.selects(&Selectable::of(stored, resource)), found);
        found
    }

    #[test]
    fn what_looks_like_labels_elsewhere_is_none() {
        let pod = json!({"metadata": {"annotations": {"a": "\"labels\":{\"x\":\"1\"}", "labels": "x"},
            "managedFields": [{"fieldsV1": {"f:metadata": {"f:labels": {"f:x": {}}}}}], "name": "p", "labels": {"y": "2"}},
            "spec": {"nodeSelector": {"nodeName": "no"}, "nodeName": "n", "hostNetwork": true}});
        // Objects that were stored before labels came first stay as they are.
        for stored in [object::encode(pod.clone()), pod.to_string().into()] {
            for (labels, fields, wanted) in [
                ("x=1", "", false),
                ("y=2", "", true),
                ("!x,y", "spec.nodeName=n", true),
                ("", "spec.nodeName=no", false),
                ("", "spec.hostNetwork=true,metadata.name=p", true),
                ("", "status.phase=,metadata.namespace!=n", true),
            ] {
                let options = asked(labels, fields);
                assert_eq!(
                    selects(&options, &stored, resource("pods")),
                    wanted,
                    "{labels} {fields}"
                );
            }
        }
    }

    #[test]
    fn a_name_leads_to_one_key_and_a_node_to_its_pods() {
        let (all, pods) = ("/api/v1/pods", "/api/v1/namespaces/a/pods");
        let key = Share::Key;
        for (path, fields, prefix, share) in [
            (
                pods,
                "metadata.name=x",
                "/core/pods/a/x",
                key("/core/pods/a/x"),
            ),
            (pods, "metadata.name!=x", "/core/pods/a/", Share::All),
            (pods, "metadata.name=", "/core/pods/a/", Share::All),
            (pods, "spec.nodeName=n", "/core/pods/a/", Share::Node("n")),
            (all, "metadata.name=x", "/core/pods/", Share::Name("x")),
            (all, "metadata.namespace=a", "/core/pods/a/", Share::All),
            (
                all,
                "metadata.namespace=a,metadata.name=x",
                "/core/pods/a/x",
                key("/core/pods/a/x"),
            ),
            (all, "spec.nodeName=n", "/core/pods/", Share::Node("n")),
            (all, "spec.nodeName=", "/core/pods/", Share::Node("")),
            (all, "spec.nodeName!=n", "/core/pods/", Share::All),
            (
                all,
                "spec.nodeName=n,metadata.name=x",
                "/core/pods/",
                Share::Name("x"),
            ),
            (
                "/api/v1/nodes",
                "metadata.name=x",
                "/core/nodes/x",
                key("/core/nodes/x"),
            ),
            (
                "/api/v1/nodes",
                "metadata.namespace=x",
                "/core/nodes/",
                Share::All,
            ),
        ] {
            let target = Target::parse(path).expect("a path of the tables");
            let options = asked("", fields);
            let found = target.prefix_of(&options);
            assert_eq!(found, prefix, "{path} {fields}");
            assert_eq!(target.share_of(&options, &found), share, "{path} {fields}");
        }
    }

    /// Objects of every kind that can be listed, with labels, and selectors that are about them more often than not.
    fn case() -> impl Strategy<Value = (Value, &'static Resource, String, String)> {
        let listed: Vec<&'static Resource> = resources()
            .iter()
            .filter(|resource| resource.verbs.contains(&"list") && resource.version == "v1")
            .collect();
        let word = || prop::sample::select(vec!["a", "b", "labels", "x.io/a"]);
        let value = || prop::sample::select(vec!["", "a", "1", "7"]);
        let labels = prop::option::of(prop::collection::btree_map(word(), value(), 0..3));
        let requirement = (word(), value(), 0..8).prop_map(|(key, value, form)| match form {
            0 | 1 => format!("{key}={value}"),
            2 => format!("{key}!={value}"),
            3 => format!("{key} in ({value},1)"),
            4 => format!("{key} notin ({value},a)"),
            5 => format!("{key}>3"),
            6 => format!("!{key}"),
            _ => key.to_owned(),
        });
        let selector = prop::collection::vec(requirement, 0..3).prop_map(|all| all.join(","));
        prop::sample::select(listed).prop_flat_map(move |resource| {
            let paths = ["metadata.name", "metadata.namespace"].iter();
            let paths = paths.chain(strategy::of(resource).selectable());
            let path = prop::sample::select(paths.copied().collect::<Vec<_>>());
            let fields = prop::collection::vec((path, any::<bool>(), any::<bool>()), 0..3);
            (
                object_of(resource),
                labels.clone(),
                selector.clone(),
                fields,
            )
                .prop_map(move |(object, labels, selector, fields)| {
                    let mut object = object::to_stored(object, resource);
                    if !object["metadata"].is_object() {
                        object["metadata"] = json!({"name": "n"});
                    }
                    match labels {
                        Some(labels) => object["metadata"]["labels"] = json!(labels),
                        None => drop(
                            object["metadata"]
                                .as_object_mut()
                                .map(|m| m.shift_remove("labels")),
                        ),
                    }
                    let field = |(path, right, equal): (&str, bool, bool)| {
                        let at = path.split('.').try_fold(&object, |at, step| at.get(step));
                        let value = match at {
                            Some(Value::String(text)) if right => text.clone(),
                            Some(value) if right && !value.is_object() && !value.is_array() => {
                                value.to_string()
                            }
                            _ => String::new(),
                        };
                        let operator = if equal { "=" } else { "!=" };
                        format!("{path}{operator}{value}")
                    };
                    let fields: Vec<String> = fields.into_iter().map(field).collect();
                    (object.clone(), resource, selector, fields.join(","))
                })
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(800))]

        #[test]
        fn what_is_selected_is_what_decoding_would_select((object, resource, labels, fields) in case()) {
            let options = asked(&labels, &fields);
            let wanted = options.labels.matches(&object) && options.fields.matches(&object);
            let stored = object::encode(object);
            prop_assert_eq!(selects(&options, &stored, resource), wanted, "{} / {}", labels, fields);
        }
    }
}
