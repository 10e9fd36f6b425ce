use crate::{Addr, layout::plain, proto};

/// The 5-tuple of a packet as it arrives at a hook.
///
/// What fills it up to its size are words, here and in other keys: to clear or copy an array of bytes, programs for the kernel call a loop
/// that goes byte by byte, some nanoseconds for each packet.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlowKey {
    pub src: Addr,
    pub dst: Addr,
    /// Network order, both.
    pub sport: u16,
    pub dport: u16,
    pub proto: u8,
    pub pad: u8,
    pub pad2: u16,
}
plain!(FlowKey, 40, { src: 0, dst: 16, sport: 32, dport: 34, proto: 36, pad: 37, pad2: 38 });

impl FlowKey {
    /// Nobody's.
    pub const NONE: Self = Self::new(Addr { words: [0, 0] }, Addr { words: [0, 0] }, 0, 0, 0);

    #[inline(always)]
    pub const fn new(src: Addr, dst: Addr, sport_be: u16, dport_be: u16, proto: u8) -> Self {
        Self {
            src,
            dst,
            sport: sport_be,
            dport: dport_be,
            proto,
            pad: 0,
            pad2: 0,
        }
    }

    /// The same key, field by field: where one may overlap the other, a copy of the whole is a loop over bytes.
    #[inline(always)]
    pub const fn again(&self) -> Self {
        Self::new(self.src, self.dst, self.sport, self.dport, self.proto)
    }

    /// The same key as words of memory.
    #[inline(always)]
    const fn words(&self) -> &[u64; 5] {
        // SAFETY: forty plain bytes, aligned as words are.
        unsafe { &*core::ptr::from_ref(self).cast() }
    }

    /// The key with source and destination exchanged.
    #[inline(always)]
    pub const fn mirrored(&self) -> Self {
        Self::new(self.dst, self.src, self.dport, self.sport, self.proto)
    }
}

/// [`Flow::seen`]: a SYN passed in this direction.
pub const SEEN_SYN: u32 = 1;
/// A FIN did.
pub const SEEN_FIN: u32 = 2;
/// A RST did.
pub const SEEN_RST: u32 = 4;
/// The flow has been answered: it lives in FLOWS, not in FLOWS_UNREPLIED.
pub const SEEN_REPLY: u32 = 8;

/// In the client's entry: its packets go to the backend's node as they come, which answers the client directly.
pub const SEEN_DISPATCHED: u32 = 16;

/// In the client's entry of an opening: the backend has a connection of the same tuple already, directly, so the next attempt takes
/// another port.
pub const SEEN_TAKEN: u32 = 32;

/// In the client's entry: the flow has been answered, and the client has not gone on. Addresses that are made up never do.
pub const SEEN_OPENING: u32 = 64;

/// The bits of [`Flow::seen`] that say what has been seen.
pub const SEEN: u32 = 0xff;

/// One direction of a translated flow. A flow has two entries that name each other: under the client's tuple, and under
/// that of the backend's answers. A packet that arrives under an entry's key leaves as the mirror of `other`.
///
/// Each entry holds what its own direction has seen, so that a packet costs one lookup; the collector reads both.
///
/// The kernel gives the element of an entry that is deleted or replaced to another key at once, and a program that found it just before
/// reads what is there then, or half of it. So an entry is sealed: who has read one knows whose it is ([`Flow::is_under`]).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    /// Key of the other direction's entry.
    pub other: FlowKey,
    /// Seconds of the monotonic clock when this direction was last used.
    pub last_seen_s: u32,
    /// SEEN_* bits. Those above [`SEEN`] are the entry's seal ([`Flow::seal`]): none of them in entries of versions before 10.
    pub seen: u32,
    /// Service id that the client asked.
    pub service: u32,
    /// Generation of the service when the backend was last seen in it.
    pub generation: u32,
    /// Place of the backend in the extent then, from 0.
    pub slot: u32,
    /// 1 in the entry of the backend's answers, 0 in the client's.
    pub reply: u32,
}
plain!(Flow, 64, { other: 0, last_seen_s: 40, seen: 44, service: 48, generation: 52, slot: 56, reply: 60 });

impl Flow {
    /// Nobody's.
    pub const NONE: Self = Self {
        other: FlowKey::NONE,
        last_seen_s: 0,
        seen: 0,
        service: 0,
        generation: 0,
        slot: 0,
        reply: 0,
    };

    /// One word of each address of a key. They differ in their last bytes, and words that are multiplied leave those at the top: the second's are
    /// brought down.
    #[inline(always)]
    const fn ends(words: &[u64; 5], at: usize) -> u64 {
        words[at] ^ words[at + 2].swap_bytes()
    }

    /// What the entry of a flow under `key` that names `other` is sealed by: a hash of both, in the bits of [`Flow::seen`] above [`SEEN`], of
    /// which the highest is always set.
    #[inline(always)]
    pub const fn seal(key: &FlowKey, other: &FlowKey) -> u32 {
        // Odd, and of as many ones as zeros in no order: the golden ratio's first digits.
        const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
        let (key, other) = (key.words(), other.words());
        let mut hash = key[4] ^ other[4] << 32;
        hash = hash.wrapping_mul(FACTOR).swap_bytes() ^ Self::ends(key, 0);
        hash = hash.wrapping_mul(FACTOR).swap_bytes() ^ Self::ends(key, 1);
        hash = hash.wrapping_mul(FACTOR).swap_bytes() ^ Self::ends(other, 0);
        hash = hash.wrapping_mul(FACTOR).swap_bytes() ^ Self::ends(other, 1);
        (hash.wrapping_mul(FACTOR) >> 32) as u32 & !SEEN | 1 << 31
    }

    /// Seals the entry, which goes under `key`.
    #[inline(always)]
    pub const fn seal_under(&mut self, key: &FlowKey) {
        self.seen = self.seen & SEEN | Self::seal(key, &self.other);
    }

    /// Whether what was read under `key` is of that key: one of another one in eight million is taken for it.
    #[inline(always)]
    pub const fn is_under(&self, key: &FlowKey) -> bool {
        let seal = Self::seal(key, &self.other);
        Self::have_one_seal(self.seen, seal) || self.seen & !SEEN == 0
    }

    /// Whether two words that may be [`Flow::seen`] are of one entry's.
    #[inline(always)]
    pub const fn have_one_seal(one: u32, other: u32) -> bool {
        (one ^ other) & !SEEN == 0
    }
}

/// A fragmented datagram: only its first fragment has ports.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FragmentKey {
    pub src: Addr,
    pub dst: Addr,
    /// Identification, network order; 16 bits in IPv4.
    pub id: u32,
    pub proto: u8,
    pub pad: u8,
    pub pad2: u16,
}
plain!(FragmentKey, 40, { src: 0, dst: 16, id: 32, proto: 36, pad: 37, pad2: 38 });

/// The ports of a fragmented datagram.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FragmentPorts {
    /// Network order, both.
    pub sport: u16,
    pub dport: u16,
}
plain!(FragmentPorts, 4, { sport: 0, dport: 2 });

/// What datagrams between a client and a backend have left behind, by a hash of the tuple of the answers. Many tuples share one: each
/// word is right by itself, and what it says is looked at or is a hint.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Trace {
    /// Seconds of the monotonic clock when a flow was last known, by whose answers a direct datagram might be taken; 0 for never.
    pub service_s: u32,
    /// When the last datagram passed that asked no Service.
    pub direct_s: u32,
    /// The hash of that one's tuple, whole.
    pub direct: u64,
}
plain!(Trace, 16, { service_s: 0, direct_s: 4, direct: 8 });

/// Seconds without a packet after which a flow is collected, from what both directions have seen.
///
/// Established TCP follows kube-proxy's default (24 h), UDP and SCTP the kernel's conntrack (120 s answered, 30 s not; 210 s).
/// `pressure` halves the longest of them that many times, when the table fills.
pub const fn timeout_s(proto: u8, seen_client: u32, seen_backend: u32, pressure: u32) -> u32 {
    let seen = seen_client | seen_backend;
    let timeout = match proto {
        proto::TCP | proto::SCTP if seen & SEEN_RST != 0 => 10,
        proto::TCP | proto::SCTP if seen_client & SEEN_OPENING != 0 => 60,
        proto::TCP | proto::SCTP if seen_client & seen_backend & SEEN_FIN != 0 => 30,
        // Both ends of an association send heartbeats, 30 s apart (RFC 9260).
        proto::SCTP if seen & SEEN_REPLY != 0 => 210,
        proto::TCP if seen & SEEN_FIN != 0 => 3600,
        proto::TCP if seen & SEEN_REPLY != 0 => 86_400,
        proto::TCP | proto::SCTP => 60,
        _ if seen & SEEN_REPLY != 0 => 120,
        _ => 30,
    };
    let shorter = timeout >> if pressure > 16 { 16 } else { pressure };
    // Pressure never cuts below what a retransmission needs.
    if shorter < 10 {
        if timeout < 10 { timeout } else { 10 }
    } else {
        shorter
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{collections::BTreeSet, vec::Vec};

    use super::*;

    #[test]
    fn a_mirrored_key_mirrored_again_is_itself() {
        let key = FlowKey::new(Addr::from_v4_be(1), Addr::from_v4_be(2), 3, 4, proto::UDP);
        assert_ne!(key, key.mirrored());
        assert_eq!(key, key.mirrored().mirrored());
    }

    #[test]
    fn an_entry_is_sealed_for_its_own_key_and_other_alone() {
        let addr = |last: u8| Addr::from_v4_be(u32::from_ne_bytes([10, 0, 0, last]));
        let long = |last: u64| Addr {
            words: [0xfd, last.to_be()],
        };
        let mut keys = Vec::new();
        for (src, dst) in [(1, 2), (2, 1), (2, 2), (3, 1)] {
            for (sport, dport) in [(1, 2), (2, 1), (2, 2), (3, 1)] {
                let (sport, dport) = (u16::to_be(sport), u16::to_be(dport));
                for proto in [proto::TCP, proto::UDP] {
                    keys.push(FlowKey::new(addr(src), addr(dst), sport, dport, proto));
                    let (src, dst) = (long(src.into()), long(dst.into()));
                    keys.push(FlowKey::new(src, dst, sport, dport, proto));
                }
            }
        }
        let mut seals = BTreeSet::new();
        for key in &keys {
            // A flow's two sides are of one protocol.
            for other in keys.iter().filter(|other| other.proto == key.proto) {
                seals.insert(Flow::seal(key, other));
                let mut flow = Flow {
                    other: *other,
                    seen: SEEN_FIN,
                    ..Flow::NONE
                };
                // As programs of older versions leave it.
                assert!(flow.is_under(key));
                flow.seal_under(key);
                assert!(flow.is_under(key));
                assert_eq!(flow.seen & SEEN, SEEN_FIN);
                for stranger in keys.iter().filter(|stranger| *stranger != key) {
                    assert!(!flow.is_under(stranger), "{key:?} {stranger:?} {other:?}");
                    // Half of it is another's already.
                    let torn = Flow {
                        other: *stranger,
                        ..flow
                    };
                    let is_whole = stranger == other || stranger.proto != other.proto;
                    assert!(is_whole || !torn.is_under(key), "{key:?} {stranger:?}");
                }
            }
        }
        let pairs = keys.len() * keys.len() / 2;
        assert!(seals.len() > pairs - 2, "{} of {pairs}", seals.len());
    }

    #[test]
    fn closed_flows_go_before_half_closed_before_established_ones() {
        let established = timeout_s(proto::TCP, SEEN_SYN | SEEN_REPLY, SEEN_REPLY, 0);
        let half_closed = timeout_s(proto::TCP, SEEN_FIN | SEEN_REPLY, SEEN_REPLY, 0);
        let closed = timeout_s(proto::TCP, SEEN_FIN | SEEN_REPLY, SEEN_FIN | SEEN_REPLY, 0);
        let reset = timeout_s(proto::TCP, SEEN_REPLY, SEEN_RST | SEEN_REPLY, 0);
        assert!(reset < closed && closed < half_closed && half_closed < established);
    }

    #[test]
    fn pressure_shortens_but_leaves_time_for_a_retransmission() {
        for proto in [proto::TCP, proto::UDP] {
            let mut last = u32::MAX;
            for pressure in 0..40 {
                let timeout = timeout_s(proto, SEEN_REPLY, SEEN_REPLY, pressure);
                assert!(timeout <= last && timeout >= 10);
                last = timeout;
            }
        }
    }
}
