//! Admission policies and their bindings. Expressions are kept, not compiled: nothing acts on them yet.

use std::collections::BTreeSet;

use serde_json::Value;

use super::metadata::{
    dns_subdomain, dns1035_label, mixed_case_label, qualified_name, validate_selector,
};
use super::place::Place;
use super::webhook::{
    FAILURE_POLICIES, MATCH_POLICIES, REINVOCATION_POLICIES, default_matching, validate_conditions,
    validate_rule,
};
use super::{Errors, Strategy};
use crate::api::fields::{self, Fields};
use crate::api::status::FieldError;

const AUDIT_ANNOTATIONS_MAX: usize = 20;
const AUDIT_EXPRESSION_BYTES_MAX: usize = 5 << 10;
const ACTIONS: [&str; 3] = ["Audit", "Deny", "Warn"];
const REASONS: [&str; 3] = ["Forbidden", "Invalid", "RequestEntityTooLarge"];
const NOT_FOUND_ACTIONS: [&str; 2] = ["Allow", "Deny"];
const MUTATED: [&str; 4] = ["*", "CONNECT", "CREATE", "UPDATE"];

fn mutates(object: &Value) -> bool {
    object.text("/kind").starts_with("Mutating")
}

/// Validating and mutating ones.
pub struct Policy;

impl Strategy for Policy {
    fn default(&self, policy: &mut Value) {
        policy.object_mut("/spec");
        policy.default("/spec/failurePolicy", "Fail");
        if policy.has("/spec/matchConstraints") {
            default_matching(&mut policy["spec"]["matchConstraints"]);
        }
    }

    fn validate(&self, policy: &Value, errors: &mut Errors) {
        let spec = Place::root(policy).field("spec");
        spec.field("failurePolicy")
            .exactly_one_of(&FAILURE_POLICIES, errors);
        if spec.field("paramKind").is_there() {
            validate_kind(&spec.field("paramKind"), errors);
        }
        let constraints = spec.field("matchConstraints");
        if constraints.is_there() {
            validate_matching(&constraints, errors);
            constraints.field("resourceRules").require(errors);
        } else {
            constraints.missing("", errors);
        }
        if mutates(policy) {
            hold_operations(&constraints, errors);
        }
        validate_conditions(&spec.field("matchConditions"), errors);
        for variable in spec.field("variables").items() {
            let (name, expression) = (variable.field("name"), variable.field("expression"));
            if name.text().is_empty() {
                name.missing("name is not specified", errors);
            }
            if expression.text().trim().is_empty() {
                expression.missing("expression is not specified", errors);
            }
        }
        if mutates(policy) {
            validate_mutations(&spec, errors);
        } else {
            validate_validations(&spec, fields::name(policy), errors);
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

fn validate_mutations(spec: &Place<'_>, errors: &mut Errors) {
    let mutations = spec.field("mutations");
    if mutations.is_empty() {
        mutations.missing("mutations must contain at least one item", errors);
    }
    spec.field("reinvocationPolicy")
        .require_one_of(&REINVOCATION_POLICIES, errors);
}

fn validate_validations(spec: &Place<'_>, name: &str, errors: &mut Errors) {
    let (validations, annotations) = (spec.field("validations"), spec.field("auditAnnotations"));
    if validations.is_empty() && annotations.is_empty() {
        let why = "validations or auditAnnotations must contain at least one item";
        validations.missing(why, errors);
        annotations.missing(why, errors);
        return;
    }
    for validation in validations.items() {
        let expression = validation.field("expression");
        if expression.text().trim().is_empty() {
            expression.missing("expression is not specified", errors);
        }
        let blank = |place: &Place<'_>| !place.is_empty() && place.text().trim().is_empty();
        for field in ["messageExpression", "message"] {
            let place = validation.field(field);
            if blank(&place) {
                place.invalid("must be non-empty if specified", errors);
            }
        }
        let message = validation.field("message");
        if message.text().trim().contains(['\n', '\r']) {
            message.invalid("must not contain line breaks", errors);
        }
        validation.field("reason").exactly_one_of(&REASONS, errors);
    }
    if annotations.len() > AUDIT_ANNOTATIONS_MAX {
        let why = format!("must not have more than {AUDIT_ANNOTATIONS_MAX} auditAnnotations");
        annotations.invalid(why, errors);
    }
    let mut keys = BTreeSet::new();
    for annotation in annotations.items() {
        let (key, value) = (annotation.field("key"), annotation.field("valueExpression"));
        let whole = format!("{name}/{}", key.text());
        if let Some(why) = qualified_name(&whole) {
            errors.push(FieldError::invalid(key.path(), whole, why));
        }
        match value.text().trim().len() {
            0 => value.missing("valueExpression is not specified", errors),
            AUDIT_EXPRESSION_BYTES_MAX.. => {
                let why = format!("must not exceed {AUDIT_EXPRESSION_BYTES_MAX} bytes in length");
                value.missing(&why, errors);
            }
            _ => {}
        }
        if !keys.insert(key.text()) {
            errors.push(FieldError::duplicate(key.path(), key.text()));
        }
    }
}

fn validate_kind(kind: &Place<'_>, errors: &mut Errors) {
    let (of, name) = (kind.field("apiVersion"), kind.field("kind"));
    if of.require(errors) {
        let (group, version) = of.text().rsplit_once('/').unwrap_or(("", of.text()));
        if group.contains('/') {
            let why = format!("unexpected GroupVersion string: {}", of.text());
            of.invalid(why, errors);
        } else {
            if let Some(why) = Some(group)
                .filter(|g| !g.is_empty())
                .and_then(dns_subdomain)
            {
                errors.push(FieldError::invalid(of.path(), group, why));
            }
            if version.is_empty() {
                of.invalid("version must be specified", errors);
            } else if let Some(why) = dns1035_label(version) {
                errors.push(FieldError::invalid(of.path(), version, why));
            }
        }
    }
    if name.require(errors)
        && let Some(why) = mixed_case_label(name.text())
    {
        name.invalid(why, errors);
    }
}

/// What a policy or binding is for.
fn validate_matching(matching: &Place<'_>, errors: &mut Errors) {
    matching
        .field("matchPolicy")
        .exactly_one_of(&MATCH_POLICIES, errors);
    validate_selector(&matching.field("namespaceSelector"), errors);
    validate_selector(&matching.field("objectSelector"), errors);
    for field in ["resourceRules", "excludeResourceRules"] {
        for rule in matching.field(field).items() {
            let mut names = BTreeSet::new();
            for name in rule.field("resourceNames").items() {
                if !names.insert(name.text()) {
                    name.duplicate(errors);
                }
            }
            validate_rule(&rule, errors);
        }
    }
}

/// Only what writes an object can be changed on its way.
fn hold_operations(matching: &Place<'_>, errors: &mut Errors) {
    for rule in matching.field("resourceRules").items() {
        for operation in rule.field("operations").items() {
            if !MUTATED.contains(&operation.text()) {
                let path = format!("{}.resourceRules.operations", matching.path());
                let given = operation.text();
                errors.push(FieldError::unsupported(path, given, &MUTATED));
            }
        }
    }
}

/// Bindings of both.
pub struct Binding;

impl Strategy for Binding {
    fn default(&self, binding: &mut Value) {
        if binding.has("/spec/matchResources") {
            default_matching(&mut binding["spec"]["matchResources"]);
        }
    }

    fn validate(&self, binding: &Value, errors: &mut Errors) {
        let spec = Place::root(binding).field("spec");
        spec.field("policyName").require_name(dns_subdomain, errors);
        if spec.field("paramRef").is_there() {
            validate_reference(&spec.field("paramRef"), errors);
        }
        let matching = spec.field("matchResources");
        validate_matching(&matching, errors);
        if mutates(binding) {
            hold_operations(&matching, errors);
            return;
        }
        let actions = spec.field("validationActions");
        let mut seen = BTreeSet::new();
        for action in actions.items() {
            action.exactly_one_of(&ACTIONS, errors);
            if !seen.insert(action.text()) {
                action.duplicate(errors);
            }
        }
        if seen.contains("Deny") && seen.contains("Warn") {
            let why = "must not contain both Deny and Warn (repeating the same validation failure information in the API response and headers serves no purpose)";
            actions.invalid(why, errors);
        }
        if seen.is_empty() {
            actions.missing("at least one validation action is required", errors);
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

fn validate_reference(reference: &Place<'_>, errors: &mut Errors) {
    let (name, selector) = (reference.field("name"), reference.field("selector"));
    let both = !name.is_empty() && selector.is_there();
    if both {
        name.forbidden("name and selector are mutually exclusive", errors);
    }
    validate_selector(&selector, errors);
    if both {
        selector.forbidden("name and selector are mutually exclusive", errors);
    }
    if name.is_empty() && !selector.is_there() {
        reference.missing("one of name or selector must be specified", errors);
    }
    reference
        .field("parameterNotFoundAction")
        .require_one_of(&NOT_FOUND_ACTIONS, errors);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::told_with_defaults;
    use super::*;

    #[test]
    fn a_policy_says_what_it_is_for_and_what_it_holds() {
        let rule = json!({"apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["deployments"]});
        let mut policy = json!({"metadata": {"name": "p.example.com"}, "spec": {
            "matchConstraints": {"resourceRules": [rule]}, "validations": [{"expression": "true"}]}});
        policy["kind"] = "ValidatingAdmissionPolicy".into();
        assert_eq!(told_with_defaults(&Policy, policy.clone()), [""; 0]);
        policy["spec"] = json!({"paramKind": {"apiVersion": "a/b/c", "kind": ""}});
        assert_eq!(
            told_with_defaults(&Policy, policy),
            [
                "spec.paramKind.apiVersion: Invalid value: \"a/b/c\": unexpected GroupVersion string: a/b/c",
                "spec.paramKind.kind: Required value",
                "spec.matchConstraints: Required value",
                "spec.validations: Required value: validations or auditAnnotations must contain at least one item",
                "spec.auditAnnotations: Required value: validations or auditAnnotations must contain at least one item",
            ]
        );
    }

    #[test]
    fn a_binding_acts_in_ways_that_go_together() {
        let binding = json!({"kind": "ValidatingAdmissionPolicyBinding", "spec": {"policyName": "p",
            "paramRef": {"name": "x", "selector": {}}, "validationActions": ["Deny", "Warn", "Deny"]}});
        let told = told_with_defaults(&Binding, binding);
        for expected in [
            "spec.paramRef.name: Forbidden",
            "spec.paramRef.parameterNotFoundAction: Required value",
            "spec.validationActions[2]: Duplicate value: \"Deny\"",
            "must not contain both Deny and Warn",
        ] {
            assert!(told.iter().any(|line| line.contains(expected)), "{told:?}");
        }
    }
}
