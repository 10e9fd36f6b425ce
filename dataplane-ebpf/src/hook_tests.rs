//! Whole conversations through the hooks of one node: pods A and B here, C elsewhere, the host at .1.

use dataplane_abi::{FrontendKey, Lead, proto};

use super::*;
use crate::{
    memory::{Bytes, Memory, checksums_are_right, hooks, icmp, tcp, udp},
    packet::tcp_flag::{ACK, FIN, RST, SYN},
    tables::FlowEntry as _,
};

const A: u32 = 11;
const B: u32 = 12;
const FEATURES: Features = Features {
    packet_lb: true,
    service_veth: true,
    masquerade: false,
    node_v4: Addr::from_v4_be(u32::from_ne_bytes([198, 18, 0, 1])),
    node_v6: Addr { words: [0, 0] },
    overlay: false,
    by_overlay: false,
};

/// A node with two pods, and a Service 10.96.0.1:80 without backends yet.
fn node(backends: &[&str]) -> Memory {
    let tables = Memory::default();
    tables.set_local("10.0.0.11", FROM_POD, A);
    tables.set_local("10.0.0.12", FROM_POD, B);
    tables.set_local("198.18.0.1", FROM_HOST, 0);
    tables.set_service(1, backends, &[]);
    for protocol in [proto::TCP, proto::UDP] {
        tables.set_frontend("10.96.0.1:80", protocol, 1);
    }
    tables
}

fn from_pod(tables: &Memory, ifindex: u32, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
    let mut packet = Bytes(bytes);
    let verdict = hooks::pod_ingress(&mut packet, tables, &FEATURES, ifindex);
    (verdict, packet.0)
}

fn from_uplink(tables: &Memory, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
    let mut packet = Bytes(bytes);
    let verdict = hooks::uplink_ingress(&mut packet, tables, &FEATURES);
    (verdict, packet.0)
}

/// Sender of an IPv4 packet of the host's, that has a port of those for others' flows.
fn host_seen(packet: &[u8]) -> String {
    let port = u16::from_be_bytes([packet[34], packet[35]]);
    assert!((8192..24_576).contains(&port));
    format!("198.18.0.1:{port}")
}

fn to_service(tables: &Memory, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
    let mut packet = Bytes(bytes);
    let verdict = hooks::service_ingress(&mut packet, tables, &FEATURES);
    (verdict, packet.0)
}

#[test]
fn a_pod_reaches_a_pod_of_its_node_through_a_service_and_hears_from_the_service() {
    let tables = node(&["10.0.0.12:8080"]);
    let (verdict, out) = from_pod(&tables, A, tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""));
    assert_eq!(
        (verdict, &out),
        (
            Verdict::Peer(B),
            &tcp("10.0.0.11:4000", "10.0.0.12:8080", SYN, b"")
        )
    );
    let (verdict, back) = from_pod(
        &tables,
        B,
        tcp("10.0.0.12:8080", "10.0.0.11:4000", SYN | ACK, b""),
    );
    assert_eq!(
        (verdict, &back),
        (
            Verdict::Peer(A),
            &tcp("10.96.0.1:80", "10.0.0.11:4000", SYN | ACK, b"")
        )
    );
    let (_, data) = from_pod(
        &tables,
        A,
        tcp("10.0.0.11:4000", "10.96.0.1:80", ACK, b"GET /"),
    );
    assert_eq!(data, tcp("10.0.0.11:4000", "10.0.0.12:8080", ACK, b"GET /"));
    assert_eq!(tables.counted(Reason::ServiceTranslated), 2);
    assert_eq!(tables.counted(Reason::ReplyTranslated), 1);
}

#[test]
fn a_pod_reaches_a_pod_of_another_node_by_the_stack_and_the_uplink_translates_back() {
    let tables = node(&["10.0.1.13:8080"]);
    let (verdict, out) = from_pod(&tables, A, udp("10.0.0.11:4000", "10.96.0.1:80", b"hello"));
    assert_eq!(
        (verdict, out),
        (
            Verdict::Pass,
            udp("10.0.0.11:4000", "10.0.1.13:8080", b"hello")
        )
    );
    let (verdict, back) = from_uplink(&tables, udp("10.0.1.13:8080", "10.0.0.11:4000", b"you too"));
    assert_eq!(
        (verdict, back),
        (
            Verdict::Peer(A),
            udp("10.96.0.1:80", "10.0.0.11:4000", b"you too")
        )
    );
}

#[test]
fn what_is_for_a_pod_with_a_limit_passes_the_queue_of_its_interface() {
    let tables = node(&["10.0.0.12:8080"]);
    tables.set_local("10.0.0.12", FROM_POD | QUEUED, B);
    let direct = tcp("10.0.0.11:4000", "10.0.0.12:8080", SYN, b"");
    let (verdict, out) = from_pod(&tables, A, direct.clone());
    assert_eq!((verdict, out), (Verdict::Route, direct));
    let asked = tcp("10.0.0.11:4001", "10.96.0.1:80", SYN, b"");
    let translated = tcp("10.0.0.11:4001", "10.0.0.12:8080", SYN, b"");
    let (verdict, out) = from_pod(&tables, A, asked);
    assert_eq!((verdict, out), (Verdict::Route, translated));
    let outside = udp("10.0.1.13:53", "10.0.0.12:4000", b"answer");
    let (verdict, _) = from_uplink(&tables, outside);
    assert_eq!(verdict, Verdict::Route);
    // What it sends is its own all the same, and takes the short way to a pod without one.
    let back = tcp("10.0.0.12:8080", "10.0.0.11:4000", SYN | ACK, b"");
    let (verdict, _) = from_pod(&tables, B, back);
    assert_eq!(verdict, Verdict::Peer(A));
}

#[test]
fn a_reset_that_nobody_heeds_ends_no_flow() {
    let tables = node(&["10.0.0.12:8080"]);
    let (pod, service, backend) = ("10.0.0.11:4000", "10.96.0.1:80", "10.0.0.12:8080");
    let sent = |flags| from_pod(&tables, A, tcp(pod, service, flags, b""));
    let heard = |flags| from_pod(&tables, B, tcp(backend, pod, flags, b""));
    let entry = |src: &str, dst: &str| {
        let (_, ip) = crate::memory::parsed(&Bytes(tcp(src, dst, ACK, b"")));
        let mut copy = Flow::NONE;
        assert!(tables.flow(&ip.key).unwrap().copy(&ip.key, &mut copy));
        copy
    };
    let timeout_s = || {
        let (client, answers) = (entry(pod, service), entry(backend, pod));
        dataplane_abi::timeout_s(proto::TCP, client.seen, answers.seen, 0)
    };
    sent(SYN);
    heard(SYN | ACK);
    sent(ACK);
    let alive_s = timeout_s();
    heard(RST);
    assert!(timeout_s() < alive_s);
    // What the other end sends may have been on its way already.
    sent(ACK);
    assert!(timeout_s() < alive_s);
    heard(ACK);
    assert_eq!(timeout_s(), alive_s);
    // One that is heeded is followed by nothing, or by more of its kind.
    sent(RST);
    sent(RST | ACK);
    heard(ACK);
    assert!(timeout_s() < alive_s);
}

#[test]
fn packets_between_pods_are_delivered_unchanged() {
    let tables = node(&[]);
    let packet = tcp("10.0.0.11:4000", "10.0.0.12:8080", SYN, b"");
    assert_eq!(
        from_pod(&tables, A, packet.clone()),
        (Verdict::Peer(B), packet)
    );
    let packet = udp("10.0.1.13:8080", "10.0.0.11:4000", b"x");
    assert_eq!(
        from_uplink(&tables, packet.clone()),
        (Verdict::Peer(A), packet)
    );
    assert_eq!(tables.counted(Reason::Delivered), 2);
}

#[test]
fn packets_to_elsewhere_are_the_stacks() {
    let tables = node(&[]);
    let packet = tcp("10.0.0.11:4000", "10.0.1.13:80", SYN, b"");
    assert_eq!(
        from_pod(&tables, A, packet.clone()),
        (Verdict::Pass, packet)
    );
    let packet = udp("10.0.0.11:4000", "198.18.0.1:53", b"");
    assert_eq!(
        from_pod(&tables, A, packet.clone()),
        (Verdict::Pass, packet)
    );
}

#[test]
fn a_pod_cannot_send_from_an_address_that_is_not_its_own() {
    let tables = node(&[]);
    for source in [
        "10.0.0.12:4000",
        "198.18.0.1:4000",
        "10.96.0.1:80",
        "10.0.1.13:1",
    ] {
        assert_eq!(
            from_pod(&tables, A, udp(source, "10.0.0.12:80", b"")).0,
            Verdict::Drop,
            "{source}"
        );
    }
    assert_eq!(tables.counted(Reason::SourceAddress), 4);
}

#[test]
fn a_pod_that_is_its_own_backend_reaches_itself() {
    let tables = node(&["10.0.0.11:8080"]);
    let (verdict, out) = from_pod(&tables, A, tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""));
    assert_eq!(
        (verdict, out),
        (
            Verdict::Peer(A),
            tcp("169.254.77.77:4000", "10.0.0.11:8080", SYN, b"")
        )
    );
    let (verdict, back) = from_pod(
        &tables,
        A,
        tcp("10.0.0.11:8080", "169.254.77.77:4000", SYN | ACK, b""),
    );
    assert_eq!(
        (verdict, back),
        (
            Verdict::Peer(A),
            tcp("10.96.0.1:80", "10.0.0.11:4000", SYN | ACK, b"")
        )
    );
}

#[test]
fn a_pod_reaches_the_hosts_own_backend_and_the_answer_is_translated_on_its_way_out() {
    let tables = node(&["198.18.0.1:6443"]);
    let (verdict, out) = from_pod(&tables, A, tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""));
    assert_eq!(
        (verdict, out),
        (
            Verdict::Pass,
            tcp("10.0.0.11:4000", "198.18.0.1:6443", SYN, b"")
        )
    );
    let mut back = Bytes(tcp("198.18.0.1:6443", "10.0.0.11:4000", SYN | ACK, b""));
    assert_eq!(hooks::answer(&mut back, &tables, &FEATURES), Verdict::Pass);
    assert_eq!(
        back.0,
        tcp("10.96.0.1:80", "10.0.0.11:4000", SYN | ACK, b"")
    );
}

#[test]
fn the_host_reaches_a_pod_of_its_own_through_a_service() {
    let tables = node(&["10.0.0.12:8080"]);
    let (verdict, out) = to_service(&tables, tcp("198.18.0.1:4000", "10.96.0.1:80", SYN, b""));
    assert_eq!(
        (verdict, out.clone()),
        (
            Verdict::Peer(B),
            tcp(&host_seen(&out), "10.0.0.12:8080", SYN, b"")
        )
    );
    let (verdict, back) = from_pod(
        &tables,
        B,
        tcp("10.0.0.12:8080", &host_seen(&out), SYN | ACK, b""),
    );
    assert_eq!(
        (verdict, back),
        (
            Verdict::Host,
            tcp("10.96.0.1:80", "198.18.0.1:4000", SYN | ACK, b"")
        )
    );
}

#[test]
fn the_host_reaches_a_pod_of_another_node_through_a_service() {
    let tables = node(&["10.0.1.13:8080"]);
    let (verdict, out) = to_service(&tables, udp("198.18.0.1:4000", "10.96.0.1:80", b"hello"));
    let route = Verdict::Route;
    let seen = host_seen(&out);
    assert_eq!(
        (verdict, out),
        (route, udp(&seen, "10.0.1.13:8080", b"hello"))
    );
    let (verdict, back) = from_uplink(&tables, udp("10.0.1.13:8080", &seen, b"you too"));
    assert_eq!(
        (verdict, back),
        (
            Verdict::Host,
            udp("10.96.0.1:80", "198.18.0.1:4000", b"you too")
        )
    );
}

#[test]
fn the_host_reaches_its_own_backend_through_a_service() {
    let tables = node(&["198.18.0.1:6443"]);
    let (verdict, out) = to_service(&tables, tcp("198.18.0.1:4000", "10.96.0.1:80", SYN, b""));
    let seen = host_seen(&out).replace("198.18.0.1", "169.254.77.77");
    assert_eq!(
        (verdict, out),
        (Verdict::Host, tcp(&seen, "198.18.0.1:6443", SYN, b""))
    );
    let (verdict, back) = to_service(&tables, tcp("198.18.0.1:6443", &seen, SYN | ACK, b""));
    assert_eq!(
        (verdict, back),
        (
            Verdict::Host,
            tcp("10.96.0.1:80", "198.18.0.1:4000", SYN | ACK, b"")
        )
    );
}

#[test]
fn a_service_without_backends_and_an_unknown_port_are_rejected() {
    let tables = node(&[]);
    for (port, reason) in [(80, Reason::NoBackend), (81, Reason::NoSuchPort)] {
        let (verdict, out) = from_pod(
            &tables,
            A,
            tcp("10.0.0.11:4000", &format!("10.96.0.1:{port}"), SYN, b""),
        );
        assert_eq!((verdict, out[47]), (Verdict::Peer(A), RST | ACK));
        let (verdict, out) = from_pod(
            &tables,
            A,
            udp("10.0.0.11:4000", &format!("10.96.0.1:{port}"), b"x"),
        );
        assert_eq!((verdict, &out[34..36]), (Verdict::Peer(A), &[3, 3][..]));
        assert!(checksums_are_right(&out));
        assert_eq!(tables.counted(reason), 2);
        assert_eq!(
            to_service(
                &tables,
                udp("198.18.0.1:4000", &format!("10.96.0.1:{port}"), b"x")
            )
            .0,
            Verdict::Host
        );
    }
}

#[test]
fn what_is_no_service_in_the_service_range_is_dropped_with_a_reason() {
    let tables = node(&[]);
    assert_eq!(
        to_service(&tables, tcp("198.18.0.1:4000", "10.96.9.9:80", SYN, b"")).0,
        Verdict::Drop
    );
    assert_eq!(tables.counted(Reason::UnknownServiceAddress), 1);
    assert_eq!(
        from_pod(
            &tables,
            A,
            icmp("10.0.0.11:0", "10.96.0.1:0", 8, 0, &[0; 8])
        )
        .0,
        Verdict::Drop
    );
    assert_eq!(tables.counted(Reason::ServiceProtocol), 1);
}

#[test]
fn a_connection_keeps_its_backend_and_a_new_one_gets_one_that_is_there() {
    let tables = node(&["10.0.0.12:8080"]);
    from_pod(&tables, A, tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""));
    from_pod(
        &tables,
        B,
        tcp("10.0.0.12:8080", "10.0.0.11:4000", SYN | ACK, b""),
    );
    tables.set_service(1, &["10.0.1.13:8080"], &[]);
    let (_, out) = from_pod(
        &tables,
        A,
        tcp("10.0.0.11:4000", "10.96.0.1:80", ACK, b"more"),
    );
    assert_eq!(out, tcp("10.0.0.11:4000", "10.0.0.12:8080", ACK, b"more"));
    let (_, out) = from_pod(&tables, A, tcp("10.0.0.11:4001", "10.96.0.1:80", SYN, b""));
    assert_eq!(out, tcp("10.0.0.11:4001", "10.0.1.13:8080", SYN, b""));
    // The same tuple opened anew is a new connection too.
    let (_, out) = from_pod(&tables, A, tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""));
    assert_eq!(out, tcp("10.0.0.11:4000", "10.0.1.13:8080", SYN, b""));
}

#[test]
fn a_tuple_used_again_after_closing_gets_a_fresh_choice() {
    let tables = node(&["10.0.0.12:8080"]);
    from_pod(&tables, A, tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""));
    from_pod(
        &tables,
        B,
        tcp("10.0.0.12:8080", "10.0.0.11:4000", SYN | ACK, b""),
    );
    from_pod(
        &tables,
        A,
        tcp("10.0.0.11:4000", "10.96.0.1:80", FIN | ACK, b""),
    );
    from_pod(
        &tables,
        B,
        tcp("10.0.0.12:8080", "10.0.0.11:4000", FIN | ACK, b""),
    );
    let created = tables.counted(Reason::FlowCreated);
    from_pod(&tables, A, tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""));
    assert_eq!(tables.counted(Reason::FlowCreated), created + 1);
}

#[test]
fn datagrams_leave_a_backend_that_is_gone_and_stay_with_one_that_moved() {
    let tables = node(&["10.0.0.12:8080"]);
    let ask = || from_pod(&tables, A, udp("10.0.0.11:4000", "10.96.0.1:80", b"x")).1;
    ask();
    tables.set_service(
        1,
        &[
            "10.0.1.13:1",
            "10.0.1.14:1",
            "10.0.1.15:1",
            "10.0.0.12:8080",
        ],
        &[],
    );
    assert_eq!(ask(), udp("10.0.0.11:4000", "10.0.0.12:8080", b"x"));
    tables.set_service(1, &["10.0.1.13:1"], &[]);
    assert_eq!(ask(), udp("10.0.0.11:4000", "10.0.1.13:1", b"x"));
    tables.set_service(1, &[], &[]);
    assert_eq!(ask()[34..36], [3, 3]);
}

#[test]
fn datagrams_leave_a_service_to_which_what_they_ask_leads_no_longer() {
    let tables = node(&["10.0.0.12:8080"]);
    let ask = || from_pod(&tables, A, udp("10.0.0.11:4000", "10.96.0.1:80", b"x")).1;
    ask();
    // The address is another Service's; the first one still has its backend, and the agent renews it.
    tables.set_service(2, &["10.0.1.13:1"], &[]);
    tables.set_lead("10.96.0.1:80", proto::UDP, Lead::new(2, 2, 0));
    tables.set_service(1, &["10.0.0.12:8080"], &[]);
    assert_eq!(ask(), udp("10.0.0.11:4000", "10.0.1.13:1", b"x"));
    // That one is gone, and its id is given to a Service of another address with the same backend.
    tables.frontends.borrow_mut().remove(&FrontendKey::new(
        crate::memory::ip("10.96.0.1"),
        80u16.to_be(),
        proto::UDP,
    ));
    tables.set_service(2, &["10.0.1.13:1"], &[]);
    tables.set_frontend("10.96.0.9:80", proto::UDP, 2);
    assert_eq!(ask()[34..36], [3, 3]);
    // Clients outside go by what leads them, which may be other backends than those of clients here.
    tables.set_lead("0.0.0.0:30080", proto::UDP, Lead::new(2, 1, 0));
    let client = || from_uplink(&tables, udp("203.0.113.9:4000", "198.18.0.1:30080", b"x")).1;
    let asked = udp("203.0.113.9:4000", "10.0.0.12:8080", b"x");
    assert_eq!(client(), asked);
    tables.set_service(1, &["10.0.0.12:8080"], &[]);
    let opened = tables.counted(Reason::FlowCreated);
    assert_eq!(client(), asked);
    assert_eq!(tables.counted(Reason::FlowCreated), opened);
    tables.set_lead("0.0.0.0:30080", proto::UDP, Lead::new(1, 2, 0));
    tables.set_service(1, &["10.0.0.12:8080"], &[]);
    assert_ne!(client(), asked);
}

#[test]
fn a_fragmented_datagram_is_translated_whole() {
    let tables = node(&["10.0.0.12:8080"]);
    let mut first = udp("10.0.0.11:4000", "10.96.0.1:80", &[7; 64]);
    first[20] = 0x20;
    let mut later = udp("10.0.0.11:4000", "10.96.0.1:80", &[7; 64]);
    later[21] = 9;
    let mut stray = later.clone();
    stray[18] = 0xee;
    assert_eq!(from_pod(&tables, A, first).1[30..34], [10, 0, 0, 12]);
    let (verdict, out) = from_pod(&tables, A, later);
    assert_eq!(
        (verdict, &out[30..34]),
        (Verdict::Peer(B), &[10, 0, 0, 12][..])
    );
    assert_eq!(from_pod(&tables, A, stray).0, Verdict::Drop);
    assert_eq!(tables.counted(Reason::FragmentUnknown), 1);
}

#[test]
fn with_translation_off_service_addresses_are_like_any_other() {
    let tables = node(&["10.0.0.12:8080"]);
    let packet = tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b"");
    let mut out = Bytes(packet.clone());
    let verdict = hooks::pod_ingress(
        &mut out,
        &tables,
        &Features {
            packet_lb: false,
            ..FEATURES
        },
        A,
    );
    assert_eq!((verdict, out.0), (Verdict::Pass, packet));
}

/// An ICMP error from a socket address' host about a packet.
fn error(from: &str, about: &[u8]) -> Vec<u8> {
    let sender = format!("{}.{}.{}.{}:0", about[26], about[27], about[28], about[29]);
    let mut body = vec![0; 4];
    body.extend(&about[14..42]);
    icmp(from, &sender, 3, 3, &body)
}

/// The same, but for the quoted transport checksum, which is left as it was.
fn without_quoted_checksum(mut packet: Vec<u8>) -> Vec<u8> {
    packet[68..70].fill(0);
    packet[36..38].fill(0);
    packet
}

#[test]
fn an_icmp_error_about_a_translated_packet_quotes_what_its_sender_sent() {
    let tables = node(&["10.0.1.13:8080"]);
    let sent = udp("10.0.0.11:4000", "10.96.0.1:80", b"hello");
    let (_, out) = from_pod(&tables, A, sent.clone());
    for (from, seen_from) in [
        ("10.0.1.13:0", "10.96.0.1:0"),
        ("198.18.0.9:0", "198.18.0.9:0"),
    ] {
        let (verdict, back) = from_uplink(&tables, error(from, &out));
        assert_eq!(verdict, Verdict::Peer(A), "from {from}");
        assert!(checksums_are_right(&back), "from {from}");
        assert_eq!(
            without_quoted_checksum(back),
            without_quoted_checksum(error(seen_from, &sent))
        );
    }
    assert_eq!(tables.counted(Reason::IcmpTranslated), 2);
}

#[test]
fn an_icmp_error_about_an_answer_reaches_the_backend_that_sent_it() {
    let tables = node(&["10.0.0.12:8080"]);
    from_pod(&tables, A, udp("10.0.0.11:4000", "10.96.0.1:80", b"hello"));
    let answer = udp("10.0.0.12:8080", "10.0.0.11:4000", b"hello");
    let (_, seen) = from_pod(&tables, B, answer.clone());
    let (verdict, out) = from_pod(&tables, A, error("10.0.0.11:0", &seen));
    assert_eq!(verdict, Verdict::Peer(B));
    assert!(checksums_are_right(&out));
    assert_eq!(
        without_quoted_checksum(out),
        without_quoted_checksum(error("10.0.0.11:0", &answer))
    );
}

#[test]
fn icmp_that_is_about_no_flow_is_left_as_it_is() {
    let tables = node(&["10.0.1.13:8080"]);
    let stray = error("10.0.1.13:0", &udp("10.0.0.11:1", "10.0.1.13:2", b"hello"));
    assert_eq!(
        from_uplink(&tables, stray.clone()),
        (Verdict::Peer(A), stray)
    );
    let echo = icmp("10.0.0.11:0", "10.0.0.12:0", 8, 0, &[0; 40]);
    assert_eq!(from_pod(&tables, A, echo.clone()), (Verdict::Peer(B), echo));
    let cut = icmp("10.0.1.13:0", "10.0.0.11:0", 3, 3, &[0x45; 10]);
    assert_eq!(from_uplink(&tables, cut.clone()), (Verdict::Peer(A), cut));
}

#[test]
fn a_direct_connection_may_use_the_port_of_a_flow_that_has_ended() {
    let tables = node(&["10.0.1.13:8080"]);
    let (client, backend) = ("10.0.0.11:4000", "10.0.1.13:8080");
    for flags in [SYN, ACK, FIN | ACK] {
        from_pod(&tables, A, tcp(client, "10.96.0.1:80", flags, b""));
        from_uplink(&tables, tcp(backend, client, flags | ACK, b""));
    }
    let opening = tcp(client, backend, SYN, b"");
    assert_eq!(
        from_pod(&tables, A, opening.clone()),
        (Verdict::Pass, opening)
    );
    for flags in [SYN | ACK, ACK] {
        let answer = tcp(backend, client, flags, b"");
        assert_eq!(
            from_uplink(&tables, answer.clone()),
            (Verdict::Peer(A), answer)
        );
    }
}

#[test]
fn the_host_keeps_a_port_that_few_may_take() {
    let tables = node(&["10.0.1.13:8080"]);
    let (_, out) = to_service(&tables, tcp("198.18.0.1:1023", "10.96.0.1:80", SYN, b""));
    assert_eq!(out, tcp("198.18.0.1:1023", "10.0.1.13:8080", SYN, b""));
    let (_, out) = to_service(&tables, tcp("198.18.0.1:1024", "10.96.0.1:80", SYN, b""));
    assert_eq!(out, tcp(&host_seen(&out), "10.0.1.13:8080", SYN, b""));
}

#[test]
fn an_opening_that_meets_a_direct_connection_is_told_and_its_reset_held() {
    let tables = node(&["10.0.1.13:8080"]);
    let (client, service, backend) = ("10.0.0.11:4000", "10.96.0.1:80", "10.0.1.13:8080");
    from_pod(&tables, A, tcp(client, service, SYN, b""));
    let told = tcp(service, client, ACK, b"");
    let state = tcp(backend, client, ACK, b"");
    assert_eq!(
        from_uplink(&tables, state.clone()),
        (Verdict::Peer(A), told)
    );
    // What comes then is the direct one's, and what it sends is never taken for its state.
    assert_eq!(
        from_uplink(&tables, state.clone()),
        (Verdict::Peer(A), state)
    );
    let reset = from_pod(&tables, A, tcp(client, service, RST, b""));
    assert_eq!(reset.0, Verdict::Drop);
    assert_eq!(tables.counted(Reason::ResetHeld), 1);
    let (_, again) = from_pod(&tables, A, tcp(client, service, SYN, b""));
    let seen = format!("10.0.0.11:{}", u16::from_be_bytes([again[34], again[35]]));
    assert_ne!(seen, client);
    assert_eq!(again, tcp(&seen, backend, SYN, b""));
    from_uplink(&tables, tcp(backend, &seen, SYN | ACK, b""));
    let (_, ended) = from_pod(&tables, A, tcp(client, service, RST, b""));
    assert_eq!(ended, tcp(&seen, backend, RST, b""));

    from_pod(&tables, A, tcp("10.0.0.11:4001", service, SYN, b""));
    for (flags, payload) in [(ACK, &b"data"[..]), (FIN | ACK, b"")] {
        let of_another = tcp(backend, "10.0.0.11:4001", flags, payload);
        assert_eq!(
            from_uplink(&tables, of_another.clone()),
            (Verdict::Peer(A), of_another)
        );
    }
}

#[path = "hook_outside_tests.rs"]
mod outside;

#[path = "hook_sctp_tests.rs"]
mod sctp;

#[test]
fn a_client_who_asks_while_an_address_changes_hands_is_led_to_its_new_service() {
    fn hand_over(tables: &Memory) {
        tables.set_service(2, &["10.0.0.12:9090"], &[]);
        for protocol in [proto::TCP, proto::UDP] {
            tables.set_frontend("10.96.0.1:80", protocol, 2);
        }
        tables.services.borrow_mut().remove(&1);
    }
    for packet in [
        tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""),
        udp("10.0.0.11:4000", "10.96.0.1:80", b"x"),
    ] {
        let tables = node(&["10.0.0.12:8080"]);
        *tables.meanwhile.borrow_mut() = Some(hand_over);
        let (verdict, out) = from_pod(&tables, A, packet);
        assert_eq!(verdict, Verdict::Peer(B));
        assert_eq!(u16::from_be_bytes([out[36], out[37]]), 9090);
        assert_eq!(tables.counted(Reason::NoBackend), 0);
    }
    // With the address itself gone there is nobody.
    let tables = node(&["10.0.0.12:8080"]);
    *tables.meanwhile.borrow_mut() = Some(|tables| {
        tables.services.borrow_mut().remove(&1);
    });
    let packet = udp("10.0.0.11:4000", "10.96.0.1:80", b"x");
    assert_eq!(from_pod(&tables, A, packet).0, Verdict::Peer(A));
    assert_eq!(tables.counted(Reason::NoBackend), 1);
}
