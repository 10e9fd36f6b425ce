//! Associations of SCTP through the hooks: as connections of TCP go, with a sum that addresses are not part of.

use dataplane_abi::{FlowKey, Lead};

use super::*;
use crate::{
    memory::sctp,
    packet::sctp_chunk::{ABORT, DATA, INIT, INIT_ACK, SHUTDOWN, SHUTDOWN_ACK},
    tables::Tables,
};

const POD: &str = "10.0.0.11:4000";
const SERVICE: &str = "10.96.0.1:80";

fn serving(backends: &[&str]) -> Memory {
    let tables = node(backends);
    tables.set_frontend(SERVICE, proto::SCTP, 1);
    tables.set_lead("0.0.0.0:30080", proto::SCTP, Lead::new(1, 1, 0));
    tables
}

#[test]
fn an_association_keeps_its_backend_and_its_sums() {
    let backend = "10.0.0.12:8080";
    let tables = serving(&[backend]);
    for (there, back) in [(INIT, INIT_ACK), (DATA, DATA), (SHUTDOWN, SHUTDOWN_ACK)] {
        let (verdict, out) = from_pod(&tables, A, sctp(POD, SERVICE, there, b"odd"));
        assert_eq!(
            (verdict, out),
            (Verdict::Peer(B), sctp(POD, backend, there, b"odd"))
        );
        let (verdict, heard) = from_pod(&tables, B, sctp(backend, POD, back, b""));
        assert_eq!(
            (verdict, heard),
            (Verdict::Peer(A), sctp(SERVICE, POD, back, b""))
        );
    }
    assert_eq!(tables.counted(Reason::FlowCreated), 1);
    assert_eq!(tables.counted(Reason::FlowReplied), 1);
}

#[test]
fn an_association_outlives_its_endpoint_and_its_next_opening_does_not() {
    let tables = serving(&["10.0.0.12:8080"]);
    from_pod(&tables, A, sctp(POD, SERVICE, INIT, b""));
    from_pod(&tables, B, sctp("10.0.0.12:8080", POD, INIT_ACK, b""));
    tables.set_service(1, &["10.0.1.13:8080"], &[]);
    let (_, out) = from_pod(&tables, A, sctp(POD, SERVICE, DATA, b"x"));
    assert_eq!(out, sctp(POD, "10.0.0.12:8080", DATA, b"x"));
    let (_, out) = from_pod(&tables, A, sctp(POD, SERVICE, INIT, b""));
    assert_eq!(out, sctp(POD, "10.0.1.13:8080", INIT, b""));
}

#[test]
fn an_aborted_association_makes_way_for_another_services() {
    let backend = "10.0.0.12:8080";
    let tables = serving(&[backend]);
    tables.set_service(2, &[backend], &[]);
    tables.set_frontend("10.96.0.2:80", proto::SCTP, 2);
    from_pod(&tables, A, sctp(POD, SERVICE, INIT, b""));
    from_pod(&tables, B, sctp(backend, POD, ABORT, b""));
    let (_, out) = from_pod(&tables, A, sctp(POD, "10.96.0.2:80", INIT, b""));
    assert_eq!(out, sctp(POD, backend, INIT, b""));
    assert_eq!(tables.counted(Reason::FlowPortChanged), 0);
    // One that is not over keeps its tuple: the other gets another port, and a sum to it.
    let tables = serving(&[backend]);
    tables.set_service(2, &[backend], &[]);
    tables.set_frontend("10.96.0.2:80", proto::SCTP, 2);
    from_pod(&tables, A, sctp(POD, SERVICE, INIT, b""));
    let (_, out) = from_pod(&tables, A, sctp(POD, "10.96.0.2:80", INIT, b""));
    assert!(checksums_are_right(&out));
    assert_ne!(out[34..36], 4000u16.to_be_bytes());
}

#[test]
fn a_client_outside_is_the_node_to_a_backend_elsewhere() {
    let (client, asked, there) = ("203.0.113.9:5000", "198.18.0.1:30080", "10.0.1.13:8080");
    let tables = serving(&[there]);
    let (verdict, out) = from_uplink(&tables, sctp(client, asked, INIT, b"x"));
    assert_eq!(verdict, Verdict::Route);
    let port = u16::from_be_bytes([out[34], out[35]]);
    let node = format!("198.18.0.1:{port}");
    assert_eq!(out, sctp(&node, there, INIT, b"x"));
    let (verdict, back) = from_uplink(&tables, sctp(there, &node, INIT_ACK, b"y"));
    assert_eq!(
        (verdict, back),
        (Verdict::Route, sctp(asked, client, INIT_ACK, b"y"))
    );
    // What opens nothing may be the host's own.
    let stranger = sctp("203.0.113.7:5000", asked, INIT_ACK, b"");
    assert_eq!(from_uplink(&tables, stranger).0, Verdict::Pass);
}

#[test]
fn without_endpoints_the_sender_learns_that_the_port_is_unreachable() {
    let tables = serving(&[]);
    for (at, reason) in [
        (SERVICE, Reason::NoBackend),
        ("10.96.0.1:81", Reason::NoSuchPort),
    ] {
        let (verdict, answer) = from_pod(&tables, A, sctp(POD, at, INIT, b""));
        assert_eq!((verdict, answer[23]), (Verdict::Peer(A), proto::ICMP));
        assert_eq!(answer[34..36], [3, 3]);
        assert!(checksums_are_right(&answer));
        assert_eq!(tables.counted(reason), 1);
    }
}

#[test]
fn an_error_about_an_association_reaches_who_opened_it() {
    let there = "10.0.1.13:8080";
    let tables = serving(&[there]);
    let (_, sent) = from_pod(&tables, A, sctp(POD, SERVICE, INIT, b""));
    // Its host speaks no SCTP: protocol unreachable, with eight bytes of the packet.
    let body = [&[0; 4][..], &sent[14..42]].concat();
    let error = icmp("10.0.1.13:0", "10.0.0.11:0", 3, 2, &body);
    let (verdict, heard) = from_uplink(&tables, error);
    let mut asked = sctp(POD, SERVICE, INIT, b"");
    asked.truncate(42);
    let body = [&[0; 4][..], &asked[14..]].concat();
    assert_eq!(verdict, Verdict::Peer(A));
    assert_eq!(heard, icmp("10.96.0.1:0", "10.0.0.11:0", 3, 2, &body));
}

#[test]
fn flows_of_associations_are_under_their_own_protocol() {
    let tables = serving(&["10.0.0.12:8080"]);
    from_pod(&tables, A, sctp(POD, SERVICE, INIT, b""));
    let key = |protocol| {
        FlowKey::new(
            crate::memory::ip("10.0.0.11"),
            crate::memory::ip("10.96.0.1"),
            4000u16.to_be(),
            80u16.to_be(),
            protocol,
        )
    };
    assert!(tables.unreplied(&key(proto::SCTP)).is_some());
    assert!(tables.unreplied(&key(proto::TCP)).is_none());
}
