//! What a packet is to Services, and its translation.

use dataplane_abi::{
    Addr, FlowKey, FragmentPorts, FrontendKey, LEAD_GUARDED, Lead, Reason, SEEN_DISPATCHED,
    SEEN_REPLY, SEEN_RST, SEEN_SYN, SEEN_TAKEN, proto,
};

use crate::{
    balance::{self, Client, Pick, Picked},
    flow,
    hook::{Aside, Features, Notes, Place, hairpin, same},
    icmp,
    packet::{Echo, Fragment, Ip, Packet},
    reject::reject,
    tables::{FlowEntry, Tables},
    translate::translate,
};

/// Whose packets a hook sees.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// A pod's: it may ask Services, and it may answer for them.
    Pod,
    /// The host's own, to Services.
    Host,
    /// Others', to the node or beyond it.
    Outside,
    /// To a pod of the node, from another or from outside: it may be an answer, or be the first of a flow past all Services.
    Direct,
    /// The host's to a pod: it may be an answer, and asks no Service.
    Answers,
}

impl Side {
    #[inline(always)]
    fn asks_services(self) -> bool {
        !matches!(self, Self::Direct | Self::Answers)
    }
}

/// What a packet turned out to be to Services.
pub(crate) enum Followed {
    /// Nothing of theirs.
    Untouched,
    /// A client's, which now goes to a backend.
    ToBackend,
    /// A backend's, which now goes to the client.
    ToClient,
    /// A client's, which goes to the backend's node as it is: [`Notes::peer`].
    Dispatched,
    /// It has become the refusal of what it was.
    Rejected,
    /// Counted already.
    Dropped,
}

/// Finds out what a packet is to Services and translates it; its new key is [`Notes::to`] then. `at_host` says that it is for an
/// address of the node.
#[inline(always)]
pub(crate) fn follow<const V6: bool, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
    notes: &mut Notes,
    side: Side,
    at_host: bool,
) -> Followed {
    let ip = &notes.ip;
    let is_followed = ip.has_ports() || (features.masquerade && may_be_echo::<V6>(ip));
    if !is_followed {
        return portless::<V6, P, T>(packet, tables, notes, side, at_host);
    }
    let followed = flow_of::<V6, P, T>(packet, tables, features, notes, side, at_host);
    if !matches!(followed, Followed::ToBackend | Followed::ToClient) {
        return followed;
    }
    // One place for all, which is much code.
    if !translate::<V6, P>(packet, &notes.ip, &notes.to) {
        return dropped(tables, Reason::RewriteFailed);
    }
    if matches!(followed, Followed::ToClient) {
        tables.count(Reason::ReplyTranslated);
    } else if notes.service != NO_SERVICE {
        tables.count(Reason::ServiceTranslated);
    } else if same(&notes.to.src, &notes.ip.key.src) {
        tables.count(Reason::PortTranslated);
    } else {
        tables.count(Reason::Masqueraded);
    }
    followed
}

/// Finds or opens the flow of a packet that has ports, or what stands for them. Where it is to be translated, [`Notes::to`] says to what,
/// and [`Notes::service`] whose flow it is.
#[inline(always)]
fn flow_of<const V6: bool, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
    notes: &mut Notes,
    side: Side,
    at_host: bool,
) -> Followed {
    let ip = &mut notes.ip;
    match ip.fragment {
        Fragment::Whole => {}
        Fragment::First => tables.insert_fragment(
            &ip.fragment_key(),
            &FragmentPorts {
                sport: ip.key.sport,
                dport: ip.key.dport,
            },
        ),
        Fragment::Later => match tables.fragment(&ip.fragment_key()) {
            Some(ports) => (ip.key.sport, ip.key.dport) = (ports.sport, ports.dport),
            None if side.asks_services() && !at_host && is_vip(tables, &ip.key.dst) => {
                return dropped(tables, Reason::FragmentUnknown);
            }
            None => return Followed::Untouched,
        },
    }
    let seen = flow::seen(ip.key.proto, ip.tcp_flags);
    if let Some(entry) = flow::lookup(tables, &ip.key) {
        let flow = entry.get();
        if flow.reply == 1 {
            // An opening's answer on a flow that has ended belongs to a connection that came to the backend directly, by the
            // socket hook say, and from a port that the flow had: translated, it would be nobody's.
            if seen & SEEN_SYN != 0 && flow::has_ended(tables, flow) {
                let client = &mut notes.aside.about;
                *client = flow.other;
                flow::forget(tables, client, &ip.key);
                return Followed::Untouched;
            }
            let is_first = flow.seen & SEEN_REPLY == 0;
            let answers = match is_first && ip.is_of_connection() {
                true => flow::answered(packet, tables, ip, flow, seen),
                false => flow::ANSWER,
            };
            if answers == flow::OF_ANOTHER {
                return Followed::Untouched;
            }
            notes.to = flow.other.mirrored();
            if answers == flow::ANSWER {
                // A flow for which the other table has no room stays here, answered.
                entry.touch(tables.now_s(), seen);
                if is_first {
                    flow::promote::<V6, T>(tables, &ip.key, flow, seen);
                }
            }
            return Followed::ToClient;
        }
        // What is sent to a pod has a flow of no service or none.
        if side.asks_services() || (side == Side::Direct && flow.service == NO_SERVICE) {
            if seen & SEEN_RST != 0 && flow.seen & SEEN_TAKEN != 0 {
                return dropped(tables, Reason::ResetHeld);
            }
            if resume::<V6, T>(tables, ip, &entry, seen) {
                if side == Side::Outside && flow.seen & SEEN_DISPATCHED != 0 {
                    return dispatch(tables, &flow.other.src, &mut notes.peer);
                }
                notes.to = flow.other.mirrored();
                notes.service = flow.service;
                return Followed::ToBackend;
            }
            let Aside {
                about: answers,
                entry,
                ..
            } = &mut notes.aside;
            entry.seen = flow.seen;
            *answers = flow.other;
            flow::forget(tables, &ip.key, answers);
        }
    } else {
        notes.aside.entry.seen = 0;
    }
    // Only an opening may take a connection from the host's own listeners: what the host itself opened from a port that
    // is a NodePort too must hear its answers.
    if side == Side::Direct && notes.ip.may_be_first() {
        return open_directly(tables, notes);
    }
    if !side.asks_services() {
        return Followed::Untouched;
    }
    let ip = &notes.ip;
    if !features.overlay && is_joining(features, ip, side, at_host) {
        return Followed::Untouched;
    }
    open::<V6, P, T>(packet, tables, features, notes, side, at_host, seen)
}

/// Whether a packet is of a connection to the node that is not known, and so the host's own business. What another node sent on may
/// be of any moment of one.
#[inline(always)]
fn is_joining(features: &Features, ip: &Ip, side: Side, at_host: bool) -> bool {
    side == Side::Outside
        && at_host
        && !features.by_overlay
        && ip.is_of_connection()
        && !ip.is_syn()
}

/// Sends a client's packet to its backend's node as it is.
#[inline(always)]
fn dispatch<T: Tables>(tables: &T, backend: &Addr, peer: &mut u64) -> Followed {
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

/// Where a packet's destination leads, when it is a frontend: its address and port, or the port of every address of the node.
#[inline(always)]
pub(crate) fn lead<T: Tables>(tables: &T, ip: &Ip, at_host: bool) -> Option<Lead> {
    let key = FrontendKey::new(ip.key.dst, ip.key.dport, ip.key.proto);
    match tables.frontend(&key) {
        None if at_host => tables.frontend(&key.on_every_address()),
        found => found,
    }
}

/// Follows what may be the first packet of a flow and asks no Service. From a port that a Service's flow has towards the same backend it
/// would be taken for that flow's when it is answered: it becomes a flow of no service, with another port.
#[inline(always)]
fn open_directly<T: Tables>(tables: &T, notes: &mut Notes) -> Followed {
    if !tables.meets(&notes.ip.key, &mut notes.aside.about) {
        return Followed::Untouched;
    }
    if !enter_directly(tables, &notes.ip, &mut notes.aside) {
        return Followed::Dropped;
    }
    notes.to = notes.aside.about.mirrored();
    notes.service = NO_SERVICE;
    Followed::ToBackend
}

/// Enters the flow of such a packet. A function of its own for both families: that is rare.
#[inline(never)]
fn enter_directly<T: Tables>(tables: &T, ip: &Ip, aside: &mut Aside) -> bool {
    let opening = flow::Opening {
        key: &ip.key,
        service: NO_SERVICE,
        backend: &Picked {
            addr: ip.key.dst,
            port: ip.key.dport,
            generation: 0,
            slot: 0,
            direct: false,
        },
        src: ip.key.src,
        fresh_port: false,
        seen: flow::seen(ip.key.proto, ip.tcp_flags) | SEEN_TAKEN,
    };
    let Aside { about, entry, .. } = aside;
    match flow::open(tables, &opening, about, entry) {
        Ok(()) => true,
        Err(reason) => {
            tables.count(reason);
            false
        }
    }
}

/// Opens a flow when the packet is for a Service.
#[inline(always)]
fn open<const V6: bool, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
    notes: &mut Notes,
    side: Side,
    at_host: bool,
    seen: u32,
) -> Followed {
    let ip = &notes.ip;
    // Without a frontend it is for nobody's, unless it leaves the cluster: then it is a flow of no service, whose backend is where
    // it goes anyway.
    let mut service = NO_SERVICE;
    let mut backend = Picked {
        addr: ip.key.dst,
        port: ip.key.dport,
        generation: 0,
        slot: 0,
        direct: false,
    };
    let joining = is_joining(features, ip, side, at_host);
    let mut dispatched = false;
    let mut source = Source {
        addr: features.node::<V6>(),
        is_node: true,
    };
    if let Some(lead) = lead(tables, ip, at_host) {
        service = match side {
            Side::Outside => lead.external,
            _ => lead.internal,
        };
        if lead.flags & LEAD_GUARDED != 0 && !tables.in_range(service, &ip.key.src) && !joining {
            return dropped(tables, Reason::SourceRange);
        }
        let client = match side {
            Side::Outside => Client::outside(&ip.key),
            _ => Client::at(ip.key.src),
        };
        let picked = if V6 {
            balance::pick_apart(tables, service, &client)
        } else {
            balance::pick(tables, service, &client)
        };
        backend = match picked {
            Pick::Backend(backend) => backend,
            _ if joining => return Followed::Untouched,
            Pick::None => return refused::<V6, P, T>(packet, tables, ip, Reason::NoBackend),
            Pick::Silent => return dropped(tables, Reason::NoLocalBackend),
            Pick::Torn | Pick::ClientUnknown => return dropped(tables, Reason::ServiceTorn),
        };
        source = seen_by::<V6, T>(tables, features, ip, side, &backend);
        dispatched = source.is_node && is_dispatched(tables, features, ip, side, &backend);
        if dispatched {
            source = Source {
                addr: ip.key.src,
                is_node: false,
            };
        } else if joining {
            return Followed::Untouched;
        }
        if is_zero(&source.addr) {
            return dropped(tables, Reason::NoNodeAddress);
        }
    } else {
        if joining {
            return Followed::Untouched;
        }
        if !at_host && is_vip(tables, &ip.key.dst) {
            if !ip.has_ports() {
                return dropped(tables, Reason::ServiceProtocol);
            }
            return refused::<V6, P, T>(packet, tables, ip, Reason::NoSuchPort);
        }
        let leaves = features.masquerade && side == Side::Pod && !at_host;
        // Without an address of the family there is nothing to give; an echo's answer opens nothing.
        let is_answer = matches!(ip.echo, Echo::Reply);
        if !leaves || is_zero(&source.addr) || is_answer || keeps_source(tables, &ip.key.dst) {
            if side == Side::Pod && ip.may_be_first() {
                return open_directly(tables, notes);
            }
            return Followed::Untouched;
        }
    }
    if source.is_node {
        tables.count(Reason::SourceNat);
    }
    // What the client's flow has met that was just forgotten.
    let met = notes.aside.entry.seen & SEEN_TAKEN;
    let opening = flow::Opening {
        key: &ip.key,
        service,
        backend: &backend,
        src: source.addr,
        fresh_port: source.is_node || is_from_any_port(ip, side),
        seen: seen | met | if dispatched { SEEN_DISPATCHED } else { 0 },
    };
    let Aside {
        about: answers,
        entry,
        ..
    } = &mut notes.aside;
    match flow::open(tables, &opening, answers, entry) {
        Ok(()) if dispatched => dispatch(tables, &backend.addr, &mut notes.peer),
        Ok(()) => {
            notes.to = answers.mirrored();
            notes.service = service;
            Followed::ToBackend
        }
        Err(reason) => dropped(tables, reason),
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

/// Whether a packet is an ICMP echo or its answer, or a later fragment of what may be one.
#[inline(always)]
fn may_be_echo<const V6: bool>(ip: &Ip) -> bool {
    let is_later = matches!(ip.fragment, Fragment::Later);
    ip.is_echo() || (ip.key.proto == proto::icmp(V6) && is_later)
}

#[inline(always)]
pub(crate) fn is_zero(addr: &Addr) -> bool {
    addr.words[0] == 0 && addr.words[1] == 0
}

/// Whether pods keep their addresses towards a destination: in the ranges for that, and to groups.
#[inline(always)]
fn keeps_source<T: Tables>(tables: &T, dst: &Addr) -> bool {
    let is_group = match dst.v4_be() {
        Some(be) => be.to_ne_bytes()[0] >= 224,
        None => dst.words[0].to_ne_bytes()[0] == 0xff,
    };
    is_group || tables.in_range(NO_SERVICE, dst)
}

/// [`dataplane_abi::Flow::service`] of what is masqueraded, and the owner of ranges without.
pub(crate) const NO_SERVICE: u32 = 0;

/// The source that a backend is to see.
pub(crate) struct Source {
    /// Zero when it should be the node's and there is none of the family.
    pub addr: Addr,
    /// The node's own address, whose ports are shared by all that it sends on.
    pub is_node: bool,
}

/// The client's own address where the answers pass a hook anyway; the hairpin address where a backend would answer its client
/// without (a pod itself, the host the host, the host a client outside); the node's where the answers would go elsewhere.
#[inline(always)]
pub(crate) fn seen_by<const V6: bool, T: Tables>(
    tables: &T,
    features: &Features,
    ip: &Ip,
    side: Side,
    backend: &Picked,
) -> Source {
    let kept = Source {
        addr: ip.key.src,
        is_node: false,
    };
    let hairpinned = Source {
        addr: hairpin::<V6>(),
        is_node: false,
    };
    if side == Side::Pod {
        if same(&backend.addr, &ip.key.src) {
            return hairpinned;
        }
        // An endpoint outside the cluster is like any other destination there.
        if !features.masquerade || keeps_source(tables, &backend.addr) {
            return kept;
        }
    }
    let there = Place::of(tables, &backend.addr);
    if there.is_host() && side != Side::Pod {
        hairpinned
    } else if side == Side::Host || there.kind != 0 {
        kept
    } else {
        Source {
            addr: features.node::<V6>(),
            is_node: true,
        }
    }
}

/// Whether a client's flow may go on. A datagram's backend must still be one: nothing else tells its
/// sender that it is gone. An established connection is left to end by itself; a new one needs a backend that is one.
#[inline(always)]
pub(crate) fn resume<const V6: bool, T: Tables>(
    tables: &T,
    ip: &Ip,
    entry: &T::Entry,
    seen: u32,
) -> bool {
    let flow = entry.get();
    if !ip.is_of_connection() || ip.is_syn() {
        let known = Picked {
            addr: flow.other.src,
            port: flow.other.sport,
            generation: flow.generation,
            slot: flow.slot,
            direct: false,
        };
        if flow.service != NO_SERVICE {
            let Some(found) = balance::find_for::<V6, T>(tables, flow.service, &known) else {
                return false;
            };
            if found.generation != known.generation {
                entry.locate(found.generation, found.slot);
            }
        }
        if ip.is_of_connection() && (flow.seen & SEEN_TAKEN != 0 || flow::is_closing(tables, flow))
        {
            return false;
        }
    }
    entry.touch(tables.now_s(), seen);
    true
}

/// Protocols without ports are not spoken by Services, but ICMP errors may be about what Services translated.
#[inline(always)]
fn portless<const V6: bool, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    notes: &mut Notes,
    side: Side,
    at_host: bool,
) -> Followed {
    let Notes { ip, to, aside, .. } = notes;
    let (about, is_written) = if V6 {
        let about = about_apart(packet, tables, ip, to, aside);
        (
            about,
            about == NO_FLOW || rewrite_apart(packet, ip, to, aside),
        )
    } else {
        let about = about_flow::<false, P, T>(packet, tables, ip, to, aside);
        (
            about,
            about == NO_FLOW || rewrite_error::<false, P>(packet, ip, to, aside),
        )
    };
    if !is_written {
        return dropped(tables, Reason::RewriteFailed);
    }
    match about {
        ABOUT_ANSWER | ABOUT_REQUEST => {
            tables.count(Reason::IcmpTranslated);
            return match about {
                ABOUT_ANSWER => Followed::ToBackend,
                _ => Followed::ToClient,
            };
        }
        _ => {}
    }
    let ip = &notes.ip;
    if side.asks_services()
        && !at_host
        && is_vip(tables, &ip.key.dst)
        // Somebody on the link answers for the address, and is asked whether he still does.
        && !(V6 && icmp::is_discovery(packet, ip))
    {
        return dropped(tables, Reason::ServiceProtocol);
    }
    Followed::Untouched
}

/// What an ICMP error is about: a number, since only such come back from a function in a register.
const NO_FLOW: u32 = 0;
const ABOUT_REQUEST: u32 = 1;
const ABOUT_ANSWER: u32 = 2;

/// As [`about_flow`], for IPv6: a function of its own, for the stack (see [`Notes`]). Two of them, one after the other, need less than
/// one: Linux 6.1 counts every frame in steps of 32 bytes.
#[inline(never)]
fn about_apart<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    ip: &Ip,
    to: &mut FlowKey,
    aside: &mut Aside,
) -> u32 {
    about_flow::<true, P, T>(packet, tables, ip, to, aside)
}

/// As [`rewrite_error`], for IPv6.
#[inline(never)]
fn rewrite_apart<P: Packet>(packet: &mut P, ip: &Ip, to: &FlowKey, aside: &Aside) -> bool {
    rewrite_error::<true, P>(packet, ip, to, aside)
}

/// Finds the flow that an ICMP error is about, and with it what the error becomes.
#[inline(always)]
fn about_flow<const V6: bool, P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    ip: &Ip,
    to: &mut FlowKey,
    aside: &mut Aside,
) -> u32 {
    let Aside {
        about,
        quoted,
        place,
        ..
    } = aside;
    match icmp::quoted::<V6, P>(packet, ip, quoted) {
        Some(found) => *place = found,
        None => return NO_FLOW,
    }
    *about = quoted.mirrored();
    let Some(entry) = flow::lookup(tables, about) else {
        return NO_FLOW;
    };
    let reply = entry.get().reply;
    *about = entry.get().other;
    // The outer addresses follow the inner ones that they equal; a router's own stays.
    let follows = |outer: &Addr, inner: &Addr, becomes: &Addr| {
        if same(outer, inner) { *becomes } else { *outer }
    };
    let src = follows(&ip.key.src, &quoted.dst, &about.dst);
    let dst = follows(&ip.key.dst, &quoted.src, &about.src);
    *to = FlowKey::new(src, dst, 0, 0, ip.key.proto);
    if reply == 1 {
        ABOUT_REQUEST
    } else {
        ABOUT_ANSWER
    }
}

#[inline(always)]
fn rewrite_error<const V6: bool, P: Packet>(
    packet: &mut P,
    ip: &Ip,
    to: &FlowKey,
    aside: &Aside,
) -> bool {
    let Aside {
        about,
        quoted,
        place,
        ..
    } = aside;
    icmp::translate::<V6, P>(packet, ip, place, quoted, to, about)
}

#[inline(always)]
fn is_vip<T: Tables>(tables: &T, addr: &Addr) -> bool {
    tables.frontend(&FrontendKey::marker(*addr)).is_some()
}

#[inline(always)]
fn refused<const V6: bool, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    ip: &Ip,
    reason: Reason,
) -> Followed {
    tables.count(reason);
    match reject::<V6, P>(packet, ip) {
        true => Followed::Rejected,
        false => Followed::Dropped,
    }
}

#[inline(always)]
fn dropped<T: Tables>(tables: &T, reason: Reason) -> Followed {
    tables.count(reason);
    Followed::Dropped
}
