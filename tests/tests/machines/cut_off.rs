//! Commands that are killed in the middle: what they worked on is as it was or as it was to be, and the same command again finishes.

use keelway_tests::process::{Running, eventually};
use keelway_tests::sandbox::is_root;

use crate::control_planes::{begin, voters};
use crate::machine::{CHANGE_TIMEOUT, Cluster, Machine, sandbox};
use crate::moving::{await_at_once, is_at, is_decided, make, maps, start};

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

/// The credentials by which a machine's control plane reaches etcd.
fn credentials(machine: &Machine) -> [String; 3] {
    ["etcd-ca.crt", "etcd-client.crt", "etcd-client.key"].map(|name| {
        let path = machine.node_file("credentials").join(name);
        std::fs::read_to_string(path).expect("a credential")
    })
}

/// An etcd beside the machine's own, with a certificate that the cluster's authority has signed; gives also the flags that name it.
fn elsewhere(machine: &Machine, folder: &std::path::Path) -> (Running, Vec<String>) {
    let url = format!("https://{}:12379", machine.address);
    let credentials = machine.node_file("credentials");
    let own = |name: &str| credentials.join(name).display().to_string();
    let data = folder.join("elsewhere").display().to_string();
    let (certificate, key) = (own("apiserver.crt"), own("apiserver.key"));
    let command = ["setpriv", "--pdeathsig", "KILL", "etcd"];
    let flags = [
        "--data-dir",
        &data,
        "--cert-file",
        &certificate,
        "--key-file",
        &key,
    ];
    let clients = [
        "--listen-client-urls",
        &url,
        "--advertise-client-urls",
        &url,
    ];
    let peers = ["--listen-peer-urls", "http://127.0.0.1:12380"];
    let words = [&command[..], &flags, &clients, &peers].concat();
    let running = machine.network.run(|| Running::start(&words, &[]));
    let mut named = vec!["--store".to_owned(), format!("etcd:{url}")];
    for (flag, name) in [
        ("--etcd-cafile", "ca.crt"),
        ("--etcd-certfile", "apiserver-kubelet-client.crt"),
        ("--etcd-keyfile", "apiserver-kubelet-client.key"),
    ] {
        let copy = folder.join(name);
        std::fs::copy(credentials.join(name), &copy).expect("copied");
        named.extend([flag.to_owned(), copy.display().to_string()]);
    }
    (running, named)
}

#[test]
fn a_way_to_an_etcd_elsewhere_that_is_cut_off_leaves_each_its_credentials() {
    if !is_root("a_way_to_an_etcd_elsewhere_that_is_cut_off_leaves_each_its_credentials") {
        return;
    }
    let _sandbox = sandbox();
    let folder = tempfile::tempdir().expect("a folder");
    let machine = Machine::new(folder.path(), 18);
    let (server, _) = machine.begin("away", &["--schedulable"]);
    let cluster = Cluster { server: &machine };
    make(&cluster, (0..3).map(|number| format!("map-{number}")));
    let kept = maps(&cluster);
    let moved = start(&machine, &["--store", "etcd"]);
    eventually("the state is in an etcd of its own", CHANGE_TIMEOUT, || {
        let known = machine.known();
        let done = is_decided(&machine) && known["unannounced"] == false;
        done.then_some(()).ok_or(known.to_string())
    });
    drop((server, moved));
    machine.wait_ended();

    // The same state is elsewhere, too.
    let (_etcd, named) = elsewhere(&machine, folder.path());
    let named: Vec<&str> = named.iter().map(String::as_str).collect();
    let embedded = machine.node_file("var/lib/keelway/controlplane");
    let from = format!("embedded:{}", embedded.display());
    let to: Vec<&str> = named
        .iter()
        .map(|word| if *word == "--store" { "--to" } else { word })
        .collect();
    let migrate = [&["store", "migrate", "--from", &from], &to[..]].concat();
    eventually("it is copied", CHANGE_TIMEOUT, || {
        let copied = machine.keelway(&migrate);
        copied.success.then_some(()).ok_or(copied.stderr)
    });

    let own = credentials(&machine);
    let given = [3, 5, 7].map(|at| std::fs::read_to_string(named[at]).expect("a credential"));
    let change = [&["start", "--foreground"], &named[..]].concat();
    let next = machine.node_file("node.next.json");
    let first_given = machine.node_file("credentials/etcd-ca.crt.next");
    for cut in 0..3 {
        let before = credentials(&machine);
        kill_at(&machine, &change, "the way there", || match cut {
            0 => next.exists(),
            1 => first_given.exists(),
            _ => !is_decided(&machine),
        });
        machine.wait_ended();
        if is_decided(&machine) {
            assert_eq!(credentials(&machine), before, "cut {cut}");
        }
        let started = start(&machine, &[]);
        assert_eq!(maps(&cluster), kept, "cut {cut}");
        let (expected, authority) = match is_decided(&machine) {
            true => (&own, true),
            false => (&given, false),
        };
        assert_eq!(&credentials(&machine), expected, "cut {cut}");
        assert!(!first_given.exists() && !next.exists());
        let key = machine.node_file("credentials/etcd-ca.key");
        assert_eq!(key.exists(), authority, "cut {cut}");
        drop(started);
        machine.wait_ended();
    }
    assert!(!is_decided(&machine), "it has come about");
    let started = start(&machine, &[]);
    assert_eq!(maps(&cluster), kept);
    eventually("`start` has told the cluster", CHANGE_TIMEOUT, || {
        let left = machine.keelway(&["leave", "--delete-cluster"]);
        left.success.then_some(()).ok_or(left.stderr)
    });
    drop(started);
}
