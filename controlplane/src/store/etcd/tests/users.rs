//! An etcd that has users, and lets each do what their roles say.

use etcd_client::Permission;

use super::server::Tls;
use super::*;

/// The role that `docs/state.md` says is enough, and one that may only write elsewhere; then users are asked for.
async fn begin(client: Client) -> Result<(), etcd_client::Error> {
    let mut auth = client.auth_client();
    let everything = Permission::read("").with_all_keys();
    let ours = Permission::read_write("/keelway").with_prefix();
    let theirs = Permission::read_write("/others").with_prefix();
    let roles = [
        ("root", vec![]),
        ("keelway", vec![everything, ours]),
        ("other", vec![theirs]),
    ];
    for (name, permissions) in roles {
        auth.role_add(name).await?;
        for permission in permissions {
            auth.role_grant_permission(name, permission).await?;
        }
        auth.user_add(name, "not used", None).await?;
        auth.user_grant_role(name, name).await?;
    }
    auth.auth_enable().await.map(drop)
}

#[tokio::test]
async fn a_user_with_the_rights_that_are_named_is_enough_and_others_are_refused() {
    let tls = Tls::make();
    let mut server = Server::start_with(&tls);
    tls.sign_user("keelway");
    let store = server.connect().await;
    let mut watch = store.watch("/core/pods/", store.revision()).await.unwrap();
    store.put(&pod(0), value(0), Expect::Absent).await.unwrap();
    store.members.ask("begin", begin).await.unwrap();
    // A store that is connected goes on, and so does one that comes anew.
    let again = server.connect().await;
    for (store, i) in [(&store, 1), (&again, 2)] {
        let made = store.put(&pod(i), value(i), Expect::Absent).await.unwrap();
        assert_eq!(store.get(&pod(i)).await.unwrap(), Some(made));
        let hour = Duration::from_secs(3600);
        let event = format!("/core/events/a/{i}");
        store
            .put_for(&event, value(i), Expect::Absent, hour)
            .await
            .unwrap();
        let both = store.commit(
            put(&pod(7), value(7), Expect::Absent),
            vec![put(&pod(8), value(8), Expect::Absent)],
        );
        both.await.unwrap();
        let along = Write {
            key: pod(8),
            value: None,
            expect: Expect::Any,
        };
        let gone = Write {
            key: pod(7),
            value: None,
            expect: Expect::Any,
        };
        store.commit(gone, vec![along]).await.unwrap();
        let newest = signed(store.revision());
        let compact =
            |client: Client| async move { client.kv_client().compact(newest, None).await };
        store.members.ask("compact", compact).await.unwrap();
    }
    // Its watch is begun anew, as a user.
    server.process.restart();
    let last = again.get(&pod(0)).await.unwrap().expect("it is there");
    let last = again
        .put(&pod(0), value(9), Expect::Revision(last.revision))
        .await
        .unwrap();
    let seen = told_until(last.revision, &mut *watch).await;
    assert_eq!(seen.len(), 1 + 2 * 5 + 1, "{seen:?}");

    for user in ["other", "nobody"] {
        tls.sign_user(user);
        let refused = Etcd::connect(&server.config())
            .await
            .err()
            .expect("refused");
        assert!(
            matches!(refused, StoreError::Unavailable { .. }),
            "{refused}"
        );
    }
}
