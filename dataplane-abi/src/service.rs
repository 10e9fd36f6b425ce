use crate::{Addr, layout::plain, limits, proto};

/// An address and port under which a service port is reached.
///
/// The unspecified address of a family stands for every address of the node: NodePorts and host ports.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FrontendKey {
    pub addr: Addr,
    /// Network order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    pub pad: u8,
    pub pad2: u32,
}
plain!(FrontendKey, 24, { addr: 0, port: 16, proto: 18, pad: 19, pad2: 20 });

/// Port of the marker that says "this address belongs to a Service", whatever its ports.
pub const VIP_PORT: u16 = 0;
/// Protocol of that marker.
pub const VIP_PROTO: u8 = 0;

impl FrontendKey {
    #[inline(always)]
    pub const fn new(addr: Addr, port_be: u16, proto: u8) -> Self {
        Self {
            addr,
            port: port_be,
            proto,
            pad: 0,
            pad2: 0,
        }
    }

    /// The key of the marker of `addr`.
    #[inline(always)]
    pub const fn marker(addr: Addr) -> Self {
        Self::new(addr, VIP_PORT, VIP_PROTO)
    }

    /// Whether the key is a marker's.
    #[inline(always)]
    pub const fn is_marker(&self) -> bool {
        self.port == VIP_PORT && self.proto == VIP_PROTO
    }

    /// A hash of the key, by which whoever reads its value knows whose that is; see [`Lead::sealed`].
    #[inline(always)]
    pub const fn digest(&self) -> u64 {
        // Odd, and of as many ones as zeros in no order: the golden ratio's first digits.
        const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
        let ports = (self.port as u64) << 8 | self.proto as u64;
        let hash = (self.addr.words[1] ^ ports << 32).wrapping_mul(FACTOR);
        (hash ^ hash >> 32 ^ self.addr.words[0]).wrapping_mul(FACTOR)
    }

    /// The key of the same port on every address of the node, for a packet to one of them.
    #[inline(always)]
    pub const fn on_every_address(&self) -> Self {
        Self::new(self.addr.unspecified(), self.port, self.proto)
    }
}

/// Where a frontend leads: the service port's backends as its traffic policies choose them, for clients on this node
/// (pods and the node itself) and for those outside.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lead {
    /// Service id for clients on this node, or [`Lead::MARKER`].
    pub internal: u32,
    /// Service id for clients elsewhere.
    pub external: u32,
    /// [`LEAD_GUARDED`].
    pub flags: u32,
    /// In the map, half of what the lead is sealed by; else 0.
    pub seal: u32,
}
plain!(Lead, 16, { internal: 0, external: 4, flags: 8, seal: 12 });

/// [`Lead::flags`]: only clients in the service's ranges (RANGES) may come by this frontend.
pub const LEAD_GUARDED: u32 = 1;
/// [`Lead::flags`] of a marker: an address for clients outside the cluster, which the node does not route into its service veth.
pub const MARKER_EXTERNAL: u32 = 2;

impl Lead {
    /// [`Lead::internal`] of the marker that says "this address belongs to a Service". What reaches a marked address on a port
    /// without frontend is rejected.
    pub const MARKER: u32 = 0;

    pub const fn new(internal: u32, external: u32, flags: u32) -> Self {
        Self {
            internal,
            external,
            flags,
            seal: 0,
        }
    }

    /// The lead as it lies in the map, under its key: each of its two words says whose it is, in bits that ids leave free. The kernel gives
    /// an element that is deleted or replaced to the next key at once, and a program that found it just before reads what is there then.
    pub const fn sealed(self, key: &FrontendKey) -> Self {
        let digest = key.digest();
        Self {
            internal: self.internal | (digest as u32) << Self::ID_BITS,
            external: self.external | ((digest >> 16) as u32) << Self::ID_BITS,
            flags: self.flags,
            seal: (digest >> 32) as u32,
        }
    }

    /// Whether what was read under a key of this digest is of that key.
    #[inline(always)]
    pub const fn is_sealed_by(&self, digest: u64) -> bool {
        let differs = (self.internal ^ (digest as u32) << Self::ID_BITS)
            | (self.external ^ ((digest >> 16) as u32) << Self::ID_BITS);
        differs >> Self::ID_BITS == 0 && self.seal == (digest >> 32) as u32
    }

    /// The lead without what it is sealed by.
    #[inline(always)]
    pub const fn bare(self) -> Self {
        Self::new(
            self.internal & (limits::SERVICES - 1),
            self.external & (limits::SERVICES - 1),
            self.flags,
        )
    }

    /// The words of a map's value, each of which was read at once.
    #[inline(always)]
    pub const fn of_words(words: [u64; 2]) -> Self {
        // SAFETY: both are sixteen plain bytes.
        unsafe { core::mem::transmute(words) }
    }

    const ID_BITS: u32 = limits::SERVICES.trailing_zeros();
}

const _: () = assert!(limits::SERVICES.is_power_of_two());

/// A range of addresses with a meaning: sources that may come to a service's guarded frontends, or, for service 0, destinations
/// to which pods keep their addresses. A key of a longest-prefix-match trie.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct RangeKey {
    /// Bits of `service` and `addr` that count: 32 and the range's own, an IPv4 range's being 96 longer.
    pub prefix_len: u32,
    /// Service id, and 0 for destinations without masquerade.
    pub service: u32,
    /// The 16 bytes in network order.
    pub addr: [u32; 4],
}
plain!(RangeKey, 24, { prefix_len: 0, service: 4, addr: 8 });

impl RangeKey {
    /// Bits of a key that is looked up.
    pub const FULL: u32 = 32 + 128;

    /// The key of a range of `len` bits out of 128.
    #[inline(always)]
    pub const fn new(service: u32, addr: Addr, len: u32) -> Self {
        let [first, second] = addr.words;
        #[cfg(target_endian = "little")]
        let addr = [
            first as u32,
            (first >> 32) as u32,
            second as u32,
            (second >> 32) as u32,
        ];
        #[cfg(target_endian = "big")]
        let addr = [
            (first >> 32) as u32,
            first as u32,
            (second >> 32) as u32,
            second as u32,
        ];
        Self {
            prefix_len: 32 + len,
            service,
            addr,
        }
    }

    /// The address of the range.
    pub const fn address(&self) -> Addr {
        Addr {
            words: [
                join(self.addr[0], self.addr[1]),
                join(self.addr[2], self.addr[3]),
            ],
        }
    }
}

/// Two words of memory as one.
const fn join(first: u32, second: u32) -> u64 {
    #[cfg(target_endian = "little")]
    return first as u64 | (second as u64) << 32;
    #[cfg(target_endian = "big")]
    return (first as u64) << 32 | second as u64;
}

/// A client that a service with affinity shall lead to the same backend again.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct AffinityKey {
    pub client: Addr,
    pub service: u32,
    pub pad: u32,
}
plain!(AffinityKey, 24, { client: 0, service: 16, pad: 20 });

impl AffinityKey {
    #[inline(always)]
    pub const fn new(client: Addr, service: u32) -> Self {
        Self {
            client,
            service,
            pad: 0,
        }
    }
}

/// The backend that a client had last.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Affinity {
    pub backend: Addr,
    /// Network order.
    pub port: u16,
    pub pad: u16,
    /// Seconds of the monotonic clock when it was last chosen.
    pub last_seen_s: u32,
    /// Its place in the extent then, from 0.
    pub slot: u32,
    pub pad2: u32,
}
plain!(Affinity, 32, { backend: 0, port: 16, pad: 18, last_seen_s: 20, slot: 24, pad2: 28 });

/// Where a service port's backends are: one aligned u64, so that it changes in one store.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ServiceRef {
    /// Index in BACKENDS of the extent's header; 0 with generation 0 means no such service.
    pub extent: u32,
    /// What the header must say; never 0 for a live service.
    pub generation: u32,
}
plain!(ServiceRef, 8, { extent: 0, generation: 4 });

impl ServiceRef {
    /// The id that no service port has: its word tells by an epoch when frontends, or what else says where a destination leads, last
    /// changed.
    pub const EPOCH_ID: u32 = 0;

    /// The word of an epoch: no service's, by its generation.
    pub const fn of_epoch(epoch: u32) -> Self {
        Self {
            extent: epoch,
            generation: 0,
        }
    }

    /// The epoch in the word of [`Self::EPOCH_ID`].
    #[inline(always)]
    pub const fn epoch(self) -> u32 {
        self.extent
    }

    /// As the word that is stored.
    pub const fn to_word(self) -> u64 {
        // SAFETY: both are eight plain bytes.
        unsafe { core::mem::transmute(self) }
    }

    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        // SAFETY: both are eight plain bytes.
        unsafe { core::mem::transmute(word) }
    }
}

/// One element of BACKENDS: an extent's header or a backend.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cell {
    pub words: [u64; 4],
}
plain!(Cell, 32, { words: 0 });

/// First cell of an extent.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ExtentHeader {
    /// Service id that the extent belongs to.
    pub service: u32,
    pub generation: u32,
    /// Backends that take new flows; they come first.
    pub active: u32,
    /// Active and terminating backends. Terminating ones are used only when `active` is 0.
    pub total: u32,
    /// [`SERVICE_SILENT`], [`SERVICE_DIRECT`], [`SERVICE_KEEPS_CLIENTS`].
    pub flags: u32,
    /// ClientIP affinity; 0 is none.
    pub affinity_timeout_s: u32,
    /// Entries of the Maglev table of this generation (MAGLEV), by which backends are chosen for clients outside; 0 without one.
    pub maglev: u32,
    /// How many of the active backends come first in ascending order of addresses and ports; the others are in that order among themselves.
    pub near_active: u16,
    /// The same of those behind them.
    pub near_terminating: u16,
}
plain!(ExtentHeader, 32, { service: 0, generation: 4, active: 8, total: 12, flags: 16, affinity_timeout_s: 20, maglev: 24, near_active: 28, near_terminating: 30 });

/// [`ExtentHeader::flags`]: without backends, clients are not answered: there are some elsewhere, which the traffic policy rules out.
pub const SERVICE_SILENT: u32 = 1;

/// Which entries of which Maglev table a block holds. Tables go by the generation of their extent, so a service and its table
/// change in the same store.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct MaglevKey {
    pub generation: u32,
    /// Position of the block's first entry in the table, in blocks.
    pub block: u32,
}
plain!(MaglevKey, 8, { generation: 0, block: 4 });

/// A run of entries of a Maglev table: places of active backends in their extent, from 0.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MaglevBlock {
    pub slots: [u16; Self::ENTRIES as usize],
}
plain!(MaglevBlock, 960, { slots: 0 });

impl MaglevBlock {
    /// With its key and what the kernel keeps of an element of a hash (56 bytes), a block fills a kilobyte of the kernel's allocator.
    pub const ENTRIES: u32 = 480;
    pub const EMPTY: Self = Self {
        slots: [0; Self::ENTRIES as usize],
    };

    /// Blocks of a table of so many entries.
    pub const fn count(entries: u32) -> u32 {
        entries.div_ceil(Self::ENTRIES)
    }
}

/// [`ExtentHeader::flags`]: clients outside are answered by their backend's node directly (DSR). Every node chooses alike.
pub const SERVICE_DIRECT: u32 = 2;

/// [`ExtentHeader::flags`]: clients outside keep their addresses also where the backend is a process of the node itself, whose answers
/// pass a hook as they leave.
pub const SERVICE_KEEPS_CLIENTS: u32 = 4;

/// Ports of one protocol, next to each other: at which a process of the node has been asked by clients that kept their addresses.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeptPorts {
    /// By the port's last bits; not 0 for one that was. Each a byte of its own, so that CPUs may set several at once.
    pub ports: [u8; Self::PORTS as usize],
}
plain!(KeptPorts, 64, { ports: 0 });

impl KeptPorts {
    pub const PORTS: u32 = 64;
    /// How many hold all ports of a protocol.
    pub const OF_A_PROTOCOL: u32 = (1 << 16) / Self::PORTS;

    /// Where a port, network order, is: which of them, and the place in it. Of a protocol without ports it is beyond the last.
    #[inline(always)]
    pub const fn place(protocol: u8, port: u16) -> (u32, u32) {
        let first = match protocol {
            proto::TCP => 0,
            proto::UDP => Self::OF_A_PROTOCOL,
            proto::SCTP => 2 * Self::OF_A_PROTOCOL,
            _ => u32::MAX - Self::OF_A_PROTOCOL,
        };
        let port = u16::from_be(port) as u32;
        (first + port / Self::PORTS, port % Self::PORTS)
    }
}

/// A range of addresses on another node. A key of a longest-prefix-match trie; the value is the hardware address of that node's end of
/// the overlay, its six bytes as they lie in the memory of a little-endian word.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PeerKey {
    /// Bits of `addr` that count, an IPv4 range's being 96 longer.
    pub prefix_len: u32,
    /// The 16 bytes in network order.
    pub addr: [u32; 4],
}
plain!(PeerKey, 20, { prefix_len: 0, addr: 4 });

impl PeerKey {
    /// Bits of a key that is looked up.
    pub const FULL: u32 = 128;

    /// The key of a range of `len` bits out of 128.
    #[inline(always)]
    pub const fn new(addr: Addr, len: u32) -> Self {
        Self {
            prefix_len: len,
            addr: RangeKey::new(0, addr, 0).addr,
        }
    }

    /// The address of the range.
    pub const fn address(&self) -> Addr {
        let as_range = RangeKey {
            prefix_len: 0,
            service: 0,
            addr: self.addr,
        };
        as_range.address()
    }
}

/// A cell after the header: where to send.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Backend {
    pub addr: Addr,
    /// Network order.
    pub port: u16,
    pub pad: u16,
    /// Its place among its service's backends, from 0. To the verifier, a number that is read is any number, while one
    /// that counts a loop is a state of its own for every turn.
    pub slot: u32,
    /// Zero; kept for weight and node.
    pub reserved: u64,
}
plain!(Backend, 32, { addr: 0, port: 16, pad: 18, slot: 20, reserved: 24 });

impl Backend {
    pub const fn new(addr: Addr, port_be: u16, slot: u32) -> Self {
        Self {
            addr,
            port: port_be,
            pad: 0,
            slot,
            reserved: 0,
        }
    }
}

macro_rules! as_cell {
    ($type:ty) => {
        impl From<$type> for Cell {
            fn from(value: $type) -> Self {
                // SAFETY: both are 32 plain bytes.
                unsafe { core::mem::transmute(value) }
            }
        }
        impl From<Cell> for $type {
            fn from(cell: Cell) -> Self {
                // SAFETY: both are 32 plain bytes.
                unsafe { core::mem::transmute(cell) }
            }
        }
    };
}
as_cell!(ExtentHeader);
as_cell!(Backend);

/// A translation that a socket was given: it asked for the frontend and talks to the backend. Of a connected socket there is one, in a
/// storage of its own: the kernel clears what it gives, and for four of these that took it a fifth of what a hook may cost a connection.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SocketPeer {
    pub frontend: Addr,
    pub backend: Addr,
    /// Network order, both.
    pub frontend_port: u16,
    pub backend_port: u16,
    /// Service id; 0 when the slot is unused.
    pub service: u32,
    /// Generation of the service when the backend was last seen in it.
    pub generation: u32,
    /// Its place in the extent then, from 0.
    pub slot: u32,
}
plain!(SocketPeer, 48, { frontend: 0, backend: 16, frontend_port: 32, backend_port: 34, service: 36, generation: 40, slot: 44 });

/// What a socket of TCP was connected to, from then until it is closed.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Connected {
    /// The kernel's number of the socket, which no other ever has; 0 where there is none.
    pub cookie: u64,
    pub peer: SocketPeer,
}
plain!(Connected, 56, { cookie: 0, peer: 8 });

impl Connected {
    /// Sockets that are made one after the other have places one after the other.
    pub const fn place(cookie: u64) -> u32 {
        cookie as u32 % limits::CONNECTED
    }
}

/// Socket storage: the last translations of an unconnected UDP socket, one per service it talks to, the oldest forgotten beyond
/// [`SocketPeers::SLOTS`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SocketPeers {
    pub peers: [SocketPeer; Self::SLOTS],
    /// Slot to be taken next.
    pub next: u32,
    /// What [`ServiceRef::epoch`] was before the first of them was looked up: while it is the same, only their backends can have changed.
    pub epoch: u32,
}
plain!(SocketPeers, 200, { peers: 0, next: 192, epoch: 196 });

impl SocketPeers {
    /// A resolver asks a handful of servers from one socket; 4 covers resolv.conf's three.
    pub const SLOTS: usize = 4;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lead_is_known_by_its_key_and_by_no_other() {
        let lead = Lead::new(limits::SERVICES - 1, 7, LEAD_GUARDED);
        let key = |last: u32, port: u16, proto| {
            FrontendKey::new(Addr::from_v4_be(last.to_be()), port.to_be(), proto)
        };
        let all = || (0..40).flat_map(|last| (0..40).map(move |port| key(last, port, 6)));
        for own in all().chain([
            key(1, 80, 17),
            FrontendKey::marker(Addr { words: [0xfd, 1] }),
        ]) {
            let sealed = lead.sealed(&own);
            assert!(sealed.is_sealed_by(own.digest()));
            assert_eq!(sealed.bare(), lead);
            for other in all().filter(|other| *other != own) {
                let theirs = lead.sealed(&other);
                // Either word alone says so: one may be another's already.
                let [first, second] = [sealed, theirs];
                let torn = Lead {
                    internal: second.internal,
                    external: second.external,
                    ..first
                };
                assert!(!theirs.is_sealed_by(own.digest()), "{own:?} {other:?}");
                assert!(!torn.is_sealed_by(own.digest()), "{own:?} {other:?}");
                let torn = Lead {
                    flags: second.flags,
                    seal: second.seal,
                    ..first
                };
                assert!(!torn.is_sealed_by(own.digest()), "{own:?} {other:?}");
            }
        }
    }
}
