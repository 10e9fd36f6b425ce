//! Machines that have IPv6 only: control planes with their etcd, a worker, pods and Services.

use keelway_tests::sandbox::is_root;

use crate::control_planes::{begin, member, voters};
use crate::machine::{Cluster, Machine, UP_TIMEOUT, joining, sandbox};

#[test]
fn machines_without_ipv4_are_a_cluster() {
    if !is_root("machines_without_ipv4_are_a_cluster") {
        return;
    }
    let _sandbox = sandbox();
    let folder = tempfile::tempdir().expect("a folder");
    let machines = [16, 17, 18].map(|number| Machine::of_ipv6(folder.path(), number));
    let [first, second, third] = &machines;
    let mut running = begin(&machines[..2]);
    let join = joining(&first.keelway(&["token", "create"]).ok());
    let mut arguments = third.join(&join);
    arguments.push("--foreground");
    let worker = third.keelway_running(&arguments);
    worker.line_with("is node", UP_TIMEOUT);
    running.push(worker);
    assert_eq!(voters(second).len(), 2);
    let members = member(first, &["list"]).ok();
    for machine in [first, second] {
        let peer = format!("https://[{}]:2380", machine.address);
        assert!(members.contains(&peer), "{members}");
    }

    // Pods on all of them, reached by a Service's name, an exec and a log.
    let cluster = Cluster { server: second };
    let taint = "node-role.kubernetes.io/control-plane-";
    cluster
        .kubectl(&["taint", "nodes", &first.name, &second.name, taint])
        .ok();
    cluster.apply_hello();
    let patch = r#"{"spec": {"replicas": 6}}"#;
    cluster
        .kubectl(&["patch", "deployment", "hello", "--patch", patch])
        .ok();
    cluster.wait_hello();
    let pods = cluster.get(&["pods", "-l", "app=hello"]);
    let pods = pods["items"].as_array().expect("a list");
    for machine in &machines {
        let here = pods
            .iter()
            .find(|pod| pod["spec"]["nodeName"] == machine.name.as_str());
        let here = here.unwrap_or_else(|| panic!("none on {}", machine.name));
        let address = here["status"]["podIP"].as_str().expect("an address");
        assert!(address.contains(':'), "{address}");
        let name = here["metadata"]["name"].as_str().expect("a name");
        cluster.kubectl(&["logs", name]).ok();
    }
    let names = cluster.who_answers(30);
    assert!(names.len() > 2, "{names:?}");

    let kubeconfig = first.kubeconfig();
    third
        .keelway(&[
            "leave",
            "--kubeconfig",
            &kubeconfig,
            "--drain-timeout",
            "60",
        ])
        .ok();
    first.keelway(&["leave", "--drain-timeout", "60"]).ok();
    assert_eq!(voters(second).concat(), second.name);
    cluster.wait_ready(&second.name);
    second.keelway(&["leave", "--delete-cluster"]).ok();
    drop(running);
}
