//! Volumes: one source each, and what each source needs.

use std::collections::BTreeSet;

use super::super::place::Place;
use super::super::{Errors, dns_label};
use crate::api::status::FieldError;

/// The sources with what each cannot do without.
const SOURCES: [(&str, &[&str]); 29] = [
    ("awsElasticBlockStore", &["volumeID"]),
    ("azureDisk", &["diskName", "diskURI"]),
    ("azureFile", &["secretName", "shareName"]),
    ("cephfs", &["monitors"]),
    ("cinder", &["volumeID"]),
    ("configMap", &["name"]),
    ("csi", &["driver"]),
    ("downwardAPI", &[]),
    ("emptyDir", &[]),
    ("ephemeral", &["volumeClaimTemplate"]),
    ("fc", &[]),
    ("flexVolume", &["driver"]),
    ("flocker", &[]),
    ("gcePersistentDisk", &["pdName"]),
    ("gitRepo", &["repository"]),
    ("glusterfs", &["endpoints", "path"]),
    ("hostPath", &["path"]),
    ("image", &["reference"]),
    ("iscsi", &["targetPortal", "iqn"]),
    ("nfs", &["server", "path"]),
    ("persistentVolumeClaim", &["claimName"]),
    ("photonPersistentDisk", &["pdID"]),
    ("portworxVolume", &["volumeID"]),
    ("projected", &[]),
    ("quobyte", &["registry", "volume"]),
    ("rbd", &["monitors", "image"]),
    ("scaleIO", &["gateway", "system", "volumeName"]),
    ("secret", &["secretName"]),
    ("storageos", &[]),
];
const HOST_PATH_TYPES: [&str; 8] = [
    "",
    "BlockDevice",
    "CharDevice",
    "Directory",
    "DirectoryOrCreate",
    "File",
    "FileOrCreate",
    "Socket",
];
/// Fields of a pod that a file may show.
const POD_FIELDS: [&str; 5] = [
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
];
const TOKEN_EXPIRATION_S_MIN: i64 = 600;

/// Checks all volumes; their names are what mounts may name.
pub fn validate_all<'a>(volumes: &Place<'a>, errors: &mut Errors) -> BTreeSet<&'a str> {
    let mut names = BTreeSet::new();
    for volume in volumes.items() {
        let told = errors.len();
        let name = volume.field("name");
        if name.require(errors) {
            name.keep_to(dns_label, errors);
            if names.contains(name.text()) {
                name.duplicate(errors);
            }
        }
        validate_source(&volume, errors);
        // A volume that is wrong is none: what mounts it is told so too.
        if errors.len() == told {
            names.insert(name.text());
        }
    }
    names
}

/// Checks that a volume (of a pod, or a persistent one) has one source, with what that needs.
pub fn validate_source(volume: &Place<'_>, errors: &mut Errors) {
    let mut found = 0;
    for (source, needs) in SOURCES {
        let place = volume.field(source);
        if !place.is_there() {
            continue;
        }
        found += 1;
        if found > 1 {
            place.forbidden("may not specify more than 1 volume type", errors);
            continue;
        }
        for need in needs {
            place.field(need).require(errors);
        }
        validate_details(source, &place, errors);
    }
    if found == 0 {
        volume.missing("must specify a volume type", errors);
    }
}

fn validate_details(source: &str, place: &Place<'_>, errors: &mut Errors) {
    match source {
        "hostPath" => {
            place.field("type").one_of(&HOST_PATH_TYPES, errors);
            no_backsteps(&place.field("path"), errors);
        }
        "emptyDir" => _ = place.field("sizeLimit").quantity(errors),
        "configMap" | "secret" => validate_files(place, errors),
        "downwardAPI" => {
            validate_mode(&place.field("defaultMode"), errors);
            validate_pod_fields(place, errors);
        }
        "projected" => {
            validate_mode(&place.field("defaultMode"), errors);
            for source in place.field("sources").items() {
                validate_projection(&source, errors);
            }
        }
        "nfs" if !place.field("path").text().starts_with('/') => {
            let path = place.field("path");
            path.invalid("must be an absolute path", errors);
        }
        "ephemeral" => {
            let resources = place.field("volumeClaimTemplate.spec.resources");
            if place.field("volumeClaimTemplate.spec").is_there()
                && !resources.field("requests.storage").is_there()
            {
                let path = format!("{}[storage]", resources.path());
                errors.push(FieldError::required(path, ""));
            }
        }
        "image" => place
            .field("pullPolicy")
            .one_of(&["Always", "IfNotPresent", "Never"], errors),
        _ => {}
    }
}

fn validate_projection(source: &Place<'_>, errors: &mut Errors) {
    let kinds = [
        "clusterTrustBundle",
        "configMap",
        "downwardAPI",
        "podCertificate",
        "secret",
        "serviceAccountToken",
    ];
    let mut found = 0;
    // A source of nothing is allowed, and brings nothing.
    for kind in kinds {
        let place = source.field(kind);
        if !place.is_there() {
            continue;
        }
        found += 1;
        if found > 1 {
            place.forbidden("may not specify more than 1 volume type per source", errors);
            continue;
        }
        match kind {
            "configMap" | "secret" => {
                place.field("name").require(errors);
                validate_files(&place, errors);
            }
            "downwardAPI" => validate_pod_fields(&place, errors),
            "serviceAccountToken" => {
                let life = place.field("expirationSeconds");
                if life.is_there() && life.int() < TOKEN_EXPIRATION_S_MIN {
                    life.invalid("may not specify a duration less than 10 minutes", errors);
                } else if life.int() > i64::from(u32::MAX) {
                    life.invalid(
                        "may not specify a duration larger than 2^32 seconds",
                        errors,
                    );
                }
                if place.field("path").require(errors) {
                    inside(&place.field("path"), errors);
                }
            }
            _ => {}
        }
    }
}

/// Files made of the keys of a ConfigMap or Secret.
fn validate_files(place: &Place<'_>, errors: &mut Errors) {
    validate_mode(&place.field("defaultMode"), errors);
    for item in place.field("items").items() {
        item.field("key").require(errors);
        if item.field("path").require(errors) {
            inside(&item.field("path"), errors);
        }
        validate_mode(&item.field("mode"), errors);
    }
}

/// Files made of fields of the pod.
fn validate_pod_fields(place: &Place<'_>, errors: &mut Errors) {
    for item in place.field("items").items() {
        if item.field("path").require(errors) {
            inside(&item.field("path"), errors);
        }
        let (field, resource) = (item.field("fieldRef"), item.field("resourceFieldRef"));
        match (field.is_there(), resource.is_there()) {
            (true, true) => item.forbidden(
                "fieldRef and resourceFieldRef can not be specified simultaneously",
                errors,
            ),
            (true, false) => validate_field_path(&field, &POD_FIELDS, errors),
            (false, true) => {
                resource.field("containerName").require(errors);
                resource.field("resource").require(errors);
            }
            (false, false) => {
                item.missing("one of fieldRef and resourceFieldRef is required", errors)
            }
        }
        validate_mode(&item.field("mode"), errors);
    }
}

/// Checks that a reference names a field of a pod that may be named.
pub fn validate_field_path(reference: &Place<'_>, allowed: &[&str], errors: &mut Errors) {
    reference.field("apiVersion").require(errors);
    let path = reference.field("fieldPath");
    if !path.require(errors) {
        return;
    }
    // One label or annotation: metadata.labels['key'].
    let subscript = path
        .text()
        .strip_suffix("']")
        .and_then(|rest| rest.split_once("['"));
    match subscript {
        Some(("metadata.labels" | "metadata.annotations", _)) => {}
        Some(_) => path.invalid("does not support subscript", errors),
        None => path.one_of(allowed, errors),
    }
}

fn validate_mode(mode: &Place<'_>, errors: &mut Errors) {
    if mode.is_there() && !(0..=0o777).contains(&mode.int()) {
        let why = "must be a number between 0 and 0777 (octal), both inclusive";
        mode.invalid(why, errors);
    }
}

/// A path that stays below where it begins.
pub fn inside(path: &Place<'_>, errors: &mut Errors) {
    if path.text().starts_with('/') {
        path.invalid("must be a relative path", errors);
    }
    no_backsteps(path, errors);
    if path.text().starts_with("..") && !path.text().starts_with("../") && path.text() != ".." {
        path.invalid("must not start with '..'", errors);
    }
}

fn no_backsteps(path: &Place<'_>, errors: &mut Errors) {
    if path.text().split('/').any(|part| part == "..") {
        path.invalid("must not contain '..'", errors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn told(volumes: Value) -> Vec<String> {
        let mut errors = Vec::new();
        validate_all(&Place::at(&volumes, "volumes"), &mut errors);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_volume_has_one_source_with_what_it_needs() {
        assert_eq!(
            told(json!([
                {"name": "a", "emptyDir": {}},
                {"name": "a", "hostPath": {"path": "/x"}, "emptyDir": {}},
                {"name": "c"},
                {"name": "d", "persistentVolumeClaim": {}},
                {"name": "e", "secret": {"secretName": "s", "defaultMode": 512, "items": [{"key": "a", "path": "../x"}]}},
                {"name": "f", "projected": {"sources": [{"serviceAccountToken": {"path": "t", "expirationSeconds": 5}}, {}]}},
            ])),
            [
                "volumes[1].name: Duplicate value: \"a\"",
                "volumes[1].hostPath: Forbidden: may not specify more than 1 volume type",
                "volumes[2]: Required value: must specify a volume type",
                "volumes[3].persistentVolumeClaim.claimName: Required value",
                "volumes[4].secret.defaultMode: Invalid value: 512: must be a number between 0 and 0777 (octal), both inclusive",
                "volumes[4].secret.items[0].path: Invalid value: \"../x\": must not contain '..'",
                "volumes[5].projected.sources[0].serviceAccountToken.expirationSeconds: Invalid value: 5: may not specify a duration less than 10 minutes",
            ]
        );
    }
}
