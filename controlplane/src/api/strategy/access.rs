//! Roles and their bindings.

use serde_json::{Value, json};

use super::{Errors, NameRule, Strategy};
use crate::api::fields::Fields;
use crate::api::status::FieldError;

const GROUP: &str = "rbac.authorization.k8s.io";

pub struct Role;

impl Strategy for Role {
    fn default(&self, role: &mut Value) {
        if !role.has("/rules") {
            role.set("/rules", json!([]));
        }
    }

    fn validate(&self, role: &Value, errors: &mut Errors) {
        for (at, rule) in role.items("/rules").iter().enumerate() {
            if rule.items("/verbs").is_empty() {
                errors.push(FieldError::required(
                    format!("rules[{at}].verbs"),
                    "verbs must contain at least one value",
                ));
            }
            if rule.items("/nonResourceURLs").is_empty() {
                for (field, why) in [
                    (
                        "apiGroups",
                        "resource rules must supply at least one api group",
                    ),
                    (
                        "resources",
                        "resource rules must supply at least one resource",
                    ),
                ] {
                    if rule.items(&format!("/{field}")).is_empty() {
                        errors.push(FieldError::required(format!("rules[{at}].{field}"), why));
                    }
                }
            }
        }
    }

    fn name_rule(&self) -> NameRule {
        NameRule::PathSegment
    }
}

pub struct Binding;

impl Strategy for Binding {
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
        super::one_of(binding, "/roleRef/apiGroup", "", &[GROUP], errors);
        let kinds: &[&str] = if binding.has("/metadata/namespace") {
            &["Role", "ClusterRole"]
        } else {
            &["ClusterRole"]
        };
        if !kinds.contains(&binding.text("/roleRef/kind")) {
            errors.push(FieldError::unsupported(
                "roleRef.kind",
                binding.text("/roleRef/kind"),
                kinds,
            ));
        }
        super::required(binding, "/roleRef/name", errors);
        for (at, subject) in binding.items("/subjects").iter().enumerate() {
            let at = format!("subjects[{at}]");
            super::one_of(
                subject,
                "/kind",
                &at,
                &["User", "Group", "ServiceAccount"],
                errors,
            );
            if subject.text("/name").is_empty() {
                errors.push(FieldError::required(format!("{at}.name"), ""));
            }
            if subject.text("/kind") == "ServiceAccount" && subject.text("/namespace").is_empty() {
                errors.push(FieldError::required(format!("{at}.namespace"), ""));
            }
        }
    }

    fn validate_update(&self, binding: &Value, old: &Value, errors: &mut Errors) {
        if binding.pointer("/roleRef") != old.pointer("/roleRef") {
            let given = binding.pointer("/roleRef").cloned().unwrap_or_default();
            errors.push(FieldError::invalid(
                "roleRef",
                given,
                "cannot change roleRef",
            ));
        }
    }

    fn name_rule(&self) -> NameRule {
        NameRule::PathSegment
    }
}
