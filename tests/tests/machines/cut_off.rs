//! Commands that are killed in the middle: what they worked on is as it was or as it was to be, and the same command again finishes.

use keelway_tests::process::eventually;
use keelway_tests::sandbox::is_root;

use crate::control_planes::{begin, voters};
use crate::machine::{CHANGE_TIMEOUT, Cluster, Machine, sandbox};
use crate::moving::{await_at_once, is_at};

const LEAVE: [&str; 3] = ["leave", "--drain-timeout", "60"];

/// Starts a command, and kills it as soon as it has come so far; one that is faster than that ends by itself.
#[track_caller]
fn kill_at(machine: &Machine, command: &[&str], what: &str, is_reached: impl Fn() -> bool) {
    let mut running = machine.keelway_running(command);
    await_at_once(what, || is_reached() || running.has_ended());
    drop(running);
}

#[test]
fn a_leave_that_is_killed_is_finished_by_the_next() {
    if !is_root("a_leave_that_is_killed_is_finished_by_the_next") {
        return;
    }
    let _sandbox = sandbox();
    let folder = tempfile::tempdir().expect("a folder");
    let machines = [16, 17].map(|number| Machine::new(folder.path(), number));
    let [first, second] = &machines;
    let before = second.look();
    let running = begin(&machines);
    assert_eq!(voters(first).len(), 2);
    let init = format!("/proc/{}", second.known()["init"]["pid"]);
    let has_ended = || !std::path::Path::new(&init).exists();

    // While its member is taken out of etcd, after which the others decide without it.
    kill_at(second, &LEAVE, "the member", || {
        is_at(second, "member\0remove\0")
    });
    assert!(second.state.exists() && !has_ended());
    // As soon as the cluster counts on it no more.
    kill_at(second, &LEAVE, "the end of its part", || {
        second.known()["complete"] == false
    });
    eventually("one member is left", CHANGE_TIMEOUT, || {
        let voters = voters(first);
        (voters.len() == 1).then_some(()).ok_or(voters.concat())
    });
    let refused = second.keelway(&["start"]).refused();
    assert!(refused.contains("is no node"), "{refused}");
    // When nobody on this machine can be asked any more.
    kill_at(second, &LEAVE, "the end of the node", has_ended);
    // And when a part of what it left is removed.
    let description = second.node_file("node.json");
    kill_at(second, &LEAVE, "the removal", || !description.exists());
    if second.state.exists() {
        second.keelway(&LEAVE).ok();
    }
    assert!(!second.state.exists(), "something is left");
    assert_eq!(second.look(), before, "the network is as it was");

    assert_eq!(voters(first).concat(), first.name);
    let cluster = Cluster { server: first };
    cluster.kubectl(&["create", "configmap", "after"]).ok();
    let nodes = cluster.get(&["nodes"]);
    assert_eq!(nodes["items"].as_array().expect("a list").len(), 1);
    drop(running);
}
