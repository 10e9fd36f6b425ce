//! The collector of flows: a program that nothing attaches, which the agent runs by BPF_PROG_TEST_RUN. It walks the table in the kernel, so that
//! an entry is judged and deleted at once; judged in user space, it could come to life in between.

use aya_ebpf::{
    EbpfContext as _, bindings::__sk_buff, helpers::generated::bpf_for_each_map_elem,
    macros::classifier, programs::TcContext,
};
use core::ffi::c_void;
use dataplane_abi::{Flow, FlowKey, SEEN, SEEN_DISPATCHED, proto, timeout_s};
use dataplane_ebpf::{
    tables::{FlowEntry as _, Tables as _},
    trace,
};

use crate::{
    entry::Entry,
    maps::{FLOWS, FLOWS_UNREPLIED, Maps, now_s},
};

/// What the walk carries from entry to entry.
#[repr(C)]
struct Walk {
    now_s: u32,
    /// See [`timeout_s`].
    pressure: u32,
    removed: u32,
    kept: u32,
}

/// Removes the flows whose time is up, and leaves the traces of datagrams' flows anew. Takes the pressure in the mark of its packet; leaves in
/// the mark how many entries it removed, and in the first control word how many answered ones it left.
#[classifier]
pub fn collect(ctx: TcContext) -> i32 {
    let skb: *mut __sk_buff = ctx.as_ptr().cast();
    // SAFETY: a valid context, whose mark and control words may be used; the maps and the callbacks are what the helper asks for,
    // and the walk outlives the calls.
    unsafe {
        let mut walk = Walk {
            now_s: now_s(),
            pressure: (*skb).mark,
            removed: 0,
            kept: 0,
        };
        bpf_for_each_map_elem(
            core::ptr::addr_of!(FLOWS).cast_mut().cast(),
            visit as *mut c_void,
            (&raw mut walk).cast(),
            0,
        );
        bpf_for_each_map_elem(
            core::ptr::addr_of!(FLOWS_UNREPLIED).cast_mut().cast(),
            visit_unreplied as *mut c_void,
            (&raw mut walk).cast(),
            0,
        );
        (*skb).mark = walk.removed;
        (*skb).cb[0] = walk.kept;
    }
    0
}

/// Judges one entry. Both sides of a flow come to the same judgement, whichever is met first.
#[inline(never)]
unsafe extern "C" fn visit(
    _map: *mut c_void,
    key: *const FlowKey,
    flow: *mut Flow,
    walk: *mut Walk,
) -> i64 {
    // SAFETY: the helper gives valid pointers; the walk is the caller's.
    let (key, walk) = unsafe { (&*key, &mut *walk) };
    let (key, mut copy) = (key.again(), Flow::NONE);
    if !Entry::of(flow).copy(&key, &mut copy) {
        return 0;
    }
    let (key, flow) = (&key, &copy);
    let (mut last_s, mut seen_other) = (flow.last_seen_s, 0);
    // The other side may be of another flow by now, and this one left over.
    let mut is_whole = false;
    if let Some(other) = Maps.flow(&flow.other)
        && let Some(seen) = other.seen(&flow.other, key)
    {
        is_whole = true;
        seen_other = seen & SEEN;
        let other_s = other.last_seen_s();
        if other_s > last_s {
            last_s = other_s;
        }
    }
    let seen = flow.seen & SEEN;
    let (client, backend) = if flow.reply == 1 {
        (seen_other, seen)
    } else {
        (seen, seen_other)
    };
    if walk.now_s.saturating_sub(last_s) > timeout_s(key.proto, client, backend, walk.pressure) {
        if is_whole {
            Maps.remove_flow(&flow.other);
        }
        Maps.remove_flow(key);
        walk.removed += 1;
    } else {
        walk.kept += 1;
        if key.proto == proto::UDP && flow.reply == 1 {
            trace::leave(&Maps, key, walk.now_s);
        }
    }
    0
}

/// Judges one entry of the table that evicts by itself, of flows that nobody has answered in time: the ports that they have are of the node's,
/// of which there are fewer than room for entries.
#[inline(never)]
unsafe extern "C" fn visit_unreplied(
    _map: *mut c_void,
    key: *const FlowKey,
    flow: *mut Flow,
    walk: *mut Walk,
) -> i64 {
    // SAFETY: as above.
    let (key, walk) = unsafe { (&*key, &mut *walk) };
    let (key, mut copy) = (key.again(), Flow::NONE);
    if !Entry::of(flow).copy(&key, &mut copy) {
        return 0;
    }
    let (key, flow) = (&key, &copy);
    let (mut last_s, mut seen_other) = (flow.last_seen_s, 0);
    let mut is_whole = false;
    if let Some(other) = Maps.unreplied(&flow.other)
        && let Some(seen) = other.seen(&flow.other, key)
    {
        is_whole = true;
        seen_other = seen & SEEN;
        let other_s = other.last_seen_s();
        if other_s.wrapping_sub(last_s).cast_signed() > 0 {
            last_s = other_s;
        }
    }
    let seen = flow.seen & SEEN;
    let (client, backend) = if flow.reply == 1 {
        (seen_other, seen)
    } else {
        (seen, seen_other)
    };
    // What another node's backend answers directly is never answered here; and an answered flow stays where the other table is full.
    let stays = client & SEEN_DISPATCHED != 0 || backend != 0;
    let idle_s = walk.now_s.wrapping_sub(last_s);
    if !stays && idle_s.cast_signed() > timeout_s(key.proto, client, 0, 0).cast_signed() {
        if is_whole {
            Maps.remove_unreplied(&flow.other);
        }
        Maps.remove_unreplied(key);
        walk.removed += 1;
    } else if key.proto == proto::UDP && flow.reply == 0 {
        // The client's side is the one that its packets touch.
        trace::renew(&Maps, &flow.other, last_s, walk.now_s);
    }
    0
}
