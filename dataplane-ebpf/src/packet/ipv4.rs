//! IPv4 headers.

use dataplane_abi::{Addr, FlowKey};

use super::{ETH_LEN, Fragment, IPV4_LEN, Ip, Packet, transport, word};

#[inline(always)]
pub(super) fn parse<P: Packet>(packet: &P, ip: &mut Ip) -> Option<()> {
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
    let transport = transport::<false, P>(packet, l4, protocol, fragment)?;
    if (total_len as usize) < header_len + transport.needed {
        return None;
    }
    *ip = Ip {
        key: FlowKey::new(
            Addr::from_v4_be(src),
            Addr::from_v4_be(dst),
            transport.ports[0],
            transport.ports[1],
            protocol,
        ),
        l4,
        fragment,
        id: words[2] as u32,
        tcp_flags: transport.tcp_flags,
        checksum: words[5],
        total_len: total_len as u32,
        echo: transport.echo,
    };
    Some(())
}
