//! Addresses of this node's pods: who has which, kept on disk.
//!
//! [`Pool`] decides and is pure; [`AddressFile`] keeps it. An allocation is named by the interface that the host has for
//! it, whose name follows from container and interface name: it can be found again without the file.

mod file;
mod pool;

use std::net::IpAddr;

use keelway_cni::{Attachment, Bandwidth, Mac, PortMapping};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::net::pod_mac;

pub use file::{AddressFile, FileError};
pub use pool::{Ask, Pool, PoolError, REST, Reserved};

/// The addresses of one attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Allocation {
    /// One of each family that the node has a range of, IPv4 first. Never empty.
    pub addresses: Vec<IpAddr>,
    /// Name of the host's side of the pod's veth.
    pub host_interface: String,
    /// Absent for one that was found on the node and is in no file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attachment: Option<Attachment>,
    /// Name of the network configuration that it was added by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Namespace and name of the pod, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The MAC address of the pod's side, when it was asked for; else it follows from the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Ports of the node that lead to the pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_mappings: Vec<PortMapping>,
    /// Limits of its traffic, as they were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,
}

impl Allocation {
    /// The pod's MAC address: its own, else one that follows from its first address.
    pub fn mac(&self) -> [u8; 6] {
        match (self.mac, self.addresses.first()) {
            (Some(Mac(bytes)), _) => bytes,
            (None, Some(first)) => pod_mac(*first),
            (None, None) => Default::default(),
        }
    }
}

/// Prefix of the host's side of pod veths; 12 hexadecimal digits follow.
pub const HOST_INTERFACE_PREFIX: &str = "kw";

/// The name of the host's interface for an attachment.
pub fn host_interface(attachment: &Attachment) -> String {
    let digest = Sha256::digest(attachment.to_string());
    format!("{HOST_INTERFACE_PREFIX}{}", hex::encode(&digest[..6]))
}

/// Whether an interface's name is one that [`host_interface`] gives.
pub fn is_host_interface(name: &str) -> bool {
    name.strip_prefix(HOST_INTERFACE_PREFIX)
        .is_some_and(|digits| {
            digits.len() == 12 && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
        })
}
