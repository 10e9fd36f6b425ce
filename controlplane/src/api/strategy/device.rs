//! Devices (resource.k8s.io): classes, claims, templates of claims, and the slices in which drivers tell what there is.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::metadata::{dns_label, dns_subdomain};
use super::place::Place;
use super::pod_spec::validate_node_selector;
use super::{Errors, Strategy};
use crate::api::fields::{self, Fields};

const REQUESTS_MAX: usize = 32;
const CONSTRAINTS_MAX: usize = 32;
const CONFIGS_MAX: usize = 32;
const SELECTORS_MAX: usize = 32;
const ALTERNATIVES_MAX: usize = 8;
const TOLERATIONS_MAX: usize = 16;
const RESERVED_FOR_MAX: usize = 256;
const DRIVER_BYTES_MAX: usize = 63;
const EXPRESSION_BYTES_MAX: usize = 10 << 10;
const DEVICES_MAX: usize = 128;
/// Of devices with taints or counters, which cost more to look at.
const ADVANCED_DEVICES_MAX: usize = 64;
const COUNTER_SETS_MAX: usize = 8;
const COUNTERS_MAX: usize = 32;
const ATTRIBUTES_MAX: usize = 32;
const TAINTS_MAX: usize = 16;
const IDENTIFIER_BYTES_MAX: usize = 32;
const TEXT_BYTES_MAX: usize = 64;

fn default_claim(spec: &str, object: &mut Value) {
    for request in object.items_mut(&format!("{spec}/devices/requests")) {
        if request.has("/exactly") {
            default_request("/exactly", request);
        }
        for alternative in request.items_mut("/firstAvailable") {
            default_request("", alternative);
        }
    }
}

fn default_request(at: &str, request: &mut Value) {
    request.default(&format!("{at}/allocationMode"), "ExactCount");
    let (mode, count) = (format!("{at}/allocationMode"), format!("{at}/count"));
    if request.text(&mode) == "ExactCount" && request.int(&count) == 0 {
        request.set(&count, 1);
    }
}

pub struct Class;

impl Strategy for Class {
    fn validate(&self, class: &Value, errors: &mut Errors) {
        let spec = Place::root(class).field("spec");
        validate_selectors(&spec.field("selectors"), errors);
        let configs = spec.field("config");
        configs.at_most(CONFIGS_MAX, errors);
        for config in configs.items() {
            validate_configuration(&config, errors);
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

pub struct Claim;

impl Strategy for Claim {
    fn default(&self, claim: &mut Value) {
        default_claim("/spec", claim);
    }

    fn validate(&self, claim: &Value, errors: &mut Errors) {
        validate_claim(&Place::root(claim).field("spec.devices"), errors);
        let reserved = Place::root(claim).field("status.reservedFor");
        reserved.at_most(RESERVED_FOR_MAX, errors);
        for consumer in reserved.items() {
            for field in ["resource", "name", "uid"] {
                consumer.field(field).require(errors);
            }
        }
    }

    fn validate_update(&self, claim: &Value, old: &Value, errors: &mut Errors) {
        let spec = |claim| Place::root(claim).field("spec");
        spec(claim).unchanged(&spec(old), errors);
    }
}

pub struct ClaimTemplate;

impl Strategy for ClaimTemplate {
    fn default(&self, template: &mut Value) {
        default_claim("/spec/spec", template);
    }

    fn validate(&self, template: &Value, errors: &mut Errors) {
        validate_claim(&Place::root(template).field("spec.spec.devices"), errors);
    }

    fn validate_update(&self, template: &Value, old: &Value, errors: &mut Errors) {
        let spec = |template| Place::root(template).field("spec");
        spec(template).unchanged(&spec(old), errors);
    }
}

/// Items whose names must differ.
fn names_differ(items: &Place<'_>, errors: &mut Errors) {
    let mut seen = BTreeSet::new();
    for item in items.items() {
        let name = item.field("name");
        if !name.is_empty() && !seen.insert(name.text()) {
            name.duplicate(errors);
        }
    }
}

fn validate_claim(devices: &Place<'_>, errors: &mut Errors) {
    let requests = devices.field("requests");
    requests.at_most(REQUESTS_MAX, errors);
    names_differ(&requests, errors);
    let mut names: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for request in requests.items() {
        let alternatives = request.field("firstAvailable");
        let inner = alternatives.items();
        names.insert(
            request.field("name").text(),
            inner
                .map(|alternative| alternative.field("name").text())
                .collect(),
        );
        validate_request(&request, errors);
    }
    let constraints = devices.field("constraints");
    constraints.at_most(CONSTRAINTS_MAX, errors);
    for constraint in constraints.items() {
        validate_references(&constraint.field("requests"), &names, errors);
        let attributes = ["matchAttribute", "distinctAttribute"].map(|name| constraint.field(name));
        if attributes.iter().all(Place::is_empty) {
            let why = "exactly one of \"matchAttribute\" or \"distinctAttribute\" is required";
            constraint.missing(why, errors);
        }
        for attribute in attributes {
            attribute.keep_to(fully_qualified, errors);
        }
    }
    let configs = devices.field("config");
    configs.at_most(CONFIGS_MAX, errors);
    for config in configs.items() {
        validate_references(&config.field("requests"), &names, errors);
        validate_configuration(&config, errors);
    }
}

fn validate_request(request: &Place<'_>, errors: &mut Errors) {
    request.field("name").require_name(dns_label, errors);
    let (exactly, alternatives) = (request.field("exactly"), request.field("firstAvailable"));
    match (exactly.is_there(), !alternatives.is_empty()) {
        (false, false) => {
            let why = "exactly one of `exactly` or `firstAvailable` is required";
            request.missing(why, errors);
        }
        (true, true) => {
            let why = "exactly one of `exactly` or `firstAvailable` is required, but multiple fields are set";
            Place::at(&Value::Null, request.path()).invalid(why, errors);
        }
        (true, false) => validate_choice(&exactly, errors),
        (false, true) => {
            alternatives.at_most(ALTERNATIVES_MAX, errors);
            names_differ(&alternatives, errors);
            for alternative in alternatives.items() {
                alternative.field("name").require_name(dns_label, errors);
                validate_choice(&alternative, errors);
            }
        }
    }
}

/// What devices a request is content with, and how many.
fn validate_choice(choice: &Place<'_>, errors: &mut Errors) {
    choice
        .field("deviceClassName")
        .require_name(dns_subdomain, errors);
    validate_selectors(&choice.field("selectors"), errors);
    let (mode, count) = (choice.field("allocationMode"), choice.field("count"));
    mode.require_one_of(&["All", "ExactCount"], errors);
    match mode.text() {
        "All" if count.int() != 0 => {
            count.invalid("must not be specified when allocationMode is 'All'", errors);
        }
        "ExactCount" if count.int() <= 0 => count.invalid("must be greater than zero", errors),
        _ => {}
    }
    let tolerations = choice.field("tolerations");
    tolerations.at_most(TOLERATIONS_MAX, errors);
    for toleration in tolerations.items() {
        toleration
            .field("operator")
            .one_of(&["Equal", "Exists"], errors);
        toleration
            .field("effect")
            .one_of(&["NoExecute", "NoSchedule"], errors);
        let value = toleration.field("value");
        if toleration.field("operator").text() == "Exists" && !value.is_empty() {
            value.invalid("must be empty for operator `Exists`", errors);
        }
    }
}

fn validate_selectors(selectors: &Place<'_>, errors: &mut Errors) {
    selectors.at_most(SELECTORS_MAX, errors);
    for selector in selectors.items() {
        let expression = selector.field("cel.expression");
        if !selector.field("cel").is_there() {
            selector.field("cel").missing("", errors);
        } else if expression.require(errors) && expression.text().len() > EXPRESSION_BYTES_MAX {
            expression.invalid(
                format!("may not be more than {EXPRESSION_BYTES_MAX} bytes"),
                errors,
            );
        }
    }
}

fn validate_references(
    requests: &Place<'_>,
    names: &BTreeMap<&str, BTreeSet<&str>>,
    errors: &mut Errors,
) {
    requests.at_most(REQUESTS_MAX, errors);
    let mut seen = BTreeSet::new();
    for request in requests.items() {
        let (outer, inner) = match request.text().split_once('/') {
            Some((outer, inner)) => (outer, Some(inner)),
            None => (request.text(), None),
        };
        let known = names.get(outer);
        if !known.is_some_and(|alternatives| inner.is_none_or(|name| alternatives.contains(name))) {
            let why = "must be the name of a request in the claim or the name of a request and a subrequest separated by '/'";
            request.invalid(why, errors);
        }
        if !seen.insert(request.text()) {
            request.duplicate(errors);
        }
    }
}

fn validate_configuration(config: &Place<'_>, errors: &mut Errors) {
    let opaque = config.field("opaque");
    if !opaque.is_there() {
        opaque.missing("", errors);
        return;
    }
    validate_driver(&opaque.field("driver"), errors);
    let parameters = opaque.field("parameters");
    if !parameters.is_there() {
        parameters.missing("", errors);
    } else if !parameters.value().is_object() {
        parameters.invalid("parameters must be a valid JSON object", errors);
    }
}

fn validate_driver(driver: &Place<'_>, errors: &mut Errors) {
    driver.require_name(dns_subdomain, errors);
    if driver.text().len() > DRIVER_BYTES_MAX {
        driver.invalid(
            format!("must be no more than {DRIVER_BYTES_MAX} bytes"),
            errors,
        );
    }
}

/// A name in a domain.
fn fully_qualified(text: &str) -> Option<String> {
    match text.split_once('/') {
        Some((domain, name)) => dns_subdomain(domain).or_else(|| identifier(name)),
        None => {
            Some("a fully qualified name must be a domain and a name separated by a slash".into())
        }
    }
}

/// A name, in a domain or not.
fn qualified(text: &str) -> Option<String> {
    match text.contains('/') {
        true => fully_qualified(text),
        false => identifier(text),
    }
}

fn identifier(text: &str) -> Option<String> {
    let starts = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if text.is_empty() {
        Some("the name must not be empty".into())
    } else if text.len() > IDENTIFIER_BYTES_MAX {
        Some(format!("may not be more than {IDENTIFIER_BYTES_MAX} bytes"))
    } else if !starts || !text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        Some("a valid C identifier must start with alphabetic character or '_', followed by a string of alphanumeric characters or '_' (e.g. 'my_name',  or 'MY_NAME',  or 'MyName', regex used for validation is '[A-Za-z_][A-Za-z0-9_]*')".into())
    } else {
        None
    }
}

pub struct Slice;

impl Strategy for Slice {
    fn default(&self, slice: &mut Value) {
        for device in slice.items_mut("/spec/devices") {
            for taint in device.items_mut("/taints") {
                taint.default("/timeAdded", fields::now());
            }
        }
    }

    fn validate(&self, slice: &Value, errors: &mut Errors) {
        let spec = Place::root(slice).field("spec");
        validate_driver(&spec.field("driver"), errors);
        let pool = spec.field("pool");
        let name = pool.field("name");
        if name.require(errors) {
            for part in name.text().split('/') {
                if let Some(why) = dns_subdomain(part) {
                    name.invalid(why, errors);
                }
            }
        }
        if pool.field("resourceSliceCount").int() <= 0 {
            pool.field("resourceSliceCount")
                .invalid("must be greater than zero", errors);
        }
        if pool.field("generation").int() < 0 {
            let why = "must be greater than or equal to zero";
            pool.field("generation").invalid(why, errors);
        }
        validate_nodes(&spec, errors);
        let (devices, shared) = (spec.field("devices"), spec.field("sharedCounters"));
        if devices.is_there() && shared.is_there() {
            let why = "only one of `sharedCounters` or `devices` is allowed";
            Place::at(&"".into(), spec.path()).invalid(why, errors);
        }
        let advanced = devices.items().any(|device| {
            device.field("taints").is_there() || device.field("consumesCounters").is_there()
        });
        let most = if advanced {
            ADVANCED_DEVICES_MAX
        } else {
            DEVICES_MAX
        };
        devices.at_most(most, errors);
        names_differ(&devices, errors);
        let per_device = spec.field("perDeviceNodeSelection").flag();
        for device in devices.items() {
            validate_device(&device, per_device, errors);
        }
        shared.at_most(COUNTER_SETS_MAX, errors);
        names_differ(&shared, errors);
        for set in shared.items() {
            set.field("name").require_name(dns_label, errors);
            validate_counters(&set.field("counters"), errors);
        }
    }

    fn validate_update(&self, slice: &Value, old: &Value, errors: &mut Errors) {
        let place = |slice, field| Place::root(slice).field(field);
        for field in ["spec.pool.name", "spec.driver", "spec.nodeName"] {
            place(slice, field).unchanged(&place(old, field), errors);
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["spec.driver", "spec.nodeName"]
    }
}

/// Which nodes a slice is of: said in exactly one way.
fn validate_nodes(spec: &Place<'_>, errors: &mut Errors) {
    let mut said = Vec::new();
    let (name, selector) = (spec.field("nodeName"), spec.field("nodeSelector"));
    if name.is_there() && name.is_empty() {
        name.invalid("must be either unset or set to a non-empty string", errors);
    } else if name.is_there() {
        said.push("`nodeName`");
        name.keep_to(dns_subdomain, errors);
    }
    if selector.is_there() {
        said.push("`nodeSelector`");
        validate_node_selector(&selector, errors);
        let terms = selector.field("nodeSelectorTerms");
        if terms.len() != 1 {
            terms.invalid("must have exactly one node selector term", errors);
        }
    }
    for (field, quoted) in [
        ("allNodes", "`allNodes`"),
        ("perDeviceNodeSelection", "`perDeviceNodeSelection`"),
    ] {
        let flag = spec.field(field);
        if flag.flag() {
            said.push(quoted);
        } else if flag.is_there() {
            flag.invalid("must be either unset or set to true", errors);
        }
    }
    let why = "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required";
    match said[..] {
        [] => spec.missing(why, errors),
        [_] => {}
        _ => {
            let given = format!("{{{}}}", said.join(", ")).into();
            let why = format!("{why}, but multiple fields are set");
            Place::at(&given, spec.path()).invalid(why, errors);
        }
    }
}

fn validate_device(device: &Place<'_>, per_device: bool, errors: &mut Errors) {
    device.field("name").require_name(dns_label, errors);
    let (attributes, capacity) = (device.field("attributes"), device.field("capacity"));
    let count = attributes.entries().count() + capacity.entries().count();
    if count > ATTRIBUTES_MAX {
        let why = format!(
            "the total number of attributes and capacities must not exceed {ATTRIBUTES_MAX}"
        );
        Place::at(&count.into(), device.path()).invalid(why, errors);
    }
    for (name, attribute) in attributes.entries() {
        check_key(name, &attributes, errors);
        validate_attribute(&attribute, errors);
    }
    for (name, amount) in capacity.entries() {
        check_key(name, &capacity, errors);
        if !amount.field("value").is_there() {
            amount.field("value").missing("", errors);
        }
        amount.field("value").quantity(errors);
    }
    let taints = device.field("taints");
    taints.at_most(TAINTS_MAX, errors);
    for taint in taints.items() {
        taint.field("key").require(errors);
        let effects = ["NoExecute", "NoSchedule", "None"];
        taint.field("effect").require_one_of(&effects, errors);
    }
    for consumed in device.field("consumesCounters").items() {
        consumed.field("counterSet").require_name(dns_label, errors);
        validate_counters(&consumed.field("counters"), errors);
    }
    let nodes = ["nodeName", "nodeSelector", "allNodes"].map(|field| device.field(field));
    let said = nodes.iter().filter(|place| place.is_there()).count();
    if per_device && said != 1 {
        let why = "exactly one of `nodeName`, `nodeSelector`, or `allNodes` is required when `perDeviceNodeSelection` is set to true in the ResourceSlice spec";
        device.missing(why, errors);
    } else if !per_device && said > 0 {
        let why = "`nodeName`, `nodeSelector` and `allNodes` can only be set if `perDeviceNodeSelection` is set to true in the ResourceSlice spec";
        Place::at(&Value::Null, device.path()).invalid(why, errors);
    }
}

fn check_key(name: &str, of: &Place<'_>, errors: &mut Errors) {
    if let Some(why) = qualified(name) {
        Place::at(&name.into(), of.path()).invalid(why, errors);
    }
}

fn validate_attribute(attribute: &Place<'_>, errors: &mut Errors) {
    if attribute
        .entries()
        .filter(|(_, value)| value.is_there())
        .count()
        != 1
    {
        attribute.invalid("exactly one value must be specified", errors);
    }
    for field in ["string", "version"] {
        let text = attribute.field(field);
        if text.text().len() > TEXT_BYTES_MAX {
            text.invalid(
                format!("may not be more than {TEXT_BYTES_MAX} bytes"),
                errors,
            );
        }
    }
}

fn validate_counters(counters: &Place<'_>, errors: &mut Errors) {
    if counters.is_empty() {
        counters.missing("", errors);
    }
    if counters.entries().count() > COUNTERS_MAX {
        counters.invalid(format!("must have at most {COUNTERS_MAX} items"), errors);
    }
    for (name, counter) in counters.entries() {
        if let Some(why) = dns_label(name) {
            Place::at(&name.into(), counters.path()).invalid(why, errors);
        }
        if !counter.field("value").is_there() {
            counter.field("value").missing("", errors);
        }
        counter.field("value").quantity(errors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn faults(strategy: &dyn Strategy, object: &Value) -> Vec<String> {
        let mut errors = Vec::new();
        strategy.validate(object, &mut errors);
        errors.into_iter().map(|error| error.field).collect()
    }

    #[test]
    fn a_claim_asks_for_one_device_unless_it_says_otherwise() {
        let mut claim = json!({"metadata": {"name": "c"}, "spec": {"devices": {
            "requests": [{"name": "a", "exactly": {"deviceClassName": "gpu.example.com"}},
                {"name": "b", "firstAvailable": [{"name": "x", "deviceClassName": "gpu.example.com"}]}],
            "constraints": [{"requests": ["a", "b/x"], "matchAttribute": "example.com/numa"}]}}});
        Claim.default(&mut claim);
        let requests = &claim["spec"]["devices"]["requests"];
        assert_eq!(requests[0]["exactly"]["count"], 1);
        assert_eq!(
            requests[1]["firstAvailable"][0]["allocationMode"],
            "ExactCount"
        );
        assert_eq!(faults(&Claim, &claim), Vec::<String>::new());
        let wrong = json!({"spec": {"devices": {
            "requests": [{"name": "a"}, {"name": "a", "exactly": {"deviceClassName": "g", "allocationMode": "All", "count": 2}}],
            "constraints": [{"requests": ["z"], "matchAttribute": "numa"}], "config": [{"requests": ["a"]}]}}});
        let at = "spec.devices";
        assert_eq!(
            faults(&Claim, &wrong),
            [
                format!("{at}.requests[1].name"),
                format!("{at}.requests[0]"),
                format!("{at}.requests[1].exactly.count"),
                format!("{at}.constraints[0].requests[0]"),
                format!("{at}.constraints[0].matchAttribute"),
                format!("{at}.config[0].opaque"),
            ]
        );
    }

    #[test]
    fn a_slice_says_of_which_node_it_is_and_what_devices_there_are() {
        let slice = json!({"metadata": {"name": "s"}, "spec": {"driver": "gpu.example.com", "nodeName": "n1",
            "pool": {"name": "n1", "generation": 1, "resourceSliceCount": 1},
            "devices": [{"name": "gpu-0", "attributes": {"model": {"string": "x"}}, "capacity": {"memory": {"value": "8Gi"}}}]}});
        assert_eq!(faults(&Slice, &slice), Vec::<String>::new());
        let mut wrong = slice.clone();
        wrong.set("/spec/allNodes", true);
        wrong.set("/spec/pool/resourceSliceCount", 0);
        wrong["spec"]["devices"][0]["attributes"] = json!({"no-name": {"string": "x", "int": 1}});
        assert_eq!(
            faults(&Slice, &wrong),
            [
                "spec.pool.resourceSliceCount",
                "spec",
                "spec.devices[0].attributes",
                "spec.devices[0].attributes[no-name]",
            ]
        );
        let mut errors = Vec::new();
        wrong.set("/spec/driver", "other.example.com");
        Slice.validate_update(&wrong, &slice, &mut errors);
        assert_eq!(errors.len(), 1);
    }
}
