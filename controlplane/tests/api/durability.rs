//! What was answered is kept.

use std::time::Duration;

use crate::etcd::Etcd;
use crate::kubectl::WEB;
use crate::server::Server;

#[test]
fn state_survives_a_kill_and_addresses_are_not_given_out_twice() {
    let server = Server::start();
    kill_between_writes(&server);
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(server.path("data"))
            .expect("the data directory")
            .permissions(),
    );
    assert_eq!(mode & 0o077, 0, "Secrets are in there");
}

#[test]
fn state_on_etcd_survives_a_kill_of_either() {
    let mut etcd = Etcd::start("http", &[]);
    let server = Server::start_on(&etcd);
    kill_between_writes(&server);
    assert!(!server.path("data").exists(), "nothing is kept beside etcd");
    // Without etcd nothing is answered that may be old, and with it everything goes on.
    etcd.kill();
    let refused = server.kubectl_fails("get configmap kept --request-timeout=10s", "");
    assert!(refused.contains("etcd"), "{refused}");
    etcd.restart();
    assert_eq!(server.object("configmap kept")["data"]["a"], "b");
    server.kubectl("annotate configmap kept note=after --overwrite");
}

fn kill_between_writes(server: &Server) {
    server.kubectl_in("apply -f -", WEB);
    server.kubectl("create configmap kept --from-literal=a=b");
    let before = (
        server.object("deployment web"),
        server.object("service web"),
        server.object("configmap kept"),
    );
    server.kill();
    server.launch();
    let after = (
        server.object("deployment web"),
        server.object("service web"),
        server.object("configmap kept"),
    );
    assert_eq!(before, after, "revisions, uids and all");
    // The allocators know what was given out before.
    let taken = before.1["spec"]["clusterIP"]
        .as_str()
        .expect("an address")
        .to_owned();
    let node_port = before.1["spec"]["ports"][0]["nodePort"]
        .as_u64()
        .expect("a node port");
    let service = |name: &str, spec: &str| {
        format!(
            r#"{{"apiVersion": "v1", "kind": "Service", "metadata": {{"name": "{name}"}}, "spec": {spec}}}"#
        )
    };
    let same = service(
        "second",
        &format!(r#"{{"clusterIP": "{taken}", "ports": [{{"port": 1}}]}}"#),
    );
    assert!(
        server
            .kubectl_fails("create -f -", &same)
            .contains("already allocated")
    );
    let same = service(
        "third",
        &format!(r#"{{"type": "NodePort", "ports": [{{"port": 1, "nodePort": {node_port}}}]}}"#),
    );
    assert!(
        server
            .kubectl_fails("create -f -", &same)
            .contains("already allocated")
    );
    // A deleted service gives both back.
    server.kubectl("delete service web");
    server.kubectl_in("create -f -", &same);
    // Revisions go on from where they were.
    server.kubectl("annotate configmap kept note=later");
    let revision = |object: &serde_json::Value| {
        object["metadata"]["resourceVersion"]
            .as_str()
            .and_then(|text| text.parse::<u64>().ok())
            .expect("a revision")
    };
    assert!(revision(&server.object("configmap kept")) > revision(&before.0));
}

#[test]
fn a_server_that_is_asked_to_stop_ends_its_watches_and_itself() {
    let server = Server::start();
    let config = server.path("admin.kubeconfig");
    let mut watching =
        std::process::Command::new(std::env::var("KUBECTL").unwrap_or("kubectl".to_owned()))
            .arg("--kubeconfig")
            .arg(&config)
            .args(["get", "namespaces", "--watch", "-o", "name"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("kubectl");
    let mut first = String::new();
    let mut lines = std::io::BufReader::new(watching.stdout.take().expect("its output"));
    std::io::BufRead::read_line(&mut lines, &mut first).expect("a first event");
    assert_eq!(first, "namespace/default\n");
    let (well, took) = server.terminate();
    assert!(well);
    assert!(
        took < Duration::from_secs(4),
        "it took {took:?}: the open watch held it up"
    );
    watching.wait().expect("kubectl ends with its watch");
}
