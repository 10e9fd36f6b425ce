//! `keelway up`: makes a cluster, step by step, and takes it down again when a step fails.
//!
//! What does not depend on each other happens at once: while the API server starts, so do the nodes' containerds, with
//! their images. Steps wait for events (readiness messages of PID 1, watches), not for time.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::api::{ApiError, ClusterApi};
use crate::cgroup::CgroupError;
use crate::checks::{CheckError, Machine};
use crate::config::{ClusterConfig, ConfigError};
use crate::containerd::{self, Snapshotter};
use crate::deploy::{self, DeployError};
use crate::down::{self, DownError};
use crate::kubeconfig::{self, KubeconfigError};
use crate::network::{self, NetworkError, Subnet, Underlay};
use crate::node::launch::{LaunchError, Nodes};
use crate::node::{BIN_DIR, Bind, NodeSpec, ServiceSpec, ServiceStatus};
use crate::pki::{ClusterPki, Credential, PkiError, Subjects};
use crate::progress::Progress;
use crate::seed::{self, Seed, SeedError};
use crate::state::{ClusterDir, ClusterState, NodeState, StateDir, StateError};

pub const CONTROL_PLANE: &str = "control-plane";
const API_PORT: u16 = 6443;
const SERVICE_CIDR: &str = "10.96.0.0/16";
const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const CLUSTER_CIDR: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 244, 0, 0), 16);
const CLUSTER_DNS: &str = "10.96.0.10";
const CLUSTER_DOMAIN: &str = "cluster.local";
/// What services wait for, told by [`Nodes::tell`].
const NETWORK: &str = "network";
const API: &str = "api";
const IMAGES: &str = "images";
/// Lines of a failed service's log that are shown.
const LOG_LINES: usize = 15;

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
    Kubeconfig(#[from] KubeconfigError),
    #[error(transparent)]
    Down(#[from] DownError),
    #[error(
        "cluster `{0}` is up already; take it down with `keelway down --name {0}`, or choose another --name"
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
        explain(&dir).await;
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
        let workers: Vec<(String, Ipv4Addr)> = (1..=self.config.nodes)
            .map(|number| (format!("node-{number}"), self.subnet.worker(number)))
            .collect();
        self.state.api_port = port;
        self.state.nodes = std::iter::once((CONTROL_PLANE.to_owned(), self.subnet.control_plane()))
            .chain(workers.iter().cloned())
            .map(|(name, address)| NodeState {
                control_plane: name == CONTROL_PLANE,
                name,
                address,
                init: None,
            })
            .collect();
        self.dir.write(&self.state)?;

        let subjects = Subjects {
            cluster: &name,
            control_plane: self.subnet.control_plane(),
            service: API_SERVICE,
            workers: workers.clone(),
        };
        let pki = ClusterPki::new(&subjects)?;
        let context = kubeconfig::context_name(&name);
        let admin = kubeconfig::single(
            &context,
            &format!("https://127.0.0.1:{port}"),
            &pki.ca.certificate,
            &pki.admin,
        );
        write_private(&self.dir.kubeconfig(), &kubeconfig::to_yaml(&admin))?;
        let mut specs = Vec::new();
        for node in &self.state.nodes {
            self.machine.hierarchies.create(&name, &node.name)?;
            let spec = if node.control_plane {
                self.control_plane(node, &pki)?
            } else {
                self.worker(node, &pki)?
            };
            specs.push(spec);
        }
        step.done();

        let step = self.progress.step("nodes");
        let mut listener = Some(listener);
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
            let listener = if spec.name == CONTROL_PLANE {
                listener.take().map(Into::into)
            } else {
                None
            };
            nodes.start(&self.config.binaries.keelway, spec, &file, listener)?;
        }
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

        self.state.complete = true;
        self.dir.write(&self.state)?;
        kubeconfig::merge_into(user_file, &admin)?;
        Ok(())
    }

    async fn connect(&self) -> Result<(), UpError> {
        let mut ends = self
            .state
            .nodes
            .iter()
            .filter_map(|node| Some((node.init?.pid, node.address)));
        let Some(control_plane) = ends.next() else {
            return Ok(());
        };
        let underlay = Underlay {
            pods: CLUSTER_CIDR,
            control_plane,
            workers: ends.collect(),
        };
        // It moves threads between namespaces, so it has threads of its own.
        tokio::task::spawn_blocking(move || network::connect(&underlay))
            .await
            .map_err(|_| UpError::Panicked)??;
        Ok(())
    }

    /// From started nodes to a cluster whose DNS answers.
    async fn converge(&self, api: &ClusterApi, nodes: &Nodes) -> Result<(), UpError> {
        let workers: Vec<&NodeState> = self
            .state
            .nodes
            .iter()
            .filter(|node| !node.control_plane)
            .collect();
        let names: Vec<String> = workers.iter().map(|node| node.name.clone()).collect();
        let server = async {
            let step = self.progress.step("API server");
            api.ready().await;
            nodes.tell(API).await?;
            step.done();
            Ok::<_, UpError>(())
        };
        let runtimes = async {
            self.plant_images(&workers).await?;
            nodes.tell(IMAGES).await?;
            let step = self.progress.step("containerd on every node");
            nodes
                .wait(|board| {
                    names
                        .iter()
                        .all(|node| board.is_ready(node, "containerd"))
                        .then_some(())
                })
                .await?;
            step.done();
            Ok::<_, UpError>(())
        };
        tokio::try_join!(server, runtimes)?;

        let step = self.progress.step("agent and DNS deployed");
        for object in deploy::objects(&self.settings())? {
            api.create(&object).await?;
        }
        step.done();
        let ready = self.progress.step("nodes Ready");
        let agent = self.progress.step("agent ready on every node");
        let dns = self.progress.step("cluster DNS ready on every node");
        let nodes_ready = async {
            api.nodes_ready(&names).await?;
            ready.done();
            Ok::<_, UpError>(())
        };
        let agent_ready = async {
            api.daemon_set_ready("keelway-agent", self.config.nodes)
                .await;
            agent.done();
            Ok(())
        };
        let dns_ready = async {
            api.daemon_set_ready("keelway-dns", self.config.nodes).await;
            dns.done();
            Ok(())
        };
        tokio::try_join!(nodes_ready, agent_ready, dns_ready)?;
        Ok(())
    }

    /// Gives every worker's containerd, before it starts, all images.
    async fn plant_images(&self, workers: &[&NodeState]) -> Result<(), UpError> {
        let config = self.containerd_config();
        let source = seed::Source {
            archives: &self.config.archives,
            keelway: &self.config.binaries.keelway,
            machine: self.machine,
            cluster: &self.dir,
            snapshotter: self.snapshotter,
            containerd_config: &config,
        };
        let seed = match Seed::find(&source) {
            Some(seed) => seed,
            None => {
                let step = self.progress.step("images imported, once for this build");
                let seed = Seed::make(&source).await?;
                step.done();
                seed
            }
        };
        let step = self.progress.step("images on every node");
        for node in workers {
            seed.plant(&self.dir.node(&node.name).join("var/lib/containerd"))?;
        }
        step.done();
        Ok(())
    }

    fn containerd_config(&self) -> String {
        let pause = format!("localhost/keelway/pause:{}", env!("CARGO_PKG_VERSION"));
        containerd::config(&pause, self.snapshotter)
    }

    fn settings(&self) -> deploy::Settings {
        // The agent's pod has the machine's /sys/fs/cgroup at /host/cgroup.
        let v2 = self.machine.hierarchies.v2_mount();
        let beside_v1 = v2.strip_prefix("/sys/fs/cgroup").unwrap_or(Path::new(""));
        let cgroup = Path::new("/host/cgroup")
            .join(beside_v1)
            .join("keelway")
            .join(&self.state.name)
            .join("$(NODE_NAME)");
        deploy::Settings {
            api_server: self.api_server(),
            cgroup: cgroup.display().to_string(),
            cluster_dns: CLUSTER_DNS.into(),
            cluster_domain: CLUSTER_DOMAIN.into(),
            agent_args: self.config.agent_args.clone(),
            dns_args: self
                .config
                .dns_upstreams
                .iter()
                .map(|server| format!("--upstream={server}"))
                .collect(),
        }
    }

    fn api_server(&self) -> String {
        format!("https://{}:{API_PORT}", self.subnet.control_plane())
    }

    fn control_plane(&self, node: &NodeState, pki: &ClusterPki) -> Result<NodeSpec, UpError> {
        let local = format!("https://127.0.0.1:{API_PORT}");
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
            ],
        )?;
        let program = Path::new(BIN_DIR).join("keelway-controlplane");
        let server = service(
            "controlplane",
            &program,
            &[
                ("--data-dir", "/var/lib/keelway/controlplane"),
                ("--pki-dir", "/etc/keelway"),
                ("--bind", &format!("0.0.0.0:{API_PORT}")),
                ("--advertise-address", &node.address.to_string()),
                ("--service-cidr", SERVICE_CIDR),
                (
                    "--cluster-cidr",
                    &format!("{}/{}", CLUSTER_CIDR.0, CLUSTER_CIDR.1),
                ),
            ],
        );
        // It binds to every address, so it need not wait for the network.
        let server = ServiceSpec {
            listens: true,
            ..server
        };
        let binaries = [(self.config.binaries.controlplane.clone(), program)];
        Ok(self.spec(node, credentials, binaries.into(), Vec::new(), vec![server]))
    }

    fn worker(&self, node: &NodeState, pki: &ClusterPki) -> Result<NodeSpec, UpError> {
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
            ..seed::containerd_service()
        };
        let program = Path::new(BIN_DIR).join("keelway-kubelet");
        let kubelet = service(
            "kubelet",
            &program,
            &[
                ("--node-name", &node.name),
                ("--node-ip", &node.address.to_string()),
                ("--kubeconfig", "/etc/keelway/kubelet.kubeconfig"),
                ("--runtime-endpoint", containerd::SOCKET),
                (
                    "--cgroup-root",
                    &format!("/keelway/{}/{}", self.state.name, node.name),
                ),
                ("--tls-cert", "/etc/keelway/kubelet.crt"),
                ("--tls-key", "/etc/keelway/kubelet.key"),
                ("--client-ca", "/etc/keelway/ca.crt"),
                ("--cluster-dns", CLUSTER_DNS),
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
        binds.extend(binaries.into_iter().chain([own]).map(|(from, to)| Bind {
            from,
            to,
            read_only: true,
        }));
        let mut hosts = String::from("127.0.0.1 localhost\n::1 localhost\n");
        for other in &self.state.nodes {
            hosts.push_str(&format!("{} {}\n", other.address, other.name));
        }
        let mut all_files = BTreeMap::from([
            ("/etc/hosts".into(), hosts),
            ("/etc/hostname".into(), format!("{}\n", node.name)),
            (
                "/etc/resolv.conf".into(),
                "# A node has no name server: nothing leaves this cluster's namespaces.\n"
                    .to_owned(),
            ),
        ]);
        all_files.extend(files);
        NodeSpec {
            cluster: self.state.name.clone(),
            name: node.name.clone(),
            dir: self.dir.node(&node.name),
            binds,
            files: all_files,
            net_sysctls: BTreeMap::from([("ipv4/ip_forward".to_owned(), "1".to_owned())]),
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
    }
}

fn write_private(path: &Path, contents: &str) -> Result<(), UpError> {
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

/// Says what can be seen of why a cluster did not come up, while it is still there: what is not ready, and the end of the
/// logs of services that failed.
async fn explain(dir: &ClusterDir) {
    let Some(state) = dir.read() else { return };
    if state.nodes.iter().any(NodeState::is_running)
        && let Some(admin) = crate::status::kubeconfig_of(dir)
        && let Ok(api) = ClusterApi::new(&admin).await
        && let Ok(missing) =
            tokio::time::timeout(Duration::from_secs(3), api.what_is_missing()).await
    {
        eprint!("{missing}");
    }
    for node in &state.nodes {
        let folder = dir.node(&node.name);
        show_end("PID 1", &node.name, &folder.join("init.log"));
        let services: Vec<ServiceStatus> = fs::read(folder.join("services.json"))
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default();
        for service in services.iter().filter(|service| service.restarts > 0) {
            show_end(
                &service.name,
                &node.name,
                &folder
                    .join("var/log/keelway")
                    .join(format!("{}.log", service.name)),
            );
        }
    }
}

fn show_end(what: &str, node: &str, log: &Path) {
    let text = fs::read(log)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    if !lines.is_empty() {
        eprintln!("--- {what} on {node}, last lines:");
        for line in lines.iter().skip(lines.len().saturating_sub(LOG_LINES)) {
            eprintln!("    {line}");
        }
    }
}
