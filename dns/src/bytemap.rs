//! A map of bytes by bytes of which a clone shares everything, and that is little more than what it holds: a zone's names and records are a
//! few bytes each, and keys, values and their pieces in memory of their own were four times as much.

use std::hash::BuildHasher;
use std::sync::Arc;

use foldhash::fast::RandomState;

/// Groups, and shards of each: what a change copies is one pointer for each group, and the entries of one group.
const GROUPS: usize = 64;
const SHARDS: usize = 64;

type Group = [Shard; SHARDS];

/// Entries in the order of their hashes, one behind the other.
#[derive(Clone, Default)]
struct Shard {
    index: Box<[Entry]>,
    bytes: Box<[u8]>,
}

/// Where an entry begins: with its key, behind which its value is.
#[derive(Clone, Copy)]
struct Entry {
    hash: u32,
    start: u32,
    key_bytes: u32,
}

/// Values by key, such as a name in wire format.
#[derive(Clone)]
pub struct ByteMap {
    hasher: RandomState,
    groups: Arc<[Arc<Group>; GROUPS]>,
    len: usize,
}

impl Default for ByteMap {
    fn default() -> Self {
        let empty = Arc::new(std::array::from_fn(|_| Shard::default()));
        Self {
            hasher: RandomState::default(),
            groups: Arc::new(std::array::from_fn(|_| Arc::clone(&empty))),
            len: 0,
        }
    }
}

/// Where a key is kept. Few keys share one, if any do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(u64);

impl Slot {
    pub const BYTES: usize = size_of::<u64>();

    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        self.0.to_le_bytes()
    }

    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(u64::from_le_bytes(bytes))
    }

    fn group(self) -> usize {
        self.0 as usize % GROUPS
    }

    fn shard(self) -> usize {
        (self.0 >> 16) as usize % SHARDS
    }

    /// What its shard is sorted by.
    fn hash(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl ByteMap {
    pub fn slot(&self, key: &[u8]) -> Slot {
        Slot(self.hasher.hash_one(key))
    }

    pub fn len(&self) -> usize {
        self.len
    }

    fn shard_of(&self, slot: Slot) -> &Shard {
        &self.groups[slot.group()][slot.shard()]
    }

    fn shard_mut(&mut self, slot: Slot) -> &mut Shard {
        let groups = Arc::make_mut(&mut self.groups);
        &mut Arc::make_mut(&mut groups[slot.group()])[slot.shard()]
    }

    pub fn get(&self, key: &[u8]) -> Option<&[u8]> {
        let slot = self.slot(key);
        let shard = self.shard_of(slot);
        let at = shard.find(slot.hash(), key).ok()?;
        Some(shard.entry(at).1)
    }

    /// Everything that is kept in one place, with its key.
    pub fn at(&self, slot: Slot) -> impl Iterator<Item = (&[u8], &[u8])> {
        let shard = self.shard_of(slot);
        let first = shard.first(slot.hash());
        let same = shard.index[first..]
            .iter()
            .take_while(move |entry| entry.hash == slot.hash());
        let count = same.count();
        (first..first + count).map(|at| shard.entry(at))
    }

    /// All entries, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let shards = self.groups.iter().flat_map(|group| group.iter());
        shards.flat_map(|shard| (0..shard.index.len()).map(|at| shard.entry(at)))
    }

    /// The value of a key, to be changed where it stands; `None` where there is none.
    pub fn get_mut(&mut self, key: &[u8]) -> Option<&mut [u8]> {
        // A key that is not there is no reason to copy anything.
        self.get(key)?;
        let slot = self.slot(key);
        let shard = self.shard_mut(slot);
        let at = shard.find(slot.hash(), key).ok()?;
        let value = shard.value(at);
        shard.bytes.get_mut(value)
    }

    /// Puts a value in the place of what is there.
    pub fn insert(&mut self, key: &[u8], value: &[u8]) {
        let slot = self.slot(key);
        let shard = self.shard_mut(slot);
        let (at, replaces) = match shard.find(slot.hash(), key) {
            Ok(at) => (at, 1),
            Err(at) => (at, 0),
        };
        shard.put(at, replaces, Some((slot.hash(), key, value)));
        self.len += 1 - replaces;
    }

    pub fn remove(&mut self, key: &[u8]) {
        if self.get(key).is_none() {
            return;
        }
        let slot = self.slot(key);
        let shard = self.shard_mut(slot);
        if let Ok(at) = shard.find(slot.hash(), key) {
            shard.put(at, 1, None);
            self.len -= 1;
        }
    }
}

impl Shard {
    /// Where the entry at `at` begins, and the one before it ends.
    fn start(&self, at: usize) -> usize {
        let entry = self.index.get(at);
        entry.map_or(self.bytes.len(), |entry| entry.start as usize)
    }

    fn value(&self, at: usize) -> std::ops::Range<usize> {
        self.start(at) + self.index[at].key_bytes as usize..self.start(at + 1)
    }

    fn entry(&self, at: usize) -> (&[u8], &[u8]) {
        let value = self.value(at);
        (&self.bytes[self.start(at)..value.start], &self.bytes[value])
    }

    /// The first entry of a hash, or where it belongs. Hashes are spread evenly, so that one says where about it is: a search by halves
    /// would wait for memory at every step, which was a tenth of an answer.
    fn first(&self, hash: u32) -> usize {
        let index = &self.index;
        let mut first = ((u64::from(hash) * index.len() as u64) >> 32) as usize;
        while first > 0 && index[first - 1].hash >= hash {
            first -= 1;
        }
        while first < index.len() && index[first].hash < hash {
            first += 1;
        }
        first
    }

    /// The place of a key, or where it belongs.
    fn find(&self, hash: u32, key: &[u8]) -> Result<usize, usize> {
        let first = self.first(hash);
        let same = self.index[first..]
            .iter()
            .take_while(|entry| entry.hash == hash);
        let found = same.enumerate().find(|(_, entry)| {
            let start = entry.start as usize;
            self.bytes[start..].get(..entry.key_bytes as usize) == Some(key)
        });
        found.map(|(at, _)| first + at).ok_or(first)
    }

    /// Writes the shard anew, with another entry, or none, in the place of the next `replaces` at `at`. There is no room for more in it: in
    /// many small shards that would be as much again.
    fn put(&mut self, at: usize, replaces: usize, new: Option<(u32, &[u8], &[u8])>) {
        let (from, to) = (self.start(at), self.start(at + replaces));
        let (_, key, value) = new.unwrap_or_default();
        let bytes = [&self.bytes[..from], key, value, &self.bytes[to..]].concat();
        let entry = new.map(|(hash, ..)| Entry {
            hash,
            start: from as u32,
            key_bytes: key.len() as u32,
        });
        let behind = self.index[at + replaces..].iter().map(|entry| Entry {
            start: (entry.start as usize - to + from + key.len() + value.len()) as u32,
            ..*entry
        });
        let before = self.index[..at].iter().copied();
        let mut index = Vec::with_capacity(self.index.len() + 1 - replaces);
        index.extend(before.chain(entry).chain(behind));
        self.index = index.into();
        self.bytes = bytes.into();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn content(map: &ByteMap) -> BTreeMap<Vec<u8>, Vec<u8>> {
        map.iter()
            .map(|(key, value)| (key.to_vec(), value.to_vec()))
            .collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Vec<u8>),
        Change,
        Remove,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => proptest::collection::vec(any::<u8>(), 0..9).prop_map(Step::Insert),
            1 => Just(Step::Change),
            2 => Just(Step::Remove),
        ]
    }

    proptest! {
        #[test]
        fn it_is_a_map_and_a_clone_stays_as_it_was(
            steps in proptest::collection::vec((0_u16..300, step()), 0..600),
            cloned_at in 0_usize..600,
        ) {
            let (mut map, mut model) = (ByteMap::default(), BTreeMap::new());
            let mut kept = (map.clone(), model.clone());
            for (at, (i, step)) in steps.into_iter().enumerate() {
                // Keys of all lengths, none of them included.
                let key = vec![(i % 251) as u8; usize::from(i / 50)];
                match step {
                    Step::Insert(value) => {
                        map.insert(&key, &value);
                        model.insert(key.clone(), value);
                    }
                    Step::Change => {
                        for value in [map.get_mut(&key), model.get_mut(&key).map(Vec::as_mut_slice)] {
                            value.into_iter().flatten().for_each(|byte| *byte = byte.wrapping_add(1));
                        }
                    }
                    Step::Remove => {
                        map.remove(&key);
                        model.remove(&key);
                    }
                }
                prop_assert_eq!(map.get(&key), model.get(&key).map(Vec::as_slice));
                prop_assert_eq!(map.len(), model.len());
                let there = map.at(map.slot(&key)).find(|(other, _)| *other == key);
                prop_assert_eq!(there.map(|(_, value)| value), map.get(&key));
                if at == cloned_at {
                    kept = (map.clone(), model.clone());
                }
            }
            prop_assert_eq!(content(&map), model);
            prop_assert_eq!(content(&kept.0), kept.1);
        }
    }

    #[test]
    fn keys_of_one_hash_are_told_apart() {
        let mut shard = Shard::default();
        shard.put(0, 0, Some((7, b"a", b"1")));
        shard.put(1, 0, Some((7, b"b", b"2")));
        shard.put(2, 0, Some((9, b"a", b"3")));
        assert_eq!(shard.find(7, b"b"), Ok(1));
        assert_eq!(shard.entry(1), (&b"b"[..], &b"2"[..]));
        assert_eq!(shard.find(7, b"c"), Err(0));
        assert_eq!(shard.find(8, b"a"), Err(2));
        shard.put(1, 1, None);
        assert_eq!(shard.find(7, b"b"), Err(0));
        assert_eq!(shard.find(9, b"a"), Ok(1));
    }
}
