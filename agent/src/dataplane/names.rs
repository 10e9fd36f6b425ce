//! The maps that the program at pods' interfaces answers questions from, and the switch that has it asked.
//!
//! None of them is pinned: the kernel empties the array of programs when nobody has it open any more, so nothing is answered for longer
//! than there is an agent that knows what to say.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::{
    Ebpf,
    maps::{Map, MapData, MapError, PerCpuArray, ProgramArray},
    programs::{Program, ProgramFd},
};
use dataplane_abi::{
    DnsCount, DnsZone, FrontendKey, NameAddresses, NameKey, POD_DNS, POD_INGRESS, limits, map,
};

use super::{Error, PacketProgram, sys};

const POD_DNS_PROGRAM: &str = "pod_dns";

/// The maps, and the programs that packets go to and fro between.
pub struct NameTables {
    names: OwnedFd,
    servers: OwnedFd,
    zone: OwnedFd,
    counts: PerCpuArray<MapData, u64>,
    programs: ProgramArray<MapData>,
    pod_dns: ProgramFd,
    pod_ingress: ProgramFd,
}

fn failed(action: &'static str, map: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Map {
        action,
        map,
        source,
    }
}

fn refused(action: &'static str, map: &'static str) -> impl Fn(MapError) -> Error {
    move |error| failed(action, map)(io::Error::other(error))
}

fn full(map: &'static str, limit: u32) -> impl Fn(io::Error) -> Error {
    move |source| match source.raw_os_error() {
        Some(libc::E2BIG) => Error::Full { map, limit },
        _ => failed("write", map)(source),
    }
}

impl NameTables {
    /// Has the kernel verify the program, which costs nothing until then, and takes the maps out of the object: possible once.
    /// `kept` is the program at pods' interfaces where an earlier worker loaded it.
    pub(super) fn load(ebpf: &mut Ebpf, kept: Option<&ProgramFd>) -> Result<Self, Error> {
        let pod_dns = program(ebpf, POD_DNS_PROGRAM, true)?;
        let pod_ingress = match kept {
            Some(kept) => kept.try_clone().map_err(|error| Error::Program {
                program: PacketProgram::PodIngress.name(),
                source: Box::new(error.into()),
            })?,
            None => program(ebpf, PacketProgram::PodIngress.name(), false)?,
        };
        let mut take = |name: &'static str| {
            let taken = ebpf.take_map(name);
            taken.ok_or(Error::Missing { program: name })
        };
        let (counts, programs) = (take(map::DNS_COUNTS)?, take(map::POD_PROGRAMS)?);
        let mut open = |name: &'static str| {
            let taken = take(name)?;
            let data = match &taken {
                Map::HashMap(data) | Map::Array(data) => data,
                _ => return Err(Error::Missing { program: name }),
            };
            let fd = data.fd().as_fd().try_clone_to_owned();
            fd.map_err(failed("open", name))
        };
        Ok(Self {
            names: open(map::DNS_NAMES)?,
            servers: open(map::DNS_SERVERS)?,
            zone: open(map::DNS_ZONE)?,
            counts: counts
                .try_into()
                .map_err(refused("open", map::DNS_COUNTS))?,
            programs: programs
                .try_into()
                .map_err(refused("open", map::POD_PROGRAMS))?,
            pod_dns,
            pod_ingress,
        })
    }

    /// Has questions answered from now on.
    pub fn turn_on(&mut self) -> Result<(), Error> {
        // The way back first.
        let ways = [(POD_INGRESS, &self.pod_ingress), (POD_DNS, &self.pod_dns)];
        for (place, program) in ways {
            let set = self.programs.set(place, program, 0);
            set.map_err(refused("write", map::POD_PROGRAMS))?;
        }
        Ok(())
    }

    /// Leaves all questions to the server from now on.
    pub fn turn_off(&mut self) -> Result<(), Error> {
        let cleared = self.programs.clear_index(&POD_DNS);
        cleared.map_err(refused("delete from", map::POD_PROGRAMS))
    }

    pub fn set_zone(&self, zone: &DnsZone) -> Result<(), Error> {
        sys::update_batch(self.zone.as_fd(), &[(0_u32, *zone)])
            .map_err(failed("write", map::DNS_ZONE))
    }

    pub fn set_names(&self, entries: &[(NameKey, NameAddresses)]) -> Result<(), Error> {
        sys::update_batch(self.names.as_fd(), entries)
            .map_err(full(map::DNS_NAMES, limits::DNS_NAMES))
    }

    pub fn remove_names(&self, keys: &[NameKey]) -> Result<(), Error> {
        sys::delete_batch(self.names.as_fd(), keys).map_err(failed("delete from", map::DNS_NAMES))
    }

    /// Names where questions are sent.
    pub fn set_servers(&self, keys: &[FrontendKey]) -> Result<(), Error> {
        let entries: Vec<(FrontendKey, u32)> = keys.iter().map(|key| (*key, 1)).collect();
        sys::update_batch(self.servers.as_fd(), &entries)
            .map_err(full(map::DNS_SERVERS, limits::DNS_SERVERS))
    }

    pub fn remove_servers(&self, keys: &[FrontendKey]) -> Result<(), Error> {
        sys::delete_batch(self.servers.as_fd(), keys)
            .map_err(failed("delete from", map::DNS_SERVERS))
    }

    /// Questions by what became of them, over all CPUs, in the order of [`DnsCount::ALL`].
    pub fn counts(&self) -> Result<[u64; DnsCount::ALL.len()], Error> {
        let mut all = [0; DnsCount::ALL.len()];
        for (count, sum) in DnsCount::ALL.iter().zip(&mut all) {
            let each = self.counts.get(&(*count as u32), 0);
            let each = each.map_err(|source| Error::Counters(Box::new(source)))?;
            *sum = each.iter().sum();
        }
        Ok(all)
    }
}

fn program(ebpf: &mut Ebpf, name: &'static str, load: bool) -> Result<ProgramFd, Error> {
    let Some(Program::SchedClassifier(program)) = ebpf.program_mut(name) else {
        return Err(Error::Missing { program: name });
    };
    let failed = |source| Error::Program {
        program: name,
        source: Box::new(source),
    };
    if load {
        program.load().map_err(failed)?;
    }
    let fd = program.fd().map_err(failed)?.try_clone();
    fd.map_err(|error| failed(error.into()))
}
