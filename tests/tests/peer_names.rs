//! Sockets that were connected to a Service at the socket: they tell its name for as long as they are open, and are forgotten then.

use std::io::{self, BufRead as _, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::process::Stdio;

use aya::maps::{Array, Map, MapData};
use dataplane_abi::{ABI_VERSION, limits, map};
use keelway_tests::nodes::{self, AT_SOCKET, Cgroup, Nodes, asking};
use keelway_tests::requests::TIMEOUT;
use keelway_tests::sandbox::{Sandbox, is_root};

const SERVICES: [&str; 2] = ["10.96.0.2:80", "[fd00:96::2]:80"];

/// Not a test of its own: the process that others start as a client.
#[test]
fn client() {
    nodes::client(hold);
}

/// Connects to each of some addresses, says whom it is connected to, and holds them until it is told to close them.
fn hold(request: &str) -> io::Result<String> {
    let mut held = Vec::new();
    for at in request.split(' ') {
        let at: SocketAddr = at.parse().map_err(io::Error::other)?;
        // One of two who have it closes it at once.
        held.push(TcpStream::connect_timeout(&at, TIMEOUT)?.try_clone()?);
    }
    for stream in &held {
        println!("HEARD {}", stream.peer_addr()?);
    }
    io::stdin().read_line(&mut String::new())?;
    Ok("closed".into())
}

/// A cookie, and what is known of its socket.
type Place = [u64; 7];

const NOBODYS: u64 = u64::MAX;

/// How many places sockets have.
fn sockets(connected: &Array<MapData, Place>) -> usize {
    let cookies = connected.iter().map(|place| place.expect("a place")[0]);
    cookies
        .filter(|cookie| ![0, NOBODYS].contains(cookie))
        .count()
}

#[test]
fn sockets_tell_their_services_name_until_they_are_closed_also_where_the_table_is_full() {
    if !is_root("sockets_tell_their_services_name") {
        return;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let mut nodes = Nodes::start(&sandbox, AT_SOCKET).expect("nodes");
    for (id, at) in (1..).zip(SERVICES) {
        nodes.serve(id, at, &["b"]).expect("a Service");
    }
    let cgroup = Cgroup::new().expect("a control group");
    let node = &mut nodes.nodes[0];
    let attached = node.dataplane().attach_cgroup(cgroup.path());
    attached.expect("hooks");
    let pins = sandbox.pin_root().join("node-1");
    let pin = pins.join(format!("v{ABI_VERSION}")).join(map::CONNECTED);
    let pinned = MapData::from_pin(pin).expect("a map");
    let mut connected = Array::try_from(Map::Array(pinned)).expect("an array");

    for is_full in [false, true] {
        if is_full {
            for place in 0..limits::CONNECTED {
                let filled = connected.set(place, [NOBODYS, 0, 0, 0, 0, 0, 0], 0);
                filled.expect("a place");
            }
        }
        let mut command = asking(Some(&cgroup), &SERVICES.join(" ")).expect("a client");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let pod = &node.pods["a"].network;
        let mut client = pod.run(|| command.spawn()).expect("a client");
        let lines = BufReader::new(client.stdout.take().expect("its words")).lines();
        let mut said = lines.map(|line| line.expect("a word"));
        for service in SERVICES {
            let name = said.find_map(|line| Some(line.split_once("HEARD ")?.1.to_owned()));
            assert_eq!(name.as_deref(), Some(service), "full: {is_full}");
        }
        let noted = if is_full { 0 } else { SERVICES.len() };
        assert_eq!(sockets(&connected), noted, "full: {is_full}");
        drop(client.stdin.take());
        assert!(
            said.any(|line| line.contains("ANSWER closed")),
            "full: {is_full}"
        );
        client.wait().expect("its end");
        assert_eq!(sockets(&connected), 0, "full: {is_full}");
    }
}
