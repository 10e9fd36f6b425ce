//! What operators see of the nodes of a real cluster, by the agent's own commands.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::TcpListener;
use std::time::Duration;

use keelway_tests::cluster::{Cluster, keelway};
use keelway_tests::process::{Finished, Running, eventually};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use crate::balancer::{apply, is_told};
use crate::services::on_node;

/// The agent of a node: its pod.
pub struct Agent(String);

/// The agents, by their nodes.
pub fn agents(cluster: &Cluster) -> BTreeMap<String, Agent> {
    let selector = "app.kubernetes.io/name=keelway-agent";
    let pods = cluster.get(&["pods", "-n", "kube-system", "--selector", selector]);
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    pods.iter()
        .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
        .map(|pod| {
            let agent = Agent(text(&pod["metadata"]["name"]));
            (text(&pod["spec"]["nodeName"]), agent)
        })
        .collect()
}

impl Agent {
    fn line<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        let exec = ["exec", "-n", "kube-system", &self.0, "--", "/keelway-agent"];
        [&exec, arguments].concat()
    }

    pub fn run(&self, cluster: &Cluster, arguments: &[&str]) -> Finished {
        cluster.kubectl(&self.line(arguments))
    }

    #[track_caller]
    pub fn json(&self, cluster: &Cluster, arguments: &[&str]) -> Value {
        let finished = self.run(cluster, arguments);
        serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {finished}"))
    }

    fn watch(&self, cluster: &Cluster, arguments: &[&str]) -> Running {
        cluster.kubectl_running(&self.line(arguments))
    }
}

/// The agent of the node that the client pod is on.
fn clients_agent(cluster: &Cluster) -> (String, Agent) {
    let client = cluster.get(&["pod", "client"]);
    let node = client["spec"]["nodeName"].as_str().expect("it runs");
    let agent = agents(cluster).remove(node).expect("every node has one");
    (node.to_owned(), agent)
}

pub fn services_are_listed_and_shown_with_their_pods(cluster: &Cluster) {
    let (node, agent) = clients_agent(cluster);
    let listed = agent.json(cluster, &["service", "list", "-o", "json"]);
    let listed = listed.as_array().expect("a list");
    for (namespace, name) in [
        ("default", "kubernetes"),
        ("default", "hello"),
        ("kube-system", "kube-dns"),
    ] {
        let is = |one: &&Value| one["namespace"] == namespace && one["name"] == name;
        let one = listed.iter().find(is).expect("it is listed");
        assert_eq!(one["refused"], serde_json::json!([]), "{one}");
        let active = one["ports"][0]["active"].as_array().map(Vec::len);
        assert!(active > Some(0), "{one}");
    }
    let text = agent
        .run(cluster, &["service", "list", "-n", "default"])
        .ok();
    assert!(!text.contains("kube-dns"), "{text}");
    let line = text
        .lines()
        .find(|line| line.contains(" hello "))
        .unwrap_or_default();
    assert!(line.ends_with("served"), "{text}");

    let shown = agent.run(cluster, &["service", "show", "hello"]).ok();
    let pods = cluster.get(&["pods", "--selector", "app=hello"]);
    for pod in pods["items"].as_array().expect("pods") {
        let name = pod["metadata"]["name"].as_str().expect("a name");
        assert!(shown.contains(&format!("Pod default/{name}")), "{shown}");
    }
    assert!(shown.contains(&node), "{shown}");
    let refused = agent.run(cluster, &["service", "show", "nobody"]).refused();
    assert!(refused.contains("no Service default/nobody"), "{refused}");
}

pub fn the_monitor_names_pods_services_and_reasons(cluster: &Cluster) {
    let (node, agent) = clients_agent(cluster);
    let limit = Duration::from_secs(20);
    let all = agent.watch(cluster, &["monitor", "-o", "json", "--service", "hello"]);
    let drops = agent.watch(cluster, &["monitor", "--drops", "--service", "hello"]);
    let keelway = keelway().display().to_string();
    let name = cluster.name.clone();
    let line = [
        &keelway,
        "monitor",
        "--name",
        &name,
        "--",
        "-o",
        "json",
        "--reason",
        "no_such_port",
    ];
    let everywhere = cluster.is_here().then(|| Running::start(&line, &[]));
    // Asked for again until the listeners are there.
    let ask = || {
        cluster
            .in_client("wget -T 5 -qO- http://hello/; wget -T 5 -qO- http://hello:81/")
            .refused()
    };
    let heard = |running: &Running, words: &str| -> String {
        eventually(words, limit, || {
            ask();
            running.try_line_with(words).ok_or_else(String::new)
        })
    };
    let flow: Value = serde_json::from_str(&heard(&all, "default/hello:")).expect("a line of JSON");
    assert_eq!(flow["class"], "flow", "{flow}");
    assert!(
        flow["service"]
            .as_str()
            .is_some_and(|name| name.starts_with("default/hello:")),
        "{flow}"
    );
    let backend = flow["backendName"]["pod"].as_str().unwrap_or_default();
    assert!(backend.starts_with("default/hello-"), "{flow}");
    let rejected: Value =
        serde_json::from_str(&heard(&all, "no_such_port")).expect("a line of JSON");
    assert_eq!(rejected["class"], "reject", "{rejected}");
    assert_eq!(
        rejected["sourceName"]["pod"], "default/client",
        "{rejected}"
    );
    assert_eq!(
        rejected["destinationName"]["service"], "default/hello",
        "{rejected}"
    );
    let text = heard(&drops, "no_such_port");
    assert!(
        text.contains("default/client") && text.contains("default/hello"),
        "{text}"
    );
    if let Some(everywhere) = everywhere {
        let line = heard(&everywhere, "no_such_port");
        let line: Value = serde_json::from_str(&line).expect("a line of JSON");
        assert_eq!(line["node"], json!(node), "{line}");
    }
    let wrong = agent
        .run(cluster, &["monitor", "--reason", "nothing"])
        .refused();
    assert!(wrong.contains("no_such_port"), "{wrong}");
}

pub fn flows_are_listed_by_name_and_flushed(cluster: &Cluster) {
    let manifest = "{apiVersion: v1, kind: Service, metadata: {name: flows}, spec: {type: NodePort, selector: {app: hello}, ports: [{port: 80, targetPort: http}]}}";
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], manifest)
        .ok();
    let service = cluster.get(&["service", "flows"]);
    let port = service["spec"]["ports"][0]["nodePort"]
        .as_u64()
        .expect("a node port");
    let (node, agent) = clients_agent(cluster);
    let address = cluster.get(&["node", &node])["status"]["addresses"][0]["address"]
        .as_str()
        .expect("an address")
        .to_owned();
    // From beside the nodes, so that every packet passes a hook.
    let (_, outside) = cluster.control_plane();
    let answer = eventually("an answer", Duration::from_secs(20), || {
        let finished = on_node(outside, &format!("WGET -T 2 -qO- http://{address}:{port}/"));
        if finished.success {
            Ok(finished.stdout)
        } else {
            Err(finished.stderr)
        }
    });
    let pod = answer
        .split_whitespace()
        .find_map(|word| word.strip_prefix("pod="))
        .expect("a pod answered");
    let list = |more: &[&str]| {
        let arguments = [&["conntrack", "list", "-o", "json"], more].concat();
        let listed = agent.json(cluster, &arguments);
        listed.as_array().cloned().expect("a list")
    };
    let flows = list(&["--service", "flows"]);
    let flow = flows
        .iter()
        .find(|flow| flow["backendName"]["pod"] == format!("default/{pod}"))
        .unwrap_or_else(|| panic!("no flow to {pod}: {flows:?}"));
    assert_eq!(flow["protocol"], "TCP", "{flow}");
    assert!(
        flow["service"]
            .as_str()
            .is_some_and(|name| name.starts_with("default/flows:")),
        "{flow}"
    );
    assert_eq!(flow["frontend"], format!("{address}:{port}"), "{flow}");
    assert!(!list(&["--pod", &format!("default/{pod}")]).is_empty());
    assert!(list(&["--service", "flows", "--proto", "udp"]).is_empty());
    let text = agent
        .run(cluster, &["conntrack", "list", "--service", "flows"])
        .ok();
    assert!(text.contains(&format!("default/{pod}")), "{text}");

    let careless = agent.run(cluster, &["conntrack", "flush"]).refused();
    assert!(careless.contains("--all"), "{careless}");
    agent
        .run(cluster, &["conntrack", "flush", "--service", "flows"])
        .ok();
    assert!(list(&["--service", "flows"]).is_empty());
    cluster.kubectl(&["delete", "service", "flows"]).ok();
}

pub fn services_that_cannot_have_what_they_want_are_told_so(cluster: &Cluster) {
    let (node, pid) = cluster.workers().into_iter().next().expect("a worker");
    // A process of the node listens where a Service is to have its node port.
    const NODE_PORT: u16 = 32_767;
    let squatter = std::thread::spawn(move || {
        let namespace = File::open(format!("/proc/{pid}/ns/net")).expect("the node's network");
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("it can be entered");
        TcpListener::bind(("0.0.0.0", NODE_PORT)).expect("the port")
    });
    let _squatter = squatter.join().expect("no panic");
    let service = |name: &str, node_port: Option<u16>| {
        let mut port = json!({"port": 80, "targetPort": "http"});
        if let Some(number) = node_port {
            port["nodePort"] = number.into();
        }
        let service_type = if node_port.is_some() {
            "NodePort"
        } else {
            "ClusterIP"
        };
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"type": service_type, "selector": {"app": "hello"}, "externalIPs": ["192.0.2.77"], "ports": [port]},
        })
    };
    apply(cluster, &service("contested-1", Some(NODE_PORT)));
    is_told(
        cluster,
        "contested-1",
        &format!("NodePortInUse: Node {node}"),
    );
    // An external address of two Services is the first name's.
    apply(cluster, &service("contested-2", None));
    is_told(
        cluster,
        "contested-2",
        "FrontendNotAvailable: 192.0.2.77:80",
    );
    let (_, agent) = clients_agent(cluster);
    let shown = agent.json(cluster, &["service", "show", "contested-2", "-o", "json"]);
    assert!(
        shown["refused"].to_string().contains("contested-1"),
        "{shown}"
    );
    let names = ["contested-1", "contested-2"];
    cluster
        .kubectl(&[&["delete", "service"], &names[..]].concat())
        .ok();
}

/// From the annotations by kubelet, containerd and plugin to the node's queues.
pub fn a_pods_bandwidth_is_what_its_annotations_say(cluster: &Cluster) {
    let client = cluster.get(&["pod", "client"]);
    let image = &client["spec"]["containers"][0]["image"];
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "limited", "annotations": {
            "kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "5M",
        }},
        "spec": {"terminationGracePeriodSeconds": 0, "containers": [
            {"name": "waits", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["sleep", "infinity"]},
        ]},
    });
    apply(cluster, &pod);
    let ready = [
        "wait",
        "--for=condition=Ready",
        "pod/limited",
        "--timeout=60s",
    ];
    cluster.kubectl(&ready).ok();
    let node = cluster.get(&["pod", "limited"])["spec"]["nodeName"].clone();
    let node = node.as_str().expect("it runs").to_owned();
    let agent = agents(cluster).remove(&node).expect("every node has one");
    let report = agent.json(cluster, &["status", "--output", "json"]);
    let allocations = report["allocations"].as_array().cloned();
    let mut allocations = allocations.unwrap_or_default().into_iter();
    let limited = allocations
        .find(|one| one["pod"] == "default/limited")
        .unwrap_or_else(|| panic!("{report}"));
    assert_eq!(limited["bandwidth"]["egressRate"], 5_000_000, "{limited}");
    let mut workers = cluster.workers().into_iter();
    let (_, pid) = workers.find(|(name, _)| *name == node).expect("a worker");
    let interface = limited["hostInterface"].as_str().expect("a name");
    let shown = on_node(pid, &format!("tc qdisc show dev {interface}")).ok();
    assert!(
        shown.contains("tbf") && shown.contains("rate 10Mbit"),
        "{shown}"
    );
    let gone = ["delete", "pod", "limited", "--wait=true"];
    cluster.kubectl(&gone).ok();
}
