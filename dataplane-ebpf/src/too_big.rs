//! Telling the sender of a packet that is longer than its way takes (RFC 1191, RFC 8201). What the host's stack sends on it judges itself;
//! what goes by its routes without it is judged here.

use dataplane_abi::proto;

use crate::{
    checksum,
    hook::Notes,
    packet::{ETH_LEN, Fragment, IPV4_LEN, IPV6_LEN, Ip, Packet},
    reject::{ICMP_LEN, ip_header, ipv6_header, pseudo_v6},
    translate::IPV4_CHECKSUM,
};

/// What is quoted of an IPv4 packet: eight bytes behind the longest header. A packet that is too long for any link has as many.
const QUOTED_LEN: usize = 60 + 8;
/// And of one of IPv6, where it is the ports behind extension headers, a fragment's for instance.
const QUOTED_V6_LEN: usize = IPV6_LEN + 32 + 8;

/// Turns a packet, as it came, into the ICMP error by which its sender hears how long one may be, `mtu` bytes from the IP header on. It comes
/// from the address that the packet was sent to, as refusals do: the host takes none from its own. False when there is nobody to be told (an
/// error, a later fragment) or it cannot be built; the packet is to be dropped then.
///
/// That an IPv4 packet may be cut is not looked at: programs cannot cut, and the host's stack takes none from its own address, which is what
/// pods leave with. Senders that let routers cut cut by themselves when they are told.
#[inline(always)]
#[must_use]
pub fn too_big<const V6: bool, P: Packet>(packet: &mut P, ip: &Ip, mtu: u32) -> bool {
    let is_error = ip.key.proto == proto::icmp(V6) && !ip.is_echo();
    if is_error || matches!(ip.fragment, Fragment::Later) {
        return false;
    }
    match V6 {
        true => tell_v6(packet, ip, mtu),
        false => tell_v4(packet, ip, mtu),
    }
}

/// Makes a translated packet what it was: that is what [`too_big`] quotes. Apart from it, since the two have no room on one stack. False when
/// it cannot be written.
#[inline(always)]
#[must_use]
pub fn translate_back<const V6: bool, P: Packet>(packet: &mut P, notes: &mut Notes) -> bool {
    let Notes { ip, to, aside, .. } = notes;
    let came = &mut aside.about;
    *came = ip.key.again();
    ip.key = to.again();
    if !V6 {
        match packet.read::<u16>(ETH_LEN + IPV4_CHECKSUM) {
            Some(field) => ip.checksum = field,
            None => return false,
        }
    }
    let is_back = packet.translate::<V6>(ip, came);
    ip.key = came.again();
    is_back
}

#[inline(always)]
fn tell_v4<P: Packet>(packet: &mut P, ip: &Ip, mtu: u32) -> bool {
    let Some(quoted) = packet.read::<[u16; QUOTED_LEN / 2]>(ETH_LEN) else {
        return false;
    };
    let len = ICMP_LEN + QUOTED_LEN;
    let Some(header) = ip_header(ip, proto::ICMP, len) else {
        return false;
    };
    // Type 3, destination unreachable; code 4, fragmentation needed.
    let mut icmp = [u16::from_ne_bytes([3, 4]), 0, 0, (mtu as u16).to_be()];
    icmp[1] = checksum::over(&quoted, !checksum::over(&icmp, 0) as u32);
    packet.resize((ETH_LEN + IPV4_LEN + len) as u32)
        && packet.put(ETH_LEN, &header)
        && packet.put(ETH_LEN + IPV4_LEN, &icmp)
        && packet.put(ETH_LEN + IPV4_LEN + ICMP_LEN, &quoted)
}

#[inline(always)]
fn tell_v6<P: Packet>(packet: &mut P, ip: &Ip, mtu: u32) -> bool {
    let Some(quoted) = packet.read::<[u16; QUOTED_V6_LEN / 2]>(ETH_LEN) else {
        return false;
    };
    let len = ICMP_LEN + QUOTED_V6_LEN;
    let header = ipv6_header(ip, proto::ICMPV6, len);
    // Type 2, packet too big.
    let (high, low) = (((mtu >> 16) as u16).to_be(), (mtu as u16).to_be());
    let mut icmp = [u16::from_ne_bytes([2, 0]), 0, high, low];
    let pseudo = pseudo_v6(&header, proto::ICMPV6, len);
    icmp[1] = checksum::over(&quoted, !checksum::over(&icmp, pseudo) as u32);
    packet.resize((ETH_LEN + IPV6_LEN + len) as u32)
        && packet.put(ETH_LEN, &header)
        && packet.put(ETH_LEN + IPV6_LEN, &icmp)
        && packet.put(ETH_LEN + IPV6_LEN + ICMP_LEN, &quoted)
}
