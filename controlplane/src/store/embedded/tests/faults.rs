//! What goes wrong with disks: power that is lost, room that runs out, bytes that flip.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// Where, and what.
type Writes = Vec<(u64, Vec<u8>)>;

/// A disk that loses power: what was written but not synced is gone. And one that is full, or refuses to sync.
#[derive(Clone, Debug, Default)]
struct PowerCut {
    written: Arc<Mutex<Vec<u8>>>,
    synced: Arc<Mutex<Vec<u8>>>,
    /// What was written since the last sync, in order.
    unsynced: Arc<Mutex<Writes>>,
    /// Syncs fail, though what was written may be there.
    fail: Arc<AtomicBool>,
    /// The file cannot grow.
    full: Arc<AtomicBool>,
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
        let grows = len > self.len()?;
        if grows && self.full.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.written.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        if self.fail.load(Ordering::SeqCst) {
            return Err(io::Error::other("no space left on device"));
        }
        self.unsynced.lock().unwrap().clear();
        *self.synced.lock().unwrap() = self.written.lock().unwrap().clone();
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let start = offset as usize;
        self.written.lock().unwrap()[start..start + data.len()].copy_from_slice(data);
        self.unsynced.lock().unwrap().push((offset, data.to_vec()));
        Ok(())
    }
}

fn on(disk: PowerCut) -> Embedded {
    let opened = Disk::with_backend(disk.clone()).unwrap();
    let reopen = Box::new(move || Disk::with_backend(disk.clone()));
    Embedded::start(opened, reopen, &EmbeddedConfig::at("unused")).unwrap()
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
    disk.fail.store(true, Ordering::SeqCst);
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

/// Writes until the disk refuses, and gives what was answered.
async fn fill(store: &Embedded, name: &str, mut filling: impl FnMut(usize)) -> Vec<Record> {
    let mut answered = Vec::new();
    for i in 0..10_000 {
        filling(i);
        let key = format!("/core/pods/{name}/{i}");
        let filled = Bytes::from(vec![b'x'; 4 << 10]);
        match store.put(&key, filled, Expect::Absent).await {
            Ok(record) => answered.push(record),
            Err(StoreError::Disk { .. }) => return answered,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the disk takes everything");
}

async fn holds(store: &Embedded, records: &[Record]) {
    let all = store.list(Range::all("/core/pods/")).await.unwrap();
    let mut wanted = records.to_vec();
    wanted.sort_by(|one, other| one.key.cmp(&other.key));
    assert!(
        all.records == wanted,
        "{} of {}",
        all.records.len(),
        wanted.len()
    );
}

/// A write when the disk has room again: the first one may still be told of the last attempt.
async fn put_again(store: &Embedded, key: &str) -> Record {
    let until = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        match store.put(key, value(1), Expect::Absent).await {
            Ok(record) => return record,
            Err(StoreError::Disk { .. }) if std::time::Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn a_disk_that_was_full_takes_writes_again_and_has_lost_nothing() {
    let disk = PowerCut::default();
    let store = on(disk.clone());
    let full = disk.full.clone();
    let mut answered = fill(&store, "first", |i| full.store(i > 40, Ordering::SeqCst)).await;
    let revision = store.revision();
    // While it is full all writes are refused, and what is there is read.
    for _ in 0..3 {
        let refused = store
            .put("/core/nodes/n", Bytes::from(vec![0; 1 << 20]), Expect::Any)
            .await;
        assert!(
            matches!(refused, Err(StoreError::Disk { .. })),
            "{refused:?}"
        );
    }
    holds(&store, &answered).await;
    assert_eq!(store.revision(), revision);
    full.store(false, Ordering::SeqCst);
    let again = put_again(&store, "/core/pods/second/again").await;
    assert_eq!(again.revision, Revision(revision.0 + 1));
    answered.push(again);
    holds(&store, &answered).await;
    // What is on disk is what is in memory.
    holds(&on(disk.after_the_cut()), &answered).await;
}

#[tokio::test]
async fn a_refused_write_that_reached_the_disk_all_the_same_is_taken_back() {
    let disk = PowerCut::default();
    let store = on(disk.clone());
    let (kept, gone) = ("/core/pods/default/kept", "/core/pods/default/gone");
    let before = store.put(kept, value(0), Expect::Any).await.unwrap();
    let lifetime = Duration::from_secs(3600);
    let event = store.put_for("/core/events/default/e", value(0), Expect::Any, lifetime);
    let event = event.await.unwrap();
    disk.fail.store(true, Ordering::SeqCst);
    let writes = [
        store.put(kept, value(1), Expect::Any),
        store.put(gone, value(1), Expect::Any),
        store.put("/core/events/default/e", value(1), Expect::Any),
    ];
    for refused in futures::future::join_all(writes).await {
        assert!(
            matches!(refused, Err(StoreError::Disk { .. })),
            "{refused:?}"
        );
    }
    // All of it is there, and only the sync was not said to be done.
    disk.fail.store(false, Ordering::SeqCst);
    let after = put_again(&store, "/core/pods/default/after").await;
    assert_eq!(after.revision, Revision(event.revision.0 + 1));
    for store in [&store, &on(disk.after_the_cut())] {
        assert_eq!(store.get(kept).await.unwrap().as_ref(), Some(&before));
        assert_eq!(store.get(gone).await.unwrap(), None);
        assert_eq!(store.get(&event.key).await.unwrap().as_ref(), Some(&event));
        assert_eq!(store.revision(), after.revision);
    }
    // It ends still when it was to end.
    let loaded = Disk::with_backend(disk.after_the_cut())
        .unwrap()
        .load()
        .unwrap();
    assert_eq!(loaded.expiries.len(), 1);
}

#[tokio::test]
async fn a_file_that_another_process_has_written_to_meanwhile_is_not_gone_on_with() {
    let disk = PowerCut::default();
    let store = on(disk.clone());
    let first = store
        .put("/core/nodes/n", value(0), Expect::Any)
        .await
        .unwrap();
    let theirs = PowerCut::of(disk.synced.lock().unwrap().clone());
    for i in 0..3 {
        let other = on(theirs.clone());
        other
            .put("/core/nodes/n", value(i), Expect::Any)
            .await
            .unwrap();
    }
    disk.fail.store(true, Ordering::SeqCst);
    store
        .put("/core/nodes/n", value(9), Expect::Any)
        .await
        .unwrap_err();
    disk.fail.store(false, Ordering::SeqCst);
    *disk.written.lock().unwrap() = theirs.synced.lock().unwrap().clone();
    let refused = store
        .put("/core/nodes/n", value(9), Expect::Any)
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("another process"), "{refused}");
    assert_eq!(store.revision(), first.revision);
}

#[tokio::test]
async fn a_commit_that_power_was_lost_in_takes_nothing_with_it() {
    let disk = PowerCut::default();
    let store = on(disk.clone());
    let mut answered = Vec::new();
    for i in 0..30 {
        let key = format!("/core/pods/default/{i}");
        answered.push(store.put(&key, value(i), Expect::Absent).await.unwrap());
    }
    disk.fail.store(true, Ordering::SeqCst);
    let torn = store.put("/core/pods/default/torn", value(99), Expect::Absent);
    torn.await.unwrap_err();
    let synced = disk.synced.lock().unwrap().clone();
    let unsynced = disk.unsynced.lock().unwrap().clone();
    assert!(unsynced.len() > 1, "a commit is several writes");
    let backwards: Writes = unsynced.iter().rev().cloned().collect();
    // All that reached the disk before the cut, in whichever order: some writes, and a part of one more.
    let orders =
        [&unsynced, &backwards].map(|order| order.iter().enumerate().map(move |at| (order, at)));
    for (unsynced, (count, next)) in orders.into_iter().flatten() {
        for part in [0, 1, next.1.len() / 2] {
            let mut image = synced.clone();
            let torn = [(next.0, next.1[..part].to_vec())];
            for (offset, data) in unsynced[..count].iter().chain(&torn) {
                let (start, end) = (*offset as usize, *offset as usize + data.len());
                image.resize(image.len().max(end), 0);
                image[start..end].copy_from_slice(data);
            }
            let survivor = on(PowerCut::of(image));
            for record in &answered {
                let found = survivor.get(&record.key).await.unwrap();
                let what = format!("{count} writes and {part} bytes");
                assert_eq!(found.as_ref(), Some(record), "{what}");
            }
        }
    }
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
async fn a_clock_that_jumps_takes_nothing_that_was_to_stay() {
    const HOUR: Duration = Duration::from_secs(3600);
    let folder = tempfile::tempdir().unwrap();
    let began = std::time::SystemTime::now();
    let time = Arc::new(Mutex::new(began));
    let clock = time.clone();
    let config = EmbeddedConfig {
        clock: Clock::of(move || *clock.lock().unwrap()),
        ..EmbeddedConfig::at(folder.path().join("state.redb"))
    };
    let store = Embedded::open(&config).unwrap();
    let mut watch = store.watch("/core/", store.revision()).await.unwrap();
    let mut revision = store.revision();
    let mut write = async |key: &str, lifetime: Option<Duration>| {
        let written = match lifetime {
            Some(lifetime) => store.put_for(key, value(0), Expect::Any, lifetime).await,
            None => store.put(key, value(0), Expect::Any).await,
        };
        let written = written.unwrap().revision;
        assert!(
            written > revision,
            "revisions go on whatever the clock says"
        );
        revision = written;
    };
    write("/core/pods/a/stays", None).await;
    write("/core/events/a/early", Some(HOUR)).await;
    // A day back: what is written now ends an hour later by the clock that there is then.
    *time.lock().unwrap() = began - 24 * HOUR;
    write("/core/events/a/late", Some(HOUR)).await;
    assert_eq!(
        store
            .list(Range::all("/core/"))
            .await
            .unwrap()
            .records
            .len(),
        3
    );
    *time.lock().unwrap() = began + 2 * HOUR;
    // Whatever is written next makes the writer look.
    write("/core/pods/a/after", None).await;
    let mut gone = Vec::new();
    while gone.len() < 2 {
        let events = watch.next().await.unwrap();
        let deleted = events
            .into_iter()
            .filter(|event| event.change == Change::Delete);
        gone.extend(deleted.map(|event| event.record.key.to_string()));
    }
    gone.sort();
    assert_eq!(gone, ["/core/events/a/early", "/core/events/a/late"]);
    let left = |store: &Embedded| {
        let keys = store.replica.newest().0;
        keys.keys().map(|key| key.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(left(&store), ["/core/pods/a/after", "/core/pods/a/stays"]);
    let revision = store.revision();
    drop(store);
    *time.lock().unwrap() = began - 1000 * HOUR;
    let store = Embedded::open(&config).unwrap();
    assert_eq!(left(&store), ["/core/pods/a/after", "/core/pods/a/stays"]);
    assert_eq!(store.revision(), revision);
}
