//! Addresses of load balancers on a link: who answers for them, and who does when that one is gone.

use std::net::Ipv4Addr;

use keelway_tests::agents::{Segment, Service, segment, until};
use keelway_tests::sandbox::{Sandbox, is_root};
use serde_json::json;

const VIP: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 200);

fn web(endpoints: Vec<(Ipv4Addr, &'static str)>, policy: &str) -> Service {
    Service {
        name: "web",
        address: Ipv4Addr::new(10, 96, 0, 7),
        endpoints,
        spec: json!({"type": "LoadBalancer", "externalTrafficPolicy": policy}),
        balanced: Some(VIP),
    }
}

/// Two nodes that have pools, and a client on their link; `None` without root.
fn topology(test: &str) -> Option<(Sandbox, tempfile::TempDir, Segment)> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let pools = dir.path().join("pools.yaml");
    std::fs::write(
        &pools,
        "pools: [{name: link, addresses: [198.18.0.200/29]}]",
    )
    .expect("pools");
    let flags = ["--load-balancer-config", pools.to_str().expect("a path")];
    let mut segment = segment(&sandbox, dir.path(), &flags).expect("a segment");
    segment.cluster.write(&[]).expect("the cluster's file");
    for node in &mut segment.nodes {
        node.start().expect("an agent");
    }
    for node in &segment.nodes {
        node.wait("both on the link", |report| {
            report["linkNodes"] == json!(["node-1", "node-2"])
        })
        .expect("both");
    }
    // Dropped from the last to the first: agents end before what they lie in.
    Some((sandbox, dir, segment))
}

#[test]
fn an_agent_that_stops_hands_over_and_policy_local_stays_with_endpoints() {
    let test = "an_agent_that_stops_hands_over_and_policy_local_stays_with_endpoints";
    let Some((_sandbox, _dir, mut segment)) = topology(test) else {
        return;
    };
    let announces = |segment: &Segment, node: usize| {
        segment.nodes[node]
            .wait("the address", |report| report["announced"] == json!([VIP]))
            .expect("it");
    };
    let pod = segment.nodes[1].add_pod("c").expect("a pod");
    let local = web(vec![(pod.address, "node-2")], "Local");
    segment.cluster.write(&[local]).expect("the file");
    announces(&segment, 1);
    let report = segment.nodes[0].report().expect("a report");
    assert_eq!(report["announced"], json!([]));

    segment
        .cluster
        .write(&[web(vec![(pod.address, "node-2")], "Cluster")])
        .expect("the file");
    let both = |segment: &Segment| {
        let shown = segment
            .nodes
            .each_ref()
            .map(|node| node.report().expect("a report")["announced"] == json!([VIP]));
        shown.iter().position(|announced| *announced)
    };
    let answering = until("one node", || Ok(both(&segment))).expect("a node");
    segment.nodes[answering].stop().expect("it stops");
    announces(&segment, 1 - answering);

    // Nothing is announced that no Service has.
    segment.cluster.write(&[]).expect("the file");
    segment.nodes[1 - answering]
        .wait("silence", |report| report["announced"] == json!([]))
        .expect("silence");
}

#[test]
fn wrong_pools_are_refused_at_the_start() {
    let dir = tempfile::tempdir().expect("a folder");
    let pools = dir.path().join("pools.yaml");
    std::fs::write(
        &pools,
        "pools: [{name: a, addresses: [198.18.0.9-198.18.0.1]}]",
    )
    .expect("it");
    let flags = ["--load-balancer-config", pools.to_str().expect("a path")];
    let output = keelway_tests::agents::agent_run(&flags).expect("an agent");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(
        said.contains("pools.yaml") && said.contains("before the first"),
        "{said}"
    );
}
