//! The data plane between two nodes of network namespaces, with real sockets: each way of translation alone carries all
//! traffic, and an agent that restarts disturbs nothing.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use dataplane_abi::{Class, Reason};
use ipnetwork::IpNetwork;
use keelway_agent::dataplane::{Op, Peers, ServiceBackends, ServiceId, held};
use keelway_tests::{
    nodes::{
        self, AT_SOCKET, BOTH, Cgroup, ECHO_PORT, Hooks, Node, Nodes, PER_PACKET, REFUSED, ask,
    },
    requests::{self, TIMEOUT, tcp},
    sandbox::{Network, Sandbox, is_root},
};

/// Not a test of its own: the process that others start as a client.
#[test]
fn client() {
    nodes::client(requests::carry_out);
}

/// Services that lead to each kind of backend there is, seen from node 1.
const SERVICES: [(&str, &str); 5] = [
    ("10.96.0.1", "a"),
    ("10.96.0.2", "b"),
    ("10.96.0.3", "c"),
    ("10.96.0.4", "node-1"),
    ("10.96.0.5", "node-2"),
];

fn started(test: &str, hooks: Hooks) -> Option<(Sandbox, Nodes)> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, hooks).unwrap();
    for (id, (vip, backend)) in (1..).zip(SERVICES) {
        nodes.serve(id, &format!("{vip}:80"), &[backend]).unwrap();
    }
    nodes.serve(9, "10.96.0.9:80", &[]).unwrap();
    Some((sandbox, nodes))
}

/// Drops of a node, for the message of a test that fails.
fn drops(node: &mut Node) -> String {
    let mut text = String::new();
    for (reason, count) in node.dataplane().counters().unwrap() {
        if count > 0 {
            let mark = if reason.class() == Class::Event {
                ""
            } else {
                "!"
            };
            write!(text, " {mark}{}={count}", reason.name()).unwrap();
        }
    }
    text
}

/// Every client of node 1 reaches every Service by every protocol, and believes to talk to the Service.
fn every_client_reaches_every_service(nodes: &mut Nodes, cgroup: Option<&Cgroup>) {
    let mut failures = String::new();
    for client in ["a", "node-1"] {
        for (vip, backend) in SERVICES {
            for protocol in ["tcp", "udp", "udp-connected"] {
                let node = &nodes.nodes[0];
                let network = node.pods.get(client).map_or(&node.host, |pod| &pod.network);
                let answer = ask(network, cgroup, &format!("{protocol} {vip}:80")).unwrap();
                if !(answer.starts_with(&format!("{backend} "))
                    && answer.ends_with(&format!(" from {vip}:80")))
                {
                    writeln!(
                        failures,
                        "{client} -> {vip} ({backend}) by {protocol}: {answer}"
                    )
                    .unwrap();
                }
            }
        }
    }
    let [first, second] = &mut nodes.nodes;
    assert!(
        failures.is_empty(),
        "{failures}node 1:{}\nnode 2:{}",
        drops(first),
        drops(second)
    );
}

#[test]
fn packets_alone_carry_every_service() {
    let Some((_sandbox, mut nodes)) = started("per packet", PER_PACKET) else {
        return;
    };
    every_client_reaches_every_service(&mut nodes, None);
    let counters = nodes.nodes[0].dataplane().counters().unwrap();
    let count = |wanted: Reason| {
        counters
            .iter()
            .find(|(reason, _)| *reason == wanted)
            .unwrap()
            .1
    };
    assert_eq!(count(Reason::SocketTranslated), 0);
    assert!(count(Reason::ServiceTranslated) > 0 && count(Reason::FlowReplied) >= 30);
}

#[test]
fn sockets_alone_carry_every_service() {
    let Some((_sandbox, mut nodes)) = started("at the socket", AT_SOCKET) else {
        return;
    };
    let cgroup = Cgroup::new().unwrap();
    nodes.nodes[0]
        .dataplane()
        .attach_cgroup(cgroup.path())
        .unwrap();
    every_client_reaches_every_service(&mut nodes, Some(&cgroup));
    let counters = nodes.nodes[0].dataplane().counters().unwrap();
    let count = |wanted: Reason| {
        counters
            .iter()
            .find(|(reason, _)| *reason == wanted)
            .unwrap()
            .1
    };
    assert_eq!(
        (
            count(Reason::ServiceTranslated),
            count(Reason::ReplyTranslated)
        ),
        (0, 0)
    );
    assert_eq!(count(Reason::SocketTranslated), 30);
}

#[test]
fn sockets_and_packets_together_translate_once() {
    let Some((_sandbox, mut nodes)) = started("both", BOTH) else {
        return;
    };
    let cgroup = Cgroup::new().unwrap();
    nodes.nodes[0]
        .dataplane()
        .attach_cgroup(cgroup.path())
        .unwrap();
    every_client_reaches_every_service(&mut nodes, Some(&cgroup));
    let counters = nodes.nodes[0].dataplane().counters().unwrap();
    let count = |wanted: Reason| {
        counters
            .iter()
            .find(|(reason, _)| *reason == wanted)
            .unwrap()
            .1
    };
    // Connected datagram sockets are the packet hooks', so that they leave a backend that is gone.
    assert_eq!(count(Reason::SocketTranslated), 20);
    assert_eq!(count(Reason::ServiceTranslated), 10);
}

#[test]
fn connected_datagram_sockets_follow_their_endpoints_also_through_none() {
    for hooks in [PER_PACKET, BOTH] {
        let Some((_sandbox, mut nodes)) = started("connected datagrams", hooks) else {
            return;
        };
        let cgroup = hooks.socket_lb.then(|| Cgroup::new().unwrap());
        if let Some(cgroup) = &cgroup {
            nodes.nodes[0]
                .dataplane()
                .attach_cgroup(cgroup.path())
                .unwrap();
        }
        let asked = ["10.96.0.2:80", "[fd00:96::2]:80"];
        for (client, at) in ["a", "node-1"]
            .into_iter()
            .flat_map(|client| asked.map(|at| (client, at)))
        {
            let answers = |nodes: &mut Nodes| {
                let counters = nodes.nodes[0].dataplane().counters().unwrap();
                let of = |(reason, count): &(Reason, u64)| {
                    let wanted = matches!(reason, Reason::ReplyTranslated | Reason::NoBackend);
                    wanted.then_some(*count)
                };
                counters.iter().filter_map(of).collect::<Vec<u64>>()
            };
            nodes.serve(2, at, &["b"]).unwrap();
            let before = answers(&mut nodes);
            let node = &nodes.nodes[0];
            let network = node.pods.get(client).map_or(&node.host, |pod| &pod.network);
            let path = network.try_clone().unwrap();
            let cgroup = cgroup.as_ref();
            let told = thread::scope(|scope| {
                let asking = scope.spawn(move || ask(&path, cgroup, &format!("follow {at}")));
                let wait = |index: usize, nodes: &mut Nodes| {
                    let start = Instant::now();
                    while answers(nodes)[index] == before[index] && start.elapsed() < TIMEOUT {
                        thread::yield_now();
                    }
                };
                wait(0, &mut nodes);
                nodes.serve(2, at, &[]).unwrap();
                wait(1, &mut nodes);
                nodes.serve(2, at, &["c"]).unwrap();
                asking.join().unwrap().unwrap()
            });
            let names: Vec<&str> = told
                .split(", ")
                .map(|answer| answer.split(' ').next().unwrap())
                .collect();
            assert_eq!(
                names,
                ["b", "refused", "c"],
                "{client} -> {at} with {hooks:?}"
            );
        }
    }
}

#[test]
fn sockets_of_both_families_reach_services_by_mapped_addresses() {
    let Some((_sandbox, mut nodes)) = started("mapped addresses", AT_SOCKET) else {
        return;
    };
    let cgroup = Cgroup::new().unwrap();
    nodes.nodes[0]
        .dataplane()
        .attach_cgroup(cgroup.path())
        .unwrap();
    let pod = &nodes.nodes[0].pods["a"].network;
    for protocol in ["tcp", "udp", "udp-connected"] {
        let answer = ask(
            pod,
            Some(&cgroup),
            &format!("{protocol} [::ffff:10.96.0.3]:80"),
        )
        .unwrap();
        assert_eq!(
            answer, "c 10.244.1.11 from [::ffff:10.96.0.3]:80",
            "{protocol}"
        );
    }
}

#[test]
fn what_no_service_answers_is_refused_at_once() {
    for hooks in [PER_PACKET, AT_SOCKET, BOTH] {
        let Some((_sandbox, mut nodes)) = started("refusals", hooks) else {
            return;
        };
        let cgroup = hooks.socket_lb.then(|| Cgroup::new().unwrap());
        if let Some(cgroup) = &cgroup {
            nodes.nodes[0]
                .dataplane()
                .attach_cgroup(cgroup.path())
                .unwrap();
        }
        let node = &nodes.nodes[0];
        for network in [&node.pods["a"].network, &node.host] {
            for request in [
                "tcp 10.96.0.9:80",
                "tcp 10.96.0.1:81",
                "udp-connected 10.96.0.9:80",
                "udp-connected 10.96.0.1:81",
            ] {
                let start = Instant::now();
                let answer = ask(network, cgroup.as_ref(), request).unwrap();
                assert_eq!(answer, REFUSED, "{request} with {hooks:?}");
                assert!(
                    start.elapsed() < TIMEOUT,
                    "{request} with {hooks:?} took {:?}",
                    start.elapsed()
                );
            }
        }
    }
}

#[test]
fn pods_and_hosts_reach_each_other_directly() {
    let Some((_sandbox, mut nodes)) = started("direct", PER_PACKET) else {
        return;
    };
    let mut failures = String::new();
    let names = [("a", 0), ("b", 0), ("c", 1), ("node-1", 0), ("node-2", 1)];
    let address = |nodes: &Nodes, (name, node): (&str, usize)| {
        nodes.nodes[node]
            .pods
            .get(name)
            .map_or(nodes.nodes[node].address, |pod| pod.address)
    };
    for from in names {
        for to in names {
            let node = &nodes.nodes[from.1];
            let network: &Network = node.pods.get(from.0).map_or(&node.host, |pod| &pod.network);
            let at = SocketAddr::new(address(&nodes, to).into(), ECHO_PORT);
            // Its own address reaches a pod by its loopback; everybody else is seen as who they are.
            let wanted = format!("{} {} from {at}", to.0, address(&nodes, from));
            for protocol in ["tcp", "udp"] {
                let answer = ask(network, None, &format!("{protocol} {at}")).unwrap();
                if answer != wanted {
                    writeln!(
                        failures,
                        "{} -> {} by {protocol}: {answer}, not {wanted}",
                        from.0, to.0
                    )
                    .unwrap();
                }
            }
        }
    }
    let [first, second] = &mut nodes.nodes;
    assert!(
        failures.is_empty(),
        "{failures}node 1:{}\nnode 2:{}",
        drops(first),
        drops(second)
    );
}

#[test]
fn an_agent_that_restarts_loses_no_connection_and_no_packet() {
    let Some((_sandbox, mut nodes)) = started("restart", PER_PACKET) else {
        return;
    };
    let stop = AtomicBool::new(false);
    let Nodes {
        nodes: [first, _second],
    } = &mut nodes;
    let before = first.dataplane().state().unwrap();
    let (a, b) = (
        first.pods.remove("a").unwrap(),
        first.pods.remove("b").unwrap(),
    );
    let (round_trips, connections) = thread::scope(|scope| {
        let long = scope.spawn(|| {
            a.network.run(|| {
                let mut stream = TcpStream::connect("10.96.0.2:80").unwrap();
                stream.set_nodelay(true).unwrap();
                // A lost packet would come again after 200 ms at the earliest.
                stream
                    .set_read_timeout(Some(Duration::from_millis(190)))
                    .unwrap();
                let (mut count, mut buffer) = (0, [0; 256]);
                while !stop.load(Ordering::Relaxed) {
                    stream.write_all(b"x").unwrap();
                    assert!(
                        stream.read(&mut buffer).expect("a packet was lost") > 0,
                        "the connection was closed"
                    );
                    count += 1;
                }
                count
            })
        });
        let short = scope.spawn(|| {
            b.network.run(|| {
                let mut count = 0;
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(
                        tcp("10.96.0.3:80".parse().unwrap()).unwrap(),
                        "c 10.244.1.12 from 10.96.0.3:80"
                    );
                    count += 1;
                }
                count
            })
        });
        for _ in 0..3 {
            first.close();
            first.open().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        (long.join().unwrap(), short.join().unwrap())
    });
    assert!(
        round_trips > 100 && connections > 100,
        "{round_trips} round trips, {connections} connections"
    );
    assert_eq!(
        first.dataplane().state().unwrap(),
        before,
        "what was pinned is what is read back"
    );
    assert_eq!(
        first
            .host
            .try_clone()
            .unwrap()
            .run(|| first.dataplane().attached_pods())
            .unwrap(),
        vec![a.ifindex, b.ifindex]
    );
}

#[test]
fn endpoints_that_change_after_a_restart_are_used() {
    let Some((_sandbox, mut nodes)) = started("endpoints", PER_PACKET) else {
        return;
    };
    nodes.nodes[0].close();
    nodes.nodes[0].open().unwrap();
    nodes.serve(1, "10.96.0.1:80", &["c"]).unwrap();
    let answer = ask(&nodes.nodes[0].pods["a"].network, None, "tcp 10.96.0.1:80").unwrap();
    assert_eq!(answer, "c 10.244.1.11 from 10.96.0.1:80");
    let backends = ServiceBackends {
        active: vec![],
        terminating: vec!["10.244.1.12:8080".parse().unwrap()],
        ..ServiceBackends::default()
    };
    nodes.nodes[0]
        .dataplane()
        .apply(&[Op::SetService {
            id: ServiceId(1),
            backends,
        }])
        .unwrap();
    let answer = ask(&nodes.nodes[0].pods["a"].network, None, "tcp 10.96.0.1:80").unwrap();
    assert_eq!(answer, "b 10.244.1.11 from 10.96.0.1:80");
}

#[test]
fn hooks_of_interfaces_and_control_groups_that_went_away_are_made_anew() {
    let Some((_sandbox, mut nodes)) = started("hooks", BOTH) else {
        return;
    };
    let node = &mut nodes.nodes[0];
    let gone = Cgroup::new().unwrap();
    node.dataplane().attach_cgroup(gone.path()).unwrap();
    drop(gone);
    let pod = node.pods.remove("b").unwrap();
    node.host
        .run(|| keelway_tests::sandbox::ip("link del kw-b"))
        .unwrap();
    node.close();
    node.open().unwrap();
    let host = node.host.try_clone().unwrap();
    let left = host.run(|| node.dataplane().attached_pods()).unwrap();
    assert!(
        !left.contains(&pod.ifindex),
        "{left:?} has no {}",
        pod.ifindex
    );
    let cgroup = Cgroup::new().unwrap();
    node.dataplane().attach_cgroup(cgroup.path()).unwrap();
    // Again: what is there is updated.
    node.dataplane().attach_cgroup(cgroup.path()).unwrap();
    let answer = ask(&node.pods["a"].network, Some(&cgroup), "tcp 10.96.0.3:80").unwrap();
    assert_eq!(answer, "c 10.244.1.11 from 10.96.0.3:80");
    let counters = node.dataplane().counters().unwrap();
    assert!(
        counters.contains(&(Reason::SocketTranslated, 1)),
        "{counters:?}"
    );
}

#[test]
fn idle_flows_are_collected_and_live_ones_are_not() {
    let Some((_sandbox, mut nodes)) = started("collector", PER_PACKET) else {
        return;
    };
    let node = &mut nodes.nodes[0];
    let pod = node.pods.remove("a").unwrap();
    let mut stream = pod
        .network
        .run(|| TcpStream::connect("10.96.0.2:80").unwrap());
    let mut buffer = [0; 256];
    stream.write_all(b"x").unwrap();
    assert!(stream.read(&mut buffer).unwrap() > 0);
    assert_eq!(
        ask(&pod.network, None, "tcp 10.96.0.3:80").unwrap(),
        "c 10.244.1.11 from 10.96.0.3:80"
    );
    let collected = node.dataplane().collect_flows().unwrap();
    assert_eq!(
        (collected.removed, collected.left, collected.pressure),
        (0, 4, 0)
    );
    stream.write_all(b"x").unwrap();
    assert!(stream.read(&mut buffer).unwrap() > 0);
}

#[test]
fn ranges_of_very_many_nodes_and_sources_are_found_again_and_replaced() {
    const MANY: u32 = 2000;
    let Some((sandbox, mut nodes)) = started("very many ranges", BOTH) else {
        return;
    };
    let range = |number: u32| {
        let address = Ipv4Addr::from_bits(u32::from_be_bytes([100, 64, 0, 0]) + (number << 8));
        IpNetwork::new(address.into(), 24).unwrap()
    };
    let node = &mut nodes.nodes[0];
    // More than the kernel shows at a time, by an agent that wrote them itself and by the next one.
    for numbers in [0..MANY, 1..MANY + 1, 1..MANY + 2, 0..3] {
        let ranges: BTreeSet<IpNetwork> = numbers.map(range).collect();
        let peers: Peers = ranges.iter().map(|range| (*range, [2; 6])).collect();
        let ops = [
            Op::SetPeers {
                peers: peers.clone(),
            },
            Op::SetUnmasqueraded {
                ranges: ranges.clone(),
            },
        ];
        for _ in 0..2 {
            node.dataplane().apply(&ops).unwrap();
            let held = held(&sandbox.pin_root().join("node-1")).unwrap();
            assert_eq!(
                (held.peers, held.unmasqueraded),
                (peers.clone(), ranges.clone())
            );
        }
        node.close();
        node.open().unwrap();
    }
}
