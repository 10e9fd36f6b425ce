//! An HTTP proxy for the nodes' containerds: tunnels (CONNECT) for what is encrypted, requests passed on for what is not.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::accepted;
use super::names::{self, authority};

/// Connections of nodes at a time; those beyond wait to be accepted.
const CONNECTIONS_MAX: usize = 256;
/// How long the head of a request may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Headers that are between one client and one server (RFC 9110, 7.6.1).
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// Held as long as a connection or its tunnel lives.
type Place = Arc<OwnedSemaphorePermit>;

type Body = BoxBody<Bytes, hyper::Error>;

/// The proxy, and who may use it.
#[derive(Debug, Clone)]
pub struct Proxy {
    clients: Arc<BTreeSet<IpAddr>>,
}

impl Proxy {
    /// A proxy for these addresses alone. Pods have others: what they may reach is `--egress`.
    pub fn new(clients: impl IntoIterator<Item = IpAddr>) -> Self {
        Self {
            clients: Arc::new(clients.into_iter().collect()),
        }
    }

    /// Serves for ever.
    pub async fn serve(self, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            let (stream, peer) = accepted(&listener, "proxy").await;
            let proxy = self.clone();
            let allowed = self.clients.contains(&peer.ip().to_canonical());
            tokio::spawn(async move {
                proxy.connection(stream, allowed, Arc::new(place)).await;
            });
        }
    }

    async fn connection(&self, stream: TcpStream, allowed: bool, place: Place) {
        let _ = stream.set_nodelay(true);
        let place = &place;
        let service = service_fn(move |request| async move {
            Ok::<_, std::convert::Infallible>(if allowed {
                self.answer(request, place).await
            } else {
                say(StatusCode::FORBIDDEN, "this proxy is for the nodes")
            })
        });
        // A connection that breaks is the client's to notice.
        let _ = hyper::server::conn::http1::Builder::new()
            .preserve_header_case(true)
            // A client may close its side once it has asked, as nc does. By default the answer would be lost if the end is read first.
            .half_close(true)
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await;
    }

    async fn answer(&self, request: Request<Incoming>, place: &Place) -> Response<Body> {
        if request.method() == Method::CONNECT {
            self.tunnel(request, place.clone()).await
        } else {
            self.pass_on(request).await
        }
    }

    async fn tunnel(&self, request: Request<Incoming>, place: Place) -> Response<Body> {
        let target = request.uri().authority().map_or("", |name| name.as_str());
        let (host, port) = match authority(target, None) {
            Ok(target) => target,
            Err(error) => return say(StatusCode::BAD_REQUEST, error),
        };
        let mut server = match names::connect(&host, port).await {
            Ok(server) => server,
            Err(error) => return refuse(error),
        };
        tokio::spawn(async move {
            // A tunnel outlives the connection's own task, and still is one of those that are counted.
            let _place = place;
            if let Ok(client) = hyper::upgrade::on(request).await {
                let mut client = TokioIo::new(client);
                // Either end may close or break at any time; so it does for the other.
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            }
        });
        Response::new(empty())
    }

    async fn pass_on(&self, mut request: Request<Incoming>) -> Response<Body> {
        if request.uri().scheme() != Some(&http::uri::Scheme::HTTP) {
            let why = "a proxy is asked for http:// addresses, or to CONNECT";
            return say(StatusCode::BAD_REQUEST, why);
        }
        let target = request.uri().authority().map_or("", |name| name.as_str());
        let (target, (host, port)) = match authority(target, Some(80)) {
            Ok(parts) => (target.to_owned(), parts),
            Err(error) => return say(StatusCode::BAD_REQUEST, error),
        };
        let server = match names::connect(&host, port).await {
            Ok(server) => server,
            Err(error) => return refuse(error),
        };
        let (mut sender, connection) =
            match hyper::client::conn::http1::handshake(TokioIo::new(server)).await {
                Ok(pair) => pair,
                Err(error) => return refuse(error),
            };
        tokio::spawn(connection);
        let path = request
            .uri()
            .path_and_query()
            .map_or("/", |path| path.as_str());
        let (path, name) = (path.parse::<Uri>(), target.parse::<HeaderValue>());
        let (Ok(path), Ok(name)) = (path, name) else {
            return say(StatusCode::BAD_REQUEST, "the address cannot be passed on");
        };
        *request.uri_mut() = path;
        drop_hop_by_hop(request.headers_mut());
        request.headers_mut().insert(header::HOST, name);
        match sender.send_request(request).await {
            Ok(mut response) => {
                drop_hop_by_hop(response.headers_mut());
                response.map(BodyExt::boxed)
            }
            Err(error) => refuse(error),
        }
    }
}

fn drop_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed()
}

fn say(status: StatusCode, why: impl std::fmt::Display) -> Response<Body> {
    let text = Full::from(format!("{why}\n"));
    let mut response = Response::new(text.map_err(|never| match never {}).boxed());
    *response.status_mut() = status;
    response
}

/// The server is not reached. The client shows no more than the status, so the log has the reason.
fn refuse(error: impl std::fmt::Display) -> Response<Body> {
    eprintln!("proxy: {error}");
    say(StatusCode::BAD_GATEWAY, error)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A proxy for `clients` on the loopback, and a server that repeats what it gets, then says "end".
    async fn proxy(clients: &[&str]) -> (std::net::SocketAddr, u16) {
        let local = "127.0.0.1:0";
        let listener = TcpListener::bind(local).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let clients = clients.iter().map(|ip| ip.parse().expect("an address"));
        tokio::spawn(Proxy::new(clients.collect::<Vec<IpAddr>>()).serve(listener));
        let server = TcpListener::bind(local).await.expect("a port");
        let port = server.local_addr().expect("an address").port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = server.accept().await {
                let mut got = vec![0; 4096];
                let length = stream.read(&mut got).await.expect("a request");
                got.truncate(length);
                let text = String::from_utf8_lossy(&got);
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\nKeep-Alive: 5\r\n\r\n",
                    text.len()
                );
                let answer = [head.as_bytes(), text.as_bytes()].concat();
                stream.write_all(&answer).await.expect("an answer");
            }
        });
        (address, port)
    }

    async fn ask(proxy: std::net::SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(proxy).await.expect("connected");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        let read = tokio::time::timeout(Duration::from_secs(10), read).await;
        read.expect("an answer in time").expect("text");
        answer
    }

    #[tokio::test]
    async fn plain_requests_are_passed_on_without_what_is_the_proxys() {
        let (proxy, port) = proxy(&["127.0.0.1"]).await;
        let answer = ask(
            proxy,
            &format!(
                "GET http://registry.localhost:{port}/v2/?x=1 HTTP/1.1\r\nHost: other\r\nAccept: a/b\r\n\
                 Proxy-Connection: keep-alive\r\nX-Own: 1\r\nConnection: close, X-Own\r\n\r\n"
            ),
        )
        .await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(!answer.contains("Keep-Alive"), "{answer}");
        let seen = answer.to_ascii_lowercase();
        assert!(seen.contains("get /v2/?x=1 http/1.1\r\n"), "{seen}");
        assert!(
            seen.contains(&format!("host: registry.localhost:{port}\r\n")),
            "{seen}"
        );
        assert!(seen.contains("accept: a/b\r\n"), "{seen}");
        assert!(
            !seen.contains("proxy-connection") && !seen.contains("x-own"),
            "{seen}"
        );
    }

    #[tokio::test]
    async fn a_tunnel_carries_bytes_both_ways() {
        let (proxy, port) = proxy(&["127.0.0.1"]).await;
        let mut stream = TcpStream::connect(proxy).await.expect("connected");
        let connect = format!("CONNECT registry.localhost:{port} HTTP/1.1\r\nHost: x\r\n\r\n");
        stream.write_all(connect.as_bytes()).await.expect("sent");
        let mut head = vec![0; "HTTP/1.1 200 OK\r\n".len()];
        stream.read_exact(&mut head).await.expect("an answer");
        assert_eq!(head, b"HTTP/1.1 200 OK\r\n");
        let mut rest = Vec::new();
        while !rest.ends_with(b"\r\n\r\n") {
            rest.push(stream.read_u8().await.expect("the head's end"));
        }
        stream
            .write_all(b"\x16\x03\x01 not HTTP at all")
            .await
            .expect("sent");
        let mut answer = Vec::new();
        stream
            .read_to_end(&mut answer)
            .await
            .expect("the server closes");
        assert!(answer.ends_with(b"\x16\x03\x01 not HTTP at all"));
    }

    #[tokio::test]
    async fn what_cannot_be_done_is_said() {
        let (proxy, _) = proxy(&["127.0.0.1"]).await;
        let free = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let closed = free.local_addr().expect("an address").port();
        drop(free);
        for (request, status, why) in [
            (
                format!("CONNECT 127.0.0.1:{closed} HTTP/1.1\r\nHost: x\r\n\r\n"),
                "502",
                "cannot connect to 127.0.0.1",
            ),
            (
                "CONNECT nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_owned(),
                "400",
                "no host and port",
            ),
            (
                "GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
                "400",
                "is asked for http://",
            ),
            (
                "GET ftp://a.localhost/ HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
                "400",
                "is asked for http://",
            ),
        ] {
            let request = request.replace("Host: x\r\n", "Host: x\r\nConnection: close\r\n");
            let answer = ask(proxy, &request).await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{request}: {answer}"
            );
            assert!(answer.contains(why), "{request}: {answer}");
        }
    }

    #[tokio::test]
    async fn who_closes_its_side_with_the_request_is_still_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        // Request and end are both there before anything is read.
        let mut streams = Vec::new();
        for _ in 0..50 {
            let mut stream = TcpStream::connect(address).await.expect("connected");
            let request = b"CONNECT a.example:1 HTTP/1.1\r\nHost: x\r\n\r\n";
            stream.write_all(request).await.expect("sent");
            stream.shutdown().await.expect("closed");
            streams.push(stream);
        }
        tokio::spawn(Proxy::new([]).serve(listener));
        for mut stream in streams {
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("text");
            assert!(answer.starts_with("HTTP/1.1 403 "), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn others_than_nodes_are_refused() {
        let (proxy, port) = proxy(&["198.18.0.11"]).await;
        let request = format!("CONNECT 127.0.0.1:{port} HTTP/1.1\r\nConnection: close\r\n\r\n");
        let answer = ask(proxy, &request).await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    }
}
