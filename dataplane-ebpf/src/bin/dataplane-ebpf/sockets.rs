//! Entry points of the cgroup hooks: a call's address in, another out.

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval},
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};
use dataplane_abi::{Addr, FrontendKey, Reason, SocketPeer, SocketPeers, proto};
use dataplane_ebpf::{
    balance::Client,
    socket::{Caller, Outcome, again, asked, destination, epoch, is_backend, remember, renew},
    tables::Tables as _,
};

use crate::{
    HOST_NETNS, PACKET_LB, SOCKET_LB,
    maps::{
        Maps, SOCKET_PEER, SOCKET_PEERS, connected, forget_connected, note_connected,
        note_datagrams,
    },
    monitor, node_v4, node_v6,
};

const ALLOW: i32 = 1;
const DENY: i32 = 0;
const ECONNREFUSED: i32 = 111;
const IPPROTO_MPTCP: u32 = 262;

/// The address of a call, in the field of its family.
trait Family {
    /// # Safety
    /// `call` is the context of a hook of this family.
    unsafe fn addr(call: *const bpf_sock_addr) -> Addr;
    /// Replaces it; false when the family cannot hold it.
    ///
    /// # Safety
    /// As above.
    unsafe fn set_addr(call: *mut bpf_sock_addr, addr: Addr) -> bool;
}

struct V4;
struct V6;

impl Family for V4 {
    #[inline(always)]
    unsafe fn addr(call: *const bpf_sock_addr) -> Addr {
        // SAFETY: a field of a valid context.
        Addr::from_v4_be(unsafe { (&raw const (*call).user_ip4).read_volatile() })
    }

    #[inline(always)]
    unsafe fn set_addr(call: *mut bpf_sock_addr, addr: Addr) -> bool {
        let Some(be) = addr.v4_be() else { return false };
        // SAFETY: as above.
        unsafe { (&raw mut (*call).user_ip4).write_volatile(be) };
        true
    }
}

impl Family for V6 {
    #[inline(always)]
    unsafe fn addr(call: *const bpf_sock_addr) -> Addr {
        // SAFETY: fields of a valid context, one load each: the verifier rewrites context accesses of four bytes.
        let word =
            |index: usize| unsafe { (&raw const (*call).user_ip6[index]).read_volatile() } as u64;
        Addr {
            words: [word(0) | word(1) << 32, word(2) | word(3) << 32],
        }
    }

    #[inline(always)]
    unsafe fn set_addr(call: *mut bpf_sock_addr, addr: Addr) -> bool {
        let [low, high] = addr.words;
        // SAFETY: as above.
        unsafe {
            (&raw mut (*call).user_ip6[0]).write_volatile(low as u32);
            (&raw mut (*call).user_ip6[1]).write_volatile((low >> 32) as u32);
            (&raw mut (*call).user_ip6[2]).write_volatile(high as u32);
            (&raw mut (*call).user_ip6[3]).write_volatile((high >> 32) as u32);
        }
        true
    }
}

#[inline(always)]
fn port(call: *const bpf_sock_addr) -> u16 {
    // SAFETY: a field of a valid context; the port is in its lower half, in network order.
    unsafe { (&raw const (*call).user_port).read_volatile() as u16 }
}

#[inline(always)]
fn set_port(call: *mut bpf_sock_addr, port: u16) {
    // SAFETY: as above.
    unsafe { (&raw mut (*call).user_port).write_volatile(port as u32) };
}

/// Whose call it is, by the cookie of its network namespace.
#[inline(always)]
fn caller(netns: u64, asked: &FrontendKey, keeps: bool) -> Caller {
    let is_host = netns == HOST_NETNS.load();
    let packet_lb = PACKET_LB.load() != 0;
    let client = if is_host {
        Client::at(match asked.addr.v4_be() {
            Some(_) => node_v4(),
            None => node_v6(),
        })
    } else if packet_lb {
        Client::UNKNOWN
    } else {
        // No address, but nobody else's.
        Client::at(Addr { words: [netns, 0] })
    };
    Caller {
        is_host,
        packet_lb,
        connects_datagrams: asked.proto == proto::UDP && !keeps,
        client,
    }
}

/// What [`destination`] comes to: numbers, since only such come back from a function in a register.
const LEAVE: u32 = 0;
const REFUSE: u32 = 1;
const TRANSLATE: u32 = 2;

/// [`destination`] as global functions, of a socket that is connected, and of one that keeps what it was given before: the verifier judges
/// each by itself, once for a program, where it would walk any other anew for each way that leads to it. They write down what the
/// socket is given. Pointers may be null to them; that of what is known is so where nothing is.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_connected(asked: *const FrontendKey, netns: u64, given: *mut SocketPeer) -> u32 {
    // SAFETY: null or the caller's, for as long as the call; the verifier holds callers to their sizes.
    match unsafe { (asked.as_ref(), given.as_mut()) } {
        (Some(asked), Some(given)) => find(asked, netns, false, None, given),
        _ => LEAVE,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_kept(
    asked: *const FrontendKey,
    netns: u64,
    known: *const SocketPeers,
    given: *mut SocketPeer,
) -> u32 {
    // SAFETY: as above.
    match unsafe { (asked.as_ref(), known.as_ref(), given.as_mut()) } {
        (Some(asked), known, Some(given)) => find(asked, netns, true, known, given),
        _ => LEAVE,
    }
}

#[inline(always)]
fn find(
    asked: &FrontendKey,
    netns: u64,
    keeps: bool,
    known: Option<&SocketPeers>,
    given: &mut SocketPeer,
) -> u32 {
    match destination(&Maps, &caller(netns, asked, keeps), asked, known) {
        Outcome::Leave => LEAVE,
        Outcome::Refuse => REFUSE,
        Outcome::Translate(peer) => {
            // By words: a copy of the whole is a loop over bytes.
            let ([high, low], [other_high, other_low]) = (peer.frontend.words, peer.backend.words);
            given.frontend.words = [high, low];
            given.backend.words = [other_high, other_low];
            given.frontend_port = peer.frontend_port;
            given.backend_port = peer.backend_port;
            given.service = peer.service;
            given.generation = peer.generation;
            given.slot = peer.slot;
            TRANSLATE
        }
    }
}

/// Notes what a datagram socket of the host is connected to. Pods' are left to the packet hooks; where there are none, they are in
/// namespaces of their own. Asks anew whose call it is: what was known would double what the verifier looks at.
#[inline(never)]
fn note(call: *mut bpf_sock_addr, peer: &SocketPeer) {
    // SAFETY: a valid context.
    unsafe {
        if (&raw const (*call).protocol).read_volatile() == proto::UDP as u32
            && bpf_get_netns_cookie(call.cast()) == HOST_NETNS.load()
        {
            note_datagrams(bpf_get_socket_cookie(call.cast()), peer);
        }
    }
}

/// Whether it is noted what a socket was connected to. Only TCP's is, which asks for nothing but its peer's name: a place in a table
/// costs it less than storage of its own, which the kernel makes, clears and gives back.
#[inline(always)]
fn is_noted(call: *mut bpf_sock_addr, peer: &SocketPeer) -> bool {
    // SAFETY: a field of a valid context. What Multipath TCP connects are sockets that nobody closes.
    let protocol = unsafe { (&raw const (*call).protocol).read_volatile() };
    // SAFETY: a valid context.
    protocol == proto::TCP as u32
        && note_connected(unsafe { bpf_get_socket_cookie(call.cast()) }, peer)
}

/// Has the call go to what the socket is given.
#[inline(always)]
fn answer<F: Family>(call: *mut bpf_sock_addr, peer: &SocketPeer, protocol: u8) {
    // SAFETY: the caller is a hook of the family.
    if unsafe { F::set_addr(call, peer.backend) } {
        set_port(call, peer.backend_port);
    }
    monitor::socket(peer, protocol);
}

/// A call that names a destination: connect, or sendmsg of an unconnected socket.
#[inline(always)]
fn names<F: Family>(ctx: &SockAddrContext, keeps: bool) -> i32 {
    if SOCKET_LB.load() == 0 {
        return ALLOW;
    }
    let call = ctx.sock_addr;
    // SAFETY: a field of a valid context.
    let protocol = match unsafe { (&raw const (*call).protocol).read_volatile() } {
        number if number == proto::TCP as u32 || number == IPPROTO_MPTCP => proto::TCP,
        number if number == proto::UDP as u32 => proto::UDP,
        _ => return ALLOW,
    };
    // SAFETY: the caller is a hook of the family.
    let frontend = FrontendKey::new(unsafe { F::addr(call) }, port(call), protocol);
    let known: *const SocketPeers = if keeps {
        // SAFETY: a valid context.
        unsafe { SOCKET_PEERS.get_ptr_mut(ctx) }
    } else {
        core::ptr::null()
    };
    // SAFETY: null or the storage of the call's socket, which the call holds.
    if let Some(known) = unsafe { known.as_ref() }
        && let Some(peer) = again(&Maps, known, &frontend.addr, frontend.port)
    {
        Maps.count(Reason::SocketTranslated);
        answer::<F>(call, peer, protocol);
        return ALLOW;
    }
    let epoch = if keeps { epoch(&Maps) } else { 0 };
    // SAFETY: a valid context.
    let netns = unsafe { bpf_get_netns_cookie(call.cast()) };
    // Filled with what is at hand: zeros would be written by a loop over bytes.
    let mut peer = SocketPeer {
        frontend: frontend.addr,
        backend: frontend.addr,
        frontend_port: frontend.port,
        backend_port: frontend.port,
        service: 0,
        generation: 0,
        slot: 0,
    };
    let found = match keeps {
        true => find_kept(&frontend, netns, known, &mut peer),
        false => find_connected(&frontend, netns, &mut peer),
    };
    match found {
        TRANSLATE => {}
        REFUSE => {
            // SAFETY: no memory arguments.
            unsafe { bpf_set_retval(-ECONNREFUSED) };
            return DENY;
        }
        _ => return ALLOW,
    }
    // Without storage the call works all the same, but the socket is told its backend's name.
    if keeps {
        // SAFETY: as above.
        if let Some(peers) = unsafe { SOCKET_PEERS.get_or_insert_ptr_mut(ctx, None).as_mut() } {
            renew(peers, epoch);
            remember(peers, &peer);
        }
    } else if !is_noted(call, &peer) {
        // SAFETY: as above.
        if let Some(place) = unsafe { SOCKET_PEER.get_or_insert_ptr_mut(ctx, None).as_mut() } {
            *place = peer;
        }
    }
    answer::<F>(call, &peer, protocol);
    if !keeps {
        note(call, &peer);
    }
    ALLOW
}

/// A call that tells a peer's address: recvmsg of an unconnected socket, or getpeername, which TCP has too.
#[inline(always)]
fn tells<F: Family>(ctx: &SockAddrContext, has_tcp: bool) -> i32 {
    if SOCKET_LB.load() == 0 {
        return ALLOW;
    }
    let call = ctx.sock_addr;
    // SAFETY: the caller is a hook of the family.
    let (addr, at) = (unsafe { F::addr(call) }, port(call));
    // SAFETY: a valid context.
    if has_tcp
        && let Some(peer) = connected(unsafe { bpf_get_socket_cookie(call.cast()) })
        && is_backend(peer, &addr, at)
    {
        tell::<F>(call, peer);
        return ALLOW;
    }
    // SAFETY: null or the storage of the call's socket.
    if let Some(peers) = unsafe { SOCKET_PEERS.get_ptr_mut(ctx).as_ref() }
        && let Some(peer) = asked(peers, &addr, at)
    {
        tell::<F>(call, peer);
        return ALLOW;
    }
    // SAFETY: as above.
    if let Some(peer) = unsafe { SOCKET_PEER.get_ptr_mut(ctx).as_ref() }
        && is_backend(peer, &addr, at)
    {
        tell::<F>(call, peer);
    }
    ALLOW
}

/// Has the call tell of the frontend that was asked for.
#[inline(always)]
fn tell<F: Family>(call: *mut bpf_sock_addr, peer: &SocketPeer) {
    // SAFETY: the caller is a hook of the family.
    if unsafe { F::set_addr(call, peer.frontend) } {
        set_port(call, peer.frontend_port);
    }
}

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    names::<V4>(&ctx, false)
}

/// Sockets of both families connect to IPv4 addresses mapped into IPv6 ones by this hook.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    names::<V6>(&ctx, false)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    names::<V4>(&ctx, true)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    names::<V6>(&ctx, true)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    tells::<V4>(&ctx, false)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    tells::<V6>(&ctx, false)
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    tells::<V4>(&ctx, true)
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    tells::<V6>(&ctx, true)
}

/// Whoever has a socket closes it: the last of them, when several do.
#[cgroup_sock(sock_release)]
pub fn sock_release(ctx: SockContext) -> i32 {
    if SOCKET_LB.load() == 0 {
        return ALLOW;
    }
    // SAFETY: a field of a valid context.
    let protocol = unsafe { (&raw const (*ctx.sock).protocol).read_volatile() };
    if protocol == proto::TCP as u32 {
        // SAFETY: a valid context.
        forget_connected(unsafe { bpf_get_socket_cookie(ctx.sock.cast()) });
    }
    ALLOW
}
