//! The kernel's links, addresses, routes and neighbours, by netlink.

pub(crate) mod answer;
mod filter;
mod follow;
pub mod iptables;
mod kernel;
mod message;
mod netlink;
pub mod nftables;
mod overlay;
mod pod;
mod route;
mod service_veth;
mod shape;
mod sys;

pub use filter::{Direction, Filter};
pub use follow::AddressNews;
pub use kernel::{Interface, InterfaceKind, Kernel, Link, Uplink};
pub use netlink::{Netlink, NetlinkError};
pub use overlay::{OVERLAY, OverlayPeer, overhead, overlay_link_local, overlay_mac};
pub use pod::{PodWire, check_pod, everything, pod_gateway, pod_mac, wire_pod};
pub use service_veth::{INNER, OUTER, keep_to_ranges, make_service_veth, service_veth_is_whole};
pub use shape::{Limits, Shape};
pub use sys::socket_option;
