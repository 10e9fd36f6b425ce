//! Entry points of the cgroup hooks: a call's address in, another out.

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use dataplane_abi::{Addr, FrontendKey, SocketPeer, SocketPeers, proto};
use dataplane_ebpf::{
    balance::Client,
    socket::{Caller, Outcome, asked, destination, remember},
};

use crate::{
    HOST_NETNS, PACKET_LB, SOCKET_LB,
    maps::{Maps, SOCKET_PEERS, note_datagrams},
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

/// Whose call it is.
#[inline(always)]
fn caller(call: *mut bpf_sock_addr, asked: &Addr, connects_datagrams: bool) -> Caller {
    // SAFETY: a valid context.
    let netns = unsafe { bpf_get_netns_cookie(call.cast()) };
    let is_host = netns == HOST_NETNS.load();
    let packet_lb = PACKET_LB.load() != 0;
    let client = if is_host {
        Client::at(match asked.v4_be() {
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
        connects_datagrams,
        client,
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
    let caller = caller(call, &frontend.addr, protocol == proto::UDP && !keeps);
    // SAFETY: null or the storage of the call's socket, which the call holds.
    let known: Option<&SocketPeers> = if keeps {
        unsafe { SOCKET_PEERS.get_ptr_mut(ctx).as_ref() }
    } else {
        None
    };
    match destination(&Maps, &caller, &frontend, known) {
        Outcome::Leave => ALLOW,
        Outcome::Refuse => {
            // SAFETY: no memory arguments.
            unsafe { bpf_set_retval(-ECONNREFUSED) };
            DENY
        }
        Outcome::Translate(peer) => {
            // SAFETY: as above. Without storage the call works all the same, but the socket is told its backend's name.
            if let Some(peers) = unsafe { SOCKET_PEERS.get_or_insert_ptr_mut(ctx, None).as_mut() } {
                remember(peers, &peer);
            }
            // SAFETY: the caller is a hook of the family.
            if unsafe { F::set_addr(call, peer.backend) } {
                set_port(call, peer.backend_port);
            }
            monitor::socket(&peer, protocol);
            if !keeps {
                note(call, &peer);
            }
            ALLOW
        }
    }
}

/// A call that tells a peer's address: recvmsg of an unconnected socket, or getpeername.
#[inline(always)]
fn tells<F: Family>(ctx: &SockAddrContext) -> i32 {
    if SOCKET_LB.load() == 0 {
        return ALLOW;
    }
    let call = ctx.sock_addr;
    // SAFETY: null or the storage of the call's socket.
    let Some(peers) = (unsafe { SOCKET_PEERS.get_ptr_mut(ctx).as_ref() }) else {
        return ALLOW;
    };
    // SAFETY: the caller is a hook of the family.
    if let Some((addr, port)) = asked(peers, &unsafe { F::addr(call) }, port(call)) {
        // SAFETY: as above.
        if unsafe { F::set_addr(call, addr) } {
            set_port(call, port);
        }
    }
    ALLOW
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
    tells::<V4>(&ctx)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    tells::<V6>(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    tells::<V4>(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    tells::<V6>(&ctx)
}
