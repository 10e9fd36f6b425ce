//! Frames of the link: ARP (RFC 826), neighbour discovery (RFC 4861), and the beats by which agents know of each other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
const ETHERNET_LEN: usize = 14;
pub const ETHERTYPE_ARP: u16 = 0x0806;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// IEEE 802's first number for local experiments.
pub const ETHERTYPE_BEAT: u16 = 0x88b5;

const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
/// Ethernet and IPv4, with the lengths of their addresses.
const ARP_KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_LEN: usize = 28;

fn ethernet(to: Mac, from: Mac, ethertype: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(96);
    frame.extend(to);
    frame.extend(from);
    frame.extend(ethertype.to_be_bytes());
    frame
}

/// Somebody who asks for the link address of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    pub wanted: IpAddr,
    /// Who asks: unspecified when it only makes sure that nobody has its address.
    pub asker: IpAddr,
    pub asker_mac: Mac,
}

/// Reads a frame as a question by ARP or neighbour solicitation.
pub fn question(frame: &[u8]) -> Option<Question> {
    let ethertype = frame.get(12..)?.first_chunk::<2>()?;
    let body = frame.get(ETHERNET_LEN..)?;
    match u16::from_be_bytes(*ethertype) {
        ETHERTYPE_ARP => arp_question(body),
        ETHERTYPE_IPV6 => neighbour_question(frame, body),
        _ => None,
    }
}

fn arp_question(arp: &[u8]) -> Option<Question> {
    let arp: &[u8; ARP_LEN] = arp.first_chunk()?;
    let is_request = arp.starts_with(&ARP_KIND) && arp[6..8] == ARP_REQUEST.to_be_bytes();
    let v4 = |at: usize| Some(Ipv4Addr::from(*arp.get(at..)?.first_chunk::<4>()?));
    let question = Question {
        wanted: v4(24)?.into(),
        asker: v4(14)?.into(),
        asker_mac: *arp.get(8..)?.first_chunk()?,
    };
    is_request.then_some(question)
}

const ICMPV6: u8 = 58;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const IPV6_LEN: usize = 40;
const HOP_LIMIT: u8 = 255;
const TARGET_LINK_ADDRESS: u8 = 2;

fn neighbour_question(frame: &[u8], ip: &[u8]) -> Option<Question> {
    // Neither extension headers nor a hop limit that a router has counted down (RFC 4861, 7.1.1).
    let icmp = ip.get(IPV6_LEN..)?;
    if *ip.get(6)? != ICMPV6 || *ip.get(7)? != HOP_LIMIT {
        return None;
    }
    if icmp.first_chunk::<2>()? != &[NEIGHBOUR_SOLICITATION, 0] {
        return None;
    }
    let v6 = |bytes: &[u8], at: usize| Some(Ipv6Addr::from(*bytes.get(at..)?.first_chunk::<16>()?));
    let (source, destination) = (v6(ip, 8)?, v6(ip, 24)?);
    let length = usize::from(u16::from_be_bytes(*ip.get(4..)?.first_chunk()?));
    let message = icmp.get(..length)?;
    if icmpv6_checksum(source, destination, message) != 0 {
        return None;
    }
    let wanted = v6(icmp, 8)?;
    let asker_mac = *frame.get(6..)?.first_chunk()?;
    (!wanted.is_multicast()).then_some(Question {
        wanted: wanted.into(),
        asker: source.into(),
        asker_mac,
    })
}

/// The answer to a question: the wanted address is at `mac`.
pub fn answer(question: &Question, mac: Mac) -> Option<Vec<u8>> {
    match (question.wanted, question.asker) {
        (IpAddr::V4(wanted), IpAddr::V4(asker)) => Some(arp(
            ARP_REPLY,
            question.asker_mac,
            mac,
            wanted,
            asker,
            question.asker_mac,
        )),
        (IpAddr::V6(wanted), IpAddr::V6(asker)) if asker.is_unspecified() => {
            Some(advertisement(wanted, mac, None))
        }
        (IpAddr::V6(wanted), IpAddr::V6(asker)) => Some(advertisement(
            wanted,
            mac,
            Some((asker, question.asker_mac)),
        )),
        _ => None,
    }
}

/// Tells everybody on the link, unasked, that an address is at `mac` now.
pub fn announcement(address: IpAddr, mac: Mac) -> Vec<u8> {
    match address {
        // A request for itself: more hosts take note of that than of a reply (RFC 5227, 3).
        IpAddr::V4(v4) => arp(ARP_REQUEST, BROADCAST, mac, v4, v4, [0; 6]),
        IpAddr::V6(v6) => advertisement(v6, mac, None),
    }
}

fn arp(
    operation: u16,
    to: Mac,
    mac: Mac,
    sender: Ipv4Addr,
    target: Ipv4Addr,
    target_mac: Mac,
) -> Vec<u8> {
    let mut frame = ethernet(to, mac, ETHERTYPE_ARP);
    frame.extend(ARP_KIND);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac);
    frame.extend(sender.octets());
    frame.extend(target_mac);
    frame.extend(target.octets());
    frame
}

fn advertisement(address: Ipv6Addr, mac: Mac, asker: Option<(Ipv6Addr, Mac)>) -> Vec<u8> {
    const SOLICITED: u8 = 0x40;
    const OVERRIDE: u8 = 0x20;
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let (to, to_mac, flags) = match asker {
        Some((asker, mac)) => (asker, mac, SOLICITED | OVERRIDE),
        None => (all_nodes, [0x33, 0x33, 0, 0, 0, 1], OVERRIDE),
    };
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(address.octets());
    message.extend([TARGET_LINK_ADDRESS, 1]);
    message.extend(mac);
    let checksum = icmpv6_checksum(address, to, &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = ethernet(to_mac, mac, ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((message.len() as u16).to_be_bytes());
    frame.extend([ICMPV6, HOP_LIMIT]);
    frame.extend(address.octets());
    frame.extend(to.octets());
    frame.extend(message);
    frame
}

/// The checksum of a message whose checksum field is zero; of one that has it, 0 when it is right.
fn icmpv6_checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let mut bytes = Vec::with_capacity(IPV6_LEN + message.len() + 1);
    bytes.extend(source.octets());
    bytes.extend(destination.octets());
    bytes.extend((message.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, ICMPV6]);
    bytes.extend(message);
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    let mut sum: u32 = bytes
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The group that is asked for an address by neighbour discovery.
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    let low = u16::from_be_bytes([b, c]);
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), low)
}

const BEAT_MAGIC: &[u8; 4] = b"KWL1";
/// Longest name of a node (a DNS subdomain).
const NAME_LEN_MAX: usize = 253;

/// A sign of life of another agent on the link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beat {
    /// Name of its Node.
    pub node: String,
    /// An address of that Node, which says that both mean the same cluster.
    pub address: IpAddr,
    /// It ends now.
    pub leaving: bool,
}

impl Beat {
    pub fn frame(&self, mac: Mac) -> Vec<u8> {
        let mut frame = ethernet(BROADCAST, mac, ETHERTYPE_BEAT);
        frame.extend(BEAT_MAGIC);
        frame.push(u8::from(self.leaving));
        let address = match self.address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        frame.extend(address.octets());
        let name = &self.node.as_bytes()[..self.node.len().min(NAME_LEN_MAX)];
        frame.push(name.len() as u8);
        frame.extend(name);
        // The shortest frame that Ethernet has.
        frame.resize(frame.len().max(60), 0);
        frame
    }

    pub fn read(frame: &[u8]) -> Option<Self> {
        let body = frame.get(ETHERNET_LEN..)?.strip_prefix(BEAT_MAGIC)?;
        if frame.get(12..14)? != ETHERTYPE_BEAT.to_be_bytes() {
            return None;
        }
        let (leaving, body) = body.split_first()?;
        let (address, body) = body.split_first_chunk::<16>()?;
        let (length, body) = body.split_first()?;
        let name = body.get(..usize::from(*length))?;
        Some(Self {
            node: std::str::from_utf8(name).ok()?.to_owned(),
            address: Ipv6Addr::from(*address).to_canonical(),
            leaving: *leaving == 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OURS: Mac = [2, 0, 0, 0, 0, 1];
    const THEIRS: Mac = [2, 0, 0, 0, 0, 2];

    fn asked_by_arp(wanted: Ipv4Addr, asker: Ipv4Addr) -> Vec<u8> {
        arp(ARP_REQUEST, BROADCAST, THEIRS, asker, wanted, [0; 6])
    }

    #[test]
    fn arp_is_answered_to_who_asked() {
        let (vip, client) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 9));
        let question = question(&asked_by_arp(vip, client)).unwrap();
        assert_eq!(question.wanted, IpAddr::V4(vip));
        let reply = answer(&question, OURS).unwrap();
        assert_eq!(reply[..14], [&THEIRS[..], &OURS, &[8, 6]].concat());
        assert_eq!(reply[20..22], [0, 2]);
        assert_eq!(reply[22..32], [&OURS[..], &vip.octets()].concat());
        assert_eq!(reply[32..42], [&THEIRS[..], &client.octets()].concat());
        assert_eq!(super::question(&reply), None, "a reply asks nothing");
    }

    #[test]
    fn a_gratuitous_arp_asks_for_itself() {
        let vip = Ipv4Addr::new(192, 0, 2, 1);
        let frame = announcement(vip.into(), OURS);
        assert_eq!(frame[..6], BROADCAST);
        let itself = question(&frame).unwrap();
        assert_eq!((itself.wanted, itself.asker), (vip.into(), vip.into()));
        assert_eq!(itself.asker_mac, OURS);
    }

    fn solicitation(wanted: Ipv6Addr, asker: Ipv6Addr) -> Vec<u8> {
        let to = solicited_node(wanted);
        let mut message = vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        message.extend(wanted.octets());
        let checksum = icmpv6_checksum(asker, to, &message);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        let mut frame = ethernet([0x33, 0x33, 0xff, 0, 0, 1], THEIRS, ETHERTYPE_IPV6);
        frame.extend([0x60, 0, 0, 0, 0, 24, ICMPV6, HOP_LIMIT]);
        frame.extend(asker.octets());
        frame.extend(to.octets());
        frame.extend(message);
        frame
    }

    #[test]
    fn neighbours_are_answered_with_a_right_checksum() {
        let vip: Ipv6Addr = "2001:db8::12:3456".parse().unwrap();
        let client: Ipv6Addr = "2001:db8::9".parse().unwrap();
        assert_eq!(solicited_node(vip).to_string(), "ff02::1:ff12:3456");
        let question = question(&solicitation(vip, client)).unwrap();
        assert_eq!(
            (question.wanted, question.asker),
            (vip.into(), client.into())
        );
        let frame = answer(&question, OURS).unwrap();
        assert_eq!(frame[..6], THEIRS);
        let message = &frame[54..];
        assert_eq!(message[0], NEIGHBOUR_ADVERTISEMENT);
        assert_eq!(message[4], 0x60, "solicited, and overriding what was known");
        assert_eq!(message[8..24], vip.octets());
        assert_eq!(message[24..], [&[2, 1][..], &OURS].concat());
        assert_eq!(icmpv6_checksum(vip, client, message), 0);
    }

    #[test]
    fn solicitations_that_came_through_a_router_or_are_damaged_are_not_heard() {
        let good = solicitation(
            "2001:db8::1".parse().unwrap(),
            "2001:db8::9".parse().unwrap(),
        );
        for (at, value) in [(21, 254), (20, 17), (54, 133), (60, 1), (56, 0xff)] {
            let mut frame = good.clone();
            frame[at] = value;
            assert_eq!(question(&frame), None, "byte {at}");
        }
    }

    #[test]
    fn beats_are_read_as_they_were_written() {
        for (node, address, leaving) in
            [("node-1", "198.18.0.1", false), ("a", "2001:db8::1", true)]
        {
            let beat = Beat {
                node: node.into(),
                address: address.parse().unwrap(),
                leaving,
            };
            assert_eq!(Beat::read(&beat.frame(OURS)), Some(beat));
        }
    }

    proptest! {
        #[test]
        fn any_frame_is_read_or_not(mut frame in prop::collection::vec(any::<u8>(), 0..120), kind in 0..3usize) {
            if frame.len() >= ETHERNET_LEN {
                let ethertype = [ETHERTYPE_ARP, ETHERTYPE_IPV6, ETHERTYPE_BEAT][kind];
                frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
            }
            let _ = question(&frame);
            let _ = Beat::read(&frame);
        }
    }
}
