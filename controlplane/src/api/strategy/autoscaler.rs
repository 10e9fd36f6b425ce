//! Autoscalers, in their stored form: that of v2.

use serde_json::{Value, json};

use super::metadata::dns_label;
use super::place::Place;
use super::{Errors, Strategy};
use crate::api::fields::Fields;
use crate::api::status::FieldError;
use crate::codec::quantity::Quantity;

pub struct Autoscaler;

/// Of pods that nobody said otherwise about, this share of their CPU is kept busy.
const CPU_UTILIZATION_PERCENT: i64 = 80;

const WINDOW_S_MAX: i64 = 3600;
const PERIOD_S_MAX: i64 = 1800;

/// Types of metrics, in order of the alphabet as messages list them, with the field that each fills in.
const SOURCES: [(&str, &str); 5] = [
    ("ContainerResource", "containerResource"),
    ("External", "external"),
    ("Object", "object"),
    ("Pods", "pods"),
    ("Resource", "resource"),
];

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

    fn prepare_create(&self, autoscaler: &mut Value) {
        autoscaler.set(
            "/status",
            json!({"currentReplicas": 0, "desiredReplicas": 0}),
        );
    }

    fn validate(&self, autoscaler: &Value, errors: &mut Errors) {
        let spec = Place::root(autoscaler).field("spec");
        let (least, most) = (spec.field("minReplicas"), spec.field("maxReplicas"));
        if least.is_there() && least.int() < 1 {
            least.invalid("must be greater than or equal to 1", errors);
        }
        if most.int() == 0 {
            most.missing("must be set and greater than 0", errors);
        } else if most.int() < 1 {
            most.invalid("must be greater than or equal to 1", errors);
        }
        if most.int() < least.int() {
            let why = "must be greater than or equal to `minReplicas`";
            errors.push(FieldError::invalid(most.path(), most.int(), why));
        }
        let target = spec.field("scaleTargetRef");
        // The one kind of the core group that scales.
        let of_core = target.field("kind").text() == "ReplicationController";
        validate_reference(&target, of_core, errors);
        for metric in spec.field("metrics").items() {
            validate_metric(&metric, errors);
        }
        for direction in ["behavior.scaleUp", "behavior.scaleDown"] {
            validate_rules(&spec.field(direction), errors);
        }
    }
}

/// Checks a reference to an object of any kind; one of the core group only where that may be.
fn validate_reference(reference: &Place<'_>, of_core: bool, errors: &mut Errors) {
    for field in ["kind", "name"] {
        if reference.field(field).require(errors) {
            segment(&reference.field(field), errors);
        }
    }
    let version = reference.field("apiVersion");
    match version.text().split_once('/') {
        None if !of_core => version.invalid("apiVersion must specify API group", errors),
        Some((_, rest)) if rest.contains('/') => {
            let why = format!("unexpected GroupVersion string: {}", version.text());
            version.invalid(why, errors);
        }
        _ => {}
    }
}

/// A name that is one segment of a path.
fn segment(name: &Place<'_>, errors: &mut Errors) {
    match name.text() {
        "." | ".." => name.invalid(format!("may not be '{}'", name.text()), errors),
        text => {
            for letter in ['/', '%'] {
                if text.contains(letter) {
                    name.invalid(format!("may not contain '{letter}'"), errors);
                }
            }
        }
    }
}

fn validate_metric(metric: &Place<'_>, errors: &mut Errors) {
    let kind = metric.field("type");
    if kind.is_empty() {
        kind.missing("must specify a metric source type", errors);
    }
    let own = SOURCES.iter().find(|(known, _)| *known == kind.text());
    if own.is_none() {
        let known = SOURCES.map(|(kind, _)| kind);
        errors.push(FieldError::unsupported(kind.path(), kind.text(), &known));
    }
    let fields = SOURCES.map(|(_, field)| field);
    let filled: Vec<&str> = fields
        .into_iter()
        .filter(|field| metric.field(field).is_there())
        .collect();
    if let Some((_, own)) = own
        && !filled.contains(own)
    {
        let why = "must populate information for the given metric source";
        metric.field(own).missing(why, errors);
    }
    for field in &filled {
        if own.is_some_and(|(_, own)| own == field) || filled.len() == 1 {
            validate_source(field, &metric.field(field), errors);
        } else {
            let why = "must populate the given metric source only";
            metric.field(field).forbidden(why, errors);
        }
    }
}

fn validate_source(kind: &str, source: &Place<'_>, errors: &mut Errors) {
    let target = source.field("target");
    let (value, average) = (target.field("value"), target.field("averageValue"));
    let share = target.field("averageUtilization");
    match kind {
        "object" | "external" | "pods" => {
            if kind == "object" {
                validate_reference(&source.field("describedObject"), true, errors);
            }
            let name = source.field("metric.name");
            if name.is_empty() {
                name.missing("must specify a metric name", errors);
            } else {
                segment(&name, errors);
            }
        }
        _ => {
            if source.field("name").is_empty() {
                let why = "must specify a resource name";
                source.field("name").missing(why, errors);
            }
            let container = source.field("container");
            if kind == "containerResource" && container.is_empty() {
                container.missing("must specify a container", errors);
            } else {
                container.keep_to(dns_label, errors);
            }
        }
    }
    validate_target(&target, errors);
    match kind {
        "pods" if !average.is_there() => {
            average.missing("must specify a positive target averageValue", errors);
        }
        "object" if !value.is_there() && !average.is_there() => {
            let why = "must set either a target value or averageValue";
            average.missing(why, errors);
        }
        "external" => match (value.is_there(), average.is_there()) {
            (false, false) => {
                let why = "must set either a target value for metric or a per-pod target";
                average.missing(why, errors);
            }
            (true, true) => {
                let why = "may not set both a target value for metric and a per-pod target";
                value.forbidden(why, errors);
            }
            _ => {}
        },
        "resource" | "containerResource" => match (share.is_there(), average.is_there()) {
            (false, false) => {
                let why = "must set either a target raw value or a target utilization";
                share.missing(why, errors);
            }
            (true, true) => {
                let why = "may not set both a target raw value and a target utilization";
                average.forbidden(why, errors);
            }
            _ => {}
        },
        _ => {}
    }
}

fn validate_target(target: &Place<'_>, errors: &mut Errors) {
    let kind = target.field("type");
    if kind.is_empty() {
        kind.missing("must specify a metric target type", errors);
    }
    if !["Utilization", "Value", "AverageValue"].contains(&kind.text()) {
        let why = "must be either Utilization, Value, or AverageValue";
        kind.invalid(why, errors);
    }
    for field in ["value", "averageValue"] {
        let value = target.field(field);
        let quantity = Quantity::of(value.value());
        if quantity.is_some_and(|quantity| quantity.is_negative() || quantity.is_zero()) {
            value.invalid("must be positive", errors);
        }
    }
    target.field("averageUtilization").positive(errors);
}

fn validate_rules(rules: &Place<'_>, errors: &mut Errors) {
    if !rules.is_there() {
        return;
    }
    let window = rules.field("stabilizationWindowSeconds");
    if window.int() < 0 {
        window.invalid("must be greater than or equal to zero", errors);
    } else if window.int() > WINDOW_S_MAX {
        let why = format!("must be less than or equal to {WINDOW_S_MAX}");
        window.invalid(why, errors);
    }
    rules
        .field("selectPolicy")
        .exactly_one_of(&["Disabled", "Max", "Min"], errors);
    let policies = rules.field("policies");
    if policies.is_empty() {
        policies.missing("must specify at least one Policy", errors);
    }
    for policy in policies.items() {
        let kind = policy.field("type");
        if !["Percent", "Pods"].contains(&kind.text()) {
            let known = ["Percent", "Pods"];
            errors.push(FieldError::unsupported(kind.path(), kind.text(), &known));
        }
        for field in ["value", "periodSeconds"] {
            let number = policy.field(field);
            if number.int() <= 0 {
                let why = "must be greater than zero";
                errors.push(FieldError::invalid(number.path(), number.int(), why));
            }
        }
        let period = policy.field("periodSeconds");
        if period.int() > PERIOD_S_MAX {
            let why = format!("must be less than or equal to {PERIOD_S_MAX}");
            period.invalid(why, errors);
        }
    }
    rules.field("tolerance").quantity(errors);
}

#[cfg(test)]
mod tests {
    use super::super::testing::told;
    use super::*;

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
                r#"spec.scaleTargetRef.apiVersion: Invalid value: "": apiVersion must specify API group"#,
            ]
        );
    }

    #[test]
    fn a_metric_has_the_source_of_its_type_and_a_target_that_suits_it() {
        let check = |metric: Value| {
            let target = json!({"apiVersion": "v1", "kind": "ReplicationController", "name": "a"});
            let spec = json!({"maxReplicas": 1, "scaleTargetRef": target, "metrics": [metric]});
            let lines = told(&Autoscaler, &json!({"spec": spec})).into_iter();
            let strip = |line: String| line.trim_start_matches("spec.metrics[0].").to_owned();
            lines.map(strip).collect::<Vec<_>>()
        };
        let half = json!({"type": "Utilization", "averageUtilization": 50});
        let cpu = json!({"name": "cpu", "target": half});
        assert!(check(json!({"type": "Resource", "resource": cpu})).is_empty());
        assert_eq!(
            check(json!({"type": "Resource", "resource": cpu, "pods": {}})),
            ["pods: Forbidden: must populate the given metric source only"]
        );
        assert_eq!(
            check(
                json!({"type": "Pods", "pods": {"metric": {"name": "a/b"}, "target": {"type": "AverageValue", "averageValue": "0"}}})
            ),
            [
                r#"pods.metric.name: Invalid value: "a/b": may not contain '/'"#,
                r#"pods.target.averageValue: Invalid value: "0": must be positive"#,
            ]
        );
        assert_eq!(
            check(json!({"type": "External"})),
            ["external: Required value: must populate information for the given metric source"]
        );
        assert_eq!(check(json!({})).len(), 2);
    }
}
