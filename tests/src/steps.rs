//! A program that is killed at a chosen step: before the nth of those system calls by which it changes anything outside itself.

use std::collections::HashSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// write, sendto, sendmsg, ftruncate, rename, unlink, unlinkat, renameat, setns, renameat2, bpf: x86-64's numbers.
const STEPS: [u64; 11] = [1, 44, 46, 77, 82, 87, 263, 264, 308, 316, 321];

/// A process whose steps are counted. It is let go when this is dropped.
pub struct Steps {
    armed: Arc<AtomicBool>,
    done: Arc<AtomicBool>,
    taken: Arc<AtomicU32>,
    tracer: Option<JoinHandle<Result<()>>>,
}

impl Steps {
    /// Follows a process that will be killed before its `last` step from [`Steps::count`] on.
    pub fn follow(process: i32, last: u32) -> Result<Self> {
        let (armed, done, taken) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU32::new(0)),
        );
        let (tell, told) = sync_channel(1);
        // All requests about a process have to come from one thread.
        let tracer = {
            let (armed, done, taken) = (armed.clone(), done.clone(), taken.clone());
            thread::spawn(move || {
                let tracees = seize(process)?;
                tell.send(()).context("whoever asked is gone")?;
                trace(process, last, tracees, &armed, &done, &taken)
            })
        };
        if told.recv().is_err() {
            // It ended without a word: why, its end says.
            tracer.join().expect("no panic")?;
            bail!("the process cannot be followed");
        }
        Ok(Self {
            armed,
            done,
            taken,
            tracer: Some(tracer),
        })
    }

    /// From now on.
    pub fn count(&self) {
        self.armed.store(true, Ordering::SeqCst);
    }

    /// Lets the process go, if it lives, and says how many steps it has taken.
    pub fn finish(mut self) -> Result<u32> {
        self.done.store(true, Ordering::SeqCst);
        if let Some(tracer) = self.tracer.take() {
            tracer.join().expect("no panic")?;
        }
        Ok(self.taken.load(Ordering::SeqCst))
    }
}

fn seize(process: i32) -> Result<HashSet<Pid>> {
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE;
    let mut seized = HashSet::new();
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let thread = entry?.file_name();
        let thread: i32 = thread.to_string_lossy().parse()?;
        let thread = Pid::from_raw(thread);
        // One may have ended just now.
        if ptrace::seize(thread, options).is_ok() {
            ptrace::interrupt(thread)?;
            seized.insert(thread);
        }
    }
    Ok(seized)
}

fn trace(
    process: i32,
    last: u32,
    mut tracees: HashSet<Pid>,
    armed: &AtomicBool,
    done: &AtomicBool,
    taken: &AtomicU32,
) -> Result<()> {
    let mut inside: HashSet<Pid> = HashSet::new();
    let mut killed = false;
    while !tracees.is_empty() {
        // Not the children of other threads of this program.
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD | WaitPidFlag::WNOHANG;
        let status = match waitpid(Pid::from_raw(-1), Some(flags)) {
            Err(Errno::ECHILD) => return Ok(()),
            status => status?,
        };
        let (thread, signal) = match status {
            WaitStatus::StillAlive => {
                if done.load(Ordering::SeqCst) && !killed {
                    // The end of this thread lets everybody go.
                    return Ok(());
                }
                thread::yield_now();
                continue;
            }
            WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..) => {
                tracees.remove(&thread);
                continue;
            }
            WaitStatus::PtraceSyscall(thread) => {
                if inside.remove(&thread) {
                    (thread, None)
                } else {
                    inside.insert(thread);
                    let is_step = ptrace::getregs(thread)
                        .is_ok_and(|registers| STEPS.contains(&registers.orig_rax));
                    if is_step && armed.load(Ordering::SeqCst) && !killed {
                        let number = taken.fetch_add(1, Ordering::SeqCst) + 1;
                        if number == last {
                            killed = true;
                            kill(Pid::from_raw(process), Signal::SIGKILL)?;
                        }
                    }
                    (thread, None)
                }
            }
            WaitStatus::PtraceEvent(thread, ..) => {
                tracees.insert(thread);
                (thread, None)
            }
            WaitStatus::Stopped(thread, signal) => {
                tracees.insert(thread);
                (thread, Some(signal))
            }
            WaitStatus::Continued(thread) => (thread, None),
        };
        match ptrace::syscall(thread, signal) {
            // Killed already.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
