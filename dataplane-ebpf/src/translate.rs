//! Rewriting a packet's addresses and ports.

use dataplane_abi::{FlowKey, proto};

use crate::{
    checksum,
    packet::{ChecksumChange, ETH_LEN, Fragment, IPV6_ADDRESSES, Ip, Packet, SCTP_CHECKSUM},
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
/// it may be half rewritten and must be dropped. For [`Packet::translate`] alone, which is what the verifier judges once.
#[inline(always)]
#[must_use]
pub fn translate<const V6: bool, P: Packet>(packet: &mut P, ip: &Ip, to: &FlowKey) -> bool {
    let from = &ip.key;
    let Some(addresses) = address_difference::<V6>(from, to) else {
        return false;
    };
    if from.proto == proto::SCTP {
        if !associate(packet, ip, to) {
            return false;
        }
    } else if !matches!(ip.fragment, Fragment::Later) {
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
            if !write_ports(packet, ip.l4(), to, ip.is_echo()) {
                return false;
            }
        }
    }
    // Of IPv6 the transport's checksum alone covers them, and its change by them is counted apart, as a pseudo header's.
    if V6 {
        return put_addresses(packet, to);
    }
    write_addresses::<false, P>(packet, ETH_LEN, ip.checksum, addresses, to)
}

/// Gives the transport header at `l4` the ports of `to`, an echo the identifier that stands there for one of them.
#[inline(always)]
#[must_use]
pub(crate) fn write_ports<P: Packet>(
    packet: &mut P,
    l4: usize,
    to: &FlowKey,
    is_echo: bool,
) -> bool {
    if is_echo {
        // The other of the two is 0, as it was.
        packet.write(l4 + 4, &(to.sport | to.dport))
    } else {
        packet.write(l4, &[to.sport, to.dport])
    }
}

/// Gives an SCTP packet the ports of `to`. Its checksum covers no addresses, and the ports with all that follows: where some of that is
/// in other fragments it cannot be mended. A function of its own: it is rare, and what is rewritten in three places else has it thrice.
#[inline(never)]
fn associate<P: Packet>(packet: &mut P, ip: &Ip, to: &FlowKey) -> bool {
    let (old, new) = (ports(&ip.key), ports(to));
    if old == new || matches!(ip.fragment, Fragment::Later) {
        return true;
    }
    let Some(field) = packet.read::<u32>(ip.l4() + SCTP_CHECKSUM) else {
        return false;
    };
    // Zero is what hardware is yet to fill in, if a sum is not zero by chance: then the packet is lost, and what its sender sends
    // instead has another.
    if field != 0 {
        if !matches!(ip.fragment, Fragment::Whole) || ip.total_len == 0 {
            return false;
        }
        let len = ip.total_len.wrapping_sub((ip.l4() - ETH_LEN) as u32);
        // The sum is stored in little-endian order (RFC 9260, appendix A).
        let changed = packet.crc32c_change(u32::from_le(old ^ new), len);
        if !packet.put(ip.l4() + SCTP_CHECKSUM, &(field ^ changed.to_le())) {
            return false;
        }
    }
    packet.put(ip.l4(), &[to.sport, to.dport])
}

/// Gives a packet's IPv6 header the addresses of `to`.
#[inline(always)]
#[must_use]
pub(crate) fn put_addresses<P: Packet>(packet: &mut P, to: &FlowKey) -> bool {
    let (s, d) = (to.src.words, to.dst.words);
    packet.put(ETH_LEN + IPV6_ADDRESSES, &[s[0], s[1], d[0], d[1]])
}

/// Gives the IP header at `l3`, one within what another header's checksum covers where it is IPv6's, the addresses of `to`, which add `difference` to a sum over it. `field` is an IPv4 header's checksum.
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
        memory::{Bytes, addr, checksums_are_right, parsed, sctp, tcp, udp},
        packet::{Parsed, is_ipv6, sctp_chunk},
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

    const PROTOCOLS: [u8; 3] = [proto::TCP, proto::UDP, proto::SCTP];

    fn packet(protocol: u8, src: &str, dst: &str, payload: &[u8]) -> Vec<u8> {
        match protocol {
            proto::TCP => tcp(src, dst, 0x10, payload),
            proto::UDP => udp(src, dst, payload),
            _ => sctp(src, dst, sctp_chunk::DATA, payload),
        }
    }

    proptest! {
        #[test]
        fn a_translated_ipv6_packet_is_the_one_that_would_have_been_sent(
            protocol in prop::sample::select(&PROTOCOLS[..]), from: ([u8; 16], u16, [u8; 16], u16), to: ([u8; 16], u16, [u8; 16], u16),
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
                packet(protocol, &src, &dst, &payload)
            };
            let key = FlowKey::new(
                (*at(to.0, to.1).ip()).into(), (*at(to.2, to.3).ip()).into(), to.1.to_be(), to.3.to_be(), protocol,
            );
            let sent = translated(build(from), key);
            prop_assert!(checksums_are_right(&sent));
            prop_assert_eq!(sent, build(to));
        }

        #[test]
        fn a_translated_packet_is_the_one_that_would_have_been_sent(
            protocol in prop::sample::select(&PROTOCOLS[..]), from: ([u8; 4], u16, [u8; 4], u16), to: ([u8; 4], u16, [u8; 4], u16),
            payload in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let build = |t: ([u8; 4], u16, [u8; 4], u16)| {
                let (src, dst) = (std::net::SocketAddrV4::new(t.0.into(), t.1).to_string(), std::net::SocketAddrV4::new(t.2.into(), t.3).to_string());
                packet(protocol, &src, &dst, &payload)
            };
            let key = FlowKey::new(addr(to.0), addr(to.2), to.1.to_be(), to.3.to_be(), protocol);
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
    fn an_sctp_packet_whose_sum_hardware_fills_in_stays_without() {
        let mut bytes = sctp(
            "10.0.0.1:1000",
            "10.96.0.10:53",
            sctp_chunk::INIT,
            b"message",
        );
        bytes[42..46].fill(0);
        let key = |port: u16| {
            FlowKey::new(
                addr([10, 0, 0, 1]),
                addr([10, 0, 0, 9]),
                1000u16.to_be(),
                port.to_be(),
                proto::SCTP,
            )
        };
        let out = translated(bytes.clone(), key(5353));
        assert_eq!(
            (&out[36..38], &out[42..46]),
            (&5353u16.to_be_bytes()[..], &[0; 4][..])
        );
        // A fragment has no port changed, as its sum is over what others hold; its addresses may be.
        bytes[20] = 0x20;
        bytes[42..46].fill(7);
        let mut packet = Bytes(bytes);
        let (_, ip) = parsed(&packet);
        assert!(!translate::<false, _>(&mut packet, &ip, &key(5353)));
        assert!(translate::<false, _>(&mut packet, &ip, &key(53)));
        assert_eq!(packet.0[42..46], [7; 4]);
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
