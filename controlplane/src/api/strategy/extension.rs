//! Definitions of custom resources and services of other API servers: kept as storage. What is held is what others would trip
//! over when these are acted on: names, versions, where to ask. Schemas are kept as they are told.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::metadata::{dns_subdomain, dns1035_label, mixed_case_label};
use super::place::Place;
use super::webhook::validate_service_port;
use super::{Errors, NameRule, Strategy};
use crate::api::fields::{self, Fields};
use crate::api::status::FieldError;

pub struct Definition;

impl Strategy for Definition {
    fn default(&self, definition: &mut Value) {
        let kind = definition.text("/spec/names/kind").to_owned();
        if !kind.is_empty() {
            definition.default("/spec/names/singular", kind.to_lowercase());
            definition.default("/spec/names/listKind", format!("{kind}List"));
        }
        definition.object_mut("/spec");
        definition.default("/spec/conversion", json!({"strategy": "None"}));
        if definition.has("/spec/conversion/webhook/clientConfig/service") {
            definition.default("/spec/conversion/webhook/clientConfig/service/port", 443);
        }
    }

    fn prepare_create(&self, definition: &mut Value) {
        let versions = definition.items("/spec/versions").iter();
        let stored: Vec<Value> = versions
            .filter(|version| version.flag("/storage"))
            .take(1)
            .map(|version| version["name"].clone())
            .collect();
        if !stored.is_empty() {
            definition.set("/status", json!({"storedVersions": stored}));
        }
    }

    fn validate(&self, definition: &Value, errors: &mut Errors) {
        let spec = Place::root(definition).field("spec");
        let (group, plural) = (spec.field("group"), spec.field("names.plural"));
        let name = fields::name(definition);
        if name != format!("{}.{}", plural.text(), group.text()) {
            let why = r#"must be spec.names.plural+"."+spec.group"#;
            errors.push(FieldError::invalid("metadata.name", name, why));
        }
        if group.require(errors) {
            if let Some(why) = dns_subdomain(group.text()) {
                group.invalid(why, errors);
            } else if !group.text().contains('.') {
                group.invalid("should be a domain with at least one dot", errors);
            }
        }
        spec.field("scope")
            .require_one_of(&["Cluster", "Namespaced"], errors);
        validate_versions(&spec.field("versions"), errors);
        validate_names(&spec.field("names"), errors);
        spec.field("conversion.strategy")
            .require_one_of(&["None", "Webhook"], errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

fn validate_versions(versions: &Place<'_>, errors: &mut Errors) {
    for version in versions.items() {
        let schema = version.field("schema.openAPIV3Schema");
        if !schema.is_there() {
            schema.missing("", errors);
        }
    }
    let mut names = BTreeSet::new();
    let mut stored = 0;
    for version in versions.items() {
        let name = version.field("name");
        names.insert(name.text());
        stored += usize::from(version.field("storage").flag());
        if let Some(why) = dns1035_label(name.text()) {
            errors.push(FieldError::invalid(name.path(), name.text(), why));
        }
    }
    if names.len() < versions.len() {
        versions.invalid("must contain unique version names", errors);
    }
    if stored != 1 {
        let why = "must have exactly one version marked as storage version";
        versions.invalid(why, errors);
    }
}

fn validate_names(names: &Place<'_>, errors: &mut Errors) {
    for field in ["plural", "singular", "kind", "listKind"] {
        names.field(field).require(errors);
    }
    for field in ["plural", "singular"] {
        names.field(field).keep_to(dns1035_label, errors);
    }
    let (kind, list_kind) = (names.field("kind"), names.field("listKind"));
    kind.keep_to(mixed_case_label, errors);
    list_kind.keep_to(mixed_case_label, errors);
    for name in names.field("shortNames").items() {
        if let Some(why) = dns1035_label(name.text()) {
            name.invalid(why, errors);
        }
    }
    if !kind.is_empty() && kind.text() == list_kind.text() {
        list_kind.invalid("kind and listKind may not be the same", errors);
    }
    for category in names.field("categories").items() {
        if let Some(why) = dns1035_label(category.text()) {
            category.invalid(why, errors);
        }
    }
}

pub struct Service;

impl Strategy for Service {
    fn default(&self, service: &mut Value) {
        if service.has("/spec/service") {
            service.default("/spec/service/port", 443);
        }
    }

    fn validate(&self, service: &Value, errors: &mut Errors) {
        let spec = Place::root(service).field("spec");
        let (group, version) = (spec.field("group"), spec.field("version"));
        let wanted = format!("{}.{}", version.text(), group.text());
        let name = fields::name(service);
        if name != wanted {
            let why = format!("must be `spec.version+\".\"+spec.group`: {wanted:?}");
            errors.push(FieldError::invalid("metadata.name", name, why));
        }
        if group.is_empty() && version.text() != "v1" {
            let why = "only v1 may have an empty group and it better be legacy kube";
            group.missing(why, errors);
        }
        group.keep_to(dns_subdomain, errors);
        if let Some(why) = dns1035_label(version.text()) {
            errors.push(FieldError::invalid(version.path(), version.text(), why));
        }
        for (field, most) in [("groupPriorityMinimum", 20_000), ("versionPriority", 1000)] {
            let priority = spec.field(field);
            if !(1..=most).contains(&priority.int()) {
                let why = format!("must be positive and less than {most}");
                errors.push(FieldError::invalid(priority.path(), priority.int(), why));
            }
        }
        let (unchecked, bundle) = (spec.field("insecureSkipTLSVerify"), spec.field("caBundle"));
        let remote = spec.field("service");
        if !remote.is_there() {
            if unchecked.flag() {
                let why = "local APIServices may not have insecureSkipTLSVerify";
                unchecked.invalid(why, errors);
            }
            return;
        }
        remote.field("namespace").require(errors);
        remote.field("name").require(errors);
        validate_service_port(&remote.field("port"), errors);
        if unchecked.flag() && !bundle.is_empty() {
            unchecked.invalid("may not be true if caBundle is present", errors);
        }
    }

    fn name_rule(&self) -> NameRule {
        NameRule::PathSegment
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::told_with_defaults;
    use super::*;

    #[test]
    fn a_definition_is_named_after_what_it_defines_and_keeps_one_version() {
        let version = json!({"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {}}});
        let mut definition = json!({"metadata": {"name": "xs.example.com"}, "spec": {"group": "example.com",
            "scope": "Cluster", "names": {"plural": "xs", "kind": "X"}, "versions": [version]}});
        assert_eq!(told_with_defaults(&Definition, definition.clone()), [""; 0]);
        Definition.default(&mut definition);
        assert_eq!(definition["spec"]["names"]["listKind"], "XList");
        Definition.prepare_create(&mut definition);
        assert_eq!(definition["status"]["storedVersions"], json!(["v1"]));
        definition["metadata"]["name"] = "ys.example.com".into();
        definition["spec"]["versions"][0]["storage"] = false.into();
        definition["spec"]["versions"][0]["schema"] = json!(null);
        let told = told_with_defaults(&Definition, definition);
        assert_eq!(told.len(), 3, "{told:?}");
    }

    #[test]
    fn a_service_of_another_server_is_named_after_its_version() {
        let spec = json!({"group": "a.b", "version": "v1", "groupPriorityMinimum": 1, "versionPriority": 0,
            "service": {"name": "s", "namespace": "n"}});
        assert_eq!(
            told_with_defaults(&Service, json!({"metadata": {"name": "x"}, "spec": spec})),
            [
                "metadata.name: Invalid value: \"x\": must be `spec.version+\".\"+spec.group`: \"v1.a.b\"",
                "spec.versionPriority: Invalid value: 0: must be positive and less than 1000",
            ]
        );
    }
}
