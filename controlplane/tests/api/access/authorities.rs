//! The authority of the cluster's certificates, replaced while the API server runs.

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::kubelet::{administrator, connect};
use crate::server::{Server, named, signed};
use crate::wire::eventually;

const PATH: &str = "/api/v1/namespaces/default";

/// Replaces a file of the server's credentials, whole or not at all.
fn put(server: &Server, name: &str, text: &str) {
    let new = server.path("put");
    std::fs::write(&new, text).expect("a file");
    std::fs::rename(&new, server.path(name)).expect("in its place");
}

/// Asks, and gives the first line of the answer; the connection stays open.
async fn ask(stream: &mut TlsStream<TcpStream>) -> std::io::Result<String> {
    let request = format!("GET {PATH} HTTP/1.1\r\nhost: k\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    let mut lines = head.lines();
    let first = lines.next().unwrap_or_default().to_owned();
    let length = lines.find_map(|line| line.strip_prefix("content-length:"));
    let length = length.and_then(|length| length.trim().parse().ok());
    let mut body = vec![0; length.expect("a length")];
    stream.read_exact(&mut body).await?;
    Ok(first)
}

#[tokio::test]
async fn the_authority_is_replaced_while_the_server_runs() {
    let server = Server::start_with("api,controllers");
    let key = KeyPair::generate().expect("a key");
    let mut authority = named("new-ca", Some("test"));
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let new = authority.self_signed(&key).expect("an authority").pem();
    let issuer = Issuer::new(authority, key);
    let sign = |file: &str, params: CertificateParams, usage: ExtendedKeyUsagePurpose| {
        let [certificate, key] = signed(params, usage, &issuer);
        put(&server, &format!("{file}.key"), &key);
        put(&server, &format!("{file}.crt"), &certificate);
    };
    let masters = named("admin", Some("system:masters"));
    sign("of-new", masters, ExtendedKeyUsagePurpose::ClientAuth);
    let code = |user: &str| server.curl_as(user, &[], PATH).0;
    assert_eq!((code("admin"), code("of-new")), (200, 0));

    // Both count; and everybody is told.
    let old = std::fs::read_to_string(server.path("ca.crt")).expect("the authority");
    let both = format!("{old}{new}");
    put(&server, "ca.crt", &both);
    eventually("the new authority's certificates are taken", || {
        code("of-new") == 200
    });
    assert_eq!(code("admin"), 200);
    let held = administrator(&server);
    let mut open = connect(&server.address(), held.clone())
        .await
        .expect("connected");
    assert_eq!(ask(&mut open).await.expect("an answer"), "http/1.1 200 ok");
    let told = |namespace: &str, map: &str, field: &str| {
        let map = server.object(&format!("configmap --namespace {namespace} {map}"));
        map["data"][field] == both.as_str()
    };
    eventually("namespaces have both", || {
        told("default", "kube-root-ca.crt", "ca.crt")
            && told("kube-system", "kube-root-ca.crt", "ca.crt")
    });
    let extensions = "extension-apiserver-authentication";
    eventually("extension servers are told of both", || {
        told("kube-system", extensions, "client-ca-file")
    });

    // The old one is dropped: it lets nobody in, neither anew nor by what a session remembers, and who is in is put out.
    let serving = named("kube-apiserver", Some("test"));
    sign("apiserver", serving, ExtendedKeyUsagePurpose::ServerAuth);
    let mut again = connect(&server.address(), held.clone())
        .await
        .expect("still taken");
    assert_eq!(ask(&mut again).await.expect("an answer"), "http/1.1 200 ok");
    put(&server, "ca.crt", &new);
    eventually("the old authority's certificates are refused", || {
        (code("admin"), code("of-new")) == (0, 200)
    });
    let mut rest = Vec::new();
    // Closed or reset: it ends.
    let _ = open.read_to_end(&mut rest).await;
    let refused = match connect(&server.address(), held.clone()).await {
        Ok(mut stream) => ask(&mut stream).await,
        Err(error) => Err(error),
    };
    assert!(refused.is_err(), "{refused:?}");
}
