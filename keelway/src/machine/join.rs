//! `keelway join`: adds this machine to a cluster, as a node.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::{Api, Client};

use super::discovery::{self, CaHash, Known};
use super::member::{self, OwnMember};
use super::run;
use super::server::{CONTROL_PLANE_LABEL, FACTS};
use super::share::{self, SealingKey, Shared};
use super::spec::{CLIENT_CERTIFICATE, ClusterFacts, ControlPlane, Plan, with_token};
use super::systemd;
use super::token::Token;
use super::{
    API_PORT, EtcdState, MachineDir, MachineError, MachineState, Role, TIMEOUT, file, leave,
    node_name, own_addresses,
};
use crate::api::{ClusterApi, is_ready};
use crate::checks::Machine;
use crate::config::{self, Binaries};
use crate::containerd;
use crate::etcd::Member;
use crate::kubeconfig;
use crate::node::launch::Nodes;
use crate::pki::{Authority, ClusterPki, Credential, Subjects};
use crate::progress::Progress;
use crate::seed::{self, Seed};
use crate::state::StateDir;

/// What is said of this machine, whatever it becomes.
#[derive(Debug, Clone, clap::Args)]
pub struct NodeFlags {
    /// The node's name [default: this machine's]
    #[arg(long)]
    pub node_name: Option<String>,
    /// This machine's address in the cluster; two for a cluster of both families [default: that of its default route]
    #[arg(long, value_name = "IP[,IP]", value_delimiter = ',')]
    pub node_ip: Vec<IpAddr>,
    /// Label of the node
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub node_labels: Vec<String>,
    /// Folder with a hosts.toml per registry, as containerd has it
    #[arg(long, value_name = "DIR")]
    pub registries: Option<PathBuf>,
    /// Folder with the images' archives
    #[arg(long, value_name = "DIR", env = "KEELWAY_IMAGES_DIR")]
    pub image_dir: Option<PathBuf>,
    /// Folder with Keelway's programs [default: that of this program]
    #[arg(long, value_name = "DIR", env = "KEELWAY_BIN_DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Stay with the node, and end it when this command is ended
    #[arg(long)]
    pub foreground: bool,
    /// Make a unit for systemd that starts the node with the machine, and hand it over
    #[arg(long, conflicts_with = "foreground")]
    pub systemd: bool,
}

impl NodeFlags {
    pub fn binaries(&self, program: &Path) -> Result<Binaries, MachineError> {
        if self.systemd {
            systemd::check()?;
        }
        Ok(config::binaries(self.bin_dir.as_deref(), program)?)
    }

    /// Ends the command's part: the node goes on by itself, or with it, or in systemd's hands.
    pub async fn hand_over(&self, nodes: Nodes, program: &Path) -> Result<(), MachineError> {
        if self.systemd {
            // Its unit starts the node again, as its own.
            nodes.stop().await?;
            return Ok(systemd::install(program).await?);
        }
        run::settle(nodes, self.foreground).await
    }
}

/// The flags of `keelway join`.
#[derive(Debug, Clone, clap::Args)]
pub struct JoinFlags {
    /// An API server of the cluster: IP[:PORT] or NAME[:PORT]
    address: String,
    /// A bootstrap token, as `keelway server` and `keelway token create` print it; `-` reads it from standard input
    #[arg(long, env = "KEELWAY_TOKEN", hide_env_values = true)]
    token: String,
    /// Hash of the cluster's authority, as printed with the token
    #[arg(long, value_name = "sha256:HASH")]
    ca_hash: String,
    /// Become a control plane too, by a token for that
    #[arg(long, requires = "certificate_key")]
    control_plane: bool,
    /// File with the key of the cluster's keys, as `keelway token create --control-plane` prints it; `-` reads it from standard input,
    /// after a token that comes from there
    #[arg(long, value_name = "FILE", requires = "control_plane")]
    certificate_key: Option<String>,
    /// Another address or name that clients reach this API server by, for its certificate
    #[arg(long = "tls-san", value_name = "NAME", requires = "control_plane")]
    names: Vec<String>,
    /// Port of this API server
    #[arg(long, default_value_t = API_PORT, requires = "control_plane")]
    port: u16,
    #[command(flatten)]
    node: NodeFlags,
}

/// Makes a node of this machine by `work`, or leaves it as it was. A node that is there already stays.
pub(super) async fn make(
    dir: &MachineDir,
    machine: &Machine,
    state: &StateDir,
    work: impl Future<Output = Result<Nodes, MachineError>>,
) -> Result<Nodes, MachineError> {
    let lock = dir.0.create()?;
    if let Some(known) = dir.known()? {
        if known.complete {
            return Err(MachineError::Member {
                node: known.node,
                cluster: known.cluster,
            });
        }
        eprintln!("removing what an attempt that was cut off left");
        undo(dir, machine).await?;
        drop(lock);
        let again = dir.0.create()?;
        return attempt(dir, machine, state, work, again).await;
    }
    attempt(dir, machine, state, work, lock).await
}

async fn attempt(
    dir: &MachineDir,
    machine: &Machine,
    state: &StateDir,
    work: impl Future<Output = Result<Nodes, MachineError>>,
    lock: crate::state::ClusterLock,
) -> Result<Nodes, MachineError> {
    let outcome = tokio::select! {
        outcome = work => outcome,
        _ = tokio::signal::ctrl_c() => Err(MachineError::Interrupted),
    };
    if outcome.is_err() {
        explain(dir);
        if dir.read().is_some_and(|known| known.complete) {
            eprintln!(
                "The others count on this machine by now: `keelway start` starts it, `keelway leave` takes it out."
            );
        } else {
            undo(dir, machine).await?;
            state.remove_if_empty();
        }
    }
    drop(lock);
    outcome
}

/// Takes back what an attempt has made, on this machine and in the cluster's etcd.
async fn undo(dir: &MachineDir, machine: &Machine) -> Result<(), MachineError> {
    if let Some(known) = dir.read()
        && let Err(error) = member::withdraw(dir, &known).await
    {
        eprintln!("{error}");
    }
    leave::remove(dir, machine)
}

/// The end of what the node's services have written, while it is there.
fn explain(dir: &MachineDir) {
    for name in ["etcd", "controlplane", "kubelet", "containerd", "balancer"] {
        let log = dir.node().join(format!("var/log/keelway/{name}.log"));
        let text = std::fs::read(&log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(8)) {
            eprintln!("{name}: {line}");
        }
    }
}

impl Plan<'_> {
    /// Writes all that the node is made of, gives it its images, and starts it.
    pub(super) async fn start(
        &self,
        known: &mut MachineState,
        program: &Path,
        flags: &NodeFlags,
        progress: &Progress,
    ) -> Result<Nodes, MachineError> {
        self.write_credentials()?;
        let spec = self.spec();
        let (path, folder) = (self.dir.spec(), self.dir.node());
        std::fs::create_dir_all(&folder).map_err(file("make", &folder))?;
        let text =
            serde_json::to_vec_pretty(&spec).map_err(|error| file("write", &path)(error.into()))?;
        std::fs::write(&path, text).map_err(file("write", &path))?;
        self.plant_images(program, flags, progress).await?;
        let step = progress.step("node started");
        let nodes = run::launch(self.dir, (&spec, &path), known, program).await?;
        step.done();
        Ok(nodes)
    }

    async fn plant_images(
        &self,
        program: &Path,
        flags: &NodeFlags,
        progress: &Progress,
    ) -> Result<(), MachineError> {
        let archives = config::images(flags.image_dir.as_deref(), program)?;
        let snapshotter = self.dir.snapshotter();
        let pause = format!("localhost/keelway/pause:{}", env!("CARGO_PKG_VERSION"));
        let containerd = containerd::config(&pause, snapshotter);
        let source = seed::Source {
            archives: &archives,
            keelway: &self.binaries.keelway,
            machine: self.machine,
            cluster: &self.dir.0,
            snapshotter,
            containerd_config: &containerd,
        };
        let seed = match Seed::find(&source) {
            Some(seed) => seed,
            None => {
                let step = progress.step("images imported, once for this build");
                let seed = Seed::make(&source).await?;
                step.done();
                seed
            }
        };
        seed.plant(&self.dir.node().join("var/lib/containerd"))?;
        Ok(())
    }
}

/// Adds this machine to a cluster.
///
/// # Errors
/// Names what went wrong; this machine is then as it was.
pub async fn run(
    flags: &JoinFlags,
    machine: &Machine,
    state: &StateDir,
    program: &Path,
) -> Result<(), MachineError> {
    let token: Token = read_token(&flags.token)?.parse()?;
    let key = flags.certificate_key.as_deref();
    let key = key.map(SealingKey::read).transpose()?;
    let hash: CaHash = flags.ca_hash.parse()?;
    let node = node_name(flags.node.node_name.as_deref())?;
    let own = own_addresses(&flags.node.node_ip)?;
    let binaries = flags.node.binaries(program)?;
    let address = discovery::address(&flags.address).await?;
    let dir = MachineDir::of(state);
    let work = async {
        let progress = Progress::default();
        let step = progress.step(format!("cluster known, by {address}"));
        let cluster = discovery::discover(address, &token, &hash).await?;
        let facts = ask(&cluster, &token, &node, &own).await?;
        let role = match key {
            Some(_) => Role::ControlPlane,
            None => Role::Worker,
        };
        let mut known = MachineState::new(&facts.name, &node, role, &own);
        dir.write(&known)?;
        let control_plane = match &key {
            Some(_) if facts.store == "embedded" => {
                return Err(MachineError::Refused(share::NOT_SHARED.to_owned()));
            }
            Some(key) => {
                let config = with_token(&format!("https://{address}"), &cluster.ca, &token);
                let client = ClusterApi::new(&config).await?.client();
                let shared = Shared::fetch(client, key).await?;
                let mut made = as_control_plane(&dir, flags, (&facts, &own), &shared)?;
                if shared.brings_members() {
                    member::check(machine)?;
                    let own = Member {
                        name: node.clone(),
                        address: own[0],
                    };
                    known.etcd = Some(EtcdState {
                        others: share::urls(&shared.store),
                        votes: false,
                    });
                    dir.write(&known)?;
                    let OwnMember { service, store } = member::arrive(&dir, &shared, &own).await?;
                    (made.etcd, made.store) = (Some(service), store);
                }
                Some(made)
            }
            None => None,
        };
        step.done();
        let mut servers = vec![address];
        if control_plane.is_some() {
            servers.push(SocketAddr::new(own[0], flags.port));
        }
        let is_control_plane = control_plane.is_some();
        let role = is_control_plane.then_some(CONTROL_PLANE_LABEL);
        let plan = Plan {
            dir: &dir,
            machine,
            binaries: &binaries,
            facts: &facts,
            node: &node,
            addresses: &own,
            servers,
            ca: &cluster.ca,
            token: &token,
            labels: flags.node.node_labels.clone(),
            taints: role
                .map(|role| format!("{role}:NoSchedule"))
                .into_iter()
                .collect(),
            registries: flags.node.registries.clone(),
            control_plane,
        };
        add(&plan, flags, &mut known, (program, &progress)).await
    };
    let nodes = make(&dir, machine, state, work).await?;
    flags.node.hand_over(nodes, program).await
}

/// Writes what a control plane needs beside a worker's credentials: what is shared, and what the authority signs for this machine.
fn as_control_plane(
    dir: &MachineDir,
    flags: &JoinFlags,
    (facts, own): (&ClusterFacts, &[IpAddr]),
    shared: &Shared,
) -> Result<ControlPlane, MachineError> {
    let subjects = Subjects {
        cluster: &facts.name,
        control_plane: own.to_vec(),
        names: flags.names.clone(),
        services: facts
            .service_cidrs
            .iter()
            .filter_map(|range| range.iter().nth(1))
            .collect(),
        workers: Vec::new(),
        renewed: true,
    };
    let credential = Credential {
        certificate: shared.file("ca.crt").to_owned(),
        key: shared.file("ca.key").to_owned(),
    };
    let authority = Authority::load(credential, subjects.years())?;
    let accounts = (
        shared.file("sa.key").to_owned(),
        shared.file("sa.pub").to_owned(),
    );
    let pki = ClusterPki::of(authority, accounts, &subjects)?;
    let folder = dir.credentials();
    std::fs::create_dir_all(&folder).map_err(file("make", &folder))?;
    for (name, text) in pki.control_plane_files(flags.port) {
        share::write(&folder.join(name), &text)?;
    }
    for (name, text) in shared.beside() {
        share::write(&folder.join(name), text)?;
    }
    let admin = kubeconfig::single(
        &kubeconfig::context_name(&facts.name),
        &format!("https://{}", SocketAddr::new(own[0], flags.port)),
        &pki.ca.certificate,
        &pki.admin,
    );
    share::write(&dir.kubeconfig(), &kubeconfig::to_yaml(&admin))?;
    Ok(ControlPlane {
        port: flags.port,
        store: shared.store.clone(),
        etcd: None,
    })
}

fn read_token(given: &str) -> Result<String, MachineError> {
    if given != "-" {
        return Ok(given.to_owned());
    }
    let mut line = String::new();
    let read = std::io::stdin().read_line(&mut line);
    read.map_err(file("read", Path::new("/dev/stdin")))?;
    Ok(line.trim().to_owned())
}

/// Starts the node, and waits until the cluster has it.
async fn add(
    plan: &Plan<'_>,
    flags: &JoinFlags,
    known: &mut MachineState,
    (program, progress): (&Path, &Progress),
) -> Result<Nodes, MachineError> {
    let nodes = plan.start(known, program, &flags.node, progress).await?;
    nodes.tell(run::API).await?;
    let joined = async {
        let step = progress.step("certificate signed by the cluster");
        let api = own_api(plan.dir, plan.local().to_string()).await?;
        step.done();
        let mut step = progress.step("node Ready");
        api.node_ready(plan.node).await;
        if known.etcd.is_some() {
            step.done();
            step = progress.step("member of etcd has caught up");
            // From now on the others may count on it: it is not taken back, but goes on or leaves.
            known.complete = true;
            known.unannounced = true;
            member::promote(plan.dir, known).await?;
            nodes.tell(member::VOTE).await?;
        }
        if plan.control_plane.is_some() {
            run::announce(plan.dir, known).await?;
        }
        step.done();
        Ok::<_, MachineError>(())
    };
    let timeout = async {
        tokio::time::sleep(TIMEOUT).await;
        Err(MachineError::Timeout(
            TIMEOUT,
            plan.dir.node().join("var/log/keelway"),
        ))
    };
    tokio::select! {
        joined = nodes.while_well(joined) => joined?,
        late = timeout => late?,
    }
    known.complete = true;
    plan.dir.write(known)?;
    println!(
        "This machine is node {} of cluster {} after {:.2} s.",
        plan.node,
        plan.facts.name,
        progress.elapsed().as_secs_f64()
    );
    Ok(nodes)
}

/// A client that is this node, once it has a certificate.
pub(super) async fn own_api(dir: &MachineDir, server: String) -> Result<ClusterApi, MachineError> {
    let pem = dir.node().join("var").join(CLIENT_CERTIFICATE);
    // It is renamed into place, in a folder that does not exist at first: looking at it is all there is.
    while !pem.exists() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let ca = dir.authorities();
    let config = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "node",
        "clusters": [{"name": "node", "cluster": {"server": format!("https://{server}"), "certificate-authority": ca}}],
        "contexts": [{"name": "node", "context": {"cluster": "node", "user": "node"}}],
        "users": [{"name": "node", "user": {"client-certificate": pem, "client-key": pem}}],
    });
    Ok(ClusterApi::new(&config).await?)
}

/// What all nodes agree on, and whether this machine can be one of them.
async fn ask(
    cluster: &Known,
    token: &Token,
    node: &str,
    own: &[IpAddr],
) -> Result<ClusterFacts, MachineError> {
    let server = format!("https://{}", cluster.address);
    let config = with_token(&server, &cluster.ca, token);
    let client: Client = ClusterApi::new(&config).await?.client();
    let refused =
        |error: kube::Error| MachineError::Refused(format!("asking the cluster: {error}"));
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "kube-system");
    let map = maps.get(FACTS).await.map_err(refused)?;
    let text = map.data.and_then(|mut data| data.remove("cluster"));
    let facts: ClusterFacts = serde_json::from_str(&text.unwrap_or_default())
        .map_err(|error| MachineError::Refused(format!("ConfigMap {FACTS}: {error}")))?;
    if facts.version != env!("CARGO_PKG_VERSION") {
        return Err(MachineError::Refused(format!(
            "the cluster is of version {}, and this program of {}: their images differ",
            facts.version,
            env!("CARGO_PKG_VERSION")
        )));
    }
    let wanted: Vec<bool> = facts
        .cluster_cidrs
        .iter()
        .map(|range| range.is_ipv4())
        .collect();
    let given: Vec<bool> = own.iter().map(IpAddr::is_ipv4).collect();
    if wanted != given {
        return Err(MachineError::Refused(
            "the cluster has other families of addresses than this machine: give its addresses with --node-ip".to_owned(),
        ));
    }
    let nodes: Api<Node> = Api::all(client);
    let taken = nodes.get_opt(node).await.map_err(refused)?;
    if taken.as_ref().is_some_and(is_ready) {
        return Err(MachineError::Refused(format!(
            "the cluster has a node {node} that is Ready: another name is given with --node-name"
        )));
    }
    Ok(facts)
}
