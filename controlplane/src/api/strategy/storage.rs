//! PersistentVolumes, their claims, and what provides them.

use serde_json::{Value, json};

use super::csi::{validate_parameters, validate_provisioner};
use super::metadata::dns_subdomain;
use super::place::Place;
use super::pod_spec::{validate_node_selector, validate_volume_source};
use super::{Errors, Strategy};
use crate::api::fields::{self, Fields};
use crate::api::status::FieldError;
use crate::codec::quantity::Quantity;

const ACCESS_MODES: [&str; 4] = [
    "ReadOnlyMany",
    "ReadWriteMany",
    "ReadWriteOnce",
    "ReadWriteOncePod",
];
const VOLUME_MODES: [&str; 2] = ["Block", "Filesystem"];

fn validate_access(modes: &Place<'_>, errors: &mut Errors) {
    if modes.is_empty() {
        modes.missing("at least 1 access mode is required", errors);
    }
    for mode in modes.items() {
        if !ACCESS_MODES.contains(&mode.text()) {
            errors.push(FieldError::unsupported(
                modes.path(),
                mode.text(),
                &ACCESS_MODES,
            ));
        }
    }
    if modes.len() > 1 && modes.items().any(|mode| mode.text() == "ReadWriteOncePod") {
        let why = "may not use ReadWriteOncePod with other access modes";
        modes.forbidden(why, errors);
    }
}

fn validate_size(size: &Place<'_>, errors: &mut Errors) {
    if !size.is_there() {
        // Named as upstream names it, which is no path.
        let path = size.path().replace(".requests.storage", "[storage]");
        errors.push(FieldError::required(path, ""));
    } else if size.quantity(errors).is_some_and(Quantity::is_zero) {
        size.invalid("must be greater than zero", errors);
    }
}

/// Fills in what a claim may leave out.
pub fn default_claim(claim: &mut Value) {
    claim.default("/spec/volumeMode", "Filesystem");
    claim.default("/status/phase", "Pending");
}

/// What a claim is filled from has two fields, an older and a newer one, and who writes one means both. The older is for
/// claims and snapshots only: anything else there is dropped, but where it was kept before.
fn settle_source(claim: &mut Value, old: Option<&Value>) {
    let kept = old.is_some_and(|old| old.has("/spec/dataSource"));
    let kind = (
        claim.text("/spec/dataSource/apiGroup"),
        claim.text("/spec/dataSource/kind"),
    );
    let known = matches!(
        kind,
        ("", "PersistentVolumeClaim") | ("snapshot.storage.k8s.io", "VolumeSnapshot")
    );
    if !known && !kept {
        claim.remove("/spec/dataSource");
    }
    if let Some(spec) = claim.pointer_mut("/spec") {
        same_source(spec);
    }
}

/// Fills in whichever of the two is missing; a source in another namespace is in the newer one only.
fn same_source(spec: &mut Value) {
    if !spec.text("/dataSourceRef/namespace").is_empty() {
        return;
    }
    for (from, to) in [
        ("dataSource", "dataSourceRef"),
        ("dataSourceRef", "dataSource"),
    ] {
        let to = format!("/{to}");
        if let Some(source) = spec.get(from).filter(|source| source.is_object()).cloned()
            && !spec.has(&to)
        {
            spec.set(&to, source);
        }
    }
}

fn validate_source(spec: &Place<'_>, errors: &mut Errors) {
    for field in ["dataSource", "dataSourceRef"] {
        let source = spec.field(field);
        if !source.is_there() {
            continue;
        }
        source.field("name").require(errors);
        let kind = source.field("kind");
        kind.require(errors);
        let (group, of) = (source.field("apiGroup"), kind.text());
        if group.text().is_empty() && of != "PersistentVolumeClaim" {
            let why = "must be 'PersistentVolumeClaim' when referencing the default apiGroup";
            errors.push(FieldError::invalid(source.path(), of, why));
        }
        group.keep_to(dns_subdomain, errors);
    }
    let (older, newer) = (spec.field("dataSource"), spec.field("dataSourceRef"));
    if !older.is_there() || !newer.is_there() {
        return;
    }
    let parts = |source: &Place<'_>| {
        ["apiGroup", "kind", "name"].map(|field| source.field(field).text().to_owned())
    };
    let why = if !newer.field("namespace").text().is_empty() {
        "may not be specified when dataSourceRef.namespace is specified"
    } else if parts(&older) != parts(&newer) {
        "must match dataSourceRef"
    } else {
        return;
    };
    // The value that upstream shows here is a path that it prints as nothing.
    errors.push(FieldError::invalid(spec.path(), json!({}), why));
}

pub struct Claim;

impl Strategy for Claim {
    fn default(&self, claim: &mut Value) {
        default_claim(claim);
    }

    fn prepare_create(&self, claim: &mut Value) {
        claim.set("/status", json!({"phase": "Pending"}));
        settle_source(claim, None);
    }

    fn prepare_update(&self, claim: &mut Value, old: &Value) {
        settle_source(claim, Some(old));
    }

    fn validate(&self, claim: &Value, errors: &mut Errors) {
        let spec = Place::root(claim).field("spec");
        validate_access(&spec.field("accessModes"), errors);
        super::metadata::validate_selector(&spec.field("selector"), errors);
        validate_size(&spec.field("resources.requests.storage"), errors);
        spec.field("storageClassName")
            .keep_to(dns_subdomain, errors);
        spec.field("volumeMode").one_of(&VOLUME_MODES, errors);
        validate_source(&spec, errors);
    }

    fn validate_update(&self, claim: &Value, old: &Value, errors: &mut Errors) {
        let fixed = |claim: &Value| {
            let mut spec = claim.pointer("/spec").cloned().unwrap_or_default();
            for field in ["resources", "volumeAttributesClassName"] {
                spec.remove(&format!("/{field}"));
            }
            same_source(&mut spec);
            // Set once, by who binds the claim.
            if old.text("/spec/volumeName").is_empty() {
                spec.remove("/volumeName");
            }
            spec
        };
        if fixed(claim) != fixed(old) {
            let why = "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
            errors.push(FieldError::forbidden("spec", why));
        }
        let size = |claim: &Value| {
            claim
                .pointer("/spec/resources/requests/storage")
                .and_then(Quantity::of)
        };
        let (new, before) = (size(claim), size(old));
        let held = old
            .pointer("/status/capacity/storage")
            .and_then(Quantity::of);
        if new < before && (held.is_none() || new < held) {
            let why = "field can not be less than status.capacity";
            errors.push(FieldError::forbidden(
                "spec.resources.requests.storage",
                why,
            ));
        }
        if new > before && old.text("/status/phase") != "Bound" {
            let why = "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
            errors.push(FieldError::forbidden("spec", why));
        }
    }
}

pub struct Volume;

impl Strategy for Volume {
    fn default(&self, volume: &mut Value) {
        volume.default("/spec/persistentVolumeReclaimPolicy", "Retain");
        volume.default("/spec/volumeMode", "Filesystem");
        volume.default("/status/phase", "Pending");
        if volume.has("/spec/hostPath") {
            volume.default("/spec/hostPath/type", "");
        }
    }

    fn prepare_create(&self, volume: &mut Value) {
        let status = json!({"phase": "Pending", "lastPhaseTransitionTime": fields::now()});
        volume.set("/status", status);
    }

    fn validate(&self, volume: &Value, errors: &mut Errors) {
        let spec = Place::root(volume).field("spec");
        validate_access(&spec.field("accessModes"), errors);
        let capacity = spec.field("capacity");
        if capacity.is_empty() {
            capacity.missing("", errors);
        } else if !capacity.field("storage").is_there() || capacity.entries().count() > 1 {
            let given = capacity.value().clone();
            errors.push(FieldError::unsupported(
                capacity.path(),
                given,
                &["storage"],
            ));
        } else {
            validate_size(&capacity.field("storage"), errors);
        }
        spec.field("persistentVolumeReclaimPolicy")
            .one_of(&["Delete", "Recycle", "Retain"], errors);
        spec.field("storageClassName")
            .keep_to(dns_subdomain, errors);
        spec.field("volumeMode").one_of(&VOLUME_MODES, errors);
        let mut faults = Vec::new();
        if spec.field("local").is_there() {
            spec.field("local.path").require(&mut faults);
            if !spec.field("nodeAffinity").is_there() {
                let affinity = spec.field("nodeAffinity");
                affinity.missing("Local volume requires node affinity", &mut faults);
            }
        } else {
            validate_volume_source(&spec, &mut faults);
        }
        errors.append(&mut faults);
        let affinity = spec.field("nodeAffinity.required");
        if affinity.is_there() {
            validate_node_selector(&affinity, errors);
        }
    }

    fn validate_update(&self, volume: &Value, old: &Value, errors: &mut Errors) {
        let source = |volume: &Value| {
            let mut spec = volume.pointer("/spec").cloned().unwrap_or_default();
            for field in [
                "accessModes",
                "capacity",
                "claimRef",
                "mountOptions",
                "nodeAffinity",
                "persistentVolumeReclaimPolicy",
                "storageClassName",
                "volumeAttributesClassName",
                "volumeMode",
            ] {
                spec.remove(&format!("/{field}"));
            }
            spec
        };
        if source(volume) != source(old) {
            let why = "spec.persistentvolumesource is immutable after creation";
            errors.push(FieldError::forbidden("spec.persistentvolumesource", why));
        }
        let (spec, before) = (
            Place::root(volume).field("spec"),
            Place::root(old).field("spec"),
        );
        spec.field("volumeMode")
            .unchanged(&before.field("volumeMode"), errors);
        if before.field("nodeAffinity").is_there() {
            spec.field("nodeAffinity")
                .unchanged(&before.field("nodeAffinity"), errors);
        }
    }
}

pub struct StorageClass;

impl Strategy for StorageClass {
    fn default(&self, class: &mut Value) {
        class.default("/reclaimPolicy", "Delete");
        class.default("/volumeBindingMode", "Immediate");
    }

    fn validate(&self, class: &Value, errors: &mut Errors) {
        let root = Place::root(class);
        validate_provisioner(&root.field("provisioner"), errors);
        validate_parameters(&root.field("parameters"), errors);
        root.field("reclaimPolicy")
            .one_of(&["Delete", "Retain"], errors);
        root.field("volumeBindingMode")
            .one_of(&["Immediate", "WaitForFirstConsumer"], errors);
    }

    fn validate_update(&self, class: &Value, old: &Value, errors: &mut Errors) {
        let (new, old) = (Place::root(class), Place::root(old));
        for (field, why) in [
            ("parameters", "updates to parameters are forbidden."),
            ("provisioner", "updates to provisioner are forbidden."),
            ("reclaimPolicy", "updates to reclaimPolicy are forbidden."),
        ] {
            if new.field(field).value() != old.field(field).value() {
                new.field(field).forbidden(why, errors);
            }
        }
        new.field("volumeBindingMode")
            .unchanged(&old.field("volumeBindingMode"), errors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(size: &str) -> Value {
        let mut claim = json!({"spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}}});
        Claim.default(&mut claim);
        claim
    }

    #[test]
    fn claims_ask_for_something() {
        let mut errors = Vec::new();
        Claim.validate(&claim("1Gi"), &mut errors);
        assert_eq!(errors, []);
        let mut bad = claim("0");
        bad.set(
            "/spec/accessModes",
            json!(["ReadWriteOncePod", "Sometimes"]),
        );
        Claim.validate(&bad, &mut errors);
        let fields: Vec<_> = errors
            .iter()
            .map(|error| (error.field.as_str(), error.reason))
            .collect();
        assert_eq!(
            fields,
            [
                ("spec.accessModes", "FieldValueNotSupported"),
                ("spec.accessModes", "FieldValueForbidden"),
                ("spec.resources.requests.storage", "FieldValueInvalid"),
            ]
        );
    }

    #[test]
    fn a_source_is_named_by_both_fields_or_by_neither() {
        let source = json!({"kind": "PersistentVolumeClaim", "name": "q"});
        for (field, other) in [
            ("dataSource", "dataSourceRef"),
            ("dataSourceRef", "dataSource"),
        ] {
            let mut claim = claim("1Gi");
            claim.set(&format!("/spec/{field}"), source.clone());
            Claim.prepare_create(&mut claim);
            assert_eq!(claim["spec"][other], source);
            // Who sends back one of the two changes nothing.
            let mut again = claim.clone();
            again.remove(&format!("/spec/{other}"));
            Claim.prepare_update(&mut again, &claim);
            let mut errors = Vec::new();
            Claim.validate(&again, &mut errors);
            Claim.validate_update(&again, &claim, &mut errors);
            assert_eq!(errors, []);
            again.set("/spec/dataSourceRef/name", "other");
            Claim.validate(&again, &mut errors);
            assert_eq!(
                (errors[0].field.as_str(), errors[0].message.as_str()),
                ("spec", "Invalid value: {}: must match dataSourceRef")
            );
        }
        let mut odd = claim("1Gi");
        let custom = json!({"apiGroup": "example.com", "kind": "Populator", "name": "p"});
        odd.set("/spec/dataSource", custom.clone());
        Claim.prepare_create(&mut odd);
        assert!(!odd.has("/spec/dataSource") && !odd.has("/spec/dataSourceRef"));
        odd.set("/spec/dataSourceRef", custom.clone());
        Claim.prepare_create(&mut odd);
        assert_eq!(odd["spec"]["dataSource"], custom);
        odd.set("/spec/dataSourceRef", json!({"kind": "Pod", "name": "p"}));
        odd.remove("/spec/dataSource");
        let mut errors = Vec::new();
        Claim.validate(&odd, &mut errors);
        assert_eq!(errors[0].field, "spec.dataSourceRef");
    }

    #[test]
    fn a_bound_claim_only_grows() {
        let mut old = claim("1Gi");
        old.set(
            "/status",
            json!({"phase": "Bound", "capacity": {"storage": "1Gi"}}),
        );
        let mut errors = Vec::new();
        Claim.validate_update(&claim("2Gi"), &old, &mut errors);
        assert_eq!(errors, []);
        Claim.validate_update(&claim("512Mi"), &old, &mut errors);
        assert_eq!(errors[0].field, "spec.resources.requests.storage");
        errors.clear();
        Claim.validate_update(&claim("2Gi"), &claim("1Gi"), &mut errors);
        assert_eq!(errors[0].field, "spec");
    }

    #[test]
    fn a_volume_has_one_source_for_good() {
        let mut volume = json!({"spec": {"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "hostPath": {"path": "/x"}}});
        Volume.default(&mut volume);
        Volume.prepare_create(&mut volume);
        assert!(volume.has("/status/lastPhaseTransitionTime"));
        let mut errors = Vec::new();
        Volume.validate(&volume, &mut errors);
        assert_eq!(errors, []);
        let mut other = volume.clone();
        other.set("/spec/hostPath/path", "/y");
        Volume.validate_update(&other, &volume, &mut errors);
        assert_eq!(errors[0].field, "spec.persistentvolumesource");
    }
}
