//! Entries of the tables of flows, which the kernel may give to others while they are looked at.

use dataplane_abi::{Flow, FlowKey, SEEN};
use dataplane_ebpf::{flow, tables::FlowEntry};

/// A flow's entry in its map.
pub struct Entry(*mut Flow);

impl Entry {
    /// An element of a flow table.
    #[inline(always)]
    pub fn of(flow: *mut Flow) -> Self {
        Self(flow)
    }

    #[inline(always)]
    pub fn last_seen_s(&self) -> u32 {
        // SAFETY: an aligned word of a value; see below.
        unsafe { (&raw const (*self.0).last_seen_s).read_volatile() }
    }

    #[inline(always)]
    fn word(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).seen).read_volatile() }
    }

    #[inline(always)]
    fn is_of(&self, sealed: u32) -> bool {
        Flow::have_one_seal(self.word(), sealed)
    }
}

impl FlowEntry for Entry {
    #[inline(always)]
    fn get(&self) -> &Flow {
        // SAFETY: a non-null value of a flow table, memory of which stays one while the program runs (RCU). Another CPU may change its words,
        // or forget the flow and give the element to another.
        unsafe { &*self.0 }
    }

    #[inline(always)]
    fn copy(&self, key: &FlowKey, copy: &mut Flow) -> bool {
        let (from, to) = (self.0.cast::<u64>(), (&raw mut *copy).cast::<u64>());
        // SAFETY: the eight words of a value, aligned, and those of a flow. Each is read once. Backwards: what the seal is not over lies behind
        // what it is over, and where the kernel writes from the front, is read before anything is written.
        unsafe {
            let mut at = size_of::<Flow>() / size_of::<u64>();
            while at > 0 {
                at -= 1;
                to.add(at).write(from.add(at).read_volatile());
            }
        }
        copy.is_under(key)
    }

    #[inline(always)]
    fn seen(&self, key: &FlowKey, other: &FlowKey) -> Option<u32> {
        let word = self.word();
        if Flow::have_one_seal(word, Flow::seal(key, other)) {
            return Some(word);
        }
        if word & !SEEN != 0 {
            return None;
        }
        // Of an older version, which says in no other way whose it is.
        (self.get().other == *other).then_some(word)
    }

    #[inline(always)]
    fn touch(&self, sealed: u32, now_s: u32, seen: u32) {
        let old = self.word();
        // Another's by now: of its own packets it knows itself.
        if !Flow::have_one_seal(old, sealed) {
            return;
        }
        // SAFETY: as above; written only when they change, to leave the cache line shared. Of what has been seen the bits alone are written,
        // so that an entry that is given away between these instructions has its own seal.
        unsafe {
            let last = &raw mut (*self.0).last_seen_s;
            if last.read_volatile() != now_s {
                last.write_volatile(now_s);
            }
            let new = flow::noted(old, seen);
            if new != old {
                let bits = (&raw mut (*self.0).seen).cast::<u8>();
                bits.add(LOWEST_BYTE).write_volatile(new as u8);
            }
        }
    }

    #[inline(always)]
    fn locate(&self, sealed: u32, generation: u32, slot: u32) {
        if !self.is_of(sealed) {
            return;
        }
        // SAFETY: as above. The slot is a hint, so that the two words need not change together.
        unsafe {
            (&raw mut (*self.0).slot).write_volatile(slot);
            (&raw mut (*self.0).generation).write_volatile(generation);
        }
    }
}

/// Where the lowest byte of a word of four lies.
const LOWEST_BYTE: usize = if cfg!(target_endian = "big") { 3 } else { 0 };
const _: () = assert!(SEEN == u8::MAX as u32);
