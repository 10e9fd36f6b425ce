//! A cluster of three control planes on an etcd of three members: any one of them can go.

mod upgrade;
mod workers;

use std::time::{Duration, Instant};

use keelway_tests::cluster::Cluster;
use keelway_tests::machine::processes;
use keelway_tests::process::eventually;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Leases of controllers and scheduler end 15 s after their holder, and pods take their time.
const TAKEOVER: Duration = Duration::from_secs(60);
/// How long a request may take that is sent while a control plane ends: its first try may go to that one.
const REQUEST: Duration = Duration::from_secs(20);

fn ready(cluster: &Cluster, deployment: &str) -> i64 {
    let found = cluster.get(&["deployment", deployment]);
    found["status"]["readyReplicas"]
        .as_i64()
        .unwrap_or_default()
}

/// Scales, which takes controllers, scheduler and kubelets, and checks that the example answers by its name.
fn works(cluster: &Cluster, replicas: i64) {
    let scale = format!("--replicas={replicas}");
    eventually("a write is answered", REQUEST, || {
        let scaled = cluster.kubectl(&["scale", "deployment", "hello", &scale]);
        scaled.success.then_some(()).ok_or(scaled.stderr)
    });
    eventually("all replicas are ready", TAKEOVER, || {
        let ready = ready(cluster, "hello");
        (ready == replicas)
            .then_some(())
            .ok_or(format!("{ready} are"))
    });
    let said =
        cluster.in_client("for i in $(seq 10); do wget -T 5 -qO- http://hello/ || exit 1; done");
    assert!(said.success, "{said}");
}

fn control_planes(cluster: &Cluster) -> Vec<(String, Value)> {
    let status = cluster.status();
    let nodes = status["nodes"].as_array().expect("nodes").iter();
    let mine = nodes.filter(|node| node["controlPlane"] == true && node["name"] != "switch");
    mine.map(|node| {
        (
            node["name"].as_str().unwrap_or_default().to_owned(),
            node.clone(),
        )
    })
    .collect()
}

#[test]
fn any_one_of_three_control_planes_can_be_lost() {
    let name = format!("three-{}", std::process::id());
    let arguments = ["--nodes", "2", "--control-planes", "3", "--store", "etcd"];
    let Some(cluster) = Cluster::own(&name, &arguments) else {
        return;
    };
    cluster.run_example();
    let servers = cluster.get(&["endpoints", "kubernetes"]);
    let addresses = servers["subsets"][0]["addresses"]
        .as_array()
        .map_or(0, Vec::len);
    assert_eq!(addresses, 3, "{servers}");
    assert_eq!(control_planes(&cluster).len(), 3);

    // Its processes die, and PID 1 starts them again.
    for process in processes(&format!("{name}/control-plane-2"), "") {
        if process.name.starts_with("etcd") || process.name.starts_with("keelway-control") {
            kill(Pid::from_raw(process.pid), Signal::SIGKILL).expect("killed");
        }
    }
    works(&cluster, 4);

    // The one that leads, if it is the first, goes for good, with its member of the store.
    let (first, node) = control_planes(&cluster).into_iter().next().expect("one");
    assert_eq!(first, "control-plane");
    let pid = i32::try_from(node["pid"].as_i64().expect("it runs")).expect("a pid");
    let began = Instant::now();
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("killed");
    works(&cluster, 6);
    println!("without {first}, all work after {:?}", began.elapsed());
    // Nodes stay Ready: their kubelets find another server.
    let nodes = cluster.get(&["nodes"]);
    for node in nodes["items"].as_array().expect("a list") {
        let conditions = node["status"]["conditions"].as_array().expect("conditions");
        let ready = conditions
            .iter()
            .find(|condition| condition["type"] == "Ready");
        assert_eq!(ready.expect("one")["status"], "True", "{node}");
    }
    eventually("the lost server is led to no more", TAKEOVER, || {
        let servers = cluster.get(&["endpoints", "kubernetes"]);
        let left = servers["subsets"][0]["addresses"]
            .as_array()
            .map_or(0, Vec::len);
        (left == 2).then_some(()).ok_or(servers.to_string())
    });
}
