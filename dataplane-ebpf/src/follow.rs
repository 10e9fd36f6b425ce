//! What a packet is to Services, and its translation.

use dataplane_abi::{
    Addr, FlowKey, FragmentPorts, FrontendKey, LEAD_GUARDED, Lead, Reason, SEEN_REPLY, SEEN_SYN,
    proto,
};

use crate::{
    balance::{self, Client, Pick, Picked},
    flow,
    hook::{Features, Place, hairpin, same},
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
    /// What may be an answer, but asks no Service.
    Answers,
}

/// What a packet turned out to be to Services.
pub(crate) enum Followed {
    /// Nothing of theirs.
    Untouched,
    /// A client's, which now goes to a backend under this key.
    ToBackend(FlowKey),
    /// A backend's, which now goes to the client under this key.
    ToClient(FlowKey),
    /// It has become the refusal of what it was.
    Rejected,
    /// Counted already.
    Dropped,
}

/// Finds out what a packet is to Services and translates it. `at_host` says that it is for an address of the node.
#[inline(always)]
pub(crate) fn follow<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
    ip: &mut Ip,
    side: Side,
    at_host: bool,
) -> Followed {
    let is_followed = ip.has_ports() || (features.masquerade && may_be_echo(ip));
    if !is_followed {
        return portless(packet, tables, ip, side, at_host);
    }
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
            None if side != Side::Answers && !at_host && is_vip(tables, &ip.key.dst) => {
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
                let client = flow.other;
                flow::forget(tables, &client, &ip.key);
                return Followed::Untouched;
            }
            let to = flow.other.mirrored();
            if flow.seen & SEEN_REPLY == 0 {
                flow::promote(tables, &ip.key, flow, seen);
            } else {
                entry.touch(tables.now_s(), seen);
            }
            return match rewrite(packet, tables, ip, &to, Reason::ReplyTranslated) {
                true => Followed::ToClient(to),
                false => Followed::Dropped,
            };
        }
        if side != Side::Answers {
            if let Some(answers) = resume(tables, ip, &entry, seen) {
                return forward(packet, tables, ip, &answers, flow.service);
            }
            let answers = flow.other;
            flow::forget(tables, &ip.key, &answers);
        }
    }
    // Only an opening may take a connection from the host's own listeners: what the host itself opened from a port that
    // is a NodePort too must hear its answers.
    if side == Side::Answers || (side == Side::Outside && at_host && ip.is_tcp() && !ip.is_syn()) {
        return Followed::Untouched;
    }
    open(packet, tables, features, ip, side, at_host, seen)
}

/// Where a packet's destination leads, when it is a frontend: its address and port, or the port of every address of the node.
#[inline(always)]
fn lead<T: Tables>(tables: &T, ip: &Ip, at_host: bool) -> Option<Lead> {
    let key = FrontendKey::new(ip.key.dst, ip.key.dport, ip.key.proto);
    match tables.frontend(&key) {
        None if at_host => tables.frontend(&key.on_every_address()),
        found => found,
    }
}

/// Opens a flow when the packet is for a Service.
#[inline(always)]
fn open<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: &Features,
    ip: &Ip,
    side: Side,
    at_host: bool,
    seen: u32,
) -> Followed {
    // Without a frontend it is for nobody's, unless it leaves the cluster: then it is a flow of no service, whose backend is where
    // it goes anyway.
    let mut service = NO_SERVICE;
    let mut backend = Picked {
        addr: ip.key.dst,
        port: ip.key.dport,
        generation: 0,
        slot: 0,
    };
    let mut source = Source {
        addr: features.node(&ip.key.src),
        is_node: true,
    };
    if let Some(lead) = lead(tables, ip, at_host) {
        service = match side {
            Side::Outside => lead.external,
            _ => lead.internal,
        };
        if lead.flags & LEAD_GUARDED != 0 && !tables.in_range(service, &ip.key.src) {
            return dropped(tables, Reason::SourceRange);
        }
        backend = match balance::pick(tables, service, &Client::at(ip.key.src)) {
            Pick::Backend(backend) => backend,
            Pick::None => return refused(packet, tables, ip, Reason::NoBackend),
            Pick::Silent => return dropped(tables, Reason::NoLocalBackend),
            Pick::Torn | Pick::ClientUnknown => return dropped(tables, Reason::ServiceTorn),
        };
        source = seen_by(tables, features, ip, side, &backend);
        if is_zero(&source.addr) {
            return dropped(tables, Reason::NoNodeAddress);
        }
    } else {
        if !at_host && is_vip(tables, &ip.key.dst) {
            if !ip.has_ports() {
                return dropped(tables, Reason::ServiceProtocol);
            }
            return refused(packet, tables, ip, Reason::NoSuchPort);
        }
        let leaves = features.masquerade && side == Side::Pod && !at_host;
        // Without an address there is nothing to give; an echo's answer opens nothing.
        let is_answer = matches!(ip.echo, Echo::Reply);
        if !leaves || is_answer || is_zero(&source.addr) || keeps_source(tables, &ip.key.dst) {
            return Followed::Untouched;
        }
    }
    if source.is_node {
        tables.count(Reason::SourceNat);
    }
    let opening = flow::Opening {
        key: &ip.key,
        service,
        backend: &backend,
        src: source.addr,
        fresh_port: source.is_node,
        seen,
    };
    match flow::open(tables, &opening) {
        Ok(answers) => forward(packet, tables, ip, &answers, service),
        Err(reason) => dropped(tables, reason),
    }
}

/// Whether a packet is an ICMP echo or its answer, or a later fragment of what may be one.
#[inline(always)]
fn may_be_echo(ip: &Ip) -> bool {
    ip.is_echo() || (ip.key.proto == proto::ICMP && matches!(ip.fragment, Fragment::Later))
}

#[inline(always)]
fn is_zero(addr: &Addr) -> bool {
    addr.words[0] == 0 && addr.words[1] == 0
}

/// Whether pods keep their addresses towards a destination: in the ranges for that, and to groups.
#[inline(always)]
fn keeps_source<T: Tables>(tables: &T, dst: &Addr) -> bool {
    let is_group = matches!(dst.v4_be(), Some(be) if be.to_ne_bytes()[0] >= 224);
    is_group || tables.in_range(NO_SERVICE, dst)
}

/// [`dataplane_abi::Flow::service`] of what is masqueraded, and the owner of ranges without.
const NO_SERVICE: u32 = 0;

/// The source that a backend is to see.
struct Source {
    /// Zero when it should be the node's and there is none of the family.
    addr: Addr,
    /// The node's own address, whose ports are shared by all that it sends on.
    is_node: bool,
}

/// The client's own address where the answers pass a hook anyway; the hairpin address where a backend would answer its client
/// without (a pod itself, the host the host, the host a client outside); the node's where the answers would go elsewhere.
#[inline(always)]
fn seen_by<T: Tables>(
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
        addr: hairpin(&ip.key.src),
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
            addr: features.node(&ip.key.src),
            is_node: true,
        }
    }
}

/// The key of a flow's answers when the flow may go on. A datagram's backend must still be one: nothing else tells its
/// sender that it is gone. An established TCP connection is left to end by itself; a new one needs a backend that is one.
#[inline(always)]
fn resume<T: Tables>(tables: &T, ip: &Ip, entry: &T::Entry, seen: u32) -> Option<FlowKey> {
    let flow = entry.get();
    if !ip.is_tcp() || ip.is_syn() {
        let known = Picked {
            addr: flow.other.src,
            port: flow.other.sport,
            generation: flow.generation,
            slot: flow.slot,
        };
        if flow.service != NO_SERVICE {
            let found = balance::find(tables, flow.service, &known)?;
            if found.generation != known.generation {
                entry.locate(found.generation, found.slot);
            }
        }
        if ip.is_tcp() && flow::is_closing(tables, flow) {
            return None;
        }
    }
    entry.touch(tables.now_s(), seen);
    Some(flow.other)
}

#[inline(always)]
fn forward<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    ip: &Ip,
    answers: &FlowKey,
    service: u32,
) -> Followed {
    let to = answers.mirrored();
    let reason = match service {
        NO_SERVICE => Reason::Masqueraded,
        _ => Reason::ServiceTranslated,
    };
    match rewrite(packet, tables, ip, &to, reason) {
        true => Followed::ToBackend(to),
        false => Followed::Dropped,
    }
}

#[inline(always)]
fn rewrite<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    ip: &Ip,
    to: &FlowKey,
    reason: Reason,
) -> bool {
    let done = translate(packet, ip, to);
    tables.count(if done { reason } else { Reason::RewriteFailed });
    done
}

/// Protocols without ports are not spoken by Services, but ICMP errors may be about what Services translated.
#[inline(always)]
fn portless<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    ip: &Ip,
    side: Side,
    at_host: bool,
) -> Followed {
    if let Some(quoted) = icmp::quoted(packet, ip)
        && let Some(entry) = flow::lookup(tables, &quoted.key.mirrored())
    {
        let (about, reply) = (entry.get().other, entry.get().reply);
        // The outer addresses follow the inner ones that they equal; a router's own stays.
        let follows = |outer: &Addr, inner: &Addr, becomes: &Addr| {
            if same(outer, inner) { *becomes } else { *outer }
        };
        let src = follows(&ip.key.src, &quoted.key.dst, &about.dst);
        let dst = follows(&ip.key.dst, &quoted.key.src, &about.src);
        let to = FlowKey::new(src, dst, 0, 0, ip.key.proto);
        if !icmp::translate(packet, ip, &quoted, &to, &about) {
            return dropped(tables, Reason::RewriteFailed);
        }
        tables.count(Reason::IcmpTranslated);
        return if reply == 1 {
            Followed::ToClient(to)
        } else {
            Followed::ToBackend(to)
        };
    }
    if side != Side::Answers && !at_host && is_vip(tables, &ip.key.dst) {
        return dropped(tables, Reason::ServiceProtocol);
    }
    Followed::Untouched
}

#[inline(always)]
fn is_vip<T: Tables>(tables: &T, addr: &Addr) -> bool {
    tables.frontend(&FrontendKey::marker(*addr)).is_some()
}

#[inline(always)]
fn refused<P: Packet, T: Tables>(packet: &mut P, tables: &T, ip: &Ip, reason: Reason) -> Followed {
    tables.count(reason);
    match reject(packet, ip) {
        true => Followed::Rejected,
        false => Followed::Dropped,
    }
}

#[inline(always)]
fn dropped<T: Tables>(tables: &T, reason: Reason) -> Followed {
    tables.count(reason);
    Followed::Dropped
}
