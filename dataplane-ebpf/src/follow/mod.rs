//! What a packet is to Services, and its translation.

mod opening;
mod portless;

use dataplane_abi::{
    Addr, Flow, FlowKey, FragmentPorts, FrontendKey, Lead, Reason, SEEN_DISPATCHED, SEEN_REPLY,
    SEEN_RST, SEEN_SYN, SEEN_TAKEN, proto,
};

use crate::{
    balance, flow,
    hook::{Aside, Features, Notes, same},
    packet::{Fragment, Ip, Packet},
    socket::epoch,
    tables::{FlowEntry as _, Tables},
};

pub(crate) use opening::seen_by;
use opening::{Opened, dispatch, is_joining};
pub use opening::{ask, open, open_directly};
pub use portless::portless;

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
    notes.is_translated = 1;
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
    let (ip, flow) = (&mut notes.ip, &mut notes.flow);
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
    if let Some(entry) = flow::lookup(tables, &ip.key, flow) {
        if flow.reply == 1 {
            // An opening's answer on a flow that has ended belongs to a connection that came to the backend directly, by the
            // socket hook say, and from a port that the flow had: translated, it would be nobody's.
            if seen & SEEN_SYN != 0 && flow::has_ended(tables, &ip.key, flow) {
                let client = &mut notes.aside.about;
                *client = flow.other.again();
                tables.forget(&ip.key, client);
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
                entry.touch(flow.seen, tables.now_s(), seen);
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
            let came = came(side == Side::Outside, at_host);
            if resume(tables, ip, &entry, flow, seen, came) {
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
            tables.forget(&ip.key, answers);
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
        let mut answer = tables.ask(features, notes, asking.0);
        if answer == balance::NONE {
            // What had the frontend may have gone since that was looked up, which leads to another by now.
            answer = tables.ask(features, notes, asking.0);
        }
        let asking = asking.answered(answer);
        opened = Opened::of(tables.open::<V6>(features, notes, asking.0));
    }
    if matches!(opened, Opened::Directly) {
        if !tables.meets(&notes.ip.key, &mut notes.aside.about, &mut notes.flow) {
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

/// Where a packet's destination leads, when it is a frontend: its address and port, or the port of every address of the node.
#[inline(always)]
pub(crate) fn lead<T: Tables>(tables: &T, asked: &FlowKey, at_host: bool) -> Option<Lead> {
    let key = FrontendKey::new(asked.dst, asked.dport, asked.proto);
    match tables.frontend(&key) {
        None if at_host => tables.frontend(&key.on_every_address()),
        found => found,
    }
}

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

/// [`dataplane_abi::Flow::service`] of what is masqueraded, and the owner of ranges without.
pub(crate) const NO_SERVICE: u32 = 0;

/// How a client came, for [`balance::seek`].
#[inline(always)]
pub(crate) const fn came(outside: bool, at_host: bool) -> u32 {
    (outside as u32 * balance::FROM_OUTSIDE) | (at_host as u32 * balance::AT_HOST)
}

/// Whether a client's flow, of which `flow` is what `entry` said, may go on. A datagram's backend must still be one of what its sender asks: nothing else tells that
/// it is gone. An established connection is left to end by itself; a new one needs a backend that is one. What asked no Service must ask
/// none now, which is looked up when frontends have changed.
#[inline(always)]
pub(crate) fn resume<T: Tables>(
    tables: &T,
    ip: &Ip,
    entry: &T::Entry,
    flow: &Flow,
    seen: u32,
    came: u32,
) -> bool {
    if !ip.is_of_connection() || ip.is_syn() {
        if flow.service != NO_SERVICE || flow.generation != epoch(tables) {
            let place = tables.seek(flow, &ip.key, came);
            let (generation, slot) = ((place >> 32) as u32, place as u32);
            if generation == 0 {
                return false;
            }
            if generation != flow.generation {
                entry.locate(flow.seen, generation, slot);
            }
        }
        if ip.is_of_connection()
            && (flow.seen & SEEN_TAKEN != 0 || flow::is_closing(tables, &ip.key, flow))
        {
            return false;
        }
    }
    entry.touch(flow.seen, tables.now_s(), seen);
    true
}

#[inline(always)]
pub(crate) fn is_vip<T: Tables>(tables: &T, addr: &Addr) -> bool {
    tables.frontend(&FrontendKey::marker(*addr)).is_some()
}

#[inline(always)]
fn dropped<T: Tables>(tables: &T, reason: Reason) -> Followed {
    tables.count(reason);
    Followed::Dropped
}
