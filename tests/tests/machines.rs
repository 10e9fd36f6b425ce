//! Machines that become nodes of a cluster: `keelway server`, `join`, `token`, `start` and `leave`, with network namespaces as
//! machines. Each has its own state folder, as a machine has its /var.

use std::path::{Path, PathBuf};
use std::time::Duration;

use keelway_tests::cluster::{client, images, keelway, project};
use keelway_tests::process::{Finished, Running, eventually, run, run_with_input};
use keelway_tests::sandbox::{Network, Sandbox, ip, is_root};
use serde_json::Value;

const UP_TIMEOUT: Duration = Duration::from_secs(150);
const CHANGE_TIMEOUT: Duration = Duration::from_secs(40);

/// A machine: a network on the bridge of the test's own namespace, and a folder for its state.
struct Machine {
    name: String,
    address: String,
    network: Network,
    state: PathBuf,
}

/// A namespace of the test's own, with the bridge that machines are on.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::enter().expect("a sandbox");
    ip("link add machines type bridge").expect("a bridge");
    ip("link set machines up").expect("up");
    ip("address add 198.18.230.254/24 dev machines").expect("an address");
    sandbox
}

impl Machine {
    fn new(folder: &Path, number: u8) -> Machine {
        let network = Network::new().expect("a network");
        let link = format!("m{number}");
        ip(&format!(
            "link add {link} type veth peer name eth0 netns {}",
            network.path().display()
        ))
        .expect("a link");
        ip(&format!("link set {link} master machines up")).expect("on the bridge");
        let address = format!("198.18.230.{number}");
        network.run(|| {
            ip("link set eth0 up").expect("up");
            ip(&format!("address add {address}/24 dev eth0")).expect("an address");
        });
        let name = format!("m{number}-{}", std::process::id());
        Machine {
            state: folder.join(&name),
            name,
            address,
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
    fn keelway(&self, arguments: &[&str]) -> Finished {
        let keelway = keelway().display().to_string();
        let command = [&[keelway.as_str()], arguments].concat();
        let environment = self.environment();
        let environment: Vec<(&str, &str)> = environment
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        self.network.run(|| run(&command, &environment, 170))
    }

    /// Runs `keelway` in the foreground: with the test, what it made ends too.
    #[track_caller]
    fn keelway_running(&self, arguments: &[&str]) -> Running {
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

    fn join<'a>(&'a self, join: &'a [String]) -> Vec<&'a str> {
        let mut arguments: Vec<&str> = join.iter().map(String::as_str).collect();
        arguments.extend(["--node-name", &self.name, "--node-ip", &self.address]);
        arguments
    }

    /// Waits until its node's PID 1 has ended, which follows the end of the command that it belonged to.
    #[track_caller]
    fn wait_ended(&self) {
        let state = std::fs::read(self.state.join("machine/machine.json")).expect("a state");
        let state: Value = serde_json::from_slice(&state).expect("JSON");
        let process = PathBuf::from(format!("/proc/{}", state["init"]["pid"]));
        eventually("PID 1 has ended", CHANGE_TIMEOUT, || {
            let there = process.exists();
            (!there).then_some(()).ok_or("it is there".to_owned())
        });
    }

    fn kubeconfig(&self) -> String {
        self.state.join("machine/kubeconfig").display().to_string()
    }

    /// What the machine's network is made of.
    fn look(&self) -> String {
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

struct Cluster<'a> {
    server: &'a Machine,
}

impl Cluster<'_> {
    #[track_caller]
    fn kubectl(&self, arguments: &[&str]) -> Finished {
        self.kubectl_with_input(arguments, "")
    }

    #[track_caller]
    fn kubectl_with_input(&self, arguments: &[&str], input: &str) -> Finished {
        let (kubectl, kubeconfig) = (client("kubectl"), self.server.kubeconfig());
        let mut command = vec![kubectl.as_str(), "--kubeconfig", &kubeconfig];
        command.extend(arguments);
        run_with_input(&command, &[], 120, input)
    }

    #[track_caller]
    fn get(&self, arguments: &[&str]) -> Value {
        let command = [&["get", "--output", "json"], arguments].concat();
        serde_json::from_str(&self.kubectl(&command).ok()).expect("JSON")
    }

    #[track_caller]
    fn wait_ready(&self, node: &str) {
        let node = format!("node/{node}");
        self.kubectl(&["wait", "--for=condition=Ready", &node, "--timeout=90s"])
            .ok();
    }
}

/// The words behind `keelway` of the command that is printed for machines that are to join.
fn joining(line: &str) -> Vec<String> {
    let words = line.split_whitespace().skip_while(|word| *word != "join");
    words.map(str::to_owned).collect()
}

fn changed(join: &[String], flag: &str, value: &str) -> Vec<String> {
    let mut changed = join.to_vec();
    let at = join.iter().position(|word| word == flag).expect("a flag");
    changed[at + 1] = value.to_owned();
    changed
}

#[test]
fn machines_join_work_and_leave() {
    if !is_root("machines_join_work_and_leave") {
        return;
    }
    let _sandbox = sandbox();
    let folder = tempfile::tempdir().expect("a folder");
    let [first, second] = [1, 2].map(|number| Machine::new(folder.path(), number));
    let untouched = second.look();

    let server_arguments = [
        "server",
        "--name",
        "machines",
        "--node-name",
        &first.name,
        "--node-ip",
        &first.address,
        "--schedulable",
        "--foreground",
    ];
    let server = first.keelway_running(&server_arguments);
    let join = joining(&server.line_with("keelway join", UP_TIMEOUT));
    let cluster = Cluster { server: &first };
    let refused = first.keelway(&["join", &first.address, "--token", "a", "--ca-hash", "b"]);
    assert!(refused.refused().contains("is no token"));
    let twice = first.keelway(&first.join(&join)).refused();
    assert!(twice.contains("already"), "{twice}");

    // Whom nobody has sent does not get in, and leaves nothing.
    let other = format!("sha256:{}", "0".repeat(64));
    for (wrong, says) in [
        (
            changed(&join, "--ca-hash", &other),
            "not of the cluster that was meant",
        ),
        (
            changed(&join, "--token", "zzzzzz.0123456789abcdef"),
            "does not know the token",
        ),
        (changed(&join, "--ca-hash", "sha256:00"), "no hash"),
    ] {
        let refused = second.keelway(&second.join(&wrong)).refused();
        assert!(refused.contains(says), "{refused}");
        assert!(!second.state.exists(), "something is left");
    }
    let same_secret = join[3].split_once('.').expect("a token").0.to_owned() + ".0000000000000000";
    let refused = second
        .keelway(&second.join(&changed(&join, "--token", &same_secret)))
        .refused();
    assert!(refused.contains("not signed by the token"), "{refused}");
    let mut taken = second.join(&join);
    let at = taken
        .iter()
        .position(|word| *word == second.name)
        .expect("a name");
    taken[at] = &first.name;
    let refused = second.keelway(&taken).refused();
    assert!(refused.contains("that is Ready"), "{refused}");

    // A token of its own, from the machine with the control plane.
    let made = first.keelway(&["token", "create", "--ttl", "1h", "--description", "for one"]);
    let own = joining(&made.ok());
    assert!(first.keelway(&["token", "list"]).ok().contains("for one"));
    let mut arguments = second.join(&own);
    arguments.extend(["--label", "tier=two", "--foreground"]);
    let node = second.keelway_running(&arguments);
    node.line_with("is node", UP_TIMEOUT);
    cluster.wait_ready(&second.name);
    first.keelway(&["token", "delete", &own[3]]).ok();
    let labels = &cluster.get(&["node", &second.name])["metadata"]["labels"];
    assert_eq!(labels["tier"], "two");

    // What pods are for: names, Services, logs and shells, on both machines.
    let example = project().join("examples/hello.yaml").display().to_string();
    cluster.kubectl(&["apply", "-f", &example]).ok();
    cluster
        .kubectl(&["rollout", "status", "deploy/hello", "--timeout=90s"])
        .ok();
    cluster
        .kubectl(&[
            "wait",
            "--for=condition=Ready",
            "pod/client",
            "--timeout=90s",
        ])
        .ok();
    let pods = cluster.get(&["pods", "-l", "app=hello"]);
    let on = |pods: &Value, node: &str| {
        let pods = pods["items"].as_array().expect("a list");
        pods.iter()
            .filter(|pod| pod["spec"]["nodeName"] == node)
            .count()
    };
    assert!(on(&pods, &first.name) > 0 && on(&pods, &second.name) > 0);
    let script = "for i in $(seq 20); do wget -T 5 -qO- http://hello/ || exit 1; done";
    let said = cluster
        .kubectl(&["exec", "client", "--", "sh", "-c", script])
        .ok();
    let mut names: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("pod=hello-"))
        .collect();
    names.sort_unstable();
    names.dedup();
    assert!(names.len() > 1, "{said}");
    let far = pods["items"].as_array().expect("a list").iter();
    let far = far
        .clone()
        .find(|pod| pod["spec"]["nodeName"] == second.name.as_str());
    let far = far.expect("one")["metadata"]["name"]
        .as_str()
        .expect("a name");
    cluster.kubectl(&["logs", far]).ok();

    // Both certificates of the node are the cluster's, asked for by the node itself.
    let requests = cluster.get(&["csr"]);
    let requests = requests["items"].as_array().expect("a list");
    let serving = requests.iter().find(|request| {
        request["spec"]["signerName"] == "kubernetes.io/kubelet-serving"
            && request["spec"]["username"] == format!("system:node:{}", second.name)
    });
    assert_eq!(
        serving.expect("one")["status"]["conditions"][0]["type"],
        "Approved"
    );

    // The control plane's machine goes down and comes back, with all that was there.
    drop(server);
    first.wait_ended();
    let stopped = first.keelway(&["leave"]).refused();
    assert!(!stopped.is_empty());
    let server = first.keelway_running(&["start", "--foreground"]);
    eventually("the API server answers again", CHANGE_TIMEOUT, || {
        let nodes = cluster.kubectl(&["get", "nodes"]);
        nodes.success.then_some(()).ok_or(nodes.stderr)
    });
    cluster.wait_ready(&first.name);
    let only = first.keelway(&["leave"]).refused();
    assert!(only.contains("only control plane"), "{only}");

    // The second machine leaves: its pods go elsewhere, its Node goes, and so does all that it was given.
    let kubeconfig = first.kubeconfig();
    second.keelway(&["leave", "--kubeconfig", &kubeconfig]).ok();
    drop(node);
    assert!(!second.state.exists(), "its state is left");
    assert_eq!(second.look(), untouched);
    let left = cluster.get(&["nodes"]);
    assert_eq!(left["items"].as_array().expect("a list").len(), 1);
    eventually("all pods run on the first machine", CHANGE_TIMEOUT, || {
        let pods = cluster.get(&[
            "pods",
            "-l",
            "app=hello",
            "--field-selector=status.phase=Running",
        ]);
        let count = on(&pods, &first.name);
        (count == 3).then_some(()).ok_or(format!("{count}"))
    });

    first.keelway(&["leave", "--delete-cluster"]).ok();
    drop(server);
    assert!(!first.state.exists());
}

/// An etcd in the test's own namespace, which ends with the test.
fn etcd(folder: &Path) -> Running {
    let data = folder.join("etcd").display().to_string();
    let clients = "http://198.18.230.254:2379";
    let command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "etcd",
        "--data-dir",
        &data,
        "--listen-client-urls",
        clients,
        "--advertise-client-urls",
        clients,
        "--listen-peer-urls",
        "http://127.0.0.1:2380",
    ];
    Running::start(&command, &[])
}

#[test]
fn a_second_control_plane_joins_on_etcd_and_takes_over() {
    const STORE: &str = "etcd:http://198.18.230.254:2379";
    if !is_root("a_second_control_plane_joins_on_etcd_and_takes_over") {
        return;
    }
    let _sandbox = sandbox();
    let folder = tempfile::tempdir().expect("a folder");
    let [first, second] = [3, 4].map(|number| Machine::new(folder.path(), number));
    let _etcd = etcd(folder.path());
    let arguments = [
        "server",
        "--name",
        "planes",
        "--node-name",
        &first.name,
        "--node-ip",
        &first.address,
        "--schedulable",
        "--foreground",
    ];
    let server = first.keelway_running(&arguments);
    server.line_with("keelway join", UP_TIMEOUT);
    let cluster = Cluster { server: &first };
    cluster
        .kubectl(&["create", "configmap", "kept", "--from-literal=a=b"])
        .ok();

    // One machine's store is for one control plane, and both sides say what to do.
    let refused = first
        .keelway(&["token", "create", "--control-plane"])
        .refused();
    assert!(refused.contains("keelway store migrate"), "{refused}");
    let mut plain = joining(&first.keelway(&["token", "create"]).ok());
    let key = "a".repeat(64);
    plain.extend([
        "--control-plane".to_owned(),
        "--certificate-key".to_owned(),
        key,
    ]);
    let refused = second.keelway(&second.join(&plain)).refused();
    assert!(refused.contains("keelway store migrate"), "{refused}");
    assert!(!second.state.exists(), "something is left");

    first.keelway(&["stop"]).ok();
    drop(server);
    let state = first
        .state
        .join("machine/node/var/lib/keelway/controlplane");
    let from = format!("embedded:{}", state.display());
    first
        .keelway(&["store", "migrate", "--from", &from, "--to", STORE])
        .ok();
    let server = first.keelway_running(&["start", "--store", STORE, "--foreground"]);
    let offered = eventually("the cluster's keys are offered", CHANGE_TIMEOUT, || {
        let made = first.keelway(&["token", "create", "--control-plane"]);
        if made.success {
            Ok(made.stdout)
        } else {
            Err(made.stderr)
        }
    });
    let joins = joining(&offered);
    let other = changed(&joins, "--certificate-key", &"b".repeat(64));
    let refused = second.keelway(&second.join(&other)).refused();
    assert!(refused.contains("cannot be opened"), "{refused}");
    let mut arguments = second.join(&joins);
    arguments.push("--foreground");
    let joined = second.keelway_running(&arguments);
    joined.line_with("is node", UP_TIMEOUT);

    // The first one goes, with its machine; the second has the state, and nodes find it.
    first.keelway(&["leave", "--drain-timeout", "60"]).ok();
    drop(server);
    let cluster = Cluster { server: &second };
    assert_eq!(cluster.get(&["configmap", "kept"])["data"]["a"], "b");
    cluster.wait_ready(&second.name);
    let nodes = cluster.get(&["nodes"]);
    assert_eq!(nodes["items"].as_array().expect("a list").len(), 1);
    let labels = &nodes["items"][0]["metadata"]["labels"];
    assert!(
        labels
            .get("node-role.kubernetes.io/control-plane")
            .is_some()
    );
    second.keelway(&["leave", "--delete-cluster"]).ok();
    drop(joined);
}
