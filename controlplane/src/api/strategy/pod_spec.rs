//! Pod specs, in pods and in templates: defaults and validation.

use serde_json::{Value, json};

use super::metadata::validate_labels;
use super::{Errors, dns_label, one_of, qualified_name};
use crate::api::fields::Fields;
use crate::api::status::FieldError;

/// The permissions of files in volumes made of API objects: 0644.
const FILE_MODE: i64 = 0o644;
/// How long a projected token is good for unless said otherwise.
const TOKEN_EXPIRATION_S: i64 = 3600;

/// The three lists of containers.
pub const CONTAINER_LISTS: [&str; 3] = ["initContainers", "containers", "ephemeralContainers"];

/// Fills in what a pod spec may leave out.
pub fn default(spec: &mut Value) {
    spec.default("/restartPolicy", "Always");
    spec.default("/dnsPolicy", "ClusterFirst");
    spec.default("/terminationGracePeriodSeconds", 30);
    spec.default("/schedulerName", "default-scheduler");
    spec.object_mut("/securityContext");
    // Two names for one field: who writes the old one reads the new one too.
    match (
        spec.text("/serviceAccountName").to_owned(),
        spec.text("/serviceAccount").to_owned(),
    ) {
        (name, _) if !name.is_empty() => spec.set("/serviceAccount", name),
        (_, name) if !name.is_empty() => spec.set("/serviceAccountName", name),
        _ => {}
    }
    let host_network = spec.flag("/hostNetwork");
    for list in CONTAINER_LISTS {
        for container in spec.items_mut(&format!("/{list}")) {
            default_container(container, host_network);
        }
    }
    for volume in spec.items_mut("/volumes") {
        default_volume(volume);
    }
}

fn default_container(container: &mut Value, host_network: bool) {
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
            probe.default("/timeoutSeconds", 1);
            probe.default("/periodSeconds", 10);
            probe.default("/successThreshold", 1);
            probe.default("/failureThreshold", 3);
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

fn default_volume(volume: &mut Value) {
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

/// Checks a pod template at a field path.
pub fn validate_template(template: &Value, at: &str, errors: &mut Errors) {
    validate_labels(
        template.object("/metadata/labels"),
        &format!("{at}.metadata.labels"),
        errors,
    );
    validate(
        template.pointer("/spec").unwrap_or(&Value::Null),
        &format!("{at}.spec"),
        errors,
    );
}

/// Checks a pod spec at a field path.
pub fn validate(spec: &Value, at: &str, errors: &mut Errors) {
    let mut volumes: Vec<&str> = Vec::new();
    for (index, volume) in spec.items("/volumes").iter().enumerate() {
        let field = format!("{at}.volumes[{index}].name");
        let name = volume.text("/name");
        if name.is_empty() {
            errors.push(FieldError::required(field, ""));
        } else if let Some(why) = dns_label(name) {
            errors.push(FieldError::invalid(field, name, why));
        } else if volumes.contains(&name) {
            errors.push(FieldError::duplicate(field, name));
        }
        volumes.push(name);
    }
    if spec.items("/containers").is_empty() {
        errors.push(FieldError::required(format!("{at}.containers"), ""));
    }
    let mut names: Vec<&str> = Vec::new();
    for list in CONTAINER_LISTS {
        for (index, container) in spec.items(&format!("/{list}")).iter().enumerate() {
            let at = format!("{at}.{list}[{index}]");
            let name = container.text("/name");
            if names.contains(&name) {
                errors.push(FieldError::duplicate(format!("{at}.name"), name));
            }
            names.push(name);
            validate_container(container, &at, &volumes, errors);
        }
    }
    one_of(
        spec,
        "/restartPolicy",
        at,
        &["Always", "Never", "OnFailure"],
        errors,
    );
    let policies = ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
    one_of(spec, "/dnsPolicy", at, &policies, errors);
    for (index, toleration) in spec.items("/tolerations").iter().enumerate() {
        let at = format!("{at}.tolerations[{index}]");
        one_of(
            toleration,
            "/operator",
            &at,
            &["Equal", "Exists", "Gt", "Lt"],
            errors,
        );
        one_of(
            toleration,
            "/effect",
            &at,
            &["NoExecute", "NoSchedule", "PreferNoSchedule"],
            errors,
        );
    }
    validate_labels(
        spec.object("/nodeSelector"),
        &format!("{at}.nodeSelector"),
        errors,
    );
    let grace = spec.int("/terminationGracePeriodSeconds");
    if grace < 0 {
        let field = format!("{at}.terminationGracePeriodSeconds");
        errors.push(FieldError::invalid(
            field,
            grace,
            "must be greater than or equal to 0",
        ));
    }
}

fn validate_container(container: &Value, at: &str, volumes: &[&str], errors: &mut Errors) {
    let name = container.text("/name");
    if name.is_empty() {
        errors.push(FieldError::required(format!("{at}.name"), ""));
    } else if let Some(why) = dns_label(name) {
        errors.push(FieldError::invalid(format!("{at}.name"), name, why));
    }
    if container.text("/image").trim().is_empty() {
        errors.push(FieldError::required(format!("{at}.image"), ""));
    }
    one_of(
        container,
        "/imagePullPolicy",
        at,
        &["Always", "IfNotPresent", "Never"],
        errors,
    );
    one_of(
        container,
        "/terminationMessagePolicy",
        at,
        &["FallbackToLogsOnError", "File"],
        errors,
    );
    for (index, port) in container.items("/ports").iter().enumerate() {
        let at = format!("{at}.ports[{index}]");
        if !(1..=65535).contains(&port.int("/containerPort")) {
            let why = "must be between 1 and 65535, inclusive";
            errors.push(FieldError::invalid(
                format!("{at}.containerPort"),
                port.int("/containerPort"),
                why,
            ));
        }
        one_of(port, "/protocol", &at, &["SCTP", "TCP", "UDP"], errors);
        let name = port.text("/name");
        if !name.is_empty() && !is_port_name(name) {
            let why = "must contain only lowercase letters, digits and hyphens, at least one letter, and be no more than 15 characters";
            errors.push(FieldError::invalid(format!("{at}.name"), name, why));
        }
    }
    for (index, variable) in container.items("/env").iter().enumerate() {
        let at = format!("{at}.env[{index}]");
        if variable.text("/name").is_empty() {
            errors.push(FieldError::required(format!("{at}.name"), ""));
        }
        if variable.has("/valueFrom") && !variable.text("/value").is_empty() {
            errors.push(FieldError::invalid(
                format!("{at}.valueFrom"),
                "",
                "may not be specified when `value` is not empty",
            ));
        }
    }
    for (index, mount) in container.items("/volumeMounts").iter().enumerate() {
        let at = format!("{at}.volumeMounts[{index}]");
        if !volumes.contains(&mount.text("/name")) {
            errors.push(FieldError::not_found(
                format!("{at}.name"),
                mount.text("/name"),
            ));
        }
        if mount.text("/mountPath").is_empty() {
            errors.push(FieldError::required(format!("{at}.mountPath"), ""));
        }
    }
    for kind in ["requests", "limits"] {
        for (resource, quantity) in container
            .object(&format!("/resources/{kind}"))
            .into_iter()
            .flatten()
        {
            if let Some(why) = qualified_name(resource) {
                errors.push(FieldError::invalid(
                    format!("{at}.resources.{kind}"),
                    resource.as_str(),
                    why,
                ));
            }
            if !is_quantity(quantity) {
                let field = format!("{at}.resources.{kind}[{resource}]");
                let why = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";
                errors.push(FieldError::invalid(field, quantity.clone(), why));
            }
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe_value) = container
            .pointer(&format!("/{probe}"))
            .filter(|probe| probe.is_object())
        else {
            continue;
        };
        let handlers = ["httpGet", "tcpSocket", "exec", "grpc"]
            .iter()
            .filter(|h| probe_value.has(&format!("/{h}")))
            .count();
        if handlers == 0 {
            errors.push(FieldError::required(
                format!("{at}.{probe}"),
                "must specify a handler type",
            ));
        } else if handlers > 1 {
            errors.push(FieldError::forbidden(
                format!("{at}.{probe}"),
                "may not specify more than 1 handler type",
            ));
        }
    }
}

/// An IANA service name, as ports are named.
fn is_port_name(name: &str) -> bool {
    name.len() <= 15
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && name.bytes().any(|byte| byte.is_ascii_lowercase())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && !name.contains("--")
}

/// Whether a value is a decimal number with an optional suffix of quantity.
fn is_quantity(value: &Value) -> bool {
    let Some(text) = value.as_str() else {
        return value.is_number();
    };
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let exponent = || {
        suffix
            .strip_prefix(['e', 'E'])
            .is_some_and(|digits| digits.parse::<i32>().is_ok())
    };
    let suffixes = [
        "", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei",
    ];
    number.bytes().any(|byte| byte.is_ascii_digit())
        && number.matches('.').count() <= 1
        && (suffixes.contains(&suffix) || exponent())
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

    #[test]
    fn quantities_are_numbers_with_known_suffixes() {
        for good in ["1", "0.5", "100m", "64Mi", "1e3", "1E", "-1", ".5"] {
            assert!(is_quantity(&json!(good)), "{good}");
        }
        for bad in ["", "1x", "Mi", "1.2.3", "1MiB", "1 Gi"] {
            assert!(!is_quantity(&json!(bad)), "{bad}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_spec_is_said_field_by_field() {
        let mut spec = json!({"containers": [{"name": "Bad_Name", "image": "", "volumeMounts": [{"name": "v", "mountPath": "/x"}],
            "readinessProbe": {}, "ports": [{"containerPort": 0}]}], "restartPolicy": "Sometimes"});
        default(&mut spec);
        let mut errors = Vec::new();
        validate(&spec, "spec", &mut errors);
        let fields: Vec<&str> = errors.iter().map(|error| error.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "spec.containers[0].name",
                "spec.containers[0].image",
                "spec.containers[0].ports[0].containerPort",
                "spec.containers[0].volumeMounts[0].name",
                "spec.containers[0].readinessProbe",
                "spec.restartPolicy",
            ]
        );
    }
}
