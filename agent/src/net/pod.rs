//! The network of one pod.

use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;

use dataplane_abi::HOST_VETH_MAC;
use ipnetwork::Ipv4Network;

use super::kernel::VethEnd;
use super::{Kernel, Link, Netlink, NetlinkError};

/// The gateway of every pod: link-local, the same everywhere, and answered by nobody, since its neighbour entry is permanent.
pub const POD_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// Every IPv4 address.
pub const EVERYTHING: Ipv4Network = Ipv4Network::new_checked(Ipv4Addr::UNSPECIFIED, 0).unwrap();

/// What a pod's network shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodWire {
    pub host_interface: String,
    /// Name of the interface in the pod.
    pub interface: String,
    pub address: Ipv4Addr,
    pub mtu: u32,
    /// Source of what the host sends to the pod.
    pub node_address: Option<Ipv4Addr>,
}

/// The MAC address of a pod's interface. It follows from the address, so an agent that restarts knows it.
pub fn pod_mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x0a, 0x6c, a, b, c, d]
}

/// Makes a pod's network, and returns the host's side. What is left of an earlier attempt is removed first, what fails
/// half way is removed again.
pub fn wire_pod(
    host: &mut Kernel,
    netns: BorrowedFd<'_>,
    wire: &PodWire,
) -> Result<Link, NetlinkError> {
    host.delete_link(&wire.host_interface)?;
    let mut pod = Kernel::new(Netlink::open_in(netns)?);
    let host_end = VethEnd {
        name: &wire.host_interface,
        mac: HOST_VETH_MAC,
        netns: None,
    };
    let pod_end = VethEnd {
        name: &wire.interface,
        mac: pod_mac(wire.address),
        netns: Some(netns),
    };
    host.make_veth(&host_end, &pod_end, wire.mtu)?;
    let made = wire_both_ends(host, &mut pod, wire);
    if made.is_err() {
        // The pair goes with either end. Failing to remove it is no better news than what failed before.
        let _ = host.delete_link(&wire.host_interface);
    }
    made
}

fn wire_both_ends(
    host: &mut Kernel,
    pod: &mut Kernel,
    wire: &PodWire,
) -> Result<Link, NetlinkError> {
    let missing =
        |name: &str| NetlinkError::new(format!("look up {name}"), nix::errno::Errno::ENODEV.into());
    let lo = pod.link("lo")?.ok_or_else(|| missing("lo"))?;
    pod.set_up(lo.index)?;
    let inside = pod
        .link(&wire.interface)?
        .ok_or_else(|| missing(&wire.interface))?;
    pod.set_up(inside.index)?;
    pod.add_address(inside.index, wire.address, 32)?;
    pod.set_neighbour(inside.index, POD_GATEWAY, HOST_VETH_MAC)?;
    pod.route_on_link(EVERYTHING, POD_GATEWAY, inside.index, None)?;

    let outside = host
        .link(&wire.host_interface)?
        .ok_or_else(|| missing(&wire.host_interface))?;
    host.set_neighbour(outside.index, wire.address, pod_mac(wire.address))?;
    host.route_to_link(
        Ipv4Network::from(wire.address),
        outside.index,
        wire.node_address,
    )?;
    Ok(outside)
}

/// What is wrong with a pod's network; nothing, when it is as [`wire_pod`] made it.
pub fn check_pod(
    host: &mut Kernel,
    netns: BorrowedFd<'_>,
    wire: &PodWire,
) -> Result<Option<String>, NetlinkError> {
    let mut pod = Kernel::new(Netlink::open_in(netns)?);
    let Some(outside) = host.link(&wire.host_interface)? else {
        return Ok(Some(format!(
            "the host has no interface {}",
            wire.host_interface
        )));
    };
    let Some(inside) = pod.link(&wire.interface)? else {
        return Ok(Some(format!("the pod has no interface {}", wire.interface)));
    };
    if !outside.up || !inside.up {
        return Ok(Some(format!(
            "{} or {} is down",
            wire.host_interface, wire.interface
        )));
    }
    if !pod
        .addresses()?
        .contains(&(inside.index, wire.address.into(), 32))
    {
        return Ok(Some(format!(
            "{} does not have the address {}",
            wire.interface, wire.address
        )));
    }
    if !pod
        .default_gateways()?
        .contains(&(inside.index, POD_GATEWAY))
    {
        return Ok(Some(format!(
            "the pod has no default route by {POD_GATEWAY}"
        )));
    }
    if !host.pod_routes()?.contains(&(outside.index, wire.address)) {
        return Ok(Some(format!("the host has no route to {}", wire.address)));
    }
    Ok(None)
}
