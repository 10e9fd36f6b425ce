//! Rows of SCTP, whose sum is over ports and chunks, and not over addresses.

use dataplane_abi::Reason;
use keelway_agent::dataplane::PacketProgram::{
    PodEgress, PodIngress, ServiceIngress, UplinkIngress,
};
use keelway_tests::packets::sctp_chunk::{ABORT, DATA, INIT, INIT_ACK};

use crate::{
    family::{Family, into_the_host},
    rows::{PASS, REDIRECT, Row, Step},
};

pub fn rows(family: Family) -> Vec<Row> {
    use Reason::*;
    let sctp = |src: &str, dst: &str, chunk, value: &[u8]| family.sctp(src, dst, chunk, value);
    let to = |active: &[&str]| family.backends(active, &[]);
    let (pod, service, other) = ("10.0.0.11:4000", "10.96.0.1:80", "10.96.0.2:80");
    let (same_port, port) = ("10.0.0.12:80", "10.0.0.12:8080");
    let (outside, node_port) = ("203.0.113.9:5000", "198.18.0.1:30080");
    vec![
        Row {
            name: "an association to the port that it asked for has other addresses only",
            backends: to(&[same_port]),
            steps: vec![
                Step(
                    PodIngress,
                    sctp(pod, service, INIT, b"odd"),
                    REDIRECT,
                    Some(sctp(pod, same_port, INIT, b"odd")),
                ),
                Step(
                    PodIngress,
                    sctp(pod, service, DATA, b""),
                    REDIRECT,
                    Some(sctp(pod, same_port, DATA, b"")),
                ),
            ],
            counters: &[(ServiceTranslated, 2), (FlowCreated, 1)],
        },
        Row {
            name: "an association to another port has a sum to it, and back",
            backends: to(&[port]),
            steps: vec![
                Step(
                    PodIngress,
                    sctp(pod, service, INIT, b"a longer one than the others"),
                    REDIRECT,
                    Some(sctp(pod, port, INIT, b"a longer one than the others")),
                ),
                Step(
                    UplinkIngress,
                    sctp(port, pod, INIT_ACK, b"odd"),
                    REDIRECT,
                    Some(sctp(service, pod, INIT_ACK, b"odd")),
                ),
                Step(
                    ServiceIngress,
                    sctp("198.18.0.1:700", service, INIT, &[7; 1400]),
                    REDIRECT,
                    Some(sctp("198.18.0.1:700", port, INIT, &[7; 1400])),
                ),
            ],
            counters: &[(ServiceTranslated, 2), (ReplyTranslated, 1)],
        },
        Row {
            name: "an association with oneself, or with the host, comes by the hairpin address",
            backends: to(&["10.0.0.11:8080"]),
            steps: vec![
                Step(
                    PodIngress,
                    sctp(pod, service, INIT, b""),
                    REDIRECT,
                    Some(sctp("169.254.77.77:4000", "10.0.0.11:8080", INIT, b"")),
                ),
                Step(
                    PodIngress,
                    sctp("10.0.0.11:8080", "169.254.77.77:4000", INIT_ACK, b""),
                    REDIRECT,
                    Some(sctp(service, pod, INIT_ACK, b"")),
                ),
            ],
            counters: &[(ServiceTranslated, 1), (ReplyTranslated, 1)],
        },
        Row {
            name: "an association of a pod with its host is translated on its way into the pod",
            backends: to(&["198.18.0.1:8080"]),
            steps: vec![
                Step(
                    PodIngress,
                    sctp(pod, service, INIT, b""),
                    PASS,
                    Some(sctp(pod, "198.18.0.1:8080", INIT, b"")),
                ),
                Step(
                    PodEgress,
                    sctp("198.18.0.1:8080", pod, INIT_ACK, b""),
                    PASS,
                    Some(sctp(service, pod, INIT_ACK, b"")),
                ),
                Step(
                    UplinkIngress,
                    sctp(outside, node_port, INIT, b""),
                    REDIRECT,
                    Some(into_the_host(sctp(
                        "169.254.77.77:5000",
                        "198.18.0.1:8080",
                        INIT,
                        b"",
                    ))),
                ),
            ],
            counters: &[(ServiceTranslated, 2), (ReplyTranslated, 1)],
        },
        Row {
            name: "an association from outside is with a pod of the node, by the node port",
            backends: to(&[port]),
            steps: vec![
                Step(
                    UplinkIngress,
                    sctp(outside, node_port, INIT, b""),
                    REDIRECT,
                    Some(sctp(outside, port, INIT, b"")),
                ),
                // What opens nothing is the host's own.
                Step(
                    UplinkIngress,
                    sctp("203.0.113.9:5001", node_port, DATA, b""),
                    PASS,
                    Some(sctp("203.0.113.9:5001", node_port, DATA, b"")),
                ),
            ],
            counters: &[(ServiceTranslated, 1), (SourceNat, 0)],
        },
        Row {
            name: "an association's tuple is free when it was aborted, and not before",
            backends: to(&[port]),
            steps: vec![
                Step(PodIngress, sctp(pod, service, INIT, b""), REDIRECT, None),
                Step(PodIngress, sctp(pod, other, INIT, b""), REDIRECT, None),
                Step(PodIngress, sctp(pod, service, ABORT, b""), REDIRECT, None),
                Step(
                    PodIngress,
                    sctp(pod, service, INIT, b""),
                    REDIRECT,
                    Some(sctp(pod, port, INIT, b"")),
                ),
            ],
            counters: &[(FlowCreated, 3), (FlowPortChanged, 1)],
        },
        Row {
            name: "an association that nobody takes is refused with an ICMP error",
            backends: to(&[]),
            steps: vec![
                Step(
                    PodIngress,
                    sctp(pod, service, INIT, b""),
                    REDIRECT,
                    Some(family.refusal(&sctp(pod, service, INIT, b""))),
                ),
                Step(
                    PodIngress,
                    sctp(pod, "10.96.0.1:81", INIT, b""),
                    REDIRECT,
                    Some(family.refusal(&sctp(pod, "10.96.0.1:81", INIT, b""))),
                ),
                Step(
                    UplinkIngress,
                    sctp(outside, node_port, INIT, b""),
                    REDIRECT,
                    Some(family.refusal(&sctp(outside, node_port, INIT, b""))),
                ),
            ],
            counters: &[(NoBackend, 2), (NoSuchPort, 1)],
        },
        Row {
            name: "an error about an association quotes what its sender sent",
            backends: to(&["10.0.1.13:8080"]),
            steps: vec![
                Step(PodIngress, sctp(pod, service, INIT, b"x"), PASS, None),
                Step(
                    UplinkIngress,
                    family
                        .port_unreachable("10.0.1.13:0", &sctp(pod, "10.0.1.13:8080", INIT, b"x")),
                    REDIRECT,
                    Some(family.port_unreachable("10.96.0.1:0", &sctp(pod, service, INIT, b"x"))),
                ),
            ],
            counters: &[(IcmpTranslated, 1), (Delivered, 1)],
        },
    ]
}
