//! Revisions that are asked for before they are there, and when they are not there any more: on both stores.

use base64::Engine;
use http::Request;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::etcd::Etcd;
use crate::server::Server;
use crate::watching::{config_map, events};

/// So much of so many writes is more than is kept of a bucket's history.
const LARGE_BYTES: usize = 900 << 10;
const LARGE_WRITES: usize = 20;

#[tokio::test]
async fn a_revision_that_is_about_to_come_is_waited_for() {
    let etcd = Etcd::start("http", &[]);
    for server in [Server::start(), Server::start_on(&etcd)] {
        let client = server.client().await;
        let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
        let made = maps
            .create(&PostParams::default(), &config_map("a", "a"))
            .await;
        let revision = made.expect("made").metadata.resource_version.expect("one");
        let next = revision.parse::<u64>().expect("a number") + 1;
        let path = |rest: &str| format!("/api/v1/namespaces/default/configmaps{rest}");
        let ask = async |path: String| {
            let request = Request::get(path).body(Vec::new()).expect("a request");
            client.request_text(request).await.expect("an answer")
        };
        let write = async {
            // Behind the others, since it asks first.
            maps.get("a").await.expect("there");
            let change = Patch::Merge(json!({"data": {"x": "y"}}));
            let changed = maps.patch("a", &PatchParams::default(), &change).await;
            changed.expect("changed");
        };
        let watched = path(&format!("?watch=1&resourceVersion={next}&timeoutSeconds=1"));
        let (got, listed, watched, ()) = tokio::join!(
            ask(path(&format!("/a?resourceVersion={next}"))),
            ask(path(&format!("?resourceVersion={next}"))),
            ask(watched),
            write
        );
        assert!(got.contains(r#""x":"y""#), "{got}");
        assert!(listed.contains(r#""x":"y""#), "{listed}");
        assert_eq!(watched, "", "nothing has happened since");
    }
}

#[tokio::test]
async fn revisions_out_of_reach_are_told() {
    let etcd = Etcd::start("http", &[]);
    for server in [Server::start(), Server::start_on(&etcd)] {
        let client = server.client().await;
        let (code, said) = server.raw("/api/v1/pods?resourceVersion=999999");
        assert_eq!(code, 504);
        assert!(
            said["message"]
                .as_str()
                .is_some_and(|text| text.contains("Too large resource version")),
            "{said}"
        );
        // The history is kept in memory: what was before the last start is expired.
        let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
        for name in ["x", "y"] {
            maps.create(&PostParams::default(), &config_map(name, "a"))
                .await
                .expect("created");
        }
        let path = "/api/v1/namespaces/default/configmaps?limit=1";
        let token = |list: &Value| {
            let token = list["metadata"]["continue"].as_str().expect("a token");
            token.to_owned()
        };
        let first = token(&server.raw(path).1);
        // A list takes minutes at most, whether anything was written meanwhile or not.
        let engine = base64::engine::general_purpose::URL_SAFE_NO_PAD;
        let said = engine.decode(&first).expect("base64");
        let mut old: Value = serde_json::from_slice(&said).expect("JSON");
        old["since"] = (old["since"].as_i64().expect("a time") - 301).into();
        let old = engine.encode(old.to_string());
        let (code, expired) = server.raw(&format!("{path}&continue={old}"));
        assert_eq!((code, &expired["reason"]), (410, &json!("Expired")));
        // A change after it: the revision that the page is of is not the present one any more.
        maps.create(&PostParams::default(), &config_map("z", "a"))
            .await
            .expect("created");
        server.kill();
        server.launch();
        // A page that is too old comes with a token that goes on from there in the present state.
        let (code, expired) = server.raw(&format!("{path}&continue={first}"));
        assert_eq!((code, &expired["reason"]), (410, &json!("Expired")));
        let (code, rest) = server.raw(&format!("{path}&continue={}", token(&expired)));
        assert_eq!(
            (code, &rest["items"][0]["metadata"]["name"]),
            (200, &json!("y"))
        );
        let seen = events(
            &client,
            "/api/v1/namespaces?watch=true&resourceVersion=1",
            1,
        )
        .await;
        assert_eq!(
            seen[0],
            json!({"type": "ERROR", "code": 410, "reason": "Expired"})
        );
    }
}

#[tokio::test]
async fn revisions_that_are_compacted_are_told() {
    let etcd = Etcd::start("http", &[]);
    for server in [Server::start(), Server::start_on(&etcd)] {
        let client = server.client().await;
        let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
        for name in ["x", "y"] {
            let made = maps
                .create(&PostParams::default(), &config_map(name, "a"))
                .await;
            made.expect("created");
        }
        let path = |rest: &str| format!("/api/v1/namespaces/default/configmaps{rest}");
        let of = |list: &Value, field: &str| {
            let text = list["metadata"][field].as_str();
            text.expect("a text").to_owned()
        };
        let (code, page) = server.raw(&path("?limit=1"));
        assert_eq!(code, 200, "{page}");
        let (token, revision) = (of(&page, "continue"), of(&page, "resourceVersion"));
        for i in 0..LARGE_WRITES {
            let filling = char::from(b'a' + i as u8).to_string().repeat(LARGE_BYTES);
            let change = Patch::Merge(json!({"data": {"filling": filling}}));
            let changed = maps.patch("y", &PatchParams::default(), &change).await;
            changed.expect("changed");
        }
        // The rest of a list comes at its revision or, with the token that the refusal brings, as it is now.
        let (code, expired) = server.raw(&path(&format!("?limit=1&continue={token}")));
        assert_eq!((code, &expired["reason"]), (410, &json!("Expired")));
        let token = of(&expired, "continue");
        let (code, rest) = server.raw(&path(&format!("?limit=1&continue={token}")));
        assert_eq!(code, 200, "{rest}");
        assert_eq!(rest["items"][0]["metadata"]["name"], "y");
        assert_ne!(of(&rest, "resourceVersion"), revision);
        let exact = format!("?limit=1&resourceVersion={revision}&resourceVersionMatch=Exact");
        let (code, expired) = server.raw(&path(&exact));
        assert_eq!((code, &expired["reason"]), (410, &json!("Expired")));
        // Not older than that is what there is now.
        let (code, newest) = server.raw(&path(&format!("?resourceVersion={revision}")));
        assert_eq!(
            (code, newest["items"].as_array().map(Vec::len)),
            (200, Some(2))
        );
        for path in [path(""), "/api/v1/configmaps".to_owned()] {
            let seen = events(
                &client,
                &format!("{path}?watch=1&resourceVersion={revision}"),
                1,
            )
            .await;
            assert_eq!(
                seen[0],
                json!({"type": "ERROR", "code": 410, "reason": "Expired"})
            );
        }
        // Of other kinds nothing is forgotten for it.
        let nodes =
            format!("/api/v1/nodes?limit=1&resourceVersion={revision}&resourceVersionMatch=Exact");
        assert_eq!(server.raw(&nodes).0, 200);
    }
}
