use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

use super::{
    op::ServiceId,
    sys::{LinkTarget, MapShape},
};
use crate::net::NetlinkError;

/// Why the data plane could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{} does not lie on a BPF file system: mount one there (mount -t bpf bpf /sys/fs/bpf)", path.display())]
    NotBpffs { path: PathBuf },
    #[error("cannot use the pin directory {}", path.display())]
    Pins { path: PathBuf, source: io::Error },
    #[error("the map pinned at {} is {pinned:?}, and this agent needs {wanted:?}: remove the directory to start afresh", path.display())]
    Shape {
        path: PathBuf,
        pinned: MapShape,
        wanted: MapShape,
    },
    #[error("cannot tell the host's network namespace from others (Linux 5.14 or newer is needed)")]
    Netns { source: io::Error },
    #[error("cannot load the eBPF object")]
    Load(#[source] Box<EbpfError>),
    #[error("cannot {action} datagram sockets (CONFIG_INET_UDP_DIAG and CONFIG_INET_DIAG_DESTROY)")]
    Sockets {
        action: &'static str,
        source: io::Error,
    },
    #[error("the kernel refused the program {program}")]
    Program {
        program: &'static str,
        source: Box<ProgramError>,
    },
    #[error("the thread that {what} panicked: {words}")]
    Panicked { what: &'static str, words: String },
    #[error("the kernel has not verified the programs yet")]
    NotVerified,
    #[error("the eBPF object lacks {program}")]
    Missing { program: &'static str },
    #[error("cannot attach {program} to {target:?}")]
    Attach {
        program: &'static str,
        target: LinkTarget,
        source: io::Error,
    },
    #[error("cannot hang the pod's programs on {target:?}")]
    Filters {
        target: LinkTarget,
        source: NetlinkError,
    },
    #[error("cannot use the pinned link {}", link.display())]
    Link { link: PathBuf, source: io::Error },
    #[error("cannot open the control group {}: it must be a folder of the v2 hierarchy", path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("cannot {action} the map {map}")]
    Map {
        action: &'static str,
        map: &'static str,
        source: io::Error,
    },
    #[error("cannot read the counters")]
    Counters(#[source] Box<MapError>),
    #[error("cannot start the thread that reads events")]
    Thread(#[source] io::Error),
    #[error("cannot open the ring of events")]
    Ring(#[source] Box<MapError>),
    #[error("the map {map} is full: its limit is {limit}")]
    Full { map: &'static str, limit: u32 },
    #[error(
        "service port {service} has {backends} backends, and the limit is {}",
        dataplane_abi::limits::BACKENDS_PER_SERVICE
    )]
    TooManyBackends { service: ServiceId, backends: usize },
    #[error("cannot run the program {program}")]
    Run {
        program: &'static str,
        source: io::Error,
    },
}

impl Error {
    /// Whether an interface that a program was to hang on is not there.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Attach { source, .. } => source.raw_os_error() == Some(libc::ENODEV),
            Self::Filters { source, .. } => source.errno() == Some(nix::errno::Errno::ENODEV),
            _ => false,
        }
    }

    /// Whether there is no room for what was asked; all else that was may be done.
    pub fn is_limit(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::TooManyBackends { .. })
    }
}
