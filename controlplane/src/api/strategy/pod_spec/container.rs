//! Containers: names, ports, environment, mounts, probes, resources.

use std::collections::BTreeSet;

use super::super::metadata::{config_key, environment_name, port_name};
use super::super::place::Place;
use super::super::{Errors, dns_label, qualified_name};
use super::volume::{inside, validate_field_path};
use crate::api::status::FieldError;

/// Fields of a pod that its environment may show.
const POD_FIELDS: [&str; 11] = [
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
const PROBES: [&str; 3] = ["livenessProbe", "readinessProbe", "startupProbe"];
const HANDLERS: [&str; 5] = ["exec", "httpGet", "tcpSocket", "grpc", "sleep"];

/// Checks the containers of all lists, whose names they share.
pub fn validate_all(spec: &Place<'_>, volumes: &BTreeSet<&str>, errors: &mut Errors) {
    let mut names: BTreeSet<&str> = BTreeSet::new();
    let mut host_ports: BTreeSet<(&str, &str, i64)> = BTreeSet::new();
    let host_network = spec.field("hostNetwork").flag();
    for list in super::CONTAINER_LISTS {
        for container in spec.field(list).items() {
            let name = container.field("name");
            if !name.text().is_empty() && !names.insert(name.text()) {
                name.duplicate(errors);
            }
            validate(&container, volumes, errors);
            match list {
                "containers" => {
                    validate_probes(&container, errors);
                    validate_lifecycle(&container, errors);
                }
                "initContainers" if container.field("restartPolicy").text() == "Always" => {
                    validate_probes(&container, errors);
                    validate_lifecycle(&container, errors);
                }
                _ => forbid_probes(&container, list, errors),
            }
            for port in container.field("ports").items() {
                validate_host_port(&port, host_network, &mut host_ports, errors);
            }
        }
    }
    for container in spec.field("ephemeralContainers").items() {
        let target = container.field("targetContainerName");
        let known = |name: &str| {
            let mut containers = spec.field("containers").items();
            containers.any(|container| container.field("name").text() == name)
        };
        if !target.text().is_empty() && !known(target.text()) {
            target.not_found(errors);
        }
    }
}

fn validate_host_port<'a>(
    port: &Place<'a>,
    host_network: bool,
    taken: &mut BTreeSet<(&'a str, &'a str, i64)>,
    errors: &mut Errors,
) {
    let host = port.field("hostPort");
    if host.int() == 0 {
        return;
    }
    if host_network && host.int() != port.field("containerPort").int() {
        let why = "must match `containerPort` when `hostNetwork` is true";
        host.invalid(why, errors);
    }
    let claim = (
        port.field("protocol").text(),
        port.field("hostIP").text(),
        host.int(),
    );
    if !taken.insert(claim) {
        let (protocol, address, number) = claim;
        let claim = format!("{protocol}/{address}/{number}");
        errors.push(FieldError::duplicate(host.path(), claim));
    }
}

fn validate(container: &Place<'_>, volumes: &BTreeSet<&str>, errors: &mut Errors) {
    container.field("name").require_name(dns_label, errors);
    let image = container.field("image");
    if image.text().trim().is_empty() {
        image.missing("", errors);
    } else if image.text().trim() != image.text() {
        image.invalid("must not have leading or trailing whitespace", errors);
    }
    container
        .field("imagePullPolicy")
        .one_of(&["Always", "IfNotPresent", "Never"], errors);
    container
        .field("terminationMessagePolicy")
        .require_one_as_listed(&["File", "FallbackToLogsOnError"], errors);
    container
        .field("restartPolicy")
        .exactly_one_of(&["Always", "Never", "OnFailure"], errors);
    let mut ports: BTreeSet<&str> = BTreeSet::new();
    for port in container.field("ports").items() {
        let name = port.field("name");
        if !name.text().is_empty() {
            for why in port_name(name.text()) {
                name.invalid(why, errors);
            }
            if !ports.insert(name.text()) {
                name.duplicate(errors);
            }
        }
        port.field("containerPort").port(errors);
        if port.field("hostPort").int() != 0 {
            port.field("hostPort").port(errors);
        }
        port.field("protocol")
            .one_of(&["SCTP", "TCP", "UDP"], errors);
    }
    validate_environment(container, errors);
    validate_mounts(container, volumes, errors);
    validate_resources(container, errors);
    validate_security(&container.field("securityContext"), errors);
}

fn validate_environment(container: &Place<'_>, errors: &mut Errors) {
    for variable in container.field("env").items() {
        variable
            .field("name")
            .require_name(environment_name, errors);
        let source = variable.field("valueFrom");
        if !source.is_there() {
            continue;
        }
        if !variable.field("value").text().is_empty() {
            errors.push(FieldError::invalid(
                source.path(),
                "",
                "may not be specified when `value` is not empty",
            ));
        }
        let kinds = [
            "fieldRef",
            "resourceFieldRef",
            "configMapKeyRef",
            "secretKeyRef",
            "fileKeyRef",
        ];
        let found: Vec<Place<'_>> = kinds
            .iter()
            .map(|kind| source.field(kind))
            .filter(Place::is_there)
            .collect();
        match found.len() {
            0 => {
                let why = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`";
                errors.push(FieldError::invalid(source.path(), "", why));
            }
            1 => {}
            _ => {
                let why = "may not have more than one field specified at a time";
                errors.push(FieldError::invalid(source.path(), "", why));
            }
        }
        if source.field("fieldRef").is_there() {
            validate_field_path(&source.field("fieldRef"), &POD_FIELDS, errors);
        }
        if source.field("resourceFieldRef").is_there() {
            source.field("resourceFieldRef.resource").require(errors);
        }
        for kind in ["configMapKeyRef", "secretKeyRef"] {
            let reference = source.field(kind);
            if reference.is_there() {
                reference.field("name").require_subdomain(errors);
                reference.field("key").require_name(config_key, errors);
            }
        }
    }
    for source in container.field("envFrom").items() {
        source.field("prefix").keep_to(environment_name, errors);
        let (map, secret) = (source.field("configMapRef"), source.field("secretRef"));
        match (map.is_there(), secret.is_there()) {
            (true, true) => {
                let why = "may not have more than one field specified at a time";
                errors.push(FieldError::invalid(source.path(), "", why));
            }
            (false, false) => {
                let why = "must specify one of: `configMapRef` or `secretRef`";
                errors.push(FieldError::invalid(source.path(), "", why));
            }
            (true, false) => _ = map.field("name").require(errors),
            (false, true) => _ = secret.field("name").require(errors),
        }
    }
}

fn validate_mounts(container: &Place<'_>, volumes: &BTreeSet<&str>, errors: &mut Errors) {
    let mut paths: BTreeSet<&str> = BTreeSet::new();
    for mount in container.field("volumeMounts").items() {
        let (name, path) = (mount.field("name"), mount.field("mountPath"));
        name.require(errors);
        if !volumes.contains(name.text()) {
            name.not_found(errors);
        }
        if path.require(errors) && !paths.insert(path.text()) {
            path.invalid("must be unique", errors);
        }
        let (sub, expression) = (mount.field("subPath"), mount.field("subPathExpr"));
        if !sub.is_empty() && !expression.is_empty() {
            expression.invalid("subPathExpr and subPath are mutually exclusive", errors);
        }
        for path in [sub, expression] {
            if !path.is_empty() {
                inside(&path, errors);
            }
        }
        mount
            .field("mountPropagation")
            .exactly_one_of(&["Bidirectional", "HostToContainer", "None"], errors);
        mount
            .field("recursiveReadOnly")
            .exactly_one_of(&["Disabled", "Enabled", "IfPossible"], errors);
        let shared = mount.field("mountPropagation").text() == "Bidirectional";
        if shared && !container.field("securityContext.privileged").flag() {
            let why = "Bidirectional mount propagation is available only to privileged containers";
            mount.field("mountPropagation").forbidden(why, errors);
        }
    }
    for device in container.field("volumeDevices").items() {
        let name = device.field("name");
        if name.require(errors) && !volumes.contains(name.text()) {
            name.not_found(errors);
        }
        device.field("devicePath").require(errors);
    }
}

/// Whether a resource may be asked for beyond what is guaranteed.
fn overcommits(resource: &str) -> bool {
    matches!(resource, "cpu" | "memory" | "ephemeral-storage")
}

/// Checks the name of a resource that containers can have.
pub fn check_resource_name(resource: &str, place: &Place<'_>, errors: &mut Errors) {
    let told = |why: &str| FieldError::invalid(place.path(), resource, why);
    if let Some(why) = qualified_name(resource) {
        errors.push(told(&why));
    } else if !resource.contains('/')
        && !overcommits(resource)
        && !resource.starts_with("hugepages-")
    {
        errors.push(told("must be a standard resource type or fully qualified"));
        errors.push(told("must be a standard resource for containers"));
    }
}

fn validate_resources(container: &Place<'_>, errors: &mut Errors) {
    let resources = container.field("resources");
    let limits = resources.field("limits");
    for (resource, limit) in limits.entries() {
        check_resource_name(resource, &limit, errors);
        let quantity = limit.quantity(errors);
        if resource.contains('/') && quantity.is_some_and(|quantity| !quantity.is_whole()) {
            limit.invalid("must be an integer", errors);
        }
    }
    let requests = resources.field("requests");
    for (resource, request) in requests.entries() {
        check_resource_name(resource, &request, errors);
        let Some(asked) = request.quantity(errors) else {
            continue;
        };
        if resource.contains('/') && !asked.is_whole() {
            request.invalid("must be an integer", errors);
        }
        let limit = limits.value().get(resource);
        match limit.and_then(crate::codec::quantity::Quantity::of) {
            Some(limit) if asked > limit => {
                let why = format!("must be less than or equal to {resource} limit of {limit}");
                let given = asked.to_string();
                errors.push(FieldError::invalid(requests.path(), given, why));
            }
            Some(limit) if asked != limit && !overcommits(resource) => {
                let why = format!("must be equal to {resource} limit of {limit}");
                let given = asked.to_string();
                errors.push(FieldError::invalid(requests.path(), given, why));
            }
            None if !overcommits(resource) => {
                limits.missing("Limit must be set for non overcommitable resources", errors);
            }
            _ => {}
        }
    }
}

fn validate_security(context: &Place<'_>, errors: &mut Errors) {
    if !context.is_there() {
        return;
    }
    for field in ["runAsUser", "runAsGroup"] {
        context.field(field).within(0..=i64::from(i32::MAX), errors);
    }
    context
        .field("procMount")
        .one_of(&["Default", "Unmasked"], errors);
    validate_seccomp(&context.field("seccompProfile"), errors);
    let escalation = context.field("allowPrivilegeEscalation");
    if escalation.is_there() && !escalation.flag() {
        if context.field("privileged").flag() {
            let why = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
            context.invalid(why, errors);
        }
        let added = context.field("capabilities.add");
        if added
            .items()
            .any(|capability| capability.text() == "CAP_SYS_ADMIN")
        {
            let why = "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN";
            context.invalid(why, errors);
        }
    }
}

/// Checks a seccomp profile, where there is one.
pub fn validate_seccomp(profile: &Place<'_>, errors: &mut Errors) {
    if !profile.is_there() {
        return;
    }
    let (kind, file) = (profile.field("type"), profile.field("localhostProfile"));
    if kind.is_empty() {
        kind.missing("type is required when seccompProfile is set", errors);
    }
    kind.one_of(&["Localhost", "RuntimeDefault", "Unconfined"], errors);
    if kind.text() == "Localhost" {
        if file.is_empty() {
            file.missing("must be set when seccomp type is Localhost", errors);
        } else {
            inside(&file, errors);
        }
    } else if file.is_there() {
        file.invalid("can only be set when seccomp type is Localhost", errors);
    }
}

fn validate_probes(container: &Place<'_>, errors: &mut Errors) {
    for kind in PROBES {
        let probe = container.field(kind);
        if !probe.is_there() {
            continue;
        }
        validate_handler(&probe, errors);
        for field in [
            "initialDelaySeconds",
            "timeoutSeconds",
            "periodSeconds",
            "successThreshold",
            "failureThreshold",
        ] {
            probe.field(field).not_negative(errors);
        }
        let grace = probe.field("terminationGracePeriodSeconds");
        if kind == "readinessProbe" {
            if grace.is_there() {
                grace.invalid("must not be set for readinessProbes", errors);
            }
            grace.positive(errors);
        } else {
            grace.positive(errors);
            let successes = probe.field("successThreshold");
            if successes.is_there() && successes.int() != 1 {
                successes.invalid("must be 1", errors);
            }
        }
    }
}

fn validate_lifecycle(container: &Place<'_>, errors: &mut Errors) {
    for hook in ["lifecycle.postStart", "lifecycle.preStop"] {
        let hook = container.field(hook);
        if hook.is_there() {
            validate_handler(&hook, errors);
        }
    }
}

fn forbid_probes(container: &Place<'_>, list: &str, errors: &mut Errors) {
    let why = match list {
        "initContainers" => "may not be set for init containers without restartPolicy=Always",
        _ => "cannot be set for an Ephemeral Container",
    };
    for field in PROBES.iter().chain(&["lifecycle"]) {
        if container.field(field).is_there() {
            container.field(field).forbidden(why, errors);
        }
    }
}

fn validate_handler(handler: &Place<'_>, errors: &mut Errors) {
    let mut found = 0;
    for kind in HANDLERS {
        let action = handler.field(kind);
        if !action.is_there() {
            continue;
        }
        found += 1;
        if found > 1 {
            action.forbidden("may not specify more than 1 handler type", errors);
            continue;
        }
        match kind {
            "exec" => _ = action.field("command").require(errors),
            "httpGet" => {
                action.field("path").require(errors);
                action.field("port").port_or_name(errors);
                action.field("scheme").one_of(&["HTTP", "HTTPS"], errors);
                for header in action.field("httpHeaders").items() {
                    header.field("name").keep_to(header_name, errors);
                }
            }
            "tcpSocket" => action.field("port").port_or_name(errors),
            "grpc" => action.field("port").port(errors),
            _ => {
                if action.field("seconds").int() < 0 {
                    action
                        .field("seconds")
                        .invalid("must be greater than or equal to 0", errors);
                }
            }
        }
    }
    if found == 0 {
        handler.missing("must specify a handler type", errors);
    }
}

fn header_name(text: &str) -> Option<String> {
    const RULE: &str = "a valid HTTP header must consist of alphanumeric characters or '-' (e.g. 'X-Header-Name', regex used for validation is '[-A-Za-z0-9]+')";
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (!text.bytes().all(plain)).then(|| RULE.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn told(mut spec: Value) -> Vec<String> {
        super::super::default(&mut spec);
        let mut errors = Vec::new();
        validate_all(
            &Place::at(&spec, "spec"),
            &BTreeSet::from(["data"]),
            &mut errors,
        );
        let lines = errors.iter().map(ToString::to_string);
        lines
            .map(|line| line.trim_start_matches("spec.").to_owned())
            .collect()
    }

    fn one(container: Value) -> Vec<String> {
        let mut container = container;
        container["name"] = "c".into();
        container["image"] = "i".into();
        told(json!({"containers": [container]}))
    }

    #[test]
    fn requests_are_within_limits_and_named_as_resources_are() {
        assert_eq!(
            one(
                json!({"resources": {"requests": {"cpu": "2", "gpu": "1", "a/b": "1"}, "limits": {"cpu": "1", "memory": "-1"}}})
            ),
            [
                r#"containers[0].resources.limits[memory]: Invalid value: "-1": must be greater than or equal to 0"#,
                r#"containers[0].resources.requests: Invalid value: "2": must be less than or equal to cpu limit of 1"#,
                r#"containers[0].resources.requests[gpu]: Invalid value: "gpu": must be a standard resource type or fully qualified"#,
                r#"containers[0].resources.requests[gpu]: Invalid value: "gpu": must be a standard resource for containers"#,
                "containers[0].resources.limits: Required value: Limit must be set for non overcommitable resources",
                "containers[0].resources.limits: Required value: Limit must be set for non overcommitable resources",
            ]
        );
    }

    #[test]
    fn ports_environment_and_mounts_are_checked() {
        assert_eq!(
            one(json!({
                "ports": [{"containerPort": 80, "name": "web", "hostPort": 80}, {"containerPort": 81, "name": "web", "hostPort": 80},
                    {"containerPort": 70000, "name": "0"}],
                "env": [{"name": "A=B"}, {"name": "C", "value": "x", "valueFrom": {"fieldRef": {"fieldPath": "spec.color"}}},
                    {"name": "D", "valueFrom": {"secretKeyRef": {"name": "s", "key": "a b"}}}],
                "volumeMounts": [{"name": "data", "mountPath": "/d"}, {"name": "other", "mountPath": "/d", "subPath": "../x"}],
            }))
            .len(),
            11
        );
    }

    #[test]
    fn probes_belong_to_containers_that_stay() {
        let probe = json!({"httpGet": {"port": "http"}, "successThreshold": 2});
        assert_eq!(
            one(
                json!({"livenessProbe": probe, "readinessProbe": {"exec": {}, "tcpSocket": {"port": 1}}})
            ),
            [
                "containers[0].livenessProbe.successThreshold: Invalid value: 2: must be 1",
                "containers[0].readinessProbe.exec.command: Required value",
                "containers[0].readinessProbe.tcpSocket: Forbidden: may not specify more than 1 handler type",
            ]
        );
        let init = |policy: Value| {
            told(json!({"containers": [], "initContainers": [
                {"name": "i", "image": "i", "startupProbe": {"tcpSocket": {"port": 1}}, "restartPolicy": policy}]}))
        };
        assert_eq!(
            init(Value::Null),
            [
                "initContainers[0].startupProbe: Forbidden: may not be set for init containers without restartPolicy=Always"
            ]
        );
        assert_eq!(init("Always".into()), Vec::<String>::new());
    }
}
