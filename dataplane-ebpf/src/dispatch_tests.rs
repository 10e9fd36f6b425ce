//! Clients' packets that one node sends on to another as they came, and what becomes of them there.

use dataplane_abi::Lead;

use super::*;
use crate::{
    memory::{Bytes, Memory, hooks, ip, tcp, udp},
    packet::tcp_flag::{ACK, SYN},
};

const CLIENT: &str = "203.0.113.9:5000";
/// A port of the first node; an address of a balancer.
const ASKED: &str = "198.18.0.1:30080";
const BALANCED: &str = "192.0.2.1:80";
const POD: &str = "10.0.2.12:8080";
const OTHER: &str = "10.0.3.13:8080";

fn features(own: &str, by_overlay: bool) -> Features {
    Features {
        packet_lb: true,
        service_veth: true,
        masquerade: false,
        node_v4: ip(own),
        node_v6: Addr { words: [0, 0] },
        overlay: true,
        by_overlay,
    }
}

/// The maps of a node: port 30080 and a balanced address lead to these backends, of which the others are on other nodes.
fn node(own: &str, backends: &[&str], others: &[&str]) -> Memory {
    let tables = Memory::default();
    tables.set_service(1, backends, &[]);
    tables.set_direct(1);
    let last = backends.len() as u16 - 1;
    // Everything leads to the last one.
    tables.set_maglev(1, &[last; 251]);
    for at in ["0.0.0.0:30080", BALANCED] {
        for protocol in [proto::TCP, proto::UDP] {
            tables.set_lead(at, protocol, Lead::new(1, 1, 0));
        }
    }
    tables.set_vip("192.0.2.1");
    tables.set_local(own, FROM_HOST, 0);
    for other in others {
        tables.peers.borrow_mut().insert(ip(other), 7);
    }
    tables
}

/// The node that is asked, and the one with the pod.
fn nodes() -> [Memory; 2] {
    let asked = node("198.18.0.1", &[POD], &["10.0.2.12", "10.0.3.13"]);
    let there = node("198.18.0.2", &[POD], &["10.0.3.13"]);
    there.set_local("10.0.2.12", FROM_POD, 12);
    [asked, there]
}

fn arrives(tables: &Memory, features: &Features, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
    let mut packet = Bytes(bytes);
    let verdict = hooks::uplink_ingress(&mut packet, tables, features);
    (verdict, packet.0)
}

#[test]
fn a_packet_goes_on_as_it_came_and_is_answered_from_where_it_went() {
    let [asked, there] = nodes();
    let (first, second) = (features("198.18.0.1", false), features("198.18.0.2", true));
    // Of one client port to one pod, the second Service would get another.
    for (client, at) in [(CLIENT, ASKED), ("203.0.113.9:5001", BALANCED)] {
        for packet in [
            tcp(client, at, SYN, b""),
            tcp(client, at, ACK, b"odd"),
            udp(client, at, b"hi"),
        ] {
            let sent_on = arrives(&asked, &first, packet.clone());
            assert_eq!(sent_on, (Verdict::Overlay, packet.clone()));
            let (verdict, out) = arrives(&there, &second, packet.clone());
            assert_eq!(verdict, Verdict::Peer(12));
            let is_tcp = packet[23] == proto::TCP;
            let wanted = match is_tcp {
                true => tcp(client, POD, packet[47], &packet[54..]),
                false => udp(client, POD, b"hi"),
            };
            assert_eq!(out, wanted);
            let answer_from = |server| match is_tcp {
                true => tcp(server, client, ACK | (packet[47] & SYN), b"yes"),
                false => udp(server, client, b"yes"),
            };
            let (answer, back) = (answer_from(POD), answer_from(at));
            let mut answer = Bytes(answer);
            let own = features("198.18.0.2", false);
            let verdict = hooks::pod_ingress(&mut answer, &there, &own, 12);
            assert_eq!((verdict, answer.0), (Verdict::Route, back));
        }
    }
    assert_eq!(asked.counted(Reason::Dispatched), 6);
    assert_eq!(
        asked.counted(Reason::SourceNat) + there.counted(Reason::SourceNat),
        0
    );
}

#[test]
fn a_node_that_never_saw_a_connection_sends_it_on_and_one_that_forgot_it_takes_it() {
    let [asked, there] = nodes();
    let middle = tcp(CLIENT, ASKED, ACK, b"of it");
    let first = features("198.18.0.1", false);
    assert_eq!(
        arrives(&asked, &first, middle.clone()),
        (Verdict::Overlay, middle.clone())
    );
    let second = features("198.18.0.2", true);
    assert_eq!(
        arrives(&there, &second, middle),
        (Verdict::Peer(12), tcp(CLIENT, POD, ACK, b"of it"))
    );
}

#[test]
fn what_was_sent_on_once_is_not_sent_on_again() {
    // The second node knows of an endpoint more, on a third.
    let there = node("198.18.0.2", &[POD, OTHER], &["10.0.3.13"]);
    there.set_local("10.0.2.12", FROM_POD, 12);
    let packet = tcp(CLIENT, ASKED, SYN, b"");
    let (verdict, out) = arrives(&there, &features("198.18.0.2", true), packet);
    assert_eq!(
        (verdict, there.counted(Reason::SourceNat)),
        (Verdict::Route, 1)
    );
    assert_eq!(out[30..34], [10, 0, 3, 13]);
    assert_eq!(out[26..30], [198, 18, 0, 2]);
}

#[test]
fn what_cannot_be_answered_directly_goes_by_way_of_the_node() {
    let by_way = |tables: &Memory, packet: Vec<u8>| {
        let (verdict, _) = arrives(tables, &features("198.18.0.1", false), packet);
        assert_eq!(
            (verdict, tables.counted(Reason::Dispatched)),
            (Verdict::Route, 0)
        );
    };
    let syn = || tcp(CLIENT, ASKED, SYN, b"");
    // No node has it; the Service does not ask; the client is its own endpoint.
    by_way(&node("198.18.0.1", &[POD], &[]), syn());
    let plain = node("198.18.0.1", &[POD], &["10.0.2.12"]);
    plain.set_service(1, &[POD], &[]);
    by_way(&plain, syn());
    let itself = node("198.18.0.1", &[POD], &["10.0.2.12"]);
    by_way(&itself, tcp("10.0.2.12:4000", ASKED, SYN, b""));
    // The host's own connections are left alone.
    let own = tcp("203.0.113.9:5001", ASKED, ACK, b"answer to the host");
    let (verdict, out) = arrives(&plain, &features("198.18.0.1", false), own.clone());
    assert_eq!((verdict, out), (Verdict::Pass, own));
}
