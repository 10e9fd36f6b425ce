//! The network of one pod.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;

use dataplane_abi::HOST_VETH_MAC;
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use nix::errno::Errno;
use sha2::{Digest, Sha256};

use super::kernel::{VethEnd, pod_steps};
use super::message;
use super::shape::{self, Limits};
use super::{Filter, Kernel, Link, Netlink, NetlinkError};

/// The gateways of every pod: link-local, the same everywhere, and answered by nobody, since their neighbour entries are permanent.
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const EVERYTHING_V4: Ipv4Network = Ipv4Network::new_checked(Ipv4Addr::UNSPECIFIED, 0).unwrap();
const EVERYTHING_V6: Ipv6Network = Ipv6Network::new_checked(Ipv6Addr::UNSPECIFIED, 0).unwrap();
/// The loopback's interface index in every network namespace.
const LOOPBACK: u32 = 1;

/// The gateway of a pod for the family of this address.
pub fn pod_gateway(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => GATEWAY_V4.into(),
        IpAddr::V6(_) => GATEWAY_V6.into(),
    }
}

/// Every address of the family of this one.
pub fn everything(like: IpAddr) -> IpNetwork {
    match like {
        IpAddr::V4(_) => EVERYTHING_V4.into(),
        IpAddr::V6(_) => EVERYTHING_V6.into(),
    }
}

/// The MAC address of a pod's interface, unless it asked for one. It follows from its first address, so an agent that restarts
/// knows it.
pub fn pod_mac(address: IpAddr) -> [u8; 6] {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            [0x0a, 0x6c, a, b, c, d]
        }
        IpAddr::V6(v6) => {
            let digest = Sha256::digest(v6.octets());
            [0x0a, 0x6e, digest[0], digest[1], digest[2], digest[3]]
        }
    }
}

/// What a pod's network shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodWire {
    pub host_interface: String,
    /// Name of the interface in the pod.
    pub interface: String,
    pub addresses: Vec<IpAddr>,
    /// Of the pod's side.
    pub mac: [u8; 6],
    pub mtu: u32,
    /// Sources of what the host sends to the pod, one of each family at most.
    pub node_addresses: Vec<IpAddr>,
    pub limits: Limits,
}

/// Makes a pod's network, and returns the host's side. What is left of an earlier attempt is removed first, what fails
/// half way is removed again. The pair is made where its ends belong: to move one makes the kernel wait for every CPU.
pub fn wire_pod(
    host: &mut Kernel,
    netns: BorrowedFd<'_>,
    wire: &PodWire,
    filters: &[Filter<'_>],
) -> Result<Link, NetlinkError> {
    let mut pod = Kernel::new(Netlink::open_in(netns)?);
    let mut made = make(host, &mut pod, netns, wire, filters);
    // Mostly there is nothing left, so nobody asks first.
    if let Err(error) = &made
        && error.errno() == Some(Errno::EEXIST)
        && host.delete_link(&wire.host_interface)?
    {
        made = make(host, &mut pod, netns, wire, filters);
    }
    if made.is_err() {
        // The pair goes with either end. Failing to remove it is no better news than what failed before.
        let _ = host.delete_link(&wire.host_interface);
    }
    made
}

fn make(
    host: &mut Kernel,
    pod: &mut Kernel,
    netns: BorrowedFd<'_>,
    wire: &PodWire,
    filters: &[Filter<'_>],
) -> Result<Link, NetlinkError> {
    let host_end = VethEnd {
        name: &wire.host_interface,
        mac: HOST_VETH_MAC,
        netns: None,
    };
    let pod_end = VethEnd {
        name: &wire.interface,
        mac: wire.mac,
        netns: Some(netns),
    };
    host.make_veth(&host_end, &pod_end, wire.mtu)?;
    let outside = host.known_link(&wire.host_interface)?;
    let inside = pod.known_link(&wire.interface)?;
    // Before it is up: no packet goes by without them.
    host.set_filters(outside.index, filters)?;
    configure_host(host, outside.index, wire)?;
    configure_pod(pod, inside.index, wire)?;
    Ok(Link {
        up: true,
        ..outside
    })
}

fn configure_host(host: &mut Kernel, index: u32, wire: &PodWire) -> Result<(), NetlinkError> {
    let mut steps = vec![message::set_up(index)];
    steps.extend(pod_steps(
        index,
        &wire.addresses,
        wire.mac,
        &wire.node_addresses,
    ));
    steps.extend(wire.limits.ingress.map(|one| shape::limit(index, &one)));
    host.run(steps)
}

fn configure_pod(pod: &mut Kernel, index: u32, wire: &PodWire) -> Result<(), NetlinkError> {
    let mut steps = vec![message::set_up(LOOPBACK), message::set_up(index)];
    for address in &wire.addresses {
        let (gateway, length) = (
            pod_gateway(*address),
            if address.is_ipv4() { 32 } else { 128 },
        );
        steps.push(message::add_address(index, *address, length));
        steps.push(message::set_neighbour(index, gateway, HOST_VETH_MAC));
        steps.push(message::route_on_link(
            everything(*address),
            gateway,
            index,
            None,
        ));
    }
    steps.extend(wire.limits.egress.map(|one| shape::limit(index, &one)));
    pod.run(steps)
}

/// What is wrong with a pod's network; nothing, when it is as [`wire_pod`] made it. What others added to it is no fault.
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
    for (kernel, link, limit) in [
        (&mut *host, &outside, wire.limits.ingress),
        (&mut pod, &inside, wire.limits.egress),
    ] {
        if limit.is_some() && !kernel.limited_links()?.contains(&link.index) {
            return Ok(Some(format!("{} has no limit of its rate", link.name)));
        }
    }
    let there = pod.addresses()?;
    let gateways = pod.default_gateways()?;
    let routes = host.pod_routes()?;
    for address in &wire.addresses {
        let (gateway, length) = (
            pod_gateway(*address),
            if address.is_ipv4() { 32 } else { 128 },
        );
        if !there.contains(&(inside.index, *address, length)) {
            return Ok(Some(format!(
                "{} does not have the address {address}",
                wire.interface
            )));
        }
        if !gateways.contains(&(inside.index, gateway)) {
            return Ok(Some(format!("the pod has no default route by {gateway}")));
        }
        if !routes.contains(&(outside.index, *address)) {
            return Ok(Some(format!("the host has no route to {address}")));
        }
    }
    Ok(None)
}
