//! What an uplink's packets for Services can have before the stack makes buffers of them (XDP): flows between clients outside and
//! backends on other nodes are rewritten and sent on. Whatever else a packet is, or may be, is left to the hook at tc, unchanged; what
//! was decided here it finds among the flows.

use dataplane_abi::{
    Addr, LEAD_GUARDED, Reason, SEEN_DISPATCHED, SEEN_FIN, SEEN_REPLY, SEEN_RST, SEEN_SYN,
    SEEN_TAKEN, proto,
};

use crate::{
    balance, flow,
    follow::{NO_SERVICE, Side, came, is_zero, lead, resume, seen_by},
    hook::{Features, Notes, Place},
    packet::{ETH_LEN, Fragment, IPV4_LEN, IPV6_LEN, Packet, Parsed, parse},
    tables::{FlowEntry, Tables},
};

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Early {
    /// Up to the hook at tc, as it is.
    Leave,
    /// Out again as [`Notes::to`] says, if the way there is known. What is counted then: [`Reason::ServiceTranslated`] for a client's
    /// packet, [`Reason::ReplyTranslated`] for a backend's.
    Forward(Reason),
}

/// Looks at a packet that came by an uplink. Changes flows as the hook at tc would, and may be followed by it on the same packet.
#[inline(always)]
pub fn uplink_early<const V6: bool, P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    features: &Features,
    notes: &mut Notes,
) -> Early {
    if !features.packet_lb || !matches!(parse::<V6, P>(packet, &mut notes.ip), Parsed::Ip) {
        return Early::Leave;
    }
    let ip = &notes.ip;
    let plain = ETH_LEN + if V6 { IPV6_LEN } else { IPV4_LEN };
    // SCTP's sum is over the whole packet, and its changes are tc's.
    let is_known = matches!(ip.key.proto, proto::TCP | proto::UDP);
    if !is_known || !matches!(ip.fragment, Fragment::Whole) || ip.l4() != plain {
        return Early::Leave;
    }
    let at = Place::of(tables, &ip.key.dst);
    if at.is_pod() {
        return Early::Leave;
    }
    let seen = flow::seen(ip.key.proto, ip.tcp_flags);
    if let Some(entry) = flow::lookup(tables, &ip.key, &mut notes.flow) {
        return follow_early(tables, notes, &entry, seen, at.is_host());
    }
    // As at tc: only an opening may take a connection from the host's own listeners. One that ends what it opens is nobody's, and the
    // hook at tc would take it for the end of an older one.
    let is_ending = seen & (SEEN_FIN | SEEN_RST) != 0;
    if is_ending || (at.is_host() && ip.is_of_connection() && !ip.is_syn()) {
        return Early::Leave;
    }
    open_early::<V6, T>(tables, features, notes, at.is_host(), seen)
}

/// A packet of a flow that is known.
#[inline(always)]
fn follow_early<T: Tables>(
    tables: &T,
    notes: &mut Notes,
    entry: &T::Entry,
    seen: u32,
    at_host: bool,
) -> Early {
    let (ip, flow) = (&notes.ip, &notes.flow);
    // What goes by the overlay goes by tc, as does what has met another connection.
    if flow.service == NO_SERVICE || flow.seen & (SEEN_DISPATCHED | SEEN_TAKEN) != 0 {
        return Early::Leave;
    }
    if flow.reply == 1 {
        // The client may be here, what may be an answer may be an opening, and what answers no opening may be of another connection.
        let answers_opening = (seen | flow.seen) & (SEEN_SYN | SEEN_RST | SEEN_REPLY) != 0;
        if is_here(tables, &flow.other.src)
            || (seen & SEEN_SYN != 0 && flow::has_ended(tables, &ip.key, flow))
            || (ip.is_of_connection() && !answers_opening)
        {
            return Early::Leave;
        }
        notes.to = flow.other.mirrored();
        let is_first = flow.seen & SEEN_REPLY == 0;
        entry.touch(flow.seen, tables.now_s(), seen);
        if is_first {
            tables.promote(&ip.key, flow, seen);
        }
        return Early::Forward(Reason::ReplyTranslated);
    }
    // A flow that may not go on is forgotten at tc, and its packet chooses anew there.
    let came = came(true, at_host);
    if is_here(tables, &flow.other.src) || !resume(tables, ip, entry, flow, seen, came) {
        return Early::Leave;
    }
    notes.to = flow.other.mirrored();
    Early::Forward(Reason::ServiceTranslated)
}

/// Opens a flow for a packet that asks a Service, wherever its backend is: where it is here, the hook at tc goes on with it. What
/// would be refused is left to that.
#[inline(always)]
fn open_early<const V6: bool, T: Tables>(
    tables: &T,
    features: &Features,
    notes: &mut Notes,
    at_host: bool,
    seen: u32,
) -> Early {
    let ip = &notes.ip;
    let Some(lead) = lead(tables, &ip.key, at_host) else {
        return Early::Leave;
    };
    let service = lead.external;
    if lead.flags & LEAD_GUARDED != 0 && !tables.in_range(service, &ip.key.src) {
        return Early::Leave;
    }
    let backend = &mut notes.aside.picked;
    if tables.choose(service, &ip.key, true, backend) != balance::CHOSEN {
        return Early::Leave;
    }
    if features.overlay && backend.direct {
        return Early::Leave;
    }
    enter_early::<V6, T>(tables, features, notes, service, seen)
}

#[inline(always)]
fn enter_early<const V6: bool, T: Tables>(
    tables: &T,
    features: &Features,
    notes: &mut Notes,
    service: u32,
    seen: u32,
) -> Early {
    let backend = &notes.aside.picked;
    let source = &mut notes.to.src;
    let is_node = seen_by::<V6, T>(tables, features, &notes.ip, Side::Outside, backend, source);
    if is_zero(source) {
        return Early::Leave;
    }
    let opening = flow::Opening {
        key: &notes.ip.key,
        service,
        backend,
        src: *source,
        fresh_port: is_node,
        seen,
    };
    let (answers, entry) = (&mut notes.aside.about, &mut notes.aside.entry);
    if flow::open(tables, &opening, answers, entry).is_err() {
        return Early::Leave;
    }
    if !is_node {
        return Early::Leave;
    }
    tables.count(Reason::SourceNat);
    notes.to = answers.mirrored();
    Early::Forward(Reason::ServiceTranslated)
}

/// Whether an address is the node's, or a pod's of it.
#[inline(always)]
fn is_here<T: Tables>(tables: &T, addr: &Addr) -> bool {
    Place::of(tables, addr).kind != 0
}

#[cfg(test)]
#[path = "early_tests.rs"]
mod tests;
