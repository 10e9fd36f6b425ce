//! Rules for the metadata that all kinds share: names, labels, annotations, owners.

use serde_json::Value;

use super::place::Place;
use super::{Errors, NameRule, of};
use crate::api::fields::{self, Fields};
use crate::api::status::FieldError;
use crate::registry::Resource;
use crate::selector::{key_faults, value_faults};

/// The most bytes that all annotations of an object may have together.
const ANNOTATIONS_BYTES_MAX: usize = 256 << 10;

const SUBDOMAIN_RULE: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL_RULE: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const DNS1035_RULE: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";

fn too_long(length_max: usize) -> String {
    format!("must be no more than {length_max} characters")
}

/// What is wrong with an RFC 1123 label.
pub fn dns_label(text: &str) -> Option<String> {
    if text.len() > 63 {
        return Some(too_long(63));
    }
    (!is_dns_label(text)).then(|| LABEL_RULE.to_owned())
}

fn is_dns_label(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    !text.is_empty()
        && text.bytes().all(|byte| plain(byte) || byte == b'-')
        && text.bytes().next().is_some_and(plain)
        && text.bytes().last().is_some_and(plain)
}

/// What is wrong with an RFC 1123 subdomain.
pub fn dns_subdomain(text: &str) -> Option<String> {
    if text.len() > 253 {
        return Some(too_long(253));
    }
    (!text.split('.').all(is_dns_label)).then(|| SUBDOMAIN_RULE.to_owned())
}

/// What is wrong with a domain that a resolver's search list names: a subdomain whose labels may also hold underscores and begin with one.
pub fn search_domain(text: &str) -> Option<String> {
    const RULE: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '_', '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '_?[a-z0-9]([-_a-z0-9]*[a-z0-9])?(\\._?[a-z0-9]([-_a-z0-9]*[a-z0-9])?)*')";
    if text == "." {
        return None;
    }
    let text = text.strip_suffix('.').unwrap_or(text);
    if text.len() > 253 {
        return Some(too_long(253));
    }
    let mut labels = text
        .split('.')
        .map(|label| label.strip_prefix('_').unwrap_or(label).replace('_', "-"));
    (!labels.all(|label| is_dns_label(&label))).then(|| RULE.to_owned())
}

/// What is wrong first with `[prefix/]name`, as keys of labels and annotations have it.
pub fn qualified_name(text: &str) -> Option<String> {
    key_faults(text).into_iter().next()
}

/// What is wrong first with the value of a label.
pub fn label_value(text: &str) -> Option<String> {
    value_faults(text).into_iter().next()
}

/// What is wrong with an RFC 1035 label.
pub fn dns1035_label(text: &str) -> Option<String> {
    if text.len() > 63 {
        return Some(too_long(63));
    }
    let starts = text
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_lowercase());
    (!is_dns_label(text) || !starts).then(|| DNS1035_RULE.to_owned())
}

/// What is wrong with the name of a kind: such a label, in whichever case.
pub fn mixed_case_label(text: &str) -> Option<String> {
    let why = dns1035_label(&text.to_lowercase())?;
    Some(format!(
        "may have mixed case, but should otherwise match: {why}"
    ))
}

/// What is wrong with the name of a port, an IANA service name.
pub fn port_name(text: &str) -> Vec<&'static str> {
    let mut faults = Vec::new();
    if text.len() > 15 {
        faults.push("must be no more than 15 bytes");
    }
    if !text
        .bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    {
        faults.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)");
    }
    if !text.bytes().any(|byte| byte.is_ascii_lowercase()) {
        faults.push("must contain at least one letter (a-z)");
    }
    if text.contains("--") {
        faults.push("must not contain consecutive hyphens");
    }
    if text.starts_with('-') || text.ends_with('-') {
        faults.push("must not begin or end with a hyphen");
    }
    faults
}

/// What is wrong with a key of a ConfigMap or Secret.
pub fn config_key(text: &str) -> Option<String> {
    const RULE: &str = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    match text {
        "." | ".." => Some(format!("must not be '{text}'")),
        _ if text.len() > 253 => Some(too_long(253)),
        _ if text.is_empty() || !text.bytes().all(plain) => Some(RULE.to_owned()),
        _ if text.starts_with("..") => Some("must not start with '..'".to_owned()),
        _ => None,
    }
}

/// What is wrong with the name of an environment variable.
pub fn environment_name(text: &str) -> Option<String> {
    const RULE: &str = "a valid environment variable names must consist only of printable ASCII characters other than '='";
    let printable = |byte: u8| (0x20..0x7f).contains(&byte) && byte != b'=';
    (!text.bytes().all(printable)).then(|| RULE.to_owned())
}

/// What is wrong with a host name that may begin with a wildcard label.
pub fn wildcard_subdomain(text: &str) -> Option<String> {
    const RULE: &str = "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain, which must consist of lower case alphanumeric characters, '-' or '.' and end with an alphanumeric character (e.g. '*.example.com', regex used for validation is '\\*\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
    match text.strip_prefix("*.") {
        Some(rest) => dns_subdomain(rest).map(|_| RULE.to_owned()),
        None => Some(RULE.to_owned()),
    }
}

/// Checks a label selector: operators, and the values that go with them.
pub fn validate_selector(selector: &Place<'_>, errors: &mut Errors) {
    validate_labels(
        selector.value().object("/matchLabels"),
        &format!("{}.matchLabels", selector.path()),
        errors,
    );
    for expression in selector.field("matchExpressions").items() {
        let values = expression.field("values");
        let operator = expression.field("operator");
        match operator.text() {
            "In" | "NotIn" => {
                if values.is_empty() {
                    let why = "must be specified when `operator` is 'In' or 'NotIn'";
                    values.missing(why, errors);
                }
                for value in values.items() {
                    for why in value_faults(value.text()) {
                        value.invalid(why, errors);
                    }
                }
            }
            "Exists" | "DoesNotExist" => {
                if !values.is_empty() {
                    let why = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                    values.forbidden(why, errors);
                }
            }
            _ => operator.invalid("not a valid selector operator", errors),
        }
        expression.field("key").label_key(errors);
    }
}

/// Checks a list of label selectors.
pub fn validate_selectors(selectors: &Place<'_>, errors: &mut Errors) {
    for selector in selectors.items() {
        validate_selector(&selector, errors);
    }
}

pub fn path_segment(text: &str) -> Option<String> {
    match text {
        "." | ".." => Some(format!("may not be '{text}'")),
        _ if text.contains('/') => Some("may not contain '/'".to_owned()),
        _ if text.contains('%') => Some("may not contain '%'".to_owned()),
        _ => None,
    }
}

/// Checks a map of labels.
pub fn validate_labels(
    labels: Option<&serde_json::Map<String, Value>>,
    field: &str,
    errors: &mut Errors,
) {
    for (key, value) in labels.into_iter().flatten() {
        for why in key_faults(key) {
            errors.push(FieldError::invalid(field, key.as_str(), why));
        }
        let value = value.as_str().unwrap_or("");
        for why in value_faults(value) {
            errors.push(FieldError::invalid(field, value, why));
        }
    }
}

/// Checks what the metadata of every kind must keep to.
pub fn validate_metadata(object: &Value, resource: &Resource, errors: &mut Errors) {
    let rule = of(resource).name_rule();
    let check = |text: &str| match rule {
        NameRule::Subdomain => dns_subdomain(text),
        NameRule::Label => dns_label(text),
        NameRule::PathSegment => path_segment(text),
    };
    let name = fields::name(object);
    if name.is_empty() {
        errors.push(FieldError::required(
            "metadata.name",
            "name or generateName is required",
        ));
    } else if let Some(why) = check(name) {
        errors.push(FieldError::invalid("metadata.name", name, why));
    }
    // What a prefix is made to a name with keeps to every rule: it may end in anything that a name may contain.
    let prefix = object.text("/metadata/generateName");
    let begun = match prefix.strip_suffix('-') {
        Some(whole) if prefix.len() > 1 => format!("{whole}a"),
        _ => prefix.to_owned(),
    };
    if let Some(why) = Some(begun)
        .filter(|begun| !begun.is_empty())
        .and_then(|begun| check(&begun))
    {
        errors.push(FieldError::invalid("metadata.generateName", prefix, why));
    }
    let namespace = fields::namespace(object);
    if let Some(why) = Some(namespace)
        .filter(|namespace| !namespace.is_empty())
        .and_then(dns_label)
    {
        errors.push(FieldError::invalid("metadata.namespace", namespace, why));
    }
    validate_labels(object.object("/metadata/labels"), "metadata.labels", errors);
    let mut bytes = 0;
    for (key, value) in object.object("/metadata/annotations").into_iter().flatten() {
        for why in key_faults(&key.to_lowercase()) {
            let path = "metadata.annotations";
            errors.push(FieldError::invalid(path, key.as_str(), why));
        }
        bytes += key.len() + value.as_str().map_or(0, str::len);
    }
    if bytes > ANNOTATIONS_BYTES_MAX {
        errors.push(FieldError::too_long(
            "metadata.annotations",
            ANNOTATIONS_BYTES_MAX,
        ));
    }
    let owners = object.items("/metadata/ownerReferences");
    for (at, owner) in owners.iter().enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if owner.text(&format!("/{field}")).is_empty() {
                let path = format!("metadata.ownerReferences[{at}].{field}");
                errors.push(FieldError::required(path, "must not be empty"));
            }
        }
    }
    if owners
        .iter()
        .filter(|owner| owner.flag("/controller"))
        .count()
        > 1
    {
        let why = "Only one reference can have Controller set to true";
        errors.push(FieldError::invalid(
            "metadata.ownerReferences",
            Value::Array(owners.to_vec()),
            why,
        ));
    }
    for finalizer in object
        .items("/metadata/finalizers")
        .iter()
        .filter_map(Value::as_str)
    {
        for why in key_faults(finalizer) {
            errors.push(FieldError::invalid("metadata.finalizers", finalizer, why));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_keep_to_their_alphabets() {
        for good in ["a", "a-b", "1a", "a.b-c.d"] {
            assert_eq!(dns_subdomain(good), None, "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a..b", "a_b", "a.-b"] {
            assert!(dns_subdomain(bad).is_some(), "{bad}");
        }
        assert!(dns_label("a.b").is_some());
        assert!(dns_label(&"a".repeat(64)).is_some());
        assert_eq!(qualified_name("example.com/My_Name.1"), None);
        for bad in ["", "/a", "a/", "Ex/a", "a b", "-a"] {
            assert!(qualified_name(bad).is_some(), "{bad}");
        }
        assert_eq!(label_value(""), None);
        assert!(label_value("a b").is_some());
    }
}
