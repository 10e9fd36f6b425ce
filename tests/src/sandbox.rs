//! Namespaces for tests, which need no cleaning up: the kernel takes them when the last thread in them ends.

use std::{
    fs::{self, File},
    io,
    marker::PhantomData,
    os::fd::{AsFd as _, BorrowedFd},
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{NSFS_MAGIC, fstatfs},
};

/// Says whether a test may make namespaces; else prints that it is skipped.
pub fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("{test}: skipped: needs root");
    }
    root
}

/// The calling thread's own mount and network namespaces: a BPF file system at /sys/fs/bpf, the loopback up, and nothing else.
/// Threads that it starts share them.
pub struct Sandbox {
    /// Namespaces belong to the thread.
    not_send: PhantomData<*const ()>,
}

impl Sandbox {
    pub fn enter() -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_FS)
            .context("cannot make namespaces")?;
        let none = None::<&str>;
        // Without this, mounts would spread to the machine.
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .context("cannot make mounts private")?;
        mount(
            Some("bpf"),
            "/sys/fs/bpf",
            Some("bpf"),
            MsFlags::empty(),
            none,
        )
        .context("cannot mount a BPF file system")?;
        ip("link set lo up")?;
        Ok(Self {
            not_send: PhantomData,
        })
    }

    /// Where the sandbox's pins lie.
    pub fn pin_root(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join("keelway")
    }

    /// The network namespace that the thread is in.
    pub fn network(&self) -> Result<Network> {
        Network::current()
    }
}

/// A network namespace.
pub struct Network(File);

impl Network {
    fn current() -> Result<Self> {
        Ok(Self(
            File::open("/proc/thread-self/ns/net").context("cannot open the network namespace")?,
        ))
    }

    /// A new one, its loopback up.
    pub fn new() -> Result<Self> {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
            ip("link set lo up")?;
            Self::current()
        });
        made.join().unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// A host's, as of one that has been up for long: its links' own addresses can be used at once. While the kernel still asks whether
    /// somebody else has a link-local address, it looks for no neighbour on behalf of what it forwards.
    pub fn host() -> Result<Self> {
        let host = Self::new()?;
        let path = "/proc/sys/net/ipv6/conf/default/accept_dad";
        match host.run(|| fs::write(path, "0")) {
            // A machine without IPv6 has no such setting.
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context(path),
            _ => Ok(host),
        }
    }

    /// One that a path leads to.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let is_namespace = fstatfs(&file)?.filesystem_type() == NSFS_MAGIC;
        ensure!(is_namespace, "{} is no namespace", path.display());
        Ok(Self(file))
    }

    /// The same namespace, for another thread.
    pub fn try_clone(&self) -> Result<Self> {
        let file = self.0.try_clone();
        Ok(Self(file.context("cannot share the network namespace")?))
    }

    /// A path that leads here, for programs that this process starts.
    pub fn path(&self) -> PathBuf {
        use std::os::fd::AsRawFd as _;
        PathBuf::from(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.0.as_raw_fd()
        ))
    }

    /// Runs on a thread inside, and waits for it.
    pub fn run<R: Send>(&self, inside: impl FnOnce() -> R + Send) -> R {
        thread::scope(|scope| {
            let run = scope.spawn(|| {
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET)
                    .expect("cannot enter the network namespace");
                inside()
            });
            run.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// For calls that want the namespace as a descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Moves an interface of the calling thread's namespace here.
    pub fn take(&self, interface: &str) -> Result<()> {
        // ip knows namespaces by name or by a process; this process's table of files serves as the name.
        ip(&format!(
            "link set {interface} netns {}",
            self.path().display()
        ))
    }
}

/// Runs `ip` with these words in the calling thread's network namespace.
pub fn ip(words: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(words.split_whitespace())
        .output()
        .context("cannot run ip")?;
    ensure!(
        output.status.success(),
        "ip {words}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Index of an interface of the calling thread's network namespace.
pub fn ifindex(interface: &str) -> Result<u32> {
    // Not from /sys, which shows the namespace that it was mounted in.
    nix::net::if_::if_nametoindex(interface).with_context(|| format!("no interface {interface}"))
}
