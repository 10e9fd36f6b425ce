//! What is selected by field, and watches that are many.

use std::time::Duration;

use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt};
use http::Request;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams, WatchEvent};
use serde_json::{Value, json};

use crate::server::Server;

const PATIENCE: Duration = Duration::from_secs(60);

fn pod(name: &str, namespace: &str, node: &str) -> String {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {"nodeName": node, "automountServiceAccountToken": false,
            "containers": [{"name": "main", "image": "nothing"}]}})
    .to_string()
}

/// Names of the pods that a list gives, and its revision.
fn pods(server: &Server, path: &str) -> (Vec<String>, u64) {
    let (code, list) = server.raw(path);
    assert_eq!(code, 200, "{list}");
    let items = list["items"].as_array().into_iter().flatten();
    let names = items.filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned));
    let revision = list["metadata"]["resourceVersion"].as_str();
    let revision = revision.and_then(|revision| revision.parse().ok());
    (names.collect(), revision.expect("a revision"))
}

#[test]
fn pods_of_a_node_are_those_that_are_on_it_at_the_moment() {
    let server = Server::start();
    server.kubectl("create namespace other");
    server.kubectl("create serviceaccount default");
    server.kubectl("create serviceaccount default -n other");
    let on = |node: &str| format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{node}");
    assert_eq!(pods(&server, &on("n1")).0, [""; 0]);
    for (name, namespace, node) in [
        ("a", "default", "n1"),
        ("b", "default", "n2"),
        ("c", "other", "n1"),
        ("d", "other", ""),
    ] {
        server.kubectl_in("create -f -", &pod(name, namespace, node));
    }
    let (names, first) = pods(&server, &on("n1"));
    assert_eq!(names, ["a", "c"]);
    assert_eq!(pods(&server, &on("n2")).0, ["b"]);
    // Together with whatever else is asked for.
    let within = "/api/v1/namespaces/other/pods?fieldSelector=spec.nodeName%3Dn1";
    assert_eq!(pods(&server, within).0, ["c"]);
    let running = format!("{},status.phase%3DRunning", on("n1"));
    assert_eq!(pods(&server, &running).0, [""; 0]);
    let not = "/api/v1/pods?fieldSelector=spec.nodeName!%3Dn1";
    assert_eq!(pods(&server, not).0, ["b", "d"]);
    // A page at a time, of which the second is as old as the first.
    let page = format!("{}&limit=1", on("n1"));
    let (_, list) = server.raw(&page);
    let token = list["metadata"]["continue"]
        .as_str()
        .expect("a second page");
    assert_eq!(list["items"][0]["metadata"]["name"], "a");
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "d"},
        "target": {"kind": "Node", "name": "n1"}});
    let path = "/api/v1/namespaces/other/pods/d/binding";
    server.kubectl_in(&format!("create --raw {path} -f -"), &binding.to_string());
    server.kubectl("delete pod a --grace-period=0 --force");
    assert_eq!(pods(&server, &format!("{page}&continue={token}")).0, ["c"]);
    let (names, last) = pods(&server, &on("n1"));
    assert_eq!(names, ["c", "d"]);
    assert!(last > first, "{first}, {last}");
}

#[tokio::test]
async fn watches_that_are_many_see_every_change_once_and_in_order() {
    const WATCHES: usize = 260;
    const CHANGES: u64 = 40;
    let server = Server::start();
    let client = server.client().await;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    let map = ConfigMap {
        metadata: ObjectMeta {
            name: Some("watched".to_owned()),
            ..ObjectMeta::default()
        },
        ..ConfigMap::default()
    };
    let made = maps
        .create(&PostParams::default(), &map)
        .await
        .expect("made");
    let from = made.metadata.resource_version.expect("a revision");
    let path = format!(
        "/api/v1/namespaces/default/configmaps?watch=1&resourceVersion={from}&fieldSelector=metadata.name%3Dwatched"
    );
    let watches = (0..WATCHES).map(|_| async {
        let request = Request::get(&path).body(Vec::new()).expect("a request");
        client.request_events::<Value>(request).await
    });
    let watches = try_join_all(watches).await.expect("all watches open");
    let changes = async {
        for number in 1..=CHANGES {
            let change = json!({"data": {"number": number.to_string()}});
            let change = Patch::Merge(&change);
            let changed = maps
                .patch("watched", &PatchParams::default(), &change)
                .await;
            changed.expect("a change");
        }
    };
    let seen = watches.into_iter().map(|watch| async move {
        let numbers = watch.take(CHANGES as usize).map_ok(|event| match event {
            WatchEvent::Modified(map) => map["data"]["number"].as_str().map(str::to_owned),
            other => panic!("{other:?}"),
        });
        numbers.try_collect::<Vec<_>>().await
    });
    let both = futures::future::join(changes, try_join_all(seen));
    let (_, seen) = tokio::time::timeout(PATIENCE, both)
        .await
        .expect("all of it in time");
    let expected: Vec<_> = (1..=CHANGES)
        .map(|number| Some(number.to_string()))
        .collect();
    for numbers in seen.expect("no watch fails") {
        assert_eq!(numbers, expected);
    }
}
