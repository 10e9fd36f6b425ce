//! IPv6 headers, extension headers among them.

use dataplane_abi::{Addr, FlowKey};

use super::{ETH_LEN, Fragment, IPV6_ADDRESSES, IPV6_LEN, Ip, Packet, transport, word};

/// IPv6 extension headers that are walked over. A packet has one or two; with more it counts as malformed.
const EXTENSIONS_MAX: u32 = 4;

/// IPv6 extension headers (RFC 8200, RFC 4302).
mod extension {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const DESTINATION: u8 = 60;
}

/// What lies behind the extension headers.
pub(crate) struct Inner {
    pub protocol: u8,
    /// Offset of the transport header.
    pub l4: usize,
    pub fragment: Fragment,
    /// Identification of a fragment, network order.
    pub id: u32,
}

/// Walks over the extension headers at `l4`, of which `protocol` is the first or, without any, the transport's. Nothing when they are cut
/// short or too many.
#[inline(always)]
pub(crate) fn behind_extensions<P: Packet>(
    packet: &P,
    mut l4: usize,
    mut protocol: u8,
) -> Option<Inner> {
    let (mut fragment, mut id) = (Fragment::Whole, 0u32);
    let mut extensions = 0;
    loop {
        match protocol {
            extension::HOP_BY_HOP | extension::ROUTING | extension::DESTINATION => {
                let [next, len] = packet.read::<[u8; 2]>(l4)?;
                protocol = next;
                l4 += (len as usize + 1) << 3;
            }
            extension::AUTHENTICATION => {
                let [next, len] = packet.read::<[u8; 2]>(l4)?;
                protocol = next;
                l4 += (len as usize + 2) << 2;
            }
            extension::FRAGMENT => {
                let header: [u16; 4] = packet.read(l4)?;
                let [next, _reserved] = header[0].to_ne_bytes();
                let bits = u16::from_be(header[1]);
                protocol = next;
                l4 += 8;
                id = word(header[2], header[3]);
                fragment = match (bits >> 3, bits & 1 != 0) {
                    (0, false) => Fragment::Whole,
                    (0, true) => Fragment::First,
                    _ => Fragment::Later,
                };
            }
            _ => break,
        }
        if matches!(fragment, Fragment::Later) {
            // What follows is the middle of something.
            break;
        }
        // Last in a turn: see `flow::enter`.
        extensions += 1;
        if extensions > EXTENSIONS_MAX {
            return None;
        }
    }
    Some(Inner {
        protocol,
        l4,
        fragment,
        id,
    })
}

#[inline(always)]
pub(super) fn parse<P: Packet>(packet: &P, ip: &mut Ip) -> Option<()> {
    let words: [u16; 4] = packet.read(ETH_LEN)?;
    let [src_high, src_low, dst_high, dst_low]: [u64; 4] = packet.read(ETH_LEN + IPV6_ADDRESSES)?;
    let [version, _class] = words[0].to_ne_bytes();
    if version >> 4 != 6 {
        return None;
    }
    let address = |high, low| Addr { words: [high, low] };
    let (src, dst) = (address(src_high, src_low), address(dst_high, dst_low));
    // Mapped IPv4 addresses do not come by the wire: in keys they are IPv4's.
    if src.v4_be().is_some() || dst.v4_be().is_some() {
        return None;
    }
    let payload_len = u16::from_be(words[2]) as usize;
    let [protocol, _hop_limit] = words[3].to_ne_bytes();
    let Inner {
        protocol,
        l4,
        fragment,
        id,
    } = behind_extensions(packet, ETH_LEN + IPV6_LEN, protocol)?;
    let transport = transport::<true, P>(packet, l4, protocol, fragment)?;
    // Zero is a jumbogram's, which the stack makes of segments that it has not cut yet.
    if payload_len != 0 && payload_len + IPV6_LEN + ETH_LEN < l4 + transport.needed {
        return None;
    }
    *ip = Ip {
        key: FlowKey::new(src, dst, transport.ports[0], transport.ports[1], protocol),
        l4,
        fragment,
        id,
        tcp_flags: transport.tcp_flags,
        checksum: 0,
        total_len: match payload_len {
            0 => 0,
            len => (len + IPV6_LEN) as u32,
        },
        echo: transport.echo,
    };
    Some(())
}
