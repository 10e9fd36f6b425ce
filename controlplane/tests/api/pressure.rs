//! Too much of everything: each is bounded, and who asks for little is served meanwhile.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::json;

use crate::server::Server;

const PATIENCE: Duration = Duration::from_secs(60);

pub type Connection = StreamOwned<ClientConnection, TcpStream>;

fn tcp(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(server.identity()).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
    stream
}

/// A connection of a user that speaks HTTP/1.1.
pub fn connect(server: &Server, user: &str) -> Connection {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(server.path("ca.crt")).expect("the CA");
    roots.add(ca).expect("a root");
    let file = |kind: &str| server.path(&format!("{user}.{kind}"));
    let certificate = CertificateDer::from_pem_file(file("crt")).expect("a certificate");
    let key = PrivateKeyDer::from_pem_file(file("key")).expect("a key");
    let config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key)
        .expect("a configuration");
    let name = "127.0.0.1".try_into().expect("a name");
    let client = ClientConnection::new(config.into(), name).expect("a client");
    StreamOwned::new(client, tcp(server))
}

/// The code of a simple request, as curl makes it.
fn get(server: &Server, user: &str, path: &str) -> u16 {
    server.curl_as(user, &["--max-time", "30"], path).0
}

#[test]
fn requests_of_any_size_and_shape_get_an_answer() {
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a folder");
    let large = folder.path().join("large");
    std::fs::write(&large, vec![b'x'; 4 << 20]).expect("written");
    let data = format!("@{}", large.display());
    let json = ["--header", "content-type: application/json"];
    let post = [&json[..], &["--max-time", "20", "--data-binary", &data]].concat();
    let maps = "/api/v1/namespaces/default/configmaps";
    assert_eq!(server.curl(&post, maps).0, 413);
    let chunked = [&post[..], &["--header", "transfer-encoding: chunked"]].concat();
    assert_eq!(server.curl(&chunked, maps).0, 413);
    let mut deep = "[".repeat(100_000);
    deep.insert_str(0, r#"{"data":"#);
    std::fs::write(&large, deep).expect("written");
    assert_eq!(server.curl(&post, maps).0, 400);
    // Heads beyond any reason, in HTTP/1.1 and in HTTP/2.
    let long = format!("/api/v1/{}", "x".repeat(100_000));
    // In a file: it is longer than an argument may be.
    std::fs::write(&large, format!("x-long: {}", "x".repeat(900_000))).expect("written");
    let header = format!("@{}", large.display());
    for version in ["--http1.1", "--http2"] {
        for more in [&[][..], &["--header", &header]] {
            let arguments = [&[version, "--max-time", "20"], more].concat();
            let (code, ..) = server.curl(&arguments, &long);
            assert!(matches!(code, 0 | 400..=499), "{version}: {code}");
        }
    }
    for nonsense in [
        "GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST /api/v1/namespaces/default/configmaps HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        "GET /api\x01 HTTP/1.1\r\n\r\n",
    ] {
        let mut connection = connect(&server, "jane");
        connection.write_all(nonsense.as_bytes()).expect("sent");
        let mut answer = Vec::new();
        // A refusal or an end, never a hang and never a success.
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = connection.read(&mut chunk) {
            answer.extend_from_slice(&chunk[..count]);
            if answer.windows(4).any(|end| end == b"\r\n\r\n") {
                break;
            }
        }
        let head = String::from_utf8_lossy(&answer).into_owned();
        assert!(!head.starts_with("HTTP/1.1 2"), "{nonsense:?}: {head}");
    }
    assert_eq!(get(&server, "admin", "/readyz"), 200);
}

#[test]
fn who_is_slow_is_cut_off_and_keeps_nobody_waiting() {
    let server = Server::start();
    let began = Instant::now();
    // Nobody begins to speak here.
    let mut silent: Vec<TcpStream> = (0..200).map(|_| tcp(&server)).collect();
    assert_eq!(get(&server, "admin", "/readyz"), 200);
    for stream in &mut silent {
        let mut byte = [0];
        assert!(
            matches!(stream.read(&mut byte), Ok(0) | Err(_)),
            "it is closed"
        );
    }
    assert!(
        began.elapsed() < PATIENCE,
        "within the time for a handshake"
    );
}

#[test]
fn ten_thousand_connections_are_borne() {
    // Shells give few to begin with; the server sees to its own.
    let own = std::process::id().to_string();
    let raised = std::process::Command::new("prlimit")
        .args(["--pid", &own, "--nofile=12000:"])
        .status();
    assert!(
        raised.is_ok_and(|status| status.success()),
        "12000 descriptors"
    );
    let server = Server::start();
    let mut held = Vec::new();
    for at in 0..10_000 {
        match TcpStream::connect(server.identity()) {
            Ok(stream) => held.push(stream),
            // This process may have no more descriptors.
            Err(error) => panic!("{at} connections are open: {error}"),
        }
        if at % 2500 == 0 {
            assert_eq!(get(&server, "node-1", "/api/v1/nodes/node-1"), 404);
        }
    }
    assert_eq!(get(&server, "node-1", "/api/v1/nodes/node-1"), 404);
    drop(held);
    assert_eq!(get(&server, "admin", "/readyz"), 200);
}

#[test]
fn a_client_without_end_waits_and_kubelets_do_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = format!("--data-dir={}", folder.path().display());
    // Two seats for users, four for the leases of nodes.
    let server = Server::start_flagged("api", vec![data, "--max-requests-inflight=20".to_owned()]);
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "jane"}, "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "jane"}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}});
    server.kubectl_in("create -f -", &binding.to_string());
    // Bodies that never come hold the seats, and what comes behind them waits.
    let request = "POST /api/v1/namespaces/default/configmaps HTTP/1.1\r\nhost: a\r\n\
        content-type: application/json\r\ncontent-length: 100\r\n\r\n{";
    let mut held: Vec<Connection> = (0..52)
        .map(|_| {
            let mut connection = connect(&server, "jane");
            connection.write_all(request.as_bytes()).expect("sent");
            connection
        })
        .collect();
    let pods = "/api/v1/namespaces/default/pods";
    let began = Instant::now();
    loop {
        let head = ["--max-time", "1", "--include"];
        let (code, _, answer) = server.curl_as("jane", &head, pods);
        if code == 429 {
            let answer = String::from_utf8_lossy(&answer).to_ascii_lowercase();
            assert!(answer.contains("retry-after: 1"), "{answer}");
            break;
        }
        assert!(began.elapsed() < PATIENCE, "too many wait: {code}");
    }
    let lease = json!({"metadata": {"name": "node-1"}}).to_string();
    let json = [
        "--max-time",
        "30",
        "--header",
        "content-type: application/json",
        "--data",
        &lease,
    ];
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    assert_eq!(server.curl_as("node-1", &json, leases).0, 201);
    assert_eq!(get(&server, "admin", pods), 200);
    assert_eq!(get(&server, "scheduler", pods), 200);
    // When they go, their seats are free.
    held.clear();
    let began = Instant::now();
    while get(&server, "jane", pods) != 200 {
        assert!(began.elapsed() < PATIENCE, "seats are given back");
    }
}

#[test]
fn writes_have_threads_of_their_own_which_nothing_else_wakes() {
    let server = Server::start();
    let post = |object: &'static str| {
        let json = ["--header", "content-type: application/json", "--data"];
        [&json[..], &[object]].concat()
    };
    // Whether those threads have gone to sleep once more with a request: the last of a few tries, since one may just be on its way there.
    let wakes = |arguments: &[&str], path: &str, expected: bool| {
        let seen = (0..10).find(|_| {
            let before = server.sleeps_of("writes");
            let (code, ..) = server.curl(arguments, path);
            assert!((200..300).contains(&code), "{path}: {code}");
            (server.sleeps_of("writes") > before) == expected
        });
        assert!(seen.is_some(), "{arguments:?} {path}");
    };
    let maps = "/api/v1/namespaces/default/configmaps";
    let map = r#"{"metadata": {"generateName": "a-"}}"#;
    wakes(&post(map), maps, true);
    let review = r#"{"spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}}}"#;
    let reviews = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    wakes(&post(review), reviews, false);
    wakes(&[], maps, false);
    wakes(
        &[],
        "/api/v1/namespaces/default/configmaps?watch=1&timeoutSeconds=1",
        false,
    );
    wakes(&[], "/version", false);
    let status = r#"{"status": {"phase": "Active"}}"#;
    let merge = [
        "--request",
        "PATCH",
        "--header",
        "content-type: application/merge-patch+json",
    ];
    let merge = [&merge[..], &["--data", status]].concat();
    wakes(&merge, "/api/v1/namespaces/default/status", true);
    wakes(&["--request", "DELETE"], maps, true);
}
