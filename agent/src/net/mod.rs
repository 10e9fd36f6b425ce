//! The kernel's links, addresses, routes and neighbours, by netlink.

mod kernel;
mod netlink;
mod pod;
mod service_veth;

pub use kernel::{Kernel, Link, Uplink};
pub use netlink::{Netlink, NetlinkError};
pub use pod::{EVERYTHING, POD_GATEWAY, PodWire, check_pod, pod_mac, wire_pod};
pub use service_veth::{INNER, OUTER, make_service_veth};
