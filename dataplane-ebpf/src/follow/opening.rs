//! A packet of no flow: which Service it asks, which backend that has for it, and the flow that is opened.

use dataplane_abi::{Addr, LEAD_GUARDED, Reason, SEEN_DISPATCHED, SEEN_TAKEN};

use super::{Asking, Followed, NO_SERVICE, Side, dropped, is_vip, is_zero, lead};
use crate::{
    balance::{self, Picked},
    flow,
    hook::{Aside, Features, Notes, Place, hairpin, same},
    packet::{Echo, Ip},
    tables::{BY_ANOTHER, SOURCE_UNKNOWN, Tables},
};

/// What became of a packet of no flow, before it is rewritten: that takes room on the stack, too. As a number it comes back from a
/// function in a register.
pub(super) enum Opened {
    /// Nobody's.
    Nothing = 0,
    /// A flow: [`Notes::to`] and [`Notes::service`].
    Flow = 1,
    /// As [`Followed::Dispatched`].
    Dispatched = 2,
    /// To be refused.
    Refused = 3,
    /// Counted already.
    Dropped = 4,
    /// What may be the first of a flow past all Services.
    Directly = 5,
}

impl Opened {
    #[inline(always)]
    pub(super) const fn of(number: u32) -> Self {
        match number {
            0 => Self::Nothing,
            1 => Self::Flow,
            2 => Self::Dispatched,
            3 => Self::Refused,
            5 => Self::Directly,
            _ => Self::Dropped,
        }
    }
}

/// Whether a packet is of a connection to the node that is not known, and so the host's own business. What another node sent on may
/// be of any moment of one.
#[inline(always)]
pub(super) fn is_joining(features: &Features, ip: &Ip, side: Side, at_host: bool) -> bool {
    side == Side::Outside
        && at_host
        && !features.by_overlay
        && ip.is_of_connection()
        && !ip.is_syn()
}

/// Sends a client's packet to its backend's node as it is.
#[inline(always)]
pub(super) fn dispatch<T: Tables>(tables: &T, backend: &Addr, peer: &mut u64) -> Followed {
    match tables.peer(backend) {
        Some(mac) => {
            *peer = mac;
            tables.count(Reason::Dispatched);
            Followed::Dispatched
        }
        // The node is gone.
        None => dropped(tables, Reason::NoRoute),
    }
}

/// Whether a packet goes to its backend's node as it is, so that the client is answered from there: the Service asks for it, the
/// backend is on another node that the overlay reaches, and no node sent the packet on before. A client is not sent its own packets
/// back, which it would take for a stranger's.
#[inline(always)]
fn is_dispatched<T: Tables>(
    tables: &T,
    features: &Features,
    ip: &Ip,
    side: Side,
    backend: &Picked,
) -> bool {
    side == Side::Outside
        && features.overlay
        && !features.by_overlay
        && backend.direct
        && !same(&backend.addr, &ip.key.src)
        && tables.peer(&backend.addr).is_some()
}

/// Enters the flow of a packet that asks no Service and has met one that does ([`Tables::meets`]): from a port that a Service's flow has
/// towards the same backend it would be taken for that flow's when it is answered. It becomes a flow of no service, with another port: an
/// [`Opened`]. That is rare. For [`Tables::open_directly`] alone, which is what the verifier judges once.
#[inline(always)]
pub fn open_directly<T: Tables>(tables: &T, notes: &mut Notes) -> u32 {
    let Notes { ip, aside, .. } = notes;
    let Aside {
        about,
        entry,
        picked: backend,
        ..
    } = aside;
    backend.go_directly(&ip.key);
    let opening = flow::Opening {
        key: &ip.key,
        service: NO_SERVICE,
        backend,
        src: ip.key.src,
        fresh_port: false,
        seen: flow::seen(ip.key.proto, ip.tcp_flags) | SEEN_TAKEN,
    };
    let opened = match flow::open(tables, &opening, about, entry) {
        Ok(()) => {
            notes.to = about.mirrored();
            notes.service = NO_SERVICE;
            Opened::Flow
        }
        Err(reason) => {
            tables.count(reason);
            Opened::Dropped
        }
    };
    opened as u32
}

/// It is for no frontend, and it comes from where its Service lets nobody in: what asking a Service came to, beside what choosing came to.
const NO_FRONTEND: u32 = 5;
const GUARDED: u32 = 6;

/// Which Service a packet of no flow asks, if it asks one, and which backend that has for it: both are in the notes of the flow that is
/// opened. Apart from [`open`], since the two have no room on one stack. For [`Tables::ask`] alone, which is what the verifier judges
/// once.
#[inline(always)]
pub fn ask<T: Tables>(tables: &T, features: &Features, notes: &mut Notes, asking: u32) -> u32 {
    let asking = Asking(asking);
    let (side, at_host) = (asking.side(), asking.at_host());
    let ip = &notes.ip;
    let Some(lead) = lead(tables, &ip.key, at_host) else {
        return NO_FRONTEND;
    };
    let outside = side == Side::Outside;
    let service = if outside {
        lead.external
    } else {
        lead.internal
    };
    notes.service = service;
    if lead.flags & LEAD_GUARDED != 0
        && !tables.in_range(service, &ip.key.src)
        && !is_joining(features, ip, side, at_host)
    {
        return GUARDED;
    }
    balance::choose_for(tables, service, &ip.key, outside, &mut notes.aside.picked)
}

/// What becomes of a packet of no flow: an [`Opened`], of an [`Asking`]. For [`Tables::open`] alone, as above.
#[inline(always)]
pub fn open<const V6: bool, T: Tables>(
    tables: &T,
    features: &Features,
    notes: &mut Notes,
    asking: u32,
) -> u32 {
    open_asked::<V6, T>(tables, features, notes, Asking(asking)) as u32
}

/// Opens a flow when the packet is for a Service.
#[inline(always)]
fn open_asked<const V6: bool, T: Tables>(
    tables: &T,
    features: &Features,
    notes: &mut Notes,
    asking: Asking,
) -> Opened {
    let lost = |reason| {
        tables.count(reason);
        Opened::Dropped
    };
    let refused = |reason| {
        tables.count(reason);
        Opened::Refused
    };
    let (side, at_host, seen) = (asking.side(), asking.at_host(), asking.seen());
    let ip = &notes.ip;
    // Without a frontend it is for nobody's, unless it leaves the cluster: then it is a flow of no service, whose backend is where
    // it goes anyway.
    let mut service = NO_SERVICE;
    let backend = &mut notes.aside.picked;
    let joining = is_joining(features, ip, side, at_host);
    let mut dispatched = false;
    // In memory, since the stack has no room for it.
    let source = &mut notes.to.src;
    *source = features.node::<V6>();
    let mut is_node = true;
    let answer = asking.answer();
    if answer != NO_FRONTEND {
        service = notes.service;
        match answer {
            balance::CHOSEN => {}
            _ if joining => return Opened::Nothing,
            balance::NONE => return refused(Reason::NoBackend),
            balance::SILENT => return lost(Reason::NoLocalBackend),
            GUARDED => return lost(Reason::SourceRange),
            _ => return lost(Reason::ServiceTorn),
        }
        is_node = seen_by::<V6, T>(tables, features, ip, side, backend, source);
        dispatched = is_node && is_dispatched(tables, features, ip, side, backend);
        if dispatched {
            *source = ip.key.src;
            is_node = false;
        } else if joining {
            return Opened::Nothing;
        }
        if is_zero(source) {
            return lost(Reason::NoNodeAddress);
        }
    } else {
        if joining {
            return Opened::Nothing;
        }
        if !at_host && is_vip(tables, &ip.key.dst) {
            if !ip.has_ports() {
                return lost(Reason::ServiceProtocol);
            }
            // A hash of the kernel's may miss a key whose element is replaced while it is looked up. Such a packet is sent again.
            if lead(tables, &ip.key, at_host).is_some() {
                return lost(Reason::ServiceTorn);
            }
            return refused(Reason::NoSuchPort);
        }
        let leaves = features.masquerade && side == Side::Pod && !at_host;
        // Without an address of the family there is nothing to give; an echo's answer opens nothing.
        let is_answer = matches!(ip.echo, Echo::Reply);
        if !leaves
            || is_zero(&features.node::<V6>())
            || is_answer
            || keeps_source(tables, &ip.key.dst)
        {
            // So may be what asks a process of the node from a port by which a Service's flow leads to it, with its client's address.
            let asks_directly = side == Side::Pod
                || (side == Side::Outside
                    && at_host
                    && tables.is_kept_port(ip.key.proto, ip.key.dport));
            if asks_directly && ip.may_be_first() {
                return Opened::Directly;
            }
            return Opened::Nothing;
        }
        backend.go_directly(&ip.key);
    }
    if is_node {
        tables.count(Reason::SourceNat);
        if tables.source_towards::<V6>(&ip.key.src, &backend.addr, source) != BY_ANOTHER {
            *source = features.node::<V6>();
        }
    }
    // What the client's flow has met that was just forgotten.
    let met = notes.aside.entry.seen & SEEN_TAKEN;
    let opening = flow::Opening {
        key: &ip.key,
        service,
        backend,
        src: *source,
        fresh_port: is_node || is_from_any_port(ip, side),
        seen: seen | met | if dispatched { SEEN_DISPATCHED } else { 0 },
    };
    let (answers, entry) = (&mut notes.aside.about, &mut notes.aside.entry);
    match flow::open(tables, &opening, answers, entry) {
        Ok(()) if dispatched => match dispatch(tables, &backend.addr, &mut notes.peer) {
            Followed::Dispatched => Opened::Dispatched,
            _ => Opened::Dropped,
        },
        Ok(()) => {
            notes.to = answers.mirrored();
            notes.service = service;
            Opened::Flow
        }
        Err(reason) => lost(reason),
    }
}

/// Whether a packet is the host's own, from a port that means nothing: none of its direct connections to the backend, which pass no hook,
/// has one of those that it gets. Servers (of NFS, say) may ask for a port below 1024, which is kept.
#[inline(always)]
fn is_from_any_port(ip: &Ip, side: Side) -> bool {
    side == Side::Host && u16::from_be(ip.key.sport) >= PORT_UNPRIVILEGED
}

/// The first port that anybody may take.
const PORT_UNPRIVILEGED: u16 = 1024;

/// Whether pods keep their addresses towards a destination: in the ranges for that, and to groups.
#[inline(always)]
fn keeps_source<T: Tables>(tables: &T, dst: &Addr) -> bool {
    let is_group = match dst.v4_be() {
        Some(be) => be.to_ne_bytes()[0] >= 224,
        None => dst.words[0].to_ne_bytes()[0] == 0xff,
    };
    is_group || tables.in_range(NO_SERVICE, dst)
}

/// Writes down the source that a backend is to see, zero when it should be the node's and there is none of the family; and gives whether it is
/// that, whose ports are shared by all that it sends on.
///
/// It is the client's own address where the answers pass a hook anyway; the hairpin address where a backend would answer its client
/// without (a pod itself, the host the host, the host a client outside); the node's where the answers would go elsewhere. A client outside
/// keeps its own at the host where its Service asks for that, which has a hook at the uplinks' egress.
#[inline(always)]
pub(crate) fn seen_by<const V6: bool, T: Tables>(
    tables: &T,
    features: &Features,
    ip: &Ip,
    side: Side,
    backend: &Picked,
    source: &mut Addr,
) -> bool {
    if side == Side::Pod {
        if same(&backend.addr, &ip.key.src) {
            *source = hairpin::<V6>();
            return false;
        }
        // An endpoint outside the cluster is like any other destination there.
        if !features.masquerade || keeps_source(tables, &backend.addr) {
            *source = ip.key.src;
            return false;
        }
    }
    let there = Place::of(tables, &backend.addr);
    if there.is_host()
        && side == Side::Outside
        && backend.keeps_clients
        && is_answered_by::<V6, T>(tables, ip, backend, source)
    {
        // Its answers are looked at as they leave from now on.
        tables.keep_port(ip.key.proto, backend.port);
        *source = ip.key.src;
        false
    } else if there.is_host() && side != Side::Pod {
        *source = hairpin::<V6>();
        false
    } else if side == Side::Host || there.kind != 0 {
        *source = ip.key.src;
        false
    } else {
        *source = features.node::<V6>();
        true
    }
}

/// Whether what the host answers a client comes from the backend's address. A datagram's answer has that of the interface by which it leaves,
/// unless the process names another.
#[inline(always)]
fn is_answered_by<const V6: bool, T: Tables>(
    tables: &T,
    ip: &Ip,
    backend: &Picked,
    room: &mut Addr,
) -> bool {
    ip.is_of_connection()
        || tables.source_towards::<V6>(&backend.addr, &ip.key.src, room) == SOURCE_UNKNOWN
        || same(room, &backend.addr)
}
