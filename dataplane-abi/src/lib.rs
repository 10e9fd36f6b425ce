#![no_std]
//! Map keys and values, limits and counters shared by the eBPF programs and the agent.
//!
//! Everything here is `repr(C)` without implicit padding; the byte order of each number is named on its field.
//! A change of a layout, of a limit that sizes a map, or of what a field means asks for a new [`ABI_VERSION`]:
//! maps are pinned under a directory that carries it, and two versions share those of [`map::OF_TRAFFIC`] alone, for as long as the
//! sizes of their keys and values agree: a [`Flow`] whose fields mean something else needs another size. (The seal in [`Flow::seen`] does not:
//! programs before version 10 look at the bits below it alone, and an entry without one is taken as it is.)

mod address;
mod counter;
mod dns;
mod event;
mod flow;
mod layout;
mod service;

pub use address::{Addr, FROM_HOST, FROM_POD, LocalAddress, QUEUED};
pub use counter::{Class, Reason};
pub use dns::{
    DNS_ADDRESSES, DNS_NAME_BYTES, DNS_RECURSION, DnsCount, DnsZone, NameAddresses, NameKey,
    POD_DNS, POD_INGRESS, name_key,
};
pub use event::{
    CAPTURE_LEN, Hook, MONITOR_LOST, MONITOR_WANTED, MONITOR_WORDS, PacketEvent, SocketEvent,
    Wanted,
};
pub use flow::{
    Flow, FlowKey, FragmentKey, FragmentPorts, SEEN, SEEN_DISPATCHED, SEEN_FIN, SEEN_OPENING,
    SEEN_REPLY, SEEN_RST, SEEN_SYN, SEEN_TAKEN, Trace, timeout_s,
};
pub use layout::Plain;
pub use service::{
    Affinity, AffinityKey, Backend, Cell, Connected, ExtentHeader, FrontendKey, KeptPorts,
    LEAD_GUARDED, Lead, MARKER_EXTERNAL, MaglevBlock, MaglevKey, PeerKey, RangeKey, SERVICE_DIRECT,
    SERVICE_KEEPS_CLIENTS, SERVICE_SILENT, ServiceRef, SocketPeer, SocketPeers, VIP_PORT,
    VIP_PROTO,
};

/// Version of everything in this crate; part of the pin directory's name.
pub const ABI_VERSION: u32 = 10;

/// Sizes of maps and what relates them.
pub mod limits {
    /// Service ports, each one frontend group with its own backends. Ids are `1..SERVICES`; 0 is never a service.
    pub const SERVICES: u32 = 1 << 17;
    /// Addresses with a port that lead to a service port, and one marker per service address.
    pub const FRONTENDS: u32 = 1 << 18;
    /// 32-byte cells in which extents lie: a header and its backends, rounded up to a power of two.
    pub const CELLS: u32 = 1 << 20;
    /// Backends of one service port, terminating ones included.
    pub const BACKENDS_PER_SERVICE: u32 = 16_383;
    /// Addresses that this node delivers to itself: its pods' and its own.
    pub const LOCAL_ADDRESSES: u32 = 1 << 12;
    /// Entries (two per flow) of flows that have seen a reply, where nobody knows how much memory there is; else between these.
    pub const FLOWS: u32 = 1 << 19;
    pub const FLOWS_MIN: u32 = 1 << 16;
    pub const FLOWS_MAX: u32 = 1 << 22;
    /// Entries (two per flow) of flows that have not, evicted least recently used first.
    pub const FLOWS_UNREPLIED: u32 = 1 << 16;
    /// Clients of services with affinity whose backend is remembered, forgotten least recently used first.
    pub const AFFINITY: u32 = 1 << 16;
    /// Ranges of sources of all services, and of destinations without masquerade.
    pub const RANGES: u32 = 1 << 16;
    /// Fragmented datagrams whose ports are remembered.
    pub const FRAGMENTS: u32 = 1 << 12;
    /// Traces of datagrams' tuples, which share them by a hash: half a megabyte.
    pub const TRACES: u32 = 1 << 15;
    /// All ports of three protocols: a quarter of a megabyte.
    pub const KEPT_PORTS: u32 = 3 * super::KeptPorts::OF_A_PROTOCOL;
    /// Places of sockets of TCP that are connected to Services, of which one that finds its own taken has storage, which costs it more:
    /// not a megabyte, and little enough for a CPU's cache.
    pub const CONNECTED: u32 = 1 << 14;
    /// Connected datagram sockets of the host whose backend is remembered, forgotten least recently connected first.
    pub const DATAGRAMS: u32 = 1 << 12;
    /// Ports of the node that it gives to others' flows: the first of them, and how many. Below NodePorts (30000) and the kernel's ephemeral
    /// ports (32768), which the node's and the pods' own connections to the same backend have.
    pub const FLOW_PORT_FIRST: u16 = 8192;
    pub const FLOW_PORTS: u16 = 1 << 14;
    /// Ranges of addresses on other nodes: four of each of 8,000.
    pub const PEERS: u32 = 1 << 15;
    /// Blocks of all Maglev tables, a kilobyte each, of which as many are there as are used: room for 950 tables of 65,521 entries.
    pub const MAGLEV_BLOCKS: u32 = 1 << 17;
    /// Names that are answered at pods' interfaces, each in each of the cluster's domains.
    pub const DNS_NAMES: u32 = 1 << 17;
    /// Addresses at which the cluster DNS is asked: its Services' and its endpoints'.
    pub const DNS_SERVERS: u32 = 1 << 10;
    /// Bytes of the ring of events: a power of two of pages, and what may wait until the agent reads it.
    pub const EVENTS_BYTES: u32 = 1 << 19;

    // The largest extent fits the array many times over, and a service's marker has room beside its frontends.
    const _: () = assert!((BACKENDS_PER_SERVICE + 1).is_power_of_two());
    const _: () = assert!(CELLS / (BACKENDS_PER_SERVICE + 1) >= 64);
    const _: () = assert!(CELLS >= 8 * SERVICES);
    const _: () = assert!(FRONTENDS >= 2 * SERVICES);
    const _: () = assert!(FLOWS > 4 * FLOWS_UNREPLIED);
    // A place in an extent fits an entry of a table.
    const _: () = assert!(BACKENDS_PER_SERVICE <= u16::MAX as u32);
    const _: () = assert!(TRACES.is_power_of_two());
    const _: () = assert!(FLOW_PORTS.is_power_of_two() && FLOW_PORT_FIRST + FLOW_PORTS <= 30_000);
    const _: () = assert!(EVENTS_BYTES.is_power_of_two() && EVENTS_BYTES >= 4096);
}

/// Names of maps, as the object declares and the agent pins them.
pub mod map {
    /// [`crate::FrontendKey`] to [`crate::Lead`]; hash.
    pub const FRONTENDS: &str = "FRONTENDS";
    /// Service id to [`crate::ServiceRef`]; mmapable array.
    pub const SERVICES: &str = "SERVICES";
    /// [`crate::Cell`]s; mmapable array.
    pub const BACKENDS: &str = "BACKENDS";
    /// [`crate::Addr`] to [`crate::LocalAddress`]; hash.
    pub const LOCAL: &str = "LOCAL";
    /// [`crate::FlowKey`] to [`crate::Flow`], replied; hash.
    pub const FLOWS: &str = "FLOWS";
    /// [`crate::FlowKey`] to [`crate::Flow`], not yet replied; LRU hash.
    pub const FLOWS_UNREPLIED: &str = "FLOWS_UNREPLIED";
    /// [`crate::AffinityKey`] to [`crate::Affinity`]; LRU hash.
    pub const AFFINITY: &str = "AFFINITY";
    /// [`crate::RangeKey`] to u32, 1; longest-prefix-match trie.
    pub const RANGES: &str = "RANGES";
    /// [`crate::PeerKey`] to u64; longest-prefix-match trie.
    pub const PEERS: &str = "PEERS";
    /// [`crate::MaglevKey`] to [`crate::MaglevBlock`]; hash.
    pub const MAGLEV: &str = "MAGLEV";
    /// [`crate::FragmentKey`] to [`crate::FragmentPorts`]; LRU hash.
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// [`crate::Trace`]s by a hash of tuples; array.
    pub const TRACES: &str = "TRACES";
    /// [`crate::KeptPorts`] by [`crate::KeptPorts::place`]; array.
    pub const KEPT_PORTS: &str = "KEPT_PORTS";
    /// [`crate::Reason`] to packets, u64; per-CPU array.
    pub const COUNTERS: &str = "COUNTERS";
    /// [`crate::PacketEvent`]s; ring.
    pub const EVENTS: &str = "EVENTS";
    /// [`crate::MONITOR_WANTED`] and [`crate::MONITOR_LOST`], words; mmapable array.
    pub const MONITOR: &str = "MONITOR";
    /// [`crate::SocketPeers`], of sockets that name a destination with what they send; socket storage.
    pub const SOCKET_PEERS: &str = "SOCKET_PEERS";
    /// [`crate::Connected`] sockets of TCP, by [`crate::Connected::place`]; array.
    pub const CONNECTED: &str = "CONNECTED";
    /// [`crate::SocketPeer`], of others that were connected, and of those that found their place taken; socket storage.
    pub const SOCKET_PEER: &str = "SOCKET_PEER";
    /// Socket cookie, u64, to [`crate::SocketPeer`]: the host's datagram sockets that were connected to a backend; LRU hash.
    pub const DATAGRAMS: &str = "DATAGRAMS";

    /// Maps that tell of traffic rather than of the cluster. They outlive the version that made them, and have the size that it gave
    /// them.
    pub const OF_TRAFFIC: [&str; 9] = [
        FLOWS,
        FLOWS_UNREPLIED,
        AFFINITY,
        FRAGMENTS,
        SOCKET_PEERS,
        CONNECTED,
        SOCKET_PEER,
        TRACES,
        KEPT_PORTS,
    ];

    // Not pinned: who answers for the cluster must know it, so answers end with the agent.
    /// [`crate::POD_DNS`] and [`crate::POD_INGRESS`] to programs; the kernel empties it when the agent ends.
    pub const POD_PROGRAMS: &str = "POD_PROGRAMS";
    /// [`crate::NameKey`] to [`crate::NameAddresses`]; hash.
    pub const DNS_NAMES: &str = "DNS_NAMES";
    /// [`crate::FrontendKey`] to u32, 1; hash.
    pub const DNS_SERVERS: &str = "DNS_SERVERS";
    /// [`crate::DnsZone`]; array of one.
    pub const DNS_ZONE: &str = "DNS_ZONE";
    /// [`crate::DnsCount`] to questions, u64; per-CPU array.
    pub const DNS_COUNTS: &str = "DNS_COUNTS";
}

/// Names of load-time constants (`.rodata`), which the agent sets before it loads the object.
pub mod global {
    /// u32, 1 when packets at tc are translated.
    pub const PACKET_LB: &str = "PACKET_LB";
    /// u32, 1 when sockets are translated.
    pub const SOCKET_LB: &str = "SOCKET_LB";
    /// u32, interface index of the outer end of the service veth pair, whose routes lead to service addresses; 0 without one.
    pub const SERVICE_VETH: &str = "SERVICE_VETH";
    /// u32, the node's IPv4 address as memory in network order: the source of what it sends on for others; 0 without one.
    pub const NODE_V4: &str = "NODE_V4";
    /// u64 each, the two words of the node's IPv6 address; 0 without one.
    pub const NODE_V6_HIGH: &str = "NODE_V6_HIGH";
    pub const NODE_V6_LOW: &str = "NODE_V6_LOW";
    /// u64, cookie of the host's network namespace: its sockets mean the host by a loopback address.
    pub const HOST_NETNS: &str = "HOST_NETNS";
    /// u32, 1 when pods take the node's address for destinations outside RANGES.
    pub const MASQUERADE: &str = "MASQUERADE";
    /// u32, interface index of the uplink that has the node's address; 0 where that is not known.
    pub const UPLINK: &str = "UPLINK";
    /// u32, interface index of the overlay, by which packets are dispatched to other nodes as they came; 0 where none are.
    pub const OVERLAY: &str = "OVERLAY";
    /// u32, interface index of the overlay, whatever goes by it; 0 without one.
    pub const OVERLAY_LINK: &str = "OVERLAY_LINK";
    /// u64, the uplink's hardware address as its six bytes lie in the memory of a little-endian word; 0 where its driver runs no
    /// program of ours.
    pub const UPLINK_MAC: &str = "UPLINK_MAC";
    /// u32, 1 when questions for cluster names may be answered at pods' interfaces.
    pub const KERNEL_DNS: &str = "KERNEL_DNS";
}

/// MAC address of the host's side of every pod veth and of both ends of the service veth pair. One address for all lets a
/// packet be moved between them without a new Ethernet header.
pub const HOST_VETH_MAC: [u8; 6] = [0x0a, 0x6b, 0x77, 0x00, 0x00, 0x01];

/// Source address that a packet takes when its backend is its own sender (a pod, or the host, that reaches itself through
/// a Service): with its own address as source, the reply would never come back to be translated. Routed into the service veth.
pub const HAIRPIN_V4: [u8; 4] = [169, 254, 77, 77];
/// The same for IPv6: a unique local address (RFC 4193), since a link-local one would belong to one interface.
pub const HAIRPIN_V6: [u8; 16] = [
    0xfd, 0x6b, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x77, 0, 0x77,
];

/// IP protocol numbers.
pub mod proto {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;

    /// The ICMP of a family.
    #[inline(always)]
    pub const fn icmp(is_v6: bool) -> u8 {
        if is_v6 { ICMPV6 } else { ICMP }
    }
}
