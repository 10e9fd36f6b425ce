//! A machine joins, works, and leaves without a trace.

use keelway_tests::process::eventually;
use keelway_tests::sandbox::is_root;
use serde_json::Value;

use crate::machine::{CHANGE_TIMEOUT, Cluster, Machine, UP_TIMEOUT, changed, joining, sandbox};

#[test]
fn machines_join_work_and_leave() {
    if !is_root("machines_join_work_and_leave") {
        return;
    }
    let _sandbox = sandbox();
    let folder = tempfile::tempdir().expect("a folder");
    let [first, second] = [1, 2].map(|number| Machine::new(folder.path(), number));
    let untouched = second.look();

    let (server, join) = first.begin("machines", &["--schedulable"]);
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
    cluster.apply_hello();
    cluster.wait_hello();
    let pods = cluster.get(&["pods", "-l", "app=hello"]);
    let on = |pods: &Value, node: &str| {
        let pods = pods["items"].as_array().expect("a list");
        pods.iter()
            .filter(|pod| pod["spec"]["nodeName"] == node)
            .count()
    };
    assert!(on(&pods, &first.name) > 0 && on(&pods, &second.name) > 0);
    let names = cluster.who_answers(20);
    assert!(names.len() > 1, "{names:?}");
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

    for machine in [&first, &second] {
        machine.hides(&[&join[3], &own[3]]);
    }

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
