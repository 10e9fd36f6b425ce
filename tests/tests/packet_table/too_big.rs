//! Packets that are longer than their way takes: their senders hear of it, whatever the packets have become by then.

use std::collections::BTreeMap;

use dataplane_abi::Reason;
use keelway_agent::dataplane::{
    Dataplane, LocalPod, Op,
    PacketProgram::{self, PodIngress, ServiceIngress, UplinkIngress},
};
use keelway_tests::{
    packets::{checksums_are_right, tcp_flag::ACK},
    sandbox::{Sandbox, ip, is_root},
};

use crate::{
    A,
    family::{Family, Fragment, into_the_host},
    hex, opened,
    rows::{DROP, REDIRECT},
    run, source_port, state,
};

/// What the interface takes behind which 198.51.100.0/24 and the pod 10.0.0.13 are, and the route to 198.51.101.0/24.
const NARROW: u16 = 1400;
const LOCKED: u16 = 1300;

fn narrowed(family: Family, sandbox: &Sandbox, backends: &[&str]) -> Dataplane {
    let mut dataplane = opened(sandbox, true);
    ip("link add narrow mtu 1400 type veth peer name narrower").unwrap();
    for end in ["narrow", "narrower"] {
        ip(&format!("link set {end} up")).unwrap();
    }
    for (range, way) in [
        ("198.51.100.0/24", "dev narrow".to_owned()),
        ("10.0.0.13/32", "dev narrow".to_owned()),
        ("198.51.101.0/24", format!("dev lo mtu lock {LOCKED}")),
    ] {
        ip(&format!("route add {} {way}", family.range(range))).unwrap();
    }
    dataplane
        .apply(&state(family, &family.backends(backends, &[])))
        .unwrap();
    // Behind its queue packets go by the host's routes.
    dataplane
        .apply(&[Op::SetPod {
            addr: family.ip("10.0.0.13"),
            pod: LocalPod {
                ifindex: 13,
                mac: [2; 6],
                queued: true,
            },
        }])
        .unwrap();
    dataplane
}

/// Makes a packet around bytes.
type Build<'a> = &'a dyn Fn(&[u8]) -> Vec<u8>;

/// A packet that is this long, from the IP header on.
fn filled(len: u16, build: Build<'_>) -> Vec<u8> {
    let headers = build(&[]).len() - 14;
    let filling: Vec<u8> = (0..usize::from(len) - headers).map(|at| at as u8).collect();
    build(&filling)
}

fn refused(dataplane: &Dataplane, program: PacketProgram, sent: &[u8], told: &[u8]) {
    let (verdict, heard) = run(dataplane, program, sent);
    assert_eq!(verdict, REDIRECT, "{}", program.name());
    assert_eq!(hex(&heard), hex(told), "{}", program.name());
    assert!(checksums_are_right(&heard));
}

#[test]
fn a_pod_hears_how_long_a_packet_may_be_that_leaves_as_the_node() {
    if !is_root("packets that are too big as the node") {
        return;
    }
    for family in Family::ALL {
        let sandbox = Sandbox::enter().unwrap();
        let dataplane = narrowed(family, &sandbox, &[]);
        let pod = "10.0.0.11:4000";
        let [asks, _] = family.echo_kinds();
        let mut told = 0;
        for (there, takes) in [("198.51.100.1:443", NARROW), ("198.51.101.1:443", LOCKED)] {
            let segment = |text: &[u8]| family.tcp(pod, there, ACK, text);
            let datagram = |text: &[u8]| family.udp(pod, there, text);
            let echo = |text: &[u8]| family.icmp(pod, there, asks, &[&[1, 2, 0, 7], text].concat());
            let builders: [Build<'_>; 3] = [&segment, &datagram, &echo];
            for build in builders {
                let fits = filled(takes, build);
                let (verdict, out) = run(&dataplane, PodIngress, &fits);
                assert_eq!((verdict, out.len()), (REDIRECT, fits.len()), "{family:?}");
                for longer in [1, 50] {
                    let sent = filled(takes + longer, build);
                    let error = family.too_big(&sent, takes);
                    refused(&dataplane, PodIngress, &sent, &error);
                    told += 1;
                }
            }
            // What hardware cuts is as long as what it is cut into.
            let headers = family.l4() as u32 - 14;
            let big = filled(3000, &segment);
            let takes_of_each = u32::from(takes) - headers - 20;
            for (more, is_told) in [(0, false), (1, true)] {
                let run = dataplane
                    .run_segmented(PodIngress, &big, A, takes_of_each + more)
                    .unwrap();
                assert_eq!(run.verdict, REDIRECT);
                if is_told {
                    let error = family.too_big(&big, takes);
                    assert_eq!(hex(&run.packet), hex(&error));
                    told += 1;
                } else {
                    assert_eq!(run.packet.len(), big.len());
                }
            }
        }
        let counters: BTreeMap<Reason, u64> = dataplane.counters().unwrap().into_iter().collect();
        assert_eq!(counters[&Reason::TooBig], told);
        assert_eq!(counters[&Reason::NoRoute], 0);
    }
}

#[test]
fn clients_of_services_and_their_endpoints_hear_how_long_a_packet_may_be() {
    if !is_root("packets that are too big for Services") {
        return;
    }
    for family in Family::ALL {
        let sandbox = Sandbox::enter().unwrap();
        let dataplane = narrowed(family, &sandbox, &["198.51.100.9:8080"]);
        // Clients outside, and processes of the node.
        for (program, client, asked) in [
            (UplinkIngress, "203.0.113.9:5000", "198.18.0.1:30080"),
            (UplinkIngress, "203.0.113.9:5000", "192.0.2.1:80"),
            (ServiceIngress, "198.18.0.1:5000", "10.96.0.1:80"),
        ] {
            let datagram = |text: &[u8]| family.udp(client, asked, text);
            let sent = filled(1500, &datagram);
            let mut told = family.too_big(&sent, NARROW);
            if program == ServiceIngress {
                told = into_the_host(told);
            }
            refused(&dataplane, program, &sent, &told);
        }
        // An endpoint here, whose answer to a client there is too long.
        let sandbox = Sandbox::enter().unwrap();
        let dataplane = narrowed(family, &sandbox, &["10.0.0.11:8080"]);
        let client = "198.51.100.7:5000";
        let asks = family.udp(client, "198.18.0.1:30080", b"x");
        let (verdict, seen) = run(&dataplane, UplinkIngress, &asks);
        assert_eq!((verdict, source_port(family, &seen)), (REDIRECT, 5000));
        let answer = |text: &[u8]| family.udp("10.0.0.11:8080", client, text);
        let sent = filled(1450, &answer);
        let told = family.too_big(&sent, NARROW);
        refused(&dataplane, PodIngress, &sent, &told);
        // A pod behind a queue, to which packets go as they came.
        let direct = |text: &[u8]| family.udp("203.0.113.9:5000", "10.0.0.13:53", text);
        let sent = filled(1450, &direct);
        let told = family.too_big(&sent, NARROW);
        refused(&dataplane, UplinkIngress, &sent, &told);
        let counters: BTreeMap<Reason, u64> = dataplane.counters().unwrap().into_iter().collect();
        assert_eq!(counters[&Reason::TooBig], 2);
    }
}

#[test]
fn of_what_is_too_big_only_those_are_told_who_can_be() {
    if !is_root("packets that are too big, and nobody's") {
        return;
    }
    for family in Family::ALL {
        let sandbox = Sandbox::enter().unwrap();
        let dataplane = narrowed(family, &sandbox, &["198.51.100.9:8080"]);
        // The first part of a datagram is answered, with its ports; of the later ones nobody could tell whose they are.
        let long = |part| {
            let mut packet = family.fragment(part, 7);
            packet.resize(1514, 7);
            let len = match family {
                Family::V4 => 16,
                Family::V6 => 18,
            };
            let bytes = 1500 - if family == Family::V4 { 0 } else { 40 };
            packet[len..len + 2].copy_from_slice(&u16::to_be_bytes(bytes));
            if family == Family::V4 {
                crate::family::fix_header(&mut packet);
            }
            packet
        };
        let sent = long(Fragment::First);
        let (verdict, heard) = run(&dataplane, PodIngress, &sent);
        assert_eq!(verdict, REDIRECT);
        assert_eq!(hex(&heard), hex(&family.too_big(&sent, NARROW)));
        assert_eq!(run(&dataplane, PodIngress, &long(Fragment::Later)).0, DROP);
        // No error about an error.
        let [asks, _] = family.echo_kinds();
        let about = family.icmp("203.0.113.9:0", "10.0.0.13:0", asks, &[0; 1400]);
        let error = match family {
            Family::V4 => 3,
            Family::V6 => 1,
        };
        let body = [&[0; 4], &about[14..]].concat();
        let error = family.icmp("203.0.113.9:0", "10.0.0.13:0", error, &body);
        assert_eq!(run(&dataplane, UplinkIngress, &error).0, DROP);
        let counters: BTreeMap<Reason, u64> = dataplane.counters().unwrap().into_iter().collect();
        assert_eq!(counters[&Reason::TooBig], 3);
    }
}
