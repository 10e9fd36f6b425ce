//! The data plane as a table: packets and map state in; verdict, packets and counters out, of the programs as the kernel
//! loaded them. Nothing is sent: the kernel runs each program on each packet (BPF_PROG_TEST_RUN).

use std::collections::BTreeMap;

use dataplane_abi::{Class, Reason};
use keelway_agent::dataplane::{
    Config, Dataplane, Frontend, Lead, LocalPod, Op,
    PacketProgram::{self, PodEgress, PodIngress, ServiceIngress, UplinkIngress},
    Protocol, ServiceBackends, ServiceId, ServiceVeth, Vip,
};
use keelway_tests::{
    packets::{
        icmp, tcp,
        tcp_flag::{ACK, FIN, RST, SYN},
        udp,
    },
    sandbox::{Sandbox, is_root},
};

const PASS: i32 = -1;
const DROP: i32 = 2;
const REDIRECT: i32 = 7;

/// Pod A, behind the interface that every packet comes by: the kernel wants one that exists.
const A: u32 = 1;
const B: u32 = 12;

/// A packet through a program: verdict, and the packet after it where it matters.
struct Step(PacketProgram, Vec<u8>, i32, Option<Vec<u8>>);

struct Row {
    name: &'static str,
    backends: ServiceBackends,
    steps: Vec<Step>,
    /// Counters that move; every other drop and reject stays.
    counters: &'static [(Reason, u64)],
}

fn to(active: &[&str]) -> ServiceBackends {
    ServiceBackends {
        active: active.iter().map(|at| at.parse().unwrap()).collect(),
        ..ServiceBackends::default()
    }
}

fn terminating(list: &[&str]) -> ServiceBackends {
    ServiceBackends {
        terminating: to(list).active,
        ..ServiceBackends::default()
    }
}

/// Pods A 10.0.0.11 and B 10.0.0.12, the host 198.18.0.1, the Service 10.96.0.1:80 (TCP and UDP).
fn state(backends: &ServiceBackends) -> Vec<Op> {
    let vip = "10.96.0.1".parse().unwrap();
    let pod = |last, ifindex| Op::SetPod {
        addr: [10, 0, 0, last].into(),
        pod: LocalPod {
            ifindex,
            mac: [2; 6],
        },
    };
    let frontend = |protocol| Op::SetFrontend {
        frontend: Frontend {
            addr: vip,
            port: 80,
            protocol,
        },
        lead: Lead::to(ServiceId(1)),
    };
    vec![
        pod(11, A),
        pod(12, B),
        Op::SetHostAddress {
            addr: [198, 18, 0, 1].into(),
        },
        Op::SetVip {
            addr: vip,
            kind: Vip::Cluster,
        },
        Op::SetService {
            id: ServiceId(1),
            backends: backends.clone(),
        },
        frontend(Protocol::Tcp),
        frontend(Protocol::Udp),
    ]
}

fn rows() -> Vec<Row> {
    use Reason::*;
    vec![
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
            name: "the host reaches a pod of its own through a Service",
            backends: to(&["10.0.0.12:8080"]),
            steps: vec![
                Step(
                    ServiceIngress,
                    tcp("198.18.0.1:4000", "10.96.0.1:80", SYN, b""),
                    REDIRECT,
                    Some(tcp("198.18.0.1:4000", "10.0.0.12:8080", SYN, b"")),
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
                    Some(reset("10.96.0.1:80", "10.0.0.11:4000", SYN)),
                ),
                Step(
                    PodIngress,
                    tcp("10.0.0.11:4000", "10.96.0.1:81", SYN, b""),
                    REDIRECT,
                    Some(reset("10.96.0.1:81", "10.0.0.11:4000", SYN)),
                ),
                Step(
                    PodIngress,
                    udp("10.0.0.11:4000", "10.96.0.1:80", b"x"),
                    REDIRECT,
                    Some(unreachable(&udp("10.0.0.11:4000", "10.96.0.1:80", b"x"))),
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
                        &with_byte(
                            with_byte(
                                udp("10.0.0.11:4000", "10.96.0.1:80", b"hello"),
                                40,
                                udp("10.0.0.11:4000", "10.0.1.13:8080", b"hello")[40],
                            ),
                            41,
                            udp("10.0.0.11:4000", "10.0.1.13:8080", b"hello")[41],
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
                Step(PodIngress, fragment(20, 0x20), REDIRECT, None),
                Step(PodIngress, fragment(21, 9), REDIRECT, None),
                Step(PodIngress, with_byte(fragment(21, 9), 18, 0xee), DROP, None),
            ],
            counters: &[(ServiceTranslated, 2), (FragmentUnknown, 1)],
        },
        Row {
            name: "what is not TCP or UDP to a Service is dropped with a reason",
            backends: to(&["10.0.0.12:8080"]),
            steps: vec![Step(
                PodIngress,
                icmp("10.0.0.11:0", "10.96.0.1:0", 8, 0, &[0; 12]),
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

/// An ICMP port unreachable from an address about a packet, to its sender.
fn error(from: &str, about: &[u8]) -> Vec<u8> {
    let sender = format!("{}.{}.{}.{}:0", about[26], about[27], about[28], about[29]);
    let body: Vec<u8> = [0; 4]
        .into_iter()
        .chain(about[14..42].iter().copied())
        .collect();
    icmp(from, &sender, 3, 3, &body)
}

/// A datagram to the Service, a byte of whose fragmentation field is set.
fn fragment(offset: usize, value: u8) -> Vec<u8> {
    let datagram = udp("10.0.0.11:4000", "10.96.0.1:80", &[7; 64]);
    let mut packet = with_byte(datagram, offset, value);
    fix_sum(&mut packet);
    packet
}

fn with_byte(mut packet: Vec<u8>, offset: usize, value: u8) -> Vec<u8> {
    packet[offset] = value;
    packet
}

/// The answer of a host that refuses a segment without data, as RFC 9293 has it.
fn reset(src: &str, dst: &str, flags: u8) -> Vec<u8> {
    assert_eq!(
        flags, SYN,
        "other segments are refused with their own acknowledgement"
    );
    let mut packet = tcp(src, dst, RST | ACK, b"");
    let window_and_numbers = [
        (38..42, vec![0; 4]),
        (42..46, vec![1, 2, 3, 5]),
        (48..50, vec![0; 2]),
    ];
    for (range, bytes) in window_and_numbers {
        packet[range].copy_from_slice(&bytes);
    }
    fix_ip_header(&mut packet);
    fix_checksum(&mut packet, 50, true);
    packet
}

/// ICMP port unreachable for a datagram.
fn unreachable(datagram: &[u8]) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend(&datagram[14..42]);
    let text = |at: usize| {
        format!(
            "{}.{}.{}.{}:0",
            datagram[at],
            datagram[at + 1],
            datagram[at + 2],
            datagram[at + 3]
        )
    };
    let mut packet = icmp(&text(30), &text(26), 3, 3, &body);
    fix_ip_header(&mut packet);
    packet
}

/// What the programs write where the builders write otherwise: no identification, "don't fragment"; Ethernet as it came.
fn fix_ip_header(packet: &mut [u8]) {
    packet[18..22].copy_from_slice(&[0, 0, 0x40, 0]);
    fix_sum(packet);
}

fn fix_sum(packet: &mut [u8]) {
    packet[24..26].fill(0);
    let sum = sum(&packet[14..34], 0);
    packet[24..26].copy_from_slice(&sum.to_be_bytes());
}

fn fix_checksum(packet: &mut [u8], at: usize, pseudo: bool) {
    packet[at..at + 2].fill(0);
    let len = (packet.len() - 34) as u32;
    let initial = if pseudo {
        packet[23] as u32 + len + !sum(&packet[26..34], 0) as u32
    } else {
        0
    };
    let field = sum(&packet[34..], initial);
    packet[at..at + 2].copy_from_slice(&field.to_be_bytes());
}

fn sum(bytes: &[u8], initial: u32) -> u16 {
    let mut total: u32 = initial
        + bytes
            .chunks(2)
            .map(|pair| (pair[0] as u32) << 8 | pair.get(1).map_or(0, |b| *b as u32))
            .sum::<u32>();
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

#[test]
fn packets_leave_the_loaded_programs_as_the_table_says() {
    if !is_root("packet table") {
        return;
    }
    for row in rows() {
        let sandbox = Sandbox::enter().unwrap();
        let config = Config {
            service_veth: Some(ServiceVeth { outer: 1, inner: 1 }),
            node_v4: Some([198, 18, 0, 1].into()),
            ..Config::new(sandbox.pin_root())
        };
        let mut dataplane = Dataplane::open(&config).unwrap();
        let mut ops = state(&row.backends);
        // A second Service of the same backends.
        let second = Frontend {
            addr: [10, 96, 0, 2].into(),
            port: 80,
            protocol: Protocol::Udp,
        };
        ops.push(Op::SetService {
            id: ServiceId(2),
            backends: row.backends.clone(),
        });
        ops.push(Op::SetFrontend {
            frontend: second,
            lead: Lead::to(ServiceId(2)),
        });
        dataplane.apply(&ops).unwrap();
        for (number, Step(program, packet, verdict, out)) in row.steps.into_iter().enumerate() {
            let run = dataplane.run(program, &packet, A, 1).unwrap();
            let place = format!("{}: step {} at {}", row.name, number + 1, program.name());
            assert_eq!(run.verdict, verdict, "{place}: verdict");
            if let Some(out) = out {
                assert_eq!(hex(&run.packet), hex(&out), "{place}: packet");
            }
        }
        let counted: BTreeMap<Reason, u64> = dataplane.counters().unwrap().into_iter().collect();
        let wanted: BTreeMap<Reason, u64> = row.counters.iter().copied().collect();
        for (reason, count) in &counted {
            match wanted.get(reason) {
                Some(want) => assert_eq!(count, want, "{}: {}", row.name, reason.name()),
                None if reason.class() != Class::Event => {
                    assert_eq!(*count, 0, "{}: {}", row.name, reason.name())
                }
                None => {}
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(" ")
}
