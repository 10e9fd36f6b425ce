//! The index against a model that reads every object anew for each question.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::auth::{Attributes, Identity, Resource};

fn rule(value: Value) -> Rule {
    serde_json::from_value(value).unwrap()
}

fn on<'a>(verb: &'a str, resource: &'a str, namespace: &'a str, name: &'a str) -> Attributes<'a> {
    let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    let (resource, group) = resource.split_once('.').unwrap_or((resource, ""));
    Attributes::resource(
        verb,
        Resource {
            group,
            resource,
            subresource,
            namespace,
            name,
            ..Resource::default()
        },
    )
}

#[test]
fn a_rule_names_verbs_groups_resources_and_objects() {
    let table = [
        (
            json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}),
            on("get", "pods", "a", "x"),
            true,
        ),
        (
            json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}),
            on("list", "pods", "a", ""),
            false,
        ),
        (
            json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}),
            on("get", "pods.apps", "a", "x"),
            false,
        ),
        (
            json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}),
            on("get", "pods/log", "a", "x"),
            false,
        ),
        (
            json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods/log"]}),
            on("get", "pods/log", "a", "x"),
            true,
        ),
        (
            json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods/log"]}),
            on("get", "pods", "a", "x"),
            false,
        ),
        (
            json!({"verbs": ["get"], "apiGroups": ["*"], "resources": ["*/scale"]}),
            on("get", "deployments.apps/scale", "a", "x"),
            true,
        ),
        (
            json!({"verbs": ["get"], "apiGroups": ["*"], "resources": ["*/scale"]}),
            on("get", "scale", "a", "x"),
            false,
        ),
        (
            json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}),
            on("proxy", "nodes/proxy", "", "n"),
            true,
        ),
        (
            json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["x"]}),
            on("get", "pods", "a", "x"),
            true,
        ),
        (
            json!({"verbs": ["*"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["x"]}),
            on("list", "pods", "a", ""),
            false,
        ),
        (
            json!({"verbs": ["*"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["x"]}),
            on("create", "pods", "a", ""),
            false,
        ),
        (
            json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}),
            Attributes::path("get", "/metrics"),
            false,
        ),
        (
            json!({"verbs": ["get"], "nonResourceURLs": ["/metrics"]}),
            Attributes::path("get", "/metrics"),
            true,
        ),
        (
            json!({"verbs": ["get"], "nonResourceURLs": ["/metrics"]}),
            Attributes::path("get", "/metrics/x"),
            false,
        ),
        (
            json!({"verbs": ["get"], "nonResourceURLs": ["/api/*"]}),
            Attributes::path("get", "/api/v1"),
            true,
        ),
        (
            json!({"verbs": ["get"], "nonResourceURLs": ["/api/*"]}),
            Attributes::path("get", "/api"),
            false,
        ),
        (
            json!({"verbs": ["get"], "nonResourceURLs": ["*"]}),
            Attributes::path("post", "/api"),
            false,
        ),
        (
            json!({"verbs": null, "nonResourceURLs": ["*"]}),
            Attributes::path("get", "/api"),
            false,
        ),
    ];
    for (value, asked, expected) in table {
        assert_eq!(
            rule(value.clone()).allows(&asked),
            expected,
            "{value} {asked}"
        );
    }
}

#[test]
fn nobody_gives_what_they_do_not_hold() {
    let held = [
        rule(json!({"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"]})),
        rule(json!({"verbs": ["watch"], "apiGroups": [""], "resources": ["pods", "*/scale"]})),
        rule(
            json!({"verbs": ["get"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": ["a", "b"]}),
        ),
        rule(json!({"verbs": ["get"], "nonResourceURLs": ["/api/*"]})),
    ];
    let spread = rule(json!({"verbs": ["get", "watch"], "apiGroups": [""], "resources": ["pods"]}));
    assert_eq!(covers(&held, &[spread]), Ok(()));
    for held_too in [
        json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["x"]}),
        json!({"verbs": ["get"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": ["b"]}),
        json!({"verbs": ["watch"], "apiGroups": [""], "resources": ["replicationcontrollers/scale"]}),
        json!({"verbs": ["get"], "nonResourceURLs": ["/api/v1", "/api/*"]}),
    ] {
        assert_eq!(
            covers(&held, &[rule(held_too.clone())]),
            Ok(()),
            "{held_too}"
        );
    }
    for more in [
        json!({"verbs": ["*"], "apiGroups": [""], "resources": ["pods"]}),
        json!({"verbs": ["get"], "apiGroups": ["*"], "resources": ["pods"]}),
        json!({"verbs": ["get"], "apiGroups": [""], "resources": ["*"]}),
        json!({"verbs": ["get"], "apiGroups": [""], "resources": ["secrets"]}),
        json!({"verbs": ["get"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": ["c"]}),
        json!({"verbs": ["get"], "nonResourceURLs": ["/apis"]}),
        json!({"verbs": ["get"], "nonResourceURLs": ["*"]}),
    ] {
        assert!(covers(&held, &[rule(more.clone())]).is_err(), "{more}");
    }
    let refused =
        rule(json!({"verbs": ["get", "create"], "apiGroups": [""], "resources": ["pods"]}));
    assert_eq!(
        covers(&held, &[refused]).unwrap_err().to_string(),
        r#"{APIGroups:[""], Resources:["pods"], Verbs:["create"]}"#
    );
    let many: Vec<String> = (0..400).map(|i| format!("r{i}")).collect();
    let huge = rule(json!({"verbs": many, "apiGroups": [""], "resources": many}));
    assert_eq!(covers(&held, &[huge]), Err(NotHeld::TooMany));
}

/// The objects, by (kind, namespace, name).
type Objects = BTreeMap<(&'static str, String, String), Value>;

/// The question asked of the objects themselves.
fn model(objects: &Objects, caller: &Identity, asked: &Attributes<'_>, namespace: &str) -> bool {
    objects.iter().any(|((kind, place, _), binding)| {
        let in_force = match *kind {
            "clusterrolebindings" => true,
            "rolebindings" => place == namespace,
            _ => false,
        };
        let given = |subject: &Value| match subject["kind"].as_str() {
            Some("User") => subject["name"] == caller.user.as_str(),
            Some("Group") => caller
                .groups
                .iter()
                .any(|group| subject["name"] == group.as_str()),
            _ => {
                let of = subject["namespace"].as_str().unwrap_or(place);
                let name = subject["name"].as_str().unwrap_or_default();
                caller.user == format!("system:serviceaccount:{of}:{name}")
            }
        };
        if !in_force || !binding["subjects"].as_array().unwrap().iter().any(given) {
            return false;
        }
        let role_place = match binding["roleRef"]["kind"].as_str() {
            Some("Role") => ("roles", place.clone()),
            _ => ("clusterroles", String::new()),
        };
        let name = binding["roleRef"]["name"].as_str().unwrap().to_owned();
        let role = objects.get(&(role_place.0, role_place.1, name));
        role.is_some_and(|role| {
            role["rules"]
                .as_array()
                .unwrap()
                .iter()
                .any(|value| rule(value.clone()).allows(asked))
        })
    })
}

fn some_rule() -> impl Strategy<Value = Value> {
    let verbs = prop::sample::subsequence(vec!["get", "list", "*"], 1..=2);
    let resources = prop::sample::subsequence(vec!["pods", "secrets", "*", "pods/log"], 1..=2);
    let names = prop::sample::subsequence(vec!["x", "y"], 0..=1);
    (verbs, resources, names).prop_map(|(verbs, resources, names)| {
        json!({"verbs": verbs, "apiGroups": [""], "resources": resources, "resourceNames": names})
    })
}

fn some_object() -> impl Strategy<Value = ((&'static str, String, String), Option<Value>)> {
    let kind = prop::sample::select(vec![
        "roles",
        "clusterroles",
        "rolebindings",
        "clusterrolebindings",
    ]);
    let place = prop::sample::select(vec!["a", "b"]);
    let name = prop::sample::select(vec!["one", "two"]);
    let rules = prop::collection::vec(some_rule(), 0..3);
    let subject = prop::sample::select(vec![
        json!({"kind": "User", "name": "jane"}),
        json!({"kind": "Group", "name": "team"}),
        json!({"kind": "ServiceAccount", "name": "robot", "namespace": "a"}),
        json!({"kind": "ServiceAccount", "name": "robot"}),
        json!({"kind": "User", "name": "joe"}),
    ]);
    let subjects = prop::collection::vec(subject, 0..3);
    let role = (
        prop::sample::select(vec!["Role", "ClusterRole"]),
        prop::sample::select(vec!["one", "two"]),
    );
    (kind, place, name, rules, subjects, role, 0..5).prop_map(
        |(kind, place, name, rules, mut subjects, (role_kind, role), gone)| {
            let cluster = kind.starts_with("cluster");
            if cluster {
                // Validation asks for the namespace there.
                subjects.retain(|s| s["kind"] != "ServiceAccount" || s.get("namespace").is_some());
            }
            let role_kind = if cluster { "ClusterRole" } else { role_kind };
            let object = json!({"metadata": {"name": name}, "rules": rules, "subjects": subjects,
                "roleRef": {"kind": role_kind, "name": role}});
            let place = if cluster { "" } else { place };
            (
                (kind, place.to_owned(), name.to_owned()),
                Some(object).filter(|_| gone > 0),
            )
        },
    )
}

proptest! {
    #[test]
    fn the_index_answers_as_the_objects_themselves(changes in prop::collection::vec(some_object(), 0..30)) {
        let mut index = Index::default();
        let mut objects = Objects::new();
        for ((kind, place, name), object) in changes {
            let bytes = object.as_ref().map(Value::to_string);
            let bytes = bytes.as_deref().map(str::as_bytes);
            match kind {
                "roles" | "clusterroles" => index.set_role(&place, &name, bytes),
                _ => index.set_binding(&place, &name, bytes),
            }
            match object {
                Some(object) => objects.insert((kind, place, name), object),
                None => objects.remove(&(kind, place, name)),
            };
        }
        let callers = [("jane", vec![]), ("joe", vec!["team"]), ("system:serviceaccount:a:robot", vec![]),
            ("system:serviceaccount:b:robot", vec!["team"]), ("nobody", vec!["system:masters"])];
        for (user, groups) in callers {
            let caller = Identity { user: user.into(), groups: groups.iter().map(|g| (*g).to_owned()).collect(), ..Identity::default() };
            for verb in ["get", "list", "delete"] {
                for resource in ["pods", "secrets", "pods/log"] {
                    for namespace in ["", "a", "b"] {
                        for name in ["", "x", "z"] {
                            let asked = on(verb, resource, namespace, name);
                            let expected = caller.is_master() || model(&objects, &caller, &asked, namespace);
                            prop_assert_eq!(index.allows(&caller, &asked), expected, "{} {}", user, asked);
                            let held = index.rules(&caller, namespace).iter().any(|rule| rule.allows(&asked));
                            prop_assert_eq!(held, model(&objects, &caller, &asked, namespace));
                        }
                    }
                }
            }
        }
    }
}
