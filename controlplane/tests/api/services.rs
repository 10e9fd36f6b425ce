//! What Services are given, and keep when they are replaced; and the one that leads to the API itself.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::Server;

/// Several times as long as servers wait before they look again.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn what_was_given_to_a_service_stays_when_it_is_replaced_by_one_without() {
    let server = Server::start();
    let wanted = |port: u16| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local",
                "ports": [{"name": "http", "port": port}]}})
    };
    server.kubectl_in("create -f -", &wanted(80).to_string());
    let given = server.object("service web");
    server.kubectl_in("replace -f -", &wanted(8080).to_string());
    let kept = server.object("service web");
    assert_eq!(kept["spec"]["ports"][0]["port"], 8080);
    for field in [
        "/spec/clusterIP",
        "/spec/healthCheckNodePort",
        "/spec/ports/0/nodePort",
    ] {
        let number = given.pointer(field);
        assert!(number.is_some_and(|number| !number.is_null()), "{field}");
        assert_eq!(kept.pointer(field), number, "{field}");
    }
    // What it leaves is free for another one.
    let mut plain = wanted(8080);
    plain["spec"].as_object_mut().expect("a spec").clear();
    plain["spec"]["ports"] = json!([{"name": "http", "port": 80}]);
    server.kubectl_in("replace -f -", &plain.to_string());
    let mut other = wanted(80);
    other["metadata"]["name"] = "other".into();
    let check = given["spec"]["healthCheckNodePort"].clone();
    other["spec"]["healthCheckNodePort"] = check.clone();
    server.kubectl_in("create -f -", &other.to_string());
    let other = server.object("service other");
    assert_eq!(other["spec"]["healthCheckNodePort"], check);
}

#[test]
fn the_service_of_the_api_comes_back_whoever_deletes_it() {
    let server = Server::start();
    let kinds = ["service", "endpoints", "endpointslice"];
    let all = || kinds.map(|kind| server.object(&format!("{kind} kubernetes")));
    let identity = |object: &Value| object["metadata"]["uid"].clone();
    let before = all();
    for kind in kinds {
        server.kubectl(&format!("delete {kind} kubernetes"));
    }
    let began = Instant::now();
    let is_back = |kind: &str| {
        let output = server.kubectl_with(&["get", kind, "kubernetes"], "");
        output.status.success()
    };
    while !kinds.iter().all(|kind| is_back(kind)) {
        assert!(began.elapsed() < PATIENCE, "never made again");
    }
    for (before, after) in before.iter().zip(all()) {
        assert_ne!(identity(before), identity(&after));
        for field in ["spec/clusterIP", "spec/ports", "subsets", "endpoints"] {
            let field = format!("/{field}");
            assert_eq!(before.pointer(&field), after.pointer(&field), "{field}");
        }
    }
}
