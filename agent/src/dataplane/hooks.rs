//! Programs on interfaces as filters of traffic control, which come and go with their interface and outlive the agent: those of pods,
//! and where the kernel has no tcx those of all interfaces. Other hooks are pinned links.

use std::{
    collections::BTreeSet,
    os::fd::{AsFd as _, OwnedFd},
};

use nix::errno::Errno;

use super::{Error, programs::PacketProgram, sys::LinkTarget};
use crate::net::{Filter, Kernel, Netlink, NetlinkError};

/// The programs of one kind of interface, for threads beside the loop too.
pub struct FilterHooks {
    pub(super) programs: Vec<(PacketProgram, OwnedFd)>,
}

impl FilterHooks {
    /// What is to hang on such an interface.
    pub fn filters(&self) -> Vec<Filter<'_>> {
        let all = self.programs.iter().map(|(program, fd)| Filter {
            direction: program.direction(),
            name: program.name(),
            program: fd.as_fd(),
        });
        all.collect()
    }

    /// Hangs the programs on an interface. Filters that hang there may be kept.
    pub(super) fn attach(&self, ifindex: u32, keep: bool) -> Result<(), Error> {
        let mut kernel = kernel()?;
        let mut filters = self.filters();
        if keep {
            filters = self.missing(&mut kernel, ifindex)?;
        }
        kernel.set_filters(ifindex, &filters).map_err(at(ifindex))
    }

    /// Puts the programs in place of those that hang on interfaces; gives how many. Interfaces that are gone need none.
    pub(super) fn replace(&self, interfaces: &[u32]) -> Result<usize, Error> {
        let (mut kernel, filters) = (kernel()?, self.filters());
        let mut replaced = 0;
        for &ifindex in interfaces {
            if set_if_there(&mut kernel, ifindex, &filters)? {
                replaced += filters.len();
            }
        }
        Ok(replaced)
    }

    /// Interfaces on which all the programs hang, in order.
    pub(super) fn attached(&self) -> Result<Vec<u32>, Error> {
        let mut kernel = kernel()?;
        let mut found = Vec::new();
        for ifindex in kernel.with_clsact().map_err(at(0))? {
            if self.missing(&mut kernel, ifindex)?.is_empty() {
                found.push(ifindex);
            }
        }
        Ok(found)
    }

    /// Takes the programs off all interfaces but these.
    pub(super) fn keep(&self, kept: &BTreeSet<u32>) -> Result<(), Error> {
        let names: Vec<&str> = self.programs.iter().map(|(one, _)| one.name()).collect();
        let attached = self.attached()?.into_iter();
        let mut kernel = kernel()?;
        for ifindex in attached.filter(|ifindex| !kept.contains(ifindex)) {
            kernel
                .remove_filters(ifindex, &names)
                .map_err(at(ifindex))?;
        }
        Ok(())
    }

    /// Hangs on again what is missing on these interfaces, and gives its names. Those that are gone need nothing.
    pub(super) fn repair(&self, interfaces: &[u32]) -> Result<Vec<String>, Error> {
        let mut kernel = kernel()?;
        let mut repaired = Vec::new();
        for &ifindex in interfaces {
            let missing = self.missing(&mut kernel, ifindex)?;
            if missing.is_empty() {
                continue;
            }
            if set_if_there(&mut kernel, ifindex, &missing)? {
                let name = |filter: &Filter<'_>| format!("{}-{ifindex}", filter.name);
                repaired.extend(missing.iter().map(name));
            }
        }
        Ok(repaired)
    }

    fn missing(&self, kernel: &mut Kernel, ifindex: u32) -> Result<Vec<Filter<'_>>, Error> {
        let mut missing = Vec::new();
        for filter in self.filters() {
            let names = kernel
                .filter_names(ifindex, filter.direction)
                .map_err(at(ifindex))?;
            if !names.iter().any(|name| name == filter.name) {
                missing.push(filter);
            }
        }
        Ok(missing)
    }
}

/// Hangs filters on an interface. False when it is gone, as pods' go beside the loop.
fn set_if_there(kernel: &mut Kernel, ifindex: u32, filters: &[Filter<'_>]) -> Result<bool, Error> {
    match kernel.set_filters(ifindex, filters) {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(false),
        Err(error) => Err(at(ifindex)(error)),
    }
}

fn kernel() -> Result<Kernel, Error> {
    Netlink::open().map(Kernel::new).map_err(at(0))
}

fn at(ifindex: u32) -> impl Fn(NetlinkError) -> Error {
    move |source| Error::Filters {
        target: LinkTarget::Interface(ifindex),
        source,
    }
}
