//! The agent on two nodes of network namespaces, with pods wired by the real CNI plugin: what is reached how, what changes
//! follow the cluster, and what survives the agent.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use keelway_tests::agents::{AgentNode, Pod, Service, cni_result, until};
use keelway_tests::nodes::{self, Cgroup, REFUSED, ask};
use keelway_tests::sandbox::{Network, ip};
use keelway_tests::topology::{Topology, WEB, web};
use serde_json::{Value, json};

const TIMEOUT: Duration = Duration::from_secs(2);

/// Not a test of its own: the process that others start as a client.
#[test]
fn client() {
    nodes::client(|request| {
        let words: Vec<&str> = request.split_whitespace().collect();
        let at: SocketAddr = words[1].parse().expect("an address");
        match words[0] {
            "tcp" => tcp(at),
            "udp" => udp(at),
            other => panic!("unknown request {other}"),
        }
    });
}

/// The server's name.
fn tcp(at: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&at, TIMEOUT)?;
    exchange(&mut stream)
}

fn exchange(stream: &mut TcpStream) -> io::Result<String> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"hello")?;
    let mut buffer = [0; 256];
    let len = stream.read(&mut buffer)?;
    Ok(first_word(&buffer[..len]))
}

fn udp(at: SocketAddr) -> io::Result<String> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.send_to(b"hello", at)?;
    let mut buffer = [0; 256];
    let (len, from) = socket.recv_from(&mut buffer)?;
    if from != at {
        return Err(io::Error::other(format!("{from} answered for {at}")));
    }
    Ok(first_word(&buffer[..len]))
}

/// An echo server's answer begins with its name.
fn first_word(answer: &[u8]) -> String {
    String::from_utf8_lossy(answer)
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// Nodes and pods, and the Service `web` that leads to a and c.
fn topology(test: &str, flags: &[&str]) -> Option<Topology> {
    let topology = Topology::start(test, flags)?;
    serve(&topology, &topology.both());
    Some(topology)
}

/// Lets `web` lead to these endpoints, and waits until it does on both nodes.
fn serve(topology: &Topology, endpoints: &[(Ipv4Addr, &'static str)]) {
    let before: Vec<u64> = topology.nodes.iter().map(batches).collect();
    topology
        .cluster
        .write(&[web(endpoints)])
        .expect("the cluster's file");
    for (node, before) in topology.nodes.iter().zip(before) {
        let backends = 2 * endpoints.len() as u64;
        node.wait("the Service in the maps", |report| {
            report["backends"] == backends && report["batches"].as_u64() > Some(before)
        })
        .expect("a plan");
    }
}

fn batches(node: &AgentNode) -> u64 {
    node.report().expect("a report")["batches"]
        .as_u64()
        .expect("a count")
}

/// Who answered over many requests, sorted.
fn answers(from: &Network, cgroup: Option<&Cgroup>, protocol: &str, at: SocketAddr) -> Vec<String> {
    let mut names: Vec<String> = (0..12)
        .map(|_| ask(from, cgroup, &format!("{protocol} {at}")).expect("a client"))
        .collect();
    names.sort();
    names.dedup();
    names
}

fn everything_is_reached(topology: &Topology, cgroups: bool) {
    let Topology { nodes, a, b, c, .. } = topology;
    let cgroup = |node: usize| cgroups.then_some(&nodes[node].cgroup);
    // Directly: on the node, across, and from a host to pods of its own and of the other.
    for (from, to, name) in [
        (&b.network, a.address, "a"),
        (&b.network, c.address, "c"),
        (&c.network, a.address, "a"),
        (&nodes[0].host, a.address, "a"),
        (&nodes[0].host, c.address, "c"),
        (&a.network, nodes[0].address, "node-1"),
        (&a.network, nodes[1].address, "node-2"),
    ] {
        for protocol in ["tcp", "udp"] {
            let answer = ask(
                from,
                None,
                &format!("{protocol} {}", SocketAddr::from((to, 8080))),
            )
            .expect("a client");
            assert_eq!(answer, name, "{protocol} to {to}");
        }
    }
    // By the Service: from a pod that is a backend, from one that is none, across, and from the hosts.
    let web = SocketAddr::from((WEB, 80));
    for (from, node) in [
        (&a.network, 0),
        (&b.network, 0),
        (&c.network, 1),
        (&nodes[0].host, 0),
        (&nodes[1].host, 1),
    ] {
        for protocol in ["tcp", "udp"] {
            assert_eq!(
                answers(from, cgroup(node), protocol, web),
                ["a", "c"],
                "{protocol} on node {node}"
            );
        }
        let refused = ask(
            from,
            cgroup(node),
            &format!("tcp {}", SocketAddr::from((WEB, 81))),
        )
        .expect("a client");
        assert_eq!(
            refused, REFUSED,
            "a port that the Service has not, on node {node}"
        );
    }
}

#[test]
fn pods_and_services_are_reached_with_both_hooks() {
    let Some(topology) = topology("pods_and_services_are_reached_with_both_hooks", &[]) else {
        return;
    };
    everything_is_reached(&topology, true);
    // What no socket hook sees is translated per packet.
    everything_is_reached(&topology, false);
}

#[test]
fn pods_and_services_are_reached_per_packet_alone() {
    let flags = ["--socket-lb", "off"];
    let Some(topology) = topology("pods_and_services_are_reached_per_packet_alone", &flags) else {
        return;
    };
    everything_is_reached(&topology, true);
}

#[test]
fn services_are_reached_at_the_socket_alone() {
    let flags = ["--packet-lb", "off"];
    let Some(topology) = topology("services_are_reached_at_the_socket_alone", &flags) else {
        return;
    };
    let Topology { nodes, a, b, c, .. } = &topology;
    for (from, node) in [
        (&a.network, 0),
        (&b.network, 0),
        (&c.network, 1),
        (&nodes[0].host, 0),
    ] {
        for protocol in ["tcp", "udp"] {
            let names = answers(
                from,
                Some(&nodes[node].cgroup),
                protocol,
                SocketAddr::from((WEB, 80)),
            );
            assert_eq!(names, ["a", "c"], "{protocol} on node {node}");
        }
    }
}

#[test]
fn changes_of_endpoints_are_followed() {
    let Some(topology) = topology("changes_of_endpoints_are_followed", &[]) else {
        return;
    };
    let web = SocketAddr::from((WEB, 80));
    serve(&topology, &topology.both()[1..]);
    assert_eq!(answers(&topology.b.network, None, "tcp", web), ["c"]);
    serve(&topology, &[]);
    assert_eq!(answers(&topology.b.network, None, "tcp", web), [REFUSED]);
    serve(&topology, &topology.both());
    assert_eq!(answers(&topology.b.network, None, "tcp", web), ["a", "c"]);

    // A file that is half written, or wrong, changes nothing.
    fs::write(&topology.cluster.path, "{\"kind\": \"List\", \"items\": [").expect("write");
    let [node, _] = &topology.nodes;
    let report = node.wait("the complaint", |report| {
        report["problems"].to_string().contains("not JSON")
    });
    assert_eq!(report.expect("a report")["services"], 1);
    assert_eq!(answers(&topology.b.network, None, "tcp", web), ["a", "c"]);
}

#[test]
fn a_service_that_prefers_its_node_stays_on_it() {
    let Some(topology) = topology("a_service_that_prefers_its_node_stays_on_it", &[]) else {
        return;
    };
    let near = Service {
        spec: json!({"trafficDistribution": "PreferSameNode"}),
        ..topology.web()
    };
    topology.cluster.write(&[near]).expect("the cluster's file");
    for node in &topology.nodes {
        node.wait("one backend per port", |report| report["backends"] == 2)
            .expect("a plan");
    }
    let web = SocketAddr::from((WEB, 80));
    assert_eq!(answers(&topology.b.network, None, "tcp", web), ["a"]);
    assert_eq!(
        answers(
            &topology.nodes[1].host,
            Some(&topology.nodes[1].cgroup),
            "udp",
            web
        ),
        ["c"]
    );
}

/// Writes the cluster's file, and waits until both nodes have so many frontends of it.
fn write(topology: &Topology, services: &[Service], frontends: usize) {
    let before: Vec<u64> = topology.nodes.iter().map(batches).collect();
    topology
        .cluster
        .write(services)
        .expect("the cluster's file");
    for (node, before) in topology.nodes.iter().zip(before) {
        node.wait("the Services in the maps", |report| {
            report["frontends"] == frontends && report["batches"].as_u64() > Some(before)
        })
        .expect("a plan");
    }
}

#[test]
fn a_service_that_changes_its_type_is_reached_by_what_it_has_then() {
    let test = "a_service_that_changes_its_type_is_reached_by_what_it_has_then";
    let Some(topology) = topology(test, &[]) else {
        return;
    };
    let balanced = Ipv4Addr::new(192, 0, 2, 9);
    let [cluster_ip, node_port, balancer] = [
        SocketAddr::from((WEB, 80)),
        SocketAddr::from((topology.nodes[0].address, 30080)),
        SocketAddr::from((balanced, 80)),
    ];
    let is_reached = |at: SocketAddr| {
        let answer = ask(&topology.b.network, None, &format!("tcp {at}")).expect("a client");
        ["a", "c"].contains(&&*answer)
    };
    for (service_type, reached) in [
        ("ClusterIP", &[cluster_ip][..]),
        ("NodePort", &[cluster_ip, node_port]),
        ("LoadBalancer", &[cluster_ip, node_port, balancer]),
        ("ExternalName", &[]),
        ("LoadBalancer", &[cluster_ip, node_port, balancer]),
        ("NodePort", &[cluster_ip, node_port]),
        ("ClusterIP", &[cluster_ip]),
    ] {
        let web = Service {
            spec: json!({
                "type": service_type, "externalName": "example.net",
                "ports": [{"name": "tcp", "port": 80, "protocol": "TCP", "nodePort": 30080}],
            }),
            balanced: Some(balanced),
            ..topology.web()
        };
        write(&topology, &[web], reached.len());
        for at in [cluster_ip, node_port, balancer] {
            let wanted = reached.contains(&at);
            assert_eq!(is_reached(at), wanted, "{service_type} at {at}");
        }
    }
}

#[test]
fn a_service_is_taken_away_and_made_anew_under_traffic() {
    let test = "a_service_is_taken_away_and_made_anew_under_traffic";
    let Some(topology) = topology(test, &[]) else {
        return;
    };
    let at = SocketAddr::from((WEB, 80));
    let (stop, made) = (AtomicBool::new(false), AtomicU32::new(0));
    let failed = thread::scope(|scope| {
        let asking = scope.spawn(|| {
            topology.b.network.run(|| {
                let mut failed = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    for (protocol, answer) in [("tcp", tcp(at)), ("udp", udp(at))] {
                        if let Err(error) = answer {
                            failed.push(format!("{protocol}: {error}"));
                        }
                    }
                    made.fetch_add(1, Ordering::Relaxed);
                }
                failed
            })
        });
        // Another object has the address each time, as when somebody deletes a Service and creates it again.
        for name in ["other", "web"].into_iter().cycle().take(10) {
            let before = made.load(Ordering::Relaxed);
            let service = Service {
                name,
                ..topology.web()
            };
            write(&topology, &[service], 2);
            while made.load(Ordering::Relaxed) < before + 3 && !asking.is_finished() {
                thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
        asking.join().expect("no panic")
    });
    assert!(failed.is_empty(), "{failed:?}");
    // With time between the two it answers nobody, and then again.
    write(&topology, &[], 0);
    let gone = answers(&topology.b.network, None, "udp", at);
    assert!(
        !gone.iter().any(|name| name == "a" || name == "c"),
        "{gone:?}"
    );
    write(&topology, &[topology.web()], 2);
    for protocol in ["tcp", "udp"] {
        assert_eq!(answers(&topology.b.network, None, protocol, at), ["a", "c"]);
    }
}

#[test]
fn a_killed_worker_is_replaced_at_once_and_nothing_that_flows_is_lost() {
    let test = "a_killed_worker_is_replaced_at_once_and_nothing_that_flows_is_lost";
    let Some(topology) = topology(test, &[]) else {
        return;
    };
    let web = SocketAddr::from((WEB, 80));
    let connect = |network: &Network| {
        network
            .run(|| TcpStream::connect_timeout(&web, TIMEOUT))
            .expect("connect")
    };
    let mut flowing = [
        connect(&topology.b.network),
        connect(&topology.nodes[0].host),
        connect(&topology.c.network),
    ];
    let names: Vec<String> = flowing
        .iter_mut()
        .map(|stream| exchange(stream).expect("an answer"))
        .collect();
    let mut gaps = Vec::new();
    for round in 0..3 {
        for node in &topology.nodes {
            let gap = node.kill_worker().expect("another worker");
            gaps.push(gap);
        }
        for (stream, name) in flowing.iter_mut().zip(&names) {
            for _ in 0..20 {
                assert_eq!(&exchange(stream).expect("an answer"), name, "round {round}");
            }
        }
        assert_eq!(
            answers(&topology.b.network, None, "udp", web),
            ["a", "c"],
            "round {round}"
        );
    }
    // A machine that is busy with other tests may be late now and then; a supervisor that waits is late always.
    gaps.sort();
    assert!(
        gaps[gaps.len() / 2] < Duration::from_millis(100),
        "no worker for {gaps:?}"
    );
    let [node, _] = &topology.nodes;
    let report = node
        .wait("ready again", |report| report["ready"] == true)
        .expect("a report");
    assert_eq!(
        report["lastBatchOperations"], 0,
        "what was found is what is wished: {report}"
    );

    // New endpoints work, and a new pod does not get an address that another one has.
    serve(&topology, &topology.both()[..1]);
    assert_eq!(answers(&topology.c.network, None, "tcp", web), ["a"]);
    let d = topology.nodes[0].add_pod("d").expect("a pod");
    assert!(![topology.a.address, topology.b.address].contains(&d.address));
    assert_eq!(
        ask(
            &topology.c.network,
            None,
            &format!("tcp {}:8080", d.address)
        )
        .expect("a client"),
        "d"
    );
}

#[test]
fn an_agent_that_stops_takes_nothing_away_and_does_later_what_it_missed() {
    let test = "an_agent_that_stops_takes_nothing_away_and_does_later_what_it_missed";
    let Some(mut topology) = topology(test, &[]) else {
        return;
    };
    let at = SocketAddr::from((WEB, 80));
    topology.nodes[0].stop().expect("a good end");
    assert_eq!(answers(&topology.b.network, None, "tcp", at), ["a", "c"]);
    assert!(
        topology.nodes[0].conf_list().exists(),
        "pods that come meanwhile wait for the agent"
    );

    // The Service changes and a pod goes while nobody is there.
    topology
        .cluster
        .write(&[web(&topology.both()[1..])])
        .expect("the cluster's file");
    let network = Network::new().expect("a network");
    let refused = topology.nodes[0]
        .cni("ADD", "container-x", Some(&network), json!({}))
        .expect("the plugin");
    assert_eq!(error_code(&refused.stdout), 11, "try again later");
    let gone = topology.nodes[0]
        .cni("DEL", &topology.a.container, None, json!({}))
        .expect("the plugin");
    assert!(gone.status.success(), "{gone:?}");
    assert_eq!(
        topology.nodes[0]
            .pod_interfaces()
            .expect("interfaces")
            .len(),
        2
    );

    topology.nodes[0].start().expect("an agent");
    let [node, _] = &topology.nodes;
    node.wait("the deletion that waited", |report| {
        allocations(report).len() == 1
    })
    .expect("a report");
    until("one interface", || {
        Ok((node.pod_interfaces()?.len() == 1).then_some(()))
    })
    .expect("the other one goes");
    assert_eq!(answers(&topology.b.network, None, "tcp", at), ["c"]);
    let waiting = fs::read_dir(node.state_dir().join("deleted"))
        .expect("the spool")
        .count();
    assert_eq!(waiting, 0, "a deletion is done once");
}

fn allocations(report: &Value) -> Vec<Value> {
    report["allocations"]
        .as_array()
        .cloned()
        .unwrap_or_default()
}

fn error_code(stdout: &[u8]) -> u64 {
    let error: Value = serde_json::from_slice(stdout).expect("an error as JSON");
    error["code"].as_u64().expect("a code")
}

#[test]
fn an_add_that_fails_leaves_nothing_and_one_that_is_repeated_gives_the_same() {
    let test = "an_add_that_fails_leaves_nothing_and_one_that_is_repeated_gives_the_same";
    let Some(topology) = topology(test, &[]) else {
        return;
    };
    let [node, _] = &topology.nodes;
    let before = (
        node.pod_interfaces().expect("interfaces"),
        node.pod_hooks().expect("hooks"),
    );

    // The name is taken in the pod.
    let network = Network::new().expect("a network");
    network
        .run(|| ip("link add eth0 type veth peer name other"))
        .expect("an interface");
    let refused = node
        .cni("ADD", "container-x", Some(&network), json!({}))
        .expect("the plugin");
    assert_eq!(error_code(&refused.stdout), 100, "{refused:?}");
    assert_eq!(
        (
            node.pod_interfaces().expect("interfaces"),
            node.pod_hooks().expect("hooks")
        ),
        before
    );
    let report = node.report().expect("a report");
    assert_eq!(allocations(&report).len(), 2, "{report}");

    let again = node
        .cni(
            "ADD",
            &topology.b.container,
            Some(&topology.b.network),
            json!({}),
        )
        .expect("the plugin");
    let address = cni_result(&again).expect("a result")["ips"][0]["address"].clone();
    assert_eq!(address, format!("{}/32", topology.b.address));
    let answer = ask(
        &topology.b.network,
        None,
        &format!("tcp {}:8080", topology.a.address),
    )
    .expect("a client");
    assert_eq!(answer, "a");
}

#[test]
fn check_finds_what_somebody_took_away() {
    let Some(topology) = topology("check_finds_what_somebody_took_away", &[]) else {
        return;
    };
    let [node, _] = &topology.nodes;
    let check = |pod: &Pod, address: &str| {
        let result = json!({"prevResult": {"cniVersion": "1.0.0", "ips": [{"address": address}]}});
        node.cni("CHECK", &pod.container, Some(&pod.network), result)
            .expect("the plugin")
    };
    let right = format!("{}/32", topology.b.address);
    assert!(check(&topology.b, &right).status.success());
    assert_eq!(
        error_code(&check(&topology.b, "10.244.1.99/32").stdout),
        100
    );
    topology
        .b
        .network
        .run(|| ip("route del default"))
        .expect("a route");
    let found = check(&topology.b, &right);
    assert!(
        String::from_utf8_lossy(&found.stdout).contains("no default route"),
        "{found:?}"
    );
    let unknown = node.cni(
        "CHECK",
        "container-x",
        Some(&topology.b.network),
        json!({"prevResult": {"ips": [{"address": right}]}}),
    );
    assert_eq!(error_code(&unknown.expect("the plugin").stdout), 3);
}

#[test]
fn addresses_are_found_again_when_their_file_is_lost() {
    let Some(mut topology) = topology("addresses_are_found_again_when_their_file_is_lost", &[])
    else {
        return;
    };
    topology.nodes[0].stop().expect("a good end");
    let file = topology.nodes[0].state_dir().join("addresses.json");
    fs::write(&file, "{\"version\": 1, \"allo").expect("half a file");
    topology.nodes[0].start().expect("an agent");
    let [node, _] = &topology.nodes;
    let d = node.add_pod("d").expect("a pod");
    assert!(
        ![topology.a.address, topology.b.address].contains(&d.address),
        "{}",
        d.address
    );
    let report = node.report().expect("a report");
    assert_eq!(allocations(&report).len(), 3, "{report}");
    assert!(
        file.with_extension("json.unreadable").exists(),
        "the file is kept for people to look at"
    );
    let answer = ask(
        &d.network,
        None,
        &format!("tcp {}:8080", topology.a.address),
    )
    .expect("a client");
    assert_eq!(answer, "a");
}

#[test]
fn deleted_pods_leave_nothing_behind() {
    let Some(topology) = topology("deleted_pods_leave_nothing_behind", &[]) else {
        return;
    };
    let Topology { nodes, a, b, c, .. } = topology;
    let quiet = nodes[0].wire("quiet").expect("a pod");
    for (node, pod) in [(&nodes[0], &a), (&nodes[0], &b), (&nodes[1], &c)] {
        for attempt in 0..2 {
            let output = node
                .cni("DEL", &pod.container, Some(&pod.network), json!({}))
                .expect("the plugin");
            assert!(
                output.status.success() && output.stdout.is_empty(),
                "attempt {attempt}: {output:?}"
            );
        }
    }
    // A pod whose namespace goes without a DEL is noticed.
    drop(quiet);
    for node in &nodes {
        node.wait("no pods", |report| allocations(report).is_empty())
            .expect("a report");
        until("no interfaces", || {
            Ok(node.pod_interfaces()?.is_empty().then_some(()))
        })
        .expect("none");
        until("no hooks", || {
            Ok(node.pod_hooks()?.is_empty().then_some(()))
        })
        .expect("none");
        let saved = fs::read_to_string(node.state_dir().join("addresses.json")).expect("the file");
        let saved: Value = serde_json::from_str(&saved).expect("JSON");
        assert_eq!(allocations(&saved), Vec::<Value>::new());
    }
}

#[test]
fn a_second_agent_waits_and_wrong_flags_are_refused() -> Result<()> {
    let test = "a_second_agent_waits_and_wrong_flags_are_refused";
    let Some(mut topology) = topology(test, &[]) else {
        return Ok(());
    };
    let [first, _] = &mut topology.nodes;
    let worker = first.worker()?;
    let second = first.spawn()?;
    until("the second agent's word", || {
        Ok(first
            .read_log()
            .contains("another agent of this node")
            .then_some(()))
    })?;
    assert_eq!(first.worker()?, worker, "the first one is not disturbed");
    first.stop()?;
    first.adopt(second);
    first.wait("ready", |report| report["ready"] == true)?;
    assert_eq!(
        ask(&topology.b.network, None, &format!("tcp {WEB}:80")).map(|name| name.len())?,
        1
    );

    for (flags, complaint) in [
        (
            &["--cgroup", "/etc"][..],
            "not a folder of a cgroup v2 hierarchy",
        ),
        (
            &["--service-cidr", "10.96.0.1/16"],
            "bits set after its prefix",
        ),
        (
            &["--socket-lb", "off", "--packet-lb", "off"],
            "nothing would translate",
        ),
        (
            &["--masquerade", "on", "--packet-lb", "off"],
            "needs --packet-lb on",
        ),
        (&["--socket", "agent.sock"], "not an absolute path"),
    ] {
        let output = keelway_tests::agents::agent_run(flags)?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(78) && told.contains(complaint),
            "{flags:?}: {output:?}"
        );
    }
    Ok(())
}
