//! Credentials that end while an agent runs: others are put in their place, and it goes on with those.

use std::net::Ipv4Addr;

use keelway_tests::agents::{AgentNode, ClusterFile, numbered_node};
use keelway_tests::lists::{ListServer, services};
use keelway_tests::sandbox::{Network, Sandbox, ip, is_root};

#[test]
fn an_agent_whose_credentials_are_refused_goes_on_with_those_that_took_their_place() {
    if !is_root("credentials that are replaced") {
        return;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let address = Ipv4Addr::new(198, 18, 0, 1);
    let host = Network::new().expect("a network");
    let server = host.run(|| {
        ip("link add eth0 type veth peer name peer").expect("an uplink");
        ip(&format!("addr add {address}/24 dev eth0")).expect("an address");
        for link in ["eth0", "peer"] {
            ip(&format!("link set {link} up")).expect("a link");
        }
        ListServer::start().expect("a server")
    });
    let (name, object) = numbered_node(1, address, None);
    server.set("nodes", vec![object]);
    let [objects, slices] = services(20, 1);
    server.set("services", objects);
    server.set("endpointslices", slices);
    server.demand("first");
    let kubeconfig = server.kubeconfig(dir.path()).expect("a kubeconfig");
    // Not followed, but a node of tests has one.
    let cluster = ClusterFile {
        path: dir.path().join("cluster.json"),
        nodes: Vec::new(),
    };
    let mut node =
        AgentNode::new(&sandbox, dir.path(), &cluster, name, host, address, &[]).expect("a node");
    node.ask_by(kubeconfig);
    node.start().expect("an agent");
    let first = node.worker().expect("a worker");
    // Refused with nothing better at hand, it goes on as it is, and says so.
    server.demand("second");
    let refused =
        |report: &serde_json::Value| report["problems"].to_string().contains("cannot be watched");
    node.wait("a refusal", refused).expect("a refusal");
    assert_eq!(node.worker().expect("a worker"), first);
    server.kubeconfig(dir.path()).expect("another kubeconfig");
    let report = node.wait("another worker", |report| {
        report["restarts"] == 1 && report["ready"] == true
    });
    let report = report.expect("another worker");
    let last_end = report["lastEnd"].to_string();
    assert!(last_end.contains("refuses the credentials"), "{last_end}");
    // With its new ones it hears what is new.
    let [objects, slices] = services(30, 1);
    server.set("services", objects);
    server.set("endpointslices", slices);
    server.expire();
    node.wait("more Services", |report| report["services"] == 30)
        .expect("more Services");
}
