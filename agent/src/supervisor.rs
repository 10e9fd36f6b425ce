//! The process that a DaemonSet sees: it keeps a worker running.
//!
//! It holds the agent's listening socket, so that requests wait while a worker is replaced instead of failing, and does
//! nothing else that could fail.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::socket;

/// By which a worker is told how many there were before it, and how the last one ended: `<count> <words>`.
pub const PREDECESSORS: &str = "KEELWAY_AGENT_PREDECESSORS";
/// Exit code of a worker whose configuration is wrong (sysexits' EX_CONFIG): another one would fare no better.
pub const EXIT_CONFIG: u8 = 78;
/// A worker that lived no longer than this died of itself, perhaps.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// So many of them in a row make a crash loop,
const SHORT_LIVES: u32 = 3;
/// which pauses this long between workers: it costs little, and the next one is there in time.
const PAUSE: Duration = Duration::from_millis(50);
/// Where the configuration has become wrong under a worker that ran, it is read again as often.
const CONFIG_PAUSE: Duration = Duration::from_secs(1);

/// What ended the supervisor.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    #[error("{}: {source}", path.display())]
    Path { path: PathBuf, source: io::Error },
    #[error("{operation}: {source}")]
    System {
        operation: &'static str,
        source: io::Error,
    },
}

/// Runs workers until a signal asks to stop. `arguments` are those of this process after its subcommand.
pub fn run(socket_path: &Path, arguments: &[OsString]) -> Result<ExitCode, SupervisorError> {
    let system = |operation| move |source| SupervisorError::System { operation, source };
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD]);
    signals
        .thread_block()
        .map_err(|errno| system("block signals")(errno.into()))?;

    let _lock = lock(socket_path)?;
    let listener = socket::listen(socket_path).map_err(|source| SupervisorError::Path {
        path: socket_path.into(),
        source,
    })?;
    let program = program();
    let mut stopping = false;
    let mut short_lives = 0;
    let mut predecessors = Predecessors::default();
    loop {
        let began = Instant::now();
        let mut worker = spawn(&program, &listener, arguments, &predecessors)
            .map_err(system("start the worker"))?;
        let status = loop {
            match signals
                .wait()
                .map_err(|errno| system("wait for a signal")(errno.into()))?
            {
                Signal::SIGCHLD => {
                    if let Some(status) =
                        worker.try_wait().map_err(system("wait for the worker"))?
                    {
                        break status;
                    }
                }
                signal => {
                    stopping = true;
                    stop(&worker, signal);
                }
            }
        };
        if stopping {
            return Ok(ExitCode::SUCCESS);
        }
        let misconfigured = status.code() == Some(EXIT_CONFIG.into());
        // What the first one was started with is refused. What becomes wrong later ends nothing that runs: whoever asks waits.
        if misconfigured && predecessors.count == 0 {
            return Ok(ExitCode::from(EXIT_CONFIG));
        }
        tracing::warn!(%status, "the worker ended; another one begins");
        predecessors = Predecessors {
            count: predecessors.count.saturating_add(1),
            last_end: Some(status.to_string()),
        };
        short_lives = if began.elapsed() < SHORT_LIFE {
            short_lives + 1
        } else {
            0
        };
        if misconfigured {
            std::thread::sleep(CONFIG_PAUSE);
        } else if short_lives >= SHORT_LIVES {
            std::thread::sleep(PAUSE);
        }
    }
}

/// The workers that came before one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Predecessors {
    pub count: u32,
    /// How the last one ended, in words.
    pub last_end: Option<String>,
}

impl Predecessors {
    /// Reads what [`PREDECESSORS`] says; anything else is none.
    pub fn parse(text: &str) -> Self {
        let parsed = text
            .split_once(' ')
            .and_then(|(count, words)| Some((count.parse().ok()?, words)));
        match parsed {
            Some((count, words)) => Self {
                count,
                last_end: Some(words.to_owned()),
            },
            None => Self::default(),
        }
    }
}

/// Takes the right to be this node's agent, and waits for whoever has it.
pub fn lock(socket_path: &Path) -> Result<File, SupervisorError> {
    let path = socket_path.with_extension("lock");
    let take = || -> io::Result<File> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let file = File::create(&path)?;
        if file.try_lock().is_err() {
            tracing::info!(path = %path.display(), "another agent of this node is still there; waiting for its end");
            file.lock()?;
        }
        Ok(file)
    };
    take().map_err(|source| SupervisorError::Path {
        path: path.clone(),
        source,
    })
}

/// The right to be this node's agent, if nobody has it.
pub fn try_lock(socket_path: &Path) -> io::Result<Option<File>> {
    let path = socket_path.with_extension("lock");
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let file = File::create(&path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(std::fs::TryLockError::WouldBlock) => Ok(None),
        Err(std::fs::TryLockError::Error(error)) => Err(error),
    }
}

/// This program, by its path, so that a worker is seen under its name; by its open file, when the path is gone.
fn program() -> PathBuf {
    std::env::current_exe()
        .ok()
        .filter(|path| path.exists())
        .unwrap_or_else(|| "/proc/self/exe".into())
}

fn spawn(
    program: &Path,
    listener: &UnixListener,
    arguments: &[OsString],
    predecessors: &Predecessors,
) -> io::Result<Child> {
    // The socket travels as standard input: a descriptor whose number needs no agreement.
    let socket = OwnedFd::from(listener.try_clone()?);
    let mut command = Command::new(program);
    command
        .arg("worker")
        .args(arguments)
        .stdin(Stdio::from(socket));
    if let Some(words) = &predecessors.last_end {
        command.env(PREDECESSORS, format!("{} {words}", predecessors.count));
    }
    command.spawn()
}

fn stop(worker: &Child, signal: Signal) {
    let Ok(pid) = i32::try_from(worker.id()) else {
        return;
    };
    if let Err(errno) = kill(Pid::from_raw(pid), signal) {
        tracing::warn!(%errno, "the worker could not be told to stop");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_learns_of_those_before_it_and_takes_nonsense_for_none() {
        let told = Predecessors::parse("3 signal: 9 (SIGKILL)");
        assert_eq!(
            (told.count, told.last_end.as_deref()),
            (3, Some("signal: 9 (SIGKILL)"))
        );
        for nonsense in ["", "3", "x y", "-1 y"] {
            assert_eq!(Predecessors::parse(nonsense), Predecessors::default());
        }
    }
}
