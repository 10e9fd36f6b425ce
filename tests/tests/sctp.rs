//! SCTP through Services, on two nodes of network namespaces. Kernels need not have its sockets: the ends are packet sockets, and what
//! they send are whole packets with sums of their own.

use std::{
    io::IoSliceMut,
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use dataplane_abi::HOST_VETH_MAC;
use keelway_agent::dataplane::{Lead, Op, ServiceBackends, ServiceId};
use keelway_tests::{
    nodes::{BOTH, Hooks, Nodes, PER_PACKET, frontend},
    packets::{
        checksums_are_right, sctp,
        sctp_chunk::{DATA, INIT, INIT_ACK},
    },
    sandbox::{Network, Sandbox, is_root},
};
use nix::{
    ifaddrs::getifaddrs,
    sys::{
        socket::{
            AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, sendto,
            setsockopt, socket, sockopt::ReceiveTimeout,
        },
        time::TimeVal,
    },
};

const PATIENCE: Duration = Duration::from_secs(5);

/// One end of a wire: everything that comes by `eth0`, and what is sent by it.
struct End {
    socket: OwnedFd,
    own: LinkAddr,
}

impl End {
    fn at(network: &Network) -> Self {
        network.run(|| {
            let own = getifaddrs()
                .unwrap()
                .filter(|one| one.interface_name == "eth0")
                .find_map(|one| one.address?.as_link_addr().copied())
                .expect("eth0 has a hardware address");
            let socket = socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::EthAll,
            )
            .unwrap();
            setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 100_000)).unwrap();
            Self { socket, own }
        })
    }

    fn mac(&self) -> [u8; 6] {
        self.own.addr().expect("a hardware address")
    }

    /// Sends a packet to the machine with this hardware address.
    fn send(&self, to: [u8; 6], mut packet: Vec<u8>) {
        packet[..6].copy_from_slice(&to);
        packet[6..12].copy_from_slice(&self.mac());
        let fd = self.socket.as_raw_fd();
        let sent = sendto(fd, &packet, &self.own, MsgFlags::empty()).unwrap();
        assert_eq!(sent, packet.len());
    }

    /// The next packet that is like another: of the same protocol, addresses, ports and chunk. A source port of 0 stands for any.
    fn receive(&self, wanted: &[u8]) -> Vec<u8> {
        self.next(&format!("{wanted:02x?}"), |packet| is_like(packet, wanted))
    }

    /// The next ICMP port unreachable from the address of this one.
    fn refusal(&self, from: &str) -> Vec<u8> {
        let probe = sctp(from, from, INIT, b"");
        let (at, source, unreachable) = match probe[12] {
            8 => (23, 26..30, [1, 3, 3]),
            _ => (20, 22..38, [58, 1, 4]),
        };
        let l4 = l4(&probe);
        self.next(&format!("a refusal from {from}"), |packet| {
            packet.len() > l4 + 2
                && packet[12..14] == probe[12..14]
                && packet[source.clone()] == probe[source.clone()]
                && [packet[at], packet[l4], packet[l4 + 1]] == unreachable
        })
    }

    fn next(&self, what: &str, is_it: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let until = Instant::now() + PATIENCE;
        let mut heard = Vec::new();
        while Instant::now() < until {
            let mut buffer = [0; 2048];
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let fd = self.socket.as_raw_fd();
            let Ok(message) = recvmsg::<LinkAddr>(fd, &mut parts, None, MsgFlags::empty()) else {
                continue;
            };
            let len = message.bytes;
            let packet = buffer[..len].to_vec();
            if packet.len() > 13 && is_it(&packet) {
                return packet;
            }
            heard.push(format!("{packet:02x?}"));
        }
        panic!("not in {PATIENCE:?}: {what}, but {heard:#?}");
    }
}

fn l4(packet: &[u8]) -> usize {
    if packet[12] == 8 { 34 } else { 54 }
}

fn is_like(packet: &[u8], wanted: &[u8]) -> bool {
    let (at, addresses) = match wanted[12] {
        8 => (23, 26..34),
        _ => (20, 22..54),
    };
    let l4 = l4(wanted);
    let any_port = wanted[l4..l4 + 2] == [0, 0];
    packet.len() >= l4 + 13
        && packet[12..14] == wanted[12..14]
        && packet[at] == wanted[at]
        && packet[addresses.clone()] == wanted[addresses]
        && (any_port || packet[l4..l4 + 2] == wanted[l4..l4 + 2])
        && packet[l4 + 2..l4 + 4] == wanted[l4 + 2..l4 + 4]
        && packet[l4 + 12] == wanted[l4 + 12]
}

/// The addresses of a test, in one family.
struct Family {
    service: &'static str,
    nobody: &'static str,
    node_port: &'static str,
    every: &'static str,
    /// Pods a and b of the first node, c of the second, and the second node.
    a: &'static str,
    b: &'static str,
    c: &'static str,
    outside: &'static str,
    /// The first node, with any port.
    node: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        service: "10.96.0.1:80",
        nobody: "10.96.0.1:81",
        node_port: "198.18.0.1:30080",
        every: "0.0.0.0:30080",
        a: "10.244.1.11:5000",
        b: "10.244.1.12:8080",
        c: "10.244.2.11:8080",
        outside: "198.18.0.2:5000",
        node: "198.18.0.1:0",
    },
    Family {
        service: "[fd00:96::1]:80",
        nobody: "[fd00:96::1]:81",
        node_port: "[fd00:18::1]:30080",
        every: "[::]:30080",
        a: "[fd00:244:1::b]:5000",
        b: "[fd00:244:1::c]:8080",
        c: "[fd00:244:2::b]:8080",
        outside: "[fd00:18::2]:5000",
        node: "[fd00:18::1]:0",
    },
];

/// What the client sent arrives at the backend, and what that answers at the client, with right sums.
fn converses(client: (&End, [u8; 6]), server: &End, ends: [&str; 4]) {
    let [from, asked, seen, backend] = ends;
    let (end, gateway) = client;
    let mut seen_port = None;
    for (there, back) in [(INIT, INIT_ACK), (DATA, DATA)] {
        end.send(gateway, sctp(from, asked, there, b"an odd number"));
        let at = server.receive(&sctp(seen, backend, there, b""));
        assert!(checksums_are_right(&at), "{asked} at {backend}: {at:02x?}");
        let l4 = l4(&at);
        let port = u16::from_be_bytes([at[l4], at[l4 + 1]]);
        assert_eq!(*seen_port.get_or_insert(port), port);
        let client_is = format!("{}:{port}", seen.rsplit_once(':').unwrap().0);
        server.send(HOST_VETH_MAC, sctp(backend, &client_is, back, b"heard"));
        let heard = end.receive(&sctp(asked, from, back, b""));
        assert!(
            checksums_are_right(&heard),
            "{asked} to {from}: {heard:02x?}"
        );
    }
}

fn associations(hooks: Hooks) {
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, hooks).unwrap();
    let pod =
        |nodes: &Nodes, node: usize, name: &str| End::at(&nodes.nodes[node].pods[name].network);
    let (a, b, c) = (
        pod(&nodes, 0, "a"),
        pod(&nodes, 0, "b"),
        pod(&nodes, 1, "c"),
    );
    let first = End::at(&nodes.nodes[0].host);
    let outside = End::at(&nodes.nodes[1].host);
    for (family, id) in FAMILIES.iter().zip([1, 2]) {
        // The second backend takes the place of the first, and the client's next association comes from the same port.
        for (name, end, backend) in [("b", &b, family.b), ("c", &c, family.c)] {
            nodes.serve(id, family.service, &[name]).unwrap();
            converses(
                (&a, HOST_VETH_MAC),
                end,
                [family.a, family.service, family.a, backend],
            );
        }
        // By the node port from outside: a pod of the node sees the client, one elsewhere the node.
        for (backend, end, seen) in [(family.b, &b, family.outside), (family.c, &c, family.node)] {
            let mut ops = vec![Op::SetService {
                id: ServiceId(id + 8),
                backends: ServiceBackends {
                    active: vec![backend.parse().unwrap()],
                    ..ServiceBackends::default()
                },
            }];
            ops.extend(frontend(family.every, Lead::to(ServiceId(id + 8))));
            nodes.nodes[0].dataplane().apply(&ops).unwrap();
            converses(
                (&outside, first.mac()),
                end,
                [family.outside, family.node_port, seen, backend],
            );
        }
        // An unknown port of the Service is refused.
        a.send(HOST_VETH_MAC, sctp(family.a, family.nobody, INIT, b""));
        let refusal = a.refusal(family.nobody);
        assert!(checksums_are_right(&refusal), "{refusal:02x?}");
    }
}

#[test]
fn associations_are_led_to_backends_and_their_answers_back_per_packet() {
    if is_root("SCTP per packet") {
        associations(PER_PACKET);
    }
}

#[test]
fn associations_are_led_per_packet_where_the_socket_hook_is_on_too() {
    if is_root("SCTP with both hooks") {
        associations(BOTH);
    }
}
