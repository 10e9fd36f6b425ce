//! Routes of ours in the node's table.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType,
};
use nix::errno::Errno;

use super::message::{ROUTE_PROTOCOL, replace_route, route};
use super::{Kernel, NetlinkError};
use crate::node::Node;
use crate::plan::{NodeRoute, RouteChange};

impl Kernel {
    /// Applies a change to the routes of this node.
    pub fn apply_route(&mut self, change: RouteChange, node: &Node) -> Result<(), NetlinkError> {
        match change {
            RouteChange::Replace(wished) => self.run(vec![replace_route(
                node_route(wished, node),
                format!("route {wished:?}"),
            )]),
            RouteChange::Remove(gone) => {
                let message = RouteNetlinkMessage::DelRoute(node_route(gone, node));
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
    /// `overlay` is the index of the overlay's interface.
    pub fn node_routes(
        &mut self,
        overlay: Option<u32>,
    ) -> Result<BTreeSet<NodeRoute>, NetlinkError> {
        let routes = self.our_routes()?;
        let read = |route: &RouteMessage| {
            let range = destination(route)?;
            if route.header.kind == RouteType::Unreachable {
                return Some(NodeRoute::Own { range });
            }
            let mut on_link = route.header.flags.contains(RouteFlags::Onlink);
            let (mut gateway, mut index) = (None, None);
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Gateway(ip) => gateway = address(ip),
                    RouteAttribute::Oif(oif) => index = Some(*oif),
                    RouteAttribute::MultiPath(_) => on_link = true,
                    _ => {}
                }
            }
            if overlay.is_some() && index == overlay {
                return gateway.map(|gateway| NodeRoute::Overlay { range, gateway });
            }
            // Routes into the service veth are on-link, and not a node's.
            gateway
                .filter(|_| !on_link)
                .map(|node| NodeRoute::Pods { range, node })
        };
        Ok(routes.iter().filter_map(read).collect())
    }

    /// The single addresses that routes of ours lead straight to interfaces, as pairs of interface and address.
    pub fn pod_routes(&mut self) -> Result<Vec<(u32, IpAddr)>, NetlinkError> {
        let routes = self.our_routes()?;
        let read = |route: &RouteMessage| {
            let range = destination(route)?;
            let single = range.prefix() == if range.is_ipv4() { 32 } else { 128 };
            let has_gateway = route
                .attributes
                .iter()
                .any(|one| matches!(one, RouteAttribute::Gateway(_)));
            let index = route.attributes.iter().find_map(|one| match one {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            });
            index
                .filter(|_| single && !has_gateway && route.header.kind == RouteType::Unicast)
                .map(|index| (index, range.ip()))
        };
        Ok(routes.iter().filter_map(read).collect())
    }

    /// The default routes' gateways, with their interfaces.
    pub fn default_gateways(&mut self) -> Result<Vec<(u32, IpAddr)>, NetlinkError> {
        let routes = self.all_routes()?;
        let read = |route: &RouteMessage| {
            let (mut gateway, mut index) = (None, None);
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Gateway(ip) => gateway = address(ip),
                    RouteAttribute::Oif(oif) => index = Some(*oif),
                    _ => {}
                }
            }
            (route.header.destination_prefix_length == 0).then_some((index?, gateway?))
        };
        Ok(routes.iter().filter_map(read).collect())
    }

    /// The interfaces by which default routes lead.
    pub fn default_interfaces(&mut self) -> Result<BTreeSet<u32>, NetlinkError> {
        let routes = self.all_routes()?;
        let defaults = routes.iter().filter(|route| is_default(route));
        let by = |route: &RouteMessage| {
            let mut by = Vec::new();
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Oif(oif) => by.push(*oif),
                    RouteAttribute::MultiPath(hops) => {
                        by.extend(hops.iter().map(|hop| hop.interface_index));
                    }
                    _ => {}
                }
            }
            by
        };
        Ok(defaults.flat_map(by).collect())
    }

    /// Where routes of ours lead: ranges, and interfaces that they name.
    pub fn leads(&mut self) -> Result<BTreeSet<(IpNetwork, u32)>, NetlinkError> {
        let routes = self.our_routes()?;
        let read = |route: &RouteMessage| {
            let oif = route.attributes.iter().find_map(|one| match one {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            });
            Some((destination(route)?, oif?))
        };
        Ok(routes.iter().filter_map(read).collect())
    }

    /// How many routes of ours there are.
    pub fn count_routes(&mut self) -> Result<usize, NetlinkError> {
        Ok(self.our_routes()?.len())
    }

    /// Removes every route of ours.
    pub fn remove_routes(&mut self) -> Result<(), NetlinkError> {
        for found in self.our_routes()? {
            self.remove_route(found)?;
        }
        Ok(())
    }

    /// Removes the routes of ours that lead to an interface from other ranges than the wanted ones, and gives those ranges.
    pub fn remove_leads(
        &mut self,
        index: u32,
        wanted: &BTreeSet<IpNetwork>,
    ) -> Result<Vec<IpNetwork>, NetlinkError> {
        let mut removed = Vec::new();
        for found in self.our_routes()? {
            let leads_there = found.attributes.contains(&RouteAttribute::Oif(index));
            let range = destination(&found).filter(|range| leads_there && !wanted.contains(range));
            if let Some(range) = range {
                self.remove_route(found)?;
                removed.push(range);
            }
        }
        Ok(removed)
    }

    fn remove_route(&mut self, found: RouteMessage) -> Result<(), NetlinkError> {
        let mut gone = RouteMessage::default();
        gone.header = found.header.clone();
        gone.header.flags = RouteFlags::empty();
        // What tells routes of one destination apart; the kernel takes no more than it needs.
        gone.attributes = found.attributes;
        gone.attributes.retain(|attribute| {
            matches!(
                attribute,
                RouteAttribute::Destination(_)
                    | RouteAttribute::Oif(_)
                    | RouteAttribute::Gateway(_)
                    | RouteAttribute::Priority(_)
            )
        });
        let removed = self.netlink.request(
            || format!("remove route {:?}", gone.attributes),
            RouteNetlinkMessage::DelRoute(gone.clone()),
            0,
        );
        match removed {
            // It went with its interface just now.
            Err(error) if error.errno() == Some(Errno::ESRCH) => Ok(()),
            removed => removed.map(drop),
        }
    }

    fn our_routes(&mut self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut routes = self.all_routes()?;
        routes.retain(|route| route.header.protocol == RouteProtocol::from(ROUTE_PROTOCOL));
        Ok(routes)
    }

    fn all_routes(&mut self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let messages = self.netlink.dump(
            || "list routes".into(),
            RouteNetlinkMessage::GetRoute(RouteMessage::default()),
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
}

/// Whether a route leads to whatever no other does.
pub(super) fn is_default(route: &RouteMessage) -> bool {
    route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast
}

fn node_route(wished: NodeRoute, here: &Node) -> RouteMessage {
    let mut message = route(wished.range());
    match wished {
        NodeRoute::Pods { range, node } => {
            message
                .attributes
                .push(RouteAttribute::Gateway(node.into()));
            // Smaller packets than the uplink takes, when pods' interfaces take no larger ones: what is too large for IPv6 is not cut.
            if here.overlay.is_some() {
                message
                    .attributes
                    .push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(
                        here.pod_mtu(),
                    )]));
            }
            // Probes come from the node's own address in its pod range.
            let probed = range.prefix() == if range.is_ipv4() { 32 } else { 128 };
            if let Some(own) = here.reserved_like(range.ip()).filter(|_| probed) {
                message
                    .attributes
                    .push(RouteAttribute::PrefSource(own.probe.into()));
            }
        }
        NodeRoute::Overlay { range, gateway } => {
            message.header.flags = RouteFlags::Onlink;
            message
                .attributes
                .push(RouteAttribute::Gateway(gateway.into()));
            if let Some(overlay) = &here.overlay {
                message.attributes.push(RouteAttribute::Oif(overlay.index));
            }
            // The node's own address would be answered by another way than the question took.
            if let Some(own) = here.reserved_like(range.ip()) {
                message
                    .attributes
                    .push(RouteAttribute::PrefSource(own.host.into()));
            }
        }
        NodeRoute::Own { .. } => message.header.kind = RouteType::Unreachable,
    }
    message
}

fn address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

fn destination(route: &RouteMessage) -> Option<IpNetwork> {
    let ip = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(ip) => address(ip),
            _ => None,
        })?;
    IpNetwork::new(ip, route.header.destination_prefix_length).ok()
}
