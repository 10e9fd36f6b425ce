//! The uplink's driver against the hook at tc, which has the last word on what is right.

use dataplane_abi::{FROM_HOST, FROM_POD, Lead, proto};
use proptest::prelude::*;

use super::*;
use crate::{
    hook::Verdict,
    memory::{Bytes, Memory, checksums_are_right, hooks, ip, tcp, udp},
    packet::{
        is_ipv6,
        tcp_flag::{ACK, FIN, RST, SYN},
    },
    translate::translate,
};

const NODE: &str = "198.18.0.1";
const CLIENT: &str = "203.0.113.9:5000";
const ASKED: &str = "198.18.0.1:30080";
const FAR: &str = "10.0.1.13:8080";

fn features() -> Features {
    Features {
        packet_lb: true,
        service_veth: true,
        masquerade: true,
        node_v4: ip(NODE),
        node_v6: ip("fd00:18::1"),
        overlay: false,
        by_overlay: false,
    }
}

/// A node whose port 30080 and whose address 192.0.2.1:80 lead to these backends, in their family; with a pod 10.0.0.12.
fn node(backends: &[&str]) -> Memory {
    let tables = Memory::default();
    tables.set_service(1, backends, &[]);
    for at in ["0.0.0.0:30080", "[::]:30080", "192.0.2.1:80"] {
        for protocol in [proto::TCP, proto::UDP] {
            tables.set_lead(at, protocol, Lead::new(1, 1, 0));
        }
    }
    tables.set_vip("192.0.2.1");
    tables.set_local("10.0.0.12", FROM_POD, 12);
    tables.set_local(NODE, FROM_HOST, 0);
    tables.set_local("fd00:18::1", FROM_HOST, 0);
    tables
}

/// A packet through the driver's program, when it is sent out there.
fn early(tables: &Memory, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut packet = Bytes(bytes.into());
    let mut notes = Notes::NONE;
    let features = features();
    let is_v6 = is_ipv6(&packet);
    let verdict = match is_v6 {
        true => uplink_early::<true, _, _>(&packet, tables, &features, &mut notes),
        false => uplink_early::<false, _, _>(&packet, tables, &features, &mut notes),
    };
    let Early::Forward(reason) = verdict else {
        return None;
    };
    tables.count(reason);
    assert!(match is_v6 {
        true => translate::<true, _>(&mut packet, &notes.ip, &notes.to),
        false => translate::<false, _>(&mut packet, &notes.ip, &notes.to),
    });
    Some(packet.0)
}

fn at_tc(tables: &Memory, bytes: &[u8]) -> (Verdict, Vec<u8>) {
    let mut packet = Bytes(bytes.into());
    let verdict = hooks::uplink_ingress(&mut packet, tables, &features());
    (verdict, packet.0)
}

#[test]
fn a_flow_to_a_backend_elsewhere_needs_the_stack_for_nothing() {
    let tables = node(&[FAR]);
    let out = early(&tables, &tcp(CLIENT, ASKED, SYN, b"")).unwrap();
    let own = format!("{NODE}:{}", u16::from_be_bytes([out[34], out[35]]));
    assert_eq!(out, tcp(&own, FAR, SYN, b""));
    let back = early(&tables, &tcp(FAR, &own, SYN | ACK, b"")).unwrap();
    assert_eq!(back, tcp(ASKED, CLIENT, SYN | ACK, b""));
    let out = early(&tables, &tcp(CLIENT, ASKED, ACK, b"odd")).unwrap();
    assert_eq!(out, tcp(&own, FAR, ACK, b"odd"));
    let counted = [Reason::SourceNat, Reason::FlowCreated, Reason::FlowReplied];
    assert_eq!(counted.map(|reason| tables.counted(reason)), [1; 3]);
    assert_eq!(tables.counted(Reason::ServiceTranslated), 2);
    let out = early(&tables, &udp(CLIENT, "192.0.2.1:80", b"hi")).unwrap();
    assert!(checksums_are_right(&out));
}

#[test]
fn a_backend_here_is_chosen_once_and_served_at_tc() {
    let tables = node(&["10.0.0.12:8080", FAR]);
    for port in 0..40 {
        let packet = tcp(&format!("203.0.113.9:{}", 5000 + port), ASKED, SYN, b"");
        if early(&tables, &packet).is_some() {
            continue;
        }
        // What tc does is what was decided, not another choice.
        assert_eq!(at_tc(&tables, &packet).0, Verdict::Peer(12));
    }
    assert_eq!(tables.counted(Reason::FlowCreated), 40);
}

#[test]
fn what_is_not_for_the_driver_is_left_and_opens_nothing() {
    let tables = node(&[FAR]);
    let mut with_options = tcp(CLIENT, ASKED, SYN, b"four");
    with_options[14] = 0x46;
    let mut fragment = udp(CLIENT, ASKED, b"first");
    fragment[20] = 0x20;
    let mut later = udp(CLIENT, ASKED, b"later");
    later[21] = 9;
    let mut extended = udp("[2001:db8::9]:5000", "[fd00:18::1]:30080", b"hop by hop");
    extended[20] = 0;
    for packet in [
        with_options,
        fragment,
        later,
        extended,
        tcp(CLIENT, ASKED, ACK, b""),
        tcp(CLIENT, "198.18.0.1:22", SYN, b""),
        tcp(CLIENT, "192.0.2.1:81", SYN, b""),
        tcp(CLIENT, "10.0.0.12:30080", SYN, b""),
        tcp(CLIENT, ASKED, SYN, b"")[..40].into(),
    ] {
        assert_eq!(early(&tables, &packet), None, "{packet:02x?}");
    }
    assert!(tables.unreplied.borrow().is_empty() && tables.fragments.borrow().is_empty());
    assert!(tables.counters.borrow().is_empty());
    // Nobody to send to, or nobody who may come: refusals are tc's.
    assert_eq!(early(&node(&[]), &tcp(CLIENT, ASKED, SYN, b"")), None);
    tables.set_lead("192.0.2.1:80", proto::TCP, Lead::new(1, 1, LEAD_GUARDED));
    assert_eq!(early(&tables, &tcp(CLIENT, "192.0.2.1:80", SYN, b"")), None);
    assert!(tables.unreplied.borrow().is_empty());
}

/// A packet of a sequence.
#[derive(Clone, Debug)]
enum Sent {
    /// By a client outside, to one of several addresses.
    Asks {
        client: u8,
        at: u8,
        is_tcp: bool,
        flags: u8,
    },
    /// By a backend, to where the packet went that came out as the so many-th.
    Answers { of: usize, flags: u8 },
    /// One with a byte of its headers changed.
    Broken { client: u8, byte: usize, to: u8 },
}

fn sent() -> impl Strategy<Value = Sent> {
    let flags = || prop::sample::select(vec![SYN, SYN | ACK, ACK, FIN | ACK, RST]);
    prop_oneof![
        (0u8..4, 0u8..6, any::<bool>(), flags()).prop_map(|(client, at, is_tcp, flags)| {
            Sent::Asks {
                client,
                at,
                is_tcp,
                flags,
            }
        }),
        (0usize..8, flags()).prop_map(|(of, flags)| Sent::Answers { of, flags }),
        (0u8..4, 12usize..54, any::<u8>()).prop_map(|(client, byte, to)| Sent::Broken {
            client,
            byte,
            to
        }),
    ]
}

fn text(bytes: &[u8], at: usize, port: usize) -> String {
    let ip = &bytes[at..at + 4];
    let port = u16::from_be_bytes([bytes[port], bytes[port + 1]]);
    format!("{}.{}.{}.{}:{port}", ip[0], ip[1], ip[2], ip[3])
}

impl Sent {
    /// The packet, given those that came out before.
    fn packet(&self, out: &[Vec<u8>]) -> Option<Vec<u8>> {
        match *self {
            Self::Asks {
                client,
                at,
                is_tcp,
                flags,
            } => {
                let client = format!("203.0.113.{}:{}", client, 4000 + u16::from(client));
                let at = [
                    ASKED,
                    "192.0.2.1:80",
                    "192.0.2.1:81",
                    "198.18.0.1:22",
                    "10.0.0.12:8080",
                    "198.18.0.1:30081",
                ][usize::from(at)];
                Some(match is_tcp {
                    true => tcp(&client, at, flags, b"asked"),
                    false => udp(&client, at, b"asked"),
                })
            }
            Self::Answers { of, flags } => {
                let to = out.get(of)?;
                // Whole packets of IPv4 alone have come out.
                let (backend, client) = (text(to, 30, 36), text(to, 26, 34));
                Some(match to[23] {
                    proto::TCP => tcp(&backend, &client, flags, b"answer"),
                    _ => udp(&backend, &client, b"answer"),
                })
            }
            Self::Broken { client, byte, to } => {
                let client = format!("203.0.113.{}:{}", client, 4000 + u16::from(client));
                let mut packet = tcp(&client, ASKED, SYN, b"broken");
                packet[byte] = to;
                Some(packet)
            }
        }
    }
}

proptest! {
    /// Whether the driver's program goes before it or not, packets leave the node alike.
    #[test]
    fn packets_leave_as_the_hook_at_tc_alone_would_have_them(packets in prop::collection::vec(sent(), 1..40)) {
        let backends = ["10.0.0.12:8080", FAR, "10.0.1.14:8080", "198.18.0.1:6443"];
        let (with, without) = (node(&backends), node(&backends));
        let mut out: Vec<Vec<u8>> = Vec::new();
        for sent in packets {
            let Some(packet) = sent.packet(&out) else { continue };
            let wanted = at_tc(&without, &packet);
            let got = match early(&with, &packet) {
                Some(sent) => (Verdict::Route, sent),
                None => at_tc(&with, &packet),
            };
            prop_assert_eq!(&got, &wanted, "{:?}", sent);
            if matches!(sent, Sent::Asks { .. }) && wanted.0 == Verdict::Route {
                out.push(wanted.1);
            }
        }
        let flows = |tables: &Memory| (tables.flows.borrow().len(), tables.unreplied.borrow().len());
        prop_assert_eq!(flows(&with), flows(&without));
    }
}
