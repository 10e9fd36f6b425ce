//! One port of a client, directly and through a Service, through the loaded programs.

use dataplane_abi::Reason;
use keelway_agent::dataplane::PacketProgram::{PodIngress, ServiceIngress, UplinkIngress};
use keelway_tests::{
    packets::{
        sctp_chunk::{self, INIT, INIT_ACK},
        tcp_flag::{ACK, FIN, RST, SYN},
    },
    sandbox::is_root,
};

use crate::{
    family::{Family, into_the_host},
    fresh::Fresh,
    hex,
    rows::{DROP, REDIRECT},
    run, source_port,
};

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

/// Of datagrams, whose kinds are none.
const DATAGRAM: Conversation = (0, 0, 0, |family, src, dst, _| family.udp(src, dst, b"odd"));

/// Over a Service with one backend.
fn leading_to(fresh: &mut Fresh, family: Family, backend: &str) {
    fresh.begin(family, &family.backends(&[backend], &[]));
}

/// Has `judge` look at a Service that leads to a backend of this node and one that leads to another node's, in both families and by both
/// protocols.
fn with_each_backend(mut judge: impl FnMut(&Fresh, Family, &Conversation, &str)) {
    let mut fresh = Fresh::open();
    for family in Family::ALL {
        for backend in ["10.0.0.12:80", "10.0.1.13:80"] {
            for conversation in &CONVERSATIONS {
                leading_to(&mut fresh, family, backend);
                judge(&fresh, family, conversation, backend);
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
    with_each_backend(|fresh, family, (open, answer, data, build), backend| {
        let sent = |packet: Vec<u8>| run(&fresh.dataplane, PodIngress, &packet).1;
        let heard = |packet: Vec<u8>| run(&fresh.dataplane, UplinkIngress, &packet);
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
        let counters = fresh.counters();
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
    with_each_backend(|fresh, family, (open, answer, data, build), backend| {
        let sent = |packet: Vec<u8>| run(&fresh.dataplane, PodIngress, &packet).1;
        let heard = |packet: Vec<u8>| run(&fresh.dataplane, UplinkIngress, &packet).1;
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
        let counters = fresh.counters();
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
    let mut fresh = Fresh::open();
    for family in Family::ALL {
        leading_to(&mut fresh, family, backend);
        let direct = family.tcp(pod, backend, SYN, b"");
        let run = |program, packet: &[u8]| run(&fresh.dataplane, program, packet).1;
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
        // A backend that remembers the old connection says so to who opens this one, who resets it.
        let state = family.tcp(backend, pod, ACK, b"");
        assert_eq!(hex(&run(UplinkIngress, &state)), hex(&state));
        let reset = family.tcp(pod, backend, RST, b"");
        assert_eq!(hex(&run(PodIngress, &reset)), hex(&reset));
        assert_eq!(hex(&run(PodIngress, &direct)), hex(&direct));
        let answer = family.tcp(backend, pod, SYN | ACK, b"");
        assert_eq!(hex(&run(UplinkIngress, &answer)), hex(&answer));
    }
}

#[test]
fn a_client_that_meets_its_own_connection_is_told_so_and_asks_again_at_once() {
    if !is_root("openings told apart") {
        return;
    }
    let (pod, service) = ("10.0.0.11:4000", "10.96.0.1:80");
    let mut fresh = Fresh::open();
    for family in Family::ALL {
        for backend in ["10.0.0.12:80", "10.0.1.13:80"] {
            leading_to(&mut fresh, family, backend);
            let sent = |packet: &[u8]| run(&fresh.dataplane, PodIngress, packet);
            let heard = |packet: &[u8]| run(&fresh.dataplane, UplinkIngress, packet).1;
            sent(&family.tcp(pod, service, SYN, b""));
            let state = family.tcp(backend, pod, ACK, b"");
            let told = family.tcp(service, pod, ACK, b"");
            assert_eq!(hex(&heard(&state)), hex(&told));
            assert_eq!(hex(&heard(&state)), hex(&state));
            assert_eq!(sent(&family.tcp(pod, service, RST, b"")).0, DROP);
            let (_, again) = sent(&family.tcp(pod, service, SYN, b""));
            let seen = format!("10.0.0.11:{}", source_port(family, &again));
            assert_ne!(seen, pod);
            assert_eq!(hex(&again), hex(&family.tcp(&seen, backend, SYN, b"")));
            let counters = fresh.counters();
            assert_eq!(counters[&Reason::ResetHeld], 1);
            assert_eq!(counters[&Reason::FlowPortChanged], 1);
        }
    }
}

/// Has `judge` look at a Service that leads to a backend of this node and one that leads to another node's, in both families.
fn with_datagrams_to(mut judge: impl FnMut(&Fresh, Family, &str)) {
    let mut fresh = Fresh::open();
    for family in Family::ALL {
        for backend in ["10.0.0.12:80", "10.0.1.13:80"] {
            leading_to(&mut fresh, family, backend);
            judge(&fresh, family, backend);
        }
    }
}

#[test]
fn a_direct_datagram_from_a_port_that_a_services_flow_has_is_told_apart() {
    if !is_root("datagrams of a port used twice") {
        return;
    }
    let (pod, service) = ("10.0.0.11:4000", "10.96.0.1:80");
    with_datagrams_to(|fresh, family, backend| {
        let sent =
            |src: &str, dst: &str| run(&fresh.dataplane, PodIngress, &family.udp(src, dst, b"odd"));
        let heard = |src: &str| {
            run(
                &fresh.dataplane,
                UplinkIngress,
                &family.udp(backend, src, b"yes"),
            )
        };
        let packet = |src: &str, dst: &str| hex(&family.udp(src, dst, b"odd"));
        let answer = |src: &str, dst: &str| hex(&family.udp(src, dst, b"yes"));
        assert_eq!(hex(&sent(pod, service).1), packet(pod, backend));
        for answered in [false, true] {
            if answered {
                assert_eq!(hex(&heard(pod).1), answer(service, pod));
            }
            let (_, direct) = sent(pod, backend);
            let seen = format!("10.0.0.11:{}", source_port(family, &direct));
            assert_ne!(seen, pod);
            assert_eq!(hex(&direct), packet(&seen, backend));
            assert_eq!(hex(&sent(pod, backend).1), hex(&direct));
            // Both go on, each by itself.
            let (verdict, back) = heard(&seen);
            assert_eq!(verdict, REDIRECT);
            assert_eq!(hex(&back), answer(backend, pod));
            assert_eq!(hex(&sent(pod, service).1), packet(pod, backend));
        }
        // Nor is the port that it was given taken for the pod's own.
        let (_, other) = sent(pod, backend);
        let seen = format!("10.0.0.11:{}", source_port(family, &other));
        let (_, of_that) = sent(&seen, backend);
        assert_ne!(source_port(family, &of_that), source_port(family, &other));
        let counters = fresh.counters();
        assert_eq!(counters[&Reason::FlowPortChanged], 2);
        assert_eq!(counters[&Reason::PortTranslated], 6);
        // Another port has nothing to do with it.
        let other = "10.0.0.11:4001";
        assert_eq!(hex(&sent(other, backend).1), packet(other, backend));
    });
}

#[test]
fn a_services_flow_from_a_port_that_direct_datagrams_have_takes_another() {
    if !is_root("datagrams of a port used twice") {
        return;
    }
    let (pod, service) = ("10.0.0.11:4000", "10.96.0.1:80");
    with_datagrams_to(|fresh, family, backend| {
        let sent =
            |src: &str, dst: &str| run(&fresh.dataplane, PodIngress, &family.udp(src, dst, b"odd"));
        let heard = |src: &str| {
            run(
                &fresh.dataplane,
                UplinkIngress,
                &family.udp(backend, src, b"yes"),
            )
            .1
        };
        let packet = |src: &str, dst: &str| hex(&family.udp(src, dst, b"odd"));
        let answer = |src: &str, dst: &str| hex(&family.udp(src, dst, b"yes"));
        assert_eq!(hex(&sent(pod, backend).1), packet(pod, backend));
        let (_, asked) = sent(pod, service);
        let seen = format!("10.0.0.11:{}", source_port(family, &asked));
        assert_ne!(seen, pod);
        assert_eq!(hex(&asked), packet(&seen, backend));
        assert_eq!(hex(&sent(pod, service).1), hex(&asked));
        assert_eq!(hex(&heard(&seen)), answer(service, pod));
        assert_eq!(hex(&sent(pod, backend).1), packet(pod, backend));
        assert_eq!(hex(&heard(pod)), answer(backend, pod));
        let counters = fresh.counters();
        assert_eq!(counters[&Reason::FlowPortChanged], 1);
        assert_eq!(counters[&Reason::PortTranslated], 0);
    });
}

/// The collector leaves the trace of a flow that nobody answers anew while it is used, and of no other.
#[test]
fn the_trace_of_datagrams_that_nobody_answers_is_left_for_as_long_as_they_go_on() {
    if !is_root("traces of flows without answers") {
        return;
    }
    /// The word of a flow's entry that says when it was last used.
    const LAST_SEEN: usize = 10;
    const LONG_S: u32 = 301;
    let (pod, service, backend) = ("10.0.0.11:4000", "10.96.0.1:80", "10.0.1.13:80");
    let mut fresh = Fresh::open();
    for family in Family::ALL {
        for (collects, idle_s, is_told_apart) in
            [(false, 0, false), (true, 0, true), (true, LONG_S, false)]
        {
            fresh.begin(family, &family.backends(&[backend], &[]));
            let sent = |fresh: &Fresh, dst: &str| {
                let packet = family.udp(pod, dst, b"odd");
                hex(&run(&fresh.dataplane, PodIngress, &packet).1)
            };
            sent(&fresh, service);
            // The trace that it left when it was opened has lost its meaning by now.
            fresh.forget_traces();
            let mut flows = fresh.unreplied();
            let entries: Vec<_> = flows.iter().map(Result::unwrap).collect();
            assert_eq!(entries.len(), 2);
            for (key, mut entry) in entries {
                // Before the machine began, if need be.
                entry[LAST_SEEN] = entry[LAST_SEEN].wrapping_sub(idle_s);
                flows.insert(key, entry, 0).unwrap();
            }
            if collects {
                fresh.dataplane.collect_flows().unwrap();
            }
            let is_its_own = sent(&fresh, backend) == hex(&family.udp(pod, backend, b"odd"));
            assert_eq!(is_its_own, !is_told_apart, "{family:?} {collects} {idle_s}");
        }
    }
}

/// A client outside, of whom a pod behind a node port sees the address.
#[test]
fn a_client_outside_that_reaches_a_pod_directly_and_by_a_node_port_is_told_apart() {
    if !is_root("a port used twice from outside") {
        return;
    }
    let (client, by_node, pod) = ("203.0.113.9:5000", "198.18.0.1:30080", "10.0.0.11:80");
    let mut fresh = Fresh::open();
    for family in Family::ALL {
        for (open, answer, data, build) in CONVERSATIONS.iter().chain([&DATAGRAM]) {
            leading_to(&mut fresh, family, pod);
            let came = |packet: Vec<u8>| run(&fresh.dataplane, UplinkIngress, &packet);
            let left = |packet: Vec<u8>| run(&fresh.dataplane, PodIngress, &packet).1;
            let packet = |src: &str, dst: &str, kind: &u8| build(family, src, dst, *kind);
            let balanced = came(packet(client, by_node, open)).1;
            assert_eq!(hex(&balanced), hex(&packet(client, pod, open)));
            let (verdict, direct) = came(packet(client, pod, open));
            let seen = format!("203.0.113.9:{}", source_port(family, &direct));
            assert_eq!(verdict, REDIRECT);
            assert_ne!(seen, client);
            assert_eq!(hex(&direct), hex(&packet(&seen, pod, open)));
            for kind in [answer, data] {
                let back = left(packet(pod, &seen, kind));
                assert_eq!(hex(&back), hex(&packet(pod, client, kind)));
                let back = left(packet(pod, client, kind));
                assert_eq!(hex(&back), hex(&packet(by_node, client, kind)));
            }
            let more = came(packet(client, pod, data)).1;
            assert_eq!(hex(&more), hex(&packet(&seen, pod, data)));
            let more = came(packet(client, by_node, data)).1;
            assert_eq!(hex(&more), hex(&packet(client, pod, data)));
        }
    }
}

/// The node's own direct connections pass no hook, so what it asks a Service per packet has ports that those have not.
#[test]
fn what_the_node_itself_asks_a_service_has_none_of_the_ports_of_its_direct_connections() {
    if !is_root("the node's ports") {
        return;
    }
    let (host, service) = ("198.18.0.1:40000", "10.96.0.1:80");
    let mut fresh = Fresh::open();
    for family in Family::ALL {
        for backend in ["10.0.0.12:80", "10.0.1.13:80"] {
            for (open, answer, data, build) in CONVERSATIONS.iter().chain([&DATAGRAM]) {
                leading_to(&mut fresh, family, backend);
                let packet = |src: &str, dst: &str, kind: &u8| build(family, src, dst, *kind);
                let asked = run(
                    &fresh.dataplane,
                    ServiceIngress,
                    &packet(host, service, open),
                )
                .1;
                let port = source_port(family, &asked);
                assert!((8192..24_576).contains(&port), "{port}");
                let seen = format!("198.18.0.1:{port}");
                assert_eq!(hex(&asked), hex(&packet(&seen, backend, open)));
                for kind in [answer, data] {
                    let back = run(
                        &fresh.dataplane,
                        UplinkIngress,
                        &packet(backend, &seen, kind),
                    )
                    .1;
                    let told = into_the_host(packet(service, host, kind));
                    assert_eq!(hex(&back), hex(&told));
                }
                let more = run(
                    &fresh.dataplane,
                    ServiceIngress,
                    &packet(host, service, data),
                )
                .1;
                assert_eq!(hex(&more), hex(&packet(&seen, backend, data)));
            }
        }
    }
}
