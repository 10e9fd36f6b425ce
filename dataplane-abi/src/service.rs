use crate::{Addr, layout::plain};

/// [`FrontendKey::scope`] of what a client inside the cluster sees; the only scope so far.
pub const SCOPE_INTERNAL: u8 = 0;

/// An address and port under which a service port is reached.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FrontendKey {
    pub addr: Addr,
    /// Network order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// [`SCOPE_INTERNAL`].
    pub scope: u8,
    pub pad: u32,
}
plain!(FrontendKey, 24, { addr: 0, port: 16, proto: 18, scope: 19, pad: 20 });

/// Port of the marker that says "this address belongs to a Service", whatever its ports.
pub const VIP_PORT: u16 = 0;
/// Protocol of that marker.
pub const VIP_PROTO: u8 = 0;
/// Value of that marker in FRONTENDS: not a service id. What reaches a marked address on a port without
/// frontend is rejected.
pub const VIP_MARKER: u32 = u32::MAX;

impl FrontendKey {
    #[inline(always)]
    pub const fn new(addr: Addr, port_be: u16, proto: u8) -> Self {
        Self {
            addr,
            port: port_be,
            proto,
            scope: SCOPE_INTERNAL,
            pad: 0,
        }
    }

    /// The key of the marker of `addr`.
    #[inline(always)]
    pub const fn marker(addr: Addr) -> Self {
        Self::new(addr, VIP_PORT, VIP_PROTO)
    }
}

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
    /// None defined yet.
    pub flags: u32,
    /// ClientIP affinity; 0 is none. Not acted on yet.
    pub affinity_timeout_s: u32,
    /// Base of a Maglev ring; 0 is none. Not acted on yet.
    pub maglev: u32,
    pub pad: u32,
}
plain!(ExtentHeader, 32, { service: 0, generation: 4, active: 8, total: 12, flags: 16, affinity_timeout_s: 20, maglev: 24, pad: 28 });

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

/// A translation that a socket was given: it asked for the frontend and talks to the backend.
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

/// Socket storage: the last translations of a socket. A TCP or connected UDP socket has one; an unconnected UDP socket one
/// per service it talks to, the oldest forgotten beyond [`SocketPeers::SLOTS`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SocketPeers {
    pub peers: [SocketPeer; Self::SLOTS],
    /// Slot to be taken next.
    pub next: u32,
    pub pad: u32,
}
plain!(SocketPeers, 200, { peers: 0, next: 192, pad: 196 });

impl SocketPeers {
    /// A resolver asks a handful of servers from one socket; 4 covers resolv.conf's three.
    pub const SLOTS: usize = 4;
}
