//! What operators see of an agent on nodes of network namespaces: Services, flows, drops, and what is said of bad input.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use keelway_tests::agents::{AgentNode, Service, until};
use keelway_tests::process::Running;
use keelway_tests::sandbox::{Network, ip};
use keelway_tests::topology::{Topology, WEB};
use serde_json::{Value, json};

const TIMEOUT: Duration = Duration::from_secs(2);

/// Packet hooks alone, so that every flow is in the tables.
fn topology(test: &str) -> Option<Topology> {
    Topology::start(test, &["--socket-lb", "off"])
}

/// Writes Services, and waits until the first node shows one of them as wished.
fn write(
    topology: &Topology,
    services: &[Service],
    name: &str,
    wished: impl Fn(&Value) -> bool,
) -> Value {
    topology
        .cluster
        .write(services)
        .expect("the cluster's file");
    until(name, || {
        let shown = topology.nodes[0].command(&["service", "show", name, "-o", "json"])?;
        let shown: Option<Value> = serde_json::from_str(&shown.stdout).ok();
        Ok(shown.filter(|shown| wished(shown)))
    })
    .expect("the Service as wished")
}

fn json_of(node: &AgentNode, arguments: &[&str]) -> Value {
    let text = node.command(arguments).expect("a command").ok();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn connect(from: &Network, at: SocketAddr) -> TcpStream {
    let stream = from
        .run(|| TcpStream::connect_timeout(&at, TIMEOUT))
        .expect("connect");
    stream.set_read_timeout(Some(TIMEOUT)).expect("a timeout");
    stream
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.write_all(b"hello")?;
    let mut buffer = [0; 256];
    let len = stream.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
}

fn all_installed(shown: &Value) -> bool {
    let ports = shown["ports"].as_array().map_or(&[][..], Vec::as_slice);
    let frontends = ports.iter().flat_map(|port| port["frontends"].as_array());
    !ports.is_empty()
        && frontends
            .flatten()
            .all(|frontend| frontend["installed"] == true)
}

#[test]
fn services_are_listed_and_shown() {
    let Some(topology) = topology("services_are_listed_and_shown") else {
        return;
    };
    let shown = write(&topology, &[topology.web()], "web", all_installed);
    assert_eq!(shown["type"], "ClusterIP");
    assert_eq!(shown["clusterIps"], json!([WEB]));
    assert_eq!(shown["ports"].as_array().expect("ports").len(), 2);
    let backends = json!([
        SocketAddr::from((topology.a.address, 8080)),
        SocketAddr::from((topology.c.address, 8080))
    ]);
    assert_eq!(shown["ports"][0]["active"], backends);
    assert!(shown["ports"][0]["id"].as_u64() > Some(0));
    assert_eq!(shown["refused"], json!([]));

    let node = &topology.nodes[0];
    let listed = json_of(node, &["service", "list", "-o", "json"]);
    assert_eq!(listed, json!([shown]));
    let text = node.command(&["service", "list"]).expect("a command").ok();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("NAMESPACE"), "{text}");
    assert!(
        lines[1].contains("10.96.0.7") && lines[1].ends_with("served"),
        "{text}"
    );
    assert!(!text.contains('\u{1b}'), "no colours into a pipe: {text}");
    let text = node.command(&["service", "show", "web"]).expect("it").ok();
    for words in ["default/web", "10.96.0.7:80 TCP", "active", "node-1 (this)"] {
        assert!(text.contains(words), "{words} in\n{text}");
    }

    let none = node.command(&["service", "show", "kube-system/dns"]);
    let said = none.expect("a command").refused();
    assert!(said.contains("no Service kube-system/dns"), "{said}");
    let empty = json_of(node, &["service", "list", "-n", "none", "-o", "json"]);
    assert_eq!(empty, json!([]));
}

#[test]
fn an_address_of_two_services_is_the_first_names_and_the_other_is_told() {
    let test = "an_address_of_two_services_is_the_first_names_and_the_other_is_told";
    let Some(topology) = topology(test) else {
        return;
    };
    let other = Service {
        name: "xweb",
        ..topology.web()
    };
    let shown = write(&topology, &[topology.web(), other], "xweb", |shown| {
        shown["refused"]
            .to_string()
            .contains("belongs to default/web")
    });
    assert!(!all_installed(&shown), "{shown}");
    let text = topology.nodes[0].command(&["service", "list"]);
    let text = text.expect("a command").ok();
    assert!(text.lines().any(|line| line.ends_with("refused")), "{text}");
    // When the first is gone, the second has it.
    let other = Service {
        name: "xweb",
        ..topology.web()
    };
    write(&topology, &[other], "xweb", all_installed);
}

#[test]
fn flows_are_listed_by_name_and_flushed() {
    let Some(topology) = topology("flows_are_listed_by_name_and_flushed") else {
        return;
    };
    write(&topology, &[topology.web()], "web", all_installed);
    let node = &topology.nodes[0];
    let web = SocketAddr::from((WEB, 80));
    let mut stream = connect(&topology.b.network, web);
    exchange(&mut stream).expect("an answer");

    let flows = json_of(node, &["conntrack", "list", "-o", "json"]);
    let [flow] = flows.as_array().expect("flows").as_slice() else {
        panic!("one flow: {flows}")
    };
    assert_eq!(flow["state"], "ESTABLISHED");
    assert_eq!(flow["frontend"], json!(web));
    assert_eq!(flow["service"], "default/web:tcp");
    assert_eq!(flow["clientName"], json!({"pod": "default/container-b"}));
    assert!(flow["expiresSeconds"].as_u64() > Some(86_000), "{flow}");
    let (mine, backend) = (
        topology.b.address.to_string(),
        flow["backend"].as_str().expect("an address").to_owned(),
    );

    for (filter, found) in [
        (["--service", "web"], 1),
        (["--pod", "default/container-b"], 1),
        (["--address", &mine], 1),
        (["--address", "10.244.0.0/16"], 1),
        (["--address", "192.0.2.1"], 0),
        (["--proto", "udp"], 0),
    ] {
        let arguments = ["conntrack", "list", "-o", "json", filter[0], filter[1]];
        let flows = json_of(node, &arguments);
        assert_eq!(flows.as_array().map(Vec::len), Some(found), "{filter:?}");
    }
    for (filter, said) in [
        (["--service", "none"], "no Service default/none"),
        (["--pod", "none"], "pod default/none"),
        (["--proto", "icmp"], "TCP, UDP or SCTP"),
        (["--address", "x"], "invalid value"),
    ] {
        let refused = node.command(&["conntrack", "list", filter[0], filter[1]]);
        let words = refused.expect("a command").refused();
        assert!(words.contains(said), "{words}");
    }

    let careless = node.command(&["conntrack", "flush"]).expect("a command");
    assert!(careless.refused().contains("--all"));
    exchange(&mut stream).expect("nothing was flushed");
    let flushed = json_of(node, &["conntrack", "flush", "-s", "web", "-o", "json"]);
    assert_eq!(flushed[0]["backend"], json!(backend));
    let left = json_of(node, &["conntrack", "list", "-o", "json"]);
    assert_eq!(left, json!([]));
    // The connection is nobody's now. A new one works.
    stream.write_all(b"hello").expect("into the buffer");
    let mut again = connect(&topology.b.network, web);
    exchange(&mut again).expect("an answer");
}

#[test]
fn commands_wait_for_a_worker_that_is_replaced_and_say_when_no_agent_is_there() {
    let test = "commands_wait_for_a_worker_that_is_replaced_and_say_when_no_agent_is_there";
    let Some(mut topology) = topology(test) else {
        return;
    };
    write(&topology, &[topology.web()], "web", all_installed);
    let node = &topology.nodes[0];
    node.kill_worker().expect("another worker");
    // At once: the supervisor holds the socket, and the new worker answers when it can.
    let listed = json_of(node, &["conntrack", "list", "-o", "json"]);
    assert_eq!(listed, json!([]));
    topology.nodes[0].stop().expect("it stops");
    let said = topology.nodes[0]
        .command(&["service", "list"])
        .expect("a command")
        .refused();
    assert!(said.contains("no agent answers"), "{said}");
}

#[test]
fn the_monitor_tells_of_flows_drops_and_rejects_with_names() {
    let test = "the_monitor_tells_of_flows_drops_and_rejects_with_names";
    let Some(topology) = topology(test) else {
        return;
    };
    write(&topology, &[topology.web()], "web", all_installed);
    let node = &topology.nodes[0];
    let all = node.watch(&["monitor", "-o", "json"]).expect("a monitor");
    let flags = [
        "monitor",
        "-o",
        "json",
        "--drops",
        "--pod",
        "default/container-b",
    ];
    let drops = node.watch(&flags).expect("a monitor");
    // Both listen once they have heard of this one, a spoofed source, which is sent until they do.
    let spoofed = |from: &Network| {
        from.run(|| {
            ip("addr add 192.0.2.9/32 dev lo").ok();
            let socket = std::net::UdpSocket::bind("192.0.2.9:0").expect("a socket");
            socket.send_to(b"hello", (WEB, 80)).ok();
        });
    };
    let line = |running: &Running, from: &Network, words: &str| -> Value {
        let text = until(words, || {
            spoofed(from);
            Ok(running.try_line_with(words))
        })
        .expect("a line");
        serde_json::from_str(&text).expect("JSON")
    };
    let dropped = line(&all, &topology.a.network, "source_address");
    assert_eq!(dropped["class"], "drop");
    assert_eq!(dropped["hook"], "pod_ingress");
    assert_eq!(dropped["protocol"], "UDP");
    assert!(
        dropped["source"].to_string().contains("192.0.2.9"),
        "{dropped}"
    );
    assert_eq!(
        dropped["destinationName"],
        json!({"service": "default/web"})
    );

    let mut stream = connect(&topology.b.network, SocketAddr::from((WEB, 80)));
    let answered = exchange(&mut stream).expect("an answer");
    let flow = all.line_with("flow_created", TIMEOUT * 5);
    let flow: Value = serde_json::from_str(&flow).expect("JSON");
    assert_eq!(flow["sourceName"], json!({"pod": "default/container-b"}));
    assert_eq!(flow["service"], "default/web:tcp");
    assert_eq!(
        (&flow["flags"], &flow["protocol"]),
        (&json!("SYN"), &json!("TCP"))
    );
    let backend = flow["backend"].as_str().expect("an address");
    let a = SocketAddr::from((topology.a.address, 8080)).to_string();
    assert_eq!(
        backend == a,
        answered.starts_with("a "),
        "{flow}: {answered}"
    );

    // A port that the Service has not: rejected, and told with the client's own packet.
    let refused = topology
        .b
        .network
        .run(|| TcpStream::connect_timeout(&SocketAddr::from((WEB, 81)), TIMEOUT));
    refused.expect_err("nobody is there");
    let rejected = drops.line_with("no_such_port", TIMEOUT * 5);
    let rejected: Value = serde_json::from_str(&rejected).expect("JSON");
    assert_eq!(rejected["class"], "reject");
    assert_eq!(rejected["destination"], "10.96.0.7:81");
    assert!(
        rejected["source"]
            .to_string()
            .contains(&topology.b.address.to_string())
    );

    let wrong = node.command(&["monitor", "--reason", "no_such_reason"]);
    let said = wrong.expect("a command").refused();
    assert!(
        said.contains("no_such_port"),
        "it names those that exist: {said}"
    );
    let wrong = node
        .command(&["monitor", "--sample", "3"])
        .expect("a command");
    assert!(wrong.refused().contains("power of two"));
}

/// Status, weight header and body of a health check; None while nobody listens.
fn health(from: &Network, at: SocketAddr, path: &str) -> Option<(u16, Option<String>, Value)> {
    let stream = from.run(|| TcpStream::connect_timeout(&at, TIMEOUT)).ok()?;
    stream.set_read_timeout(Some(TIMEOUT)).expect("a timeout");
    let mut stream = stream;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let weight = head
        .lines()
        .find_map(|line| line.strip_prefix("x-load-balancing-endpoint-weight: "));
    Some((
        status,
        weight.map(str::to_owned),
        serde_json::from_str(body).unwrap_or_default(),
    ))
}

const HEALTH_PORT: u16 = 30_999;

fn balanced(topology: &Topology, endpoints: Vec<(Ipv4Addr, &'static str)>) -> Service {
    Service {
        endpoints,
        spec: json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": HEALTH_PORT}),
        ..topology.web()
    }
}

#[test]
fn health_checks_count_local_endpoints_and_follow_them() {
    let Some(topology) = topology("health_checks_count_local_endpoints_and_follow_them") else {
        return;
    };
    // As an external load balancer does: from the link, to the node's own address.
    let from = &topology.nodes[1].host;
    let at = SocketAddr::from((topology.nodes[0].address, HEALTH_PORT));
    let answers = |path: &str, wished: &dyn Fn(u16, &Value) -> bool| {
        until("the health check's answer", || {
            Ok(health(from, at, path).filter(|(status, _, body)| wished(*status, body)))
        })
        .expect("an answer")
    };
    let (a, b) = (topology.a.address, topology.b.address);
    let web = balanced(
        &topology,
        vec![(a, "node-1"), (b, "node-1"), (topology.c.address, "node-2")],
    );
    topology.cluster.write(&[web]).expect("the file");
    let (status, weight, body) = answers("/any/path", &|_, body| body["localEndpoints"] == 2);
    assert_eq!((status, weight.as_deref()), (200, Some("2")));
    assert_eq!(
        body["service"],
        json!({"namespace": "default", "name": "web"})
    );
    assert_eq!(body["serviceProxyHealthy"], true);

    let web = balanced(&topology, vec![(topology.c.address, "node-2")]);
    topology.cluster.write(&[web]).expect("the file");
    let (_, weight, body) = answers("/", &|status, _| status == 503);
    assert_eq!(
        (weight.as_deref(), &body["localEndpoints"]),
        (Some("0"), &json!(0))
    );

    // A worker that is killed leaves its port for its successor.
    topology.nodes[0].kill_worker().expect("another worker");
    answers("/", &|status, _| status == 503);

    let proxy = SocketAddr::from((topology.nodes[0].address, 10_256));
    let (status, _, body) = health(from, proxy, "/healthz").expect("an answer");
    assert_eq!((status, &body["nodeEligible"]), (200, &json!(true)));
    assert!(body["lastUpdated"].is_string() && body["currentTime"].is_string());
    let (status, _, body) = health(from, proxy, "/livez").expect("an answer");
    assert_eq!((status, body.get("nodeEligible")), (200, None));

    // No longer a LoadBalancer: nobody listens.
    topology.cluster.write(&[topology.web()]).expect("the file");
    until("the port is free", || {
        Ok(health(from, at, "/").is_none().then_some(()))
    })
    .expect("a closed port");
}

#[test]
fn a_health_check_whose_port_is_taken_is_told_and_had_when_it_is_free() {
    let test = "a_health_check_whose_port_is_taken_is_told_and_had_when_it_is_free";
    let Some(topology) = topology(test) else {
        return;
    };
    let squatter = topology.nodes[0]
        .host
        .run(|| std::net::TcpListener::bind(("0.0.0.0", HEALTH_PORT)))
        .expect("the port");
    let web = balanced(&topology, vec![(topology.a.address, "node-1")]);
    let refused = |shown: &Value| shown["refused"].to_string().contains("healthCheckNodePort");
    let shown = write(&topology, std::slice::from_ref(&web), "web", refused);
    assert!(
        shown["refused"][0].to_string().contains("in use"),
        "{shown}"
    );
    drop(squatter);
    write(&topology, &[web], "web", |shown| {
        shown["refused"] == json!([])
    });
    let at = SocketAddr::from((topology.nodes[0].address, HEALTH_PORT));
    let (status, ..) = health(&topology.nodes[1].host, at, "/").expect("an answer");
    assert_eq!(status, 200);
}

#[test]
fn a_node_port_that_a_process_listens_on_is_told_and_serves_the_service() {
    let test = "a_node_port_that_a_process_listens_on_is_told_and_serves_the_service";
    let Some(topology) = topology(test) else {
        return;
    };
    const NODE_PORT: u16 = 30_080;
    let node = &topology.nodes[0];
    let at = SocketAddr::from((node.address, NODE_PORT));
    let squatter = node
        .host
        .run(|| std::net::TcpListener::bind(("0.0.0.0", NODE_PORT)))
        .expect("the port");
    let web = Service {
        endpoints: vec![(topology.a.address, "node-1")],
        spec: json!({"type": "NodePort", "ports": [{"name": "tcp", "port": 80, "protocol": "TCP", "nodePort": NODE_PORT}]}),
        ..topology.web()
    };
    let shown = write(&topology, &[web], "web", |shown| {
        all_installed(shown) && shown["warnings"].to_string().contains("30080")
    });
    assert_eq!(shown["refused"], json!([]));
    let report = node.report().expect("a report");
    assert_eq!(report["nodePortsShared"], 1);
    let text = node.command(&["service", "show", "web"]).expect("it").ok();
    assert!(
        text.contains("Warning:") && text.contains("hidden"),
        "{text}"
    );
    // The other node has the port for itself.
    let other = topology.nodes[1].report().expect("a report");
    assert_eq!(other["nodePortsShared"], 0);
    // As with kube-proxy, whoever comes from outside reaches the Service.
    let mut stream = connect(&topology.nodes[1].host, at);
    let answer = exchange(&mut stream).expect("an answer");
    assert!(answer.starts_with("a "), "{answer}");
    drop(squatter);
    node.wait("the port for itself", |report| {
        report["nodePortsShared"] == 0
    })
    .expect("it");
}

#[test]
fn endpoints_that_cannot_be_used_are_told_and_the_others_serve() {
    let Some(topology) = topology("endpoints_that_cannot_be_used_are_told_and_the_others_serve")
    else {
        return;
    };
    let before = topology.nodes[0].report().expect("a report")["refusals"].as_u64();
    let bad = [
        [127, 0, 0, 1],
        [224, 0, 0, 1],
        [169, 254, 1, 1],
        [0, 0, 0, 0],
    ];
    let mut endpoints = vec![(topology.a.address, "node-1")];
    endpoints.extend(bad.map(|address| (Ipv4Addr::from(address), "node-1")));
    // A node's own address is an endpoint like any other: a process of the host.
    endpoints.push((topology.nodes[0].address, "node-1"));
    let web = Service {
        endpoints,
        ..topology.web()
    };
    let shown = write(&topology, std::slice::from_ref(&web), "web", |shown| {
        shown["ports"][0]["active"].as_array().map(Vec::len) == Some(2)
    });
    assert_ne!(shown["refused"], json!([]), "{shown}");
    // By SCTP as well.
    let ports = json!([{"name": "tcp", "port": 80, "protocol": "TCP"}, {"name": "sctp", "port": 80, "protocol": "SCTP"}]);
    let sctp = Service {
        spec: json!({"ports": ports}),
        ..web
    };
    write(&topology, &[sctp], "web", |shown| {
        let active = |at: usize| shown["ports"][at]["active"].as_array().map(Vec::len);
        [active(0), active(1)] == [Some(2); 2]
    });
    let after = topology.nodes[0].report().expect("a report")["refusals"].as_u64();
    assert!(after > before, "{before:?} {after:?}");
    let answers: std::collections::BTreeSet<String> = (0..40)
        .map(|_| {
            let mut stream = connect(&topology.b.network, SocketAddr::from((WEB, 80)));
            let answer = exchange(&mut stream).expect("an answer");
            answer.split(' ').next().unwrap_or_default().to_owned()
        })
        .collect();
    assert_eq!(answers, ["a", "node-1"].map(str::to_owned).into());
}
