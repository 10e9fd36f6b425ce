//! Services of type LoadBalancer where no cloud gives addresses: asked from beside the nodes, as a router or an office would.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use keelway_tests::cluster::Cluster;
use keelway_tests::process::{Finished, eventually};
use serde_json::{Value, json};

use crate::operate::agents;
use crate::services::on_node;

const CONFIG: &str = "keelway-config";
const LEASE: &str = "keelway-load-balancer";
/// Within this another node serves what a node served that is cut off.
const MOVED_WITHIN: Duration = Duration::from_secs(2);

/// Two addresses of the nodes' own subnet, which nobody has.
fn pool(cluster: &Cluster) -> [Ipv4Addr; 2] {
    let nodes = cluster.get(&["nodes"]);
    let addresses = nodes["items"][0]["status"]["addresses"].as_array();
    let internal = addresses
        .into_iter()
        .flatten()
        .find(|address| address["type"] == "InternalIP")
        .and_then(|address| address["address"].as_str()?.parse::<Ipv4Addr>().ok())
        .expect("a node has an address");
    let [a, b, c, _] = internal.octets();
    [200, 201].map(|last| Ipv4Addr::new(a, b, c, last))
}

pub fn apply(cluster: &Cluster, object: &Value) {
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], &object.to_string())
        .ok();
}

fn balanced(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"type": "LoadBalancer", "selector": {"app": "hello"}, "ports": [{"port": 80, "targetPort": "http"}]},
    })
}

/// The address that a Service was given.
fn given(cluster: &Cluster, name: &str) -> Result<Ipv4Addr, String> {
    let service = cluster.get(&["service", name]);
    let ingress = &service["status"]["loadBalancer"]["ingress"][0];
    let address = ingress["ip"].as_str().and_then(|ip| ip.parse().ok());
    address.ok_or_else(|| service["status"].to_string())
}

/// Events about a Service, as `reason: note`.
fn told(cluster: &Cluster, name: &str) -> Vec<String> {
    let selector = format!("involvedObject.kind=Service,involvedObject.name={name}");
    let events = cluster.get(&["events", "--field-selector", &selector]);
    let events = events["items"].as_array().cloned().unwrap_or_default();
    let text = |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
    events
        .iter()
        .map(|event| format!("{}: {}", text(event, "reason"), text(event, "message")))
        .collect()
}

pub fn is_told(cluster: &Cluster, name: &str, words: &str) {
    eventually(words, Duration::from_secs(20), || {
        let told = told(cluster, name);
        let found = told.iter().any(|event| event.contains(words));
        found.then_some(()).ok_or_else(|| format!("{told:?}"))
    });
}

/// A request from beside the nodes.
fn from_outside(cluster: &Cluster, address: Ipv4Addr, patience_s: u32) -> Finished {
    let (_, pid) = cluster.control_plane();
    on_node(pid, &format!("WGET -T {patience_s} -qO- http://{address}/"))
}

/// The node whose agent says that it answers for an address.
fn answering(cluster: &Cluster, address: Ipv4Addr) -> String {
    eventually("one node that answers", Duration::from_secs(20), || {
        let announced: BTreeMap<String, Value> = agents(cluster)
            .into_iter()
            .map(|(node, agent)| {
                let report = agent.json(cluster, &["status", "-o", "json"]);
                (node, report["announced"].clone())
            })
            .collect();
        let has = |announced: &Value| {
            let all = announced.as_array().into_iter().flatten();
            all.clone().any(|one| *one == json!(address))
        };
        let all: Vec<&String> = announced
            .iter()
            .filter(|(_, announced)| has(announced))
            .map(|(node, _)| node)
            .collect();
        match all[..] {
            [node] => Ok(node.clone()),
            _ => Err(format!("{announced:?}")),
        }
    })
}

pub fn a_service_gets_an_address_that_answers_from_outside(cluster: &Cluster) {
    let pool = pool(cluster);
    let [first, last] = pool;
    let pools = format!("pools: [{{name: link, addresses: [{first}-{last}]}}]");
    apply(
        cluster,
        &json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": CONFIG, "namespace": "kube-system"},
            "data": {"loadBalancer": pools},
        }),
    );
    for name in ["balanced-1", "balanced-2"] {
        apply(cluster, &balanced(name));
        let address = eventually("an address", Duration::from_secs(30), || {
            given(cluster, name)
        });
        assert!(pool.contains(&address), "{address}");
        let answer = eventually("an answer from outside", Duration::from_secs(20), || {
            let finished = from_outside(cluster, address, 2);
            if finished.success {
                Ok(finished.stdout)
            } else {
                Err(finished.to_string())
            }
        });
        assert!(answer.contains("pod=hello-"), "{answer}");
        let answer = cluster
            .in_client(&format!("wget -T 5 -qO- http://{address}/"))
            .ok();
        assert!(answer.contains("pod=hello-"), "{answer}");
        is_told(
            cluster,
            name,
            &format!("AddressAssigned: Assigned {address}"),
        );
    }
    // The pool is empty: that is told, and what goes makes room.
    apply(cluster, &balanced("balanced-3"));
    is_told(cluster, "balanced-3", "AddressNotAssigned: ");
    given(cluster, "balanced-3").expect_err("there is none");
    cluster.kubectl(&["delete", "service", "balanced-2"]).ok();
    eventually("the address that is free", Duration::from_secs(20), || {
        given(cluster, "balanced-3")
    });
    // A type that changes gives its address back.
    let patch = r#"{"spec": {"type": "ClusterIP"}}"#;
    cluster
        .kubectl(&["patch", "service", "balanced-3", "--patch", patch])
        .ok();
    eventually("no address", Duration::from_secs(20), || {
        match given(cluster, "balanced-3") {
            Ok(address) => Err(address.to_string()),
            Err(_) => Ok(()),
        }
    });
    cluster.kubectl(&["delete", "service", "balanced-3"]).ok();
    // A configuration that is wrong changes nothing, and is told by every agent.
    let wrong = r#"{"data": {"loadBalancer": "pools: [{name: link, addresses: [198.18.0.9-198.18.0.1]}]"}}"#;
    let set = |patch: &str| {
        let map = ["configmap", CONFIG, "--namespace", "kube-system"];
        let patch = ["--patch", patch];
        cluster
            .kubectl(&[&["patch"], &map[..], &patch[..]].concat())
            .ok();
    };
    set(wrong);
    for (_, agent) in agents(cluster) {
        eventually("the problem", Duration::from_secs(20), || {
            let report = agent.json(cluster, &["status", "-o", "json"]);
            let problems = report["problems"].to_string();
            if problems.contains("load balancer") && problems.contains(CONFIG) {
                Ok(())
            } else {
                Err(problems)
            }
        });
    }
    let address = given(cluster, "balanced-1").expect("it keeps its address");
    assert!(from_outside(cluster, address, 5).success);
    set(&json!({"data": {"loadBalancer": pools}}).to_string());
}

pub fn another_agent_gives_out_addresses_when_the_holder_of_the_lease_is_gone(cluster: &Cluster) {
    let lease = ["lease", LEASE, "--namespace", "kube-system"];
    let holder = || {
        let lease = cluster.get(&lease);
        lease["spec"]["holderIdentity"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let nodes: Vec<String> = agents(cluster).into_keys().collect();
    assert!(nodes.contains(&holder()), "{}", holder());
    // As if somebody else had taken it and died: whoever had it stops, and after a second of silence one of them takes over.
    let gone = r#"{"spec": {"holderIdentity": "gone", "leaseDurationSeconds": 1}}"#;
    let patch = [&["patch"], &lease[..], &["--type=merge", "--patch", gone]].concat();
    cluster.kubectl(&patch).ok();
    let next = eventually("another holder", Duration::from_secs(40), || {
        let holder = holder();
        nodes
            .contains(&holder)
            .then(|| holder.clone())
            .ok_or(holder)
    });
    apply(cluster, &balanced("balanced-4"));
    let address = eventually("an address", Duration::from_secs(30), || {
        given(cluster, "balanced-4")
    });
    println!("         {next} holds the lease and gave out {address}");
    cluster.kubectl(&["delete", "service", "balanced-4"]).ok();
}

pub fn an_address_is_served_by_another_node_when_its_node_is_cut_off(cluster: &Cluster) {
    let address = given(cluster, "balanced-1").expect("it has an address");
    let before = answering(cluster, address);
    let (_, pid) = cluster.control_plane();
    // The switch between the nodes is there, with a port that has the name of each.
    let link = |state: &str| on_node(pid, &format!("ip link set {before} {state}")).ok();
    assert!(from_outside(cluster, address, 2).success);
    // Endpoints that are cut off too refuse nobody, but do not answer: enough tries find another one.
    link("down");
    let cut = Instant::now();
    let moved = eventually("an answer", Duration::from_secs(20), || {
        let asked = cut.elapsed();
        let finished = from_outside(cluster, address, 1);
        finished.success.then_some(asked).ok_or(finished.stderr)
    });
    link("up");
    println!("         served {moved:?} after {before} was cut off");
    // A try may take a second, as it does when its endpoint is on the node that is cut off.
    assert!(moved < MOVED_WITHIN * 3, "after {moved:?}");
    eventually("its own node again", Duration::from_secs(20), || {
        let now = answering(cluster, address);
        if now == before { Ok(()) } else { Err(now) }
    });
    cluster.kubectl(&["delete", "service", "balanced-1"]).ok();
    let map = ["configmap", CONFIG, "--namespace", "kube-system"];
    cluster.kubectl(&[&["delete"], &map[..]].concat()).ok();
}
