//! Rows of what only IPv6 has: extension headers, neighbour discovery, routers that say how big a packet may be.

use dataplane_abi::Reason;
use keelway_agent::dataplane::PacketProgram::{PodIngress, UplinkIngress};
use keelway_tests::packets::icmp;

use crate::{
    family::Family,
    rows::{DROP, PASS, REDIRECT, Row, Step},
};

const V6: Family = Family::V6;

/// A datagram behind a header of destination options that has none but padding.
fn with_options(src: &str, dst: &str, payload: &[u8]) -> Vec<u8> {
    let mut packet = V6.udp(src, dst, payload);
    packet.splice(54..54, [17, 0, 1, 4, 0, 0, 0, 0]);
    packet[19] += 8;
    packet[20] = 60;
    packet
}

/// The datagram behind options with the checksum of another.
fn with_sum_of(mut packet: Vec<u8>, other: &[u8]) -> Vec<u8> {
    packet[68..70].copy_from_slice(&other[68..70]);
    packet
}

/// What a router says about a packet that is too big for its next link, of which it quotes some.
fn too_big(from: &str, about: &[u8]) -> Vec<u8> {
    let body = [&[0, 0, 5, 0][..], &about[14..about.len().min(78)]].concat();
    V6.icmp(from, "10.0.0.11:0", 2, &body)
}

pub fn rows() -> Vec<Row> {
    use Reason::*;
    let (pod, service, there) = ("10.0.0.11:4000", "10.96.0.1:80", "10.0.1.13:8080");
    let (sent, gone) = (V6.udp(pod, service, b"hello"), V6.udp(pod, there, b"hello"));
    let balanced = format!("[{}]:0", V6.ip("192.0.2.1"));
    let here = format!("[{}]:0", V6.ip("10.0.0.11"));
    let neighbour = icmp("[fe80::1]:0", "[ff02::1:ff00:1]:0", 135, 0, &[0; 20]);
    let groups = icmp("[::]:0", "[ff02::16]:0", 143, 0, &[0; 28]);
    let asked = icmp("[fd00::9]:0", &balanced, 135, 0, &[0; 20]);
    let (optional, went) = (
        with_options(pod, service, b"hello"),
        with_options(pod, there, b"hello"),
    );
    let mut later = went.clone();
    later[20] = 44;
    later[54..62].copy_from_slice(&[17, 0, 0, 72, 0, 0, 0, 9]);
    let stray = too_big("10.0.9.9:0", &later);
    vec![
        Row {
            name: "a datagram is translated behind extension headers",
            backends: V6.backends(&["10.0.0.12:8080"], &[]),
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
            name: "a sender learns that a translated packet is too big for a link on the way",
            backends: V6.backends(&[there], &[]),
            steps: vec![
                Step(PodIngress, sent.clone(), PASS, Some(gone.clone())),
                Step(
                    UplinkIngress,
                    too_big("10.0.9.9:0", &gone),
                    REDIRECT,
                    Some(too_big("10.0.9.9:0", &V6.with_checksum_of(sent, &gone))),
                ),
            ],
            counters: &[(IcmpTranslated, 1), (Delivered, 1)],
        },
        Row {
            name: "what an error quotes is translated behind extension headers, and a later fragment left as it is",
            backends: V6.backends(&[there], &[]),
            steps: vec![
                Step(PodIngress, optional.clone(), PASS, Some(went.clone())),
                Step(
                    UplinkIngress,
                    too_big("10.0.9.9:0", &went),
                    REDIRECT,
                    Some(too_big("10.0.9.9:0", &with_sum_of(optional, &went))),
                ),
                Step(UplinkIngress, stray.clone(), REDIRECT, Some(stray)),
            ],
            counters: &[(IcmpTranslated, 1), (Delivered, 2)],
        },
        Row {
            name: "neighbours and groups are for the link, and nothing else comes from its addresses",
            backends: V6.backends(&[], &[]),
            steps: vec![
                Step(PodIngress, neighbour.clone(), PASS, Some(neighbour)),
                Step(PodIngress, groups.clone(), PASS, Some(groups)),
                Step(UplinkIngress, asked.clone(), PASS, Some(asked)),
                Step(
                    PodIngress,
                    icmp("[fe80::1]:0", &here, 128, 0, &[0; 20]),
                    DROP,
                    None,
                ),
            ],
            counters: &[(SourceAddress, 1), (Passed, 3)],
        },
    ]
}
