//! The data plane as the agent sees it: eBPF programs and pinned maps behind a few calls.
//!
//! [`Dataplane::open`] loads the programs, adopts the maps that an earlier agent pinned, and updates the links it left in
//! place, so that a restart drops no packet. [`Dataplane::state`] reads back what the maps hold; the agent diffs its plan
//! against that and hands the difference to [`Dataplane::apply`].

mod constants;
mod datagrams;
mod early;
mod error;
mod events;
mod extent;
mod flows;
mod handover;
mod hooks;
mod kept;
mod loading;
pub mod maglev;
mod mapping;
mod names;
mod op;
mod pinned;
mod programs;
mod ranges;
mod shapes;
mod sys;
mod tables;
mod verify;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::Instant,
};

use dataplane_abi::{ABI_VERSION, Reason, map};

pub use datagrams::ConnectedDatagram;
pub use early::{EarlyUplink, Xdp, XdpMode};
pub use error::Error;
pub use events::{EventRing, quiet};
pub use flows::{FlowTables, FlowView, monotonic_ns, monotonic_s};
pub use handover::HandedOver;
pub use hooks::FilterHooks;
pub use loading::Preparation;
pub use maglev::MaglevUse;
pub use names::NameTables;
pub use op::{
    Frontend, Lead, LocalPod, Op, Peers, Protocol, ServiceBackends, ServiceId, Sources, State, Vip,
};
pub use programs::PacketProgram;
pub use sys::{LinkTarget, MapShape};
pub use tables::{Applied, Usage};

use crate::dataplane::{
    pinned::PinnedMaps,
    programs::{POD_PROGRAMS, Programs},
    tables::Tables,
};

/// Where pins lie unless configured otherwise.
pub const PIN_ROOT: &str = "/sys/fs/bpf/keelway";

/// How the data plane is set up; validated before it gets here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Directory on a bpffs for this node's pins, [`PIN_ROOT`] by default. Maps and links lie in its subdirectory
    /// `v<ABI_VERSION>`.
    pub pin_root: PathBuf,
    /// Translate at the socket (cgroup hooks).
    pub socket_lb: bool,
    /// Translate packets (tc hooks).
    pub packet_lb: bool,
    /// The pair of interfaces through which the host's own traffic to Services is routed, when there is one.
    pub service_veth: Option<ServiceVeth>,
    /// The node's address of each family: the source of what it sends on for clients outside, and for pods where it masquerades.
    pub node_v4: Option<Ipv4Addr>,
    pub node_v6: Option<Ipv6Addr>,
    /// Pods take the node's address for destinations that [`Op::SetUnmasqueraded`] does not name.
    pub masquerade: bool,
    /// Interface index of the uplink that has the node's address. By others, what is sent on for others has theirs.
    pub uplink: Option<u32>,
    /// Hardware address of the uplink whose driver shall run our program ([`Dataplane::attach_early`]): other frames are not for us.
    pub uplink_mac: Option<[u8; 6]>,
    /// Interface index of the overlay, where clients outside may be answered by other nodes directly; the hook of uplinks is to hang on
    /// it too. It carries to the nodes that [`Op::SetPeers`] names.
    pub overlay: Option<u32>,
    /// The interface of the overlay, whatever goes by it.
    pub overlay_link: Option<u32>,
    /// Questions for cluster names may be answered at pods' interfaces; see [`Dataplane::load_names`].
    pub kernel_dns: bool,
    /// An uplink's driver may be asked to run our program ([`EarlyUplink::is_asked`]). Without, the kernel has not to verify it.
    pub early: bool,
}

impl Config {
    /// Both kinds of hooks and nothing else, under a pin directory.
    pub fn new(pin_root: impl Into<PathBuf>) -> Self {
        Self {
            pin_root: pin_root.into(),
            socket_lb: true,
            packet_lb: true,
            service_veth: None,
            node_v4: None,
            node_v6: None,
            masquerade: false,
            uplink: None,
            uplink_mac: None,
            overlay: None,
            overlay_link: None,
            kernel_dns: false,
            early: true,
        }
    }
}

/// Interface indexes of the service veth pair, both ends in the host's network namespace. The agent makes the pair:
///
/// - both ends have the MAC address [`dataplane_abi::HOST_VETH_MAC`] and are up;
/// - the Service ranges are routed to `outer` by a gateway with a permanent neighbour entry (MAC: HOST_VETH_MAC) and the
///   node's address as preferred source: `ip route add 10.96.0.0/16 via 169.254.77.1 dev <outer> onlink src <node address>`;
/// - so are [`dataplane_abi::HAIRPIN_V4`]/32 and, where the node has IPv6, [`dataplane_abi::HAIRPIN_V6`]/128;
/// - IPv4 forwarding is on, as it is on every node that routes for pods.
///
/// Programs run where packets come out of `inner`; what they answer enters the host again through `outer`, whose
/// routes make it a legitimate source for Service addresses (no rp_filter or accept_local setting is needed).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServiceVeth {
    pub outer: u32,
    pub inner: u32,
}

/// What became of a packet that a program was run on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Run {
    /// The program's return value: -1 next program, 2 dropped, 7 redirected.
    pub verdict: i32,
    /// The packet as the program left it.
    pub packet: Vec<u8>,
    /// Mean time of one run; the kernel measures it over all repeats.
    pub nanoseconds: u32,
}

/// What a pass of the collector found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Collected {
    /// Entries (two per flow) removed from and left in the table of answered flows.
    pub removed: u32,
    pub left: u32,
    /// How often the longest timeouts were halved, the table being this full.
    pub pressure: u32,
}

/// Everything that a node's maps hold, for whoever looks from beside its agent.
pub fn held(pin_root: &Path) -> Result<State, Error> {
    Tables::adopt(PinnedMaps::open(&pin_root.join(format!("v{ABI_VERSION}")))?)?.state()
}

/// The loaded data plane of this node.
pub struct Dataplane {
    programs: Programs,
    tables: Tables<PinnedMaps>,
    socket_lb: bool,
    service_veth: Option<ServiceVeth>,
    pin_root: PathBuf,
    dir: PathBuf,
    /// Until then, filters on interfaces are those of another version.
    to_take_over: bool,
    /// What hangs by filters beside the programs of pods: all other packet programs, where the kernel has no tcx.
    filtered: BTreeSet<(PacketProgram, u32)>,
    /// Where frontends led in another version's maps, until it is taken over.
    inherited: BTreeMap<Frontend, Lead>,
    /// Entries that the last collection left, of as many as there is room for.
    flows_left: u32,
    flows_max: u32,
}

impl Dataplane {
    /// Loads the programs over the pinned maps, which are made where there are none, and gives links that an
    /// earlier agent pinned the new programs. Attaches nothing else. To be called in the host's network namespace.
    pub fn open(config: &Config) -> Result<Self, Error> {
        let mut dataplane = Self::begin(config, Preparation::begin(), || {})?;
        dataplane.finish()?;
        Ok(dataplane)
    }

    /// The first half of [`Dataplane::open`]: maps can be read and written when it returns, and of an earlier agent's nothing is changed.
    /// `verified` is called when the kernel has verified the programs: [`Dataplane::finish`] has not to wait then. Until that is done
    /// nothing can be hung anywhere.
    pub fn begin(
        config: &Config,
        preparation: Preparation,
        verified: impl FnOnce() + Send + 'static,
    ) -> Result<Self, Error> {
        let dir = config.pin_root.join(format!("v{ABI_VERSION}"));
        let failed = |source| Error::Pins {
            path: dir.clone(),
            source,
        };
        fs::create_dir_all(&dir).map_err(failed)?;
        if !sys::is_bpffs(&dir).map_err(failed)? {
            return Err(Error::NotBpffs { path: dir });
        }
        handover::share(&config.pin_root, &dir)?;
        let programs = Programs::begin(&dir, config, preparation, verified)?;
        let inherited = handover::inherited(&config.pin_root, &dir)?;
        let tables = Tables::adopt(PinnedMaps::open(&dir)?)?;
        let mut tables = tables.after_generation(inherited.generation);
        if config.masquerade {
            tables.hold_masquerade_back(Instant::now())?;
        }
        Ok(Self {
            to_take_over: handover::is_due(&config.pin_root, &dir)?,
            programs,
            tables,
            socket_lb: config.socket_lb,
            service_veth: config.service_veth,
            pin_root: config.pin_root.clone(),
            inherited: inherited.leads,
            filtered: BTreeSet::new(),
            flows_left: 0,
            flows_max: flows_max(&dir)?,
            dir,
        })
    }

    /// Waits until the kernel has verified the programs, and gives links that an earlier agent pinned ours.
    pub fn finish(&mut self) -> Result<(), Error> {
        if self.programs.finish()? {
            self.programs.adopt_links(self.socket_lb)?;
            self.programs.forget_others();
            // What others' programs found, with constants of their own, and before anything hangs that was not there.
            self.tables.begin_epoch();
        }
        Ok(())
    }

    /// Everything that the maps hold now.
    pub fn state(&self) -> Result<State, Error> {
        self.tables.state()
    }

    /// Where frontends led in the maps of another version that is to be taken over: ids that its flows are known by.
    pub fn inherited(&self) -> &BTreeMap<Frontend, Lead> {
        &self.inherited
    }

    /// Carries out a batch. Of several changes of one thing the last counts; services come before the frontends that name
    /// them and go after. On an error part of the batch may be done: diff against [`Dataplane::state`] again.
    pub fn apply(&mut self, ops: &[Op]) -> Result<Applied, Error> {
        self.tables.apply(ops, Instant::now())
    }

    /// Hangs the socket hooks on a control group of the v2 hierarchy; all below it are covered.
    pub fn attach_cgroup(&mut self, cgroup: &Path) -> Result<(), Error> {
        self.programs.attach_cgroup(cgroup)
    }

    /// Hangs the packet hooks on the host's side of a pod's veth, in place of those of an earlier agent; those of another version
    /// stay until it is taken over. The pod's address is set by [`Op::SetPod`].
    pub fn attach_pod(&mut self, ifindex: u32) -> Result<(), Error> {
        self.pod_hooks()?.attach(ifindex, self.to_take_over)
    }

    /// The hooks of pods' interfaces, for threads that make interfaces beside the loop.
    pub fn pod_hooks(&self) -> Result<FilterHooks, Error> {
        self.programs.filters(&POD_PROGRAMS)
    }

    /// Interfaces with pod hooks, in order.
    pub fn attached_pods(&self) -> Result<Vec<u32>, Error> {
        self.pod_hooks()?.attached()
    }

    /// Hangs the packet hook on an interface by which other nodes are reached.
    pub fn attach_uplink(&mut self, ifindex: u32) -> Result<(), Error> {
        self.attach_packet(PacketProgram::UplinkIngress, ifindex)
    }

    /// Hangs the hook at such an interface by which the node's own processes answer clients that kept their addresses
    /// ([`ServiceBackends::keeps_clients`]).
    pub fn attach_answers(&mut self, ifindex: u32) -> Result<(), Error> {
        self.attach_packet(PacketProgram::UplinkEgress, ifindex)
    }

    /// Whether that hook hangs anywhere: there may be flows that need it.
    pub fn has_answers(&self) -> Result<bool, Error> {
        let program = PacketProgram::UplinkEgress;
        if self.programs.has_tcx() {
            return self.programs.hangs_packet(program);
        }
        Ok(!self.programs.filters(&[program])?.attached()?.is_empty())
    }

    /// Takes the packet hooks off interfaces by which other nodes are not reached any more: all but these.
    pub fn keep_uplinks(&mut self, kept: &BTreeSet<u32>) -> Result<(), Error> {
        for program in [PacketProgram::UplinkIngress, PacketProgram::UplinkEgress] {
            if self.programs.has_tcx() {
                self.programs.keep_packet(program, kept)?;
            } else {
                self.programs.filters(&[program])?.keep(kept)?;
            }
            self.filtered
                .retain(|(other, ifindex)| *other != program || kept.contains(ifindex));
        }
        Ok(())
    }

    /// Hangs the program on an uplink's driver, as far as that can be; to be called again when it may have become possible. Gives what
    /// is so.
    pub fn attach_early(&mut self, uplink: &EarlyUplink, mode: XdpMode) -> Result<Xdp, Error> {
        self.programs.attach_early(uplink, mode)
    }

    /// Hangs the packet hook on the configured service veth pair, if there is one.
    pub fn attach_service_veth(&mut self) -> Result<(), Error> {
        match self.service_veth {
            Some(pair) => self.attach_packet(PacketProgram::ServiceIngress, pair.inner),
            None => Ok(()),
        }
    }

    fn attach_packet(&mut self, program: PacketProgram, ifindex: u32) -> Result<(), Error> {
        if self.programs.has_tcx() {
            return self.programs.attach_packet(program, ifindex);
        }
        let hooks = self.programs.filters(&[program])?;
        hooks.attach(ifindex, self.to_take_over)?;
        self.filtered.insert((program, ifindex));
        Ok(())
    }

    /// Whether programs hang on other interfaces than pods' by tcx links, as they do where the kernel has them.
    pub fn has_tcx(&self) -> bool {
        self.programs.has_tcx()
    }

    /// Hangs on again what somebody took off: a link that hangs nowhere though its interface is there, or the control group, and
    /// the filters of these pods' interfaces. Gives the names of what was missing. Fails when the pins themselves are gone: with
    /// their file system, all that they held is.
    pub fn repair(&mut self, cgroup: Option<&Path>, pods: &[u32]) -> Result<Vec<String>, Error> {
        let mut repaired = self.programs.repair(cgroup)?;
        repaired.extend(self.pod_hooks()?.repair(pods)?);
        for (program, ifindex) in &self.filtered {
            let hooks = self.programs.filters(&[*program])?;
            repaired.extend(hooks.repair(&[*ifindex])?);
        }
        Ok(repaired)
    }

    /// Ends the connections of datagram sockets of this network namespace that have a backend which shall not be `kept`; gives how many.
    pub fn end_datagrams(&self, kept: impl Fn(&ConnectedDatagram) -> bool) -> Result<usize, Error> {
        datagrams::end(&self.dir, kept)
    }

    /// Takes over from agents of another [`ABI_VERSION`], whose programs work until then: to be called when all Services are in our
    /// maps.
    pub fn take_over(&mut self) -> Result<HandedOver, Error> {
        let programs = &self.programs;
        let filtered = self.filtered.iter().copied().collect::<Vec<_>>();
        let taken = handover::take_over(&self.pin_root, &self.dir, programs, &filtered)?;
        self.to_take_over = false;
        self.inherited = BTreeMap::new();
        Ok(taken)
    }

    /// Has the kernel verify the program that answers questions, and gives the maps that it answers from: possible once.
    pub fn load_names(&mut self) -> Result<NameTables, Error> {
        self.programs.load_names()
    }

    /// Counters since the maps were made, all of them, in the order of [`Reason::ALL`].
    pub fn counters(&self) -> Result<Vec<(Reason, u64)>, Error> {
        self.programs.counters()
    }

    /// How full the maps are. Reads two of them whole.
    pub fn usage(&self) -> Result<Usage, Error> {
        self.tables.usage()
    }

    /// Cells of the backends' array that services have, and those that rest.
    pub fn cells_used(&self) -> u32 {
        self.tables.cells_used()
    }

    /// Entries that the table of answered flows has room for: as many as it was made for.
    pub fn flows_max(&self) -> u32 {
        self.flows_max
    }

    /// How much of the room for Maglev tables is used.
    pub fn maglev(&self) -> MaglevUse {
        self.tables.maglev()
    }

    /// Service ports that choose at random for want of room for their table, for which there is some by now: they get it by
    /// [`Op::RenewService`].
    pub fn tables_with_room(&self) -> Vec<ServiceId> {
        self.tables.tables_with_room()
    }

    /// Removes flows whose time is up; to be called every ten seconds or so. The fuller the table was left, the shorter
    /// flows may idle. Takes 140 ns per entry (measured) on the calling CPU.
    pub fn collect_flows(&mut self) -> Result<Collected, Error> {
        let pressure = pressure(self.flows_left, self.flows_max);
        let (removed, left) = self.programs.collect(pressure)?;
        self.flows_left = left;
        Ok(Collected {
            removed,
            left,
            pressure,
        })
    }

    /// Runs a packet program on a packet that starts with its Ethernet header, as if it came by an interface of this
    /// network namespace. The kernel carries no redirect out. Maps and counters change as they would.
    pub fn run(
        &self,
        program: PacketProgram,
        packet: &[u8],
        ifindex: u32,
        repeat: u32,
    ) -> Result<Run, Error> {
        self.run_as(program, packet, ifindex, 0, repeat, 0)
    }

    /// As [`Dataplane::run`], once, on a packet that hardware is to cut, each with so many bytes behind its headers.
    pub fn run_segmented(
        &self,
        program: PacketProgram,
        packet: &[u8],
        ifindex: u32,
        segment: u32,
    ) -> Result<Run, Error> {
        self.run_as(program, packet, ifindex, segment, 1, 0)
    }

    /// As [`Dataplane::run`], once, on a packet whose sum hardware has told: an error (EBADMSG) when that is not the sum of what is left
    /// of it.
    pub fn run_summed(
        &self,
        program: PacketProgram,
        packet: &[u8],
        ifindex: u32,
    ) -> Result<Run, Error> {
        let flags = sys::TEST_SKB_CHECKSUM_COMPLETE;
        self.run_as(program, packet, ifindex, 0, 1, flags)
    }

    fn run_as(
        &self,
        program: PacketProgram,
        packet: &[u8],
        ifindex: u32,
        segment: u32,
        repeat: u32,
        flags: u32,
    ) -> Result<Run, Error> {
        let programs = &self.programs;
        let (verdict, packet, nanoseconds) =
            programs.run(program, packet, ifindex, segment, repeat, flags)?;
        Ok(Run {
            verdict,
            packet,
            nanoseconds,
        })
    }

    /// As [`Dataplane::run`], of the uplink driver's program: verdict 2 is up to the hook at tc, 3 out again.
    pub fn run_early(&self, packet: &[u8], ifindex: u32, repeat: u32) -> Result<Run, Error> {
        let (verdict, packet, nanoseconds) = self.programs.run_early(packet, ifindex, repeat)?;
        Ok(Run {
            verdict,
            packet,
            nanoseconds,
        })
    }
}

fn flows_max(dir: &Path) -> Result<u32, Error> {
    let failed = |source| Error::Map {
        action: "open",
        map: map::FLOWS,
        source,
    };
    let flows = sys::open_pinned(&dir.join(map::FLOWS)).map_err(failed)?;
    let shape = sys::map_shape(flows.as_fd()).map_err(failed)?;
    Ok(shape.max_entries)
}

/// Halvings of the longest timeouts at a fill of the flow table: none up to one half, then ever more: 24 h becomes 20 minutes
/// at seven eighths.
fn pressure(entries: u32, max: u32) -> u32 {
    match entries as u64 * 8 / max as u64 {
        0..=3 => 0,
        4 => 1,
        5 => 2,
        6 => 4,
        _ => 6,
    }
}

#[cfg(test)]
mod tests {
    use dataplane_abi::limits;

    use super::*;

    #[test]
    fn pressure_rises_with_the_table_and_is_none_while_it_is_half_empty() {
        let max = limits::FLOWS;
        assert_eq!(pressure(max / 2 - 1, max), 0);
        let rising: Vec<u32> = (4..9)
            .map(|eighths| pressure(max / 8 * eighths, max))
            .collect();
        assert!(rising.is_sorted() && rising[0] > 0, "{rising:?}");
    }
}
