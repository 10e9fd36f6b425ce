//! One data plane for many cases, each of which finds it as if no packet had passed: loading the programs costs more than all that they
//! are asked, and very much more on a machine that is emulated.

use std::{collections::BTreeMap, path::PathBuf};

use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData},
};
use dataplane_abi::{ABI_VERSION, Reason, map};
use keelway_agent::dataplane::{Dataplane, ServiceBackends};
use keelway_tests::sandbox::Sandbox;

use crate::{family::Family, opened, state};

/// A flow's key and its entry, in words.
pub type Tuple = [u64; 5];
pub type Entry = [u32; 16];

pub struct Fresh {
    sandbox: Sandbox,
    pub dataplane: Dataplane,
    counted: BTreeMap<Reason, u64>,
}

impl Fresh {
    pub fn open() -> Self {
        let sandbox = Sandbox::enter().unwrap();
        let dataplane = opened(&sandbox, false);
        Self {
            sandbox,
            dataplane,
            counted: BTreeMap::new(),
        }
    }

    /// Forgets all traffic, and leads the Services of a family to these backends.
    pub fn begin(&mut self, family: Family, backends: &ServiceBackends) {
        for flows in [
            Map::HashMap(self.pinned(map::FLOWS)),
            Map::LruHashMap(self.pinned(map::FLOWS_UNREPLIED)),
        ] {
            empty::<Tuple, Entry>(flows);
        }
        empty::<[u32; 6], [u32; 8]>(Map::LruHashMap(self.pinned(map::AFFINITY)));
        empty::<Tuple, u32>(Map::LruHashMap(self.pinned(map::FRAGMENTS)));
        self.forget_traces();
        self.dataplane.apply(&state(family, backends)).unwrap();
        self.counted = self.dataplane.counters().unwrap().into_iter().collect();
    }

    /// What was counted since then.
    pub fn counters(&self) -> BTreeMap<Reason, u64> {
        let counters = self.dataplane.counters().unwrap().into_iter();
        counters
            .map(|(reason, count)| (reason, count - self.counted[&reason]))
            .collect()
    }

    /// Takes away the traces of datagrams, as if they were old.
    pub fn forget_traces(&self) {
        let traces = Map::Array(self.pinned(map::TRACES));
        let mut traces: Array<_, [u64; 2]> = traces.try_into().unwrap();
        let left: Vec<u32> = (0..traces.len())
            .filter(|at| traces.get(at, 0).unwrap() != [0, 0])
            .collect();
        for at in left {
            traces.set(at, [0, 0], 0).unwrap();
        }
    }

    /// The table of flows that were answered.
    pub fn flows(&self) -> HashMap<MapData, Tuple, Entry> {
        let flows = Map::HashMap(self.pinned(map::FLOWS));
        flows.try_into().unwrap()
    }

    /// The table of flows that nobody has answered.
    pub fn unreplied(&self) -> HashMap<MapData, Tuple, Entry> {
        let flows = Map::LruHashMap(self.pinned(map::FLOWS_UNREPLIED));
        flows.try_into().unwrap()
    }

    /// Where frontends lead, as it lies in the map: keys and what is under each, in words.
    pub fn frontends(&self) -> HashMap<MapData, [u32; 6], [u32; 4]> {
        let frontends = Map::HashMap(self.pinned(map::FRONTENDS));
        frontends.try_into().unwrap()
    }

    pub fn pin_root(&self) -> PathBuf {
        self.sandbox.pin_root()
    }

    fn pinned(&self, name: &str) -> MapData {
        let dir = self.pin_root().join(format!("v{ABI_VERSION}"));
        MapData::from_pin(dir.join(name)).unwrap()
    }
}

fn empty<K: Pod, V: Pod>(map: Map) {
    let mut map: HashMap<MapData, K, V> = map.try_into().unwrap();
    let keys: Vec<K> = map.keys().map(Result::unwrap).collect();
    for key in keys {
        map.remove(&key).unwrap();
    }
}
