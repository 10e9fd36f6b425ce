//! One port of a client, used towards a backend directly and through a Service at once: real sockets of a pod, between which the kernel
//! tells by the address that each asked for, and which lead to one tuple at the backend.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use dataplane_abi::Reason;
use keelway_tests::nodes::{BOTH, Hooks, Nodes, PER_PACKET};
use keelway_tests::sandbox::{Sandbox, is_root};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket,
    sockopt::ReuseAddr,
};
use std::os::fd::AsRawFd as _;

/// Longer than until the second attempt of an opening, or the third.
const PATIENCE: Duration = Duration::from_secs(10);
const SERVICES: [&str; 2] = ["10.96.0.1:80", "[fd00:10:96::1]:80"];

/// Connects from a port that other sockets may have too.
fn connect_from(port: u16, to: SocketAddr) -> io::Result<TcpStream> {
    let (family, any) = match to {
        SocketAddr::V4(_) => (AddressFamily::Inet, "0.0.0.0"),
        SocketAddr::V6(_) => (AddressFamily::Inet6, "::"),
    };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, ReuseAddr, &true)?;
    let any = any.parse().map_err(io::Error::other)?;
    let from = SockaddrStorage::from(SocketAddr::new(any, port));
    bind(fd.as_raw_fd(), &from)?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A question, and who answers.
fn ask(mut stream: &TcpStream) -> io::Result<String> {
    stream.write_all(b"who?")?;
    let mut buffer = [0; 128];
    let len = stream.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
}

fn changed(nodes: &mut Nodes) -> u64 {
    let counters = nodes.nodes[0].dataplane().counters().unwrap();
    let is_it = |(reason, _): &&(Reason, u64)| *reason == Reason::FlowPortChanged;
    counters.iter().find(is_it).unwrap().1
}

/// Two connections of one port of pod a, first to `first`, then to `second`, which end at the same backend; both are used in turn.
fn both_work(nodes: &Nodes, port: u16, first: SocketAddr, second: SocketAddr, backend: &str) {
    let of_first = || -> io::Result<()> {
        let first = connect_from(port, first)?;
        let answer = ask(&first)?;
        let second = connect_from(port, second)?;
        for stream in [&second, &first, &second, &first] {
            let again = ask(stream)?;
            if again != answer || !again.starts_with(backend) {
                return Err(io::Error::other(format!("{answer}, and then {again}")));
            }
        }
        Ok(())
    };
    let pod = &nodes.nodes[0].pods["a"].network;
    if let Err(error) = pod.run(of_first) {
        panic!("port {port} to {first} and {second}: {error}");
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
            let before = changed(&mut nodes);
            both_work(&nodes, port, service, direct, backend);
            assert_eq!(changed(&mut nodes), before + 1, "{service} to {backend}");
            both_work(&nodes, port + 1, direct, service, backend);
            assert_eq!(changed(&mut nodes), before + 2, "{backend} by {service}");
            port += 2;
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
