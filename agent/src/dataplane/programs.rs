//! The eBPF programs: loading them over pinned maps, and the pinned links that hang them on interfaces and control groups.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::maps::{Map, MapData, PerCpuArray};
use dataplane_abi::{Reason, map};

use super::{
    Config, Error, FilterHooks, NameTables, early,
    loading::{Loaded, Loading, Preparation},
    sys::{self, LinkTarget},
};
use crate::net::Direction;

/// A program at tc.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum PacketProgram {
    PodIngress,
    PodEgress,
    UplinkIngress,
    UplinkEgress,
    ServiceIngress,
}

impl PacketProgram {
    pub const ALL: [Self; 5] = [
        Self::PodIngress,
        Self::PodEgress,
        Self::UplinkIngress,
        Self::UplinkEgress,
        Self::ServiceIngress,
    ];

    /// Name in the object, in pins and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PodIngress => "pod_ingress",
            Self::PodEgress => "pod_egress",
            Self::UplinkIngress => "uplink_ingress",
            Self::UplinkEgress => "uplink_egress",
            Self::ServiceIngress => "service_ingress",
        }
    }

    /// Name of the pin of its link on an interface.
    fn pin(self, ifindex: u32) -> String {
        format!("{}-{ifindex}", self.name())
    }

    /// Which packets of its interface it sees.
    pub(super) fn direction(self) -> Direction {
        match self {
            Self::PodEgress | Self::UplinkEgress => Direction::Egress,
            _ => Direction::Ingress,
        }
    }

    fn attach_type(self) -> u32 {
        const BPF_TCX_INGRESS: u32 = 46;
        const BPF_TCX_EGRESS: u32 = 47;
        match self.direction() {
            Direction::Ingress => BPF_TCX_INGRESS,
            Direction::Egress => BPF_TCX_EGRESS,
        }
    }
}

/// What hangs on the host's side of a pod's veth.
pub(super) const POD_PROGRAMS: [PacketProgram; 2] =
    [PacketProgram::PodIngress, PacketProgram::PodEgress];

/// The programs at control groups, by name, with the kernel's number of their attach type.
pub(super) const SOCKET_PROGRAMS: [(&str, u32); 9] = [
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
    ("sock_release", 34),
];

pub(super) const COLLECT: &str = "collect";

/// The programs and where their links are pinned.
pub struct Programs {
    /// Until they are verified.
    loading: Option<Loading>,
    loaded: Option<Loaded>,
    dir: PathBuf,
    links: PathBuf,
    early: bool,
}

impl Programs {
    /// Loads the programs over the maps pinned in `dir`, which are made where they are not. Those are there when it returns; programs
    /// when [`Programs::finish`] does.
    pub fn begin(
        dir: &Path,
        config: &Config,
        preparation: Preparation,
        verified: impl FnOnce() + Send + 'static,
    ) -> Result<Self, Error> {
        Ok(Self {
            loading: Some(Loading::begin(dir, config, preparation, verified)?),
            loaded: None,
            dir: dir.to_owned(),
            links: dir.join("links"),
            early: config.early,
        })
    }

    /// Waits until the kernel has verified all programs. False when it had already.
    pub fn finish(&mut self) -> Result<bool, Error> {
        let Some(loading) = self.loading.take() else {
            return Ok(false);
        };
        self.loaded = Some(loading.wait()?);
        Ok(true)
    }

    fn loaded(&self) -> Result<&Loaded, Error> {
        self.loaded.as_ref().ok_or(Error::NotVerified)
    }

    /// Whether packet programs can hang by links; else they do by filters.
    pub fn has_tcx(&self) -> bool {
        self.loaded.as_ref().is_none_or(|loaded| loaded.tcx)
    }

    /// Whether a program is one of those that the configuration asks for.
    pub(super) fn is_loaded(&self, name: &str) -> bool {
        name != early::PROGRAM || self.early
    }

    pub(super) fn fd(&self, name: &'static str) -> Result<BorrowedFd<'_>, Error> {
        self.loaded()?.fd(name)
    }

    /// Forgets what was kept of other builds, once our own programs hang in place of theirs.
    pub fn forget_others(&self) {
        if let Some(loaded) = &self.loaded {
            loaded.kept.forget_others();
        }
    }

    /// Gives the links that an earlier agent left these programs, in place, and forgets those whose interface or control
    /// group is gone.
    pub fn adopt_links(&self, socket_lb: bool) -> Result<(), Error> {
        fs::create_dir_all(&self.links).map_err(|source| Error::Pins {
            path: self.links.clone(),
            source,
        })?;
        for path in self.pinned()? {
            let Some(name) = program_of(&path) else {
                unlink(&path)?;
                continue;
            };
            if !socket_lb && SOCKET_PROGRAMS.iter().any(|(socket, _)| *socket == name) {
                unlink(&path)?;
                continue;
            }
            let link = sys::open_pinned(&path).map_err(|source| Error::Link {
                link: path.clone(),
                source,
            })?;
            if !self.is_loaded(name) {
                // Off at once: the kernel takes its time with a link that only loses its pin. One whose interface is gone hangs nowhere.
                let _gone = sys::detach_link(link.as_fd());
                unlink(&path)?;
                continue;
            }
            self.renew(&path, link, name, None)?;
        }
        Ok(())
    }

    /// Updates a link in place when it hangs where it should; else unpins it and says no.
    pub(super) fn renew(
        &self,
        path: &Path,
        link: OwnedFd,
        name: &'static str,
        wanted: Option<LinkTarget>,
    ) -> Result<bool, Error> {
        let failed = |source| Error::Link {
            link: path.to_owned(),
            source,
        };
        let target = sys::link_target(link.as_fd()).map_err(failed)?;
        let gone = matches!(
            target,
            LinkTarget::Interface(0) | LinkTarget::Cgroup(0) | LinkTarget::Other
        );
        if gone || wanted.is_some_and(|wanted| wanted != target) {
            unlink(path)?;
            return Ok(false);
        }
        match sys::update_link(link.as_fd(), self.fd(name)?) {
            Ok(()) => Ok(true),
            // What it hung on went away just now.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
                unlink(path)?;
                Ok(false)
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Hangs a program on a target, or gives the link that hangs there already the program.
    fn attach(
        &self,
        name: &'static str,
        attach_type: u32,
        pin: String,
        target: u32,
        wanted: LinkTarget,
    ) -> Result<(), Error> {
        let path = self.links.join(pin);
        match sys::open_pinned(&path) {
            Ok(link) => {
                if self.renew(&path, link, name, Some(wanted))? {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::Link { link: path, source }),
        }
        let failed = |source| Error::Attach {
            program: name,
            target: wanted,
            source,
        };
        let link = sys::create_link(self.fd(name)?, target, attach_type).map_err(failed)?;
        sys::pin(link.as_fd(), &path).map_err(|source| Error::Link { link: path, source })
    }

    /// Packet programs as filters, for other threads.
    pub fn filters(&self, programs: &[PacketProgram]) -> Result<FilterHooks, Error> {
        let programs = programs
            .iter()
            .map(|&program| {
                let fd = self.fd(program.name())?.try_clone_to_owned();
                let failed = |source| Error::Attach {
                    program: program.name(),
                    target: LinkTarget::Other,
                    source,
                };
                Ok((program, fd.map_err(failed)?))
            })
            .collect::<Result<_, Error>>()?;
        Ok(FilterHooks { programs })
    }

    /// The program that answers questions, and its maps; see [`super::Dataplane::load_names`].
    pub fn load_names(&mut self) -> Result<NameTables, Error> {
        let loaded = self.loaded.as_mut().ok_or(Error::NotVerified)?;
        NameTables::load(&mut loaded.ebpf, loaded.pod_ingress.as_ref())
    }

    /// Hangs a packet program on an interface by a link.
    pub fn attach_packet(&self, program: PacketProgram, ifindex: u32) -> Result<(), Error> {
        self.attach(
            program.name(),
            program.attach_type(),
            program.pin(ifindex),
            ifindex,
            LinkTarget::Interface(ifindex),
        )
    }

    /// Whether a packet program hangs anywhere by a link.
    pub fn hangs_packet(&self, program: PacketProgram) -> Result<bool, Error> {
        let pinned = self.pinned()?;
        let mut programs = pinned.iter().filter_map(|path| program_of(path));
        Ok(programs.any(|name| name == program.name()))
    }

    /// Takes a packet program off all interfaces but these, where it hangs by links.
    pub fn keep_packet(&self, program: PacketProgram, kept: &BTreeSet<u32>) -> Result<(), Error> {
        let kept: BTreeSet<String> = kept.iter().map(|ifindex| program.pin(*ifindex)).collect();
        for path in self.pinned()? {
            let is_kept = |name: &str| kept.contains(name);
            let name = path.file_name().and_then(|name| name.to_str());
            if program_of(&path) != Some(program.name()) || name.is_some_and(is_kept) {
                continue;
            }
            take_off(&path)?;
        }
        Ok(())
    }

    /// Hangs the socket programs on a control group of the v2 hierarchy.
    pub fn attach_cgroup(&self, cgroup: &Path) -> Result<(), Error> {
        let failed = |source| Error::Cgroup {
            path: cgroup.to_owned(),
            source,
        };
        let dir = fs::File::open(cgroup).map_err(failed)?;
        let id = sys::cgroup_id(cgroup).map_err(failed)?;
        for (name, attach_type) in SOCKET_PROGRAMS {
            self.attach(
                name,
                attach_type,
                name.to_owned(),
                dir.as_raw_fd() as u32,
                LinkTarget::Cgroup(id),
            )?;
        }
        Ok(())
    }

    /// Hangs on again what hangs nowhere though it should; see [`super::Dataplane::repair`].
    pub fn repair(&self, cgroup: Option<&Path>) -> Result<Vec<String>, Error> {
        let mut repaired = Vec::new();
        for path in self.pinned()? {
            let (Some(name), Some(pin)) = (program_of(&path), path.file_name()) else {
                continue;
            };
            let failed = |source| Error::Link {
                link: path.clone(),
                source,
            };
            let link = match sys::open_pinned(&path) {
                Ok(link) => link,
                // A thread beside the loop removed it just now, with its interface.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            let target = sys::link_target(link.as_fd()).map_err(failed)?;
            let pin = pin.to_string_lossy().into_owned();
            match target {
                LinkTarget::Interface(0) => {
                    unlink(&path)?;
                    let (_, ifindex) = pin.split_once('-').unwrap_or_default();
                    let program = PacketProgram::ALL
                        .into_iter()
                        .find(|program| program.name() == name);
                    let (Some(program), Ok(ifindex)) = (program, ifindex.parse()) else {
                        continue;
                    };
                    match self.attach_packet(program, ifindex) {
                        Ok(()) => repaired.push(pin),
                        // The interface is gone, as it should be then.
                        Err(Error::Attach { source, .. })
                            if source.raw_os_error() == Some(libc::ENODEV) => {}
                        Err(error) => return Err(error),
                    }
                }
                LinkTarget::Cgroup(0) => {
                    unlink(&path)?;
                    if let Some(cgroup) = cgroup {
                        self.attach_cgroup(cgroup)?;
                        repaired.push(pin);
                    }
                }
                _ => {}
            }
        }
        Ok(repaired)
    }

    /// Where our links are pinned.
    pub(super) fn links(&self) -> &Path {
        &self.links
    }

    fn pinned(&self) -> Result<Vec<PathBuf>, Error> {
        pins_in(&self.links)
    }

    /// Runs a packet program on a packet, which hardware is to cut in segments of so many bytes where that is not 0.
    pub fn run(
        &self,
        program: PacketProgram,
        packet: &[u8],
        ifindex: u32,
        segment: u32,
        repeat: u32,
        flags: u32,
    ) -> Result<(i32, Vec<u8>, u32), Error> {
        let mut skb = sys::SkBuff {
            ifindex,
            ingress_ifindex: ifindex,
            segment,
            ..sys::SkBuff::default()
        };
        sys::test_run(self.fd(program.name())?, packet, &mut skb, repeat, flags).map_err(|source| {
            Error::Run {
                program: program.name(),
                source,
            }
        })
    }

    /// Runs the program of the uplink's driver on a packet.
    pub fn run_early(
        &self,
        packet: &[u8],
        ifindex: u32,
        repeat: u32,
    ) -> Result<(i32, Vec<u8>, u32), Error> {
        let mut frame = sys::XdpFrame {
            data_end: packet.len() as u32,
            ingress_ifindex: ifindex,
            ..sys::XdpFrame::default()
        };
        let program = early::PROGRAM;
        sys::test_run(self.fd(program)?, packet, &mut frame, repeat, 0)
            .map_err(|source| Error::Run { program, source })
    }

    /// Runs the collector of flows: how many entries it removed and left.
    pub fn collect(&self, pressure: u32) -> Result<(u32, u32), Error> {
        let mut skb = sys::SkBuff {
            mark: pressure,
            ..sys::SkBuff::default()
        };
        sys::test_run(self.fd(COLLECT)?, &[0; 64], &mut skb, 1, 0).map_err(|source| {
            Error::Run {
                program: COLLECT,
                source,
            }
        })?;
        Ok((skb.mark, skb.control[0]))
    }

    /// Packets per reason, over all CPUs.
    pub fn counters(&self) -> Result<Vec<(Reason, u64)>, Error> {
        let failed = |source| Error::Counters(Box::new(source));
        let pinned = MapData::from_pin(self.dir.join(map::COUNTERS)).map_err(failed)?;
        let counters = PerCpuArray::<MapData, u64>::try_from(Map::PerCpuArray(pinned));
        let counters = counters.map_err(failed)?;
        let sum = |reason: &Reason| {
            Ok((
                *reason,
                counters
                    .get(&(*reason as u32), 0)
                    .map_err(failed)?
                    .iter()
                    .sum(),
            ))
        };
        Reason::ALL.iter().map(sum).collect()
    }
}

/// No interface has this number.
const NOBODY: u32 = i32::MAX.cast_unsigned();

/// Whether the kernel has tcx (Linux 6.6): only one that has it looks for the interface.
pub(super) fn has_tcx(program: BorrowedFd<'_>) -> bool {
    match sys::create_link(program, NOBODY, PacketProgram::UplinkIngress.attach_type()) {
        Err(error) => error.raw_os_error() != Some(libc::EINVAL),
        Ok(_) => true,
    }
}

/// The pins in a directory, in no order.
pub(super) fn pins_in(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Pins {
        path: dir.to_owned(),
        source,
    };
    let entries = fs::read_dir(dir).map_err(failed)?;
    entries
        .map(|entry| entry.map(|entry| entry.path()).map_err(failed))
        .collect()
}

/// The program that a pinned link belongs to, by the link's name. Those of pods hang by filters.
pub(super) fn program_of(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?.to_str()?;
    let name = name.split_once('-').map_or(name, |(program, _)| program);
    if name == early::PIN {
        return Some(early::PROGRAM);
    }
    let packet = [
        PacketProgram::UplinkIngress,
        PacketProgram::UplinkEgress,
        PacketProgram::ServiceIngress,
    ];
    packet
        .map(PacketProgram::name)
        .into_iter()
        .chain(SOCKET_PROGRAMS.iter().map(|(socket, _)| *socket))
        .find(|known| *known == name)
}

/// Takes a program off where a pinned link hangs it, at once: the kernel takes its time with a link that only loses its pin.
pub(super) fn take_off(path: &Path) -> Result<(), Error> {
    if let Ok(link) = sys::open_pinned(path) {
        // One whose interface is gone hangs nowhere already.
        let _gone = sys::detach_link(link.as_fd());
    }
    unlink(path)
}

pub(super) fn unlink(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Link {
            link: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}
