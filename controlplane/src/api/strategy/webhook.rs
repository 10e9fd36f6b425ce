//! Configurations of admission webhooks, and the rules by which webhooks and policies say what they are for.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::metadata::{dns_subdomain, dns1035_label, qualified_name, validate_selector};
use super::place::Place;
use super::{Errors, Strategy};
use crate::api::fields::Fields;
use crate::api::status::FieldError;

const CONDITIONS_MAX: usize = 64;
const REVIEW_VERSIONS: [&str; 2] = ["v1", "v1beta1"];
const SIDE_EFFECTS: [&str; 2] = ["None", "NoneOnDryRun"];
const OPERATIONS: [&str; 5] = ["*", "CONNECT", "CREATE", "DELETE", "UPDATE"];
pub const FAILURE_POLICIES: [&str; 2] = ["Fail", "Ignore"];
pub const MATCH_POLICIES: [&str; 2] = ["Equivalent", "Exact"];
pub const REINVOCATION_POLICIES: [&str; 2] = ["IfNeeded", "Never"];

/// What selects objects and namespaces for a webhook or a policy, where it is left out.
pub fn default_matching(owner: &mut Value) {
    owner.default("/matchPolicy", "Equivalent");
    for selector in ["/namespaceSelector", "/objectSelector"] {
        owner.default(selector, json!({}));
    }
    for rules in ["/rules", "/resourceRules", "/excludeResourceRules"] {
        for rule in owner.items_mut(rules) {
            rule.default("/scope", "*");
        }
    }
}

/// Validating and mutating ones: the second have a reinvocation policy besides.
pub struct Configuration;

impl Strategy for Configuration {
    fn default(&self, configuration: &mut Value) {
        let mutating = configuration.text("/kind").starts_with("Mutating");
        for hook in configuration.items_mut("/webhooks") {
            hook.default("/failurePolicy", "Fail");
            hook.default("/timeoutSeconds", 10);
            default_matching(hook);
            if mutating {
                hook.default("/reinvocationPolicy", "Never");
            }
            if hook.has("/clientConfig/service") {
                hook.default("/clientConfig/service/port", 443);
            }
        }
    }

    fn validate(&self, configuration: &Value, errors: &mut Errors) {
        let mut names = BTreeSet::new();
        for hook in Place::root(configuration).field("webhooks").items() {
            validate_hook(&hook, errors);
            validate_review_versions(&hook.field("admissionReviewVersions"), errors);
            let name = hook.field("name");
            if !name.is_empty() && !names.insert(name.text()) {
                name.duplicate(errors);
            }
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

fn validate_hook(hook: &Place<'_>, errors: &mut Errors) {
    let name = hook.field("name");
    if name.require(errors) {
        if let Some(why) = dns_subdomain(name.text()) {
            name.invalid(why, errors);
        } else if name.text().split('.').count() < 3 {
            let why = "should be a domain with at least three segments separated by dots";
            name.invalid(why, errors);
        }
    }
    for rule in hook.field("rules").items() {
        validate_rule(&rule, errors);
    }
    for (field, known) in [
        ("failurePolicy", &FAILURE_POLICIES),
        ("matchPolicy", &MATCH_POLICIES),
    ] {
        hook.field(field).exactly_one_of(known, errors);
    }
    let effects = hook.field("sideEffects");
    if effects.is_there() {
        effects.exactly_one_of(&SIDE_EFFECTS, errors);
    } else {
        effects.missing("must specify one of None, NoneOnDryRun", errors);
    }
    let timeout = hook.field("timeoutSeconds");
    if timeout.is_there() && !(1..=30).contains(&timeout.int()) {
        let why = "the timeout value must be between 1 and 30 seconds";
        timeout.invalid(why, errors);
    }
    validate_selector(&hook.field("namespaceSelector"), errors);
    validate_selector(&hook.field("objectSelector"), errors);
    hook.field("reinvocationPolicy")
        .exactly_one_of(&REINVOCATION_POLICIES, errors);
    let client = hook.field("clientConfig");
    let (url, service) = (client.field("url"), client.field("service"));
    match (url.is_there(), service.is_there()) {
        (true, false) => validate_url(&url, errors),
        (false, true) => validate_service(&service, errors),
        _ => client.missing("exactly one of url or service is required", errors),
    }
    validate_conditions(&hook.field("matchConditions"), errors);
}

fn validate_review_versions(versions: &Place<'_>, errors: &mut Errors) {
    if versions.is_empty() {
        versions.missing("must specify one of v1, v1beta1", errors);
        return;
    }
    let mut seen = BTreeSet::new();
    for version in versions.items() {
        if !seen.insert(version.text()) {
            version.invalid("duplicate version", errors);
        } else if let Some(why) = dns1035_label(version.text()) {
            version.invalid(why, errors);
        }
    }
    if !REVIEW_VERSIONS.iter().any(|known| seen.contains(known)) {
        versions.invalid("must include at least one of v1, v1beta1", errors);
    }
}

fn validate_url(url: &Place<'_>, errors: &mut Errors) {
    const FORM: &str = "; desired format: https://host[/path]";
    let (scheme, rest) = url.text().split_once("://").unwrap_or(("", url.text()));
    if scheme != "https" {
        let why = format!("'https' is the only allowed URL scheme{FORM}");
        errors.push(FieldError::invalid(url.path(), scheme, why));
    }
    let rest = if scheme.is_empty() { "" } else { rest };
    let (rest, fragment) = rest.split_once('#').unwrap_or((rest, ""));
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let authority = rest.split('/').next().unwrap_or("");
    let (user, host) = authority.rsplit_once('@').unwrap_or(("", authority));
    let mut refuse = |part: &str, why: String| {
        errors.push(FieldError::invalid(url.path(), part, why));
    };
    if host.is_empty() {
        refuse(host, format!("host must be specified{FORM}"));
    }
    for (part, what) in [
        (user, "user information is"),
        (fragment, "fragments are"),
        (query, "query parameters are"),
    ] {
        if !part.is_empty() {
            refuse(part, format!("{what} not permitted in the URL"));
        }
    }
}

fn validate_service(service: &Place<'_>, errors: &mut Errors) {
    service.field("name").require(errors);
    service.field("namespace").require(errors);
    validate_service_port(&service.field("port"), errors);
    let path = service.field("path");
    let text = path.text();
    match text {
        "" | "/" => return,
        "//" => return path.invalid("segment[0] may not be empty", errors),
        _ if !text.starts_with('/') => path.invalid("must start with a '/'", errors),
        _ => {}
    }
    let rest: String = text.chars().skip(1).collect();
    let steps = rest.strip_suffix('/').unwrap_or(&rest).split('/');
    for (at, step) in steps.enumerate() {
        if step.is_empty() {
            path.invalid(format!("segment[{at}] may not be empty"), errors);
        } else if let Some(why) = dns_subdomain(step) {
            path.invalid(format!("segment[{at}]: {why}"), errors);
        }
    }
}

/// The port of a Service that the API server itself calls.
pub fn validate_service_port(port: &Place<'_>, errors: &mut Errors) {
    if !(1..=65535).contains(&port.int()) {
        let why = "port is not valid: must be between 1 and 65535, inclusive";
        port.invalid(why, errors);
    }
}

/// Conditions under which a webhook or policy is asked. Their expressions are kept, not compiled.
pub fn validate_conditions(conditions: &Place<'_>, errors: &mut Errors) {
    conditions.at_most(CONDITIONS_MAX, errors);
    let mut names = BTreeSet::new();
    for condition in conditions.items() {
        let (expression, name) = (condition.field("expression"), condition.field("name"));
        if expression.text().trim().is_empty() {
            expression.missing("", errors);
        }
        if name.require(errors) {
            name.keep_to(qualified_name, errors);
            if !names.insert(name.text()) {
                name.duplicate(errors);
            }
        }
    }
}

/// Operations and resources.
pub fn validate_rule(rule: &Place<'_>, errors: &mut Errors) {
    let operations = rule.field("operations");
    operations.require(errors);
    alone(
        &operations,
        "if '*' is present, must not specify other operations",
        errors,
    );
    for operation in operations.items() {
        operation.exactly_one_of(&OPERATIONS, errors);
    }
    let (groups, versions) = (rule.field("apiGroups"), rule.field("apiVersions"));
    groups.require(errors);
    alone(
        &groups,
        "if '*' is present, must not specify other API groups",
        errors,
    );
    versions.require(errors);
    alone(
        &versions,
        "if '*' is present, must not specify other API versions",
        errors,
    );
    for version in versions.items() {
        version.require(errors);
    }
    validate_resources(&rule.field("resources"), errors);
    let scopes = ["*", "Cluster", "Namespaced"];
    rule.field("scope").exactly_one_of(&scopes, errors);
}

/// Who names everything names nothing else.
fn alone(list: &Place<'_>, why: &str, errors: &mut Errors) {
    if list.len() > 1 && list.items().any(|item| item.text() == "*") {
        list.invalid(why, errors);
    }
}

fn validate_resources(resources: &Place<'_>, errors: &mut Errors) {
    resources.require(errors);
    let (mut whole, mut parts) = (BTreeSet::new(), BTreeSet::new());
    for item in resources.items() {
        let text = item.text();
        if !item.require(errors) {
            continue;
        }
        let Some((resource, part)) = text.split_once('/') else {
            continue;
        };
        if whole.contains(resource) {
            let why = format!("if '{resource}/*' is present, must not specify {text}");
            item.invalid(why, errors);
        }
        if parts.contains(part) {
            let why = format!("if '*/{part}' is present, must not specify {text}");
            item.invalid(why, errors);
        }
        if part == "*" {
            whole.insert(resource);
        }
        if resource == "*" {
            parts.insert(part);
        }
    }
    let names = |wanted: &str| resources.items().any(|item| item.text() == wanted);
    if resources.len() > 1 && names("*/*") {
        resources.invalid(
            "if '*/*' is present, must not specify other resources",
            errors,
        );
    }
    // Upstream looks at the last one without a subresource.
    let plain = resources.items().filter(|item| !item.text().contains('/'));
    let other = plain.last().is_some_and(|item| item.text() != "*");
    if names("*") && other {
        let why = "if '*' is present, must not specify other resources without subresources";
        resources.invalid(why, errors);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::told_with_defaults;
    use super::*;

    fn hook(change: impl FnOnce(&mut Value)) -> Vec<String> {
        let rule = json!({"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]});
        let mut hook = json!({"name": "a.example.com", "clientConfig": {"url": "https://a.example.com/x"},
            "rules": [rule], "sideEffects": "None", "admissionReviewVersions": ["v1"]});
        change(&mut hook);
        let kind = "MutatingWebhookConfiguration";
        told_with_defaults(&Configuration, json!({"kind": kind, "webhooks": [hook]}))
    }

    #[test]
    fn a_hook_is_complete_and_names_what_it_is_for() {
        assert_eq!(hook(|_| {}), [""; 0]);
        let told = hook(|hook| {
            hook["name"] = "a".into();
            hook["clientConfig"] = json!({"url": "http://u@a/?q"});
            hook["rules"][0]["operations"] = json!(["*", "FLY"]);
            hook["rules"][0]["resources"] = json!(["*", "pods", "*/*"]);
            hook["sideEffects"] = "Some".into();
            hook["admissionReviewVersions"] = json!(["v9"]);
        });
        for expected in [
            "webhooks[0].name: Invalid value: \"a\": should be a domain with at least three segments",
            "webhooks[0].rules[0].operations: Invalid value: [\"*\",\"FLY\"]: if '*' is present",
            "webhooks[0].rules[0].operations[1]: Unsupported value: \"FLY\"",
            "webhooks[0].rules[0].resources: Invalid value: [\"*\",\"pods\",\"*/*\"]: if '*/*' is present",
            "must not specify other resources without subresources",
            "webhooks[0].sideEffects: Unsupported value: \"Some\"",
            "webhooks[0].clientConfig.url: Invalid value: \"http\": 'https' is the only allowed URL scheme",
            "webhooks[0].clientConfig.url: Invalid value: \"u\": user information",
            "webhooks[0].clientConfig.url: Invalid value: \"q\": query parameters",
            "webhooks[0].admissionReviewVersions: Invalid value: [\"v9\"]: must include at least one of v1, v1beta1",
        ] {
            assert!(
                told.iter().any(|line| line.contains(expected)),
                "{expected}\n{told:#?}"
            );
        }
        let told =
            hook(|hook| hook["clientConfig"] = json!({"service": {"name": "s", "path": "a//b"}}));
        assert_eq!(
            told,
            [
                "webhooks[0].clientConfig.service.namespace: Required value",
                "webhooks[0].clientConfig.service.path: Invalid value: \"a//b\": must start with a '/'",
                "webhooks[0].clientConfig.service.path: Invalid value: \"a//b\": segment[0] may not be empty",
                "webhooks[0].clientConfig.service.path: Invalid value: \"a//b\": segment[1] may not be empty",
            ]
        );
    }
}
