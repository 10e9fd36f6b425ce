//! What the file takes.

use futures::future::join_all;

use super::*;

fn length(folder: &tempfile::TempDir) -> u64 {
    let file = std::fs::metadata(folder.path().join("state.redb"));
    file.expect("the file").len()
}

/// As many writes at a time as clients would have open.
async fn at_once(store: &Embedded, count: usize, key: impl Fn(usize) -> String, value: &Bytes) {
    for first in (0..count).step_by(64) {
        let keys: Vec<String> = (first..count.min(first + 64)).map(&key).collect();
        let writes = keys
            .iter()
            .map(|key| store.put(key, value.clone(), Expect::Any));
        for written in join_all(writes).await {
            written.expect("a write");
        }
    }
}

#[tokio::test]
async fn leases_and_events_that_come_and_go_do_not_make_it_grow() {
    let (store, folder) = fresh();
    let value = Bytes::from(vec![b'x'; 600]);
    let lease = |at: usize| format!("/coordination.k8s.io/leases/kube-node-lease/n{}", at % 50);
    let events = async |round: usize| {
        let keys: Vec<String> = (0..100)
            .map(|at| format!("/core/events/a/{round}-{at}"))
            .collect();
        let short = Duration::from_millis(1);
        let writes = keys
            .iter()
            .map(|key| store.put_for(key, value.clone(), Expect::Any, short));
        for written in join_all(writes).await {
            written.expect("a write");
        }
    };
    at_once(&store, 500, lease, &value).await;
    events(0).await;
    let before = length(&folder);
    for round in 1..20 {
        at_once(&store, 500, lease, &value).await;
        events(round).await;
    }
    let mut watch = store
        .watch("/core/events/", Revision(store.revision().0 - 1))
        .await
        .unwrap();
    while !store
        .list(Range::all("/core/events/"))
        .await
        .unwrap()
        .records
        .is_empty()
    {
        watch.next().await.unwrap();
    }
    // Each round rewrites more than that.
    let after = length(&folder);
    assert!(
        after < before + (4 << 20),
        "{before} bytes have become {after}"
    );
}

#[tokio::test]
async fn room_that_nothing_uses_is_given_back() {
    let (store, folder) = fresh();
    let value = Bytes::from(vec![b'x'; 16 << 10]);
    let pod = |at: usize| format!("/core/pods/a/{at:05}");
    at_once(&store, 2000, pod, &value).await;
    let full = length(&folder);
    assert!(full > 30 << 20, "{full}");
    // One of a hundred stays, so that what is free lies everywhere.
    let gone: Vec<String> = (0..2000).filter(|at| at % 100 != 0).map(pod).collect();
    let deletes = gone.iter().map(|key| store.delete(key, Expect::Any));
    for deleted in join_all(deletes).await {
        deleted.expect("a deletion");
    }
    let kept = store.list(Range::all("/")).await.unwrap().records;
    drop(store);
    let store = Embedded::open(&EmbeddedConfig::at(folder.path().join("state.redb"))).unwrap();
    assert_eq!(store.list(Range::all("/")).await.unwrap().records, kept);
    let left = length(&folder);
    assert!(left < full / 4, "{full} bytes have become {left}");
}
