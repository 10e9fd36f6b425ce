//! `keelway up`: makes a cluster, step by step, and takes it down again when a step fails.
//!
//! What does not depend on each other happens at once: while the API server starts, so do the nodes' containerds, with
//! their images. Steps wait for events (readiness messages of PID 1, watches), not for time.

mod converge;
mod failure;
pub(crate) mod specs;
pub mod upgrade;

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::api::{ApiError, ClusterApi};
use crate::cgroup::CgroupError;
use crate::checks::{CheckError, Machine};
use crate::config::{ClusterConfig, ConfigError, StoreKind};
use crate::containerd::{ImageError, Snapshotter};
use crate::deploy::DeployError;
use crate::down::{self, DownError};
use crate::kubeconfig::{self, KubeconfigError};
use crate::network::{self, NetworkError, Subnet, Underlay};
use crate::node::launch::{LaunchError, Nodes};
use crate::node::mounts::MountError;
use crate::pki::{ClusterPki, EtcdPki, PkiError, Subjects};
use crate::progress::Progress;
use crate::seed::SeedError;
use crate::state::{ClusterDir, ClusterState, NodeState, StateDir, StateError};

pub const CONTROL_PLANE: &str = "control-plane";
/// The node that holds the bridge when there are several control planes: none of them may be the one that all need.
const SWITCH: &str = "switch";

fn workers_of(state: &ClusterState) -> Vec<NodeState> {
    let nodes = state.nodes.iter().filter(|node| !node.control_plane);
    nodes.cloned().collect()
}

/// Whether a node is a control plane's, and not only the one that connects them.
fn is_control_plane(node: &NodeState) -> bool {
    node.control_plane && node.name != SWITCH
}

const CLUSTER_DOMAIN: &str = "cluster.local";
/// What services wait for, told by [`Nodes::tell`].
const NETWORK: &str = "network";
const API: &str = "api";
const IMAGES: &str = "images";
/// The service of the control plane's node by which the cluster reaches the outside.
const FORWARDER: &str = "forwarder";

#[derive(Debug, thiserror::Error)]
pub enum UpError {
    #[error(transparent)]
    Check(#[from] CheckError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Seed(#[from] SeedError),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Deploy(#[from] DeployError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Mounts(#[from] MountError),
    #[error(transparent)]
    Kubeconfig(#[from] KubeconfigError),
    #[error(transparent)]
    Down(#[from] DownError),
    #[error(
        "cluster `{0}` is up already; `keelway upgrade --name {0}` makes it this build's, `keelway down --name {0}` takes it down"
    )]
    AlreadyUp(String),
    #[error(
        "cluster `{0}` is here, but does not run (was the machine restarted?); `keelway down --name {0}` removes it"
    )]
    NotRunning(String),
    #[error(
        "processes of a cluster `{0}` run that this state folder does not know; `keelway down --name {0}` ends them"
    )]
    Unknown(String),
    #[error("cluster `{0}` is not up; `keelway up --name {0}` makes it")]
    NotUp(String),
    #[error(
        "cluster `{0}` has one control plane, without which it is none: `keelway down` and `up` make another cluster. One of several is replaced while the others serve: `keelway up --control-planes 3 --store etcd`. Its workers get this build's programs by `keelway upgrade --only workers`"
    )]
    OnlyOne(String),
    #[error("cannot end control plane {node}: {source}")]
    Stop { node: String, source: io::Error },
    #[error("cannot end {service} on {node}: {source}")]
    StopService {
        service: String,
        node: String,
        source: io::Error,
    },
    #[error(
        "{node} has not come back within {patience:?}; the others run. `keelway upgrade` goes on with it, by this build or another"
    )]
    NotBack { node: String, patience: Duration },
    #[error(
        "{node} is left as it is, since the cluster would not go on without it: {needed} other control planes have to serve, and of them do: {serving}. `keelway status` tells what does not run; `keelway upgrade` goes on when they serve"
    )]
    Needed {
        node: String,
        serving: String,
        needed: usize,
    },
    #[error("cannot listen on 127.0.0.1:{port}: {source}")]
    Listen { port: u16, source: io::Error },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("the cluster did not come up within {0:?}; --timeout allows it more")]
    Timeout(Duration),
    #[error("interrupted")]
    Interrupted,
    #[error("a task of `up` panicked")]
    Panicked,
}

/// A cluster while it is made.
struct Plan<'a> {
    config: &'a ClusterConfig,
    machine: &'a Machine,
    dir: ClusterDir,
    state: ClusterState,
    subnet: Subnet,
    snapshotter: Snapshotter,
    progress: Progress,
}

/// Makes the cluster. Returns when its DNS answers on every node.
///
/// # Errors
/// Names the step's failure. Unless `keep_on_error` is set, nothing is left of what was made.
pub async fn run(
    config: &ClusterConfig,
    machine: &Machine,
    state_dir: &StateDir,
) -> Result<(), UpError> {
    let progress = Progress::default();
    let user_files = kubeconfig::Files::from_environment()?;
    let name = config.name.as_ref();
    let (dir, _lock) = claim(name, machine, state_dir)?;

    let mut nodes = Nodes::default();
    let outcome = async {
        let mut state = ClusterState {
            name: name.to_owned(),
            subnet: 0,
            api_port: 0,
            kubeconfig: Some(user_files.for_writing().to_owned()),
            complete: false,
            nodes: Vec::new(),
            deployed: None,
        };
        let subnet = state_dir.claim_subnet(&dir, &mut state)?;
        let snapshotter = Snapshotter::for_folder(&dir.path);
        let mut plan = Plan {
            config,
            machine,
            dir: dir.clone(),
            state,
            subnet,
            snapshotter,
            progress: progress.clone(),
        };
        tokio::select! {
            made = plan.make(&mut nodes, user_files.for_writing()) => made,
            () = tokio::time::sleep(config.timeout) => Err(UpError::Timeout(config.timeout)),
            _ = tokio::signal::ctrl_c() => Err(UpError::Interrupted),
        }
    }
    .await;

    if let Err(error) = outcome {
        failure::explain(&dir).await;
        if config.keep_on_error {
            // A node that is gone already cannot be told, and is kept all the same.
            let _ = nodes.detach().await;
            eprintln!(
                "kept for you to look at: {}; `keelway down --name {name}` removes it",
                dir.path.display()
            );
        } else {
            down::remove(&dir, &machine.hierarchies)?;
            state_dir.remove_if_empty();
        }
        return Err(error);
    }
    nodes.detach().await?;
    let context = kubeconfig::context_name(name);
    println!(
        "Cluster {name} is up after {:.2} s: {} nodes, kubectl context {context}.",
        progress.elapsed().as_secs_f64(),
        config.nodes
    );
    println!("Try:");
    println!("  kubectl get nodes -o wide");
    println!("  kubectl apply -f examples/hello.yaml && kubectl rollout status deploy/hello");
    println!("  kubectl exec client -- wget -qO- http://hello/");
    Ok(())
}

/// The cluster's folder, new and locked. What an `up` left that was killed is removed first.
fn claim(
    name: &str,
    machine: &Machine,
    state_dir: &StateDir,
) -> Result<(ClusterDir, crate::state::ClusterLock), UpError> {
    let dir = state_dir.cluster(name);
    let fresh = !dir.path.exists();
    let lock = dir.create()?;
    match dir.read() {
        Some(known) if known.complete => {
            let runs = known.nodes.iter().any(NodeState::is_running);
            return Err(if runs {
                UpError::AlreadyUp(name.into())
            } else {
                UpError::NotRunning(name.into())
            });
        }
        None if fresh && !machine.hierarchies.pids(name).is_empty() => {
            dir.remove()?;
            state_dir.remove_if_empty();
            return Err(UpError::Unknown(name.into()));
        }
        None if fresh => return Ok((dir, lock)),
        _ => {}
    }
    eprintln!("removing what an unfinished `keelway up` of cluster {name} left");
    down::remove(&dir, &machine.hierarchies)?;
    drop(lock);
    let lock = dir.create()?;
    Ok((dir, lock))
}

impl Plan<'_> {
    async fn make(&mut self, nodes: &mut Nodes, user_file: &Path) -> Result<(), UpError> {
        let name = self.config.name.as_ref().to_owned();
        let step = self.progress.step("credentials and folders");
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, self.config.api_port)).map_err(|source| {
                UpError::Listen {
                    port: self.config.api_port,
                    source,
                }
            })?;
        let port = listener
            .local_addr()
            .map_or(self.config.api_port, |address| address.port());
        let family = self.config.ip_family;
        let several = self.config.control_planes > 1;
        let control_planes: Vec<(String, Vec<IpAddr>)> = (1..=self.config.control_planes)
            .map(|number| {
                let name = match number {
                    1 => CONTROL_PLANE.to_owned(),
                    number => format!("{CONTROL_PLANE}-{number}"),
                };
                (name, self.subnet.one_control_plane(family, number))
            })
            .collect();
        let workers: Vec<(String, Vec<IpAddr>)> = (1..=self.config.nodes)
            .map(|number| (format!("node-{number}"), self.subnet.worker(family, number)))
            .collect();
        self.state.api_port = port;
        // It has no address of its own; what is written down is that of the loopback.
        let switch = several.then(|| (SWITCH.to_owned(), vec![Ipv4Addr::LOCALHOST.into()]));
        let node = |control_plane| {
            move |(name, addresses): (String, Vec<IpAddr>)| NodeState {
                control_plane,
                name,
                address: addresses[0],
                second_address: addresses.get(1).copied(),
                init: None,
                unsettled: false,
            }
        };
        let beside_workers = switch.into_iter().chain(control_planes.iter().cloned());
        self.state.nodes = beside_workers
            .map(node(true))
            .chain(workers.iter().cloned().map(node(false)))
            .collect();
        self.dir.write(&self.state)?;

        let subjects = Subjects {
            cluster: &name,
            control_plane: control_planes
                .iter()
                .flat_map(|(_, addresses)| addresses.clone())
                .collect(),
            names: Vec::new(),
            services: family.api_services(),
            renewed: false,
            workers,
        };
        let pki = ClusterPki::new(&subjects)?;
        let etcd = match self.config.store {
            StoreKind::Embedded => None,
            StoreKind::Etcd => Some(EtcdPki::new(&name, &control_planes, false)?),
        };
        let context = kubeconfig::context_name(&name);
        let admin = kubeconfig::single(
            &context,
            &format!("https://127.0.0.1:{port}"),
            &pki.ca.certificate,
            &pki.admin,
        );
        specs::write_private(&self.dir.kubeconfig(), &kubeconfig::to_yaml(&admin))?;
        let mut specs = Vec::new();
        for node in &self.state.nodes {
            self.machine.hierarchies.create(&name, &node.name)?;
            let spec = if node.name == SWITCH {
                self.switch(node)?
            } else if node.control_plane {
                self.control_plane(node, &pki, etcd.as_ref())?
            } else {
                self.worker(node, &pki)?
            };
            specs.push(spec);
        }
        step.done();

        let step = self.progress.step("nodes");
        for spec in &specs {
            let file = spec.dir.join("node.json");
            let text = serde_json::to_vec_pretty(spec).map_err(|error| UpError::Write {
                path: file.clone(),
                source: error.into(),
            })?;
            fs::write(&file, text).map_err(|source| UpError::Write {
                path: file.clone(),
                source,
            })?;
            // Several control planes accept from one socket: whichever lives.
            let takes = spec.services.iter().any(|service| service.listens);
            let own = takes.then(|| listener.try_clone()).transpose();
            let own = own.map_err(|source| UpError::Listen { port, source })?;
            let own = own.map(Into::into);
            nodes.start(&self.config.binaries.keelway, spec, &file, own)?;
        }
        drop(listener);
        let names: Vec<String> = specs.iter().map(|spec| spec.name.clone()).collect();
        let inits = nodes
            .wait(|board| {
                names
                    .iter()
                    .map(|name| board.init(name))
                    .collect::<Option<Vec<_>>>()
            })
            .await?;
        for (node, init) in self.state.nodes.iter_mut().zip(inits) {
            node.init = Some(init);
        }
        self.dir.write(&self.state)?;
        self.connect().await?;
        nodes
            .wait(|board| names.iter().all(|name| board.is_booted(name)).then_some(()))
            .await?;
        nodes.tell(NETWORK).await?;
        step.done();

        let api = ClusterApi::new(&admin).await?;
        nodes.while_well(self.converge(&api, nodes)).await?;

        self.state.deployed = Some(self.settings());
        self.state.complete = true;
        self.dir.write(&self.state)?;
        kubeconfig::merge_into(user_file, &admin)?;
        Ok(())
    }

    async fn connect(&self) -> Result<(), UpError> {
        let ends = |wanted: fn(&NodeState) -> bool| {
            let nodes = self.state.nodes.iter().filter(move |node| wanted(node));
            nodes.filter_map(|node| Some((node.init?.pid, node.addresses())))
        };
        let mut control_planes = ends(is_control_plane);
        let switch = ends(|node| node.name == SWITCH).next();
        let control_plane = match switch {
            Some((pid, _)) => Some((pid, Vec::new())),
            None => control_planes.next(),
        };
        let Some(control_plane) = control_plane else {
            return Ok(());
        };
        let underlay = Underlay {
            egress: self.config.egress,
            pods: self.config.ip_family.pods(),
            control_plane,
            control_planes: control_planes.collect(),
            workers: ends(|node| !node.control_plane).collect(),
        };
        // It moves threads between namespaces, so it has threads of its own.
        tokio::task::spawn_blocking(move || network::connect(&underlay))
            .await
            .map_err(|_| UpError::Panicked)??;
        Ok(())
    }
}
