//! Many flows, and flows that two CPUs open at once, through the loaded programs.

use std::collections::{BTreeMap, BTreeSet};

use dataplane_abi::{Reason, limits};
use keelway_agent::dataplane::{
    Dataplane,
    PacketProgram::{PodIngress, UplinkIngress},
};
use keelway_tests::{
    packets::{
        sctp_chunk::{self, INIT, INIT_ACK},
        tcp_flag::{ACK, FIN, RST, SYN},
    },
    sandbox::{Sandbox, is_root},
};

use crate::{family::Family, hex, opened, rows::REDIRECT, run, source_port, state};

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

/// What opens a conversation, what answers that, what is in its middle, and how a packet of such a kind is made.
type Conversation = (u8, u8, u8, fn(Family, &str, &str, u8) -> Vec<u8>);

/// Of TCP and of SCTP.
const CONVERSATIONS: [Conversation; 2] = [
    (SYN, SYN | ACK, ACK, |family, src, dst, flags| {
        family.tcp(src, dst, flags, b"odd")
    }),
    (
        INIT,
        INIT_ACK,
        sctp_chunk::DATA,
        |family, src, dst, chunk| family.sctp(src, dst, chunk, b"odd"),
    ),
];

/// Has `judge` look at a Service that leads to a backend of this node and one that leads to another node's, in both families and by both
/// protocols.
fn with_each_backend(mut judge: impl FnMut(&Dataplane, Family, &Conversation, &str)) {
    for family in Family::ALL {
        for backend in ["10.0.0.12:80", "10.0.1.13:80"] {
            for conversation in &CONVERSATIONS {
                let sandbox = Sandbox::enter().unwrap();
                let mut dataplane = opened(&sandbox, false);
                let backends = family.backends(&[backend], &[]);
                dataplane.apply(&state(family, &backends)).unwrap();
                judge(&dataplane, family, conversation, backend);
            }
        }
    }
}

#[test]
fn a_direct_connection_from_a_port_that_a_services_flow_has_is_told_apart() {
    if !is_root("a port used twice") {
        return;
    }
    let (pod, service) = ("10.0.0.11:4000", "10.96.0.1:80");
    with_each_backend(|dataplane, family, (open, answer, data, build), backend| {
        let sent = |packet: Vec<u8>| run(dataplane, PodIngress, &packet).1;
        let heard = |packet: Vec<u8>| run(dataplane, UplinkIngress, &packet);
        let packet = |src: &str, dst: &str, kind: &u8| build(family, src, dst, *kind);
        let translated = packet(pod, backend, open);
        assert_eq!(hex(&sent(packet(pod, service, open))), hex(&translated));
        // Before the Service's flow is answered and after, and when it is sent again.
        for answered in [false, true] {
            if answered {
                let (_, back) = heard(packet(backend, pod, answer));
                assert_eq!(hex(&back), hex(&packet(service, pod, answer)));
            }
            let direct = sent(packet(pod, backend, open));
            let seen = format!("10.0.0.11:{}", source_port(family, &direct));
            assert_ne!(seen, pod);
            assert_eq!(hex(&direct), hex(&packet(&seen, backend, open)));
            assert_eq!(hex(&sent(packet(pod, backend, open))), hex(&direct));
            // Both go on, each by itself.
            let (verdict, back) = heard(packet(backend, &seen, answer));
            assert_eq!(verdict, REDIRECT);
            assert_eq!(hex(&back), hex(&packet(backend, pod, answer)));
            let more = sent(packet(pod, backend, data));
            assert_eq!(hex(&more), hex(&packet(&seen, backend, data)));
            let (_, back) = heard(packet(backend, &seen, data));
            assert_eq!(hex(&back), hex(&packet(backend, pod, data)));
            let more = sent(packet(pod, service, data));
            assert_eq!(hex(&more), hex(&packet(pod, backend, data)));
        }
        let counters: BTreeMap<Reason, u64> = dataplane.counters().unwrap().into_iter().collect();
        assert_eq!(counters[&Reason::FlowPortChanged], 1);
        assert_eq!(counters[&Reason::PortTranslated], 6);
        assert_eq!(counters[&Reason::Masqueraded], 0);
        // A connection of another port has nothing to do with either.
        let other = packet("10.0.0.11:4001", backend, open);
        assert_eq!(hex(&sent(other.clone())), hex(&other));
    });
}

#[test]
fn a_services_flow_from_a_port_that_a_direct_connection_has_takes_another() {
    if !is_root("a port used twice") {
        return;
    }
    let (pod, service) = ("10.0.0.11:4000", "10.96.0.1:80");
    with_each_backend(|dataplane, family, (open, answer, data, build), backend| {
        let sent = |packet: Vec<u8>| run(dataplane, PodIngress, &packet).1;
        let heard = |packet: Vec<u8>| run(dataplane, UplinkIngress, &packet).1;
        let packet = |src: &str, dst: &str, kind: &u8| build(family, src, dst, *kind);
        // Nothing is kept of a direct connection.
        for (src, dst, kind) in [
            (pod, backend, open),
            (backend, pod, answer),
            (pod, backend, data),
        ] {
            let passing = packet(src, dst, kind);
            let out = if src == pod {
                sent(passing.clone())
            } else {
                heard(passing.clone())
            };
            assert_eq!(hex(&out), hex(&passing));
        }
        let first = sent(packet(pod, service, open));
        assert_eq!(hex(&first), hex(&packet(pod, backend, open)));
        // The backend has such a connection, and says how far that is; it is the direct one's to hear, as is what comes then.
        for _ in 0..2 {
            let state = packet(backend, pod, data);
            assert_eq!(hex(&heard(state.clone())), hex(&state));
        }
        let again = sent(packet(pod, service, open));
        let seen = format!("10.0.0.11:{}", source_port(family, &again));
        assert_ne!(seen, pod);
        assert_eq!(hex(&again), hex(&packet(&seen, backend, open)));
        let back = heard(packet(backend, &seen, answer));
        assert_eq!(hex(&back), hex(&packet(service, pod, answer)));
        let more = sent(packet(pod, service, data));
        assert_eq!(hex(&more), hex(&packet(&seen, backend, data)));
        let of_the_direct_one = packet(backend, pod, data);
        assert_eq!(
            hex(&heard(of_the_direct_one.clone())),
            hex(&of_the_direct_one)
        );
        let counters: BTreeMap<Reason, u64> = dataplane.counters().unwrap().into_iter().collect();
        assert_eq!(counters[&Reason::FlowPortChanged], 1);
        assert_eq!(counters[&Reason::FlowReplied], 1);
    });
}

#[test]
fn a_port_whose_flow_has_ended_on_both_sides_is_free_for_a_direct_connection() {
    if !is_root("a port used again") {
        return;
    }
    let (pod, service, backend) = ("10.0.0.11:4000", "10.96.0.1:80", "10.0.1.13:80");
    for family in Family::ALL {
        let sandbox = Sandbox::enter().unwrap();
        let mut dataplane = opened(&sandbox, false);
        let backends = family.backends(&[backend], &[]);
        dataplane.apply(&state(family, &backends)).unwrap();
        let direct = family.tcp(pod, backend, SYN, b"");
        let run = |program, packet: &[u8]| run(&dataplane, program, packet).1;
        run(PodIngress, &family.tcp(pod, service, SYN, b""));
        run(UplinkIngress, &family.tcp(backend, pod, SYN | ACK, b""));
        run(UplinkIngress, &family.tcp(backend, pod, FIN | ACK, b""));
        // The client may still send.
        let half = run(PodIngress, &direct);
        assert_ne!(source_port(family, &half), 4000);
        let seen = format!("10.0.0.11:{}", source_port(family, &half));
        run(UplinkIngress, &family.tcp(backend, &seen, RST, b""));
        run(PodIngress, &family.tcp(pod, service, FIN | ACK, b""));
        assert_eq!(hex(&run(PodIngress, &direct)), hex(&direct));
        let answer = family.tcp(backend, pod, SYN | ACK, b"");
        assert_eq!(hex(&run(UplinkIngress, &answer)), hex(&answer));
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
