//! ICMP errors about translated packets. An error quotes the packet that it is about, as that looked where the error arose;
//! whoever gets it must find there what he sent.

use dataplane_abi::{Addr, FlowKey, proto};

use crate::{
    checksum,
    packet::{
        ChecksumChange, ETH_LEN, Echo, Fragment, IPV4_LEN, IPV6_ADDRESSES, IPV6_LEN, Ip, Packet,
        echo, has_ports,
        ipv6::{Inner, behind_extensions},
        word,
    },
    translate::{address_difference, ports, put_addresses, write_addresses, write_ports},
};

/// Type, code, checksum and four bytes that depend on the type.
const ICMP_LEN: usize = 8;
const ICMP_CHECKSUM: usize = 2;

/// ICMP types that quote a packet (RFC 792): destination unreachable, time exceeded, parameter problem.
const QUOTING: [u8; 3] = [3, 11, 12];
/// ICMPv6 types that do (RFC 4443): destination unreachable, packet too big, time exceeded, parameter problem.
const QUOTING_V6: core::ops::RangeInclusive<u8> = 1..=4;
/// ICMPv6 types of neighbour discovery (RFC 4861).
const DISCOVERY: core::ops::RangeInclusive<u8> = 133..=137;

/// Whether a packet is neighbour discovery's.
#[inline(always)]
pub fn is_discovery<P: Packet>(packet: &P, ip: &Ip) -> bool {
    // Two bytes: the bound of a single one comes out as "start >= end", of which the verifier learns nothing.
    match packet.read::<[u8; 2]>(ip.l4()) {
        Some([kind, _code]) => {
            ip.key.proto == proto::ICMPV6
                && matches!(ip.fragment, Fragment::Whole)
                && DISCOVERY.contains(&kind)
        }
        None => false,
    }
}

/// Where the packet that an error quotes lies.
#[derive(Clone, Copy, Debug)]
pub struct Quoted {
    /// Offsets of its IP and transport headers.
    l3: usize,
    l4: usize,
    /// IPv4 header checksum as it lies in memory.
    checksum: u16,
    /// An echo, which has an identifier for a port.
    is_echo: bool,
}

impl Quoted {
    /// Of no packet yet.
    pub const NONE: Self = Self {
        l3: 0,
        l4: 0,
        checksum: 0,
        is_echo: false,
    };
}

/// Reads the key of what a packet quotes, when it is an ICMP error about what may be a flow's.
#[inline(always)]
pub fn quoted<const V6: bool, P: Packet>(packet: &P, ip: &Ip, key: &mut FlowKey) -> Option<Quoted> {
    if ip.key.proto != proto::icmp(V6) || !matches!(ip.fragment, Fragment::Whole) {
        return None;
    }
    let [kind, _code] = packet.read::<[u8; 2]>(ip.l4())?;
    let l3 = ip.l4() + ICMP_LEN;
    if V6 && QUOTING_V6.contains(&kind) {
        quoted_v6(packet, l3, key)
    } else if !V6 && QUOTING.contains(&kind) {
        quoted_v4(packet, l3, key)
    } else {
        None
    }
}

#[inline(always)]
fn quoted_v4<P: Packet>(packet: &P, l3: usize, key: &mut FlowKey) -> Option<Quoted> {
    let words: [u16; IPV4_LEN / 2] = packet.read(l3)?;
    let [version_ihl, _tos] = words[0].to_ne_bytes();
    let [_ttl, protocol] = words[4].to_ne_bytes();
    let header_len = (version_ihl as usize & 0x0f) << 2;
    // Later fragments have no ports to tell whose they are.
    let is_first = u16::from_be(words[3]) & 0x1fff == 0;
    if version_ihl >> 4 != 4 || header_len < IPV4_LEN || !is_first {
        return None;
    }
    let l4 = l3 + header_len;
    let (ports, is_echo) = quoted_ports::<false, P>(packet, l4, protocol)?;
    let src = Addr::from_v4_be(word(words[6], words[7]));
    let dst = Addr::from_v4_be(word(words[8], words[9]));
    *key = FlowKey::new(src, dst, ports[0], ports[1], protocol);
    Some(Quoted {
        l3,
        l4,
        checksum: words[5],
        is_echo,
    })
}

/// The ports of what is quoted, of which there may be eight bytes only, and whether they are an echo's identifier.
#[inline(always)]
fn quoted_ports<const V6: bool, P: Packet>(
    packet: &P,
    l4: usize,
    protocol: u8,
) -> Option<([u16; 2], bool)> {
    if has_ports(protocol) {
        return Some((packet.read(l4)?, false));
    }
    let (ports, kind) = echo::<V6, P>(packet, l4);
    let is_echo = protocol == proto::icmp(V6) && !matches!(kind, Echo::None);
    is_echo.then_some((ports, true))
}

/// An error about a later fragment, or behind more extension headers than are walked over, tells nobody anything: it is left as it is.
#[inline(always)]
fn quoted_v6<P: Packet>(packet: &P, l3: usize, key: &mut FlowKey) -> Option<Quoted> {
    let words: [u16; 4] = packet.read(l3)?;
    let [src_high, src_low, dst_high, dst_low]: [u64; 4] = packet.read(l3 + IPV6_ADDRESSES)?;
    let [version, _class] = words[0].to_ne_bytes();
    let [protocol, _hop_limit] = words[3].to_ne_bytes();
    let address = |high, low| Addr { words: [high, low] };
    let (src, dst) = (address(src_high, src_low), address(dst_high, dst_low));
    let is_mapped = src.v4_be().is_some() || dst.v4_be().is_some();
    if version >> 4 != 6 || is_mapped {
        return None;
    }
    let Inner {
        protocol,
        l4,
        fragment,
        ..
    } = behind_extensions(packet, l3 + IPV6_LEN, protocol)?;
    if matches!(fragment, Fragment::Later) {
        return None;
    }
    let (ports, is_echo) = quoted_ports::<true, P>(packet, l4, protocol)?;
    *key = FlowKey::new(src, dst, ports[0], ports[1], protocol);
    Some(Quoted {
        l3,
        l4,
        checksum: 0,
        is_echo,
    })
}

/// Gives an error the addresses of `to`, and what it quotes the addresses and ports of `about`. False when it cannot be
/// written; it must be dropped then.
///
/// The transport checksum within the quotation stays as it was: receivers cannot check it, most of the packet not being quoted.
#[inline(always)]
#[must_use]
pub fn translate<const V6: bool, P: Packet>(
    packet: &mut P,
    ip: &Ip,
    place: &Quoted,
    quoted: &FlowKey,
    to: &FlowKey,
    about: &FlowKey,
) -> bool {
    let (Some(inner), Some(outer)) = (
        address_difference::<V6>(quoted, about),
        address_difference::<V6>(&ip.key, to),
    ) else {
        return false;
    };
    let (old_ports, new_ports) = (ports(quoted), ports(about));
    let field = ip.l4() + ICMP_CHECKSUM;
    let patch = |packet: &mut P, difference, pseudo_header| {
        let change = ChecksumChange {
            difference,
            pseudo_header,
            optional: false,
        };
        packet.patch_checksum(field, change)
    };
    // ICMP's checksum covers what is quoted. A quoted IPv4 header's own checksum balances what changes in it, so that only the ports
    // show; IPv6 has none, but its ICMP has a pseudo header.
    let changed = checksum::difference([old_ports], [new_ports]);
    let summed = if V6 {
        patch(packet, changed, false) && patch(packet, inner, false) && patch(packet, outer, true)
    } else {
        patch(packet, changed, false)
    };
    summed
        && write_addresses::<V6, P>(packet, place.l3, place.checksum, inner, about)
        && write_ports(packet, place.l4, about, place.is_echo)
        && match V6 {
            true => put_addresses(packet, to),
            false => write_addresses::<false, P>(packet, ETH_LEN, ip.checksum, outer, to),
        }
}
