//! A map by name of which a clone shares everything, and that is little more than its entries: general persistent maps keep half of their
//! nodes empty, which for a zone of small entries is most of the memory.

use std::hash::BuildHasher;
use std::sync::Arc;

use foldhash::fast::RandomState;

/// Groups, and shards of each: what a change copies is one pointer for each group, and the entries of one group.
const GROUPS: usize = 64;
const SHARDS: usize = 64;

type Shard<V> = Vec<Entry<V>>;
type Group<V> = [Shard<V>; SHARDS];

#[derive(Clone)]
struct Entry<V> {
    hash: u32,
    name: Arc<[u8]>,
    value: V,
}

/// Values by name in wire format.
#[derive(Clone)]
pub struct NameMap<V> {
    hasher: RandomState,
    groups: Arc<[Arc<Group<V>>; GROUPS]>,
    len: usize,
}

impl<V> Default for NameMap<V> {
    fn default() -> Self {
        let empty = Arc::new(std::array::from_fn(|_| Vec::new()));
        Self {
            hasher: RandomState::default(),
            groups: Arc::new(std::array::from_fn(|_| Arc::clone(&empty))),
            len: 0,
        }
    }
}

/// Where a name is kept: group, shard, and the hash that its shard is sorted by.
#[derive(Clone, Copy)]
struct Slot {
    group: usize,
    shard: usize,
    hash: u32,
}

impl<V> NameMap<V> {
    fn slot(&self, name: &[u8]) -> Slot {
        let hash = self.hasher.hash_one(name);
        Slot {
            group: hash as usize % GROUPS,
            shard: (hash >> 16) as usize % SHARDS,
            hash: (hash >> 32) as u32,
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn get(&self, name: &[u8]) -> Option<&V> {
        let slot = self.slot(name);
        let shard = &self.groups[slot.group][slot.shard];
        find(shard, slot.hash, name).ok().map(|at| &shard[at].value)
    }

    /// All names with their values, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<[u8]>, &V)> {
        let shards = self.groups.iter().flat_map(|group| group.iter());
        shards.flatten().map(|entry| (&entry.name, &entry.value))
    }
}

impl<V: Clone> NameMap<V> {
    fn shard(&mut self, slot: Slot) -> &mut Shard<V> {
        let groups = Arc::make_mut(&mut self.groups);
        &mut Arc::make_mut(&mut groups[slot.group])[slot.shard]
    }

    pub fn get_mut(&mut self, name: &[u8]) -> Option<&mut V> {
        // A name that is not there is no reason to copy anything.
        self.get(name)?;
        let slot = self.slot(name);
        let shard = self.shard(slot);
        let at = find(shard, slot.hash, name).ok()?;
        Some(&mut shard[at].value)
    }

    /// The value of a name, put there where there is none.
    pub fn get_or_insert(&mut self, name: &Arc<[u8]>, make: impl FnOnce() -> V) -> &mut V {
        let slot = self.slot(name);
        let shard = self.shard(slot);
        let found = find(shard, slot.hash, name);
        let at = match found {
            Ok(at) => at,
            Err(at) => {
                let entry = Entry {
                    hash: slot.hash,
                    name: name.clone(),
                    value: make(),
                };
                // Many small vectors: room for twice as much in each would be as much again.
                shard.reserve_exact(1);
                shard.insert(at, entry);
                at
            }
        };
        if found.is_err() {
            self.len += 1;
        }
        // Again, since the count could not be changed while the first loan lasted.
        &mut self.shard(slot)[at].value
    }

    pub fn remove(&mut self, name: &[u8]) {
        if self.get(name).is_none() {
            return;
        }
        let slot = self.slot(name);
        let shard = self.shard(slot);
        if let Ok(at) = find(shard, slot.hash, name) {
            shard.remove(at);
            shard.shrink_to_fit();
            self.len -= 1;
        }
    }
}

/// The place of a name in a shard, or where it belongs. Hashes are spread evenly, so that one says where about it is: a search by halves
/// would wait for memory at every step, which was a tenth of an answer.
fn find<V>(shard: &[Entry<V>], hash: u32, name: &[u8]) -> Result<usize, usize> {
    let mut first = ((u64::from(hash) * shard.len() as u64) >> 32) as usize;
    while first > 0 && shard[first - 1].hash >= hash {
        first -= 1;
    }
    while first < shard.len() && shard[first].hash < hash {
        first += 1;
    }
    let same = shard[first..].iter().take_while(|entry| entry.hash == hash);
    let at = same.clone().position(|entry| *entry.name == *name);
    at.map(|at| first + at).ok_or(first)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn name(i: u16) -> Arc<[u8]> {
        Arc::from(i.to_be_bytes())
    }

    fn content(map: &NameMap<u32>) -> BTreeMap<Arc<[u8]>, u32> {
        map.iter()
            .map(|(name, value)| (name.clone(), *value))
            .collect()
    }

    proptest! {
        #[test]
        fn it_is_a_map_and_a_clone_stays_as_it_was(
            steps in proptest::collection::vec((0_u16..300, any::<bool>(), any::<u32>()), 0..600),
            cloned_at in 0_usize..600,
        ) {
            let (mut map, mut model) = (NameMap::default(), BTreeMap::new());
            let mut kept = (map.clone(), model.clone());
            for (at, (i, put, value)) in steps.into_iter().enumerate() {
                let key = name(i);
                if put {
                    *map.get_or_insert(&key, || 0) = value;
                    model.insert(key.clone(), value);
                } else {
                    map.remove(&key);
                    model.remove(&key);
                }
                prop_assert_eq!(map.get(&key), model.get(&key));
                prop_assert_eq!(map.get_mut(&key).copied(), model.get(&key).copied());
                prop_assert_eq!(map.len(), model.len());
                if at == cloned_at {
                    kept = (map.clone(), model.clone());
                }
            }
            prop_assert_eq!(content(&map), model);
            prop_assert_eq!(content(&kept.0), kept.1);
        }
    }

    #[test]
    fn names_of_one_hash_are_told_apart() {
        let entry = |name: &[u8]| Entry {
            hash: 7,
            name: name.into(),
            value: (),
        };
        let shard = [entry(b"a"), entry(b"b")];
        assert_eq!(find(&shard, 7, b"b"), Ok(1));
        assert_eq!(find(&shard, 7, b"c"), Err(0));
        assert_eq!(find(&shard, 8, b"a"), Err(2));
    }
}
