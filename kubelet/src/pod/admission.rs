//! Admission: pods that this node must not run, whoever put them here.

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::is_sidecar;

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

/// A Refusal is why a pod is not run, in the words of the API. It is final: its pod is over.
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

/// Why the pod must not run beside others that are here already: a port of the node that it wants is theirs.
pub fn conflict<'a>(pod: &Pod, others: impl IntoIterator<Item = &'a Pod>) -> Option<Refusal> {
    let wanted: Vec<HostPort<'_>> = host_ports(pod).collect();
    if wanted.is_empty() {
        return None;
    }
    let clash =
        |other: &Pod| host_ports(other).any(|theirs| wanted.iter().any(|ours| ours.meets(&theirs)));
    others.into_iter().any(clash).then(|| Refusal {
        reason: "NodePorts",
        message:
            "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports"
                .to_owned(),
    })
}

/// A port of the node, at one of its addresses or at all.
struct HostPort<'a> {
    address: &'a str,
    protocol: &'a str,
    port: i32,
}

impl HostPort<'_> {
    fn meets(&self, other: &HostPort<'_>) -> bool {
        let all = |address: &str| matches!(address, "" | "0.0.0.0" | "::");
        let same_address = self.address == other.address || all(self.address) || all(other.address);
        (self.port, self.protocol) == (other.port, other.protocol) && same_address
    }
}

fn host_ports(pod: &Pod) -> impl Iterator<Item = HostPort<'_>> {
    let spec = pod.spec.iter();
    let containers = spec.flat_map(|spec| {
        let sidecars = spec.init_containers.iter().flatten();
        let sidecars = sidecars.filter(|container| is_sidecar(container));
        spec.containers.iter().chain(sidecars)
    });
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    ports.filter_map(|port| {
        Some(HostPort {
            address: port.host_ip.as_deref().unwrap_or(""),
            protocol: port.protocol.as_deref().unwrap_or("TCP"),
            port: port.host_port.filter(|port| *port != 0)?,
        })
    })
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

    #[test]
    fn a_port_of_the_node_is_one_pods_at_a_time() {
        let pod = |port: serde_json::Value| -> Pod {
            let spec = json!({"containers": [{"name": "a", "ports": [port]}]});
            serde_json::from_value(json!({"spec": spec})).unwrap()
        };
        let held = pod(json!({"containerPort": 80, "hostPort": 8080, "hostIP": "192.0.2.1"}));
        for (port, refused) in [
            (json!({"containerPort": 81, "hostPort": 8080}), true),
            (
                json!({"containerPort": 81, "hostPort": 8080, "hostIP": "192.0.2.1"}),
                true,
            ),
            (
                json!({"containerPort": 81, "hostPort": 8080, "hostIP": "192.0.2.2"}),
                false,
            ),
            (
                json!({"containerPort": 81, "hostPort": 8080, "protocol": "UDP"}),
                false,
            ),
            (json!({"containerPort": 8080}), false),
        ] {
            let wanted = pod(port.clone());
            let found = conflict(&wanted, [&held]).map(|refusal| refusal.reason);
            assert_eq!(found, refused.then_some("NodePorts"), "{port}");
        }
    }
}
