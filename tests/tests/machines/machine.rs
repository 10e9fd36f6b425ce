//! A machine, and a cluster of machines, as the tests use them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use keelway_tests::cluster::{client, images, keelway, project};
use keelway_tests::process::{Finished, Running, eventually, run, run_with_input};
use keelway_tests::sandbox::{Network, Sandbox, ip};
use nix::unistd::Pid;
use serde_json::Value;

pub const UP_TIMEOUT: Duration = Duration::from_secs(150);
pub const CHANGE_TIMEOUT: Duration = Duration::from_secs(40);

/// A machine: a network on the bridge of the test's own namespace, and a folder for its state.
pub struct Machine {
    pub name: String,
    pub address: String,
    pub network: Network,
    pub state: PathBuf,
}

/// A namespace of the test's own, with the bridge that machines are on.
pub fn sandbox() -> Sandbox {
    let sandbox = Sandbox::enter().expect("a sandbox");
    ip("link add machines type bridge").expect("a bridge");
    ip("link set machines up").expect("up");
    ip("address add 198.18.230.254/24 dev machines").expect("an address");
    ip("address add 2001:2:0:e6::fe/64 dev machines nodad").expect("an address");
    sandbox
}

impl Machine {
    pub fn new(folder: &Path, number: u8) -> Machine {
        Self::at(folder, number, (&format!("198.18.230.{number}"), 24))
    }

    /// One that has no address but of IPv6.
    pub fn of_ipv6(folder: &Path, number: u8) -> Machine {
        Self::at(folder, number, (&format!("2001:2:0:e6::{number:x}"), 64))
    }

    fn at(folder: &Path, number: u8, (address, prefix): (&str, u8)) -> Machine {
        let network = Network::new().expect("a network");
        let link = format!("m{number}");
        ip(&format!(
            "link add {link} type veth peer name eth0 netns {}",
            network.path().display()
        ))
        .expect("a link");
        ip(&format!("link set {link} master machines up")).expect("on the bridge");
        network.run(|| {
            ip("link set eth0 up").expect("up");
            // Nobody else has it, so nothing waits until the kernel has asked around.
            let nodad = if prefix > 32 { "nodad" } else { "" };
            ip(&format!("address add {address}/{prefix} dev eth0 {nodad}")).expect("an address");
        });
        let name = format!("m{number}-{}", std::process::id());
        Machine {
            state: folder.join(&name),
            name,
            address: address.to_owned(),
            network,
        }
    }

    fn environment(&self) -> Vec<(String, String)> {
        vec![
            (
                "KEELWAY_STATE_DIR".to_owned(),
                self.state.display().to_string(),
            ),
            (
                "KEELWAY_IMAGES_DIR".to_owned(),
                images().display().to_string(),
            ),
        ]
    }

    /// Runs `keelway` on the machine, to its end.
    #[track_caller]
    pub fn keelway(&self, arguments: &[&str]) -> Finished {
        self.keelway_with_input(arguments, "")
    }

    #[track_caller]
    pub fn keelway_with_input(&self, arguments: &[&str], input: &str) -> Finished {
        let keelway = keelway().display().to_string();
        let command = [&[keelway.as_str()], arguments].concat();
        let environment = self.environment();
        let environment: Vec<(&str, &str)> = environment
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        self.network
            .run(|| run_with_input(&command, &environment, 170, input))
    }

    /// Runs `keelway` in the foreground: with the test, what it made ends too.
    #[track_caller]
    pub fn keelway_running(&self, arguments: &[&str]) -> Running {
        let keelway = keelway().display().to_string();
        // The parent is a thread: that of the test, not one that ends at once.
        let within = format!("--net={}", self.network.path().display());
        let mut command = vec![
            "setpriv",
            "--pdeathsig",
            "KILL",
            "nsenter",
            &within,
            &keelway,
        ];
        command.extend(arguments);
        let environment = self.environment();
        let environment: Vec<(&str, &str)> = environment
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        Running::start(&command, &environment)
    }

    /// Begins a cluster of a name on the machine; gives also the words of the command that others join by.
    #[track_caller]
    pub fn begin(&self, cluster: &str, more: &[&str]) -> (Running, Vec<String>) {
        let arguments = [
            "server",
            "--name",
            cluster,
            "--node-name",
            &self.name,
            "--node-ip",
            &self.address,
            "--foreground",
        ];
        let server = self.keelway_running(&[&arguments, more].concat());
        let join = joining(&server.line_with("keelway join", UP_TIMEOUT));
        (server, join)
    }

    pub fn join<'a>(&'a self, join: &'a [String]) -> Vec<&'a str> {
        let mut arguments: Vec<&str> = join.iter().map(String::as_str).collect();
        arguments.extend(["--node-name", &self.name, "--node-ip", &self.address]);
        arguments
    }

    /// Has a control plane offer the cluster's keys; gives the words of the command by which another one joins.
    #[track_caller]
    pub fn offer(&self) -> Vec<String> {
        let offered = self.keelway(&["token", "create", "--control-plane"]);
        self.take_offer(&offered.ok())
    }

    /// The same words of a line that offers that. The key is in a file.
    #[track_caller]
    pub fn take_offer(&self, line: &str) -> Vec<String> {
        let key = line.split_whitespace().skip_while(|word| *word != "echo");
        let file = self.state.with_extension("key");
        std::fs::write(&file, key.take(2).last().expect("a key")).expect("written");
        let file = file.display().to_string();
        changed(&joining(line), "--certificate-key", &file)
    }

    /// What is written down of it as a node; null before there is anything.
    pub fn known(&self) -> Value {
        let text = std::fs::read(self.state.join("machine/machine.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Waits until its node's PID 1 has ended, which follows the end of the command that it belonged to.
    #[track_caller]
    pub fn wait_ended(&self) {
        let process = PathBuf::from(format!("/proc/{}", self.known()["init"]["pid"]));
        eventually("PID 1 has ended", CHANGE_TIMEOUT, || {
            let there = process.exists();
            (!there).then_some(()).ok_or("it is there".to_owned())
        });
    }

    /// A service of its node: a child of the node's PID 1, by the name of its program.
    #[track_caller]
    pub fn service(&self, program: &str) -> Pid {
        let known = self.known();
        let init = known["init"]["pid"].as_u64().expect("a PID 1");
        let threads = format!("/proc/{init}/task/{init}/children");
        let children = std::fs::read_to_string(threads).expect("PID 1 lives");
        let is_wanted = |pid: &&str| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            program.starts_with(name.trim()) && !name.trim().is_empty()
        };
        let found = children.split_whitespace().find(is_wanted);
        let found = found.and_then(|pid| pid.parse().ok());
        Pid::from_raw(found.unwrap_or_else(|| panic!("{program} does not run: {children}")))
    }

    /// A file of its node, by its path there.
    pub fn node_file(&self, path: &str) -> PathBuf {
        self.state.join("machine/node").join(path)
    }

    pub fn kubeconfig(&self) -> String {
        self.state.join("machine/kubeconfig").display().to_string()
    }

    /// Checks that what is secret is in no log of its node and in no program's arguments: private keys, tokens of ServiceAccounts, and the
    /// tokens that machines join with.
    #[track_caller]
    pub fn hides(&self, tokens: &[&str]) {
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let files = |folder: &str| {
            let entries = std::fs::read_dir(self.node_file(folder)).expect("a folder");
            entries.flatten().map(|entry| entry.path())
        };
        let secret_half = |token: &&str| token.split_once('.').expect("a token").1.to_owned();
        let mut secrets: Vec<String> = tokens.iter().map(secret_half).collect();
        for path in files("credentials").chain(files("var/lib/kubelet/pki")) {
            let text = read(path);
            let lines: Vec<&str> = text.lines().collect();
            let keys = lines
                .windows(2)
                .filter(|pair| pair[0].contains("PRIVATE KEY--"));
            secrets.extend(keys.map(|pair| pair[1].to_owned()));
        }
        assert!(secrets.len() > tokens.len() + 1, "{secrets:?}");
        // How the head of a signed token begins, and a key in a file.
        secrets.extend(["eyJhbGciOi", "PRIVATE KEY"].map(str::to_owned));
        let logs = files("var/log/keelway").chain([self.node_file("init.log")]);
        let mut public: Vec<(String, String)> = logs
            .map(|path| (path.display().to_string(), read(path)))
            .collect();
        let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
        for process in processes.map(|process| process.path()) {
            if read(process.join("cgroup")).contains(&format!("/{}/", self.name)) {
                let arguments = read(process.join("cmdline"));
                public.push((arguments.replace('\0', " "), arguments));
            }
        }
        assert!(
            public
                .iter()
                .any(|(what, _)| what.contains("keelway-kubelet"))
        );
        for (what, text) in &public {
            let found = secrets.iter().find(|secret| text.contains(secret.as_str()));
            assert!(found.is_none(), "{found:?} is in {what}");
        }
    }

    /// What the machine's network is made of.
    pub fn look(&self) -> String {
        self.network.run(|| {
            let look = |words: &[&str]| run(words, &[], 20).ok();
            let links = look(&["ip", "-oneline", "link"]);
            let links: Vec<&str> = links
                .lines()
                .filter_map(|line| line.split(": ").nth(1))
                .collect();
            let forwarding = look(&["cat", "/proc/sys/net/ipv4/ip_forward"]);
            // IPv6 makes addresses of its own some time after a link is up.
            let routes = look(&["ip", "-4", "route", "show", "table", "all"]);
            let rules = look(&["ip", "rule"]);
            let filters = look(&["tc", "filter", "show", "dev", "eth0", "ingress"]);
            format!("{links:?}\n{forwarding}\n{routes}\n{rules}\n{filters}")
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.state.exists() {
            // A test that fails leaves a node behind.
            let finished = self.keelway(&[
                "leave",
                "--force",
                "--delete-cluster",
                "--drain-timeout",
                "1",
            ]);
            if !std::thread::panicking() {
                finished.ok();
            }
        }
    }
}

pub struct Cluster<'a> {
    pub server: &'a Machine,
}

impl Cluster<'_> {
    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> Finished {
        self.kubectl_with_input(arguments, "")
    }

    #[track_caller]
    pub fn kubectl_with_input(&self, arguments: &[&str], input: &str) -> Finished {
        let (kubectl, kubeconfig) = (client("kubectl"), self.server.kubeconfig());
        let mut command = vec![kubectl.as_str(), "--kubeconfig", &kubeconfig];
        command.extend(arguments);
        run_with_input(&command, &[], 120, input)
    }

    #[track_caller]
    pub fn get(&self, arguments: &[&str]) -> Value {
        let command = [&["get", "--output", "json"], arguments].concat();
        serde_json::from_str(&self.kubectl(&command).ok()).expect("JSON")
    }

    /// Puts the README's example into the cluster.
    #[track_caller]
    pub fn apply_hello(&self) {
        let example = project().join("examples/hello.yaml").display().to_string();
        self.kubectl(&["apply", "-f", &example]).ok();
    }

    /// Waits until as many pods as are wanted of the example are there, and its client.
    #[track_caller]
    pub fn wait_hello(&self) {
        let rollout = ["rollout", "status", "deploy/hello", "--timeout=90s"];
        self.kubectl(&rollout).ok();
        let ready = [
            "wait",
            "--for=condition=Ready",
            "pod/client",
            "--timeout=90s",
        ];
        self.kubectl(&ready).ok();
    }

    /// The pods that answer when the example's client asks the Service so many times by its name; every time somebody does.
    #[track_caller]
    pub fn who_answers(&self, times: usize) -> BTreeSet<String> {
        let script =
            format!("for i in $(seq {times}); do wget -T 5 -qO- http://hello/ || exit 1; done");
        let said = self
            .kubectl(&["exec", "client", "--", "sh", "-c", &script])
            .ok();
        let names = said.lines().filter(|line| line.contains("pod=hello-"));
        names.map(str::to_owned).collect()
    }

    #[track_caller]
    pub fn wait_ready(&self, node: &str) {
        let node = format!("node/{node}");
        self.kubectl(&["wait", "--for=condition=Ready", &node, "--timeout=90s"])
            .ok();
    }
}

/// The words behind `keelway` of the command that is printed for machines that are to join.
pub fn joining(line: &str) -> Vec<String> {
    let words = line.split_whitespace().skip_while(|word| *word != "join");
    words.map(str::to_owned).collect()
}

pub fn changed(join: &[String], flag: &str, value: &str) -> Vec<String> {
    let mut changed = join.to_vec();
    let at = join.iter().position(|word| word == flag).expect("a flag");
    changed[at + 1] = value.to_owned();
    changed
}
