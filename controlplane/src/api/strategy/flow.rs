//! FlowSchemas and PriorityLevelConfigurations: kept as they are told, and held to what makes sense of them.

use serde_json::Value;

use super::metadata::{dns_label, dns_subdomain};
use super::place::Place;
use super::{Errors, Strategy};
use crate::api::fields::{self, Fields};
use crate::api::status::FieldError;

/// The level, and the schema, that no request waits in.
const EXEMPT: &str = "exempt";
const PRECEDENCE_DEFAULT: i64 = 1000;
const PRECEDENCE_MAX: i64 = 10_000;
const SHARES_DEFAULT: i64 = 30;
const QUEUES_DEFAULT: i64 = 64;
const QUEUES_MAX: i64 = 10_000_000;
const HAND_DEFAULT: i64 = 8;
const QUEUE_LENGTH_DEFAULT: i64 = 50;
/// What one hash has for dealing a hand of queues.
const HASH_BITS: u32 = 60;
const VERBS: [&str; 10] = [
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "proxy",
    "update",
    "watch",
    "*",
];

pub struct FlowSchema;

impl Strategy for FlowSchema {
    fn default(&self, schema: &mut Value) {
        if schema.int("/spec/matchingPrecedence") == 0 {
            schema.object_mut("/spec");
            schema.set("/spec/matchingPrecedence", PRECEDENCE_DEFAULT);
        }
    }

    fn validate(&self, schema: &Value, errors: &mut Errors) {
        let spec = Place::root(schema).field("spec");
        let precedence = spec.field("matchingPrecedence");
        match precedence.int() {
            ..=0 => precedence.invalid("must be a positive value", errors),
            1 if fields::name(schema) != EXEMPT => {
                let why = "only the schema named 'exempt' may have matchingPrecedence 1";
                precedence.invalid(why, errors);
            }
            above if above > PRECEDENCE_MAX => {
                precedence.invalid(format!("must not be greater than {PRECEDENCE_MAX}"), errors);
            }
            _ => {}
        }
        if spec.field("distinguisherMethod").is_there() {
            let method = spec.field("distinguisherMethod.type");
            method.require_one_of(&["ByNamespace", "ByUser"], errors);
        }
        let level = spec.field("priorityLevelConfiguration.name");
        if level.is_empty() {
            level.missing("must reference a priority level", errors);
        }
        level.keep_to(dns_subdomain, errors);
        for rule in spec.field("rules").items() {
            validate_rule(&rule, errors);
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

fn validate_rule(rule: &Place<'_>, errors: &mut Errors) {
    let subjects = rule.field("subjects");
    if subjects.is_empty() {
        subjects.missing("subjects must contain at least one value", errors);
    }
    for subject in subjects.items() {
        validate_subject(&subject, errors);
    }
    let (resources, paths) = (rule.field("resourceRules"), rule.field("nonResourceRules"));
    if resources.is_empty() && paths.is_empty() {
        let why = "at least one of resourceRules and nonResourceRules has to be non-empty";
        rule.missing(why, errors);
    }
    for rule in resources.items() {
        validate_verbs(&rule, errors);
        let groups = "resource rules must supply at least one api group";
        all_or_some(&rule.field("apiGroups"), groups, "api groups", errors);
        let resources = "resource rules must supply at least one resource";
        all_or_some(&rule.field("resources"), resources, "resources", errors);
        let namespaces = rule.field("namespaces");
        if !(namespaces.is_empty() && rule.field("clusterScope").flag()) {
            let why =
                "resource rules that are not cluster scoped must supply at least one namespace";
            all_or_some(&namespaces, why, "namespaces", errors);
        }
        for namespace in namespaces
            .items()
            .filter(|namespace| namespace.text() != "*")
        {
            let rule = |text: &str| {
                let why = dns_label(text)?;
                Some(format!(
                    "each member of this list must be '*' or a DNS-1123 label; {why}"
                ))
            };
            namespace.keep_to(rule, errors);
        }
    }
    for rule in paths.items() {
        validate_verbs(&rule, errors);
        let urls = rule.field("nonResourceURLs");
        let why = "nonResourceURLs must contain at least one value";
        all_or_some(&urls, why, "non-resource URLs", errors);
        for url in urls.items().filter(|url| url.text() != "*") {
            let text = url.text();
            if !text.starts_with('/') {
                url.invalid("must start with slash", errors);
            } else if text.contains(' ') {
                url.invalid("must not contain white-space", errors);
            } else if text.contains("//") {
                url.invalid("must not contain double slash", errors);
            } else if text.trim_end_matches('*').contains('*') || text.ends_with("**") {
                url.invalid("wildcard can only do suffix matching", errors);
            }
        }
    }
}

/// A list in which `*` stands alone.
fn all_or_some(list: &Place<'_>, absent: &str, what: &str, errors: &mut Errors) {
    if list.is_empty() {
        list.missing(absent, errors);
    } else if list.len() > 1 && list.items().any(|item| item.text() == "*") {
        let why = format!("if '*' is present, must not specify other {what}");
        list.invalid(why, errors);
    }
}

fn validate_verbs(rule: &Place<'_>, errors: &mut Errors) {
    let verbs = rule.field("verbs");
    all_or_some(
        &verbs,
        "verbs must contain at least one value",
        "verbs",
        errors,
    );
    if verbs.items().any(|verb| !VERBS.contains(&verb.text())) {
        let known = &VERBS[..VERBS.len() - 1];
        errors.push(FieldError::unsupported(
            verbs.path(),
            verbs.value().clone(),
            known,
        ));
    }
}

fn validate_subject(subject: &Place<'_>, errors: &mut Errors) {
    let kinds = [
        ("User", "user"),
        ("Group", "group"),
        ("ServiceAccount", "serviceAccount"),
    ];
    let kind = subject.field("kind");
    kind.require_one_of(&kinds.map(|(kind, _)| kind), errors);
    for (name, field) in kinds {
        let about = subject.field(field);
        if name != kind.text() {
            if about.is_there() && kinds.iter().any(|(known, _)| *known == kind.text()) {
                let why = format!("{field} is forbidden when subject kind is not '{name}'");
                about.forbidden(&why, errors);
            }
            continue;
        }
        if !about.is_there() {
            let why = format!("{field} is required when subject kind is '{name}'");
            about.missing(&why, errors);
            continue;
        }
        let given = about.field("name");
        given.require(errors);
        if name == "ServiceAccount" {
            if given.text() != "*" {
                given.keep_to(dns_subdomain, errors);
            }
            let namespace = about.field("namespace");
            if namespace.is_empty() {
                namespace.missing("must specify namespace for service account", errors);
            }
            namespace.keep_to(dns_label, errors);
        }
    }
}

pub struct PriorityLevel;

impl Strategy for PriorityLevel {
    fn default(&self, level: &mut Value) {
        for (kind, shares) in [("limited", SHARES_DEFAULT), ("exempt", 0)] {
            let spec = format!("/spec/{kind}");
            if level.has(&spec) {
                level.default(&format!("{spec}/nominalConcurrencyShares"), shares);
                level.default(&format!("{spec}/lendablePercent"), 0);
            }
        }
        let queuing = "/spec/limited/limitResponse/queuing";
        if level.has(queuing) {
            for (field, default) in [
                ("handSize", HAND_DEFAULT),
                ("queues", QUEUES_DEFAULT),
                ("queueLengthLimit", QUEUE_LENGTH_DEFAULT),
            ] {
                let pointer = format!("{queuing}/{field}");
                if level.int(&pointer) == 0 {
                    level.set(&pointer, default);
                }
            }
        }
    }

    fn validate(&self, level: &Value, errors: &mut Errors) {
        let spec = Place::root(level).field("spec");
        let kind = spec.field("type");
        if (fields::name(level) == EXEMPT) != (kind.text() == "Exempt") {
            kind.invalid("must be 'Exempt' if and only if `name` is 'exempt'", errors);
        }
        kind.require_one_of(&["Exempt", "Limited"], errors);
        let (limited, exempt) = (spec.field("limited"), spec.field("exempt"));
        match kind.text() {
            "Exempt" if limited.is_there() => {
                limited.forbidden("must be nil if the type is not Limited", errors);
            }
            "Limited" if exempt.is_there() => {
                exempt.forbidden("must be nil if the type is Limited", errors);
            }
            "Limited" if !limited.is_there() => {
                limited.missing("must not be empty when type is Limited", errors);
            }
            _ => {}
        }
        for shares in [&limited, &exempt] {
            let nominal = shares.field("nominalConcurrencyShares");
            if nominal.int() < 0 {
                nominal.invalid("must be a non-negative integer", errors);
            }
            shares.field("lendablePercent").within(0..=100, errors);
        }
        let borrowing = limited.field("borrowingLimitPercent");
        if borrowing.int() < 0 {
            borrowing.invalid("if specified, must be a non-negative integer", errors);
        }
        if limited.is_there() {
            validate_response(&limited.field("limitResponse"), errors);
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

fn validate_response(response: &Place<'_>, errors: &mut Errors) {
    response
        .field("type")
        .require_one_of(&["Queue", "Reject"], errors);
    let queuing = response.field("queuing");
    match (response.field("type").text(), queuing.is_there()) {
        ("Reject", true) => {
            let why = "must be nil if limited.limitResponse.type is not Limited";
            queuing.forbidden(why, errors);
        }
        ("Queue", false) => {
            let why = "must not be empty if limited.limitResponse.type is Limited";
            queuing.missing(why, errors);
        }
        ("Queue", true) => validate_queues(&queuing, errors),
        _ => {}
    }
}

fn validate_queues(queuing: &Place<'_>, errors: &mut Errors) {
    let (length, queues, hand) = (
        queuing.field("queueLengthLimit"),
        queuing.field("queues"),
        queuing.field("handSize"),
    );
    for number in [&length, &queues, &hand] {
        if number.int() <= 0 {
            number.invalid("must be positive", errors);
        }
    }
    if queues.int() > QUEUES_MAX {
        queues.invalid(format!("must not be greater than {QUEUES_MAX}"), errors);
    }
    let (deck, dealt) = (queues.int(), hand.int());
    if deck <= 0 || dealt <= 0 {
        return;
    }
    if dealt > deck {
        hand.invalid(
            format!("should not be greater than queues ({deck})"),
            errors,
        );
    } else if entropy_bits(deck, dealt) > HASH_BITS {
        let why = format!(
            "required entropy bits of deckSize {deck} and handSize {dealt} should not be greater than {HASH_BITS}"
        );
        hand.invalid(why, errors);
    }
}

/// How many bits of a hash deal a hand out of a deck (shuffle sharding).
fn entropy_bits(deck: i64, hand: i64) -> u32 {
    ((deck as f64).log2() * hand as f64).ceil() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_level_is_filled_in_and_its_queues_can_be_dealt() {
        let mut level = json!({"metadata": {"name": "l"}, "spec": {"type": "Limited", "limited": {
            "limitResponse": {"type": "Queue", "queuing": {}}}}});
        PriorityLevel.default(&mut level);
        let expected = json!({"nominalConcurrencyShares": 30, "lendablePercent": 0,
            "limitResponse": {"type": "Queue", "queuing": {"handSize": 8, "queues": 64, "queueLengthLimit": 50}}});
        assert_eq!(level["spec"]["limited"], expected);
        let faults = |level: &Value| {
            let mut errors = Vec::new();
            PriorityLevel.validate(level, &mut errors);
            errors
                .into_iter()
                .map(|e| format!("{}: {}", e.field, e.message))
                .collect::<Vec<_>>()
        };
        assert_eq!(faults(&level), Vec::<String>::new());
        let queuing = "/spec/limited/limitResponse/queuing";
        level.set(&format!("{queuing}/handSize"), 65);
        assert!(faults(&level)[0].contains("should not be greater than queues (64)"));
        level.set(&format!("{queuing}/handSize"), 20);
        assert!(faults(&level)[0].contains("required entropy bits"));
        let exempt = json!({"metadata": {"name": "x"}, "spec": {"type": "Exempt", "limited": {}}});
        assert_eq!(faults(&exempt).len(), 3, "{:?}", faults(&exempt));
    }

    #[test]
    fn a_schema_says_whose_requests_it_means() {
        let faults = |rule: Value| {
            let mut schema = json!({"metadata": {"name": "s"}, "spec": {
                "priorityLevelConfiguration": {"name": "l"}, "rules": [rule]}});
            FlowSchema.default(&mut schema);
            assert_eq!(schema["spec"]["matchingPrecedence"], 1000);
            let mut errors = Vec::new();
            FlowSchema.validate(&schema, &mut errors);
            errors.into_iter().map(|e| e.field).collect::<Vec<_>>()
        };
        let user = json!({"kind": "User", "user": {"name": "a"}});
        let all =
            json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"]});
        assert!(faults(json!({"subjects": [user], "resourceRules": [all]})).is_empty());
        assert_eq!(
            faults(
                json!({"subjects": [{"kind": "User", "group": {"name": "a"}}],
                "nonResourceRules": [{"verbs": ["get", "fly"], "nonResourceURLs": ["x"]}]})
            ),
            [
                "spec.rules[0].subjects[0].user",
                "spec.rules[0].subjects[0].group",
                "spec.rules[0].nonResourceRules[0].verbs",
                "spec.rules[0].nonResourceRules[0].nonResourceURLs[0]",
            ]
        );
    }
}
