//! Quotas, limits, disruption budgets, runtime classes.

use serde_json::{Value, json};

use super::metadata::{dns_label, qualified_name, validate_selector};
use super::place::Place;
use super::{Errors, NameRule, Strategy};
use crate::api::fields::Fields;
use crate::api::status::FieldError;
use crate::codec::quantity::Quantity;

pub struct Quota;

/// Resources without a prefix that a quota may limit.
const QUOTA_NAMES: [&str; 20] = [
    "configmaps",
    "cpu",
    "ephemeral-storage",
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "memory",
    "persistentvolumeclaims",
    "pods",
    "replicationcontrollers",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
    "requests.storage",
    "resourcequotas",
    "secrets",
    "services",
    "services.loadbalancers",
    "services.nodeports",
    "storage",
];
const SCOPES: [&str; 7] = [
    "BestEffort",
    "CrossNamespacePodAffinity",
    "NotBestEffort",
    "NotTerminating",
    "PriorityClass",
    "Terminating",
    "VolumeAttributesClass",
];

impl Strategy for Quota {
    fn prepare_create(&self, quota: &mut Value) {
        quota.set("/status", json!({}));
    }

    fn validate(&self, quota: &Value, errors: &mut Errors) {
        let spec = Place::root(quota).field("spec");
        for (name, quantity) in spec.field("hard").entries() {
            let told = |why: &str| FieldError::invalid(quantity.path(), name, why);
            if let Some(why) = qualified_name(name) {
                errors.push(told(&why));
            } else if !name.contains('/')
                && !QUOTA_NAMES.contains(&name)
                && !name.contains("hugepages-")
            {
                errors.push(told("must be a standard resource type or fully qualified"));
                errors.push(told("must be a standard resource for quota"));
            }
            let counts = name.starts_with("count/")
                || !name.contains("cpu")
                    && !name.contains('/')
                    && !name.contains("memory")
                    && !name.contains("storage")
                    && !name.contains("hugepages");
            if quantity
                .quantity(errors)
                .is_some_and(|amount| counts && !amount.is_whole())
            {
                quantity.invalid("must be an integer", errors);
            }
        }
        let scopes = spec.field("scopes");
        for scope in scopes.items() {
            if !SCOPES.contains(&scope.text()) {
                scopes.invalid("unsupported scope", errors);
            }
        }
        let has = |name: &str| scopes.items().any(|scope| scope.text() == name);
        for (one, other) in [
            ("Terminating", "NotTerminating"),
            ("BestEffort", "NotBestEffort"),
        ] {
            if has(one) && has(other) {
                scopes.invalid("conflicting scopes", errors);
            }
        }
        for expression in spec.field("scopeSelector.matchExpressions").items() {
            let (scope, values) = (expression.field("scopeName"), expression.field("values"));
            if !SCOPES.contains(&scope.text()) {
                scope.invalid("unsupported scope", errors);
            }
            let operator = expression.field("operator");
            match operator.text() {
                "In" | "NotIn" if values.is_empty() => {
                    let why = "must be at least one value when `operator` is 'In' or 'NotIn' for scope selector";
                    values.missing(why, errors);
                }
                "Exists" | "DoesNotExist" if !values.is_empty() => {
                    let why = "must be no value when `operator` is 'Exists' or 'DoesNotExist' for scope selector";
                    values.invalid(why, errors);
                }
                "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
                _ => operator.invalid("not a valid selector operator", errors),
            }
        }
    }

    fn validate_update(&self, quota: &Value, old: &Value, errors: &mut Errors) {
        let scopes = |quota| Place::root(quota).field("spec.scopes");
        scopes(quota).unchanged(&scopes(old), errors);
    }
}

pub struct LimitRange;

impl Strategy for LimitRange {
    fn creates_on_update(&self) -> bool {
        true
    }

    fn default(&self, range: &mut Value) {
        for limit in range.items_mut("/spec/limits") {
            if limit.text("/type") != "Container" {
                continue;
            }
            for (from, to) in [
                ("max", "default"),
                ("default", "defaultRequest"),
                ("min", "defaultRequest"),
            ] {
                let values = limit.object(&format!("/{from}")).cloned();
                for (name, value) in values.into_iter().flatten() {
                    limit
                        .object_mut(&format!("/{to}"))
                        .entry(name)
                        .or_insert(value);
                }
            }
        }
    }

    fn validate(&self, range: &Value, errors: &mut Errors) {
        let mut kinds: Vec<&str> = Vec::new();
        for limit in Place::root(range).field("spec.limits").items() {
            let kind = limit.field("type");
            if kind.require(errors) {
                if kinds.contains(&kind.text()) {
                    kind.duplicate(errors);
                }
                kinds.push(kind.text());
            }
            if kind.text() == "Pod" {
                for field in ["default", "defaultRequest"] {
                    if limit.field(field).is_there() {
                        let why = "may not be specified when `type` is 'Pod'";
                        limit.field(field).forbidden(why, errors);
                    }
                }
            }
            let fields = [
                "max",
                "min",
                "default",
                "defaultRequest",
                "maxLimitRequestRatio",
            ];
            for field in fields {
                for (name, quantity) in limit.field(field).entries() {
                    if let Some(why) = qualified_name(name) {
                        errors.push(FieldError::invalid(quantity.path(), name, why));
                    }
                    quantity.quantity(errors);
                }
            }
            // Each must not be more than the other. It is told at the default that breaks its bound.
            for (less, more, at) in [
                ("min", "max", "min"),
                ("min", "defaultRequest", "defaultRequest"),
                ("defaultRequest", "max", "defaultRequest"),
                ("defaultRequest", "default", "defaultRequest"),
                ("min", "default", "default"),
                ("default", "max", "default"),
            ] {
                for (name, quantity) in limit.field(less).entries() {
                    let bound = limit.field(more).value().get(name).and_then(Quantity::of);
                    let (Some(amount), Some(bound)) = (Quantity::of(quantity.value()), bound)
                    else {
                        continue;
                    };
                    if amount > bound {
                        let named = |field: &str| match (field, less) {
                            ("defaultRequest", _) => "default request".to_owned(),
                            ("default", "defaultRequest") => "default limit".to_owned(),
                            (field, _) => field.to_owned(),
                        };
                        let (less, more) = (named(less), named(more));
                        let why =
                            format!("{less} value {amount} is greater than {more} value {bound}");
                        let given = limit
                            .field(at)
                            .value()
                            .get(name)
                            .cloned()
                            .unwrap_or_default();
                        let place = format!("{}[{name}]", limit.field(at).path());
                        errors.push(FieldError::invalid(place, given, why));
                    }
                }
            }
        }
    }
}

pub struct DisruptionBudget;

impl Strategy for DisruptionBudget {
    fn name_rule(&self) -> NameRule {
        NameRule::PathSegment
    }

    fn validate(&self, budget: &Value, errors: &mut Errors) {
        let spec = Place::root(budget).field("spec");
        let (least, most) = (spec.field("minAvailable"), spec.field("maxUnavailable"));
        if least.is_there() && most.is_there() {
            spec.invalid("minAvailable and maxUnavailable cannot be both set", errors);
        }
        for share in [least, most] {
            share.share(errors);
            share.at_most_all(errors);
        }
        validate_selector(&spec.field("selector"), errors);
        spec.field("unhealthyPodEvictionPolicy")
            .one_of(&["AlwaysAllow", "IfHealthyBudget"], errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

pub struct RuntimeClass;

impl Strategy for RuntimeClass {
    fn creates_on_update(&self) -> bool {
        true
    }

    fn validate(&self, class: &Value, errors: &mut Errors) {
        let root = Place::root(class);
        root.field("handler").require_name(dns_label, errors);
        for (name, quantity) in root.field("overhead.podFixed").entries() {
            if let Some(why) = qualified_name(name) {
                errors.push(FieldError::invalid(quantity.path(), name, why));
            }
            quantity.quantity(errors);
        }
    }

    fn validate_update(&self, class: &Value, old: &Value, errors: &mut Errors) {
        let handler = |class| Place::root(class).field("handler");
        handler(class).unchanged(&handler(old), errors);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::told;
    use super::*;

    #[test]
    fn quotas_limit_what_can_be_counted() {
        let quota = json!({"spec": {"hard": {"pods": "2", "cpu": "1500m", "count/deployments.apps": "1.5", "apples": "1", "example.com/x": "1"},
            "scopes": ["BestEffort", "NotBestEffort"]}});
        assert_eq!(
            told(&Quota, &quota),
            [
                r#"spec.hard[count/deployments.apps]: Invalid value: "1.5": must be an integer"#,
                r#"spec.hard[apples]: Invalid value: "apples": must be a standard resource type or fully qualified"#,
                r#"spec.hard[apples]: Invalid value: "apples": must be a standard resource for quota"#,
                r#"spec.scopes: Invalid value: ["BestEffort","NotBestEffort"]: conflicting scopes"#,
            ]
        );
    }

    #[test]
    fn limits_default_from_their_bounds_and_are_in_order() {
        let mut range = json!({"spec": {"limits": [{"type": "Container", "max": {"cpu": "2"}, "min": {"memory": "1Mi"}}]}});
        LimitRange.default(&mut range);
        let limit = &range["spec"]["limits"][0];
        assert_eq!(limit["default"], json!({"cpu": "2"}));
        assert_eq!(
            limit["defaultRequest"],
            json!({"cpu": "2", "memory": "1Mi"})
        );
        assert_eq!(told(&LimitRange, &range), Vec::<String>::new());
        let wrong = json!({"spec": {"limits": [{"type": "Pod", "max": {"cpu": "1"}, "min": {"cpu": "2"}}, {"type": "Pod"}]}});
        assert_eq!(
            told(&LimitRange, &wrong),
            [
                r#"spec.limits[0].min[cpu]: Invalid value: "2": min value 2 is greater than max value 1"#,
                r#"spec.limits[1].type: Duplicate value: "Pod""#,
            ]
        );
    }

    #[test]
    fn a_budget_is_given_one_way() {
        let budget = json!({"spec": {"minAvailable": 1, "maxUnavailable": "x"}});
        assert_eq!(told(&DisruptionBudget, &budget).len(), 2);
        let budget = json!({"spec": {"minAvailable": "50%", "selector": {}}});
        assert_eq!(told(&DisruptionBudget, &budget), Vec::<String>::new());
    }
}
