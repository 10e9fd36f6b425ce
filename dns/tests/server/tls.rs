//! Upstreams that are asked over TLS (RFC 7858): by their name and nobody else's.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use keelway_dns::config::spec::TlsSpec;
use rustls_pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use crate::support::*;

/// A server for `name` that answers one address, with a file that vouches for it, and its connections counted.
async fn start(
    name: &str,
    folder: &std::path::Path,
) -> (std::net::SocketAddr, PathBuf, Arc<AtomicUsize>) {
    let key = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
    let file = folder.join("ca.pem");
    std::fs::write(&file, key.cert.pem()).expect("written");
    let private = PrivateKeyDer::try_from(key.signing_key.serialize_der()).expect("a key");
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![key.cert.der().clone()], private)
        .expect("a configuration");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let server = listener.local_addr().expect("an address");
    let connections = Arc::new(AtomicUsize::new(0));
    let count = connections.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, count) = (acceptor.clone(), count.clone());
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                count.fetch_add(1, Ordering::SeqCst);
                while let Ok(length) = stream.read_u16().await {
                    let mut wire = vec![0; usize::from(length)];
                    if stream.read_exact(&mut wire).await.is_err() {
                        return;
                    }
                    let query = hickory_proto::op::Message::from_vec(&wire).expect("a query");
                    let records = vec![address(&query, 0, [192, 0, 2, 7])];
                    let answer = reply(&query, ResponseCode::NoError, records)
                        .to_vec()
                        .expect("an answer");
                    if stream.write_all(&framed(&answer)).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (server, file, connections)
}

#[tokio::test]
async fn an_upstream_by_tls_is_asked_over_one_connection_and_only_under_its_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (upstream, authorities, connections) = start("dns.example", folder.path()).await;
    let with_name = |name: &str| {
        let mut spec = spec(&[upstream]);
        spec.blocks[0].routes[0].servers[0].tls = Some(TlsSpec {
            name: name.into(),
            authorities: Some(authorities.clone()),
            own: None,
        });
        spec
    };
    let (_, server) = serve(with_name("dns.example"), &cluster(0)).await;
    for number in 0..5 {
        let asked = query(&format!("n{number}.example.org."), RecordType::A);
        assert_eq!(data(&udp(server, &asked).await), ["192.0.2.7"]);
    }
    // One for the questions, one for the look for loops that goes on beside them.
    assert!(connections.load(Ordering::SeqCst) <= 2);
    let (_, server) = serve(with_name("other.example"), &cluster(0)).await;
    let answer = udp(server, &query("www.example.org.", RecordType::A)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
}
