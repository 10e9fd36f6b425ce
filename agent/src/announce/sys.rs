//! Packet sockets of one interface, which the standard library does not have.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use super::frame::ETHERTYPE_IPV6;

/// Accepts neighbour solicitations alone: on a socket for all of IPv6 everything else would be copied too. Offsets are of the frame.
const SOLICITATIONS: [libc::sock_filter; 6] = {
    const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const fn step(code: u16, otherwise: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter {
            code,
            jt: 0,
            jf: otherwise,
            k,
        }
    }
    [
        // The next header is ICMPv6, the message's type 135.
        step(LOAD_BYTE, 0, 20),
        step(IF_EQUAL, 3, 58),
        step(LOAD_BYTE, 0, 54),
        step(IF_EQUAL, 1, 135),
        step(RETURN, 0, u32::MAX),
        step(RETURN, 0, 0),
    ]
};

/// A socket that receives the frames of one kind that come by an interface, and sends frames by it. Never waits.
pub fn packet_socket(ifindex: u32, ethertype: u16) -> io::Result<OwnedFd> {
    let protocol = ethertype.to_be();
    let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // Of no protocol until it is bound: it would hear every interface.
    // SAFETY: no memory arguments; the descriptor is new and ours.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, flags, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    if ethertype == ETHERTYPE_IPV6 {
        let filter = libc::sock_fprog {
            len: SOLICITATIONS.len() as u16,
            filter: SOLICITATIONS.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel copies the program, which outlives the call, and checks it.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const filter).cast(),
                size_of::<libc::sock_fprog>() as u32,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: plain integers, for which zero is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = ifindex as i32;
    // SAFETY: an address of the family's type and size.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    match result {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}
