//! The maps, and the kernel's side of [`Tables`].

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{
        Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SkStorage, lpm_trie::Key as PrefixKey,
    },
    helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns, bpf_loop},
    macros::btf_map,
};
use core::{arch::asm, ffi::c_void, hint::black_box};
use dataplane_abi::{
    Addr, Affinity, AffinityKey, Cell, Connected, Flow, FlowKey, FragmentKey, FragmentPorts,
    FrontendKey, KeptPorts, Lead, LocalAddress, MaglevBlock, MaglevKey, PeerKey, RangeKey, Reason,
    ServiceRef, SocketPeer, SocketPeers, Trace, limits,
};
use dataplane_ebpf::{
    balance::{self, Picked},
    flow,
    hook::Notes,
    tables::{Refused, SOURCE_UNKNOWN, Tables, Turn},
    trace,
};

use crate::entry::Entry;

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
/// Memory for what is there, and no more. It keeps no element from its next owner: from Linux 6.1 on the kernel gives one that was deleted
/// or replaced to the next key that the same CPU inserts, at once, as it does with those that are made beforehand. A program that found it
/// just before reads what is there then. So a value says whose it is (FRONTENDS, FLOWS, DNS_NAMES), or a stranger's does no harm; it is said
/// below, where each is read.
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

const BPF_ANY: u64 = 0;
const BPF_NOEXIST: u64 = 1;
const EEXIST: i32 = -17;
const NS_PER_S: u64 = 1_000_000_000;

#[btf_map]
pub static FRONTENDS: HashMap<FrontendKey, Lead, { limits::FRONTENDS as usize }, NO_PREALLOC> =
    HashMap::new();
/// Words of [`ServiceRef`]: read in one load.
#[btf_map]
pub static SERVICES: Array<u64, { limits::SERVICES as usize }, MMAPABLE> = Array::new();
#[btf_map]
pub static BACKENDS: Array<Cell, { limits::CELLS as usize }, MMAPABLE> = Array::new();
#[btf_map]
pub static LOCAL: HashMap<Addr, LocalAddress, { limits::LOCAL_ADDRESSES as usize }, NO_PREALLOC> =
    HashMap::new();
#[btf_map]
pub static FLOWS: HashMap<FlowKey, Flow, { limits::FLOWS as usize }, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static FLOWS_UNREPLIED: LruHashMap<FlowKey, Flow, { limits::FLOWS_UNREPLIED as usize }> =
    LruHashMap::new();
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, { limits::AFFINITY as usize }> =
    LruHashMap::new();
#[btf_map]
pub static MAGLEV: HashMap<
    MaglevKey,
    MaglevBlock,
    { limits::MAGLEV_BLOCKS as usize },
    NO_PREALLOC,
> = HashMap::new();
/// Keys are [`RangeKey`]s: what follows the length of the prefix, as words.
#[btf_map]
pub static RANGES: LpmTrie<[u32; 5], u32, { limits::RANGES as usize }> = LpmTrie::new();
/// Keys are [`PeerKey`]s.
#[btf_map]
pub static PEERS: LpmTrie<[u32; 4], u64, { limits::PEERS as usize }> = LpmTrie::new();
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, { limits::FRAGMENTS as usize }> =
    LruHashMap::new();
#[btf_map]
static TRACES: Array<Trace, { limits::TRACES as usize }> = Array::new();
#[btf_map]
static KEPT_PORTS: Array<KeptPorts, { limits::KEPT_PORTS as usize }> = Array::new();
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { Reason::COUNT as usize }> = PerCpuArray::new();
/// Not pinned, since nothing outlives its packet.
#[btf_map]
static NOTES: PerCpuArray<Notes, 1> = PerCpuArray::new();
#[btf_map]
pub static SOCKET_PEERS: SkStorage<SocketPeers> = SkStorage::new();
#[btf_map]
pub static SOCKET_PEER: SkStorage<SocketPeer> = SkStorage::new();
#[btf_map]
static CONNECTED: Array<Connected, { limits::CONNECTED as usize }> = Array::new();

/// By the cookies of sockets.
#[btf_map]
static DATAGRAMS: LruHashMap<u64, SocketPeer, { limits::DATAGRAMS as usize }> = LruHashMap::new();

/// The place of a socket of TCP, and the word that says whose it is.
#[inline(always)]
fn connected_place(cookie: u64) -> Option<(*mut SocketPeer, *mut u64)> {
    let place = CONNECTED.get_ptr_mut(Connected::place(cookie))?;
    // SAFETY: fields of an element of the array.
    Some(unsafe { (&raw mut (*place).peer, &raw mut (*place).cookie) })
}

/// Notes what a socket of TCP is connected to; false where its place is another's.
#[inline(always)]
pub fn note_connected(cookie: u64, peer: &SocketPeer) -> bool {
    let Some((place, owner)) = connected_place(cookie) else {
        return false;
    };
    // SAFETY: an aligned word of an array's element.
    let found = unsafe { take_if_free(owner, cookie) };
    // One that is connected again has it.
    if found != 0 && found != cookie {
        return false;
    }
    // SAFETY: the socket's own, which one call at a time connects, and until then nobody is told of it.
    unsafe { place.write(*peer) };
    true
}

/// Puts a value where 0 is; gives what was there. By the kernel's instruction itself, which the compiler does not offer for this target.
///
/// # Safety
/// The word is there for as long as the call, and aligned.
#[inline(always)]
unsafe fn take_if_free(word: *mut u64, value: u64) -> u64 {
    let mut found = 0;
    // SAFETY: touches that word alone; r0 is what it is compared with, and then what it was.
    unsafe {
        asm!(
            "r0 = cmpxchg_64({word} + 0, r0, {value})",
            word = in(reg) word,
            value = in(reg) value,
            inlateout("r0") found,
            options(nostack),
        );
    }
    found
}

/// What a socket of TCP is connected to.
#[inline(always)]
pub fn connected(cookie: u64) -> Option<&'static SocketPeer> {
    let (place, owner) = connected_place(cookie)?;
    // SAFETY: one load of an aligned word; the place is the socket's own for as long as it is open, as it is in a call.
    unsafe { (owner.read_volatile() == cookie).then(|| &*place) }
}

/// Forgets a socket.
#[inline(always)]
pub fn forget_connected(cookie: u64) {
    if let Some((_, owner)) = connected_place(cookie) {
        // SAFETY: as above, and one store.
        unsafe {
            if owner.read_volatile() == cookie {
                owner.write_volatile(0);
            }
        }
    }
}

/// Notes what a datagram socket of the host is connected to.
#[inline(always)]
pub fn note_datagrams(cookie: u64, peer: &SocketPeer) {
    let _refused = DATAGRAMS.insert(&cookie, peer, BPF_ANY);
}

/// Seconds of the monotonic clock, at the resolution of a tick: far cheaper than the exact time, and timeouts need no more.
#[inline(always)]
pub fn now_s() -> u32 {
    // SAFETY: the helper has no arguments and no effect.
    (unsafe { bpf_ktime_get_coarse_ns() } / NS_PER_S) as u32
}

/// This CPU's notes, whatever the last packet left in them.
#[inline(always)]
pub fn notes() -> Option<&'static mut Notes> {
    // SAFETY: an element of the array, aligned; its zeros and whatever a hook left are valid. Packets are handled one after the
    // other on a CPU, with bottom halves off, and an entry point asks once.
    NOTES.get_ptr_mut(0).map(|notes| unsafe { &mut *notes })
}

/// The maps above.
pub struct Maps;

#[inline(always)]
fn refused(result: Result<(), i32>) -> Result<(), Refused> {
    match result {
        Ok(()) => Ok(()),
        Err(EEXIST) => Err(Refused::Exists),
        Err(_) => Err(Refused::Full),
    }
}

impl Tables for Maps {
    type Entry = Entry;

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<Lead> {
        let lead = sealed_lead(key)?;
        if lead.is_sealed_by(key.digest()) {
            return Some(lead.bare());
        }
        let found = lead_again(key);
        if found == 0 {
            return None;
        }
        Some(lead_of(found))
    }

    #[inline(always)]
    fn service(&self, id: u32) -> Option<ServiceRef> {
        let word = SERVICES.get_ptr(id)?;
        // SAFETY: an element of the array, aligned; the agent replaces it by one atomic store, this is one load.
        Some(ServiceRef::from_word(unsafe { word.read_volatile() }))
    }

    #[inline(always)]
    fn cell(&self, index: u32) -> Option<Cell> {
        BACKENDS.get(index).copied()
    }

    #[inline(always)]
    fn maglev(&self, generation: u32, position: u32) -> Option<u16> {
        let block = position / MaglevBlock::ENTRIES;
        let key = MaglevKey { generation, block };
        let slots = MAGLEV.get_ptr(&key)?;
        let at = position.wrapping_sub(block.wrapping_mul(MaglevBlock::ENTRIES));
        if at >= MaglevBlock::ENTRIES {
            return None;
        }
        // SAFETY: within the value. Of another table's entries each is a backend of this service or none, which is looked at.
        Some(unsafe { slots.cast::<u16>().add(at as usize).read() })
    }

    #[inline(always)]
    fn peer(&self, addr: &Addr) -> Option<u64> {
        let PeerKey { addr, .. } = PeerKey::new(*addr, 128);
        PEERS.get(&PrefixKey::new(PeerKey::FULL, addr)).copied()
    }

    #[inline(always)]
    fn local(&self, addr: &Addr) -> Option<LocalAddress> {
        // SAFETY: memory of a value while the program runs. Copied at once; an element goes to another address when the agent's next batch
        // enters one after a pod's was taken away, which is one packet of a pod that is gone.
        unsafe { LOCAL.get(addr) }.copied()
    }

    /// Asked with a packet: [`crate::monitor::Told::source_towards`].
    #[inline(always)]
    fn source_towards<const V6: bool>(&self, _: &Addr, _: &Addr, _: &mut Addr) -> u32 {
        SOURCE_UNKNOWN
    }

    #[inline(always)]
    fn is_kept_port(&self, protocol: u8, port: u16) -> bool {
        is_port_kept(protocol as u32, port as u32) != 0
    }

    #[inline(always)]
    fn keep_port(&self, protocol: u8, port: u16) {
        keep_port(protocol as u32, port as u32);
    }

    #[inline(always)]
    fn in_range(&self, service: u32, addr: &Addr) -> bool {
        let RangeKey { addr, .. } = RangeKey::new(service, *addr, 128);
        let words = [service, addr[0], addr[1], addr[2], addr[3]];
        RANGES.get(&PrefixKey::new(RangeKey::FULL, words)).is_some()
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        // SAFETY: plain words. An entry that another client takes meanwhile is as good as any: the backend is looked up.
        unsafe { AFFINITY.get(key) }.copied()
    }

    #[inline(always)]
    fn set_affinity(&self, key: &AffinityKey, affinity: &Affinity) {
        let _refused = AFFINITY.insert(key, affinity, BPF_ANY);
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<Entry> {
        FLOWS.get_ptr_mut(key).map(Entry::of)
    }

    #[inline(always)]
    fn insert_flow(&self, key: &FlowKey, flow: &Flow) -> Result<(), Refused> {
        refused(FLOWS.insert(key, flow, BPF_ANY))
    }

    #[inline(always)]
    fn remove_flow(&self, key: &FlowKey) {
        let _absent = FLOWS.remove(key);
    }

    #[inline(always)]
    fn unreplied(&self, key: &FlowKey) -> Option<Entry> {
        FLOWS_UNREPLIED.get_ptr_mut(key).map(Entry::of)
    }

    #[inline(always)]
    fn insert_unreplied(&self, key: &FlowKey, flow: &Flow, replace: bool) -> Result<(), Refused> {
        refused(FLOWS_UNREPLIED.insert(key, flow, if replace { BPF_ANY } else { BPF_NOEXIST }))
    }

    #[inline(always)]
    fn remove_unreplied(&self, key: &FlowKey) {
        let _absent = FLOWS_UNREPLIED.remove(key);
    }

    #[inline(always)]
    fn repeat<L: Turn<Self>>(&self, turns: u32, state: &mut L) {
        // SAFETY: the callback is what the helper asks for, and the state outlives the call.
        unsafe {
            bpf_loop(turns, turn::<L> as *mut c_void, (&raw mut *state).cast(), 0);
        }
    }

    #[inline(always)]
    fn choose(&self, service: u32, key: &FlowKey, outside: bool, picked: &mut Picked) -> u32 {
        choose_backend(service, key, outside as u32, picked)
    }

    #[inline(always)]
    fn seek(&self, flow: &Flow, asked: &FlowKey, came: u32) -> u64 {
        seek_backend(flow, asked, came)
    }

    #[inline(always)]
    fn bisect(&self, low: u32, high: u32, addr: &Addr, port: u16) -> u32 {
        bisect_backends(low, high, addr, port as u32)
    }

    #[inline(always)]
    fn enter(
        &self,
        key: &FlowKey,
        answers: &mut FlowKey,
        entry: &mut Flow,
        fresh_port: u32,
    ) -> u32 {
        enter_flow(key, answers, entry, fresh_port)
    }

    #[inline(always)]
    fn claim(&self, answers: &FlowKey, entry: &mut Flow) -> bool {
        claim_tuple(answers, entry) != 0
    }

    #[inline(always)]
    fn copy_again(&self, key: &FlowKey, copy: &mut Flow) -> bool {
        copy_flow_again(key, copy) != 0
    }

    #[inline(always)]
    fn seen_of(&self, key: &FlowKey, other: &FlowKey) -> u32 {
        seen_of_flow(key, other)
    }

    #[inline(always)]
    fn trace(&self, at: u32) -> Trace {
        match TRACES.get_ptr(at) {
            // SAFETY: an element of the array, aligned. Other CPUs write its words, each of which is right by itself.
            Some(trace) => unsafe { trace.read_volatile() },
            None => Trace::default(),
        }
    }

    #[inline(always)]
    fn leave_service(&self, at: u32, now_s: u32) {
        if let Some(trace) = TRACES.get_ptr_mut(at) {
            // SAFETY: as above.
            unsafe { (&raw mut (*trace).service_s).write_volatile(now_s) };
        }
    }

    #[inline(always)]
    fn leave_direct(&self, at: u32, tuple: u64, now_s: u32) {
        if let Some(trace) = TRACES.get_ptr_mut(at) {
            // SAFETY: as above.
            unsafe {
                (&raw mut (*trace).direct).write_volatile(tuple);
                (&raw mut (*trace).direct_s).write_volatile(now_s);
            }
        }
    }

    #[inline(always)]
    fn meets(&self, key: &FlowKey, answers: &mut FlowKey, met: &mut Flow) -> bool {
        meets_flow(key, answers, met) != 0
    }

    #[inline(always)]
    fn promote(&self, key: &FlowKey, reply: &Flow, seen: u32) {
        promote_flow(key, reply, seen);
    }

    #[inline(always)]
    fn forget(&self, key: &FlowKey, other: &FlowKey) {
        forget_flow(key, other);
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        // SAFETY: two 16-bit words; an entry evicted meanwhile costs its datagram, as if it had been evicted before.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn insert_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) {
        let _refused = FRAGMENTS.insert(key, ports, BPF_ANY);
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
            // SAFETY: this CPU's own element. An interrupt between load and store loses a count at most.
            unsafe { *counter += 1 };
        }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper has no arguments and no effect.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn now_s(&self) -> u32 {
        now_s()
    }
}

/// One turn of a loop, for the helper that takes them. Ends it by 1.
#[inline(never)]
unsafe extern "C" fn turn<L: Turn<Maps>>(_index: u64, state: *mut L) -> i64 {
    // SAFETY: the loop's own, for as long as it lasts.
    let goes_on = unsafe { &mut *state }.turn(&Maps);
    // The compiler knows that a global function gives 0 or 1, and the verifier does not: it is to see that it is compared.
    (black_box(goes_on as u32) == 0) as i64
}

/// Whether clients keep their addresses at a port. Functions of their own, for the stack: each has a key on it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_port_kept(protocol: u32, port: u32) -> u32 {
    let (block, at) = KeptPorts::place(protocol as u8, port as u16);
    match KEPT_PORTS.get_ptr(block) {
        // SAFETY: a byte within an element of the array; it only ever goes from 0 to 1.
        Some(ports) => unsafe {
            let at = (at % KeptPorts::PORTS) as usize;
            ports.cast::<u8>().add(at).read_volatile() as u32
        },
        None => 0,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn keep_port(protocol: u32, port: u32) -> u32 {
    let (block, at) = KeptPorts::place(protocol as u8, port as u16);
    if let Some(ports) = KEPT_PORTS.get_ptr_mut(block) {
        let at = (at % KeptPorts::PORTS) as usize;
        // SAFETY: as above.
        unsafe { ports.cast::<u8>().add(at).write_volatile(1) };
    }
    0
}

/// What a frontend's element holds, each word of it read at once.
#[inline(always)]
fn sealed_lead(key: &FrontendKey) -> Option<Lead> {
    let words = FRONTENDS.get_ptr(key)?.cast::<u64>();
    // SAFETY: the two words of a value, aligned, memory of one while the program runs.
    Some(Lead::of_words(unsafe {
        [words.read_volatile(), words.add(1).read_volatile()]
    }))
}

/// A lead in a register, and 0 for none.
const LEAD_FOUND: u64 = 1 << 63;
const EXTERNAL_SHIFT: u32 = 20;
const FLAGS_SHIFT: u32 = 40;

/// How often a frontend is looked up anew whose element went to another key as it was read. Where one is written without a pause, one look in
/// a thousand finds that.
const LOOKS_AGAIN_MAX: u32 = 3;

/// Looks a frontend up whose element went to another key as it was read: it has another element by now, or none. Rare, and so a global
/// function, as those below.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lead_again(key: *const FrontendKey) -> u64 {
    // SAFETY: as below.
    let Some(key) = (unsafe { key.as_ref() }) else {
        return 0;
    };
    for _ in 0..LOOKS_AGAIN_MAX {
        let Some(lead) = sealed_lead(key) else {
            return 0;
        };
        if lead.is_sealed_by(key.digest()) {
            let lead = lead.bare();
            return LEAD_FOUND
                | lead.internal as u64
                | (lead.external as u64) << EXTERNAL_SHIFT
                | (lead.flags as u64) << FLAGS_SHIFT;
        }
    }
    0
}

#[inline(always)]
const fn lead_of(found: u64) -> Lead {
    const ID: u64 = limits::SERVICES as u64 - 1;
    Lead::new(
        (found & ID) as u32,
        (found >> EXTERNAL_SHIFT & ID) as u32,
        (found >> FLAGS_SHIFT & 0xff) as u32,
    )
}

/// [`flow::enter`] as a global function: the verifier judges it once, by itself, where it would walk any other anew on each path that
/// leads to it. It holds that such a function's pointers may be null.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn enter_flow(
    key: *const FlowKey,
    answers: *mut FlowKey,
    entry: *mut Flow,
    fresh_port: u32,
) -> u32 {
    // SAFETY: null or references of the caller's, the only one, for as long as the call; the verifier holds callers to their sizes.
    let (key, answers, entry) = unsafe { (key.as_ref(), answers.as_mut(), entry.as_mut()) };
    match (key, answers, entry) {
        (Some(key), Some(answers), Some(entry)) => {
            flow::enter(&Maps, key, answers, entry, fresh_port)
        }
        _ => u32::MAX,
    }
}

/// [`flow::copy_again`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn copy_flow_again(key: *const FlowKey, copy: *mut Flow) -> u32 {
    // SAFETY: as above.
    match unsafe { (key.as_ref(), copy.as_mut()) } {
        (Some(key), Some(copy)) => flow::copy_again(&Maps, key, copy) as u32,
        _ => 0,
    }
}

/// [`flow::seen_of`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn seen_of_flow(key: *const FlowKey, other: *const FlowKey) -> u32 {
    // SAFETY: as above.
    match unsafe { (key.as_ref(), other.as_ref()) } {
        (Some(key), Some(other)) => flow::seen_of(&Maps, key, other),
        _ => 0,
    }
}

/// [`flow::claim`], likewise: each of many attempts costs the verifier a call.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn claim_tuple(answers: *const FlowKey, entry: *mut Flow) -> u32 {
    // SAFETY: as above.
    match unsafe { (answers.as_ref(), entry.as_mut()) } {
        (Some(answers), Some(entry)) => flow::claim(&Maps, answers, entry) as u32,
        _ => 0,
    }
}

/// [`trace::meets`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn meets_flow(key: *const FlowKey, answers: *mut FlowKey, met: *mut Flow) -> u32 {
    // SAFETY: as above.
    match unsafe { (key.as_ref(), answers.as_mut(), met.as_mut()) } {
        (Some(key), Some(answers), Some(met)) => trace::meets(&Maps, key, answers, met) as u32,
        _ => 0,
    }
}

/// What choosing came to when its arguments are null, which they are not: the service is torn.
const NOWHERE: u32 = u32::MAX;

/// [`balance::choose_for`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
fn choose_backend(service: u32, key: *const FlowKey, outside: u32, picked: *mut Picked) -> u32 {
    // SAFETY: as above.
    match unsafe { (key.as_ref(), picked.as_mut()) } {
        (Some(key), Some(picked)) => balance::choose_for(&Maps, service, key, outside != 0, picked),
        _ => NOWHERE,
    }
}

/// [`balance::seek`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
fn seek_backend(flow: *const Flow, asked: *const FlowKey, came: u32) -> u64 {
    // SAFETY: as above.
    match unsafe { (flow.as_ref(), asked.as_ref()) } {
        (Some(flow), Some(asked)) => balance::seek(&Maps, flow, asked, came),
        _ => 0,
    }
}

/// [`balance::bisect`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn bisect_backends(low: u32, high: u32, addr: *const Addr, port: u32) -> u32 {
    // SAFETY: as above.
    match unsafe { addr.as_ref() } {
        Some(addr) => balance::bisect(&Maps, low, high, addr, port as u16),
        None => u32::MAX,
    }
}

/// [`flow::forget`], likewise. It comes to nothing, but functions that give nothing are not judged by themselves.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn forget_flow(key: *const FlowKey, other: *const FlowKey) -> u32 {
    // SAFETY: as above.
    if let (Some(key), Some(other)) = unsafe { (key.as_ref(), other.as_ref()) } {
        flow::forget(&Maps, key, other);
    }
    0
}

/// [`flow::advance`], likewise. It comes to nothing, but functions that give nothing are not judged by themselves.
#[unsafe(no_mangle)]
#[inline(never)]
fn promote_flow(key: *const FlowKey, reply: *const Flow, seen: u32) -> u32 {
    // SAFETY: as above.
    if let (Some(key), Some(reply)) = unsafe { (key.as_ref(), reply.as_ref()) } {
        flow::advance(&Maps, key, reply, seen);
    }
    0
}
