use proptest::prelude::*;

use super::*;
use crate::registry::type_of;

fn deployment() -> &'static Type {
    type_of("apps", "v1", "Deployment").unwrap()
}

fn by(name: &str) -> Manager<'_> {
    Manager {
        name,
        subresource: "",
        now: "2026-01-01T00:00:00Z",
    }
}

fn object(spec: Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "labels": {"app": "d"}}, "spec": spec})
}

fn containers(list: Value) -> Value {
    object(json!({"template": {"spec": {"containers": list}}}))
}

fn applied(live: Option<&Value>, config: &Value, name: &str) -> Value {
    apply(live, config, deployment(), by(name), false).unwrap()
}

#[test]
fn the_first_apply_creates_and_owns_what_it_says() {
    let created = applied(
        None,
        &containers(json!([{"name": "a", "image": "x", "ports": [{"containerPort": 80}]}])),
        "kubectl",
    );
    let entry = &created["metadata"]["managedFields"][0];
    assert_eq!(
        (&entry["manager"], &entry["operation"], &entry["fieldsType"]),
        (&json!("kubectl"), &json!("Apply"), &json!("FieldsV1"))
    );
    assert_eq!(
        entry["fieldsV1"],
        json!({
            "f:metadata": {"f:labels": {"f:app": {}}},
            "f:spec": {"f:template": {"f:spec": {"f:containers": {"k:{\"name\":\"a\"}": {
                ".": {}, "f:name": {}, "f:image": {},
                "f:ports": {"k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}},
            }}}}},
        })
    );
}

#[test]
fn applying_the_same_again_changes_nothing_not_even_the_time() {
    let config = object(json!({"replicas": 2}));
    let live = applied(None, &config, "kubectl");
    let again = apply(
        Some(&live),
        &config,
        deployment(),
        Manager {
            now: "2027-01-01T00:00:00Z",
            ..by("kubectl")
        },
        false,
    );
    assert_eq!(again.unwrap(), live);
}

#[test]
fn fields_given_up_go_unless_another_manager_has_them() {
    let live = applied(
        None,
        &object(json!({"replicas": 2, "paused": true, "minReadySeconds": 5})),
        "a",
    );
    let live = applied(Some(&live), &object(json!({"paused": true})), "b");
    let after = applied(Some(&live), &object(json!({"replicas": 2})), "a");
    assert_eq!(after["spec"], json!({"replicas": 2, "paused": true}));
}

#[test]
fn items_of_keyed_lists_merge_and_go_by_key() {
    let live = applied(
        None,
        &containers(json!([{"name": "a", "image": "1"}, {"name": "b", "image": "1"}])),
        "a",
    );
    let live = applied(
        Some(&live),
        &containers(json!([{"name": "b", "tty": true}])),
        "b",
    );
    let after = applied(
        Some(&live),
        &containers(json!([{"name": "a", "image": "2"}])),
        "a",
    );
    assert_eq!(
        after["spec"]["template"]["spec"]["containers"],
        json!([{"name": "a", "image": "2"}, {"name": "b", "tty": true}])
    );
}

#[test]
fn another_managers_field_is_a_conflict_unless_the_value_is_the_same_or_force_is_set() {
    let live = applied(None, &object(json!({"replicas": 2})), "a");
    let shared = applied(Some(&live), &object(json!({"replicas": 2})), "b");
    assert_eq!(
        shared["metadata"]["managedFields"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    let conflict = apply(
        Some(&live),
        &object(json!({"replicas": 3})),
        deployment(),
        by("b"),
        false,
    )
    .unwrap_err();
    assert_eq!(
        conflict.to_string(),
        "Apply failed with 1 conflict: conflict with \"a\": .spec.replicas"
    );
    let forced = apply(
        Some(&live),
        &object(json!({"replicas": 3})),
        deployment(),
        by("b"),
        true,
    )
    .unwrap();
    assert_eq!(forced["spec"]["replicas"], 3);
    let owner = |name: &str| {
        let list = forced["metadata"]["managedFields"].as_array().unwrap();
        list.iter().find(|e| e["manager"] == name).unwrap()["fieldsV1"].clone()
    };
    assert_eq!(
        owner("a"),
        json!({"f:metadata": {"f:labels": {"f:app": {}}}})
    );
    assert_eq!(owner("b")["f:spec"], json!({"f:replicas": {}}));
}

#[test]
fn several_conflicts_are_listed_by_manager() {
    let live = applied(
        None,
        &containers(json!([{"name": "a", "image": "1", "tty": true}])),
        "x",
    );
    let error = apply(
        Some(&live),
        &containers(json!([{"name": "a", "image": "2", "tty": false}])),
        deployment(),
        by("y"),
        false,
    );
    assert_eq!(
        error.unwrap_err().to_string(),
        "Apply failed with 2 conflicts: conflicts with \"x\":\n- .spec.template.spec.containers[name=\"a\"].image\n\
         - .spec.template.spec.containers[name=\"a\"].tty"
    );
}

#[test]
fn updates_take_the_fields_they_change_and_an_update_and_an_apply_by_one_name_are_two_managers() {
    let live = applied(
        None,
        &object(json!({"replicas": 2, "paused": true})),
        "kubectl",
    );
    let mut scaled = live.clone();
    scaled["spec"]["replicas"] = 5.into();
    track_update(Some(&live), &mut scaled, deployment(), by("kubectl"));
    let entries = scaled["metadata"]["managedFields"].as_array().unwrap();
    assert_eq!(entries[0]["fieldsV1"]["f:spec"], json!({"f:paused": {}}));
    assert_eq!(
        (&entries[1]["operation"], &entries[1]["fieldsV1"]),
        (&json!("Update"), &json!({"f:spec": {"f:replicas": {}}}))
    );
    let conflict = apply(
        Some(&scaled),
        &object(json!({"replicas": 2})),
        deployment(),
        by("kubectl"),
        false,
    );
    assert!(matches!(conflict, Err(PatchError::Conflict(_))));
}

#[test]
fn an_update_without_effect_keeps_managed_fields_and_a_removed_field_has_no_manager() {
    let mut live = object(json!({"replicas": 2, "paused": true}));
    track_update(None, &mut live, deployment(), by("a"));
    let mut same = live.clone();
    same["metadata"]
        .as_object_mut()
        .unwrap()
        .remove("managedFields");
    track_update(
        Some(&live),
        &mut same,
        deployment(),
        Manager {
            now: "2027-01-01T00:00:00Z",
            ..by("b")
        },
    );
    assert_eq!(same, live);
    let mut without = live.clone();
    without["spec"].as_object_mut().unwrap().remove("paused");
    track_update(Some(&live), &mut without, deployment(), by("b"));
    assert_eq!(
        without["metadata"]["managedFields"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(
        without["metadata"]["managedFields"][0]["fieldsV1"]["f:spec"],
        json!({"f:replicas": {}})
    );
    let mut reset = live.clone();
    reset["metadata"]["managedFields"] = json!([{}]);
    track_update(Some(&live), &mut reset, deployment(), by("b"));
    assert!(reset["metadata"].get("managedFields").is_none());
}

#[test]
fn subresources_are_managers_of_their_own() {
    let live = applied(None, &object(json!({"replicas": 2})), "a");
    let mut status = live.clone();
    status["status"] =
        json!({"replicas": 2, "conditions": [{"type": "Available", "status": "True"}]});
    track_update(
        Some(&live),
        &mut status,
        deployment(),
        Manager {
            subresource: "status",
            ..by("a")
        },
    );
    let entry = &status["metadata"]["managedFields"][1];
    assert_eq!(entry["subresource"], "status");
    assert_eq!(
        entry["fieldsV1"]["f:status"],
        json!({"f:replicas": {}, "f:conditions": {"k:{\"type\":\"Available\"}": {".": {}, "f:type": {}, "f:status": {}}}})
    );
}

#[test]
fn an_apply_must_name_its_manager_and_bring_no_managed_fields() {
    let config = object(json!({}));
    assert!(matches!(
        apply(None, &config, deployment(), by(""), false),
        Err(PatchError::Invalid(_))
    ));
    let live = applied(None, &config, "a");
    assert!(matches!(
        apply(None, &live, deployment(), by("a"), false),
        Err(PatchError::Invalid(_))
    ));
}

fn spec() -> impl Strategy<Value = Value> {
    let container =
        ("[abc]", prop::option::of("[xyz]"), any::<bool>()).prop_map(|(name, image, tty)| {
            let mut out = json!({"name": name, "tty": tty});
            if let Some(image) = image {
                out["image"] = image.into();
            }
            out
        });
    let list = prop::collection::vec(container, 0..3).prop_map(|mut list| {
        let mut seen = Vec::new();
        list.retain(|c: &Value| {
            let new = !seen.contains(&c["name"]);
            seen.push(c["name"].clone());
            new
        });
        list
    });
    (prop::option::of(0..3i32), list).prop_map(|(replicas, containers)| {
        let mut out = json!({"template": {"spec": {"hostname": "h"}}});
        if let Some(replicas) = replicas {
            out["replicas"] = replicas.into();
        }
        if !containers.is_empty() {
            out["template"]["spec"]["containers"] = containers.into();
        }
        out
    })
}

proptest! {
    #[test]
    fn what_is_applied_is_there_and_applying_twice_is_applying_once(first in spec(), second in spec(), third in spec()) {
        let live = applied(None, &object(first), "a");
        let live = apply(Some(&live), &object(second), deployment(), by("b"), true).unwrap();
        let config = object(third);
        let once = apply(Some(&live), &config, deployment(), by("a"), true).unwrap();
        prop_assert!(typed::changed(Some(&once), &config, Kind::Struct(deployment())).is_empty());
        prop_assert_eq!(apply(Some(&once), &config, deployment(), by("a"), false).unwrap(), once);
    }

    /// Most writes change nothing of it, and are looked at in a quicker way: it is to say what the whole way says.
    #[test]
    fn managed_fields_that_stay_are_those_that_would_be_made(first in spec(), second in spec(), third in spec(), own in any::<bool>()) {
        let kind = Kind::Struct(deployment());
        let mut live = object(first);
        track_update(None, &mut live, deployment(), by("a"));
        let mut second = object(second);
        track_update(Some(&live), &mut second, deployment(), by("b"));
        let manager = Manager { now: "2030-01-01T00:00:00Z", ..by(if own { "b" } else { "a" }) };
        let mut quick = object(third);
        let mut whole = quick.clone();
        track_update(Some(&second), &mut quick, deployment(), manager);
        let changed = managed(typed::changed(Some(&second), &whole, kind));
        let mut gone = managed(typed::changed(None, &second, kind));
        gone.subtract(&managed(typed::changed(None, &whole, kind)));
        prop_assert_eq!(&managed(typed::gone(&second, Some(&whole), kind)), &gone);
        track(Some(&second), &mut whole, manager, (changed, gone));
        prop_assert_eq!(&quick, &whole);
        // Once more with other values, as controllers do.
        let mut again = quick.clone();
        again["spec"]["template"]["spec"]["hostname"] = "other".into();
        track_update(Some(&quick), &mut again, deployment(), manager);
        let mut more = again.clone();
        more["spec"]["template"]["spec"]["hostname"] = "more".into();
        let before = more.clone();
        track_update(Some(&again), &mut more, deployment(), manager);
        prop_assert_eq!(more, before);
    }

    #[test]
    fn field_sets_survive_being_written(first in spec()) {
        let set = typed::changed(None, &object(first), Kind::Struct(deployment()));
        prop_assert_eq!(Set::parse(&set.render()), set);
    }
}

#[test]
fn kubectl_takes_over_what_it_applied_itself_and_nothing_else() {
    let config = object(json!({"replicas": 2, "paused": true}));
    let mut live = config.clone();
    live["metadata"]["annotations"] =
        json!({"kubectl.kubernetes.io/last-applied-configuration": config.to_string()});
    track_update(
        None,
        &mut live,
        deployment(),
        by("kubectl-client-side-apply"),
    );
    let wanted = object(json!({"replicas": 3, "paused": true}));
    let conflict = apply(Some(&live), &wanted, deployment(), by("other"), false);
    assert_eq!(
        conflict.expect_err("another manager").to_string(),
        "Apply failed with 1 conflict: conflict with \"kubectl-client-side-apply\" using apps/v1: .spec.replicas"
    );
    let after = applied(Some(&live), &wanted, "kubectl");
    assert_eq!(after["spec"]["replicas"], 3);
    let kept =
        &after["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"];
    assert!(
        kept.as_str()
            .is_some_and(|text| text.contains(r#""replicas":3"#)),
        "{kept}"
    );
    // Somebody scaled it since: that is theirs.
    let mut scaled = live.clone();
    scaled["spec"]["replicas"] = 7.into();
    track_update(Some(&live), &mut scaled, deployment(), by("hpa"));
    let conflict = apply(Some(&scaled), &wanted, deployment(), by("kubectl"), false);
    assert_eq!(
        conflict.expect_err("scaled").to_string(),
        "Apply failed with 1 conflict: conflict with \"hpa\" using apps/v1: .spec.replicas"
    );
}

#[test]
fn items_that_nobody_could_tell_apart_are_refused() {
    let twice = containers(json!([{"name": "a", "image": "x"}, {"name": "a"}]));
    let refused = apply(None, &twice, deployment(), by("kubectl"), false);
    assert_eq!(
        refused.expect_err("refused").to_string(),
        "failed to create typed patch object (/d; apps/v1, Kind=Deployment): .spec.template.spec.containers: duplicate entries for key [name=\"a\"]"
    );
}

#[test]
fn what_somebody_wants_empty_stays_when_the_last_in_it_goes() {
    let full = object(json!({"replicas": 3, "template": {}}));
    let live = applied(None, &full, "first");
    let bare = object(json!({}));
    let given_up = applied(Some(&live), &bare, "first");
    assert_eq!(given_up["spec"], json!({}));
    assert_eq!(applied(Some(&given_up), &bare, "first"), given_up);

    let shared = applied(
        Some(&live),
        &object(json!({"template": {"spec": {}}})),
        "second",
    );
    let without = applied(Some(&shared), &object(json!({"replicas": 3})), "first");
    assert_eq!(without["spec"]["template"], json!({"spec": {}}));
}
