//! What each tc hook does with a packet.

use dataplane_abi::{Addr, FROM_HOST, FROM_POD, FlowKey, HAIRPIN_V4, LocalAddress, Reason};

use crate::{
    follow::{Followed, Side, follow},
    packet::{Packet, Parsed, parse},
    tables::Tables,
};

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// On to the next program, then to the stack.
    Pass,
    Drop,
    /// Into the namespace behind this interface, the host's side of a pod's veth.
    Peer(u32),
    /// Into the host's stack, as if it came in by the outer end of the service veth pair.
    Host,
    /// Out by the host's routes, from and to the addresses that the packet has now. They are not carried here: the compiler would
    /// compare them before it looks which verdict it is, and the verifier refuses registers that were never written.
    Route,
}

/// Load-time constants that the hooks depend on.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    pub packet_lb: bool,
    /// There is a service veth pair, by which [`Verdict::Host`] can be had.
    pub service_veth: bool,
    /// Pods take the node's address for destinations outside the ranges that keep theirs.
    pub masquerade: bool,
    /// The node's address, the source of what it sends on for others; zero without one.
    pub node_v4: Addr,
    pub node_v6: Addr,
}

impl Features {
    /// The node's address of the same family; zero without one.
    #[inline(always)]
    pub fn node(&self, like: &Addr) -> Addr {
        match like.v4_be() {
            Some(_) => self.node_v4,
            None => self.node_v6,
        }
    }
}

/// Where an address is: its [`LocalAddress::kind`], 0 when it is elsewhere, and the interface of a pod.
///
/// Not an Option: where it is None, the compiler copies whatever register would hold the value, and the verifier refuses to
/// read one that was never written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub kind: u32,
    pub ifindex: u32,
}

impl Place {
    #[inline(always)]
    pub fn of<T: Tables>(tables: &T, addr: &Addr) -> Self {
        match tables.local(addr) {
            Some(LocalAddress { kind, ifindex, .. }) => Self { kind, ifindex },
            None => Self {
                kind: 0,
                ifindex: 0,
            },
        }
    }

    #[inline(always)]
    pub fn is_pod(&self) -> bool {
        self.kind == FROM_POD
    }

    #[inline(always)]
    pub fn is_host(&self) -> bool {
        self.kind == FROM_HOST
    }
}

/// The address that hairpinned packets take as their source, of the same family.
#[inline(always)]
pub(crate) fn hairpin(_like: &Addr) -> Addr {
    Addr::from_v4_be(u32::from_ne_bytes(HAIRPIN_V4))
}

#[inline(always)]
pub(crate) fn same(a: &Addr, b: &Addr) -> bool {
    a.words[0] == b.words[0] && a.words[1] == b.words[1]
}

/// Packets that a pod sends: ingress of the host's side of its veth, `ifindex`.
#[inline(always)]
pub fn pod_ingress<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
    ifindex: u32,
) -> Verdict {
    let mut ip = match parse(packet) {
        Parsed::Ip(ip) => ip,
        Parsed::Other => return pass(tables),
        Parsed::Malformed => return drop(tables, Reason::Malformed),
    };
    let owner = Place::of(tables, &ip.key.src);
    if !owner.is_pod() || owner.ifindex != ifindex {
        return drop(tables, Reason::SourceAddress);
    }
    let at = Place::of(tables, &ip.key.dst);
    if features.packet_lb {
        // What is sent to a pod may be an answer, but asks no Service.
        let side = if at.is_pod() {
            Side::Answers
        } else {
            Side::Pod
        };
        match follow(packet, tables, features, &mut ip, side, at.is_host()) {
            Followed::Untouched => {}
            Followed::ToBackend(to) => {
                let there = Place::of(tables, &to.dst);
                if !there.is_pod() && !same(&to.src, &ip.key.src) {
                    return Verdict::Route;
                }
                return deliver(tables, &there);
            }
            Followed::ToClient(to) => return onward(tables, &to, features),
            Followed::Rejected => return Verdict::Peer(ifindex),
            Followed::Dropped => return Verdict::Drop,
        }
    }
    deliver(tables, &at)
}

/// Packets that the host sends to a pod: egress of the host's side of its veth. Answers of the host's own backends are
/// translated back here.
#[inline(always)]
pub fn pod_egress<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
) -> Verdict {
    if !features.packet_lb {
        return Verdict::Pass;
    }
    let Parsed::Ip(mut ip) = parse(packet) else {
        return Verdict::Pass;
    };
    match follow(packet, tables, features, &mut ip, Side::Answers, false) {
        Followed::Dropped => Verdict::Drop,
        _ => Verdict::Pass,
    }
}

/// Packets that come from outside: ingress of an uplink. Those for pods are delivered; those for the node's ports and for
/// addresses of Services are balanced.
#[inline(always)]
pub fn uplink_ingress<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
) -> Verdict {
    let mut ip = match parse(packet) {
        Parsed::Ip(ip) => ip,
        // The stack judges what is not ours.
        Parsed::Other | Parsed::Malformed => return pass(tables),
    };
    let at = Place::of(tables, &ip.key.dst);
    if features.packet_lb {
        let side = if at.is_pod() {
            Side::Answers
        } else {
            Side::Outside
        };
        match follow(packet, tables, features, &mut ip, side, at.is_host()) {
            Followed::Untouched => {}
            Followed::ToBackend(to) => return onward(tables, &to, features),
            Followed::ToClient(to) => {
                if at.is_pod() && same(&to.dst, &ip.key.dst) {
                    return deliver(tables, &at);
                }
                return onward(tables, &to, features);
            }
            Followed::Rejected => return Verdict::Route,
            Followed::Dropped => return Verdict::Drop,
        }
    }
    deliver(tables, &at)
}

/// Packets that the host routed to a Service address: ingress of the inner end of the service veth pair. So come the answers of
/// the host's own backends to what was hairpinned to them.
#[inline(always)]
pub fn service_ingress<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
) -> Verdict {
    let mut ip = match parse(packet) {
        Parsed::Ip(ip) => ip,
        Parsed::Other => return pass(tables),
        Parsed::Malformed => return drop(tables, Reason::Malformed),
    };
    match follow(packet, tables, features, &mut ip, Side::Host, false) {
        Followed::Untouched => drop(tables, Reason::UnknownServiceAddress),
        Followed::ToBackend(to) => onward(tables, &to, features),
        Followed::ToClient(to) => onward(tables, &to, features),
        Followed::Rejected => Verdict::Host,
        Followed::Dropped => Verdict::Drop,
    }
}

/// To a local pod directly, else by the stack.
#[inline(always)]
fn deliver<T: Tables>(tables: &T, at: &Place) -> Verdict {
    if !at.is_pod() {
        return pass(tables);
    }
    tables.count(Reason::Delivered);
    Verdict::Peer(at.ifindex)
}

/// To where a translated packet goes now. The stack would refuse one that comes in with one of the host's own addresses as
/// source, and reverse path filtering one with a Service's: the host takes these from the interface that its routes lead to Services
/// by, and others go out without it.
#[inline(always)]
fn onward<T: Tables>(tables: &T, to: &FlowKey, features: &Features) -> Verdict {
    let there = Place::of(tables, &to.dst);
    if there.is_pod() {
        tables.count(Reason::Delivered);
        return Verdict::Peer(there.ifindex);
    }
    if there.is_host() {
        return if features.service_veth {
            Verdict::Host
        } else {
            pass(tables)
        };
    }
    Verdict::Route
}

#[inline(always)]
fn pass<T: Tables>(tables: &T) -> Verdict {
    tables.count(Reason::Passed);
    Verdict::Pass
}

#[inline(always)]
fn drop<T: Tables>(tables: &T, reason: Reason) -> Verdict {
    tables.count(reason);
    Verdict::Drop
}

#[cfg(test)]
#[path = "hook_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "hook_fuzz.rs"]
mod fuzz;
