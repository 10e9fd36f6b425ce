//! Admission: pods that this node must not run, whoever put them here.

use k8s_openapi::api::core::v1::{Pod, PodSpec};

/// Sysctls that a pod may set: they are the pod's own, and cannot hurt others (upstream's list).
const SYSCTLS_SAFE: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// A Refusal is why a pod is not run, in the words of the API. It is final: what it depends on does not change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub reason: &'static str,
    pub message: String,
}

/// Why the pod must not run here, if it must not.
pub fn refusal(pod: &Pod) -> Option<Refusal> {
    let spec = pod.spec.as_ref()?;
    let os = spec.os.as_ref().map_or("linux", |os| os.name.as_str());
    if os != "linux" {
        return Some(Refusal {
            reason: "PodOSNotSupported",
            message: format!("the pod is for {os}, and this node runs linux"),
        });
    }
    let sysctls = spec.security_context.iter();
    let mut sysctls = sysctls.flat_map(|s| s.sysctls.iter().flatten());
    sysctls.find_map(|sysctl| forbidden(spec, &sysctl.name))
}

fn forbidden(spec: &PodSpec, name: &str) -> Option<Refusal> {
    let refuse = |why: &str| {
        Some(Refusal {
            reason: "SysctlForbidden",
            message: format!("forbidden sysctl: \"{name}\" {why}"),
        })
    };
    // Both ways to write a name are one name.
    let dotted = name.replace('/', ".");
    if !SYSCTLS_SAFE.contains(&dotted.as_str()) {
        return refuse("not allowlisted");
    }
    if dotted.starts_with("net.") && spec.host_network == Some(true) {
        return refuse("not allowed with host net enabled");
    }
    if dotted.starts_with("kernel.") && spec.host_ipc == Some(true) {
        return refuse("not allowed with host ipc enabled");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pods_of_other_systems_and_with_sysctls_of_the_node_are_refused() {
        let sysctl = |name: &str| json!({"sysctls": [{"name": name, "value": "1"}]});
        for (spec, expected) in [
            (json!({}), None),
            (json!({"os": {"name": "linux"}}), None),
            (
                json!({"os": {"name": "windows"}}),
                Some("PodOSNotSupported"),
            ),
            (
                json!({"securityContext": sysctl("kernel.shm_rmid_forced")}),
                None,
            ),
            (
                json!({"securityContext": sysctl("net/ipv4/tcp_syncookies")}),
                None,
            ),
            (
                json!({"securityContext": sysctl("kernel.msgmax")}),
                Some("SysctlForbidden"),
            ),
            (
                json!({"securityContext": sysctl("vm.swappiness")}),
                Some("SysctlForbidden"),
            ),
            (
                json!({"hostNetwork": true, "securityContext": sysctl("net.ipv4.tcp_syncookies")}),
                Some("SysctlForbidden"),
            ),
            (
                json!({"hostIPC": true, "securityContext": sysctl("kernel.shm_rmid_forced")}),
                Some("SysctlForbidden"),
            ),
        ] {
            let mut spec = spec;
            spec["containers"] = json!([]);
            let pod = serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap();
            assert_eq!(refusal(&pod).map(|r| r.reason), expected, "{spec}");
        }
    }
}
