//! The cluster that an end-to-end suite works on: one that it starts, the running one that `KEELWAY_E2E_CLUSTER` names, or
//! any Kubernetes by `KEELWAY_E2E_KUBECONFIG`.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::process::{Finished, Running, run, run_with_input};

/// Any cluster; what needs the machine below it is skipped.
const KUBECONFIG: &str = "KEELWAY_E2E_KUBECONFIG";
/// A cluster of `keelway up` on this machine, by name; it is left running.
const RUNNING: &str = "KEELWAY_E2E_CLUSTER";
const UP_SECONDS_MAX: u32 = 300;
const KUBECTL_SECONDS_MAX: u32 = 120;

/// The folder with kubectl and helm that `cargo xtask test` names; what it lacks is taken from PATH.
const CLIENTS: &str = "KEELWAY_CLIENTS_DIR";

/// Whose a cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// This suite started it and takes it away.
    Own,
    /// It was up on this machine before.
    Found,
    /// It may be anywhere.
    Given,
}

/// A running cluster.
pub struct Cluster {
    pub name: String,
    kubeconfig: PathBuf,
    origin: Origin,
    /// Holds the kubeconfig, unless that was given.
    _folder: Option<tempfile::TempDir>,
}

impl Cluster {
    /// The cluster of this run. None, with a word about it, when there is none to be had here.
    pub fn obtain(name: &str, arguments: &[&str]) -> Option<Cluster> {
        if let Some(kubeconfig) = std::env::var_os(KUBECONFIG) {
            return Some(Cluster {
                name: name.to_owned(),
                kubeconfig: kubeconfig.into(),
                origin: Origin::Given,
                _folder: None,
            });
        }
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        let folder = tempfile::tempdir().expect("there is room for a temporary folder");
        let running = std::env::var(RUNNING).ok();
        let mut cluster = Cluster {
            name: running.clone().unwrap_or_else(|| name.to_owned()),
            kubeconfig: folder.path().join("kubeconfig"),
            origin: Origin::Found,
            _folder: Some(folder),
        };
        if running.is_some() {
            let keelway = keelway().display().to_string();
            let text = run(&[&keelway, "kubeconfig", "--name", &cluster.name], &[], 30).ok();
            std::fs::write(&cluster.kubeconfig, text)
                .expect("a temporary folder can be written to");
        } else {
            // When it fails, what it made it has removed; a cluster of this name that it did not make is not ours to.
            print!("{}", cluster.up(&inside(arguments)).ok());
            cluster.origin = Origin::Own;
        }
        Some(cluster)
    }

    /// A cluster that is made for the caller, whatever the rest of the suite works on. None, with a word about it, where there is
    /// none to be had.
    pub fn own(name: &str, arguments: &[&str]) -> Option<Cluster> {
        Self::reaching_out(name, &inside(arguments))
    }

    /// [`Cluster::own`] with a forwarder, unless the arguments are against it: for callers in a network namespace of their own, which is
    /// what the cluster reaches then.
    pub fn reaching_out(name: &str, arguments: &[&str]) -> Option<Cluster> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        let folder = tempfile::tempdir().expect("there is room for a temporary folder");
        let mut cluster = Cluster {
            name: name.to_owned(),
            kubeconfig: folder.path().join("kubeconfig"),
            origin: Origin::Found,
            _folder: Some(folder),
        };
        print!("{}", cluster.up(arguments).ok());
        cluster.origin = Origin::Own;
        Some(cluster)
    }

    /// `keelway up` for this cluster's name, with its contexts in a file of its own.
    pub fn up(&self, arguments: &[&str]) -> Finished {
        let keelway = keelway().display().to_string();
        let mut command = vec![keelway.as_str(), "up", "--name", &self.name];
        command.extend(arguments);
        self.run_keelway(&command, UP_SECONDS_MAX)
    }

    /// Where its administrator's credentials are.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Where its state is on this machine.
    pub fn folder(&self) -> PathBuf {
        let all = std::env::var_os("KEELWAY_STATE_DIR");
        let all = all.map_or_else(|| "/var/lib/keelway".into(), PathBuf::from);
        all.join("clusters").join(&self.name)
    }

    /// `keelway down`.
    pub fn down(&self) -> Finished {
        let keelway = keelway().display().to_string();
        self.run_keelway(&[&keelway, "down", "--name", &self.name], 60)
    }

    fn run_keelway(&self, command: &[&str], seconds_max: u32) -> Finished {
        let kubeconfig = self.kubeconfig.display().to_string();
        run(command, &[("KUBECONFIG", &kubeconfig)], seconds_max)
    }

    /// Whether its nodes are on this machine, and so can be looked at.
    pub fn is_here(&self) -> bool {
        self.origin != Origin::Given
    }

    /// Whether this suite started it.
    pub fn is_own(&self) -> bool {
        self.origin == Origin::Own
    }

    pub fn kubectl(&self, arguments: &[&str]) -> Finished {
        self.kubectl_with_input(arguments, "")
    }

    pub fn kubectl_with_input(&self, arguments: &[&str], input: &str) -> Finished {
        let kubeconfig = self.kubeconfig.display().to_string();
        let kubectl = client("kubectl");
        let mut command = vec![kubectl.as_str(), "--kubeconfig", &kubeconfig];
        command.extend(arguments);
        run_with_input(&command, &[], KUBECTL_SECONDS_MAX, input)
    }

    /// A client that reads the kubeconfig from its environment.
    pub fn run(&self, command: &[&str], environment: &[(&str, &str)]) -> Finished {
        let kubeconfig = self.kubeconfig.display().to_string();
        let mut all = vec![("KUBECONFIG", kubeconfig.as_str())];
        all.extend(environment);
        run(command, &all, KUBECTL_SECONDS_MAX)
    }

    /// kubectl beside the test, for what goes on until it is stopped.
    pub fn kubectl_running(&self, arguments: &[&str]) -> Running {
        let kubeconfig = self.kubeconfig.display().to_string();
        let kubectl = client("kubectl");
        let mut command = vec![kubectl.as_str(), "--kubeconfig", &kubeconfig];
        command.extend(arguments);
        Running::start(&command, &[])
    }

    /// The command line of kubectl for this cluster, for programs that run kubectl themselves.
    pub fn kubectl_line(&self, arguments: &str) -> String {
        format!(
            "{} --kubeconfig {} {arguments}",
            client("kubectl"),
            self.kubeconfig.display()
        )
    }

    /// Puts the project's example into the cluster, and waits until its replicas and the client run.
    #[track_caller]
    pub fn run_example(&self) {
        let example = project().join("examples/hello.yaml").display().to_string();
        self.kubectl(&["apply", "-f", &example]).ok();
        self.kubectl(&["rollout", "status", "deploy/hello", "--timeout=90s"])
            .ok();
        let ready = [
            "wait",
            "--for=condition=Ready",
            "pod/client",
            "--timeout=60s",
        ];
        self.kubectl(&ready).ok();
    }

    /// An object or list, as JSON.
    #[track_caller]
    pub fn get(&self, arguments: &[&str]) -> Value {
        let mut command = vec!["get", "--output", "json"];
        command.extend(arguments);
        let text = self.kubectl(&command).ok();
        serde_json::from_str(&text).expect("kubectl prints JSON")
    }

    /// Runs a shell script in the client pod.
    pub fn in_client(&self, script: &str) -> Finished {
        self.kubectl(&["exec", "client", "--", "sh", "-c", script])
    }

    /// What `keelway status` tells of this cluster.
    #[track_caller]
    pub fn status(&self) -> Value {
        let keelway = keelway().display().to_string();
        let command = [
            keelway.as_str(),
            "status",
            "--name",
            &self.name,
            "--output",
            "json",
        ];
        let finished = self.run_keelway(&command, 30);
        // It fails when not everything is healthy, and still tells.
        let all: Value = serde_json::from_str(&finished.stdout)
            .unwrap_or_else(|_| panic!("no status: {finished}"));
        all[0].clone()
    }

    /// Worker nodes: name and PID 1, as the machine numbers it.
    #[track_caller]
    pub fn workers(&self) -> Vec<(String, i64)> {
        self.nodes(false)
    }

    /// The control plane's node, which is beside the workers on their link: name and PID 1.
    #[track_caller]
    pub fn control_plane(&self) -> (String, i64) {
        let found = self.nodes(true).into_iter().next();
        found.expect("a cluster has a control plane")
    }

    #[track_caller]
    fn nodes(&self, control_plane: bool) -> Vec<(String, i64)> {
        let status = self.status();
        status["nodes"]
            .as_array()
            .expect("a status has nodes")
            .iter()
            .filter(|node| node["controlPlane"] == control_plane)
            .map(|node| {
                let name = node["name"].as_str().expect("a node has a name");
                (name.to_owned(), node["pid"].as_i64().expect("a node runs"))
            })
            .collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.is_own() {
            let finished = self.down();
            // A test that fails already has its own message.
            if !finished.success && !std::thread::panicking() {
                panic!("{finished}");
            }
        }
    }
}

/// Arguments for a cluster that asks nobody outside for images: what a test mistypes is to stay on this machine.
fn inside<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    [&["--no-pull"], arguments].concat()
}

/// A client of Kubernetes by name: the suite's own, else the machine's.
pub fn client(name: &str) -> String {
    let own = std::env::var_os(CLIENTS).map(|folder| PathBuf::from(folder).join(name));
    own.filter(|program| program.is_file())
        .map_or_else(|| name.to_owned(), |program| program.display().to_string())
}

/// The folder with Keelway's own images, as archives.
pub fn images() -> PathBuf {
    std::env::var_os("KEELWAY_IMAGES_DIR")
        .map_or_else(|| project().join("target/images"), PathBuf::from)
}

/// The keelway binary.
pub fn keelway() -> PathBuf {
    program("keelway")
}

/// A binary of this build: where `cargo xtask test` says, else where cargo has built this test.
pub fn program(name: &str) -> PathBuf {
    let folder = match std::env::var_os("KEELWAY_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => std::env::current_exe()
            .ok()
            .and_then(|test| Some(test.parent()?.parent()?.to_path_buf()))
            .expect("a test lies in deps/ of its profile's folder"),
    };
    let program = folder.join(name);
    assert!(
        program.exists(),
        "{} is not built; run the end-to-end suite with `make test`",
        program.display()
    );
    program
}

/// The project's root folder.
pub fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests lie in the project")
}
