//! The pair of interfaces through which the host's own traffic to Services goes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dataplane_abi::{HAIRPIN_V4, HAIRPIN_V6, HOST_VETH_MAC};
use ipnetwork::IpNetwork;

use super::kernel::VethEnd;
use super::message;
use super::{Kernel, NetlinkError};
use crate::dataplane::ServiceVeth;

/// The end that Service ranges are routed into.
pub const OUTER: &str = "keelway-svc";
/// The end where the packets come out, and programs translate them.
pub const INNER: &str = "keelway-svc-in";

/// Gateways of the Service ranges: addresses that only their permanent neighbour entries know.
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 1);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x77, 1);

/// Makes the pair if it is not there, and routes the ranges into it, each with the node's address of its family as source. Traffic that
/// flows is not disturbed.
pub fn make_service_veth(
    host: &mut Kernel,
    ranges: &[IpNetwork],
    node_addresses: &[IpAddr],
    mtu: u32,
) -> Result<ServiceVeth, NetlinkError> {
    if host.link(OUTER)?.is_none() || host.link(INNER)?.is_none() {
        // Half a pair cannot be; a foreign interface of one of the names makes the creation fail, by its name.
        let end = |name| VethEnd {
            name,
            mac: HOST_VETH_MAC,
            netns: None,
        };
        host.make_veth(&end(OUTER), &end(INNER), mtu)?;
    }
    let (outer, inner) = (host.known_link(OUTER)?, host.known_link(INNER)?);
    for link in [&outer, &inner] {
        if !link.up {
            host.set_up(link.index)?;
        }
    }
    let mut steps = vec![message::set_neighbour(
        outer.index,
        GATEWAY_V4.into(),
        HOST_VETH_MAC,
    )];
    if ranges.iter().any(IpNetwork::is_ipv6) {
        steps.push(message::set_neighbour(
            outer.index,
            GATEWAY_V6.into(),
            HOST_VETH_MAC,
        ));
    }
    for range in routed(ranges) {
        let source = node_addresses
            .iter()
            .copied()
            .find(|ip| ip.is_ipv4() == range.is_ipv4());
        let gateway = if range.is_ipv4() {
            GATEWAY_V4.into()
        } else {
            GATEWAY_V6.into()
        };
        steps.push(message::route_on_link(range, gateway, outer.index, source));
    }
    host.run(steps)?;
    Ok(ServiceVeth {
        outer: outer.index,
        inner: inner.index,
    })
}

/// What is routed into the pair: the Service ranges, and the addresses that stand for a client that is its own backend; that of IPv6
/// where there are Services of it, since a node may have it off altogether.
fn routed(ranges: &[IpNetwork]) -> impl Iterator<Item = IpNetwork> {
    let hairpins = [IpAddr::from(HAIRPIN_V4), IpAddr::from(HAIRPIN_V6)].map(IpNetwork::from);
    let ipv6 = ranges.iter().any(IpNetwork::is_ipv6);
    let hairpins = hairpins
        .into_iter()
        .filter(move |own| own.is_ipv4() || ipv6);
    ranges.iter().copied().chain(hairpins)
}

/// Whether the pair is as it was made: somebody may have set it down, or taken its routes away.
pub fn service_veth_is_whole(
    host: &mut Kernel,
    pair: &ServiceVeth,
    ranges: &[IpNetwork],
) -> Result<bool, NetlinkError> {
    let ends = [(OUTER, pair.outer), (INNER, pair.inner)];
    for (name, index) in ends {
        if !host
            .link(name)?
            .is_some_and(|link| link.up && link.index == index)
        {
            return Ok(false);
        }
    }
    let leads = host.leads()?;
    Ok(routed(ranges).all(|range| leads.contains(&(range, pair.outer))))
}

/// Takes away what else was routed into the pair, and gives those ranges.
pub fn keep_to_ranges(
    host: &mut Kernel,
    pair: &ServiceVeth,
    ranges: &[IpNetwork],
) -> Result<Vec<IpNetwork>, NetlinkError> {
    host.remove_leads(pair.outer, &routed(ranges).collect())
}
