//! Requests that go through to a kubelet; here to one that only knows a few answers.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::server::Server;

/// What the kubelet was asked: method, path with query, and the caller's certificate in bytes.
type Asked = Arc<Mutex<Vec<(String, usize)>>>;

fn pem(server: &Server, name: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let certificate =
        CertificateDer::from_pem_file(server.path(&format!("{name}.crt"))).expect("a certificate");
    (
        vec![certificate],
        PrivateKeyDer::from_pem_file(server.path(&format!("{name}.key"))).expect("a key"),
    )
}

fn roots(server: &Server) -> Arc<rustls::RootCertStore> {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(server.path("ca.crt")).expect("the CA"))
        .expect("a root");
    Arc::new(roots)
}

/// Starts a kubelet on loopback that demands a client certificate, and returns its port.
async fn start_kubelet(server: &Server, asked: Asked) -> u16 {
    let (certificates, key) = pem(server, "kubelet");
    let verifier = WebPkiClientVerifier::builder(roots(server))
        .build()
        .expect("a verifier");
    let config = rustls::ServerConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates, key)
        .expect("a configuration");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("its address").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, asked) = (acceptor.clone(), asked.clone());
            tokio::spawn(async move {
                let stream = acceptor
                    .accept(stream)
                    .await
                    .expect("the API server shows its certificate");
                let certificate = stream
                    .get_ref()
                    .1
                    .peer_certificates()
                    .map_or(0, |c| c[0].len());
                let service =
                    service_fn(move |request| answer(request, asked.clone(), certificate));
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                let _ = connection.with_upgrades().await;
            });
        }
    });
    port
}

async fn answer(
    mut request: Request<Incoming>,
    asked: Asked,
    certificate: usize,
) -> Result<Response<Full<Bytes>>, std::convert::Infallible> {
    let path = request
        .uri()
        .path_and_query()
        .map_or(String::new(), ToString::to_string);
    asked
        .lock()
        .expect("asked")
        .push((format!("{} {path}", request.method()), certificate));
    assert!(
        request.headers().get(header::AUTHORIZATION).is_none(),
        "credentials end at the API server"
    );
    let reply = |code: StatusCode, text: &str| {
        let mut response = Response::new(Full::from(text.to_owned()));
        *response.status_mut() = code;
        response
    };
    if path.starts_with("/containerLogs/default/talker/c") {
        return Ok(reply(StatusCode::OK, "one\ntwo\n"));
    }
    if path.starts_with("/containerLogs") {
        return Ok(reply(
            StatusCode::BAD_REQUEST,
            "container \"d\" in pod \"talker\" is waiting to start: ContainerCreating",
        ));
    }
    let protocol = request.headers().get(header::UPGRADE).cloned();
    if path.starts_with("/exec")
        && protocol
            .as_ref()
            .is_some_and(|protocol| protocol == "SPDY/3.1")
    {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            // Says everything back, louder.
            let mut stream = TokioIo::new(upgrade.await.expect("an upgraded connection"));
            let mut buffer = [0; 64];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                buffer[..read].make_ascii_uppercase();
                stream.write_all(&buffer[..read]).await.expect("written");
            }
        });
        let mut response = reply(StatusCode::SWITCHING_PROTOCOLS, "");
        response
            .headers_mut()
            .insert(header::CONNECTION, "Upgrade".parse().expect("a value"));
        response
            .headers_mut()
            .insert(header::UPGRADE, "SPDY/3.1".parse().expect("a value"));
        return Ok(response);
    }
    Ok(reply(StatusCode::FORBIDDEN, "no such protocol"))
}

fn place_pod(server: &Server, port: u16) {
    let node = format!(
        r#"{{"apiVersion": "v1", "kind": "Node", "metadata": {{"name": "n1"}}, "status": {{
            "addresses": [{{"type": "InternalIP", "address": "127.0.0.1"}}],
            "daemonEndpoints": {{"kubeletEndpoint": {{"Port": {port}}}}}}}}}"#
    );
    server.kubectl_in("create -f -", &node);
    server.kubectl("create serviceaccount default");
    let pod = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "talker"}, "spec": {"nodeName": "n1",
        "containers": [{"name": "c", "image": "i"}, {"name": "d", "image": "i"}]}}"#;
    server.kubectl_in("create -f -", pod);
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_come_from_the_kubelet_and_so_do_its_complaints() {
    let server = Server::start();
    let asked = Asked::default();
    let port = start_kubelet(&server, asked.clone()).await;
    place_pod(&server, port);
    assert_eq!(server.kubectl("logs talker -c c --tail=5"), "one\ntwo\n");
    let (request, certificate) = asked.lock().expect("asked")[0].clone();
    assert_eq!(request, "GET /containerLogs/default/talker/c?tailLines=5");
    assert!(certificate > 0, "the API server shows who it is");
    let said = server.kubectl_fails("logs talker -c d", "");
    assert!(
        said.contains("(BadRequest): container \"d\" in pod \"talker\" is waiting to start"),
        "{said}"
    );
    let said = server.kubectl_fails("get --raw /api/v1/namespaces/default/pods/talker/log", "");
    assert!(
        said.contains("a container name must be specified for pod talker, choose one of: [c d]"),
        "{said}"
    );
}

/// Asks the API server to upgrade an exec, and returns the connection and the first line of the answer.
async fn upgrade(
    server: &Server,
    protocol: &str,
) -> (tokio_rustls::client::TlsStream<TcpStream>, String) {
    let (certificates, key) = pem(server, "admin");
    let config = rustls::ClientConfig::builder()
        .with_root_certificates(roots(server))
        .with_client_auth_cert(certificates, key)
        .expect("a configuration");
    let address = server.url().trim_start_matches("https://").to_owned();
    let stream = TcpStream::connect(&address).await.expect("connected");
    let name = ServerName::try_from("127.0.0.1").expect("a name");
    let mut stream = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .expect("TLS");
    let path = "/api/v1/namespaces/default/pods/talker/exec?container=c&command=sh&command=-c&command=a%20b&stdin=true&stdout=true";
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("an answer"));
    }
    let head = String::from_utf8(head).expect("text");
    (stream, head.lines().next().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgraded_connection_is_passed_on_byte_for_byte_and_a_refusal_is_passed_back() {
    let server = Server::start();
    let asked = Asked::default();
    let port = start_kubelet(&server, asked.clone()).await;
    place_pod(&server, port);
    let (mut stream, first) = upgrade(&server, "SPDY/3.1").await;
    assert_eq!(first, "HTTP/1.1 101 Switching Protocols");
    assert_eq!(
        asked.lock().expect("asked")[0].0,
        "POST /exec/default/talker/c?command=sh&command=-c&command=a%20b&input=1&output=1"
    );
    for word in ["hello", "again"] {
        stream.write_all(word.as_bytes()).await.expect("sent");
        let mut heard = [0; 5];
        stream.read_exact(&mut heard).await.expect("said back");
        assert_eq!(heard, word.to_ascii_uppercase().as_bytes());
    }
    let (_, first) = upgrade(&server, "websocket").await;
    assert_eq!(
        first, "HTTP/1.1 403 Forbidden",
        "kubectl tries its next protocol then"
    );
}
