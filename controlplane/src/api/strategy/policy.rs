//! Quotas, limits, disruption budgets, autoscalers, runtime classes.

use serde_json::{Value, json};

use super::metadata::{dns_label, qualified_name, validate_selector};
use super::place::Place;
use super::{Errors, Strategy};
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

/// An autoscaler in its stored form, that of v2.
pub struct Autoscaler;

/// Of pods that nobody said otherwise about, this share of their CPU is kept busy.
const CPU_UTILIZATION_PERCENT: i64 = 80;

impl Strategy for Autoscaler {
    fn default(&self, autoscaler: &mut Value) {
        autoscaler.default("/spec/minReplicas", 1);
        if autoscaler.items("/spec/metrics").is_empty() {
            let target =
                json!({"type": "Utilization", "averageUtilization": CPU_UTILIZATION_PERCENT});
            let metric = json!({"type": "Resource", "resource": {"name": "cpu", "target": target}});
            autoscaler.set("/spec/metrics", json!([metric]));
        }
        if !autoscaler.has("/spec/behavior") {
            return;
        }
        let rules = [
            (
                "scaleUp",
                0,
                json!([{"type": "Pods", "value": 4, "periodSeconds": 15}, {"type": "Percent", "value": 100, "periodSeconds": 15}]),
            ),
            (
                "scaleDown",
                -1,
                json!([{"type": "Percent", "value": 100, "periodSeconds": 15}]),
            ),
        ];
        for (direction, window_s, policies) in rules {
            let at = format!("/spec/behavior/{direction}");
            autoscaler.default(&format!("{at}/selectPolicy"), "Max");
            if window_s >= 0 {
                autoscaler.default(&format!("{at}/stabilizationWindowSeconds"), window_s);
            }
            autoscaler.default(&format!("{at}/policies"), policies);
        }
    }

    fn validate(&self, autoscaler: &Value, errors: &mut Errors) {
        let spec = Place::root(autoscaler).field("spec");
        let (least, most) = (spec.field("minReplicas"), spec.field("maxReplicas"));
        least.positive(errors);
        if most.int() == 0 {
            most.missing("must be set and greater than 0", errors);
        } else if most.int() < 1 {
            most.invalid("must be greater than or equal to 1", errors);
        }
        if most.int() < least.int() {
            let why = "must be greater than or equal to `minReplicas`";
            errors.push(FieldError::invalid(most.path(), most.int(), why));
        }
        spec.field("scaleTargetRef.kind").require(errors);
        spec.field("scaleTargetRef.name").require(errors);
        for metric in spec.field("metrics").items() {
            let kinds = [
                "ContainerResource",
                "External",
                "Object",
                "Pods",
                "Resource",
            ];
            let kind = metric.field("type");
            kind.require_one_of(&kinds, errors);
            let field = match kind.text() {
                "ContainerResource" => "containerResource",
                "External" => "external",
                "Object" => "object",
                "Pods" => "pods",
                "Resource" => "resource",
                _ => continue,
            };
            if !metric.field(field).is_there() {
                let why = "must populate information for the given metric source";
                metric.field(field).missing(why, errors);
                continue;
            }
            metric
                .field(&format!("{field}.target.type"))
                .require_one_of(&["AverageValue", "Utilization", "Value"], errors);
        }
        for direction in ["behavior.scaleUp", "behavior.scaleDown"] {
            let rules = spec.field(direction);
            let window = rules.field("stabilizationWindowSeconds");
            window.not_negative(errors);
            if window.int() > 3600 {
                window.invalid("must be less than or equal to 3600", errors);
            }
            rules
                .field("selectPolicy")
                .one_of(&["Disabled", "Max", "Min"], errors);
            for policy in rules.field("policies").items() {
                policy.field("type").one_of(&["Percent", "Pods"], errors);
                policy.field("value").positive(errors);
                let period = policy.field("periodSeconds");
                period.positive(errors);
                if period.int() > 1800 {
                    period.invalid("must be less than or equal to 1800", errors);
                }
            }
        }
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
    fn an_autoscaler_scales_between_bounds() {
        let mut autoscaler =
            json!({"spec": {"maxReplicas": 0, "scaleTargetRef": {"kind": "Deployment"}}});
        Autoscaler.default(&mut autoscaler);
        assert_eq!(
            autoscaler["spec"]["metrics"][0]["resource"]["target"]["averageUtilization"],
            80
        );
        assert_eq!(
            told(&Autoscaler, &autoscaler),
            [
                "spec.maxReplicas: Required value: must be set and greater than 0",
                "spec.maxReplicas: Invalid value: 0: must be greater than or equal to `minReplicas`",
                "spec.scaleTargetRef.name: Required value",
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
