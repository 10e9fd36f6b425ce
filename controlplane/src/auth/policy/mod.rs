//! The roles and bindings that every cluster has from its first moment: those of Kubernetes v1.36, and those of our own
//! parts. Tools, charts and users rely on their names and rights.

mod components;
mod controllers;
mod users;

use serde_json::{Value, json};

use super::rbac::{GROUP, Rule};
use crate::registry::Resource;

/// The user that our controllers authenticate as.
pub const CONTROLLERS: &str = "system:keelway-controllers";
/// An object with this annotation set to `false` is left to its owner.
pub const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";

const READ: &str = "get list watch";
const WRITE: &str = "create update patch delete deletecollection";
const READ_WRITE: &str = "get list watch create update patch delete deletecollection";

/// One rule, as words: verbs, groups (`core` for the one without a name), resources, names; or verbs and paths.
#[derive(Clone, Copy)]
enum Row {
    On(&'static str, &'static str, &'static str, &'static str),
    Paths(&'static str, &'static str),
}

const fn on(verbs: &'static str, groups: &'static str, resources: &'static str) -> Row {
    Row::On(verbs, groups, resources, "")
}

const EVENTS: Row = on("create update patch", "core events.k8s.io", "events");

impl Row {
    fn rule(self) -> Rule {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        match self {
            Self::On(verbs, groups, resources, names) => Rule {
                verbs: words(verbs),
                api_groups: groups
                    .split_whitespace()
                    .map(|group| if group == "core" { "" } else { group }.to_owned())
                    .collect(),
                resources: words(resources),
                resource_names: words(names),
                non_resource_urls: Vec::new(),
            },
            Self::Paths(verbs, paths) => Rule {
                verbs: words(verbs),
                non_resource_urls: words(paths),
                ..Rule::default()
            },
        }
    }
}

/// A ClusterRole of the table.
struct Role {
    name: &'static str,
    rows: &'static [Row],
    /// The role (`admin`, `edit`, `view`) that takes over its rules.
    joins: Option<&'static str>,
}

const fn role(name: &'static str, rows: &'static [Row]) -> Role {
    Role {
        name,
        rows,
        joins: None,
    }
}

/// What is to be there, as objects of rbac.authorization.k8s.io/v1, with the plural and namespace of each.
pub struct Bootstrapped {
    pub plural: &'static str,
    pub namespace: Option<&'static str>,
    pub object: Value,
}

/// Everything, in an order in which it can be created.
pub fn defaults(served: &[&'static Resource]) -> Vec<Bootstrapped> {
    let mut all = Vec::new();
    for aggregated in users::AGGREGATED {
        let label = |name: &str| format!("rbac.authorization.k8s.io/aggregate-to-{name}");
        let mut object = object("ClusterRole", aggregated.name);
        object["aggregationRule"] = json!({"clusterRoleSelectors":
            [{"matchLabels": {label(aggregated.name): "true"}}]});
        if let Some(joins) = aggregated.joins {
            object["metadata"]["labels"][label(joins)] = "true".into();
        }
        all.push(cluster("clusterroles", object));
    }
    for table in [users::ROLES, components::ROLES] {
        all.extend(table.iter().map(cluster_role));
    }
    for (name, rows) in controllers::ROLES {
        let full = format!("system:controller:{name}");
        all.push(cluster(
            "clusterroles",
            with_rules(object("ClusterRole", &full), rows),
        ));
        let subject = account("kube-system", name);
        all.push(cluster(
            "clusterrolebindings",
            binding("ClusterRole", &full, vec![subject]),
        ));
    }
    let mut own = object("ClusterRole", CONTROLLERS);
    own["rules"] = json!(controllers::own(served));
    all.push(cluster("clusterroles", own));
    let user = json!({"apiGroup": GROUP, "kind": "User", "name": CONTROLLERS});
    all.push(cluster(
        "clusterrolebindings",
        binding("ClusterRole", CONTROLLERS, vec![user]),
    ));
    for (role, kind, names) in users::BINDINGS.iter().chain(components::BINDINGS) {
        let subjects = names
            .iter()
            .map(|name| match *kind {
                "ServiceAccount" => account("kube-system", name),
                kind => json!({"apiGroup": GROUP, "kind": kind, "name": name}),
            })
            .collect();
        all.push(cluster(
            "clusterrolebindings",
            binding("ClusterRole", role, subjects),
        ));
    }
    for &(namespace, name, rows, bound, users, accounts) in components::NAMESPACED {
        let place = |plural, object| Bootstrapped {
            plural,
            namespace: Some(namespace),
            object,
        };
        all.push(place("roles", with_rules(object("Role", name), rows)));
        let users = users
            .iter()
            .map(|name| json!({"apiGroup": GROUP, "kind": "User", "name": name}));
        let subjects = users
            .chain(accounts.iter().map(|name| account("kube-system", name)))
            .collect();
        let mut binding = binding("Role", name, subjects);
        binding["kind"] = "RoleBinding".into();
        binding["metadata"]["name"] = bound.into();
        all.push(place("rolebindings", binding));
    }
    all
}

/// What every node may do with what belongs to its pods or to itself; the Node authorizer sees to that.
pub fn node_rules() -> Vec<Rule> {
    let reads = on(READ, "core", "nodes pods");
    components::NODE
        .iter()
        .chain([&reads])
        .map(|row| row.rule())
        .collect()
}

fn cluster(plural: &'static str, object: Value) -> Bootstrapped {
    Bootstrapped {
        plural,
        namespace: None,
        object,
    }
}

fn object(kind: &str, name: &str) -> Value {
    json!({"apiVersion": format!("{GROUP}/v1"), "kind": kind, "metadata": {"name": name,
        "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}, "annotations": {AUTOUPDATE: "true"}}})
}

fn with_rules(mut role: Value, rows: &[Row]) -> Value {
    let rules: Vec<Rule> = rows.iter().map(|row| row.rule()).collect();
    // A role of no rules has no list, as its protobuf form has none.
    if !rules.is_empty() {
        role["rules"] = json!(rules);
    }
    role
}

fn cluster_role(role: &Role) -> Bootstrapped {
    let mut object = with_rules(object("ClusterRole", role.name), role.rows);
    if let Some(joins) = role.joins {
        let label = format!("rbac.authorization.k8s.io/aggregate-to-{joins}");
        object["metadata"]["labels"][label] = "true".into();
    }
    cluster("clusterroles", object)
}

/// A binding with the role's own name.
fn binding(kind: &str, role: &str, subjects: Vec<Value>) -> Value {
    let mut binding = object("ClusterRoleBinding", role);
    binding["roleRef"] = json!({"apiGroup": GROUP, "kind": kind, "name": role});
    // A binding of nobody has no list, as its protobuf form has none.
    if !subjects.is_empty() {
        binding["subjects"] = subjects.into();
    }
    binding
}

fn account(namespace: &str, name: &str) -> Value {
    json!({"kind": "ServiceAccount", "namespace": namespace, "name": name})
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::auth::rbac::{Index, covers};
    use crate::registry;

    fn all() -> Vec<Bootstrapped> {
        let served: Vec<&'static Resource> = registry::resources().iter().collect();
        defaults(&served)
    }

    fn name(default: &Bootstrapped) -> &str {
        default.object["metadata"]["name"].as_str().unwrap()
    }

    fn rules(name_wanted: &str) -> Vec<Rule> {
        let found = all()
            .into_iter()
            .find(|d| d.plural == "clusterroles" && name(d) == name_wanted);
        serde_json::from_value(found.unwrap().object["rules"].take()).unwrap()
    }

    #[test]
    fn every_binding_has_its_role_and_no_object_is_there_twice() {
        let all = all();
        let roles: BTreeSet<(Option<&str>, &str)> = all
            .iter()
            .filter(|d| d.plural.ends_with("roles"))
            .map(|d| (d.namespace, name(d)))
            .collect();
        for binding in all.iter().filter(|d| d.plural.ends_with("bindings")) {
            let role = binding.object["roleRef"]["name"].as_str().unwrap();
            assert!(roles.contains(&(binding.namespace, role)), "{role}");
        }
        let mut seen = BTreeSet::new();
        for default in &all {
            assert!(
                seen.insert((default.plural, default.namespace, name(default))),
                "{} twice",
                name(default)
            );
        }
    }

    #[test]
    fn rules_name_resources_that_are_there() {
        // Of groups that others serve, and parts that only exist as a right.
        let elsewhere = [
            "metrics.k8s.io",
            "custom.metrics.k8s.io",
            "external.metrics.k8s.io",
            "extensions",
        ];
        let rights = [
            "restricted",
            "finalizers",
            "nodeclient",
            "selfnodeclient",
            "metrics",
            "stats",
            "log",
            "spec",
            "configz",
            "healthz",
            "pods",
            "rollback",
        ];
        for default in all() {
            let rules: Vec<Rule> =
                serde_json::from_value(default.object.get("rules").cloned().unwrap_or(json!([])))
                    .unwrap();
            for rule in rules {
                for (group, resource) in rule
                    .api_groups
                    .iter()
                    .flat_map(|group| rule.resources.iter().map(move |resource| (group, resource)))
                {
                    let (plural, part) = resource.split_once('/').unwrap_or((resource, ""));
                    let known = group == "*"
                        || plural == "*"
                        || elsewhere.contains(&group.as_str())
                        || plural == "signers"
                        || rights.contains(&part)
                        || registry::resources().iter().any(|r| {
                            r.group == group
                                && r.plural == plural
                                && (part.is_empty() || r.subresource(part).is_some())
                        });
                    assert!(known, "{}: {resource} in {group:?}", name(&default));
                }
            }
        }
    }

    #[test]
    fn a_viewer_reads_neither_secrets_nor_roles_and_an_editor_gives_no_rights() {
        let (view, edit) = (
            rules("system:aggregate-to-view"),
            rules("system:aggregate-to-edit"),
        );
        let on = |verb: &str, group: &str, resource: &str| Rule {
            verbs: vec![verb.to_owned()],
            api_groups: vec![group.to_owned()],
            resources: vec![resource.to_owned()],
            ..Rule::default()
        };
        for secret in [
            on("get", "", "secrets"),
            on("get", "", "pods/exec"),
            on("list", GROUP, "roles"),
        ] {
            assert!(covers(&view, &[secret]).is_err());
        }
        assert_eq!(covers(&edit, &[on("get", "", "secrets")]), Ok(()));
        for right in [
            on("create", GROUP, "rolebindings"),
            on("create", "discovery.k8s.io", "endpointslices"),
            on("update", "", "resourcequotas"),
        ] {
            assert!(covers(&edit, &[right]).is_err());
        }
    }

    #[test]
    fn bindings_give_the_rights_to_those_they_name() {
        let mut index = Index::default();
        for default in all() {
            let (place, name) = (default.namespace.unwrap_or(""), name(&default).to_owned());
            let bytes = default.object.to_string();
            match default.plural {
                "roles" | "clusterroles" => index.set_role(place, &name, Some(bytes.as_bytes())),
                _ => index.set_binding(place, &name, Some(bytes.as_bytes())),
            }
        }
        let caller = |user: &str, groups: &[&str]| crate::auth::Identity {
            user: user.to_owned(),
            groups: groups.iter().map(|g| (*g).to_owned()).collect(),
            ..Default::default()
        };
        let jane = caller("jane", &["system:authenticated"]);
        let scheduler = caller("system:kube-scheduler", &["system:authenticated"]);
        let path = |path| crate::auth::Attributes::path("get", path);
        assert!(index.allows(&jane, &path("/apis/apps/v1")));
        assert!(!index.allows(&jane, &path("/metrics")));
        let asked = |verb, resource, namespace, name| {
            crate::auth::Attributes::resource(
                verb,
                crate::auth::Resource {
                    resource,
                    namespace,
                    name,
                    ..Default::default()
                },
            )
        };
        assert!(index.allows(&scheduler, &asked("list", "pods", "", "")));
        assert!(!index.allows(&scheduler, &asked("list", "secrets", "", "")));
        assert!(!index.allows(&jane, &asked("list", "pods", "a", "")));
        let controllers = caller(CONTROLLERS, &["system:authenticated"]);
        assert!(index.allows(&controllers, &asked("patch", "secrets", "a", "x")));
        let exec = crate::auth::Resource {
            resource: "pods",
            subresource: "exec",
            namespace: "a",
            name: "x",
            ..Default::default()
        };
        for verb in ["get", "create", "patch"] {
            assert!(!index.allows(&controllers, &crate::auth::Attributes::resource(verb, exec)));
        }
    }
}
