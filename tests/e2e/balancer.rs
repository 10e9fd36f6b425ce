//! Services of type LoadBalancer where no cloud gives addresses: asked from beside the nodes, as a router or an office would.

use std::net::Ipv4Addr;
use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::process::{Finished, eventually};
use serde_json::{Value, json};

use crate::services::on_node;

const CONFIG: &str = "keelway-config";

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
    let names = ["balanced-1", "balanced-3"];
    cluster
        .kubectl(&[&["delete", "service"], &names[..]].concat())
        .ok();
    let map = ["configmap", CONFIG, "--namespace", "kube-system"];
    cluster.kubectl(&[&["delete"], &map[..]].concat()).ok();
}
