//! `keelway`: clusters on one machine, and machines as nodes of clusters.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand, ValueEnum};
use futures::future::try_join_all;
use keelway::cgroup::Hierarchies;
use keelway::config::{ClusterConfig, ClusterName, StoreKind, UpFlags};
use keelway::containerd::{Containerd, Snapshotter};
use keelway::forward::ForwardArguments;
use keelway::machine::MachineDir;
use keelway::machine::balancer::{self, BalanceArguments};
use keelway::machine::join::{self, JoinFlags};
use keelway::machine::leave::{self, LeaveFlags};
use keelway::machine::member;
use keelway::machine::rotation::{self, Step};
use keelway::machine::server::{self, ServerFlags, StoreFlags};
use keelway::machine::token::command::{self as token, TokenCommand};
use keelway::node::init::{self, InitArguments};
use keelway::state::StateDir;
use keelway::status::Status;
use keelway::up::upgrade::{self, UpgradeFlags};
use keelway::{checks, down, forward, machine, monitor, up};

/// Whole Kubernetes clusters whose network path is Keelway's: on one machine (`up`), or of many (`server`, `join`).
///
/// With `up`, each node is a set of namespaces with its own containerd; the machine's own network, files and settings stay as they are.
#[derive(Debug, Parser)]
#[command(name = "keelway", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a cluster, and select its context keelway-NAME for kubectl
    Up(UpFlags),
    /// Make a running cluster this build's: its control planes one after another while the others serve, then its workers under their pods
    Upgrade(UpgradeFlags),
    /// Take a cluster away, with everything that belongs to it
    Down {
        /// Name of the cluster
        #[arg(long, default_value = "default")]
        name: ClusterName,
        /// All clusters of this machine
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// Tell what of a cluster runs; fails when not everything does
    Status {
        /// Name of the cluster [default: every cluster of this machine]
        #[arg(long)]
        name: Option<ClusterName>,
        /// Also say how each node reaches the pods of each other one, with round trips
        #[arg(long)]
        connectivity: bool,
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Watch drops, rejects and new flows on all nodes of a cluster; arguments after `--` are those of `keelway-agent monitor`
    Monitor {
        /// Name of the cluster
        #[arg(long, default_value = "default")]
        name: ClusterName,
        /// --drops, --sample N, --pod, --service, --reason, --count N, --output json
        #[arg(last = true, value_name = "FLAGS")]
        arguments: Vec<String>,
    },
    /// Print a kubeconfig for a cluster
    Kubeconfig {
        /// Name of the cluster
        #[arg(long, default_value = "default")]
        name: ClusterName,
    },
    /// Images in a cluster
    #[command(subcommand)]
    Image(Image),
    /// Begin a cluster of many machines on this one: its first control plane and node
    Server(Box<ServerFlags>),
    /// Add this machine to a cluster
    Join(Box<JoinFlags>),
    /// Take this machine out of its cluster, and remove what it left here
    Leave(LeaveFlags),
    /// Start this machine's node again, after a reboot for example
    Start {
        /// Stay with the node, and end it when this command is ended
        #[arg(long)]
        foreground: bool,
        #[command(flatten)]
        store: StoreFlags,
    },
    /// End this machine's node; `start` starts it again
    Stop,
    /// Tokens that machines join with
    #[command(subcommand)]
    Token(TokenCommand),
    /// The certificates of this machine's node: those of its control plane, and those of its kubelet
    #[command(subcommand)]
    Certs(CertsCommand),
    /// Back up, restore or move the state of a control plane; arguments are those of `keelway-controlplane store`
    #[command(disable_help_flag = true)]
    Store {
        /// backup, restore, migrate, show or member, with its flags
        #[arg(
            trailing_var_arg = true,
            allow_hyphen_values = true,
            value_name = "ARGUMENTS"
        )]
        arguments: Vec<String>,
    },
    #[command(hide = true)]
    NodeInit {
        #[arg(long)]
        spec: PathBuf,
        #[arg(long)]
        parent: Option<u32>,
        #[arg(long)]
        outside: Option<u32>,
        #[arg(long)]
        listener: bool,
    },
    #[command(hide = true)]
    Balance(BalanceArguments),
    #[command(hide = true)]
    Forward(ForwardArguments),
    #[command(hide = true)]
    NodeExec {
        #[arg(long)]
        listener: bool,
        #[arg(long)]
        outside: bool,
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
enum Image {
    /// Import an OCI or Docker archive on every node
    Load {
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
        /// Name of the cluster
        #[arg(long, default_value = "default")]
        name: ClusterName,
    },
}

#[derive(Debug, Subcommand)]
enum CertsCommand {
    /// List them, with when each expires
    List,
    /// Sign them anew, for a year; the cluster's authority stays. What runs takes them up by itself
    Renew {
        /// Names as `list` has them; all when none is given
        names: Vec<String>,
    },
    /// Put another authority in the place of the cluster's, step by step, while the cluster runs; without a step, say where that stands
    RotateCa {
        #[arg(value_enum)]
        step: Option<Step>,
        /// How long to wait until all nodes and namespaces know of the change
        #[arg(long, value_name = "SECONDS", default_value_t = 120)]
        timeout: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        // A node's own processes have no runtime: PID 1 is a single thread, and the other becomes a service.
        Command::NodeInit {
            spec,
            parent,
            outside,
            listener,
        } => init::run(&InitArguments {
            spec,
            parent,
            outside,
            listener,
        })
        .map_err(Into::into),
        Command::NodeExec {
            argv,
            listener,
            outside,
        } => Err(keelway::node::exec_service(&argv, listener, outside).into()),
        Command::Store { arguments } => Err(controlplane("store", &reaching(arguments))),
        Command::Certs(command) => certs(&command),
        // It changes namespaces before it has threads.
        Command::Forward(arguments) => forward::run(&arguments).map_err(Into::into),
        command => run(command),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Has `store member` ask the etcd that this machine has a member of, unless another is named.
fn reaching(mut arguments: Vec<String>) -> Vec<String> {
    let is_named = |word: &String| word == "--store" || word.starts_with("--store=");
    let is_member = arguments.first().is_some_and(|word| word == "member");
    if is_member && arguments.len() > 1 && !arguments.iter().any(is_named) {
        let dir = MachineDir::of(&StateDir::from_environment());
        arguments.extend(member::reached(&dir).unwrap_or_default());
    }
    arguments
}

/// Becomes the control plane's program, which knows its stores and certificates; gives why it could not.
fn controlplane(part: &str, arguments: &[String]) -> anyhow::Error {
    let program = match std::env::current_exe() {
        Ok(own) => own.with_file_name("keelway-controlplane"),
        Err(error) => return anyhow::Error::from(error).context("cannot find this program"),
    };
    let mut command = std::process::Command::new(&program);
    let error = command.arg(part).args(arguments).exec();
    anyhow::Error::from(error).context(format!("cannot run {}", program.display()))
}

/// Becomes the control plane's program, for the certificates of this machine. A kubelet renews its own, when their files are gone.
fn certs(command: &CertsCommand) -> anyhow::Result<()> {
    let dir = MachineDir::of(&StateDir::from_environment());
    if dir.read().is_none() {
        bail!("this machine is no node of a cluster that `keelway server` made");
    }
    let mut arguments = vec![
        "--pki-dir".to_owned(),
        dir.credentials().display().to_string(),
    ];
    if dir.kubeconfig().exists() {
        arguments.extend([
            "--kubeconfig".to_owned(),
            dir.kubeconfig().display().to_string(),
        ]);
    }
    let kubelet = dir.kubelet_certificates();
    match command {
        CertsCommand::List => {
            arguments.insert(0, "list".to_owned());
            for path in kubelet.iter().filter(|path| path.exists()) {
                arguments.extend(["--pem".to_owned(), path.display().to_string()]);
            }
        }
        CertsCommand::Renew { names } => {
            let stem = |path: &PathBuf| {
                path.file_stem()
                    .map(|name| name.to_string_lossy().into_owned())
            };
            let mut others = names.clone();
            for path in kubelet {
                let named = stem(&path).unwrap_or_default();
                if (names.is_empty() || names.contains(&named)) && path.exists() {
                    std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
                    println!("{named} is asked for anew by the kubelet, within a minute.");
                }
                others.retain(|name| *name != named);
            }
            let is_control_plane = dir.credentials().join("ca.key").exists();
            if (others.is_empty() && !names.is_empty()) || (names.is_empty() && !is_control_plane) {
                return Ok(());
            }
            arguments.insert(0, "renew".to_owned());
            arguments.extend(others);
        }
        CertsCommand::RotateCa { step, timeout } => {
            return rotate_ca(*step, Duration::from_secs(*timeout));
        }
    }
    Err(controlplane("certs", &arguments))
}

#[tokio::main]
async fn rotate_ca(step: Option<Step>, patience: Duration) -> anyhow::Result<()> {
    checks::root("certs rotate-ca")?;
    Ok(rotation::run(step, patience, &StateDir::from_environment()).await?)
}

#[tokio::main]
async fn run(command: Command) -> anyhow::Result<()> {
    let state = StateDir::from_environment();
    match command {
        Command::Up(flags) => {
            checks::root("up")?;
            let program = std::env::current_exe().context("cannot find this program")?;
            let config = ClusterConfig::new(&flags, &program)?;
            let machine = checks::machine()?;
            checks::family(config.ip_family)?;
            if config.egress {
                checks::egress(&machine)?;
            }
            if config.store == StoreKind::Etcd {
                checks::etcd(&machine)?;
            }
            up::run(&config, &machine, &state).await?;
        }
        Command::Upgrade(flags) => {
            let (machine, program) = prepared("upgrade")?;
            upgrade::run(&flags, &machine, &state, &program).await?;
        }
        Command::Down { name, all } => {
            checks::root("down")?;
            let hierarchies = Hierarchies::of_this_machine()?;
            let names = if all {
                down::clusters(&state, &hierarchies)
            } else {
                vec![name.to_string()]
            };
            if names.is_empty() {
                println!("No cluster is up.");
            }
            for name in names {
                match down::cluster(&state, &hierarchies, &name)? {
                    down::Found::Nothing => println!("Cluster {name} is not up."),
                    down::Found::Cluster { .. } => println!("Cluster {name} is gone."),
                }
            }
        }
        Command::Status {
            name,
            connectivity,
            output,
        } => return status(&state, name, connectivity, output).await,
        Command::Monitor { name, arguments } => {
            checks::root("monitor")?;
            monitor::run(&state.cluster(name.as_ref()), name.as_ref(), &arguments).await?;
        }
        Command::Kubeconfig { name } => {
            let path = state.cluster(name.as_ref()).kubeconfig();
            print!(
                "{}",
                std::fs::read_to_string(&path)
                    .with_context(|| format!("cluster {name} is not up (no {})", path.display()))?
            );
        }
        Command::Image(Image::Load { files, name }) => {
            checks::root("image load")?;
            load(&state, &name, &files).await?;
        }
        Command::Server(flags) => {
            let (machine, program) = prepared("server")?;
            server::run(&flags, &machine, &state, &program).await?;
        }
        Command::Join(flags) => {
            let (machine, program) = prepared("join")?;
            join::run(&flags, &machine, &state, &program).await?;
        }
        Command::Leave(flags) => {
            let (machine, _) = prepared("leave")?;
            leave::run(&flags, &machine, &state).await?;
        }
        Command::Start { foreground, store } => {
            let (machine, program) = prepared("start")?;
            machine::run::start(&state, (&machine, &program), (foreground, &store)).await?;
        }
        Command::Stop => {
            checks::root("stop")?;
            machine::run::stop(&state)?;
        }
        Command::Token(command) => token::run(&command, &state).await?,
        Command::Balance(arguments) => balancer::run(&arguments).await?,
        Command::Store { .. }
        | Command::Certs(_)
        | Command::NodeInit { .. }
        | Command::NodeExec { .. }
        | Command::Forward(_) => {}
    }
    Ok(())
}

/// What commands need that make or end a node of this machine.
fn prepared(command: &'static str) -> anyhow::Result<(checks::Machine, PathBuf)> {
    checks::root(command)?;
    let program = std::env::current_exe().context("cannot find this program")?;
    Ok((checks::machine()?, program))
}

async fn status(
    state: &StateDir,
    name: Option<ClusterName>,
    connectivity: bool,
    output: Output,
) -> anyhow::Result<()> {
    let names = name.map_or_else(|| state.names(), |name| vec![name.to_string()]);
    let mut all = Vec::new();
    for name in names {
        match Status::of(&state.cluster(&name)).await {
            Some(mut status) => {
                if connectivity {
                    status.connect();
                }
                all.push(status);
            }
            None => bail!("cluster {name} is not up"),
        }
    }
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&all)?),
        Output::Text if all.is_empty() => println!("No cluster is up."),
        Output::Text => all.iter().for_each(|status| print!("{status}")),
    }
    if let Some(status) = all.iter().find(|status| !status.healthy) {
        bail!("cluster {} is not healthy", status.name);
    }
    Ok(())
}

async fn load(state: &StateDir, name: &ClusterName, files: &[PathBuf]) -> anyhow::Result<()> {
    let dir = state.cluster(name.as_ref());
    let known = dir
        .read()
        .with_context(|| format!("cluster {name} is not up"))?;
    for file in files {
        if !file.is_file() {
            bail!("{} is not a file", file.display());
        }
    }
    let snapshotter = Snapshotter::for_folder(&dir.path);
    let workers = known.nodes.iter().filter(|node| !node.control_plane);
    let imports = workers.map(|node| async move {
        let Some(init) = node.init.filter(|init| init.is_alive()) else {
            bail!("node {} does not run", node.name)
        };
        let containerd = Containerd::of_node(&node.name, init.pid, snapshotter);
        for file in files {
            containerd.import(file).await?;
        }
        Ok(())
    });
    try_join_all(imports).await?;
    println!(
        "Loaded {} on every node of cluster {name}.",
        files
            .iter()
            .map(|file| file.display().to_string())
            .collect::<Vec<_>>()
            .join(", ")
    );
    Ok(())
}
