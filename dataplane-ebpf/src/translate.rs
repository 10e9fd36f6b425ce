//! Rewriting a packet's addresses and ports.

use dataplane_abi::{FlowKey, proto};

use crate::{
    checksum,
    packet::{ChecksumChange, ETH_LEN, Fragment, Ip, Packet},
};

/// Offset of the checksum in an IPv4 header; source and destination follow.
pub(crate) const IPV4_CHECKSUM: usize = 10;

/// Gives a packet the addresses and ports of `to`, checksums included. False when it cannot be written, in which case
/// it may be half rewritten and must be dropped.
#[inline(always)]
#[must_use]
pub fn translate<P: Packet>(packet: &mut P, ip: &Ip, to: &FlowKey) -> bool {
    let from = &ip.key;
    let (Some(old_src), Some(old_dst), Some(new_src), Some(new_dst)) = (
        from.src.v4_be(),
        from.dst.v4_be(),
        to.src.v4_be(),
        to.dst.v4_be(),
    ) else {
        return false;
    };
    let addresses = checksum::difference([old_src, old_dst], [new_src, new_dst]);
    if !matches!(ip.fragment, Fragment::Later) {
        let (field, optional) = match from.proto {
            proto::TCP => (ip.l4 + 16, false),
            proto::UDP => (ip.l4 + 6, true),
            proto::ICMP if ip.is_echo() => (ip.l4 + 2, false),
            _ => return false,
        };
        // ICMP's covers no addresses.
        if !ip.is_echo()
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
                packet.write(ip.l4 + 4, &(to.sport | to.dport))
            } else {
                packet.write(ip.l4, &[to.sport, to.dport])
            };
            if !written {
                return false;
            }
        }
    }
    // Checksum, source and destination lie side by side: one write.
    let (s, d) = (halves(new_src), halves(new_dst));
    packet.write(
        ETH_LEN + IPV4_CHECKSUM,
        &[
            checksum::updated(ip.checksum, addresses),
            s[0],
            s[1],
            d[0],
            d[1],
        ],
    )
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
        memory::{Bytes, addr, checksums_are_right, tcp, udp},
        packet::{Parsed, parse},
    };

    fn translated(bytes: Vec<u8>, to: FlowKey) -> Vec<u8> {
        let mut packet = Bytes(bytes);
        let Parsed::Ip(ip) = parse(&packet) else {
            panic!("not IPv4")
        };
        assert!(translate(&mut packet, &ip, &to));
        packet.0
    }

    proptest! {
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
