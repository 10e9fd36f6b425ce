//! Clients outside, node ports, addresses for some sources only.

use dataplane_abi::{LEAD_GUARDED, Lead};

use super::*;
use crate::memory::addr;

/// A node whose port 30080 leads to the backends of service 1 for clients here, and of service 2 for those outside; that has an
/// address 192.0.2.1 for some sources only.
fn exposed(here: &[&str], outside: &[&str]) -> Memory {
    let tables = node(here);
    tables.set_service(2, outside, &[]);
    for protocol in [proto::TCP, proto::UDP] {
        tables.set_lead("0.0.0.0:30080", protocol, Lead::new(1, 2, 0));
        tables.set_lead("192.0.2.1:80", protocol, Lead::new(1, 2, LEAD_GUARDED));
    }
    tables.set_vip([192, 0, 2, 1]);
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
        .push((2, addr([203, 0, 113, 0]), mapped(24)));
    assert_eq!(from_uplink(&tables, syn).0, Verdict::Peer(B));
    let other = tcp("203.0.114.9:5000", "192.0.2.1:80", SYN, b"");
    assert_eq!(from_uplink(&tables, other).0, Verdict::Drop);
    // A pod is judged by the ranges of the service port that it is led to.
    let pod = tcp("10.0.0.11:4000", "192.0.2.1:80", SYN, b"");
    assert_eq!(from_pod(&tables, A, pod.clone()).0, Verdict::Drop);
    tables
        .ranges
        .borrow_mut()
        .push((1, addr([10, 0, 0, 11]), 128));
    assert_eq!(from_pod(&tables, A, pod).0, Verdict::Peer(B));
}

#[test]
fn ports_that_are_all_taken_are_a_drop_with_a_reason() {
    let tables = exposed(&[], &["10.0.1.13:8080"]);
    // Every port is another client's already.
    for port in 8192..24_576u16 {
        let answers = FlowKey::new(
            addr([10, 0, 1, 13]),
            addr([198, 18, 0, 1]),
            8080u16.to_be(),
            port.to_be(),
            proto::UDP,
        );
        let taken = dataplane_abi::Flow {
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
    ..FEATURES
};

fn masqueraded(tables: &Memory, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
    let mut packet = Bytes(bytes);
    let verdict = pod_ingress(&mut packet, tables, &MASQUERADING, A);
    (verdict, packet.0)
}

fn back(tables: &Memory, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
    let mut packet = Bytes(bytes);
    let verdict = uplink_ingress(&mut packet, tables, &MASQUERADING);
    (verdict, packet.0)
}

/// A node of a cluster in 10.0.0.0/8.
fn in_a_cluster() -> Memory {
    let tables = exposed(&[], &[]);
    let cluster = (0, addr([10, 0, 0, 0]), 96 + 8);
    tables.ranges.borrow_mut().push(cluster);
    tables
}

#[test]
fn a_pod_leaves_the_cluster_as_the_node_and_hears_its_answers() {
    let tables = in_a_cluster();
    let (pod, there) = ("10.0.0.11:4000", "192.0.2.99:443");
    for flags in [SYN, ACK] {
        let (verdict, out) = masqueraded(&tables, tcp(pod, there, flags, b"x"));
        assert_eq!(verdict, Verdict::Route);
        let port = u16::from_be_bytes([out[34], out[35]]);
        let outer = format!("198.18.0.1:{port}");
        assert_eq!(out, tcp(&outer, there, flags, b"x"));
        assert_eq!(
            back(&tables, tcp(there, &outer, flags | ACK, b"y")),
            (Verdict::Peer(A), tcp(there, pod, flags | ACK, b"y"))
        );
    }
    assert_eq!(tables.counted(Reason::Masqueraded), 2);
    assert_eq!(tables.counted(Reason::SourceNat), 1);
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
    ] {
        let out = masqueraded(&tables, packet.clone());
        assert_eq!(out, (Verdict::Pass, packet));
    }
    assert_eq!(tables.counted(Reason::Masqueraded), 0);
}

#[test]
fn an_echo_leaves_the_cluster_under_an_identifier_of_the_nodes() {
    let tables = in_a_cluster();
    let (pod, there, node) = ("10.0.0.11:0", "192.0.2.99:0", "198.18.0.1:0");
    for id in [[1, 2], [0, 0]] {
        let asked = [id[0], id[1], 0, 1, 9];
        let (verdict, out) = masqueraded(&tables, icmp(pod, there, 8, 0, &asked));
        assert_eq!(verdict, Verdict::Route);
        let taken = [out[38], out[39]];
        assert_ne!(taken, id);
        let body = [taken[0], taken[1], 0, 1, 9];
        assert_eq!(out, icmp(node, there, 8, 0, &body));
        assert_eq!(
            back(&tables, icmp(there, node, 0, 0, &body)),
            (Verdict::Peer(A), icmp(there, pod, 0, 0, &asked))
        );
    }
}
