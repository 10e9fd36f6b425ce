//! System calls that the standard library lacks: file descriptors over Unix sockets, and an interface's flags.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// Sends the beginning of `bytes`, with `fd` attached to its first byte; returns how many bytes went.
pub(crate) fn send_with_fd(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let raw: Vec<i32> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() {
        &control[..0]
    } else {
        &control[..]
    };
    // MSG_NOSIGNAL: an agent that went away is an error to be told, not the end of this process.
    let sent = sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(sent)
}

/// Receives the first bytes of a message and the descriptor attached to them. More than one descriptor is refused.
pub(crate) fn receive_with_fd(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = nix::cmsg_space!([i32; 4]);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just made these descriptors for this process, and nothing else knows of them.
            descriptors.extend(
                raw.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    if descriptors.len() > 1 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "more than one file descriptor was sent",
        ));
    }
    Ok((message.bytes, descriptors.pop()))
}

nix::ioctl_write_ptr_bad!(
    /// SIOCSIFFLAGS of netdevice(7).
    set_interface_flags,
    nix::libc::SIOCSIFFLAGS,
    nix::libc::ifreq
);

/// Brings up `lo` in the network namespace of the calling thread.
pub(crate) fn loopback_up() -> nix::Result<()> {
    use nix::libc::{IFF_RUNNING, IFF_UP, ifreq};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: all-zero bytes are a valid ifreq: a name and a union of plain numbers.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as nix::libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (IFF_UP | IFF_RUNNING) as i16;
    // SAFETY: the request is a whole ifreq that outlives the call, and the descriptor is a socket.
    unsafe { set_interface_flags(socket.as_raw_fd(), &request) }.map(drop)
}
