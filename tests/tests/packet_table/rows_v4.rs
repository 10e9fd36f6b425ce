//! Rows of what only IPv4 has: options in its header, and routers that say how big a packet may be by an error of its own.

use dataplane_abi::Reason;
use keelway_agent::dataplane::PacketProgram::{PodIngress, UplinkIngress};
use keelway_tests::packets::icmp;

use crate::{
    family::{Family, fix_header},
    rows::{DROP, PASS, REDIRECT, Row, Step},
};

const V4: Family = Family::V4;

/// A datagram with a router alert and padding for options (RFC 2113).
fn with_options(src: &str, dst: &str, payload: &[u8]) -> Vec<u8> {
    let mut packet = V4.udp(src, dst, payload);
    packet.splice(34..34, [0x94, 4, 0, 0, 1, 1, 1, 0]);
    packet[14] = 0x47;
    packet[17] += 8;
    fix_header(&mut packet);
    packet
}

/// What a router says about a packet that is too big for its next link (RFC 1191).
fn too_big(about: &[u8]) -> Vec<u8> {
    let body = [&[0, 0, 5, 0][..], &about[14..42]].concat();
    icmp("10.0.9.9:0", "10.0.0.11:0", 3, 4, &body)
}

pub fn rows() -> Vec<Row> {
    use Reason::*;
    let (pod, service, there) = ("10.0.0.11:4000", "10.96.0.1:80", "10.0.1.13:8080");
    let (sent, gone) = (V4.udp(pod, service, b"hello"), V4.udp(pod, there, b"hello"));
    vec![
        Row {
            name: "a datagram is translated behind options",
            backends: V4.backends(&["10.0.0.12:8080"], &[]),
            steps: vec![
                Step(
                    PodIngress,
                    with_options(pod, service, b"odd"),
                    REDIRECT,
                    Some(with_options(pod, "10.0.0.12:8080", b"odd")),
                ),
                Step(
                    PodIngress,
                    with_options("10.0.0.12:8080", pod, b"answer"),
                    DROP,
                    None,
                ),
            ],
            counters: &[(ServiceTranslated, 1), (SourceAddress, 1)],
        },
        Row {
            name: "a sender learns that a translated IPv4 packet is too big for a link on the way",
            backends: V4.backends(&[there], &[]),
            steps: vec![
                Step(PodIngress, sent.clone(), PASS, Some(gone.clone())),
                Step(
                    UplinkIngress,
                    too_big(&gone),
                    REDIRECT,
                    Some(too_big(&V4.with_checksum_of(sent, &gone))),
                ),
            ],
            counters: &[(IcmpTranslated, 1), (Delivered, 1)],
        },
    ]
}
