//! The data plane as a table: packets and map state in; verdict, packets and counters out, of the programs as the kernel
//! loaded them, every row in both families. Nothing is sent: the kernel runs each program on each packet (BPF_PROG_TEST_RUN).

mod family;
mod flows;
mod fresh;
mod random;
mod reused;
mod rows;
mod rows_sctp;
mod rows_v4;
mod rows_v6;
mod same_port;
mod size;
mod sums;
mod told;
mod too_big;

use std::{collections::BTreeMap, fs, net::IpAddr};

use dataplane_abi::{Class, Reason};
use keelway_agent::dataplane::{
    Config, Dataplane, Frontend, Lead, LocalPod, Op, PacketProgram, Protocol, ServiceBackends,
    ServiceId, ServiceVeth, Vip,
};
use keelway_tests::{
    packets::{checksums_are_right, sctp_chunk, tcp_flag::SYN},
    sandbox::{Sandbox, ip, is_root},
};

use crate::{
    family::Family,
    fresh::Fresh,
    rows::{PASS, REDIRECT, Row, Step, rows},
};

/// Pod A, behind the interface that every packet comes by: the kernel wants one that exists.
const A: u32 = 1;
const B: u32 = 12;

/// Pods A 10.0.0.11 and B 10.0.0.12, the host 198.18.0.1; the backends are reached by the Service 10.96.0.1:80, by UDP and SCTP
/// also by 10.96.0.2:80, by the node ports 30080 and, for clients here, 30081, and from 203.0.113.0/24 by 192.0.2.1:80.
fn state(family: Family, backends: &ServiceBackends) -> Vec<Op> {
    let (first, second, silent) = (ServiceId(1), ServiceId(2), ServiceId(3));
    let pod = |address: &str, ifindex| Op::SetPod {
        addr: family.ip(address),
        pod: LocalPod {
            ifindex,
            mac: [2; 6],
            queued: false,
        },
    };
    let vip = |address: &str, kind| Op::SetVip {
        addr: family.ip(address),
        kind,
    };
    let service = |id, backends: &ServiceBackends| Op::SetService {
        id,
        backends: backends.clone(),
    };
    let mut ops = vec![
        pod("10.0.0.11", A),
        pod("10.0.0.12", B),
        Op::SetHostAddress {
            addr: family.ip("198.18.0.1"),
        },
        vip("10.96.0.1", Vip::Cluster),
        vip("192.0.2.1", Vip::External),
        service(first, backends),
        service(second, backends),
        service(
            silent,
            &ServiceBackends {
                silent: true,
                ..ServiceBackends::default()
            },
        ),
        Op::SetUnmasqueraded {
            ranges: [family.range("10.0.0.0/8")].into(),
        },
        Op::SetSources {
            id: first,
            sources: [family.range("203.0.113.0/24")].into(),
        },
    ];
    let everybody = Lead::to(first);
    let local = Lead {
        external: silent,
        ..everybody
    };
    let guarded = Lead {
        guarded: true,
        ..everybody
    };
    let (tcp, udp, sctp) = (Protocol::Tcp, Protocol::Udp, Protocol::Sctp);
    for (at, protocols, lead) in [
        ("10.96.0.1:80", &[tcp, udp, sctp][..], everybody),
        ("10.96.0.2:80", &[udp, sctp], Lead::to(second)),
        ("0.0.0.0:30080", &[tcp, udp, sctp], everybody),
        ("0.0.0.0:30081", &[tcp, udp], local),
        ("192.0.2.1:80", &[tcp, udp], guarded),
    ] {
        let at = family.at(at);
        ops.extend(protocols.iter().map(|protocol| Op::SetFrontend {
            frontend: Frontend {
                addr: at.ip(),
                port: at.port(),
                protocol: *protocol,
            },
            lead,
        }));
    }
    ops
}

/// A data plane of its own, with a way out: the kernel looks it up, though nothing is sent.
fn opened(sandbox: &Sandbox, masquerade: bool) -> Dataplane {
    ip("route add default dev lo").unwrap();
    ip("-6 route add default dev lo").unwrap();
    for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        fs::write(format!("/proc/sys/net/{key}"), "1").unwrap();
    }
    let IpAddr::V6(node_v6) = Family::V6.ip("198.18.0.1") else {
        panic!("an address of the other family");
    };
    Dataplane::open(&Config {
        service_veth: Some(ServiceVeth { outer: 1, inner: 1 }),
        node_v4: Some([198, 18, 0, 1].into()),
        node_v6: Some(node_v6),
        masquerade,
        ..Config::new(sandbox.pin_root())
    })
    .unwrap()
}

fn run(dataplane: &Dataplane, program: PacketProgram, packet: &[u8]) -> (i32, Vec<u8>) {
    let run = dataplane.run(program, packet, A, 1).unwrap();
    (run.verdict, run.packet)
}

#[test]
fn packets_leave_the_loaded_programs_as_the_table_says_over_ipv4() {
    let rows = rows(Family::V4).into_iter().chain(rows_v4::rows());
    check_all(Family::V4, rows.collect());
}

#[test]
fn packets_leave_the_loaded_programs_as_the_table_says_over_ipv6() {
    let rows = rows(Family::V6).into_iter().chain(rows_v6::rows());
    check_all(Family::V6, rows.collect());
}

#[test]
fn associations_leave_the_loaded_programs_as_the_table_says() {
    for family in Family::ALL {
        check_all(family, rows_sctp::rows(family));
    }
}

fn check_all(family: Family, rows: Vec<Row>) {
    if !is_root("packet table") {
        return;
    }
    let mut fresh = Fresh::open();
    for row in rows {
        fresh.begin(family, &row.backends);
        check(&fresh, family, row);
    }
}

fn check(fresh: &Fresh, family: Family, row: Row) {
    let name = format!("{family:?}: {}", row.name);
    for (number, Step(program, packet, verdict, out)) in row.steps.into_iter().enumerate() {
        let place = format!("{name}: step {} at {}", number + 1, program.name());
        let (got, packet) = run(&fresh.dataplane, program, &packet);
        assert_eq!(got, verdict, "{place}: verdict");
        if let Some(out) = out {
            assert_eq!(hex(&packet), hex(&out), "{place}: packet");
        }
    }
    let counted = fresh.counters();
    let wanted: BTreeMap<Reason, u64> = row.counters.iter().copied().collect();
    for (reason, count) in &counted {
        match wanted.get(reason) {
            Some(want) => assert_eq!(count, want, "{name}: {}", reason.name()),
            None if reason.class() != Class::Event => {
                assert_eq!(*count, 0, "{name}: {}", reason.name())
            }
            None => {}
        }
    }
}

/// The source port that a packet leaves with.
fn source_port(family: Family, packet: &[u8]) -> u16 {
    let at = family.l4();
    u16::from_be_bytes([packet[at], packet[at + 1]])
}

#[test]
fn the_node_stands_in_for_clients_outside_whose_answers_must_come_back_here() {
    if !is_root("source translation") {
        return;
    }
    let (client, asked, there) = ("203.0.113.9:5000", "198.18.0.1:30080", "10.0.1.13:8080");
    let uplink = PacketProgram::UplinkIngress;
    for family in Family::ALL {
        let tcp = |src: &str, dst: &str, text: &[u8]| family.tcp(src, dst, SYN, text);
        let sandbox = Sandbox::enter().unwrap();
        let mut dataplane = opened(&sandbox, false);
        let backends = family.backends(&[there], &[]);
        dataplane.apply(&state(family, &backends)).unwrap();
        let (verdict, out) = run(&dataplane, uplink, &tcp(client, asked, b"hi"));
        assert_eq!(verdict, REDIRECT, "{family:?}");
        assert!(checksums_are_right(&out));
        let node = format!("198.18.0.1:{}", source_port(family, &out));
        assert_eq!(hex(&out), hex(&tcp(&node, there, b"hi")));
        let (verdict, back) = run(&dataplane, uplink, &tcp(there, &node, b"you"));
        assert_eq!(verdict, REDIRECT, "{family:?}");
        assert_eq!(hex(&back), hex(&tcp(asked, client, b"you")));
        let counters: BTreeMap<Reason, u64> = dataplane.counters().unwrap().into_iter().collect();
        assert_eq!(counters[&Reason::SourceNat], 1);
    }
}

#[test]
fn a_pod_leaves_the_cluster_as_the_node() {
    if !is_root("masquerade") {
        return;
    }
    for family in Family::ALL {
        leaves_as_the_node(family);
    }
}

fn leaves_as_the_node(family: Family) {
    use PacketProgram::{PodIngress, UplinkIngress};
    let (pod, there) = ("10.0.0.11:4000", "198.51.100.1:443");
    let sandbox = Sandbox::enter().unwrap();
    let mut dataplane = opened(&sandbox, true);
    let nothing = family.backends(&[], &[]);
    dataplane.apply(&state(family, &nothing)).unwrap();
    let segment = |src: &str, dst: &str, text: &[u8]| family.tcp(src, dst, SYN, text);
    let datagram = |src: &str, dst: &str, text: &[u8]| family.udp(src, dst, text);
    let chunk = |src: &str, dst: &str, text: &[u8]| family.sctp(src, dst, sctp_chunk::INIT, text);
    for build in [
        &segment as &dyn Fn(&str, &str, &[u8]) -> Vec<u8>,
        &datagram,
        &chunk,
    ] {
        let (verdict, out) = run(&dataplane, PodIngress, &build(pod, there, b"odd"));
        assert_eq!(verdict, REDIRECT, "{family:?}");
        let node = format!("198.18.0.1:{}", source_port(family, &out));
        assert_ne!(source_port(family, &out), 4000);
        assert_eq!(hex(&out), hex(&build(&node, there, b"odd")));
        let (verdict, back) = run(&dataplane, UplinkIngress, &build(there, &node, b"you"));
        assert_eq!(verdict, REDIRECT, "{family:?}");
        assert_eq!(hex(&back), hex(&build(there, pod, b"you")));
    }
    // An echo under another identifier.
    let [asks, answers] = family.echo_kinds();
    let (node, asked) = ("198.18.0.1:0", [1, 2, 0, 7, 9]);
    let request = family.icmp(pod, there, asks, &asked);
    let (verdict, out) = run(&dataplane, PodIngress, &request);
    assert_eq!(verdict, REDIRECT, "{family:?}");
    let id = family.l4() + 4;
    let body = [out[id], out[id + 1], 0, 7, 9];
    assert_ne!(body[..2], [1, 2]);
    assert_eq!(hex(&out), hex(&family.icmp(node, there, asks, &body)));
    let answer = family.icmp(there, node, answers, &body);
    let (verdict, back) = run(&dataplane, UplinkIngress, &answer);
    assert_eq!(verdict, REDIRECT, "{family:?}");
    let heard = family.icmp(there, pod, answers, &asked);
    assert_eq!(hex(&back), hex(&heard));
    // A router's errors about what left are the pod's, and quote what it sent: but for the sum, which is left as it left.
    for (sent, sum_at) in [
        (segment(pod, there, b"odd"), None),
        (chunk(pod, there, b"odd"), None),
        (request, Some(family.l4() + 2)),
    ] {
        let (_, out) = run(&dataplane, PodIngress, &sent);
        let error = family.port_unreachable("198.18.0.9:0", &out);
        let (verdict, back) = run(&dataplane, UplinkIngress, &error);
        let mut sent = sent;
        if let Some(at) = sum_at {
            sent[at..at + 2].copy_from_slice(&out[at..at + 2]);
        }
        let for_the_pod = family.port_unreachable("198.18.0.9:0", &sent);
        assert_eq!(verdict, REDIRECT, "{family:?}");
        assert_eq!(hex(&back), hex(&for_the_pod));
    }
    // What stays in the cluster stays as it is.
    let inside = segment(pod, "10.0.1.13:80", b"");
    assert_eq!(run(&dataplane, PodIngress, &inside), (PASS, inside.clone()));
    let counters: BTreeMap<Reason, u64> = dataplane.counters().unwrap().into_iter().collect();
    assert_eq!(counters[&Reason::Masqueraded], 7);
    assert_eq!(counters[&Reason::IcmpTranslated], 3);
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(" ")
}
