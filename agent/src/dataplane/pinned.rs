//! The kernel's maps behind [`MapIo`]: hashes by batches of bpf(2), arrays by mmap.

use std::{
    io,
    ops::ControlFlow,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use dataplane_abi::{
    Addr, Cell, FrontendKey, Lead, LocalAddress, MaglevBlock, MaglevKey, PeerKey, RangeKey,
    ServiceRef, limits, map,
};

use super::{Error, mapping::Mapping, sys, tables::MapIo};

/// The pinned maps that the agent writes.
pub struct PinnedMaps {
    frontends: OwnedFd,
    local: OwnedFd,
    ranges: OwnedFd,
    maglev: OwnedFd,
    peers: OwnedFd,
    services: Mapping,
    backends: Mapping,
}

impl PinnedMaps {
    /// Opens the maps under a pin directory.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let open =
            |name: &'static str| sys::open_pinned(&dir.join(name)).map_err(failed("open", name));
        let (services, backends) = (open(map::SERVICES)?, open(map::BACKENDS)?);
        let service_bytes = limits::SERVICES as usize * size_of::<u64>();
        let cell_bytes = limits::CELLS as usize * size_of::<Cell>();
        Ok(Self {
            frontends: open(map::FRONTENDS)?,
            local: open(map::LOCAL)?,
            ranges: open(map::RANGES)?,
            maglev: open(map::MAGLEV)?,
            peers: open(map::PEERS)?,
            services: Mapping::whole(services.as_fd(), service_bytes)
                .map_err(failed("map", map::SERVICES))?,
            backends: Mapping::reserve(backends.as_fd(), cell_bytes)
                .map_err(failed("map", map::BACKENDS))?,
        })
    }
}

fn failed(action: &'static str, map: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Map {
        action,
        map,
        source,
    }
}

/// A hash says E2BIG when it is full, a trie ENOSPC.
fn written(map: &'static str, limit: u32) -> impl Fn(io::Error) -> Error {
    move |source| match source.raw_os_error() {
        Some(libc::E2BIG | libc::ENOSPC) => Error::Full { map, limit },
        _ => Error::Map {
            action: "write",
            map,
            source,
        },
    }
}

impl MapIo for PinnedMaps {
    fn frontends(&self) -> Result<Vec<(FrontendKey, Lead)>, Error> {
        let entries = sys::entries::<FrontendKey, Lead>(self.frontends.as_fd());
        let entries = entries.map_err(failed("read", map::FRONTENDS))?;
        let bare = |(key, lead): (FrontendKey, Lead)| (key, lead.bare());
        Ok(entries.into_iter().map(bare).collect())
    }

    fn set_frontends(&mut self, entries: &[(FrontendKey, Lead)]) -> Result<(), Error> {
        let sealed = |(key, lead): &(FrontendKey, Lead)| (*key, lead.sealed(key));
        let entries: Vec<(FrontendKey, Lead)> = entries.iter().map(sealed).collect();
        sys::update_batch(self.frontends.as_fd(), &entries)
            .map_err(written(map::FRONTENDS, limits::FRONTENDS))
    }

    fn remove_frontends(&mut self, keys: &[FrontendKey]) -> Result<(), Error> {
        sys::delete_batch(self.frontends.as_fd(), keys)
            .map_err(failed("delete from", map::FRONTENDS))
    }

    fn ranges(&self) -> Result<Vec<RangeKey>, Error> {
        let entries = sys::entries::<RangeKey, u32>(self.ranges.as_fd());
        let entries = entries.map_err(failed("read", map::RANGES))?;
        Ok(entries.into_iter().map(|(key, _)| key).collect())
    }

    fn set_ranges(&mut self, keys: &[RangeKey]) -> Result<(), Error> {
        let entries: Vec<(RangeKey, u32)> = keys.iter().map(|key| (*key, 1)).collect();
        sys::update_batch(self.ranges.as_fd(), &entries)
            .map_err(written(map::RANGES, limits::RANGES))
    }

    fn remove_ranges(&mut self, keys: &[RangeKey]) -> Result<(), Error> {
        sys::delete_batch(self.ranges.as_fd(), keys).map_err(failed("delete from", map::RANGES))
    }

    fn local_addresses(&self) -> Result<Vec<(Addr, LocalAddress)>, Error> {
        sys::entries(self.local.as_fd()).map_err(failed("read", map::LOCAL))
    }

    fn set_local_addresses(&mut self, entries: &[(Addr, LocalAddress)]) -> Result<(), Error> {
        sys::update_batch(self.local.as_fd(), entries)
            .map_err(written(map::LOCAL, limits::LOCAL_ADDRESSES))
    }

    fn remove_local_addresses(&mut self, keys: &[Addr]) -> Result<(), Error> {
        sys::delete_batch(self.local.as_fd(), keys).map_err(failed("delete from", map::LOCAL))
    }

    fn maglev_blocks(&self) -> Result<Vec<MaglevKey>, Error> {
        let mut keys = Vec::new();
        sys::visit_entries(self.maglev.as_fd(), |(key, _): (MaglevKey, MaglevBlock)| {
            keys.push(key);
            ControlFlow::Continue(())
        })
        .map_err(failed("read", map::MAGLEV))?;
        Ok(keys)
    }

    fn set_maglev(&mut self, blocks: &[(MaglevKey, MaglevBlock)]) -> Result<(), Error> {
        sys::update_batch(self.maglev.as_fd(), blocks)
            .map_err(written(map::MAGLEV, limits::MAGLEV_BLOCKS))
    }

    fn remove_maglev(&mut self, keys: &[MaglevKey]) -> Result<(), Error> {
        sys::delete_batch(self.maglev.as_fd(), keys).map_err(failed("delete from", map::MAGLEV))
    }

    fn peers(&self) -> Result<Vec<(PeerKey, u64)>, Error> {
        sys::entries(self.peers.as_fd()).map_err(failed("read", map::PEERS))
    }

    fn set_peers(&mut self, entries: &[(PeerKey, u64)]) -> Result<(), Error> {
        sys::update_batch(self.peers.as_fd(), entries).map_err(written(map::PEERS, limits::PEERS))
    }

    fn remove_peers(&mut self, keys: &[PeerKey]) -> Result<(), Error> {
        sys::delete_batch(self.peers.as_fd(), keys).map_err(failed("delete from", map::PEERS))
    }

    fn epoch(&self) -> u32 {
        self.service(ServiceRef::EPOCH_ID).epoch()
    }

    fn set_epoch(&mut self, epoch: u32) {
        self.set_service(ServiceRef::EPOCH_ID, ServiceRef::of_epoch(epoch));
    }

    fn service(&self, id: u32) -> ServiceRef {
        ServiceRef::from_word(self.services.load_word(id))
    }

    fn set_service(&mut self, id: u32, reference: ServiceRef) {
        self.services.store_word(id, reference.to_word());
    }

    fn reach_cells(&mut self, cells: u32) -> Result<(), Error> {
        self.backends
            .reach_cells(cells)
            .map_err(failed("map", map::BACKENDS))
    }

    fn cell(&self, index: u32) -> Cell {
        self.backends.read_cell(index)
    }

    fn write_cells(&mut self, first: u32, cells: &[Cell]) {
        self.backends.write_cells(first, cells);
    }
}
