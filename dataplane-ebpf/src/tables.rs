//! The maps, as packet and socket logic see them.

use dataplane_abi::{
    Addr, Affinity, AffinityKey, Cell, Flow, FlowKey, FragmentKey, FragmentPorts, FrontendKey,
    Lead, LocalAddress, Reason, ServiceRef, Trace,
};

use crate::{
    balance::{self, Picked},
    flow, follow,
    hook::{Features, Notes},
    packet::Packet,
    trace,
};

/// Why an entry was not inserted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    Exists,
    Full,
}

/// What [`Tables::source_towards`] comes to: it is not known, and nothing written; by the uplink that has the node's address, or the overlay;
/// by another.
pub const SOURCE_UNKNOWN: u32 = 0;
pub const BY_FIRST_UPLINK: u32 = 1;
pub const BY_ANOTHER: u32 = 2;

/// An entry of a flow table, where it lies: it can be kept up to date in place, and may be given to another key at any moment. So it is
/// copied, and what was copied says whose it is; and what is written is written to the entry of the flow whose seal ([`Flow::seen`]) is told.
///
/// Fields are written one by one and read by others while they are: each is a word that is right at any time by itself.
pub trait FlowEntry {
    /// The entry as it lies there, whosever it is by now.
    fn get(&self) -> &Flow;
    /// Copies the entry, which was found under `key`. False when it is another's.
    fn copy(&self, key: &FlowKey, copy: &mut Flow) -> bool;
    /// [`Flow::seen`] of the entry, which was found under `key`, where it names `other`.
    fn seen(&self, key: &FlowKey, other: &FlowKey) -> Option<u32>;
    /// Notes a packet.
    fn touch(&self, sealed: u32, now_s: u32, seen: u32);
    /// Notes where the backend was last found.
    fn locate(&self, sealed: u32, generation: u32, slot: u32);
}

/// A loop: what it carries from turn to turn.
pub trait Turn<T> {
    /// Takes a turn. Whether there is to be another.
    fn turn(&mut self, tables: &T) -> bool;
}

/// The maps. Lookups are by value or by reference to what the map holds; nothing allocates.
pub trait Tables: Sized {
    type Entry: FlowEntry;

    fn frontend(&self, key: &FrontendKey) -> Option<Lead>;
    fn service(&self, id: u32) -> Option<ServiceRef>;
    fn cell(&self, index: u32) -> Option<Cell>;
    /// The entry at a position of the Maglev table of a generation.
    fn maglev(&self, generation: u32, position: u32) -> Option<u16>;
    /// The hardware address of the overlay's end on the other node that has an address, as a word; see [`dataplane_abi::PeerKey`].
    fn peer(&self, addr: &Addr) -> Option<u64>;
    fn local(&self, addr: &Addr) -> Option<LocalAddress>;
    /// The address that the node's routes give what it sends itself to `dst`, written down in `source`, and by what it leaves: one of the numbers
    /// below. `src` counts for rules by source.
    fn source_towards<const V6: bool>(&self, src: &Addr, dst: &Addr, source: &mut Addr) -> u32;
    /// Whether a process of the node has been asked at a port, network order, by clients that kept their addresses.
    fn is_kept_port(&self, protocol: u8, port: u16) -> bool;
    fn keep_port(&self, protocol: u8, port: u16);
    /// Whether an address lies in one of the ranges of a service or, for service 0, of destinations without masquerade.
    fn in_range(&self, service: u32, addr: &Addr) -> bool;

    /// The backend that a client had last. It may be another's: whoever uses it finds it among the service's backends first.
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    fn set_affinity(&self, key: &AffinityKey, affinity: &Affinity);

    /// Flows that have been answered. What is found may be another's by the time that it is looked at.
    fn flow(&self, key: &FlowKey) -> Option<Self::Entry>;
    fn insert_flow(&self, key: &FlowKey, flow: &Flow) -> Result<(), Refused>;
    fn remove_flow(&self, key: &FlowKey);

    /// Flows that have not been; the least recently used give way, so an insert is refused only for what exists when
    /// `replace` is false.
    fn unreplied(&self, key: &FlowKey) -> Option<Self::Entry>;
    fn insert_unreplied(&self, key: &FlowKey, flow: &Flow, replace: bool) -> Result<(), Refused>;
    fn remove_unreplied(&self, key: &FlowKey);

    /// What follows are functions of the tables, so that a kernel's can be judged by themselves, once for all that call them:
    /// [`balance::choose_for`], [`balance::seek`], [`balance::bisect`], [`flow::copy_again`], [`flow::seen_of`], [`flow::enter`],
    /// [`flow::claim`], [`flow::advance`] and [`flow::forget`].
    fn choose(&self, service: u32, key: &FlowKey, outside: bool, picked: &mut Picked) -> u32 {
        balance::choose_for(self, service, key, outside, picked)
    }
    fn seek(&self, flow: &Flow, asked: &FlowKey, came: u32) -> u64 {
        balance::seek(self, flow, asked, came)
    }
    fn bisect(&self, low: u32, high: u32, addr: &Addr, port: u16) -> u32 {
        balance::bisect(self, low, high, addr, port)
    }
    fn enter(
        &self,
        key: &FlowKey,
        answers: &mut FlowKey,
        entry: &mut Flow,
        fresh_port: u32,
    ) -> u32 {
        flow::enter(self, key, answers, entry, fresh_port)
    }
    fn claim(&self, answers: &FlowKey, entry: &mut Flow) -> bool {
        flow::claim(self, answers, entry)
    }
    fn copy_again(&self, key: &FlowKey, copy: &mut Flow) -> bool {
        flow::copy_again(self, key, copy)
    }
    fn seen_of(&self, key: &FlowKey, other: &FlowKey) -> u32 {
        flow::seen_of(self, key, other)
    }
    fn promote(&self, key: &FlowKey, reply: &Flow, seen: u32) {
        flow::advance(self, key, reply, seen);
    }

    fn forget(&self, key: &FlowKey, other: &FlowKey) {
        flow::forget(self, key, other);
    }

    /// [`follow::ask`], [`follow::open`], [`follow::open_directly`] and [`follow::portless`], likewise.
    fn ask(&self, features: &Features, notes: &mut Notes, asking: u32) -> u32 {
        follow::ask(self, features, notes, asking)
    }
    fn open<const V6: bool>(&self, features: &Features, notes: &mut Notes, asking: u32) -> u32 {
        follow::open::<V6, Self>(self, features, notes, asking)
    }
    fn open_directly(&self, notes: &mut Notes, _asking: u32) -> u32 {
        follow::open_directly(self, notes)
    }
    fn portless<const V6: bool, P: Packet>(
        &self,
        packet: &mut P,
        notes: &mut Notes,
        asking: u32,
    ) -> u32 {
        follow::portless::<V6, P, Self>(packet, self, notes, asking)
    }

    /// The traces at a place below [`dataplane_abi::limits::TRACES`], and each of its halves.
    fn trace(&self, at: u32) -> Trace;
    fn leave_service(&self, at: u32, now_s: u32);
    fn leave_direct(&self, at: u32, tuple: u64, now_s: u32);

    /// [`trace::meets`], likewise.
    fn meets(&self, key: &FlowKey, answers: &mut FlowKey, met: &mut Flow) -> bool {
        trace::meets(self, key, answers, met)
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts>;
    fn insert_fragment(&self, key: &FragmentKey, ports: &FragmentPorts);

    /// Takes at most so many turns of a loop. A kernel's verifier judges one of them for all, where it would walk each.
    fn repeat<L: Turn<Self>>(&self, turns: u32, state: &mut L) {
        for _ in 0..turns {
            if !state.turn(self) {
                break;
            }
        }
    }

    fn count(&self, reason: Reason);
    fn random(&self) -> u32;
    /// Seconds of the monotonic clock.
    fn now_s(&self) -> u32;
}
