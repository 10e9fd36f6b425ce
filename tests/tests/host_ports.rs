//! Ports of the node that pods ask for (`hostPort`), by the CNI plugin with a real agent behind it.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use keelway_agent::net::AddressNews;
use keelway_tests::agents::{AgentNode, addresses_of, cni_result, two_dual_stack_nodes, until};
use keelway_tests::sandbox::{Network, Sandbox, ip, is_root};
use serde_json::json;

struct Topology {
    nodes: [AgentNode; 2],
    _dir: tempfile::TempDir,
    _sandbox: Sandbox,
}

/// Two nodes with their agents.
fn topology(test: &str) -> Option<Topology> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let (cluster, mut nodes) = two_dual_stack_nodes(&sandbox, dir.path(), &[]).expect("two nodes");
    cluster.write(&[]).expect("the cluster's file");
    for node in &mut nodes {
        node.start().expect("an agent");
    }
    Some(Topology {
        nodes,
        _dir: dir,
        _sandbox: sandbox,
    })
}

#[test]
fn ports_of_the_node_lead_to_the_pod_that_asked_for_them() {
    let Some(topology) = topology("ports_of_the_node_lead_to_the_pod") else {
        return;
    };
    let [node, other] = &topology.nodes;
    let wish = json!({"runtimeConfig": {"portMappings": [
        {"hostPort": 8081, "containerPort": 7000, "protocol": "tcp"},
    ]}});
    let network = Network::new().expect("a network");
    let added = node
        .cni("ADD", "c1", Some(&network), wish.clone())
        .expect("the plugin");
    let addresses = addresses_of(&cni_result(&added).expect("a result")).expect("addresses");
    let listener = network
        .run(|| TcpListener::bind((addresses[0], 7000)))
        .expect("a listener");
    let serving = thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, client) = listener.accept().expect("a client");
            let answer = client.ip().to_string();
            stream.write_all(answer.as_bytes()).expect("an answer");
        }
    });
    let ask = |network: &Network| {
        network.run(|| -> Result<String> {
            let at = SocketAddr::from(([198, 18, 0, 1], 8081));
            let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(5))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })
    };
    until("the port", || {
        Ok((node.report()?["frontends"] == 2).then_some(()))
    })
    .expect("planned");
    assert_eq!(
        ask(&other.host).expect("an answer"),
        "198.18.0.2",
        "the client's address is kept"
    );
    let pod = other.wire("client").expect("a pod");
    ask(&pod.network).expect("an answer");
    serving.join().expect("no panic");

    let second = Network::new().expect("a network");
    let refused = node
        .cni("ADD", "c2", Some(&second), wish.clone())
        .expect("the plugin");
    assert!(
        String::from_utf8_lossy(&refused.stdout)
            .contains("hostPort 8081 of this node is default/c1's"),
        "{refused:?}"
    );
    let killed = node.kill_worker().expect("another worker");
    node.wait("the port again", |report| {
        report["ready"] == true && report["frontends"] == 2
    })
    .unwrap_or_else(|error| panic!("{error:#} after {killed:?}"));
    assert!(
        node.cni("DEL", "c1", None, json!({}))
            .expect("the plugin")
            .status
            .success()
    );
    node.wait("no port", |report| report["frontends"] == 0)
        .expect("it goes");
    let added = node
        .cni("ADD", "c2", Some(&second), wish)
        .expect("the plugin");
    cni_result(&added).expect("the port is free again");
}

#[test]
fn ports_of_the_node_lead_datagrams_of_both_families_and_at_the_address_that_they_name() {
    let Some(topology) = topology("ports_of_the_node_lead_datagrams") else {
        return;
    };
    let [node, other] = &topology.nodes;
    let wish = json!({"runtimeConfig": {"portMappings": [
        {"hostPort": 8082, "containerPort": 7000, "protocol": "udp"},
        {"hostPort": 8083, "containerPort": 7000, "protocol": "tcp", "hostIP": "198.18.0.1"},
        {"hostPort": 8084, "containerPort": 7000, "protocol": "tcp", "hostIP": "198.18.0.2"},
    ]}});
    let network = Network::new().expect("a network");
    let added = node
        .cni("ADD", "c1", Some(&network), wish)
        .expect("the plugin");
    let addresses = addresses_of(&cni_result(&added).expect("a result")).expect("addresses");
    let _listener = network
        .run(|| TcpListener::bind((addresses[0], 7000)))
        .expect("a listener");
    let pod = other.wire("client").expect("a pod");
    let near = node.wire("near").expect("a pod");
    let patience = Duration::from_secs(5);
    for (address, host) in [
        (addresses[0], "198.18.0.1"),
        (addresses[1], "fd00:198:18::1"),
    ] {
        let bind = |address: IpAddr| -> Result<UdpSocket> {
            let socket = UdpSocket::bind((address, 7000))?;
            socket.set_read_timeout(Some(patience))?;
            Ok(socket)
        };
        let server = network.run(|| bind(address)).expect("a socket");
        let at = SocketAddr::new(host.parse().expect("an address"), 8082);
        let any = match at {
            SocketAddr::V4(_) => IpAddr::from([0, 0, 0, 0]),
            SocketAddr::V6(_) => IpAddr::from([0; 16]),
        };
        for network in [&other.host, &pod.network, &near.network] {
            let client = network.run(|| bind(any)).expect("a socket");
            client.send_to(b"ask", at).expect("sent");
            let mut buffer = [0; 16];
            let (length, from) = server.recv_from(&mut buffer).expect("it arrives");
            assert_eq!(&buffer[..length], b"ask");
            server.send_to(b"answer", from).expect("sent");
            let (length, from) = client.recv_from(&mut buffer).expect("an answer");
            assert_eq!((&buffer[..length], from), (&b"answer"[..], at));
        }
    }
    let connect = |port: u16| {
        let at = SocketAddr::from(([198, 18, 0, 1], port));
        other
            .host
            .run(|| TcpStream::connect_timeout(&at, patience).map_err(|error| error.kind()))
    };
    connect(8083).expect("at the address that it names");
    let elsewhere = connect(8084).expect_err("another node's address");
    assert_eq!(elsewhere, std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn an_address_that_comes_to_the_node_has_the_nodes_ports() {
    let Some(topology) = topology("an_address_that_comes_to_the_node") else {
        return;
    };
    let [node, other] = &topology.nodes;
    let wish = json!({"runtimeConfig": {"portMappings": [
        {"hostPort": 8081, "containerPort": 7000, "protocol": "tcp"},
    ]}});
    let network = Network::new().expect("a network");
    let added = node
        .cni("ADD", "c1", Some(&network), wish)
        .expect("the plugin");
    let addresses = addresses_of(&cni_result(&added).expect("a result")).expect("addresses");
    let _listener = network
        .run(|| TcpListener::bind((addresses[0], 7000)))
        .expect("a listener");
    let news = node.host.run(AddressNews::open).expect("news");
    let (tell, told) = mpsc::channel();
    let hearing = thread::spawn(
        move || {
            while news.wait().is_ok() && tell.send(()).is_ok() {}
        },
    );
    node.host
        .run(|| ip("address add 198.18.0.77/32 dev eth0"))
        .expect("an address");
    told.recv_timeout(Duration::from_secs(10)).expect("news");
    let at = SocketAddr::from(([198, 18, 0, 77], 8081));
    until("the port at the new address", || {
        let connected = other
            .host
            .run(|| TcpStream::connect_timeout(&at, Duration::from_secs(5)));
        Ok(connected.ok())
    })
    .expect("a connection");
    drop(told);
    node.host
        .run(|| ip("address del 198.18.0.77/32 dev eth0"))
        .expect("it goes");
    hearing.join().expect("no panic");
}
