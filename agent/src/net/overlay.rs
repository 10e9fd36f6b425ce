//! The VXLAN interface by which nodes reach each other's pods where the network between them does not carry pod addresses (RFC 7348).
//!
//! Nothing is learnt and nothing is flooded: every node's MAC address follows from its underlay address, and forwarding entries say
//! which node has it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use sha2::{Digest, Sha256};

use super::message;
use super::netlink::Step;
use super::{Kernel, Link, NetlinkError};

/// Name of the interface.
pub const OVERLAY: &str = "keelway-vx";
/// The network's number in packets, and the port that IANA gave VXLAN.
const VNI: u32 = 107;
const PORT: u16 = 4789;

/// Bytes that the overlay adds to a packet: Ethernet, VXLAN, UDP and the outer IP header.
pub const fn overhead(underlay: IpAddr) -> u32 {
    14 + 8 + 8 + if underlay.is_ipv4() { 20 } else { 40 }
}

/// The MAC address of the overlay's interface on the node that has this underlay address.
pub fn overlay_mac(underlay: IpAddr) -> [u8; 6] {
    match underlay {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            [0x0a, 0x6d, a, b, c, d]
        }
        IpAddr::V6(v6) => {
            let digest = Sha256::digest(v6.octets());
            [0x0a, 0x6f, digest[0], digest[1], digest[2], digest[3]]
        }
    }
}

/// The link-local address of the overlay's interface on the node that has this underlay address: the one that its MAC address makes
/// (RFC 4291, appendix A).
///
/// Routes of IPv6 lead by it. The kernel refuses a gateway out of the range itself ("nexthop has invalid gateway or device mismatch")
/// while the range's route leads elsewhere, so that a way which was direct could not go back to the overlay.
pub fn overlay_link_local(underlay: IpAddr) -> Ipv6Addr {
    let [a, b, c, d, e, f] = overlay_mac(underlay);
    let interface = [a ^ 0x02, b, c, 0xff, 0xfe, d, e, f];
    Ipv6Addr::from((0xfe80_u128 << 112) | u128::from(u64::from_be_bytes(interface)))
}

/// Another node in the overlay: the node itself, and the addresses that routes to it lead by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OverlayPeer {
    pub underlay: IpAddr,
    pub gateways: BTreeSet<IpAddr>,
}

impl Kernel {
    /// Makes the interface, unless it is there and as it should be.
    pub fn make_overlay(&mut self, underlay: IpAddr, mtu: u32) -> Result<Link, NetlinkError> {
        let mac = overlay_mac(underlay);
        if let Some(link) = self.link(OVERLAY)? {
            if link.mac == Some(mac) && link.mtu == mtu {
                if !link.up {
                    self.set_up(link.index)?;
                }
                return Ok(link);
            }
            // The node has another address or uplink now.
            self.delete_link(OVERLAY)?;
        }
        let local = match underlay {
            IpAddr::V4(v4) => InfoVxlan::Local(v4),
            IpAddr::V6(v6) => InfoVxlan::Local6(v6),
        };
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(OVERLAY.into()),
            LinkAttribute::Address(mac.to_vec()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Vxlan),
                LinkInfo::Data(InfoData::Vxlan(vec![
                    InfoVxlan::Id(VNI),
                    InfoVxlan::Port(PORT),
                    InfoVxlan::Learning(false),
                    local,
                ])),
            ]),
        ];
        self.netlink.request(
            || format!("make interface {OVERLAY}"),
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )?;
        let link = self.known_link(OVERLAY)?;
        self.set_up(link.index)?;
        Ok(link)
    }

    /// Enters another node: who has its MAC address, and which addresses are behind that.
    pub fn set_overlay_peer(
        &mut self,
        overlay: u32,
        peer: &OverlayPeer,
    ) -> Result<(), NetlinkError> {
        let mac = overlay_mac(peer.underlay);
        let mut steps = vec![Step {
            operation: format!("set forwarding to {}", peer.underlay),
            message: RouteNetlinkMessage::NewNeighbour(forwarding(overlay, peer.underlay)),
            flags: NLM_F_CREATE | NLM_F_REPLACE,
        }];
        steps.extend(
            peer.gateways
                .iter()
                .map(|gateway| message::set_neighbour(overlay, *gateway, mac)),
        );
        self.run(steps)
    }

    /// Forgets another node, and addresses of one that it no longer has.
    pub fn remove_overlay_peer(
        &mut self,
        overlay: u32,
        underlay: Option<IpAddr>,
        gateways: &BTreeSet<IpAddr>,
    ) -> Result<(), NetlinkError> {
        let entries = underlay
            .map(|underlay| forwarding(overlay, underlay))
            .into_iter();
        let neighbours = gateways.iter().map(|gateway| {
            let mut message = NeighbourMessage::default();
            message.header.family = message::family(*gateway);
            message.header.ifindex = overlay;
            message.attributes.push(destination(*gateway));
            message
        });
        for message in entries.chain(neighbours) {
            let removed = self.netlink.request(
                || "forget a node of the overlay".into(),
                RouteNetlinkMessage::DelNeighbour(message),
                0,
            );
            match removed {
                Err(error) if error.errno() != Some(Errno::ENOENT) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Forgets the addresses behind other nodes that are none of these: of nodes that went while no agent ran.
    pub fn keep_overlay_gateways(
        &mut self,
        overlay: u32,
        wished: &BTreeSet<IpAddr>,
    ) -> Result<(), NetlinkError> {
        let held = self.permanent_neighbours()?.into_keys();
        let gone = held
            .filter(|(index, ip)| *index == overlay && !wished.contains(ip))
            .map(|(_, ip)| ip)
            .collect();
        self.remove_overlay_peer(overlay, None, &gone)
    }

    /// The underlay addresses that the overlay forwards to.
    pub fn overlay_peers(&mut self, overlay: u32) -> Result<BTreeSet<IpAddr>, NetlinkError> {
        let mut request = NeighbourMessage::default();
        request.header.family = AddressFamily::Bridge;
        let messages = self.netlink.dump(
            || "list forwarding entries".into(),
            RouteNetlinkMessage::GetNeighbour(request),
        )?;
        let read = |message| {
            let RouteNetlinkMessage::NewNeighbour(entry) = message else {
                return None;
            };
            if entry.header.ifindex != overlay {
                return None;
            }
            entry
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                        Some((*v4).into())
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                        Some((*v6).into())
                    }
                    // The family of these entries is the bridge's, so addresses come as bytes.
                    NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                        match bytes.len() {
                            4 => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
                            16 => <[u8; 16]>::try_from(bytes.as_slice())
                                .ok()
                                .map(IpAddr::from),
                            _ => None,
                        }
                    }
                    _ => None,
                })
        };
        Ok(messages.into_iter().filter_map(read).collect())
    }

    /// Gives the node an address of its pod range, on an interface of ours.
    pub fn add_own_address(&mut self, index: u32, address: IpAddr) -> Result<(), NetlinkError> {
        let length = if address.is_ipv4() { 32 } else { 128 };
        self.run(vec![message::add_address(index, address, length)])
    }
}

fn forwarding(overlay: u32, underlay: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = overlay;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(
            overlay_mac(underlay).to_vec(),
        ));
    message.attributes.push(destination(underlay));
    message
}

fn destination(address: IpAddr) -> NeighbourAttribute {
    NeighbourAttribute::Destination(match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    })
}
