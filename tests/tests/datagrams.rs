//! Connected datagram sockets of the node itself, by addresses whose packets no hook sees: when the backend that such a socket was given
//! is gone, its owner is told.

use std::io::{self, BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Stdio;
use std::time::{Duration, Instant};

use keelway_tests::agents::Service;
use keelway_tests::nodes::{self, asking};
use keelway_tests::topology::{Topology, web};
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
