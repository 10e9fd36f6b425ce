//! The network of one namespace: what is there, and what is asked of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::tc::{TcAttribute, TcMessage};
use nix::errno::Errno;

use super::message;
use super::netlink::Step;
use super::{Netlink, NetlinkError};

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    pub up: bool,
}

/// An interface, with what says whether it can lead to other machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub link: Link,
    pub kind: InterfaceKind,
    /// It is a part of another one, as a bridge's port is: packets come by that one.
    pub is_port: bool,
}

/// Where an interface leads, as far as its kind says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterfaceKind {
    /// Out of the machine: hardware, and what is made of it (bonds, VLANs, MACVLANs).
    Outer,
    /// To another network namespace, of a container or of whoever plays a machine.
    Veth,
    /// To containers and virtual machines, or out of the machine by one of its ports.
    Bridge,
    /// Nowhere by itself: overlays, loopback, dummies. Also what has no Ethernet header, which programs read.
    Inner,
}

/// One end of a veth pair to be made.
pub(super) struct VethEnd<'a> {
    pub name: &'a str,
    pub mac: [u8; 6],
    /// The namespace that this end is made in, if not the socket's.
    pub netns: Option<BorrowedFd<'a>>,
}

/// The interface by which the node reaches others, with the node's addresses: one of each family at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    pub link: Link,
    pub addresses: Vec<IpAddr>,
}

/// The group of interfaces that are about to be removed together.
const DYING_GROUP: u32 = 0x6b77_6479;

/// The network of one namespace.
pub struct Kernel {
    pub(super) netlink: Netlink,
}

impl Kernel {
    pub fn new(netlink: Netlink) -> Self {
        Self { netlink }
    }

    pub(super) fn run(&mut self, steps: Vec<Step>) -> Result<(), NetlinkError> {
        self.netlink.run(steps)
    }

    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let messages = self.netlink.dump(
            || "list interfaces".into(),
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
        )?;
        Ok(messages.iter().filter_map(read_link).collect())
    }

    /// All interfaces, with their kinds.
    pub fn interfaces(&mut self) -> Result<Vec<Interface>, NetlinkError> {
        let messages = self.netlink.dump(
            || "list interfaces".into(),
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
        )?;
        Ok(messages.iter().filter_map(read_interface).collect())
    }

    /// Interfaces with a queueing discipline of this kind.
    pub(super) fn links_with(&mut self, kind: &str) -> Result<BTreeSet<u32>, NetlinkError> {
        let answers = self.netlink.dump(
            || "list queueing disciplines".into(),
            RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()),
        )?;
        let index = |answer| {
            let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = answer else {
                return None;
            };
            let is_of_kind =
                |attribute: &TcAttribute| matches!(attribute, TcAttribute::Kind(of) if of == kind);
            let found = qdisc.attributes.iter().any(is_of_kind);
            found.then_some(qdisc.header.index.cast_unsigned())
        };
        Ok(answers.into_iter().filter_map(index).collect())
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

    /// Whether an interface is one end of a veth pair.
    pub fn is_veth(&mut self, name: &str) -> Result<bool, NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        let answers = self.netlink.get(
            || format!("look up interface {name}"),
            RouteNetlinkMessage::GetLink(message),
        )?;
        let is_veth = |answer: &RouteNetlinkMessage| {
            let RouteNetlinkMessage::NewLink(link) = answer else {
                return false;
            };
            let infos = link
                .attributes
                .iter()
                .filter_map(|attribute| match attribute {
                    LinkAttribute::LinkInfo(infos) => Some(infos),
                    _ => None,
                });
            let mut infos = infos.flatten();
            infos.any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth)))
        };
        Ok(answers.iter().any(is_veth))
    }

    /// The interface of this name, which must be there.
    pub(super) fn known_link(&mut self, name: &str) -> Result<Link, NetlinkError> {
        self.link(name)?
            .ok_or_else(|| NetlinkError::new(format!("look up {name}"), Errno::ENODEV.into()))
    }

    /// Makes a veth pair, both ends down: the kernel makes end `b` first, and refuses to open an end that has no other yet. Fails when
    /// one of the names is taken.
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
            // As many as are used of those that the kernel would make, one for each CPU, to take the others away again.
            message.attributes.push(LinkAttribute::NumTxQueues(1));
            message.attributes.push(LinkAttribute::NumRxQueues(1));
            if let Some(netns) = end.netns {
                message
                    .attributes
                    .push(LinkAttribute::NetNsFd(netns.as_raw_fd()));
            }
            message
        };
        let mut message = end(a);
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
        self.run(vec![message::set_up(index)])
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

    /// Removes interfaces together: the kernel waits once for all of them, where it would wait for each. Those that are not there are
    /// left out.
    pub fn delete_links(&mut self, names: &[String]) -> Result<(), NetlinkError> {
        if let [name] = names {
            return self.delete_link(name).map(drop);
        }
        let mut marked = false;
        for name in names {
            let Some(link) = self.link(name)? else {
                continue;
            };
            match self.run(vec![message::set_group(link.index, DYING_GROUP)]) {
                Ok(()) => marked = true,
                // It went with its namespace just now.
                Err(error) if error.errno() == Some(Errno::ENODEV) => {}
                Err(error) => return Err(error),
            }
        }
        if !marked {
            return Ok(());
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(DYING_GROUP));
        match self.netlink.request(
            || format!("delete {} interfaces", names.len()),
            RouteNetlinkMessage::DelLink(message),
            0,
        ) {
            Err(error) if error.errno() != Some(Errno::ENODEV) => Err(error),
            _ => Ok(()),
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

    /// The permanent neighbour entries, by interface: MAC addresses behind addresses, which only an agent or an administrator enters.
    pub fn permanent_neighbours(
        &mut self,
    ) -> Result<BTreeMap<(u32, IpAddr), [u8; 6]>, NetlinkError> {
        let messages = self.netlink.dump(
            || "list neighbours".into(),
            RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()),
        )?;
        let read = |message| {
            let RouteNetlinkMessage::NewNeighbour(entry) = message else {
                return None;
            };
            if entry.header.state != NeighbourState::Permanent {
                return None;
            }
            let (mut ip, mut mac) = (None, None);
            for attribute in &entry.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                        ip = Some(IpAddr::V4(*v4));
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                        ip = Some(IpAddr::V6(*v6));
                    }
                    NeighbourAttribute::LinkLayerAddress(bytes) => {
                        mac = bytes.as_slice().try_into().ok();
                    }
                    _ => {}
                }
            }
            Some(((entry.header.ifindex, ip?), mac?))
        };
        Ok(messages.into_iter().filter_map(read).collect())
    }

    /// Lets the host reach a pod's addresses by the host's side of its veth.
    pub fn connect_pod(
        &mut self,
        index: u32,
        addresses: &[IpAddr],
        mac: [u8; 6],
        sources: &[IpAddr],
    ) -> Result<(), NetlinkError> {
        self.run(pod_steps(index, addresses, mac, sources))
    }

    /// The interface that has the first of these addresses, with those that the node has.
    pub fn uplink(&mut self, wanted: &[IpAddr]) -> Result<Option<Uplink>, NetlinkError> {
        let there = self.addresses()?;
        let own = |ip: &IpAddr| there.iter().any(|(_, address, _)| address == ip);
        let index = there
            .iter()
            .find(|(_, ip, _)| Some(ip) == wanted.first())
            .map(|(index, ..)| *index);
        let Some(index) = index else { return Ok(None) };
        let addresses = wanted.iter().copied().filter(own).collect();
        Ok(self
            .links()?
            .into_iter()
            .find(|link| link.index == index)
            .map(|link| Uplink { link, addresses }))
    }
}

/// How the host reaches a pod: permanent neighbours, and routes of single addresses from the node's own.
pub(super) fn pod_steps(
    index: u32,
    addresses: &[IpAddr],
    mac: [u8; 6],
    sources: &[IpAddr],
) -> Vec<Step> {
    addresses
        .iter()
        .flat_map(|address| {
            let source = sources
                .iter()
                .copied()
                .find(|source| source.is_ipv4() == address.is_ipv4());
            [
                message::set_neighbour(index, *address, mac),
                message::route_to_link((*address).into(), index, source),
            ]
        })
        .collect()
}

fn read_interface(message: &RouteNetlinkMessage) -> Option<Interface> {
    let link = read_link(message)?;
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let (mut kind, mut is_port) = (InterfaceKind::Outer, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::LinkInfo(infos) => {
                let known = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind_of(kind)),
                    _ => None,
                });
                kind = known.unwrap_or(kind);
            }
            LinkAttribute::Controller(of) => is_port = *of != 0,
            _ => {}
        }
    }
    if message.header.link_layer_type != LinkLayerType::Ether {
        kind = InterfaceKind::Inner;
    }
    Some(Interface {
        link,
        kind,
        is_port,
    })
}

fn kind_of(kind: &InfoKind) -> InterfaceKind {
    match kind {
        InfoKind::Vlan
        | InfoKind::Bond
        | InfoKind::Team
        | InfoKind::MacVlan
        | InfoKind::IpVlan
        | InfoKind::MacSec
        | InfoKind::Dsa
        | InfoKind::Wwan => InterfaceKind::Outer,
        InfoKind::Veth => InterfaceKind::Veth,
        // Open vSwitch's are bridges too, and virtual machines' taps have one end in the machine.
        InfoKind::Bridge | InfoKind::Tun | InfoKind::Other(_) => InterfaceKind::Bridge,
        _ => InterfaceKind::Inner,
    }
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
