//! Entry points of the eBPF programs. Each turns its context into what the library works on, and the outcome into what the
//! kernel wants; the logic is in the library.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod collect;
mod dns;
mod early;
mod entry;
mod maps;
mod monitor;
mod packets;
mod sockets;

use aya_ebpf::{
    EbpfContext as _, Global, bindings::TC_ACT_SHOT, macros::classifier, programs::TcContext,
};
use dataplane_abi::{Addr, Hook};
use dataplane_ebpf::hook::{self, Features};

use crate::{
    maps::{Maps, notes},
    monitor::Watched,
    packets::{Skb, act, is_for_another, is_ipv6},
};

/// `dataplane_abi::global`: what the agent turned on. Constants to the verifier, which removes what they rule out.
#[unsafe(no_mangle)]
static PACKET_LB: Global<u32> = Global::new(1);
#[unsafe(no_mangle)]
static SOCKET_LB: Global<u32> = Global::new(1);
#[unsafe(no_mangle)]
static SERVICE_VETH: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static NODE_V4: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static NODE_V6_HIGH: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static NODE_V6_LOW: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static HOST_NETNS: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static MASQUERADE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static UPLINK_MAC: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static UPLINK: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static OVERLAY: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static OVERLAY_LINK: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static KERNEL_DNS: Global<u32> = Global::new(0);

#[inline(always)]
fn features() -> Features {
    Features {
        packet_lb: PACKET_LB.load() != 0,
        service_veth: SERVICE_VETH.load() != 0,
        masquerade: MASQUERADE.load() != 0,
        node_v4: node_v4(),
        node_v6: node_v6(),
        overlay: OVERLAY.load() != 0,
        by_overlay: false,
    }
}

/// The node's IPv4 address; zero without one.
#[inline(always)]
fn node_v4() -> Addr {
    match NODE_V4.load() {
        0 => Addr { words: [0, 0] },
        be => Addr::from_v4_be(be),
    }
}

/// The node's IPv6 address; zero without one.
#[inline(always)]
fn node_v6() -> Addr {
    Addr {
        words: [NODE_V6_HIGH.load(), NODE_V6_LOW.load()],
    }
}

/// Ingress of the host's side of a pod's veth: what the pod sends.
#[classifier]
pub fn pod_ingress(ctx: TcContext) -> i32 {
    let v6 = is_ipv6(&ctx);
    dns::ask(&ctx, v6);
    match v6 {
        true => pod_ingress_v6(&ctx),
        false => pod_ingress_v4(&ctx),
    }
}

#[inline(never)]
fn pod_ingress_v4(ctx: &TcContext) -> i32 {
    from_pod::<false>(ctx)
}

#[inline(never)]
fn pod_ingress_v6(ctx: &TcContext) -> i32 {
    from_pod::<true>(ctx)
}

#[inline(always)]
fn from_pod<const V6: bool>(ctx: &TcContext) -> i32 {
    let Some(notes) = notes() else {
        return TC_ACT_SHOT;
    };
    let mut skb = Skb::new::<V6>(ctx);
    let ifindex = skb.ifindex();
    let tables = Watched::new(skb.raw(), Hook::PodIngress);
    let verdict = hook::pod_ingress::<V6, _, _>(&mut skb, &tables, &features(), notes, ifindex);
    let back = hook::Verdict::Peer(ifindex);
    act::<V6, _>(&mut skb, &tables, verdict, notes, back)
}

/// Egress of the host's side of a pod's veth: what the host sends to the pod.
#[classifier]
pub fn pod_egress(ctx: TcContext) -> i32 {
    match is_ipv6(&ctx) {
        true => pod_egress_v6(&ctx),
        false => pod_egress_v4(&ctx),
    }
}

#[inline(never)]
fn pod_egress_v4(ctx: &TcContext) -> i32 {
    answer::<false>(ctx, Hook::PodEgress)
}

#[inline(never)]
fn pod_egress_v6(ctx: &TcContext) -> i32 {
    answer::<true>(ctx, Hook::PodEgress)
}

/// Translates answers back on their way to a client.
#[inline(always)]
fn answer<const V6: bool>(ctx: &TcContext, hook: Hook) -> i32 {
    let Some(notes) = notes() else {
        return TC_ACT_SHOT;
    };
    let mut skb = Skb::new::<V6>(ctx);
    let tables = Watched::new(skb.raw(), hook);
    match hook::answer::<V6, _, _>(&mut skb, &tables, &features(), notes) {
        hook::Verdict::Drop => TC_ACT_SHOT,
        _ => packets::NEXT,
    }
}

/// Ingress of an uplink: what comes from outside.
#[classifier]
pub fn uplink_ingress(ctx: TcContext) -> i32 {
    if is_for_another(&ctx) {
        return packets::NEXT;
    }
    match is_ipv6(&ctx) {
        true => uplink_ingress_v6(&ctx),
        false => uplink_ingress_v4(&ctx),
    }
}

#[inline(never)]
fn uplink_ingress_v4(ctx: &TcContext) -> i32 {
    from_outside::<false>(ctx)
}

#[inline(never)]
fn uplink_ingress_v6(ctx: &TcContext) -> i32 {
    from_outside::<true>(ctx)
}

#[inline(always)]
fn from_outside<const V6: bool>(ctx: &TcContext) -> i32 {
    let Some(notes) = notes() else {
        return TC_ACT_SHOT;
    };
    let mut skb = Skb::new::<V6>(ctx);
    let tables = Watched::new(skb.raw(), Hook::UplinkIngress);
    let mut features = features();
    features.by_overlay = features.overlay && skb.ifindex() == OVERLAY.load();
    let verdict = hook::uplink_ingress::<V6, _, _>(&mut skb, &tables, &features, notes);
    if features.overlay && matches!(verdict, hook::Verdict::Overlay) {
        return packets::to_peer(&mut skb, &tables, notes.peer);
    }
    let back = hook::Verdict::Route;
    act::<V6, _>(&mut skb, &tables, verdict, notes, back)
}

/// Egress of an uplink or of the overlay: what leaves the node. It hangs only where processes of the node are endpoints that are to see
/// clients as they are.
#[classifier]
pub fn uplink_egress(ctx: TcContext) -> i32 {
    if PACKET_LB.load() == 0 {
        return packets::NEXT;
    }
    let skb = Skb::of(ctx.as_ptr().cast());
    match is_ipv6(&ctx) {
        true if hook::may_be_answer::<true, _, _>(&skb, &Maps) => uplink_egress_v6(&ctx),
        false if hook::may_be_answer::<false, _, _>(&skb, &Maps) => uplink_egress_v4(&ctx),
        _ => packets::NEXT,
    }
}

#[inline(never)]
fn uplink_egress_v4(ctx: &TcContext) -> i32 {
    answer::<false>(ctx, Hook::UplinkEgress)
}

#[inline(never)]
fn uplink_egress_v6(ctx: &TcContext) -> i32 {
    answer::<true>(ctx, Hook::UplinkEgress)
}

/// Ingress of the inner end of the service veth pair: what the host routed to a Service address.
#[classifier]
pub fn service_ingress(ctx: TcContext) -> i32 {
    if PACKET_LB.load() == 0 {
        return packets::NEXT;
    }
    match is_ipv6(&ctx) {
        true => service_ingress_v6(&ctx),
        false => service_ingress_v4(&ctx),
    }
}

#[inline(never)]
fn service_ingress_v4(ctx: &TcContext) -> i32 {
    to_service::<false>(ctx)
}

#[inline(never)]
fn service_ingress_v6(ctx: &TcContext) -> i32 {
    to_service::<true>(ctx)
}

#[inline(always)]
fn to_service<const V6: bool>(ctx: &TcContext) -> i32 {
    let Some(notes) = notes() else {
        return TC_ACT_SHOT;
    };
    let mut skb = Skb::new::<V6>(ctx);
    let tables = Watched::new(skb.raw(), Hook::ServiceIngress);
    let verdict = hook::service_ingress::<V6, _, _>(&mut skb, &tables, &features(), notes);
    let back = hook::Verdict::Host;
    act::<V6, _>(&mut skb, &tables, verdict, notes, back)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel gives some helpers to programs under a GPL-compatible licence only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
