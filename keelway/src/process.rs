//! A process named so that it cannot be confused with a later one of the same number.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::sys;

/// How long the PID 1 of a node is waited for: longer than it waits for its services.
pub const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// A process of the machine: its number, and the tick since boot at which it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    pub pid: u32,
    pub start_ticks: u64,
}

impl Process {
    /// The process that has this number now, or None.
    pub fn now(pid: u32) -> Option<Process> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Process {
            pid,
            start_ticks: start_ticks(&stat)?,
        })
    }

    /// Its number in the pid namespace of another process; None when it is in another one.
    pub fn number_within(&self, of: &Process) -> Option<u32> {
        let namespace = |pid| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        if namespace(self.pid)? != namespace(of.pid)? {
            return None;
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let numbers = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))?;
        numbers.split_whitespace().last()?.parse().ok()
    }

    /// Whether it is still there; a zombie is not.
    pub fn is_alive(&self) -> bool {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)) else {
            return false;
        };
        start_ticks(&stat) == Some(self.start_ticks) && !matches!(state(&stat), Some('Z' | 'X'))
    }

    /// Sends SIGKILL and waits until the process has ended. A process that is gone already is a success.
    ///
    /// # Errors
    /// TimedOut when it has not ended within `timeout`; otherwise what the system calls say.
    pub fn kill_and_wait(&self, timeout: Duration) -> io::Result<()> {
        self.signal_and_wait(Signal::SIGKILL, timeout)
    }

    /// Sends a signal that ends the process, and waits until it has. A process that is gone already is a success.
    ///
    /// # Errors
    /// As [`Process::kill_and_wait`].
    pub fn signal_and_wait(&self, signal: Signal, timeout: Duration) -> io::Result<()> {
        let fd = match sys::pidfd_open(self.pid) {
            Ok(fd) => fd,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            Err(error) => return Err(error),
        };
        // The pidfd is open, so the number cannot pass to another process between this look and the signal.
        if !self.is_alive() {
            return Ok(());
        }
        match sys::pidfd_kill(&fd, signal) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            Err(error) => return Err(error),
        }
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], wait) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("process {} does not end", self.pid),
                    ));
                }
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Field 22 of /proc/PID/stat. The second field, the name, may itself hold spaces and brackets.
fn start_ticks(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

fn state(stat: &str) -> Option<char> {
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .next()?
        .chars()
        .next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_past_a_name_with_brackets_and_spaces() {
        let stat = "7 (a) R (b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 1000 10";
        assert_eq!(start_ticks(stat), Some(4242));
        assert_eq!(state(stat), Some('S'));
    }

    #[test]
    fn a_process_has_its_number_in_the_namespace_that_it_is_in() {
        let own = Process::now(std::process::id()).expect("it is there");
        assert_eq!(own.number_within(&own), Some(std::process::id()));
    }

    #[test]
    fn killing_waits_for_the_end_and_a_second_time_succeeds() {
        let mut child = std::process::Command::new("/bin/sleep")
            .arg("1000")
            .spawn()
            .expect("sleep starts");
        let process = Process::now(child.id()).expect("it is there");
        assert!(process.is_alive());
        process
            .kill_and_wait(Duration::from_secs(5))
            .expect("it ends");
        assert!(!process.is_alive(), "a zombie does not count as alive");
        child.wait().expect("reaped");
        process
            .kill_and_wait(Duration::from_secs(5))
            .expect("gone is a success");
    }

    #[test]
    fn a_process_with_the_same_number_but_another_start_is_left_alone() {
        let mut child = std::process::Command::new("/bin/sleep")
            .arg("1000")
            .spawn()
            .expect("sleep starts");
        let mut other = Process::now(child.id()).expect("it is there");
        other.start_ticks += 1;
        other
            .kill_and_wait(Duration::from_secs(1))
            .expect("nothing to do");
        assert!(
            child.try_wait().expect("asked").is_none(),
            "the wrong process was killed"
        );
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }
}
