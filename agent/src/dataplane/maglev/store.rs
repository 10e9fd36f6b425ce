//! Which services have a Maglev table in the maps, and how much of the room is used.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dataplane_abi::{MaglevBlock, MaglevKey, limits};

use super::table;
use crate::dataplane::{Error, op::ServiceBackends, tables::MapIo};

/// How much of the room for Maglev tables is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MaglevUse {
    pub blocks: u32,
    /// Service ports whose table found no room: they choose at random.
    pub refused: usize,
}

/// A table in the maps, by the generation of the service whose it is.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub generation: u32,
    pub entries: u32,
}

impl Held {
    /// The keys of its blocks.
    fn keys(self) -> impl Iterator<Item = MaglevKey> {
        let generation = self.generation;
        (0..MaglevBlock::count(self.entries)).map(move |block| MaglevKey { generation, block })
    }
}

/// The tables that services have.
#[derive(Debug, Default)]
pub struct MaglevStore {
    held: HashMap<u32, Held>,
    /// Blocks of all of them.
    pub(in crate::dataplane) blocks: u32,
    /// Services whose table found no room, and the blocks that it asks for.
    refused: BTreeMap<u32, u32>,
}

impl MaglevStore {
    /// Takes over the tables of these services, and removes those that belong to nobody: an agent that was killed between a table and
    /// its service left them.
    pub fn adopt(io: &mut impl MapIo, held: HashMap<u32, Held>) -> Self {
        let mut store = Self {
            held,
            ..Self::default()
        };
        if let Err(error) = store.remove_stray(io) {
            tracing::warn!(%error, "what is left of Maglev tables cannot be looked at");
        }
        store
    }

    fn remove_stray(&mut self, io: &mut impl MapIo) -> Result<(), Error> {
        let owned: BTreeSet<u32> = self.held.values().map(|held| held.generation).collect();
        let (kept, stray): (Vec<MaglevKey>, Vec<MaglevKey>) = io
            .maglev_blocks()?
            .into_iter()
            .partition(|key| owned.contains(&key.generation));
        self.blocks = kept.len() as u32;
        io.remove_maglev(&stray)
    }

    /// Writes the table that a service asks for, under the generation it is about to have; gives its entries, 0 without one.
    pub fn write(
        &mut self,
        io: &mut impl MapIo,
        id: u32,
        generation: u32,
        backends: &ServiceBackends,
    ) -> Result<u32, Error> {
        self.refused.remove(&id);
        let entries = backends.maglev;
        if entries == 0 || backends.active.len() < 2 {
            return Ok(0);
        }
        let wanted = MaglevBlock::count(entries);
        if self.blocks + wanted > limits::MAGLEV_BLOCKS {
            self.refused.insert(id, wanted);
            return Ok(0);
        }
        let table = table(&backends.active, entries);
        let new = Held {
            generation,
            entries,
        };
        let blocks: Vec<(MaglevKey, MaglevBlock)> = new
            .keys()
            .zip(table.chunks(MaglevBlock::ENTRIES as usize))
            .map(|(key, slots)| {
                let mut block = MaglevBlock::EMPTY;
                block.slots[..slots.len()].copy_from_slice(slots);
                (key, block)
            })
            .collect();
        io.set_maglev(&blocks)?;
        self.blocks += wanted;
        Ok(entries)
    }

    /// Notes that a service has changed to its new generation, and removes the table of the one before.
    pub fn changed(
        &mut self,
        io: &mut impl MapIo,
        id: u32,
        generation: u32,
        entries: u32,
    ) -> Result<(), Error> {
        let new = Held {
            generation,
            entries,
        };
        let old = match entries {
            0 => self.held.remove(&id),
            _ => self.held.insert(id, new),
        };
        self.forget(io, old)
    }

    /// Removes what a service had that is gone.
    pub fn remove(&mut self, io: &mut impl MapIo, id: u32) -> Result<(), Error> {
        self.refused.remove(&id);
        let old = self.held.remove(&id);
        self.forget(io, old)
    }

    fn forget(&mut self, io: &mut impl MapIo, old: Option<Held>) -> Result<(), Error> {
        let Some(old) = old else {
            return Ok(());
        };
        let gone: Vec<MaglevKey> = old.keys().collect();
        io.remove_maglev(&gone)?;
        self.blocks = self.blocks.saturating_sub(gone.len() as u32);
        Ok(())
    }

    /// Of the services whose table found no room, those for which there is some by now.
    pub fn with_room(&self) -> Vec<u32> {
        let mut free = limits::MAGLEV_BLOCKS.saturating_sub(self.blocks);
        let mut fitting = Vec::new();
        for (id, wanted) in &self.refused {
            if *wanted <= free {
                free -= wanted;
                fitting.push(*id);
            }
        }
        fitting
    }

    pub fn usage(&self) -> MaglevUse {
        MaglevUse {
            blocks: self.blocks,
            refused: self.refused.len(),
        }
    }
}
