//! Packets that nobody would send: random ones, and good ones in which bytes were changed or that were cut, through every hook.
//! None panics, and what a hook changes is what it may change: addresses, ports, and the sums over them.

use dataplane_abi::{FROM_HOST, FROM_POD, LEAD_GUARDED, Lead, proto};
use proptest::{prelude::*, sample::Index};

use super::*;
use crate::{
    memory::{Bytes, Memory, checksums_are_right, hooks, icmp, ip, parsed, sctp, tcp, udp},
    packet::{ETH_LEN, IPV6_LEN},
};

const A: u32 = 11;

fn features(masquerade: bool) -> Features {
    Features {
        packet_lb: true,
        service_veth: true,
        masquerade,
        node_v4: ip("198.18.0.1"),
        node_v6: ip("fd00:18::1"),
        overlay: false,
        by_overlay: false,
    }
}

/// A node with everything: Services in both families, node ports, guarded addresses, affinity, no backends.
fn node() -> Memory {
    let tables = Memory::default();
    for (pod, host) in [("10.0.0.11", "198.18.0.1"), ("fd00::11", "fd00:18::1")] {
        tables.set_local(pod, FROM_POD, A);
        tables.set_local(host, FROM_HOST, 0);
    }
    tables.set_local("10.0.0.12", FROM_POD, 12);
    tables.set_local("fd00::12", FROM_POD, 12);
    tables.set_service(1, &["10.0.0.12:8080", "10.0.1.13:8080"], &[]);
    tables.set_service(2, &["10.0.1.13:8080"], &["10.0.0.11:8080"]);
    tables.set_service(3, &[], &[]);
    tables.set_service(4, &["[fd00::12]:8080", "[fd00::1:13]:8080"], &[]);
    tables.set_service(5, &["[fd00::1:13]:8080"], &["[fd00::11]:8080"]);
    for affine in [2, 5] {
        tables.set_affinity_timeout(affine, 60);
    }
    for protocol in [proto::TCP, proto::UDP, proto::SCTP] {
        for (at, service) in [
            ("10.96.0.1:80", 1),
            ("10.96.0.2:80", 2),
            ("10.96.0.3:80", 3),
            ("[fd00:96::1]:80", 4),
            ("[fd00:96::2]:80", 5),
            ("[fd00:96::3]:80", 3),
        ] {
            tables.set_frontend(at, protocol, service);
        }
        for (every, balanced, service) in [
            ("0.0.0.0:30080", "192.0.2.1:80", 1),
            ("[::]:30080", "[2001:db8::1]:80", 4),
        ] {
            tables.set_lead(every, protocol, Lead::new(service, 3, 0));
            let guarded = Lead::new(service, service, LEAD_GUARDED);
            tables.set_lead(balanced, protocol, guarded);
        }
    }
    let ranges = [
        (1, ip("203.0.113.0"), 96 + 24),
        (4, ip("2001:db8:113::"), 48),
        (0, ip("10.0.0.0"), 96 + 8),
        (0, ip("fd00::"), 16),
    ];
    tables.ranges.borrow_mut().extend(ranges);
    tables
}

/// Conversations that hooks have much to do with.
fn good() -> impl Strategy<Value = Vec<u8>> {
    let v4 = vec![
        "10.0.0.11:4000",
        "10.96.0.1:80",
        "10.96.0.2:80",
        "10.96.0.3:80",
        "198.18.0.1:30080",
        "10.0.1.13:8080",
        "10.0.0.12:8080",
        "203.0.113.9:5000",
        "192.0.2.1:80",
    ];
    let v6 = vec![
        "[fd00::11]:4000",
        "[fd00:96::1]:80",
        "[fd00:96::2]:80",
        "[fd00:96::3]:80",
        "[fd00:18::1]:30080",
        "[fd00::1:13]:8080",
        "[fd00::12]:8080",
        "[2001:db8:113::9]:5000",
        "[2001:db8::1]:80",
        "[fe80::1]:1",
    ];
    let pair = prop_oneof![
        (prop::sample::select(v4.clone()), prop::sample::select(v4)),
        (prop::sample::select(v6.clone()), prop::sample::select(v6)),
    ];
    let payload = prop::collection::vec(any::<u8>(), 0..40);
    (pair, 0u8..5, any::<u8>(), payload).prop_map(|((src, dst), kind, flags, payload)| match kind {
        0 => tcp(src, dst, flags, &payload),
        1 => udp(src, dst, &payload),
        2 => sctp(src, dst, flags % 16, &payload),
        3 => icmp(
            src,
            dst,
            [0, 3, 8, 11, 128, 129, 1, 2][flags as usize % 8],
            0,
            &payload,
        ),
        _ => {
            // An error that quotes what may be a flow's.
            let quoted = udp(dst, src, &payload);
            let body = [&[0; 4][..], &quoted[14..]].concat();
            let kind = if src.starts_with('[') { 1 } else { 3 };
            icmp(src, dst, kind, 3, &body)
        }
    })
}

fn packet() -> impl Strategy<Value = Vec<u8>> {
    let change = (any::<Index>(), any::<u8>());
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..200),
        3 => good(),
        4 => (good(), prop::collection::vec(change, 1..4)).prop_map(|(mut bytes, changes)| {
            for (at, value) in changes {
                // Not the addresses of the frame, which nothing looks at.
                let at = 12 + at.index(bytes.len() - 12);
                bytes[at] = value;
            }
            bytes
        }),
        1 => (good(), any::<Index>()).prop_map(|(mut bytes, at)| {
            bytes.truncate(at.index(bytes.len()));
            bytes
        }),
    ]
}

/// The bytes that a translation may change, from the packet as it came.
fn may_change(before: &[u8]) -> Vec<bool> {
    let mut may = vec![false; before.len()];
    let mut open = |range: core::ops::Range<usize>| {
        let end = range.end.min(may.len());
        may[range.start.min(end)..end].fill(true);
    };
    // Behind extension headers, which are none of those that may change.
    let behind = |mut at: usize, mut next: u8| {
        while let (0 | 43 | 44 | 51 | 60, Some(&[after, len])) = (
            next,
            before.get(at..at + 2).and_then(|two| two.first_chunk()),
        ) {
            at += match next {
                44 => 8,
                51 => (usize::from(len) + 2) * 4,
                _ => (usize::from(len) + 1) * 8,
            };
            next = after;
        }
        at
    };
    let headers = |at: usize, open: &mut dyn FnMut(core::ops::Range<usize>)| -> usize {
        let first = before.get(at).copied().unwrap_or(0);
        if first >> 4 == 4 {
            open(at + 10..at + 20);
            at + ((first & 0x0f) as usize) * 4
        } else {
            open(at + 8..at + 40);
            behind(at + IPV6_LEN, before.get(at + 6).copied().unwrap_or(0))
        }
    };
    headers(ETH_LEN, &mut open);
    // What is no packet of ours may change nowhere.
    let (Parsed::Ip, ip) = parsed(&Bytes(before.to_vec())) else {
        return vec![false; before.len()];
    };
    let l4 = ip.l4();
    match ip.key.proto {
        proto::TCP => {
            open(l4..l4 + 4);
            open(l4 + 16..l4 + 18);
        }
        proto::UDP => open(l4..l4 + 8),
        proto::SCTP => {
            open(l4..l4 + 4);
            open(l4 + 8..l4 + 12);
        }
        _ => {
            open(l4 + 2..l4 + 6);
            // What an error quotes.
            let inner = headers(l4 + 8, &mut open);
            open(inner..inner + 6);
        }
    }
    may
}

fn is_refusal(before: &[u8], after: &[u8]) -> bool {
    // A reset or an error, back to where the packet came from.
    let sources = if before[12] == 8 {
        (26..30, 30..34)
    } else {
        (22..38, 38..54)
    };
    after.get(sources.1) == before.get(sources.0) && checksums_are_right(after)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_packet_panics_or_is_rewritten_where_it_must_not_be(
        packets in prop::collection::vec((0u8..4, packet()), 1..8), masquerade: bool,
    ) {
        let (tables, features) = (node(), features(masquerade));
        for (hook, before) in packets {
            let was_right = matches!(parsed(&Bytes(before.clone())), (Parsed::Ip, ip) if ip.fragment == crate::packet::Fragment::Whole && ip.l4() == headers_len(&before))
                && is_whole(&before) && checksums_are_right(&before);
            let mut packet = Bytes(before.clone());
            let verdict = match hook {
                0 => hooks::pod_ingress(&mut packet, &tables, &features, A),
                1 => hooks::answer(&mut packet, &tables, &features),
                2 => hooks::uplink_ingress(&mut packet, &tables, &features),
                _ => hooks::service_ingress(&mut packet, &tables, &features),
            };
            let after = packet.0;
            if verdict == Verdict::Drop || before == after {
                continue;
            }
            if after.len() == before.len() {
                let may = may_change(&before);
                let wrong = (0..before.len()).find(|at| before[*at] != after[*at] && !may[*at]);
                if let Some(at) = wrong {
                    prop_assert!(is_refusal(&before, &after), "byte {at} of {before:02x?} became {after:02x?}");
                    continue;
                }
                if was_right {
                    prop_assert!(checksums_are_right(&after), "{before:02x?} became {after:02x?}");
                }
            } else {
                prop_assert!(is_refusal(&before, &after), "{before:02x?} became {after:02x?}");
            }
        }
    }
}

fn headers_len(packet: &[u8]) -> usize {
    if packet[12] == 8 { 34 } else { 54 }
}

/// Whether a packet is as long as it says.
fn is_whole(packet: &[u8]) -> bool {
    let field = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]) as usize;
    match packet[12] {
        8 => field(16) + 14 == packet.len() && packet[14] == 0x45,
        _ => field(18) + 54 == packet.len(),
    }
}
