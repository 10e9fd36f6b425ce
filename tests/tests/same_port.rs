//! One port of a client, used towards a backend directly and through a Service at once: real sockets of a pod, between which the kernel
//! tells by the address that each asked for, and which lead to one tuple at the backend.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, SocketAddrV6, TcpListener};
use std::process::Command;

use dataplane_abi::Reason;
use keelway_agent::dataplane::{Lead, Op, ServiceBackends, ServiceId};
use keelway_tests::agents::until;
use keelway_tests::nodes::{BOTH, Hooks, Nodes, PER_PACKET, frontend};
use keelway_tests::sandbox::{Network, Sandbox, is_root};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt,
    shutdown, socket,
    sockopt::{ReceiveTimeout, ReuseAddr, SendTimeout},
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use std::os::fd::AsRawFd as _;

/// Longer than until the second attempt of an opening, or the third.
const PATIENCE_S: i64 = 10;
const SERVICES: [&str; 2] = ["10.96.0.1:80", "[fd00:96::1]:80"];
const KINDS: [SockType; 2] = [SockType::Stream, SockType::Datagram];

/// Connects from a port that other sockets may have too.
fn connect_from(kind: SockType, port: u16, to: SocketAddr) -> io::Result<File> {
    let (family, any) = match to {
        SocketAddr::V4(_) => (AddressFamily::Inet, "0.0.0.0"),
        SocketAddr::V6(_) => (AddressFamily::Inet6, "::"),
    };
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, ReuseAddr, &true)?;
    setsockopt(&fd, ReceiveTimeout, &TimeVal::seconds(PATIENCE_S))?;
    setsockopt(&fd, SendTimeout, &TimeVal::seconds(PATIENCE_S))?;
    let any = any.parse().map_err(io::Error::other)?;
    let from = SockaddrStorage::from(SocketAddr::new(any, port));
    bind(fd.as_raw_fd(), &from)?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(File::from(fd))
}

/// A question, and who answers.
fn ask(mut socket: &File) -> io::Result<String> {
    socket.write_all(b"who?")?;
    let mut buffer = [0; 128];
    let len = socket.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
}

fn counted(nodes: &mut Nodes, reason: Reason) -> u64 {
    let counters = nodes.nodes[0].dataplane().counters().unwrap();
    let is_it = |(counted, _): &&(Reason, u64)| *counted == reason;
    counters.iter().find(is_it).unwrap().1
}

/// Two sockets of one port of `client`, connected first to `first`, then to `second`, which end at the same backend; both are used in turn.
fn both_work(
    client: &Network,
    kind: SockType,
    port: u16,
    [first, second]: [SocketAddr; 2],
    backend: &str,
) {
    let of_first = || -> io::Result<()> {
        let one = connect_from(kind, port, first)?;
        let answer = ask(&one)?;
        let other = connect_from(kind, port, second)?;
        for socket in [&other, &one, &other, &one] {
            let again = ask(socket)?;
            if again != answer || !again.starts_with(backend) {
                return Err(io::Error::other(format!("{answer}, and then {again}")));
            }
        }
        Ok(())
    };
    if let Err(error) = client.run(of_first) {
        panic!("{kind:?} of port {port} to {first} and {second}: {error}");
    }
}

fn each_order(test: &str, hooks: Hooks) {
    if !is_root(test) {
        return;
    }
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, hooks).unwrap();
    let mut port = 40_000;
    for backend in ["b", "c", "node-1"] {
        for (id, service) in (1..).zip(SERVICES) {
            nodes.serve(id, service, &[backend]).unwrap();
            let service: SocketAddr = service.parse().unwrap();
            let direct = nodes.backend(backend, service.is_ipv4()).unwrap();
            for kind in KINDS {
                let changed = counted(&mut nodes, Reason::FlowPortChanged);
                let held = counted(&mut nodes, Reason::ResetHeld);
                let pod = nodes.nodes[0].pods["a"].network.try_clone().unwrap();
                both_work(&pod, kind, port, [service, direct], backend);
                let by_now = counted(&mut nodes, Reason::FlowPortChanged);
                assert_eq!(by_now, changed + 1, "{service} to {backend}");
                both_work(&pod, kind, port + 1, [direct, service], backend);
                let by_now = counted(&mut nodes, Reason::FlowPortChanged);
                assert_eq!(by_now, changed + 2, "{backend} by {service}");
                // The opening was answered by the direct connection's state, and sent again at once.
                let held = counted(&mut nodes, Reason::ResetHeld) - held;
                assert_eq!(held, u64::from(kind == SockType::Stream), "{backend}");
                port += 2;
            }
        }
    }
}

#[test]
fn a_port_used_directly_and_through_a_service_is_told_apart_per_packet() {
    each_order("same port per packet", PER_PACKET);
}

/// The pod is in no control group of the hook's, as one whose client the hook leaves to packets.
#[test]
fn and_so_it_is_beside_the_socket_hook() {
    each_order("same port beside the socket hook", BOTH);
}

/// The other node's host asks for a node port, of which the pod behind it sees who it is.
#[test]
fn and_so_it_is_from_outside() {
    if !is_root("same port from outside") {
        return;
    }
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, PER_PACKET).unwrap();
    let outside = nodes.nodes[1].host.try_clone().unwrap();
    let mut port = 40_000;
    for (id, service, every) in [
        (1, SERVICES[0], "0.0.0.0:30080"),
        (2, SERVICES[1], "[::]:30080"),
    ] {
        nodes.serve(id, service, &["b"]).unwrap();
        let lead = Lead::to(ServiceId(id));
        let node = &mut nodes.nodes[0];
        node.dataplane().apply(&frontend(every, lead)).unwrap();
        let is_ipv4 = every.starts_with('0');
        let mut by_node = nodes.backend("node-1", is_ipv4).unwrap();
        by_node.set_port(30080);
        let direct = nodes.backend("b", is_ipv4).unwrap();
        for kind in KINDS {
            both_work(&outside, kind, port, [by_node, direct], "b");
            both_work(&outside, kind, port + 1, [direct, by_node], "b");
            port += 2;
        }
    }
    assert_eq!(counted(&mut nodes, Reason::FlowPortChanged), 8);
}

#[test]
fn and_so_it_is_from_the_node_itself_without_the_socket_hook() {
    if !is_root("same port from the node") {
        return;
    }
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, PER_PACKET).unwrap();
    let host = nodes.nodes[0].host.try_clone().unwrap();
    let mut port = 40_000;
    for backend in ["a", "c"] {
        for (id, service) in (1..).zip(SERVICES) {
            nodes.serve(id, service, &[backend]).unwrap();
            let service: SocketAddr = service.parse().unwrap();
            let direct = nodes.backend(backend, service.is_ipv4()).unwrap();
            for kind in KINDS {
                both_work(&host, kind, port, [service, direct], backend);
                both_work(&host, kind, port + 1, [direct, service], backend);
                port += 2;
            }
        }
    }
}

/// A server that ends connections as its clients do.
const ENDING: u16 = 9090;
/// What is behind as much as this at a slow interface leaves later than the other end's.
const MUCH: [u8; 3000] = [0; 3000];

/// A connection whose ends cross, so that each end waits for stragglers of the other's (TIME-WAIT).
fn end_at_once(
    client: &Network,
    server: &Network,
    listener: &TcpListener,
    port: u16,
    to: SocketAddr,
) -> anyhow::Result<()> {
    let mut one = client.run(|| connect_from(SockType::Stream, port, to))?;
    let (mut other, _) = listener.accept()?;
    one.write_all(&MUCH)?;
    shutdown(one.as_raw_fd(), Shutdown::Write)?;
    other.shutdown(std::net::Shutdown::Write)?;
    for end in [&mut one as &mut dyn io::Read, &mut other] {
        end.read_to_end(&mut Vec::new())?;
    }
    for network in [client, server] {
        until("an end that waits for stragglers", || {
            Ok(network.run(|| lingers(port))?.then_some(()))
        })?;
    }
    Ok(())
}

/// Whether this network namespace has a connection from or to a port that waits for stragglers.
fn lingers(port: u16) -> io::Result<bool> {
    const TIME_WAIT: &str = "06";
    let port = format!(":{port:04X}");
    let mut all = String::new();
    for table in ["tcp", "tcp6"] {
        all += &fs::read_to_string(format!("/proc/thread-self/net/{table}"))?;
    }
    Ok(all.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        matches!(words[..], [_, one, other, TIME_WAIT, ..] if one.ends_with(&port) || other.ends_with(&port))
    }))
}

/// The backend remembers the connection of a Service's client, and so does that one, of the Service. Another connection from the port,
/// directly, is told so by the backend, unless it happens to begin with a later number, and resets the old one: the Service's client
/// would not.
#[test]
fn a_port_is_free_for_a_direct_connection_when_both_ends_of_the_services_linger() {
    if !is_root("a port whose connection lingers") {
        return;
    }
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, PER_PACKET).unwrap();
    let pod = nodes.nodes[0].pods["a"].network.try_clone().unwrap();
    pod.run(|| {
        // A time stamp tells the new connection from the old one, too.
        fs::write("/proc/sys/net/ipv4/tcp_timestamps", "0").unwrap();
        let slow = "qdisc add dev eth0 root tbf rate 160kbit burst 2000 latency 5s";
        let slowed = Command::new("tc").args(slow.split(' ')).status().unwrap();
        assert!(slowed.success());
    });
    let mut port = 40_000;
    for (node, backend) in [(0, "b"), (1, "c")] {
        let server = nodes.nodes[node].pods[backend].network.try_clone().unwrap();
        let any = SocketAddrV6::new(std::net::Ipv6Addr::UNSPECIFIED, ENDING, 0, 0);
        let listener = server.run(|| TcpListener::bind(any)).unwrap();
        for (id, service) in (1..).zip(SERVICES) {
            nodes.serve(id, service, &[backend]).unwrap();
            let service: SocketAddr = service.parse().unwrap();
            let mut direct = nodes.backend(backend, service.is_ipv4()).unwrap();
            direct.set_port(ENDING);
            let backends = ServiceBackends {
                active: vec![direct],
                ..ServiceBackends::default()
            };
            let id = ServiceId(id);
            let ending = [Op::SetService { id, backends }];
            nodes.nodes[0].dataplane().apply(&ending).unwrap();
            // Every other one begins with an earlier number.
            for _ in 0..4 {
                end_at_once(&pod, &server, &listener, port, service).unwrap();
                if let Err(error) = pod.run(|| connect_from(SockType::Stream, port, direct)) {
                    panic!("from port {port} to {direct}, not by {service}: {error}");
                }
                listener.accept().unwrap();
                port += 1;
            }
        }
    }
}
