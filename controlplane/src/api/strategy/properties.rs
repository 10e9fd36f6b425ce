//! Properties that hold of the rules of every kind, on objects made from the tables: nothing makes them panic, defaults are
//! the same the second time, and what is stored is served in every form.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::of;
use crate::api::change::{carry_over, drop_empty, spec_differs};
use crate::api::conversion::{from_stored, to_stored};
use crate::api::fields::Fields;
use crate::api::request::Target;
use crate::api::table::{self, Include};
use crate::api::write::Part;
use crate::codec::arbitrary::object_of;
use crate::codec::transcode::transcode;
use crate::codec::{self, FieldValidation, MediaType};
use crate::patch;
use crate::registry::{Resource, resources, split_api_version};

fn resource_of(object: &Value) -> &'static Resource {
    let (group, version) = split_api_version(object.text("/apiVersion"));
    let kind = object.text("/kind");
    crate::registry::resource_of_kind(group, version, kind).expect("an object of the tables")
}

/// Two objects of one kind that can be stored.
fn pair() -> impl Strategy<Value = (Value, Value)> {
    let stored: Vec<&'static Resource> = resources()
        .iter()
        .filter(|resource| resource.verbs.contains(&"list") && resource.version == "v1")
        .collect();
    prop::sample::select(stored)
        .prop_flat_map(|resource| (object_of(resource), object_of(resource)))
}

/// A place in a document, and what a client that means harm puts there: directives, other types, operations of a JSON patch.
fn twist() -> impl Strategy<Value = (prop::sample::Index, Value)> {
    let with = prop::sample::select(vec![
        json!(null),
        json!(-1),
        json!(""),
        json!([]),
        json!({}),
        json!([null]),
        json!({"$patch": "delete"}),
        json!({"$patch": "replace", "name": "a"}),
        json!({"$patch": "no such"}),
        json!({"$retainKeys": ["a", 1]}),
        json!([{"$patch": "delete", "name": "a"}, {"$patch": "replace"}]),
        json!({"$deleteFromPrimitiveList/finalizers": ["a"], "$setElementOrder/containers": [{"name": "a"}, 1]}),
        json!({"op": "add", "path": "/metadata/labels/-", "value": 1}),
        json!({"op": "move", "from": "/spec", "path": "/spec/x"}),
        json!({"op": "test", "path": "", "value": null}),
        json!({"op": "remove", "path": "/~2"}),
        json!([[[[[[[[1]]]]]]]]),
        json!(1e300),
    ]);
    (any::<prop::sample::Index>(), with)
}

/// Replaces one of the values of a document, the document itself left out.
fn twisted(document: &mut Value, at: prop::sample::Index, with: &Value) {
    fn places(value: &Value, path: String, found: &mut Vec<String>) {
        let inner: Vec<(String, &Value)> = match value {
            Value::Object(fields) => fields
                .iter()
                .map(|(key, value)| (key.replace('~', "~0").replace('/', "~1"), value))
                .collect(),
            Value::Array(items) => items
                .iter()
                .enumerate()
                .map(|(index, value)| (index.to_string(), value))
                .collect(),
            _ => Vec::new(),
        };
        for (key, value) in inner {
            let path = format!("{path}/{key}");
            found.push(path.clone());
            places(value, path, found);
        }
    }
    let mut found = Vec::new();
    places(document, String::new(), &mut found);
    // What a document says that it is has been looked at before it comes here.
    found.retain(|path| path != "/kind" && path != "/apiVersion");
    if found.is_empty() {
        return;
    }
    if let Some(place) = document.pointer_mut(&found[at.index(found.len())]) {
        *place = with.clone();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_object_makes_the_rules_panic((new, old) in pair()) {
        let resource = resource_of(&new);
        let strategy = of(resource);
        let (mut new, old) = (to_stored(new, resource), to_stored(old, resource));
        let mut errors = Vec::new();
        strategy.prepare_update(&mut new, &old);
        strategy.default(&mut new);
        let once = new.clone();
        strategy.default(&mut new);
        prop_assert_eq!(&new, &once, "defaults are the same the second time");
        strategy.prepare_create(&mut new);
        super::validate_metadata(&new, resource, &mut errors);
        strategy.validate(&new, &mut errors);
        strategy.validate_update(&new, &old, &mut errors);
        strategy.assign(&mut new);
        strategy.mark_deleted(&mut new);
        let _ = strategy.grace_s(&new, None);
        let _ = spec_differs(&new, &old);
        for error in &errors {
            prop_assert!(!error.message.is_empty());
        }
        // What is defaulted is served: as a row, and in the other encoding.
        let served = from_stored(new, resource);
        table::table(table::printer(resource.group, resource.kind), "v1", [&served], Include::Object, true);
        let text = served.to_string();
        let decoded = codec::decode(text.as_bytes(), MediaType::Json, "", "", FieldValidation::Strict);
        prop_assert!(decoded.is_ok(), "{:?} of {}", decoded.err(), text);
        prop_assert!(transcode(text.as_bytes()).is_some(), "{}", text);
    }

    #[test]
    fn no_patch_makes_the_server_panic((patch, old) in pair(), force in any::<bool>()) {
        let resource = resource_of(&old);
        let ty = resource.ty.get();
        let mut merged = old.clone();
        let _ = patch::merge(&mut merged, &patch);
        let mut merged = old.clone();
        let _ = patch::strategic(&mut merged, &patch, ty);
        let mut merged = old.clone();
        let _ = patch::json(&mut merged, &patch);
        let manager = patch::Manager { name: "kubectl", subresource: "", now: "2026-01-01T00:00:00Z" };
        let mut live = old.clone();
        patch::track_update(None, &mut live, ty, patch::Manager { name: "other", ..manager });
        let _ = patch::apply(Some(&live), &patch, ty, manager, force);
        if let Ok(applied) = patch::apply(None, &patch, ty, manager, force) {
            // What was applied is there, and applying it again changes nothing.
            let again = patch::apply(Some(&applied), &patch, ty, manager, false);
            prop_assert_eq!(again.ok(), Some(applied));
        }
    }

    #[test]
    fn no_twisted_patch_makes_the_server_panic((mut patch, old) in pair(), twists in prop::collection::vec(twist(), 1..6)) {
        let ty = resource_of(&old).ty.get();
        for (at, with) in &twists {
            twisted(&mut patch, *at, with);
        }
        let manager = patch::Manager { name: "kubectl", subresource: "", now: "2026-01-01T00:00:00Z" };
        let _ = patch::strategic(&mut old.clone(), &patch, ty);
        let _ = patch::merge(&mut old.clone(), &patch);
        let operations = Value::Array(twists.into_iter().map(|(_, with)| with).collect());
        let _ = patch::json(&mut old.clone(), &operations);
        let _ = patch::apply(Some(&old), &patch, ty, manager, true);
        // What was stored before rules became stricter must not make tracking panic either.
        let mut new = patch.clone();
        patch::track_update(Some(&old), &mut new, ty, manager);
        if let Ok(decoded) = codec::validate(patch, FieldValidation::Ignore) {
            let (new, resource) = (decoded.value, resource_of(&old));
            let mut errors = Vec::new();
            of(resource).validate(&new, &mut errors);
            of(resource).validate_update(&new, &old, &mut errors);
        }
    }

    #[test]
    fn a_status_write_leaves_everything_else((new, old) in pair()) {
        let resource = resource_of(&old);
        let path = format!("/api/v1/namespaces/a/{}/b/status", resource.plural);
        let Some(target) = Target::parse(&path) else { return Ok(()) };
        let (mut status, mut main) = (new.clone(), new);
        carry_over(&mut status, &old, Part::Status, &target);
        prop_assert!(!spec_differs(&status, &old));
        carry_over(&mut main, &old, Part::Main, &target);
        if target.resource.subresource("status").is_some() {
            prop_assert_eq!(main.get("status"), old.get("status"));
        }
        drop_empty(&mut main);
    }
}
