//! ICMP errors about translated packets. An error quotes the packet that it is about, as that looked where the error arose;
//! whoever gets it must find there what he sent.

use dataplane_abi::{Addr, FlowKey, proto};

use crate::{
    checksum,
    packet::{ChecksumChange, ETH_LEN, Fragment, IPV4_LEN, Ip, Packet, word},
    translate::{IPV4_CHECKSUM, halves, ports},
};

/// Type, code, checksum and four bytes that depend on the type.
const ICMP_LEN: usize = 8;
const ICMP_CHECKSUM: usize = 2;

/// ICMP types that quote a packet (RFC 792): destination unreachable, time exceeded, parameter problem.
const QUOTING: [u8; 3] = [3, 11, 12];

/// The packet that an error quotes.
#[derive(Clone, Copy, Debug)]
pub struct Quoted {
    pub key: FlowKey,
    /// Offsets of its IP and transport headers.
    l3: usize,
    l4: usize,
    /// IP header checksum as it lies in memory.
    checksum: u16,
}

/// Reads what a packet quotes, when it is an ICMP error about TCP or UDP.
#[inline(always)]
pub fn quoted<P: Packet>(packet: &P, ip: &Ip) -> Option<Quoted> {
    if ip.key.proto != proto::ICMP || !matches!(ip.fragment, Fragment::Whole) {
        return None;
    }
    // Two bytes: the bound of a single one comes out as "start >= end", of which the verifier learns nothing.
    let [kind, _code] = packet.read::<[u8; 2]>(ip.l4)?;
    if !QUOTING.contains(&kind) {
        return None;
    }
    let l3 = ip.l4 + ICMP_LEN;
    let words: [u16; IPV4_LEN / 2] = packet.read(l3)?;
    let [version_ihl, _tos] = words[0].to_ne_bytes();
    let [_ttl, protocol] = words[4].to_ne_bytes();
    let header_len = (version_ihl as usize & 0x0f) << 2;
    // Later fragments have no ports to tell whose they are.
    let is_first = u16::from_be(words[3]) & 0x1fff == 0;
    let has_ports = matches!(protocol, proto::TCP | proto::UDP);
    if version_ihl >> 4 != 4 || header_len < IPV4_LEN || !has_ports || !is_first {
        return None;
    }
    let l4 = l3 + header_len;
    let ports: [u16; 2] = packet.read(l4)?;
    let src = Addr::from_v4_be(word(words[6], words[7]));
    let dst = Addr::from_v4_be(word(words[8], words[9]));
    Some(Quoted {
        key: FlowKey::new(src, dst, ports[0], ports[1], protocol),
        l3,
        l4,
        checksum: words[5],
    })
}

/// Gives an error the addresses of `to`, and what it quotes the addresses and ports of `about`. False when it cannot be
/// written; it must be dropped then.
///
/// The transport checksum within the quotation stays as it was: receivers cannot check it, most of the packet not being quoted.
#[inline(always)]
#[must_use]
pub fn translate<P: Packet>(
    packet: &mut P,
    ip: &Ip,
    quoted: &Quoted,
    to: &FlowKey,
    about: &FlowKey,
) -> bool {
    let change = ChecksumChange {
        difference: checksum::difference([ports(&quoted.key)], [ports(about)]),
        pseudo_header: false,
        optional: false,
    };
    // The quoted IP header's own checksum balances what changes in it: ICMP's sees the ports only.
    addresses(packet, quoted.l3, quoted.checksum, &quoted.key, about)
        && packet.patch_checksum(ip.l4 + ICMP_CHECKSUM, change)
        && packet.write(quoted.l4, &[about.sport, about.dport])
        && addresses(packet, ETH_LEN, ip.checksum, &ip.key, to)
}

/// Replaces the addresses of the IPv4 header at `l3`.
#[inline(always)]
fn addresses<P: Packet>(
    packet: &mut P,
    l3: usize,
    field: u16,
    from: &FlowKey,
    to: &FlowKey,
) -> bool {
    let (Some(old_src), Some(old_dst), Some(src), Some(dst)) = (
        from.src.v4_be(),
        from.dst.v4_be(),
        to.src.v4_be(),
        to.dst.v4_be(),
    ) else {
        return false;
    };
    let difference = checksum::difference([old_src, old_dst], [src, dst]);
    let (s, d) = (halves(src), halves(dst));
    packet.write(
        l3 + IPV4_CHECKSUM,
        &[checksum::updated(field, difference), s[0], s[1], d[0], d[1]],
    )
}
