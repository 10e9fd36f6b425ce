//! Elements of a hash that the kernel gives to another key while a program reads them.

use std::sync::atomic::{AtomicBool, Ordering};

use dataplane_abi::{
    Flow, FlowKey, FrontendKey, Plain as _, Reason, SEEN_DISPATCHED, SEEN_REPLY, proto,
};
use keelway_agent::dataplane::{
    Frontend, Lead, Op,
    PacketProgram::{PodIngress, UplinkIngress},
    Peers, Protocol, ServiceBackends, ServiceId, Vip,
};
use keelway_tests::{
    packets::tcp_flag::{ACK, SYN},
    sandbox::is_root,
};

use crate::{
    A,
    family::Family,
    fresh::{Entry, Fresh, Tuple},
    hex,
    rows::REDIRECT,
    run,
};

/// The key of a frontend of UDP, in words as they lie in the map.
fn key(family: Family, at: &str) -> [u32; 6] {
    let at = family.at(at);
    let FrontendKey {
        addr, port, proto, ..
    } = FrontendKey::new(at.ip().into(), at.port().to_be(), proto::UDP);
    let [first, second] = addr.words;
    let ports = u32::from(port) | u32::from(proto) << 16;
    let halves = |word: u64| [word as u32, (word >> 32) as u32];
    let ([a, b], [c, d]) = (halves(first), halves(second));
    [a, b, c, d, ports, 0]
}

#[test]
fn what_lies_under_a_frontend_and_is_anothers_leads_nobody() {
    if !is_root("a frontend with what is another's") {
        return;
    }
    let mut fresh = Fresh::open();
    for family in Family::ALL {
        fresh.begin(family, &family.backends(&["10.0.0.12:8080"], &[]));
        let asks = |port: u16| family.udp(&format!("10.0.0.11:{port}"), "10.96.0.1:80", b"x");
        let mut frontends = fresh.frontends();
        let [own, other] = ["10.96.0.1:80", "0.0.0.0:30080"].map(|at| key(family, at));
        let lead = frontends.get(&own, 0).unwrap();
        let others = frontends.get(&other, 0).unwrap();
        assert_eq!(run(&fresh.dataplane, PodIngress, &asks(4000)).0, REDIRECT);
        // Whole, or one of the two words: which is written first is the kernel's.
        let [a, b, c, d] = lead;
        let [e, f, g, h] = others;
        for (port, lies) in (4001..).zip([others, [e, f, c, d], [a, b, g, h]]) {
            frontends.insert(own, lies, 0).unwrap();
            let datagram = asks(port);
            let (_, refusal) = run(&fresh.dataplane, PodIngress, &datagram);
            assert_eq!(hex(&refusal), hex(&family.refusal(&datagram)));
        }
        assert_eq!(fresh.counters()[&Reason::NoSuchPort], 3);
        frontends.insert(own, lead, 0).unwrap();
        assert_eq!(run(&fresh.dataplane, PodIngress, &asks(4004)).0, REDIRECT);
    }
}

#[test]
fn packets_are_led_by_their_own_frontend_however_often_it_and_others_are_written() {
    if !is_root("frontends that are written") {
        return;
    }
    const PACKETS: u32 = 2_000_000;
    let family = Family::V4;
    let mut fresh = Fresh::open();
    fresh.begin(family, &family.backends(&[], &[]));
    let silent = ServiceBackends {
        silent: true,
        ..ServiceBackends::default()
    };
    // Both drop what asks them as it is, for reasons of their own; the second lets nobody in.
    let (first, second) = (ServiceId(50), ServiceId(51));
    let mut ops = Vec::new();
    for (id, at, guarded) in [
        (first, "10.96.0.50:80", false),
        (second, "10.96.0.51:80", true),
    ] {
        let at = family.at(at);
        let frontend = Frontend {
            addr: at.ip(),
            port: at.port(),
            protocol: Protocol::Udp,
        };
        let lead = Lead {
            guarded,
            ..Lead::to(id)
        };
        ops.extend([
            Op::SetService {
                id,
                backends: silent.clone(),
            },
            Op::SetFrontend { frontend, lead },
            Op::SetVip {
                addr: at.ip(),
                kind: Vip::Cluster,
            },
        ]);
    }
    fresh.dataplane.apply(&ops).unwrap();
    let mut frontends = fresh.frontends();
    let entries = ["10.96.0.50:80", "10.96.0.51:80"].map(|at| {
        let key = key(family, at);
        (key, frontends.get(&key, 0).unwrap())
    });
    let stop = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        // Each write frees an element, which the next one takes.
        let writing = scope.spawn(|| {
            let mut written = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                for (key, lead) in entries {
                    frontends.insert(key, lead, 0).unwrap();
                    written += 1;
                }
            }
            written
        });
        let datagram = family.udp("10.0.0.11:4000", "10.96.0.50:80", b"x");
        let ran = fresh.dataplane.run(PodIngress, &datagram, A, PACKETS);
        stop.store(true, Ordering::Relaxed);
        ran.unwrap();
        writing.join().unwrap()
    });
    assert!(written > 0);
    // Hardly ever an element is missed that is replaced again and again as it is looked up: no answer, where a refusal would be believed. It
    // would also take the packet's place in what follows.
    let counters = fresh.counters();
    let led = counters[&Reason::NoLocalBackend];
    let missed = counters[&Reason::ServiceTorn];
    assert_eq!(led + missed, u64::from(PACKETS));
    assert!(missed < u64::from(PACKETS) / 10_000, "{missed} missed");
    assert_eq!(counters[&Reason::SourceRange], 0);
}

/// The key of a flow's side, in words.
fn tuple(family: Family, src: &str, dst: &str) -> Tuple {
    let [src, dst] = [src, dst].map(|at| family.at(at));
    let ports = [src, dst].map(|at| at.port().to_be());
    let key = FlowKey::new(
        src.ip().into(),
        dst.ip().into(),
        ports[0],
        ports[1],
        proto::TCP,
    );
    Tuple::read_from(key.as_bytes()).unwrap()
}

#[test]
fn what_lies_under_a_flows_tuple_and_is_anothers_leads_nobody() {
    if !is_root("a flow with what is another's") {
        return;
    }
    let mut fresh = Fresh::open();
    let (backend, service) = ("10.0.0.12:8080", "10.96.0.1:80");
    let (own, other) = ("10.0.0.11:4000", "10.0.0.11:5000");
    for family in Family::ALL {
        // Before and after the first answer, which moves flows to the other table.
        for is_answered in [false, true] {
            fresh.begin(family, &family.backends(&[backend], &[]));
            for pod in [own, other] {
                let opening = family.tcp(pod, service, SYN, b"");
                let opened = (REDIRECT, family.tcp(pod, backend, SYN, b""));
                assert_eq!(run(&fresh.dataplane, PodIngress, &opening), opened);
                if is_answered {
                    let answer = family.tcp(backend, pod, SYN | ACK, b"");
                    let heard = (REDIRECT, family.tcp(service, pod, SYN | ACK, b""));
                    assert_eq!(run(&fresh.dataplane, UplinkIngress, &answer), heard);
                }
            }
            let mut flows = match is_answered {
                true => fresh.flows(),
                false => fresh.unreplied(),
            };
            // A backend's packet is as it came then, and a client's opens a flow of its own.
            for (ends, program, sent, wanted) in [
                (
                    [own, other].map(|pod| tuple(family, backend, pod)),
                    UplinkIngress,
                    family.tcp(backend, own, SYN | ACK, b""),
                    family.tcp(backend, own, SYN | ACK, b""),
                ),
                (
                    [own, other].map(|pod| tuple(family, pod, service)),
                    PodIngress,
                    family.tcp(own, service, ACK, b"x"),
                    family.tcp(own, backend, ACK, b"x"),
                ),
            ] {
                let [entry, others] = ends.map(|key| flows.get(&key, 0).unwrap());
                // Whole, the other side that it names alone, and all but that.
                for half in [0..16, 0..9, 9..16] {
                    let mut lies = entry;
                    lies[half.clone()].copy_from_slice(&others[half]);
                    flows.insert(ends[0], lies, 0).unwrap();
                    let (_, out) = run(&fresh.dataplane, program, &sent);
                    assert_eq!(hex(&out), hex(&wanted), "{family:?} {is_answered}");
                    assert_eq!(flows.get(&ends[1], 0).unwrap(), others);
                    flows.insert(ends[0], entry, 0).unwrap();
                }
            }
        }
    }
}

#[test]
fn packets_go_by_their_own_flow_however_often_it_and_others_are_entered() {
    if !is_root("flows that are entered") {
        return;
    }
    // Unsealed, one packet in a million went by what had the element of its own flow.
    const PACKETS: u32 = 10_000_000;
    const STRANGERS: u16 = 8;
    let family = Family::V4;
    let mut fresh = Fresh::open();
    fresh.begin(family, &family.backends(&["10.0.1.13:8080"], &[]));
    // What is of a flow that goes to its backend's node as it came is dropped as it is where that node is not known. The strangers' is.
    let peers = Peers::from([("10.2.0.0/24".parse().unwrap(), [2; 6])]);
    fresh.dataplane.apply(&[Op::SetPeers { peers }]).unwrap();
    let (node, client) = ("198.18.0.1:30080", |port| format!("203.0.113.9:{port}"));
    let entry = |port, backend| {
        let client = client(port);
        let key = tuple(family, &client, node);
        let [under, other] = [key, tuple(family, backend, &client)]
            .map(|tuple| FlowKey::read_from(tuple.as_bytes()).unwrap());
        let mut flow = Flow {
            other,
            seen: SEEN_REPLY | SEEN_DISPATCHED,
            service: 2,
            ..Flow::NONE
        };
        flow.seal_under(&under);
        (key, Entry::read_from(flow.as_bytes()).unwrap())
    };
    let own = entry(4000, "10.1.0.1:8080");
    let strangers: Vec<_> = (0..STRANGERS)
        .map(|number| entry(5000 + number, "10.2.0.1:8080"))
        .collect();
    let packet = family.tcp(&client(4000), node, ACK, b"x");
    for mut flows in [fresh.flows(), fresh.unreplied()] {
        let before = fresh.counters();
        flows.insert(own.0, own.1, 0).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Each write frees an element, which the next one takes.
            let writing = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for (key, entry) in &strangers {
                        flows.insert(own.0, own.1, 0).unwrap();
                        flows.insert(key, entry, 0).unwrap();
                    }
                }
            });
            let ran = fresh.dataplane.run(UplinkIngress, &packet, A, PACKETS);
            stop.store(true, Ordering::Relaxed);
            ran.unwrap();
            writing.join().unwrap();
        });
        for (key, _) in strangers.iter().chain([&own]) {
            flows.remove(key).unwrap();
        }
        let counters = fresh.counters();
        let counted = |reason| counters[&reason] - before[&reason];
        assert_eq!(counted(Reason::Dispatched), 0, "strangers' ways");
        // Hardly ever an entry is missed that is replaced again and again as it is looked up.
        let (led, missed) = (counted(Reason::NoRoute), counted(Reason::Passed));
        assert_eq!(led + missed, u64::from(PACKETS));
        assert!(missed < u64::from(PACKETS) / 10_000, "{missed} missed");
    }
}
