//! An etcd that has no room left (the alarm NOSPACE), and gets some.

use etcd_client::{AlarmAction, AlarmOptions, AlarmType, CompactionOptions};

use super::*;

/// It is looked at ten times a second: what is written meanwhile goes beyond it.
const QUOTA_BYTES: usize = 4 << 20;
const VALUE_BYTES: usize = 64 << 10;

/// Whether a write was refused for want of room.
fn is_refused<T>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Unavailable { reason, .. }) if reason.contains("database space exceeded"))
}

/// What an administrator does: forgets the history, gives the room back, takes the alarm off.
async fn make_room(store: &Etcd) {
    let newest = signed(store.revision());
    let clear = |client: Client| async move {
        let physical = CompactionOptions::new().with_physical();
        client.kv_client().compact(newest, Some(physical)).await?;
        let mut maintenance = client.maintenance_client();
        maintenance.defragment().await?;
        let told = maintenance
            .alarm(AlarmAction::Get, AlarmType::None, None)
            .await?;
        for alarm in told.alarms() {
            let mut of = AlarmOptions::new();
            of.with_member(alarm.member_id());
            let off = AlarmAction::Deactivate;
            maintenance.alarm(off, alarm.alarm(), Some(of)).await?;
        }
        Ok(())
    };
    store.members.ask("make room", clear).await.unwrap();
}

/// What a watch tells next, at least so many changes.
async fn told(watch: &mut Box<dyn WatchStream>, count: usize) -> Vec<(Revision, Bytes)> {
    let mut told = Vec::new();
    while told.len() < count {
        let events = watch.next().await.unwrap().into_iter();
        told.extend(events.map(|event| (event.record.revision, event.record.value.clone())));
    }
    told
}

#[tokio::test]
async fn an_etcd_that_is_full_refuses_writes_serves_reads_and_goes_on_with_room() {
    let quota = format!("--quota-backend-bytes={QUOTA_BYTES}");
    let server = Server::start_flagged(&[quota]);
    let store = server.connect().await;
    let mut watch = store.watch("/core/pods/", store.revision()).await.unwrap();
    let (mut answered, mut seen) = (Vec::new(), Vec::new());
    for round in 0..2 {
        let kept = store.put(&pod(1), value(round), Expect::Any).await.unwrap();
        answered.push((kept.revision, kept.value.clone()));
        let mut last = kept.clone();
        let refused = loop {
            let large = Bytes::from(vec![(answered.len() % 256) as u8; VALUE_BYTES]);
            match store.put(&pod(0), large, Expect::Any).await {
                Ok(record) => last = record,
                refused => break refused,
            }
            answered.push((last.revision, last.value.clone()));
            assert!(answered.len() < 2000, "it takes everything");
        };
        assert!(is_refused(&refused), "{refused:?}");
        // The one by which it became full may have happened; those after it do not.
        let newest = store.get(&pod(0)).await.unwrap().expect("it is there");
        if newest != last {
            answered.push((newest.revision, newest.value.clone()));
            last = newest;
        }
        let hour = Duration::from_secs(3600);
        let ending = store.put_for("/core/events/a/e", value(1), Expect::Any, hour);
        assert!(is_refused(&ending.await));
        let two = store.commit(
            put(&pod(2), value(2), Expect::Any),
            vec![put(&pod(3), value(3), Expect::Any)],
        );
        assert!(is_refused(&two.await));
        let found = store.get(&pod(1)).await.unwrap();
        assert_eq!(found, Some(kept.clone()));
        let page = store.list(Range::all("/core/")).await.unwrap();
        assert_eq!(
            (page.records, page.revision),
            (vec![last.clone(), kept], last.revision)
        );
        // What takes no room is done.
        let gone = store
            .delete(&pod(0), Expect::Revision(last.revision))
            .await
            .unwrap();
        answered.push((gone.revision, last.value));
        // Whoever reads later than this has more to catch up with than is kept.
        seen.extend(told(&mut watch, answered.len() - seen.len()).await);
        make_room(&store).await;
    }
    let last = store.put(&pod(1), value(9), Expect::Any).await.unwrap();
    answered.push((last.revision, last.value));
    seen.extend(told(&mut watch, answered.len() - seen.len()).await);
    assert!(seen == answered, "what was answered, once and in order");
}
