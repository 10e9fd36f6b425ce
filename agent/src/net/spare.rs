//! Veth pairs that are made before a pod asks for one.
//!
//! Making a pair is quick, hanging programs on its end is not: the kernel waits for every CPU with each of them. So the host's side
//! lies ready with its programs on it, and the other one in a namespace that nobody else sees, from which it moves into the pod's.
//! That namespace lives as long as this process: a pair that was not used goes with it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use dataplane_abi::HOST_VETH_MAC;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use super::kernel::VethEnd;
use super::message::{self, LinkChange};
use super::pod::PodWire;
use super::{Kernel, Netlink, NetlinkError};

/// A pair that waits for its pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spare {
    /// Of both ends.
    pub name: String,
    pub host_index: u32,
    /// In the namespace where it waits.
    pod_index: u32,
}

/// Prefix of the names of pairs that wait.
const PREFIX: &str = "kw-s";

/// Whether an interface's name is that of a pair that waits.
pub fn is_spare(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// The namespace in which the pods' sides wait.
pub struct SpareNetwork {
    netns: OwnedFd,
    kernel: Mutex<Kernel>,
}

impl SpareNetwork {
    pub fn open() -> Result<Self, NetlinkError> {
        let enter = || -> Result<Self, NetlinkError> {
            let failed = |source| NetlinkError::new("make a network namespace", source);
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| failed(errno.into()))?;
            let netns = File::open("/proc/thread-self/ns/net").map_err(failed)?;
            Ok(Self {
                netns: netns.into(),
                kernel: Mutex::new(Kernel::new(Netlink::open()?)),
            })
        };
        std::thread::scope(|scope| {
            scope.spawn(enter).join().unwrap_or_else(|_| {
                Err(NetlinkError::new(
                    "make a network namespace",
                    io::Error::other("the thread panicked"),
                ))
            })
        })
    }

    /// Makes a pair with this number, both ends down.
    pub fn make(&self, host: &mut Kernel, number: u32, mtu: u32) -> Result<Spare, NetlinkError> {
        // The process id keeps it apart from those of a predecessor that are still going.
        let name = format!("{PREFIX}{:x}-{number:x}", std::process::id());
        let host_end = VethEnd {
            name: &name,
            mac: HOST_VETH_MAC,
            netns: None,
        };
        let pod_end = VethEnd {
            name: &name,
            mac: HOST_VETH_MAC,
            netns: Some(self.netns.as_fd()),
        };
        host.make_veth(&host_end, &pod_end, mtu)?;
        Ok(Spare {
            host_index: host.known_link(&name)?.index,
            pod_index: self.kernel().known_link(&name)?.index,
            name,
        })
    }

    /// Moves the pod's side into the pod, gives it its name and MAC address there, and returns its index.
    pub(super) fn give(
        &self,
        spare: &Spare,
        netns: BorrowedFd<'_>,
        pod: &mut Kernel,
        wire: &PodWire,
    ) -> Result<u32, NetlinkError> {
        let change = |index: Option<u32>| LinkChange {
            netns: Some(netns),
            index,
            mac: Some(wire.mac),
            mtu: Some(wire.mtu),
            name: Some(&wire.interface),
            ..LinkChange::default()
        };
        let give = |index| {
            self.kernel()
                .run(vec![message::change_link(spare.pod_index, &change(index))])
        };
        // It keeps its index unless the pod has an interface of that: so nobody has to ask for it.
        match give(Some(spare.pod_index)) {
            Ok(()) => Ok(spare.pod_index),
            Err(error) if error.errno() == Some(Errno::EBUSY) => {
                give(None)?;
                Ok(pod.known_link(&wire.interface)?.index)
            }
            Err(error) => Err(error),
        }
    }

    fn kernel(&self) -> std::sync::MutexGuard<'_, Kernel> {
        // A panic between request and answer leaves answers that the next request skips.
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
