//! What goes over the wire beside objects: compression, newlines, health, keys, and connections that stall or break off.

use std::io::Read;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::kubelet::connected;
use crate::server::{Server, text};

/// How many watches of a resource are open, as the metrics say.
pub fn watchers(server: &Server, resource: &str) -> u32 {
    let metrics = server.kubectl("get --raw /metrics");
    let name = format!("apiserver_registered_watchers{{resource=\"{resource}\"}} ");
    metrics
        .lines()
        .find_map(|line| line.strip_prefix(&name))
        .map_or(0, |count| count.parse().expect("a count"))
}

pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn large_lists_are_compressed_for_those_who_take_it_and_the_same_without() {
    let server = Server::start();
    let maps: Vec<String> = (0..40)
        .map(|number| {
            let filling = format!("{number:08}").repeat(1000);
            format!("---\n{{apiVersion: v1, kind: ConfigMap, metadata: {{name: m{number:02}}}, data: {{a: \"{filling}\"}}}}\n")
        })
        .collect();
    server.kubectl_in("create -f -", &maps.concat());
    let path = "/api/v1/namespaces/default/configmaps";
    let headers = server.path("headers");
    let dumped = headers.display().to_string();
    for accept in [
        "application/json",
        "application/yaml",
        "application/vnd.kubernetes.protobuf",
    ] {
        let accept = format!("Accept: {accept}");
        let (code, _, plain) = server.curl(&["-H", &accept, "-D", &dumped], path);
        assert_eq!(code, 200);
        assert!(plain.len() > 320_000, "{}", plain.len());
        let told = std::fs::read_to_string(&headers)
            .expect("headers")
            .to_lowercase();
        assert!(!told.contains("content-encoding"), "{told}");
        assert!(
            told.contains(&format!("content-length: {}\r\n", plain.len())),
            "{told}"
        );
        assert!(
            told.contains("audit-id: ") && told.contains("cache-control: no-cache, private"),
            "{told}"
        );
        let gzip = ["-H", &accept, "-H", "Accept-Encoding: gzip", "-D", &dumped];
        let (code, _, packed) = server.curl(&gzip, path);
        assert_eq!(code, 200);
        let told = std::fs::read_to_string(&headers)
            .expect("headers")
            .to_lowercase();
        assert!(told.contains("content-encoding: gzip"), "{told}");
        assert!(
            packed.len() < plain.len() / 4,
            "{} of {}",
            packed.len(),
            plain.len()
        );
        let mut unpacked = Vec::new();
        flate2::read::GzDecoder::new(&packed[..])
            .read_to_end(&mut unpacked)
            .expect("gzip");
        assert_eq!(unpacked, plain);
    }
    // Small answers are not worth it; every answer in JSON ends its line.
    let (_, _, small) = server.curl(&["-H", "Accept-Encoding: gzip"], &format!("{path}/m00?x"));
    assert!(text(&small).starts_with('{') && small.ends_with(b"}\n"));
    for path in ["/api/v1/namespaces", "/api/v1/nodes/none", "/version"] {
        let (.., body) = server.curl(&[], path);
        assert!(body.ends_with(b"}\n"), "{path}: {}", text(&body));
    }
}

#[test]
fn health_is_told_check_by_check() {
    let server = Server::start();
    assert_eq!(server.kubectl("get --raw /livez"), "ok");
    let said = server.kubectl("get --raw /readyz?verbose");
    for line in [
        "[+]ping ok",
        "[+]etcd ok",
        "[+]shutdown ok",
        "readyz check passed",
    ] {
        assert!(said.contains(line), "{said}");
    }
    let said = server.kubectl("get --raw /healthz?verbose&exclude=etcd&exclude=nothing");
    for line in [
        "[+]etcd excluded: ok",
        "no matches for nothing",
        "healthz check passed",
    ] {
        assert!(said.contains(line), "{said}");
    }
    assert_eq!(server.kubectl("get --raw /livez/etcd"), "ok");
    let (code, ..) = server.curl(&[], "/livez/nothing");
    assert_eq!(code, 404);
}

#[test]
fn others_can_verify_tokens_by_the_published_keys() {
    let server = Server::start();
    server.kubectl("create serviceaccount robot");
    let issuer: Value =
        serde_json::from_str(&server.kubectl("get --raw /.well-known/openid-configuration"))
            .expect("JSON");
    let claims = |token: &str, part: usize| -> Value {
        use base64::Engine;
        let part = token.split('.').nth(part).expect("a part");
        let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(part);
        serde_json::from_slice(&bytes.expect("base64")).expect("JSON")
    };
    let token = server.kubectl("create token robot");
    assert_eq!(issuer["issuer"], claims(token.trim(), 1)["iss"]);
    let path = issuer["jwks_uri"].as_str().expect("an address");
    assert_eq!(path, format!("{}/openid/v1/jwks", server.url()));
    let keys: Value =
        serde_json::from_str(&server.kubectl("get --raw /openid/v1/jwks")).expect("JSON");
    let header = claims(token.trim(), 0);
    let key = keys["keys"]
        .as_array()
        .expect("keys")
        .iter()
        .find(|key| key["kid"] == header["kid"]);
    let key = key.expect("the key that signed");
    assert_eq!(
        (&key["alg"], &key["kty"], &key["crv"]),
        (&header["alg"], &"EC".into(), &"P-256".into())
    );
    for coordinate in ["x", "y"] {
        assert_eq!(key[coordinate].as_str().map(str::len), Some(43));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let server = Server::start();
    let (mut connection, _) = connected(&server).await;
    let head = "POST /api/v1/namespaces/default/configmaps?timeout=1s HTTP/1.1\r\nHost: x\r\n\
                Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{\"apiVersion\":";
    connection.write_all(head.as_bytes()).await.expect("sent");
    let mut said = vec![0; 4096];
    let read = tokio::time::timeout(Duration::from_secs(20), connection.read(&mut said));
    let length = read.await.expect("an answer in time").expect("an answer");
    let said = text(&said[..length]);
    assert!(said.starts_with("HTTP/1.1 504"), "{said}");
    assert!(
        said.contains("request did not complete within requested timeout"),
        "{said}"
    );
    let (code, ..) = server.curl(&[], "/api/v1/namespaces?timeout=soon");
    assert_eq!(code, 400, "a timeout is a duration");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_with_its_client() {
    let server = Server::start();
    for half in [true, false] {
        let (mut connection, _) = connected(&server).await;
        let head = "GET /api/v1/namespaces?watch=true HTTP/1.1\r\nHost: x\r\n\r\n";
        connection.write_all(head.as_bytes()).await.expect("sent");
        let mut said = vec![0; 1024];
        let length = connection.read(&mut said).await.expect("events");
        assert!(text(&said[..length]).starts_with("HTTP/1.1 200"));
        assert_eq!(watchers(&server, "namespaces"), 1);
        if half {
            // It says that it will say no more, and leaves its other ear open.
            connection.shutdown().await.expect("half closed");
        } else {
            drop(connection);
        }
        eventually("the watch is over", || watchers(&server, "namespaces") == 0);
    }
}
