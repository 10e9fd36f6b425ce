//! A responder that looks nothing up: what it is asked goes back as an answer, by the same system calls as our server's. Beside it, under the
//! same load, is seen what of a waiting time is the machine's and the generator's own.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg};

use super::pin;

pub const BARE: &str = "bare";
/// The same at 70 % of what it can do itself.
pub const BARE_ALONE: &str = "bare, at 70 % of its own";

/// Datagrams of one system call, as our server takes them.
const BATCH: usize = 32;
const QUERY_BYTES_MAX: usize = 1536;

/// Starts one on a CPU; it answers for as long as this process lives.
pub fn start(cpu: usize) -> io::Result<SocketAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = socket.local_addr()?;
    thread::spawn(move || {
        // Where it may not have a CPU of its own, it has the generator's, which is seen.
        let _ = pin(cpu);
        answer(&socket)
    });
    Ok(address)
}

fn answer(socket: &UdpSocket) -> io::Result<()> {
    let mut buffers = vec![[0_u8; QUERY_BYTES_MAX]; BATCH];
    let mut received = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    let mut replies = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    loop {
        let mut slices: Vec<[IoSliceMut<'_>; 1]> = buffers
            .iter_mut()
            .map(|buffer| [IoSliceMut::new(buffer)])
            .collect();
        let taken = recvmmsg(
            socket.as_raw_fd(),
            &mut received,
            &mut slices,
            MsgFlags::MSG_WAITFORONE,
            None,
        );
        let taken: Vec<(usize, Option<SockaddrIn>)> = match taken {
            Ok(messages) => messages.map(|one| (one.bytes, one.address)).collect(),
            Err(Errno::EINTR | Errno::ECONNREFUSED) => continue,
            Err(errno) => return Err(errno.into()),
        };
        for (buffer, _) in buffers.iter_mut().zip(&taken) {
            // "This is a response", and nothing else.
            buffer[2] |= 0x80;
        }
        let peers: Vec<Option<SockaddrIn>> = taken.iter().map(|(_, peer)| *peer).collect();
        let slices: Vec<[IoSlice<'_>; 1]> = buffers
            .iter()
            .zip(&taken)
            .map(|(buffer, (bytes, _))| [IoSlice::new(&buffer[..*bytes])])
            .collect();
        // What can't be sent shows as loss.
        let _ = sendmmsg(
            socket.as_raw_fd(),
            &mut replies,
            &slices,
            &peers,
            [],
            MsgFlags::empty(),
        );
    }
}
