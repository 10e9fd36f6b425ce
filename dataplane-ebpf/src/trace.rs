//! Datagrams of one port of a client to one backend, directly and through a Service. They have no opening that says which of the two came
//! second. So both leave a trace, by a hash of the tuple of their answers, and whoever comes to the other's takes another port: a direct
//! datagram reads one word while no flow of a Service has its hash, a flow that is opened reads one too.

use dataplane_abi::{Addr, FlowKey, limits, proto, timeout_s};

use crate::{flow, tables::Tables};

/// Seconds after which a Service's flow that left a trace is gone: the collector finds those that are not, every ten or so, and leaves
/// their traces anew.
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
/// for those of a Service's flow. A datagram that need not leaves its trace. `answers` is room for a key.
#[inline(always)]
pub fn meets<T: Tables>(tables: &T, key: &FlowKey, answers: &mut FlowKey) -> bool {
    if key.proto != proto::UDP {
        return flow::is_taken(tables, key, answers);
    }
    let tuple = digest(&key.dst, &key.src, key.dport, key.sport);
    let at = place(tuple);
    let trace = tables.trace(at);
    let now_s = tables.now_s();
    if trace.service_s != 0 {
        if flow::is_taken(tables, key, answers) {
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

/// Leaves the trace of a Service's flow.
#[inline(always)]
pub fn leave<T: Tables>(tables: &T, answers: &FlowKey, now_s: u32) {
    // A second late rather than never, when the machine has just begun.
    tables.leave_service(place(digest_of(answers)), now_s | (now_s == 0) as u32);
}
