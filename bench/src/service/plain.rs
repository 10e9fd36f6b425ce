//! Two nodes that the kernel alone routes for: what Keelway is compared with, and what iptables, nftables or kube-proxy work on.
//!
//! Pods hang on a veth each, as ptp and most other plugins wire them. A namespace without rules has no netfilter hooks and no
//! connection tracking.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use keelway_tests::sandbox::{Network, ip};

use super::cluster::{Pod, node_address};

/// Both nodes with their pods.
pub struct Plain {
    pub hosts: [Network; 2],
    pub client: Pod,
    /// A server beside the client, and one on the other node.
    pub servers: [Pod; 2],
}

impl Plain {
    pub fn build() -> Result<Self> {
        let hosts = [Network::new()?, Network::new()?];
        ip("link add up1 type veth peer name up2")?;
        for (host, number) in hosts.iter().zip([1_u8, 2]) {
            host.take(&format!("up{number}"))?;
            host.run(|| -> Result<()> {
                ip(&format!("link set up{number} name eth0"))?;
                ip(&format!("addr add {}/24 dev eth0", node_address(number)))?;
                ip("link set eth0 up")?;
                let other = 3 - number;
                ip(&format!(
                    "route add 10.244.{}.0/20 via {}",
                    16 * other,
                    node_address(other)
                ))?;
                std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("ip_forward")
            })?;
        }
        let client = pod(&hosts[0], 1, 1)?;
        let servers = [pod(&hosts[0], 1, 2)?, pod(&hosts[1], 2, 1)?];
        Ok(Self {
            hosts,
            client,
            servers,
        })
    }
}

/// A pod with a range of its own, whose first address is the node's.
fn pod(host: &Network, node: u8, number: u8) -> Result<Pod> {
    let third = 16 * node + number;
    let network = Network::new()?;
    let veth = format!("pod{number}");
    host.run(|| -> Result<()> {
        ip(&format!("link add {veth} type veth peer name inside"))?;
        network.take("inside")?;
        ip(&format!("addr add 10.244.{third}.1/24 dev {veth}"))?;
        ip(&format!("link set {veth} up"))
    })?;
    let address = Ipv4Addr::new(10, 244, third, 2);
    network.run(|| -> Result<()> {
        ip("link set inside name eth0")?;
        ip(&format!("addr add {address}/24 dev eth0"))?;
        ip("link set eth0 up")?;
        ip(&format!("route add default via 10.244.{third}.1"))
    })?;
    Ok(Pod { network, address })
}

/// Two namespaces on one veth pair: no path between two pods can be shorter.
pub fn bare_pair() -> Result<[Pod; 2]> {
    let ends = [Network::new()?, Network::new()?];
    ip("link add end1 type veth peer name end2")?;
    let mut pods = Vec::new();
    for (network, number) in ends.into_iter().zip([1_u8, 2]) {
        network.take(&format!("end{number}"))?;
        let address = Ipv4Addr::new(10, 244, 1, number);
        network.run(|| -> Result<()> {
            ip(&format!("link set end{number} name eth0"))?;
            ip(&format!("addr add {address}/24 dev eth0"))?;
            ip("link set eth0 up")
        })?;
        pods.push(Pod { network, address });
    }
    pods.try_into()
        .map_err(|_count| anyhow::anyhow!("two ends were made"))
}
