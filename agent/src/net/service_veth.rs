//! The pair of interfaces through which the host's own traffic to Services goes.

use std::net::Ipv4Addr;

use dataplane_abi::{HAIRPIN_V4, HOST_VETH_MAC};
use ipnetwork::Ipv4Network;

use super::kernel::VethEnd;
use super::{Kernel, NetlinkError};
use crate::dataplane::ServiceVeth;

/// The end that Service ranges are routed into.
pub const OUTER: &str = "keelway-svc";
/// The end where the packets come out, and programs translate them.
pub const INNER: &str = "keelway-svc-in";

/// Gateway of the Service ranges: an address that only its permanent neighbour entry knows.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 1);

/// Makes the pair if it is not there, and routes the ranges into it. Traffic that flows is not disturbed.
pub fn make_service_veth(
    host: &mut Kernel,
    ranges: &[Ipv4Network],
    node_address: Ipv4Addr,
    mtu: u32,
) -> Result<ServiceVeth, NetlinkError> {
    let missing =
        |name: &str| NetlinkError::new(format!("look up {name}"), nix::errno::Errno::ENODEV.into());
    if host.link(OUTER)?.is_none() || host.link(INNER)?.is_none() {
        // Half a pair cannot be; a foreign interface of one of the names makes the creation fail, by its name.
        let end = |name| VethEnd {
            name,
            mac: HOST_VETH_MAC,
            netns: None,
        };
        host.make_veth(&end(OUTER), &end(INNER), mtu)?;
    }
    let outer = host.link(OUTER)?.ok_or_else(|| missing(OUTER))?;
    let inner = host.link(INNER)?.ok_or_else(|| missing(INNER))?;
    for link in [&outer, &inner] {
        if !link.up {
            host.set_up(link.index)?;
        }
    }
    host.set_neighbour(outer.index, GATEWAY, HOST_VETH_MAC)?;
    let hairpin = Ipv4Network::from(Ipv4Addr::from(HAIRPIN_V4));
    for range in ranges.iter().copied().chain([hairpin]) {
        host.route_on_link(range, GATEWAY, outer.index, Some(node_address))?;
    }
    Ok(ServiceVeth {
        outer: outer.index,
        inner: inner.index,
    })
}
