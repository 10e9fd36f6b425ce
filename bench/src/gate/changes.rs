//! How many operations on the maps a change of the cluster is, whatever the cluster's size.

use anyhow::{Context as _, Result};
use cluster_model::{Change, Dirty, Kind, Object, ObjectRef, Snapshot, read_manifest};
use keelway_agent::dataplane::State;
use keelway_agent::plan::{Balancing, Here, Ledger, plan};
use keelway_tests::lists;
use serde_json::Value;

/// A node's plan of a cluster, kept as the agent keeps it.
struct Books {
    snapshot: Snapshot,
    ledger: Ledger,
    here: Here,
}

const ENDPOINTS: usize = 5;

/// Operations by what changed, in a cluster of so many Services.
pub fn operations(services: usize) -> Result<Vec<(&'static str, usize)>> {
    let objects = |endpoints: usize| -> Result<Vec<Object>> {
        let lists = lists::services(services, endpoints).concat();
        Ok(read_manifest(Value::from(lists).to_string().as_bytes())?)
    };
    let all = objects(ENDPOINTS)?;
    let mut books = Books {
        snapshot: Snapshot::default(),
        ledger: Ledger::adopt(State::default()),
        here: Here {
            balancing: Balancing::default(),
            node: "node-1".into(),
            zone: None,
        },
    };
    for kind in [Kind::Service, Kind::EndpointSlice] {
        let of_kind = all.iter().filter(|object| object.kind() == kind);
        books.take(Change::Replace(kind, of_kind.cloned().collect()));
    }
    // The first one that has an address of its own.
    let first = |objects: &[Object], kind| -> Result<Object> {
        let mut of_kind = objects.iter().filter(|object| object.kind() == kind);
        of_kind.next().cloned().context("the cluster has Services")
    };
    let (service, slice) = (
        first(&all, Kind::Service)?,
        first(&all, Kind::EndpointSlice)?,
    );
    let changed = first(&objects(ENDPOINTS + 1)?, Kind::EndpointSlice)?;
    let gone = |object: &Object| -> ObjectRef { object.reference() };
    Ok(vec![
        ("nothing", books.take(Change::Upsert(slice.clone()))),
        ("one more endpoint", books.take(Change::Upsert(changed))),
        ("endpoints gone", books.take(Change::Remove(gone(&slice)))),
        ("endpoints back", books.take(Change::Upsert(slice))),
        ("Service gone", books.take(Change::Remove(gone(&service)))),
        ("Service back", books.take(Change::Upsert(service))),
    ])
}

impl Books {
    /// Takes a change, and says how many operations bring the maps to it.
    fn take(&mut self, change: Change) -> usize {
        let mut dirty = Dirty::default();
        self.snapshot.apply(change, &mut dirty);
        for key in dirty.services {
            self.ledger
                .set(&key, plan(&self.snapshot, &key, &self.here));
        }
        let batch = self.ledger.diff();
        self.ledger.applied(&batch);
        batch.ops.len()
    }
}
