//! What every implementation of `Store` must do. Each function is one behaviour; `contract_tests!` runs them all.

use std::time::Duration;

use bytes::Bytes;

use super::*;

mod compaction;
mod shares;

pub use compaction::what_is_compacted_is_refused_and_what_is_left_is_whole;
pub use shares::a_watch_of_a_share_is_told_all_of_it_and_progresses_with_the_rest;

const PREFIX: &str = "/core/configmaps/";

fn key(name: &str) -> String {
    format!("{PREFIX}default/{name}")
}

async fn put(store: &impl Store, name: &str, value: &str) -> Record {
    store
        .put(
            &key(name),
            Bytes::copy_from_slice(value.as_bytes()),
            Expect::Any,
        )
        .await
        .expect("an unconditional put succeeds")
}

async fn names(store: &impl Store, at: Option<Revision>) -> Vec<(String, String)> {
    let page = store
        .list(Range {
            at,
            ..Range::all(PREFIX)
        })
        .await
        .expect("the list is served");
    page.records
        .iter()
        .map(|r| {
            (
                r.key[PREFIX.len() + 8..].to_owned(),
                String::from_utf8_lossy(&r.value).into_owned(),
            )
        })
        .collect()
}

async fn next(watch: &mut Box<dyn WatchStream>) -> Vec<Arc<WatchEvent>> {
    tokio::time::timeout(Duration::from_secs(10), watch.next())
        .await
        .expect("events arrive")
        .expect("the watch lives")
}

pub async fn every_write_gets_the_next_revision_and_keeps_the_creation(store: impl Store) {
    let before = store.revision();
    let created = put(&store, "a", "1").await;
    assert_eq!(created.revision, Revision(before.0 + 1));
    assert_eq!(created.created, created.revision);
    let updated = put(&store, "a", "2").await;
    assert_eq!(updated.revision, Revision(before.0 + 2));
    assert_eq!(updated.created, created.revision);
    assert_eq!(store.get(&key("a")).await.unwrap(), Some(updated.clone()));
    assert_eq!(store.revision(), updated.revision);
    assert_eq!(store.get(&key("b")).await.unwrap(), None);
}

pub async fn conditions_decide_writes(store: impl Store) {
    let value = || Bytes::from_static(b"x");
    let first = store.put(&key("a"), value(), Expect::Absent).await.unwrap();
    let again = store.put(&key("a"), value(), Expect::Absent).await;
    assert!(matches!(again, Err(StoreError::Exists { current, .. }) if *current == first));
    let second = store
        .put(&key("a"), value(), Expect::Revision(first.revision))
        .await
        .unwrap();
    let stale = store
        .put(&key("a"), value(), Expect::Revision(first.revision))
        .await;
    assert!(matches!(stale, Err(StoreError::Conflict { current, .. }) if *current == second));
    let stale = store
        .delete(&key("a"), Expect::Revision(first.revision))
        .await;
    assert!(matches!(stale, Err(StoreError::Conflict { .. })));
    let missing = store
        .put(&key("b"), value(), Expect::Revision(first.revision))
        .await;
    assert!(matches!(missing, Err(StoreError::NotFound { .. })));
    assert!(matches!(
        store.delete(&key("b"), Expect::Any).await,
        Err(StoreError::NotFound { .. })
    ));
    assert_eq!(
        store.revision(),
        second.revision,
        "refused writes take no revision"
    );
    let deleted = store
        .delete(&key("a"), Expect::Revision(second.revision))
        .await
        .unwrap();
    assert_eq!(
        (deleted.revision, &deleted.value),
        (Revision(second.revision.0 + 1), &second.value)
    );
    assert_eq!(store.get(&key("a")).await.unwrap(), None);
    let reborn = store.put(&key("a"), value(), Expect::Absent).await.unwrap();
    assert_eq!(reborn.created, reborn.revision);
}

pub async fn a_transaction_does_all_or_nothing_at_one_revision(store: impl Store) {
    let write = |name: &str, value: Option<&str>, expect: Expect| Write {
        key: key(name),
        value: value.map(|value| Bytes::copy_from_slice(value.as_bytes())),
        expect,
    };
    let start = store.revision();
    let mut watch = store.watch(PREFIX, start).await.unwrap();
    let first = store
        .commit(
            write("a", Some("1"), Expect::Absent),
            vec![
                write("b", Some("1"), Expect::Absent),
                // Whatever is there, and nothing is.
                write("none", None, Expect::Any),
            ],
        )
        .await
        .unwrap();
    assert_eq!(first.revision, Revision(start.0 + 1));
    let b = store.get(&key("b")).await.unwrap().expect("b is there");
    assert_eq!((b.revision, b.created), (first.revision, first.revision));
    // Each of these fails by one condition, and does nothing.
    let missing = Expect::Revision(first.revision);
    for (along, expected) in [
        (write("b", Some("2"), Expect::Absent), "exists already"),
        (write("c", Some("2"), missing), "does not exist"),
        (
            write("b", None, Expect::Revision(start)),
            "not at the expected one",
        ),
    ] {
        let refused = store
            .commit(write("a", Some("2"), Expect::Any), vec![along])
            .await
            .expect_err("one condition does not hold");
        assert!(refused.to_string().contains(expected), "{refused}");
        assert_eq!(store.get(&key("a")).await.unwrap().as_ref(), Some(&first));
        assert_eq!(store.revision(), first.revision);
    }
    let gone = store
        .commit(
            write("a", None, Expect::Revision(first.revision)),
            vec![
                write("b", None, Expect::Any),
                write("c", Some("1"), Expect::Absent),
            ],
        )
        .await
        .unwrap();
    assert_eq!((gone.revision.0, &*gone.value), (start.0 + 2, &b"1"[..]));
    let left = names(&store, None).await;
    assert_eq!(left, [("c".to_owned(), "1".to_owned())]);
    assert_eq!(names(&store, Some(first.revision)).await.len(), 2);
    let mut seen = Vec::new();
    while seen.len() < 5 {
        seen.extend(next(&mut watch).await);
    }
    let revisions: Vec<u64> = seen
        .iter()
        .map(|event| event.record.revision.0 - start.0)
        .collect();
    assert_eq!(revisions, [1, 1, 2, 2, 2]);
    // From between the two nothing of either is missed or seen twice.
    let mut rest = store.watch(PREFIX, first.revision).await.unwrap();
    assert_eq!(next(&mut rest).await.len(), 3);
}

pub async fn one_of_many_racing_writers_wins(store: impl Store) {
    let store = Arc::new(store);
    let first = put(&*store, "a", "0").await;
    let racers = (0..32).map(|i| {
        let store = store.clone();
        tokio::spawn(async move {
            store
                .put(
                    &key("a"),
                    Bytes::from(i.to_string()),
                    Expect::Revision(first.revision),
                )
                .await
        })
    });
    let outcomes = futures::future::join_all(racers).await;
    let won: Vec<_> = outcomes
        .into_iter()
        .filter_map(|o| o.expect("no racer panics").ok())
        .collect();
    assert_eq!(won.len(), 1);
    assert_eq!(store.get(&key("a")).await.unwrap().as_ref(), Some(&won[0]));
}

pub async fn lists_are_ordered_limited_and_bounded_by_the_prefix(store: impl Store) {
    for name in ["c", "a", "b"] {
        put(&store, name, name).await;
    }
    store
        .put(
            "/core/configmapsx/default/z",
            Bytes::from_static(b"z"),
            Expect::Any,
        )
        .await
        .unwrap();
    store
        .put(
            "/core/configmap/default/0",
            Bytes::from_static(b"0"),
            Expect::Any,
        )
        .await
        .unwrap();
    let page = store
        .list(Range {
            limit: Some(2),
            ..Range::all(PREFIX)
        })
        .await
        .unwrap();
    assert_eq!(
        page.records.iter().map(|r| &*r.value).collect::<Vec<_>>(),
        [b"a", b"b"]
    );
    assert_eq!(
        (page.remaining, page.more(), page.revision),
        (1, true, store.revision())
    );
    let rest = Range {
        after: Some(&page.records[1].key),
        at: Some(page.revision),
        ..Range::all(PREFIX)
    };
    let page = store.list(rest).await.unwrap();
    assert_eq!(
        page.records.iter().map(|r| &*r.value).collect::<Vec<_>>(),
        [b"c"]
    );
    assert!(!page.more());
    assert!(
        store
            .list(Range::all("/core/none/"))
            .await
            .unwrap()
            .records
            .is_empty()
    );
}

pub async fn a_list_of_what_is_wanted_goes_on_after_what_it_has_found(store: impl Store) {
    for name in ["a", "b", "c", "d", "e", "f"] {
        let value = if "bdf".contains(name) { "even" } else { "odd" };
        put(&store, name, value).await;
    }
    let even = |record: &Record| &record.value[..] == b"even";
    let mut found = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let range = Range {
            limit: Some(2),
            after: after.as_deref(),
            wanted: Some(&even),
            ..Range::all(PREFIX)
        };
        let page = store.list(range).await.unwrap();
        found.push((page.records.len(), page.remaining));
        after = page.records.last().map(|record| record.key.to_string());
        if !page.more() {
            break;
        }
    }
    // Two, of which two more may follow; then one, at the end.
    assert_eq!(found, [(2, 2), (1, 0)]);
}

pub async fn a_list_continues_at_its_revision_while_others_write(store: impl Store) {
    for name in ["a", "b", "c"] {
        put(&store, name, "old").await;
    }
    let at = store.revision();
    put(&store, "b", "new").await;
    put(&store, "b", "newer").await;
    put(&store, "d", "new").await;
    store.delete(&key("c"), Expect::Any).await.unwrap();
    put(&store, "c", "reborn").await;
    let pairs = |v: &[(&str, &str)]| {
        v.iter()
            .map(|(a, b)| (a.to_string(), b.to_string()))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        names(&store, Some(at)).await,
        pairs(&[("a", "old"), ("b", "old"), ("c", "old")])
    );
    assert_eq!(
        names(&store, None).await,
        pairs(&[("a", "old"), ("b", "newer"), ("c", "reborn"), ("d", "new")])
    );
    let future = store
        .list(Range {
            at: Some(Revision(store.revision().0 + 1)),
            ..Range::all(PREFIX)
        })
        .await;
    assert!(matches!(future, Err(StoreError::Future { .. })));
}

pub async fn a_watch_sees_every_later_write_in_order_with_what_it_replaced(store: impl Store) {
    let before = put(&store, "a", "0").await;
    let mut watch = store.watch(PREFIX, before.revision).await.unwrap();
    put(&store, "a", "1").await;
    store
        .put(
            "/core/secrets/default/x",
            Bytes::from_static(b"other"),
            Expect::Any,
        )
        .await
        .unwrap();
    put(&store, "b", "2").await;
    let deleted = store.delete(&key("a"), Expect::Any).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.extend(next(&mut watch).await);
    }
    let text = |r: &Record| String::from_utf8_lossy(&r.value).into_owned();
    let told: Vec<_> = seen
        .iter()
        .map(|e| {
            (
                e.change.clone(),
                text(&e.record),
                e.previous.as_ref().map(text),
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            (Change::Put, "1".into(), Some("0".into())),
            (Change::Put, "2".into(), None),
            (Change::Delete, "1".into(), Some("1".into()))
        ]
    );
    assert!(
        seen.windows(2)
            .all(|w| w[0].record.revision < w[1].record.revision)
    );
    assert_eq!(seen[2].record.revision, deleted.revision);
    assert_eq!(watch.progress(), deleted.revision);
}

pub async fn a_watch_from_the_past_replays_and_then_follows(store: impl Store) {
    let from = store.revision();
    put(&store, "a", "1").await;
    put(&store, "b", "2").await;
    let mut watch = store.watch(PREFIX, from).await.unwrap();
    assert_eq!(next(&mut watch).await.len(), 2);
    let (events, _) = tokio::join!(next(&mut watch), put(&store, "c", "3"));
    assert_eq!(&*events[0].record.value, b"3");
    let too_new = store.watch(PREFIX, Revision(store.revision().0 + 10)).await;
    assert!(matches!(too_new, Err(StoreError::Future { .. })));
}

pub async fn a_quiet_watch_progresses_with_the_rest_of_the_store(store: impl Store) {
    let watch = store.watch("/core/nodes/", store.revision()).await.unwrap();
    let other = put(&store, "a", "1").await;
    assert_eq!(watch.progress(), other.revision);
}

pub async fn a_watch_of_everything_sees_all_buckets_in_order(store: impl Store) {
    let mut watch = store.watch("/", store.revision()).await.unwrap();
    for key in ["/core/pods/a/b", "/apps/deployments/a/b", "/core/nodes/n"] {
        store
            .put(key, Bytes::from_static(b"x"), Expect::Any)
            .await
            .unwrap();
    }
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.extend(
            next(&mut watch)
                .await
                .into_iter()
                .map(|e| e.record.key.to_string()),
        );
    }
    assert_eq!(
        seen,
        ["/core/pods/a/b", "/apps/deployments/a/b", "/core/nodes/n"]
    );
}

pub async fn a_lifetime_ends_with_a_deletion_that_watches_see(store: impl Store) {
    let short = Duration::from_millis(60);
    let mut watch = store.watch(PREFIX, store.revision()).await.unwrap();
    let value = || Bytes::from_static(b"x");
    store
        .put_for(&key("brief"), value(), Expect::Absent, short)
        .await
        .unwrap();
    store
        .put_for(&key("kept"), value(), Expect::Absent, short)
        .await
        .unwrap();
    put(&store, "kept", "for good").await;
    let renewed = store
        .put_for(&key("renewed"), value(), Expect::Absent, short)
        .await
        .unwrap();
    store
        .put_for(
            &key("renewed"),
            value(),
            Expect::Revision(renewed.revision),
            Duration::from_secs(600),
        )
        .await
        .unwrap();
    let deleted = loop {
        let events = next(&mut watch).await;
        if let Some(event) = events.into_iter().find(|e| e.change == Change::Delete) {
            break event.record.clone();
        }
    };
    assert_eq!(&*deleted.key, key("brief"));
    assert_eq!(store.get(&key("brief")).await.unwrap(), None);
    // Its neighbours' first lifetimes are over within the same time; a later one shows that they were passed over.
    store
        .put_for(&key("later"), value(), Expect::Absent, short)
        .await
        .unwrap();
    while !next(&mut watch)
        .await
        .iter()
        .any(|e| e.change == Change::Delete && *e.record.key == key("later"))
    {}
    assert!(store.get(&key("kept")).await.unwrap().is_some());
    assert!(store.get(&key("renewed")).await.unwrap().is_some());
}

/// Op is one step of a random history.
#[derive(Clone, Debug)]
pub enum Op {
    Put(u8, u8),
    Delete(u8),
}

pub fn ops() -> impl proptest::strategy::Strategy<Value = Vec<Op>> {
    use proptest::prelude::*;
    let op = prop_oneof![3 => (0..6u8, any::<u8>()).prop_map(|(k, v)| Op::Put(k, v)), 1 => (0..6u8).prop_map(Op::Delete)];
    proptest::collection::vec(op, 1..40)
}

/// After any history: a list at each revision is what the state was, and a watch from there leads to the newest state.
pub async fn lists_and_watches_agree_with_a_model(store: impl Store, ops: Vec<Op>) {
    use std::collections::BTreeMap;
    let mut model: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut states = vec![(store.revision(), model.clone())];
    for op in ops {
        let key = |k: u8| format!("{PREFIX}ns-{}/{k}", k % 2);
        let written = match op {
            Op::Put(k, v) => {
                model.insert(key(k), vec![v]);
                store.put(&key(k), Bytes::from(vec![v]), Expect::Any).await
            }
            Op::Delete(k) => {
                let existed = model.remove(&key(k)).is_some();
                let deleted = store.delete(&key(k), Expect::Any).await;
                assert_eq!(existed, deleted.is_ok());
                deleted
            }
        };
        if let Ok(record) = written {
            states.push((record.revision, model.clone()));
        }
    }
    for (revision, state) in &states {
        for namespace in ["", "ns-0/", "ns-1/"] {
            let prefix = format!("{PREFIX}{namespace}");
            let within = |m: &BTreeMap<String, Vec<u8>>| -> BTreeMap<String, Vec<u8>> {
                m.iter()
                    .filter(|(k, _)| k.starts_with(&prefix))
                    .map(|(k, v)| (k.clone(), v.clone()))
                    .collect()
            };
            let page = store
                .list(Range {
                    at: Some(*revision),
                    ..Range::all(&prefix)
                })
                .await
                .expect("history is kept");
            let mut replica: BTreeMap<String, Vec<u8>> = page
                .records
                .iter()
                .map(|r| (r.key.to_string(), r.value.to_vec()))
                .collect();
            assert_eq!(replica, within(state), "at {revision}");
            let mut watch = store
                .watch(&prefix, *revision)
                .await
                .expect("history is kept");
            while watch.progress() < store.revision() {
                for event in next(&mut watch).await {
                    let before = match event.change {
                        Change::Put => replica
                            .insert(event.record.key.to_string(), event.record.value.to_vec()),
                        Change::Delete => replica.remove(&*event.record.key),
                    };
                    assert_eq!(
                        before,
                        event.previous.as_ref().map(|p| p.value.to_vec()),
                        "each event names what it replaces"
                    );
                }
            }
            assert_eq!(replica, within(&model), "from {revision}");
        }
    }
}

/// Makes one test per behaviour; `$make` returns a fresh store and whatever must outlive it.
macro_rules! contract_tests {
    ($make:expr) => {
        $crate::store::contract::contract_tests!(@ $make;
            every_write_gets_the_next_revision_and_keeps_the_creation, conditions_decide_writes,
            a_transaction_does_all_or_nothing_at_one_revision,
            one_of_many_racing_writers_wins, lists_are_ordered_limited_and_bounded_by_the_prefix,
            a_list_of_what_is_wanted_goes_on_after_what_it_has_found,
            a_list_continues_at_its_revision_while_others_write,
            a_watch_sees_every_later_write_in_order_with_what_it_replaced,
            a_watch_from_the_past_replays_and_then_follows, a_quiet_watch_progresses_with_the_rest_of_the_store,
            a_watch_of_everything_sees_all_buckets_in_order,
            a_watch_of_a_share_is_told_all_of_it_and_progresses_with_the_rest,
            what_is_compacted_is_refused_and_what_is_left_is_whole,
            a_lifetime_ends_with_a_deletion_that_watches_see);
    };
    (@ $make:expr; $($name:ident),*) => {
        $(#[tokio::test]
        async fn $name() {
            let (store, _keep) = $make;
            $crate::store::contract::$name(store).await;
        })*

        proptest::proptest! {
            #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]
            #[test]
            fn lists_and_watches_agree_with_a_model(ops in $crate::store::contract::ops()) {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(async {
                    let (store, _keep) = $make;
                    $crate::store::contract::lists_and_watches_agree_with_a_model(store, ops).await;
                });
            }
        }
    };
}
pub(crate) use contract_tests;
