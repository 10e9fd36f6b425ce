//! `keelway`: development clusters on one machine.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand, ValueEnum};
use futures::future::try_join_all;
use keelway::cgroup::Hierarchies;
use keelway::config::{ClusterConfig, ClusterName, UpFlags};
use keelway::containerd::{Containerd, Snapshotter};
use keelway::forward::ForwardArguments;
use keelway::node::init::{self, InitArguments};
use keelway::state::StateDir;
use keelway::status::Status;
use keelway::{checks, down, forward, monitor, up};

/// Development clusters on one machine: whole Kubernetes clusters whose network path is Keelway's.
///
/// Each node is a set of namespaces with its own containerd; the machine's own network, files and settings stay as they are.
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
    /// Back up, restore or move the state of a control plane; arguments are those of `keelway-controlplane store`
    #[command(disable_help_flag = true)]
    Store {
        /// backup, restore or migrate, with its flags
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
        Command::Store { arguments } => Err(store(&arguments)),
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

/// Becomes the control plane's program, which knows its stores; gives why it could not.
fn store(arguments: &[String]) -> anyhow::Error {
    let program = match std::env::current_exe() {
        Ok(own) => own.with_file_name("keelway-controlplane"),
        Err(error) => return anyhow::Error::from(error).context("cannot find this program"),
    };
    let mut command = std::process::Command::new(&program);
    let error = command.arg("store").args(arguments).exec();
    anyhow::Error::from(error).context(format!("cannot run {}", program.display()))
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
            up::run(&config, &machine, &state).await?;
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
        Command::Store { .. }
        | Command::NodeInit { .. }
        | Command::NodeExec { .. }
        | Command::Forward(_) => {}
    }
    Ok(())
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
