//! Roles and their bindings.

use serde_json::{Value, json};

use super::place::Place;
use super::{Errors, NameRule, Strategy};
use crate::api::fields::Fields;
use crate::api::status::FieldError;

const GROUP: &str = "rbac.authorization.k8s.io";

pub struct Role;

impl Strategy for Role {
    fn creates_on_update(&self) -> bool {
        true
    }

    fn default(&self, role: &mut Value) {
        if !role.has("/rules") {
            role.set("/rules", json!([]));
        }
    }

    fn validate(&self, role: &Value, errors: &mut Errors) {
        let namespaced = role.has("/metadata/namespace");
        for rule in Place::root(role).field("rules").items() {
            if rule.field("verbs").is_empty() {
                rule.field("verbs")
                    .missing("verbs must contain at least one value", errors);
            }
            let urls = rule.field("nonResourceURLs");
            let (groups, resources) = (rule.field("apiGroups"), rule.field("resources"));
            if !urls.is_empty() {
                if namespaced {
                    let why = "namespaced rules cannot apply to non-resource URLs";
                    urls.invalid(why, errors);
                }
                if !groups.is_empty()
                    || !resources.is_empty()
                    || !rule.field("resourceNames").is_empty()
                {
                    let why = "rules cannot apply to both regular resources and non-resource URLs";
                    urls.invalid(why, errors);
                }
                continue;
            }
            if groups.is_empty() {
                groups.missing("resource rules must supply at least one api group", errors);
            }
            if resources.is_empty() {
                resources.missing("resource rules must supply at least one resource", errors);
            }
        }
        super::metadata::validate_selectors(
            &Place::root(role).field("aggregationRule.clusterRoleSelectors"),
            errors,
        );
    }

    fn name_rule(&self) -> NameRule {
        NameRule::PathSegment
    }
}

pub struct Binding;

impl Strategy for Binding {
    fn creates_on_update(&self) -> bool {
        true
    }

    fn default(&self, binding: &mut Value) {
        binding.default("/roleRef/apiGroup", GROUP);
        for subject in binding.items_mut("/subjects") {
            match subject.text("/kind") {
                "User" | "Group" => subject.default("/apiGroup", GROUP),
                _ => {}
            }
        }
    }

    fn validate(&self, binding: &Value, errors: &mut Errors) {
        let root = Place::root(binding);
        let role = root.field("roleRef");
        role.field("apiGroup").one_of(&[GROUP], errors);
        let kinds: &[&str] = if binding.has("/metadata/namespace") {
            &["Role", "ClusterRole"]
        } else {
            &["ClusterRole"]
        };
        let kind = role.field("kind");
        if !kinds.contains(&kind.text()) {
            let error = FieldError::unsupported_as_listed(kind.path(), kind.text(), kinds);
            errors.push(error);
        }
        role.field("name").require(errors);
        for subject in root.field("subjects").items() {
            let kind = subject.field("kind");
            let kinds = ["ServiceAccount", "User", "Group"];
            if !kinds.contains(&kind.text()) {
                let error = FieldError::unsupported_as_listed(kind.path(), kind.text(), &kinds);
                errors.push(error);
            }
            subject.field("name").require(errors);
            let group = subject.field("apiGroup");
            if kind.text() == "ServiceAccount" {
                subject.field("namespace").require(errors);
                subject
                    .field("name")
                    .keep_to(super::metadata::dns_subdomain, errors);
                if !group.text().is_empty() {
                    group.one_of(&[""], errors);
                }
            } else {
                group.one_of(&[GROUP], errors);
            }
        }
    }

    fn validate_update(&self, binding: &Value, old: &Value, errors: &mut Errors) {
        let role = |binding| Place::root(binding).field("roleRef");
        if role(binding).value() != role(old).value() {
            role(binding).invalid("cannot change roleRef", errors);
        }
    }

    fn name_rule(&self) -> NameRule {
        NameRule::PathSegment
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::told_with_defaults as told;
    use super::*;

    #[test]
    fn rules_are_about_resources_or_paths() {
        assert_eq!(
            told(
                &Role,
                json!({"metadata": {"namespace": "a"}, "rules": [
                {"verbs": ["get"], "nonResourceURLs": ["/x"], "resources": ["pods"]}, {"apiGroups": [""]}]})
            ),
            [
                r#"rules[0].nonResourceURLs: Invalid value: ["/x"]: namespaced rules cannot apply to non-resource URLs"#,
                r#"rules[0].nonResourceURLs: Invalid value: ["/x"]: rules cannot apply to both regular resources and non-resource URLs"#,
                "rules[1].verbs: Required value: verbs must contain at least one value",
                "rules[1].resources: Required value: resource rules must supply at least one resource",
            ]
        );
    }

    #[test]
    fn a_binding_names_a_role_and_subjects() {
        let binding = json!({"metadata": {}, "roleRef": {"kind": "Role", "name": "r"},
            "subjects": [{"kind": "User", "name": "u"}, {"kind": "ServiceAccount", "name": "s"}, {"kind": "Robot", "name": "x"}]});
        assert_eq!(
            told(&Binding, binding),
            [
                r#"roleRef.kind: Unsupported value: "Role": supported values: "ClusterRole""#,
                "subjects[1].namespace: Required value",
                r#"subjects[2].kind: Unsupported value: "Robot": supported values: "ServiceAccount", "User", "Group""#,
            ]
        );
    }
}
