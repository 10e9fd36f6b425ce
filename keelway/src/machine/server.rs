//! `keelway server`: begins a cluster with this machine as its first control plane and node, and says how others join.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnetwork::IpNetwork;
use kube::core::DynamicObject;
use serde_json::json;

use super::discovery::{self, CaHash};
use super::join::{NodeFlags, make};
use super::member::{self, OwnMember};
use super::run;
use super::share::{self, write};
use super::spec::{ClusterFacts, ControlPlane, Plan, local_api};
use super::token::{self, Token};
use super::{
    API_PORT, EtcdState, MachineDir, MachineError, MachineState, Role, file, node_name,
    own_addresses,
};
use crate::api::ClusterApi;
use crate::checks::Machine;
use crate::config::{Binaries, ClusterName};
use crate::deploy;
use crate::etcd::{self, Member};
use crate::family;
use crate::kubeconfig;
use crate::node::launch::Nodes;
use crate::pki::{ClusterPki, Subjects};
use crate::progress::Progress;
use crate::state::StateDir;

/// Where machines that join read what all nodes agree on.
pub const FACTS: &str = "keelway-cluster";
const CLUSTER_DOMAIN: &str = "cluster.local";
/// How long the token is good that is printed at the beginning, as kubeadm's.
pub const TOKEN_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Where the cluster's DNS is in the Service range.
const DNS_HOST: u32 = 10;
pub const CONTROL_PLANE_LABEL: &str = "node-role.kubernetes.io/control-plane";

/// The flags of `keelway server`.
#[derive(Debug, Clone, clap::Args)]
pub struct ServerFlags {
    /// Name of the cluster; the kubectl context is keelway-NAME
    #[arg(long, default_value = "default")]
    name: ClusterName,
    #[command(flatten)]
    node: NodeFlags,
    /// Port of the API server
    #[arg(long, default_value_t = API_PORT)]
    port: u16,
    /// Another address or name that clients reach the API server by, for its certificate
    #[arg(long = "tls-san", value_name = "NAME")]
    names: Vec<String>,
    /// Range of pod addresses; two for a cluster of both families [default: 10.244.0.0/16, with IPv6 fd00:10:244::/56]
    #[arg(long, value_name = "CIDR[,CIDR]", value_delimiter = ',')]
    cluster_cidr: Vec<IpNetwork>,
    /// Range of Service addresses [default: 10.96.0.0/16, with IPv6 fd00:10:96::/112]
    #[arg(long, value_name = "CIDR[,CIDR]", value_delimiter = ',')]
    service_cidr: Vec<IpNetwork>,
    /// Let pods of all kinds run on this machine
    #[arg(long)]
    schedulable: bool,
    #[command(flatten)]
    store: StoreFlags,
    /// What is kept sealed, and the keys to that: an EncryptionConfiguration, for all control planes
    #[arg(long, value_name = "FILE")]
    encryption_provider_config: Option<PathBuf>,
    /// Which requests go into the audit log: a Policy of audit.k8s.io/v1, for all control planes
    #[arg(long, value_name = "FILE")]
    audit_policy_file: Option<PathBuf>,
    /// Flag of keelway-agent, for all nodes
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    agent_arg: Vec<String>,
}

/// Where a control plane keeps the cluster's state.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct StoreFlags {
    /// In place of the embedded store: `etcd` for one with a member on each control plane (Debian: etcd-server), or etcd:URL[,URL...] for
    /// one that is there. More than one control plane needs it
    #[arg(long, value_name = "etcd[:URL[,URL...]]")]
    store: Option<String>,
    /// The authority of etcd's members
    #[arg(long, value_name = "FILE")]
    etcd_cafile: Option<PathBuf>,
    /// Certificate that etcd is shown
    #[arg(long, value_name = "FILE", requires = "etcd_keyfile")]
    etcd_certfile: Option<PathBuf>,
    /// Key of that certificate
    #[arg(long, value_name = "FILE", requires = "etcd_certfile")]
    etcd_keyfile: Option<PathBuf>,
}

/// The store that brings its own members.
const OWN_ETCD: &str = "etcd";

impl StoreFlags {
    pub fn is_shared(&self) -> bool {
        self.store.is_some()
    }

    /// Whether control planes bring the members of the etcd.
    ///
    /// # Errors
    /// When files are named for that, which are made.
    pub fn brings_members(&self) -> Result<bool, MachineError> {
        let own = self.store.as_deref() == Some(OWN_ETCD);
        if own && (self.etcd_cafile.is_some() || self.etcd_certfile.is_some()) {
            let reason = "--store etcd makes its certificates; --etcd-cafile, --etcd-certfile and --etcd-keyfile are for etcd:URL";
            return Err(MachineError::Refused(reason.to_owned()));
        }
        Ok(own)
    }

    /// The same flags for a program of this machine, which sees the files where they are.
    pub fn named(&self) -> Vec<String> {
        let file = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let flags = [
            ("--store", self.store.clone()),
            ("--etcd-cafile", file(&self.etcd_cafile)),
            ("--etcd-certfile", file(&self.etcd_certfile)),
            ("--etcd-keyfile", file(&self.etcd_keyfile)),
        ];
        let given = flags.into_iter();
        given
            .filter_map(|(flag, value)| Some([flag.to_owned(), value?]))
            .flatten()
            .collect()
    }

    /// The flags of the control plane, and the files that it needs, with the names that they get beside its own credentials.
    pub fn flags(&self) -> (Vec<String>, Vec<(&Path, &'static str)>) {
        let Some(store) = &self.store else {
            let embedded = ["--data-dir", "/var/lib/keelway/controlplane"];
            return (embedded.map(str::to_owned).into(), Vec::new());
        };
        let mut flags = vec!["--store".to_owned(), store.clone()];
        let mut files = Vec::new();
        for (flag, path, name) in [
            ("--etcd-cafile", &self.etcd_cafile, etcd::CA),
            ("--etcd-certfile", &self.etcd_certfile, etcd::CLIENT[0]),
            ("--etcd-keyfile", &self.etcd_keyfile, etcd::CLIENT[1]),
        ] {
            if let Some(path) = path {
                flags.extend([flag.to_owned(), format!("/etc/keelway/{name}")]);
                files.push((path.as_path(), name));
            }
        }
        (flags, files)
    }
}

/// Begins the cluster.
///
/// # Errors
/// Names what went wrong; this machine is then as it was.
pub async fn run(
    flags: &ServerFlags,
    machine: &Machine,
    state: &StateDir,
    program: &Path,
) -> Result<(), MachineError> {
    let node = node_name(flags.node.node_name.as_deref())?;
    let own = own_addresses(&flags.node.node_ip)?;
    let facts = facts(flags, &own)?;
    if flags.store.brings_members()? {
        member::check(machine)?;
    }
    let binaries = flags.node.binaries(program)?;
    let prepared = Prepared {
        flags,
        machine,
        program,
        node,
        own,
        facts,
        binaries,
        progress: Progress::default(),
    };
    let dir = MachineDir::of(state);
    let nodes = make(&dir, machine, state, prepared.begin(&dir)).await?;
    flags.node.hand_over(nodes, program).await
}

struct Prepared<'a> {
    flags: &'a ServerFlags,
    machine: &'a Machine,
    program: &'a Path,
    node: String,
    own: Vec<IpAddr>,
    facts: ClusterFacts,
    binaries: Binaries,
    progress: Progress,
}

impl Prepared<'_> {
    async fn begin(&self, dir: &MachineDir) -> Result<Nodes, MachineError> {
        let role = Role::ControlPlane;
        let mut known = MachineState::new(&self.facts.name, &self.node, role, &self.own);
        dir.write(&known)?;
        let step = self.progress.step("credentials and folders");
        let pki = self.credentials(dir)?;
        let token = Token::new()?;
        let server = SocketAddr::new(self.own[0], self.flags.port);
        let taint = format!("{CONTROL_PLANE_LABEL}:NoSchedule");
        let control_plane = self.control_plane(dir, &mut known)?;
        let plan = Plan {
            dir,
            machine: self.machine,
            binaries: &self.binaries,
            facts: &self.facts,
            node: &self.node,
            addresses: &self.own,
            servers: vec![server],
            ca: &pki.ca.certificate,
            token: &token,
            labels: self.flags.node.node_labels.clone(),
            taints: (!self.flags.schedulable)
                .then_some(taint)
                .into_iter()
                .collect(),
            registries: self.flags.node.registries.clone(),
            control_plane: Some(control_plane),
        };
        let admin = kubeconfig::single(
            &kubeconfig::context_name(&self.facts.name),
            &format!("https://{server}"),
            &pki.ca.certificate,
            &pki.admin,
        );
        write(&dir.kubeconfig(), &kubeconfig::to_yaml(&admin))?;
        step.done();
        let nodes = plan
            .start(&mut known, self.program, &self.flags.node, &self.progress)
            .await?;
        nodes.tell(member::VOTE).await?;
        let converge = async {
            let api = ClusterApi::new(&admin).await?;
            let step = self.progress.step("API server");
            api.ready().await;
            let what = ("the first machines", &[token::GROUP][..]);
            token::create(api.client(), &token, Some(TOKEN_LIFE), what).await?;
            self.publish(&api, &pki.ca.certificate, server).await?;
            nodes.tell(run::API).await?;
            step.done();
            let step = self.progress.step("node Ready");
            api.nodes_ready(std::slice::from_ref(&self.node)).await?;
            api.label_node(&self.node, CONTROL_PLANE_LABEL).await?;
            step.done();
            let step = self.progress.step("agent ready");
            api.daemon_set_ready("keelway-agent", 1).await;
            step.done();
            Ok::<_, MachineError>(())
        };
        nodes.while_well(converge).await?;
        known.complete = true;
        dir.write(&known)?;
        self.say(dir, &pki.ca.certificate, &token, server)?;
        Ok(nodes)
    }

    /// What this machine runs as the first control plane; an etcd is begun if it is to be of ours.
    fn control_plane(
        &self,
        dir: &MachineDir,
        known: &mut MachineState,
    ) -> Result<ControlPlane, MachineError> {
        let port = self.flags.port;
        if !self.flags.store.brings_members()? {
            let (store, _) = self.flags.store.flags();
            let etcd = None;
            return Ok(ControlPlane { port, store, etcd });
        }
        let own = Member {
            name: self.node.clone(),
            address: self.own[0],
        };
        let OwnMember { service, store } = member::found(dir, &self.facts.name, &own)?;
        known.etcd = Some(EtcdState {
            others: Vec::new(),
            votes: true,
        });
        dir.write(known)?;
        let etcd = Some(service);
        Ok(ControlPlane { port, store, etcd })
    }

    /// Makes the cluster's authority and what it signs for this control plane.
    fn credentials(&self, dir: &MachineDir) -> Result<ClusterPki, MachineError> {
        let first = |range: &IpNetwork| range.iter().nth(1);
        let pki = ClusterPki::new(&Subjects {
            cluster: &self.facts.name,
            control_plane: self.own.clone(),
            names: self.flags.names.clone(),
            services: self.facts.service_cidrs.iter().filter_map(first).collect(),
            workers: Vec::new(),
            renewed: true,
        })?;
        let folder = dir.credentials();
        std::fs::create_dir_all(&folder).map_err(file("make", &folder))?;
        for (name, text) in pki.control_plane_files(self.flags.port) {
            write(&folder.join(name), &text)?;
        }
        let guards = [
            (&self.flags.encryption_provider_config, share::ENCRYPTION),
            (&self.flags.audit_policy_file, share::AUDIT_POLICY),
        ];
        let guards = guards
            .into_iter()
            .filter_map(|(from, name)| Some((from.as_deref()?, name)));
        for (from, name) in self.flags.store.flags().1.into_iter().chain(guards) {
            let text = std::fs::read_to_string(from).map_err(file("read", from))?;
            write(&folder.join(name), &text)?;
        }
        Ok(pki)
    }

    /// Creates what nodes run, what lets them join, and what they read before and after they trust the cluster.
    async fn publish(
        &self,
        api: &ClusterApi,
        ca: &str,
        server: SocketAddr,
    ) -> Result<(), MachineError> {
        for object in deploy::objects(&self.settings())? {
            api.create(&object).await?;
        }
        for object in deploy::join_objects()? {
            api.create(&object).await?;
        }
        let info = kubeconfig::without_credentials(&format!("https://{server}"), ca);
        let maps = [
            (
                discovery::NAMESPACE,
                discovery::NAME,
                "kubeconfig",
                kubeconfig::to_yaml(&info),
            ),
            (
                "kube-system",
                FACTS,
                "cluster",
                serde_json::to_string_pretty(&self.facts)
                    .map_err(|error| MachineError::Refused(error.to_string()))?,
            ),
        ];
        for (namespace, name, key, text) in maps {
            let map = json!({"apiVersion": "v1", "kind": "ConfigMap",
                "metadata": {"namespace": namespace, "name": name}, "data": {key: text}});
            let map: DynamicObject = serde_json::from_value(map)
                .map_err(|error| MachineError::Refused(error.to_string()))?;
            api.create(&map).await?;
        }
        Ok(())
    }

    fn settings(&self) -> deploy::Settings {
        let ranges = self.facts.service_cidrs.iter();
        let mut agent_args: Vec<String> = ranges
            .map(|range| format!("--service-cidr={range}"))
            .collect();
        agent_args.extend(self.flags.agent_arg.iter().cloned());
        let dns_args = name_servers()
            .map(|server| format!("--upstream={server}"))
            .collect();
        deploy::Settings {
            api_server: format!("https://{}", local_api(self.own[0])),
            cgroup: super::spec::CGROUP.to_owned(),
            cluster_dns: self.facts.cluster_dns.to_string(),
            cluster_domain: self.facts.cluster_domain.clone(),
            agent_args,
            dns_args,
            builds: Default::default(),
        }
    }

    fn say(
        &self,
        dir: &MachineDir,
        ca: &str,
        token: &Token,
        server: SocketAddr,
    ) -> Result<(), MachineError> {
        println!(
            "Cluster {} runs on this machine, node {}, after {:.2} s. Its administrator's kubeconfig is {}:",
            self.facts.name,
            self.node,
            self.progress.elapsed().as_secs_f64(),
            dir.kubeconfig().display()
        );
        println!("  export KUBECONFIG={}", dir.kubeconfig().display());
        println!("To add a machine, run there within 24 hours:");
        println!("  {}", join_command(server, token, ca)?);
        Ok(())
    }
}

/// What is typed on a machine that is to join.
///
/// # Errors
/// When the authority's certificate cannot be read.
pub fn join_command(server: SocketAddr, token: &Token, ca: &str) -> Result<String, MachineError> {
    let hash = CaHash::of_pem(ca)?;
    Ok(format!(
        "keelway join {server} --token {} --ca-hash {hash}",
        token.shown()
    ))
}

/// The machine's name servers, as far as pods can reach them.
fn name_servers() -> impl Iterator<Item = SocketAddr> {
    let text = Plan::resolv_conf().and_then(|path| std::fs::read_to_string(path).ok());
    let servers: Vec<SocketAddr> = text
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok())
        .filter(|address: &IpAddr| !address.is_loopback())
        .map(|address| SocketAddr::new(address, 53))
        .collect();
    servers.into_iter()
}

/// What all nodes of the cluster agree on.
fn facts(flags: &ServerFlags, own: &[IpAddr]) -> Result<ClusterFacts, MachineError> {
    let family = family::IpFamily::of(own);
    let given = |flag, given: &[IpNetwork], default: Vec<IpNetwork>| {
        if given.is_empty() {
            return Ok(default);
        }
        let refuse = |range: IpNetwork, reason| {
            Err(MachineError::Range {
                flag,
                range,
                reason,
            })
        };
        for (at, range) in given.iter().enumerate() {
            if range.ip() != range.network() {
                return refuse(*range, "it has bits set behind its prefix");
            }
            if default.get(at).map(IpNetwork::is_ipv4) != Some(range.is_ipv4()) {
                return refuse(
                    *range,
                    "there is to be one range for each family of --node-ip, in its order",
                );
            }
        }
        if given.len() < default.len() {
            return refuse(
                given[0],
                "a node of two addresses needs a range of each family",
            );
        }
        Ok(given.to_vec())
    };
    let service_cidrs = given("--service-cidr", &flags.service_cidr, family.services())?;
    let cluster_cidrs = given("--cluster-cidr", &flags.cluster_cidr, family.pods())?;
    let first = service_cidrs[0];
    let cluster_dns = first.iter().nth(DNS_HOST as usize);
    Ok(ClusterFacts {
        name: flags.name.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cluster_dns: cluster_dns.ok_or(MachineError::Range {
            flag: "--service-cidr",
            range: first,
            reason: "it is too small",
        })?,
        service_cidrs,
        cluster_cidrs,
        cluster_domain: CLUSTER_DOMAIN.to_owned(),
        store: share::kind_of_store(&flags.store.flags().0).to_owned(),
    })
}
