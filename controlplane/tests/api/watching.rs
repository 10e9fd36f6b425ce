//! Lists and watches, as informers use them.

use futures::{StreamExt, TryStreamExt};
use http::Request;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ServiceAccount};
use kube::api::{
    Api, DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, WatchEvent,
};
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::{Value, json};

use crate::server::Server;

pub fn config_map(name: &str, label: &str) -> ConfigMap {
    let metadata = ObjectMeta {
        name: Some(name.to_owned()),
        labels: Some([("set".to_owned(), label.to_owned())].into()),
        ..ObjectMeta::default()
    };
    ConfigMap {
        metadata,
        ..ConfigMap::default()
    }
}

/// Some raw watch events of a path.
pub async fn events(client: &kube::Client, path: &str, count: usize) -> Vec<Value> {
    let request = Request::get(path).body(Vec::new()).expect("a request");
    let stream = client
        .request_events::<Value>(request)
        .await
        .expect("a watch");
    let values = stream.take(count).map_ok(|event| match event {
        WatchEvent::Added(object) => json!({"type": "ADDED", "object": object}),
        WatchEvent::Modified(object) => json!({"type": "MODIFIED", "object": object}),
        WatchEvent::Deleted(object) => json!({"type": "DELETED", "object": object}),
        WatchEvent::Bookmark(bookmark) => {
            json!({"type": "BOOKMARK", "annotations": bookmark.metadata.annotations,
            "revision": bookmark.metadata.resource_version})
        }
        WatchEvent::Error(status) => {
            json!({"type": "ERROR", "code": status.code, "reason": status.reason})
        }
    });
    let collected = values.try_collect::<Vec<Value>>();
    tokio::time::timeout(std::time::Duration::from_secs(20), collected)
        .await
        .expect("events in time")
        .expect("events")
}

#[tokio::test]
async fn a_list_comes_in_pages_of_one_moment() {
    let server = Server::start();
    let client = server.client().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    for number in 0..7 {
        maps.create(
            &PostParams::default(),
            &config_map(&format!("m{number}"), "a"),
        )
        .await
        .expect("created");
    }
    let first = maps
        .list(&ListParams::default().limit(3))
        .await
        .expect("a page");
    assert_eq!(first.items.len(), 3);
    assert_eq!(first.metadata.remaining_item_count, Some(4));
    maps.delete("m6", &DeleteParams::default())
        .await
        .expect("deleted");
    let token = first.metadata.continue_.clone().expect("more");
    let rest = maps
        .list(&ListParams::default().limit(10).continue_token(&token))
        .await
        .expect("the rest");
    let names: Vec<String> = rest
        .items
        .iter()
        .filter_map(|map| map.metadata.name.clone())
        .collect();
    assert_eq!(
        names,
        ["m3", "m4", "m5", "m6"],
        "as it was when the list began"
    );
    assert_eq!(
        rest.metadata.resource_version,
        first.metadata.resource_version
    );
    assert_eq!(rest.metadata.continue_, None);
    // With a selector, pages are filled from what matches.
    maps.create(&PostParams::default(), &config_map("other", "b"))
        .await
        .expect("created");
    let selected = maps
        .list(&ListParams::default().labels("set=b").limit(1))
        .await
        .expect("a page");
    assert_eq!(selected.items.len(), 1);
}

#[tokio::test]
async fn a_watch_goes_on_from_a_list_and_follows_its_selector() {
    let server = Server::start();
    let client = server.client().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let list = maps.list(&ListParams::default()).await.expect("a list");
    let revision = list.metadata.resource_version.expect("a revision");
    maps.create(&PostParams::default(), &config_map("x", "a"))
        .await
        .expect("created");
    let patch = |label: &str| Patch::Merge(json!({"metadata": {"labels": {"set": label}}}));
    maps.patch("x", &PatchParams::default(), &patch("b"))
        .await
        .expect("relabelled");
    maps.patch("x", &PatchParams::default(), &patch("a"))
        .await
        .expect("relabelled");
    maps.delete("x", &DeleteParams::default())
        .await
        .expect("deleted");
    let path =
        format!("/api/v1/namespaces/default/configmaps?watch=true&resourceVersion={revision}");
    let all = events(&client, &path, 4).await;
    let kinds = |events: &[Value]| {
        events
            .iter()
            .map(|e| e["type"].as_str().unwrap_or("").to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(kinds(&all), ["ADDED", "MODIFIED", "MODIFIED", "DELETED"]);
    let revisions: Vec<u64> = all
        .iter()
        .map(|event| {
            event["object"]["metadata"]["resourceVersion"]
                .as_str()
                .and_then(|r| r.parse().ok())
                .expect("a revision")
        })
        .collect();
    assert!(
        revisions.is_sorted_by(|a, b| a < b),
        "{revisions:?}: the deletion has a revision of its own"
    );
    let selected = events(&client, &format!("{path}&labelSelector=set%3Da"), 4).await;
    assert_eq!(kinds(&selected), ["ADDED", "DELETED", "ADDED", "DELETED"]);
    assert_eq!(
        selected[1]["object"]["metadata"]["labels"]["set"], "a",
        "as it was when it last matched"
    );
    assert_eq!(
        selected[1]["object"]["metadata"]["resourceVersion"],
        all[1]["object"]["metadata"]["resourceVersion"],
        "but at the revision of the change"
    );
}

#[tokio::test]
async fn a_streaming_list_ends_with_its_bookmark_and_goes_on() {
    let server = Server::start();
    let client = server.client().await;
    let path = "/api/v1/namespaces?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let seen = events(&client, path, 5).await;
    assert!(seen[..4].iter().all(|event| event["type"] == "ADDED"));
    assert_eq!(seen[4]["type"], "BOOKMARK");
    assert_eq!(seen[4]["annotations"]["k8s.io/initial-events-end"], "true");
    // The parameters that must go together.
    let wrong = Request::get("/api/v1/namespaces?watch=true&sendInitialEvents=true")
        .body(Vec::new())
        .expect("a request");
    let refused = client.request_text(wrong).await.expect_err("refused");
    assert!(matches!(refused, kube::Error::Api(status) if status.code == 422));
}

#[tokio::test]
async fn what_one_write_makes_of_two_kinds_is_watched_as_two() {
    let server = Server::start();
    let client = server.client().await;
    let (_, list) = server.raw("/api/v1/services");
    let revision = list["metadata"]["resourceVersion"]
        .as_str()
        .expect("a revision");
    server.kubectl("create service clusterip one --tcp=80");
    // A Service and its address are written at one revision; whoever watches first has it encoded.
    for (path, kind, version) in [
        (
            "/apis/networking.k8s.io/v1/ipaddresses",
            "IPAddress",
            "networking.k8s.io/v1",
        ),
        ("/api/v1/services", "Service", "v1"),
    ] {
        // And for longer than any clock goes.
        let path = format!(
            "{path}?watch=1&resourceVersion={revision}&timeoutSeconds={}",
            i64::MAX
        );
        let seen = events(&client, &path, 1).await;
        assert_eq!(seen[0]["type"], "ADDED", "{path}");
        assert_eq!(seen[0]["object"]["kind"], kind, "{path}");
        assert_eq!(seen[0]["object"]["apiVersion"], version, "{path}");
    }
}

#[tokio::test]
async fn an_informer_keeps_up_through_a_restart() {
    let server = Server::start();
    let client = server.client().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client);
    let mut stream = std::pin::pin!(
        watcher(maps.clone(), watcher::Config::default())
            .default_backoff()
            .applied_objects()
    );
    maps.create(&PostParams::default(), &config_map("before", "a"))
        .await
        .expect("created");
    let name = |map: ConfigMap| map.metadata.name.unwrap_or_default();
    assert_eq!(
        name(
            stream
                .try_next()
                .await
                .expect("an event")
                .expect("an object")
        ),
        "before"
    );
    server.kill();
    server.launch();
    maps.create(&PostParams::default(), &config_map("later", "a"))
        .await
        .expect("created");
    let wait = async {
        loop {
            // Errors are the connection that broke; the watcher makes a new one.
            if let Ok(Some(map)) = stream.try_next().await
                && name(map) == "later"
            {
                return;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), wait)
        .await
        .expect("the informer sees the new object");
}

#[tokio::test]
async fn writers_that_race_all_get_their_turn() {
    let server = Server::start();
    let client = server.client().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client);
    maps.create(&PostParams::default(), &config_map("shared", "a"))
        .await
        .expect("created");
    let writers = (0..8).map(|number| {
        let maps = maps.clone();
        async move {
            let patch = Patch::Merge(json!({"data": {format!("k{number}"): "1"}}));
            maps.patch("shared", &PatchParams::default(), &patch).await
        }
    });
    for outcome in futures::future::join_all(writers).await {
        outcome.expect("patched");
    }
    assert_eq!(
        maps.get("shared")
            .await
            .expect("there")
            .data
            .map(|data| data.len()),
        Some(8)
    );
    // Whoever says which version they read is told when it is old.
    let mut stale = maps.get("shared").await.expect("there");
    maps.patch(
        "shared",
        &PatchParams::default(),
        &Patch::Merge(json!({"data": {"k0": "2"}})),
    )
    .await
    .expect("patched");
    stale.data = None;
    let refused = maps
        .replace("shared", &PostParams::default(), &stale)
        .await
        .expect_err("stale");
    assert!(
        matches!(refused, kube::Error::Api(status) if status.code == 409 && status.reason == "Conflict")
    );
}

#[tokio::test]
async fn names_are_generated_and_conditions_of_a_deletion_are_kept() {
    let server = Server::start();
    let client = server.client().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client);
    let generated = ConfigMap {
        metadata: ObjectMeta {
            generate_name: Some("made-".to_owned()),
            ..ObjectMeta::default()
        },
        ..ConfigMap::default()
    };
    let made = maps
        .create(&PostParams::default(), &generated)
        .await
        .expect("created");
    let name = made.metadata.name.clone().expect("a name");
    assert!(name.starts_with("made-") && name.len() == 10, "{name}");
    let other = kube::api::Preconditions {
        uid: Some("someone-else".to_owned()),
        resource_version: None,
    };
    let refused = maps
        .delete(
            &name,
            &DeleteParams {
                preconditions: Some(other),
                ..DeleteParams::default()
            },
        )
        .await;
    assert!(matches!(refused, Err(kube::Error::Api(status)) if status.code == 409));
    maps.create(&PostParams::default(), &config_map("kept", "b"))
        .await
        .expect("created");
    maps.create(&PostParams::default(), &config_map("gone", "a"))
        .await
        .expect("created");
    maps.delete_collection(
        &DeleteParams::default(),
        &ListParams::default().labels("set=a"),
    )
    .await
    .expect("deleted");
    let left = maps
        .list(&ListParams::default().labels("set"))
        .await
        .expect("a list");
    assert_eq!(left.items.len(), 1);
}

#[tokio::test]
async fn status_and_spec_are_written_apart() {
    let server = Server::start();
    server.kubectl("create serviceaccount default");
    server.kubectl("run one --image=nginx");
    let pods: Api<Pod> = Api::default_namespaced(server.client().await);
    let both = Patch::Merge(
        json!({"spec": {"activeDeadlineSeconds": 99}, "status": {"phase": "Running"}}),
    );
    let pod = pods
        .patch("one", &PatchParams::default(), &both)
        .await
        .expect("patched");
    let facts = |pod: &Pod| {
        let phase = pod.status.as_ref().and_then(|status| status.phase.clone());
        let deadline = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.active_deadline_seconds);
        (phase, deadline, pod.metadata.generation)
    };
    assert_eq!(facts(&pod), (Some("Pending".to_owned()), Some(99), Some(2)));
    let both = Patch::Merge(
        json!({"spec": {"activeDeadlineSeconds": 11}, "status": {"phase": "Running"}}),
    );
    let pod = pods
        .patch_status("one", &PatchParams::default(), &both)
        .await
        .expect("patched");
    assert_eq!(
        facts(&pod),
        (Some("Running".to_owned()), Some(99), Some(2)),
        "the generation counts the spec only"
    );
    let again = pods.replace("one", &PostParams::default(), &pod).await;
    assert_eq!(
        again.expect("replaced").metadata.resource_version,
        pod.metadata.resource_version,
        "a write that changes nothing is none"
    );
    // A binding is taken once.
    let bind = |node: &str| {
        let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "one"}, "target": {"kind": "Node", "name": node}});
        Request::post("/api/v1/namespaces/default/pods/one/binding")
            .body(binding.to_string().into_bytes())
            .expect("a request")
    };
    let client = server.client().await;
    client.request_text(bind("n1")).await.expect("bound");
    let refused = client
        .request_text(bind("n2"))
        .await
        .expect_err("bound already");
    assert!(
        matches!(refused, kube::Error::Api(status) if status.message.contains("already assigned to node"))
    );
    let pod = pods.get("one").await.expect("there");
    assert_eq!(
        pod.metadata.generation,
        Some(2),
        "to be put on a node is no change of what was asked for"
    );
    // Some kinds are answered with the object that is gone, others with a Status.
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
    let robot = serde_json::from_value(json!({"metadata": {"name": "robot"}})).expect("an account");
    accounts
        .create(&PostParams::default(), &robot)
        .await
        .expect("created");
    let gone = accounts.delete("robot", &DeleteParams::default()).await;
    assert!(gone.expect("deleted").is_left());
    assert_eq!(
        pod.spec.and_then(|spec| spec.node_name).as_deref(),
        Some("n1")
    );
}

/// What an informer holds: names and revisions.
type Seen = std::collections::BTreeMap<String, String>;

/// Follows a path from its initial events on, into a map.
async fn follow(client: kube::Client, path: String, seen: std::sync::Arc<std::sync::Mutex<Seen>>) {
    let request = Request::get(path).body(Vec::new()).expect("a request");
    let mut stream = client
        .request_events::<ConfigMap>(request)
        .await
        .expect("a watch")
        .boxed();
    while let Some(event) = stream.try_next().await.expect("an event") {
        let mut seen = seen.lock().expect("seen");
        let facts = |map: &ConfigMap| {
            let metadata = map.metadata.clone();
            (
                metadata.name.unwrap_or_default(),
                metadata.resource_version.unwrap_or_default(),
            )
        };
        match event {
            WatchEvent::Added(map) => {
                let (name, revision) = facts(&map);
                assert_eq!(seen.insert(name, revision), None, "added twice");
            }
            WatchEvent::Modified(map) => {
                let (name, revision) = facts(&map);
                let before = seen
                    .insert(name, revision.clone())
                    .expect("modified before it was added");
                assert!(
                    before.parse::<u64>().ok() < revision.parse().ok(),
                    "{before} then {revision}"
                );
            }
            WatchEvent::Deleted(map) => {
                assert!(
                    seen.remove(&facts(&map).0).is_some(),
                    "deleted before it was added"
                );
            }
            WatchEvent::Bookmark(_) | WatchEvent::Error(_) => panic!("not asked for, not expected"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_watcher_ends_up_with_what_a_list_shows() {
    let server = Server::start();
    let client = server.client().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let selectors = ["", "set=even", "set!=even"];
    let watchers: Vec<_> = selectors
        .iter()
        .flat_map(|selector| [*selector, *selector])
        .map(|selector| {
            let seen = std::sync::Arc::default();
            let query = selector.replace('=', "%3D").replace('!', "%21");
            let path =
                format!("/api/v1/namespaces/default/configmaps?watch=true&labelSelector={query}");
            let task = tokio::spawn(follow(client.clone(), path, std::sync::Arc::clone(&seen)));
            (selector, seen, task)
        })
        .collect();
    let writers = (0..6).map(|writer| {
        let maps = maps.clone();
        async move {
            for step in 0..30 {
                let name = format!("w{writer}-{}", step % 7);
                let label = if (step / 7) % 2 == 0 { "even" } else { "odd" };
                let patch = Patch::Merge(json!({"metadata": {"labels": {"set": label}}}));
                match step % 5 {
                    4 => drop(maps.delete(&name, &DeleteParams::default()).await),
                    _ if maps.get_opt(&name).await.expect("a look").is_some() => {
                        maps.patch(&name, &PatchParams::default(), &patch)
                            .await
                            .expect("patched");
                    }
                    _ => drop(
                        maps.create(&PostParams::default(), &config_map(&name, label))
                            .await
                            .expect("created"),
                    ),
                }
            }
        }
    });
    futures::future::join_all(writers).await;
    for (selector, seen, task) in watchers {
        let list = maps
            .list(&ListParams::default().labels(selector))
            .await
            .expect("a list");
        let shown: Seen = list
            .items
            .into_iter()
            .map(|map| {
                (
                    map.metadata.name.unwrap_or_default(),
                    map.metadata.resource_version.unwrap_or_default(),
                )
            })
            .collect();
        assert!(
            selector.is_empty() || shown.len() < 40,
            "the selector selects"
        );
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while *seen.lock().expect("seen") != shown {
            assert!(!task.is_finished(), "the watch ended");
            assert!(
                std::time::Instant::now() < deadline,
                "watching {selector:?}: {:?} is not {shown:?}",
                seen.lock()
            );
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        task.abort();
    }
}
