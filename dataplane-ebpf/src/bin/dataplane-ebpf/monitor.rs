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
use dataplane_ebpf::{
    balance::Picked,
    follow::{self, Asking, Followed},
    hook::{Features, Notes},
    packet::Packet,
    tables::{Refused, SOURCE_UNKNOWN, Tables},
};

use crate::{
    entry::Entry,
    features,
    maps::Maps,
    packets::{Skb, source_towards_v4, source_towards_v6},
};

#[btf_map]
pub static EVENTS: RingBuf<PacketEvent, { limits::EVENTS_BYTES as usize }> = RingBuf::new();
#[btf_map]
pub static MONITOR: Array<u64, { MONITOR_WORDS as usize }, { BPF_F_MMAPABLE as usize }> =
    Array::new();

/// The maps, for the packets of one hook: what is counted is also told.
pub struct Watched<P> {
    maps: Maps,
    packet: P,
    hook: u32,
}

/// A packet that can be told of.
pub trait Told: Sized {
    fn tell(&self, hook: u32, reason: u32);

    /// [`Tables::open`] and [`Tables::open_directly`] of this packet.
    #[inline(always)]
    fn open<const V6: bool>(
        tables: &Watched<Self>,
        features: &Features,
        notes: &mut Notes,
        asking: u32,
    ) -> u32 {
        follow::open::<V6, _>(tables, features, notes, asking)
    }
    #[inline(always)]
    fn open_directly(tables: &Watched<Self>, notes: &mut Notes, _asking: u32) -> u32 {
        follow::open_directly(tables, notes)
    }

    /// [`Tables::source_towards`] of this packet. What a driver sends on leaves by the uplink that it came by, which is the first.
    #[inline(always)]
    fn source_towards<const V6: bool>(&self, _: &Addr, _: &Addr, _: &mut Addr) -> u32 {
        SOURCE_UNKNOWN
    }

    /// [`Tables::portless`] of this packet.
    #[inline(always)]
    fn portless<const V6: bool, P: Packet>(
        tables: &Watched<Self>,
        packet: &mut P,
        notes: &mut Notes,
        asking: u32,
    ) -> u32 {
        follow::portless::<V6, _, _>(packet, tables, notes, asking)
    }
}

impl<P: Told> Watched<P> {
    #[inline(always)]
    pub fn new(packet: P, hook: Hook) -> Self {
        Self::of(packet, hook as u32)
    }

    /// By the number of the hook.
    #[inline(always)]
    fn of(packet: P, hook: u32) -> Self {
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
        is_kept_port(protocol: u8, port: u16) -> bool;
        keep_port(protocol: u8, port: u16);
        in_range(service: u32, addr: &Addr) -> bool;
        affinity(key: &AffinityKey) -> Option<Affinity>;
        set_affinity(key: &AffinityKey, affinity: &Affinity);
        flow(key: &FlowKey) -> Option<Entry>;
        insert_flow(key: &FlowKey, flow: &Flow) -> Result<(), Refused>;
        remove_flow(key: &FlowKey);
        unreplied(key: &FlowKey) -> Option<Entry>;
        insert_unreplied(key: &FlowKey, flow: &Flow, replace: bool) -> Result<(), Refused>;
        remove_unreplied(key: &FlowKey);
        choose(service: u32, key: &FlowKey, outside: bool, picked: &mut Picked) -> u32;
        seek(flow: &Flow, asked: &FlowKey, came: u32) -> u64;
        bisect(low: u32, high: u32, addr: &Addr, port: u16) -> u32;
        copy_again(key: &FlowKey, copy: &mut Flow) -> bool;
        seen_of(key: &FlowKey, other: &FlowKey) -> u32;
        enter(key: &FlowKey, answers: &mut FlowKey, entry: &mut Flow, fresh_port: u32) -> u32;
        claim(answers: &FlowKey, entry: &mut Flow) -> bool;
        trace(at: u32) -> Trace;
        leave_service(at: u32, now_s: u32);
        leave_direct(at: u32, tuple: u64, now_s: u32);
        meets(key: &FlowKey, answers: &mut FlowKey, met: &mut Flow) -> bool;
        promote(key: &FlowKey, reply: &Flow, seen: u32);
        forget(key: &FlowKey, other: &FlowKey);
        fragment(key: &FragmentKey) -> Option<FragmentPorts>;
        insert_fragment(key: &FragmentKey, ports: &FragmentPorts);
        random() -> u32;
        now_s() -> u32;
    }

    #[inline(always)]
    fn source_towards<const V6: bool>(&self, src: &Addr, dst: &Addr, source: &mut Addr) -> u32 {
        self.packet.source_towards::<V6>(src, dst, source)
    }

    #[inline(always)]
    fn ask(&self, _features: &Features, notes: &mut Notes, asking: u32) -> u32 {
        ask_service(notes, asking)
    }

    #[inline(always)]
    fn open<const V6: bool>(&self, features: &Features, notes: &mut Notes, asking: u32) -> u32 {
        P::open::<V6>(self, features, notes, asking)
    }

    #[inline(always)]
    fn open_directly(&self, notes: &mut Notes, asking: u32) -> u32 {
        P::open_directly(self, notes, asking)
    }

    #[inline(always)]
    fn portless<const V6: bool, Q: Packet>(
        &self,
        packet: &mut Q,
        notes: &mut Notes,
        asking: u32,
    ) -> u32 {
        P::portless::<V6, Q>(self, packet, notes, asking)
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        self.maps.count(reason);
        // Known where this is inlined: other events leave no trace here.
        match (reason.class(), reason) {
            (Class::Event, Reason::FlowCreated) => {
                // SAFETY: the helper has no arguments and no effect.
                if wanted().drops() && wanted().flow(unsafe { bpf_get_prandom_u32() }) {
                    self.packet.tell(self.hook, reason as u32);
                }
            }
            (Class::Event, _) => {}
            (Class::Drop | Class::Reject, _) => {
                if wanted().drops() {
                    self.packet.tell(self.hook, reason as u32);
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

    #[inline(always)]
    fn open<const V6: bool>(
        tables: &Watched<Self>,
        _features: &Features,
        notes: &mut Notes,
        asking: u32,
    ) -> u32 {
        let asking = asking | tables.hook << HOOK_SHIFT;
        match V6 {
            true => open_flow_v6(tables.packet, notes, asking),
            false => open_flow_v4(tables.packet, notes, asking),
        }
    }

    #[inline(always)]
    fn open_directly(tables: &Watched<Self>, notes: &mut Notes, asking: u32) -> u32 {
        let asking = asking | tables.hook << HOOK_SHIFT;
        open_direct_flow(tables.packet, notes, asking)
    }

    #[inline(always)]
    fn source_towards<const V6: bool>(&self, src: &Addr, dst: &Addr, source: &mut Addr) -> u32 {
        match V6 {
            true => source_towards_v6(*self, src, dst, source),
            false => source_towards_v4(*self, src, dst, source),
        }
    }

    #[inline(always)]
    fn portless<const V6: bool, P: Packet>(
        tables: &Watched<Self>,
        _packet: &mut P,
        notes: &mut Notes,
        asking: u32,
    ) -> u32 {
        let asking = asking | tables.hook << HOOK_SHIFT;
        match V6 {
            true => follow_portless_v6(tables.packet, notes, asking),
            false => follow_portless_v4(tables.packet, notes, asking),
        }
    }
}

/// Where an [`Asking`] has the hook.
const HOOK_SHIFT: u32 = 24;

/// [`follow::ask`] as a global function, as below.
#[unsafe(no_mangle)]
#[inline(never)]
fn ask_service(notes: *mut Notes, asking: u32) -> u32 {
    // SAFETY: null or the caller's, the only one, for as long as the call; the verifier holds callers to the size.
    let Some(notes) = (unsafe { notes.as_mut() }) else {
        return u32::MAX;
    };
    follow::ask(&Maps, &features_of(asking), notes, asking)
}

/// The features that go with an [`Asking`].
#[inline(always)]
fn features_of(asking: u32) -> Features {
    let features = features();
    Features {
        by_overlay: features.overlay && Asking(asking).by_overlay(),
        ..features
    }
}

/// [`follow::open`] as a global function of each family, which the verifier judges by itself, once, whatever its arguments, where it would
/// walk any other anew on each path that leads to it. It holds that such a function's pointers, the context apart, may be null.
#[unsafe(no_mangle)]
#[inline(never)]
fn open_flow_v4(skb: *mut __sk_buff, notes: *mut Notes, asking: u32) -> u32 {
    open_flow::<false>(skb, notes, asking)
}

#[unsafe(no_mangle)]
#[inline(never)]
fn open_flow_v6(skb: *mut __sk_buff, notes: *mut Notes, asking: u32) -> u32 {
    open_flow::<true>(skb, notes, asking)
}

#[inline(always)]
fn open_flow<const V6: bool>(skb: *mut __sk_buff, notes: *mut Notes, asking: u32) -> u32 {
    // SAFETY: as above.
    let Some(notes) = (unsafe { notes.as_mut() }) else {
        return u32::MAX;
    };
    let tables = Watched::of(skb, asking >> HOOK_SHIFT);
    follow::open::<V6, _>(&tables, &features_of(asking), notes, asking)
}

/// [`follow::open_directly`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
fn open_direct_flow(skb: *mut __sk_buff, notes: *mut Notes, asking: u32) -> u32 {
    // SAFETY: as above.
    let Some(notes) = (unsafe { notes.as_mut() }) else {
        return u32::MAX;
    };
    follow::open_directly(&Watched::of(skb, asking >> HOOK_SHIFT), notes)
}

/// [`follow::portless`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
fn follow_portless_v4(skb: *mut __sk_buff, notes: *mut Notes, asking: u32) -> u32 {
    follow_portless::<false>(skb, notes, asking)
}

#[unsafe(no_mangle)]
#[inline(never)]
fn follow_portless_v6(skb: *mut __sk_buff, notes: *mut Notes, asking: u32) -> u32 {
    follow_portless::<true>(skb, notes, asking)
}

#[inline(always)]
fn follow_portless<const V6: bool>(skb: *mut __sk_buff, notes: *mut Notes, asking: u32) -> u32 {
    // SAFETY: as above.
    let Some(notes) = (unsafe { notes.as_mut() }) else {
        return Followed::Dropped as u32;
    };
    let tables = Watched::of(skb, asking >> HOOK_SHIFT);
    follow::portless::<V6, _, _>(&mut Skb::of(skb), &tables, notes, asking)
}

/// One global function, so that reasons cost the programs and the verifier little.
#[unsafe(no_mangle)]
#[inline(never)]
fn tell_buffer(skb: *mut __sk_buff, hook: u32, reason: u32) -> u32 {
    // SAFETY: a valid context.
    let (ifindex, len) = unsafe { ((*skb).ifindex, (*skb).len) };
    tell(hook, reason, ifindex, len, |data, bytes| {
        // SAFETY: a valid context, and memory for so many bytes.
        unsafe { bpf_skb_load_bytes(skb.cast(), 0, data, bytes) == 0 }
    });
    0
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

/// A function of its own, since it is rare.
#[inline(never)]
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
