//! What containers and volumes may leave out.

use serde_json::{Value, json};

use crate::api::fields::Fields;

/// The permissions of files in volumes made of API objects: 0644.
const FILE_MODE: i64 = 0o644;
/// How long a projected token is good for unless said otherwise.
const TOKEN_EXPIRATION_S: i64 = 3600;

pub fn container(container: &mut Value, host_network: bool) {
    container.default("/terminationMessagePath", "/dev/termination-log");
    container.default("/terminationMessagePolicy", "File");
    let policy = if is_latest(container.text("/image")) {
        "Always"
    } else {
        "IfNotPresent"
    };
    container.default("/imagePullPolicy", policy);
    container.object_mut("/resources");
    for port in container.items_mut("/ports") {
        port.default("/protocol", "TCP");
        if host_network {
            let number = port.int("/containerPort");
            port.default("/hostPort", number);
        }
    }
    for variable in container.items_mut("/env") {
        if variable.has("/valueFrom/fieldRef") {
            variable.default("/valueFrom/fieldRef/apiVersion", "v1");
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container
            .pointer_mut(&format!("/{probe}"))
            .filter(|probe| probe.is_object())
        {
            let defaults = [
                ("/timeoutSeconds", 1),
                ("/periodSeconds", 10),
                ("/successThreshold", 1),
                ("/failureThreshold", 3),
            ];
            for (field, value) in defaults {
                // Go does not tell zero from none here.
                if probe.int(field) == 0 {
                    probe.set(field, value);
                }
            }
            default_handler(probe);
            if probe.has("/grpc") {
                probe.default("/grpc/service", "");
            }
        }
    }
    for hook in ["postStart", "preStop"] {
        if let Some(handler) = container.pointer_mut(&format!("/lifecycle/{hook}")) {
            default_handler(handler);
        }
    }
}

fn default_handler(handler: &mut Value) {
    if handler.has("/httpGet") {
        handler.default("/httpGet/path", "/");
        handler.default("/httpGet/scheme", "HTTP");
    }
}

/// Whether an image reference names no version but the latest.
fn is_latest(image: &str) -> bool {
    if image.contains('@') {
        return false;
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    last.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

pub fn volume(volume: &mut Value) {
    let sources = volume.as_object().map_or(0, |fields| {
        fields.keys().filter(|key| *key != "name").count()
    });
    if sources == 0 {
        volume.set("/emptyDir", json!({}));
    }
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        if volume
            .pointer(&format!("/{source}"))
            .is_some_and(Value::is_object)
        {
            volume.default(&format!("/{source}/defaultMode"), FILE_MODE);
        }
    }
    // An ephemeral claim is a claim like others.
    if volume.has("/ephemeral/volumeClaimTemplate/spec") {
        volume.default(
            "/ephemeral/volumeClaimTemplate/spec/volumeMode",
            "Filesystem",
        );
    }
    if volume.has("/iscsi") {
        volume.default("/iscsi/iscsiInterface", "default");
    }
    if volume.has("/rbd") {
        volume.default("/rbd/pool", "rbd");
        volume.default("/rbd/user", "admin");
        volume.default("/rbd/keyring", "/etc/ceph/keyring");
    }
    if volume.has("/azureDisk") {
        volume.default("/azureDisk/cachingMode", "ReadWrite");
        volume.default("/azureDisk/kind", "Shared");
        volume.default("/azureDisk/fsType", "ext4");
        volume.default("/azureDisk/readOnly", false);
    }
    if volume.has("/scaleIO") {
        volume.default("/scaleIO/storageMode", "ThinProvisioned");
        volume.default("/scaleIO/fsType", "xfs");
    }
    if volume.has("/image") {
        let latest = is_latest(volume.text("/image/reference"));
        let policy = if latest { "Always" } else { "IfNotPresent" };
        volume.default("/image/pullPolicy", policy);
    }
    if volume.has("/hostPath") && volume.pointer("/hostPath/type").is_none() {
        volume.set("/hostPath/type", "");
    }
    for item in volume.items_mut("/downwardAPI/items") {
        default_field_ref(item);
    }
    for source in volume.items_mut("/projected/sources") {
        if source.has("/serviceAccountToken") {
            source.default("/serviceAccountToken/expirationSeconds", TOKEN_EXPIRATION_S);
        }
        for item in source.items_mut("/downwardAPI/items") {
            default_field_ref(item);
        }
    }
}

fn default_field_ref(item: &mut Value) {
    if item.has("/fieldRef") {
        item.default("/fieldRef/apiVersion", "v1");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_images_without_a_version_are_always_pulled() {
        for (image, latest) in [
            ("nginx", true),
            ("nginx:latest", true),
            ("nginx:1.27", false),
            ("localhost:5000/nginx", true),
            ("localhost:5000/nginx:v1", false),
            ("nginx@sha256:abc", false),
        ] {
            assert_eq!(is_latest(image), latest, "{image}");
        }
    }
}
