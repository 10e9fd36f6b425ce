//! Where a pod may run: tolerations, node selection, affinity, spreading, gates.

use std::collections::BTreeSet;

use super::super::metadata::{validate_labels, validate_selector};
use super::super::place::Place;
use super::super::{Errors, dns_label, qualified_name};
use crate::api::fields::Fields;
use crate::api::status::FieldError;

const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";

pub fn validate(spec: &Place<'_>, errors: &mut Errors) {
    let selector = spec.field("nodeSelector");
    validate_labels(
        spec.value().object("/nodeSelector"),
        selector.path(),
        errors,
    );
    for toleration in spec.field("tolerations").items() {
        validate_toleration(&toleration, errors);
    }
    validate_node_affinity(&spec.field("affinity.nodeAffinity"), errors);
    for kind in ["affinity.podAffinity", "affinity.podAntiAffinity"] {
        let affinity = spec.field(kind);
        for term in affinity.field(REQUIRED).items() {
            validate_pod_term(&term, errors);
        }
        for weighted in affinity.field(PREFERRED).items() {
            weigh(&weighted, errors);
            validate_pod_term(&weighted.field("podAffinityTerm"), errors);
        }
    }
    validate_spreading(spec, errors);
    let mut gates: BTreeSet<&str> = BTreeSet::new();
    for gate in spec.field("schedulingGates").items() {
        let name = gate.field("name");
        name.require_name(qualified_name, errors);
        if !gates.insert(name.text()) {
            name.duplicate(errors);
        }
    }
}

fn validate_toleration(toleration: &Place<'_>, errors: &mut Errors) {
    let (key, operator) = (toleration.field("key"), toleration.field("operator"));
    let (value, effect) = (toleration.field("value"), toleration.field("effect"));
    key.keep_to(qualified_name, errors);
    if key.text().is_empty() && operator.text() != "Exists" {
        let why = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
        errors.push(FieldError::invalid(operator.path(), operator.text(), why));
    }
    if toleration.field("tolerationSeconds").is_there() && effect.text() != "NoExecute" {
        let why = "effect must be 'NoExecute' when `tolerationSeconds` is set";
        errors.push(FieldError::invalid(effect.path(), effect.text(), why));
    }
    match operator.text() {
        "" | "Equal" => value.keep_to(super::super::metadata::label_value, errors),
        "Exists" if !value.text().is_empty() => {
            let why = "value must be empty when `operator` is 'Exists'";
            errors.push(FieldError::invalid(operator.path(), value.text(), why));
        }
        "Exists" => {}
        "Gt" | "Lt" => {
            if value.text().parse::<i64>().is_err() {
                value.invalid("value must be a valid integer", errors);
            }
        }
        _ => operator.one_of(&["Equal", "Exists", "Gt", "Lt"], errors),
    }
    if !effect.text().is_empty() {
        effect.one_of(&["NoExecute", "NoSchedule", "PreferNoSchedule"], errors);
    }
}

fn validate_node_affinity(affinity: &Place<'_>, errors: &mut Errors) {
    let required = affinity.field(REQUIRED);
    if required.is_there() {
        validate_node_selector(&required, errors);
    }
    for weighted in affinity.field(PREFERRED).items() {
        weigh(&weighted, errors);
        validate_node_term(&weighted.field("preference"), errors);
    }
}

/// Checks a node selector: at least one term, each with requirements that make sense.
pub fn validate_node_selector(selector: &Place<'_>, errors: &mut Errors) {
    let terms = selector.field("nodeSelectorTerms");
    if terms.is_empty() {
        terms.missing("must have at least one node selector term", errors);
    }
    for term in terms.items() {
        validate_node_term(&term, errors);
    }
}

fn validate_node_term(term: &Place<'_>, errors: &mut Errors) {
    for requirement in term.field("matchExpressions").items() {
        validate_requirement(&requirement, errors);
        requirement.field("key").label_key(errors);
    }
    for requirement in term.field("matchFields").items() {
        let (key, operator) = (requirement.field("key"), requirement.field("operator"));
        let values = requirement.field("values");
        if !["In", "NotIn"].contains(&operator.text()) {
            operator.invalid("not a valid selector operator", errors);
        } else if values.len() != 1 {
            let why =
                "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
            values.missing(why, errors);
        }
        if key.text() != "metadata.name" {
            key.invalid("not a valid field selector key", errors);
        }
    }
}

fn validate_requirement(requirement: &Place<'_>, errors: &mut Errors) {
    let values = requirement.field("values");
    let operator = requirement.field("operator");
    match operator.text() {
        "In" | "NotIn" if values.is_empty() => {
            values.missing(
                "must be specified when `operator` is 'In' or 'NotIn'",
                errors,
            );
        }
        "Exists" | "DoesNotExist" if !values.is_empty() => {
            let why = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
            values.forbidden(why, errors);
        }
        "Gt" | "Lt" if values.len() != 1 => {
            let why = "must be specified single value when `operator` is 'Lt' or 'Gt'";
            values.missing(why, errors);
        }
        "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
        _ => operator.invalid("not a valid selector operator", errors),
    }
}

fn weigh(term: &Place<'_>, errors: &mut Errors) {
    let weight = term.field("weight");
    if !(1..=100).contains(&weight.int()) {
        let why = "must be in the range 1-100";
        errors.push(FieldError::invalid(weight.path(), weight.int(), why));
    }
}

fn validate_pod_term(term: &Place<'_>, errors: &mut Errors) {
    validate_selector(&term.field("labelSelector"), errors);
    validate_selector(&term.field("namespaceSelector"), errors);
    for namespace in term.field("namespaces").items() {
        namespace.keep_to(dns_label, errors);
    }
    let key = term.field("topologyKey");
    if key.is_empty() {
        key.missing("can not be empty", errors);
    }
    key.label_key(errors);
}

fn validate_spreading(spec: &Place<'_>, errors: &mut Errors) {
    let mut seen: BTreeSet<(&str, &str)> = BTreeSet::new();
    for constraint in spec.field("topologySpreadConstraints").items() {
        let skew = constraint.field("maxSkew");
        if skew.int() <= 0 {
            errors.push(FieldError::invalid(
                skew.path(),
                skew.int(),
                "must be greater than zero",
            ));
        }
        let key = constraint.field("topologyKey");
        if key.is_empty() {
            key.missing("can not be empty", errors);
        }
        let action = constraint.field("whenUnsatisfiable");
        action.require_one_of(&["DoNotSchedule", "ScheduleAnyway"], errors);
        let domains = constraint.field("minDomains");
        if domains.is_there() && domains.int() <= 0 {
            domains.invalid("must be greater than zero", errors);
        }
        if domains.is_there() && action.text() != "DoNotSchedule" {
            let why =
                "can only use minDomains if whenUnsatisfiable=DoNotSchedule, not ScheduleAnyway";
            domains.invalid(why, errors);
        }
        for policy in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            constraint
                .field(policy)
                .one_of(&["Honor", "Ignore"], errors);
        }
        validate_selector(&constraint.field("labelSelector"), errors);
        if !seen.insert((key.text(), action.text())) {
            let pair = format!("{{{}, {}}}", key.text(), action.text());
            let place = format!("{}.{{topologyKey, whenUnsatisfiable}}", constraint.path());
            errors.push(FieldError::duplicate(place, pair));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn told(spec: Value) -> Vec<String> {
        let mut errors = Vec::new();
        validate(&Place::at(&spec, "spec"), &mut errors);
        let lines = errors.iter().map(ToString::to_string);
        lines
            .map(|line| line.trim_start_matches("spec.").to_owned())
            .collect()
    }

    #[test]
    fn tolerations_are_whole_or_refused() {
        assert_eq!(
            told(json!({"tolerations": [
                {"operator": "Exists"},
                {"key": "a", "operator": "Exists", "value": "b"},
                {"operator": "Equal"},
                {"key": "a", "tolerationSeconds": 3, "effect": "NoSchedule"},
                {"key": "a", "effect": "Always"},
            ]})),
            [
                r#"tolerations[1].operator: Invalid value: "b": value must be empty when `operator` is 'Exists'"#,
                r#"tolerations[2].operator: Invalid value: "Equal": operator must be Exists when `key` is empty, which means "match all values and all keys""#,
                r#"tolerations[3].effect: Invalid value: "NoSchedule": effect must be 'NoExecute' when `tolerationSeconds` is set"#,
                r#"tolerations[4].effect: Unsupported value: "Always": supported values: "NoExecute", "NoSchedule", "PreferNoSchedule""#,
            ]
        );
    }

    #[test]
    fn affinity_and_spreading_say_what_they_mean() {
        assert_eq!(
            told(json!({
                "affinity": {
                    "nodeAffinity": {REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "In"}]}]}},
                    "podAntiAffinity": {PREFERRED: [{"weight": 0, "podAffinityTerm": {"labelSelector": {}}}]},
                },
                "topologySpreadConstraints": [{"maxSkew": 0, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
            })),
            [
                "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0].values: Required value: must be specified when `operator` is 'In' or 'NotIn'",
                "affinity.podAntiAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].weight: Invalid value: 0: must be in the range 1-100",
                "affinity.podAntiAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].podAffinityTerm.topologyKey: Required value: can not be empty",
                "affinity.podAntiAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].podAffinityTerm.topologyKey: Invalid value: \"\": name part must be non-empty",
                "affinity.podAntiAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].podAffinityTerm.topologyKey: Invalid value: \"\": name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')",
                "topologySpreadConstraints[0].maxSkew: Invalid value: 0: must be greater than zero",
            ]
        );
    }
}
