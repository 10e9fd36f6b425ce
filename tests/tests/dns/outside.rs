//! Names outside the cluster, by the arguments that the manifest gives; and what an operator sees of it all.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::thread;

use keelway_tests::cluster::program;
use keelway_tests::sandbox::{Sandbox, ip, is_root};

use crate::support::{NOERROR, NXDOMAIN, Server, api, ask, free_port, question, service_name};

const UPSTREAM: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 3, 1));
const REFUSED: u8 = 5;

/// Answers every question with one address, for as long as the process lives.
fn willing(upstream: SocketAddr) {
    let socket = UdpSocket::bind(upstream).expect("an address");
    thread::spawn(move || {
        let mut message = [0; 1500];
        while let Ok((bytes, peer)) = socket.recv_from(&mut message) {
            let end = 12
                + message[12..bytes]
                    .iter()
                    .position(|byte| *byte == 0)
                    .expect("a name")
                + 5;
            let mut reply = message[..end].to_vec();
            reply[2] |= 0x80;
            (reply[7], reply[11]) = (1, 0);
            reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
            let _ = socket.send_to(&reply, peer);
        }
    });
}

/// The arguments of the DaemonSet's server, with another resolver configuration.
fn arguments(resolv_conf: &str) -> Vec<String> {
    let manifest = include_str!("../../../deploy/dns.yaml");
    let line = manifest
        .lines()
        .find_map(|line| line.trim().strip_prefix("args: ["));
    let words = line.expect("arguments").trim_end_matches(']').split(", ");
    let words = words.map(|word| word.trim_matches('"'));
    let words: Vec<&str> = words.filter(|word| *word != "serve").collect();
    assert!(words.contains(&"--upstream=/etc/resolv.conf"), "{words:?}");
    let filled = words.iter().map(|word| {
        let word = word.replace("${CLUSTER_DOMAIN}", "cluster.local");
        word.replace("/etc/resolv.conf", resolv_conf)
    });
    filled.collect()
}

#[test]
fn the_manifest_as_it_is_has_other_names_asked_for_where_the_node_asks() {
    if !is_root("outside") {
        return;
    }
    let _sandbox = Sandbox::enter().expect("namespaces");
    ip(&format!("address add {UPSTREAM}/32 dev lo")).expect("an address");
    willing((UPSTREAM, 53).into());
    let (_api, folder, kubeconfig) = api(10, 1);
    let resolv = folder.path().join("resolv.conf");
    for (text, expected) in [
        (
            format!("search corp.example\nnameserver {UPSTREAM}\n"),
            (NOERROR, 1),
        ),
        // A node without a name server has a cluster all the same.
        ("# nothing leaves this network\n".to_owned(), (REFUSED, 0)),
    ] {
        fs::write(&resolv, &text).expect("written");
        let arguments = arguments(&resolv.display().to_string());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let server = Server::start(&kubeconfig, &arguments);
        server.wait_ready();
        assert_eq!(
            ask(server.address, "www.example.org"),
            Some(expected),
            "{text}"
        );
        assert_eq!(ask(server.address, &service_name(0)), Some((NOERROR, 1)));
    }
}

fn sample(metrics: &str, name: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|rest| rest.split_whitespace().next());
    value.map_or(0.0, |value| value.parse().expect("a number"))
}

#[test]
fn what_was_asked_and_answered_is_counted_by_corednss_names() {
    let upstream = free_port();
    willing(upstream);
    let (_api, _folder, kubeconfig) = api(10, 1);
    let upstream = format!("--upstream={upstream}");
    let server = Server::start(&kubeconfig, &["--threads", "1", &upstream]);
    server.wait_ready();
    for _ in 0..3 {
        assert_eq!(ask(server.address, &service_name(1)), Some((NOERROR, 1)));
        assert_eq!(
            ask(server.address, "absent.svc.cluster.local"),
            Some((NXDOMAIN, 0))
        );
        assert_eq!(ask(server.address, "www.example.org"), Some((NOERROR, 1)));
    }
    let metrics = server.http("/metrics").expect("metrics");
    for (name, expected) in [
        ("coredns_dns_requests_total{proto=\"udp\",type=\"A\"}", 9.0),
        (
            "coredns_dns_responses_total{proto=\"udp\",rcode=\"NOERROR\"}",
            6.0,
        ),
        (
            "coredns_dns_responses_total{proto=\"udp\",rcode=\"NXDOMAIN\"}",
            3.0,
        ),
        ("coredns_dns_request_duration_seconds_count", 9.0),
        ("coredns_dns_request_size_bytes_count", 9.0),
        ("coredns_dns_response_size_bytes_count", 9.0),
        ("coredns_cache_hits_total{type=\"success\"}", 2.0),
        ("coredns_cache_misses_total", 1.0),
        ("coredns_cache_entries{type=\"success\"}", 1.0),
        ("keelway_dns_services", 10.0),
    ] {
        assert_eq!(sample(&metrics, name), expected, "{name}: {metrics}");
    }
    let forwarded = metrics
        .lines()
        .find(|line| line.starts_with("coredns_proxy_request_duration_seconds_count{to="));
    assert!(
        forwarded.is_some_and(|line| line.ends_with(" 1")),
        "{metrics}"
    );
}

#[test]
fn each_query_has_one_line_in_the_log_whatever_its_name_is_made_of() {
    let (_api, _folder, kubeconfig) = api(10, 1);
    let (listen, health) = (free_port(), free_port());
    let mut child = Command::new(program("keelway-dns"))
        .args([
            "serve",
            "--log",
            "--threads",
            "1",
            "--agent",
            "",
            "--kubeconfig",
        ])
        .arg(&kubeconfig)
        .args([
            "--listen",
            &listen.to_string(),
            "--health",
            &health.to_string(),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("keelway-dns starts");
    let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    let server = Server {
        child,
        address: listen,
        health,
    };
    server.wait_ready();
    // A label that would end its line and begin one of its own.
    let forged = format!("a\n[INFO] b.{}", service_name(2));
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
    for name in [&service_name(1), &forged] {
        socket.send_to(&question(7, name), listen).expect("sent");
    }
    let client = socket.local_addr().expect("an address");
    let expected = [
        format!("[INFO] {client} - 7 \"A IN {}. udp ", service_name(1)),
        format!(
            "[INFO] {client} - 7 \"A IN a\\010[info]\\032b.{}. udp ",
            service_name(2)
        ),
    ];
    for (expected, line) in expected.into_iter().zip(lines) {
        let line = line.expect("a line");
        assert!(line.starts_with(&expected), "{line:?}: {expected:?}");
    }
}
