//! Socket options of any level, which neither the standard library nor nix has.
#![expect(unsafe_code, reason = "a call that takes a pointer to bytes")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// Asks for an option of a socket. What is asked for stands in `bytes`, as many as there are; the answer takes its place, and may be shorter.
pub fn socket_option(
    socket: BorrowedFd<'_>,
    level: i32,
    option: i32,
    bytes: &mut [u8],
) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(bytes.len())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the kernel reads and writes no more than `length` bytes, which is how many there are.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            bytes.as_mut_ptr().cast(),
            &mut length,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(length as usize)
}
