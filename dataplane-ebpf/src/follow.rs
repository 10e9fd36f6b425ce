//! What a packet is to Services, and its translation.

use dataplane_abi::{
    Addr, FlowKey, FragmentPorts, FrontendKey, LEAD_GUARDED, Lead, Reason, SEEN_DISPATCHED,
    SEEN_REPLY, SEEN_RST, SEEN_SYN, SEEN_TAKEN, proto,
};

use crate::{
    balance::{self, Picked},
    flow,
    hook::{Aside, Features, Notes, Place, hairpin, same},
    icmp,
    packet::{Echo, Fragment, Ip, Packet},
    tables::{FlowEntry, Tables},
};

/// Whose packets a hook sees.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// A pod's: it may ask Services, and it may answer for them.
    Pod = 0,
    /// The host's own, to Services.
    Host = 1,
    /// Others', to the node or beyond it.
    Outside = 2,
    /// To a pod of the node, from another or from outside: it may be an answer, or be the first of a flow past all Services.
    Direct = 3,
    /// The host's to a pod: it may be an answer, and asks no Service.
    Answers = 4,
}

/// What is known of a packet beside its notes, in one number, to be handed to a function that is judged by itself: the [`Side`], whether
/// it is for an address of the node, whether it came by the overlay, its SEEN_* bits, and what asking a Service came to. The highest byte
/// is free.
#[derive(Clone, Copy)]
pub struct Asking(pub u32);

impl Asking {
    const SIDE: u32 = 7;
    const AT_HOST: u32 = 8;
    const BY_OVERLAY: u32 = 16;
    const SEEN_SHIFT: u32 = 8;
    const ANSWER_SHIFT: u32 = 16;

    #[inline(always)]
    const fn new(side: Side, at_host: bool, by_overlay: bool, seen: u32) -> Self {
        let at_host = if at_host { Self::AT_HOST } else { 0 };
        let by_overlay = if by_overlay { Self::BY_OVERLAY } else { 0 };
        Self(side as u32 | at_host | by_overlay | (seen & 0xff) << Self::SEEN_SHIFT)
    }

    #[inline(always)]
    const fn side(self) -> Side {
        match self.0 & Self::SIDE {
            0 => Side::Pod,
            1 => Side::Host,
            2 => Side::Outside,
            3 => Side::Direct,
            _ => Side::Answers,
        }
    }

    #[inline(always)]
    const fn at_host(self) -> bool {
        self.0 & Self::AT_HOST != 0
    }

    #[inline(always)]
    pub const fn by_overlay(self) -> bool {
        self.0 & Self::BY_OVERLAY != 0
    }

    #[inline(always)]
    const fn answered(self, answer: u32) -> Self {
        Self(self.0 | (answer & 0xff) << Self::ANSWER_SHIFT)
    }

    #[inline(always)]
    const fn answer(self) -> u32 {
        self.0 >> Self::ANSWER_SHIFT & 0xff
    }

    #[inline(always)]
    const fn seen(self) -> u32 {
        self.0 >> Self::SEEN_SHIFT & 0xff
    }
}

impl Side {
    #[inline(always)]
    fn asks_services(self) -> bool {
        !matches!(self, Self::Direct | Self::Answers)
    }
}

/// What a packet turned out to be to Services. As a number it comes back from a function in a register.
pub enum Followed {
    /// Nothing of theirs.
    Untouched = 0,
    /// A client's, which now goes to a backend.
    ToBackend = 1,
    /// A backend's, which now goes to the client.
    ToClient = 2,
    /// A client's, which goes to the backend's node as it is: [`Notes::peer`].
    Dispatched = 3,
    /// It has become the refusal of what it was.
    Rejected = 4,
    /// Counted already.
    Dropped = 5,
}

impl Followed {
    #[inline(always)]
    const fn of(number: u32) -> Self {
        match number {
            0 => Self::Untouched,
            1 => Self::ToBackend,
            2 => Self::ToClient,
            3 => Self::Dispatched,
            4 => Self::Rejected,
            _ => Self::Dropped,
        }
    }
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
        let asking = Asking::new(side, at_host, features.by_overlay, 0);
        return Followed::of(tables.portless::<V6, P>(packet, notes, asking.0));
    }
    let followed = flow_of::<V6, P, T>(packet, tables, features, notes, side, at_host);
    if !matches!(followed, Followed::ToBackend | Followed::ToClient) {
        return followed;
    }
    // One place for all, which is much code.
    if !packet.translate::<V6>(&notes.ip, &notes.to) {
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
                *client = flow.other.again();
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
                    tables.promote(&ip.key, flow, seen);
                }
            }
            return Followed::ToClient;
        }
        // What is sent to a pod has a flow of no service or none.
        if side.asks_services() || (side == Side::Direct && flow.service == NO_SERVICE) {
            if seen & SEEN_RST != 0 && flow.seen & SEEN_TAKEN != 0 {
                return dropped(tables, Reason::ResetHeld);
            }
            if resume(tables, ip, &entry, seen) {
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
            *answers = flow.other.again();
            flow::forget(tables, &ip.key, answers);
        }
    } else {
        notes.aside.entry.seen = 0;
    }
    // Only an opening may take a connection from the host's own listeners: what the host itself opened from a port that
    // is a NodePort too must hear its answers.
    let opens_directly = side == Side::Direct && notes.ip.may_be_first();
    if !opens_directly && !side.asks_services() {
        return Followed::Untouched;
    }
    if !features.overlay && is_joining(features, &notes.ip, side, at_host) {
        return Followed::Untouched;
    }
    let asking = Asking::new(side, at_host, features.by_overlay, seen);
    let mut opened = Opened::Directly;
    if side != Side::Direct {
        let asking = asking.answered(tables.ask(features, notes, asking.0));
        opened = Opened::of(tables.open::<V6>(features, notes, asking.0));
    }
    if matches!(opened, Opened::Directly) {
        if !tables.meets(&notes.ip.key, &mut notes.aside.about) {
            return Followed::Untouched;
        }
        opened = Opened::of(tables.open_directly(notes, asking.0));
    }
    match opened {
        Opened::Nothing => Followed::Untouched,
        Opened::Flow => Followed::ToBackend,
        Opened::Dispatched => Followed::Dispatched,
        Opened::Refused if packet.refuse::<V6>(&notes.ip) => Followed::Rejected,
        Opened::Refused | Opened::Directly | Opened::Dropped => Followed::Dropped,
    }
}

/// What became of a packet of no flow, before it is rewritten: that takes room on the stack, too. As a number it comes back from a
/// function in a register.
enum Opened {
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
    const fn of(number: u32) -> Self {
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
    let Some(lead) = lead(tables, ip, at_host) else {
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
    let mut source = Source {
        addr: features.node::<V6>(),
        is_node: true,
    };
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
        source = seen_by::<V6, T>(tables, features, ip, side, backend);
        dispatched = source.is_node && is_dispatched(tables, features, ip, side, backend);
        if dispatched {
            source = Source {
                addr: ip.key.src,
                is_node: false,
            };
        } else if joining {
            return Opened::Nothing;
        }
        if is_zero(&source.addr) {
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
            return refused(Reason::NoSuchPort);
        }
        let leaves = features.masquerade && side == Side::Pod && !at_host;
        // Without an address of the family there is nothing to give; an echo's answer opens nothing.
        let is_answer = matches!(ip.echo, Echo::Reply);
        if !leaves || is_zero(&source.addr) || is_answer || keeps_source(tables, &ip.key.dst) {
            if side == Side::Pod && ip.may_be_first() {
                return Opened::Directly;
            }
            return Opened::Nothing;
        }
        backend.go_directly(&ip.key);
    }
    if source.is_node {
        tables.count(Reason::SourceNat);
    }
    // What the client's flow has met that was just forgotten.
    let met = notes.aside.entry.seen & SEEN_TAKEN;
    let opening = flow::Opening {
        key: &ip.key,
        service,
        backend,
        src: source.addr,
        fresh_port: source.is_node || is_from_any_port(ip, side),
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
pub(crate) fn resume<T: Tables>(tables: &T, ip: &Ip, entry: &T::Entry, seen: u32) -> bool {
    let flow = entry.get();
    if !ip.is_of_connection() || ip.is_syn() {
        if flow.service != NO_SERVICE {
            let place = tables.seek(flow);
            let (generation, slot) = ((place >> 32) as u32, place as u32);
            if generation == 0 {
                return false;
            }
            if generation != flow.generation {
                entry.locate(generation, slot);
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

/// What becomes of a packet of a protocol without ports, which Services do not speak; but ICMP errors may be about what Services
/// translated. A [`Followed`], of an [`Asking`]. For [`Tables::portless`] alone, as above.
#[inline(always)]
pub fn portless<const V6: bool, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    notes: &mut Notes,
    asking: u32,
) -> u32 {
    let asking = Asking(asking);
    without_ports::<V6, P, T>(packet, tables, notes, asking.side(), asking.at_host()) as u32
}

#[inline(always)]
fn without_ports<const V6: bool, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    notes: &mut Notes,
    side: Side,
    at_host: bool,
) -> Followed {
    let Notes { ip, to, aside, .. } = notes;
    let about = about_flow::<V6, P, T>(packet, tables, ip, to, aside);
    if about != NO_FLOW && !rewrite_error::<V6, P>(packet, ip, to, aside) {
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
    *about = entry.get().other.again();
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
fn dropped<T: Tables>(tables: &T, reason: Reason) -> Followed {
    tables.count(reason);
    Followed::Dropped
}
