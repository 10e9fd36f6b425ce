//! The program at an uplink's driver (XDP): [`Packet`] over its frame, and sending it out again.

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibLookup,
        xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
        xdp_md,
    },
    helpers::generated::{bpf_fib_lookup, bpf_xdp_adjust_tail, bpf_xdp_load_bytes},
    macros::xdp,
    programs::XdpContext,
};
use core::mem::MaybeUninit;
use dataplane_abi::{FlowKey, Hook, Plain, Reason};
use dataplane_ebpf::{
    early::{self, Early},
    hook::Notes,
    packet::{ChecksumChange, Ip, Packet, is_ipv6},
    tables::Tables as _,
    translate::translate,
};

use crate::{
    UPLINK_MAC, features,
    maps::{Maps, notes},
    monitor::{Told, Watched, tell},
    packets::{blank, crc32c_change, set_ends},
};

/// A frame as it lies in the driver's memory.
pub struct Frame(*mut xdp_md);

impl Frame {
    /// Where the bytes at `offset` are, when the frame has them.
    #[inline(always)]
    fn at<T: Plain>(&self, offset: usize) -> Option<*mut T> {
        // SAFETY: a valid context.
        let (start, end) = unsafe {
            (
                (*self.0).data as usize + offset,
                (*self.0).data_end as usize,
            )
        };
        if start + size_of::<T>() > end {
            return None;
        }
        Some(start as *mut T)
    }
}

impl Packet for Frame {
    #[inline(always)]
    fn read<T: Plain>(&self, offset: usize) -> Option<T> {
        // SAFETY: the bytes lie before the end; as for socket buffers, the machine loads words from any address.
        self.at::<T>(offset).map(|at| unsafe { at.read() })
    }

    #[inline(always)]
    fn write<T: Plain>(&mut self, offset: usize, value: &T) -> bool {
        match self.at::<T>(offset) {
            // SAFETY: as above; a frame is this program's alone.
            Some(at) => unsafe {
                at.write(*value);
                true
            },
            None => false,
        }
    }

    /// A frame's checksums are whole: no hardware is yet to complete them. (A veth's other end may hand over some that are not; see
    /// docs/uplink.md.)
    #[inline(always)]
    fn patch_checksum(&mut self, offset: usize, change: ChecksumChange) -> bool {
        let Some(field) = self.read::<u16>(offset) else {
            return false;
        };
        self.write(offset, &change.applied_to(field))
    }

    #[inline(always)]
    fn crc32c_change(&self, difference: u32, len: u32) -> u32 {
        crc32c_change(difference, len)
    }

    #[inline(always)]
    fn resize(&mut self, len: u32) -> bool {
        // SAFETY: a valid context.
        unsafe {
            let now = (*self.0).data_end - (*self.0).data;
            bpf_xdp_adjust_tail(self.0, len as i32 - now as i32) == 0
        }
    }

    #[inline(always)]
    fn translate<const V6: bool>(&mut self, ip: &Ip, to: &FlowKey) -> bool {
        let done = match V6 {
            true => translate_frame_v6(self.0, ip, to),
            false => translate_frame_v4(self.0, ip, to),
        };
        done != 0
    }
}

/// [`translate`] as a global function of each family, as for socket buffers.
#[unsafe(no_mangle)]
#[inline(never)]
fn translate_frame_v4(frame: *mut xdp_md, ip: *const Ip, to: *const FlowKey) -> u32 {
    // SAFETY: null or references of the caller's for as long as the call; the verifier holds callers to their sizes.
    match unsafe { (ip.as_ref(), to.as_ref()) } {
        (Some(ip), Some(to)) => translate::<false, _>(&mut Frame(frame), ip, to) as u32,
        _ => 0,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
fn translate_frame_v6(frame: *mut xdp_md, ip: *const Ip, to: *const FlowKey) -> u32 {
    // SAFETY: as above.
    match unsafe { (ip.as_ref(), to.as_ref()) } {
        (Some(ip), Some(to)) => translate::<true, _>(&mut Frame(frame), ip, to) as u32,
        _ => 0,
    }
}

impl Told for Frame {
    #[inline(always)]
    fn tell(&self, hook: u32, reason: u32) {
        tell_frame(self.0, hook, reason);
    }
}

/// A function of its own, as the one for socket buffers.
#[inline(never)]
fn tell_frame(frame: *mut xdp_md, hook: u32, reason: u32) {
    // SAFETY: a valid context.
    let (ifindex, len) = unsafe { ((*frame).ingress_ifindex, (*frame).data_end - (*frame).data) };
    tell(hook, reason, ifindex, len, |data, bytes| {
        // SAFETY: a valid context, and memory for so many bytes.
        unsafe { bpf_xdp_load_bytes(frame, 0, data, bytes) == 0 }
    });
}

/// The frame's own address is the uplink's. A switch floods what it does not know, and groups are not ours.
#[inline(always)]
fn is_for_us(frame: &Frame) -> bool {
    let mac = UPLINK_MAC.load();
    match frame.read::<[u16; 3]>(0) {
        Some([a, b, c]) => mac == (a as u64 | (b as u64) << 16 | (c as u64) << 32),
        None => false,
    }
}

/// What comes from outside, before the stack sees it.
#[xdp]
pub fn uplink_early(ctx: XdpContext) -> u32 {
    let frame = Frame(ctx.ctx);
    if !is_for_us(&frame) {
        return XDP_PASS;
    }
    match is_ipv6(&frame) {
        true => uplink_early_v6(ctx.ctx),
        false => uplink_early_v4(ctx.ctx),
    }
}

#[inline(never)]
fn uplink_early_v4(ctx: *mut xdp_md) -> u32 {
    from_driver::<false>(ctx)
}

#[inline(never)]
fn uplink_early_v6(ctx: *mut xdp_md) -> u32 {
    from_driver::<true>(ctx)
}

#[inline(always)]
fn from_driver<const V6: bool>(ctx: *mut xdp_md) -> u32 {
    let Some(notes) = notes() else {
        return XDP_PASS;
    };
    let mut frame = Frame(ctx);
    let tables = Watched::new(Frame(ctx), Hook::UplinkEarly);
    let reason = match early::uplink_early::<V6, _, _>(&frame, &tables, &features(), notes) {
        Early::Leave => return XDP_PASS,
        Early::Forward(reason) => reason,
    };
    let mut macs = [0u16; 6];
    if !leads_back::<V6>(ctx, notes, &mut macs) {
        return XDP_PASS;
    }
    // From here on the frame is no longer what came, and what fails is lost.
    if !frame.translate::<V6>(&notes.ip, &notes.to) || !frame.write(0, &macs) {
        tables.count(Reason::RewriteFailed);
        return XDP_DROP;
    }
    Maps.count(reason);
    Maps.count(Reason::SentEarly);
    XDP_TX
}

/// Whether the way to where a packet goes now is known, fits it, and leads out where it came in; writes down by which hardware
/// addresses. A function of its own, for the stack (see [`Notes`]).
#[inline(never)]
fn leads_back<const V6: bool>(ctx: *mut xdp_md, notes: &Notes, macs: &mut [u16; 6]) -> bool {
    let (to, ip) = (&notes.to, &notes.ip);
    // SAFETY: a plain struct of integers, for which zero is valid; a valid context; the helper gets the struct's true size.
    unsafe {
        let mut fib = MaybeUninit::uninit();
        let fib: &mut FibLookup = blank(&mut fib);
        let ingress = (*ctx).ingress_ifindex;
        fib.ifindex = ingress;
        fib.l4_protocol = to.proto;
        // With a length the route's own MTU is asked.
        fib.__bindgen_anon_1.tot_len = ip.total_len as u16;
        if !set_ends::<V6>(fib, &to.src, &to.dst) {
            return false;
        }
        let result = bpf_fib_lookup(ctx.cast(), fib, size_of::<FibLookup>() as i32, 0) as u32;
        if result != BPF_FIB_LKUP_RET_SUCCESS || fib.ifindex != ingress {
            return false;
        }
        let (next, own) = (fib.dmac, fib.smac);
        let pair = |mac: &[u8; 6], at: usize| u16::from_ne_bytes([mac[at], mac[at + 1]]);
        *macs = [
            pair(&next, 0),
            pair(&next, 2),
            pair(&next, 4),
            pair(&own, 0),
            pair(&own, 2),
            pair(&own, 4),
        ];
        true
    }
}
