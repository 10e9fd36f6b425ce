//! sandbox: what CRI is told about a pod as a whole.

use std::collections::HashMap;
use std::net::IpAddr;

use k8s_cri::v1::{
    DnsConfig, Int64Value, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PortMapping, Protocol, SecurityProfile,
    security_profile::ProfileType,
};
use k8s_openapi::api::core::v1::{Pod, PodSpec, SeccompProfile};

use super::{PodKey, host_network};
use crate::runtime::{LABEL_POD_NAME, LABEL_POD_NAMESPACE, LABEL_POD_UID};

/// Limits of resolv.conf that resolvers share (glibc and musl): more is cut.
const NAMESERVERS_MAX: usize = 3;
const SEARCHES_MAX: usize = 32;

/// What the kernel takes as a host's name.
const HOSTNAME_BYTES_MAX: usize = 64;

/// A SandboxError says why a pod can have no sandbox.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SandboxError {
    #[error(
        "setHostnameAsFQDN: the name {0} has {len} characters, and a host's name at most {HOSTNAME_BYTES_MAX}",
        len = .0.len()
    )]
    Hostname(String),
    #[error(
        "hostUsers is false: user namespaces are not supported here, and the pod is not run without"
    )]
    UserNamespace,
}

/// Resolv is the content of a resolv.conf.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resolv {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

impl Resolv {
    pub fn parse(text: &str) -> Self {
        let mut resolv = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => resolv.servers.extend(words.next().map(str::to_owned)),
                Some("search") => resolv.searches = words.map(str::to_owned).collect(),
                Some("options") => resolv.options = words.map(str::to_owned).collect(),
                _ => {}
            }
        }
        resolv
    }
}

/// How names are resolved in the cluster.
#[derive(Debug, Clone)]
pub struct ClusterDns<'a> {
    pub servers: &'a [IpAddr],
    pub domain: &'a str,
    /// The node's own resolv.conf.
    pub host: &'a Resolv,
}

/// The resolv.conf of a pod.
pub fn resolv(pod: &Pod, dns: &ClusterDns<'_>) -> Resolv {
    let spec = pod.spec.as_ref();
    let policy = spec
        .and_then(|s| s.dns_policy.as_deref())
        .unwrap_or("ClusterFirst");
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let cluster = match policy {
        "None" => None,
        "Default" => Some(false),
        "ClusterFirstWithHostNet" => Some(true),
        // A pod on the host's network resolves as the host does unless it says otherwise.
        _ => Some(!host_network(pod)),
    };
    let mut resolv = match cluster {
        None => Resolv::default(),
        Some(true) if !dns.servers.is_empty() => {
            let own = [
                format!("{namespace}.svc.{}", dns.domain),
                format!("svc.{}", dns.domain),
                dns.domain.to_owned(),
            ];
            Resolv {
                servers: dns.servers.iter().map(IpAddr::to_string).collect(),
                searches: own
                    .into_iter()
                    .chain(dns.host.searches.iter().cloned())
                    .collect(),
                options: vec!["ndots:5".to_owned()],
            }
        }
        Some(_) => dns.host.clone(),
    };
    if let Some(config) = spec.and_then(|s| s.dns_config.as_ref()) {
        resolv
            .servers
            .extend(config.nameservers.iter().flatten().cloned());
        resolv
            .searches
            .extend(config.searches.iter().flatten().cloned());
        for option in config.options.iter().flatten() {
            let Some(name) = &option.name else { continue };
            resolv
                .options
                .retain(|known| known.split(':').next() != Some(name));
            resolv.options.push(match &option.value {
                Some(value) => format!("{name}:{value}"),
                None => name.clone(),
            });
        }
    }
    let mut seen = Vec::new();
    resolv.searches.retain(|domain| {
        !seen.contains(domain) && {
            seen.push(domain.clone());
            true
        }
    });
    resolv.servers.truncate(NAMESERVERS_MAX);
    resolv.searches.truncate(SEARCHES_MAX);
    resolv
}

/// The name of a pod in its own hosts file: its `hostnameOverride`, its `hostname`, or its own name.
fn short_hostname(pod: &Pod) -> String {
    let spec = pod.spec.as_ref();
    let given = |name: Option<&String>| name.filter(|name| !name.is_empty()).cloned();
    let name = given(spec.and_then(|s| s.hostname_override.as_ref()))
        .or_else(|| given(spec.and_then(|s| s.hostname.as_ref())));
    let mut name = name
        .or_else(|| pod.metadata.name.clone())
        .unwrap_or_default();
    // The kernel takes 64 bytes, a DNS label 63.
    name.truncate(HOSTNAME_BYTES_MAX - 1);
    name.trim_end_matches(['-', '.']).to_owned()
}

/// The domain that Services give the names of a pod's subdomain, if it has one.
fn domain(pod: &Pod, cluster_domain: &str) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let subdomain = spec.subdomain.as_deref().filter(|name| !name.is_empty())?;
    if spec.hostname_override.is_some() {
        return None;
    }
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    Some(format!("{subdomain}.{namespace}.svc.{cluster_domain}"))
}

/// The hostname of a pod with a network of its own; with `setHostnameAsFQDN` its full name.
pub fn hostname(pod: &Pod, cluster_domain: &str) -> Result<String, SandboxError> {
    let name = short_hostname(pod);
    let full = pod.spec.as_ref().and_then(|s| s.set_hostname_as_fqdn) == Some(true);
    match domain(pod, cluster_domain).filter(|_| full) {
        None => Ok(name),
        Some(domain) => {
            let name = format!("{name}.{domain}");
            if name.len() > HOSTNAME_BYTES_MAX {
                return Err(SandboxError::Hostname(name));
            }
            Ok(name)
        }
    }
}

/// The name of a pod's log directory.
pub fn log_directory_name(key: &PodKey) -> String {
    format!("{}_{}_{}", key.namespace, key.name, key.uid)
}

/// The sandbox of a pod for CRI.
pub fn sandbox_config(
    pod: &Pod,
    attempt: u32,
    cgroup_parent: &str,
    log_directory: &str,
    dns: &ClusterDns<'_>,
) -> Result<PodSandboxConfig, SandboxError> {
    let key = PodKey::of(pod);
    let empty = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    if spec.host_users == Some(false) {
        return Err(SandboxError::UserNamespace);
    }
    let resolv = resolv(pod, dns);
    let security = spec.security_context.as_ref();
    let mut labels: HashMap<String, String> = pod
        .metadata
        .labels
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect();
    labels.insert(LABEL_POD_NAME.to_owned(), key.name.clone());
    labels.insert(LABEL_POD_NAMESPACE.to_owned(), key.namespace.clone());
    labels.insert(LABEL_POD_UID.to_owned(), key.uid.clone());
    let privileged = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten());
    let privileged = privileged
        .filter_map(|c| c.security_context.as_ref())
        .any(|s| s.privileged == Some(true));
    Ok(PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: key.name,
            uid: key.uid,
            namespace: key.namespace,
            attempt,
        }),
        // The host's network brings the host's name with it, and no UTS namespace to set another in.
        hostname: if host_network(pod) {
            String::new()
        } else {
            hostname(pod, dns.domain)?
        },
        log_directory: log_directory.to_owned(),
        dns_config: Some(DnsConfig {
            servers: resolv.servers,
            searches: resolv.searches,
            options: resolv.options,
        }),
        port_mappings: if host_network(pod) {
            Vec::new()
        } else {
            port_mappings(spec)
        },
        labels,
        annotations: pod
            .metadata
            .annotations
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: cgroup_parent.to_owned(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(spec)),
                run_as_user: security
                    .and_then(|s| s.run_as_user)
                    .map(|value| Int64Value { value }),
                run_as_group: security
                    .filter(|s| s.run_as_user.is_some())
                    .and_then(|s| s.run_as_group)
                    .map(|value| Int64Value { value }),
                supplemental_groups: supplemental_groups(spec),
                privileged,
                seccomp: Some(seccomp(security.and_then(|s| s.seccomp_profile.as_ref()))),
                ..Default::default()
            }),
            sysctls: security
                .iter()
                .flat_map(|s| s.sysctls.iter().flatten())
                .map(|s| (s.name.clone(), s.value.clone()))
                .collect(),
            ..Default::default()
        }),
        ..Default::default()
    })
}

fn port_mappings(spec: &PodSpec) -> Vec<PortMapping> {
    let ports = spec
        .containers
        .iter()
        .flat_map(|c| c.ports.iter().flatten());
    let mapping = |port: &k8s_openapi::api::core::v1::ContainerPort| PortMapping {
        protocol: match port.protocol.as_deref() {
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            _ => Protocol::Tcp,
        } as i32,
        container_port: port.container_port,
        host_port: port.host_port.unwrap_or(0),
        host_ip: port.host_ip.clone().unwrap_or_default(),
    };
    ports.map(mapping).collect()
}

/// The namespaces of a pod, or of a container in it.
pub fn namespaces(spec: &PodSpec) -> NamespaceOption {
    let pod_or_node = |host: Option<bool>| {
        if host == Some(true) {
            NamespaceMode::Node
        } else {
            NamespaceMode::Pod
        }
    };
    let pid = match (
        spec.host_pid == Some(true),
        spec.share_process_namespace == Some(true),
    ) {
        (true, _) => NamespaceMode::Node,
        (false, true) => NamespaceMode::Pod,
        (false, false) => NamespaceMode::Container,
    };
    NamespaceOption {
        network: pod_or_node(spec.host_network) as i32,
        pid: pid as i32,
        ipc: pod_or_node(spec.host_ipc) as i32,
        ..Default::default()
    }
}

/// Extra groups of every process of the pod: those asked for, and the one that owns its volumes.
pub fn supplemental_groups(spec: &PodSpec) -> Vec<i64> {
    let Some(security) = &spec.security_context else {
        return Vec::new();
    };
    security
        .supplemental_groups
        .iter()
        .flatten()
        .copied()
        .chain(security.fs_group)
        .collect()
}

pub fn seccomp(profile: Option<&SeccompProfile>) -> SecurityProfile {
    match profile.map(|p| (p.type_.as_str(), p.localhost_profile.clone())) {
        Some(("RuntimeDefault", _)) => SecurityProfile {
            profile_type: ProfileType::RuntimeDefault as i32,
            localhost_ref: String::new(),
        },
        Some(("Localhost", file)) => SecurityProfile {
            profile_type: ProfileType::Localhost as i32,
            localhost_ref: format!("/var/lib/kubelet/seccomp/{}", file.unwrap_or_default()),
        },
        _ => SecurityProfile {
            profile_type: ProfileType::Unconfined as i32,
            localhost_ref: String::new(),
        },
    }
}

/// The content of /etc/hosts for a pod with a network of its own.
pub fn hosts_file(pod: &Pod, ips: &[String], cluster_domain: &str) -> String {
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    let host = short_hostname(pod);
    for ip in ips {
        match domain(pod, cluster_domain) {
            Some(domain) => text.push_str(&format!("{ip}\t{host}.{domain}\t{host}\n")),
            None => text.push_str(&format!("{ip}\t{host}\n")),
        }
    }
    text + &host_aliases(pod)
}

/// The lines of a hosts file that the pod's spec adds.
pub fn host_aliases(pod: &Pod) -> String {
    let aliases = pod
        .spec
        .iter()
        .flat_map(|s| s.host_aliases.iter().flatten());
    let line = |alias: &k8s_openapi::api::core::v1::HostAlias| {
        let names: Vec<_> = alias.hostnames.iter().flatten().cloned().collect();
        format!("{}\t{}\n", alias.ip, names.join("\t"))
    };
    aliases.map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn resolv_conf_follows_the_dns_policy() {
        let host =
            Resolv::parse("# x\nnameserver 192.0.2.53\nsearch corp.example\noptions timeout:1\n");
        let dns = ClusterDns {
            servers: &["10.96.0.10".parse().unwrap()],
            domain: "cluster.local",
            host: &host,
        };
        let cluster = [
            "ns.svc.cluster.local",
            "svc.cluster.local",
            "cluster.local",
            "corp.example",
        ];
        for (spec, servers, searches, options) in [
            (
                json!({}),
                vec!["10.96.0.10"],
                cluster.to_vec(),
                vec!["ndots:5"],
            ),
            (
                json!({"hostNetwork": true}),
                vec!["192.0.2.53"],
                vec!["corp.example"],
                vec!["timeout:1"],
            ),
            (
                json!({"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"}),
                vec!["10.96.0.10"],
                cluster.to_vec(),
                vec!["ndots:5"],
            ),
            (
                json!({"dnsPolicy": "Default"}),
                vec!["192.0.2.53"],
                vec!["corp.example"],
                vec!["timeout:1"],
            ),
            (
                json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["192.0.2.1"], "searches": ["a"], "options": [{"name": "ndots", "value": "2"}]}}),
                vec!["192.0.2.1"],
                vec!["a"],
                vec!["ndots:2"],
            ),
            (
                json!({"dnsConfig": {"options": [{"name": "ndots", "value": "1"}]}}),
                vec!["10.96.0.10"],
                cluster.to_vec(),
                vec!["ndots:1"],
            ),
        ] {
            let mut spec = spec;
            spec["containers"] = json!([]);
            let pod: Pod =
                serde_json::from_value(json!({"metadata": {"namespace": "ns"}, "spec": spec}))
                    .unwrap();
            let got = resolv(&pod, &dns);
            assert_eq!(
                (got.servers, got.searches, got.options),
                (own(servers), own(searches), own(options)),
                "{spec}"
            );
        }
    }

    #[test]
    fn the_hostname_is_the_pods_name_unless_its_spec_says_otherwise() {
        let long = "x".repeat(63);
        let full = format!("{long}.sub.ns.svc.cluster.local");
        for (spec, expected) in [
            (json!({}), Ok("pod-1")),
            (json!({"hostname": "web"}), Ok("web")),
            (json!({"hostname": "web", "subdomain": "sub"}), Ok("web")),
            (
                json!({"hostname": "web", "subdomain": "sub", "setHostnameAsFQDN": true}),
                Ok("web.sub.ns.svc.cluster.local"),
            ),
            (
                json!({"hostname": "web", "setHostnameAsFQDN": true}),
                Ok("web"),
            ),
            (
                json!({"hostname": "web", "subdomain": "sub", "hostnameOverride": "db.example"}),
                Ok("db.example"),
            ),
            (
                json!({"hostname": long, "subdomain": "sub", "setHostnameAsFQDN": true}),
                Err(SandboxError::Hostname(full.clone())),
            ),
        ] {
            let mut spec = spec;
            spec["containers"] = json!([]);
            let meta = json!({"name": "pod-1", "namespace": "ns"});
            let pod = serde_json::from_value(json!({"metadata": meta, "spec": spec})).unwrap();
            assert_eq!(
                hostname(&pod, "cluster.local"),
                expected.map(str::to_owned),
                "{spec}"
            );
        }
    }

    fn own(list: Vec<&str>) -> Vec<String> {
        list.into_iter().map(str::to_owned).collect()
    }
}
