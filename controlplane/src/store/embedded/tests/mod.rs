use std::time::Duration;

use super::*;
use crate::store::contract::contract_tests;

fn fresh() -> (Embedded, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    (
        Embedded::open(&EmbeddedConfig::at(folder.path().join("state.redb")))
            .expect("the store opens"),
        folder,
    )
}

mod faults;
mod space;

contract_tests!(fresh());

fn value(i: usize) -> Bytes {
    Bytes::from(format!("value {i}"))
}

#[tokio::test]
async fn state_and_revision_survive_a_restart() {
    let (store, folder) = fresh();
    for i in 0..50 {
        store
            .put(
                &format!("/core/pods/default/{i:03}"),
                value(i),
                Expect::Absent,
            )
            .await
            .unwrap();
    }
    let deleted = store
        .delete("/core/pods/default/007", Expect::Any)
        .await
        .unwrap();
    let before = store.list(Range::all("/")).await.unwrap();
    drop(store);
    let store = Embedded::open(&EmbeddedConfig::at(folder.path().join("state.redb"))).unwrap();
    let after = store.list(Range::all("/")).await.unwrap();
    assert_eq!(before.records, after.records);
    assert_eq!(
        store.revision(),
        deleted.revision,
        "a deletion's revision is kept as well"
    );
    let past = store
        .watch("/core/pods/", Revision(deleted.revision.0 - 1))
        .await;
    assert!(
        matches!(past, Err(StoreError::Compacted { .. })),
        "history does not survive, and says so"
    );
    assert!(store.watch("/core/pods/", deleted.revision).await.is_ok());
}

#[tokio::test]
async fn lifetimes_survive_a_restart() {
    let (store, folder) = fresh();
    let lifetime = Duration::from_millis(150);
    store
        .put_for("/core/events/default/e", value(0), Expect::Absent, lifetime)
        .await
        .unwrap();
    store
        .put("/core/events/default/f", value(0), Expect::Absent)
        .await
        .unwrap();
    drop(store);
    let store = Embedded::open(&EmbeddedConfig::at(folder.path().join("state.redb"))).unwrap();
    // It may have ended before the watch began.
    let mut watch = store
        .watch("/core/events/", store.revision())
        .await
        .unwrap();
    if store.get("/core/events/default/e").await.unwrap().is_some() {
        assert_eq!(watch.next().await.unwrap()[0].change, Change::Delete);
    }
    let left = store
        .list(Range::all("/core/events/"))
        .await
        .unwrap()
        .records;
    assert_eq!(
        left.iter().map(|r| &*r.key).collect::<Vec<_>>(),
        ["/core/events/default/f"]
    );
}

#[tokio::test]
async fn a_second_process_on_the_same_file_is_refused_with_the_reason() {
    let (_store, folder) = fresh();
    let second = Embedded::open(&EmbeddedConfig::at(folder.path().join("state.redb")));
    let message = second.err().expect("it is refused").to_string();
    assert!(message.contains("another process has it open"), "{message}");
}

#[tokio::test]
async fn a_slow_watch_is_cut_off_and_a_busy_bucket_does_not_shorten_anothers_history() {
    let folder = tempfile::tempdir().unwrap();
    let config = EmbeddedConfig {
        history: Bounds {
            events_max: 4,
            ..Bounds::default()
        },
        ..EmbeddedConfig::at(folder.path().join("state.redb"))
    };
    let store = Embedded::open(&config).unwrap();
    let start = store.revision();
    let mut slow = store.watch("/core/pods/", start).await.unwrap();
    let mut quiet = store.watch("/core/nodes/", start).await.unwrap();
    store
        .put("/core/nodes/n", value(0), Expect::Any)
        .await
        .unwrap();
    for i in 0..5 {
        store
            .put("/core/pods/default/p", value(i), Expect::Any)
            .await
            .unwrap();
    }
    assert!(matches!(
        slow.next().await,
        Err(StoreError::Compacted { .. })
    ));
    assert_eq!(quiet.next().await.unwrap().len(), 1);
    let past = store
        .list(Range {
            at: Some(start),
            ..Range::all("/core/pods/")
        })
        .await;
    assert!(matches!(past, Err(StoreError::Compacted { .. })));
    let past = store
        .list(Range {
            at: Some(start),
            ..Range::all("/core/nodes/")
        })
        .await
        .unwrap();
    assert!(past.records.is_empty());
}

#[tokio::test]
async fn history_is_bounded_by_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let config = EmbeddedConfig {
        history: Bounds {
            bytes_max: 64 << 10,
            ..Bounds::default()
        },
        ..EmbeddedConfig::at(folder.path().join("state.redb"))
    };
    let store = Embedded::open(&config).unwrap();
    let start = store.revision();
    for _ in 0..20 {
        store
            .put(
                "/core/secrets/default/s",
                Bytes::from(vec![7; 16 << 10]),
                Expect::Any,
            )
            .await
            .unwrap();
    }
    assert!(matches!(
        store.watch("/core/secrets/", start).await,
        Err(StoreError::Compacted { .. })
    ));
    assert!(
        store
            .watch("/core/secrets/", Revision(store.revision().0 - 2))
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn a_watch_ends_when_the_wait_is_dropped_and_nothing_is_lost() {
    let (store, _folder) = fresh();
    let mut watch = store.watch("/core/pods/", store.revision()).await.unwrap();
    assert!(
        tokio::time::timeout(Duration::from_millis(5), watch.next())
            .await
            .is_err()
    );
    store
        .put("/core/pods/default/p", value(1), Expect::Any)
        .await
        .unwrap();
    assert_eq!(watch.next().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_format_of_later_versions_is_refused() {
    let (store, folder) = fresh();
    drop(store);
    let path = folder.path().join("state.redb");
    let database = redb::Database::create(&path).unwrap();
    let write = database.begin_write().unwrap();
    let meta = redb::TableDefinition::<&str, u64>::new("meta");
    write.open_table(meta).unwrap().insert("format", 2).unwrap();
    write.commit().unwrap();
    drop(database);
    let Err(error) = Embedded::open(&EmbeddedConfig::at(&path)) else {
        panic!("it was opened");
    };
    let said = error.to_string();
    assert!(
        said.contains("its format is 2, and this version reads 1"),
        "{said}"
    );
}
