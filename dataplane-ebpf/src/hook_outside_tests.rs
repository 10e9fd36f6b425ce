//! Clients outside and destinations outside, node ports, ranges of sources; and what is special to IPv6.

use dataplane_abi::{LEAD_GUARDED, Lead};

use super::*;
use crate::memory::ip;

/// A node whose port 30080 leads to the backends of service 1 for clients here, and of service 2 for those outside; that has an
/// address 192.0.2.1 for some sources only; in both families.
fn exposed(here: &[&str], outside: &[&str]) -> Memory {
    let tables = node(here);
    tables.set_service(2, outside, &[]);
    for (every, balanced) in [("0.0.0.0", "192.0.2.1"), ("[::]", "[2001:db8::1]")] {
        for protocol in [proto::TCP, proto::UDP] {
            tables.set_lead(&format!("{every}:30080"), protocol, Lead::new(1, 2, 0));
            let guarded = Lead::new(1, 2, LEAD_GUARDED);
            tables.set_lead(&format!("{balanced}:80"), protocol, guarded);
        }
    }
    tables.set_vip("192.0.2.1");
    tables.set_local("fd00::11", FROM_POD, A);
    tables.set_local("fd00::12", FROM_POD, B);
    tables.set_local("fd00:18::1", FROM_HOST, 0);
    tables
}

const CLIENT: &str = "203.0.113.9:5000";

#[test]
fn a_client_outside_is_seen_by_a_pod_of_the_node_and_hears_from_the_node_port() {
    let tables = exposed(&[], &["10.0.0.12:8080"]);
    let (verdict, out) = from_uplink(&tables, tcp(CLIENT, "198.18.0.1:30080", SYN, b""));
    assert_eq!(
        (verdict, out),
        (Verdict::Peer(B), tcp(CLIENT, "10.0.0.12:8080", SYN, b""))
    );
    let (verdict, back) = from_pod(&tables, B, tcp("10.0.0.12:8080", CLIENT, SYN | ACK, b""));
    assert_eq!(
        (verdict, back),
        (
            Verdict::Route,
            tcp("198.18.0.1:30080", CLIENT, SYN | ACK, b"")
        )
    );
}

#[test]
fn a_client_outside_is_the_node_to_a_backend_elsewhere() {
    let tables = exposed(&[], &["10.0.1.13:8080"]);
    for (number, protocol) in [(0u8, "tcp"), (1, "udp")] {
        let packet = |src: &str, dst: &str, flags| match number {
            0 => tcp(src, dst, flags, b"x"),
            _ => udp(src, dst, b"x"),
        };
        let (verdict, out) = from_uplink(&tables, packet(CLIENT, "198.18.0.1:30080", SYN));
        let routed = Verdict::Route;
        assert_eq!(verdict, routed, "{protocol}");
        let port = u16::from_be_bytes([out[34], out[35]]);
        assert!((8192..24_576).contains(&port));
        let node = format!("198.18.0.1:{port}");
        assert_eq!(out, packet(&node, "10.0.1.13:8080", SYN));
        // Again: the same port.
        let (_, again) = from_uplink(&tables, packet(CLIENT, "198.18.0.1:30080", SYN));
        assert_eq!(again, out);
        let (verdict, back) = from_uplink(&tables, packet("10.0.1.13:8080", &node, SYN | ACK));
        assert_eq!(
            (verdict, back),
            (
                Verdict::Route,
                packet("198.18.0.1:30080", CLIENT, SYN | ACK)
            )
        );
    }
    assert_eq!(tables.counted(Reason::SourceNat), 2);
}

#[test]
fn a_client_outside_reaches_the_hosts_own_backend_by_the_hairpin_address() {
    let tables = exposed(&[], &["198.18.0.1:6443"]);
    let (verdict, out) = from_uplink(&tables, tcp(CLIENT, "198.18.0.1:30080", SYN, b""));
    assert_eq!(
        (verdict, out),
        (
            Verdict::Host,
            tcp("169.254.77.77:5000", "198.18.0.1:6443", SYN, b"")
        )
    );
    let answer = tcp("198.18.0.1:6443", "169.254.77.77:5000", SYN | ACK, b"");
    assert_eq!(
        to_service(&tables, answer),
        (
            Verdict::Route,
            tcp("198.18.0.1:30080", CLIENT, SYN | ACK, b"")
        )
    );
}

/// What the host sends to others.
fn leaves(tables: &Memory, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
    let mut packet = Bytes(bytes);
    let verdict = hooks::uplink_egress(&mut packet, tables, &FEATURES);
    (verdict, packet.0)
}

#[test]
fn the_hosts_own_backend_sees_a_client_that_its_service_keeps_and_answers_as_the_node_port() {
    for (client, asked, backend) in [
        (CLIENT, "198.18.0.1:30080", "198.18.0.1:6443"),
        (
            "[2001:db8:9::9]:5000",
            "[fd00:18::1]:30080",
            "[fd00:18::1]:6443",
        ),
    ] {
        let tables = exposed(&[], &[backend]);
        tables.set_keeps_clients(2);
        // Of what leaves nothing is looked at before.
        let early = tcp(backend, client, SYN | ACK, b"");
        assert_eq!(leaves(&tables, early.clone()), (Verdict::Pass, early));
        let segment = |src: &str, dst: &str, flags| tcp(src, dst, flags, b"");
        let datagram = |src: &str, dst: &str, _: u8| udp(src, dst, b"x");
        for packet in [&segment as &dyn Fn(&str, &str, u8) -> Vec<u8>, &datagram] {
            let (verdict, out) = from_uplink(&tables, packet(client, asked, SYN));
            assert_eq!(
                (verdict, out),
                (Verdict::Pass, packet(client, backend, SYN))
            );
            assert_eq!(
                leaves(&tables, packet(backend, client, SYN | ACK)),
                (Verdict::Pass, packet(asked, client, SYN | ACK))
            );
            let (_, again) = from_uplink(&tables, packet(client, asked, ACK));
            assert_eq!(again, packet(client, backend, ACK));
        }
        // Who asks it directly, from a port by which it is asked through the Service, is told apart.
        let (verdict, out) = from_uplink(&tables, segment(client, backend, SYN));
        assert_eq!(verdict, Verdict::Pass);
        let at = if client == CLIENT { 34 } else { 54 };
        let port = u16::from_be_bytes([out[at], out[at + 1]]);
        let (own, _) = client.rsplit_once(':').expect("a port");
        let other = format!("{own}:{port}");
        assert_ne!(other, client);
        assert_eq!(out, segment(&other, backend, SYN));
        assert_eq!(
            leaves(&tables, segment(backend, &other, SYN | ACK)),
            (Verdict::Pass, segment(backend, client, SYN | ACK))
        );
        // So much for that port: another process's answers, and its own to others, are as they are.
        for other in [
            tcp(&backend.replace("6443", "22"), client, ACK, b"x"),
            tcp(backend, &client.replace("5000", "5001"), ACK, b"x"),
        ] {
            assert_eq!(leaves(&tables, other.clone()), (Verdict::Pass, other));
        }
        assert_eq!(tables.counted(Reason::ReplyTranslated), 3);
        assert_eq!(tables.counted(Reason::PortTranslated), 1);
    }
}

/// An answer to a datagram has the address of the interface by which it leaves: with another than the backend's it would be nobody's.
#[test]
fn datagrams_whose_answers_have_another_address_come_by_the_hairpin_one() {
    let tables = exposed(&[], &["198.18.0.1:6443"]);
    tables.set_keeps_clients(2);
    let client = ip("203.0.113.9");
    for (own, kept) in [("198.18.0.1", true), ("198.19.0.1", false)] {
        tables
            .sources
            .borrow_mut()
            .insert(client, (ip(own), crate::tables::BY_ANOTHER));
        for (port, is_datagram) in [(5001, false), (5002, true)] {
            let port = port + 10 * u16::from(kept);
            let packet = |src: &str, dst: &str| match is_datagram {
                true => udp(src, dst, b"x"),
                false => tcp(src, dst, SYN, b""),
            };
            let client = format!("203.0.113.9:{port}");
            let out = from_uplink(&tables, packet(&client, "198.18.0.1:30080"));
            let wished = match kept || !is_datagram {
                true => (Verdict::Pass, packet(&client, "198.18.0.1:6443")),
                false => (
                    Verdict::Host,
                    packet(&format!("169.254.77.77:{port}"), "198.18.0.1:6443"),
                ),
            };
            assert_eq!(out, wished);
        }
    }
}

#[test]
fn who_leaves_by_another_interface_has_the_nodes_address_there() {
    let tables = in_a_cluster();
    tables.set_service(2, &["10.0.1.13:8080"], &[]);
    for (there, by, node) in [
        ("192.0.2.98", crate::tables::BY_FIRST_UPLINK, "198.18.0.1"),
        ("192.0.2.99", crate::tables::BY_ANOTHER, "198.19.0.1"),
    ] {
        tables
            .sources
            .borrow_mut()
            .insert(ip(there), (ip("198.19.0.1"), by));
        let there = format!("{there}:443");
        let (verdict, out) = masqueraded(&tables, tcp("10.0.0.11:4000", &there, SYN, b""));
        let port = u16::from_be_bytes([out[34], out[35]]);
        let node = format!("{node}:{port}");
        assert_eq!(
            (verdict, &out),
            (Verdict::Route, &tcp(&node, &there, SYN, b""))
        );
        assert_eq!(
            back(&tables, tcp(&there, &node, SYN | ACK, b"")),
            (
                Verdict::Peer(A),
                tcp(&there, "10.0.0.11:4000", SYN | ACK, b"")
            )
        );
    }
    // So has a client outside whose backend is reached by it.
    let backend = (ip("198.19.0.1"), crate::tables::BY_ANOTHER);
    tables.sources.borrow_mut().insert(ip("10.0.1.13"), backend);
    let (_, out) = from_uplink(&tables, tcp(CLIENT, "198.18.0.1:30080", SYN, b""));
    let port = u16::from_be_bytes([out[34], out[35]]);
    let node = format!("198.19.0.1:{port}");
    assert_eq!(out, tcp(&node, "10.0.1.13:8080", SYN, b""));
}

#[test]
fn a_pod_reaches_a_node_port_of_its_node_by_what_clients_here_get() {
    let tables = exposed(&["10.0.0.12:8080"], &[]);
    let (verdict, out) = from_pod(
        &tables,
        A,
        tcp("10.0.0.11:4000", "198.18.0.1:30080", SYN, b""),
    );
    assert_eq!(
        (verdict, out),
        (
            Verdict::Peer(B),
            tcp("10.0.0.11:4000", "10.0.0.12:8080", SYN, b"")
        )
    );
    let other = tcp("10.0.0.11:4000", "198.18.0.1:22", SYN, b"");
    assert_eq!(from_pod(&tables, A, other.clone()), (Verdict::Pass, other));
}

#[test]
fn what_is_the_hosts_own_stays_with_it() {
    let tables = exposed(&[], &["10.0.0.12:8080"]);
    // Another port; and what is no opening, on a port that the host may have connected from.
    for packet in [
        tcp(CLIENT, "198.18.0.1:22", SYN, b""),
        tcp(CLIENT, "198.18.0.1:30080", SYN | ACK, b""),
        tcp(CLIENT, "198.18.0.1:30080", ACK, b"x"),
        udp(CLIENT, "198.18.0.1:22", b"x"),
        icmp("203.0.113.9:0", "198.18.0.1:0", 8, 0, &[0; 12]),
    ] {
        assert_eq!(
            from_uplink(&tables, packet.clone()),
            (Verdict::Pass, packet)
        );
    }
}

#[test]
fn clients_outside_are_refused_or_not_answered_as_the_policy_has_it() {
    let tables = exposed(&["10.0.0.12:8080"], &[]);
    let syn = tcp(CLIENT, "198.18.0.1:30080", SYN, b"");
    let (verdict, out) = from_uplink(&tables, syn.clone());
    assert_eq!(verdict, Verdict::Route);
    assert!(checksums_are_right(&out) && out[47] & RST != 0);
    tables.set_silent(2);
    assert_eq!(from_uplink(&tables, syn.clone()), (Verdict::Drop, syn));
    assert_eq!(
        (
            tables.counted(Reason::NoBackend),
            tables.counted(Reason::NoLocalBackend)
        ),
        (1, 1)
    );
}

#[test]
fn a_guarded_address_lets_in_the_ranges_of_whom_it_asks() {
    let tables = exposed(&["10.0.0.12:8080"], &["10.0.0.12:8080"]);
    let syn = tcp(CLIENT, "192.0.2.1:80", SYN, b"");
    assert_eq!(from_uplink(&tables, syn.clone()).0, Verdict::Drop);
    assert_eq!(tables.counted(Reason::SourceRange), 1);
    let mapped = |len: u32| 96 + len;
    tables
        .ranges
        .borrow_mut()
        .push((2, ip("203.0.113.0"), mapped(24)));
    assert_eq!(from_uplink(&tables, syn).0, Verdict::Peer(B));
    let other = tcp("203.0.114.9:5000", "192.0.2.1:80", SYN, b"");
    assert_eq!(from_uplink(&tables, other).0, Verdict::Drop);
    // A pod is judged by the ranges of the service port that it is led to.
    let pod = tcp("10.0.0.11:4000", "192.0.2.1:80", SYN, b"");
    assert_eq!(from_pod(&tables, A, pod.clone()).0, Verdict::Drop);
    tables.ranges.borrow_mut().push((1, ip("10.0.0.11"), 128));
    assert_eq!(from_pod(&tables, A, pod).0, Verdict::Peer(B));
}

#[test]
fn ports_that_are_all_taken_are_a_drop_with_a_reason() {
    let tables = exposed(&[], &["10.0.1.13:8080"]);
    // Every port is another client's already.
    for port in 8192..24_576u16 {
        let answers = FlowKey::new(
            ip("10.0.1.13"),
            ip("198.18.0.1"),
            8080u16.to_be(),
            port.to_be(),
            proto::UDP,
        );
        let taken = Flow {
            other: answers,
            last_seen_s: 0,
            seen: 0,
            service: 2,
            generation: 1,
            slot: 0,
            reply: 1,
        };
        tables.insert_unreplied(&answers, &taken, true).unwrap();
    }
    let (verdict, _) = from_uplink(&tables, udp(CLIENT, "198.18.0.1:30080", b"x"));
    assert_eq!(verdict, Verdict::Drop);
    assert_eq!(tables.counted(Reason::FlowPortsExhausted), 1);
}

const MASQUERADING: Features = Features {
    masquerade: true,
    node_v6: Addr {
        words: [
            u64::from_ne_bytes([0xfd, 0, 0, 0x18, 0, 0, 0, 0]),
            u64::from_ne_bytes([0, 0, 0, 0, 0, 0, 0, 1]),
        ],
    },
    ..FEATURES
};

fn masqueraded(tables: &Memory, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
    let mut packet = Bytes(bytes);
    let verdict = hooks::pod_ingress(&mut packet, tables, &MASQUERADING, A);
    (verdict, packet.0)
}

fn back(tables: &Memory, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
    let mut packet = Bytes(bytes);
    let verdict = hooks::uplink_ingress(&mut packet, tables, &MASQUERADING);
    (verdict, packet.0)
}

/// A node of a cluster in 10.0.0.0/8 and fd00::/16.
fn in_a_cluster() -> Memory {
    let tables = exposed(&[], &[]);
    let cluster = [(0, ip("10.0.0.0"), 96 + 8), (0, ip("fd00::"), 16)];
    tables.ranges.borrow_mut().extend(cluster);
    tables
}

#[test]
fn a_pod_leaves_the_cluster_as_the_node_and_hears_its_answers() {
    let tables = in_a_cluster();
    for (pod, there, node, port_at) in [
        ("10.0.0.11:4000", "192.0.2.99:443", "198.18.0.1", 34),
        ("[fd00::11]:4000", "[2001:db8::99]:443", "[fd00:18::1]", 54),
    ] {
        for flags in [SYN, ACK] {
            let (verdict, out) = masqueraded(&tables, tcp(pod, there, flags, b"x"));
            assert_eq!(verdict, Verdict::Route);
            let port = u16::from_be_bytes([out[port_at], out[port_at + 1]]);
            let outer = format!("{node}:{port}");
            assert_eq!(out, tcp(&outer, there, flags, b"x"));
            assert_eq!(
                back(&tables, tcp(there, &outer, flags | ACK, b"y")),
                (Verdict::Peer(A), tcp(there, pod, flags | ACK, b"y"))
            );
        }
    }
    assert_eq!(tables.counted(Reason::Masqueraded), 4);
    assert_eq!(tables.counted(Reason::SourceNat), 2);
}

#[test]
fn in_the_cluster_and_towards_groups_a_pod_stays_who_it_is() {
    let tables = in_a_cluster();
    for packet in [
        tcp("10.0.0.11:4000", "10.0.1.13:80", SYN, b""),
        udp("10.0.0.11:4000", "239.1.2.3:80", b"x"),
        tcp("10.0.0.11:4000", "198.18.0.1:22", SYN, b""),
        icmp("10.0.0.11:0", "10.0.1.13:0", 8, 0, &[1, 2, 0, 1]),
        icmp("10.0.0.11:0", "192.0.2.99:0", 0, 0, &[1, 2, 0, 1]),
        tcp("[fd00::11]:4000", "[fd00::1:13]:80", SYN, b""),
        udp("[fd00::11]:4000", "[ff05::1:3]:80", b"x"),
        tcp("[fd00::11]:4000", "[fd00:18::1]:22", SYN, b""),
        icmp("[fd00::11]:0", "[fd00::1:13]:0", 128, 0, &[1, 2, 0, 1]),
        icmp("[fd00::11]:0", "[2001:db8::99]:0", 129, 0, &[1, 2, 0, 1]),
    ] {
        let out = masqueraded(&tables, packet.clone());
        assert_eq!(out, (Verdict::Pass, packet));
    }
    assert_eq!(tables.counted(Reason::Masqueraded), 0);
}

#[test]
fn an_echo_leaves_the_cluster_under_an_identifier_of_the_nodes() {
    let tables = in_a_cluster();
    let v4 = ["10.0.0.11:0", "192.0.2.99:0", "198.18.0.1:0"];
    let v6 = ["[fd00::11]:0", "[2001:db8::99]:0", "[fd00:18::1]:0"];
    for ([pod, there, node], kinds, id_at) in [(v4, [8, 0], 38), (v6, [128, 129], 58)] {
        for id in [[1, 2], [0, 0]] {
            let asked = [id[0], id[1], 0, 1, 9];
            let (verdict, out) = masqueraded(&tables, icmp(pod, there, kinds[0], 0, &asked));
            assert_eq!(verdict, Verdict::Route);
            let taken = [out[id_at], out[id_at + 1]];
            assert_ne!(taken, id);
            let body = [taken[0], taken[1], 0, 1, 9];
            assert_eq!(out, icmp(node, there, kinds[0], 0, &body));
            assert_eq!(
                back(&tables, icmp(there, node, kinds[1], 0, &body)),
                (Verdict::Peer(A), icmp(there, pod, kinds[1], 0, &asked))
            );
        }
    }
}

#[test]
fn ipv6_services_are_translated_and_their_errors_too() {
    let tables = exposed(&[], &["[fd00::1:13]:8080"]);
    tables.set_service(3, &["[fd00::1:13]:8080"], &[]);
    tables.set_frontend("[fd00:96::1]:80", proto::UDP, 3);
    let (pod, vip, backend) = ("[fd00::11]:4000", "[fd00:96::1]:80", "[fd00::1:13]:8080");
    let sent = udp(pod, vip, b"hello");
    assert_eq!(
        from_pod(&tables, A, sent.clone()),
        (Verdict::Pass, udp(pod, backend, b"hello"))
    );
    assert_eq!(
        from_uplink(&tables, udp(backend, pod, b"answer")),
        (Verdict::Peer(A), udp(vip, pod, b"answer"))
    );
    // A router says that it is too big for its link.
    let quote = |packet: &[u8]| [&[0, 0, 5, 0][..], &packet[14..62]].concat();
    let too_big = |about: &[u8]| icmp("[fd00:99::1]:0", pod, 2, 0, &quote(about));
    let (verdict, back) = from_uplink(&tables, too_big(&udp(pod, backend, b"hello")));
    assert_eq!(verdict, Verdict::Peer(A));
    assert!(checksums_are_right(&back));
    let without_quoted_sum = |mut packet: Vec<u8>| {
        packet[56..58].fill(0);
        packet[108..110].fill(0);
        packet
    };
    assert_eq!(without_quoted_sum(back), without_quoted_sum(too_big(&sent)));
    // Without a backend or port, as in IPv4.
    let (verdict, out) = from_pod(&tables, A, tcp(pod, "[fd00:96::1]:81", SYN, b""));
    assert_eq!(verdict, Verdict::Peer(A));
    assert!(checksums_are_right(&out));
}

#[test]
fn a_pod_reaches_itself_by_an_ipv6_service() {
    let tables = exposed(&[], &[]);
    tables.set_service(3, &["[fd00::11]:8080"], &[]);
    tables.set_frontend("[fd00:96::1]:80", proto::TCP, 3);
    let (verdict, out) = from_pod(
        &tables,
        A,
        tcp("[fd00::11]:4000", "[fd00:96::1]:80", SYN, b""),
    );
    let hairpin = "[fd6b:7700::77:77]:4000";
    assert_eq!(
        (verdict, out),
        (Verdict::Peer(A), tcp(hairpin, "[fd00::11]:8080", SYN, b""))
    );
    assert_eq!(
        from_pod(&tables, A, tcp("[fd00::11]:8080", hairpin, SYN | ACK, b"")),
        (
            Verdict::Peer(A),
            tcp("[fd00:96::1]:80", "[fd00::11]:4000", SYN | ACK, b"")
        )
    );
}

#[test]
fn neighbours_are_found_by_pods_and_nothing_else_comes_from_their_link_addresses() {
    let tables = exposed(&[], &[]);
    for (src, dst, kind) in [
        ("[fe80::1]:0", "[ff02::1:ff00:1]:0", 135),
        ("[::]:0", "[ff02::1:ff00:11]:0", 135),
        ("[fe80::1]:0", "[fe80::2]:0", 136),
        ("[fd00::11]:0", "[ff02::1:ff00:1]:0", 135),
    ] {
        let packet = icmp(src, dst, kind, 0, &[0; 20]);
        assert_eq!(
            from_pod(&tables, A, packet.clone()),
            (Verdict::Pass, packet),
            "{src}"
        );
    }
    for packet in [
        udp("[fe80::1]:1", "[ff02::fb]:2", b"x"),
        icmp("[fe80::1]:0", "[fd00::12]:0", 128, 0, &[0; 20]),
        icmp("[fd00::12]:0", "[fe80::2]:0", 136, 0, &[0; 20]),
    ] {
        assert_eq!(from_pod(&tables, A, packet).0, Verdict::Drop);
    }
    assert_eq!(tables.counted(Reason::SourceAddress), 3);
    // Somebody on the link asks whether the node still has a balanced address.
    tables.set_vip("2001:db8::1");
    let probe = icmp("[fd00:18::9]:0", "[2001:db8::1]:0", 135, 0, &[0; 20]);
    assert_eq!(from_uplink(&tables, probe).0, Verdict::Pass);
}
