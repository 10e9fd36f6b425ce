//! What each tc hook does with a packet of one family: of the other it passes everything on. A program asks which it is first, so
//! that the verifier sees each family by itself, and what the one needs of the stack does not add to the other's.

use dataplane_abi::{
    Addr, FROM_HOST, FROM_POD, Flow, FlowKey, HAIRPIN_V4, HAIRPIN_V6, LocalAddress, QUEUED, Reason,
    proto,
};

use crate::{
    balance::Picked,
    follow::{Followed, Side, follow},
    icmp::Quoted,
    packet::{ETH_LEN, IPV6_LEN, Ip, Packet, Parsed, has_ports, parse},
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
    /// To another node by the overlay, as it came: [`Notes::peer`] says which.
    Overlay,
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
    /// There is an overlay, by which clients' packets for backends elsewhere can be sent on as they came.
    pub overlay: bool,
    /// The packet came by it: another node sent it on, and chose a backend here.
    pub by_overlay: bool,
}

impl Features {
    /// The node's address of the family; zero without one.
    #[inline(always)]
    pub fn node<const V6: bool>(&self) -> Addr {
        if V6 { self.node_v6 } else { self.node_v4 }
    }
}

/// Where a hook writes down what it finds of a packet. In the kernel this is memory of the CPU: a program and the functions that it
/// calls share 512 bytes of stack, too few for IPv6's long addresses; and nothing need be cleared for a packet.
#[derive(Debug)]
pub struct Notes {
    pub ip: Ip,
    /// What the packet was translated to.
    pub to: FlowKey,
    /// What the entry of its flow says; of one that is opened, what has the tuple that it is to get.
    pub flow: Flow,
    /// The service of whose flow a client's packet is; 0 for none.
    pub service: u32,
    pub aside: Aside,
    /// The hardware address of the node that [`Verdict::Overlay`] sends to, as a word.
    pub peer: u64,
    /// 1 when the packet has become [`Notes::to`], else 0.
    pub is_translated: u32,
}

/// Keys that are needed for a moment.
#[derive(Debug)]
pub struct Aside {
    /// Of the other side of a flow that is opened or forgotten, or of what an ICMP error is about.
    pub about: FlowKey,
    /// Of what an ICMP error quotes, and where that lies.
    pub quoted: FlowKey,
    pub place: Quoted,
    /// Of a flow that is opened.
    pub entry: Flow,
    /// What was chosen for it.
    pub picked: Picked,
}

impl Notes {
    /// Of no packet yet.
    pub const NONE: Self = Self {
        ip: Ip::NONE,
        to: FlowKey::NONE,
        flow: Flow::NONE,
        service: 0,
        aside: Aside {
            about: FlowKey::NONE,
            quoted: FlowKey::NONE,
            place: Quoted::NONE,
            entry: Flow::NONE,
            picked: Picked::NONE,
        },
        peer: 0,
        is_translated: 0,
    };
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
        self.kind & FROM_POD != 0
    }

    /// A pod whose packets wait in the queue of its interface: they get there by the host's routes, since a redirect into the pod's
    /// namespace passes no queue.
    #[inline(always)]
    fn is_queued(&self) -> bool {
        self.kind & QUEUED != 0
    }

    #[inline(always)]
    pub fn is_host(&self) -> bool {
        self.kind == FROM_HOST
    }
}

/// The address that hairpinned packets take as their source.
#[inline(always)]
pub(crate) fn hairpin<const V6: bool>() -> Addr {
    if V6 {
        const { Addr::from_octets(HAIRPIN_V6) }
    } else {
        Addr::from_v4_be(u32::from_ne_bytes(HAIRPIN_V4))
    }
}

/// Whether an address is good on its link only: a group's or, of IPv6, link-local or none yet.
#[inline(always)]
fn is_of_link(addr: &Addr) -> bool {
    if let Some(be) = addr.v4_be() {
        return be.to_ne_bytes()[0] >= 224;
    }
    let [a, b, ..] = addr.words[0].to_ne_bytes();
    let unspecified = addr.words[0] == 0 && addr.words[1] == 0;
    unspecified || a == 0xff || (a == 0xfe && b & 0xc0 == 0x80)
}

#[inline(always)]
pub(crate) fn same(a: &Addr, b: &Addr) -> bool {
    a.words[0] == b.words[0] && a.words[1] == b.words[1]
}

/// Packets that a pod sends: ingress of the host's side of its veth, `ifindex`.
#[inline(always)]
pub fn pod_ingress<const V6: bool, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
    notes: &mut Notes,
    ifindex: u32,
) -> Verdict {
    notes.is_translated = 0;
    match parse::<V6, P>(packet, &mut notes.ip) {
        Parsed::Ip => {}
        Parsed::Other => return pass(tables),
        Parsed::Malformed => return drop(tables, Reason::Malformed),
    }
    let owner = Place::of(tables, &notes.ip.key.src);
    if !owner.is_pod() || owner.ifindex != ifindex {
        // Neighbours are found, and groups joined, from addresses of the link. What that says of others' addresses is not believed:
        // the host's entries for pods are permanent.
        if V6
            && notes.ip.key.proto == proto::ICMPV6
            && is_of_link(&notes.ip.key.src)
            && is_of_link(&notes.ip.key.dst)
        {
            return pass(tables);
        }
        return drop(tables, Reason::SourceAddress);
    }
    let at = Place::of(tables, &notes.ip.key.dst);
    if features.packet_lb {
        // What is sent to a pod may be an answer, but asks no Service.
        let side = if at.is_pod() { Side::Direct } else { Side::Pod };
        match follow::<V6, P, T>(packet, tables, features, notes, side, at.is_host()) {
            Followed::Untouched => {}
            Followed::ToBackend => {
                let there = Place::of(tables, &notes.to.dst);
                if !there.is_pod() && !same(&notes.to.src, &notes.ip.key.src) {
                    return Verdict::Route;
                }
                return deliver(tables, &there);
            }
            // Another port is all that has changed of it.
            Followed::ToClient
                if same(&notes.to.src, &notes.ip.key.src)
                    && same(&notes.to.dst, &notes.ip.key.dst) => {}
            Followed::ToClient => return onward(tables, &notes.to, features.service_veth),
            Followed::Rejected => return Verdict::Peer(ifindex),
            Followed::Dispatched | Followed::Dropped => return Verdict::Drop,
        }
    }
    deliver(tables, &at)
}

/// Packets that the host sends to a pod: egress of the host's side of its veth; and those that leave the node, of which [`may_be_answer`]
/// does not say that they are no answers: egress of an uplink or of the overlay. Answers of the host's own backends are translated back here,
/// of the latter those to clients that kept their addresses.
#[inline(always)]
pub fn answer<const V6: bool, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
    notes: &mut Notes,
) -> Verdict {
    if !features.packet_lb {
        return Verdict::Pass;
    }
    if parse::<V6, P>(packet, &mut notes.ip) != Parsed::Ip {
        return Verdict::Pass;
    }
    match follow::<V6, P, T>(packet, tables, features, notes, Side::Answers, false) {
        Followed::Dropped => Verdict::Drop,
        _ => Verdict::Pass,
    }
}

/// Whether a packet may be of a process of the node that clients have been led to with their addresses kept: by the port that it comes from,
/// or because that cannot be told (errors about a flow, later fragments, extension headers). What leaves the node pays for this look alone.
#[inline(always)]
pub fn may_be_answer<const V6: bool, P: Packet, T: Tables>(packet: &P, tables: &T) -> bool {
    let (protocol, l4) = if V6 {
        match packet.read::<[u8; 2]>(ETH_LEN + 6) {
            Some([next, _hop_limit]) => (next, ETH_LEN + IPV6_LEN),
            None => return true,
        }
    } else {
        let header = packet.read::<[u16; 5]>(ETH_LEN).unwrap_or([0; 5]);
        let [words, _tos] = header[0].to_ne_bytes();
        let [_ttl, protocol] = header[4].to_ne_bytes();
        if u16::from_be(header[3]) & 0x1fff != 0 {
            return true;
        }
        (protocol, ETH_LEN + (words as usize & 15) * 4)
    };
    if !has_ports(protocol) {
        return true;
    }
    match packet.read::<u16>(l4) {
        Some(port) => tables.is_kept_port(protocol, port),
        None => true,
    }
}

/// Packets that come from outside: ingress of an uplink. Those for pods are delivered; those for the node's ports and for
/// addresses of Services are balanced.
#[inline(always)]
pub fn uplink_ingress<const V6: bool, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
    notes: &mut Notes,
) -> Verdict {
    notes.is_translated = 0;
    match parse::<V6, P>(packet, &mut notes.ip) {
        Parsed::Ip => {}
        // The stack judges what is not ours.
        Parsed::Other | Parsed::Malformed => return pass(tables),
    }
    let at = Place::of(tables, &notes.ip.key.dst);
    if features.packet_lb {
        // By the overlay comes what was sent to another node's port, and is this node's now.
        let at_host = at.is_host() || features.by_overlay;
        // Each by itself: together they would have the verifier follow both at every step.
        let followed = if at.is_pod() {
            follow::<V6, P, T>(packet, tables, features, notes, Side::Direct, false)
        } else {
            follow::<V6, P, T>(packet, tables, features, notes, Side::Outside, at_host)
        };
        match followed {
            Followed::Untouched => {}
            Followed::ToBackend => {
                // A client that the node's own process is to see comes in as if it had asked that directly: the stack judges whether it may.
                let is_seen = same(&notes.to.src, &notes.ip.key.src);
                return onward(tables, &notes.to, features.service_veth && !is_seen);
            }
            Followed::ToClient => {
                if at.is_pod() && same(&notes.to.dst, &notes.ip.key.dst) {
                    return deliver(tables, &at);
                }
                return onward(tables, &notes.to, features.service_veth);
            }
            Followed::Rejected => return Verdict::Route,
            Followed::Dispatched => return Verdict::Overlay,
            Followed::Dropped => return Verdict::Drop,
        }
    }
    deliver(tables, &at)
}

/// Packets that the host routed to a Service address: ingress of the inner end of the service veth pair. So come the answers of
/// the host's own backends to what was hairpinned to them.
#[inline(always)]
pub fn service_ingress<const V6: bool, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
    notes: &mut Notes,
) -> Verdict {
    notes.is_translated = 0;
    match parse::<V6, P>(packet, &mut notes.ip) {
        Parsed::Ip => {}
        Parsed::Other => return pass(tables),
        Parsed::Malformed => return drop(tables, Reason::Malformed),
    }
    match follow::<V6, P, T>(packet, tables, features, notes, Side::Host, false) {
        // The host looks for others and joins groups at the interface, as at any.
        Followed::Untouched if is_of_link(&notes.ip.key.dst) => pass(tables),
        Followed::Untouched => drop(tables, Reason::UnknownServiceAddress),
        Followed::ToBackend => onward(tables, &notes.to, features.service_veth),
        Followed::ToClient => onward(tables, &notes.to, features.service_veth),
        Followed::Rejected => Verdict::Host,
        Followed::Dispatched | Followed::Dropped => Verdict::Drop,
    }
}

/// To a local pod directly, else by the stack.
#[inline(always)]
fn deliver<T: Tables>(tables: &T, at: &Place) -> Verdict {
    if !at.is_pod() {
        return pass(tables);
    }
    tables.count(Reason::Delivered);
    into_pod(at)
}

#[inline(always)]
fn into_pod(at: &Place) -> Verdict {
    if at.is_queued() {
        return Verdict::Route;
    }
    Verdict::Peer(at.ifindex)
}

/// To where a translated packet goes now. The stack would refuse one that comes in with one of the host's own addresses as
/// source, and reverse path filtering one with a Service's: the host takes these from the interface that its routes lead to Services
/// by, and others go out without it.
#[inline(always)]
fn onward<T: Tables>(tables: &T, to: &FlowKey, by_service_veth: bool) -> Verdict {
    let there = Place::of(tables, &to.dst);
    if there.is_pod() {
        tables.count(Reason::Delivered);
        return into_pod(&there);
    }
    if there.is_host() {
        return if by_service_veth {
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
#[path = "dispatch_tests.rs"]
mod dispatch;

#[cfg(test)]
#[path = "hook_fuzz.rs"]
mod fuzz;
