//! The authority of the cluster's certificates, replaced while the API server runs.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::server::Server;
use crate::wire::eventually;

const PATH: &str = "/api/v1/namespaces/default";

fn named(name: &str, organization: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let said = [
        (DnType::CommonName, name),
        (DnType::OrganizationName, organization),
    ];
    for (kind, value) in said {
        params.distinguished_name.push(kind, value);
    }
    params
}

/// Replaces a file of the server's credentials, whole or not at all.
fn put(server: &Server, name: &str, text: &str) {
    let new = server.path("put");
    std::fs::write(&new, text).expect("a file");
    std::fs::rename(&new, server.path(name)).expect("in its place");
}

/// What the administrator's client is made of; it takes sessions up again where the server lets it.
fn client(server: &Server) -> Arc<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(server.path("ca.crt")).expect("authorities") {
        roots.add(root.expect("one")).expect("an authority");
    }
    let chain = CertificateDer::pem_file_iter(server.path("admin.crt")).expect("a certificate");
    let chain = chain.collect::<Result<Vec<_>, _>>().expect("a chain");
    let key = PrivateKeyDer::from_pem_file(server.path("admin.key")).expect("a key");
    let config = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key);
    Arc::new(config.expect("a configuration"))
}

async fn connect(
    server: &Server,
    config: &Arc<rustls::ClientConfig>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let address = server.url().trim_start_matches("https://").to_owned();
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("127.0.0.1").expect("a name");
    TlsConnector::from(config.clone())
        .connect(name, stream)
        .await
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
    let mut authority = named("new-ca", "test");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let new = authority.self_signed(&key).expect("an authority").pem();
    let issuer = Issuer::new(authority, key);
    let sign = |file: &str, mut params: CertificateParams, usage: ExtendedKeyUsagePurpose| {
        params.extended_key_usages = vec![usage];
        let loopback = SanType::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
        params.subject_alt_names.push(loopback);
        let key = KeyPair::generate().expect("a key");
        let signed = params.signed_by(&key, &issuer).expect("a certificate");
        put(&server, &format!("{file}.key"), &key.serialize_pem());
        put(&server, &format!("{file}.crt"), &signed.pem());
    };
    let masters = named("admin", "system:masters");
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
    let held = client(&server);
    let mut open = connect(&server, &held).await.expect("connected");
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
    let serving = named("kube-apiserver", "test");
    sign("apiserver", serving, ExtendedKeyUsagePurpose::ServerAuth);
    let mut again = connect(&server, &held).await.expect("still taken");
    assert_eq!(ask(&mut again).await.expect("an answer"), "http/1.1 200 ok");
    put(&server, "ca.crt", &new);
    eventually("the old authority's certificates are refused", || {
        (code("admin"), code("of-new")) == (0, 200)
    });
    let mut rest = Vec::new();
    // Closed or reset: it ends.
    let _ = open.read_to_end(&mut rest).await;
    let refused = match connect(&server, &held).await {
        Ok(mut stream) => ask(&mut stream).await,
        Err(error) => Err(error),
    };
    assert!(refused.is_err(), "{refused:?}");
}
