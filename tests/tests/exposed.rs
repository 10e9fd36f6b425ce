//! Services as clients inside and outside the cluster reach them: NodePorts, external addresses, addresses of load balancers;
//! traffic policies, affinity and ranges of sources. Real sockets, two nodes of network namespaces; the second node's host is
//! the client outside.

use std::{
    fmt::Write as _,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
};

use dataplane_abi::Reason;
use keelway_agent::dataplane::{Lead, Op, ServiceBackends, ServiceId, Vip};
use keelway_tests::{
    agents,
    nodes::{
        self, AT_SOCKET, BOTH, Cgroup, ECHO_PORT, Hooks, Nodes, PER_PACKET, REFUSED, ask, frontend,
    },
    requests,
    sandbox::{Network, Sandbox, ip, is_root},
};

/// Not a test of its own: the process that others start as a client.
#[test]
fn client() {
    nodes::client(requests::carry_out);
}

/// Backends by what the echo servers there call themselves.
fn at(name: &str) -> SocketAddr {
    let address: Ipv4Addr = match name {
        "a" => [10, 244, 1, 11].into(),
        "b" => [10, 244, 1, 12].into(),
        "c" => [10, 244, 2, 11].into(),
        "node-1" => [198, 18, 0, 1].into(),
        "node-2" => [198, 18, 0, 2].into(),
        other => panic!("no backend {other}"),
    };
    SocketAddr::new(address.into(), ECHO_PORT)
}

fn service(id: u32, backends: &[&str]) -> Op {
    Op::SetService {
        id: ServiceId(id),
        backends: ServiceBackends {
            active: backends.iter().map(|name| at(name)).collect(),
            ..ServiceBackends::default()
        },
    }
}

/// NodePorts 30001 and on lead to one backend each.
const NODE_PORTS: [(u16, &str); 5] = [
    (30001, "a"),
    (30002, "b"),
    (30003, "c"),
    (30004, "node-1"),
    (30005, "node-2"),
];

/// Two nodes, and in the first one's tables: the NodePorts above; 30009 and 192.0.2.9 without endpoints; 30010 whose endpoints
/// are all on other nodes, with external policy Local; 192.0.2.1 of a load balancer, for some sources only.
fn started(test: &str, hooks: Hooks) -> Option<(Sandbox, Nodes, Option<Cgroup>)> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, hooks).unwrap();
    let cgroup = hooks.socket_lb.then(|| Cgroup::new().unwrap());
    let mut ops = Vec::new();
    for (id, (port, backend)) in (1..).zip(NODE_PORTS) {
        ops.push(service(id, &[backend]));
        ops.extend(frontend(
            &format!("0.0.0.0:{port}"),
            Lead::to(ServiceId(id)),
        ));
    }
    ops.push(service(9, &[]));
    ops.extend(frontend("0.0.0.0:30009", Lead::to(ServiceId(9))));
    ops.extend(frontend("192.0.2.9:80", Lead::to(ServiceId(9))));
    ops.push(Op::SetService {
        id: ServiceId(10),
        backends: ServiceBackends {
            silent: true,
            ..ServiceBackends::default()
        },
    });
    let nowhere_near = Lead {
        internal: ServiceId(3),
        external: ServiceId(10),
        guarded: false,
    };
    ops.extend(frontend("0.0.0.0:30010", nowhere_near));
    ops.push(Op::SetSources {
        id: ServiceId(3),
        sources: ["198.18.0.0/24", "10.244.1.11/32"]
            .iter()
            .map(|range| range.parse().unwrap())
            .collect(),
    });
    ops.push(Op::SetVip {
        addr: [192, 0, 2, 1].into(),
        kind: Vip::External,
    });
    let guarded = Lead {
        guarded: true,
        ..Lead::to(ServiceId(3))
    };
    ops.extend(frontend("192.0.2.1:80", guarded));
    let [first, second] = &mut nodes.nodes;
    first.dataplane().apply(&ops).unwrap();
    if let Some(cgroup) = &cgroup {
        first.dataplane().attach_cgroup(cgroup.path()).unwrap();
    }
    // The client outside finds the balanced addresses behind the first node.
    second
        .host
        .run(|| ip("route add 192.0.2.0/24 via 198.18.0.1"))
        .unwrap();
    Some((sandbox, nodes, cgroup))
}

fn drops(nodes: &mut Nodes) -> String {
    let counters = nodes.nodes[0].dataplane().counters().unwrap();
    let moved = counters.iter().filter(|(_, count)| *count > 0);
    moved.fold(String::new(), |mut text, (reason, count)| {
        write!(text, " {}={count}", reason.name()).unwrap();
        text
    })
}

fn counted(nodes: &mut Nodes, reason: Reason) -> u64 {
    let counters = nodes.nodes[0].dataplane().counters().unwrap();
    counters
        .iter()
        .find(|(other, _)| *other == reason)
        .unwrap()
        .1
}

#[test]
fn clients_outside_reach_every_kind_of_backend_by_a_node_port() {
    for hooks in [PER_PACKET, BOTH] {
        let Some((_sandbox, mut nodes, _cgroup)) = started("outside", hooks) else {
            return;
        };
        let mut failures = String::new();
        for (client, own) in [("node-2", "198.18.0.2"), ("c", "10.244.2.11")] {
            for (port, backend) in NODE_PORTS {
                let node = &nodes.nodes[1];
                let network = node.pods.get(client).map_or(&node.host, |pod| &pod.network);
                // Pods here see the client; the answers of others must come back here, and so must the host's own.
                let seen = match backend {
                    "a" | "b" => own,
                    "node-1" => "169.254.77.77",
                    _ => "198.18.0.1",
                };
                let wanted = format!("{backend} {seen} from 198.18.0.1:{port}");
                for protocol in ["tcp", "udp", "udp-connected"] {
                    let answer =
                        ask(network, None, &format!("{protocol} 198.18.0.1:{port}")).unwrap();
                    if answer != wanted {
                        writeln!(
                            failures,
                            "{client} by {protocol}: {answer:?}, not {wanted:?}"
                        )
                        .unwrap();
                    }
                }
            }
        }
        assert!(
            failures.is_empty(),
            "{hooks:?}: {failures}{}",
            drops(&mut nodes)
        );
    }
}

#[test]
fn pods_and_the_node_itself_reach_node_ports_of_their_node() {
    for hooks in [PER_PACKET, AT_SOCKET, BOTH] {
        let Some((_sandbox, mut nodes, cgroup)) = started("inside", hooks) else {
            return;
        };
        let mut failures = String::new();
        let mut clients = vec![("a", "198.18.0.1")];
        if hooks.socket_lb {
            clients.extend([("node-1", "198.18.0.1"), ("node-1", "127.0.0.1")]);
        }
        for (client, address) in clients {
            let mut ports = NODE_PORTS.to_vec();
            // Clients on the node are not bound by the external policy.
            ports.push((30010, "c"));
            for (port, backend) in ports {
                let node = &nodes.nodes[0];
                let network = node.pods.get(client).map_or(&node.host, |pod| &pod.network);
                for protocol in ["tcp", "udp", "udp-connected"] {
                    let request = format!("{protocol} {address}:{port}");
                    let answer = ask(network, cgroup.as_ref(), &request).unwrap();
                    if !(answer.starts_with(&format!("{backend} "))
                        && answer.ends_with(&format!(" from {address}:{port}")))
                    {
                        writeln!(failures, "{client}: {request} ({backend}): {answer}").unwrap();
                    }
                }
            }
        }
        assert!(
            failures.is_empty(),
            "{hooks:?}: {failures}{}",
            drops(&mut nodes)
        );
    }
}

#[test]
fn a_pods_loopback_is_its_own() {
    let Some((_sandbox, nodes, cgroup)) = started("loopback", BOTH) else {
        return;
    };
    let pod = &nodes.nodes[0].pods["a"].network;
    let answer = ask(pod, cgroup.as_ref(), "tcp 127.0.0.1:30002").unwrap();
    assert_eq!(answer, REFUSED);
    let answer = ask(pod, cgroup.as_ref(), "tcp 127.0.0.1:8080").unwrap();
    assert_eq!(answer, "a 127.0.0.1 from 127.0.0.1:8080");
}

#[test]
fn without_endpoints_every_client_is_refused_by_every_kind_of_address() {
    for hooks in [PER_PACKET, BOTH] {
        let Some((_sandbox, mut nodes, cgroup)) = started("no endpoints", hooks) else {
            return;
        };
        let outside = &nodes.nodes[1].host;
        let pod = &nodes.nodes[0].pods["a"].network;
        let mut clients: Vec<(&Network, Option<&Cgroup>)> =
            vec![(outside, None), (pod, cgroup.as_ref())];
        if hooks.socket_lb {
            clients.push((&nodes.nodes[0].host, cgroup.as_ref()));
        }
        let mut failures = String::new();
        for (number, (network, cgroup)) in clients.into_iter().enumerate() {
            for address in ["198.18.0.1:30009", "192.0.2.9:80", "192.0.2.1:81"] {
                for protocol in ["tcp", "udp-connected"] {
                    let answer = ask(network, cgroup, &format!("{protocol} {address}")).unwrap();
                    if answer != REFUSED {
                        writeln!(failures, "client {number}: {protocol} {address}: {answer}")
                            .unwrap();
                    }
                }
            }
        }
        assert!(
            failures.is_empty(),
            "{hooks:?}: {failures}{}",
            drops(&mut nodes)
        );
    }
}

#[test]
fn policy_local_without_an_endpoint_here_is_silent_to_clients_outside() {
    let Some((_sandbox, mut nodes, _cgroup)) = started("silence", PER_PACKET) else {
        return;
    };
    for request in ["tcp 198.18.0.1:30010", "udp 198.18.0.1:30010"] {
        let answer = ask(&nodes.nodes[1].host, None, request).unwrap();
        assert!(
            answer == "error: timed out" || answer == "error: operation would block",
            "{request}: {answer}"
        );
    }
    assert!(counted(&mut nodes, Reason::NoLocalBackend) >= 2);
    assert_eq!(counted(&mut nodes, Reason::NoBackend), 0);
}

#[test]
fn ranges_of_sources_let_in_whom_they_name() {
    for hooks in [PER_PACKET, BOTH] {
        let Some((_sandbox, mut nodes, cgroup)) = started("source ranges", hooks) else {
            return;
        };
        let [first, second] = &nodes.nodes;
        let request = "tcp 192.0.2.1:80";
        let from = |network, cgroup| ask(network, cgroup, request).unwrap();
        assert_eq!(
            from(&second.host, None),
            "c 198.18.0.1 from 192.0.2.1:80",
            "{hooks:?}"
        );
        assert_eq!(
            from(&first.pods["a"].network, cgroup.as_ref()),
            "c 10.244.1.11 from 192.0.2.1:80",
            "{hooks:?}"
        );
        if hooks.socket_lb {
            assert_eq!(
                from(&first.host, cgroup.as_ref()),
                "c 198.18.0.1 from 192.0.2.1:80"
            );
        }
        for (network, cgroup) in [
            (&second.pods["c"].network, None),
            (&first.pods["b"].network, cgroup.as_ref()),
        ] {
            let answer = from(network, cgroup);
            assert!(
                answer == "error: timed out" || answer == "error: operation would block",
                "{hooks:?}: {answer}"
            );
        }
        assert!(counted(&mut nodes, Reason::SourceRange) >= 2);
    }
}

#[test]
fn a_client_of_a_service_with_affinity_keeps_its_backend_until_it_is_gone() {
    for hooks in [PER_PACKET, AT_SOCKET, BOTH] {
        let Some((_sandbox, mut nodes, cgroup)) = started("affinity", hooks) else {
            return;
        };
        let affine = |backends: &[&str]| Op::SetService {
            id: ServiceId(20),
            backends: ServiceBackends {
                active: backends.iter().map(|name| at(name)).collect(),
                affinity_timeout_s: 60,
                ..ServiceBackends::default()
            },
        };
        let mut ops = vec![affine(&["b", "c", "node-1", "node-2"])];
        ops.extend(frontend("10.96.0.20:80", Lead::to(ServiceId(20))));
        ops.extend(frontend("0.0.0.0:30020", Lead::to(ServiceId(20))));
        nodes.nodes[0].dataplane().apply(&ops).unwrap();
        let mut last = String::new();
        for round in 0..2 {
            // One answer, whatever the address and protocol; whoever asks.
            let pod = &nodes.nodes[0].pods["a"].network;
            let mut backends = std::collections::BTreeSet::new();
            for request in [
                "8*tcp 10.96.0.20:80",
                "8*udp 10.96.0.20:80",
                "8*udp-connected 10.96.0.20:80",
                "8*tcp 198.18.0.1:30020",
            ] {
                let answer = ask(pod, cgroup.as_ref(), request).unwrap();
                let names = answer.split(", ").map(|one| one.split(' ').next().unwrap());
                backends.extend(names.map(str::to_owned));
            }
            assert_eq!(backends.len(), 1, "{hooks:?}: {backends:?}");
            let chosen = backends.pop_first().unwrap();
            assert_ne!(chosen, last, "{hooks:?}, round {round}");
            // What it has goes away, and it settles on another.
            let left = ["b", "c", "node-1", "node-2"].into_iter();
            let left: Vec<&str> = left.filter(|name| *name != chosen).collect();
            nodes.nodes[0].dataplane().apply(&[affine(&left)]).unwrap();
            last = chosen;
        }
    }
}

#[test]
fn the_hosts_own_connections_from_a_node_port_hear_their_answers() {
    let Some((_sandbox, nodes, _cgroup)) = started("host ports", PER_PACKET) else {
        return;
    };
    let [first, second] = &nodes.nodes;
    // A connection of the host whose own port is a NodePort: what comes back is its.
    let listener = second
        .host
        .run(|| TcpListener::bind("198.18.0.2:7000"))
        .unwrap();
    let mut stream = first.host.run(|| connect_from(30001, "198.18.0.2:7000"));
    let (mut accepted, from) = listener.accept().unwrap();
    assert_eq!(from.to_string(), "198.18.0.1:30001");
    accepted.write_all(b"hello").unwrap();
    let mut buffer = [0; 5];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"hello");
}

/// Connects from a port of one's choice.
fn connect_from(port: u16, to: &str) -> TcpStream {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
    use std::os::fd::AsRawFd as _;
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    bind(fd.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, port)).unwrap();
    let to: std::net::SocketAddrV4 = to.parse().unwrap();
    connect(fd.as_raw_fd(), &SockaddrIn::from(to)).unwrap();
    TcpStream::from(fd)
}

#[test]
fn with_masquerade_pods_leave_the_cluster_as_their_node() {
    let Some((_sandbox, mut nodes, _cgroup)) = started("masquerade", PER_PACKET) else {
        return;
    };
    nodes.nodes[0].masquerade(&["10.244.0.0/16"]).unwrap();
    let mut failures = String::new();
    for protocol in ["tcp", "udp", "udp-connected", "20*tcp"] {
        for (pod, own) in [("a", "10.244.1.11"), ("b", "10.244.1.12")] {
            // The other node's host is outside the ranges, its pod in them; the pod's own node needs no other address.
            for (there, wanted) in [
                ("198.18.0.2:8080", "node-2 198.18.0.1 from 198.18.0.2:8080"),
                (
                    "198.18.0.1:30005",
                    "node-2 198.18.0.1 from 198.18.0.1:30005",
                ),
                (
                    "10.244.2.11:8080",
                    &*format!("c {own} from 10.244.2.11:8080"),
                ),
                (
                    "198.18.0.1:8080",
                    &*format!("node-1 {own} from 198.18.0.1:8080"),
                ),
            ] {
                let network = &nodes.nodes[0].pods[pod].network;
                let answer = ask(network, None, &format!("{protocol} {there}")).unwrap();
                if answer != wanted {
                    writeln!(failures, "{pod}: {protocol} {there}: {answer:?}").unwrap();
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures}{}", drops(&mut nodes));
    assert!(counted(&mut nodes, Reason::Masqueraded) > 0);
}

#[test]
fn an_agent_that_masquerades_lets_pods_reach_who_knows_no_way_to_them() {
    if !is_root("masquerading agents") {
        return;
    }
    let sandbox = Sandbox::enter().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--masquerade", "on"];
    let mut segment = agents::segment(&sandbox, dir.path(), &flags).unwrap();
    nodes::echo(&segment.client, "outside").unwrap();
    segment.cluster.write(&[]).unwrap();
    for node in &mut segment.nodes {
        node.start().unwrap();
    }
    let [a, b] = ["a", "b"].map(|name| {
        let node = &segment.nodes[usize::from(name == "b")];
        node.add_pod(name).unwrap()
    });
    for protocol in ["tcp", "udp", "udp-connected"] {
        for (there, wanted) in [
            ("198.18.0.9".to_owned(), "outside 198.18.0.1".to_owned()),
            // The ranges are those that the agent has from the Nodes.
            ("198.18.0.2".to_owned(), format!("node-2 {}", a.address)),
            (b.address.to_string(), format!("b {}", a.address)),
        ] {
            let request = format!("{protocol} {there}:{ECHO_PORT}");
            let answer = ask(&a.network, None, &request).unwrap();
            let wanted = format!("{wanted} from {there}:{ECHO_PORT}");
            assert_eq!(answer, wanted, "{request}");
        }
    }
}
