//! What the nodes of a cluster are made of: their files, credentials and services.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{API, API_PORT, CLUSTER_DOMAIN, FORWARDER, IMAGES, NETWORK, Plan, UpError};
use crate::containerd;
use crate::family;
use crate::forward;
use crate::kubeconfig;
use crate::node::{BIN_DIR, Bind, NodeSpec, ServiceSpec};
use crate::pki::{ClusterPki, Credential};
use crate::seed;
use crate::state::NodeState;

impl Plan<'_> {
    pub(super) fn containerd_config(&self) -> String {
        let pause = format!("localhost/keelway/pause:{}", env!("CARGO_PKG_VERSION"));
        containerd::config(&pause, self.snapshotter)
    }

    pub(super) fn api_server(&self) -> String {
        let addresses = self.subnet.control_plane(self.config.ip_family);
        format!("https://{}", SocketAddr::new(addresses[0], API_PORT))
    }

    pub(super) fn control_plane(
        &self,
        node: &NodeState,
        pki: &ClusterPki,
    ) -> Result<NodeSpec, UpError> {
        let local = format!("https://127.0.0.1:{API_PORT}");
        let scheduler =
            kubeconfig::single("scheduler", &local, &pki.ca.certificate, &pki.scheduler);
        let controllers =
            kubeconfig::single("controllers", &local, &pki.ca.certificate, &pki.controllers);
        let (token_key, token_public) = &pki.service_accounts;
        let credentials = self.credentials(
            node,
            &[
                ("ca.crt", &pki.ca.certificate),
                ("ca.key", &pki.ca.key),
                ("apiserver.crt", &pki.apiserver.certificate),
                ("apiserver.key", &pki.apiserver.key),
                (
                    "apiserver-kubelet-client.crt",
                    &pki.apiserver_kubelet_client.certificate,
                ),
                (
                    "apiserver-kubelet-client.key",
                    &pki.apiserver_kubelet_client.key,
                ),
                ("sa.key", token_key),
                ("sa.pub", token_public),
                ("controllers.kubeconfig", &kubeconfig::to_yaml(&controllers)),
                ("scheduler.kubeconfig", &kubeconfig::to_yaml(&scheduler)),
            ],
        )?;
        let program = Path::new(BIN_DIR).join("keelway-controlplane");
        let ip_family = self.config.ip_family;
        // A socket of [::] takes IPv4 connections too, but only where there is IPv6.
        let everywhere = if ip_family.has_v6() {
            "[::]"
        } else {
            "0.0.0.0"
        };
        let server = service(
            "controlplane",
            &program,
            &[
                ("--data-dir", "/var/lib/keelway/controlplane"),
                ("--pki-dir", "/etc/keelway"),
                ("--bind", &format!("{everywhere}:{API_PORT}")),
                ("--advertise-address", &node.address.to_string()),
                ("--service-cidr", &family::list(&ip_family.services())),
                ("--cluster-cidr", &family::list(&ip_family.pods())),
            ],
        );
        // It binds to every address, so it need not wait for the network.
        let server = ServiceSpec {
            listens: true,
            ..server
        };
        let binaries = [(self.config.binaries.controlplane.clone(), program)];
        let mut services = vec![server];
        services.extend(self.forwarder());
        Ok(self.spec(node, credentials, binaries.into(), Vec::new(), services))
    }

    fn resolv_conf(&self) -> String {
        if self.config.egress {
            format!("nameserver {}\n", self.name_server())
        } else {
            "# A node has no name server: nothing leaves this cluster's namespaces.\n".to_owned()
        }
    }

    /// The machine's name servers, as the cluster reaches them by its way out.
    pub(super) fn name_server(&self) -> IpAddr {
        let v4 = self.config.ip_family.has_v4();
        let mut servers = forward::NAME_SERVERS.into_iter();
        servers
            .find(|server| server.is_ipv4() == v4)
            .unwrap_or(forward::NAME_SERVERS[0])
    }

    /// Where nodes find the proxy by which images are fetched.
    fn proxy(&self) -> SocketAddr {
        let addresses = self.subnet.control_plane(self.config.ip_family);
        SocketAddr::new(addresses[0], forward::PROXY_PORT)
    }

    pub(super) fn has_forwarder(&self) -> bool {
        self.config.pull || self.config.egress
    }

    fn forwarder(&self) -> Option<ServiceSpec> {
        if !self.has_forwarder() {
            return None;
        }
        let program = Path::new(BIN_DIR).join("keelway");
        let mut forwarder = service(FORWARDER, &program, &[]);
        forwarder.argv.push("forward".to_owned());
        if self.config.pull {
            forwarder.argv.push(format!("--proxy={}", self.proxy()));
            let workers = self.state.nodes.iter().filter(|node| !node.control_plane);
            let clients = workers.flat_map(NodeState::addresses);
            let clients = clients.map(|address| format!("--client={address}"));
            forwarder.argv.extend(clients);
        }
        if self.config.egress {
            forwarder.argv.push("--egress".to_owned());
            let family = self.config.ip_family;
            let inside = [family.pods(), family.services()].concat();
            let inside = inside.iter().map(|range| format!("--inside={range}"));
            forwarder.argv.extend(inside);
        }
        forwarder.after = vec![NETWORK.to_owned()];
        forwarder.notifies = true;
        forwarder.outside = true;
        Some(forwarder)
    }

    /// What containerd is told of the proxy; what is in the cluster needs none.
    fn proxy_environment(&self) -> BTreeMap<String, String> {
        if !self.config.pull {
            return BTreeMap::new();
        }
        let family = self.config.ip_family;
        let ranges = [family.pods(), family.services()].concat();
        let inside = format!(
            "198.18.0.0/15,2001:2::/48,.svc,.{CLUSTER_DOMAIN},{}",
            family::list(&ranges)
        );
        let proxy = format!("http://{}", self.proxy());
        [
            ("HTTP_PROXY", proxy.clone()),
            ("HTTPS_PROXY", proxy),
            ("NO_PROXY", inside),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    pub(super) fn worker(&self, node: &NodeState, pki: &ClusterPki) -> Result<NodeSpec, UpError> {
        let number = self
            .state
            .nodes
            .iter()
            .position(|other| other.name == node.name)
            .unwrap_or_default();
        let Some((client, serving)) = number
            .checked_sub(1)
            .and_then(|index| pki.kubelets.get(index))
        else {
            return Err(UpError::Panicked);
        };
        let kubelet =
            kubeconfig::single(&node.name, &self.api_server(), &pki.ca.certificate, client);
        let Credential { certificate, key } = serving;
        let credentials = self.credentials(
            node,
            &[
                ("ca.crt", &pki.ca.certificate),
                ("kubelet.kubeconfig", &kubeconfig::to_yaml(&kubelet)),
                ("kubelet.crt", certificate),
                ("kubelet.key", key),
            ],
        )?;
        let containerd = ServiceSpec {
            after: vec![IMAGES.to_owned()],
            env: self.proxy_environment(),
            ..seed::containerd_service()
        };
        let program = Path::new(BIN_DIR).join("keelway-kubelet");
        let kubelet = service(
            "kubelet",
            &program,
            &[
                ("--node-name", &node.name),
                ("--node-ip", &family::list(&node.addresses())),
                ("--kubeconfig", "/etc/keelway/kubelet.kubeconfig"),
                ("--runtime-endpoint", containerd::SOCKET),
                (
                    "--cgroup-root",
                    &format!("/keelway/{}/{}", self.state.name, node.name),
                ),
                ("--tls-cert", "/etc/keelway/kubelet.crt"),
                ("--tls-key", "/etc/keelway/kubelet.key"),
                ("--client-ca", "/etc/keelway/ca.crt"),
                (
                    "--cluster-dns",
                    &self.config.ip_family.cluster_dns().to_string(),
                ),
                ("--cluster-domain", CLUSTER_DOMAIN),
                ("--root-dir", "/var/lib/kubelet"),
            ],
        );
        let kubelet = ServiceSpec {
            after: [NETWORK, API, "containerd"].map(String::from).to_vec(),
            ..kubelet
        };
        let binaries = [(self.config.binaries.kubelet.clone(), program)];
        let files = vec![(PathBuf::from(containerd::CONFIG), self.containerd_config())];
        Ok(self.spec(
            node,
            credentials,
            binaries.into(),
            files,
            vec![containerd, kubelet],
        ))
    }

    /// Writes a node's credentials into a folder that only root can read, which the node sees as /etc/keelway.
    fn credentials(&self, node: &NodeState, files: &[(&str, &str)]) -> Result<Bind, UpError> {
        let folder = self.dir.node(&node.name).join("credentials");
        fs::create_dir_all(&folder).map_err(|source| UpError::Write {
            path: folder.clone(),
            source,
        })?;
        for (name, contents) in files {
            write_private(&folder.join(name), contents)?;
        }
        Ok(Bind {
            from: folder,
            to: "/etc/keelway".into(),
            read_only: true,
        })
    }

    fn spec(
        &self,
        node: &NodeState,
        credentials: Bind,
        binaries: Vec<(PathBuf, PathBuf)>,
        files: Vec<(PathBuf, String)>,
        services: Vec<ServiceSpec>,
    ) -> NodeSpec {
        let own = (
            self.config.binaries.keelway.clone(),
            Path::new(BIN_DIR).join("keelway"),
        );
        let mut binds = vec![credentials];
        let registries = self.config.registries.iter().map(|folder| Bind {
            from: folder.clone(),
            to: containerd::REGISTRIES.into(),
            read_only: true,
        });
        binds.extend(registries);
        binds.extend(binaries.into_iter().chain([own]).map(|(from, to)| Bind {
            from,
            to,
            read_only: true,
        }));
        let mut hosts = String::from("127.0.0.1 localhost\n::1 localhost\n");
        for other in &self.state.nodes {
            for address in other.addresses() {
                hosts.push_str(&format!("{address} {}\n", other.name));
            }
        }
        let mut all_files = BTreeMap::from([
            ("/etc/hosts".into(), hosts),
            ("/etc/hostname".into(), format!("{}\n", node.name)),
            ("/etc/resolv.conf".into(), self.resolv_conf()),
        ]);
        all_files.extend(files);
        let mut net_sysctls = vec![("ipv4/ip_forward", "1")];
        if self.config.ip_family.has_v6() {
            // Whatever new namespaces of this machine begin with.
            net_sysctls.extend([
                ("ipv6/conf/all/disable_ipv6", "0"),
                ("ipv6/conf/default/disable_ipv6", "0"),
                ("ipv6/conf/all/forwarding", "1"),
            ]);
        }
        NodeSpec {
            cluster: self.state.name.clone(),
            name: node.name.clone(),
            dir: self.dir.node(&node.name),
            binds,
            files: all_files,
            net_sysctls: net_sysctls
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            path: self.machine.path.clone(),
            services,
        }
    }
}

fn service(name: &str, program: &Path, flags: &[(&str, &str)]) -> ServiceSpec {
    let mut argv = vec![program.display().to_string()];
    argv.extend(
        flags
            .iter()
            .flat_map(|(flag, value)| [(*flag).to_owned(), (*value).to_owned()]),
    );
    ServiceSpec {
        name: name.into(),
        argv,
        env: BTreeMap::new(),
        after: Vec::new(),
        notifies: false,
        listens: false,
        outside: false,
    }
}

pub(super) fn write_private(path: &Path, contents: &str) -> Result<(), UpError> {
    let failed = |source| UpError::Write {
        path: path.to_owned(),
        source,
    };
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    file.write_all(contents.as_bytes()).map_err(failed)
}
