//! Reading the beginning of a packet that an event carries.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dataplane_abi::proto;

const ETHERNET_LEN: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Extension headers of IPv6 that have a length of their own.
const IPV6_EXTENSIONS: [u8; 3] = [0, 43, 60];
const IPV6_FRAGMENT: u8 = 44;
/// Extension headers that are followed; what has more is shown without ports.
const IPV6_EXTENSIONS_MAX: usize = 8;

/// What a packet's headers say, as far as they were captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Source and destination; absent where the protocol has none, or in a later fragment.
    pub ports: Option<(u16, u16)>,
    /// Flags of TCP.
    pub tcp_flags: Option<u8>,
    /// Type and code of ICMP.
    pub icmp: Option<(u8, u8)>,
    pub fragment: bool,
}

/// Reads a packet that starts with its Ethernet header; None when it is not IP, or too short to say.
pub fn decode(packet: &[u8]) -> Option<Decoded> {
    let ip = packet.get(ETHERNET_LEN..)?;
    match u16_at(packet, 12)? {
        ETHERTYPE_IPV4 => ipv4(ip),
        ETHERTYPE_IPV6 => ipv6(ip),
        _ => None,
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let two = bytes.get(at..)?.first_chunk::<2>()?;
    Some(u16::from_be_bytes(*two))
}

fn ipv4(ip: &[u8]) -> Option<Decoded> {
    let header = usize::from(ip.first()? & 0x0f) * 4;
    let address = |at: usize| {
        let four = ip.get(at..)?.first_chunk::<4>()?;
        Some(IpAddr::V4(Ipv4Addr::from(*four)))
    };
    let fragment = u16_at(ip, 6)?;
    let decoded = Decoded {
        source: address(12)?,
        destination: address(16)?,
        protocol: *ip.get(9)?,
        ports: None,
        tcp_flags: None,
        icmp: None,
        fragment: fragment & 0x3fff != 0,
    };
    let later = fragment & 0x1fff != 0;
    Some(with_transport(decoded, ip.get(header..).filter(|_| !later)))
}

fn ipv6(ip: &[u8]) -> Option<Decoded> {
    let address = |at: usize| {
        let sixteen = ip.get(at..)?.first_chunk::<16>()?;
        Some(IpAddr::V6(Ipv6Addr::from(*sixteen)))
    };
    let (mut next, mut at, mut fragment, mut later) = (*ip.get(6)?, 40, false, false);
    for _ in 0..IPV6_EXTENSIONS_MAX {
        let length = match next {
            IPV6_FRAGMENT => {
                fragment = true;
                later |= u16_at(ip, at + 2).is_some_and(|offset| offset & 0xfff8 != 0);
                8
            }
            extension if IPV6_EXTENSIONS.contains(&extension) => match ip.get(at + 1) {
                Some(length) => 8 + usize::from(*length) * 8,
                None => break,
            },
            _ => break,
        };
        match ip.get(at) {
            Some(following) => next = *following,
            None => break,
        }
        at += length;
    }
    let decoded = Decoded {
        source: address(8)?,
        destination: address(24)?,
        protocol: next,
        ports: None,
        tcp_flags: None,
        icmp: None,
        fragment,
    };
    Some(with_transport(decoded, ip.get(at..).filter(|_| !later)))
}

fn with_transport(mut decoded: Decoded, transport: Option<&[u8]>) -> Decoded {
    const ICMPV6: u8 = 58;
    let Some(bytes) = transport else {
        return decoded;
    };
    match decoded.protocol {
        proto::TCP | proto::UDP | proto::SCTP => {
            decoded.ports = u16_at(bytes, 0).zip(u16_at(bytes, 2));
            if decoded.protocol == proto::TCP {
                decoded.tcp_flags = bytes.get(13).copied();
            }
        }
        proto::ICMP | ICMPV6 => {
            decoded.icmp = bytes.first().copied().zip(bytes.get(1).copied());
        }
        _ => {}
    }
    decoded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ipv4_packet(protocol: u8, fragment: u16, transport: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 12];
        packet.extend([0x08, 0x00, 0x45, 0, 0, 0, 0, 0]);
        packet.extend(fragment.to_be_bytes());
        packet.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 96, 0, 7]);
        packet.extend(transport);
        packet
    }

    #[test]
    fn a_syn_is_read() {
        let transport = [15, 160, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2];
        let decoded = decode(&ipv4_packet(proto::TCP, 0x4000, &transport)).unwrap();
        assert_eq!(decoded.source, IpAddr::from([10, 0, 0, 1]));
        assert_eq!(decoded.destination, IpAddr::from([10, 96, 0, 7]));
        assert_eq!(decoded.ports, Some((4000, 80)));
        assert_eq!((decoded.tcp_flags, decoded.fragment), (Some(2), false));
    }

    #[test]
    fn a_later_fragment_has_no_ports() {
        let decoded = decode(&ipv4_packet(proto::UDP, 0x2001, &[15, 160, 0, 80])).unwrap();
        assert_eq!((decoded.ports, decoded.fragment), (None, true));
    }

    #[test]
    fn ipv6_is_read_through_its_extension_headers() {
        let mut packet = vec![0; 12];
        packet.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 0, 64]);
        packet.extend("fd00::1".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend("fd00::2".parse::<Ipv6Addr>().unwrap().octets());
        // Hop-by-hop options, then UDP.
        packet.extend([proto::UDP, 0, 0, 0, 0, 0, 0, 0, 0, 53, 0, 54]);
        let decoded = decode(&packet).unwrap();
        assert_eq!(
            (decoded.protocol, decoded.ports),
            (proto::UDP, Some((53, 54)))
        );
        assert_eq!(decoded.destination, "fd00::2".parse::<IpAddr>().unwrap());
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_or_not_but_never_beyond_its_end(bytes in prop::collection::vec(any::<u8>(), 0..128), kind in 0..3usize) {
            let mut packet = bytes;
            let ethertype = [ETHERTYPE_IPV4, ETHERTYPE_IPV6, 0x0806][kind];
            if packet.len() >= ETHERNET_LEN {
                packet[12..14].copy_from_slice(&ethertype.to_be_bytes());
            }
            let decoded = decode(&packet);
            prop_assert!(decoded.is_none() || packet.len() >= ETHERNET_LEN + 20);
        }
    }
}
