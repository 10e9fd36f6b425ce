//! From the object to verified programs, in three steps: what every loader needs is read ([`Preparation`]), the object is loaded over the
//! pinned maps, which can be used from then on, and the kernel verifies the programs. The first and the last take most of the time of a
//! start, and do so on threads of their own, while the cluster is asked, planned for, and written into the maps.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    thread::{self, JoinHandle},
};

use aya::{Ebpf, EbpfLoader, include_bytes_aligned, programs::ProgramFd};
use dataplane_abi::{limits, map};

use super::{
    Config, Error, PacketProgram,
    constants::Constants,
    early,
    kept::Kept,
    programs::{COLLECT, SOCKET_PROGRAMS, has_tcx},
    shapes::{check_shape, shapes},
    verify::verify,
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/dataplane-ebpf"));

/// A loader that is being made: making one reads the types of all of the kernel, some 50 ms.
pub struct Preparation(JoinHandle<EbpfLoader<'static>>);

impl Preparation {
    pub fn begin() -> Self {
        Self(thread::spawn(|| {
            let mut loader = EbpfLoader::new();
            // The programs read nothing of the kernel's own structures.
            loader.btf(None);
            // What the kernel can is tried out once for the process.
            let _known = aya::features();
            loader
        }))
    }

    fn loader(self) -> Result<EbpfLoader<'static>, Error> {
        joined(self.0, "reads the kernel's types")
    }
}

/// What a thread came to. Its panic is an error like others, so that `status` tells of it and all is begun anew.
fn joined<T>(thread: JoinHandle<T>, what: &'static str) -> Result<T, Error> {
    thread.join().map_err(|panic| {
        let words = panic.downcast_ref::<String>().cloned();
        let words = words.or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).into()));
        Error::Panicked {
            what,
            words: words.unwrap_or_default(),
        }
    })
}

/// Calls what it holds when it goes: also when a panic takes it away, and nobody would hear of the end of the thread.
struct AtTheEnd<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Drop for AtTheEnd<F> {
    fn drop(&mut self) {
        if let Some(call) = self.0.take() {
            call();
        }
    }
}

/// Programs that the kernel is verifying.
pub(super) struct Loading(JoinHandle<Result<Loaded, Error>>);

impl Loading {
    /// Loads the object over the maps pinned in `dir`, which are made where they are not. `verified` is called when the kernel has
    /// verified the programs, or refused one.
    pub fn begin(
        dir: &Path,
        config: &Config,
        preparation: Preparation,
        verified: impl FnOnce() + Send + 'static,
    ) -> Result<Self, Error> {
        for (name, wanted) in shapes() {
            check_shape(dir, name, wanted)?;
        }
        let mut loader = preparation.loader()?;
        for (name, _) in shapes() {
            loader.map_pin_path(name, dir.join(name));
        }
        // One that is pinned keeps its size.
        let flows = memory_bytes().map_or(limits::FLOWS, flows_for);
        loader.map_max_entries(map::FLOWS, flows);
        let constants = Constants::of(config)?;
        constants.override_in(&mut loader);
        let said = format!("{constants:?}");
        let kept = Kept::of(dir, &said);
        let lent = kept.lend(&mut loader);
        let ebpf = loader
            .load(OBJECT)
            .map_err(|source| Error::Load(Box::new(source)))?;
        let packet = PacketProgram::ALL.iter().map(|program| program.name());
        let socket = SOCKET_PROGRAMS.iter().map(|(name, _)| *name);
        let names: Vec<&'static str> = packet
            .chain([COLLECT])
            .chain(config.early.then_some(early::PROGRAM))
            .chain(socket)
            .collect();
        let fds = lent
            .as_ref()
            .map(|lent| lent.take(&names))
            .unwrap_or_default();
        let pod_ingress = lent.and_then(|lent| lent.pod_ingress());
        let loaded = Loaded {
            ebpf,
            fds,
            pod_ingress,
            // Over maps that were not there before.
            kept: Kept::of(dir, &said),
            tcx: true,
        };
        Ok(Self::run(verified, move || loaded.verified(names)))
    }

    /// A thread that has programs verified, and calls `verified` at its end, whatever that is.
    fn run(
        verified: impl FnOnce() + Send + 'static,
        verify: impl FnOnce() -> Result<Loaded, Error> + Send + 'static,
    ) -> Self {
        Self(thread::spawn(move || {
            let _told = AtTheEnd(Some(verified));
            verify()
        }))
    }

    pub fn wait(self) -> Result<Loaded, Error> {
        joined(self.0, "has programs verified")?
    }
}

/// Programs that the kernel has verified.
pub(super) struct Loaded {
    pub ebpf: Ebpf,
    fds: BTreeMap<&'static str, OwnedFd>,
    /// Where it was kept.
    pub pod_ingress: Option<ProgramFd>,
    pub kept: Kept,
    /// Packet programs can hang by links; else they do by filters.
    pub tcx: bool,
}

impl Loaded {
    /// Has the kernel verify those of these programs that no earlier worker left.
    fn verified(mut self, names: Vec<&'static str>) -> Result<Self, Error> {
        let new: Vec<&'static str> = names
            .into_iter()
            .filter(|name| !self.fds.contains_key(name))
            .collect();
        tracing::debug!(kept = self.fds.len(), new = new.len(), "programs");
        verify(&mut self.ebpf, &new)?;
        for name in new {
            let failed = |source| Error::Program {
                program: name,
                source: Box::new(source),
            };
            let missing = Error::Missing { program: name };
            let program = self.ebpf.program(name).ok_or(missing)?;
            let fd = program.fd().map_err(failed)?.as_fd();
            self.kept.keep(name, fd);
            let fd = fd
                .try_clone_to_owned()
                .map_err(|error| failed(error.into()))?;
            self.fds.insert(name, fd);
        }
        self.tcx = has_tcx(self.fd(PacketProgram::UplinkIngress.name())?);
        Ok(self)
    }

    pub fn fd(&self, name: &'static str) -> Result<BorrowedFd<'_>, Error> {
        let fd = self.fds.get(name).ok_or(Error::Missing { program: name })?;
        Ok(fd.as_fd())
    }
}

/// Bytes that the kernel takes for an entry of a table of flows.
const FLOW_BYTES: u64 = 192;
/// Of the machine's memory the table of answered flows may come to take this part: its entries are made as flows come, and go with them,
/// but for two words each that it is found by.
const FLOWS_SHARE: u64 = 256;

/// The machine's memory, where the kernel tells.
fn memory_bytes() -> Option<u64> {
    let told = fs::read_to_string("/proc/meminfo").ok()?;
    let total = told
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kilobytes: u64 = total.split_whitespace().next()?.parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// How many entries the table of answered flows has room for on a machine with so much memory.
fn flows_for(memory_bytes: u64) -> u32 {
    let wished = (memory_bytes / FLOWS_SHARE / FLOW_BYTES).next_power_of_two();
    let bounded = wished.clamp(limits::FLOWS_MIN.into(), limits::FLOWS_MAX.into());
    u32::try_from(bounded).unwrap_or(limits::FLOWS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_for_the_verifier_hears_of_a_panic_too() {
        let (tell, told) = std::sync::mpsc::channel();
        let verified = move || tell.send(()).expect("somebody who listens");
        let loading = Loading::run(verified, || panic!("of {}", "a test"));
        told.recv().expect("told");
        let error = loading.wait().err().expect("an error");
        assert_eq!(
            error.to_string(),
            "the thread that has programs verified panicked: of a test"
        );
    }

    #[test]
    fn the_table_of_flows_is_as_large_as_memory_lets_it_be() {
        const GIB: u64 = 1 << 30;
        let flows = [0, GIB, 8 * GIB, 24 * GIB, 64 * GIB, u64::MAX].map(flows_for);
        assert_eq!(
            flows,
            [1 << 16, 1 << 16, 1 << 18, 1 << 19, 1 << 21, 1 << 22]
        );
    }
}
