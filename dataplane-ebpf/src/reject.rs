//! Turning a packet into its own refusal: a TCP reset or an ICMP port unreachable, from the address it was sent to.

use dataplane_abi::proto;

use crate::{
    checksum,
    packet::{ETH_LEN, Fragment, IPV4_LEN, IPV6_LEN, Ip, Packet, tcp_flag},
    translate::halves,
};

const TCP_LEN: usize = 20;
pub(crate) const ICMP_LEN: usize = 8;
/// What an ICMP error quotes: the IP header and eight bytes (RFC 792).
const QUOTED_LEN: usize = IPV4_LEN + 8;
/// The same of IPv6, where more could be quoted (RFC 4443), but nobody looks further than the ports.
const QUOTED_V6_LEN: usize = IPV6_LEN + 8;
const TTL: u8 = 64;

/// Rewrites a packet into the answer that refuses it. False when none is due (a reset, a later fragment, a protocol
/// without one) or it cannot be built; the packet is to be dropped then.
/// For [`Packet::refuse`] alone, which is what the verifier judges once.
#[inline(always)]
#[must_use]
pub fn reject<const V6: bool, P: Packet>(packet: &mut P, ip: &Ip) -> bool {
    if matches!(ip.fragment, Fragment::Later) {
        return false;
    }
    match ip.key.proto {
        proto::TCP => reset::<V6, P>(packet, ip),
        proto::UDP | proto::SCTP if V6 => port_unreachable_v6(packet, ip),
        proto::UDP | proto::SCTP => port_unreachable(packet, ip),
        _ => false,
    }
}

/// RFC 9293, 3.10.7.1: the reset of a segment to a connection that does not exist.
#[inline(always)]
fn reset<const V6: bool, P: Packet>(packet: &mut P, ip: &Ip) -> bool {
    if ip.tcp_flags & tcp_flag::RST != 0 {
        return false;
    }
    let Some(segment) = packet.read::<[u16; TCP_LEN / 2]>(ip.l4()) else {
        return false;
    };
    let (seq, ack) = ([segment[2], segment[3]], [segment[4], segment[5]]);
    let [offset, _flags] = segment[6].to_ne_bytes();
    let (new_seq, new_ack, flags) = if ip.tcp_flags & tcp_flag::ACK != 0 {
        (ack, [0, 0], tcp_flag::RST)
    } else {
        let headers = (ip.l4() - ETH_LEN) as u32 + ((offset as u32 >> 4) << 2);
        let mut length = ip.total_len.wrapping_sub(headers);
        length = length.wrapping_add((ip.tcp_flags & tcp_flag::SYN != 0) as u32);
        length = length.wrapping_add((ip.tcp_flags & tcp_flag::FIN != 0) as u32);
        let next = ((u16::from_be(seq[0]) as u32) << 16 | u16::from_be(seq[1]) as u32)
            .wrapping_add(length);
        (
            [0, 0],
            [((next >> 16) as u16).to_be(), (next as u16).to_be()],
            tcp_flag::RST | tcp_flag::ACK,
        )
    };
    let mut tcp = [
        ip.key.dport,
        ip.key.sport,
        new_seq[0],
        new_seq[1],
        new_ack[0],
        new_ack[1],
        u16::from_ne_bytes([(TCP_LEN as u8 / 4) << 4, flags]),
        0,
        0,
        0,
    ];
    if V6 {
        let header = ipv6_header(ip, proto::TCP, TCP_LEN);
        tcp[8] = checksum::over(&tcp, pseudo_v6(&header, proto::TCP, TCP_LEN));
        return packet.resize((ETH_LEN + IPV6_LEN + TCP_LEN) as u32)
            && packet.put(ETH_LEN, &header)
            && packet.put(ETH_LEN + IPV6_LEN, &tcp);
    }
    let Some(header) = ip_header(ip, proto::TCP, TCP_LEN) else {
        return false;
    };
    let pseudo = [
        header[6],
        header[7],
        header[8],
        header[9],
        (proto::TCP as u16).to_be(),
        (TCP_LEN as u16).to_be(),
    ];
    tcp[8] = checksum::over(&tcp, !checksum::over(&pseudo, 0) as u32);
    packet.resize((ETH_LEN + IPV4_LEN + TCP_LEN) as u32)
        && packet.put(ETH_LEN, &header)
        && packet.put(ETH_LEN + IPV4_LEN, &tcp)
}

#[inline(always)]
fn port_unreachable_v6<P: Packet>(packet: &mut P, ip: &Ip) -> bool {
    // As with IPv4's options.
    if ip.l4() != ETH_LEN + IPV6_LEN {
        return false;
    }
    let Some(quoted) = packet.read::<[u16; QUOTED_V6_LEN / 2]>(ETH_LEN) else {
        return false;
    };
    let header = ipv6_header(ip, proto::ICMPV6, ICMP_LEN + QUOTED_V6_LEN);
    // Type 1, destination unreachable; code 4, port.
    let mut icmp = [u16::from_ne_bytes([1, 4]), 0, 0, 0];
    let pseudo = pseudo_v6(&header, proto::ICMPV6, ICMP_LEN + QUOTED_V6_LEN);
    icmp[1] = checksum::over(&quoted, !checksum::over(&icmp, pseudo) as u32);
    packet.resize((ETH_LEN + IPV6_LEN + ICMP_LEN + QUOTED_V6_LEN) as u32)
        && packet.put(ETH_LEN, &header)
        && packet.put(ETH_LEN + IPV6_LEN, &icmp)
        && packet.put(ETH_LEN + IPV6_LEN + ICMP_LEN, &quoted)
}

/// An IPv6 header back to the sender.
#[inline(always)]
pub(crate) fn ipv6_header(ip: &Ip, protocol: u8, payload_len: usize) -> [u16; IPV6_LEN / 2] {
    let (s, d) = (ip.key.dst.words, ip.key.src.words);
    let [s0, s1, s2, s3] = quarters(s[0]);
    let [s4, s5, s6, s7] = quarters(s[1]);
    let [d0, d1, d2, d3] = quarters(d[0]);
    let [d4, d5, d6, d7] = quarters(d[1]);
    [
        u16::from_ne_bytes([0x60, 0]),
        0,
        (payload_len as u16).to_be(),
        u16::from_ne_bytes([protocol, TTL]),
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        d0,
        d1,
        d2,
        d3,
        d4,
        d5,
        d6,
        d7,
    ]
}

/// The four 16-bit words of memory in one of 64 bits.
#[inline(always)]
const fn quarters(word: u64) -> [u16; 4] {
    #[cfg(target_endian = "little")]
    return [
        word as u16,
        (word >> 16) as u16,
        (word >> 32) as u16,
        (word >> 48) as u16,
    ];
    #[cfg(target_endian = "big")]
    return [
        (word >> 48) as u16,
        (word >> 32) as u16,
        (word >> 16) as u16,
        word as u16,
    ];
}

/// The sum over the pseudo header of what follows an IPv6 header (RFC 8200, 8.1).
#[inline(always)]
pub(crate) fn pseudo_v6(header: &[u16; IPV6_LEN / 2], protocol: u8, len: usize) -> u32 {
    let addresses = !checksum::over(header, 0) as u32;
    // The header's own first words are not in it; in ones' complement, adding a complement takes away.
    let mut sum = addresses as u64;
    let mut index = 0;
    while index < 4 {
        sum += !header[index] as u64;
        index += 1;
    }
    sum += (protocol as u16).to_be() as u64 + (len as u16).to_be() as u64;
    sum as u32
}

#[inline(always)]
fn port_unreachable<P: Packet>(packet: &mut P, ip: &Ip) -> bool {
    // With IP options, what is quoted would have a varying length; such packets are rare enough to be dropped.
    if ip.l4() != ETH_LEN + IPV4_LEN {
        return false;
    }
    let Some(quoted) = packet.read::<[u16; QUOTED_LEN / 2]>(ETH_LEN) else {
        return false;
    };
    let Some(header) = ip_header(ip, proto::ICMP, ICMP_LEN + QUOTED_LEN) else {
        return false;
    };
    // Type 3, destination unreachable; code 3, port.
    let mut icmp = [u16::from_ne_bytes([3, 3]), 0, 0, 0];
    icmp[1] = checksum::over(&quoted, !checksum::over(&icmp, 0) as u32);
    packet.resize((ETH_LEN + IPV4_LEN + ICMP_LEN + QUOTED_LEN) as u32)
        && packet.put(ETH_LEN, &header)
        && packet.put(ETH_LEN + IPV4_LEN, &icmp)
        && packet.put(ETH_LEN + IPV4_LEN + ICMP_LEN, &quoted)
}

/// An IPv4 header back to the sender.
#[inline(always)]
pub(crate) fn ip_header(ip: &Ip, protocol: u8, payload_len: usize) -> Option<[u16; IPV4_LEN / 2]> {
    let (src, dst) = (halves(ip.key.dst.v4_be()?), halves(ip.key.src.v4_be()?));
    let total_len = (IPV4_LEN + payload_len) as u16;
    let dont_fragment = 0x4000u16.to_be();
    let ttl_protocol = u16::from_ne_bytes([TTL, protocol]);
    let mut header = [
        u16::from_ne_bytes([0x45, 0]),
        total_len.to_be(),
        0,
        dont_fragment,
        ttl_protocol,
        0,
        src[0],
        src[1],
        dst[0],
        dst[1],
    ];
    header[5] = checksum::over(&header, 0);
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        memory::{Bytes, checksums_are_right, parsed, tcp, udp},
        packet::{Parsed, is_ipv6},
    };

    fn rejected(bytes: Vec<u8>) -> Option<Vec<u8>> {
        let mut packet = Bytes(bytes);
        let (kind, ip) = parsed(&packet);
        assert_eq!(kind, Parsed::Ip);
        let rejected = match is_ipv6(&packet) {
            true => reject::<true, _>(&mut packet, &ip),
            false => reject::<false, _>(&mut packet, &ip),
        };
        rejected.then_some(packet.0)
    }

    #[test]
    fn a_syn_is_reset_with_its_number_acknowledged() {
        let out = rejected(tcp("10.0.0.1:4000", "10.96.0.1:81", tcp_flag::SYN, b"")).unwrap();
        assert!(checksums_are_right(&out));
        assert_eq!(out.len(), 54);
        assert_eq!(out[26..34], [10, 96, 0, 1, 10, 0, 0, 1]);
        assert_eq!(out[34..38], [0, 81, 0x0f, 0xa0]);
        // The builder's sequence number is 0x01020304.
        assert_eq!(out[38..42], [0; 4]);
        assert_eq!(out[42..46], [1, 2, 3, 5]);
        assert_eq!(out[47], tcp_flag::RST | tcp_flag::ACK);
    }

    #[test]
    fn data_of_an_unknown_connection_is_reset_at_its_acknowledgement() {
        let out = rejected(tcp(
            "10.0.0.1:4000",
            "10.96.0.1:81",
            tcp_flag::ACK,
            b"some data",
        ))
        .unwrap();
        assert!(checksums_are_right(&out));
        // The builder's acknowledgement number is 0x05060708.
        assert_eq!(out[38..42], [5, 6, 7, 8]);
        assert_eq!(out[47], tcp_flag::RST);
    }

    #[test]
    fn a_datagram_is_answered_with_port_unreachable_that_quotes_it() {
        let sent = udp(
            "10.0.0.1:4000",
            "10.96.0.1:53",
            b"a question that is longer than what is quoted",
        );
        let out = rejected(sent.clone()).unwrap();
        assert!(checksums_are_right(&out));
        assert_eq!(out[34..36], [3, 3]);
        assert_eq!(out[42..70], sent[14..42]);
        assert_eq!(out[30..34], [10, 0, 0, 1]);
    }

    #[test]
    fn ipv6_is_refused_the_same_way() {
        let octets = |text: &str| text.parse::<core::net::Ipv6Addr>().unwrap().octets();
        let (client, vip) = ("[fd00::1]:4000", "[fd00:96::1]:81");
        let out = rejected(tcp(client, vip, tcp_flag::SYN, b"")).unwrap();
        assert!(checksums_are_right(&out));
        assert_eq!(out.len(), 74);
        assert_eq!(
            (&out[22..38], &out[38..54]),
            (&octets("fd00:96::1")[..], &octets("fd00::1")[..])
        );
        assert_eq!(out[62..66], [1, 2, 3, 5]);
        assert_eq!(out[67], tcp_flag::RST | tcp_flag::ACK);
        let sent = udp(
            client,
            vip,
            b"a question that is longer than what is quoted",
        );
        let out = rejected(sent.clone()).unwrap();
        assert!(checksums_are_right(&out));
        assert_eq!((out[20], out[54], out[55]), (proto::ICMPV6, 1, 4));
        assert_eq!(out[62..110], sent[14..62]);
        assert_eq!(rejected(tcp(client, vip, tcp_flag::RST, b"")), None);
    }

    #[test]
    fn resets_and_later_fragments_are_not_answered() {
        assert_eq!(
            rejected(tcp("10.0.0.1:4000", "10.96.0.1:81", tcp_flag::RST, b"")),
            None
        );
        let mut fragment = udp("10.0.0.1:4000", "10.96.0.1:53", b"rest");
        fragment[21] = 1;
        assert_eq!(rejected(fragment), None);
    }
}
