//! What the maps hold, and changing it: frontends, services with their extents, local addresses.
//!
//! [`MapIo`] is the seam: pinned maps of the kernel, or maps in memory for tests.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use dataplane_abi::{
    Addr, Backend, Cell, ExtentHeader, FROM_HOST, FROM_POD, FrontendKey, LEAD_GUARDED,
    Lead as RawLead, LocalAddress, MARKER_EXTERNAL, MaglevBlock, MaglevKey, PeerKey, QUEUED,
    RangeKey, SERVICE_DIRECT, SERVICE_KEEPS_CLIENTS, SERVICE_SILENT, ServiceRef, limits,
};
use ipnetwork::IpNetwork;

use super::{
    Error,
    constants::word_of,
    extent::{Extent, Extents},
    maglev::{Held, MaglevStore, MaglevUse},
    op::{Frontend, Lead, LocalPod, Op, Protocol, ServiceBackends, ServiceId, State, Vip},
    ranges::Ranges,
};

/// The maps of the data plane, as the agent reads and writes them.
pub trait MapIo {
    fn frontends(&self) -> Result<Vec<(FrontendKey, RawLead)>, Error>;
    fn set_frontends(&mut self, entries: &[(FrontendKey, RawLead)]) -> Result<(), Error>;
    fn remove_frontends(&mut self, keys: &[FrontendKey]) -> Result<(), Error>;

    fn ranges(&self) -> Result<Vec<RangeKey>, Error>;
    fn set_ranges(&mut self, keys: &[RangeKey]) -> Result<(), Error>;
    fn remove_ranges(&mut self, keys: &[RangeKey]) -> Result<(), Error>;

    fn local_addresses(&self) -> Result<Vec<(Addr, LocalAddress)>, Error>;
    fn set_local_addresses(&mut self, entries: &[(Addr, LocalAddress)]) -> Result<(), Error>;
    fn remove_local_addresses(&mut self, keys: &[Addr]) -> Result<(), Error>;

    /// Which blocks of Maglev tables there are.
    fn maglev_blocks(&self) -> Result<Vec<MaglevKey>, Error>;
    fn set_maglev(&mut self, blocks: &[(MaglevKey, MaglevBlock)]) -> Result<(), Error>;
    fn remove_maglev(&mut self, keys: &[MaglevKey]) -> Result<(), Error>;

    fn peers(&self) -> Result<Vec<(PeerKey, u64)>, Error>;
    fn set_peers(&mut self, entries: &[(PeerKey, u64)]) -> Result<(), Error>;
    fn remove_peers(&mut self, keys: &[PeerKey]) -> Result<(), Error>;

    /// The word of [`ServiceRef::EPOCH_ID`].
    fn epoch(&self) -> u32;
    fn set_epoch(&mut self, epoch: u32);

    fn service(&self, id: u32) -> ServiceRef;
    /// Replaces a service's reference in one store, after all cells written before.
    fn set_service(&mut self, id: u32, reference: ServiceRef);
    /// Lets the first cells be read and written: those after them must not be touched.
    fn reach_cells(&mut self, cells: u32) -> Result<(), Error>;
    fn cell(&self, index: u32) -> Cell;
    fn write_cells(&mut self, first: u32, cells: &[Cell]);
}

/// How much of the maps is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    pub services: u32,
    pub frontends: u32,
    pub cells: u32,
    pub local_addresses: u32,
}

/// What was done by [`Tables::apply`]: entries written and removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Applied {
    pub services: u32,
    pub frontends: u32,
    pub local_addresses: u32,
}

/// The maps with what the agent needs to know to change them.
pub struct Tables<M> {
    io: M,
    extents: Extents,
    /// Extent of each service that has one.
    placed: HashMap<u32, Extent>,
    ranges: Ranges,
    /// The ranges of other nodes that the map holds; nothing while that is not known.
    peers: Option<BTreeMap<PeerKey, u64>>,
    generation: u32,
    maglev: MaglevStore,
}

const CELLS_ORDER: u8 = limits::CELLS.trailing_zeros() as u8;
const _: () = assert!(limits::CELLS.is_power_of_two());

impl<M: MapIo> Tables<M> {
    /// Takes over maps as they are. A service whose extent contradicts it (only a bug could write one) is removed.
    pub fn adopt(mut io: M) -> Result<Self, Error> {
        let mut extents = Extents::new(CELLS_ORDER);
        let (mut placed, mut generation) = (HashMap::new(), io.epoch());
        let mut tables = HashMap::new();
        for id in 1..limits::SERVICES {
            let reference = io.service(id);
            if reference.generation == 0 {
                continue;
            }
            generation = generation.max(reference.generation);
            match extent_of(&mut io, id, reference)? {
                Some(extent) if extents.reserve(extent) => {
                    let entries = ExtentHeader::from(io.cell(reference.extent)).maglev;
                    if entries != 0 {
                        let generation = reference.generation;
                        tables.insert(
                            id,
                            Held {
                                generation,
                                entries,
                            },
                        );
                    }
                    placed.insert(id, extent);
                }
                _ => {
                    tracing::warn!(
                        service = id,
                        "removed a service whose backends are not where it says"
                    );
                    io.set_service(id, ServiceRef::default());
                }
            }
        }
        let maglev = MaglevStore::adopt(&mut io, tables);
        Ok(Self {
            io,
            extents,
            placed,
            ranges: Ranges::default(),
            peers: None,
            generation,
            maglev,
        })
    }

    /// Lets generations go on behind one that other maps may have come to.
    pub fn after_generation(mut self, generation: u32) -> Self {
        self.generation = self.generation.max(generation);
        self
    }

    /// Everything that the maps hold.
    pub fn state(&self) -> Result<State, Error> {
        let mut state = State::default();
        for id in self.placed.keys() {
            state.services.insert(ServiceId(*id), self.backends(*id));
        }
        for (key, lead) in self.io.frontends()? {
            if key.is_marker() {
                let kind = if lead.flags & MARKER_EXTERNAL == 0 {
                    Vip::Cluster
                } else {
                    Vip::External
                };
                state.vips.insert(key.addr.into(), kind);
            } else if let Some((frontend, lead)) = frontend_of(&key, &lead) {
                state.frontends.insert(frontend, lead);
            } else {
                tracing::warn!(?key, ?lead, "a frontend of an unknown kind is left alone");
            }
        }
        for key in self.io.ranges()? {
            let Some(range) = network(&key) else {
                tracing::warn!(?key, "a range that is none is left alone");
                continue;
            };
            match key.service {
                0 => state.unmasqueraded.insert(range),
                id => state
                    .sources
                    .entry(ServiceId(id))
                    .or_default()
                    .insert(range),
            };
        }
        for (key, mac) in self.io.peers()? {
            let [a, b, c, d, e, f, ..] = mac.to_le_bytes();
            match range_of(key.address(), key.prefix_len) {
                Some(range) => drop(state.peers.insert(range, [a, b, c, d, e, f])),
                None => tracing::warn!(?key, "a range of another node that is none is left alone"),
            }
        }
        for (addr, local) in self.io.local_addresses()? {
            match local.kind & !QUEUED {
                FROM_POD => {
                    state.pods.insert(
                        addr.into(),
                        LocalPod {
                            ifindex: local.ifindex,
                            mac: local.mac,
                            queued: local.kind & QUEUED != 0,
                        },
                    );
                }
                FROM_HOST => {
                    state.host_addresses.insert(addr.into());
                }
                _ => tracing::warn!(
                    ?addr,
                    kind = local.kind,
                    "a local address of an unknown kind is left alone"
                ),
            }
        }
        Ok(state)
    }

    fn backends(&self, id: u32) -> ServiceBackends {
        let extent = self.io.service(id).extent;
        let header = ExtentHeader::from(self.io.cell(extent));
        let backend = |slot: u32| {
            let backend = Backend::from(self.io.cell(extent + 1 + slot));
            SocketAddr::new(backend.addr.into(), u16::from_be(backend.port))
        };
        ServiceBackends {
            active: (0..header.active).map(backend).collect(),
            terminating: (header.active..header.total).map(backend).collect(),
            silent: header.flags & SERVICE_SILENT != 0,
            affinity_timeout_s: header.affinity_timeout_s,
            maglev: header.maglev,
            direct: header.flags & SERVICE_DIRECT != 0,
            keeps_clients: header.flags & SERVICE_KEEPS_CLIENTS != 0,
        }
    }

    /// Carries out a batch. Of several changes of one thing the last counts; services come before the frontends that name
    /// them and go after. On an error part of the batch may be done: read [`Tables::state`] before going on.
    pub fn apply(&mut self, ops: &[Op], now: Instant) -> Result<Applied, Error> {
        let batch = Batch::collect(ops)?;
        let applied = self.carry_out(&batch, now);
        // Also when some of it failed.
        // With a service goes what says which generation it had, and the next agent's may not come to that again.
        let removes = batch
            .services
            .iter()
            .any(|(_, backends)| backends.is_none());
        if removes
            || !(batch.frontends.is_empty() && batch.locals.is_empty() && batch.ranges.is_empty())
        {
            self.begin_epoch();
        }
        applied
    }

    /// Has sockets ask again where destinations lead.
    pub fn begin_epoch(&mut self) {
        let epoch = self.next_generation();
        self.io.set_epoch(epoch);
    }

    /// The one after all that services and epochs have had.
    fn next_generation(&mut self) -> u32 {
        // 0 says that there is no service.
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        self.generation
    }

    fn carry_out(&mut self, batch: &Batch<'_>, now: Instant) -> Result<Applied, Error> {
        for (id, backends) in &batch.services {
            if let Some(backends) = backends {
                self.place(*id, backends, now)?;
            }
        }
        if let Some(peers) = &batch.peers {
            self.settle_peers(peers)?;
        }
        let stale_ranges = self.ranges.extend(&mut self.io, &batch.ranges)?;
        let changed = self.lead(batch, &stale_ranges, now);
        if changed.is_err() {
            self.ranges.forget();
        }
        changed
    }

    /// What clients are led by, and what nothing leads to any more.
    fn lead(
        &mut self,
        batch: &Batch<'_>,
        stale_ranges: &[RangeKey],
        now: Instant,
    ) -> Result<Applied, Error> {
        let (set, removed) = parted(&batch.locals);
        self.io.set_local_addresses(&set)?;
        self.io.remove_local_addresses(&removed)?;
        // A marker rejects the ports that are not there: it comes after them and goes before. The sorts keep all other order.
        let (mut set, mut removed) = parted(&batch.frontends);
        set.sort_by_key(|(key, _)| key.is_marker());
        removed.sort_by_key(|key| !key.is_marker());
        self.io.set_frontends(&set)?;
        self.io.remove_frontends(&removed)?;
        self.io.remove_ranges(stale_ranges)?;
        for (id, wished) in &batch.renewed {
            if self.placed.contains_key(id) && !matches!(batch.services.get(id), Some(None)) {
                self.renew(*id, wished, now)?;
            }
        }
        for (id, backends) in &batch.services {
            if backends.is_none()
                && let Some(extent) = self.placed.remove(id)
            {
                self.io.set_service(*id, ServiceRef::default());
                self.extents.retire(extent, now);
                self.maglev.remove(&mut self.io, *id)?;
            }
        }
        Ok(Applied {
            services: batch.services.len() as u32,
            frontends: batch.frontends.len() as u32,
            local_addresses: batch.locals.len() as u32,
        })
    }

    /// Gives a service another generation, with the backends that are wished; where there is no room for them, with those that it has.
    fn renew(&mut self, id: u32, wished: &ServiceBackends, now: Instant) -> Result<(), Error> {
        match self.place(id, wished, now) {
            Err(error) if error.is_limit() => {
                let held = self.backends(id);
                self.place(id, &held, now)
            }
            placed => placed,
        }
    }

    /// Writes a service's backends to a new extent, leads the service there, and lets the old one rest.
    fn place(&mut self, id: u32, backends: &ServiceBackends, now: Instant) -> Result<(), Error> {
        let total = backends.active.len() + backends.terminating.len();
        if total > limits::BACKENDS_PER_SERVICE as usize {
            return Err(Error::TooManyBackends {
                service: ServiceId(id),
                backends: total,
            });
        }
        let order = Extent::order_for(total as u32);
        let extent = self.extents.allocate(order, now).ok_or(Error::Full {
            map: dataplane_abi::map::BACKENDS,
            limit: limits::CELLS,
        })?;
        if let Err(error) = self.io.reach_cells(extent.end()) {
            self.extents.retire(extent, now);
            return Err(error);
        }
        let generation = self.next_generation();
        let entries = match self.maglev.write(&mut self.io, id, generation, backends) {
            Ok(entries) => entries,
            Err(error) => {
                self.extents.retire(extent, now);
                return Err(error);
            }
        };
        // Nodes that do not choose alike would send clients' packets to nodes that send them on.
        let direct = backends.direct && (entries != 0 || backends.active.len() == 1);
        let flags = if backends.silent { SERVICE_SILENT } else { 0 }
            | if direct { SERVICE_DIRECT } else { 0 }
            | if backends.keeps_clients {
                SERVICE_KEEPS_CLIENTS
            } else {
                0
            };
        let header = ExtentHeader {
            service: id,
            generation,
            active: backends.active.len() as u32,
            total: total as u32,
            flags,
            affinity_timeout_s: backends.affinity_timeout_s,
            maglev: entries,
            near_active: ascending(&backends.active),
            near_terminating: ascending(&backends.terminating),
        };
        let mut cells = vec![Cell::from(header)];
        let all = backends.active.iter().chain(&backends.terminating);
        cells.extend(
            (0..).zip(all).map(|(slot, at)| {
                Cell::from(Backend::new(at.ip().into(), at.port().to_be(), slot))
            }),
        );
        self.io.write_cells(extent.start, &cells);
        self.io.set_service(
            id,
            ServiceRef {
                extent: extent.start,
                generation,
            },
        );
        if let Some(old) = self.placed.insert(id, extent) {
            self.extents.retire(old, now);
        }
        // The old table need not rest: a program that finds none any more looks again for the service.
        self.maglev.changed(&mut self.io, id, generation, entries)
    }

    /// How much of the room for Maglev tables is used.
    pub fn maglev(&self) -> MaglevUse {
        self.maglev.usage()
    }

    /// Service ports that choose at random for want of room for their table, for which there is some by now.
    pub fn tables_with_room(&self) -> Vec<ServiceId> {
        self.maglev.with_room().into_iter().map(ServiceId).collect()
    }

    /// Makes the ranges of other nodes these.
    fn settle_peers(&mut self, wished: &BTreeMap<PeerKey, u64>) -> Result<(), Error> {
        // On an error nothing is known of what is there, and it is read again.
        let held = match self.peers.take() {
            Some(held) => held,
            None => self.io.peers()?.into_iter().collect(),
        };
        let new = wished
            .iter()
            .filter(|(key, mac)| held.get(key) != Some(mac));
        let new: Vec<(PeerKey, u64)> = new.map(|(key, mac)| (*key, *mac)).collect();
        let gone = held.keys().filter(|key| !wished.contains_key(key));
        let gone: Vec<PeerKey> = gone.copied().collect();
        self.io.remove_peers(&gone)?;
        self.io.set_peers(&new)?;
        self.peers = Some(wished.clone());
        Ok(())
    }

    /// Lets pods keep their addresses everywhere, unless it is known where they do. Programs that masquerade must not see a packet
    /// before that: what one pod sends to another would leave as the node.
    pub fn hold_masquerade_back(&mut self, now: Instant) -> Result<(), Error> {
        if self.io.ranges()?.iter().any(|key| key.service == 0) {
            return Ok(());
        }
        let everywhere = [IpAddr::from([0; 4]), IpAddr::from([0; 16])];
        let ranges = everywhere
            .into_iter()
            .filter_map(|any| IpNetwork::new(any, 0).ok())
            .collect();
        self.apply(&[Op::SetUnmasqueraded { ranges }], now)
            .map(drop)
    }

    /// Cells that services have. Those that rest are free again in a moment.
    pub fn cells_used(&self) -> u32 {
        limits::CELLS - self.extents.available()
    }

    /// How full the maps are. Counts frontends and addresses by reading them.
    pub fn usage(&self) -> Result<Usage, Error> {
        Ok(Usage {
            services: self.placed.len() as u32,
            frontends: self.io.frontends()?.len() as u32,
            cells: self.cells_used(),
            local_addresses: self.io.local_addresses()?.len() as u32,
        })
    }
}

/// How many backends come first in ascending order. There are no more than fit.
fn ascending(backends: &[SocketAddr]) -> u16 {
    let descent = backends.windows(2).position(|pair| pair[0] > pair[1]);
    descent.map_or(backends.len(), |last| last + 1) as u16
}

/// Where a service's header says that its extent is, when it is one. All of it can be read then.
fn extent_of(io: &mut impl MapIo, id: u32, reference: ServiceRef) -> Result<Option<Extent>, Error> {
    if reference.extent == 0 || reference.extent >= limits::CELLS {
        return Ok(None);
    }
    io.reach_cells(reference.extent + 1)?;
    let header = ExtentHeader::from(io.cell(reference.extent));
    let is_its = header.service == id && header.generation == reference.generation;
    if !is_its || header.active > header.total || header.total > limits::BACKENDS_PER_SERVICE {
        return Ok(None);
    }
    let extent = Extent {
        start: reference.extent,
        order: Extent::order_for(header.total),
    };
    if !extent.start.is_multiple_of(1 << extent.order) {
        return Ok(None);
    }
    io.reach_cells(extent.end())?;
    Ok(Some(extent))
}

/// A frontend and where it leads, as the maps have them; nothing of a marker, or of a protocol that we do not speak.
pub(super) fn frontend_of(key: &FrontendKey, lead: &RawLead) -> Option<(Frontend, Lead)> {
    if key.is_marker() {
        return None;
    }
    let frontend = Frontend {
        addr: key.addr.into(),
        port: u16::from_be(key.port),
        protocol: Protocol::from_number(key.proto)?,
    };
    let lead = Lead {
        internal: ServiceId(lead.internal),
        external: ServiceId(lead.external),
        guarded: lead.flags & LEAD_GUARDED != 0,
    };
    Some((frontend, lead))
}

/// What a batch leaves each key with; nothing where it is to be removed.
#[derive(Default)]
struct Batch<'a> {
    services: BTreeMap<u32, Option<&'a ServiceBackends>>,
    renewed: BTreeMap<u32, &'a ServiceBackends>,
    ranges: BTreeMap<u32, BTreeSet<RangeKey>>,
    frontends: BTreeMap<FrontendKey, Option<RawLead>>,
    locals: BTreeMap<Addr, Option<LocalAddress>>,
    peers: Option<BTreeMap<PeerKey, u64>>,
}

impl<'a> Batch<'a> {
    fn collect(ops: &'a [Op]) -> Result<Self, Error> {
        let mut batch = Self::default();
        for op in ops {
            match op {
                Op::SetService { id, backends } => {
                    batch.services.insert(checked(*id)?, Some(backends));
                }
                Op::RemoveService { id } => {
                    batch.services.insert(checked(*id)?, None);
                }
                Op::RenewService { id, backends } => {
                    batch.renewed.insert(checked(*id)?, backends);
                }
                Op::SetSources { id, sources } => {
                    let id = checked(*id)?;
                    batch.ranges.insert(id, range_keys(id, sources));
                }
                Op::SetUnmasqueraded { ranges } => {
                    batch.ranges.insert(0, range_keys(0, ranges));
                }
                Op::SetPeers { peers } => {
                    let entry = |(range, mac): (&IpNetwork, &[u8; 6])| {
                        let len = u32::from(range.prefix()) + deeper(range);
                        (PeerKey::new(range.network().into(), len), word_of(*mac))
                    };
                    batch.peers = Some(peers.iter().map(entry).collect());
                }
                Op::SetFrontend { frontend, lead } => {
                    let flags = if lead.guarded { LEAD_GUARDED } else { 0 };
                    let lead =
                        RawLead::new(checked(lead.internal)?, checked(lead.external)?, flags);
                    batch.frontends.insert(frontend_key(frontend), Some(lead));
                }
                Op::RemoveFrontend { frontend } => {
                    batch.frontends.insert(frontend_key(frontend), None);
                }
                Op::SetVip { addr, kind } => {
                    let flags = match kind {
                        Vip::Cluster => 0,
                        Vip::External => MARKER_EXTERNAL,
                    };
                    let marker = RawLead::new(RawLead::MARKER, 0, flags);
                    batch
                        .frontends
                        .insert(FrontendKey::marker((*addr).into()), Some(marker));
                }
                Op::RemoveVip { addr } => {
                    batch
                        .frontends
                        .insert(FrontendKey::marker((*addr).into()), None);
                }
                Op::SetPod { addr, pod } => {
                    let local = LocalAddress {
                        kind: if pod.queued {
                            FROM_POD | QUEUED
                        } else {
                            FROM_POD
                        },
                        ifindex: pod.ifindex,
                        mac: pod.mac,
                        pad: [0; 2],
                    };
                    batch.locals.insert((*addr).into(), Some(local));
                }
                Op::SetHostAddress { addr } => {
                    let local = LocalAddress {
                        kind: FROM_HOST,
                        ifindex: 0,
                        mac: [0; 6],
                        pad: [0; 2],
                    };
                    batch.locals.insert((*addr).into(), Some(local));
                }
                Op::RemovePod { addr } | Op::RemoveHostAddress { addr } => {
                    batch.locals.insert((*addr).into(), None);
                }
            }
        }
        Ok(batch)
    }
}

fn checked(id: ServiceId) -> Result<u32, Error> {
    if (1..limits::SERVICES).contains(&id.0) {
        Ok(id.0)
    } else {
        Err(Error::Full {
            map: dataplane_abi::map::SERVICES,
            limit: limits::SERVICES,
        })
    }
}

/// The keys of ranges; an IPv4 range lies 96 bits deep in the mapped ones.
fn range_keys(id: u32, ranges: &BTreeSet<IpNetwork>) -> BTreeSet<RangeKey> {
    let key = |range: &IpNetwork| {
        let len = u32::from(range.prefix()) + deeper(range);
        RangeKey::new(id, range.network().into(), len)
    };
    ranges.iter().map(key).collect()
}

/// Bits before those of a range's own addresses.
fn deeper(range: &IpNetwork) -> u32 {
    if range.is_ipv4() { 96 } else { 0 }
}

/// The range of a key.
fn network(key: &RangeKey) -> Option<IpNetwork> {
    range_of(key.address(), key.prefix_len.checked_sub(32)?)
}

/// The range of an address and so many bits out of 128.
fn range_of(addr: Addr, len: u32) -> Option<IpNetwork> {
    let addr = IpAddr::from(addr);
    let len = if addr.is_ipv4() {
        len.checked_sub(96)?
    } else {
        len
    };
    IpNetwork::new(addr, u8::try_from(len).ok()?).ok()
}

fn frontend_key(frontend: &Frontend) -> FrontendKey {
    FrontendKey::new(
        frontend.addr.into(),
        frontend.port.to_be(),
        frontend.protocol.number(),
    )
}

fn parted<K: Copy, V: Copy>(changes: &BTreeMap<K, Option<V>>) -> (Vec<(K, V)>, Vec<K>) {
    let set = changes
        .iter()
        .filter_map(|(key, value)| value.map(|value| (*key, value)))
        .collect();
    let removed = changes
        .iter()
        .filter(|(_, value)| value.is_none())
        .map(|(key, _)| *key)
        .collect();
    (set, removed)
}

#[cfg(test)]
#[path = "tables_tests.rs"]
mod tests;
