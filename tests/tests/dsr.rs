//! Clients outside that are answered by their endpoint's node directly: real agents, real sockets, both families.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use keelway_tests::agents::{AgentNode, Segment, Service, dual_stack_segment, until};
use keelway_tests::nodes::{self, ECHO_PORT, ask};
use keelway_tests::requests::{self, TIMEOUT};
use keelway_tests::sandbox::{Sandbox, ip, is_root};
use serde_json::{Value, json};

/// Not a test of its own: the process that others start as a client.
#[test]
fn client() {
    nodes::client(requests::carry_out);
}

const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

fn ports(node_port: u16) -> Value {
    let port = |name, protocol| {
        json!({
            "name": name, "port": 80, "protocol": protocol, "nodePort": node_port,
        })
    };
    json!([port("tcp", "TCP"), port("udp", "UDP")])
}

fn service(
    name: &'static str,
    last: u8,
    node_port: u16,
    endpoints: &[(Ipv4Addr, &'static str)],
    more: Value,
) -> Service {
    let mut spec = json!({"type": "LoadBalancer", "ports": ports(node_port)});
    if let (Value::Object(spec), Value::Object(more)) = (&mut spec, more) {
        spec.extend(more);
    }
    Service {
        name,
        address: Ipv4Addr::new(10, 96, 0, last),
        endpoints: endpoints.to_vec(),
        spec,
        balanced: None,
    }
}

/// A Service of IPv6 whose endpoint is on node-2.
fn six(endpoint: &str) -> [Value; 2] {
    [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "six"},
            "spec": {
                "type": "NodePort", "clusterIP": "fd00:96::6", "clusterIPs": ["fd00:96::6"],
                "ipFamilies": ["IPv6"], "ports": ports(30086),
            },
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv6",
            "metadata": {
                "namespace": "default", "name": "six-1", "labels": {"kubernetes.io/service-name": "six"},
            },
            "ports": [
                {"name": "tcp", "port": ECHO_PORT, "protocol": "TCP"}, {"name": "udp", "port": ECHO_PORT, "protocol": "UDP"},
            ],
            "endpoints": [{"addresses": [endpoint], "nodeName": "node-2", "conditions": {"ready": true}}],
        }),
    ]
}

fn topology(test: &str) -> Option<(Sandbox, tempfile::TempDir, Segment)> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let flags = [
        "--dsr",
        "on",
        "--service-cidr",
        "10.96.0.0/16",
        "--service-cidr",
        "fd00:96::/112",
    ];
    let mut segment = dual_stack_segment(&sandbox, dir.path(), &flags).expect("a segment");
    segment.cluster.write(&[]).expect("the cluster's file");
    for node in &mut segment.nodes {
        node.start().expect("an agent");
    }
    // Dropped from the last to the first: agents end before what they lie in.
    Some((sandbox, dir, segment))
}

fn counted(node: &AgentNode, reason: &str) -> u64 {
    let report = node.report().expect("a report");
    let counters = report["counters"].as_array().expect("counters");
    let found = counters.iter().find(|counter| counter["reason"] == reason);
    found
        .and_then(|counter| counter["packets"].as_u64())
        .expect("a count")
}

fn wait_for_ports(segment: &Segment, ports: u64) {
    for node in &segment.nodes {
        let all = |report: &Value| report["servicePorts"].as_u64() == Some(ports);
        node.wait("every Service", all).expect("them");
    }
}

#[test]
fn endpoints_elsewhere_see_their_clients_and_answer_them_directly() {
    let test = "endpoints_elsewhere_see_their_clients_and_answer_them_directly";
    let Some((_sandbox, _dir, segment)) = topology(test) else {
        return;
    };
    let pod = segment.nodes[1].add_pod("c").expect("a pod");
    let own = segment.nodes[0].add_pod("a").expect("a pod");
    let [there, here] = [(pod.address, "node-2"), (own.address, "node-1")];
    let on_the_host = (segment.nodes[1].address, "node-2");
    let sticky = json!({"sessionAffinity": "ClientIP"});
    let services = [
        service("web", 1, 30080, &[there], json!({})),
        service("near", 2, 30081, &[here], json!({})),
        service("sticky", 3, 30082, &[there], sticky),
        service("host", 4, 30083, &[on_the_host], json!({})),
    ];
    let six_pod = pod.addresses[1].to_string();
    segment
        .cluster
        .write_with(&services, &six(&six_pod))
        .expect("the file");
    wait_for_ports(&segment, 10);
    for (at, wanted) in [
        ("198.18.0.1:30080", "c 198.18.0.9 from 198.18.0.1:30080"),
        ("198.18.0.2:30080", "c 198.18.0.9 from 198.18.0.2:30080"),
        ("198.18.0.1:30081", "a 198.18.0.9 from 198.18.0.1:30081"),
        // Who comes back to an endpoint is led by the node that he asked.
        ("198.18.0.1:30082", "c 198.18.0.1 from 198.18.0.1:30082"),
        (
            "198.18.0.1:30083",
            "node-2 169.254.77.77 from 198.18.0.1:30083",
        ),
        (
            "[fd00:198:18::1]:30086",
            "c fd00:198:18::9 from [fd00:198:18::1]:30086",
        ),
    ] {
        for protocol in ["tcp", "udp", "udp-connected"] {
            let answer =
                ask(&segment.client, None, &format!("{protocol} {at}")).expect("an answer");
            let report = || {
                segment
                    .nodes
                    .each_ref()
                    .map(|node| node.report().expect("a report")["counters"].clone())
            };
            assert_eq!(answer, wanted, "{protocol} {at}: {:?}", report());
        }
    }
    assert!(counted(&segment.nodes[0], "dispatched") > 0);
    // Only the sticky one's came back this way, and those of the pod here.
    let sent_on = counted(&segment.nodes[0], "source_nat");
    assert_eq!(sent_on, 3);
}

fn asks(stream: &mut TcpStream) -> String {
    stream.write_all(b"hello").expect("it takes a question");
    let mut buffer = [0; 256];
    let len = stream.read(&mut buffer).expect("an answer");
    String::from_utf8_lossy(&buffer[..len]).into_owned()
}

#[test]
fn connections_go_on_when_another_node_gets_their_packets() {
    let test = "connections_go_on_when_another_node_gets_their_packets";
    let Some((_sandbox, _dir, segment)) = topology(test) else {
        return;
    };
    let there = segment.nodes[1].add_pod("c").expect("a pod");
    let here = segment.nodes[0].add_pod("a").expect("a pod");
    let mut web = service(
        "web",
        1,
        30080,
        &[(here.address, "node-1"), (there.address, "node-2")],
        json!({}),
    );
    web.balanced = Some(VIP);
    segment.cluster.write(&[web]).expect("the file");
    wait_for_ports(&segment, 2);
    let lead_by = |node: &str| {
        let route = format!("route replace 192.0.2.1/32 via {node}");
        segment.client.run(|| ip(&route)).expect("a route");
    };
    lead_by("198.18.0.1");
    let at = SocketAddr::from((VIP, 80));
    let connect = || {
        let stream = segment
            .client
            .run(|| TcpStream::connect_timeout(&at, TIMEOUT));
        let stream = stream.expect("a connection");
        stream.set_read_timeout(Some(TIMEOUT)).expect("a timeout");
        stream
    };
    let mut streams: Vec<TcpStream> = (0..24).map(|_| connect()).collect();
    let first: Vec<String> = streams.iter_mut().map(asks).collect();
    let is_from = |name: &str| first.iter().any(|answer| answer.starts_with(name));
    assert!(
        is_from("a 198.18.0.9") && is_from("c 198.18.0.9"),
        "{first:?}"
    );
    // As a router does when it loses a way: the other node has never seen these connections.
    lead_by("198.18.0.2");
    let second: Vec<String> = streams.iter_mut().map(asks).collect();
    assert_eq!(first, second);
    let sent_on = until("packets sent on", || {
        Ok(Some(counted(&segment.nodes[1], "dispatched")).filter(|count| *count > 0))
    });
    assert!(sent_on.is_ok());
}
