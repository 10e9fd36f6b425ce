//! A state moves from one kind of store to the other and back.

use super::*;
use crate::store::snapshot::Snapshot;
use crate::store::snapshot::tests::snapshot;
use crate::store::{Embedded, EmbeddedConfig};

fn contents(snapshot: &Snapshot) -> Vec<(String, Bytes)> {
    let records = snapshot.records.iter();
    records
        .map(|r| (r.key.to_string(), r.value.clone()))
        .collect()
}

#[tokio::test]
async fn a_state_moves_to_etcd_and_back() {
    let server = Server::start();
    let config = server.config();
    let mut original = snapshot(300);
    original.revision = Revision(2000);
    original.records.push(Record {
        key: "/core/events/default/e".into(),
        value: value(1),
        revision: Revision(9),
        created: Revision(9),
    });
    original.records.sort_by(|a, b| a.key.cmp(&b.key));
    Etcd::import(&config, &original).await.expect("imported");
    let refused = Etcd::import(&config, &original).await.expect_err("twice");
    assert!(
        refused.to_string().contains("there is a state already"),
        "{refused}"
    );
    let store = Etcd::connect(&config).await.expect("connected");
    assert!(store.revision() >= original.revision);
    let moved = Snapshot::of(&store).await.expect("read");
    assert_eq!(contents(&moved), contents(&original));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.redb");
    Embedded::import(&path, &moved).expect("imported");
    let refused = Embedded::import(&path, &moved).expect_err("twice");
    assert!(
        refused.to_string().contains("there is a state already"),
        "{refused}"
    );
    let embedded = Embedded::open(&EmbeddedConfig::at(&path)).expect("opened");
    let back = Snapshot::of(&embedded).await.expect("read");
    assert_eq!(back, moved, "with its revisions");
    let next = embedded.put(&pod(1), value(1), Expect::Any).await.unwrap();
    assert_eq!(next.revision.0, moved.revision.0 + 1);
}

#[tokio::test]
async fn an_import_that_was_cut_off_is_used_by_nobody_and_done_again() {
    let server = Server::start();
    let config = server.config();
    let store = Etcd::connect(&config).await.expect("connected");
    for (key, left) in [("/keelway/importing", 0), ("/core/pods/default/left", 1)] {
        store.put(key, value(left), Expect::Any).await.unwrap();
    }
    let refused = Etcd::connect(&config).await.err().expect("refused");
    assert!(
        refused.to_string().contains("was not finished"),
        "{refused}"
    );
    let original = snapshot(10);
    Etcd::import(&config, &original).await.expect("done again");
    let store = Etcd::connect(&config).await.expect("whole by now");
    let moved = Snapshot::of(&store).await.expect("read");
    assert_eq!(contents(&moved), contents(&original));
}
