//! What keeps a cluster's state safe: sealed values, backups, moving from one store to another, and the audit log.

use std::io::Write as _;
use std::net::Shutdown;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::etcd::Etcd;
use crate::pressure::connect;
use crate::server::{Server, text};

const PATIENCE: Duration = Duration::from_secs(30);

/// `keelway-controlplane store ...`: what it said.
fn store(arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(env!("CARGO_BIN_EXE_keelway-controlplane"))
        .arg("store")
        .args(arguments)
        .output()
        .expect("the program runs");
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(text(&output.stderr)),
    }
}

fn backup(server: &Server, file: &Path) -> Vec<u8> {
    let kubeconfig = server.path("admin.kubeconfig").display().to_string();
    let name = file.display().to_string();
    let said = store(&["backup", "--kubeconfig", &kubeconfig, &name]).expect("a backup");
    assert!(said.starts_with("backed up "), "{said}");
    std::fs::read(file).expect("the backup")
}

fn contains(bytes: &[u8], part: &str) -> bool {
    bytes.windows(part.len()).any(|at| at == part.as_bytes())
}

fn sealing(keys: &[(&str, &str)]) -> String {
    let providers: Vec<String> = keys
        .iter()
        .map(|(name, secret)| format!("{{aesgcm: {{keys: [{{name: {name}, secret: {secret}}}]}}}}"))
        .collect();
    format!(
        "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n\
         - resources: [secrets]\n  providers: [{}, {{identity: {{}}}}]\n",
        providers.join(", ")
    )
}

#[test]
fn secrets_are_sealed_where_they_are_kept_and_keys_are_rotated() {
    let one = ("one", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=");
    let two = ("two", "Hx4dHBsaGRgXFhUUExIREA8ODQwLCgkIBwYFBAMCAQA=");
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    let flag = |name: &str, path: &str| format!("--{name}={}", at(path).display());
    std::fs::write(at("keys"), sealing(&[one])).expect("written");
    let flags = vec![
        flag("data-dir", "data"),
        flag("encryption-provider-config", "keys"),
    ];
    let server = Server::start_flagged("api", flags);
    server.kubectl("create secret generic s --from-literal=password=hunter2-hunter2");
    server.kubectl("create configmap c --from-literal=plain=visible-visible");
    let sealed_with =
        |backup: &[u8], name: &str| contains(backup, &format!("k8s:enc:aesgcm:v1:{name}:"));
    let password = "aHVudGVyMi1odW50ZXIy";
    for kept in [
        backup(&server, &at("first")),
        std::fs::read(at("data/state.redb")).expect("the database"),
    ] {
        assert!(sealed_with(&kept, "one") && contains(&kept, "visible-visible"));
        assert!(!contains(&kept, password));
    }
    // The new key first: everything is sealed with it, and then the old one can go.
    std::fs::write(at("keys"), sealing(&[two, one])).expect("written");
    server.kill();
    server.launch();
    let began = Instant::now();
    for round in 0.. {
        let kept = backup(&server, &at(&format!("round-{round}")));
        if sealed_with(&kept, "two") && !sealed_with(&kept, "one") {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "values are sealed anew");
    }
    std::fs::write(at("keys"), sealing(&[two])).expect("written");
    server.kill();
    server.launch();
    assert_eq!(server.object("secret s")["data"]["password"], password);
    // Without the key nothing is made up.
    std::fs::write(at("keys"), sealing(&[one])).expect("written");
    server.kill();
    server.launch();
    let refused = server.kubectl_fails("get secret s", "");
    assert!(
        refused.contains("a key that is not in the file"),
        "{refused}"
    );
    assert_eq!(
        server.object("configmap c")["data"]["plain"],
        "visible-visible"
    );
}

/// What a state is known by.
fn seen(server: &Server) -> [Value; 3] {
    ["configmap kept", "service kept", "secret kept"].map(|name| server.object(name))
}

/// The same without what another store numbers in its own way.
fn without_revisions(objects: [Value; 3]) -> [Value; 3] {
    objects.map(|mut object| {
        object["metadata"]["resourceVersion"].take();
        object
    })
}

fn revision(object: &Value) -> u64 {
    let text = object["metadata"]["resourceVersion"].as_str();
    text.and_then(|text| text.parse().ok()).expect("a revision")
}

#[test]
fn a_state_is_backed_up_restored_and_moved_to_etcd_and_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name).display().to_string();
    let embedded = |name: &str| format!("embedded:{}", at(name));
    let on = |name: &str| vec![format!("--data-dir={}", at(name))];
    let mut server = Server::start_flagged("api", on("first"));
    server.kubectl("create configmap kept --from-literal=a=b");
    server.kubectl("create service nodeport kept --tcp=80");
    server.kubectl("create secret generic kept --from-literal=a=b");
    let original = seen(&server);
    backup(&server, Path::new(&at("backup")));
    let mode = std::fs::metadata(at("backup"))
        .expect("the backup")
        .permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o077, 0);
    // Only for those who may have everything.
    let (code, ..) = server.curl_as("jane", &[], "/keelway/backup");
    assert_eq!(code, 403);
    let busy = store(&[
        "migrate",
        "--from",
        &embedded("first"),
        "--to",
        &embedded("x"),
    ]);
    assert!(
        busy.expect_err("it runs")
            .contains("another process has it open")
    );
    // What came after the backup is not in it.
    server.kubectl("create configmap later");
    server.kill();
    store(&["restore", &at("backup"), "--to", &embedded("second")]).expect("restored");
    let twice = store(&["restore", &at("backup"), "--to", &embedded("second")]);
    assert!(
        twice
            .expect_err("it is there")
            .contains("there is a state already")
    );
    server.relaunch_on(on("second"));
    assert_eq!(seen(&server), original, "revisions and all");
    let gone = server.kubectl_fails("get configmap later", "");
    assert!(gone.contains("not found"), "{gone}");
    // Nothing that clients saw after the backup is numbered a second time.
    server.kubectl("create configmap anew");
    assert!(revision(&server.object("configmap anew")) > 1_000_000);
    server.kill();

    let etcd = Etcd::start("http", &[]);
    let name = format!("etcd:{}", etcd.endpoint());
    store(&["migrate", "--from", &embedded("first"), "--to", &name]).expect("migrated");
    server.relaunch_on(vec![format!("--store={name}")]);
    let moved = seen(&server);
    assert_eq!(
        without_revisions(moved.clone()),
        without_revisions(original.clone())
    );
    server.kubectl("annotate configmap kept note=after");
    assert!(revision(&server.object("configmap kept")) > revision(&original[2]));
    // What was given out stays given out.
    let port = original[1]["spec"]["ports"][0]["nodePort"].clone();
    let same = serde_json::json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "same"},
        "spec": {"type": "NodePort", "ports": [{"port": 1, "nodePort": port}]}});
    let refused = server.kubectl_fails("create -f -", &same.to_string());
    assert!(refused.contains("already allocated"), "{refused}");
    server.kill();
    store(&["migrate", "--from", &name, "--to", &embedded("third")]).expect("migrated back");
    let before = revision(&moved[1]);
    server.relaunch_on(on("third"));
    let back = seen(&server);
    assert_eq!(back[0]["metadata"]["annotations"]["note"], "after");
    assert_eq!(revision(&back[1]), before, "etcd's revisions are kept");

    let mut damaged = std::fs::read(at("backup")).expect("the backup");
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(at("damaged"), damaged).expect("written");
    let refused = store(&["restore", &at("damaged"), "--to", &embedded("fourth")]);
    assert!(refused.expect_err("it is damaged").contains("damaged"));
    assert!(!Path::new(&at("fourth")).exists(), "nothing is half made");
}

const POLICY: &str = "
apiVersion: audit.k8s.io/v1
kind: Policy
rules:
  - {level: None, resources: [{group: coordination.k8s.io}]}
  - {level: Metadata, namespaces: [default]}
  - {level: Metadata, nonResourceURLs: [/metrics]}
";

/// The events of an audit log, once as many are there as are waited for.
fn audited(log: &Path, count: usize) -> Vec<Value> {
    let began = Instant::now();
    loop {
        let text = std::fs::read_to_string(log).expect("the log");
        if text.lines().count() >= count {
            let event = |line| serde_json::from_str(line).expect("JSON");
            return text.lines().map(event).collect();
        }
        assert!(began.elapsed() < PATIENCE, "events are written: {text}");
        std::thread::yield_now();
    }
}

#[test]
fn pods_that_break_the_level_to_be_audited_are_in_the_audit_log() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name).display().to_string();
    let policy = POLICY.replace("namespaces: [default]", "verbs: [create]");
    std::fs::write(at("policy"), policy).expect("written");
    let server = Server::start_flagged(
        "api",
        vec![
            format!("--data-dir={}", at("data")),
            format!("--audit-policy-file={}", at("policy")),
            format!("--audit-log-path={}", at("log")),
        ],
    );
    let create = |body: &str, path: &str, expected: u16| {
        let words = ["--header", "content-type: application/json", "--data", body];
        let (code, _, said) = server.curl(&words, path);
        assert_eq!(code, expected, "{}", String::from_utf8_lossy(&said));
    };
    let namespace = r#"{"metadata": {"name": "shop", "labels": {"pod-security.kubernetes.io/enforce": "baseline",
        "pod-security.kubernetes.io/audit": "restricted"}}}"#;
    create(namespace, "/api/v1/namespaces", 201);
    let account = r#"{"metadata": {"name": "default"}}"#;
    create(account, "/api/v1/namespaces/shop/serviceaccounts", 201);
    let pods = "/api/v1/namespaces/shop/pods";
    let plain =
        r#"{"metadata": {"name": "plain"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}"#;
    create(plain, pods, 201);
    let host = r#"{"metadata": {"name": "host"}, "spec": {"hostNetwork": true, "containers": [{"name": "c", "image": "i"}]}}"#;
    create(host, pods, 403);
    let set = r#"{"metadata": {"name": "set"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template":
        {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}}"#;
    create(set, "/apis/apps/v1/namespaces/shop/replicasets", 201);
    let events = audited(Path::new(&at("log")), 5);
    let told = |event: usize, annotation: &str| {
        let annotations = &events[event]["annotations"];
        annotations[format!("pod-security.kubernetes.io/{annotation}")]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let broken =
        r#"would violate PodSecurity "restricted:latest": allowPrivilegeEscalation != false"#;
    for event in [2, 3, 4] {
        let violations = told(event, "audit-violations");
        let fits = match event {
            3 => violations.contains("host namespaces (hostNetwork=true)"),
            _ => violations.starts_with(broken),
        };
        assert!(fits, "{violations}");
    }
    assert_eq!(told(2, "enforce-policy"), "baseline:latest");
    assert_eq!(told(3, "enforce-policy"), "baseline:latest");
    assert_eq!(told(4, "enforce-policy"), "", "it is no pod");
    assert_eq!(told(1, "audit-violations"), "");
}

#[test]
fn the_audit_log_tells_who_did_what_and_what_the_answer_was() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("policy"), POLICY).expect("written");
    let server = Server::start_flagged(
        "api",
        vec![
            format!("--data-dir={}", at("data")),
            format!("--audit-policy-file={}", at("policy")),
            format!("--audit-log-path={}", at("log")),
        ],
    );
    let named = ["--header", "audit-id: mine-1"];
    let (code, ..) = server.curl_as(
        "jane",
        &named,
        "/api/v1/namespaces/default/secrets/x?pretty=1",
    );
    assert_eq!(code, 403);
    let body = r#"{"metadata": {"name": "c"}, "data": {"token": "hunter2"}}"#;
    let create = ["--header", "content-type: application/json", "--data", body];
    assert_eq!(
        server
            .curl(&create, "/api/v1/namespaces/default/configmaps")
            .0,
        201
    );
    let as_jane = [
        "--header",
        "impersonate-user: jane",
        "--user-agent",
        "tester/1",
    ];
    assert_eq!(
        server.curl(&as_jane, "/api/v1/namespaces/default/pods").0,
        403
    );
    assert_eq!(server.curl_as("", &[], "/metrics").0, 401);
    // No rule is about these.
    assert_eq!(server.curl(&[], "/api/v1/nodes").0, 200);
    let leases = "/apis/coordination.k8s.io/v1/namespaces/default/leases";
    assert_eq!(server.curl(&[], leases).0, 200);
    // The older form of a watch is told as what it is, and nothing but a watch.
    let watch = "/api/v1/watch/namespaces/default/secrets?timeoutSeconds=1";
    assert_eq!(server.curl(&[], watch).0, 200);
    let watched = "/api/v1/watch/namespaces/default/configmaps";
    assert_eq!(server.curl(&["--request", "POST"], watched).0, 404);
    let events = audited(Path::new(&at("log")), 5);
    let log = format!("{events:?}");
    assert!(!log.contains("hunter2"), "bodies are nobody's business");
    let told: Vec<String> = events
        .iter()
        .map(|event| {
            let text = |pointer: &str| {
                let value = event.pointer(pointer).cloned().unwrap_or_default();
                value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned)
            };
            let (user, verb, code) = ("/user/username", "/verb", "/responseStatus/code");
            let (of, name) = ("/objectRef/resource", "/objectRef/name");
            [user, "/impersonatedUser/username", verb, of, name, code]
                .map(text)
                .join(" ")
        })
        .collect();
    assert_eq!(
        told,
        [
            "jane null get secrets x 403",
            "admin null create configmaps null 201",
            "admin jane list pods null 403",
            "system:anonymous null get null null 401",
            "admin null watch secrets null 200",
        ]
    );
    assert_eq!(events[0]["auditID"], "mine-1");
    assert_eq!(
        events[0]["requestURI"],
        "/api/v1/namespaces/default/secrets/x?pretty=1"
    );
    assert_eq!(
        events[0]["annotations"]["authorization.k8s.io/decision"],
        "forbid"
    );
    assert_eq!(events[0]["sourceIPs"][0], "127.0.0.1");
    assert_eq!(events[2]["userAgent"], "tester/1");
    // What was written for a client that hung up meanwhile, at one moment or another, is in the log.
    for moment in 0..40 {
        let mut connection = connect(&server, "admin");
        let body = format!(r#"{{"metadata": {{"name": "hung-up-{moment}"}}}}"#);
        let head = "POST /api/v1/namespaces/default/configmaps HTTP/1.1\r\nhost: a";
        let head = format!("{head}\r\ncontent-length: {}", body.len());
        let request = format!("{head}\r\ncontent-type: application/json\r\n\r\n{body}");
        connection.write_all(request.as_bytes()).expect("sent");
        std::thread::sleep(Duration::from_micros(200 * moment));
        connection.sock.shutdown(Shutdown::Both).expect("hung up");
    }
    let (_, maps) = server.raw("/api/v1/namespaces/default/configmaps");
    let names = maps["items"].as_array().expect("a list").iter();
    let names = names.filter_map(|map| map["metadata"]["name"].as_str());
    let written = names.filter(|name| name.starts_with("hung-up-")).count();
    assert!(written > 0, "some come through");
    let told = |event: &&Value| {
        event["verb"] == "create"
            && event["objectRef"]["resource"] == "configmaps"
            && event["responseStatus"]["code"] == 201
    };
    let began = Instant::now();
    loop {
        let events = audited(Path::new(&at("log")), 5);
        // The first one is of somebody who waited.
        if events.iter().filter(told).count() > written {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{written} of {events:?}");
        std::thread::yield_now();
    }
}
