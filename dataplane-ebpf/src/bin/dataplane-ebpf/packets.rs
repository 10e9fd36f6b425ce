//! The kernel's side of [`Packet`], and carrying out a verdict.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff, BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
        BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS,
        BPF_FIB_LOOKUP_SKIP_NEIGH, BPF_FIB_LOOKUP_SRC, TC_ACT_SHOT, bpf_fib_lookup as FibLookup,
        bpf_redir_neigh as NextHop,
    },
    helpers::generated::{
        bpf_fib_lookup, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer,
        bpf_skb_change_tail, bpf_skb_pull_data, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use core::mem::MaybeUninit;
use dataplane_abi::{Addr, FROM_HOST, FlowKey, HOST_VETH_MAC, Plain, Reason, proto};
use dataplane_ebpf::{
    crc32c,
    hook::{Notes, Verdict},
    packet::{ChecksumChange, ETH_LEN, Ip, Packet, word},
    reject::reject,
    tables::{BY_ANOTHER, BY_FIRST_UPLINK, SOURCE_UNKNOWN, Tables as _},
    too_big::{too_big, translate_back},
    translate::translate,
};

use crate::{
    OVERLAY, OVERLAY_LINK, SERVICE_VETH, UPLINK,
    maps::Maps,
    monitor::{Told, Watched},
};

/// TCX_NEXT, and TC_ACT_UNSPEC where there is no tcx: the next program, then the stack.
pub const NEXT: i32 = -1;

/// Headers that are looked at: Ethernet, IPv4 and TCP without options.
const HEADERS_MIN: u32 = 54;
/// The same with IPv6.
const HEADERS_MIN_V6: u32 = 74;
/// The same with the longest options of IPv4, or extension headers of IPv6.
const HEADERS_MAX: u32 = 14 + 60 + 60;
/// Where an IPv6 header says what follows it; the hop limit lies behind that.
const IPV6_NEXT_HEADER: usize = 6;
/// Protocol of a buffer, as it lies in memory.
const ETH_P_IPV6: u32 = u16::from_ne_bytes([0x86, 0xdd]) as u32;
const AF_INET: u8 = 2;
/// `PACKET_OTHERHOST`: the frame names another machine's hardware address.
const FOR_ANOTHER: u32 = 3;
const AF_INET6: u8 = 10;

/// Whether a buffer's protocol is IPv6.
#[inline(always)]
pub fn is_ipv6(ctx: &TcContext) -> bool {
    let skb: *const __sk_buff = ctx.as_ptr().cast();
    // SAFETY: a valid context.
    unsafe { (*skb).protocol == ETH_P_IPV6 }
}

/// Whether the frame names another machine, and came because a switch did not know where that is, or somebody listens to all: the
/// stack drops it, and two nodes must not both answer one client.
#[inline(always)]
pub fn is_for_another(ctx: &TcContext) -> bool {
    let skb: *const __sk_buff = ctx.as_ptr().cast();
    // SAFETY: a valid context.
    unsafe { (*skb).pkt_type == FOR_ANOTHER }
}

/// A socket buffer.
pub struct Skb(*mut __sk_buff);

impl Skb {
    /// The context's buffer, its headers in the part that can be read directly.
    #[inline(always)]
    pub fn new<const V6: bool>(ctx: &TcContext) -> Self {
        let skb = Self(ctx.as_ptr().cast());
        let least = match V6 {
            true if skb.has_extensions() => HEADERS_MAX,
            true => HEADERS_MIN_V6,
            false => HEADERS_MIN,
        };
        if ctx.data() + least as usize > ctx.data_end() && ctx.len() >= HEADERS_MIN {
            let wanted = if ctx.len() < HEADERS_MAX {
                ctx.len()
            } else {
                HEADERS_MAX
            };
            // SAFETY: a valid context. On failure reads come back empty and the packet counts as malformed.
            unsafe { bpf_skb_pull_data(skb.0, wanted) };
        }
        skb
    }

    /// Whether something other than a transport's header follows an IPv6 header.
    #[inline(always)]
    fn has_extensions(&self) -> bool {
        match self.read::<[u8; 2]>(ETH_LEN + IPV6_NEXT_HEADER) {
            Some([next, _hop_limit]) => {
                !matches!(next, proto::TCP | proto::UDP | proto::ICMPV6 | proto::SCTP)
            }
            None => true,
        }
    }

    /// A context's buffer as it is.
    #[inline(always)]
    pub fn of(skb: *mut __sk_buff) -> Self {
        Self(skb)
    }

    #[inline(always)]
    fn store<T: Plain>(&mut self, offset: usize, value: &T, flags: u64) -> bool {
        // By helper rather than directly: direct writes make the verifier put a copy check before every packet,
        // translated or not.
        // SAFETY: a valid context; the value is as long as said and has no padding.
        unsafe {
            bpf_skb_store_bytes(
                self.0,
                offset as u32,
                core::ptr::from_ref(value).cast(),
                size_of::<T>() as u32,
                flags,
            ) == 0
        }
    }

    #[inline(always)]
    pub fn raw(&self) -> *mut __sk_buff {
        self.0
    }

    /// Bytes of the longest packet that this is or, when hardware is to cut it, becomes, from the IP header on; 0 where that is not known: of
    /// SCTP, whose chunks are what it is cut by.
    #[inline(always)]
    fn longest(&self, ip: &Ip) -> u16 {
        // SAFETY: a valid context.
        let (len, segment) = unsafe { ((*self.0).len, (*self.0).gso_size) };
        let longest = if segment == 0 {
            len.wrapping_sub(ETH_LEN as u32)
        } else {
            match ip.headers_len(self) {
                Some(headers) => headers + segment,
                None => 0,
            }
        };
        if longest > u16::MAX as u32 {
            u16::MAX
        } else {
            longest as u16
        }
    }

    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: a valid context.
        unsafe { (*self.0).ifindex }
    }
}

impl Packet for Skb {
    #[inline(always)]
    fn read<T: Plain>(&self, offset: usize) -> Option<T> {
        // SAFETY: a valid context, and the bytes lie before the end. Where the verifier lets packets be read at any address, the
        // machine loads words from any; elsewhere the program is refused.
        unsafe {
            let (start, end) = (
                (*self.0).data as usize + offset,
                (*self.0).data_end as usize,
            );
            if start + size_of::<T>() > end {
                return None;
            }
            Some((start as *const T).read())
        }
    }

    #[inline(always)]
    fn write<T: Plain>(&mut self, offset: usize, value: &T) -> bool {
        self.store(offset, value, 0)
    }

    #[inline(always)]
    fn put<T: Plain>(&mut self, offset: usize, value: &T) -> bool {
        self.store(offset, value, BPF_F_RECOMPUTE_CSUM as u64)
    }

    #[inline(always)]
    fn patch_checksum(&mut self, offset: usize, change: ChecksumChange) -> bool {
        let mut flags = 0;
        if change.pseudo_header {
            flags |= BPF_F_PSEUDO_HDR as u64;
        }
        if change.optional {
            flags |= BPF_F_MARK_MANGLED_0 as u64;
        }
        // SAFETY: a valid context. Size 0 in the flags means that `to` is a difference.
        unsafe {
            bpf_l4_csum_replace(self.0, offset as u32, 0, change.difference as u64, flags) == 0
        }
    }

    #[inline(always)]
    fn crc32c_change(&self, difference: u32, len: u32) -> u32 {
        crc32c_change(difference, len)
    }

    #[inline(always)]
    fn resize(&mut self, len: u32) -> bool {
        // SAFETY: a valid context.
        unsafe { bpf_skb_change_tail(self.0, len, 0) == 0 }
    }

    #[inline(always)]
    fn translate<const V6: bool>(&mut self, ip: &Ip, to: &FlowKey) -> bool {
        let done = match V6 {
            true => translate_buffer_v6(self.0, ip, to),
            false => translate_buffer_v4(self.0, ip, to),
        };
        done != 0
    }

    #[inline(always)]
    fn refuse<const V6: bool>(&mut self, ip: &Ip) -> bool {
        let done = match V6 {
            true => refuse_buffer_v6(self.0, ip),
            false => refuse_buffer_v4(self.0, ip),
        };
        done != 0
    }
}

/// [`translate`] as a global function of each family, which the verifier judges by itself, once. It holds that such a function's pointers,
/// the context apart, may be null.
#[unsafe(no_mangle)]
#[inline(never)]
fn translate_buffer_v4(skb: *mut __sk_buff, ip: *const Ip, to: *const FlowKey) -> u32 {
    // SAFETY: null or references of the caller's for as long as the call; the verifier holds callers to their sizes.
    match unsafe { (ip.as_ref(), to.as_ref()) } {
        (Some(ip), Some(to)) => translate::<false, _>(&mut Skb(skb), ip, to) as u32,
        _ => 0,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
fn translate_buffer_v6(skb: *mut __sk_buff, ip: *const Ip, to: *const FlowKey) -> u32 {
    // SAFETY: as above.
    match unsafe { (ip.as_ref(), to.as_ref()) } {
        (Some(ip), Some(to)) => translate::<true, _>(&mut Skb(skb), ip, to) as u32,
        _ => 0,
    }
}

/// [`reject`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
fn refuse_buffer_v4(skb: *mut __sk_buff, ip: *const Ip) -> u32 {
    // SAFETY: as above.
    unsafe { ip.as_ref() }.is_some_and(|ip| reject::<false, _>(&mut Skb(skb), ip)) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
fn refuse_buffer_v6(skb: *mut __sk_buff, ip: *const Ip) -> u32 {
    // SAFETY: as above.
    unsafe { ip.as_ref() }.is_some_and(|ip| reject::<true, _>(&mut Skb(skb), ip)) as u32
}

/// [`crc32c::change`] as a global function: such a one the verifier judges by itself, once, whatever its arguments. Any other it would
/// walk anew on each path that leads to it, a thousand steps each time.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn crc32c_change(difference: u32, len: u32) -> u32 {
    crc32c::change(difference, len)
}

/// Carries out a verdict. `back` is the one that leads to where the packet came from.
#[inline(always)]
pub fn act<const V6: bool, P: Told>(
    skb: &mut Skb,
    tables: &Watched<P>,
    verdict: Verdict,
    notes: &mut Notes,
    back: Verdict,
) -> i32 {
    let Verdict::Route = verdict else {
        return act_here(skb, tables, verdict);
    };
    let way = route::<V6>(skb, &notes.ip);
    if way & (TOO_BIG | NO_WAY) == 0 {
        return way as i32;
    }
    // Who listens is told of the packet that came, and its sender too.
    let is_back = turn_back::<V6>(skb, notes);
    if way & NO_WAY != 0 {
        tables.count(Reason::NoRoute);
        return TC_ACT_SHOT;
    }
    tables.count(Reason::TooBig);
    if !is_back || !tell_sender::<V6>(skb, &notes.ip, way & !TOO_BIG) {
        return TC_ACT_SHOT;
    }
    match back {
        Verdict::Route => match route::<V6>(skb, &notes.ip) {
            way if way & (TOO_BIG | NO_WAY) == 0 => way as i32,
            _ => TC_ACT_SHOT,
        },
        back => act_here(skb, tables, back),
    }
}

/// Carries out a verdict that asks no routes.
#[inline(always)]
fn act_here<P: Told>(skb: &mut Skb, tables: &Watched<P>, verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Pass => NEXT,
        // To other nodes the hook of the uplink alone sends, by a way of its own.
        Verdict::Drop | Verdict::Overlay | Verdict::Route => TC_ACT_SHOT,
        // SAFETY: the helper has no memory arguments. The pod's own Ethernet header is not looked at by its stack.
        Verdict::Peer(ifindex) => unsafe { bpf_redirect_peer(ifindex, 0) as i32 },
        Verdict::Host => to_host(skb, tables),
    }
}

/// Into the host by the service veth pair. The packet is received there anew, so its Ethernet header must name the interface.
#[inline(always)]
fn to_host<P: Told>(skb: &mut Skb, tables: &Watched<P>) -> i32 {
    if !skb.write(0, &[HOST_VETH_MAC, HOST_VETH_MAC]) {
        tables.count(Reason::RewriteFailed);
        return TC_ACT_SHOT;
    }
    // SAFETY: no memory arguments.
    unsafe { bpf_redirect(SERVICE_VETH.load(), BPF_F_INGRESS as u64) as i32 }
}

/// To another node by the overlay, whose end there has this hardware address.
#[inline(always)]
pub fn to_peer<P: Told>(skb: &mut Skb, tables: &Watched<P>, mac: u64) -> i32 {
    let mac = [mac as u16, (mac >> 16) as u16, (mac >> 32) as u16];
    if !skb.write(0, &mac) {
        tables.count(Reason::RewriteFailed);
        return TC_ACT_SHOT;
    }
    // SAFETY: no memory arguments.
    unsafe { bpf_redirect(OVERLAY.load(), 0) as i32 }
}

/// What comes with the bytes that the way takes of a packet that is longer, and what says that there is none. Else it is a return value of a
/// program's.
const TOO_BIG: u32 = 1 << 31;
const NO_WAY: u32 = 1 << 30;

#[inline(always)]
fn route<const V6: bool>(skb: &mut Skb, ip: &Ip) -> u32 {
    match V6 {
        true => route_buffer_v6(skb.0, ip),
        false => route_buffer_v4(skb.0, ip),
    }
}

/// Makes a packet what it was when it came. False when it cannot be written.
#[inline(always)]
fn turn_back<const V6: bool>(skb: &mut Skb, notes: &mut Notes) -> bool {
    if notes.is_translated == 0 {
        return true;
    }
    let is_back = match V6 {
        true => turn_back_v6(skb.0, notes),
        false => turn_back_v4(skb.0, notes),
    };
    is_back != 0
}

#[inline(always)]
fn tell_sender<const V6: bool>(skb: &mut Skb, ip: &Ip, mtu: u32) -> bool {
    let told = match V6 {
        true => tell_sender_v6(skb.0, ip, mtu),
        false => tell_sender_v4(skb.0, ip, mtu),
    };
    told != 0
}

/// [`translate_back`] as a global function of each family, as those above.
#[unsafe(no_mangle)]
#[inline(never)]
fn turn_back_v4(skb: *mut __sk_buff, notes: *mut Notes) -> u32 {
    // SAFETY: as above.
    unsafe { notes.as_mut() }.is_some_and(|notes| translate_back::<false, _>(&mut Skb(skb), notes))
        as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
fn turn_back_v6(skb: *mut __sk_buff, notes: *mut Notes) -> u32 {
    // SAFETY: as above.
    unsafe { notes.as_mut() }.is_some_and(|notes| translate_back::<true, _>(&mut Skb(skb), notes))
        as u32
}

/// [`too_big`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
fn tell_sender_v4(skb: *mut __sk_buff, ip: *const Ip, mtu: u32) -> u32 {
    // SAFETY: as above.
    unsafe { ip.as_ref() }.is_some_and(|ip| too_big::<false, _>(&mut Skb(skb), ip, mtu)) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
fn tell_sender_v6(skb: *mut __sk_buff, ip: *const Ip, mtu: u32) -> u32 {
    // SAFETY: as above.
    unsafe { ip.as_ref() }.is_some_and(|ip| too_big::<true, _>(&mut Skb(skb), ip, mtu)) as u32
}

/// [`route_buffer`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
fn route_buffer_v4(skb: *mut __sk_buff, ip: *const Ip) -> u32 {
    // SAFETY: as above.
    match unsafe { ip.as_ref() } {
        Some(ip) => route_buffer::<false>(&mut Skb(skb), ip),
        None => NO_WAY,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
fn route_buffer_v6(skb: *mut __sk_buff, ip: *const Ip) -> u32 {
    // SAFETY: as above.
    match unsafe { ip.as_ref() } {
        Some(ip) => route_buffer::<true>(&mut Skb(skb), ip),
        None => NO_WAY,
    }
}

/// Out by the host's routes. Its stack would refuse a packet that comes in with one of its own addresses as source.
#[inline(always)]
fn route_buffer<const V6: bool>(skb: &mut Skb, ip: &Ip) -> u32 {
    // SAFETY: plain structs of integers, for which zero is valid; the helpers get their true sizes.
    unsafe {
        let mut fib = MaybeUninit::uninit();
        let fib: &mut FibLookup = blank(&mut fib);
        fib.ifindex = skb.ifindex();
        let known = if V6 {
            fib.family = AF_INET6;
            match skb.read::<[[u16; 8]; 2]>(ETH_LEN + 8) {
                Some([src, dst]) => {
                    fib.__bindgen_anon_3.ipv6_src = words(&src);
                    fib.__bindgen_anon_4.ipv6_dst = words(&dst);
                    true
                }
                None => false,
            }
        } else {
            fib.family = AF_INET;
            match skb.read::<[[u16; 2]; 2]>(ETH_LEN + 12) {
                Some([[a, b], [c, d]]) => {
                    fib.__bindgen_anon_3.ipv4_src = word(a, b);
                    fib.__bindgen_anon_4.ipv4_dst = word(c, d);
                    true
                }
                None => false,
            }
        };
        if !known {
            return NO_WAY;
        }
        // With a length the route's own MTU is asked, where it is locked, and what is known of the way to this destination.
        fib.__bindgen_anon_1.tot_len = skb.longest(ip);
        let size = size_of::<FibLookup>() as i32;
        let mut result = bpf_fib_lookup(skb.0.cast(), fib, size, 0) as u32;
        if result == BPF_FIB_LKUP_RET_FRAG_NEEDED {
            let too_big = TOO_BIG | fib.__bindgen_anon_1.mtu_result as u32;
            if OVERLAY_LINK.load() == 0 {
                return too_big;
            }
            // What is longer than the overlay takes of pods is cut below it, in packets of the underlay. By what interface it would go, the
            // kernel says when it is asked without a length.
            fib.__bindgen_anon_1.tot_len = 0;
            result = bpf_fib_lookup(skb.0.cast(), fib, size, 0) as u32;
            if fib.ifindex != OVERLAY_LINK.load() {
                return too_big;
            }
            if result == BPF_FIB_LKUP_RET_FRAG_NEEDED {
                result = BPF_FIB_LKUP_RET_SUCCESS;
            }
        }
        // Without a neighbour the route is known all the same, and the redirect resolves it.
        if result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH {
            return NO_WAY;
        }
        let mut hop: NextHop = core::mem::zeroed();
        // The kernel says by which family the next hop is known, and puts it in the place of the destination.
        hop.nh_family = fib.family as u32;
        hop.__bindgen_anon_1.ipv6_nh = fib.__bindgen_anon_4.ipv6_dst;
        bpf_redirect_neigh(fib.ifindex, &mut hop, size_of::<NextHop>() as i32, 0) as u32
    }
}

/// A plain struct of 32-bit words, all of them zero. For one that is zeroed as a whole the compiler calls a loop over its bytes.
///
/// # Safety
/// Zero is a valid value of each of its fields.
#[inline(always)]
pub unsafe fn blank<T>(place: &mut MaybeUninit<T>) -> &mut T {
    let words = place.as_mut_ptr().cast::<u32>();
    let mut at = 0;
    // SAFETY: within the struct; all of it is written, and by the caller's word that is a value.
    unsafe {
        while at < size_of::<T>() / size_of::<u32>() {
            words.add(at).write_volatile(0);
            at += 1;
        }
        place.assume_init_mut()
    }
}

/// Says between which addresses a way is asked for. False where they are not of the family.
#[inline(always)]
pub fn set_ends<const V6: bool>(fib: &mut FibLookup, src: &Addr, dst: &Addr) -> bool {
    if V6 {
        fib.family = AF_INET6;
        fib.__bindgen_anon_3.ipv6_src = halves(&src.words);
        fib.__bindgen_anon_4.ipv6_dst = halves(&dst.words);
        return true;
    }
    let (Some(src), Some(dst)) = (src.v4_be(), dst.v4_be()) else {
        return false;
    };
    fib.family = AF_INET;
    fib.__bindgen_anon_3.ipv4_src = src;
    fib.__bindgen_anon_4.ipv4_dst = dst;
    true
}

/// Two 64-bit words of memory as four of 32 bits.
#[inline(always)]
const fn halves(words: &[u64; 2]) -> [u32; 4] {
    #[cfg(target_endian = "little")]
    return [
        words[0] as u32,
        (words[0] >> 32) as u32,
        words[1] as u32,
        (words[1] >> 32) as u32,
    ];
    #[cfg(target_endian = "big")]
    return [
        (words[0] >> 32) as u32,
        words[0] as u32,
        (words[1] >> 32) as u32,
        words[1] as u32,
    ];
}

/// Eight 16-bit words of memory as four of 32 bits.
#[inline(always)]
fn words(halves: &[u16; 8]) -> [u32; 4] {
    [
        word(halves[0], halves[1]),
        word(halves[2], halves[3]),
        word(halves[4], halves[5]),
        word(halves[6], halves[7]),
    ]
}

/// [`Tables::source_towards`] as a global function of each family, as those above.
#[unsafe(no_mangle)]
#[inline(never)]
pub fn source_towards_v4(
    skb: *mut __sk_buff,
    src: *const Addr,
    dst: *const Addr,
    source: *mut Addr,
) -> u32 {
    source_towards::<false>(skb, src, dst, source)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub fn source_towards_v6(
    skb: *mut __sk_buff,
    src: *const Addr,
    dst: *const Addr,
    source: *mut Addr,
) -> u32 {
    source_towards::<true>(skb, src, dst, source)
}

/// Asks the host's routes. Kernels before Linux 6.7 do not say.
#[inline(always)]
fn source_towards<const V6: bool>(
    skb: *mut __sk_buff,
    src: *const Addr,
    dst: *const Addr,
    source: *mut Addr,
) -> u32 {
    // SAFETY: as above.
    let (Some(src), Some(dst)) = (unsafe { (src.as_ref(), dst.as_ref()) }) else {
        return SOURCE_UNKNOWN;
    };
    // SAFETY: as above.
    let Some(source) = (unsafe { source.as_mut() }) else {
        return SOURCE_UNKNOWN;
    };
    // SAFETY: a valid context; a plain struct of integers, for which zero is valid; the helper gets its true size.
    let (by, found) = unsafe {
        let mut fib = MaybeUninit::uninit();
        let fib: &mut FibLookup = blank(&mut fib);
        fib.ifindex = (*skb).ifindex;
        if !set_ends::<V6>(fib, src, dst) {
            return SOURCE_UNKNOWN;
        }
        let flags = BPF_FIB_LOOKUP_SRC | BPF_FIB_LOOKUP_SKIP_NEIGH;
        let size = size_of::<FibLookup>() as i32;
        let result = bpf_fib_lookup(skb.cast(), fib, size, flags) as u32;
        if result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_FRAG_NEEDED {
            return SOURCE_UNKNOWN;
        }
        let found = if V6 {
            let [a, b, c, d] = fib.__bindgen_anon_3.ipv6_src;
            Addr {
                words: [a as u64 | (b as u64) << 32, c as u64 | (d as u64) << 32],
            }
        } else {
            Addr::from_v4_be(fib.__bindgen_anon_3.ipv4_src)
        };
        let is_first = fib.ifindex == UPLINK.load() || fib.ifindex == OVERLAY_LINK.load();
        (
            if is_first {
                BY_FIRST_UPLINK
            } else {
                BY_ANOTHER
            },
            found,
        )
    };
    // Where an interface has no address, the kernel gives that of another, which may be none for other machines.
    match Maps.local(&found) {
        Some(at) if at.kind == FROM_HOST => {
            *source = found;
            by
        }
        _ => SOURCE_UNKNOWN,
    }
}
