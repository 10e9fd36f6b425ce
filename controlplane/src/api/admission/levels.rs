//! The levels of pod security: what of a pod breaks baseline and restricted, in the words of upstream.

use serde_json::Value;

use crate::api::fields::Fields;

/// Capabilities that the baseline lets containers have.
const CAPABILITIES: [&str; 13] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];
/// Sysctls that belong to the pod's own namespaces.
const SYSCTLS: [&str; 10] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_syncookies",
];
/// Volumes that hold nothing of the node.
const VOLUMES: [&str; 9] = [
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
];
const SELINUX_TYPES: [&str; 5] = [
    "",
    "container_engine_t",
    "container_init_t",
    "container_kvm_t",
    "container_t",
];

/// What breaks a level, in the words of upstream.
pub fn violations(level: &str, pod: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    if matches!(level, "baseline" | "restricted") {
        baseline(pod, level, &mut faults);
    }
    if level == "restricted" {
        restricted(pod, &mut faults);
    }
    faults
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers", "ephemeralContainers"]
        .into_iter()
        .flat_map(|list| pod.items(&format!("/spec/{list}")))
}

/// `container "a"`, `containers "a", "b"`.
fn named(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
    let plural = if names.len() == 1 { "" } else { "s" };
    format!("container{plural} {}", quoted.join(", "))
}

/// The names of the containers of which something holds.
fn those(pod: &Value, holds: impl Fn(&Value) -> bool) -> Vec<&str> {
    containers(pod)
        .filter(|container| holds(container))
        .map(|container| container.text("/name"))
        .collect()
}

fn baseline(pod: &Value, level: &str, faults: &mut Vec<String>) {
    let host: Vec<String> = ["hostNetwork", "hostPID", "hostIPC"]
        .into_iter()
        .filter(|field| pod.flag(&format!("/spec/{field}")))
        .map(|field| format!("{field}=true"))
        .collect();
    if !host.is_empty() {
        faults.push(format!("host namespaces ({})", host.join(", ")));
    }
    let privileged = those(pod, |c| c.flag("/securityContext/privileged"));
    if !privileged.is_empty() {
        let who = named(&privileged);
        faults.push(format!(
            "privileged ({who} must not set securityContext.privileged=true)"
        ));
    }
    if level == "baseline" {
        added_capabilities(pod, &CAPABILITIES, "non-default capabilities", None, faults);
    }
    let paths: Vec<String> = pod
        .items("/spec/volumes")
        .iter()
        .filter(|volume| volume.has("/hostPath"))
        .map(|volume| format!("{:?}", volume.text("/name")))
        .collect();
    if !paths.is_empty() && level == "baseline" {
        let plural = if paths.len() == 1 { "" } else { "s" };
        faults.push(format!(
            "hostPath volumes (volume{plural} {})",
            paths.join(", ")
        ));
    }
    let ports: Vec<String> = containers(pod)
        .flat_map(|container| container.items("/ports"))
        .map(|port| port.int("/hostPort"))
        .filter(|port| *port != 0)
        .map(|port| port.to_string())
        .collect();
    if !ports.is_empty() {
        let uses = |c: &Value| {
            c.items("/ports")
                .iter()
                .any(|port| port.int("/hostPort") != 0)
        };
        let (who, plural) = (those(pod, uses), if ports.len() == 1 { "" } else { "s" });
        let verb = if who.len() == 1 { "uses" } else { "use" };
        faults.push(format!(
            "hostPort ({} {verb} hostPort{plural} {})",
            named(&who),
            ports.join(", ")
        ));
    }
    let mislabelled = |of: &Value, at: &str| {
        let options = format!("{at}/seLinuxOptions");
        !SELINUX_TYPES.contains(&of.text(&format!("{options}/type")))
            || !of.text(&format!("{options}/user")).is_empty()
            || !of.text(&format!("{options}/role")).is_empty()
    };
    let who = those(pod, |c| mislabelled(c, "/securityContext"));
    if !who.is_empty() || mislabelled(pod, "/spec/securityContext") {
        let who = if who.is_empty() {
            "pod".to_owned()
        } else {
            named(&who)
        };
        faults.push(format!(
            "seLinuxOptions ({who} set forbidden securityContext.seLinuxOptions)"
        ));
    }
    let unmasked = those(pod, |c| c.text("/securityContext/procMount") == "Unmasked");
    if !unmasked.is_empty() {
        let who = named(&unmasked);
        faults.push(format!(
            "procMount ({who} must not set securityContext.procMount to \"Unmasked\")"
        ));
    }
    if level == "baseline" {
        let unconfined =
            |of: &Value, at: &str| of.text(&format!("{at}/seccompProfile/type")) == "Unconfined";
        let who = those(pod, |c| unconfined(c, "/securityContext"));
        if unconfined(pod, "/spec/securityContext") || !who.is_empty() {
            let who = if who.is_empty() {
                "pod".to_owned()
            } else {
                named(&who)
            };
            faults.push(format!(
                "seccompProfile ({who} must not set securityContext.seccompProfile.type to \"Unconfined\")"
            ));
        }
    }
    let sysctls: Vec<&str> = pod
        .items("/spec/securityContext/sysctls")
        .iter()
        .map(|sysctl| sysctl.text("/name"))
        .filter(|name| !SYSCTLS.contains(name))
        .collect();
    if !sysctls.is_empty() {
        faults.push(format!("forbidden sysctls ({})", sysctls.join(", ")));
    }
}

/// Capabilities beyond those allowed; `also` is said in the same breath.
fn added_capabilities(
    pod: &Value,
    allowed: &[&str],
    what: &str,
    also: Option<String>,
    faults: &mut Vec<String>,
) {
    let beyond = |container: &Value| -> Vec<String> {
        let added = container.items("/securityContext/capabilities/add").iter();
        added
            .filter_map(Value::as_str)
            .filter(|name| !allowed.contains(name))
            .map(|name| format!("{name:?}"))
            .collect()
    };
    let who = those(pod, |container| !beyond(container).is_empty());
    let mut parts: Vec<String> = also.into_iter().collect();
    if !who.is_empty() {
        let mut names: Vec<String> = containers(pod).flat_map(beyond).collect();
        names.sort();
        names.dedup();
        parts.push(format!(
            "{} must not include {} in securityContext.capabilities.add",
            named(&who),
            names.join(", ")
        ));
    }
    if !parts.is_empty() {
        faults.push(format!("{what} ({})", parts.join("; ")));
    }
}

fn restricted(pod: &Value, faults: &mut Vec<String>) {
    let mut volumes = Vec::new();
    for volume in pod.items("/spec/volumes") {
        let source = volume
            .as_object()
            .into_iter()
            .flatten()
            .map(|(key, _)| key.as_str());
        if let Some(source) = source
            .filter(|key| *key != "name")
            .find(|key| !VOLUMES.contains(key))
        {
            volumes.push(format!(
                "volume {:?} uses restricted volume type {source:?}",
                volume.text("/name")
            ));
        }
    }
    if !volumes.is_empty() {
        faults.push(format!("restricted volume types ({})", volumes.join("; ")));
    }
    let escalates = those(pod, |container| {
        container.pointer("/securityContext/allowPrivilegeEscalation") != Some(&Value::Bool(false))
    });
    if !escalates.is_empty() {
        let who = named(&escalates);
        faults.push(format!(
            "allowPrivilegeEscalation != false ({who} must set securityContext.allowPrivilegeEscalation=false)"
        ));
    }
    let keeps = those(pod, |container| {
        let dropped = container.items("/securityContext/capabilities/drop");
        !dropped.iter().any(|name| name == "ALL")
    });
    let also = (!keeps.is_empty()).then(|| {
        format!(
            "{} must set securityContext.capabilities.drop=[\"ALL\"]",
            named(&keeps)
        )
    });
    let allowed = ["NET_BIND_SERVICE"];
    added_capabilities(pod, &allowed, "unrestricted capabilities", also, faults);
    let whole = pod.pointer("/spec/securityContext/runAsNonRoot") == Some(&Value::Bool(true));
    let may_be_root = those(pod, |container| {
        match container.pointer("/securityContext/runAsNonRoot") {
            Some(Value::Bool(says)) => !says,
            _ => !whole,
        }
    });
    if !may_be_root.is_empty() {
        let who = named(&may_be_root);
        faults.push(format!(
            "runAsNonRoot != true (pod or {who} must set securityContext.runAsNonRoot=true)"
        ));
    }
    let root = |of: &Value, at: &str| of.has(at) && of.int(at) == 0;
    let who = those(pod, |container| {
        root(container, "/securityContext/runAsUser")
    });
    if root(pod, "/spec/securityContext/runAsUser") || !who.is_empty() {
        let who = if who.is_empty() {
            "pod".to_owned()
        } else {
            named(&who)
        };
        faults.push(format!("runAsUser=0 ({who} must not set runAsUser=0)"));
    }
    let confined = |kind: &str| matches!(kind, "RuntimeDefault" | "Localhost");
    let whole = confined(pod.text("/spec/securityContext/seccompProfile/type"));
    let free = those(pod, |container| {
        match container.text("/securityContext/seccompProfile/type") {
            "" => !whole,
            kind => !confined(kind),
        }
    });
    if !free.is_empty() {
        let who = named(&free);
        faults.push(format!(
            "seccompProfile (pod or {who} must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\")"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_plain_pod_keeps_to_the_baseline_and_not_to_restricted() {
        let pod = json!({"spec": {"containers": [{"name": "c"}]}});
        assert_eq!(violations("", &pod), Vec::<String>::new());
        assert_eq!(violations("privileged", &pod), Vec::<String>::new());
        assert_eq!(violations("baseline", &pod), Vec::<String>::new());
        assert_eq!(
            violations("restricted", &pod),
            [
                r#"allowPrivilegeEscalation != false (container "c" must set securityContext.allowPrivilegeEscalation=false)"#,
                r#"unrestricted capabilities (container "c" must set securityContext.capabilities.drop=["ALL"])"#,
                r#"runAsNonRoot != true (pod or container "c" must set securityContext.runAsNonRoot=true)"#,
                r#"seccompProfile (pod or container "c" must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost")"#,
            ]
        );
        let careful = json!({"spec": {"securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "volumes": [{"name": "v", "emptyDir": {}}],
            "containers": [{"name": "c", "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}});
        assert_eq!(violations("restricted", &careful), Vec::<String>::new());
    }

    #[test]
    fn what_reaches_the_node_breaks_the_baseline() {
        let pod = json!({"spec": {"hostNetwork": true, "hostPID": true, "volumes": [{"name": "v", "hostPath": {"path": "/"}}],
            "containers": [
                {"name": "a", "securityContext": {"privileged": true, "capabilities": {"add": ["NET_ADMIN", "CHOWN"]}}},
                {"name": "b", "ports": [{"containerPort": 80, "hostPort": 80}]}]}});
        assert_eq!(
            violations("baseline", &pod),
            [
                "host namespaces (hostNetwork=true, hostPID=true)",
                r#"privileged (container "a" must not set securityContext.privileged=true)"#,
                r#"non-default capabilities (container "a" must not include "NET_ADMIN" in securityContext.capabilities.add)"#,
                r#"hostPath volumes (volume "v")"#,
                r#"hostPort (container "b" uses hostPort 80)"#,
            ]
        );
    }
}
