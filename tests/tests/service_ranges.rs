//! A second range of Service addresses in a cluster of its own: what a Service there is from pods and from nodes, by its address, its name
//! and its address' name, and what an address of the range is that no Service has.

use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::process::{self, Finished, run};
use serde_json::json;

const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Waits until something is so.
#[track_caller]
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    process::eventually(what, CHANGE_TIMEOUT, || {
        is_so().then_some(()).ok_or_else(|| "not yet".to_owned())
    });
}

fn in_url(address: &str) -> String {
    match address.contains(':') {
        true => format!("[{address}]"),
        false => address.to_owned(),
    }
}

/// Runs a command in the network namespace of a node, outside its cgroup: no socket hook is asked.
fn in_node(pid: i64, command: &[&str]) -> Finished {
    let network = format!("--net=/proc/{pid}/ns/net");
    run(&[&["nsenter", &network], command].concat(), &[], 30)
}

/// The interface by which a node reaches an address.
fn way(pid: i64, address: &str) -> String {
    let found = in_node(pid, &["ip", "route", "get", address]);
    let words: Vec<&str> = found.stdout.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "dev");
    at.and_then(|at| words.get(at + 1))
        .unwrap_or(&"none")
        .to_string()
}

fn apply(cluster: &Cluster, object: &serde_json::Value) {
    let text = object.to_string();
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], &text)
        .ok();
}

/// Checks a Service with the given address of a second range, whose address `unused` nobody has.
fn check(cluster: &Cluster, name: &str, address: &str, unused: &str) {
    let (_, pid) = &cluster.workers()[0];
    eventually("the range is routed", || way(*pid, unused) == "keelway-svc");
    apply(
        cluster,
        &json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"clusterIP": address, "selector": {"app": "hello"}, "ports": [
                {"name": "http", "port": 80, "targetPort": "http"},
                {"name": "datagram", "port": 80, "protocol": "UDP", "targetPort": "datagram"}]}}),
    );
    let url = in_url(address);
    eventually("an answer at the address", || {
        let script = format!("wget -T 2 -qO- http://{url}/");
        cluster.in_client(&script).success
    });
    for host in [url.as_str(), name] {
        let script =
            format!("for i in 1 2 3 4 5; do wget -T 5 -qO- http://{host}/ || exit 1; done");
        let answers = cluster.in_client(&script).ok();
        assert_eq!(
            answers.matches("pod=hello-").count(),
            5,
            "{host}: {answers}"
        );
    }
    let script = format!("echo hi | nc -u -w 5 -W 1 {address} 80");
    let answer = cluster.in_client(&script).ok();
    assert!(answer.contains("pod=hello-"), "{address}: {answer}");
    // From a process of the node, at its socket, and per packet from one that no hook of a cgroup sees.
    let host = ["exec", "host", "--", "wget", "-T", "5", "-qO-"];
    let answer = cluster.kubectl(&[&host[..], &[&format!("http://{url}/")]].concat());
    assert!(answer.ok().contains("pod=hello-"));
    for (_, pid) in cluster.workers() {
        let script = format!(
            "exec 3<>/dev/tcp/{address}/80; printf 'GET / HTTP/1.0\\r\\nHost: a\\r\\n\\r\\n' >&3; cat <&3"
        );
        let answer = in_node(pid, &["timeout", "10", "bash", "-c", &script]).ok();
        assert!(answer.contains("pod=hello-"), "{answer}");
        assert_eq!(way(pid, unused), "keelway-svc");
    }
    let script = format!("dig +short -x {address}");
    let found = cluster.in_client(&script).ok();
    assert_eq!(found.trim(), format!("{name}.default.svc.cluster.local."));
    // Nobody's address is silent, as one of the first range, and has no name.
    for nobodys in [unused, "10.96.77.77"] {
        let script = format!("nc -w 2 {nobodys} 80 < /dev/null");
        assert!(!cluster.in_client(&script).success, "{nobodys}");
        let script = format!("dig +short -x {nobodys}");
        assert_eq!(cluster.in_client(&script).stdout.trim(), "", "{nobodys}");
    }
}

#[test]
fn a_service_in_a_second_range_is_a_service_like_any_other() {
    let name = format!("ranges-{}", std::process::id());
    let up = ["--nodes", "2", "--ip-family", "dual"];
    let Some(cluster) = Cluster::own(&name, &up) else {
        return;
    };
    cluster.run_example();
    let host = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "host"},
        "spec": {"hostNetwork": true, "containers": [{"name": "main", "image": "localhost/keelway/client:0.1.0",
            "command": ["sleep", "100000"]}]}});
    apply(&cluster, &host);
    apply(
        &cluster,
        &json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "more"},
            "spec": {"cidrs": ["203.0.113.0/24", "2001:db8:cb00::/64"]}}),
    );
    let ready = ["wait", "servicecidr/more", "--for=condition=Ready"];
    cluster.kubectl(&ready).ok();
    let ready = ["wait", "pod/host", "--for=condition=Ready"];
    cluster.kubectl(&ready).ok();
    check(&cluster, "more-v4", "203.0.113.10", "203.0.113.99");
    check(&cluster, "more-v6", "2001:db8:cb00::a", "2001:db8:cb00::99");

    // A range that the nodes are in themselves is given out of, and not routed.
    let nodes = cluster.get(&["nodes"]);
    let own = nodes["items"][0]["status"]["addresses"][0]["address"]
        .as_str()
        .expect("an address");
    let (network, _) = own.rsplit_once('.').expect("an IPv4 address");
    let before: Vec<String> = cluster
        .workers()
        .iter()
        .map(|(_, pid)| way(*pid, &format!("{network}.200")))
        .collect();
    apply(
        &cluster,
        &json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "wrong"},
            "spec": {"cidrs": [format!("{network}.0/24")]}}),
    );
    // The next range comes after it.
    apply(
        &cluster,
        &json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "zone"},
            "spec": {"cidrs": ["192.0.2.0/24"]}}),
    );
    for ((_, pid), before) in cluster.workers().iter().zip(before) {
        eventually("the last range is routed", || {
            way(*pid, "192.0.2.9") == "keelway-svc"
        });
        assert_eq!(way(*pid, &format!("{network}.200")), before);
    }

    // What is gone is routed no more.
    cluster
        .kubectl(&["delete", "service", "more-v4", "more-v6"])
        .ok();
    let names = ["more", "wrong", "zone"];
    cluster
        .kubectl(&[&["delete", "servicecidr", "--timeout=60s"], &names[..]].concat())
        .ok();
    for (_, pid) in cluster.workers() {
        for address in ["203.0.113.10", "2001:db8:cb00::a", "192.0.2.9"] {
            eventually("the range is routed no more", || {
                way(pid, address) != "keelway-svc"
            });
        }
        assert_eq!(way(pid, "10.96.0.1"), "keelway-svc");
    }
}
