//! What the data plane holds and how it changes: the vocabulary between the agent's plan and the maps.
//!
//! Nothing here knows of maps, aya or the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use dataplane_abi::proto;
use ipnetwork::IpNetwork;

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
    Sctp,
}

impl Protocol {
    /// IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Protocol::Tcp => proto::TCP,
            Protocol::Udp => proto::UDP,
            Protocol::Sctp => proto::SCTP,
        }
    }

    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            proto::TCP => Some(Protocol::Tcp),
            proto::UDP => Some(Protocol::Udp),
            proto::SCTP => Some(Protocol::Sctp),
            _ => None,
        }
    }
}

impl From<cluster_model::Protocol> for Protocol {
    fn from(protocol: cluster_model::Protocol) -> Self {
        match protocol {
            cluster_model::Protocol::Tcp => Self::Tcp,
            cluster_model::Protocol::Udp => Self::Udp,
            cluster_model::Protocol::Sctp => Self::Sctp,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// An address and port under which a service port is reached.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Frontend {
    /// The unspecified address stands for every address of the node, and for loopback ones in the host's own sockets: NodePorts,
    /// host ports. Each family has its own.
    pub addr: IpAddr,
    /// Never 0.
    pub port: u16,
    pub protocol: Protocol,
}

impl Frontend {
    /// The same port on every address of the node.
    pub fn on_every_address(self) -> Self {
        let addr = match self.addr {
            IpAddr::V4(_) => IpAddr::from([0; 4]),
            IpAddr::V6(_) => IpAddr::from([0; 16]),
        };
        Self { addr, ..self }
    }
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

/// Where a frontend leads: traffic policies may give clients on this node (pods and the node itself) other backends than clients
/// elsewhere, which are a service port of their own then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lead {
    pub internal: ServiceId,
    pub external: ServiceId,
    /// Only clients in the service port's `sources` may come by this frontend.
    pub guarded: bool,
}

impl Lead {
    /// The same backends for everybody.
    pub const fn to(id: ServiceId) -> Self {
        Self {
            internal: id,
            external: id,
            guarded: false,
        }
    }
}

/// What kind of address belongs to a Service.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Vip {
    /// Of the Service ranges, which the node routes into the service veth.
    Cluster,
    /// For clients outside the cluster.
    External,
}

/// The backends of a service port, in the order in which programs see them. `active` take new flows; `terminating` only
/// while there is no active one, and serve the flows they have. Neither kind: clients are rejected.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServiceBackends {
    pub active: Vec<SocketAddr>,
    pub terminating: Vec<SocketAddr>,
    /// Without any backend clients are not answered, rather than rejected: there are some on other nodes.
    pub silent: bool,
    /// A client gets the backend that it had within so many seconds; 0 for any.
    pub affinity_timeout_s: u32,
    /// Entries of the Maglev table by which backends are chosen for clients outside, one of [`super::maglev::SIZES`]; 0 for any at
    /// random. Read back, 0 also where there was no room for the table.
    pub maglev: u32,
    /// Clients outside are answered by their backend's node directly, where all nodes can choose alike: with a Maglev table, or one
    /// backend. Read back, false also where there was no room for the table.
    pub direct: bool,
    /// Clients outside keep their addresses also at backends that are processes of the node itself: [`super::Dataplane::attach_answers`].
    pub keeps_clients: bool,
}

impl ServiceBackends {
    /// All of them, those that take new flows first.
    pub fn all(&self) -> impl Iterator<Item = &SocketAddr> {
        self.active.iter().chain(&self.terminating)
    }

    /// All of them by number. They are mostly in order already, of which the sort makes use.
    pub fn sorted(&self) -> Vec<SocketAddr> {
        let mut all: Vec<SocketAddr> = self.all().copied().collect();
        all.sort();
        all
    }

    /// Whether all that others are is among them.
    pub fn holds_all(&self, others: &Self) -> bool {
        let mut own = self.sorted().into_iter();
        let others = others.sorted();
        others.iter().all(|other| own.any(|one| one == *other))
    }
}

/// The ranges from which clients may come to a service port by its guarded frontends.
pub type Sources = BTreeSet<IpNetwork>;

/// A pod of this node: how packets for its address reach it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocalPod {
    /// Interface index of the host's side of its veth.
    pub ifindex: u32,
    /// MAC address of its own side.
    pub mac: [u8; 6],
    /// What is for the pod has to pass the queue of that interface, where its rate is limited.
    pub queued: bool,
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
    /// Gives a service port's backends another generation, by which flows of datagrams look whether what they asked leads there still:
    /// after frontends that led to it lead elsewhere. Comes after all frontends of its batch, and has the backends that are wished: with what
    /// the maps hold, a table that had no room would be forgotten. Of one that is gone nothing is renewed.
    RenewService {
        id: ServiceId,
        backends: ServiceBackends,
    },
    /// Sets all ranges from which clients may come to a service port by guarded frontends; none lets nobody in.
    SetSources {
        id: ServiceId,
        sources: Sources,
    },
    /// Lets a frontend lead to service ports. Replaces where it led.
    SetFrontend {
        frontend: Frontend,
        lead: Lead,
    },
    RemoveFrontend {
        frontend: Frontend,
    },
    /// Marks an address as a Service's: ports of it without frontend are rejected instead of routed.
    SetVip {
        addr: IpAddr,
        kind: Vip,
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
    /// Sets all ranges of destinations to which pods keep their own addresses, where the data plane masquerades.
    SetUnmasqueraded {
        ranges: BTreeSet<IpNetwork>,
    },
    /// Sets all ranges of addresses that are on other nodes, with the hardware address of the overlay's end there.
    SetPeers {
        peers: Peers,
    },
}

/// Where addresses on other nodes are, in the overlay.
pub type Peers = BTreeMap<IpNetwork, [u8; 6]>;

/// Everything that the maps hold: what an agent that restarts diffs its plan against.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct State {
    pub services: BTreeMap<ServiceId, ServiceBackends>,
    /// Of the service ports that have any.
    pub sources: BTreeMap<ServiceId, Sources>,
    pub frontends: BTreeMap<Frontend, Lead>,
    pub vips: BTreeMap<IpAddr, Vip>,
    pub pods: BTreeMap<IpAddr, LocalPod>,
    pub host_addresses: BTreeSet<IpAddr>,
    pub unmasqueraded: BTreeSet<IpNetwork>,
    pub peers: Peers,
}
