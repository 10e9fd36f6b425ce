//! What the data plane holds and how it changes: the vocabulary between the agent's plan and the maps.
//!
//! Nothing here knows of maps, aya or the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use dataplane_abi::proto;

/// Id of a service port: one port of one Service, with its own backends and all its frontends. `1..limits::SERVICES`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ServiceId(pub u32);

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Transport protocol of a frontend.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Protocol::Tcp => proto::TCP,
            Protocol::Udp => proto::UDP,
        }
    }

    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            proto::TCP => Some(Protocol::Tcp),
            proto::UDP => Some(Protocol::Udp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
        })
    }
}

/// An address and port under which a service port is reached.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Frontend {
    pub addr: IpAddr,
    /// Never 0.
    pub port: u16,
    pub protocol: Protocol,
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {}",
            SocketAddr::new(self.addr, self.port),
            self.protocol
        )
    }
}

/// The backends of a service port, in the order in which programs see them. `active` take new flows; `terminating` only
/// while there is no active one, and serve the flows they have. Neither kind: clients are rejected.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServiceBackends {
    pub active: Vec<SocketAddr>,
    pub terminating: Vec<SocketAddr>,
}

/// A pod of this node: how packets for its address reach it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocalPod {
    /// Interface index of the host's side of its veth.
    pub ifindex: u32,
    /// MAC address of its own side.
    pub mac: [u8; 6],
}

/// One change of the maps. Each is idempotent: setting what is there or removing what is not changes nothing.
///
/// Order within a batch, for no packet to see a dangling reference: services are set before frontends that name them, and
/// frontends removed before their services.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Sets all backends of a service port, atomically.
    SetService {
        id: ServiceId,
        backends: ServiceBackends,
    },
    RemoveService {
        id: ServiceId,
    },
    /// Lets a frontend lead to a service port. Replaces what it led to.
    SetFrontend {
        frontend: Frontend,
        id: ServiceId,
    },
    RemoveFrontend {
        frontend: Frontend,
    },
    /// Marks an address as a Service's: ports of it without frontend are rejected instead of routed.
    SetVip {
        addr: IpAddr,
    },
    RemoveVip {
        addr: IpAddr,
    },
    SetPod {
        addr: IpAddr,
        pod: LocalPod,
    },
    RemovePod {
        addr: IpAddr,
    },
    /// Names an address of the node itself, whose backends (host-network pods) the stack delivers to.
    SetHostAddress {
        addr: IpAddr,
    },
    RemoveHostAddress {
        addr: IpAddr,
    },
}

/// Everything that the maps hold: what an agent that restarts diffs its plan against.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct State {
    pub services: BTreeMap<ServiceId, ServiceBackends>,
    pub frontends: BTreeMap<Frontend, ServiceId>,
    pub vips: BTreeSet<IpAddr>,
    pub pods: BTreeMap<IpAddr, LocalPod>,
    pub host_addresses: BTreeSet<IpAddr>,
}
