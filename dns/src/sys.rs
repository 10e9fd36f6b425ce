//! Batches of datagrams: `recvmmsg(2)` and `sendmmsg(2)`, the one place of this crate that needs system calls of its own.
#![expect(
    unsafe_code,
    reason = "msghdr arrays are raw pointers into buffers of the same structure"
)]

use std::io;
use std::mem;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// Has the allocator keep little of what was freed: one pool for the main thread, which keeps the cluster, and one for all others, so that a
/// list on its way leaves no holes between what is kept of it; large pieces by pages of their own for good (their bound would grow with the
/// first list), and a small rest at the end.
pub fn keep_memory_small() {
    const POOLS: i32 = 2;
    const LARGE_BYTES: i32 = 64 << 10;
    const REST_BYTES: i32 = 256 << 10;
    // SAFETY: these only set numbers of the allocator; a refused one leaves it as it was.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, POOLS);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, REST_BYTES);
    }
}

/// Lets every other thread go before this one where a CPU is wanted by both.
pub fn let_others_go_first() -> io::Result<()> {
    const NICE: i32 = 10;
    // SAFETY: no pointers are passed; process 0 is the calling thread (Linux has a niceness for each).
    let set = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    if set < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Gives memory that was freed back to the system.
pub fn give_memory_back() {
    // SAFETY: the allocator only looks at its own free lists, under its own locks.
    unsafe { libc::malloc_trim(0) };
}

/// Lets go of the pages of this program itself: those that are still needed come back from the page cache when they are next touched. A list
/// goes through a third of the code, and answers through little of it.
pub fn give_code_back() -> io::Result<()> {
    let program = std::fs::read_link("/proc/self/exe")?;
    let program = program.to_string_lossy();
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let Some((start, bytes)) = never_written(line, &program) else {
            continue;
        };
        // SAFETY: these pages map a file and were never writable, so that whatever reads or runs them next finds the same bytes.
        let let_go = unsafe {
            libc::madvise(
                std::ptr::without_provenance_mut(start),
                bytes,
                libc::MADV_DONTNEED,
            )
        };
        if let_go < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Where a line of /proc/self/maps has code or constants of a program. What was relocated is read-only too by now, but lies behind the code.
fn never_written(line: &str, program: &str) -> Option<(usize, usize)> {
    let mut words = line.split_ascii_whitespace();
    let (range, rights, offset) = (words.next()?, words.next()?, words.next()?);
    let path = words.nth(2)?;
    let constants = rights == "r--p" && offset.bytes().all(|digit| digit == b'0');
    if path != program || !(rights == "r-xp" || constants) {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    let (start, end) = (number(start)?, number(end)?);
    Some((start, end.checked_sub(start)?))
}

/// Datagrams taken or given in one system call.
pub const BATCH: usize = 32;
/// A query is a few hundred bytes at most; what is longer is cut and then refused as malformed.
const QUERY_BYTES_MAX: usize = 1536;
/// Enough for an `IP_PKTINFO` or `IPV6_PKTINFO` message, with its header and alignment.
const CONTROL_BYTES: usize = 64;

/// Opens a UDP socket that shares its address with others of this process, so that the kernel spreads clients over
/// them, and that reports which local address each datagram came to, where it has several.
pub fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    // SAFETY: no pointers are passed; the descriptor is owned from here on.
    let socket = unsafe {
        let fd = libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT)?;
    // Room for a burst that comes while this thread is not running; the system's own bound applies.
    let _ = set_value(&socket, libc::SO_RCVBUF, &RECEIVE_BUFFER_BYTES);
    // So that a thread with nothing to do sees that it is to end.
    let patience = libc::timeval {
        tv_sec: 0,
        tv_usec: RECEIVE_PATIENCE_US,
    };
    set_value(&socket, libc::SO_RCVTIMEO, &patience)?;
    // Replies of a socket that has one address come from it; with all of them, the kernel has to be told with each, and tells with each.
    let any = address.ip().is_unspecified();
    match address {
        SocketAddr::V4(_) if any => set_option(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO)?,
        SocketAddr::V4(_) => {}
        SocketAddr::V6(_) => {
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)?;
            if any {
                set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)?;
            }
        }
    }
    let (storage, length) = sockaddr(address);
    // SAFETY: `storage` holds an address of `length` bytes of the socket's family.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const storage).cast(), length) };
    if bound < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(UdpSocket::from(socket))
    }
}

const RECEIVE_BUFFER_BYTES: i32 = 4 << 20;
const RECEIVE_PATIENCE_US: libc::suseconds_t = 200_000;

fn set_option(socket: &OwnedFd, level: i32, option: i32) -> io::Result<()> {
    set(socket, level, option, &1_i32)
}

fn set_value<T: Copy>(socket: &OwnedFd, option: i32, value: &T) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, option, value)
}

fn set<T: Copy>(socket: &impl AsRawFd, level: i32, option: i32, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads the bytes of one `T` behind the pointer; callers pass the type that the option has.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const *value).cast(),
            size_of::<T>() as u32,
        )
    };
    if set < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn sockaddr(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: all zeroes is a valid sockaddr_storage (family AF_UNSPEC).
    let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
    let length = match address {
        SocketAddr::V4(v4) => {
            let inner = libc::sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage is large enough and aligned for every address type.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(inner) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            let inner = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(inner) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, length as libc::socklen_t)
}

/// Datagrams that the kernel has dropped at a socket since it was made: those that found its queue full, and those kept out of it.
pub fn drops(socket: &UdpSocket) -> io::Result<u32> {
    const VALUES: usize = 9;
    const DROPS: usize = 8;
    let mut values = [0_u32; VALUES];
    let mut bytes = size_of_val(&values) as libc::socklen_t;
    // SAFETY: the kernel writes at most `bytes` bytes, which is what `values` has.
    let read = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    if read < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(values[DROPS])
    }
}

/// Lets one of `share` (a power of two) datagrams of a client into a socket's queue, and all of everyone else's.
pub fn hold(socket: &UdpSocket, client: IpAddr, share: u32) -> io::Result<()> {
    // Classic BPF, which needs no privilege; the kernel drops before it queues or wakes anyone.
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let network = |offset: i32| (libc::SKF_NET_OFF + offset) as u32;
    let (at, words): (i32, Vec<u32>) = match client {
        IpAddr::V4(v4) => (12, vec![v4.to_bits()]),
        IpAddr::V6(v6) => {
            let words = v6.octets();
            let words = words.chunks_exact(4);
            let word = |bytes: &[u8]| u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            (8, words.map(word).collect())
        }
    };
    let line = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = Vec::new();
    for (i, word) in words.iter().enumerate() {
        // To the acceptance behind the rest of the words, the random number, the mask and the last comparison.
        let accept = 2 * (words.len() - 1 - i) + 3;
        program.push(line(LOAD, 0, 0, network(at + 4 * i as i32)));
        program.push(line(EQUAL, 0, accept as u8, *word));
    }
    let random = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM) as u32;
    program.extend([
        line(LOAD, 0, 0, random),
        line(AND, 0, 0, share - 1),
        line(EQUAL, 0, 1, 0),
        line(RETURN, 0, 0, u32::MAX),
        line(RETURN, 0, 0, 0),
    ]);
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // The program is copied by the call.
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)
}

/// Lets everyone into a socket's queue again.
pub fn release(socket: &UdpSocket) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &0_i32)
}

#[repr(align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL_BYTES]);

/// Where a reply goes that is not ready yet: to the peer, from the address that it had asked.
pub struct Later {
    socket: Arc<UdpSocket>,
    peer: libc::sockaddr_storage,
    peer_bytes: u32,
    control: Control,
    control_bytes: usize,
}

impl Later {
    /// Sends the reply; one that can't be sent is passed over, and the client asks again.
    pub fn send(&self, reply: &[u8]) -> io::Result<()> {
        let mut vector = libc::iovec {
            iov_base: reply.as_ptr().cast_mut().cast(),
            iov_len: reply.len(),
        };
        let (mut peer, mut control) = (self.peer, self.control);
        // SAFETY: all zeroes is a valid msghdr.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_name = (&raw mut peer).cast();
        header.msg_namelen = self.peer_bytes;
        header.msg_iov = &raw mut vector;
        header.msg_iovlen = 1;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = self.control_bytes;
        // SAFETY: the header points to values of this function and to `reply`, which sendmsg only reads.
        let sent = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const header, 0) };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

/// Buffers for one batch, allocated once. Replies go out in the place of the queries they answer: to the same
/// address, from the local address that the query came to.
pub struct Batch {
    queries: Vec<[u8; QUERY_BYTES_MAX]>,
    replies: Vec<[u8; super::server::REPLY_BYTES_MAX]>,
    reply_bytes: [usize; BATCH],
    received: [usize; BATCH],
    peers: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    vectors: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

impl Batch {
    pub fn new() -> Self {
        // SAFETY: all zeroes is a valid value of these C structures: null pointers and no lengths.
        let (peer, vector, header) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
        Self {
            queries: vec![[0; QUERY_BYTES_MAX]; BATCH],
            replies: vec![[0; super::server::REPLY_BYTES_MAX]; BATCH],
            reply_bytes: [0; BATCH],
            received: [0; BATCH],
            peers: vec![peer; BATCH],
            controls: vec![Control([0; CONTROL_BYTES]); BATCH],
            vectors: vec![vector; BATCH],
            headers: vec![header; BATCH],
        }
    }

    /// Waits for datagrams and takes as many as are there; returns their number.
    pub fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        for i in 0..BATCH {
            self.vectors[i] = libc::iovec {
                iov_base: self.queries[i].as_mut_ptr().cast(),
                iov_len: QUERY_BYTES_MAX,
            };
            self.point(
                i,
                i,
                CONTROL_BYTES,
                size_of::<libc::sockaddr_storage>() as u32,
            );
        }
        // SAFETY: every header points to buffers of `self`, with their lengths, that outlive the call.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_WAITFORONE,
                std::ptr::null_mut(),
            )
        };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        for i in 0..count as usize {
            self.received[i] = self.headers[i].msg_len as usize;
            self.reply_bytes[i] = 0;
            self.any_interface(i);
        }
        Ok(count as usize)
    }

    /// The datagram at `i` and the buffer for its reply.
    pub fn exchange(&mut self, i: usize) -> (&[u8], &mut [u8]) {
        (&self.queries[i][..self.received[i]], &mut self.replies[i])
    }

    /// Bytes of the reply at `i`; 0 where there is none.
    pub fn reply_bytes(&self, i: usize) -> usize {
        self.reply_bytes[i]
    }

    /// A way to reply to the datagram at `i` later, as [`Batch::send`] would have done.
    pub fn reply_socket(&self, i: usize, socket: &Arc<UdpSocket>) -> Later {
        Later {
            socket: socket.clone(),
            peer: self.peers[i],
            peer_bytes: self.headers[i].msg_hdr.msg_namelen,
            control: self.controls[i],
            control_bytes: self.headers[i].msg_hdr.msg_controllen,
        }
    }

    /// Says that the reply at `i` is to be sent, with this many bytes.
    pub fn reply(&mut self, i: usize, bytes: usize) {
        self.reply_bytes[i] = bytes;
    }

    /// Who sent the datagram at `i`; `None` for an address family that no socket here has.
    pub fn peer(&self, i: usize) -> Option<SocketAddr> {
        let storage = &self.peers[i];
        match i32::from(storage.ss_family) {
            libc::AF_INET => {
                // SAFETY: the family says that a sockaddr_in was written there.
                let v4 = unsafe { (&raw const *storage).cast::<libc::sockaddr_in>().read() };
                Some((v4.sin_addr.s_addr.to_ne_bytes(), u16::from_be(v4.sin_port)).into())
            }
            libc::AF_INET6 => {
                // SAFETY: the family says that a sockaddr_in6 was written there.
                let v6 = unsafe { (&raw const *storage).cast::<libc::sockaddr_in6>().read() };
                Some((v6.sin6_addr.s6_addr, u16::from_be(v6.sin6_port)).into())
            }
            _ => None,
        }
    }

    /// Sends the replies of the first `count` places. One that can't be sent is passed over: the client asks again.
    pub fn send(&mut self, socket: &UdpSocket, count: usize) -> io::Result<()> {
        let mut ready = 0;
        for i in 0..count {
            if self.reply_bytes[i] == 0 {
                continue;
            }
            let (control, name) = (
                self.headers[i].msg_hdr.msg_controllen,
                self.headers[i].msg_hdr.msg_namelen,
            );
            self.vectors[ready] = libc::iovec {
                iov_base: self.replies[i].as_mut_ptr().cast(),
                iov_len: self.reply_bytes[i],
            };
            self.point(ready, i, control, name);
            ready += 1;
        }
        let mut sent = 0;
        while sent < ready {
            // SAFETY: headers `sent..ready` point to buffers of `self` that outlive the call.
            let count = unsafe {
                let first = self.headers.as_mut_ptr().add(sent);
                libc::sendmmsg(socket.as_raw_fd(), first, (ready - sent) as u32, 0)
            };
            match count {
                // The first of them failed alone (a peer that is gone, say): go on behind it.
                0 => sent += 1,
                count if count > 0 => sent += count as usize,
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error if error.raw_os_error() == Some(libc::EBADF) => return Err(error),
                    _ => sent += 1,
                },
            }
        }
        Ok(())
    }

    /// Points header `to` at the peer and control data of place `from` and at vector `to`.
    fn point(&mut self, to: usize, from: usize, control_bytes: usize, name_bytes: u32) {
        let header = &mut self.headers[to].msg_hdr;
        header.msg_name = (&raw mut self.peers[from]).cast();
        header.msg_namelen = name_bytes;
        header.msg_iov = &raw mut self.vectors[to];
        header.msg_iovlen = 1;
        header.msg_control = self.controls[from].0.as_mut_ptr().cast();
        header.msg_controllen = control_bytes as _;
        header.msg_flags = 0;
    }

    /// Clears the interface in the control data of place `i`: the reply takes the route to its peer, and only the
    /// source address is kept.
    fn any_interface(&mut self, i: usize) {
        let header = &raw const self.headers[i].msg_hdr;
        // SAFETY: the kernel has just written well-formed control messages of `msg_controllen` bytes into the
        // buffer that `msg_control` points to, and CMSG_* stay within that length.
        unsafe {
            let mut message = libc::CMSG_FIRSTHDR(header);
            while let Some(one) = message.as_ref() {
                match (one.cmsg_level, one.cmsg_type) {
                    (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                        (*libc::CMSG_DATA(message).cast::<libc::in_pktinfo>()).ipi_ifindex = 0;
                    }
                    (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                        (*libc::CMSG_DATA(message).cast::<libc::in6_pktinfo>()).ipi6_ifindex = 0;
                    }
                    _ => {}
                }
                message = libc::CMSG_NXTHDR(header, message);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use super::*;

    fn heard(server: &UdpSocket, clients: &[&UdpSocket]) -> Vec<IpAddr> {
        for client in clients {
            client.send(b"?").expect("sent");
        }
        let mut from = Vec::new();
        while let Ok((_, peer)) = server.recv_from(&mut [0; 8]) {
            from.push(peer.ip());
        }
        from
    }

    fn held_back(of: [IpAddr; 2]) {
        let server = bind((of[0], 0).into()).expect("a socket");
        server
            .set_read_timeout(Some(Duration::from_millis(50)))
            .expect("a timeout");
        let client = |ip: IpAddr| {
            let client = UdpSocket::bind((ip, 0)).expect("a socket");
            client
                .connect(server.local_addr().expect("an address"))
                .expect("connected");
            client
        };
        let [hog, other] = of.map(client);
        assert_eq!(heard(&server, &[&hog, &other]).len(), 2);
        assert_eq!(drops(&server).expect("a number"), 0);
        // One of four thousand million: none of these.
        hold(&server, of[0], 1 << 31).expect("a filter");
        let several = [&hog, &hog, &other, &hog];
        assert_eq!(heard(&server, &several), [of[1]]);
        assert_eq!(drops(&server).expect("a number"), 3);
        hold(&server, of[0], 1).expect("a filter");
        assert_eq!(heard(&server, &several).len(), 4);
        hold(&server, of[0], 1 << 31).expect("a filter");
        release(&server).expect("no filter");
        assert_eq!(heard(&server, &several).len(), 4);
    }

    #[test]
    fn only_what_was_never_written_is_let_go() {
        let found = |rights: &str, offset: &str, path: &str| {
            let line = format!("7f6b916f9000-7f6b925a3000 {rights} {offset} fe:00 123    {path}");
            never_written(&line, "/keelway-dns").is_some()
        };
        assert!(found("r-xp", "004f9000", "/keelway-dns"));
        assert!(found("r--p", "00000000", "/keelway-dns"));
        assert!(!found("r--p", "013a3000", "/keelway-dns"), "relocated");
        assert!(!found("rw-p", "00000000", "/keelway-dns"));
        assert!(!found("r-xp", "00000000", "/lib/libc.so.6"));
        assert_eq!(
            never_written("7ffc-7ffd rw-p 0 00:00 0", "/keelway-dns"),
            None
        );
        // The test goes on running.
        give_code_back().expect("this program is mapped");
    }

    #[test]
    fn a_client_that_is_held_back_is_not_heard_and_others_are() {
        held_back([
            Ipv4Addr::new(127, 0, 0, 1).into(),
            Ipv4Addr::new(127, 0, 0, 2).into(),
        ]);
    }
}
