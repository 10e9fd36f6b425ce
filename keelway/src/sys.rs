//! System calls: those that nix does not wrap, or not without more of it (pidfds, extended attributes), and limits.
#![expect(
    unsafe_code,
    reason = "the one module of this crate that calls libc directly"
)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;

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

/// Sends a signal to the process behind a pidfd.
///
/// # Errors
/// ESRCH when it has ended and was reaped.
pub fn pidfd_kill(fd: &OwnedFd, signal: Signal) -> io::Result<()> {
    let no_info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: the descriptor is open for the length of the call, and a null siginfo is what kill(2) would send.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd.as_raw_fd(),
            signal as libc::c_int,
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

/// A copy of a file descriptor of the process behind a pidfd, by its number there.
///
/// # Errors
/// EBADF when it has none of that number, EPERM when it is not ours to look into.
pub fn pidfd_getfd(process: &OwnedFd, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three integers and no pointers; the descriptor is open for the length of the call.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A mount of a file or folder of the caller's, that is nowhere yet.
///
/// # Errors
/// When there is no such file, or the caller may not mount.
pub fn open_tree(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path ends with a zero byte; the other arguments are integers.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Puts a mount that is nowhere over a file or folder, in the mount namespace of the calling thread.
///
/// # Errors
/// When there is no such file, or the caller may not mount.
pub fn move_mount(tree: &OwnedFd, to: &Path) -> io::Result<()> {
    let to = CString::new(to.as_os_str().as_bytes())?;
    // SAFETY: both paths end with a zero byte, and the descriptor is open for the length of the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Lets this process have as many open files as it may ask for.
///
/// # Errors
/// When the kernel refuses.
pub fn raise_descriptors() -> io::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Ok(())
}

/// Gives `to` the extended attribute of this name that `from` has. None is copied when `from` has none, or when its file
/// system knows no attributes.
///
/// # Errors
/// When the attribute cannot be read or set; one of more than 64 bytes cannot be read.
pub fn copy_attribute(from: &Path, to: &Path, name: &CStr) -> io::Result<()> {
    let (from, to) = (
        CString::new(from.as_os_str().as_bytes())?,
        CString::new(to.as_os_str().as_bytes())?,
    );
    let mut value = [0_u8; 64];
    // SAFETY: path and name end with a zero byte, and the kernel writes no more than the given length into the buffer.
    let length = unsafe {
        libc::lgetxattr(
            from.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    let Ok(length) = usize::try_from(length) else {
        let error = io::Error::last_os_error();
        let none = matches!(error.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP));
        return if none { Ok(()) } else { Err(error) };
    };
    // SAFETY: as above; the kernel reads `length` bytes, which is how many it has just written.
    let done =
        unsafe { libc::lsetxattr(to.as_ptr(), name.as_ptr(), value.as_ptr().cast(), length, 0) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
