//! System calls that nix does not wrap: pidfds.
#![expect(
    unsafe_code,
    reason = "the one module of this crate that calls libc directly"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A file descriptor of process `pid`, which keeps naming that process when its number is used again. It becomes
/// readable when the process ends.
///
/// # Errors
/// ESRCH when there is no such process.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Sends SIGKILL to the process behind a pidfd.
///
/// # Errors
/// ESRCH when it has ended and was reaped.
pub fn pidfd_kill(fd: &OwnedFd) -> io::Result<()> {
    let no_info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: the descriptor is open for the length of the call, and a null siginfo is what kill(2) would send.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd.as_raw_fd(),
            libc::SIGKILL,
            no_info,
            0,
        )
    };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
