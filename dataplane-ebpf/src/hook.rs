//! What each tc hook does with a packet.

use dataplane_abi::{
    Addr, FROM_HOST, FROM_POD, FlowKey, FragmentPorts, FrontendKey, HAIRPIN_V4, LocalAddress,
    Reason, SEEN_REPLY, SEEN_SYN, VIP_MARKER,
};

use crate::{
    balance::{self, Pick, Picked},
    flow, icmp,
    packet::{Fragment, Ipv4, Packet, Parsed, parse},
    reject::reject,
    tables::{FlowEntry, Tables},
    translate::translate,
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
    /// Out by the host's routes, from the first to the second address.
    Route(Addr, Addr),
}

/// Load-time constants that the hooks depend on.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    pub packet_lb: bool,
    /// There is a service veth pair, by which [`Verdict::Host`] can be had.
    pub service_veth: bool,
}

/// Packets that a pod sends: ingress of the host's side of its veth, `ifindex`.
#[inline(always)]
pub fn pod_ingress<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: Features,
    ifindex: u32,
) -> Verdict {
    let mut ip = match parse(packet) {
        Parsed::Ipv4(ip) => ip,
        Parsed::Other => return pass(tables),
        Parsed::Malformed => return drop(tables, Reason::Malformed),
    };
    match tables.local(&ip.key.src) {
        Some(LocalAddress {
            kind: FROM_POD,
            ifindex: owner,
            ..
        }) if owner == ifindex => {}
        _ => return drop(tables, Reason::SourceAddress),
    }
    let pod = pod_at(tables, &ip.key.dst);
    if features.packet_lb {
        // What is sent to a pod may be an answer, but asks no Service.
        let side = if pod != 0 { Side::Answers } else { Side::Pod };
        match follow(packet, tables, &mut ip, side) {
            Followed::Untouched => {}
            Followed::ToBackend(to) => return deliver(tables, pod_at(tables, &to.dst)),
            Followed::ToClient(to) => return answer(tables, &to.dst, features),
            Followed::Rejected => return Verdict::Peer(ifindex),
            Followed::Dropped => return Verdict::Drop,
        }
    }
    deliver(tables, pod)
}

/// Packets that the host sends to a pod: egress of the host's side of its veth. Answers of the host's own backends are
/// translated back here.
#[inline(always)]
pub fn pod_egress<P: Packet, T: Tables>(packet: &mut P, tables: &T, features: Features) -> Verdict {
    if !features.packet_lb {
        return Verdict::Pass;
    }
    let Parsed::Ipv4(mut ip) = parse(packet) else {
        return Verdict::Pass;
    };
    match follow(packet, tables, &mut ip, Side::Answers) {
        Followed::Dropped => Verdict::Drop,
        _ => Verdict::Pass,
    }
}

/// Packets that come from other nodes: ingress of an uplink.
#[inline(always)]
pub fn uplink_ingress<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    features: Features,
) -> Verdict {
    let mut ip = match parse(packet) {
        Parsed::Ipv4(ip) => ip,
        // The stack judges what is not ours.
        Parsed::Other | Parsed::Malformed => return pass(tables),
    };
    if features.packet_lb {
        match follow(packet, tables, &mut ip, Side::Answers) {
            Followed::ToClient(to) => return answer(tables, &to.dst, features),
            Followed::Dropped => return Verdict::Drop,
            _ => {}
        }
    }
    deliver(tables, pod_at(tables, &ip.key.dst))
}

/// Packets that the host routed to a Service address: ingress of the inner end of the service veth pair.
#[inline(always)]
pub fn service_ingress<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Verdict {
    let mut ip = match parse(packet) {
        Parsed::Ipv4(ip) => ip,
        Parsed::Other => return pass(tables),
        Parsed::Malformed => return drop(tables, Reason::Malformed),
    };
    match follow(packet, tables, &mut ip, Side::Host) {
        Followed::Untouched => drop(tables, Reason::UnknownServiceAddress),
        Followed::ToBackend(to) => match tables.local(&to.dst) {
            Some(LocalAddress {
                kind: FROM_POD,
                ifindex,
                ..
            }) => {
                tables.count(Reason::Delivered);
                Verdict::Peer(ifindex)
            }
            Some(LocalAddress {
                kind: FROM_HOST, ..
            }) => Verdict::Host,
            _ => Verdict::Route(to.src, to.dst),
        },
        Followed::ToClient(_) | Followed::Rejected => Verdict::Host,
        Followed::Dropped => Verdict::Drop,
    }
}

/// Whose packets a hook sees.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    /// A pod's: it may ask Services, and it may answer for them.
    Pod,
    /// The host's own, to Services.
    Host,
    /// Others', which may be answers.
    Answers,
}

/// What a packet turned out to be to Services.
enum Followed {
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

/// Finds out what a packet is to Services and translates it.
#[inline(always)]
fn follow<P: Packet, T: Tables>(packet: &mut P, tables: &T, ip: &mut Ipv4, side: Side) -> Followed {
    if !ip.has_ports() {
        return portless(packet, tables, ip, side);
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
            None if side != Side::Answers && is_vip(tables, &ip.key.dst) => {
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
                return forward(packet, tables, ip, &answers);
            }
            let answers = flow.other;
            flow::forget(tables, &ip.key, &answers);
        }
    }
    if side == Side::Answers {
        return Followed::Untouched;
    }
    open(packet, tables, ip, side, seen)
}

/// Opens a flow when the packet is for a Service.
#[inline(always)]
fn open<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    ip: &Ipv4,
    side: Side,
    seen: u32,
) -> Followed {
    let service = match tables.frontend(&FrontendKey::new(ip.key.dst, ip.key.dport, ip.key.proto)) {
        Some(id) if id != VIP_MARKER => id,
        _ if is_vip(tables, &ip.key.dst) => return refused(packet, tables, ip, Reason::NoSuchPort),
        _ => return Followed::Untouched,
    };
    let backend = match balance::pick(tables, service) {
        Pick::Backend(backend) => backend,
        Pick::None => return refused(packet, tables, ip, Reason::NoBackend),
        Pick::Torn => return dropped(tables, Reason::ServiceTorn),
    };
    let src = match reaches_itself(tables, ip, side, &backend) {
        true => Addr::from_v4_be(u32::from_ne_bytes(HAIRPIN_V4)),
        false => ip.key.src,
    };
    match flow::open(
        tables,
        &flow::Opening {
            key: &ip.key,
            service,
            backend: &backend,
            src,
            seen,
        },
    ) {
        Ok(answers) => forward(packet, tables, ip, &answers),
        Err(reason) => dropped(tables, reason),
    }
}

/// Whether the backend would answer its client without the answer passing a hook: a pod itself, or the host the host.
#[inline(always)]
fn reaches_itself<T: Tables>(tables: &T, ip: &Ipv4, side: Side, backend: &Picked) -> bool {
    match side {
        Side::Host => matches!(
            tables.local(&backend.addr),
            Some(LocalAddress {
                kind: FROM_HOST,
                ..
            })
        ),
        _ => {
            backend.addr.words[0] == ip.key.src.words[0]
                && backend.addr.words[1] == ip.key.src.words[1]
        }
    }
}

/// The key of a flow's answers when the flow may go on. A datagram's backend must still be one: nothing else tells its
/// sender that it is gone. An established TCP connection is left to end by itself; a new one needs a backend that is one.
#[inline(always)]
fn resume<T: Tables>(tables: &T, ip: &Ipv4, entry: &T::Entry, seen: u32) -> Option<FlowKey> {
    let flow = entry.get();
    if !ip.is_tcp() || ip.is_syn() {
        let known = Picked {
            addr: flow.other.src,
            port: flow.other.sport,
            generation: flow.generation,
            slot: flow.slot,
        };
        let found = balance::find(tables, flow.service, &known)?;
        if found.generation != known.generation {
            entry.locate(found.generation, found.slot);
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
    ip: &Ipv4,
    answers: &FlowKey,
) -> Followed {
    let to = answers.mirrored();
    match rewrite(packet, tables, ip, &to, Reason::ServiceTranslated) {
        true => Followed::ToBackend(to),
        false => Followed::Dropped,
    }
}

#[inline(always)]
fn rewrite<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    ip: &Ipv4,
    to: &FlowKey,
    reason: Reason,
) -> bool {
    let done = translate(packet, ip, to);
    tables.count(if done { reason } else { Reason::RewriteFailed });
    done
}

/// Protocols without ports are not spoken by Services, but ICMP errors may be about what Services translated.
#[inline(always)]
fn portless<P: Packet, T: Tables>(packet: &mut P, tables: &T, ip: &Ipv4, side: Side) -> Followed {
    if let Some(quoted) = icmp::quoted(packet, ip)
        && let Some(entry) = flow::lookup(tables, &quoted.key.mirrored())
    {
        let (about, reply) = (entry.get().other, entry.get().reply);
        // The outer addresses follow the inner ones that they equal; a router's own stays.
        let follows = |outer: &Addr, inner: &Addr, becomes: &Addr| {
            let same = outer.words[0] == inner.words[0] && outer.words[1] == inner.words[1];
            if same { *becomes } else { *outer }
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
    if side != Side::Answers && is_vip(tables, &ip.key.dst) {
        return dropped(tables, Reason::ServiceProtocol);
    }
    Followed::Untouched
}

#[inline(always)]
fn is_vip<T: Tables>(tables: &T, addr: &Addr) -> bool {
    tables.frontend(&FrontendKey::marker(*addr)).is_some()
}

#[inline(always)]
fn refused<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    ip: &Ipv4,
    reason: Reason,
) -> Followed {
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

/// The host's side of the veth of the local pod that has the address; 0 when none has. Not an Option: where it is None, the
/// compiler copies whatever register would hold the value, and the verifier refuses to read one that was never written.
#[inline(always)]
fn pod_at<T: Tables>(tables: &T, addr: &Addr) -> u32 {
    match tables.local(addr) {
        Some(local) if local.kind == FROM_POD => local.ifindex,
        _ => 0,
    }
}

/// To a local pod directly, else by the stack.
#[inline(always)]
fn deliver<T: Tables>(tables: &T, pod: u32) -> Verdict {
    if pod == 0 {
        return pass(tables);
    }
    tables.count(Reason::Delivered);
    Verdict::Peer(pod)
}

/// As [`deliver`], for a packet that now comes from a Service address: the host takes it from the interface that its
/// routes lead to that address by, or reverse path filtering would drop it.
#[inline(always)]
fn answer<T: Tables>(tables: &T, dst: &Addr, features: Features) -> Verdict {
    match tables.local(dst) {
        Some(LocalAddress {
            kind: FROM_POD,
            ifindex,
            ..
        }) => {
            tables.count(Reason::Delivered);
            Verdict::Peer(ifindex)
        }
        Some(LocalAddress {
            kind: FROM_HOST, ..
        }) if features.service_veth => Verdict::Host,
        _ => pass(tables),
    }
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
