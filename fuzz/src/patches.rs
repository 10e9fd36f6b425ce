//! Patches of all formats, onto objects of kinds whose lists merge by keys, by value and not at all.

use serde_json::{Value, json};

use crate::codec::{self, DEPTH_MAX, FieldValidation, MediaType};
use crate::patch::{self, Manager};
use crate::registry::{Type, split_api_version, type_of};

fn objects() -> [Value; 4] {
    let port = json!({"name": "http", "containerPort": 80, "protocol": "TCP"});
    let container = json!({"name": "web", "image": "web:1", "ports": [port],
        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}], "command": ["a", "b"]});
    let template = json!({"metadata": {"labels": {"app": "web"}},
        "spec": {"containers": [container], "volumes": [{"name": "v", "emptyDir": {}}],
            "tolerations": [{"key": "k", "operator": "Exists"}]}});
    [
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "o", "finalizers": ["a/b", "c/d"]},
            "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": template}}),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "o", "labels": {"a": "b"}},
            "spec": {"ports": [{"port": 80, "protocol": "TCP"}, {"port": 80, "protocol": "UDP"}],
                "externalIPs": ["192.0.2.1"], "selector": {"app": "web"}}}),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "o"}, "data": {"a": "1", "b": "2"}}),
        json!({"apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": {"name": "o"}, "revision": 1,
            "data": {"spec": {"list": [1, {"a": null}]}}}),
    ]
}

fn type_for(object: &Value) -> &'static Type {
    let text = |key: &str| object[key].as_str().unwrap_or_default();
    let (group, version) = split_api_version(text("apiVersion"));
    type_of(group, version, text("kind")).expect("a known kind")
}

/// A patch in each format; the first byte chooses the object.
pub fn patches(input: &[u8]) {
    let Some((choice, body)) = input.split_first() else {
        return;
    };
    let Ok(patch) = codec::parse(body, MediaType::Json) else {
        return;
    };
    let objects = objects();
    let object = &objects[usize::from(*choice) % objects.len()];

    let mut patched = object.clone();
    match patch::json(&mut patched, &patch) {
        Ok(()) => outcome(patched),
        Err(_) => assert_eq!(patched, *object, "a patch that fails changes nothing"),
    }

    let mut patched = object.clone();
    if patch::merge(&mut patched, &patch).is_ok() {
        let once = patched.clone();
        assert_eq!(patch::merge(&mut patched, &patch), Ok(()));
        assert_eq!(patched, once, "the same again is no change");
        outcome(once);
    }

    let mut patched = object.clone();
    if patch::strategic(&mut patched, &patch, type_for(object)).is_ok() {
        outcome(patched);
    }
}

/// What a patch leaves is checked as a body is.
fn outcome(value: Value) {
    assert!(!codec::is_deeper_than(&value, 2 * DEPTH_MAX));
    if let Ok(decoded) = codec::validate(value, FieldValidation::Warn) {
        crate::documents::settled(&decoded.value);
    }
}

/// Configurations that two managers apply in turn, one a line; the first byte chooses the object, whether it is there before,
/// and whether they insist.
pub fn applies(input: &[u8]) {
    let Some((choice, lines)) = input.split_first() else {
        return;
    };
    let objects = objects();
    let object = &objects[usize::from(*choice) % objects.len()];
    let ty = type_for(object);
    let text = |key: &str| object[key].as_str().unwrap_or_default();
    let now = "2026-01-01T00:00:00Z";
    let mut live = None;
    if choice & 0x10 != 0 {
        let mut created = object.clone();
        let creator = Manager {
            name: "creator",
            subresource: "",
            now,
        };
        patch::track_update(None, &mut created, ty, creator);
        live = Some(created);
    }
    for (turn, line) in lines.split(|byte| *byte == b'\n').take(8).enumerate() {
        let (version, kind) = (text("apiVersion"), text("kind"));
        let warn = FieldValidation::Warn;
        let Ok(applied) = codec::decode(line, MediaType::Yaml, version, kind, warn) else {
            continue;
        };
        let mut applied = applied.value;
        if applied["apiVersion"] != version || applied["kind"] != kind {
            continue;
        }
        if !applied["metadata"].is_object() {
            applied["metadata"] = json!({});
        }
        applied["metadata"]["name"] = "o".into();
        let manager = Manager {
            name: ["first", "second"][turn % 2],
            subresource: "",
            now,
        };
        let force = choice & 0x20 != 0;
        let Ok(merged) = patch::apply(live.as_ref(), &applied, ty, manager, force) else {
            continue;
        };
        let again = patch::apply(Some(&merged), &applied, ty, manager, force);
        assert_eq!(again.as_ref(), Ok(&merged), "the same again is no change");
        let mut updated = merged.clone();
        patch::track_update(live.as_ref(), &mut updated, ty, manager);
        live = Some(merged);
    }
}
