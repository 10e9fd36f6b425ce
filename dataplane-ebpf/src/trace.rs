//! Datagrams of one port of a client to one backend, directly and through a Service. They have no opening that says which of the two came
//! second. So both leave a trace, by a hash of the tuple of their answers, and whoever comes to the other's takes another port: a direct
//! datagram reads one word while no flow of a Service has its hash, a flow that is opened reads one too.

use dataplane_abi::{Addr, Flow, FlowKey, limits, proto, timeout_s};

use crate::{flow, tables::Tables};

/// Seconds after which a Service's flow that left a trace is gone, or not used any more: the collector finds those that are, every ten or
/// so, and leaves their traces anew.
const SERVICE_S: u32 = 300;
/// Seconds for which a direct datagram may be answered, and another follow it.
const DIRECT_S: u32 = 120;

const _: () = assert!(SERVICE_S > 2 * timeout_s(proto::UDP, 0, 0, 0));

/// A hash of the tuple of answers.
#[inline(always)]
fn digest(src: &Addr, dst: &Addr, sport: u16, dport: u16) -> u64 {
    // Odd, and of as many ones as zeros in no order: pi's first digits.
    const FACTOR: u64 = 0x2438_6a88_85a3_08d3 | 1;
    let ports = (sport as u64) << 16 | dport as u64;
    let mut hash = FACTOR;
    for word in [
        ports,
        src.words[0],
        src.words[1],
        dst.words[0],
        dst.words[1],
    ] {
        hash = (hash ^ word).wrapping_mul(FACTOR);
        hash ^= hash >> 32;
    }
    hash
}

/// Where the traces of a hash lie.
#[inline(always)]
const fn place(digest: u64) -> u32 {
    digest as u32 & (limits::TRACES - 1)
}

#[inline(always)]
fn digest_of(answers: &FlowKey) -> u64 {
    digest(&answers.src, &answers.dst, answers.sport, answers.dport)
}

/// Whether a packet that may be a flow's first, asks no Service and goes by `key` must take another port, since its answers would be taken
/// for those of a Service's flow. A datagram that need not leaves its trace. `answers` is room for a key, `met` for an entry.
#[inline(always)]
pub fn meets<T: Tables>(tables: &T, key: &FlowKey, answers: &mut FlowKey, met: &mut Flow) -> bool {
    if key.proto != proto::UDP {
        return flow::is_taken(tables, key, answers, met);
    }
    let tuple = digest(&key.dst, &key.src, key.dport, key.sport);
    let at = place(tuple);
    let trace = tables.trace(at);
    let now_s = tables.now_s();
    if trace.service_s != 0 {
        if flow::is_taken(tables, key, answers, met) {
            return true;
        }
        if now_s.wrapping_sub(trace.service_s) > SERVICE_S {
            tables.leave_service(at, 0);
        }
    }
    if trace.direct != tuple || trace.direct_s != now_s {
        tables.leave_direct(at, tuple, now_s);
    }
    false
}

/// Whether datagrams pass directly by the tuple whose answers these are.
#[inline(always)]
pub fn is_used_directly<T: Tables>(tables: &T, answers: &FlowKey, now_s: u32) -> bool {
    let tuple = digest_of(answers);
    let trace = tables.trace(place(tuple));
    trace.direct == tuple && now_s.wrapping_sub(trace.direct_s) <= DIRECT_S
}

/// Leaves the trace of a Service's flow that nobody has answered anew, while its client goes on: it was used at `last_s`. One that is not
/// used any more stays in its table until others need the room.
#[inline(always)]
pub fn renew<T: Tables>(tables: &T, answers: &FlowKey, last_s: u32, now_s: u32) {
    if now_s.wrapping_sub(last_s) > SERVICE_S {
        return;
    }
    let left_s = tables.trace(place(digest_of(answers))).service_s;
    if left_s == 0 || last_s.wrapping_sub(left_s).cast_signed() > 0 {
        leave(tables, answers, last_s);
    }
}

/// Leaves the trace of a Service's flow.
#[inline(always)]
pub fn leave<T: Tables>(tables: &T, answers: &FlowKey, now_s: u32) {
    // A second late rather than never, when the machine has just begun.
    tables.leave_service(place(digest_of(answers)), now_s | (now_s == 0) as u32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        balance::Picked,
        memory::{Memory, addr},
    };

    const BEGINNING_S: u32 = 1000;

    fn key(dst: [u8; 4], port: u16) -> FlowKey {
        let ports = (4000u16.to_be(), port.to_be());
        FlowKey::new(addr([10, 0, 0, 1]), addr(dst), ports.0, ports.1, proto::UDP)
    }

    fn direct() -> FlowKey {
        key([10, 0, 0, 2], 53)
    }

    /// Opens a Service's flow to where the direct one goes, and says whether it kept the client's port.
    fn asks(tables: &Memory) -> bool {
        let backend = Picked {
            addr: direct().dst,
            port: direct().dport,
            ..Picked::NONE
        };
        let client = key([10, 96, 0, 1], 53);
        let opening = flow::Opening {
            key: &client,
            service: 1,
            backend: &backend,
            src: client.src,
            fresh_port: false,
            seen: 0,
        };
        let (mut answers, mut entry) = (FlowKey::NONE, Flow::NONE);
        flow::open(tables, &opening, &mut answers, &mut entry).unwrap();
        answers.dport == client.sport
    }

    fn meets(tables: &Memory) -> bool {
        let (mut answers, mut met) = (FlowKey::NONE, Flow::NONE);
        super::meets(tables, &direct(), &mut answers, &mut met)
    }

    fn at(seconds: u32) -> Memory {
        let tables = Memory::default();
        tables.clock_s.set(seconds);
        tables
    }

    #[test]
    fn a_direct_datagram_is_remembered_for_two_minutes() {
        for (later_s, keeps) in [(0, false), (DIRECT_S, false), (DIRECT_S + 1, true)] {
            let tables = at(BEGINNING_S);
            assert!(!meets(&tables));
            tables.clock_s.set(BEGINNING_S + later_s);
            assert_eq!(asks(&tables), keeps, "{later_s}");
        }
        // Another one in between counts anew.
        let tables = at(BEGINNING_S);
        for passed_s in [0, DIRECT_S, 2 * DIRECT_S] {
            tables.clock_s.set(BEGINNING_S + passed_s);
            assert!(!meets(&tables));
        }
        tables.clock_s.set(BEGINNING_S + 3 * DIRECT_S);
        assert!(!asks(&tables));
    }

    #[test]
    fn the_trace_of_a_flow_that_is_gone_is_taken_away_after_five_minutes() {
        let tables = at(BEGINNING_S);
        assert!(asks(&tables));
        tables.forget(&key([10, 96, 0, 1], 53), &direct().mirrored());
        let left = |tables: &Memory| {
            tables
                .trace(place(digest_of(&direct().mirrored())))
                .service_s
        };
        tables.clock_s.set(BEGINNING_S + SERVICE_S);
        assert!(!meets(&tables));
        assert_eq!(left(&tables), BEGINNING_S);
        tables.clock_s.set(BEGINNING_S + SERVICE_S + 1);
        assert!(!meets(&tables));
        assert_eq!(left(&tables), 0);
    }

    #[test]
    fn the_trace_of_a_flow_that_is_used_and_not_answered_is_as_old_as_its_last_packet() {
        let tables = at(BEGINNING_S);
        let answers = direct().mirrored();
        let left = || tables.trace(place(digest_of(&answers))).service_s;
        assert!(asks(&tables));
        let now_s = BEGINNING_S + 2 * SERVICE_S;
        for (last_s, expected_s) in [
            (BEGINNING_S + 10, BEGINNING_S),
            (now_s - SERVICE_S, now_s - SERVICE_S),
            (now_s, now_s),
            // Another flow of the same hash, which was used before.
            (now_s - 1, now_s),
        ] {
            renew(&tables, &answers, last_s, now_s);
            assert_eq!(left(), expected_s, "{last_s}");
        }
    }

    #[test]
    fn the_clock_may_begin_at_zero_and_wrap() {
        for beginning_s in [0, u32::MAX - 5] {
            let tables = at(beginning_s);
            assert!(asks(&tables));
            assert!(meets(&tables), "{beginning_s}");
            tables.clock_s.set(beginning_s.wrapping_add(20));
            renew(
                &tables,
                &direct().mirrored(),
                tables.now_s(),
                tables.now_s(),
            );
            assert!(meets(&tables), "{beginning_s}");
            let tables = at(beginning_s);
            assert!(!meets(&tables));
            tables.clock_s.set(beginning_s.wrapping_add(DIRECT_S));
            assert!(!asks(&tables), "{beginning_s}");
        }
    }
}
