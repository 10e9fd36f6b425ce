//! Services over IPv6 with real sockets: what `datapath.rs` and `exposed.rs` show of IPv4, and what is IPv6's own.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Instant,
};

use dataplane_abi::Reason;
use keelway_agent::dataplane::{Lead, Op, ServiceBackends, ServiceId, Vip};
use keelway_tests::{
    nodes::{self, AT_SOCKET, BOTH, Cgroup, Hooks, Nodes, PER_PACKET, REFUSED, ask, frontend},
    requests::{self, TIMEOUT},
    sandbox::{Network, Sandbox, ip, is_root},
};

/// Not a test of its own: the process that others start as a client.
#[test]
fn client() {
    nodes::client(requests::carry_out);
}

/// Services of one backend each, by address and by node port.
const SERVICES: [(u32, &str, u16, &str); 5] = [
    (1, "fd00:96::1", 30001, "a"),
    (2, "fd00:96::2", 30002, "b"),
    (3, "fd00:96::3", 30003, "c"),
    (4, "fd00:96::4", 30004, "node-1"),
    (5, "fd00:96::5", 30005, "node-2"),
];

fn backends(nodes: &Nodes, names: &[&str]) -> ServiceBackends {
    let at = |name: &&str| nodes.backend(name, false).unwrap();
    ServiceBackends {
        active: names.iter().map(at).collect(),
        ..ServiceBackends::default()
    }
}

/// Two nodes, and in the first one's tables: the Services above; fd00:96::9 and 30009 without endpoints; 30010 whose endpoints are
/// all on other nodes, with external policy Local; 2001:db8::1 of a load balancer, for some sources only.
fn started(test: &str, hooks: Hooks) -> Option<(Sandbox, Nodes, Option<Cgroup>)> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, hooks).unwrap();
    let mut ops = Vec::new();
    let vip = |address: &str, kind| Op::SetVip {
        addr: address.parse().unwrap(),
        kind,
    };
    for (id, address, port, backend) in SERVICES {
        let backends = backends(&nodes, &[backend]);
        let id = ServiceId(id);
        ops.extend([vip(address, Vip::Cluster), Op::SetService { id, backends }]);
        ops.extend(frontend(&format!("[{address}]:80"), Lead::to(id)));
        ops.extend(frontend(&format!("[::]:{port}"), Lead::to(id)));
    }
    let (empty, silent) = (ServiceId(9), ServiceId(10));
    for (id, silent) in [(empty, false), (silent, true)] {
        let backends = ServiceBackends {
            silent,
            ..ServiceBackends::default()
        };
        ops.push(Op::SetService { id, backends });
    }
    ops.push(vip("fd00:96::9", Vip::Cluster));
    ops.extend(frontend("[fd00:96::9]:80", Lead::to(empty)));
    ops.extend(frontend("[::]:30009", Lead::to(empty)));
    let nowhere_near = Lead {
        external: silent,
        ..Lead::to(ServiceId(3))
    };
    ops.extend(frontend("[::]:30010", nowhere_near));
    let ranges = ["fd00:18::/64", "fd00:244:1::b/128"];
    ops.push(Op::SetSources {
        id: ServiceId(3),
        sources: ranges.map(|range| range.parse().unwrap()).into(),
    });
    ops.push(vip("2001:db8::1", Vip::External));
    let guarded = Lead {
        guarded: true,
        ..Lead::to(ServiceId(3))
    };
    ops.extend(frontend("[2001:db8::1]:80", guarded));
    let [first, second] = &mut nodes.nodes;
    first.dataplane().apply(&ops).unwrap();
    let cgroup = hooks.socket_lb.then(|| Cgroup::new().unwrap());
    if let Some(cgroup) = &cgroup {
        first.dataplane().attach_cgroup(cgroup.path()).unwrap();
    }
    // The client outside finds the balanced addresses behind the first node.
    second
        .host
        .run(|| ip("-6 route add 2001:db8::/64 via fd00:18::1"))
        .unwrap();
    Some((sandbox, nodes, cgroup))
}

fn moved(nodes: &mut Nodes) -> String {
    let counters = nodes.nodes[0].dataplane().counters().unwrap();
    let moved = counters.iter().filter(|(_, count)| *count > 0);
    moved.fold(String::new(), |mut text, (reason, count)| {
        write!(text, " {}={count}", reason.name()).unwrap();
        text
    })
}

fn counted(nodes: &mut Nodes, wanted: Reason) -> u64 {
    let counters = nodes.nodes[0].dataplane().counters().unwrap();
    let mut found = counters.iter().filter(|(reason, _)| *reason == wanted);
    found.next().unwrap().1
}

fn network<'a>(nodes: &'a Nodes, client: &str) -> &'a Network {
    let (number, node) = match client {
        "c" | "node-2" => (1, &nodes.nodes[1]),
        _ => (0, &nodes.nodes[0]),
    };
    let pod = node.pods.get(client).map(|pod| &pod.network);
    pod.unwrap_or(&nodes.nodes[number].host)
}

#[test]
fn every_client_reaches_every_service_each_way() {
    for hooks in [PER_PACKET, AT_SOCKET, BOTH] {
        let Some((_sandbox, mut nodes, cgroup)) = started("IPv6", hooks) else {
            return;
        };
        let mut failures = String::new();
        for client in ["a", "node-1"] {
            for (_, vip, _, backend) in SERVICES {
                for protocol in ["tcp", "udp", "udp-connected"] {
                    let request = format!("{protocol} [{vip}]:80");
                    let answer = ask(network(&nodes, client), cgroup.as_ref(), &request).unwrap();
                    if !(answer.starts_with(&format!("{backend} "))
                        && answer.ends_with(&format!(" from [{vip}]:80")))
                    {
                        writeln!(failures, "{client}: {request} ({backend}): {answer}").unwrap();
                    }
                }
            }
        }
        let counters = moved(&mut nodes);
        assert!(failures.is_empty(), "{hooks:?}: {failures}{counters}");
        if !hooks.socket_lb {
            assert!(counted(&mut nodes, Reason::FlowReplied) >= 30, "{counters}");
        }
    }
}

#[test]
fn clients_outside_reach_every_kind_of_backend_by_a_node_port() {
    for hooks in [PER_PACKET, BOTH] {
        let Some((_sandbox, mut nodes, _cgroup)) = started("IPv6 from outside", hooks) else {
            return;
        };
        let mut failures = String::new();
        for (client, own) in [("node-2", "fd00:18::2"), ("c", "fd00:244:2::b")] {
            for (_, _, port, backend) in SERVICES {
                // Pods here see the client; the answers of others must come back here, and so must the host's own.
                let seen = match backend {
                    "a" | "b" => own,
                    "node-1" => "fd6b:7700::77:77",
                    _ => "fd00:18::1",
                };
                let wanted = format!("{backend} {seen} from [fd00:18::1]:{port}");
                for protocol in ["tcp", "udp", "udp-connected"] {
                    let request = format!("{protocol} [fd00:18::1]:{port}");
                    let answer = ask(network(&nodes, client), None, &request).unwrap();
                    if answer != wanted {
                        writeln!(failures, "{client}: {request}: {answer:?}, not {wanted:?}")
                            .unwrap();
                    }
                }
            }
        }
        let counters = moved(&mut nodes);
        assert!(failures.is_empty(), "{hooks:?}: {failures}{counters}");
    }
}

#[test]
fn pods_and_the_node_itself_reach_node_ports_of_their_node() {
    for hooks in [PER_PACKET, AT_SOCKET, BOTH] {
        let Some((_sandbox, mut nodes, cgroup)) = started("IPv6 node ports", hooks) else {
            return;
        };
        let mut failures = String::new();
        let mut clients = vec![("a", "[fd00:18::1]")];
        if hooks.socket_lb {
            clients.extend([("node-1", "[fd00:18::1]"), ("node-1", "[::1]")]);
        }
        let ports = SERVICES.map(|(_, _, port, backend)| (port, backend));
        for (client, address) in clients {
            // Clients on the node are not bound by the external policy.
            for (port, backend) in ports.into_iter().chain([(30010, "c")]) {
                for protocol in ["tcp", "udp", "udp-connected"] {
                    let request = format!("{protocol} {address}:{port}");
                    let answer = ask(network(&nodes, client), cgroup.as_ref(), &request).unwrap();
                    if !(answer.starts_with(&format!("{backend} "))
                        && answer.ends_with(&format!(" from {address}:{port}")))
                    {
                        writeln!(failures, "{client}: {request} ({backend}): {answer}").unwrap();
                    }
                }
            }
        }
        let counters = moved(&mut nodes);
        assert!(failures.is_empty(), "{hooks:?}: {failures}{counters}");
    }
}

#[test]
fn what_no_service_answers_is_refused_at_once() {
    for hooks in [PER_PACKET, AT_SOCKET, BOTH] {
        let Some((_sandbox, mut nodes, cgroup)) = started("IPv6 refusals", hooks) else {
            return;
        };
        let inside = ["[fd00:96::9]:80", "[fd00:96::1]:81"];
        let outside = ["[fd00:18::1]:30009", "[2001:db8::1]:81"];
        let mut asked = vec![("a", inside[0]), ("a", inside[1])];
        asked.extend([("node-1", inside[0]), ("node-1", inside[1])]);
        if hooks.packet_lb {
            asked.extend([("node-2", outside[0]), ("node-2", outside[1])]);
            asked.extend([("a", outside[0]), ("a", outside[1])]);
        }
        let mut failures = String::new();
        for (client, at) in asked {
            for protocol in ["tcp", "udp-connected"] {
                let request = format!("{protocol} {at}");
                let cgroup = cgroup.as_ref().filter(|_| client != "node-2");
                let start = Instant::now();
                let answer = ask(network(&nodes, client), cgroup, &request).unwrap();
                let took = start.elapsed();
                if answer != REFUSED || took >= TIMEOUT {
                    writeln!(failures, "{client}: {request}: {answer} after {took:?}").unwrap();
                }
            }
        }
        let counters = moved(&mut nodes);
        assert!(failures.is_empty(), "{hooks:?}: {failures}{counters}");
    }
}

#[test]
fn policies_and_ranges_of_sources_hold() {
    let Some((_sandbox, mut nodes, _cgroup)) = started("IPv6 policies", PER_PACKET) else {
        return;
    };
    let is_silence =
        |answer: &str| answer == "error: timed out" || answer == "error: operation would block";
    for request in ["tcp [fd00:18::1]:30010", "udp [fd00:18::1]:30010"] {
        let answer = ask(network(&nodes, "node-2"), None, request).unwrap();
        assert!(is_silence(&answer), "{request}: {answer}");
    }
    assert!(counted(&mut nodes, Reason::NoLocalBackend) >= 2);
    for (client, wanted) in [
        ("node-2", Some("c fd00:18::1 from [2001:db8::1]:80")),
        ("a", Some("c fd00:244:1::b from [2001:db8::1]:80")),
        ("c", None),
        ("b", None),
    ] {
        let answer = ask(network(&nodes, client), None, "tcp [2001:db8::1]:80").unwrap();
        match wanted {
            Some(wanted) => assert_eq!(answer, wanted, "{client}"),
            None => assert!(is_silence(&answer), "{client}: {answer}"),
        }
    }
    assert!(counted(&mut nodes, Reason::SourceRange) >= 2);
    assert_eq!(counted(&mut nodes, Reason::NoBackend), 0);
}

#[test]
fn a_client_of_a_service_with_affinity_keeps_its_backend_until_it_is_gone() {
    for hooks in [PER_PACKET, AT_SOCKET, BOTH] {
        let Some((_sandbox, mut nodes, cgroup)) = started("IPv6 affinity", hooks) else {
            return;
        };
        let all = ["b", "c", "node-1", "node-2"];
        let affine = |nodes: &Nodes, names: &[&str]| Op::SetService {
            id: ServiceId(20),
            backends: ServiceBackends {
                affinity_timeout_s: 60,
                ..backends(nodes, names)
            },
        };
        let mut ops = vec![affine(&nodes, &all)];
        ops.extend(frontend("[fd00:96::20]:80", Lead::to(ServiceId(20))));
        ops.extend(frontend("[::]:30020", Lead::to(ServiceId(20))));
        nodes.nodes[0].dataplane().apply(&ops).unwrap();
        let mut last = String::new();
        for round in 0..2 {
            // One answer, whatever the address and protocol.
            let mut seen = BTreeSet::new();
            for request in [
                "8*tcp [fd00:96::20]:80",
                "8*udp [fd00:96::20]:80",
                "8*udp-connected [fd00:96::20]:80",
                "8*tcp [fd00:18::1]:30020",
            ] {
                let answer = ask(network(&nodes, "a"), cgroup.as_ref(), request).unwrap();
                let names = answer.split(", ").map(|one| one.split(' ').next().unwrap());
                seen.extend(names.map(str::to_owned));
            }
            assert_eq!(seen.len(), 1, "{hooks:?}: {seen:?}");
            let chosen = seen.pop_first().unwrap();
            assert_ne!(chosen, last, "{hooks:?}, round {round}");
            // What it has goes away, and it settles on another.
            let left: Vec<&str> = all.into_iter().filter(|name| *name != chosen).collect();
            let change = affine(&nodes, &left);
            nodes.nodes[0].dataplane().apply(&[change]).unwrap();
            last = chosen;
        }
    }
}

#[test]
fn with_masquerade_pods_leave_the_cluster_as_their_node() {
    let Some((_sandbox, mut nodes, _cgroup)) = started("IPv6 masquerade", PER_PACKET) else {
        return;
    };
    nodes.nodes[0]
        .masquerade(&["fd00:244::/32", "fe80::/10"])
        .unwrap();
    let mut failures = String::new();
    for protocol in ["tcp", "udp", "udp-connected", "20*tcp"] {
        for (pod, own) in [("a", "fd00:244:1::b"), ("b", "fd00:244:1::c")] {
            // The other node's host is outside the ranges, its pod in them; the pod's own node needs no other address.
            for (there, wanted) in [
                ("[fd00:18::2]:8080", "node-2 fd00:18::1".to_owned()),
                ("[fd00:18::1]:30005", "node-2 fd00:18::1".to_owned()),
                ("[fd00:244:2::b]:8080", format!("c {own}")),
                ("[fd00:18::1]:8080", format!("node-1 {own}")),
            ] {
                let request = format!("{protocol} {there}");
                let answer = ask(network(&nodes, pod), None, &request).unwrap();
                if answer != format!("{wanted} from {there}") {
                    writeln!(failures, "{pod}: {request}: {answer:?}").unwrap();
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures}{}", moved(&mut nodes));
    assert!(counted(&mut nodes, Reason::Masqueraded) > 0);
}

#[test]
fn datagrams_longer_than_a_packet_and_their_answers_are_translated_whole() {
    let Some((_sandbox, mut nodes, _cgroup)) = started("IPv6 fragments", PER_PACKET) else {
        return;
    };
    for (vip, backend) in [("fd00:96::2", "b"), ("fd00:96::3", "c")] {
        let socket = network(&nodes, "a").run(|| UdpSocket::bind("[::]:0"));
        let socket = socket.unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let to: SocketAddr = format!("[{vip}]:80").parse().unwrap();
        socket.send_to(&[7; 4000], to).unwrap();
        let mut buffer = [0; 256];
        let (len, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(from, to);
        assert!(buffer[..len].starts_with(backend.as_bytes()), "{backend}");
    }
    // Two fragments more than the first of each datagram.
    assert_eq!(counted(&mut nodes, Reason::ServiceTranslated), 6);
    assert_eq!(counted(&mut nodes, Reason::FragmentUnknown), 0);
}

#[test]
fn a_connection_learns_that_its_packets_are_too_big_for_a_link_on_the_way() {
    let Some((_sandbox, mut nodes, _cgroup)) = started("IPv6 path MTU", PER_PACKET) else {
        return;
    };
    // The link between the nodes is narrower than the pods'.
    for node in &nodes.nodes {
        node.host.run(|| ip("link set eth0 mtu 1280")).unwrap();
    }
    let ops: Vec<Op> = frontend("[fd00:96::3]:81", Lead::to(ServiceId(11))).into();
    let mut sink = backends(&nodes, &["c"]);
    sink.active[0].set_port(8090);
    let sink = Op::SetService {
        id: ServiceId(11),
        backends: sink,
    };
    let dataplane = nodes.nodes[0].dataplane();
    dataplane.apply(&[sink]).unwrap();
    dataplane.apply(&ops).unwrap();
    let listener = network(&nodes, "c").run(|| TcpListener::bind("[::]:8090"));
    let listener = listener.unwrap();
    const SENT: usize = 200_000;
    let server = thread::spawn(move || {
        let (mut stream, _client) = listener.accept().unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        stream.write_all(&got.len().to_be_bytes()).unwrap();
    });
    let mut stream = network(&nodes, "a")
        .run(|| TcpStream::connect("[fd00:96::3]:81"))
        .unwrap();
    stream.set_read_timeout(Some(4 * TIMEOUT)).unwrap();
    stream.write_all(&[7; SENT]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut got = [0; size_of::<usize>()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(usize::from_be_bytes(got), SENT);
    server.join().unwrap();
    assert!(counted(&mut nodes, Reason::IcmpTranslated) > 0);
}
