//! What CSI drivers and their helpers write: drivers, nodes, capacities, attachments, classes of attributes.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::metadata::{dns_subdomain, qualified_name, validate_selector};
use super::place::Place;
use super::{Errors, Strategy};
use crate::api::fields::Fields;
use crate::api::status::FieldError;

const NODE_ID_BYTES_MAX: usize = 256;
const DRIVER_NAME_BYTES_MAX: usize = 63;
const PARAMETERS_MAX: usize = 512;
const PARAMETERS_BYTES_MAX: usize = 256 << 10;
const TOKEN_SECONDS_MIN: i64 = 600;
const TOKEN_SECONDS_MAX: i64 = 1 << 32;
const ALLOCATABLE_PERIOD_SECONDS_MIN: i64 = 10;

/// The name of a driver, in any case of letters.
pub fn validate_driver_name(name: &Place<'_>, errors: &mut Errors) {
    if !name.require(errors) {
        return;
    }
    if name.text().len() > DRIVER_NAME_BYTES_MAX {
        name.too_long(DRIVER_NAME_BYTES_MAX, errors);
    }
    name.keep_to(|text| dns_subdomain(&text.to_lowercase()), errors);
}

/// The name of what provides volumes, as classes give it.
pub fn validate_provisioner(name: &Place<'_>, errors: &mut Errors) {
    if name.require(errors) {
        name.keep_to(|text| qualified_name(&text.to_lowercase()), errors);
    }
}

/// What a class hands to its driver.
pub fn validate_parameters(parameters: &Place<'_>, errors: &mut Errors) {
    if parameters.entries().count() > PARAMETERS_MAX {
        parameters.too_long(PARAMETERS_MAX, errors);
        return;
    }
    let mut bytes = 0;
    for (key, value) in parameters.entries() {
        if key.is_empty() {
            let why = "field can not be empty.";
            errors.push(FieldError::invalid(parameters.path(), key, why));
        }
        bytes += key.len() + value.text().len();
    }
    if bytes > PARAMETERS_BYTES_MAX {
        parameters.too_long(PARAMETERS_BYTES_MAX, errors);
    }
}

pub struct Driver;

impl Strategy for Driver {
    fn default(&self, driver: &mut Value) {
        driver.object_mut("/spec");
        driver.default("/spec/attachRequired", true);
        driver.default("/spec/podInfoOnMount", false);
        driver.default("/spec/storageCapacity", false);
        driver.default("/spec/fsGroupPolicy", "ReadWriteOnceWithFSType");
        driver.default("/spec/requiresRepublish", false);
        driver.default("/spec/seLinuxMount", false);
        if driver.items("/spec/volumeLifecycleModes").is_empty() {
            driver.set("/spec/volumeLifecycleModes", json!(["Persistent"]));
        }
    }

    fn validate(&self, driver: &Value, errors: &mut Errors) {
        let spec = Place::root(driver).field("spec");
        let policies = ["File", "None", "ReadWriteOnceWithFSType"];
        spec.field("fsGroupPolicy")
            .exactly_one_of(&policies, errors);
        let mut audiences = BTreeSet::new();
        for request in spec.field("tokenRequests").items() {
            let audience = request.field("audience");
            if !audiences.insert(audience.text()) {
                let given = audience.text();
                errors.push(FieldError::duplicate(audience.path(), given));
                continue;
            }
            let lifetime = request.field("expirationSeconds");
            match lifetime.value().as_i64() {
                Some(..TOKEN_SECONDS_MIN) => {
                    lifetime.invalid("may not specify a duration less than 10 minutes", errors);
                }
                Some(seconds) if seconds > TOKEN_SECONDS_MAX => {
                    lifetime.invalid(
                        "may not specify a duration larger than 2^32 seconds",
                        errors,
                    );
                }
                _ => {}
            }
        }
        let modes = spec.field("volumeLifecycleModes");
        for mode in modes.items() {
            let known = ["Persistent", "Ephemeral"];
            if !known.contains(&mode.text()) {
                errors.push(FieldError::unsupported(modes.path(), mode.text(), &known));
            }
        }
        let period = spec.field("nodeAllocatableUpdatePeriodSeconds");
        if period.is_there() && period.int() < ALLOCATABLE_PERIOD_SECONDS_MIN {
            period.invalid("must be greater than or equal to 10 seconds", errors);
        }
        let in_secrets = spec.field("serviceAccountTokenInSecrets");
        if in_secrets.is_there() && spec.field("tokenRequests").is_empty() {
            let why = "serviceAccountTokenInSecrets is set but no tokenRequests are specified";
            in_secrets.invalid(why, errors);
        }
    }

    fn validate_update(&self, driver: &Value, old: &Value, errors: &mut Errors) {
        let (spec, before) = (
            Place::root(driver).field("spec"),
            Place::root(old).field("spec"),
        );
        if spec.field("attachRequired").value() != before.field("attachRequired").value() {
            // Upstream tells it at this name.
            let given = spec.field("attachRequired").value().clone();
            let why = "field is immutable";
            errors.push(FieldError::invalid("spec.attachedRequired", given, why));
        }
        spec.field("volumeLifecycleModes")
            .unchanged(&before.field("volumeLifecycleModes"), errors);
    }
}

pub struct Node;

impl Strategy for Node {
    fn validate(&self, node: &Value, errors: &mut Errors) {
        let mut names = BTreeSet::new();
        for driver in Place::root(node).field("spec.drivers").items() {
            let name = driver.field("name");
            validate_driver_name(&name, errors);
            let id = driver.field("nodeID");
            id.require(errors);
            if id.text().len() > NODE_ID_BYTES_MAX {
                let why = format!("must be {NODE_ID_BYTES_MAX} characters or less");
                id.invalid(why, errors);
            }
            driver.field("allocatable.count").not_negative(errors);
            if !names.insert(name.text()) {
                errors.push(FieldError::duplicate(name.path(), name.text()));
            }
            validate_topology(&driver, errors);
        }
    }

    fn validate_update(&self, node: &Value, old: &Value, errors: &mut Errors) {
        let fixed = |driver: &Value| {
            let mut driver = driver.clone();
            driver.remove("/allocatable");
            driver
        };
        for driver in node.items("/spec/drivers") {
            let name = driver.text("/name");
            let mut olds = old.items("/spec/drivers").iter();
            if let Some(before) = olds.find(|before| before.text("/name") == name)
                && fixed(driver) != fixed(before)
            {
                let why = "field is immutable";
                errors.push(FieldError::invalid("spec.drivers", fixed(driver), why));
            }
        }
    }
}

/// Keys of a driver's topology; upstream tells what is wrong with one at the driver.
fn validate_topology(driver: &Place<'_>, errors: &mut Errors) {
    let mut keys = BTreeSet::new();
    for key in driver.field("topologyKeys").items() {
        if key.text().is_empty() {
            driver.missing("", errors);
        }
        if !keys.insert(key.text()) {
            errors.push(FieldError::duplicate(driver.path(), key.text()));
        }
        if let Some(why) = qualified_name(key.text()) {
            errors.push(FieldError::invalid(driver.path(), key.text(), why));
        }
    }
}

pub struct Capacity;

impl Strategy for Capacity {
    fn validate(&self, capacity: &Value, errors: &mut Errors) {
        let root = Place::root(capacity);
        validate_selector(&root.field("nodeTopology"), errors);
        let class = root.field("storageClassName");
        if let Some(why) = dns_subdomain(class.text()) {
            errors.push(FieldError::invalid(class.path(), class.text(), why));
        }
        root.field("capacity").quantity(errors);
    }

    fn validate_update(&self, capacity: &Value, old: &Value, errors: &mut Errors) {
        let (new, old) = (Place::root(capacity), Place::root(old));
        for field in ["nodeTopology", "storageClassName"] {
            new.field(field).unchanged(&old.field(field), errors);
        }
    }
}

pub struct Attachment;

impl Strategy for Attachment {
    fn validate(&self, attachment: &Value, errors: &mut Errors) {
        let spec = Place::root(attachment).field("spec");
        validate_driver_name(&spec.field("attacher"), errors);
        let source = spec.field("source");
        let name = source.field("persistentVolumeName");
        let why = "must specify exactly one of inlineVolumeSpec and persistentVolumeName";
        match (source.field("inlineVolumeSpec").is_there(), name.is_there()) {
            (false, false) => source.missing(why, errors),
            (true, true) => source.forbidden(why, errors),
            (false, true) if name.is_empty() => {
                name.missing("must specify non empty persistentVolumeName", errors);
            }
            _ => {}
        }
        let node = spec.field("nodeName");
        if let Some(why) = dns_subdomain(node.text()) {
            errors.push(FieldError::invalid(node.path(), node.text(), why));
        }
        if let (true, Some(why)) = (name.is_there(), dns_subdomain(name.text())) {
            errors.push(FieldError::invalid(name.path(), name.text(), why));
        }
    }

    fn validate_update(&self, attachment: &Value, old: &Value, errors: &mut Errors) {
        Place::root(attachment)
            .field("spec")
            .unchanged(&Place::root(old).field("spec"), errors);
    }
}

pub struct AttributesClass;

impl Strategy for AttributesClass {
    fn validate(&self, class: &Value, errors: &mut Errors) {
        let root = Place::root(class);
        validate_provisioner(&root.field("driverName"), errors);
        let parameters = root.field("parameters");
        validate_parameters(&parameters, errors);
        if parameters.is_empty() {
            parameters.missing("must contain at least one key/value pair", errors);
        }
    }

    fn validate_update(&self, class: &Value, old: &Value, errors: &mut Errors) {
        let (new, old) = (Place::root(class), Place::root(old));
        for (field, why) in [
            ("driverName", "updates to driverName are forbidden."),
            ("parameters", "updates to parameters are forbidden."),
        ] {
            if new.field(field).value() != old.field(field).value() {
                new.field(field).forbidden(why, errors);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{told, told_with_defaults};
    use super::*;

    #[test]
    fn drivers_nodes_and_attachments_name_what_they_are_of() {
        let driver = json!({"spec": {"tokenRequests": [{"audience": "a", "expirationSeconds": 5}, {"audience": "a"}],
            "fsGroupPolicy": "Some"}});
        assert_eq!(
            told_with_defaults(&Driver, driver),
            [
                r#"spec.fsGroupPolicy: Unsupported value: "Some": supported values: "File", "None", "ReadWriteOnceWithFSType""#,
                "spec.tokenRequests[0].expirationSeconds: Invalid value: 5: may not specify a duration less than 10 minutes",
                r#"spec.tokenRequests[1].audience: Duplicate value: "a""#,
            ]
        );
        let node = json!({"spec": {"drivers": [{"name": "a", "nodeID": "n"}, {"name": "a", "nodeID": ""}]}});
        assert_eq!(
            told(&Node, &node),
            [
                "spec.drivers[1].nodeID: Required value",
                r#"spec.drivers[1].name: Duplicate value: "a""#,
            ]
        );
        let attachment = json!({"spec": {"attacher": "", "nodeName": "n", "source": {}}});
        assert_eq!(
            told(&Attachment, &attachment),
            [
                "spec.attacher: Required value",
                "spec.source: Required value: must specify exactly one of inlineVolumeSpec and persistentVolumeName",
            ]
        );
    }

    #[test]
    fn what_others_rely_on_does_not_change() {
        let class = json!({"driverName": "d", "parameters": {"a": "b"}});
        let mut other = class.clone();
        other.set("/parameters/a", "c");
        let mut errors = Vec::new();
        AttributesClass.validate_update(&other, &class, &mut errors);
        assert_eq!(errors[0].field, "parameters");
        let node = json!({"spec": {"drivers": [{"name": "a", "nodeID": "n", "allocatable": {"count": 1}}]}});
        let mut more = node.clone();
        more["spec"]["drivers"][0]["allocatable"]["count"] = 2.into();
        errors.clear();
        Node.validate_update(&more, &node, &mut errors);
        assert_eq!(errors, []);
        more["spec"]["drivers"][0]["nodeID"] = "m".into();
        Node.validate_update(&more, &node, &mut errors);
        assert_eq!(errors[0].field, "spec.drivers");
    }
}
