//! Elements of a hash that the kernel gives to another key while a program reads them.

use std::sync::atomic::{AtomicBool, Ordering};

use dataplane_abi::{FrontendKey, Reason, proto};
use keelway_agent::dataplane::{
    Frontend, Lead, Op, PacketProgram::PodIngress, Protocol, ServiceBackends, ServiceId, Vip,
};
use keelway_tests::sandbox::is_root;

use crate::{A, family::Family, fresh::Fresh, hex, rows::REDIRECT, run};

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
