use std::io;
use std::sync::{Arc, Mutex};
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

/// A disk that loses power: what was written but not synced is gone.
#[derive(Clone, Debug, Default)]
struct PowerCut {
    written: Arc<Mutex<Vec<u8>>>,
    synced: Arc<Mutex<Vec<u8>>>,
    fail: Arc<std::sync::atomic::AtomicBool>,
}

impl PowerCut {
    fn of(image: Vec<u8>) -> Self {
        Self {
            written: Arc::new(Mutex::new(image.clone())),
            synced: Arc::new(Mutex::new(image)),
            ..Self::default()
        }
    }

    fn after_the_cut(&self) -> Self {
        Self::of(self.synced.lock().unwrap().clone())
    }
}

impl redb::StorageBackend for PowerCut {
    fn len(&self) -> io::Result<u64> {
        Ok(self.written.lock().unwrap().len() as u64)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let start = offset as usize;
        out.copy_from_slice(&self.written.lock().unwrap()[start..start + out.len()]);
        Ok(())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.written.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        if self.fail.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(io::Error::other("no space left on device"));
        }
        *self.synced.lock().unwrap() = self.written.lock().unwrap().clone();
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let start = offset as usize;
        self.written.lock().unwrap()[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }
}

fn on(disk: PowerCut) -> Embedded {
    Embedded::start(
        Disk::with_backend(disk).unwrap(),
        &EmbeddedConfig::at("unused"),
    )
    .unwrap()
}

#[tokio::test]
async fn an_answered_write_survives_a_power_cut_at_any_moment_after_the_answer() {
    let disk = PowerCut::default();
    let store = on(disk.clone());
    for i in 0..20 {
        let written = store
            .put(&format!("/core/pods/default/{i}"), value(i), Expect::Absent)
            .await
            .unwrap();
        let survivor = on(disk.after_the_cut());
        assert_eq!(
            survivor.get(&written.key).await.unwrap(),
            Some(written.clone())
        );
        assert_eq!(survivor.revision(), written.revision);
    }
}

#[tokio::test]
async fn a_write_that_the_disk_refuses_is_refused_and_not_seen() {
    let disk = PowerCut::default();
    let store = on(disk.clone());
    let before = store
        .put("/core/pods/default/a", value(0), Expect::Any)
        .await
        .unwrap();
    disk.fail.store(true, std::sync::atomic::Ordering::SeqCst);
    let refused = store
        .put("/core/pods/default/a", value(1), Expect::Any)
        .await;
    assert!(
        matches!(&refused, Err(StoreError::Disk { reason, .. }) if reason.contains("no space")),
        "{refused:?}"
    );
    assert_eq!(
        store.get("/core/pods/default/a").await.unwrap(),
        Some(before.clone())
    );
    assert_eq!(store.revision(), before.revision);
}

#[tokio::test]
async fn queued_writes_share_a_commit() {
    let disk = PowerCut::default();
    let store = Arc::new(on(disk.clone()));
    let writes = (0..500).map(|i| {
        let store = store.clone();
        async move {
            store
                .put(&format!("/core/pods/default/{i}"), value(i), Expect::Absent)
                .await
                .map(|r| r.revision)
        }
    });
    let revisions = futures::future::join_all(writes).await;
    let mut revisions: Vec<_> = revisions.into_iter().map(|r| r.unwrap().0).collect();
    revisions.sort_unstable();
    let first = revisions[0];
    assert!(
        revisions
            .iter()
            .enumerate()
            .all(|(i, r)| *r == first + i as u64),
        "one revision each, no gaps"
    );
    assert_eq!(
        on(disk.after_the_cut())
            .list(Range::all("/"))
            .await
            .unwrap()
            .records
            .len(),
        500
    );
}

/// A store that was closed well: its folder, its file's bytes, and what was in it.
async fn closed() -> (tempfile::TempDir, Vec<u8>, Vec<Record>, Revision) {
    let (store, folder) = fresh();
    for i in 0..400 {
        let key = format!("/core/pods/default/{:03}", i % 300);
        let filled = Bytes::from(format!("{i} {}", "x".repeat(200 + i)));
        store.put(&key, filled, Expect::Any).await.unwrap();
    }
    let all = store.list(Range::all("/")).await.unwrap();
    let revision = store.revision();
    drop(store);
    let bytes = std::fs::read(folder.path().join("state.redb")).unwrap();
    (folder, bytes, all.records, revision)
}

#[tokio::test]
async fn a_byte_that_flips_in_a_closed_file_is_found_or_was_of_no_use() {
    let (folder, good, records, revision) = closed().await;
    let path = folder.path().join("flipped.redb");
    let (mut refused, mut harmless) = (0, 0);
    // A prime step: all places in pages come up.
    for at in (0..good.len()).step_by(good.len() / 250 * 2 + 1) {
        let mut flipped = good.clone();
        flipped[at] ^= 0x10;
        std::fs::write(&path, &flipped).unwrap();
        match Embedded::open(&EmbeddedConfig::at(&path)) {
            Ok(store) => {
                let all = store.list(Range::all("/")).await.unwrap();
                assert_eq!(all.records, records, "byte {at}");
                assert_eq!(store.revision(), revision, "byte {at}");
                harmless += 1;
            }
            Err(error) => {
                let kept = std::fs::read(&path).unwrap();
                assert!(kept == flipped, "byte {at}: the file was changed: {error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 5, "{refused} found, {harmless} of no use");
    // A value's own bytes, in every copy that commits have left of it: one of them is in use.
    let value = &records[7].value;
    let copies = good.windows(value.len()).enumerate();
    let copies = copies.filter(|(_, window)| *window == &value[..]);
    let mut flipped = good.clone();
    for (at, _) in copies {
        flipped[at + 20] ^= 1;
    }
    assert!(flipped != good, "it is there");
    std::fs::write(&path, &flipped).unwrap();
    let Err(error) = Embedded::open(&EmbeddedConfig::at(&path)) else {
        panic!("a value of other bytes is served");
    };
    assert!(error.to_string().contains("it is damaged"), "{error}");
}

#[tokio::test]
async fn a_file_that_was_cut_off_is_refused_and_left_as_it_is() {
    let (folder, good, _, _) = closed().await;
    let path = folder.path().join("short.redb");
    for part in [2, 3, 10] {
        std::fs::write(&path, &good[..good.len() / part]).unwrap();
        assert!(Embedded::open(&EmbeddedConfig::at(&path)).is_err());
        assert_eq!(std::fs::read(&path).unwrap().len(), good.len() / part);
    }
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
