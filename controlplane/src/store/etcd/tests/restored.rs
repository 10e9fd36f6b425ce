//! An etcd that is put back to an earlier state below a running store, and leases that it has ended.

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

/// Whether the store says that its state is another one, and gives and takes nothing any more.
async fn is_over(store: &Etcd) -> bool {
    let lost = timeout(PATIENCE, store.lost()).await;
    let lost = lost.expect("it is noticed").to_string();
    let read = store.get(&pod(0)).await;
    let written = store.put(&pod(0), value(9), Expect::Any).await;
    lost.contains("put back") && read.is_err() && written.is_err()
}

#[tokio::test]
async fn an_etcd_that_goes_back_is_noticed() {
    let (store, mut server) = fresh().await;
    store.put(&pod(0), value(0), Expect::Any).await.unwrap();
    server.process.keep("before");
    server.process.restart();
    // What may be asked again finds the way back; a write may not.
    store.get(&pod(0)).await.unwrap();
    for i in 0..5 {
        store.put(&pod(i), value(1), Expect::Any).await.unwrap();
    }
    server.process.put_back("before");
    server.process.restart();
    assert!(is_over(&store).await);
    // Whoever comes anew finds what there is.
    let store = server.connect().await;
    let found = store.list(Range::all("/core/pods/")).await.unwrap();
    assert_eq!(found.records.len(), 1);
    assert_eq!(found.records[0].value, value(0));
}

#[tokio::test]
async fn an_etcd_that_went_back_and_on_is_noticed() {
    let (mut store, mut server) = fresh().await;
    store.put(&pod(0), value(0), Expect::Any).await.unwrap();
    server.process.keep("before");
    server.process.restart();
    store.get(&pod(0)).await.unwrap();
    for i in 0..3 {
        store.put(&pod(i), value(1), Expect::Any).await.unwrap();
    }
    store.stop_following().await;
    server.process.put_back("before");
    server.process.restart();
    let theirs = server.connect().await;
    for i in 0..5 {
        theirs.put(&pod(i), value(2), Expect::Any).await.unwrap();
    }
    assert!(theirs.revision() > store.replica.revision());
    store.follow_again();
    assert!(is_over(&store).await);
}

#[tokio::test]
async fn a_lease_that_etcd_has_ended_is_asked_for_again() {
    let (store, _server) = fresh().await;
    let hour = Duration::from_secs(3600);
    let put = |i| store.put_for("/core/events/a/e", value(i), Expect::Any, hour);
    put(0).await.unwrap();
    // Another write may fall into the next minute, and be given a lease of its own.
    let revoke = |client: Client| async move {
        let mut client = client.lease_client();
        for lease in client.leases().await?.leases() {
            client.revoke(lease.id()).await?;
        }
        Ok(())
    };
    store.members.ask("revoke", revoke).await.unwrap();
    let written = put(1).await.unwrap();
    let found = store.get("/core/events/a/e").await.unwrap();
    assert_eq!(found, Some(written));
}
