//! Several control planes, on an etcd that is there and on one whose members they bring.

use std::path::Path;

use keelway_tests::process::{Finished, Running, eventually};
use keelway_tests::sandbox::is_root;
use serde_json::Value;

use crate::machine::{CHANGE_TIMEOUT, Cluster, Machine, UP_TIMEOUT, changed, joining, sandbox};

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
    let (server, _) = first.begin("planes", &["--schedulable"]);
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
    plain.extend(["--control-plane", "--certificate-key", "-"].map(str::to_owned));
    let refused = second
        .keelway_with_input(&second.join(&plain), &"a".repeat(64))
        .refused();
    assert!(refused.contains("keelway store migrate"), "{refused}");
    assert!(!second.state.exists(), "something is left");

    first.keelway(&["stop"]).ok();
    drop(server);
    // On an etcd without the state, it would be another cluster.
    let empty = first.keelway(&["start", "--store", STORE]).refused();
    assert!(empty.contains("there is no state in it"), "{empty}");
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
    let joins = first.take_offer(&offered);
    let other = changed(&joins, "--certificate-key", "-");
    let refused = second
        .keelway_with_input(&second.join(&other), &"b".repeat(64))
        .refused();
    assert!(refused.contains("cannot be opened"), "{refused}");
    // As an argument it would be everybody's on the machine.
    let told = changed(&joins, "--certificate-key", &"b".repeat(64));
    let refused = second.keelway(&second.join(&told)).refused();
    assert!(refused.contains("is no argument"), "{refused}");
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

/// A server that brings its own etcd, and as many control planes more as there are machines.
pub fn begin(machines: &[Machine]) -> Vec<Running> {
    let [first, others @ ..] = machines else {
        panic!("one at least")
    };
    let (server, _) = first.begin("members", &["--store", "etcd"]);
    let others = others.iter().map(|machine| come(first, machine));
    [server].into_iter().chain(others).collect()
}

/// Makes a machine another control plane of the first one's cluster.
#[track_caller]
pub fn come(first: &Machine, machine: &Machine) -> Running {
    let joins = first.offer();
    let mut arguments = machine.join(&joins);
    arguments.push("--foreground");
    let joined = machine.keelway_running(&arguments);
    joined.line_with("is node", UP_TIMEOUT);
    joined
}

/// Runs `keelway store member` on a control plane, which asks the etcd that it has a member of.
#[track_caller]
pub fn member(machine: &Machine, words: &[&str]) -> Finished {
    machine.keelway(&[&["store", "member"], words].concat())
}

/// The members as etcd knows them: the name and the address of each that has a vote.
#[track_caller]
pub fn voters(machine: &Machine) -> Vec<String> {
    let shown = member(machine, &["list", "--output", "json"]).ok();
    let shown: Vec<Value> = serde_json::from_str(&shown).expect("JSON");
    let voters = shown.iter().filter(|member| member["isLearner"] == false);
    let mut names: Vec<String> = voters
        .map(|member| member["name"].as_str().expect("a name").to_owned())
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn control_planes_that_bring_their_etcd_outlive_any_of_them() {
    if !is_root("control_planes_that_bring_their_etcd_outlive_any_of_them") {
        return;
    }
    let _sandbox = sandbox();
    let folder = tempfile::tempdir().expect("a folder");
    let machines = [5, 6, 7].map(|number| Machine::new(folder.path(), number));
    let [first, second, third] = &machines;
    let mut running = begin(&machines[..2]);
    // An attempt of the third machine that was cut off has left a member that will never start, which only its next attempt replaces.
    let abandoned = format!("https://{}:2380", third.address);
    member(first, &["add", &abandoned]).ok();
    running.push(come(first, third));
    let names = |machines: &[&Machine]| -> Vec<String> {
        let names = machines.iter().map(|machine| machine.name.clone());
        names.collect()
    };
    assert_eq!(voters(third), names(&[first, second, third]));
    let cluster = Cluster { server: first };
    cluster
        .kubectl(&["create", "configmap", "kept", "--from-literal=a=b"])
        .ok();

    // The machine that began it all is gone at once: the others have the state, and nodes find them.
    drop(running.remove(0));
    first.wait_ended();
    let cluster = Cluster { server: third };
    let kept = eventually("the others answer", CHANGE_TIMEOUT, || {
        let got = cluster.kubectl(&["get", "configmap", "kept", "--output", "json"]);
        let stderr = got.stderr;
        got.success.then_some(got.stdout).ok_or(stderr)
    });
    assert!(kept.contains(r#""a": "b""#), "{kept}");
    let lost = ["create", "configmap", "since", "--from-literal=a=c"];
    cluster.kubectl(&lost).ok();
    cluster.wait_ready(&second.name);

    // It comes back, and has what it missed.
    running.push(first.keelway_running(&["start", "--foreground"]));
    let cluster = Cluster { server: first };
    eventually("it has caught up", CHANGE_TIMEOUT, || {
        let got = cluster.kubectl(&["get", "configmap", "since"]);
        got.success.then_some(()).ok_or(got.stderr)
    });
    cluster.wait_ready(&first.name);

    // They leave one by one; the last has everything.
    first.keelway(&["leave", "--drain-timeout", "60"]).ok();
    assert_eq!(voters(second), names(&[second, third]));
    third.keelway(&["leave", "--drain-timeout", "60"]).ok();
    assert_eq!(voters(second), names(&[second]));
    let cluster = Cluster { server: second };
    assert_eq!(cluster.get(&["configmap", "since"])["data"]["a"], "c");
    let nodes = cluster.get(&["nodes"]);
    assert_eq!(nodes["items"].as_array().expect("a list").len(), 1);
    let only = second.keelway(&["leave"]).refused();
    assert!(only.contains("only control plane"), "{only}");
    second.keelway(&["leave", "--delete-cluster"]).ok();
    drop(running);
}
