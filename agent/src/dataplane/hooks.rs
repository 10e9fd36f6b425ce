//! The hooks of pods' interfaces, for threads beside the loop: hanging one on takes milliseconds, in which the kernel waits for
//! every CPU.

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
};

use super::{
    Error,
    programs::PacketProgram,
    sys::{self, LinkTarget},
};

/// The programs of a pod's interface and where their links are pinned.
pub struct PodHooks {
    pub(super) programs: Vec<(PacketProgram, OwnedFd)>,
    pub(super) links: PathBuf,
}

impl PodHooks {
    /// Hangs the programs on the host's side of a new veth.
    pub fn attach(&self, ifindex: u32) -> Result<(), Error> {
        let attached = self.attach_all(ifindex);
        if attached.is_err() {
            self.forget(ifindex);
        }
        attached
    }

    /// Removes the pins of hooks whose interface is gone, or is about to go.
    pub fn forget(&self, ifindex: u32) {
        for (program, _) in &self.programs {
            // One that is left is found by the next comparison of pins and interfaces.
            let _ = fs::remove_file(self.links.join(program.pin(ifindex)));
        }
    }

    fn attach_all(&self, ifindex: u32) -> Result<(), Error> {
        for (program, fd) in &self.programs {
            let failed = |source| Error::Attach {
                program: program.name(),
                target: LinkTarget::Interface(ifindex),
                source,
            };
            let link =
                sys::create_link(fd.as_fd(), ifindex, program.attach_type()).map_err(failed)?;
            let path = self.links.join(program.pin(ifindex));
            let pin = || match sys::pin(link.as_fd(), &path) {
                // Of an interface that had the index before: it is new, so that one is gone.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    fs::remove_file(&path)?;
                    sys::pin(link.as_fd(), &path)
                }
                other => other,
            };
            pin().map_err(|source| Error::Link {
                link: path.clone(),
                source,
            })?;
        }
        Ok(())
    }
}
