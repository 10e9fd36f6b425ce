//! Load-time constants of the programs (`.rodata`): what is turned on, and where this node is.

use aya::EbpfLoader;
use dataplane_abi::{Addr, global};

use super::{Config, Error, sys};

/// By the names of [`global`].
#[derive(Debug)]
pub(super) struct Constants {
    packet_lb: u32,
    socket_lb: u32,
    service_veth: u32,
    node_v4: u32,
    node_v6: [u64; 2],
    masquerade: u32,
    kernel_dns: u32,
    host_netns: u64,
    uplink: u32,
    overlay: u32,
    overlay_link: u32,
    uplink_mac: u64,
}

impl Constants {
    /// As a configuration has them. To be called in the host's network namespace.
    pub fn of(config: &Config) -> Result<Self, Error> {
        let node_v4 = config.node_v4;
        Ok(Self {
            packet_lb: u32::from(config.packet_lb),
            socket_lb: u32::from(config.socket_lb),
            service_veth: config.service_veth.map_or(0, |pair| pair.outer),
            node_v4: node_v4.map_or(0, |v4| u32::from_ne_bytes(v4.octets())),
            node_v6: config.node_v6.map_or([0, 0], |v6| Addr::from(v6).words),
            masquerade: u32::from(config.masquerade),
            kernel_dns: u32::from(config.kernel_dns),
            host_netns: sys::netns_cookie().map_err(|source| Error::Netns { source })?,
            uplink: config.uplink.unwrap_or(0),
            overlay: config.overlay.unwrap_or(0),
            overlay_link: config.overlay_link.unwrap_or(0),
            uplink_mac: config.uplink_mac.map_or(0, word_of),
        })
    }

    /// Has a loader give them to the programs.
    pub fn override_in<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        let [high, low] = &self.node_v6;
        loader
            .override_global(global::PACKET_LB, &self.packet_lb, true)
            .override_global(global::SOCKET_LB, &self.socket_lb, true)
            .override_global(global::SERVICE_VETH, &self.service_veth, true)
            .override_global(global::NODE_V4, &self.node_v4, true)
            .override_global(global::NODE_V6_HIGH, high, true)
            .override_global(global::NODE_V6_LOW, low, true)
            .override_global(global::MASQUERADE, &self.masquerade, true)
            .override_global(global::KERNEL_DNS, &self.kernel_dns, true)
            .override_global(global::HOST_NETNS, &self.host_netns, true)
            .override_global(global::UPLINK, &self.uplink, true)
            .override_global(global::OVERLAY, &self.overlay, true)
            .override_global(global::OVERLAY_LINK, &self.overlay_link, true)
            .override_global(global::UPLINK_MAC, &self.uplink_mac, true);
    }
}

/// A hardware address as programs have it.
pub(super) fn word_of(mac: [u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
}
