//! Requests that go through to a kubelet; here to one that only knows a few answers, and one command: say everything back,
//! louder, and fail when told "fail".

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::api::AttachParams;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message};

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
    for root in CertificateDer::pem_file_iter(server.path("ca.crt")).expect("authorities") {
        roots.add(root.expect("one")).expect("a root");
    }
    Arc::new(roots)
}

/// Starts a kubelet on loopback that demands a client certificate, and returns its port.
async fn start_kubelet(server: &Server, asked: Asked) -> u16 {
    start_kubelet_as(server, asked, pem(server, "kubelet")).await
}

async fn start_kubelet_as(
    server: &Server,
    asked: Asked,
    (certificates, key): (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
) -> u16 {
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
                // The API server may not like our certificate.
                let Ok(stream) = acceptor.accept(stream).await else {
                    return;
                };
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
    let spdy = protocol.is_some_and(|protocol| protocol == "SPDY/3.1");
    if spdy
        && ["/exec", "/portForward"]
            .iter()
            .any(|known| path.starts_with(known))
    {
        let upgrade = hyper::upgrade::on(&mut request);
        let inner = request.headers().get("x-stream-protocol-version").cloned();
        let streams = inner
            .as_ref()
            .is_some_and(|inner| inner == "v4.channel.k8s.io");
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgrade.await.expect("an upgraded connection"));
            if streams {
                // Whoever is asked breaks off when the API server does.
                let _ = run_command(&mut stream).await;
                return;
            }
            let mut buffer = [0; 64];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                buffer[..read].make_ascii_uppercase();
                stream.write_all(&buffer[..read]).await.expect("written");
            }
        });
        let mut response = reply(StatusCode::SWITCHING_PROTOCOLS, "");
        if let Some(inner) = inner {
            response
                .headers_mut()
                .insert("x-stream-protocol-version", inner);
        }
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

/// The runtime's end of a command's SPDY connection, which takes streams as they come.
async fn run_command<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> std::io::Result<()> {
    let mut opened: Vec<(u32, String)> = Vec::new();
    let mut said = Vec::new();
    let id = |opened: &[(u32, String)], name: &str| {
        opened
            .iter()
            .find(|(_, known)| known == name)
            .map(|(id, _)| *id)
    };
    loop {
        let (first, second) = (stream.read_u32().await?, stream.read_u32().await?);
        let mut body = vec![0; (second & 0x00ff_ffff) as usize];
        stream.read_exact(&mut body).await?;
        if first == 0x8003_0001 {
            let number = u32::from_be_bytes(body[..4].try_into().expect("an id"));
            let text = String::from_utf8_lossy(&body).into_owned();
            let known = ["error", "stdin", "stdout", "stderr", "resize"];
            let name = known
                .iter()
                .find(|name| text.contains(**name))
                .expect("a kind of stream");
            opened.push((number, (*name).to_owned()));
            // SYN_REPLY, of which nobody reads the headers.
            for word in [0x8003_0002, 4, number] {
                stream.write_u32(word).await?;
            }
        } else if first == id(&opened, "stdin").expect("only standard input gets data") {
            said.extend_from_slice(&body);
            if second >> 24 == 1 {
                break;
            }
        }
    }
    let fails = said == b"fail";
    said.make_ascii_uppercase();
    let status = if fails {
        r#"{"metadata":{},"status":"Failure","reason":"NonZeroExitCode","message":"command terminated with non-zero exit code",
            "details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#
    } else {
        r#"{"metadata":{},"status":"Success"}"#
    };
    for (name, data) in [
        ("error", status.as_bytes()),
        ("stdout", &said),
        ("stderr", &[]),
    ] {
        let Some(id) = id(&opened, name) else {
            continue;
        };
        stream.write_u32(id).await?;
        stream.write_u32(1 << 24 | data.len() as u32).await?;
        stream.write_all(data).await?;
    }
    // Reads on until the API server has closed.
    while stream.read_u8().await.is_ok() {}
    Ok(())
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
    let log = "/api/v1/namespaces/default/pods/talker/log?container=c";
    for (protocol, expected) in [
        ("binary.k8s.io", Message::binary("one\ntwo\n")),
        ("base64.binary.k8s.io", Message::text("b25lCnR3bwo=")),
    ] {
        assert_eq!(websocket(&server, log, Some(protocol)).await, [expected]);
    }
    let watch = "/api/v1/nodes?watch=true&timeoutSeconds=1";
    let events = websocket(&server, watch, None).await;
    let event: serde_json::Value =
        serde_json::from_str(events[0].to_text().expect("text")).expect("an event");
    assert_eq!(
        (&event["type"], &event["object"]["metadata"]["name"]),
        (&"ADDED".into(), &"n1".into())
    );
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

#[tokio::test(flavor = "multi_thread")]
async fn a_kubelet_that_nobody_vouches_for_is_asked_only_when_the_caller_insists() {
    let server = Server::start();
    let key = rcgen::KeyPair::generate().expect("a key");
    let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .and_then(|params| params.self_signed(&key))
        .expect("a certificate");
    let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
    let own = (vec![certificate.der().clone()], key);
    let asked = Asked::default();
    let port = start_kubelet_as(&server, asked.clone(), own).await;
    place_pod(&server, port);
    let said = server.kubectl_fails("logs talker -c c", "");
    assert!(said.contains("cannot reach the kubelet"), "{said}");
    let logs = server.kubectl("logs talker -c c --insecure-skip-tls-verify-backend");
    assert_eq!(logs, "one\ntwo\n");
    let (_, certificate) = asked.lock().expect("asked")[0].clone();
    assert!(certificate > 0, "the API server still shows who it is");
}

/// What the administrator's client is made of; it takes sessions up again where the server lets it.
pub fn administrator(server: &Server) -> Arc<rustls::ClientConfig> {
    let (certificates, key) = pem(server, "admin");
    let config = rustls::ClientConfig::builder()
        .with_root_certificates(roots(server))
        .with_client_auth_cert(certificates, key);
    Arc::new(config.expect("a configuration"))
}

pub async fn connect(
    address: &str,
    config: Arc<rustls::ClientConfig>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("127.0.0.1").expect("a name");
    TlsConnector::from(config).connect(name, stream).await
}

/// A connection of the administrator to the API server, and its address.
pub async fn connected(server: &Server) -> (TlsStream<TcpStream>, String) {
    let address = server.address();
    let stream = connect(&address, administrator(server)).await;
    (stream.expect("connected"), address)
}

/// What comes over a WebSocket until the server closes it.
async fn websocket(server: &Server, path: &str, protocol: Option<&'static str>) -> Vec<Message> {
    let (stream, address) = connected(server).await;
    let url = format!("wss://{address}{path}");
    let mut request = url.into_client_request().expect("a request");
    if let Some(protocol) = protocol {
        let name = header::SEC_WEBSOCKET_PROTOCOL;
        let protocol = http::HeaderValue::from_static(protocol);
        request.headers_mut().insert(name, protocol);
    }
    let (mut socket, answer) = tokio_tungstenite::client_async(request, stream)
        .await
        .expect("a WebSocket");
    let agreed = answer.headers().get(header::SEC_WEBSOCKET_PROTOCOL);
    assert_eq!(
        agreed.map(|agreed| agreed.to_str().ok()),
        protocol.map(Some)
    );
    let mut heard = Vec::new();
    while let Some(Ok(message)) = socket.next().await {
        if !message.is_close() {
            heard.push(message);
        }
    }
    heard
}

/// Asks the API server to upgrade an exec, and returns the connection and the first line of the answer.
async fn upgrade(server: &Server, protocol: &str) -> (TlsStream<TcpStream>, String) {
    let (mut stream, address) = connected(server).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_runs_a_command_of_which_the_input_can_end() {
    let server = Server::start();
    let asked = Asked::default();
    let port = start_kubelet(&server, asked.clone()).await;
    place_pod(&server, port);
    let pods: kube::Api<Pod> = kube::Api::default_namespaced(server.client().await);
    for (input, output, succeeds) in [("hello", "HELLO", true), ("fail", "FAIL", false)] {
        let parameters = AttachParams::default()
            .container("c")
            .stdin(true)
            .stderr(false);
        let mut process = pods
            .exec("talker", ["shout"], &parameters)
            .await
            .expect("a process");
        let mut stdin = process.stdin().expect("its input");
        stdin.write_all(input.as_bytes()).await.expect("written");
        stdin.shutdown().await.expect("the end of the input");
        drop(stdin);
        let mut said = String::new();
        let mut stdout = process.stdout().expect("its output");
        stdout.read_to_string(&mut said).await.expect("read");
        assert_eq!(said, output);
        let status = process
            .take_status()
            .expect("one waiter")
            .await
            .expect("a status");
        assert_eq!(
            status.status.as_deref() == Some("Success"),
            succeeds,
            "{status:?}"
        );
    }
    let first = asked.lock().expect("asked")[0].0.clone();
    assert_eq!(
        first,
        "POST /exec/default/talker/c?command=shout&input=1&output=1"
    );
    // kubectl tells the exit code of the command by its own.
    let words = ["exec", "-i", "talker", "-c", "c", "--", "shout"];
    let failed = server.kubectl_with(&words, "fail");
    assert_eq!(failed.status.code(), Some(7), "{failed:?}");
    assert_eq!(
        crate::server::text(&server.kubectl_with(&words, "hello").stdout),
        "HELLO"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_carries_port_forwards_and_is_refused_with_a_status() {
    let server = Server::start();
    let port = start_kubelet(&server, Asked::default()).await;
    place_pod(&server, port);
    let open = async |path: &str, protocol: &str| {
        let (stream, address) = connected(&server).await;
        let url = format!("wss://{address}/api/v1/namespaces/default/pods/talker/{path}");
        let mut request = url.into_client_request().expect("a request");
        let protocol = protocol.parse().expect("a value");
        request
            .headers_mut()
            .insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
        tokio_tungstenite::client_async(request, stream).await
    };
    let (mut socket, answer) = open("portforward", "SPDY/3.1+portforward.k8s.io")
        .await
        .expect("a WebSocket");
    assert_eq!(
        answer.headers()[header::SEC_WEBSOCKET_PROTOCOL],
        "SPDY/3.1+portforward.k8s.io"
    );
    socket
        .send(Message::Binary(Bytes::from_static(b"bytes")))
        .await
        .expect("sent");
    let heard = socket.next().await.expect("a message").expect("a good one");
    assert_eq!(heard, Message::Binary(Bytes::from_static(b"BYTES")));
    for (path, code, message) in [
        ("attach?container=c&stdout=true", 403, "no such protocol"),
        (
            "attach?container=c",
            400,
            "at least 1 of stdin, stdout, stderr",
        ),
        ("exec?container=c&stdout=true", 400, "at least 1 command"),
        (
            "exec?container=x&stdout=true&command=sh",
            400,
            "container x is not valid for pod talker",
        ),
    ] {
        match open(path, "v5.channel.k8s.io").await {
            Err(WebSocketError::Http(answer)) => {
                let body = answer.body().clone().unwrap_or_default();
                let status: serde_json::Value = serde_json::from_slice(&body).expect("a Status");
                let said = status["message"].as_str().expect("a message");
                assert_eq!(answer.status(), code, "{path}: {said}");
                assert!(said.contains(message), "{path}: {said}");
            }
            other => panic!("{path}: {:?}", other.map(|(_, answer)| answer)),
        }
    }
}

#[test]
fn options_of_logs_that_make_no_sense_are_refused() {
    let server = Server::start();
    place_pod(&server, 1);
    for (query, message) in [
        (
            "tailLines=-1",
            "tailLines: Invalid value: -1: must be greater than or equal to 0",
        ),
        (
            "limitBytes=0",
            "limitBytes: Invalid value: 0: must be greater than 0",
        ),
        (
            "sinceSeconds=5&sinceTime=2026-01-01T00:00:00Z",
            "at most one of `sinceTime` or `sinceSeconds`",
        ),
        ("stream=Stdin", r#"stream: Unsupported value: "Stdin""#),
        ("stream=Stdout&tailLines=1", "mutually exclusive"),
    ] {
        let (code, status) = server.raw(&format!(
            "/api/v1/namespaces/default/pods/talker/log?container=c&{query}"
        ));
        let said = status["message"].as_str().expect("a message");
        assert_eq!(code, 422, "{said}");
        assert!(said.contains(message), "{said}");
    }
}
