//! Keeps the rules of aggregated ClusterRoles: those of all ClusterRoles that their selectors select.

use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use serde_json::json;

use super::labels::selector_matches;
use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Plan, View};
use super::snapshot::{Change, Snapshot};

pub const CONTROLLER: Controller = Controller {
    name: "clusterrole-aggregation",
    affected,
    plan,
};

/// Any role may belong to any aggregated one, before or after its change; there are few of those.
fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    if matches!(
        change.new.as_ref().or(change.old.as_ref()),
        Some(Object::ClusterRole(_))
    ) {
        let aggregated = snapshot
            .cluster_roles
            .iter()
            .filter(|(_, role)| role.aggregation_rule.is_some());
        keys.extend(aggregated.map(|(key, _)| key.clone()));
    }
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(role) = view.snapshot.cluster_roles.get(key) else {
        return plan;
    };
    if role.aggregation_rule.is_none() || role.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let rules = rules(view.snapshot, role);
    if role.rules.as_deref().unwrap_or_default() != rules {
        plan.push(Action::Patch {
            target: Target::of(&**role),
            subresource: None,
            body: json!({"rules": rules}),
        });
    }
    plan
}

/// The rules of all selected roles, each once, in the order of the roles' names.
fn rules(snapshot: &Snapshot, role: &ClusterRole) -> Vec<PolicyRule> {
    let selectors = role
        .aggregation_rule
        .iter()
        .flat_map(|rule| rule.cluster_role_selectors.iter().flatten());
    let selectors: Vec<_> = selectors.collect();
    let mut rules: Vec<PolicyRule> = Vec::new();
    for other in snapshot.cluster_roles.values() {
        let labels = other.metadata.labels.as_ref();
        let selected = selectors
            .iter()
            .any(|selector| selector_matches(selector, labels));
        if !selected || other.metadata.name == role.metadata.name {
            continue;
        }
        for rule in other.rules.iter().flatten() {
            if !rules.contains(rule) {
                rules.push(rule.clone());
            }
        }
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::super::testing::Cluster;
    use super::*;

    fn role(name: &str, label: &str, selects: &str, verbs: &[&str]) -> ClusterRole {
        let mut role = json!({"metadata": {"name": name, "labels": {label: "true"}}});
        if !selects.is_empty() {
            role["aggregationRule"] =
                json!({"clusterRoleSelectors": [{"matchLabels": {selects: "true"}}]});
        }
        let rules = verbs
            .iter()
            .map(|verb| json!({"verbs": [verb], "apiGroups": [""], "resources": ["pods"]}));
        role["rules"] = rules.collect();
        serde_json::from_value(role).unwrap()
    }

    fn verbs(cluster: &Cluster, name: &str) -> Vec<String> {
        let role = cluster
            .snapshot
            .cluster_roles
            .get(&Key::new("", name))
            .unwrap();
        role.rules
            .iter()
            .flatten()
            .flat_map(|rule| rule.verbs.clone())
            .collect()
    }

    #[test]
    fn an_aggregated_role_has_the_rules_of_what_it_selects() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.add(role("admin", "x", "to-admin", &[]));
        cluster.add(role("edit", "to-admin", "to-edit", &["stale"]));
        cluster.add(role("one", "to-edit", "", &["get", "list"]));
        cluster.settle();
        assert_eq!(verbs(&cluster, "edit"), ["get", "list"]);
        assert_eq!(verbs(&cluster, "admin"), ["get", "list"], "by way of edit");
        cluster.add(role("two", "to-edit", "", &["list", "watch"]));
        cluster.settle();
        assert_eq!(verbs(&cluster, "admin"), ["get", "list", "watch"]);
        cluster.edit(&Key::new("", "one"), |role: &mut ClusterRole| {
            role.metadata.labels = None
        });
        cluster.settle();
        assert_eq!(verbs(&cluster, "admin"), ["list", "watch"]);
    }
}
