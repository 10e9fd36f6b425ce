//! Rights in a real cluster: what a pod's token and a node's certificate open, and what not.

use std::path::Path;
use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::process::{eventually, run, run_with_input};
use serde_json::Value;

/// A folder with what a node shows the API server: `ca`, `certificate` and `key`.
fn keys_of(cluster: &Cluster, pid: i64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("there is room for a temporary folder");
    let pid = pid.to_string();
    let read = |name: &str| {
        let file = format!("/etc/keelway/{name}");
        run(
            &["nsenter", "--target", &pid, "--mount", "cat", &file],
            &[],
            30,
        )
        .ok()
    };
    let write = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).expect("the folder can be written to");
    };
    write("ca", &read("ca.crt"));
    write("kubeconfig", &read("kubelet.kubeconfig"));
    let kubeconfig = folder.path().join("kubeconfig").display().to_string();
    for (name, field) in [
        ("certificate", "client-certificate-data"),
        ("key", "client-key-data"),
    ] {
        let path = format!("jsonpath={{.users[0].user.{field}}}");
        let view = [
            "config",
            "view",
            "--raw",
            "--kubeconfig",
            &kubeconfig,
            "--output",
            &path,
        ];
        let encoded = cluster.kubectl(&view).ok();
        let decoded = run_with_input(&["base64", "--decode"], &[], 30, encoded.trim());
        write(name, &decoded.ok());
    }
    folder
}

/// Somebody on a node, with what the node holds: the status code of a request.
fn on_node(pid: i64, keys: &Path, credentials: &str, method: &str, url: &str) -> String {
    let script = format!(
        "cd {} && curl --silent --output /dev/null --write-out '%{{http_code}}' --max-time 20 \
         --cacert ca {credentials} --request {method} '{url}'",
        keys.display()
    );
    let namespace = format!("--net=/proc/{pid}/ns/net");
    run(&["nsenter", &namespace, "sh", "-c", &script], &[], 30).stdout
}

pub fn a_kubelet_lets_nobody_in_without_the_right(cluster: &Cluster) {
    let pods = cluster.get(&["pods", "--selector", "app=hello"]);
    let pod = &pods["items"][0];
    let text = |pointer: &str| pod.pointer(pointer).and_then(Value::as_str).expect("text");
    let (host, name) = (text("/status/hostIP"), text("/metadata/name"));
    let container = text("/spec/containers/0/name");
    let at = |path: &str| format!("https://{host}:10250/{path}");
    let exec = at(&format!(
        "exec/default/{name}/{container}?command=id&output=1"
    ));
    let logs = at(&format!("containerLogs/default/{name}/{container}"));
    let workers = cluster.workers();
    let own = workers
        .iter()
        .find(|(node, _)| node == text("/spec/nodeName"));
    let other = workers
        .iter()
        .find(|(node, _)| node != text("/spec/nodeName"));
    let (own, other) = (own.expect("its node").1, other.expect("another node").1);
    let folders = [own, other].map(|pid| (pid, keys_of(cluster, pid)));
    let on_node = |pid: i64, credentials: &str, method: &str, url: &str| {
        let (_, keys) = folders.iter().find(|(of, _)| *of == pid).expect("its keys");
        on_node(pid, keys.path(), credentials, method, url)
    };
    let token = |account: &str| {
        let token = cluster.kubectl(&["create", "token", account]).ok();
        format!("--header 'Authorization: Bearer {}'", token.trim())
    };
    let node = "--cert certificate --key key";
    let nobody = "--header 'Authorization: Bearer nonsense'";
    for (who, pid, credentials, expected) in [
        ("nobody", other, "", "401"),
        ("a made up token", other, nobody, "401"),
        ("another node", other, node, "403"),
        ("the node itself", own, node, "403"),
        ("a pod", other, &token("default"), "403"),
    ] {
        for (method, url) in [
            ("POST", &exec),
            ("GET", &exec),
            ("GET", &logs),
            ("GET", &at("pods")),
        ] {
            let code = on_node(pid, credentials, method, url);
            assert_eq!(code, expected, "{who}: {method} {url}");
        }
    }
    // A right opens what it names, for as long as it is there.
    cluster
        .kubectl(&["create", "serviceaccount", "scraper"])
        .ok();
    let metrics = ["--verb=get", "--resource=nodes/metrics"];
    let role = [&["create", "clusterrole", "e2e-scraper"], &metrics[..]].concat();
    cluster.kubectl(&role).ok();
    let binding = [
        "--clusterrole=e2e-scraper",
        "--serviceaccount=default:scraper",
    ];
    let bind = [
        &["create", "clusterrolebinding", "e2e-scraper"],
        &binding[..],
    ]
    .concat();
    cluster.kubectl(&bind).ok();
    let scraper = token("scraper");
    assert_eq!(on_node(other, &scraper, "GET", &at("metrics")), "200");
    assert_eq!(on_node(other, &scraper, "GET", &exec), "403");
    for kind in ["clusterrolebinding", "clusterrole"] {
        cluster.kubectl(&["delete", kind, "e2e-scraper"]).ok();
    }
    eventually(
        "the scraper is refused",
        Duration::from_secs(30),
        || match on_node(other, &scraper, "GET", &at("metrics")).as_str() {
            "403" => Ok(()),
            code => Err(code.to_owned()),
        },
    );
    cluster
        .kubectl(&["delete", "serviceaccount", "scraper"])
        .ok();
    eventually(
        "its token is refused",
        Duration::from_secs(30),
        || match on_node(other, &scraper, "GET", &at("metrics")).as_str() {
            "401" => Ok(()),
            code => Err(code.to_owned()),
        },
    );
}
