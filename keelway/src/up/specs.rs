//! What the nodes of a cluster are made of: their files, credentials and services.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{
    API, CLUSTER_DOMAIN, CONTROL_PLANE, FORWARDER, IMAGES, NETWORK, Plan, UpError, is_control_plane,
};
use crate::containerd;
use crate::etcd::{self, Arrival, Member};
use crate::family;
use crate::forward;
use crate::kubeconfig;
use crate::machine::balancer;
use crate::machine::{API_PORT, local_api};
use crate::node::{BIN_DIR, Bind, NodeSpec, ServiceSpec};
use crate::pki::{ClusterPki, Credential, EtcdPki};
use crate::seed;
use crate::state::NodeState;

impl Plan<'_> {
    pub(super) fn containerd_config(&self) -> String {
        let pause = format!("localhost/keelway/pause:{}", env!("CARGO_PKG_VERSION"));
        containerd::config(&pause, self.snapshotter)
    }

    /// Where parts of workers find an API server: the one there is, or by a service of each worker one of those that live.
    pub(super) fn api_server(&self) -> String {
        let addresses = self.subnet.control_plane(self.config.ip_family);
        if self.config.control_planes > 1 {
            return format!("https://{}", local_api(addresses[0]));
        }
        format!("https://{}", SocketAddr::new(addresses[0], API_PORT))
    }

    /// The node whose only part is the bridge.
    pub(super) fn switch(&self, node: &NodeState) -> Result<NodeSpec, UpError> {
        let credentials = self.credentials(node, &[])?;
        Ok(self.spec(node, credentials, Vec::new(), Vec::new(), Vec::new()))
    }

    /// The control planes' nodes; with etcd, each has a member of it.
    fn control_planes(&self) -> Vec<&NodeState> {
        let nodes = self.state.nodes.iter();
        nodes.filter(|node| is_control_plane(node)).collect()
    }

    /// A member of the etcd that keeps the state.
    fn etcd(&self, node: &NodeState) -> ServiceSpec {
        let member = |node: &NodeState| Member {
            name: node.name.clone(),
            address: node.address,
        };
        let all: Vec<String> = self
            .control_planes()
            .into_iter()
            .map(|node| member(node).as_initial())
            .collect();
        let mut etcd = member(node).service(&all, Arrival::Founder);
        etcd.after = vec![NETWORK.to_owned()];
        etcd
    }

    pub(super) fn control_plane(
        &self,
        node: &NodeState,
        pki: &ClusterPki,
        pki_of_etcd: Option<&EtcdPki>,
    ) -> Result<NodeSpec, UpError> {
        let files = pki.control_plane_files(API_PORT);
        let mut files: Vec<(&str, &str)> = files
            .iter()
            .map(|(name, text)| (*name, text.as_str()))
            .collect();
        let members = self.control_planes();
        let number = members.iter().position(|member| member.name == node.name);
        let member = pki_of_etcd.and_then(|etcd| Some((etcd, etcd.members.get(number?)?)));
        if let Some((authority, own)) = member {
            files.extend([
                (etcd::CA, authority.ca.certificate.as_str()),
                (etcd::CLIENT[0], &authority.client.certificate),
                (etcd::CLIENT[1], &authority.client.key),
                (etcd::MEMBER[0], &own.certificate),
                (etcd::MEMBER[1], &own.key),
            ]);
        }
        let credentials = self.credentials(node, &files)?;
        let program = Path::new(BIN_DIR).join("keelway-controlplane");
        let ip_family = self.config.ip_family;
        // A socket of [::] takes IPv4 connections too, but only where there is IPv6.
        let everywhere = if ip_family.has_v6() {
            "[::]"
        } else {
            "0.0.0.0"
        };
        let mut server = service(
            "controlplane",
            &program,
            &[
                ("--pki-dir", "/etc/keelway"),
                ("--bind", &format!("{everywhere}:{API_PORT}")),
                ("--advertise-address", &node.address.to_string()),
                ("--service-cidr", &family::list(&ip_family.services())),
                ("--cluster-cidr", &family::list(&ip_family.pods())),
            ],
        );
        // It binds to every address, so it need not wait for the network.
        server.listens = true;
        if pki_of_etcd.is_some() {
            // Its own member first: without that one, the others do.
            let urls = members.iter().map(|node| etcd::client_url(node.address));
            let mut urls: Vec<String> = urls.collect();
            urls.rotate_left(number.unwrap_or_default());
            server.argv.extend(etcd::own_store_flags(&urls));
            server.after = vec![etcd::SERVICE.to_owned()];
        } else {
            let folder = ["--data-dir", "/var/lib/keelway/controlplane"];
            server.argv.extend(folder.map(str::to_owned));
        }
        let binaries = [(self.config.binaries.controlplane.clone(), program)];
        let mut services = vec![server];
        if pki_of_etcd.is_some() {
            services.insert(0, self.etcd(node));
        }
        if node.name == CONTROL_PLANE {
            services.extend(self.forwarder());
        }
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
    fn name_server(&self) -> IpAddr {
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
        let mut workers = self.state.nodes.iter().filter(|node| !node.control_plane);
        let number = workers.position(|other| other.name == node.name);
        let Some((client, serving)) = number.and_then(|index| pki.kubelets.get(index)) else {
            return Err(UpError::Panicked);
        };
        let kubelet =
            kubeconfig::single(&node.name, &self.api_server(), &pki.ca.certificate, client);
        let Credential { certificate, key } = serving;
        let pair = format!("{}{}", client.certificate, client.key);
        let credentials = self.credentials(
            node,
            &[
                ("ca.crt", &pki.ca.certificate),
                ("kubelet.kubeconfig", &kubeconfig::to_yaml(&kubelet)),
                ("kubelet.crt", certificate),
                ("kubelet.key", key),
                ("kubelet-client.pem", &pair),
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
            self.balancer()
                .into_iter()
                .chain([containerd, kubelet])
                .collect(),
        ))
    }

    /// Carries what a worker asks API servers to one that lives, where there are several.
    fn balancer(&self) -> Option<ServiceSpec> {
        if self.config.control_planes < 2 {
            return None;
        }
        let servers: Vec<SocketAddr> = self
            .control_planes()
            .iter()
            .map(|node| SocketAddr::new(node.address, API_PORT))
            .collect();
        let local = local_api(servers[0].ip());
        let certificate = "/etc/keelway/kubelet-client.pem";
        Some(balancer::service(local, &servers, certificate))
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
            machine: false,
            services,
        }
    }
}

pub(crate) fn service(name: &str, program: &Path, flags: &[(&str, &str)]) -> ServiceSpec {
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

pub(crate) fn write_private(path: &Path, contents: &str) -> Result<(), UpError> {
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
