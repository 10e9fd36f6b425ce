//! Rewriting a packet's addresses and ports.

use dataplane_abi::{FlowKey, proto};

use crate::{
    checksum,
    packet::{ChecksumChange, ETH_LEN, Fragment, IPV6_ADDRESSES, Ip, Packet},
};

/// Offset of the checksum in an IPv4 header; source and destination follow.
pub(crate) const IPV4_CHECKSUM: usize = 10;

/// What a change of a key's addresses does to a sum over them; nothing when they are of another family.
#[inline(always)]
pub(crate) fn address_difference<const V6: bool>(from: &FlowKey, to: &FlowKey) -> Option<u32> {
    if V6 {
        return Some(checksum::difference(quarters(from), quarters(to)));
    }
    let (Some(old_src), Some(old_dst), Some(src), Some(dst)) = (
        from.src.v4_be(),
        from.dst.v4_be(),
        to.src.v4_be(),
        to.dst.v4_be(),
    ) else {
        return None;
    };
    Some(checksum::difference([old_src, old_dst], [src, dst]))
}

/// Source and destination as 32-bit words of memory, in an order of our own.
#[inline(always)]
const fn quarters(key: &FlowKey) -> [u32; 8] {
    let (s, d) = (key.src.words, key.dst.words);
    [
        s[0] as u32,
        (s[0] >> 32) as u32,
        s[1] as u32,
        (s[1] >> 32) as u32,
        d[0] as u32,
        (d[0] >> 32) as u32,
        d[1] as u32,
        (d[1] >> 32) as u32,
    ]
}

/// Gives a packet the addresses and ports of `to`, checksums included. False when it cannot be written, in which case
/// it may be half rewritten and must be dropped.
#[inline(always)]
#[must_use]
pub fn translate<const V6: bool, P: Packet>(packet: &mut P, ip: &Ip, to: &FlowKey) -> bool {
    if V6 {
        translate_apart(packet, ip, to)
    } else {
        rewrite::<false, P>(packet, ip, to)
    }
}

/// A function of its own, for the stack (see [`crate::reject::reject`]).
#[inline(never)]
fn translate_apart<P: Packet>(packet: &mut P, ip: &Ip, to: &FlowKey) -> bool {
    rewrite::<true, P>(packet, ip, to)
}

#[inline(always)]
fn rewrite<const V6: bool, P: Packet>(packet: &mut P, ip: &Ip, to: &FlowKey) -> bool {
    let from = &ip.key;
    let Some(addresses) = address_difference::<V6>(from, to) else {
        return false;
    };
    if !matches!(ip.fragment, Fragment::Later) {
        let (field, optional) = match from.proto {
            proto::TCP => (ip.l4() + 16, false),
            proto::UDP => (ip.l4() + 6, true),
            proto::ICMP | proto::ICMPV6 if ip.is_echo() => (ip.l4() + 2, false),
            _ => return false,
        };
        // ICMP for IPv4 is the one without a pseudo header.
        if from.proto != proto::ICMP
            && !packet.patch_checksum(
                field,
                ChecksumChange {
                    difference: addresses,
                    pseudo_header: true,
                    optional,
                },
            )
        {
            return false;
        }
        if from.sport != to.sport || from.dport != to.dport {
            let ports = checksum::difference([ports(from)], [ports(to)]);
            if !packet.patch_checksum(
                field,
                ChecksumChange {
                    difference: ports,
                    pseudo_header: false,
                    optional,
                },
            ) {
                return false;
            }
            let written = if ip.is_echo() {
                // The identifier; the other of the two is 0, as it was.
                packet.write(ip.l4() + 4, &(to.sport | to.dport))
            } else {
                packet.write(ip.l4(), &[to.sport, to.dport])
            };
            if !written {
                return false;
            }
        }
    }
    write_addresses::<V6, P>(packet, ETH_LEN, ip.checksum, addresses, to)
}

/// Gives the IP header at `l3` the addresses of `to`, which add `difference` to a sum over it. `field` is an IPv4 header's checksum.
#[inline(always)]
#[must_use]
pub(crate) fn write_addresses<const V6: bool, P: Packet>(
    packet: &mut P,
    l3: usize,
    field: u16,
    difference: u32,
    to: &FlowKey,
) -> bool {
    if V6 {
        let (s, d) = (to.src.words, to.dst.words);
        return packet.write(l3 + IPV6_ADDRESSES, &[s[0], s[1], d[0], d[1]]);
    }
    let (Some(src), Some(dst)) = (to.src.v4_be(), to.dst.v4_be()) else {
        return false;
    };
    // Checksum, source and destination lie side by side: one write.
    let (s, d) = (halves(src), halves(dst));
    let field = checksum::updated(field, difference);
    packet.write(l3 + IPV4_CHECKSUM, &[field, s[0], s[1], d[0], d[1]])
}

#[inline(always)]
pub(crate) const fn ports(key: &FlowKey) -> u32 {
    let (s, d) = (key.sport.to_ne_bytes(), key.dport.to_ne_bytes());
    u32::from_ne_bytes([s[0], s[1], d[0], d[1]])
}

/// The two 16-bit words of memory in one of 32 bits.
#[inline(always)]
pub(crate) const fn halves(word: u32) -> [u16; 2] {
    let b = word.to_ne_bytes();
    [
        u16::from_ne_bytes([b[0], b[1]]),
        u16::from_ne_bytes([b[2], b[3]]),
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        memory::{Bytes, addr, checksums_are_right, parsed, tcp, udp},
        packet::{Parsed, is_ipv6},
    };

    fn translated(bytes: Vec<u8>, to: FlowKey) -> Vec<u8> {
        let mut packet = Bytes(bytes);
        let (kind, ip) = parsed(&packet);
        assert_eq!(kind, Parsed::Ip);
        assert!(match is_ipv6(&packet) {
            true => translate::<true, _>(&mut packet, &ip, &to),
            false => translate::<false, _>(&mut packet, &ip, &to),
        });
        packet.0
    }

    proptest! {
        #[test]
        fn a_translated_ipv6_packet_is_the_one_that_would_have_been_sent(
            is_tcp: bool, from: ([u8; 16], u16, [u8; 16], u16), to: ([u8; 16], u16, [u8; 16], u16),
            payload in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let at = |octets: [u8; 16], port| {
                // No IPv4 address in IPv6's clothes, which would be another family's.
                let mut octets = octets;
                octets[0] |= 0x20;
                std::net::SocketAddrV6::new(octets.into(), port, 0, 0)
            };
            let build = |t: ([u8; 16], u16, [u8; 16], u16)| {
                let (src, dst) = (at(t.0, t.1).to_string(), at(t.2, t.3).to_string());
                if is_tcp { tcp(&src, &dst, 0x10, &payload) } else { udp(&src, &dst, &payload) }
            };
            let number = if is_tcp { proto::TCP } else { proto::UDP };
            let key = FlowKey::new(
                (*at(to.0, to.1).ip()).into(), (*at(to.2, to.3).ip()).into(), to.1.to_be(), to.3.to_be(), number,
            );
            let sent = translated(build(from), key);
            prop_assert!(checksums_are_right(&sent));
            prop_assert_eq!(sent, build(to));
        }

        #[test]
        fn a_translated_packet_is_the_one_that_would_have_been_sent(
            is_tcp: bool, from: ([u8; 4], u16, [u8; 4], u16), to: ([u8; 4], u16, [u8; 4], u16),
            payload in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let build = |t: ([u8; 4], u16, [u8; 4], u16)| {
                let (src, dst) = (std::net::SocketAddrV4::new(t.0.into(), t.1).to_string(), std::net::SocketAddrV4::new(t.2.into(), t.3).to_string());
                if is_tcp { tcp(&src, &dst, 0x10, &payload) } else { udp(&src, &dst, &payload) }
            };
            let number = if is_tcp { proto::TCP } else { proto::UDP };
            let key = FlowKey::new(addr(to.0), addr(to.2), to.1.to_be(), to.3.to_be(), number);
            let sent = translated(build(from), key);
            prop_assert!(checksums_are_right(&sent));
            prop_assert_eq!(sent, build(to));
        }
    }

    #[test]
    fn a_udp_packet_without_checksum_stays_without() {
        let mut bytes = udp("10.0.0.1:1000", "10.96.0.10:53", b"question");
        bytes[40..42].fill(0);
        let to = FlowKey::new(
            addr([10, 0, 0, 1]),
            addr([10, 0, 0, 9]),
            1000u16.to_be(),
            5353u16.to_be(),
            proto::UDP,
        );
        assert_eq!(translated(bytes, to)[40..42], [0, 0]);
    }

    #[test]
    fn a_later_fragment_changes_its_addresses_only() {
        let mut bytes = udp("10.0.0.1:1000", "10.96.0.10:53", b"rest of a datagram");
        bytes[21] = 1;
        let payload = bytes[34..].to_vec();
        let to = FlowKey::new(addr([10, 0, 0, 1]), addr([10, 0, 0, 9]), 0, 0, proto::UDP);
        let out = translated(bytes, to);
        assert_eq!(out[30..34], [10, 0, 0, 9]);
        assert_eq!(out[34..], payload);
    }
}
