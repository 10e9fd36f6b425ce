//! xtask: set-up, builds, images, tests and conventions of Keelway. `make up`, `make test`, `make bench` and `make down` call it.
#![forbid(unsafe_code)]

mod build;
mod check;
mod fuzz;
mod images;
mod process;
mod project;
mod registry;
mod setup;
mod tidy;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use project::Project;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Set-up, builds, images, tests and conventions of Keelway"
)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Put in place what building and running needs: eBPF toolchain, containerd, runc, kubectl
    Setup,
    /// Build every binary
    Build {
        #[arg(long, default_value = "dist")]
        profile: String,
    },
    /// Build OCI archives into target/images
    Images {
        /// Images to build (agent, dns, pause, echo, client); all when none is named
        names: Vec<String>,
        #[arg(long, default_value = "dist")]
        profile: String,
        /// Take the binaries as they are
        #[arg(long)]
        no_build: bool,
    },
    /// Build an OCI archive of programs that were built elsewhere, under any name (docs/images.md)
    Image(images::foreign::Recipe),
    /// Start a cluster on this machine: set-up, build, images, then `keelway up` with the arguments
    Up {
        #[arg(long, env = "KEELWAY_PROFILE", default_value = "dist")]
        profile: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Remove the cluster: `keelway down` with the arguments
    Down {
        #[arg(long, env = "KEELWAY_PROFILE", default_value = "dist")]
        profile: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Check formatting, lints and conventions, then run every test; arguments go to the test runner and skip the checks
    Test {
        #[arg(long, env = "KEELWAY_TEST_PROFILE", default_value = "dev")]
        profile: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Measure: set-up, build, images, then `keelway-bench` with the arguments
    Bench {
        #[arg(long, env = "KEELWAY_PROFILE", default_value = "dist")]
        profile: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Hold the programs' instructions, lookups and stack, and the map operations per change, against bench/gate.json
    Gate {
        /// Write them into the file instead
        #[arg(long)]
        update: bool,
        #[arg(long, env = "KEELWAY_TEST_PROFILE", default_value = "dev")]
        profile: String,
    },
    /// Try the API's parsers and the DNS with inputs that libFuzzer makes up: each target for so many seconds
    Fuzz {
        /// Targets (the names in fuzz/fuzz_targets); all when none is named
        names: Vec<String>,
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Formatting, clippy and conventions
    Lint,
    /// Conventions that code can check: imports between crates, unsafe code, file lengths, module names
    Tidy,
    /// Generate the control plane's tables from the published Kubernetes definitions
    GenerateRegistry {
        /// Folder with definitions.json, protobuf.json, discovery.json and paths.json
        #[arg(long)]
        from: PathBuf,
    },
    /// Generate what `kubectl explain` says from the schemas of the k8s-openapi package
    GenerateDescriptions {
        /// The folder src/v1_36 of its source
        #[arg(long)]
        from: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    let project = Project::locate()?;
    match task {
        Task::Setup => setup::run(&project),
        Task::Build { profile } => {
            setup::run(&project)?;
            build::all(&project, &profile)
        }
        Task::Images {
            names,
            profile,
            no_build,
        } => images::run(&project, &profile, &names, !no_build),
        Task::Image(recipe) => images::foreign::run(&project, recipe),
        Task::Up { profile, args } => {
            need_root("make up")?;
            setup::run(&project)?;
            build::all(&project, &profile)?;
            images::run(&project, &profile, &[], false)?;
            keelway(&project, &profile, "up", &args)
        }
        Task::Down { profile, args } => {
            need_root("make down")?;
            // A clone that was cleaned still has to be able to remove its cluster.
            if !project.bin_dir(&profile).join("keelway").exists() {
                build::packages(&project, &profile, &["keelway"])?;
            }
            keelway(&project, &profile, "down", &args)
        }
        Task::Test { profile, args } => {
            setup::run(&project)?;
            if args.is_empty() {
                check::lint(&project)?;
                tidy::run(&project)?;
                check::fuzz(&project)?;
            }
            build::all(&project, &profile)?;
            images::run(&project, &profile, &[], false)?;
            check::test(&project, &profile, &args)
        }
        Task::Bench { profile, args } => {
            need_root("make bench")?;
            setup::run(&project)?;
            build::all(&project, &profile)?;
            images::run(&project, &profile, &[], false)?;
            let mut bench = Command::new(project.bin_dir(&profile).join("keelway-bench"));
            process::become_command(environment(&mut bench, &project, &profile).args(&args))
        }
        Task::Gate { update, profile } => {
            setup::run(&project)?;
            build::packages(&project, &profile, &["keelway-bench"])?;
            let mut bench = Command::new(project.bin_dir(&profile).join("keelway-bench"));
            bench.arg("gate").current_dir(&project.root);
            if update {
                bench.arg("--update");
            }
            process::become_command(&mut bench)
        }
        Task::Fuzz { names, seconds } => {
            fuzz::run(&project, &names, fuzz::Effort::Seconds(seconds))
        }
        Task::Lint => {
            setup::run(&project)?;
            check::lint(&project)?;
            tidy::run(&project)
        }
        Task::Tidy => tidy::run(&project),
        Task::GenerateRegistry { from } => registry::generate(
            &from,
            &project.root.join("controlplane/src/registry/generated"),
        ),
        Task::GenerateDescriptions { from } => registry::descriptions::generate(
            &from,
            &project
                .root
                .join("controlplane/src/registry/generated/descriptions.gz"),
        ),
    }
}

/// Asked before anything is built or installed, so that a refusal leaves nothing half made.
fn need_root(what: &str) -> Result<()> {
    if process::is_root() {
        return Ok(());
    }
    bail!(
        "{what} needs root: it makes namespaces, loads eBPF programs and runs containerd. Try `sudo -E {what}`"
    );
}

fn keelway(project: &Project, profile: &str, verb: &str, args: &[String]) -> Result<()> {
    let mut command = Command::new(project.bin_dir(profile).join("keelway"));
    process::become_command(
        environment(&mut command, project, profile)
            .arg(verb)
            .args(args),
    )
}

/// What our programs and tests read to find the build they belong to.
fn environment<'a>(command: &'a mut Command, project: &Project, profile: &str) -> &'a mut Command {
    command
        .env("KEELWAY_BIN_DIR", project.bin_dir(profile))
        .env("KEELWAY_IMAGES_DIR", project.images_dir())
        .env("KEELWAY_CLIENTS_DIR", project.clients_dir())
}
