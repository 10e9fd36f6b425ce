//! The ring by which programs tell of packets, and the word that says what they shall tell.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::Path;

use aya::maps::{Map, MapData, RingBuf};
use dataplane_abi::{
    ABI_VERSION, MONITOR_LOST, MONITOR_WANTED, MONITOR_WORDS, PacketEvent, Plain as _, Wanted, map,
};

use super::Error;
use super::{mapping::Mapping, sys};

/// The pinned ring. One reader at a time: whoever reads an event takes it.
pub struct EventRing {
    ring: RingBuf<MapData>,
    words: Mapping,
}

impl EventRing {
    /// Opens what is pinned under this root.
    pub fn open(pin_root: &Path) -> Result<Self, Error> {
        let dir = pin_root.join(format!("v{ABI_VERSION}"));
        let refused = |source| Error::Ring(Box::new(source));
        let data = MapData::from_pin(dir.join(map::EVENTS)).map_err(refused)?;
        Ok(Self {
            ring: RingBuf::try_from(Map::RingBuf(data)).map_err(refused)?,
            words: words(&dir)?,
        })
    }

    /// Says what is to be told from now on.
    pub fn want(&self, wanted: Wanted) {
        self.words.store_word(MONITOR_WANTED, wanted.0);
    }

    /// Events since the maps were made for which there was no room.
    pub fn lost(&self) -> u64 {
        self.words.load_word(MONITOR_LOST)
    }

    /// The next event, if there is one now.
    pub fn take(&mut self) -> Option<PacketEvent> {
        loop {
            let item = self.ring.next()?;
            // All that is written to the ring is such events; anything else is passed over.
            if let Some(event) = PacketEvent::read_from(&item) {
                return Some(event);
            }
        }
    }

    /// Becomes readable when there is an event.
    pub fn fd(&self) -> BorrowedFd<'_> {
        debug_assert!(self.ring.as_raw_fd() >= 0);
        self.ring.as_fd()
    }
}

/// Stops the telling that an earlier agent's listener began. No ring is no telling.
pub fn quiet(pin_root: &Path) -> Result<(), Error> {
    let dir = pin_root.join(format!("v{ABI_VERSION}"));
    words(&dir)?.store_word(MONITOR_WANTED, Wanted::default().0);
    Ok(())
}

fn words(dir: &Path) -> Result<Mapping, Error> {
    let failed = |source| Error::Map {
        action: "map",
        map: map::MONITOR,
        source,
    };
    let fd = sys::open_pinned(&dir.join(map::MONITOR)).map_err(failed)?;
    Mapping::whole(fd.as_fd(), MONITOR_WORDS as usize * size_of::<u64>()).map_err(failed)
}
