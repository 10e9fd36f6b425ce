//! SCTP through Services with the kernel's own sockets, where it has them: associations are made, carry messages both ways, and end.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::thread;
use std::time::Duration;

use keelway_agent::dataplane::{Lead, ServiceId};
use keelway_tests::nodes::{BOTH, ECHO_PORT, Hooks, Nodes, PER_PACKET, frontend};
use keelway_tests::sandbox::{Network, Sandbox, is_root};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect,
    listen, socket,
};

const PATIENCE: Duration = Duration::from_secs(10);
/// Longer than a packet, so that messages are cut and put together again.
const MESSAGE_BYTES: usize = 4000;
const ROUNDS: u8 = 5;

/// A socket of one address alone: those of several tell each other of them, and translation knows of one.
fn at(own: IpAddr, port: u16) -> io::Result<OwnedFd> {
    let family = match own {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(family, SockType::Stream, flags, SockProtocol::Sctp)?;
    let own = SockaddrStorage::from(SocketAddr::new(own, port));
    bind(fd.as_raw_fd(), &own)?;
    Ok(fd)
}

/// Answers each message with itself, at the port of every echo server, for as long as the test runs.
fn echo(network: &Network, own: IpAddr) -> io::Result<()> {
    let listener = network.run(|| at(own, ECHO_PORT))?;
    listen(&listener, Backlog::new(16)?)?;
    let listener = TcpListener::from(listener);
    thread::spawn(move || {
        for peer in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || answer(peer));
        }
    });
    Ok(())
}

fn answer(mut peer: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 2 * MESSAGE_BYTES];
    loop {
        match peer.read(&mut buffer)? {
            0 => return Ok(()),
            len => peer.write_all(&buffer[..len])?,
        }
    }
}

/// Messages of an association from an address to a Service, each of which comes back.
fn converse(from: &Network, own: IpAddr, to: SocketAddr) -> io::Result<()> {
    let fd = from.run(|| -> io::Result<OwnedFd> {
        let fd = at(own, 0)?;
        connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        Ok(fd)
    })?;
    let mut stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(PATIENCE))?;
    for round in 0..ROUNDS {
        let message = vec![round; MESSAGE_BYTES];
        stream.write_all(&message)?;
        let mut back = vec![0; MESSAGE_BYTES];
        stream.read_exact(&mut back)?;
        if back != message {
            return Err(io::Error::other("another message came back"));
        }
    }
    Ok(())
}

fn has_sctp() -> bool {
    match at(IpAddr::from([127, 0, 0, 1]), 0) {
        Ok(_) => true,
        Err(error) => {
            let errno = error.raw_os_error().map(Errno::from_raw);
            let missing = [Errno::EPROTONOSUPPORT, Errno::ESOCKTNOSUPPORT].map(Some);
            assert!(missing.contains(&errno), "an SCTP socket: {error}");
            false
        }
    }
}

fn associations_work(test: &str, hooks: Hooks) {
    if !is_root(test) {
        return;
    }
    if !has_sctp() {
        println!("{test}: skipped: the kernel has no sockets of SCTP");
        return;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let mut nodes = Nodes::start(&sandbox, hooks).expect("two nodes");
    for is_ipv4 in [true, false] {
        for (node, pod) in [(0, "b"), (1, "c")] {
            let own = nodes.backend(pod, is_ipv4).expect("a pod").ip();
            echo(&nodes.nodes[node].pods[pod].network, own).expect("a server");
        }
    }
    let families = [
        (true, "10.96.0.1:80", "0.0.0.0:30080"),
        (false, "[fd00:96::1]:80", "[::]:30080"),
    ];
    for (is_ipv4, service, every) in families {
        for backend in ["b", "c"] {
            nodes.serve(1, service, &[backend]).expect("a Service");
            let port = frontend(every, Lead::to(ServiceId(1)));
            nodes.nodes[0]
                .dataplane()
                .apply(&port)
                .expect("a node port");
            let own = |name: &str| nodes.backend(name, is_ipv4).expect("an address");
            let pod = &nodes.nodes[0].pods["a"].network;
            let mut by_node = own("node-1");
            by_node.set_port(30080);
            let service = service.parse().expect("an address with a port");
            for (who, from, address, to) in [
                ("a pod", pod, own("a").ip(), service),
                (
                    "the node",
                    &nodes.nodes[0].host,
                    own("node-1").ip(),
                    service,
                ),
                (
                    "a client outside",
                    &nodes.nodes[1].host,
                    own("node-2").ip(),
                    by_node,
                ),
            ] {
                if let Err(error) = converse(from, address, to) {
                    panic!("{who} to {to}, which leads to {backend}: {error}");
                }
            }
        }
    }
}

#[test]
fn associations_of_sockets_are_led_to_backends_and_back_per_packet() {
    associations_work("associations per packet", PER_PACKET);
}

#[test]
fn and_so_they_are_beside_the_socket_hook() {
    associations_work("associations beside the socket hook", BOTH);
}
