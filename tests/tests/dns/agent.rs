//! One watch per node: the agent tells the server of the cluster, and is not missed when it is gone.
//!
//! Agent and server have an API server each, so that it shows who asked which. The agent's Node does not exist: it looks, and touches nothing.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use keelway_tests::cluster::program;
use keelway_tests::lists::{ListServer, services};
use keelway_tests::process::eventually;
use keelway_tests::sandbox::is_root;
use serde_json::{Value, json};

use crate::support::{Clients, NOERROR, NXDOMAIN, Server, api, ask, service_name};

const PATIENCE: Duration = Duration::from_secs(30);

struct Agent {
    folder: tempfile::TempDir,
    kubeconfig: PathBuf,
    child: Option<Child>,
}

impl Agent {
    fn new(api: &ListServer) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let kubeconfig = api.kubeconfig(folder.path()).expect("a kubeconfig");
        Self {
            folder,
            kubeconfig,
            child: None,
        }
    }

    fn socket(&self) -> String {
        let path = self.folder.path().join("cluster/watch.sock");
        path.display().to_string()
    }

    /// Starts a worker without a supervisor, so that what is killed is all that there is.
    fn start(&mut self) {
        let path = |name: &str| self.folder.path().join(name);
        let child = Command::new(program("keelway-agent"))
            .args([
                "worker",
                "--node-name",
                "nobody",
                "--healthz-bind-address",
                "",
            ])
            .args(["--socket-lb", "off", "--kubeconfig"])
            .arg(&self.kubeconfig)
            .arg("--socket")
            .arg(path("agent.sock"))
            .arg("--state-dir")
            .arg(path("state"))
            .arg("--pin-root")
            .arg(path("pins"))
            .arg("--cni-conf-dir")
            .arg(path("cni"))
            .env("RUST_LOG", "error")
            .stdin(Stdio::null())
            .spawn()
            .expect("keelway-agent starts");
        self.child = Some(child);
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("it can be killed");
            child.wait().expect("it ends");
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The same Services with all of their versions, and one more at the end when `extra`.
fn set(api: &ListServer, count: usize, version: u64) {
    let [mut listed, mut slices] = services(count, 2);
    for object in listed.iter_mut().chain(&mut slices) {
        object["metadata"]["resourceVersion"] = Value::from(version.to_string());
    }
    api.set("services", listed);
    api.set("endpointslices", slices);
    api.set(
        "nodes",
        vec![json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "other"}})],
    );
    api.expire();
}

fn from_agent(server: &Server) -> Result<bool, String> {
    let metrics = server.http("/metrics")?;
    Ok(metrics
        .lines()
        .any(|line| line == "keelway_dns_from_agent 1"))
}

fn wait_source(server: &Server, agent: bool) {
    eventually("the other source", PATIENCE, || match from_agent(server)? {
        now if now == agent => Ok(()),
        now => Err(format!("from the agent: {now}")),
    });
}

fn wait_answer(server: &Server, i: usize, expected: (u8, u8)) {
    eventually("the news", PATIENCE, || {
        match ask(server.address, &service_name(i)) {
            Some(answer) if answer == expected => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

fn start(agent: &Agent, kubeconfig: &Path) -> Server {
    Server::start(kubeconfig, &["--threads", "1", "--agent", &agent.socket()])
}

#[test]
fn an_agent_is_listened_to_and_killed_again_and_again_without_a_list_or_a_wrong_answer() {
    // What an agent opens, only root may.
    if !is_root("agent") {
        return;
    }
    let (own, _folder, kubeconfig) = api(200, 2);
    let agents_api = ListServer::start().expect("a free port");
    set(&agents_api, 200, 10);
    let mut agent = Agent::new(&agents_api);
    agent.start();
    eventually("the agent's socket", PATIENCE, || {
        if Path::new(&agent.socket()).exists() {
            Ok(())
        } else {
            Err("absent".to_owned())
        }
    });
    let server = start(&agent, &kubeconfig);
    server.wait_ready();
    wait_source(&server, true);
    // By what happens while it listens.
    set(&agents_api, 201, 11);
    wait_answer(&server, 200, (NOERROR, 1));
    let address = server.address;
    let clients = Clients::start(2, 200, move || address);
    for round in 0..5 {
        agent.kill();
        let count = 202 + round;
        set(&agents_api, count, 12 + round as u64);
        agent.start();
        wait_answer(&server, count - 1, (NOERROR, 1));
    }
    wait_source(&server, true);
    let counts = clients.finish();
    assert!(
        counts.good > 1000 && counts.denied + counts.servfail + counts.unanswered == 0,
        "{counts:?}"
    );
    assert_eq!(
        own.lists(),
        0,
        "the API server was asked by the agent alone"
    );
}

#[test]
fn without_its_agent_the_server_watches_and_an_agent_that_knows_less_is_not_believed() {
    // What an agent opens, only root may.
    if !is_root("agent") {
        return;
    }
    let agents_api = ListServer::start().expect("a free port");
    let own = ListServer::start().expect("a free port");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let kubeconfig = own.kubeconfig(folder.path()).expect("a kubeconfig");
    set(&agents_api, 200, 10);
    set(&own, 200, 10);
    let mut agent = Agent::new(&agents_api);
    let server = start(&agent, &kubeconfig);
    // Where no agent has ever been, none is waited for.
    server.wait_ready();
    assert!(!from_agent(&server).expect("metrics") && own.lists() >= 2);
    agent.start();
    wait_source(&server, true);
    let address = server.address;
    let clients = Clients::start(2, 200, move || address);
    // It stays away, so the server watches by itself, and learns what no agent knows.
    agent.kill();
    set(&own, 202, 20);
    wait_answer(&server, 201, (NOERROR, 1));
    agent.start();
    let end = Instant::now() + Duration::from_secs(4);
    while Instant::now() < end {
        assert_eq!(
            ask(address, &service_name(201)),
            Some((NOERROR, 1)),
            "the zone went back in time"
        );
        assert!(!from_agent(&server).expect("metrics"), "it was believed");
    }
    // It catches up: what it knows counts from then on, and the server's own watch has ended.
    set(&agents_api, 201, 30);
    wait_source(&server, true);
    wait_answer(&server, 201, (NXDOMAIN, 0));
    let lists = own.lists();
    own.expire();
    set(&agents_api, 203, 31);
    wait_answer(&server, 202, (NOERROR, 1));
    assert_eq!(own.lists(), lists, "nobody watches there any more");
    let counts = clients.finish();
    assert!(
        counts.good > 1000 && counts.denied + counts.servfail + counts.unanswered == 0,
        "{counts:?}"
    );
}
