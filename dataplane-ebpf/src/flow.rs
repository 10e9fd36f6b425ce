//! Conntrack of flows that are translated per packet.
//!
//! A flow has two entries, under the client's tuple and under that of the backend's answers; each names the other, and a
//! packet leaves as the mirror of the other's key. Both lie in the unreplied table, which evicts, until the first answer
//! moves them to the replied one, which does not: a flood of openings cannot push out flows that live.

use dataplane_abi::{
    Flow, FlowKey, Reason, SEEN, SEEN_FIN, SEEN_OPENING, SEEN_REPLY, SEEN_RST, SEEN_SYN,
    SEEN_TAKEN, limits, proto,
};

use crate::{
    balance::Picked,
    packet::{Ip, Packet, tcp_flag},
    tables::{FlowEntry, Refused, Tables, Turn},
    trace,
};

/// Other source ports tried when a flow's own is taken, at random: while one of eight is free, one opening of 25 million finds none.
/// A SYN that is dropped costs its client a second, the last attempt some microseconds.
const PORT_ATTEMPTS: u32 = 128;

/// The SEEN_* bits of a packet.
#[inline(always)]
pub const fn seen(protocol: u8, tcp_flags: u8) -> u32 {
    if !matches!(protocol, proto::TCP | proto::SCTP) {
        return 0;
    }
    let mut seen = 0;
    if tcp_flags & tcp_flag::SYN != 0 {
        seen |= SEEN_SYN;
    }
    if tcp_flags & tcp_flag::FIN != 0 {
        seen |= SEEN_FIN;
    }
    if tcp_flags & tcp_flag::RST != 0 {
        seen |= SEEN_RST;
    }
    seen
}

/// The SEEN_* bits of a direction after a packet with these. An opening is one no longer when its client goes on. Whoever has reset a
/// connection sends nothing more of it: a reset that is followed was none of this connection's (late, or made up), its receiver took no
/// notice, and neither do we.
#[inline(always)]
pub const fn noted(before: u32, seen: u32) -> u32 {
    // Without a branch: the verifier would go on from here twice, with every packet that is looked up.
    let kept = (seen & SEEN_RST) | ((seen & SEEN_SYN) * SEEN_OPENING);
    (before & (!(SEEN_RST | SEEN_OPENING) | kept)) | seen
}

/// Entry of a packet in either table, the replied one first, and what it says.
#[inline(always)]
pub fn lookup<T: Tables>(tables: &T, key: &FlowKey, copy: &mut Flow) -> Option<T::Entry> {
    let entry = find(tables, key)?;
    if !entry.copy(key, copy) && !tables.copy_again(key, copy) {
        return None;
    }
    // Where it was copied again it has another entry by now, and in the one that it had nothing is noted, which is another's.
    Some(entry)
}

#[inline(always)]
fn find<T: Tables>(tables: &T, key: &FlowKey) -> Option<T::Entry> {
    match tables.flow(key) {
        Some(entry) => Some(entry),
        None => tables.unreplied(key),
    }
}

/// How often an entry is looked up anew that was another's when it was read.
const LOOKS_AGAIN_MAX: u32 = 3;

/// Looks up what a flow's entry says that was another's when it was read: it has another entry by now, or none. For [`Tables::copy_again`]
/// alone, which is what the verifier judges once.
#[inline(always)]
pub fn copy_again<T: Tables>(tables: &T, key: &FlowKey, copy: &mut Flow) -> bool {
    for _ in 0..LOOKS_AGAIN_MAX {
        match find(tables, key) {
            Some(entry) if entry.copy(key, copy) => return true,
            Some(_) => {}
            None => return false,
        }
    }
    false
}

/// What came of looking for the side of a flow that is under a key: there is none, or it is of another flow.
const NO_SIDE: u32 = 0;
/// There is, with what it has seen.
const SIDE: u32 = 1 << 31;

/// What the side of a flow under `key` has seen whose other one is under `other`: [`SIDE`] and the bits, or [`NO_SIDE`]. For
/// [`Tables::seen_of`] alone, as above.
#[inline(always)]
pub fn seen_of<T: Tables>(tables: &T, key: &FlowKey, other: &FlowKey) -> u32 {
    for _ in 0..LOOKS_AGAIN_MAX {
        let Some(entry) = find(tables, key) else {
            return NO_SIDE;
        };
        if let Some(seen) = entry.seen(key, other) {
            return SIDE | (seen & SEEN);
        }
    }
    NO_SIDE
}

/// Whether the flow of which `entry`, under `key`, is one side is closing or closed, so that its tuple may be used anew.
#[inline(always)]
pub fn is_closing<T: Tables>(tables: &T, key: &FlowKey, entry: &Flow) -> bool {
    const CLOSING: u32 = SEEN_FIN | SEEN_RST;
    entry.seen & CLOSING != 0
        || match tables.seen_of(&entry.other, key) {
            NO_SIDE => true,
            seen => seen & CLOSING != 0,
        }
}

/// Whether either side of the flow of which `entry`, under `key`, is one has been seen to end it.
#[inline(always)]
pub fn has_ended<T: Tables>(tables: &T, key: &FlowKey, entry: &Flow) -> bool {
    const ENDED: u32 = SEEN_FIN | SEEN_RST;
    entry.seen & ENDED != 0 || tables.seen_of(&entry.other, key) & ENDED != 0
}

/// Whether the flow whose answers come by `answers`, of which `entry` is that side, may still pass packets: it has been reset by nobody, and
/// not been ended by both.
#[inline(always)]
fn lives<T: Tables>(tables: &T, answers: &FlowKey, entry: &Flow) -> bool {
    if entry.seen & SEEN_RST != 0 {
        return false;
    }
    match find(tables, &entry.other) {
        Some(client) => {
            let client = client.get();
            let has_ended = client.seen & SEEN_RST != 0 || client.seen & entry.seen & SEEN_FIN != 0;
            !has_ended && client.other == *answers
        }
        None => false,
    }
}

/// Whether the opening that goes by `key`, which no flow has, would be taken for one of a flow that lives, since its answers would: they
/// have the tuple of that flow's. `answers` is room for it, `flow` for its entry.
///
/// One that has ended is forgotten: what the backend says from now on, that it remembers the old connection for instance, is for who opens
/// this one. The old one's client may be waiting for stragglers still (TIME-WAIT), and would swallow it, time and again. So is what is left
/// of one that was never answered, and whose client's side is gone: evicted, or of another flow.
#[inline(always)]
pub fn is_taken<T: Tables>(
    tables: &T,
    key: &FlowKey,
    answers: &mut FlowKey,
    flow: &mut Flow,
) -> bool {
    *answers = key.mirrored();
    if lookup(tables, answers, flow).is_none() || flow.reply != 1 {
        return false;
    }
    if lives(tables, answers, flow) {
        return true;
    }
    if flow.seen & SEEN_REPLY != 0 {
        forget_ended(tables, answers, flow);
    } else if tables.now_s().wrapping_sub(flow.last_seen_s) > ENTERING_S {
        tables.remove_unreplied(answers);
    }
    false
}

/// Seconds for which the answers' side of a flow may be there before the client's is: another CPU enters the two one after the other.
const ENTERING_S: u32 = 1;

/// What a backend's packet is to a flow that waits for its first answer: a number, since only such come back from a function in a register.
pub const ANSWER: u32 = 0;
/// It is of another connection, which the backend has directly.
pub const OF_ANOTHER: u32 = 1;
/// It is that one's state, told in answer to the flow's opening.
pub const CHALLENGE: u32 = 2;

/// What a packet under the tuple of a flow's answers, of which `flow` is the entry, is to it. An opening is answered by one or by a reset; a
/// backend that has a connection of the same tuple tells that one's state (RFC 9293, 3.10.7.4), or goes on with it. The client's next
/// attempt takes another port. It makes that at once when it is told the state, which answers nothing that it asked, and would reset the
/// other connection: see [`Reason::ResetHeld`]. A second time the other one may be who asked. A function of its own: it is rare.
#[inline(never)]
pub fn answered<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    ip: &Ip,
    flow: &Flow,
    seen: u32,
) -> u32 {
    if (seen | flow.seen) & (SEEN_SYN | SEEN_RST) != 0 {
        return ANSWER;
    }
    let Some(client) = tables.unreplied(&flow.other) else {
        return ANSWER;
    };
    match client.seen(&flow.other, &ip.key) {
        Some(opened) if opened & SEEN_SYN != 0 => {
            let is_known = opened & SEEN_TAKEN != 0;
            client.touch(opened, tables.now_s(), SEEN_TAKEN);
            if !is_known && ip.is_bare_ack(packet) {
                CHALLENGE
            } else {
                OF_ANOTHER
            }
        }
        _ => ANSWER,
    }
}

/// Moves a flow to the replied table, when `reply` arrived under `key` and found it unreplied. For [`Tables::promote`] alone, which is
/// what the verifier judges once.
#[inline(always)]
pub fn advance<T: Tables>(tables: &T, key: &FlowKey, reply: &Flow, seen: u32) {
    let now_s = tables.now_s();
    // The client's side is rebuilt from this one: what it had seen was an opening, else it would not be unreplied.
    let is_connection = matches!(key.proto, proto::TCP | proto::SCTP) as u32;
    let mut entry = Flow {
        other: *key,
        last_seen_s: now_s,
        seen: SEEN_SYN | SEEN_REPLY | (is_connection * SEEN_OPENING),
        reply: 0,
        ..*reply
    };
    entry.seal_under(&reply.other);
    if tables.insert_flow(&reply.other, &entry).is_err() {
        tables.count(Reason::FlowTableFull);
        return;
    }
    entry.other = reply.other;
    entry.seen = seen | SEEN_REPLY;
    entry.reply = reply.reply;
    entry.seal_under(key);
    if tables.insert_flow(key, &entry).is_err() {
        tables.remove_flow(&reply.other);
        tables.count(Reason::FlowTableFull);
        return;
    }
    tables.remove_unreplied(&reply.other);
    tables.remove_unreplied(key);
    tables.count(Reason::FlowReplied);
}

/// A flow to be opened.
pub struct Opening<'a> {
    /// The client's tuple as it arrived.
    pub key: &'a FlowKey,
    pub service: u32,
    pub backend: &'a Picked,
    /// Source that the backend is to see: the client's, the hairpin address, or the node's.
    pub src: dataplane_abi::Addr,
    /// The client's port means nothing at that source: a port of its own is taken.
    pub fresh_port: bool,
    /// What the client's packet shows; with [`SEEN_TAKEN`] its port is taken, whatever is known of it here.
    pub seen: u32,
}

/// Enters a flow in the unreplied table and gives the key of its answers, whose mirror is what the packet becomes. Takes another source
/// port when the client's already leads to the same backend through another Service. `entry` is room for one.
#[inline(always)]
pub fn open<T: Tables>(
    tables: &T,
    opening: &Opening<'_>,
    answers: &mut FlowKey,
    entry: &mut Flow,
) -> Result<(), Reason> {
    let Opening { key, backend, .. } = *opening;
    *answers = FlowKey::new(
        backend.addr,
        opening.src,
        backend.port,
        key.sport,
        key.proto,
    );
    *entry = Flow {
        other: *key,
        last_seen_s: tables.now_s(),
        seen: opening.seen,
        service: opening.service,
        generation: backend.generation,
        slot: backend.slot,
        reply: 1,
    };
    match tables.enter(key, answers, entry, opening.fresh_port as u32) {
        ENTERED => {}
        ENTERED_BY_ANOTHER_PORT => tables.count(Reason::FlowPortChanged),
        REFUSED => return Err(Reason::FlowRefused),
        _ => return Err(Reason::FlowPortsExhausted),
    }
    tables.count(Reason::FlowCreated);
    Ok(())
}

/// What became of a flow to be entered: a number, since only such come back from a function in a register.
const ENTERED: u32 = 0;
const ENTERED_BY_ANOTHER_PORT: u32 = 1;
const REFUSED: u32 = 2;
const NO_PORT: u32 = 3;

/// Enters a client's flow: `entry` is that of its answers, with what the client's packet has shown. Leaves in `answers` the tuple that it
/// got. For [`Tables::enter`] alone, which is what the verifier judges once.
#[inline(always)]
pub fn enter<T: Tables>(
    tables: &T,
    key: &FlowKey,
    answers: &mut FlowKey,
    entry: &mut Flow,
    fresh_port: u32,
) -> u32 {
    // The node's own ports for others' flows are nobody's directly.
    let is_traced = key.proto == proto::UDP && fresh_port == 0;
    let is_taken = entry.seen & SEEN_TAKEN != 0
        || (is_traced && trace::is_used_directly(tables, answers, entry.last_seen_s));
    let seen = entry.seen & !SEEN_TAKEN;
    entry.seen = 0;
    let mut entered = ENTERED;
    if is_taken && fresh_port == 0 {
        entered = ENTERED_BY_ANOTHER_PORT;
    }
    if is_taken || fresh_port != 0 {
        answers.dport = random_port(tables);
    }
    if !tables.claim(answers, entry) {
        if fresh_port == 0 {
            entered = ENTERED_BY_ANOTHER_PORT;
        }
        let mut claiming = Claiming {
            answers: &mut *answers,
            entry: &mut *entry,
            is_claimed: false,
        };
        tables.repeat(PORT_ATTEMPTS, &mut claiming);
        if !claiming.is_claimed {
            return NO_PORT;
        }
    }
    if is_traced {
        trace::leave(tables, answers, entry.last_seen_s);
    }
    entry.other = answers.again();
    entry.seen = seen;
    entry.reply = 0;
    entry.seal_under(key);
    match tables.insert_unreplied(key, entry, true) {
        Ok(()) => entered,
        Err(_) => REFUSED,
    }
}

/// Taking a tuple with whichever port.
struct Claiming<'a> {
    answers: &'a mut FlowKey,
    entry: &'a mut Flow,
    is_claimed: bool,
}

impl<T: Tables> Turn<T> for Claiming<'_> {
    #[inline(always)]
    fn turn(&mut self, tables: &T) -> bool {
        self.answers.dport = random_port(tables);
        self.is_claimed = tables.claim(self.answers, self.entry);
        !self.is_claimed
    }
}

/// A port, network order.
#[inline(always)]
fn random_port<T: Tables>(tables: &T) -> u16 {
    (limits::FLOW_PORT_FIRST + (tables.random() as u16 & (limits::FLOW_PORTS - 1))).to_be()
}

/// Takes the tuple of a flow's answers. False when another flow has it. For [`Tables::claim`] alone, as above.
///
/// What it finds it looks at where it lies: there is no room on the stack for more. Of an element that changes hands meanwhile the other side is
/// of a flow that does not name `answers`, and stays.
#[inline(always)]
pub fn claim<T: Tables>(tables: &T, answers: &FlowKey, entry: &mut Flow) -> bool {
    entry.seal_under(answers);
    if let Some(taken) = tables.flow(answers) {
        let taken = taken.get();
        if taken.other != entry.other && lives(tables, answers, taken) {
            return false;
        }
        forget_ended(tables, answers, taken);
    }
    match tables.insert_unreplied(answers, entry, false) {
        // Between the look above and the insert, another CPU may have moved its flow from here to the replied table.
        Ok(()) => match tables.flow(answers) {
            Some(taken) if taken.get().other != entry.other => {
                tables.remove_unreplied(answers);
                false
            }
            _ => true,
        },
        Err(Refused::Full) => false,
        Err(Refused::Exists) => match tables.unreplied(answers) {
            Some(taken) if taken.get().other != entry.other => false,
            _ => tables.insert_unreplied(answers, entry, true).is_ok(),
        },
    }
}

/// Forgets a flow that has ended, and so was answered, by the entry of its answers. The client may have another one by now, which stays; and
/// whoever waits for a first answer by this tuple has just claimed it.
#[inline(always)]
fn forget_ended<T: Tables>(tables: &T, answers: &FlowKey, entry: &Flow) {
    if let Some(client) = tables.flow(&entry.other)
        && client.get().other == *answers
    {
        tables.remove_flow(&entry.other);
    }
    tables.remove_flow(answers);
}

/// Forgets the flow of which a packet has one side's `key`: that, and `other`, unless it is of another flow by now, whose it stays. For
/// [`Tables::forget`] alone, as above.
#[inline(always)]
pub fn forget<T: Tables>(tables: &T, key: &FlowKey, other: &FlowKey) {
    if let Some(entry) = tables.flow(other)
        && entry.seen(other, key).is_some()
    {
        tables.remove_flow(other);
    }
    if let Some(entry) = tables.unreplied(other)
        && entry.seen(other, key).is_some()
    {
        tables.remove_unreplied(other);
    }
    tables.remove_flow(key);
    tables.remove_unreplied(key);
}

#[cfg(test)]
#[path = "flow_tests.rs"]
mod tests;
