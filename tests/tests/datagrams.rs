//! Connected datagram sockets of the node itself, by addresses whose packets no hook sees: when the backend that such a socket was given
//! is gone, its owner is told.

use std::io::{self, BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Stdio;
use std::time::{Duration, Instant};

use keelway_tests::agents::{Service, dual_stack_segment};
use keelway_tests::nodes::{self, ECHO_PORT, asking};
use keelway_tests::sandbox::{Sandbox, is_root};
use keelway_tests::topology::{Topology, web};
use nix::errno::Errno;
use serde_json::json;

/// How long a client goes on asking.
const PATIENCE: Duration = Duration::from_secs(30);

/// Not a test of its own: the process that others start as a client.
#[test]
fn client() {
    nodes::client(|request| follow(request.parse().expect("an address")));
}

/// Asks by one connected datagram socket for as long as anybody listens, and says whenever what comes of it is something else than
/// before. Connects anew when its connection was ended.
fn follow(at: SocketAddr) -> io::Result<String> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let (mut connected, mut last) = (false, String::new());
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let ask = || -> io::Result<String> {
            if !connected {
                socket.connect(at)?;
            }
            socket.send(b"hello")?;
            let mut buffer = [0; 256];
            let len = socket.recv(&mut buffer)?;
            Ok(first_word(&buffer[..len]))
        };
        let heard = match ask() {
            Ok(name) => name,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            // Ended between an answer and the next question: a socket without a destination says that before why it has none.
            Err(error) if error.raw_os_error() == Some(Errno::EDESTADDRREQ as i32) => {
                io::ErrorKind::ConnectionAborted.to_string()
            }
            Err(error) => error.kind().to_string(),
        };
        connected = !heard.contains(' ');
        if heard != last {
            println!("HEARD {heard}");
            last = heard;
        }
    }
    Ok(last)
}

fn first_word(answer: &[u8]) -> String {
    let answer = String::from_utf8_lossy(answer);
    answer.split(' ').next().unwrap_or_default().to_owned()
}

#[test]
fn the_hosts_connected_datagram_sockets_leave_backends_that_are_gone_by_every_address() {
    let test = "the_hosts_connected_datagram_sockets";
    let Some(topology) = Topology::start(test, &[]) else {
        return;
    };
    const NODE_PORT: u16 = 30_080;
    let [node, _] = &topology.nodes;
    let exposed = |endpoints: &[(Ipv4Addr, &'static str)]| {
        let port = json!({"name": "udp", "port": 80, "protocol": "UDP", "nodePort": NODE_PORT});
        let web = Service {
            spec: json!({"type": "NodePort", "ports": [port], "externalIPs": ["192.0.2.7"]}),
            ..web(endpoints)
        };
        topology.cluster.write(&[web]).expect("the cluster's file");
    };
    let [first, second] = topology.both();
    for at in [
        SocketAddr::from(([127, 0, 0, 1], NODE_PORT)),
        SocketAddr::from((node.address, NODE_PORT)),
        SocketAddr::from(([192, 0, 2, 7], 80)),
    ] {
        exposed(&[first]);
        let mut command = asking(Some(&node.cgroup), &at.to_string()).expect("a client");
        command.stdout(Stdio::piped());
        let mut client = node.host.run(|| command.spawn()).expect("a client");
        let lines = BufReader::new(client.stdout.take().expect("its words")).lines();
        let mut said = lines.filter_map(|line| {
            let line = line.expect("a word");
            Some(line.split_once("HEARD ")?.1.to_owned())
        });
        // Whether the Service was there before the client or not.
        let mut hear = |wanted: &str| {
            let last = said.by_ref().find(|word| word == wanted);
            assert_eq!(last.as_deref(), Some(wanted), "by {at}");
        };
        hear("a");
        exposed(&[second]);
        hear("connection aborted");
        hear("c");
        exposed(&[]);
        hear("connection aborted");
        hear("connection refused");
        exposed(&[first]);
        hear("a");
        topology.cluster.write(&[]).expect("the cluster's file");
        hear("connection aborted");
        client.kill().expect("its end");
        client.wait().expect("its end");
    }
}

#[test]
fn datagrams_from_outside_that_fill_a_packet_reach_endpoints_behind_the_overlay() {
    let test = "datagrams_from_outside_that_fill_a_packet_reach_endpoints_behind_the_overlay";
    if !is_root(test) {
        return;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let ranges = ["10.96.0.0/16", "fd00:96::/112"];
    let mut flags = vec!["--routing", "vxlan"];
    flags.extend(ranges.iter().flat_map(|range| ["--service-cidr", range]));
    let mut segment = dual_stack_segment(&sandbox, dir.path(), &flags).expect("a segment");
    segment.cluster.write(&[]).expect("the cluster's file");
    for node in &mut segment.nodes {
        node.start().expect("an agent");
    }
    let pod = segment.nodes[1].add_pod("c").expect("a pod");
    let objects = |number: usize, family: &str, ip: &str| {
        let port =
            json!({"name": "udp", "port": 80, "protocol": "UDP", "nodePort": 30080 + number});
        let name = format!("long-{number}");
        [
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": name},
                "spec": {
                    "type": "NodePort", "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": [family], "ports": [port],
                },
            }),
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                "metadata": {
                    "namespace": "default", "name": format!("{name}-1"), "labels": {"kubernetes.io/service-name": name},
                },
                "ports": [{"name": "udp", "port": ECHO_PORT, "protocol": "UDP"}],
                "endpoints": [
                    {"addresses": [pod.addresses[number]], "nodeName": "node-2", "conditions": {"ready": true}},
                ],
            }),
        ]
    };
    let services = [
        objects(0, "IPv4", "10.96.0.7"),
        objects(1, "IPv6", "fd00:96::7"),
    ];
    segment
        .cluster
        .write_with(&[], services.as_flattened())
        .expect("the cluster's file");
    for node in &segment.nodes {
        node.wait("every Service", |report| report["servicePorts"] == 2)
            .expect("them");
    }
    for (at, any, headers, seen) in [
        ("198.18.0.1:30080", "0.0.0.0:0", 28, "c 198.18.0.1"),
        ("[fd00:198:18::1]:30081", "[::]:0", 48, "c fd00:198:18::1"),
    ] {
        let socket = segment
            .client
            .run(|| UdpSocket::bind(any))
            .expect("a socket");
        socket.connect(at).expect("an address");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        // A packet of the link, of pods' own, and the longest that these take: none is lost.
        for packet in [1500, 1451, 1450, 1430, 100] {
            let question = vec![b'x'; packet - headers];
            socket.send(&question).expect("it fits the link");
            let mut answer = [0; 256];
            let len = socket.recv(&mut answer).unwrap_or_else(|error| {
                let report = segment.nodes[0].report().expect("a report");
                panic!("{packet} bytes to {at}: {error}: {}", report["counters"])
            });
            assert_eq!(
                String::from_utf8_lossy(&answer[..len]),
                seen,
                "{packet} bytes to {at}"
            );
        }
    }
}
