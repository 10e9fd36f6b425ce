//! A store that was told of one member, and finds the others.

use super::*;

async fn listed(path: &std::path::Path, count: usize) -> Vec<String> {
    for _ in 0..300 {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        if lines.len() == count {
            return lines;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{count} members are not remembered");
}

#[tokio::test]
async fn members_that_nobody_named_are_asked_when_the_named_one_is_gone() {
    let mut members = losses::start();
    let folder = tempfile::tempdir().unwrap();
    let one = EtcdConfig::at(vec![members[0].endpoint().to_owned()]);
    let config = EtcdConfig {
        members_file: Some(folder.path().join("members")),
        ..one.clone()
    };
    let store = Etcd::connect(&config).await.unwrap();
    store.put(&pod(1), value(1), Expect::Absent).await.unwrap();
    let mut watch = store.watch("/core/pods/", store.revision()).await.unwrap();
    let path = config.members_file.as_deref().unwrap();
    let known = listed(path, members.len()).await;
    assert_eq!(known[0], members[0].endpoint());

    members[0].kill();
    let written = loop {
        // The answer to what was asked of the member that died is lost.
        match store.put(&pod(2), value(2), Expect::Any).await {
            Ok(written) => break written,
            Err(error) => assert!(matches!(error, StoreError::Unavailable { .. }), "{error}"),
        }
    };
    let mut seen = watch.next().await.unwrap();
    while seen.last().unwrap().record.revision < written.revision {
        seen.extend(watch.next().await.unwrap());
    }
    drop(store);

    // The same after a restart; who remembers nobody is lost.
    assert!(Etcd::connect(&one).await.is_err());
    let store = Etcd::connect(&config).await.unwrap();
    assert_eq!(store.get(&pod(1)).await.unwrap().unwrap().value, value(1));
    store.put(&pod(3), value(3), Expect::Absent).await.unwrap();

    // Who left is forgotten.
    members[0].restart();
    let membership = EtcdMembership::connect(&config).await.unwrap();
    let listed_now = membership.list().await.unwrap();
    let gone = listed_now
        .iter()
        .find(|m| m.client_urls == known[2..])
        .unwrap();
    // Whom another one names who comes to its address is not taken out: it has started, under another name.
    let refused = membership.add(&gone.peer_urls[0], "somebody").await;
    let refused = refused.expect_err("it is another one").to_string();
    assert!(refused.contains("which is another one"), "{refused}");
    membership.remove(&gone.peer_urls[0]).await.unwrap();
    assert_eq!(listed(path, 2).await, known[..2]);
}
