//! What this machine is made of as a node: its files, credentials and services.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::balancer;
use super::member;
use super::share;
use super::token::Token;
use super::{LOCAL_API_PORT, MachineDir, MachineError, file};
use crate::checks::Machine;
use crate::config::Binaries;
use crate::containerd;
use crate::family;
use crate::node::{BIN_DIR, Bind, NodeSpec, ServiceSpec};
use crate::seed;
use crate::up::specs::{service, write_private};

/// Where the agent finds the node's cgroup, whichever hierarchy it is in.
pub const CGROUP: &str = "/run/keelway/cgroup";
const CREDENTIALS: &str = "/etc/keelway";
const CERTIFICATES: &str = "/var/lib/kubelet/pki";
/// The client certificate of the node with its key, in its /var.
pub const CLIENT_CERTIFICATE: &str = "lib/kubelet/pki/kubelet-client.pem";
/// systemd-resolved keeps the real name servers here, and an address of the machine's loopback in /etc/resolv.conf, which pods do not reach.
const RESOLV_CONFS: [&str; 2] = ["/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"];

/// What all nodes of a cluster agree on; `kube-system/keelway-cluster` tells it to those that join.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterFacts {
    pub name: String,
    pub version: String,
    pub service_cidrs: Vec<ipnetwork::IpNetwork>,
    pub cluster_cidrs: Vec<ipnetwork::IpNetwork>,
    pub cluster_dns: IpAddr,
    pub cluster_domain: String,
    /// `embedded` or `etcd`: whether there can be more than one control plane.
    pub store: String,
}

/// What a control plane runs with, beside what every node does.
#[derive(Debug, Clone)]
pub struct ControlPlane {
    pub port: u16,
    /// The flags of its store.
    pub store: Vec<String>,
    /// Its member of etcd, where it brings one.
    pub etcd: Option<ServiceSpec>,
}

/// A node to be made of this machine.
#[derive(Debug, Clone)]
pub struct Plan<'a> {
    pub dir: &'a MachineDir,
    pub machine: &'a Machine,
    pub binaries: &'a Binaries,
    pub facts: &'a ClusterFacts,
    pub node: &'a str,
    pub addresses: &'a [IpAddr],
    /// API servers to begin with.
    pub servers: Vec<SocketAddr>,
    pub ca: &'a str,
    pub token: &'a Token,
    pub labels: Vec<String>,
    pub taints: Vec<String>,
    pub registries: Option<PathBuf>,
    pub control_plane: Option<ControlPlane>,
}

/// Where parts of a node find an API server.
pub fn local_api(first: IpAddr) -> SocketAddr {
    let loopback = match first {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    SocketAddr::new(loopback, LOCAL_API_PORT)
}

/// A kubeconfig with a token.
pub fn with_token(server: &str, ca: &str, token: &Token) -> Value {
    use base64::Engine;
    let ca = base64::prelude::BASE64_STANDARD.encode(ca);
    let name = "keelway";
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": name,
        "clusters": [{"name": name, "cluster": {"server": server, "certificate-authority-data": ca}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "users": [{"name": name, "user": {"token": token.shown()}}],
    })
}

impl Plan<'_> {
    pub fn local(&self) -> SocketAddr {
        local_api(self.addresses[0])
    }

    /// The machine's file of name servers.
    pub fn resolv_conf() -> Option<PathBuf> {
        let mut found = RESOLV_CONFS.iter().map(PathBuf::from);
        found.find(|path| path.is_file())
    }

    /// Writes what a worker joins with; the token goes with the first start that has a certificate.
    pub fn write_credentials(&self) -> Result<(), MachineError> {
        let folder = self.dir.credentials();
        fs::create_dir_all(&folder).map_err(file("make", &folder))?;
        let server = format!("https://{}", self.local());
        let bootstrap = with_token(&server, self.ca, self.token);
        for (name, text) in [
            ("ca.crt", self.ca.to_owned()),
            (
                "bootstrap.kubeconfig",
                crate::kubeconfig::to_yaml(&bootstrap),
            ),
        ] {
            let path = folder.join(name);
            write_private(&path, &text)
                .map_err(|error| MachineError::Refused(error.to_string()))?;
        }
        Ok(())
    }

    pub fn spec(&self) -> NodeSpec {
        let v2 = self.machine.hierarchies.for_the_machine();
        let group = v2.group(self.node, &self.facts.name);
        let mut binds = vec![
            Bind {
                from: self.dir.credentials(),
                to: CREDENTIALS.into(),
                // A control plane renews its certificates there.
                read_only: self.control_plane.is_none(),
            },
            Bind {
                from: v2
                    .v2_mount()
                    .join(group.strip_prefix("/").unwrap_or(&group)),
                to: CGROUP.into(),
                read_only: false,
            },
            Bind {
                from: "/etc/hosts".into(),
                to: "/etc/hosts".into(),
                read_only: true,
            },
        ];
        if let Some(path) = Self::resolv_conf() {
            binds.push(Bind {
                from: path,
                to: "/etc/resolv.conf".into(),
                read_only: true,
            });
        }
        binds.extend(self.registries.iter().map(|folder| Bind {
            from: folder.clone(),
            to: containerd::REGISTRIES.into(),
            read_only: true,
        }));
        let programs = [
            ("keelway", &self.binaries.keelway),
            ("keelway-kubelet", &self.binaries.kubelet),
            ("keelway-controlplane", &self.binaries.controlplane),
        ];
        binds.extend(programs.map(|(name, from)| Bind {
            from: from.clone(),
            to: Path::new(BIN_DIR).join(name),
            read_only: true,
        }));
        let pause = format!("localhost/keelway/pause:{}", env!("CARGO_PKG_VERSION"));
        let config = containerd::config(&pause, self.dir.snapshotter());
        let mut services = vec![self.balancer(), seed::containerd_service(), self.kubelet()];
        if let Some(control_plane) = &self.control_plane {
            services.insert(0, self.server(control_plane));
            services.extend(control_plane.etcd.clone());
        }
        let mut settings = BTreeMap::from([("ipv4/ip_forward".to_owned(), "1".to_owned())]);
        if self.addresses.iter().any(IpAddr::is_ipv6) {
            settings.insert("ipv6/conf/all/forwarding".to_owned(), "1".to_owned());
        }
        NodeSpec {
            cluster: self.node.to_owned(),
            name: self.facts.name.clone(),
            dir: self.dir.node(),
            binds,
            files: BTreeMap::from([
                ("/etc/hostname".into(), format!("{}\n", self.node)),
                (PathBuf::from(containerd::CONFIG), config),
            ]),
            net_sysctls: settings,
            path: self.machine.path.clone(),
            machine: true,
            services,
        }
    }

    fn balancer(&self) -> ServiceSpec {
        let certificate = format!("/var/{CLIENT_CERTIFICATE}");
        balancer::service(self.local(), &self.servers, &certificate)
    }

    fn kubelet(&self) -> ServiceSpec {
        let program = Path::new(BIN_DIR).join("keelway-kubelet");
        let group = self.machine.hierarchies.for_the_machine();
        let group = group.group(self.node, &self.facts.name);
        let mut kubelet = service(
            "kubelet",
            &program,
            &[
                ("--node-name", self.node),
                ("--node-ip", &family::list(self.addresses)),
                ("--kubeconfig", "/var/lib/kubelet/kubeconfig"),
                (
                    "--bootstrap-kubeconfig",
                    &format!("{CREDENTIALS}/bootstrap.kubeconfig"),
                ),
                ("--cert-dir", CERTIFICATES),
                ("--runtime-endpoint", containerd::SOCKET),
                ("--cgroup-root", &group.display().to_string()),
                ("--client-ca", &format!("{CREDENTIALS}/ca.crt")),
                ("--cluster-dns", &self.facts.cluster_dns.to_string()),
                ("--cluster-domain", &self.facts.cluster_domain),
                ("--root-dir", "/var/lib/kubelet"),
            ],
        );
        for (flag, values) in [
            ("--node-labels", &self.labels),
            ("--register-with-taints", &self.taints),
        ] {
            if !values.is_empty() {
                kubelet.argv.push(format!("{flag}={}", values.join(",")));
            }
        }
        kubelet.after = vec!["containerd".to_owned(), super::run::API.to_owned()];
        kubelet
    }

    fn server(&self, control_plane: &ControlPlane) -> ServiceSpec {
        let program = Path::new(BIN_DIR).join("keelway-controlplane");
        // A socket of [::] takes IPv4 connections too, but only where there is IPv6.
        let everywhere = if self.addresses.iter().any(IpAddr::is_ipv6) {
            "[::]"
        } else {
            "0.0.0.0"
        };
        let facts = self.facts;
        let mut server = service(
            "controlplane",
            &program,
            &[
                ("--pki-dir", CREDENTIALS),
                ("--bind", &format!("{everywhere}:{}", control_plane.port)),
                ("--advertise-address", &self.addresses[0].to_string()),
                ("--service-cidr", &family::list(&facts.service_cidrs)),
                ("--cluster-cidr", &family::list(&facts.cluster_cidrs)),
            ],
        );
        server.argv.extend(control_plane.store.iter().cloned());
        let given = |name: &str| self.dir.credentials().join(name).exists();
        let mut guards = Vec::new();
        if given(share::ENCRYPTION) {
            guards.push(("--encryption-provider-config", share::ENCRYPTION));
        }
        if given(share::AUDIT_POLICY) {
            guards.push(("--audit-policy-file", share::AUDIT_POLICY));
            let log = ["--audit-log-path", "/var/log/keelway/audit.log"];
            server.argv.extend(log.map(str::to_owned));
        }
        for (flag, name) in guards {
            let words = [flag.to_owned(), format!("{CREDENTIALS}/{name}")];
            server.argv.extend(words);
        }
        if let Some(etcd) = &control_plane.etcd {
            server.after = vec![etcd.name.clone(), member::VOTE.to_owned()];
        }
        server
    }
}
