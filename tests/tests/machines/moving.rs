//! A control plane whose state moves from the embedded store into an etcd of its own, by one command that may be cut off anywhere.

use std::time::{Duration, Instant};

use keelway_tests::process::{Running, eventually, run};
use keelway_tests::sandbox::is_root;
use serde_json::{Value, json};

use crate::control_planes::{come, voters};
use crate::machine::{CHANGE_TIMEOUT, Cluster, Machine, UP_TIMEOUT, sandbox};

/// So many that moving them takes longer than one look.
const MAPS: usize = 600;

/// How far a move has come that is cut off there.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// It is written down what the node is to be.
    Described,
    /// The etcd is begun.
    Begun,
    /// The state is being copied.
    Copying,
    /// The node is described as it is to be from now on.
    Decided,
}

impl Cut {
    fn is_reached(self, machine: &Machine) -> bool {
        match self {
            Cut::Described => machine.node_file("node.next.json").exists(),
            Cut::Begun => machine.node_file("var/lib/etcd/member").exists(),
            Cut::Copying => is_copying(machine),
            Cut::Decided => is_decided(machine),
        }
    }
}

/// Whether an etcd of its own is part of its node, as that is described.
pub fn is_decided(machine: &Machine) -> bool {
    let spec = std::fs::read(machine.node_file("node.json")).expect("a description");
    let spec: Value = serde_json::from_slice(&spec).expect("JSON");
    let services = spec["services"].as_array().expect("services");
    services.iter().any(|service| service["name"] == "etcd")
}

fn is_copying(machine: &Machine) -> bool {
    is_at(machine, "migrate\0")
}

/// Whether a program with such words among its arguments works on the machine's state.
pub fn is_at(machine: &Machine, words: &str) -> bool {
    let state = machine.state.display().to_string();
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let mut lines = processes.map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).into_owned()
    });
    lines.any(|line| line.contains(words) && line.contains(&state))
}

/// Waits without a pause: what is waited for is short.
#[track_caller]
pub fn await_at_once(what: &str, mut is_reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + UP_TIMEOUT;
    while !is_reached() {
        assert!(Instant::now() < deadline, "{what} is not reached");
        std::thread::yield_now();
    }
}

/// The ConfigMaps that the test made, as name and data.
#[track_caller]
pub fn maps(cluster: &Cluster<'_>) -> Vec<(String, String)> {
    let all = eventually("the API server answers", CHANGE_TIMEOUT, || {
        let got = cluster.kubectl(&["get", "configmaps", "--output", "json"]);
        got.success.then_some(got.stdout).ok_or(got.stderr)
    });
    let all: Value = serde_json::from_str(&all).expect("JSON");
    let items = all["items"].as_array().expect("a list").iter();
    let ours = items.filter(|map| map["data"].get("of").is_some());
    let pairs = ours.map(|map| {
        let name = map["metadata"]["name"].as_str().expect("a name");
        (name.to_owned(), map["data"]["of"].to_string())
    });
    pairs.collect()
}

fn map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"of": name}})
}

#[track_caller]
pub fn make(cluster: &Cluster<'_>, names: impl Iterator<Item = String>) {
    let items: Vec<Value> = names.map(|name| map(&name)).collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    let made = cluster.kubectl_with_input(&["create", "--filename", "-"], &list.to_string());
    made.ok();
}

#[track_caller]
pub fn start(machine: &Machine, more: &[&str]) -> Running {
    machine.keelway_running(&[&["start", "--foreground"], more].concat())
}

const SEALING: &str = "
apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - aesgcm: {keys: [{name: one, secret: MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=}]}
  - identity: {}
";
const POLICY: &str = "
apiVersion: audit.k8s.io/v1
kind: Policy
rules:
- level: Metadata
  resources: [{group: '', resources: [secrets]}]
- level: None
";

/// Whether a text is in any file below a folder of the machine's node.
fn holds(machine: &Machine, folder: &str, text: &str) -> bool {
    let folder = machine.node_file(folder).display().to_string();
    let command = [
        "grep",
        "--recursive",
        "--text",
        "--quiet",
        "--fixed-strings",
        text,
        &folder,
    ];
    run(&command, &[], 60).success
}

#[test]
fn a_state_moves_into_an_etcd_of_its_own_wherever_that_is_cut_off() {
    const MOVE: [&str; 2] = ["--store", "etcd"];
    if !is_root("a_state_moves_into_an_etcd_of_its_own_wherever_that_is_cut_off") {
        return;
    }
    let _sandbox = sandbox();
    let folder = tempfile::tempdir().expect("a folder");
    let [first, second] = [11, 12].map(|number| Machine::new(folder.path(), number));
    let sealing = folder.path().join("sealing.yaml");
    std::fs::write(&sealing, SEALING).expect("written");
    let policy = folder.path().join("policy.yaml");
    std::fs::write(&policy, POLICY).expect("written");
    let (sealing, policy) = (sealing.display().to_string(), policy.display().to_string());
    let guards = [
        "--schedulable",
        "--encryption-provider-config",
        &sealing,
        "--audit-policy-file",
        &policy,
    ];
    let (server, _) = first.begin("moving", &guards);
    let cluster = Cluster { server: &first };
    let secret = [
        "create",
        "secret",
        "generic",
        "hidden",
        "--from-literal=word=xyzzy-plugh",
    ];
    cluster.kubectl(&secret).ok();
    make(&cluster, (0..MAPS).map(|number| format!("map-{number}")));
    let mut kept = maps(&cluster);
    assert_eq!(kept.len(), MAPS);
    let before = cluster.get(&["configmap", "map-7"]);

    // An etcd that nobody here has begun is not touched.
    let foreign = first.node_file("var/lib/etcd");
    std::fs::create_dir_all(&foreign).expect("a folder");
    let refused = first.keelway(&[&["start"], &MOVE[..]].concat()).refused();
    assert!(refused.contains("not this cluster's state"), "{refused}");
    std::fs::remove_dir(&foreign).expect("it is as it was");
    assert_eq!(maps(&cluster), kept, "the node runs on");

    let mut running = Some(server);
    for (round, cut) in [
        Cut::Described,
        Cut::Begun,
        Cut::Copying,
        Cut::Copying,
        Cut::Decided,
    ]
    .into_iter()
    .enumerate()
    {
        // The first one finds the node running, as the user would have it.
        let moving = start(&first, &MOVE);
        await_at_once(&format!("{cut:?}"), || cut.is_reached(&first));
        if round == 3 {
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(moving);
        drop(running.take());
        first.wait_ended();
        let started = start(&first, &[]);
        assert_eq!(maps(&cluster), kept, "after {cut:?}");
        make(&cluster, std::iter::once(format!("since-{round}")));
        kept = maps(&cluster);
        let decided = matches!(cut, Cut::Decided);
        if matches!(cut, Cut::Described | Cut::Begun) || decided {
            assert_eq!(is_decided(&first), decided, "after {cut:?}");
        }
        if !is_decided(&first) {
            assert!(!foreign.exists(), "something is left of the etcd");
            let credentials = first.node_file("credentials");
            assert!(!credentials.join("etcd-ca.key").exists());
            assert!(!credentials.join("etcd-client.crt").exists());
        }
        running = Some(started);
        drop(running.take());
        first.wait_ended();
    }

    // It has come about; asking for it again changes nothing. Revisions went on, so that who knew one is not told lies.
    let started = start(&first, &MOVE);
    assert_eq!(maps(&cluster), kept);
    assert_eq!(voters(&first).concat(), first.name);
    let said = first.keelway(&[&["start"], &MOVE[..]].concat()).ok();
    assert!(said.contains("already"), "{said}");
    let after = cluster.get(&["configmap", "map-7"]);
    let version = |map: &Value| -> u64 {
        let version = map["metadata"]["resourceVersion"].as_str();
        version
            .and_then(|text| text.parse().ok())
            .expect("a number")
    };
    assert_eq!(after["metadata"]["uid"], before["metadata"]["uid"]);
    assert!(version(&cluster.get(&["configmap", "since-4"])) > version(&before));
    cluster.wait_ready(&first.name);

    // Which is what others can join.
    let joined = come(&first, &second);
    assert_eq!(voters(&second).len(), 2);
    let cluster = Cluster { server: &second };
    assert_eq!(maps(&cluster), kept);

    // What was sealed is so in both stores, whose keys go to whom the state goes to. So does what is told of.
    let hidden = cluster.get(&["secret", "hidden"]);
    assert_eq!(hidden["data"]["word"], "eHl6enktcGx1Z2g=");
    for folder in ["var/lib/keelway/controlplane", "var/lib/etcd/member"] {
        for machine in [&first, &second] {
            let open = holds(machine, folder, "eHl6enktcGx1Z2g");
            assert!(!open, "{folder} of {}", machine.name);
        }
        assert!(
            holds(&first, folder, "/core/secrets/default/hidden"),
            "{folder}"
        );
    }
    let told = std::fs::read_to_string(second.node_file("var/log/keelway/audit.log"));
    let told = told.expect("a log");
    let mut events = told
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    assert!(
        events.any(|event| event["objectRef"]["name"] == "hidden"),
        "{told}"
    );
    second.keelway(&["leave", "--drain-timeout", "60"]).ok();
    first.keelway(&["leave", "--delete-cluster"]).ok();
    drop((joined, started));
}
