//! Peer processes: clients and servers that live in a pod's namespace and in a chosen cgroup.
//!
//! A peer is this same binary, run as `keelway-bench peer`. It speaks JSON lines on its standard
//! streams and ends when its standard input closes, so a killed bench leaves none behind.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::load::{self, Order, Sample};

/// Where a peer lives.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    /// Network namespace to enter, as a path.
    #[arg(long)]
    pub netns: PathBuf,
    /// cgroup v2 folder to join: whether socket hooks see this peer is decided by it.
    #[arg(long)]
    pub cgroup: PathBuf,
    /// CPU to run on; a client goes where its order says.
    #[arg(long)]
    pub cpu: usize,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Role {
    Server,
    Client,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply {
    Ready,
    Sample(Sample),
    Failed(String),
}

#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    #[error("peer can't be started: {0}")]
    Spawn(#[source] io::Error),
    #[error("peer in {place}: {source}")]
    Pipe { place: PathBuf, source: io::Error },
    #[error("peer in {place} said {said:?}, which is not a reply")]
    Protocol { place: PathBuf, said: String },
    #[error("{order:?} from {place} failed: {reason}")]
    Run {
        order: Box<Order>,
        place: PathBuf,
        reason: String,
    },
}

/// A running peer process, as its parent sees it. Ends when dropped.
pub struct Peer {
    child: Child,
    orders: Option<ChildStdin>,
    replies: BufReader<ChildStdout>,
    place: PathBuf,
}

impl Peer {
    /// Starts a peer and waits until it is in its place (and, for a server, listens).
    ///
    /// # Errors
    /// When the process can't be started, or can't enter its place.
    pub fn start(place: &Place, role: Role) -> Result<Self, PeerError> {
        let program = std::env::current_exe().map_err(PeerError::Spawn)?;
        let mut child = Command::new(program)
            .arg("peer")
            .arg(match role {
                Role::Server => "server",
                Role::Client => "client",
            })
            .arg("--netns")
            .arg(&place.netns)
            .arg("--cgroup")
            .arg(&place.cgroup)
            .arg("--cpu")
            .arg(place.cpu.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(PeerError::Spawn)?;
        let (orders, replies) = (child.stdin.take(), child.stdout.take());
        let replies =
            replies.ok_or_else(|| PeerError::Spawn(io::Error::other("no standard output")))?;
        let mut peer = Self {
            child,
            orders,
            replies: BufReader::new(replies),
            place: place.netns.clone(),
        };
        match peer.reply()? {
            Reply::Ready => Ok(peer),
            other => Err(peer.unexpected(&other)),
        }
    }

    /// Runs one measurement from this peer, which must be a client.
    ///
    /// # Errors
    /// When the peer is gone or the measurement failed.
    pub fn measure(&mut self, order: &Order) -> Result<Sample, PeerError> {
        let line = serde_json::to_string(order).map_err(io::Error::other);
        let sent = line.and_then(|line| match &mut self.orders {
            Some(pipe) => writeln!(pipe, "{line}"),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        });
        sent.map_err(|source| PeerError::Pipe {
            place: self.place.clone(),
            source,
        })?;
        match self.reply()? {
            Reply::Sample(sample) => Ok(sample),
            Reply::Failed(reason) => Err(PeerError::Run {
                order: Box::new(*order),
                place: self.place.clone(),
                reason,
            }),
            other @ Reply::Ready => Err(self.unexpected(&other)),
        }
    }

    fn reply(&mut self) -> Result<Reply, PeerError> {
        let mut line = String::new();
        self.replies
            .read_line(&mut line)
            .map_err(|source| PeerError::Pipe {
                place: self.place.clone(),
                source,
            })?;
        serde_json::from_str(&line).map_err(|_| PeerError::Protocol {
            place: self.place.clone(),
            said: line,
        })
    }

    fn unexpected(&self, reply: &Reply) -> PeerError {
        PeerError::Protocol {
            place: self.place.clone(),
            said: format!("{reply:?}"),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Closing its input asks the peer to end; the kill is for one that is stuck in a run.
        drop(self.orders.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The life of a peer process: enter the place, then serve or take orders until input closes.
///
/// # Errors
/// When the place can't be entered or the standard streams break.
pub fn live(place: &Place, role: Role) -> anyhow::Result<()> {
    enter(place)?;
    if let Role::Server = role {
        load::serve()?;
    }
    let mut out = io::stdout().lock();
    say(&mut out, &Reply::Ready)?;
    for line in io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?)?;
        pin(order.cpu)?;
        let reply = match load::run(&order) {
            Ok(sample) => Reply::Sample(sample),
            Err(error) => Reply::Failed(error.to_string()),
        };
        say(&mut out, &reply)?;
    }
    Ok(())
}

fn say(out: &mut impl Write, reply: &Reply) -> anyhow::Result<()> {
    writeln!(out, "{}", serde_json::to_string(reply)?)?;
    Ok(out.flush()?)
}

fn enter(place: &Place) -> anyhow::Result<()> {
    use anyhow::Context as _;
    let procs = place.cgroup.join("cgroup.procs");
    fs::write(&procs, std::process::id().to_string())
        .with_context(|| format!("joining {}", procs.display()))?;
    enter_netns(&place.netns)?;
    pin(place.cpu)
}

fn pin(cpu: usize) -> anyhow::Result<()> {
    use anyhow::Context as _;
    let mut cpus = CpuSet::new();
    cpus.set(cpu).with_context(|| format!("CPU {cpu}"))?;
    sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("pinning to CPU {cpu}"))
}

fn enter_netns(path: &Path) -> anyhow::Result<()> {
    use anyhow::Context as _;
    let namespace = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    setns(namespace, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("entering {}", path.display()))
}
