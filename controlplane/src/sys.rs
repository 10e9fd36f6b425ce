//! The one place of the crate with system calls: sockets that the parent opened for us, and how many we may open.

#![allow(
    unsafe_code,
    reason = "taking over a file descriptor by its number cannot be checked by the compiler"
)]

use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The first descriptor of the LISTEN_FDS protocol (sd_listen_fds(3)).
const FIRST_FD: i32 = 3;

/// The listening sockets that `LISTEN_FDS` passes, when they are meant for this process. To be called once, first thing:
/// until then nothing else may have been opened under those numbers.
pub fn passed_listeners() -> std::io::Result<Vec<TcpListener>> {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse::<i32>().ok())
    };
    let meant_for_us =
        number("LISTEN_PID").is_none_or(|pid| u32::try_from(pid) == Ok(std::process::id()));
    let count = number("LISTEN_FDS").filter(|_| meant_for_us).unwrap_or(0);
    (FIRST_FD..FIRST_FD.saturating_add(count))
        .map(|fd| {
            // SAFETY: the protocol says that these descriptors are ours, and the caller calls this once, before anything
            // else in the process opens or closes descriptors, so that each gets exactly one owner.
            let owned = unsafe { OwnedFd::from_raw_fd(fd) };
            let listener = TcpListener::from(owned);
            listener.set_nonblocking(true)?;
            listener.local_addr()?;
            Ok(listener)
        })
        .collect()
}

/// Lets this process open as many files as it may: each client is one, and shells begin with a thousand.
pub fn raise_descriptor_limit() -> std::io::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Ok(())
}
