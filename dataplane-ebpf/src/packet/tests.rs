use dataplane_abi::Addr;
use proptest::prelude::*;

use super::*;
use crate::memory::{self, Bytes, tcp, udp};

fn v4(text: &str) -> Addr {
    text.parse::<core::net::Ipv4Addr>().unwrap().into()
}

fn parsed(bytes: &[u8]) -> Ip {
    let (parsed, ip) = memory::parsed(&Bytes(bytes.to_vec()));
    assert_eq!(parsed, Parsed::Ip);
    ip
}

/// Of either family.
fn parse(packet: &Bytes) -> Parsed {
    memory::parsed(packet).0
}

#[test]
fn a_tcp_packet_has_its_tuple_and_flags() {
    let ip = parsed(&tcp("10.0.0.1:1000", "10.0.0.2:80", tcp_flag::SYN, b""));
    assert_eq!(
        ip.key,
        FlowKey::new(
            v4("10.0.0.1"),
            v4("10.0.0.2"),
            1000u16.to_be(),
            80u16.to_be(),
            proto::TCP
        )
    );
    assert!(ip.is_syn());
    assert_eq!(ip.fragment, Fragment::Whole);
    assert_eq!(ip.l4(), 34);
}

#[test]
fn options_move_the_transport_header() {
    let mut bytes = udp("10.0.0.1:1000", "10.0.0.2:53", b"x");
    bytes[14] = 0x46;
    bytes[17] += 4;
    bytes.splice(34..34, [1, 1, 1, 1]);
    let ip = parsed(&bytes);
    assert_eq!((ip.l4(), ip.key.dport), (38, 53u16.to_be()));
}

#[test]
fn later_fragments_have_no_ports() {
    let mut bytes = udp("10.0.0.1:1000", "10.0.0.2:53", b"payload");
    bytes[20] = 0x20;
    assert_eq!(
        (parsed(&bytes).fragment, parsed(&bytes).key.dport),
        (Fragment::First, 53u16.to_be())
    );
    bytes[21] = 1;
    assert_eq!(
        (parsed(&bytes).fragment, parsed(&bytes).key.dport),
        (Fragment::Later, 0)
    );
}

#[test]
fn headers_that_are_cut_short_or_lie_are_malformed() {
    let good = tcp("10.0.0.1:1000", "10.0.0.2:80", tcp_flag::SYN, b"");
    for cut in 14..good.len() - 6 {
        let parsed = parse(&Bytes(good[..cut].to_vec()));
        assert!(
            matches!(parsed, Parsed::Malformed),
            "cut at {cut}: {parsed:?}"
        );
    }
    for (offset, value, what) in [
        (14, 0x65, "version 6"),
        (14, 0x44, "header of 16 bytes"),
        (17, 39, "total length below headers"),
    ] {
        let mut bytes = good.clone();
        bytes[offset] = value;
        assert!(matches!(parse(&Bytes(bytes)), Parsed::Malformed), "{what}");
    }
}

/// A datagram from fd00::1:1000 to fd00::2:53 behind extension headers, of which `next` are the types.
fn extended(next: &[u8], headers: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut bytes = udp("[fd00::1]:1000", "[fd00::2]:53", payload);
    bytes[20] = next[0];
    let len = u16::from_be_bytes([bytes[18], bytes[19]]) + headers.len() as u16;
    bytes[18..20].copy_from_slice(&len.to_be_bytes());
    bytes.splice(54..54, headers.iter().copied());
    bytes
}

#[test]
fn an_ipv6_packet_has_its_tuple_behind_extension_headers() {
    let v6 = |text: &str| Addr::from(text.parse::<core::net::Ipv6Addr>().unwrap());
    let hop_by_hop = [60, 0, 0, 0, 0, 0, 0, 0];
    let destination = [17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let both = [&hop_by_hop[..], &destination].concat();
    for (bytes, l4) in [
        (udp("[fd00::1]:1000", "[fd00::2]:53", b"x"), 54),
        (extended(&[60], &destination, b"x"), 70),
        (extended(&[0], &both, b"x"), 78),
        (
            extended(&[51], &[17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], b"x"),
            66,
        ),
    ] {
        let ip = parsed(&bytes);
        assert_eq!((ip.l4(), ip.fragment), (l4, Fragment::Whole));
        assert_eq!(
            ip.key,
            FlowKey::new(
                v6("fd00::1"),
                v6("fd00::2"),
                1000u16.to_be(),
                53u16.to_be(),
                proto::UDP
            )
        );
    }
    let ip = parsed(&tcp("[fd00::1]:1", "[fd00::2]:2", tcp_flag::SYN, b"abc"));
    assert!(ip.is_syn());
    assert_eq!(ip.total_len, 63);
}

#[test]
fn ipv6_fragments_are_told_apart() {
    for (bits, wanted, dport) in [
        ([0, 0], Fragment::Whole, 53u16.to_be()),
        ([0, 1], Fragment::First, 53u16.to_be()),
        ([0, 9], Fragment::Later, 0),
        ([1, 0], Fragment::Later, 0),
    ] {
        let header = [17, 0, bits[0], bits[1], 0xde, 0xad, 0xbe, 0xef];
        let ip = parsed(&extended(&[44], &header, b"payload"));
        assert_eq!((ip.fragment, ip.key.dport), (wanted, dport));
        assert_eq!(ip.id, u32::from_ne_bytes([0xde, 0xad, 0xbe, 0xef]));
    }
}

#[test]
fn ipv6_headers_that_are_cut_short_or_lie_are_malformed() {
    let good = tcp("[fd00::1]:1000", "[fd00::2]:80", tcp_flag::SYN, b"");
    for cut in 14..good.len() - 6 {
        let parsed = parse(&Bytes(good[..cut].to_vec()));
        assert!(matches!(parsed, Parsed::Malformed), "cut at {cut}");
    }
    let endless: Vec<u8> = [60, 0, 0, 0, 0, 0, 0, 0].repeat(6);
    for (bytes, what) in [
        (
            {
                let mut bytes = good.clone();
                bytes[14] = 0x45;
                bytes
            },
            "version 4",
        ),
        (
            {
                let mut bytes = good.clone();
                bytes[19] = 19;
                bytes
            },
            "payload below headers",
        ),
        (extended(&[60], &endless, b""), "too many extensions"),
        (
            extended(&[60], &[17, 255, 0, 0, 0, 0, 0, 0], b""),
            "extension beyond the end",
        ),
    ] {
        assert!(matches!(parse(&Bytes(bytes)), Parsed::Malformed), "{what}");
    }
}

#[test]
fn what_is_not_ip_is_left_alone() {
    for ethertype in [[0x08, 0x06], [0x81, 0x00]] {
        let mut bytes = udp("10.0.0.1:1", "10.0.0.2:2", b"");
        bytes[12..14].copy_from_slice(&ethertype);
        assert!(matches!(parse(&Bytes(bytes)), Parsed::Other));
    }
    assert!(matches!(parse(&Bytes(vec![])), Parsed::Other));
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_without_panic_and_within_the_packet(mut bytes in prop::collection::vec(any::<u8>(), 0..128), family in 0..3, next: prop::sample::Index) {
        if family == 1 && bytes.len() > 14 {
            bytes[12] = 8;
            bytes[13] = 0;
            bytes[14] = 0x40 | bytes[14] & 0x0f;
        }
        if family == 2 && bytes.len() > 20 {
            (bytes[12], bytes[13]) = (0x86, 0xdd);
            bytes[14] = 0x60;
            bytes[20] = *next.get(&[0u8, 6, 17, 43, 44, 51, 58, 60]);
        }
        let (len, packet) = (bytes.len(), Bytes(bytes));
        if let (Parsed::Ip, ip) = memory::parsed(&packet) {
            prop_assert!(ip.l4() >= 34 && (is_ipv6(&packet) || ip.l4() <= 74));
            if ip.has_ports() && ip.fragment != Fragment::Later {
                prop_assert!(ip.l4() + 4 <= len);
            }
        }
    }
}
