//! Turning a packet into its own refusal: a TCP reset or an ICMP port unreachable, from the address it was sent to.

use dataplane_abi::proto;

use crate::{
    checksum,
    packet::{ETH_LEN, Fragment, IPV4_LEN, Ip, Packet, tcp_flag},
    translate::halves,
};

const TCP_LEN: usize = 20;
const ICMP_LEN: usize = 8;
/// What an ICMP error quotes: the IP header and eight bytes (RFC 792).
const QUOTED_LEN: usize = IPV4_LEN + 8;
const TTL: u8 = 64;

/// Rewrites a packet into the answer that refuses it. False when none is due (a reset, a later fragment, a protocol
/// without one) or it cannot be built; the packet is to be dropped then.
#[inline(always)]
#[must_use]
pub fn reject<P: Packet>(packet: &mut P, ip: &Ip) -> bool {
    if matches!(ip.fragment, Fragment::Later) {
        return false;
    }
    match ip.key.proto {
        proto::TCP => reset(packet, ip),
        proto::UDP => port_unreachable(packet, ip),
        _ => false,
    }
}

/// RFC 9293, 3.10.7.1: the reset of a segment to a connection that does not exist.
#[inline(always)]
fn reset<P: Packet>(packet: &mut P, ip: &Ip) -> bool {
    if ip.tcp_flags & tcp_flag::RST != 0 {
        return false;
    }
    let Some(segment) = packet.read::<[u16; TCP_LEN / 2]>(ip.l4) else {
        return false;
    };
    let (seq, ack) = ([segment[2], segment[3]], [segment[4], segment[5]]);
    let [offset, _flags] = segment[6].to_ne_bytes();
    let (new_seq, new_ack, flags) = if ip.tcp_flags & tcp_flag::ACK != 0 {
        (ack, [0, 0], tcp_flag::RST)
    } else {
        let headers = (ip.l4 - ETH_LEN) as u32 + ((offset as u32 >> 4) << 2);
        let mut length = (ip.total_len as u32).wrapping_sub(headers);
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
    let Some(header) = ip_header(ip, proto::TCP, TCP_LEN) else {
        return false;
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
        && packet.write(ETH_LEN, &header)
        && packet.write(ETH_LEN + IPV4_LEN, &tcp)
}

#[inline(always)]
fn port_unreachable<P: Packet>(packet: &mut P, ip: &Ip) -> bool {
    // With IP options, what is quoted would have a varying length; such packets are rare enough to be dropped.
    if ip.l4 != ETH_LEN + IPV4_LEN {
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
        && packet.write(ETH_LEN, &header)
        && packet.write(ETH_LEN + IPV4_LEN, &icmp)
        && packet.write(ETH_LEN + IPV4_LEN + ICMP_LEN, &quoted)
}

/// An IPv4 header back to the sender.
#[inline(always)]
fn ip_header(ip: &Ip, protocol: u8, payload_len: usize) -> Option<[u16; IPV4_LEN / 2]> {
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
        memory::{Bytes, checksums_are_right, tcp, udp},
        packet::{Parsed, parse},
    };

    fn rejected(bytes: Vec<u8>) -> Option<Vec<u8>> {
        let mut packet = Bytes(bytes);
        let Parsed::Ip(ip) = parse(&packet) else {
            panic!("not IPv4")
        };
        reject(&mut packet, &ip).then_some(packet.0)
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
