//! The rows of the table.

use dataplane_abi::Reason;
use keelway_agent::dataplane::{
    PacketProgram::{self, PodEgress, PodIngress, ServiceIngress, UplinkEgress, UplinkIngress},
    ServiceBackends,
};
use keelway_tests::packets::tcp_flag::{ACK, FIN, RST, SYN};

use crate::family::{Family, Fragment, into_the_host, with_byte};

pub const PASS: i32 = -1;
pub const DROP: i32 = 2;
pub const REDIRECT: i32 = 7;

/// A packet through a program: verdict, and the packet after it where it matters.
pub struct Step(pub PacketProgram, pub Vec<u8>, pub i32, pub Option<Vec<u8>>);

pub struct Row {
    pub name: &'static str,
    /// Of the Service 10.96.0.1, and of what else leads to it.
    pub backends: ServiceBackends,
    pub steps: Vec<Step>,
    /// Counters that move; every other drop and reject stays.
    pub counters: &'static [(Reason, u64)],
}

/// The table, of one family: addresses are written as IPv4's, and [`Family::at`] says what they are in IPv6.
pub fn rows(family: Family) -> Vec<Row> {
    use Reason::*;
    let tcp = |src: &str, dst: &str, flags, payload: &[u8]| family.tcp(src, dst, flags, payload);
    let udp = |src: &str, dst: &str, payload: &[u8]| family.udp(src, dst, payload);
    let echo = |src: &str, dst: &str| family.echo(src, dst);
    let error = |from: &str, about: &[u8]| family.port_unreachable(from, about);
    let reset = |src: &str, dst: &str| family.reset(src, dst);
    let refusal = |datagram: &[u8]| family.refusal(datagram);
    let fragment = |part, id| family.fragment(part, id);
    let to = |active: &[&str]| family.backends(active, &[]);
    let terminating = |list: &[&str]| family.backends(&[], list);
    let kept = |active: &[&str]| ServiceBackends {
        keeps_clients: true,
        ..family.backends(active, &[])
    };
    vec![
        Row {
            name: "the host's own endpoint sees a client that its Service keeps, and answers as what was asked",
            backends: kept(&["198.18.0.1:8080"]),
            steps: vec![
                Step(
                    UplinkIngress,
                    tcp("203.0.113.9:5000", "198.18.0.1:30080", SYN, b""),
                    PASS,
                    Some(tcp("203.0.113.9:5000", "198.18.0.1:8080", SYN, b"")),
                ),
                Step(
                    UplinkEgress,
                    tcp("198.18.0.1:8080", "203.0.113.9:5000", SYN | ACK, b""),
                    PASS,
                    Some(tcp("198.18.0.1:30080", "203.0.113.9:5000", SYN | ACK, b"")),
                ),
                Step(
                    UplinkIngress,
                    tcp("203.0.113.9:5000", "198.18.0.1:30080", ACK, b"odd"),
                    PASS,
                    Some(tcp("203.0.113.9:5000", "198.18.0.1:8080", ACK, b"odd")),
                ),
                Step(
                    UplinkIngress,
                    udp("203.0.113.9:5000", "192.0.2.1:80", b"odd"),
                    PASS,
                    Some(udp("203.0.113.9:5000", "198.18.0.1:8080", b"odd")),
                ),
                Step(
                    UplinkEgress,
                    udp("198.18.0.1:8080", "203.0.113.9:5000", b"even"),
                    PASS,
                    Some(udp("192.0.2.1:80", "203.0.113.9:5000", b"even")),
                ),
                // Nobody listens any more.
                Step(
                    UplinkEgress,
                    error(
                        "198.18.0.1:0",
                        &tcp("203.0.113.9:5000", "198.18.0.1:8080", ACK, b"odd"),
                    ),
                    PASS,
                    Some(error(
                        "198.18.0.1:0",
                        &tcp("203.0.113.9:5000", "198.18.0.1:30080", ACK, b"odd"),
                    )),
                ),
                // Whoever else leaves the node is left alone.
                Step(
                    UplinkEgress,
                    udp("198.18.0.1:8081", "203.0.113.9:5000", b"x"),
                    PASS,
                    Some(udp("198.18.0.1:8081", "203.0.113.9:5000", b"x")),
                ),
                Step(
                    UplinkEgress,
                    tcp("198.18.0.1:8080", "203.0.113.8:5000", SYN, b""),
                    PASS,
                    Some(tcp("198.18.0.1:8080", "203.0.113.8:5000", SYN, b"")),
                ),
            ],
            counters: &[
                (ServiceTranslated, 3),
                (ReplyTranslated, 2),
                (FlowCreated, 2),
                (FlowReplied, 2),
                (IcmpTranslated, 1),
                (SourceNat, 0),
            ],
        },
        Row {
            name: "who asks the host's own endpoint directly, from a port that a kept client has, is told apart",
            backends: kept(&["198.18.0.1:8080"]),
            steps: vec![
                Step(
                    UplinkIngress,
                    tcp("203.0.113.9:5000", "198.18.0.1:30080", SYN, b""),
                    PASS,
                    Some(tcp("203.0.113.9:5000", "198.18.0.1:8080", SYN, b"")),
                ),
                Step(
                    UplinkIngress,
                    tcp("203.0.113.9:5000", "198.18.0.1:8080", SYN, b""),
                    PASS,
                    None,
                ),
                Step(
                    UplinkIngress,
                    tcp("203.0.113.8:5000", "198.18.0.1:8080", SYN, b""),
                    PASS,
                    Some(tcp("203.0.113.8:5000", "198.18.0.1:8080", SYN, b"")),
                ),
            ],
            counters: &[
                (ServiceTranslated, 1),
                (PortTranslated, 1),
                (FlowCreated, 2),
            ],
        },
        Row {
            name: "a pod reaches a pod of its node through a Service, and back",
            backends: to(&["10.0.0.12:8080"]),
            steps: vec![
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""),
                    REDIRECT,
                    Some(tcp("10.0.0.11:4000", "10.0.0.12:8080", SYN, b"")),
                ),
                Step(
                    UplinkIngress,
                    tcp("10.0.0.12:8080", "10.0.0.11:4000", SYN | ACK, b""),
                    REDIRECT,
                    Some(tcp("10.96.0.1:80", "10.0.0.11:4000", SYN | ACK, b"")),
                ),
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "10.96.0.1:80", ACK, b"odd"),
                    REDIRECT,
                    Some(tcp("10.0.0.11:4000", "10.0.0.12:8080", ACK, b"odd")),
                ),
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "10.96.0.1:80", FIN | ACK, b""),
                    REDIRECT,
                    Some(tcp("10.0.0.11:4000", "10.0.0.12:8080", FIN | ACK, b"")),
                ),
            ],
            counters: &[
                (ServiceTranslated, 3),
                (ReplyTranslated, 1),
                (FlowCreated, 1),
                (FlowReplied, 1),
                (Delivered, 4),
            ],
        },
        Row {
            name: "a direct connection may use the port of a flow that has ended",
            backends: to(&["10.0.1.13:8080"]),
            steps: vec![
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""),
                    PASS,
                    None,
                ),
                Step(
                    UplinkIngress,
                    tcp("10.0.1.13:8080", "10.0.0.11:4000", SYN | ACK, b""),
                    REDIRECT,
                    Some(tcp("10.96.0.1:80", "10.0.0.11:4000", SYN | ACK, b"")),
                ),
                Step(
                    UplinkIngress,
                    tcp("10.0.1.13:8080", "10.0.0.11:4000", FIN | ACK, b""),
                    REDIRECT,
                    Some(tcp("10.96.0.1:80", "10.0.0.11:4000", FIN | ACK, b"")),
                ),
                Step(
                    UplinkIngress,
                    tcp("10.0.1.13:8080", "10.0.0.11:4000", SYN | ACK, b""),
                    REDIRECT,
                    Some(tcp("10.0.1.13:8080", "10.0.0.11:4000", SYN | ACK, b"")),
                ),
            ],
            counters: &[
                (ServiceTranslated, 1),
                (ReplyTranslated, 2),
                (FlowCreated, 1),
                (FlowReplied, 1),
                (Passed, 1),
                (Delivered, 3),
            ],
        },
        Row {
            name: "datagrams to another node go by the stack and come back by the uplink",
            backends: to(&["10.0.1.13:5353"]),
            steps: vec![
                Step(
                    PodIngress,
                    udp("10.0.0.11:4000", "10.96.0.1:80", b"question"),
                    PASS,
                    Some(udp("10.0.0.11:4000", "10.0.1.13:5353", b"question")),
                ),
                Step(
                    UplinkIngress,
                    udp("10.0.1.13:5353", "10.0.0.11:4000", b"answer"),
                    REDIRECT,
                    Some(udp("10.96.0.1:80", "10.0.0.11:4000", b"answer")),
                ),
            ],
            counters: &[
                (ServiceTranslated, 1),
                (ReplyTranslated, 1),
                (Passed, 1),
                (Delivered, 1),
            ],
        },
        Row {
            name: "pods reach each other unchanged",
            backends: to(&[]),
            steps: vec![
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "10.0.0.12:80", SYN, b""),
                    REDIRECT,
                    Some(tcp("10.0.0.11:4000", "10.0.0.12:80", SYN, b"")),
                ),
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "10.0.1.13:80", SYN, b""),
                    PASS,
                    Some(tcp("10.0.0.11:4000", "10.0.1.13:80", SYN, b"")),
                ),
                Step(
                    UplinkIngress,
                    udp("10.0.1.13:1", "10.0.0.12:2", b"x"),
                    REDIRECT,
                    Some(udp("10.0.1.13:1", "10.0.0.12:2", b"x")),
                ),
                Step(
                    PodEgress,
                    udp("198.18.0.1:1", "10.0.0.11:2", b"x"),
                    PASS,
                    Some(udp("198.18.0.1:1", "10.0.0.11:2", b"x")),
                ),
            ],
            counters: &[(Delivered, 2), (Passed, 1), (FlowCreated, 0)],
        },
        Row {
            name: "a pod cannot send from another's address",
            backends: to(&["10.0.0.12:8080"]),
            steps: vec![
                Step(
                    PodIngress,
                    udp("10.0.0.12:4000", "10.96.0.1:80", b"x"),
                    DROP,
                    None,
                ),
                Step(
                    PodIngress,
                    udp("198.18.0.1:4000", "10.0.0.12:80", b"x"),
                    DROP,
                    None,
                ),
            ],
            counters: &[(SourceAddress, 2)],
        },
        Row {
            name: "a pod reaches itself through a Service",
            backends: to(&["10.0.0.11:8080"]),
            steps: vec![
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""),
                    REDIRECT,
                    Some(tcp("169.254.77.77:4000", "10.0.0.11:8080", SYN, b"")),
                ),
                Step(
                    PodIngress,
                    tcp("10.0.0.11:8080", "169.254.77.77:4000", SYN | ACK, b""),
                    REDIRECT,
                    Some(tcp("10.96.0.1:80", "10.0.0.11:4000", SYN | ACK, b"")),
                ),
            ],
            counters: &[(ServiceTranslated, 1), (ReplyTranslated, 1)],
        },
        Row {
            name: "the answers of the host's own backend are translated on their way into the pod",
            backends: to(&["198.18.0.1:6443"]),
            steps: vec![
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""),
                    PASS,
                    Some(tcp("10.0.0.11:4000", "198.18.0.1:6443", SYN, b"")),
                ),
                Step(
                    PodEgress,
                    tcp("198.18.0.1:6443", "10.0.0.11:4000", SYN | ACK, b""),
                    PASS,
                    Some(tcp("10.96.0.1:80", "10.0.0.11:4000", SYN | ACK, b"")),
                ),
            ],
            counters: &[(ServiceTranslated, 1), (ReplyTranslated, 1)],
        },
        Row {
            name: "the host reaches a pod of its own through a Service, by a port that few may take",
            backends: to(&["10.0.0.12:8080"]),
            steps: vec![
                Step(
                    ServiceIngress,
                    tcp("198.18.0.1:700", "10.96.0.1:80", SYN, b""),
                    REDIRECT,
                    Some(tcp("198.18.0.1:700", "10.0.0.12:8080", SYN, b"")),
                ),
                Step(
                    ServiceIngress,
                    tcp("198.18.0.1:4000", "10.96.9.9:80", SYN, b""),
                    DROP,
                    None,
                ),
            ],
            counters: &[(ServiceTranslated, 1), (UnknownServiceAddress, 1)],
        },
        Row {
            name: "a Service without backends and an unknown port are rejected",
            backends: to(&[]),
            steps: vec![
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "10.96.0.1:80", SYN, b""),
                    REDIRECT,
                    Some(reset("10.96.0.1:80", "10.0.0.11:4000")),
                ),
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "10.96.0.1:81", SYN, b""),
                    REDIRECT,
                    Some(reset("10.96.0.1:81", "10.0.0.11:4000")),
                ),
                Step(
                    PodIngress,
                    udp("10.0.0.11:4000", "10.96.0.1:80", b"x"),
                    REDIRECT,
                    Some(refusal(&udp("10.0.0.11:4000", "10.96.0.1:80", b"x"))),
                ),
                Step(
                    ServiceIngress,
                    udp("198.18.0.1:4000", "10.96.0.1:81", b"a longer one"),
                    REDIRECT,
                    None,
                ),
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "10.96.0.1:80", RST, b""),
                    DROP,
                    None,
                ),
            ],
            counters: &[(NoBackend, 3), (NoSuchPort, 2)],
        },
        Row {
            name: "a terminating backend serves when it is the last",
            backends: terminating(&["10.0.0.12:8080"]),
            steps: vec![Step(
                PodIngress,
                udp("10.0.0.11:4000", "10.96.0.1:80", b"x"),
                REDIRECT,
                Some(udp("10.0.0.11:4000", "10.0.0.12:8080", b"x")),
            )],
            counters: &[(TerminatingUsed, 1)],
        },
        Row {
            name: "two Services of one backend keep one client port's flows apart",
            backends: to(&["10.0.0.12:8080"]),
            steps: vec![
                Step(
                    PodIngress,
                    udp("10.0.0.11:4000", "10.96.0.1:80", b"x"),
                    REDIRECT,
                    Some(udp("10.0.0.11:4000", "10.0.0.12:8080", b"x")),
                ),
                Step(
                    PodIngress,
                    udp("10.0.0.11:4000", "10.96.0.2:80", b"x"),
                    REDIRECT,
                    None,
                ),
            ],
            counters: &[(FlowCreated, 2), (FlowPortChanged, 1)],
        },
        Row {
            name: "an ICMP error about a translated packet quotes what its sender sent",
            backends: to(&["10.0.1.13:8080"]),
            steps: vec![
                Step(
                    PodIngress,
                    udp("10.0.0.11:4000", "10.96.0.1:80", b"hello"),
                    PASS,
                    None,
                ),
                Step(
                    UplinkIngress,
                    error(
                        "10.0.1.13:0",
                        &udp("10.0.0.11:4000", "10.0.1.13:8080", b"hello"),
                    ),
                    REDIRECT,
                    // The quoted transport checksum stays as it was.
                    Some(error(
                        "10.96.0.1:0",
                        &family.with_checksum_of(
                            udp("10.0.0.11:4000", "10.96.0.1:80", b"hello"),
                            &udp("10.0.0.11:4000", "10.0.1.13:8080", b"hello"),
                        ),
                    )),
                ),
                Step(
                    UplinkIngress,
                    error(
                        "10.0.1.13:0",
                        &udp("10.0.0.11:4001", "10.0.1.13:8080", b"other"),
                    ),
                    REDIRECT,
                    Some(error(
                        "10.0.1.13:0",
                        &udp("10.0.0.11:4001", "10.0.1.13:8080", b"other"),
                    )),
                ),
            ],
            counters: &[(IcmpTranslated, 1), (Delivered, 2)],
        },
        Row {
            name: "a fragmented datagram is translated whole, and a stray fragment to a Service dropped",
            backends: to(&["10.0.0.12:8080"]),
            steps: vec![
                Step(PodIngress, fragment(Fragment::First, 1), REDIRECT, None),
                Step(PodIngress, fragment(Fragment::Later, 1), REDIRECT, None),
                Step(PodIngress, fragment(Fragment::Later, 2), DROP, None),
            ],
            counters: &[(ServiceTranslated, 2), (FragmentUnknown, 1)],
        },
        Row {
            name: "a client outside is itself to a pod of the node, which answers as the node port",
            backends: to(&["10.0.0.11:8080"]),
            steps: vec![
                Step(
                    UplinkIngress,
                    tcp("203.0.113.9:5000", "198.18.0.1:30080", SYN, b""),
                    REDIRECT,
                    Some(tcp("203.0.113.9:5000", "10.0.0.11:8080", SYN, b"")),
                ),
                Step(
                    PodIngress,
                    tcp("10.0.0.11:8080", "203.0.113.9:5000", SYN | ACK, b""),
                    REDIRECT,
                    Some(tcp("198.18.0.1:30080", "203.0.113.9:5000", SYN | ACK, b"")),
                ),
                Step(
                    UplinkIngress,
                    udp("203.0.113.9:5000", "198.18.0.1:30080", b"x"),
                    REDIRECT,
                    Some(udp("203.0.113.9:5000", "10.0.0.11:8080", b"x")),
                ),
            ],
            counters: &[(ServiceTranslated, 2), (ReplyTranslated, 1), (SourceNat, 0)],
        },
        Row {
            name: "a client outside reaches the host's own backend by the hairpin address",
            backends: to(&["198.18.0.1:6443"]),
            steps: vec![
                Step(
                    UplinkIngress,
                    tcp("203.0.113.9:5000", "198.18.0.1:30080", SYN, b""),
                    REDIRECT,
                    Some(into_the_host(tcp(
                        "169.254.77.77:5000",
                        "198.18.0.1:6443",
                        SYN,
                        b"",
                    ))),
                ),
                Step(
                    ServiceIngress,
                    tcp("198.18.0.1:6443", "169.254.77.77:5000", SYN | ACK, b""),
                    REDIRECT,
                    Some(tcp("198.18.0.1:30080", "203.0.113.9:5000", SYN | ACK, b"")),
                ),
            ],
            counters: &[(ServiceTranslated, 1), (ReplyTranslated, 1)],
        },
        Row {
            name: "a pod reaches a node port of its node, and itself by one",
            backends: to(&["10.0.0.11:8080"]),
            steps: vec![
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "198.18.0.1:30080", SYN, b""),
                    REDIRECT,
                    Some(tcp("169.254.77.77:4000", "10.0.0.11:8080", SYN, b"")),
                ),
                Step(
                    PodIngress,
                    tcp("10.0.0.11:8080", "169.254.77.77:4000", SYN | ACK, b""),
                    REDIRECT,
                    Some(tcp("198.18.0.1:30080", "10.0.0.11:4000", SYN | ACK, b"")),
                ),
            ],
            counters: &[(ServiceTranslated, 1), (ReplyTranslated, 1)],
        },
        Row {
            name: "with policy Local clients here get any backend, and those outside no answer without one here",
            backends: to(&["10.0.0.11:8080"]),
            steps: vec![
                Step(
                    PodIngress,
                    udp("10.0.0.11:4000", "198.18.0.1:30081", b"x"),
                    REDIRECT,
                    None,
                ),
                Step(
                    UplinkIngress,
                    tcp("203.0.113.9:5000", "198.18.0.1:30081", SYN, b""),
                    DROP,
                    None,
                ),
            ],
            counters: &[(ServiceTranslated, 1), (NoLocalBackend, 1)],
        },
        Row {
            name: "a client outside is refused without endpoints, and on unknown ports of a balanced address",
            backends: to(&[]),
            steps: vec![
                Step(
                    UplinkIngress,
                    tcp("203.0.113.9:5000", "198.18.0.1:30080", SYN, b""),
                    REDIRECT,
                    Some(reset("198.18.0.1:30080", "203.0.113.9:5000")),
                ),
                Step(
                    UplinkIngress,
                    udp("203.0.113.9:5000", "198.18.0.1:30080", b"x"),
                    REDIRECT,
                    Some(refusal(&udp("203.0.113.9:5000", "198.18.0.1:30080", b"x"))),
                ),
                Step(
                    UplinkIngress,
                    tcp("203.0.113.9:5000", "192.0.2.1:81", SYN, b""),
                    REDIRECT,
                    Some(reset("192.0.2.1:81", "203.0.113.9:5000")),
                ),
            ],
            counters: &[(NoBackend, 2), (NoSuchPort, 1)],
        },
        Row {
            name: "a balanced address lets in whom its ranges name",
            backends: to(&["10.0.0.11:8080"]),
            steps: vec![
                Step(
                    UplinkIngress,
                    tcp("203.0.113.9:5000", "192.0.2.1:80", SYN, b""),
                    REDIRECT,
                    Some(tcp("203.0.113.9:5000", "10.0.0.11:8080", SYN, b"")),
                ),
                Step(
                    UplinkIngress,
                    tcp("203.0.114.9:5000", "192.0.2.1:80", SYN, b""),
                    DROP,
                    None,
                ),
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "192.0.2.1:80", SYN, b""),
                    DROP,
                    None,
                ),
            ],
            counters: &[(ServiceTranslated, 1), (SourceRange, 2)],
        },
        Row {
            name: "the node's other ports, and what opens nothing on a node port, are the host's",
            backends: to(&["10.0.0.11:8080"]),
            steps: vec![
                Step(
                    UplinkIngress,
                    tcp("203.0.113.9:5000", "198.18.0.1:22", SYN, b""),
                    PASS,
                    Some(tcp("203.0.113.9:5000", "198.18.0.1:22", SYN, b"")),
                ),
                Step(
                    UplinkIngress,
                    tcp("203.0.113.9:5000", "198.18.0.1:30080", SYN | ACK, b""),
                    PASS,
                    Some(tcp("203.0.113.9:5000", "198.18.0.1:30080", SYN | ACK, b"")),
                ),
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "198.18.0.1:22", SYN, b""),
                    PASS,
                    Some(tcp("10.0.0.11:4000", "198.18.0.1:22", SYN, b"")),
                ),
                Step(
                    UplinkIngress,
                    echo("203.0.113.9:0", "198.18.0.1:0"),
                    PASS,
                    None,
                ),
            ],
            counters: &[(Passed, 4), (FlowCreated, 0)],
        },
        Row {
            name: "what has no ports is dropped with a reason when it is for a Service",
            backends: to(&["10.0.0.12:8080"]),
            steps: vec![Step(
                PodIngress,
                echo("10.0.0.11:0", "10.96.0.1:0"),
                DROP,
                None,
            )],
            counters: &[(ServiceProtocol, 1)],
        },
        Row {
            name: "headers that lie are dropped where a pod sends them and left to the stack elsewhere",
            backends: to(&[]),
            steps: vec![
                Step(
                    PodIngress,
                    with_byte(udp("10.0.0.11:1", "10.0.0.12:2", b"x"), 14, 0x41),
                    DROP,
                    None,
                ),
                Step(
                    UplinkIngress,
                    with_byte(udp("10.0.1.13:1", "10.0.0.12:2", b"x"), 14, 0x41),
                    PASS,
                    None,
                ),
                Step(
                    PodIngress,
                    with_byte(udp("10.0.0.11:1", "10.0.0.12:2", b"x"), 13, 0x06),
                    PASS,
                    None,
                ),
            ],
            counters: &[(Malformed, 1)],
        },
    ]
}
