//! The shapes of pinned maps: whether programs can have what is pinned under a name. aya takes whatever is.

use std::{io, os::fd::AsFd as _, path::Path};

use dataplane_abi::{
    Addr, Affinity, AffinityKey, Cell, Connected, Flow, FlowKey, FragmentKey, FragmentPorts,
    FrontendKey, KeptPorts, Lead, LocalAddress, MONITOR_WORDS, MaglevBlock, MaglevKey, PeerKey,
    RangeKey, Reason, SocketPeer, SocketPeers, Trace, limits, map,
};

use super::{
    Error,
    sys::{self, MapShape},
};

/// What each map of the object is made like.
pub(super) fn shapes() -> [(&'static str, MapShape); 20] {
    const HASH: u32 = 1;
    const ARRAY: u32 = 2;
    const PERCPU_ARRAY: u32 = 6;
    const LRU_HASH: u32 = 9;
    const LPM_TRIE: u32 = 11;
    const SK_STORAGE: u32 = 24;
    const RINGBUF: u32 = 27;
    const NO_PREALLOC: u32 = 1;
    const MMAPABLE: u32 = 1024;
    let word = size_of::<u32>();
    [
        (
            map::DATAGRAMS,
            MapShape::new(
                LRU_HASH,
                size_of::<u64>(),
                size_of::<SocketPeer>(),
                limits::DATAGRAMS,
                0,
            ),
        ),
        (
            map::FRONTENDS,
            MapShape::new(
                HASH,
                size_of::<FrontendKey>(),
                size_of::<Lead>(),
                limits::FRONTENDS,
                NO_PREALLOC,
            ),
        ),
        (
            map::SERVICES,
            MapShape::new(ARRAY, word, size_of::<u64>(), limits::SERVICES, MMAPABLE),
        ),
        (
            map::BACKENDS,
            MapShape::new(ARRAY, word, size_of::<Cell>(), limits::CELLS, MMAPABLE),
        ),
        (
            map::LOCAL,
            MapShape::new(
                HASH,
                size_of::<Addr>(),
                size_of::<LocalAddress>(),
                limits::LOCAL_ADDRESSES,
                NO_PREALLOC,
            ),
        ),
        (
            map::FLOWS,
            MapShape::new(
                HASH,
                size_of::<FlowKey>(),
                size_of::<Flow>(),
                limits::FLOWS,
                NO_PREALLOC,
            ),
        ),
        (
            map::FLOWS_UNREPLIED,
            MapShape::new(
                LRU_HASH,
                size_of::<FlowKey>(),
                size_of::<Flow>(),
                limits::FLOWS_UNREPLIED,
                0,
            ),
        ),
        (
            map::AFFINITY,
            MapShape::new(
                LRU_HASH,
                size_of::<AffinityKey>(),
                size_of::<Affinity>(),
                limits::AFFINITY,
                0,
            ),
        ),
        (
            map::RANGES,
            MapShape::new(
                LPM_TRIE,
                size_of::<RangeKey>(),
                word,
                limits::RANGES,
                NO_PREALLOC,
            ),
        ),
        (
            map::PEERS,
            MapShape::new(
                LPM_TRIE,
                size_of::<PeerKey>(),
                size_of::<u64>(),
                limits::PEERS,
                NO_PREALLOC,
            ),
        ),
        (
            map::MAGLEV,
            MapShape::new(
                HASH,
                size_of::<MaglevKey>(),
                size_of::<MaglevBlock>(),
                limits::MAGLEV_BLOCKS,
                NO_PREALLOC,
            ),
        ),
        (
            map::FRAGMENTS,
            MapShape::new(
                LRU_HASH,
                size_of::<FragmentKey>(),
                size_of::<FragmentPorts>(),
                limits::FRAGMENTS,
                0,
            ),
        ),
        (
            map::TRACES,
            MapShape::new(ARRAY, word, size_of::<Trace>(), limits::TRACES, 0),
        ),
        (
            map::KEPT_PORTS,
            MapShape::new(ARRAY, word, size_of::<KeptPorts>(), limits::KEPT_PORTS, 0),
        ),
        (
            map::COUNTERS,
            MapShape::new(PERCPU_ARRAY, word, size_of::<u64>(), Reason::COUNT, 0),
        ),
        (
            map::EVENTS,
            MapShape::new(RINGBUF, 0, 0, limits::EVENTS_BYTES, 0),
        ),
        (
            map::MONITOR,
            MapShape::new(ARRAY, word, size_of::<u64>(), MONITOR_WORDS, MMAPABLE),
        ),
        (
            map::SOCKET_PEERS,
            MapShape::new(SK_STORAGE, word, size_of::<SocketPeers>(), 0, NO_PREALLOC),
        ),
        (
            map::CONNECTED,
            MapShape::new(ARRAY, word, size_of::<Connected>(), limits::CONNECTED, 0),
        ),
        (
            map::SOCKET_PEER,
            MapShape::new(SK_STORAGE, word, size_of::<SocketPeer>(), 0, NO_PREALLOC),
        ),
    ]
}

/// Refuses a map that programs would misread.
pub(super) fn check_shape(dir: &Path, name: &'static str, wanted: MapShape) -> Result<(), Error> {
    let failed = |source| Error::Map {
        action: "open",
        map: name,
        source,
    };
    let pinned = match sys::open_pinned(&dir.join(name)) {
        Ok(map) => sys::map_shape(map.as_fd()).map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if shape_fits(name, pinned) {
        Ok(())
    } else {
        Err(Error::Shape {
            path: dir.join(name),
            pinned,
            wanted,
        })
    }
}

/// Whether programs can have a map of this shape under that name. One that tells of traffic may have been made by another version,
/// which had room for more or less in it.
pub(super) fn shape_fits(name: &str, shape: MapShape) -> bool {
    let wanted = shapes().into_iter().find(|(known, _)| *known == name);
    wanted.is_some_and(|(_, wanted)| {
        let is_of_traffic = map::OF_TRAFFIC.contains(&name);
        let max_entries = if is_of_traffic {
            wanted.max_entries
        } else {
            shape.max_entries
        };
        shape.with_max_entries(max_entries) == wanted
    })
}
