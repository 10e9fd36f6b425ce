//! Pod specs, in pods and in templates: defaults and validation.

mod container;
mod defaults;
mod scheduling;
mod volume;

pub use scheduling::validate_node_selector;
pub use volume::validate_source as validate_volume_source;

use std::collections::BTreeSet;

use serde_json::Value;

use super::metadata::{dns_subdomain, search_domain, validate_labels};
use super::place::Place;
use super::{Errors, dns_label, qualified_name};
use crate::api::fields::Fields;
use crate::api::status::FieldError;
use crate::selector::key_faults;

/// How many name servers and search domains a pod may give.
const NAMESERVERS_MAX: usize = 3;
const SEARCHES_MAX: usize = 32;
const SEARCHES_BYTES_MAX: usize = 2048;

/// The longest host name that Linux takes.
const HOSTNAME_BYTES_MAX: usize = 64;

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
            defaults::container(container, host_network);
        }
    }
    for volume in spec.items_mut("/volumes") {
        defaults::volume(volume);
    }
}

/// Checks a pod template.
pub fn validate_template(template: &Place<'_>, errors: &mut Errors) {
    let labels = template.field("metadata.labels");
    validate_labels(
        template.value().object("/metadata/labels"),
        labels.path(),
        errors,
    );
    let annotations = template.field("metadata.annotations");
    for (key, _) in annotations.entries() {
        for why in key_faults(&key.to_lowercase()) {
            errors.push(FieldError::invalid(annotations.path(), key, why));
        }
    }
    let spec = template.field("spec");
    validate(&spec, errors);
    if !spec.field("ephemeralContainers").is_empty() {
        let why = "ephemeral containers not allowed in pod template";
        spec.field("ephemeralContainers").forbidden(why, errors);
    }
}

/// Checks a pod spec.
pub fn validate(spec: &Place<'_>, errors: &mut Errors) {
    let volumes = volume::validate_all(&spec.field("volumes"), errors);
    if spec.field("containers").is_empty() {
        spec.field("containers").missing("", errors);
    }
    container::validate_all(spec, &volumes, errors);
    spec.field("restartPolicy")
        .require_one_as_listed(&["Always", "OnFailure", "Never"], errors);
    validate_dns(spec, errors);
    validate_identity(spec, errors);
    validate_security(spec, errors);
    scheduling::validate(spec, errors);
    spec.field("activeDeadlineSeconds")
        .within(1..=i64::from(i32::MAX), errors);
    for gate in spec.field("readinessGates").items() {
        gate.field("conditionType")
            .require_name(qualified_name, errors);
    }
    let preemption = spec.field("preemptionPolicy");
    if preemption.is_there() {
        preemption.require_one_as_listed(&["PreemptLowerPriority", "Never"], errors);
    }
    if spec.field("os").is_there() {
        spec.field("os.name")
            .require_one_of(&["linux", "windows"], errors);
    }
    for (resource, quantity) in spec.field("overhead").entries() {
        container::check_resource_name(resource, &quantity, errors);
        quantity.quantity(errors);
    }
}

fn validate_dns(spec: &Place<'_>, errors: &mut Errors) {
    let policy = spec.field("dnsPolicy");
    let policies = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    policy.require_one_as_listed(&policies, errors);
    let config = spec.field("dnsConfig");
    let servers = config.field("nameservers");
    if policy.text() == "None" {
        if !config.is_there() {
            let why = "must provide `dnsConfig` when `dnsPolicy` is None";
            config.missing(why, errors);
        } else if servers.is_empty() {
            let why = "must provide at least one DNS nameserver when `dnsPolicy` is None";
            servers.missing(why, errors);
        }
    }
    if servers.len() > NAMESERVERS_MAX {
        servers.invalid(
            format!("must not have more than {NAMESERVERS_MAX} nameservers"),
            errors,
        );
    }
    for server in servers.items() {
        server.address(errors);
    }
    let searches = config.field("searches");
    if searches.len() > SEARCHES_MAX {
        searches.invalid(
            format!("must not have more than {SEARCHES_MAX} search paths"),
            errors,
        );
    }
    let bytes: usize = searches.items().map(|search| search.text().len() + 1).sum();
    if bytes > SEARCHES_BYTES_MAX + 1 {
        let why = format!(
            "must not have more than {SEARCHES_BYTES_MAX} characters (including spaces) in the search list"
        );
        searches.invalid(why, errors);
    }
    for search in searches.items() {
        search.keep_to(search_domain, errors);
    }
    for option in config.field("options").items() {
        option.field("name").require(errors);
    }
    for alias in spec.field("hostAliases").items() {
        alias.field("ip").address(errors);
        for name in alias.field("hostnames").items() {
            name.keep_to(dns_subdomain, errors);
        }
    }
}

fn validate_identity(spec: &Place<'_>, errors: &mut Errors) {
    spec.field("hostname").keep_to(dns_label, errors);
    spec.field("subdomain").keep_to(dns_label, errors);
    for name in ["serviceAccountName", "nodeName", "priorityClassName"] {
        spec.field(name).keep_to(dns_subdomain, errors);
    }
    for name in ["runtimeClassName", "hostnameOverride"] {
        spec.field(name).hold_to(dns_subdomain, errors);
    }
    let hostname = spec.field("hostnameOverride");
    if hostname.text().len() > HOSTNAME_BYTES_MAX {
        hostname.too_long(HOSTNAME_BYTES_MAX, errors);
    }
    let mut claims: BTreeSet<&str> = BTreeSet::new();
    for claim in spec.field("resourceClaims").items() {
        let name = claim.field("name");
        name.require_name(dns_label, errors);
        if !claims.insert(name.text()) {
            name.duplicate(errors);
        }
    }
}

fn validate_security(spec: &Place<'_>, errors: &mut Errors) {
    let share = spec.field("shareProcessNamespace");
    if share.flag() && spec.field("hostPID").flag() {
        share.invalid(
            "ShareProcessNamespace and HostPID cannot both be enabled",
            errors,
        );
    }
    let context = spec.field("securityContext");
    let ids = 0..=i64::from(i32::MAX);
    for field in ["runAsUser", "runAsGroup", "fsGroup"] {
        context.field(field).within(ids.clone(), errors);
    }
    for group in context.field("supplementalGroups").items() {
        group.within(ids.clone(), errors);
    }
    context
        .field("fsGroupChangePolicy")
        .one_of(&["Always", "OnRootMismatch"], errors);
    context
        .field("supplementalGroupsPolicy")
        .one_of(&["Merge", "Strict"], errors);
    container::validate_seccomp(&context.field("seccompProfile"), errors);
    let mut names: BTreeSet<&str> = BTreeSet::new();
    for sysctl in context.field("sysctls").items() {
        let name = sysctl.field("name");
        let plain = |text: &str| {
            text.split(['.', '/']).all(|part| {
                let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
                !part.is_empty()
                    && part
                        .bytes()
                        .all(|byte| inner(byte) || b"-_".contains(&byte))
                    && part.bytes().next().is_some_and(inner)
                    && part.bytes().last().is_some_and(inner)
            })
        };
        if name.require(errors) && !plain(name.text()) {
            let why = "must have at most 253 characters and match regex ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";
            name.invalid(why, errors);
        } else if !names.insert(name.text()) {
            name.duplicate(errors);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn told(mut spec: Value) -> Vec<String> {
        default(&mut spec);
        let mut errors = Vec::new();
        validate(&Place::at(&spec, "spec"), &mut errors);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_wrong_with_a_spec_is_said_field_by_field() {
        let mut spec = json!({"containers": [{"name": "Bad_Name", "image": "", "volumeMounts": [{"name": "v", "mountPath": "/x"}],
            "readinessProbe": {}, "ports": [{"containerPort": 0}]}], "restartPolicy": "Sometimes"});
        default(&mut spec);
        let mut errors = Vec::new();
        validate(&Place::at(&spec, "spec"), &mut errors);
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

    #[test]
    fn a_pod_without_a_policy_for_names_says_its_servers() {
        let container = json!([{"name": "c", "image": "i"}]);
        assert_eq!(
            told(json!({"containers": container, "dnsPolicy": "None"})),
            ["spec.dnsConfig: Required value: must provide `dnsConfig` when `dnsPolicy` is None"]
        );
        let searches = [".", "a.b.", "_sip._tcp.abc_d.test", "-a", "a..b", "a_"];
        let config =
            json!({"nameservers": ["1.1.1.1", "2", "3.3.3.3", "4.4.4.4"], "searches": searches});
        let told = told(json!({"containers": container, "dnsConfig": config}));
        assert_eq!(
            told[..2],
            [
                r#"spec.dnsConfig.nameservers: Invalid value: ["1.1.1.1","2","3.3.3.3","4.4.4.4"]: must not have more than 3 nameservers"#,
                r#"spec.dnsConfig.nameservers[1]: Invalid value: "2": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"#,
            ]
        );
        let wrong = told[2..]
            .iter()
            .map(|why| why.split(": a lowercase").next().unwrap());
        assert_eq!(
            wrong.collect::<Vec<_>>(),
            [
                r#"spec.dnsConfig.searches[3]: Invalid value: "-a""#,
                r#"spec.dnsConfig.searches[4]: Invalid value: "a..b""#,
                r#"spec.dnsConfig.searches[5]: Invalid value: "a_""#,
            ]
        );
    }
}
