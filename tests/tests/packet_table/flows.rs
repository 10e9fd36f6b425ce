//! Many flows, and flows that two CPUs open at once, through the loaded programs.

use std::collections::{BTreeMap, BTreeSet};

use dataplane_abi::{Reason, limits};
use keelway_agent::dataplane::{
    Dataplane, Frontend, Lead, Op,
    PacketProgram::{PodIngress, UplinkIngress},
    Protocol, ServiceId, Vip,
};
use keelway_tests::{
    packets::{
        sctp_chunk::INIT,
        tcp_flag::{ACK, SYN},
    },
    sandbox::{Sandbox, is_root},
};

use crate::{
    family::Family,
    fresh::Fresh,
    hex, opened,
    rows::{DROP, REDIRECT},
    run, source_port, state,
};

#[test]
fn ports_that_are_taken_on_two_cpus_at_once_are_never_the_same() {
    if !is_root("ports") {
        return;
    }
    // More than three of four ports there are for them.
    const CLIENTS: u16 = 6_500;
    let family = Family::V4;
    let sandbox = Sandbox::enter().unwrap();
    let mut dataplane = opened(&sandbox, false);
    let backends = family.backends(&["10.0.1.13:8080"], &[]);
    dataplane.apply(&state(family, &backends)).unwrap();
    let dataplane = &dataplane;
    let ports: Vec<u16> = std::thread::scope(|scope| {
        let open = |first: u16| {
            let client = |port| {
                let client = format!("203.0.113.9:{}", first + port);
                let packet = family.tcp(&client, "198.18.0.1:30080", SYN, b"");
                let (verdict, out) = run(dataplane, UplinkIngress, &packet);
                assert_eq!(verdict, REDIRECT, "{client}");
                source_port(family, &out)
            };
            (0..CLIENTS).map(client).collect::<Vec<u16>>()
        };
        let threads = [10_000, 20_000].map(|first: u16| scope.spawn(move || open(first)));
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    let different: BTreeSet<&u16> = ports.iter().collect();
    assert_eq!(different.len(), usize::from(2 * CLIENTS));
}

#[test]
fn two_datagrams_of_one_socket_at_once_are_both_answered_by_the_service() {
    if !is_root("two at once") {
        return;
    }
    const TIMES: u16 = 500;
    let family = Family::V4;
    let sandbox = Sandbox::enter().unwrap();
    let mut dataplane = opened(&sandbox, false);
    let backends = family.backends(&["10.0.0.12:8080", "10.0.1.13:8080"], &[]);
    dataplane.apply(&state(family, &backends)).unwrap();
    let (dataplane, service) = (&dataplane, "10.96.0.1:80");
    let start = &std::sync::Barrier::new(2);
    // As a resolver asks for both kinds of addresses: two questions from one port, before there is any answer.
    let ask = move || {
        let client = |port| {
            let client = format!("10.0.0.11:{}", 40_000 + port);
            start.wait();
            run(dataplane, PodIngress, &family.udp(&client, service, b"x")).1
        };
        (0..TIMES).map(client).collect::<Vec<_>>()
    };
    let asked: Vec<Vec<Vec<u8>>> = std::thread::scope(|scope| {
        let threads = [scope.spawn(ask), scope.spawn(ask)];
        threads.map(|thread| thread.join().unwrap()).into()
    });
    for (port, packets) in (0..TIMES).zip(asked[0].iter().zip(&asked[1])) {
        let client = format!("10.0.0.11:{}", 40_000 + port);
        for packet in [packets.0, packets.1] {
            let backend = format!("10.0.{}.{}:8080", packet[32], packet[33]);
            // Where the other one came first by another backend, this one may have come under another port.
            let seen = format!("10.0.0.11:{}", source_port(family, packet));
            assert_eq!(hex(packet), hex(&family.udp(&seen, &backend, b"x")));
            let answer = family.udp(&backend, &seen, b"answer");
            let (verdict, heard) = run(dataplane, UplinkIngress, &answer);
            assert_eq!(verdict, REDIRECT, "{client}");
            assert_eq!(hex(&heard), hex(&family.udp(service, &client, b"answer")));
        }
    }
}

#[test]
fn an_opening_that_is_sent_again_goes_to_the_same_backend() {
    if !is_root("openings sent again") {
        return;
    }
    for family in Family::ALL {
        let sandbox = Sandbox::enter().unwrap();
        let mut dataplane = opened(&sandbox, false);
        let backends = family.backends(&["10.0.0.12:8080", "10.0.1.13:8080"], &[]);
        dataplane.apply(&state(family, &backends)).unwrap();
        // By chance alone, as many would not all be alike.
        for port in 4_000..4_020 {
            let (pod, service) = (format!("10.0.0.11:{port}"), "10.96.0.1:80");
            let again = |packet: &[u8]| {
                let [first, second] = [(); 2].map(|()| run(&dataplane, PodIngress, packet));
                assert_eq!(first, second, "{family:?} {port}");
            };
            again(&family.tcp(&pod, service, SYN, b""));
            again(&family.udp(&pod, service, b"question"));
            again(&family.sctp(&pod, service, INIT, b""));
        }
    }
}

#[test]
fn a_flood_of_openings_evicts_no_flow_that_was_answered() {
    if !is_root("flood") {
        return;
    }
    let family = Family::V4;
    let sandbox = Sandbox::enter().unwrap();
    let mut dataplane = opened(&sandbox, false);
    // On this node, so that clients outside need no port of the node's, of which there are fewer.
    let backend = "10.0.0.12:8080";
    let backends = family.backends(&[backend], &[]);
    dataplane.apply(&state(family, &backends)).unwrap();
    let (pod, service) = ("10.0.0.11:4000", "10.96.0.1:80");
    run(&dataplane, PodIngress, &family.tcp(pod, service, SYN, b""));
    let answer = family.tcp(backend, pod, SYN | ACK, b"");
    let heard = (REDIRECT, family.tcp(service, pod, SYN | ACK, b""));
    assert_eq!(run(&dataplane, UplinkIngress, &answer), heard);
    // More than there is room for: each has two entries.
    let flood = limits::FLOWS_UNREPLIED;
    for number in 0..flood {
        let [_, b, c, d] = number.to_be_bytes();
        let from = format!("203.{b}.{c}.{d}:5000");
        let packet = family.tcp(&from, "198.18.0.1:30080", SYN, b"");
        assert_eq!(run(&dataplane, UplinkIngress, &packet).0, REDIRECT);
    }
    let counters: BTreeMap<Reason, u64> = dataplane.counters().unwrap().into_iter().collect();
    assert_eq!(counters[&Reason::FlowCreated], u64::from(flood) + 1);
    // The flow goes on with its backend, both ways.
    let data = family.tcp(pod, service, ACK, b"more");
    let (_, out) = run(&dataplane, PodIngress, &data);
    assert_eq!(hex(&out), hex(&family.tcp(pod, backend, ACK, b"more")));
    let answer = family.tcp(backend, pod, ACK, b"and more");
    let (_, out) = run(&dataplane, UplinkIngress, &answer);
    assert_eq!(hex(&out), hex(&family.tcp(service, pod, ACK, b"and more")));
}

#[test]
fn datagrams_leave_a_service_that_lost_what_they_ask_and_connections_stay() {
    if !is_root("frontends that move") {
        return;
    }
    let mut fresh = Fresh::open();
    let (first, second) = (ServiceId(1), ServiceId(2));
    let (pod, outside) = ("10.0.0.11:4000", "203.0.113.9:4000");
    let (old, new) = ("10.0.0.12:8080", "10.0.0.12:8081");
    for family in Family::ALL {
        fresh.begin(family, &family.backends(&[old], &[]));
        let asks = |fresh: &Fresh, program, from: &str, at: &str| {
            run(&fresh.dataplane, program, &family.udp(from, at, b"x"))
        };
        let led = |from: &str, to: &str| (REDIRECT, family.udp(from, to, b"x"));
        let (vip, node_port) = ("10.96.0.1:80", "198.18.0.1:30080");
        let opening = family.tcp(pod, vip, SYN, b"");
        assert_eq!(run(&fresh.dataplane, PodIngress, &opening).0, REDIRECT);
        let answer = family.tcp(old, pod, SYN | ACK, b"");
        assert_eq!(run(&fresh.dataplane, UplinkIngress, &answer).0, REDIRECT);
        assert_eq!(asks(&fresh, PodIngress, pod, vip), led(pod, old));
        assert_eq!(
            asks(&fresh, UplinkIngress, outside, node_port),
            led(outside, old)
        );
        // Both Services have what is asked for, one after the other; the first goes on with its backend.
        let mut ops = vec![Op::SetService {
            id: second,
            backends: family.backends(&[new], &[]),
        }];
        let frontends = ["10.96.0.1:80", "0.0.0.0:30080"].map(|at| family.at(at));
        for at in frontends {
            ops.extend(
                [Protocol::Tcp, Protocol::Udp].map(|protocol| Op::SetFrontend {
                    frontend: Frontend {
                        addr: at.ip(),
                        port: at.port(),
                        protocol,
                    },
                    lead: Lead::to(second),
                }),
            );
        }
        let renew = |id, backend| Op::RenewService {
            id,
            backends: family.backends(&[backend], &[]),
        };
        ops.push(renew(first, old));
        fresh.dataplane.apply(&ops).unwrap();
        assert_eq!(asks(&fresh, PodIngress, pod, vip), led(pod, new));
        assert_eq!(
            asks(&fresh, UplinkIngress, outside, node_port),
            led(outside, new)
        );
        let data = family.tcp(pod, vip, ACK, b"more");
        let (_, out) = run(&fresh.dataplane, PodIngress, &data);
        assert_eq!(hex(&out), hex(&family.tcp(pod, old, ACK, b"more")));
        // What leads nowhere any more is refused, whatever had it.
        let gone = Op::RemoveFrontend {
            frontend: Frontend {
                addr: frontends[0].ip(),
                port: 80,
                protocol: Protocol::Udp,
            },
        };
        let ops = [gone, renew(second, new)];
        fresh.dataplane.apply(&ops).unwrap();
        let (_, refusal) = asks(&fresh, PodIngress, pod, vip);
        assert_eq!(
            hex(&refusal),
            hex(&family.refusal(&family.udp(pod, vip, b"x")))
        );
    }
}

#[test]
fn a_flood_of_answered_openings_on_a_full_table_is_counted_and_ends_no_flow() {
    if !is_root("a full table") {
        return;
    }
    const FLOOD: u32 = 2_000;
    let family = Family::V4;
    let mut fresh = Fresh::open();
    let backend = "10.0.0.12:8080";
    fresh.begin(family, &family.backends(&[backend], &[]));
    let (pod, service) = ("10.0.0.11:4000", "10.96.0.1:80");
    let open = |fresh: &Fresh, client: &str| {
        let opening = family.tcp(client, "198.18.0.1:30080", SYN, b"");
        assert_eq!(run(&fresh.dataplane, UplinkIngress, &opening).0, REDIRECT);
        let answer = family.tcp(backend, client, SYN | ACK, b"");
        let (verdict, heard) = run(&fresh.dataplane, UplinkIngress, &answer);
        assert_eq!(verdict, REDIRECT, "{client}");
        let wanted = family.tcp("198.18.0.1:30080", client, SYN | ACK, b"");
        assert_eq!(hex(&heard), hex(&wanted));
    };
    let opening = family.tcp(pod, service, SYN, b"");
    assert_eq!(run(&fresh.dataplane, PodIngress, &opening).0, REDIRECT);
    let answer = family.tcp(backend, pod, SYN | ACK, b"");
    assert_eq!(run(&fresh.dataplane, UplinkIngress, &answer).0, REDIRECT);
    // Others' flows, as many as there is room for.
    let mut flows = fresh.flows();
    let others = (0..u64::from(fresh.dataplane.flows_max())).map(|n| [n, !0, 0, 0, 0]);
    let mut last = [0; 5];
    for other in others {
        match flows.insert(other, [0; 16], 0) {
            Ok(()) => last = other,
            Err(_) => break,
        }
    }
    for number in 0..FLOOD {
        let [_, b, c, d] = number.to_be_bytes();
        open(&fresh, &format!("203.{b}.{c}.{d}:5000"));
    }
    let counted = fresh.counters();
    assert_eq!(counted[&Reason::FlowTableFull], u64::from(FLOOD));
    // The flow that was answered before goes on, and so do those of the flood whose clients do.
    let data = family.tcp(pod, service, ACK, b"more");
    let (_, out) = run(&fresh.dataplane, PodIngress, &data);
    assert_eq!(hex(&out), hex(&family.tcp(pod, backend, ACK, b"more")));
    let client = "203.0.0.7:5000";
    let data = family.tcp(client, "198.18.0.1:30080", ACK, b"more");
    let (_, out) = run(&fresh.dataplane, UplinkIngress, &data);
    assert_eq!(hex(&out), hex(&family.tcp(client, backend, ACK, b"more")));
    // With room again, the next one is kept.
    let replied = counted[&Reason::FlowReplied];
    for other in [last, [0, !0, 0, 0, 0]] {
        flows.remove(&other).unwrap();
    }
    open(&fresh, "203.1.0.1:5000");
    assert_eq!(fresh.counters()[&Reason::FlowReplied], replied + 1);
}

#[test]
fn datagrams_to_an_address_outside_go_by_the_service_that_gets_it_and_out_again_when_that_is_gone()
{
    if !is_root("an address outside that becomes a Service's") {
        return;
    }
    for family in Family::ALL {
        let sandbox = Sandbox::enter().unwrap();
        let mut dataplane = opened(&sandbox, true);
        let backends = family.backends(&["10.0.0.12:8080"], &[]);
        dataplane.apply(&state(family, &backends)).unwrap();
        let (pod, there, other) = ("10.0.0.11:4000", "198.51.100.1:53", "198.51.100.1:54");
        let [asks, _] = family.echo_kinds();
        let echo = family.icmp(pod, there, asks, &[1, 2, 0, 7]);
        let at = family.at(there);
        let vip = at.ip();
        let frontend = Frontend {
            addr: vip,
            port: at.port(),
            protocol: Protocol::Udp,
        };
        // Before and after the first answer.
        for is_answered in [false, true] {
            let ask = |dataplane: &Dataplane, asked: &str| {
                run(dataplane, PodIngress, &family.udp(pod, asked, b"x"))
            };
            let leaves = |dataplane: &Dataplane, asked: &str| {
                let (verdict, out) = ask(dataplane, asked);
                assert_eq!(verdict, REDIRECT);
                let node = format!("198.18.0.1:{}", source_port(family, &out));
                assert_eq!(hex(&out), hex(&family.udp(&node, asked, b"x")));
                if is_answered {
                    let answer = family.udp(asked, &node, b"answer");
                    let (verdict, heard) = run(dataplane, UplinkIngress, &answer);
                    assert_eq!(verdict, REDIRECT);
                    assert_eq!(hex(&heard), hex(&family.udp(asked, pod, b"answer")));
                }
                node
            };
            for asked in [there, other] {
                let node = leaves(&dataplane, asked);
                // The flow is one.
                assert_eq!(leaves(&dataplane, asked), node);
            }
            assert_eq!(run(&dataplane, PodIngress, &echo).0, REDIRECT);
            let given = [
                Op::SetFrontend {
                    frontend,
                    lead: Lead::to(ServiceId(1)),
                },
                Op::SetVip {
                    addr: vip,
                    kind: Vip::External,
                },
            ];
            dataplane.apply(&given).unwrap();
            for _ in 0..2 {
                let (verdict, out) = ask(&dataplane, there);
                assert_eq!(verdict, REDIRECT);
                assert_eq!(hex(&out), hex(&family.udp(pod, "10.0.0.12:8080", b"x")));
            }
            // Its other ports are nobody's, and it has no echo.
            let datagram = family.udp(pod, other, b"x");
            let (_, refusal) = run(&dataplane, PodIngress, &datagram);
            assert_eq!(hex(&refusal), hex(&family.refusal(&datagram)));
            assert_eq!(run(&dataplane, PodIngress, &echo).0, DROP);
            let taken = [Op::RemoveVip { addr: vip }, Op::RemoveFrontend { frontend }];
            let renewed = Op::RenewService {
                id: ServiceId(1),
                backends: backends.clone(),
            };
            dataplane.apply(&[&taken[..], &[renewed]].concat()).unwrap();
            for asked in [there, other] {
                leaves(&dataplane, asked);
            }
            assert_eq!(run(&dataplane, PodIngress, &echo).0, REDIRECT);
        }
    }
}
