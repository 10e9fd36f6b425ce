//! One object that many write at once: none of them is refused, and nothing that was answered is lost.

use futures::future::join_all;
use k8s_openapi::api::core::v1::{ConfigMap, ResourceQuota};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::etcd::Etcd;
use crate::server::Server;
use crate::watching::config_map;

/// Many times as many as a write is tried again.
const WRITERS: usize = 100;

#[tokio::test]
async fn whoever_patches_one_object_at_once_succeeds() {
    let etcd = Etcd::start("http", &[]);
    for server in [Server::start(), Server::start_on(&etcd)] {
        let maps: Api<ConfigMap> = Api::default_namespaced(server.client().await);
        let hot = config_map("hot", "a");
        let made = maps.create(&PostParams::default(), &hot).await;
        made.expect("made");
        let patches = (0..WRITERS).map(|writer| {
            let maps = maps.clone();
            async move {
                let change = Patch::Merge(json!({"data": {format!("by-{writer}"): "x"}}));
                maps.patch("hot", &PatchParams::default(), &change).await
            }
        });
        for patched in join_all(patches).await {
            patched.expect("patched");
        }
        let data = maps.get("hot").await.expect("there").data.expect("data");
        let kept = data.keys().filter(|key| key.starts_with("by-")).count();
        assert_eq!(kept, WRITERS);
        let deleted = maps.delete("hot", &DeleteParams::default()).await;
        deleted.expect("deleted");
    }
}

#[tokio::test]
async fn what_is_created_at_once_under_a_quota_is_counted_once_each() {
    let server = Server::start();
    let client = server.client().await;
    let quotas: Api<ResourceQuota> = Api::default_namespaced(client.clone());
    let limit = json!({"metadata": {"name": "limit"}, "spec": {"hard": {"count/configmaps": WRITERS.to_string()}}});
    let limit = serde_json::from_value(limit).expect("a quota");
    let made = quotas.create(&PostParams::default(), &limit).await;
    made.expect("a quota");
    let maps: Api<ConfigMap> = Api::default_namespaced(client);
    let there = maps.list(&Default::default()).await.expect("a list").items;
    let creates = (there.len()..WRITERS).map(|number| {
        let maps = maps.clone();
        async move {
            let map = config_map(&format!("map-{number}"), "a");
            maps.create(&PostParams::default(), &map).await
        }
    });
    for created in join_all(creates).await {
        created.expect("created");
    }
    let more = config_map("one-more", "a");
    let refused = maps.create(&PostParams::default(), &more).await;
    let refused = refused.expect_err("the quota is used up").to_string();
    assert!(refused.contains("exceeded quota: limit"), "{refused}");
}
