//! The requests that wiring is made of.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::Step;

/// Marks routes as ours (`rtm_protocol`; /etc/iproute2/rt_protos leaves 100 to 185 free).
pub(super) const ROUTE_PROTOCOL: u8 = 107;

pub(super) fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

pub(super) fn set_up(index: u32) -> Step {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    Step {
        operation: format!("set interface {index} up"),
        message: RouteNetlinkMessage::SetLink(message),
        flags: 0,
    }
}

pub(super) fn set_group(index: u32, group: u32) -> Step {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::Group(group));
    Step {
        operation: format!("set the group of interface {index}"),
        message: RouteNetlinkMessage::SetLink(message),
        flags: 0,
    }
}

pub(super) fn add_address(index: u32, address: IpAddr, prefix_len: u8) -> Step {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.index = index;
    message.header.prefix_len = prefix_len;
    message.header.scope = AddressScope::Universe;
    if address.is_ipv6() {
        // Nobody else can have it, and nobody would hear the question.
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    Step {
        operation: format!("add address {address}/{prefix_len}"),
        message: RouteNetlinkMessage::NewAddress(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
    }
}

/// Enters the MAC address behind an address for good: nothing is asked on the wire.
pub(super) fn set_neighbour(index: u32, address: IpAddr, mac: [u8; 6]) -> Step {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message
        .attributes
        .push(NeighbourAttribute::Destination(match address {
            IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
            IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
        }));
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    Step {
        operation: format!("set neighbour {address}"),
        message: RouteNetlinkMessage::NewNeighbour(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
    }
}

/// A route of ours to a range, with no way yet.
pub(super) fn route(range: IpNetwork) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = family(range.ip());
    route.header.destination_prefix_length = range.prefix();
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = RouteProtocol::from(ROUTE_PROTOCOL);
    route.header.scope = RouteScope::Universe;
    route.header.kind = RouteType::Unicast;
    if range.prefix() > 0 {
        route
            .attributes
            .push(RouteAttribute::Destination(range.network().into()));
    }
    route
}

/// Routes a range straight to an interface.
pub(super) fn route_to_link(range: IpNetwork, index: u32, source: Option<IpAddr>) -> Step {
    let mut message = route(range);
    if range.is_ipv4() {
        message.header.scope = RouteScope::Link;
    }
    message.attributes.push(RouteAttribute::Oif(index));
    message
        .attributes
        .extend(source.map(|source| RouteAttribute::PrefSource(source.into())));
    replace_route(message, format!("route {range} to interface {index}"))
}

/// Routes a range through a gateway that is taken to be on the interface's link, whatever its address.
pub(super) fn route_on_link(
    range: IpNetwork,
    gateway: IpAddr,
    index: u32,
    source: Option<IpAddr>,
) -> Step {
    let mut message = route(range);
    message.header.flags = RouteFlags::Onlink;
    message
        .attributes
        .push(RouteAttribute::Gateway(gateway.into()));
    message.attributes.push(RouteAttribute::Oif(index));
    message
        .attributes
        .extend(source.map(|source| RouteAttribute::PrefSource(source.into())));
    replace_route(message, format!("route {range} via {gateway}"))
}

pub(super) fn replace_route(message: RouteMessage, operation: String) -> Step {
    Step {
        operation,
        message: RouteNetlinkMessage::NewRoute(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
    }
}
