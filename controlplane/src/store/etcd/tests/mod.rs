//! The contract on a real etcd, and what only happens with servers: two of us, restarts, lost members, compaction.

mod credentials;
mod full;
mod known;
mod losses;
mod moves;
#[path = "../../../../tests/support/etcd.rs"]
mod process;
mod restored;
mod server;
mod slow;
mod users;

use super::*;
use crate::store::Change;
use crate::store::contract::contract_tests;
use server::Server;

async fn fresh() -> (Etcd, Server) {
    let server = Server::start();
    (server.connect().await, server)
}

contract_tests!(fresh().await);

fn value(i: usize) -> Bytes {
    Bytes::from(format!("value {i}"))
}

fn pod(i: usize) -> String {
    format!("/core/pods/default/{i:04}")
}

/// What a watch tells of, up to the first that is as new as the last one: keys and revisions.
async fn told_until(last: Revision, watch: &mut dyn WatchStream) -> Vec<(String, Revision)> {
    let mut seen: Vec<(String, Revision)> = Vec::new();
    while seen.last().is_none_or(|(_, revision)| *revision < last) {
        let events = watch.next().await.unwrap();
        let told = events
            .iter()
            .map(|event| (event.record.key.to_string(), event.record.revision));
        seen.extend(told);
    }
    seen
}

impl Etcd {
    /// Does nothing of its own accord any more: what etcd has from now on is not heard of.
    async fn stop_following(&mut self) {
        self._tasks.abort_all();
        while self._tasks.join_next().await.is_some() {}
    }

    /// Begins to follow where that was stopped.
    fn follow_again(&mut self) {
        let follower = Follower {
            members: self.members.clone(),
            space: self.space.clone(),
            replica: self.replica.clone(),
            doubt: self.doubt.clone(),
            lineage: self.lineage.clone(),
        };
        self._tasks.spawn(follower.run());
    }
}

#[tokio::test]
async fn what_one_of_us_was_answered_another_one_reads() {
    let (ours, server) = fresh().await;
    let theirs = server.connect().await;
    let mut watch = theirs
        .watch("/core/pods/", theirs.revision())
        .await
        .unwrap();
    for i in 0..200 {
        let written = ours.put(&pod(i % 7), value(i), Expect::Any).await.unwrap();
        let read = theirs.get(&pod(i % 7)).await.unwrap();
        assert_eq!(read.as_ref(), Some(&written));
    }
    let mut seen = 0;
    while seen < 200 {
        seen += watch.next().await.unwrap().len();
    }
    // A revision that only the other one knows yet.
    let last = ours.put(&pod(0), value(0), Expect::Any).await.unwrap();
    assert!(theirs.watch("/core/pods/", last.revision).await.is_ok());
    let page = theirs.list(Range::all("/core/pods/")).await.unwrap();
    assert_eq!((page.records.len(), page.revision), (7, last.revision));
}

#[tokio::test]
async fn state_is_found_again() {
    let (store, server) = fresh().await;
    // More than one page of the list that loads them.
    for start in (0..2500).step_by(50) {
        let writes = (start..start + 50).map(|i| {
            let store = &store;
            async move { store.put(&pod(i), value(i), Expect::Absent).await }
        });
        for outcome in futures::future::join_all(writes).await {
            outcome.unwrap();
        }
    }
    store.delete(&pod(7), Expect::Any).await.unwrap();
    let before = store.list(Range::all("/")).await.unwrap();
    drop(store);
    let store = server.connect().await;
    let after = store.list(Range::all("/")).await.unwrap();
    assert_eq!(before.records.len(), 2499);
    assert_eq!(
        (before.records, before.revision),
        (after.records, after.revision)
    );
}

#[tokio::test]
async fn clusters_that_share_an_etcd_do_not_see_each_other() {
    let (ours, server) = fresh().await;
    let config = EtcdConfig {
        prefix: "/keelway/other".to_owned(),
        ..server.config()
    };
    let theirs = Etcd::connect(&config).await.unwrap();
    theirs.put(&pod(1), value(1), Expect::Absent).await.unwrap();
    assert_eq!(ours.get(&pod(1)).await.unwrap(), None);
    ours.put(&pod(1), value(2), Expect::Absent).await.unwrap();
    assert_eq!(theirs.get(&pod(1)).await.unwrap().unwrap().value, value(1));
}

#[tokio::test]
async fn while_etcd_is_away_writes_fail_and_watches_lose_nothing() {
    let (store, mut server) = fresh().await;
    let mut watch = store.watch("/core/pods/", store.revision()).await.unwrap();
    let mut answered = Vec::new();
    for round in 0..3 {
        for i in 0..20 {
            let written = store.put(&pod(i), value(round), Expect::Any).await;
            answered.push(written.unwrap().revision);
        }
        server.process.kill();
        let refused = store.put(&pod(0), value(round), Expect::Absent).await;
        assert!(
            matches!(refused, Err(StoreError::Unavailable { .. })),
            "{refused:?}"
        );
        assert!(
            store.get(&pod(0)).await.is_err(),
            "nobody can tell whether it is the newest"
        );
        server.process.restart();
    }
    let last = store.put(&pod(99), value(0), Expect::Any).await.unwrap();
    answered.push(last.revision);
    let told = told_until(last.revision, &mut *watch).await;
    let seen: Vec<Revision> = told.into_iter().map(|(_, revision)| revision).collect();
    assert_eq!(seen, answered);
}

#[tokio::test]
async fn a_follower_whose_history_was_compacted_reads_anew_and_says_so() {
    let (mut store, server) = fresh().await;
    let theirs = server.connect().await;
    store.put(&pod(1), value(1), Expect::Any).await.unwrap();
    let mut watch = store.watch("/core/pods/", store.revision()).await.unwrap();
    store.stop_following().await;
    for i in 0..20 {
        theirs
            .put(&pod(i), value(i + 1), Expect::Any)
            .await
            .unwrap();
    }
    let last = theirs.delete(&pod(3), Expect::Any).await.unwrap();
    let compact = |client: Client| async move {
        client
            .kv_client()
            .compact(signed(last.revision), None)
            .await
    };
    store.members.ask("compact", compact).await.unwrap();
    store.follow_again();
    assert!(matches!(
        watch.next().await,
        Err(StoreError::Compacted { .. })
    ));
    store.replica.reached(last.revision).await;
    let ours = store.replica.range(Range::all("/")).unwrap();
    assert_eq!(
        ours.records,
        theirs.list(Range::all("/")).await.unwrap().records
    );
    let mut watch = store.watch("/core/pods/", ours.revision).await.unwrap();
    theirs.put(&pod(3), value(0), Expect::Absent).await.unwrap();
    assert_eq!(watch.next().await.unwrap()[0].change, Change::Put);
}

#[tokio::test]
async fn a_format_of_later_versions_is_refused() {
    let (store, server) = fresh().await;
    let write =
        |client: Client| async move { client.kv_client().put("/keelway-format", "2", None).await };
    store.members.ask("write", write).await.unwrap();
    let refused = Etcd::connect(&server.config())
        .await
        .err()
        .expect("a refusal")
        .to_string();
    assert!(
        refused.contains("its format is \"2\", and this version reads \"1\""),
        "{refused}"
    );
}

#[tokio::test]
async fn an_etcd_that_is_not_there_is_named_as_such() {
    let config = EtcdConfig::at(vec!["http://127.0.0.1:1".to_owned()]);
    let refused = Etcd::connect(&config).await.err().expect("a refusal");
    assert!(
        matches!(refused, StoreError::Unavailable { .. }),
        "{refused}"
    );
    let config = EtcdConfig {
        ca_file: Some("/nowhere/ca.crt".into()),
        ..config
    };
    let refused = Etcd::connect(&config)
        .await
        .err()
        .expect("a refusal")
        .to_string();
    assert!(refused.contains("/nowhere/ca.crt"), "{refused}");
}
