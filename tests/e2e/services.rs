//! Services as pods and nodes reach them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use keelway_tests::cluster::{Cluster, program};
use keelway_tests::process::{Finished, eventually, run};

pub fn hello_becomes_ready_on_more_than_one_node(cluster: &Cluster) {
    cluster.run_example();
    let replicas = replicas(cluster);
    assert_eq!(replicas.len(), 3, "{replicas:?}");
    let nodes: BTreeSet<&String> = replicas.values().collect();
    assert!(
        nodes.len() > 1,
        "all replicas are on one node: {replicas:?}"
    );
}

/// Ready replicas of hello: pod and node.
pub fn replicas(cluster: &Cluster) -> BTreeMap<String, String> {
    let pods = cluster.get(&["pods", "--selector", "app=hello"]);
    pods["items"]
        .as_array()
        .expect("a list has items")
        .iter()
        .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
        .filter(|pod| {
            let conditions = pod["status"]["conditions"].as_array();
            conditions
                .into_iter()
                .flatten()
                .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
        })
        .map(|pod| {
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            (
                text(&pod["metadata"]["name"]),
                text(&pod["spec"]["nodeName"]),
            )
        })
        .collect()
}

/// Answers of the echo server, counted by pod; every line has to be an answer.
#[track_caller]
fn answers(output: &str, expected: usize) -> BTreeMap<String, usize> {
    let mut by_pod = BTreeMap::new();
    for line in output.lines() {
        let pod = line
            .split_whitespace()
            .find_map(|word| word.strip_prefix("pod="))
            .unwrap_or_else(|| panic!("not an answer: {line:?} in\n{output}"));
        *by_pod.entry(pod.to_owned()).or_default() += 1;
    }
    let total: usize = by_pod.values().sum();
    assert_eq!(total, expected, "{output}");
    by_pod
}

#[track_caller]
fn every_replica_answers(cluster: &Cluster, output: &str, expected: usize) {
    let answered: BTreeSet<String> = answers(output, expected).into_keys().collect();
    let ready: BTreeSet<String> = replicas(cluster).into_keys().collect();
    assert_eq!(answered, ready);
}

pub fn a_service_answers_by_name_from_every_replica(cluster: &Cluster) {
    let output = cluster
        .in_client("for i in $(seq 100); do wget -T 5 -qO- http://hello/ 2>&1 || echo failed; done")
        .ok();
    every_replica_answers(cluster, &output, 100);
}

/// The ClusterIP of a Service in the default namespace.
fn address(cluster: &Cluster, service: &str) -> String {
    let service = cluster.get(&["service", service]);
    service["spec"]["clusterIP"]
        .as_str()
        .expect("a Service has an address")
        .to_owned()
}

const DATAGRAMS: &str =
    "for i in $(seq 30); do (echo hi | nc -u -w 5 -W 1 TARGET 80 || echo failed) & done; wait";

pub fn a_service_answers_by_address_and_by_udp(cluster: &Cluster) {
    let address = address(cluster, "hello");
    let output = cluster
        .in_client(&format!(
            "for i in $(seq 100); do wget -T 5 -qO- http://{address}/ 2>&1 || echo failed; done"
        ))
        .ok();
    every_replica_answers(cluster, &output, 100);
    for target in ["hello", &address] {
        let output = cluster.in_client(&DATAGRAMS.replace("TARGET", target)).ok();
        every_replica_answers(cluster, &output, 30);
    }
}

pub fn a_service_answers_the_nodes_own_programs(cluster: &Cluster) {
    let address = address(cluster, "hello");
    for (node, pid) in cluster.workers() {
        let script = format!(
            "for i in $(seq 30); do WGET -T 5 -qO- http://{address}/ || echo failed on {node}; done"
        );
        // In the node's own network and control group, as its kubelet is; and in its network only.
        let groups = control_groups(&cluster.name, &node);
        for enter in [groups.as_str(), ""] {
            let script = format!("{enter}{script}");
            let output = on_node(pid, &script).ok();
            let by_pod = answers(&output, 30);
            assert_eq!(
                by_pod.len(),
                replicas(cluster).len(),
                "on {node}: {by_pod:?}"
            );
            let output = on_node(
                pid,
                &format!(
                    "{enter}{}",
                    DATAGRAMS
                        .replace("nc -u", "NC -u")
                        .replace("TARGET", &address)
                ),
            )
            .ok();
            answers(&output, 30);
        }
    }
}

/// Shell words that move the shell into a node's control group, in the hierarchy whose programs see sockets.
fn control_groups(cluster: &str, node: &str) -> String {
    let unified = if std::path::Path::new("/sys/fs/cgroup/unified").exists() {
        "/sys/fs/cgroup/unified"
    } else {
        "/sys/fs/cgroup"
    };
    // Version 2 forbids processes in a group that has groups with controllers below; a leaf of its own is always fine.
    let leaf = format!("{unified}/keelway/{cluster}/{node}/e2e");
    format!("mkdir -p {leaf} && echo $$ > {leaf}/cgroup.procs && ")
}

/// Runs a script in a node's network namespace. WGET and NC in it are the programs of our client image.
pub fn on_node(pid: i64, script: &str) -> Finished {
    let path = |name| program(name).display().to_string();
    let script = script
        .replace("WGET", &path("wget"))
        .replace("NC -u", &format!("{} -u", path("nc")));
    let namespace = format!("--net=/proc/{pid}/ns/net");
    run(&["nsenter", &namespace, "sh", "-c", &script], &[], 120)
}

pub fn pods_reach_each_other_and_their_node_across_nodes(cluster: &Cluster) {
    let pods = cluster.get(&["pods", "--selector", "app=hello"]);
    let addresses: Vec<&str> = pods["items"]
        .as_array()
        .expect("a list has items")
        .iter()
        .filter_map(|pod| pod["status"]["podIP"].as_str())
        .collect();
    assert!(addresses.len() >= 3, "{addresses:?}");
    for address in &addresses {
        let output = cluster
            .in_client(&format!("wget -T 5 -qO- http://{address}/"))
            .ok();
        answers(&output, 1);
        for (_, pid) in cluster.workers() {
            let output = on_node(pid, &format!("WGET -T 5 -qO- http://{address}/")).ok();
            answers(&output, 1);
        }
    }
    let client = cluster.get(&["pod", "client"]);
    let node_address = client["status"]["hostIP"]
        .as_str()
        .expect("a running pod has a node");
    let pod_address = client["status"]["podIP"]
        .as_str()
        .expect("a running pod has an address");
    let pong = cluster
        .in_client(&format!("ping -c 1 -W 2 {node_address}"))
        .ok();
    assert!(pong.contains("1 packets received"), "{pong}");
    // A pod is seen under its own address by another pod: nothing on the way translates it.
    let output = cluster
        .in_client(&format!("wget -T 5 -qO- http://{}/", addresses[0]))
        .ok();
    assert!(
        output.contains(&format!("client={pod_address}:")),
        "{output}"
    );
}

pub fn a_service_without_endpoints_refuses_at_once(cluster: &Cluster) {
    let manifest = "---\n{apiVersion: v1, kind: Service, metadata: {name: nobody}, spec: {selector: {app: nobody}, ports: [{port: 80}]}}";
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], manifest)
        .ok();
    let took = eventually("a refusal", Duration::from_secs(10), || {
        let started = Instant::now();
        let finished = cluster.in_client("wget -T 5 -qO- http://nobody/");
        if finished.stderr.contains("refused") {
            Ok(started.elapsed())
        } else {
            Err(finished.to_string())
        }
    });
    assert!(took < Duration::from_secs(3), "the refusal took {took:?}");
    cluster.kubectl(&["delete", "service", "nobody"]).ok();
}

pub fn cluster_dns_answers_services_pods_and_reverse_names(cluster: &Cluster) {
    let address = address(cluster, "hello");
    let dig = |arguments: &str| cluster.in_client(&format!("dig +short {arguments}")).ok();
    assert_eq!(dig("+search hello").trim(), address);
    assert_eq!(dig("hello.default.svc.cluster.local").trim(), address);
    assert_eq!(
        dig(&format!("-x {address}")).trim(),
        "hello.default.svc.cluster.local."
    );
    assert_eq!(
        dig("kubernetes.default.svc.cluster.local").trim(),
        "10.96.0.1"
    );
    assert!(
        dig("_http._tcp.hello.default.svc.cluster.local SRV")
            .contains(" 80 hello.default.svc.cluster.local.")
    );
    let full = |arguments: &str| cluster.in_client(&format!("dig {arguments}")).ok();
    assert!(full("absent.default.svc.cluster.local").contains("NXDOMAIN"));
    let no_data = full("hello.default.svc.cluster.local AAAA");
    assert!(
        no_data.contains("NOERROR") && no_data.contains("ANSWER: 0"),
        "{no_data}"
    );
}

pub fn either_hook_alone_carries_all_traffic(cluster: &Cluster) {
    for off in ["--socket-lb=off", "--packet-lb=off"] {
        set_agent_argument(cluster, Some(off));
        a_service_answers_by_name_from_every_replica(cluster);
        a_service_answers_by_address_and_by_udp(cluster);
        a_service_answers_the_nodes_own_programs_in_their_group(cluster, off);
    }
    set_agent_argument(cluster, None);
    a_service_answers_by_name_from_every_replica(cluster);
}

/// What runs outside a node's control groups has the packet hook only.
fn a_service_answers_the_nodes_own_programs_in_their_group(cluster: &Cluster, off: &str) {
    let address = address(cluster, "hello");
    for (node, pid) in cluster.workers() {
        let groups = control_groups(&cluster.name, &node);
        let script = format!(
            "{groups} for i in $(seq 10); do WGET -T 5 -qO- http://{address}/ || echo failed on {node} with {off}; done"
        );
        answers(&on_node(pid, &script).ok(), 10);
    }
}

/// Gives every agent one argument more, or takes it away again, and waits until all of them run with it.
fn set_agent_argument(cluster: &Cluster, argument: Option<&str>) {
    let agents = cluster.get(&["daemonset", "keelway-agent", "--namespace", "kube-system"]);
    let mut arguments = agents["spec"]["template"]["spec"]["containers"][0]["args"].clone();
    let list = arguments.as_array_mut().expect("the agent has arguments");
    list.retain(|argument| !argument.as_str().unwrap_or_default().ends_with("-lb=off"));
    list.extend(argument.map(serde_json::Value::from));
    let patch = serde_json::json!([{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": arguments}]);
    let set = ["--namespace", "kube-system"];
    cluster
        .kubectl(&[
            "patch",
            "daemonset",
            "keelway-agent",
            set[0],
            set[1],
            "--type=json",
            "--patch",
            &patch.to_string(),
        ])
        .ok();
    cluster
        .kubectl(&[
            "rollout",
            "status",
            "daemonset/keelway-agent",
            set[0],
            set[1],
            "--timeout=90s",
        ])
        .ok();
}
