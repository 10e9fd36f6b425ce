//! Reading packets. [`Packet`] is the seam: a socket buffer in the kernel, a vector in tests.

use dataplane_abi::{Addr, FlowKey, FragmentKey, Plain, proto};

/// Length of an Ethernet header; the IP header lies behind it.
pub const ETH_LEN: usize = 14;
/// Length of an IPv4 header without options.
pub const IPV4_LEN: usize = 20;

const ETHERTYPE_OFFSET: usize = 12;
const ETHERTYPE_IPV4: u16 = u16::from_ne_bytes([0x08, 0x00]);

/// Types of ICMP messages.
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;

/// TCP flag bits.
pub mod tcp_flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
}

/// A packet that starts with an Ethernet header.
pub trait Packet {
    /// The bytes at `offset`, as they lie in memory, when the packet has them.
    fn read<T: Plain>(&self, offset: usize) -> Option<T>;

    /// Replaces the bytes at `offset`; false when the packet is too short or cannot be written.
    #[must_use]
    fn write<T: Plain>(&mut self, offset: usize, value: &T) -> bool;

    /// Corrects the TCP, UDP or ICMP checksum at `offset` for a change of what it covers.
    #[must_use]
    fn patch_checksum(&mut self, offset: usize, change: ChecksumChange) -> bool;

    /// Makes the packet `len` bytes long, filling with zeros or cutting at the end.
    #[must_use]
    fn resize(&mut self, len: u32) -> bool;
}

/// A change to account for in a transport checksum.
#[derive(Clone, Copy, Debug)]
pub struct ChecksumChange {
    /// [`crate::checksum::difference`] of the words that changed.
    pub difference: u32,
    /// The words are of the pseudo header (addresses). A checksum that hardware is yet to complete holds those only.
    pub pseudo_header: bool,
    /// Zero means "none" and stays (UDP over IPv4).
    pub optional: bool,
}

/// Whether a packet is a fragment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fragment {
    Whole,
    /// Has the transport header.
    First,
    /// Has none: ports in the key are 0.
    Later,
}

/// Whether a packet is an ICMP echo.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Echo {
    None,
    /// Its identifier is the key's source port; the other is 0.
    Request,
    /// Its identifier is the key's destination port; the other is 0.
    Reply,
}

/// A packet's coordinates.
#[derive(Clone, Copy, Debug)]
pub struct Ip {
    /// Ports are 0 where the protocol has none or the fragment does not hold them.
    pub key: FlowKey,
    /// Offset of the transport header.
    pub l4: usize,
    pub fragment: Fragment,
    /// Identification, network order.
    pub id: u16,
    /// TCP's flags; 0 for other protocols.
    pub tcp_flags: u8,
    /// IP header checksum as it lies in memory.
    pub checksum: u16,
    /// IP total length, host order.
    pub total_len: u16,
    pub echo: Echo,
}

/// What a packet turned out to be.
#[derive(Clone, Copy, Debug)]
pub enum Parsed {
    Ip(Ip),
    /// Not IPv4: left alone.
    Other,
    /// IPv4 by its type, but its headers are cut short or contradict themselves.
    Malformed,
}

/// Reads the headers of a packet.
#[inline(always)]
pub fn parse<P: Packet>(packet: &P) -> Parsed {
    match packet.read::<u16>(ETHERTYPE_OFFSET) {
        Some(ETHERTYPE_IPV4) => match parse_ipv4(packet) {
            Some(ip) => Parsed::Ip(ip),
            None => Parsed::Malformed,
        },
        _ => Parsed::Other,
    }
}

#[inline(always)]
fn parse_ipv4<P: Packet>(packet: &P) -> Option<Ip> {
    // One bounds check for the whole header; words as they lie in memory.
    let words: [u16; 10] = packet.read(ETH_LEN)?;
    let [version_ihl, _tos] = words[0].to_ne_bytes();
    let header_len = (version_ihl as usize & 0x0f) << 2;
    if version_ihl >> 4 != 4 || header_len < IPV4_LEN {
        return None;
    }
    let total_len = u16::from_be(words[1]);
    let [_ttl, protocol] = words[4].to_ne_bytes();
    let src = word(words[6], words[7]);
    let dst = word(words[8], words[9]);
    let fragment_bits = u16::from_be(words[3]);
    let fragment = match (fragment_bits & 0x1fff, fragment_bits & 0x2000 != 0) {
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First,
        _ => Fragment::Later,
    };
    let l4 = ETH_LEN + header_len;
    let (mut ports, mut tcp_flags, mut echo) = ([0u16; 2], 0, Echo::None);
    if !matches!(fragment, Fragment::Later) {
        let needed = match protocol {
            proto::TCP => {
                ports = packet.read(l4)?;
                // The rest of a TCP header may lie in the next fragment, but no sender does that: RFC 1858, 8 bytes least.
                tcp_flags = packet.read::<u8>(l4 + 13)?;
                20
            }
            proto::UDP => {
                ports = packet.read(l4)?;
                8
            }
            proto::ICMP => {
                // RFC 792: type and code, checksum, identifier.
                let message = packet.read::<[u16; 3]>(l4).unwrap_or([u16::MAX; 3]);
                let [kind, _code] = message[0].to_ne_bytes();
                if kind == ECHO_REQUEST {
                    (echo, ports[0]) = (Echo::Request, message[2]);
                } else if kind == ECHO_REPLY {
                    (echo, ports[1]) = (Echo::Reply, message[2]);
                }
                0
            }
            _ => 0,
        };
        if (total_len as usize) < header_len + needed {
            return None;
        }
    }
    Some(Ip {
        key: FlowKey::new(
            Addr::from_v4_be(src),
            Addr::from_v4_be(dst),
            ports[0],
            ports[1],
            protocol,
        ),
        l4,
        fragment,
        id: words[2],
        tcp_flags,
        checksum: words[5],
        total_len,
        echo,
    })
}

/// Two 16-bit words of memory as one of 32 bits of memory.
#[inline(always)]
pub const fn word(first: u16, second: u16) -> u32 {
    let (a, b) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a[0], a[1], b[0], b[1]])
}

impl Ip {
    /// The key under which the datagram's ports are remembered.
    #[inline(always)]
    pub fn fragment_key(&self) -> FragmentKey {
        FragmentKey {
            src: self.key.src,
            dst: self.key.dst,
            id: self.id as u32,
            proto: self.key.proto,
            pad: [0; 3],
        }
    }

    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        self.key.proto == proto::TCP
    }

    /// Whether Services are spoken over the packet's protocol.
    #[inline(always)]
    pub fn has_ports(&self) -> bool {
        matches!(self.key.proto, proto::TCP | proto::UDP)
    }

    #[inline(always)]
    pub fn is_echo(&self) -> bool {
        !matches!(self.echo, Echo::None)
    }

    /// Whether it opens a TCP connection.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.is_tcp() && self.tcp_flags & (tcp_flag::SYN | tcp_flag::ACK) == tcp_flag::SYN
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{Bytes, tcp, udp};

    fn v4(text: &str) -> Addr {
        text.parse::<core::net::Ipv4Addr>().unwrap().into()
    }

    fn ipv4(bytes: &[u8]) -> Ip {
        match parse(&Bytes(bytes.to_vec())) {
            Parsed::Ip(ip) => ip,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_tcp_packet_has_its_tuple_and_flags() {
        let ip = ipv4(&tcp("10.0.0.1:1000", "10.0.0.2:80", tcp_flag::SYN, b""));
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
        assert_eq!(ip.l4, 34);
    }

    #[test]
    fn options_move_the_transport_header() {
        let mut bytes = udp("10.0.0.1:1000", "10.0.0.2:53", b"x");
        bytes[14] = 0x46;
        bytes[17] += 4;
        bytes.splice(34..34, [1, 1, 1, 1]);
        let ip = ipv4(&bytes);
        assert_eq!((ip.l4, ip.key.dport), (38, 53u16.to_be()));
    }

    #[test]
    fn later_fragments_have_no_ports() {
        let mut bytes = udp("10.0.0.1:1000", "10.0.0.2:53", b"payload");
        bytes[20] = 0x20;
        assert_eq!(
            (ipv4(&bytes).fragment, ipv4(&bytes).key.dport),
            (Fragment::First, 53u16.to_be())
        );
        bytes[21] = 1;
        assert_eq!(
            (ipv4(&bytes).fragment, ipv4(&bytes).key.dport),
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

    #[test]
    fn what_is_not_ipv4_is_left_alone() {
        for ethertype in [[0x86, 0xdd], [0x08, 0x06], [0x81, 0x00]] {
            let mut bytes = udp("10.0.0.1:1", "10.0.0.2:2", b"");
            bytes[12..14].copy_from_slice(&ethertype);
            assert!(matches!(parse(&Bytes(bytes)), Parsed::Other));
        }
        assert!(matches!(parse(&Bytes(vec![])), Parsed::Other));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic_and_within_the_packet(mut bytes in prop::collection::vec(any::<u8>(), 0..128), as_ipv4: bool) {
            if as_ipv4 && bytes.len() > 14 {
                bytes[12] = 8;
                bytes[13] = 0;
                bytes[14] = 0x40 | bytes[14] & 0x0f;
            }
            let len = bytes.len();
            if let Parsed::Ip(ip) = parse(&Bytes(bytes)) {
                prop_assert!(ip.l4 >= 34 && ip.l4 <= 74);
                if ip.has_ports() && ip.fragment != Fragment::Later {
                    prop_assert!(ip.l4 + 4 <= len);
                }
            }
        }
    }
}
