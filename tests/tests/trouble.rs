//! Nodes in trouble: what an agent stands on is gone, or it cannot know what it should. Traffic stays up or comes back by itself, and
//! `status` says what happened.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dataplane_abi::limits;
use keelway_agent::dataplane::held;
use keelway_tests::agents::{Service, agent_run, cni_result, until};
use keelway_tests::requests::{TIMEOUT, exchange};
use keelway_tests::sandbox::{Network, ip};
use keelway_tests::topology::{Topology, WEB};
use serde_json::{Value, json};

/// How often clients ask while the API server is away, and a worker is killed.
const ASKED_EVERY: Duration = Duration::from_secs(1);
const KILLED_EVERY: Duration = Duration::from_secs(60);

/// For how long it is away; `KEELWAY_AWAY_S` says otherwise.
fn away() -> Duration {
    let seconds = std::env::var("KEELWAY_AWAY_S").ok();
    Duration::from_secs(seconds.map_or(3, |text| text.parse().expect("a number of seconds")))
}

/// Writes Services, and waits until pod b is served by both endpoints of the first.
fn serve(topology: &Topology, services: &[Service]) {
    topology
        .cluster
        .write(services)
        .expect("the cluster's file");
    is_served(topology, "both endpoints");
}

fn is_served(topology: &Topology, what: &str) {
    is_served_at(topology, WEB, what);
}

fn is_served_at(topology: &Topology, address: Ipv4Addr, what: &str) {
    until(what, || {
        let answers = (0..20).map(|_| ask(&topology.b.network, (address, 80)));
        let names: std::io::Result<BTreeSet<String>> = answers.collect();
        Ok(names.ok().filter(|names| names.len() == 2))
    })
    .expect(what);
}

/// The name of the server that answers, after a connection of its own.
fn ask(from: &Network, at: (Ipv4Addr, u16)) -> std::io::Result<String> {
    let answer = whole_answer(from, at)?;
    Ok(answer.split(' ').next().unwrap_or_default().to_owned())
}

/// The server's name, and whom it takes the client to be.
fn whole_answer(from: &Network, at: (Ipv4Addr, u16)) -> std::io::Result<String> {
    let stream = from.run(|| TcpStream::connect_timeout(&SocketAddr::from(at), TIMEOUT));
    exchange(&mut stream?)
}

fn problems(report: &Value) -> String {
    report["problems"].to_string()
}

#[test]
fn pins_that_are_removed_under_an_agent_come_back_and_status_says_so() {
    let test = "pins_that_are_removed_under_an_agent_come_back_and_status_says_so";
    let Some(topology) = Topology::start(test, &[]) else {
        return;
    };
    serve(&topology, &[topology.web()]);
    let node = &topology.nodes[0];
    let worker = node.worker().expect("a worker");
    fs::remove_dir_all(node.pin_root()).expect("the pins");
    let report = node
        .wait("another worker that is ready", |report| {
            report["ready"] == true && report["restarts"].as_u64() > Some(0)
        })
        .expect("it");
    assert_ne!(node.worker().expect("a worker"), worker);
    let why = report["lastEnd"].as_str().unwrap_or_default();
    assert!(why.contains("is gone: starting over"), "{report}");
    is_served(&topology, "both endpoints again");
    let shown = node.command(&["status"]).expect("it").ok();
    assert!(shown.contains("is gone: starting over"), "{shown}");
    // A pod that comes now has a network too.
    let pod = node.add_pod("d").expect("a pod");
    ask(&pod.network, (WEB, 80)).expect("an answer");
}

#[test]
fn a_program_that_is_taken_off_is_hung_on_again() {
    let Some(topology) = Topology::start("a_program_that_is_taken_off_is_hung_on_again", &[])
    else {
        return;
    };
    serve(&topology, &[topology.web()]);
    let node = &topology.nodes[0];
    let uplinks = || -> Vec<PathBuf> {
        let mut folders = vec![node.pin_root()];
        let mut found = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("a folder").flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if entry
                    .file_name()
                    .to_string_lossy()
                    .starts_with("uplink_ingress-")
                {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    };
    let before = uplinks();
    assert!(!before.is_empty());
    let worker = node.worker().expect("a worker");
    for pin in &before {
        fs::remove_file(pin).expect("the pin, and the link with it");
    }
    until("the programs", || Ok((uplinks() == before).then_some(()))).expect("programs");
    is_served(&topology, "both endpoints");
    assert_eq!(
        node.worker().expect("a worker"),
        worker,
        "no new one was needed"
    );
}

#[test]
fn without_an_api_server_a_new_worker_leaves_traffic_as_it_is_and_says_what_it_lacks() {
    let test = "without_an_api_server_a_new_worker_leaves_traffic_as_it_is_and_says_what_it_lacks";
    // Per packet, so that a flow's entry is what keeps the connection.
    let Some(topology) = Topology::start(test, &["--socket-lb", "off"]) else {
        return;
    };
    serve(&topology, &[topology.web()]);
    let node = &topology.nodes[0];
    let at = SocketAddr::from((WEB, 80));
    let open = topology
        .b
        .network
        .run(|| TcpStream::connect_timeout(&at, TIMEOUT));
    let mut open = open.expect("a connection");
    let server = exchange(&mut open).expect("an answer");
    let aside = topology.cluster.path.with_extension("aside");
    fs::rename(&topology.cluster.path, &aside).expect("no cluster to be known");
    for _ in 0..3 {
        node.kill_worker().expect("another worker");
        let report = node
            .wait("a worker that knows nothing", |report| {
                problems(report).contains("cannot be watched")
            })
            .expect("it");
        assert_eq!(report["ready"], false);
        assert!(
            report["lastEnd"].to_string().contains("SIGKILL"),
            "{report}"
        );
        is_served(&topology, "both endpoints as before");
        assert_eq!(exchange(&mut open).expect("the same connection"), server);
    }
    // A pod that comes has its port of the node, and takes it along.
    let late = Network::new().expect("a network");
    let wish = json!({"runtimeConfig": {"portMappings": [
        {"hostPort": 8090, "containerPort": 7000, "protocol": "tcp"},
    ]}});
    let added = node
        .cni("ADD", "late", Some(&late), wish)
        .expect("the plugin");
    cni_result(&added).expect("a pod");
    let listening = late.run(|| TcpListener::bind(("0.0.0.0", 7000)));
    let _listener = listening.expect("a listener");
    let connects = || {
        let port = SocketAddr::from((node.address, 8090));
        let other = &topology.nodes[1].host;
        other
            .run(|| TcpStream::connect_timeout(&port, TIMEOUT))
            .is_ok()
    };
    until("the pod's port", || Ok(connects().then_some(()))).expect("it");
    let removed = node
        .cni("DEL", "late", None, json!({}))
        .expect("the plugin");
    assert!(removed.status.success());
    until("the pod's port gone", || Ok((!connects()).then_some(()))).expect("it");
    // Nothing of what is known grows old, for as long as it takes.
    let (began, mut killed) = (Instant::now(), Instant::now());
    while began.elapsed() < away() {
        is_served(&topology, "both endpoints still");
        assert_eq!(exchange(&mut open).expect("the same connection"), server);
        if killed.elapsed() > KILLED_EVERY {
            node.kill_worker().expect("another worker");
            killed = Instant::now();
        }
        std::thread::sleep(ASKED_EVERY);
    }
    // What changed meanwhile is caught up with.
    fs::rename(&aside, &topology.cluster.path).expect("the cluster");
    let web = Service {
        endpoints: vec![(topology.c.address, "node-2")],
        ..topology.web()
    };
    topology.cluster.write(&[web]).expect("the file");
    node.wait("ready", |report| report["ready"] == true)
        .expect("ready");
    until("the other endpoint alone", || {
        let answers: BTreeSet<String> = (0..10)
            .map(|_| ask(&topology.b.network, (WEB, 80)).expect("an answer"))
            .collect();
        Ok((answers == ["c".to_owned()].into()).then_some(()))
    })
    .expect("it");
    assert_eq!(exchange(&mut open).expect("the same connection"), server);
}

#[test]
fn nothing_is_masqueraded_before_it_is_known_what_must_not_be() {
    let test = "nothing_is_masqueraded_before_it_is_known_what_must_not_be";
    let Some(mut topology) = Topology::start(test, &["--masquerade", "on"]) else {
        return;
    };
    serve(&topology, &[topology.web()]);
    let (b, c) = (topology.b.address.to_string(), topology.c.address);
    let seen = |topology: &Topology| {
        let answer = whole_answer(&topology.b.network, (c, 8080)).expect("an answer");
        answer.split(' ').nth(1).unwrap_or_default().to_owned()
    };
    assert_eq!(seen(&topology), b);
    // As after the machine was started anew: the agent knows its own node from its file, and no other.
    topology.nodes[0].kill().expect("killed");
    fs::remove_dir_all(topology.nodes[0].pin_root()).expect("the pins");
    let aside = topology.cluster.path.with_extension("aside");
    fs::rename(&topology.cluster.path, &aside).expect("no cluster to be known");
    let agent = topology.nodes[0].spawn().expect("an agent");
    topology.nodes[0].adopt(agent);
    let node = &topology.nodes[0];
    let ranges = || {
        let state = held(&node.pin_root()).ok()?;
        let ranges = state.unmasqueraded.iter().map(ToString::to_string);
        Some(ranges.collect::<Vec<_>>())
    };
    until("pods in the new maps", || {
        let pods = held(&node.pin_root()).map_or(0, |state| state.pods.len());
        Ok((pods >= 2).then_some(()))
    })
    .expect("pods");
    assert_eq!(ranges(), Some(vec!["0.0.0.0/0".into(), "::/0".into()]));
    assert_eq!(seen(&topology), b);
    fs::rename(&aside, &topology.cluster.path).expect("the cluster");
    until("what is known", || {
        Ok(ranges().filter(|ranges| ranges.contains(&"10.244.2.0/24".into())))
    })
    .expect("ranges");
    assert!(!ranges().expect("ranges").contains(&"0.0.0.0/0".into()));
    assert_eq!(seen(&topology), b);
}

#[test]
fn the_api_servers_service_keeps_its_last_backends() {
    let test = "the_api_servers_service_keeps_its_last_backends";
    let Some(topology) = Topology::start(test, &[]) else {
        return;
    };
    // The first of the range, as everywhere: of a Service that is gone only that is known.
    let address = Ipv4Addr::new(10, 96, 0, 1);
    let kubernetes = |endpoints| Service {
        name: "kubernetes",
        address,
        endpoints,
        ..topology.web()
    };
    let both = topology.web().endpoints;
    let write = |services: &[Service]| topology.cluster.write(services).expect("the file");
    write(&[kubernetes(both.clone())]);
    is_served_at(&topology, address, "both endpoints");
    let node = &topology.nodes[0];
    for services in [vec![kubernetes(Vec::new())], Vec::new()] {
        write(&services);
        node.wait("what is kept", |report| {
            problems(report).contains("default/kubernetes")
        })
        .expect("it");
        is_served_at(&topology, address, "its last endpoints");
        // Another worker finds them in the maps.
        node.kill_worker().expect("another worker");
        node.wait("what is kept, by another worker", |report| {
            report["ready"] == true && problems(report).contains("default/kubernetes")
        })
        .expect("it");
        is_served_at(&topology, address, "its last endpoints, by another worker");
    }
    write(&[kubernetes(both)]);
    node.wait("no problem", |report| report["problems"] == json!([]))
        .expect("none");
    is_served_at(&topology, address, "both endpoints again");
}

#[test]
fn an_overlay_that_somebody_takes_down_or_away_is_made_again() {
    let test = "an_overlay_that_somebody_takes_down_or_away_is_made_again";
    let Some(topology) = Topology::start(test, &["--routing", "vxlan"]) else {
        return;
    };
    serve(&topology, &[topology.web()]);
    let node = &topology.nodes[0];
    let take = |what: &str| {
        node.host
            .run(|| ip(&format!("link {what} keelway-vx")))
            .expect("the interface");
    };
    // Whoever does it time and again ends no worker.
    for _ in 0..2 {
        take("set down dev");
        node.wait("what somebody does", |report| {
            problems(report).contains("sets it down")
        })
        .expect("it");
        is_served(&topology, "both endpoints again");
    }
    let report = node
        .wait("no problem", |report| report["problems"] == json!([]))
        .expect("none");
    assert_eq!(report["restarts"], 0, "{report}");
    take("del dev");
    node.wait("another worker that is ready", |report| {
        report["ready"] == true && report["restarts"] == 1
    })
    .expect("it");
    is_served(&topology, "both endpoints again");
}

#[test]
fn a_full_map_is_told_and_keeps_nobody_elses_service_from_working() {
    let test = "a_full_map_is_told_and_keeps_nobody_elses_service_from_working";
    let Some(topology) = Topology::start(test, &[]) else {
        return;
    };
    // More ranges of sources than all Services can have together.
    let ranges: Vec<String> = (0..=limits::RANGES)
        .map(|number| format!("{}/32", Ipv4Addr::from(0xc000_0000 + number)))
        .collect();
    let ports = json!([{"name": "tcp", "port": 80, "protocol": "TCP"}]);
    let big = Service {
        name: "big",
        address: Ipv4Addr::new(10, 96, 0, 8),
        spec: json!({"type": "LoadBalancer", "ports": ports, "loadBalancerSourceRanges": ranges}),
        balanced: Some(Ipv4Addr::new(203, 0, 113, 1)),
        ..topology.web()
    };
    serve(&topology, &[topology.web()]);
    topology
        .cluster
        .write(&[big, topology.web()])
        .expect("the file");
    let node = &topology.nodes[0];
    let report = node
        .wait("a full map", |report| problems(report).contains("full"))
        .expect("it");
    assert!(report["batchesFailed"].as_u64() > Some(0), "{report}");
    // What is in the same batch, and what comes later, works: a Service's endpoints may be in the next batch, as they are in an
    // object of their own, and until then it refuses.
    until("an answer", || {
        match ask(&topology.b.network, (Ipv4Addr::new(10, 96, 0, 8), 80)) {
            Ok(_) => Ok(Some(())),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(None),
            Err(error) => Err(error.into()),
        }
    })
    .expect("an answer");
    is_served(&topology, "both endpoints");
    // Another worker, which begins with a map that is full, serves what fits.
    node.kill_worker().expect("another worker");
    node.wait("what fits, by another worker", |report| {
        report["ready"] == true && problems(report).contains("full")
    })
    .expect("it");
    is_served(&topology, "both endpoints, by another worker");
    // What goes makes room.
    serve(&topology, &[topology.web()]);
    node.wait("no problem", |report| report["problems"] == json!([]))
        .expect("none");
}

#[test]
fn a_service_of_thousands_of_ports_is_served_at_each() {
    let Some(topology) = Topology::start("a_service_of_thousands_of_ports_is_served_at_each", &[])
    else {
        return;
    };
    const PORTS: u16 = 2_000;
    let ports: Vec<_> = (1..=PORTS)
        .map(|port| json!({"name": format!("p{port}"), "port": port, "protocol": "TCP"}))
        .collect();
    let slice_ports: Vec<_> = (1..=PORTS)
        .map(|port| json!({"name": format!("p{port}"), "port": 8080, "protocol": "TCP"}))
        .collect();
    let mut items = topology.cluster.nodes.clone();
    items.push(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "wide"},
        "spec": {"clusterIP": WEB, "clusterIPs": [WEB], "ports": ports},
    }));
    // Slices have a hundred ports each, as the API allows.
    for (number, ports) in slice_ports.chunks(100).enumerate() {
        items.push(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "namespace": "default", "name": format!("wide-{number}"),
                "labels": {"kubernetes.io/service-name": "wide"},
            },
            "ports": ports,
            "endpoints": [{"addresses": [topology.a.address], "nodeName": "node-1", "conditions": {"ready": true}}],
        }));
    }
    let partial = topology.cluster.path.with_extension("new");
    let list = json!({"kind": "List", "apiVersion": "v1", "items": items});
    fs::write(&partial, list.to_string()).expect("the file");
    fs::rename(&partial, &topology.cluster.path).expect("the file");
    for port in [1, PORTS / 2, PORTS] {
        until("an answer", || {
            Ok(ask(&topology.b.network, (WEB, port)).ok())
        })
        .expect("an answer");
    }
    let report = topology.nodes[0].report().expect("a report");
    assert_eq!(report["servicePorts"], PORTS, "{report}");
    assert_eq!(report["problems"], json!([]));
}

#[test]
fn an_agent_that_would_need_a_service_to_reach_the_api_server_is_refused() {
    for (url, range) in [
        ("https://10.96.0.1:443", "10.96.0.0/16"),
        ("https://[fd00:96::1]", "fd00:96::/112"),
    ] {
        let output = agent_run(&["--api-server", url, "--service-cidr", range]).expect("an agent");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success());
        assert!(
            said.contains("--api-server") && said.contains(range),
            "{said}"
        );
    }
}
