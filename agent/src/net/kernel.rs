//! The operations that wiring is made of.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnetwork::Ipv4Network;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use super::{Netlink, NetlinkError};
use crate::plan::{NodeRoute, RouteChange};

/// Marks routes as ours (`rtm_protocol`; /etc/iproute2/rt_protos leaves 100 to 185 free).
const ROUTE_PROTOCOL: u8 = 107;

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    pub up: bool,
}

/// One end of a veth pair to be made.
pub(super) struct VethEnd<'a> {
    pub name: &'a str,
    pub mac: [u8; 6],
    /// The namespace that this end is made in, if not the socket's.
    pub netns: Option<BorrowedFd<'a>>,
}

/// The interface by which the node reaches others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    pub link: Link,
    pub address: Ipv4Addr,
}

/// The network of one namespace.
pub struct Kernel {
    netlink: Netlink,
}

impl Kernel {
    pub fn new(netlink: Netlink) -> Self {
        Self { netlink }
    }

    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let messages = self.netlink.dump(
            || "list interfaces".into(),
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
        )?;
        Ok(messages.iter().filter_map(read_link).collect())
    }

    /// The interface of this name, if there is one.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        match self.netlink.get(
            || format!("look up interface {name}"),
            RouteNetlinkMessage::GetLink(message),
        ) {
            Ok(answers) => Ok(answers.iter().find_map(read_link)),
            Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a veth pair with end `a` up. End `b` must be set up after: the kernel makes it first, and refuses to open an end
    /// that has no other yet. Fails when one of the names is taken.
    pub(super) fn make_veth(
        &mut self,
        a: &VethEnd<'_>,
        b: &VethEnd<'_>,
        mtu: u32,
    ) -> Result<(), NetlinkError> {
        let end = |end: &VethEnd<'_>| {
            let mut message = LinkMessage::default();
            message
                .attributes
                .push(LinkAttribute::IfName(end.name.into()));
            message
                .attributes
                .push(LinkAttribute::Address(end.mac.to_vec()));
            message.attributes.push(LinkAttribute::Mtu(mtu));
            if let Some(netns) = end.netns {
                message
                    .attributes
                    .push(LinkAttribute::NetNsFd(netns.as_raw_fd()));
            }
            message
        };
        let mut message = end(a);
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(end(b)))),
        ]));
        self.netlink.request(
            || format!("make veth pair {} and {}", a.name, b.name),
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    pub fn set_up(&mut self, index: u32) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.netlink.request(
            || format!("set interface {index} up"),
            RouteNetlinkMessage::NewLink(message),
            0,
        )
    }

    /// Removes an interface; returns whether it was there.
    pub fn delete_link(&mut self, name: &str) -> Result<bool, NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        match self.netlink.request(
            || format!("delete interface {name}"),
            RouteNetlinkMessage::DelLink(message),
            0,
        ) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Every address of the namespace, with the index of its interface and its prefix length.
    pub fn addresses(&mut self) -> Result<Vec<(u32, IpAddr, u8)>, NetlinkError> {
        let messages = self.netlink.dump(
            || "list addresses".into(),
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
        )?;
        let mut found = Vec::new();
        for message in messages {
            let RouteNetlinkMessage::NewAddress(address) = message else {
                continue;
            };
            let (mut local, mut other) = (None, None);
            for attribute in &address.attributes {
                match attribute {
                    AddressAttribute::Local(ip) => local = Some(*ip),
                    AddressAttribute::Address(ip) => other = Some(*ip),
                    _ => {}
                }
            }
            if let Some(ip) = local.or(other) {
                found.push((address.header.index, ip, address.header.prefix_len));
            }
        }
        Ok(found)
    }

    pub fn add_address(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        prefix_len: u8,
    ) -> Result<(), NetlinkError> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.index = index;
        message.header.prefix_len = prefix_len;
        message.header.scope = AddressScope::Universe;
        message
            .attributes
            .push(AddressAttribute::Local(address.into()));
        message
            .attributes
            .push(AddressAttribute::Address(address.into()));
        self.netlink.request(
            || format!("add address {address}/{prefix_len}"),
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Enters the MAC address behind an address for good: nothing is asked on the wire.
    pub fn set_neighbour(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        mac: [u8; 6],
    ) -> Result<(), NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message
            .attributes
            .push(NeighbourAttribute::Destination(NeighbourAddress::Inet(
                address,
            )));
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.netlink.request(
            || format!("set neighbour {address}"),
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Routes a range straight to an interface.
    pub fn route_to_link(
        &mut self,
        range: Ipv4Network,
        index: u32,
        source: Option<Ipv4Addr>,
    ) -> Result<(), NetlinkError> {
        let mut route = route(range);
        route.header.scope = RouteScope::Link;
        route.attributes.push(RouteAttribute::Oif(index));
        route
            .attributes
            .extend(source.map(|source| RouteAttribute::PrefSource(RouteAddress::Inet(source))));
        self.replace_route(route, || format!("route {range} to interface {index}"))
    }

    /// Routes a range through a gateway that is taken to be on the interface's link, whatever its address.
    pub fn route_on_link(
        &mut self,
        range: Ipv4Network,
        gateway: Ipv4Addr,
        index: u32,
        source: Option<Ipv4Addr>,
    ) -> Result<(), NetlinkError> {
        let mut route = route(range);
        route.header.flags = RouteFlags::Onlink;
        route
            .attributes
            .push(RouteAttribute::Gateway(RouteAddress::Inet(gateway)));
        route.attributes.push(RouteAttribute::Oif(index));
        route
            .attributes
            .extend(source.map(|source| RouteAttribute::PrefSource(RouteAddress::Inet(source))));
        self.replace_route(route, || format!("route {range} via {gateway}"))
    }

    /// Applies a change to the routes of this node.
    pub fn apply_route(&mut self, change: RouteChange) -> Result<(), NetlinkError> {
        match change {
            RouteChange::Replace(wished) => {
                let route = node_route(wished);
                self.replace_route(route, || format!("route {wished:?}"))
            }
            RouteChange::Remove(gone) => {
                let message = RouteNetlinkMessage::DelRoute(node_route(gone));
                match self
                    .netlink
                    .request(|| format!("remove route {gone:?}"), message, 0)
                {
                    Err(error) if error.errno() != Some(Errno::ESRCH) => Err(error),
                    _ => Ok(()),
                }
            }
        }
    }

    /// The routes of ours that lead to nodes, or close this node's range.
    pub fn node_routes(&mut self) -> Result<BTreeSet<NodeRoute>, NetlinkError> {
        let routes = self.our_routes()?;
        let read = |route: &RouteMessage| {
            let range = destination(route)?;
            if route.header.kind == RouteType::Unreachable {
                return Some(NodeRoute::Own { range });
            }
            let mut on_link = route.header.flags.contains(RouteFlags::Onlink);
            let mut gateway = None;
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Gateway(RouteAddress::Inet(ip)) => gateway = Some(*ip),
                    RouteAttribute::MultiPath(_) => on_link = true,
                    _ => {}
                }
            }
            // Routes into the service veth are on-link, and not a node's.
            gateway
                .filter(|_| !on_link)
                .map(|node| NodeRoute::Pods { range, node })
        };
        Ok(routes.iter().filter_map(read).collect())
    }

    /// The single addresses that routes of ours lead straight to interfaces, as pairs of interface and address.
    pub fn pod_routes(&mut self) -> Result<Vec<(u32, Ipv4Addr)>, NetlinkError> {
        let routes = self.our_routes()?;
        let read = |route: &RouteMessage| {
            let range = destination(route).filter(|range| range.prefix() == 32)?;
            let has_gateway = route
                .attributes
                .iter()
                .any(|one| matches!(one, RouteAttribute::Gateway(_)));
            let index = route.attributes.iter().find_map(|one| match one {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            });
            index
                .filter(|_| !has_gateway)
                .map(|index| (index, range.ip()))
        };
        Ok(routes.iter().filter_map(read).collect())
    }

    /// The default routes' gateways, with their interfaces.
    pub fn default_gateways(&mut self) -> Result<Vec<(u32, Ipv4Addr)>, NetlinkError> {
        let routes = self.all_routes()?;
        let read = |route: &RouteMessage| {
            let (mut gateway, mut index) = (None, None);
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Gateway(RouteAddress::Inet(ip)) => gateway = Some(*ip),
                    RouteAttribute::Oif(oif) => index = Some(*oif),
                    _ => {}
                }
            }
            (route.header.destination_prefix_length == 0).then_some((index?, gateway?))
        };
        Ok(routes.iter().filter_map(read).collect())
    }

    /// The interface that has this address.
    pub fn uplink(&mut self, address: Ipv4Addr) -> Result<Option<Uplink>, NetlinkError> {
        let index = self
            .addresses()?
            .into_iter()
            .find(|(_, ip, _)| *ip == IpAddr::V4(address))
            .map(|(index, ..)| index);
        let Some(index) = index else { return Ok(None) };
        Ok(self
            .links()?
            .into_iter()
            .find(|link| link.index == index)
            .map(|link| Uplink { link, address }))
    }

    fn our_routes(&mut self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut routes = self.all_routes()?;
        routes.retain(|route| route.header.protocol == RouteProtocol::from(ROUTE_PROTOCOL));
        Ok(routes)
    }

    fn all_routes(&mut self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut request = RouteMessage::default();
        request.header.address_family = AddressFamily::Inet;
        let messages = self.netlink.dump(
            || "list routes".into(),
            RouteNetlinkMessage::GetRoute(request),
        )?;
        let main = |message| match message {
            RouteNetlinkMessage::NewRoute(route)
                if route.header.table == RouteHeader::RT_TABLE_MAIN =>
            {
                Some(route)
            }
            _ => None,
        };
        Ok(messages.into_iter().filter_map(main).collect())
    }

    fn replace_route(
        &mut self,
        route: RouteMessage,
        operation: impl FnOnce() -> String,
    ) -> Result<(), NetlinkError> {
        self.netlink.request(
            operation,
            RouteNetlinkMessage::NewRoute(route),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }
}

/// A route of ours to a range, with no way yet.
fn route(range: Ipv4Network) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet;
    route.header.destination_prefix_length = range.prefix();
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = RouteProtocol::from(ROUTE_PROTOCOL);
    route.header.scope = RouteScope::Universe;
    route.header.kind = RouteType::Unicast;
    if range.prefix() > 0 {
        route
            .attributes
            .push(RouteAttribute::Destination(RouteAddress::Inet(
                range.network(),
            )));
    }
    route
}

fn node_route(wished: NodeRoute) -> RouteMessage {
    let mut message = route(wished.range());
    match wished {
        NodeRoute::Pods { node, .. } => message
            .attributes
            .push(RouteAttribute::Gateway(RouteAddress::Inet(node))),
        NodeRoute::Own { .. } => message.header.kind = RouteType::Unreachable,
    }
    message
}

fn destination(route: &RouteMessage) -> Option<Ipv4Network> {
    let address = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(*ip),
            _ => None,
        })?;
    Ipv4Network::new(address, route.header.destination_prefix_length).ok()
}

fn read_link(message: &RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            _ => {}
        }
    }
    Some(link)
}
