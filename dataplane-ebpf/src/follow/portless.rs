//! A packet of a protocol without ports: what it is to the flow that it is about.

use dataplane_abi::{Addr, Flow, FlowKey, Reason};

use super::{Asking, Followed, Side, dropped, is_vip};
use crate::{
    flow,
    hook::{Aside, Notes, same},
    icmp,
    packet::{Ip, Packet},
    tables::Tables,
};

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
    let Notes {
        ip,
        to,
        flow,
        aside,
        ..
    } = notes;
    let about = about_flow::<V6, P, T>(packet, tables, ip, to, flow, aside);
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
    flow: &mut Flow,
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
    if flow::lookup(tables, about, flow).is_none() {
        return NO_FLOW;
    }
    *about = flow.other.again();
    // The outer addresses follow the inner ones that they equal; a router's own stays.
    let follows = |outer: &Addr, inner: &Addr, becomes: &Addr| {
        if same(outer, inner) { *becomes } else { *outer }
    };
    let src = follows(&ip.key.src, &quoted.dst, &about.dst);
    let dst = follows(&ip.key.dst, &quoted.src, &about.src);
    *to = FlowKey::new(src, dst, 0, 0, ip.key.proto);
    if flow.reply == 1 {
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
