//! Nodes that are reached by more than one interface: clients outside come by any of them, and agents follow which there are.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};

use keelway_tests::agents::{
    AgentNode, ClusterFile, DUAL_STACK_RANGES, Pod, two_dual_stack_nodes, until,
};
use keelway_tests::nodes::{ECHO_PORT, echo};
use keelway_tests::requests::{TIMEOUT, exchange};
use keelway_tests::sandbox::{Network, Sandbox, ip, is_root};
use serde_json::{Value, json};

const NODE_PORT: u16 = 30080;
/// Of the second interface, and of the client's.
const MAC: &str = "02:00:00:00:00:01";
const CLIENT_MAC: &str = "02:00:00:00:00:09";
/// An address of the Service that is no node's.
const EXTERNAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

/// Two nodes, a pod on each, and a client behind a second interface of the first node. Goes with the value.
struct Second {
    nodes: [AgentNode; 2],
    a: Pod,
    c: Pod,
    client: Network,
    cluster: ClusterFile,
    _dir: tempfile::TempDir,
    _sandbox: Sandbox,
}

/// A Service of both families at a NodePort and an external address, which leads to these endpoints of nodes.
fn service(policy: &str, endpoints: &[(IpAddr, &str)]) -> Vec<Value> {
    let ports = ["TCP", "UDP"].map(|protocol| {
        json!({"name": protocol.to_lowercase(), "port": 80, "protocol": protocol, "nodePort": NODE_PORT})
    });
    let target = ["TCP", "UDP"].map(|protocol| {
        json!({"name": protocol.to_lowercase(), "port": ECHO_PORT, "protocol": protocol})
    });
    let slice = |ipv4: bool| {
        let own = endpoints.iter().filter(|(ip, _)| ip.is_ipv4() == ipv4);
        let own = own.map(|(ip, node)| json!({"addresses": [ip], "nodeName": node}));
        let own: Vec<Value> = own.collect();
        let family = if ipv4 { "IPv4" } else { "IPv6" };
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family, "ports": target, "endpoints": own,
            "metadata": {
                "namespace": "default", "name": format!("web-{}", family.to_lowercase()),
                "labels": {"kubernetes.io/service-name": "web"},
            },
        })
    };
    let spec = json!({
        "type": "NodePort", "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00:10:96::7"],
        "ipFamilies": ["IPv4", "IPv6"], "externalIPs": [EXTERNAL], "ports": ports,
        "externalTrafficPolicy": policy,
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web"}, "spec": spec,
    });
    vec![service, slice(true), slice(false)]
}

impl Second {
    /// The first node has the second interface not yet. None, with a word about it, without root.
    fn start(test: &str, flags: &[&str]) -> Option<Self> {
        if !is_root(test) {
            return None;
        }
        let sandbox = Sandbox::enter().expect("a sandbox");
        let dir = tempfile::tempdir().expect("a folder");
        let flags = [&DUAL_STACK_RANGES[..], flags].concat();
        let (cluster, mut nodes) =
            two_dual_stack_nodes(&sandbox, dir.path(), &flags).expect("two nodes");
        cluster.write(&[]).expect("the cluster's file");
        for node in &mut nodes {
            node.host.run(|| {
                // The strictest that hosts have.
                for conf in ["all", "default"] {
                    let path = format!("/proc/sys/net/ipv4/conf/{conf}/rp_filter");
                    fs::write(path, "1").expect("a sysctl");
                }
            });
            node.start().expect("an agent");
        }
        let a = nodes[0].add_pod("a").expect("a pod");
        let c = nodes[1].add_pod("c").expect("a pod");
        Some(Self {
            nodes,
            a,
            c,
            client: Network::new().expect("a network"),
            cluster,
            _dir: dir,
            _sandbox: sandbox,
        })
    }

    /// Leads the Service to a pod of each node and to the first one's own process, or to that alone.
    fn serve(&self, policy: &str, with_pods: bool) {
        let of_host = ["198.18.0.1", "fd00:198:18::1"].map(|ip| ip.parse().expect("an address"));
        let mut endpoints: Vec<(IpAddr, &str)> = of_host.map(|ip| (ip, "node-1")).into();
        if with_pods {
            endpoints.extend(self.a.addresses.iter().map(|ip| (*ip, "node-1")));
            endpoints.extend(self.c.addresses.iter().map(|ip| (*ip, "node-2")));
        }
        let objects = service(policy, &endpoints);
        let written = self.cluster.write_with(&[], &objects);
        written.expect("the cluster's file");
    }

    /// Wires the client to a second interface of the first node: 198.19.0.1 and fd00:198:19::1, the client being .9 there.
    fn wire(&self) {
        let wire = format!(
            "link add kw-second address {MAC} type veth peer name kw-client address {CLIENT_MAC}"
        );
        ip(&wire).expect("a wire");
        let ends = [
            (&self.nodes[0].host, "kw-second", "eth1", 1),
            (&self.client, "kw-client", "eth0", 9),
        ];
        for (network, made, name, last) in ends {
            network.take(made).expect("an end");
            network.run(|| {
                ip(&format!("link set {made} name {name}")).expect("a name");
                ip(&format!("link set {name} up")).expect("up");
                ip(&format!("addr add 198.19.0.{last}/24 dev {name}")).expect("an address");
                ip(&format!("addr add fd00:198:19::{last}/64 dev {name} nodad")).expect("one");
            });
        }
        self.client
            .run(|| ip(&format!("route add {EXTERNAL}/32 via 198.19.0.1")))
            .expect("a route");
    }

    fn wait_for_uplinks(&self, wished: &[&str]) -> Value {
        let is_wished = |report: &Value| report["uplinks"] == json!(wished);
        let what = format!("uplinks {wished:?}");
        self.nodes[0].wait(&what, is_wished).expect("uplinks")
    }
}

/// The name of the server that answers a connection of its own, and whom it takes the client to be.
fn ask(from: &Network, at: SocketAddr) -> std::io::Result<String> {
    let mut stream = from.run(|| TcpStream::connect_timeout(&at, TIMEOUT))?;
    exchange(&mut stream)
}

/// The same by a datagram.
fn send(from: &Network, at: SocketAddr) -> std::io::Result<String> {
    let any = if at.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = from.run(|| UdpSocket::bind(any))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.connect(at)?;
    socket.send(b"hello")?;
    let mut buffer = [0; 256];
    let len = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
}

/// What each server is called and takes its client to be, over so many questions that each is asked.
fn answers(client: &Network, at: SocketAddr) -> BTreeSet<String> {
    let mut answers = BTreeSet::new();
    for how in [ask, send] {
        let asked = (0..40).map(|_| how(client, at));
        answers.extend(asked.map(|answer| answer.expect("an answer")));
    }
    answers
}

#[test]
fn clients_reach_services_by_a_second_uplink_which_may_come_and_go() {
    let test = "clients_reach_services_by_a_second_uplink_which_may_come_and_go";
    let Some(second) = Second::start(test, &[]) else {
        return;
    };
    second.serve("Cluster", true);
    second.wait_for_uplinks(&["eth0"]);
    second.wire();
    let report = second.wait_for_uplinks(&["eth0", "eth1"]);
    assert_eq!(report["problems"], json!([]), "{report}");
    let shown = second.nodes[0].command(&["status"]).expect("it").ok();
    assert!(shown.contains("Uplinks:   eth0 (tc, not XDP: "), "{shown}");
    assert!(shown.contains(", eth1 (tc)\n"), "{shown}");
    let addresses: [(IpAddr, u16); 3] = [
        ([198, 19, 0, 1].into(), NODE_PORT),
        (EXTERNAL.into(), 80),
        ("fd00:198:19::1".parse().expect("an address"), NODE_PORT),
    ];
    for (address, port) in addresses {
        let at = SocketAddr::new(address, port);
        until("an answer", || Ok(ask(&second.client, at).ok())).expect("an answer");
        let answers = answers(&second.client, at);
        let names: BTreeSet<&str> = answers
            .iter()
            .filter_map(|answer| answer.split(' ').next())
            .collect();
        assert_eq!(names, BTreeSet::from(["a", "c", "node-1"]), "{answers:?}");
        let own = if at.is_ipv4() {
            "198.19.0.9"
        } else {
            "fd00:198:19::9"
        };
        assert!(answers.contains(&format!("a {own}")), "{answers:?}");
    }
    // Directly to a pod, which answers by its node.
    let pod = SocketAddr::from((second.a.address, ECHO_PORT));
    second
        .client
        .run(|| ip("route add 10.244.0.0/16 via 198.19.0.1"))
        .expect("a route");
    assert!(
        ask(&second.client, pod)
            .expect("an answer")
            .starts_with("a ")
    );
    second.nodes[0]
        .host
        .run(|| ip("link del eth1"))
        .expect("it goes");
    second.wait_for_uplinks(&["eth0"]);
    // The pods of the other node are reached as before, and the interface may come again.
    second.wire();
    second.wait_for_uplinks(&["eth0", "eth1"]);
    let at = SocketAddr::from(([198, 19, 0, 1], NODE_PORT));
    until("an answer", || Ok(ask(&second.client, at).ok())).expect("an answer");
    assert_eq!(answers(&second.client, at).len(), 3);
    let again = SocketAddr::from((second.c.address, ECHO_PORT));
    assert!(
        ask(&second.a.network, again)
            .expect("an answer")
            .starts_with("c ")
    );
}

#[test]
fn an_interface_that_is_no_uplink_any_more_has_no_program() {
    let test = "an_interface_that_is_no_uplink_any_more_has_no_program";
    let Some(second) = Second::start(test, &[]) else {
        return;
    };
    second.serve("Cluster", true);
    second.wire();
    second.wait_for_uplinks(&["eth0", "eth1"]);
    let at = SocketAddr::from((EXTERNAL, 80));
    until("an answer", || Ok(ask(&second.client, at).ok())).expect("an answer");
    let host = &second.nodes[0].host;
    host.run(|| ip("addr flush dev eth1")).expect("no address");
    second.wait_for_uplinks(&["eth0"]);
    // The way there and back is as it was.
    host.run(|| {
        ip("route add 198.19.0.9/32 dev eth1").expect("a route");
        let known = format!("neigh replace 198.19.0.9 lladdr {CLIENT_MAC} dev eth1 nud permanent");
        ip(&known).expect("a neighbour");
    });
    let known = format!("neigh replace 198.19.0.1 lladdr {MAC} dev eth0 nud permanent");
    second.client.run(|| ip(&known)).expect("a neighbour");
    assert!(ask(&second.client, at).is_err());
    // A default route makes it one again.
    host.run(|| ip("route add default dev eth1"))
        .expect("a route");
    second.wait_for_uplinks(&["eth0", "eth1"]);
    until("an answer", || Ok(ask(&second.client, at).ok())).expect("an answer");
}

#[test]
fn named_uplinks_are_the_only_ones_beside_the_nodes_own() {
    let test = "named_uplinks_are_the_only_ones_beside_the_nodes_own";
    let Some(second) = Second::start(test, &["--uplink", "eth7"]) else {
        return;
    };
    second.wire();
    let note = "--uplink eth7: there is no Ethernet interface of this name";
    let is_told = |report: &Value| report["notes"].to_string().contains(note);
    second.nodes[0].wait("a note", is_told).expect("a note");
    second.wait_for_uplinks(&["eth0"]);
    let host = &second.nodes[0].host;
    host.run(|| {
        ip("link set eth1 down").expect("down");
        ip("link set eth1 name eth7").expect("a name");
        ip("link set eth7 up").expect("up");
    });
    second.wait_for_uplinks(&["eth0", "eth7"]);
}

#[test]
fn clients_keep_their_addresses_at_the_nodes_own_endpoints_with_policy_local() {
    let test = "clients_keep_their_addresses_at_the_nodes_own_endpoints_with_policy_local";
    let Some(mut second) = Second::start(test, &[]) else {
        return;
    };
    second.wire();
    second.wait_for_uplinks(&["eth0", "eth1"]);
    // What leaves the node is looked at where that is needed, and only there.
    let looked_at = |node: &AgentNode| {
        let versions = fs::read_dir(node.pin_root()).expect("the pins").flatten();
        let links = versions.filter_map(|version| fs::read_dir(version.path().join("links")).ok());
        let names = links.flatten().flatten().map(|link| link.file_name());
        let is_look = |name: &OsString| name.to_string_lossy().starts_with("uplink_egress-");
        names.filter(is_look).count()
    };
    assert_eq!(looked_at(&second.nodes[0]), 0);
    second.serve("Local", false);
    let v6 = |ip: &str| ip.parse::<IpAddr>().expect("an address");
    let other = &second.nodes[1].host.try_clone().expect("a network");
    let pod = &second.c;
    let check = || {
        // From the other node, from its pod by the overlay or without, and by the second uplink. There datagrams' answers would have that
        // uplink's address, which is not the endpoint's.
        for (client, address, port, own, datagrams) in [
            (
                other,
                v6("198.18.0.1"),
                NODE_PORT,
                "198.18.0.2",
                "198.18.0.2",
            ),
            (
                other,
                v6("fd00:198:18::1"),
                NODE_PORT,
                "fd00:198:18::2",
                "fd00:198:18::2",
            ),
            (
                &second.client,
                v6("198.19.0.1"),
                NODE_PORT,
                "198.19.0.9",
                "169.254.77.77",
            ),
            (
                &second.client,
                EXTERNAL.into(),
                80,
                "198.19.0.9",
                "169.254.77.77",
            ),
            (
                &second.client,
                v6("fd00:198:19::1"),
                NODE_PORT,
                "fd00:198:19::9",
                "fd6b:7700::77:77",
            ),
        ] {
            let at = SocketAddr::new(address, port);
            until("an answer", || Ok(ask(client, at).ok())).expect("an answer");
            let wished = [own, datagrams].map(|client| format!("node-1 {client}"));
            assert_eq!(answers(client, at), BTreeSet::from(wished), "{at}");
        }
        let at = SocketAddr::from(([198, 18, 0, 1], NODE_PORT));
        let of_pod = ask(&pod.network, at).expect("an answer");
        assert_eq!(of_pod, format!("node-1 {}", pod.address));
        send(&pod.network, at).expect("an answer to a datagram");
        // What is asked directly is none of the Service's.
        let direct = SocketAddr::from(([198, 18, 0, 1], ECHO_PORT));
        assert_eq!(ask(other, direct).expect("an answer"), "node-1 198.18.0.2");
    };
    check();
    assert_eq!([0, 1].map(|node| looked_at(&second.nodes[node])), [3, 0]);
    // The answers of a connection that lives leave as they did, whoever else the Service leads to, and whatever becomes of the agent.
    let at = SocketAddr::from(([198, 18, 0, 1], NODE_PORT));
    let mut stream = other
        .run(|| TcpStream::connect_timeout(&at, TIMEOUT))
        .expect("it");
    stream.set_read_timeout(Some(TIMEOUT)).expect("a timeout");
    let mut buffer = [0; 256];
    let mut goes_on = || {
        stream.write_all(b"hello").expect("sent");
        assert!(stream.read(&mut buffer).expect("an answer") > 0);
    };
    goes_on();
    second.serve("Cluster", false);
    until("another source", || {
        let answer = ask(other, at)?;
        Ok((answer == "node-1 169.254.77.77").then_some(()))
    })
    .expect("another source");
    goes_on();
    second.nodes[0].stop().expect("the agent's end");
    second.nodes[0].start().expect("an agent");
    goes_on();
}

#[test]
fn pods_leave_the_cluster_as_the_node_by_whichever_uplink() {
    let test = "pods_leave_the_cluster_as_the_node_by_whichever_uplink";
    let Some(second) = Second::start(test, &["--masquerade", "on"]) else {
        return;
    };
    second.wire();
    second.wait_for_uplinks(&["eth0", "eth1"]);
    echo(&second.client, "outside").expect("a server");
    for (there, node) in [
        ("198.19.0.9", "198.19.0.1"),
        ("fd00:198:19::9", "fd00:198:19::1"),
    ] {
        let at = SocketAddr::new(there.parse().expect("an address"), ECHO_PORT);
        for how in [ask, send] {
            let wished = format!("outside {node}");
            until("an answer to the node", || {
                Ok(how(&second.a.network, at)
                    .ok()
                    .filter(|seen| *seen == wished))
            })
            .expect("an answer");
        }
    }
}
