//! The ranges of addresses that service ports let in, and those without masquerade: what their map holds is known, since reading a trie
//! of many thousands back takes seconds.

use std::collections::{BTreeMap, BTreeSet};

use dataplane_abi::{RangeKey, limits};

use super::{Error, tables::MapIo};

/// The ranges of each service that has any, and of destinations without masquerade under 0; nothing while it is not known.
#[derive(Default)]
pub(super) struct Ranges(Option<BTreeMap<u32, BTreeSet<RangeKey>>>);

impl Ranges {
    /// Adds the ranges that some services shall have and have not, and gives those to be removed once no frontend asks for them. Where
    /// there is room for both only one after the other, they are removed first: for a moment clients of the new ones wait.
    pub fn extend(
        &mut self,
        io: &mut impl MapIo,
        wished: &BTreeMap<u32, BTreeSet<RangeKey>>,
    ) -> Result<Vec<RangeKey>, Error> {
        if wished.is_empty() {
            return Ok(Vec::new());
        }
        // On an error nothing is known of what is there, and it is read again.
        let mut held = match self.0.take() {
            Some(held) => held,
            None => read(io)?,
        };
        let none = BTreeSet::new();
        let (mut set, mut removed) = (Vec::new(), Vec::new());
        for (service, wish) in wished {
            let had = held.get(service).unwrap_or(&none);
            set.extend(wish.difference(had).copied());
            removed.extend(had.difference(wish).copied());
        }
        let room = limits::RANGES as usize;
        let together = held.values().map(BTreeSet::len).sum::<usize>() + set.len();
        if together - removed.len() > room {
            // The kernel would take some of them.
            self.0 = Some(held);
            return Err(Error::Full {
                map: dataplane_abi::map::RANGES,
                limit: limits::RANGES,
            });
        }
        if together > room {
            io.remove_ranges(&removed)?;
            removed.clear();
        }
        io.set_ranges(&set)?;
        for (service, wish) in wished {
            if wish.is_empty() {
                held.remove(service);
            } else {
                held.insert(*service, wish.clone());
            }
        }
        self.0 = Some(held);
        Ok(removed)
    }

    /// What was to be removed may be there still.
    pub fn forget(&mut self) {
        self.0 = None;
    }
}

fn read(io: &impl MapIo) -> Result<BTreeMap<u32, BTreeSet<RangeKey>>, Error> {
    let mut held: BTreeMap<u32, BTreeSet<RangeKey>> = BTreeMap::new();
    for key in io.ranges()? {
        held.entry(key.service).or_default().insert(key);
    }
    Ok(held)
}
