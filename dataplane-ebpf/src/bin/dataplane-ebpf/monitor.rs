//! Telling of packets while somebody listens: a ring that the agent reads, and a word by which it says what it wants.
//!
//! While nobody listens, a drop or a new flow costs one load more, and other packets nothing.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MMAPABLE},
    btf_maps::{Array, RingBuf},
    helpers::generated::{
        bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_prandom_u32, bpf_ktime_get_ns,
        bpf_skb_load_bytes,
    },
    macros::btf_map,
};
use dataplane_abi::{
    Addr, Affinity, AffinityKey, CAPTURE_LEN, Cell, Class, Flow, FlowKey, FragmentKey,
    FragmentPorts, FrontendKey, Hook, Lead, LocalAddress, MONITOR_LOST, MONITOR_WANTED,
    MONITOR_WORDS, PacketEvent, Reason, ServiceRef, SocketEvent, SocketPeer, Trace, Wanted, limits,
};
use dataplane_ebpf::tables::{Refused, Tables};

use crate::maps::{Entry, Maps};

#[btf_map]
pub static EVENTS: RingBuf<PacketEvent, { limits::EVENTS_BYTES as usize }> = RingBuf::new();
#[btf_map]
pub static MONITOR: Array<u64, { MONITOR_WORDS as usize }, { BPF_F_MMAPABLE as usize }> =
    Array::new();

/// The maps, for the packets of one hook: what is counted is also told.
pub struct Watched<P> {
    maps: Maps,
    packet: P,
    hook: Hook,
}

/// A packet that can be told of.
pub trait Told {
    fn tell(&self, hook: u32, reason: u32);
}

impl<P: Told> Watched<P> {
    #[inline(always)]
    pub fn new(packet: P, hook: Hook) -> Self {
        Self {
            maps: Maps,
            packet,
            hook,
        }
    }
}

macro_rules! forward {
    ($($name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        $(
            #[inline(always)]
            fn $name(&self, $($argument: $type),*) $(-> $result)? {
                self.maps.$name($($argument),*)
            }
        )*
    };
}

impl<P: Told> Tables for Watched<P> {
    type Entry = Entry;

    forward! {
        frontend(key: &FrontendKey) -> Option<Lead>;
        service(id: u32) -> Option<ServiceRef>;
        cell(index: u32) -> Option<Cell>;
        maglev(generation: u32, position: u32) -> Option<u16>;
        peer(addr: &Addr) -> Option<u64>;
        local(addr: &Addr) -> Option<LocalAddress>;
        in_range(service: u32, addr: &Addr) -> bool;
        affinity(key: &AffinityKey) -> Option<Affinity>;
        set_affinity(key: &AffinityKey, affinity: &Affinity);
        flow(key: &FlowKey) -> Option<Entry>;
        insert_flow(key: &FlowKey, flow: &Flow) -> Result<(), Refused>;
        remove_flow(key: &FlowKey);
        unreplied(key: &FlowKey) -> Option<Entry>;
        insert_unreplied(key: &FlowKey, flow: &Flow, replace: bool) -> Result<(), Refused>;
        remove_unreplied(key: &FlowKey);
        enter(key: &FlowKey, answers: &mut FlowKey, entry: &mut Flow, fresh_port: u32) -> u32;
        claim(answers: &FlowKey, entry: &Flow) -> bool;
        trace(at: u32) -> Trace;
        leave_service(at: u32, now_s: u32);
        leave_direct(at: u32, tuple: u64, now_s: u32);
        meets(key: &FlowKey, answers: &mut FlowKey) -> bool;
        fragment(key: &FragmentKey) -> Option<FragmentPorts>;
        insert_fragment(key: &FragmentKey, ports: &FragmentPorts);
        random() -> u32;
        now_s() -> u32;
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        self.maps.count(reason);
        // Known where this is inlined: other events leave no trace here.
        match (reason.class(), reason) {
            (Class::Event, Reason::FlowCreated) => {
                // SAFETY: the helper has no arguments and no effect.
                if wanted().drops() && wanted().flow(unsafe { bpf_get_prandom_u32() }) {
                    self.packet.tell(self.hook as u32, reason as u32);
                }
            }
            (Class::Event, _) => {}
            (Class::Drop | Class::Reject, _) => {
                if wanted().drops() {
                    self.packet.tell(self.hook as u32, reason as u32);
                }
            }
        }
    }
}

#[inline(always)]
fn wanted() -> Wanted {
    match MONITOR.get_ptr(MONITOR_WANTED) {
        // SAFETY: an element of the array, aligned; the agent replaces it by one store, this is one load.
        Some(word) => Wanted(unsafe { word.read_volatile() }),
        None => Wanted::default(),
    }
}

impl Told for *mut __sk_buff {
    #[inline(always)]
    fn tell(&self, hook: u32, reason: u32) {
        tell_buffer(*self, hook, reason);
    }
}

/// One function, not inlined, so that reasons cost the programs little.
#[inline(never)]
fn tell_buffer(skb: *mut __sk_buff, hook: u32, reason: u32) {
    // SAFETY: a valid context.
    let (ifindex, len) = unsafe { ((*skb).ifindex, (*skb).len) };
    tell(hook, reason, ifindex, len, |data, bytes| {
        // SAFETY: a valid context, and memory for so many bytes.
        unsafe { bpf_skb_load_bytes(skb.cast(), 0, data, bytes) == 0 }
    });
}

/// Writes an event. `load` copies so many bytes of the packet's beginning, if it has them.
#[inline(always)]
pub fn tell(
    hook: u32,
    reason: u32,
    ifindex: u32,
    len: u32,
    load: impl Fn(*mut core::ffi::c_void, u32) -> bool,
) {
    let Some(mut entry) = EVENTS.reserve(0) else {
        lost();
        return;
    };
    let event: *mut PacketEvent = entry.as_mut_ptr();
    // SAFETY: the ring gives memory for an event, all of which is written before it is submitted. Bytes are
    // loaded in fixed sizes: the verifier takes a computed one only with a proof that it is not zero.
    unsafe {
        (*event).time_ns = bpf_ktime_get_ns();
        (*event).reason = reason;
        (*event).hook = hook;
        (*event).ifindex = ifindex;
        (*event).len = len;
        (*event).pad = 0;
        let data: *mut core::ffi::c_void = (&raw mut (*event).data).cast();
        // The shortest is an IPv4 header with the ports. A load that fails leaves zeros.
        (*event).captured = if load(data, CAPTURE_LEN as u32) {
            CAPTURE_LEN as u32
        } else if load(data, SHORT_LEN) {
            SHORT_LEN
        } else if load(data, SHORTEST_LEN) {
            SHORTEST_LEN
        } else {
            0
        };
    }
    entry.submit(0);
}

/// Tells of a call that a socket's new destination came of, as of a flow.
#[inline(always)]
pub fn socket(peer: &SocketPeer, protocol: u8) {
    // SAFETY: the helper has no arguments and no effect.
    if wanted().drops() && wanted().flow(unsafe { bpf_get_prandom_u32() }) {
        tell_socket(peer, protocol as u32);
    }
}

#[inline(always)]
fn tell_socket(peer: &SocketPeer, protocol: u32) {
    let Some(mut entry) = EVENTS.reserve(0) else {
        lost();
        return;
    };
    let event: *mut PacketEvent = entry.as_mut_ptr();
    // SAFETY: memory for an event, all of which is written before it is submitted; a socket's event fits its data.
    unsafe {
        (*event).time_ns = bpf_ktime_get_ns();
        (*event).reason = Reason::SocketTranslated as u32;
        (*event).hook = Hook::Socket as u32;
        (*event).ifindex = 0;
        (*event).len = 0;
        (*event).captured = size_of::<SocketEvent>() as u32;
        (*event).pad = 0;
        let words = &raw mut (*event).data;
        // What lies behind the socket's event.
        (*words)[9] = 0;
        (*words)[10] = 0;
        (*words)[11] = 0;
        let told: *mut SocketEvent = words.cast();
        (*told).peer = *peer;
        (*told).pid = (bpf_get_current_pid_tgid() >> 32) as u32;
        (*told).proto = protocol;
        bpf_get_current_comm((&raw mut (*told).comm).cast(), 16);
    }
    entry.submit(0);
}

#[inline(always)]
fn lost() {
    if let Some(lost) = MONITOR.get_ptr_mut(MONITOR_LOST) {
        // SAFETY: an element of the array, aligned. A count that two CPUs make at once may be one.
        unsafe { *lost += 1 };
    }
}

/// Ethernet, IPv6 and ports; also TCP over IPv4 without options.
const SHORT_LEN: u32 = 54;
/// Ethernet, IPv4 and eight bytes more.
const SHORTEST_LEN: u32 = 42;
