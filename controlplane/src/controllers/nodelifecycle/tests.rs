//! Nodes that fall silent and come back, in a cluster in memory.

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};

use super::super::nodes;
use super::super::object::Key;
use super::super::plan::Controller;
use super::super::pods;
use super::super::testing::{Cluster, node, pod};

const GRACE_S: i64 = super::GRACE.as_secs() as i64;

const CONTROLLERS: &[Controller] = &[super::CONTROLLER, super::EVICTION];

fn cluster() -> Cluster {
    let mut cluster = Cluster::new(CONTROLLERS);
    cluster.add(node("n0"));
    cluster.add(
        serde_json::from_value::<Lease>(json!({
            "metadata": {"namespace": "kube-node-lease", "name": "n0"},
            "spec": {"renewTime": "2026-01-01T00:00:00.000000Z"},
        }))
        .unwrap(),
    );
    cluster.settle();
    cluster
}

fn renew(cluster: &mut Cluster) {
    let now = cluster.now;
    cluster.edit::<Lease>(&Key::new("kube-node-lease", "n0"), |lease| {
        lease.spec.as_mut().unwrap().renew_time = Some(
            k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(now),
        );
    });
}

fn set_condition(cluster: &mut Cluster, type_: &str, status: &str) {
    cluster.edit::<Node>(&Key::cluster("n0"), |node| {
        let conditions = node
            .status
            .as_mut()
            .unwrap()
            .conditions
            .get_or_insert_default();
        conditions.retain(|condition| condition.type_ != type_);
        conditions.push(k8s_openapi::api::core::v1::NodeCondition {
            type_: type_.into(),
            status: status.into(),
            ..Default::default()
        });
    });
}

fn add_pod(cluster: &mut Cluster, name: &str, tolerations: Value) -> Key {
    let mut pod = pod("default", name);
    let spec = pod.spec.as_mut().unwrap();
    spec.node_name = Some("n0".into());
    spec.tolerations = serde_json::from_value(tolerations).unwrap();
    let key = Key::of(&cluster.add(pod).metadata);
    cluster.set_ready(&key, true);
    key
}

fn found(cluster: &Cluster) -> &Node {
    cluster.snapshot.nodes.get(&Key::cluster("n0")).unwrap()
}

fn taints(cluster: &Cluster) -> Vec<(String, String)> {
    nodes::taints(found(cluster))
        .iter()
        .map(|taint| (taint.key.clone(), taint.effect.clone()))
        .collect()
}

fn both(key: &str) -> Vec<(String, String)> {
    vec![
        (key.into(), "NoSchedule".into()),
        (key.into(), "NoExecute".into()),
    ]
}

#[test]
fn a_node_that_renews_its_lease_is_left_alone() {
    let mut cluster = cluster();
    for _ in 0..20 {
        cluster.advance(10);
        renew(&mut cluster);
        cluster.settle();
    }
    assert_eq!(
        nodes::ready_condition(found(&cluster)).unwrap().status,
        "True"
    );
    assert!(taints(&cluster).is_empty());
}

#[test]
fn a_clock_that_is_set_makes_no_node_silent_and_lets_none_be_silent_for_longer() {
    const YEAR_S: i64 = 365 * 24 * 3600;
    for by in [3600, YEAR_S, -3600, -YEAR_S] {
        let mut cluster = cluster();
        let key = add_pod(&mut cluster, "a", json!([]));
        let is_ready = |cluster: &Cluster| {
            let ready = nodes::ready_condition(found(cluster)).unwrap().status == "True";
            assert_eq!(
                pods::is_ready(cluster.snapshot.pods.get(&key).unwrap()),
                ready
            );
            ready
        };
        cluster.advance(9);
        cluster.set_clock(by);
        // Somebody touches the node before its kubelet is due.
        set_condition(&mut cluster, "DiskPressure", "False");
        cluster.settle();
        assert!(is_ready(&cluster), "set by {by} s");
        assert!(taints(&cluster).is_empty());
        // From here on it is really silent.
        cluster.advance(GRACE_S - 10);
        set_condition(&mut cluster, "PIDPressure", "False");
        cluster.settle();
        assert!(is_ready(&cluster), "set by {by} s");
        cluster.advance(2);
        set_condition(&mut cluster, "MemoryPressure", "False");
        cluster.settle();
        assert!(!is_ready(&cluster), "set by {by} s");
    }
}

#[test]
fn a_silent_node_becomes_unknown_its_pods_unready_and_all_of_it_is_undone_when_it_speaks() {
    let mut cluster = cluster();
    let key = add_pod(&mut cluster, "a", json!([]));
    cluster.advance(GRACE_S - 1);
    cluster.settle();
    assert_eq!(
        nodes::ready_condition(found(&cluster)).unwrap().status,
        "True"
    );
    cluster.advance(2);
    cluster.settle();
    let ready = nodes::ready_condition(found(&cluster)).unwrap();
    assert_eq!(
        (ready.status.as_str(), ready.reason.as_deref()),
        ("Unknown", Some("NodeStatusUnknown"))
    );
    assert_eq!(
        nodes::condition(found(&cluster), "DiskPressure")
            .unwrap()
            .status,
        "Unknown"
    );
    assert_eq!(taints(&cluster), both(nodes::UNREACHABLE));
    assert!(!pods::is_ready(cluster.snapshot.pods.get(&key).unwrap()));
    renew(&mut cluster);
    set_condition(&mut cluster, "Ready", "True");
    cluster.settle();
    assert!(taints(&cluster).is_empty());
    assert!(cluster.snapshot.pods.contains(&key));
}

#[test]
fn conditions_and_unschedulable_become_taints_and_foreign_taints_stay() {
    let mut cluster = cluster();
    cluster.edit::<Node>(&Key::cluster("n0"), |node| {
        node.spec = serde_json::from_value(json!({
            "unschedulable": true, "taints": [{"key": "mine", "effect": "NoSchedule"}],
        }))
        .unwrap();
    });
    set_condition(&mut cluster, "DiskPressure", "True");
    cluster.settle();
    let has =
        |cluster: &Cluster, key: &str| taints(cluster).contains(&(key.into(), "NoSchedule".into()));
    assert!(
        has(&cluster, "mine")
            && has(&cluster, nodes::UNSCHEDULABLE)
            && has(&cluster, nodes::DISK_PRESSURE)
    );
    cluster.edit::<Node>(&Key::cluster("n0"), |node| {
        node.spec.as_mut().unwrap().unschedulable = None
    });
    set_condition(&mut cluster, "DiskPressure", "False");
    cluster.settle();
    assert_eq!(
        taints(&cluster),
        [("mine".to_string(), "NoSchedule".to_string())]
    );
    set_condition(&mut cluster, "Ready", "False");
    cluster.settle();
    assert_eq!(taints(&cluster)[1..], both(nodes::NOT_READY));
}

#[test]
fn a_node_whose_kubelet_has_not_spoken_yet_takes_no_pods() {
    let mut cluster = Cluster::new(CONTROLLERS);
    let mut silent = node("n0");
    silent.status = None;
    cluster.add(silent);
    cluster.settle();
    assert_eq!(
        taints(&cluster),
        [(nodes::NOT_READY.to_string(), "NoSchedule".to_string())]
    );
}

#[test]
fn pods_leave_an_unreachable_node_when_their_tolerations_end() {
    let mut cluster = cluster();
    let tolerate = |seconds: Value| {
        let mut toleration =
            json!({"key": nodes::UNREACHABLE, "operator": "Exists", "effect": "NoExecute"});
        toleration["tolerationSeconds"] = seconds;
        json!([toleration])
    };
    let short = add_pod(&mut cluster, "short", tolerate(json!(20)));
    let silent = add_pod(&mut cluster, "says-nothing", json!([]));
    let forever = add_pod(&mut cluster, "forever", tolerate(Value::Null));
    let stubborn = add_pod(&mut cluster, "stubborn", json!([{"operator": "Exists"}]));
    let there = |cluster: &Cluster| {
        [&short, &silent, &forever, &stubborn].map(|key| cluster.snapshot.pods.contains(key))
    };
    cluster.advance(GRACE_S + 1);
    cluster.settle();
    assert_eq!(there(&cluster), [true; 4]);
    cluster.advance(20);
    cluster.settle();
    assert_eq!(there(&cluster), [false, true, true, true]);
    cluster.advance(280);
    cluster.settle();
    assert_eq!(
        there(&cluster),
        [false, false, true, true],
        "300 s unless the pod says otherwise"
    );
    cluster.advance(100_000);
    cluster.settle();
    assert_eq!(there(&cluster), [false, false, true, true]);
}

#[test]
fn an_own_no_execute_taint_drives_out_at_once_who_does_not_tolerate_it() {
    let mut cluster = cluster();
    let goes = add_pod(&mut cluster, "goes", json!([]));
    let stays = add_pod(
        &mut cluster,
        "stays",
        json!([{"key": "maintenance", "operator": "Exists"}]),
    );
    cluster.edit::<Node>(&Key::cluster("n0"), |node| {
        node.spec = serde_json::from_value(
            json!({"taints": [{"key": "maintenance", "effect": "NoExecute"}]}),
        )
        .unwrap();
    });
    cluster.settle();
    assert!(!cluster.snapshot.pods.contains(&goes));
    assert!(cluster.snapshot.pods.contains(&stays));
    let late: Key = add_pod(&mut cluster, "late", json!([]));
    cluster.settle();
    assert!(
        !cluster.snapshot.pods.contains(&late),
        "a pod that comes later as well"
    );
}
