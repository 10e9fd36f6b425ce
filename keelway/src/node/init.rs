//! `keelway node-init`: makes a node's namespaces, and is its PID 1.
//!
//! It runs twice. The first process moves into the node's control groups and new namespaces, starts the second and ends;
//! the second is PID 1 of the new pid namespace, builds the file systems, and supervises. It is single-threaded and small:
//! a poll loop over signals, the control channel and the services' notifications. When it ends, for whatever reason, the
//! kernel ends every process of the node, and with them go its mounts, interfaces and BPF objects.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{UnixCredentials, recvmsg, setsockopt, sockopt};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sethostname};

use super::services::{Handed, NOTIFY_SOCKET, Services};
use super::{Event, NodeSpec, Order, SERVICES_FILE, mounts};
use crate::cgroup::{CgroupError, Hierarchies};
use crate::network::{self, NetworkError};

/// An order or event is far shorter; a longer line is not ours.
const LINE_BYTES_MAX: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("cannot read the node's description {path}: {source}")]
    Spec { path: PathBuf, source: io::Error },
    #[error("standard input is not a control channel: {0}")]
    Channel(io::Error),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot make the node's namespaces: {0}")]
    Namespaces(nix::Error),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Mounts(#[from] mounts::MountError),
    #[error("cannot {action}: {source}")]
    System { action: String, source: io::Error },
    #[error("`keelway up` ended before the cluster was up")]
    Abandoned,
}

fn system(action: impl Into<String>) -> impl FnOnce(io::Error) -> InitError {
    move |source| InitError::System {
        action: action.into(),
        source,
    }
}

/// What `up` gives the first process, as flags.
#[derive(Debug, Clone)]
pub struct InitArguments {
    pub spec: PathBuf,
    /// The process that has to be our parent; None in PID 1.
    pub parent: Option<u32>,
    /// In PID 1, the process of `up`, as the machine numbers it.
    pub outside: Option<u32>,
    /// Standard output is the listening socket for the service that wants it.
    pub listener: bool,
}

/// Runs whichever of the two processes this is.
///
/// # Errors
/// What went wrong; it has been reported over the control channel too.
pub fn run(arguments: &InitArguments) -> Result<(), InitError> {
    let mut channel = Channel::from_stdin()?;
    let outcome = match arguments.parent {
        Some(parent) => make_namespaces(arguments, parent, &mut channel),
        None => supervise(arguments, &mut channel),
    };
    if let Err(error) = &outcome {
        channel.send(&Event::Failed {
            reason: error.to_string(),
        });
    }
    outcome
}

fn read_spec(path: &Path) -> Result<NodeSpec, InitError> {
    let failed = |source| InitError::Spec {
        path: path.to_owned(),
        source,
    };
    serde_json::from_slice(&fs::read(path).map_err(failed)?).map_err(|error| failed(error.into()))
}

fn make_namespaces(
    arguments: &InitArguments,
    parent: u32,
    channel: &mut Channel,
) -> Result<(), InitError> {
    // If `up` dies, so does this process, until PID 1 has taken over and watches the control channel.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(InitError::Namespaces)?;
    if nix::unistd::getppid().as_raw() as u32 != parent {
        return Err(InitError::Abandoned);
    }
    let spec = read_spec(&arguments.spec)?;
    let mut hierarchies = Hierarchies::of_this_machine()?;
    if spec.machine {
        hierarchies = hierarchies.for_the_machine();
    }
    hierarchies.join(&spec.cluster, &spec.name)?;
    let mut own = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC;
    if !spec.machine {
        own |= CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS;
    }
    unshare(own).map_err(InitError::Namespaces)?;
    if !spec.machine {
        sethostname(&spec.name).map_err(InitError::Namespaces)?;
        // containerd listens on 127.0.0.1, which exists only once lo is up.
        network::loopback_up()?;
    }
    // Last: from here on this process may not start threads.
    unshare(CloneFlags::CLONE_NEWPID).map_err(InitError::Namespaces)?;

    let mut command = Command::new("/proc/self/exe");
    command.arg("node-init").arg("--spec").arg(&arguments.spec);
    command.arg("--outside").arg(parent.to_string());
    let output = if arguments.listener {
        command.arg("--listener");
        Stdio::inherit()
    } else {
        Stdio::null()
    };
    let init = command
        .stdin(Stdio::inherit())
        .stdout(output)
        .spawn()
        .map_err(system("start PID 1"))?;
    channel.send(&Event::Init { pid: init.id() });
    Ok(())
}

fn supervise(arguments: &InitArguments, channel: &mut Channel) -> Result<(), InitError> {
    if std::process::id() != 1 {
        return Err(system("be PID 1")(io::Error::other(
            "this is not a new pid namespace; `keelway up` starts it",
        )));
    }
    // Else it would be called "exe", after /proc/self/exe.
    let _ = nix::sys::prctl::set_name(c"keelway");
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        signals.add(signal);
    }
    signals
        .thread_block()
        .map_err(|error| system("block signals")(error.into()))?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(|error| system("receive signals")(error.into()))?;

    let spec = read_spec(&arguments.spec)?;
    // Opened before the root changes: `keelway status` reads it in the node's folder on the machine.
    let status = StatusFile::open(&spec.dir)?;
    // So are the machine's namespaces: /proc is still the machine's. If `up` has ended meanwhile, so will this node.
    let outside = match arguments.outside {
        Some(up) if spec.services.iter().any(|service| service.outside) => {
            let open = |kind: &str| {
                let path = format!("/proc/{up}/ns/{kind}");
                let file = fs::File::open(&path);
                file.map(OwnedFd::from)
                    .map_err(system(format!("open {path}")))
            };
            Some((open("net")?, open("mnt")?))
        }
        _ => None,
    };
    mounts::enter(&spec)?;
    for (name, value) in &spec.net_sysctls {
        let path = Path::new("/proc/sys/net").join(name);
        fs::write(&path, value).map_err(system(format!("set {}", path.display())))?;
    }
    let notifications =
        UnixDatagram::bind(NOTIFY_SOCKET).map_err(system(format!("listen on {NOTIFY_SOCKET}")))?;
    notifications
        .set_nonblocking(true)
        .map_err(system("listen for notifications"))?;
    setsockopt(&notifications, sockopt::PassCred, &true)
        .map_err(|error| system("learn who notifies")(error.into()))?;

    let listener = if arguments.listener {
        Some(
            io::stdout()
                .as_fd()
                .try_clone_to_owned()
                .map_err(system("keep the listening socket"))?,
        )
    } else {
        None
    };
    let mut init = Init {
        services: Services::new(spec.services, spec.path, Handed { listener, outside }),
        status,
        detached: false,
    };
    channel.send(&Event::Booted);
    init.run(channel, &signals, &notifications)
}

struct Init {
    services: Services,
    status: StatusFile,
    /// `up` has ended well; nobody is at the other end of the channel.
    detached: bool,
}

impl Init {
    /// Returns when it is told to stop, and its services have ended or had their time; or when `up` ended before the cluster was up.
    fn run(
        &mut self,
        channel: &mut Channel,
        signals: &SignalFd,
        notifications: &UnixDatagram,
    ) -> Result<(), InitError> {
        loop {
            if self.services.have_stopped(Instant::now()) {
                return Ok(());
            }
            for event in self.services.start_due(Instant::now()) {
                channel.send(&event);
            }
            self.status.write(&self.services);

            let timeout = self.services.next_start().map_or(PollTimeout::NONE, |due| {
                // Rounded up, or the loop would spin for the last millisecond.
                let left = due.saturating_duration_since(Instant::now())
                    + std::time::Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            });
            let mut ready = vec![
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(notifications.as_fd(), PollFlags::POLLIN),
            ];
            if !self.detached {
                ready.push(PollFd::new(channel.stream.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut ready, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(system("wait for events")(error.into())),
            }

            while let Ok(Some(signal)) = signals.read_signal() {
                if signal.ssi_signo == Signal::SIGTERM as u32
                    || signal.ssi_signo == Signal::SIGINT as u32
                {
                    self.services.stop(Instant::now());
                }
            }
            self.reap(channel);
            for service in read_notifications(notifications, &self.services) {
                channel.send(&Event::Ready {
                    service: service.clone(),
                });
                self.services.is_ready(service);
            }
            if !self.detached {
                self.take_orders(channel)?;
            }
        }
    }

    fn take_orders(&mut self, channel: &mut Channel) -> Result<(), InitError> {
        loop {
            match channel.receive() {
                Ok(Some(Order::Happened { name })) => self.services.happened(name),
                Ok(Some(Order::Detach)) => {
                    self.detached = true;
                    return Ok(());
                }
                Ok(Some(Order::Stop)) => self.services.stop(Instant::now()),
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    return Err(InitError::Abandoned);
                }
                Err(error) => return Err(InitError::Channel(error)),
            }
        }
    }

    /// Collects every child that has ended: services, and orphans that the kernel gave to PID 1.
    fn reap(&mut self, channel: &mut Channel) {
        loop {
            let (pid, status) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, format!("exit status {code}")),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("{signal}")),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            if let Some(event) = self
                .services
                .ended(pid.as_raw() as u32, status, Instant::now())
            {
                if let Event::Exited {
                    service, status, ..
                } = &event
                {
                    eprintln!("{} {service} ended ({status})", jiff::Timestamp::now());
                }
                channel.send(&event);
            }
        }
    }
}

/// Names of services that have said READY=1. The kernel attests the sender's process, so one cannot speak for another.
fn read_notifications(socket: &UnixDatagram, services: &Services) -> Vec<String> {
    let mut ready = Vec::new();
    let mut buffer = [0_u8; 4096];
    let mut control = nix::cmsg_space!(UnixCredentials);
    loop {
        let mut parts = [io::IoSliceMut::new(&mut buffer)];
        let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
        let (length, sender) = match recvmsg::<()>(
            std::os::fd::AsRawFd::as_raw_fd(socket),
            &mut parts,
            Some(&mut control),
            flags,
        ) {
            Ok(message) => {
                let sender = message.cmsgs().ok().and_then(|mut parts| {
                    parts.find_map(|part| match part {
                        nix::sys::socket::ControlMessageOwned::ScmCredentials(credentials) => {
                            Some(credentials.pid())
                        }
                        _ => None,
                    })
                });
                (message.bytes, sender)
            }
            Err(_) => return ready,
        };
        let Some(text) = buffer
            .get(..length)
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
        else {
            continue;
        };
        let service = sender.and_then(|pid| services.name_of(pid as u32));
        if let (true, Some(service)) = (text.lines().any(|line| line == "READY=1"), service) {
            ready.push(service.to_owned());
        }
    }
}

/// [`SERVICES_FILE`]. Replaced by rename, so a reader never sees half of it.
struct StatusFile {
    folder: OwnedFd,
    last: String,
}

impl StatusFile {
    fn open(dir: &Path) -> Result<Self, InitError> {
        let folder = fs::File::open(dir).map_err(system(format!("open {}", dir.display())))?;
        Ok(StatusFile {
            folder: folder.into(),
            last: String::new(),
        })
    }

    fn write(&mut self, services: &Services) {
        let Ok(text) = serde_json::to_string(&services.status()) else {
            return;
        };
        if text == self.last {
            return;
        }
        // It only informs: a full disk must not end the node.
        if let Err(error) = self.replace(&text) {
            eprintln!("cannot write services.json: {error}");
        }
        self.last = text;
    }

    fn replace(&self, text: &str) -> io::Result<()> {
        use nix::fcntl::{OFlag, openat, renameat};
        use nix::sys::stat::Mode;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC;
        let mut file = fs::File::from(openat(
            &self.folder,
            "services.json.new",
            flags,
            Mode::from_bits_truncate(0o644),
        )?);
        file.write_all(text.as_bytes())?;
        Ok(renameat(
            &self.folder,
            "services.json.new",
            &self.folder,
            SERVICES_FILE,
        )?)
    }
}

/// The node's end of the control channel.
struct Channel {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Channel {
    fn from_stdin() -> Result<Self, InitError> {
        let stream = UnixStream::from(
            io::stdin()
                .as_fd()
                .try_clone_to_owned()
                .map_err(InitError::Channel)?,
        );
        stream.peer_addr().map_err(InitError::Channel)?;
        stream.set_nonblocking(true).map_err(InitError::Channel)?;
        Ok(Channel {
            stream,
            received: Vec::new(),
        })
    }

    /// Nobody may be listening any more, and that is fine.
    fn send(&mut self, event: &Event) {
        if let Ok(mut line) = serde_json::to_vec(event) {
            line.push(b'\n');
            drop(self.stream.write_all(&line));
        }
    }

    /// The next order, or None when there is none yet.
    fn receive(&mut self) -> io::Result<Option<Order>> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            let mut buffer = [0_u8; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(length) => self
                    .received
                    .extend(buffer.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.received.len() > LINE_BYTES_MAX {
                return Err(io::Error::new(
                    ErrorKind::InvalidData,
                    "an order without an end",
                ));
            }
        }
    }
}
