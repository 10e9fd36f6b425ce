//! An etcd that asks for certificates, and certificates that end.

use tokio::time::Instant;

use super::server::Tls;
use super::*;

#[tokio::test]
async fn certificates_are_shown_and_asked_for() {
    let tls = Tls::make();
    let server = Server::start_with(&tls);
    let store = server.connect().await;
    store.put(&pod(1), value(1), Expect::Absent).await.unwrap();
    let nobody = EtcdConfig {
        identity_files: None,
        ..server.config()
    };
    assert!(Etcd::connect(&nobody).await.is_err());
    let others = Tls::make();
    let fooled = EtcdConfig {
        ca_file: Some(others.path("ca.crt")),
        ..server.config()
    };
    assert!(Etcd::connect(&fooled).await.is_err());
}

/// A certificate that was renewed is shown at the next connection, though the store was opened with one that has ended since.
#[tokio::test]
async fn a_certificate_that_was_renewed_is_taken_up() {
    const SHORT: Duration = Duration::from_secs(4);
    let tls = Tls::make();
    tls.sign_client(SHORT);
    let ends = Instant::now() + SHORT;
    let mut server = Server::start_with(&tls);
    let store = server.connect().await;
    store.put(&pod(1), value(1), Expect::Absent).await.unwrap();
    let expired = tempfile::tempdir().unwrap();
    let kept = ["client.crt", "client.key"].map(|name| {
        let kept = expired.path().join(name);
        std::fs::copy(tls.path(name), &kept).unwrap();
        kept
    });
    tls.sign_client(Duration::from_secs(3600));
    tokio::time::sleep_until(ends + Duration::from_secs(1)).await;
    // Connections are made anew, which the old certificate does not get any more.
    server.process.restart();
    let [certificate, key] = kept;
    let late = EtcdConfig {
        identity_files: Some((certificate, key)),
        ..server.config()
    };
    assert!(Etcd::connect(&late).await.is_err(), "it has ended");
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Err(error) = store.put(&pod(2), value(2), Expect::Any).await {
        assert!(Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(store.get(&pod(1)).await.unwrap().unwrap().value, value(1));
}
