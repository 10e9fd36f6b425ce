//! echo: tells over HTTP and UDP which pod answered whom. It is what examples and tests look at, so it ends the way a
//! good server does: after SIGTERM it says that it is not ready, serves on while that news spreads, lets
//! requests in flight finish, and only then exits.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Parser;
use http::header::{CONNECTION, CONTENT_TYPE};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, UdpSocket};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(
    about = "Answers HTTP and UDP with the names of its pod and node and the client's address"
)]
struct Flags {
    /// Where HTTP is served; /healthz and /readyz are for probes, every other path answers
    #[arg(long, default_value = "[::]:80")]
    http: SocketAddr,
    /// Where datagrams are answered
    #[arg(long, default_value = "[::]:80")]
    udp: SocketAddr,
    /// How long to serve on after SIGTERM while readiness fails
    #[arg(long, default_value_t = 3000)]
    drain_ms: u64,
    /// How long requests in flight may take after that
    #[arg(long, default_value_t = 10_000)]
    finish_ms: u64,
    #[arg(long, env = "POD_NAME", default_value = "", hide_default_value = true)]
    pod: String,
    #[arg(long, env = "NODE_NAME", default_value = "", hide_default_value = true)]
    node: String,
}

/// Who answers, and whether it is on its way out.
struct Identity {
    pod: String,
    node: String,
    draining: AtomicBool,
}

impl Identity {
    fn answer(&self, client: SocketAddr) -> String {
        let client = SocketAddr::new(client.ip().to_canonical(), client.port());
        format!("pod={} node={} client={client}\n", self.pod, self.node)
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let flags = Flags::parse();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listener = TcpListener::bind(flags.http)
        .await
        .with_context(|| format!("cannot serve HTTP on {}", flags.http))?;
    let socket = UdpSocket::bind(flags.udp)
        .await
        .with_context(|| format!("cannot serve UDP on {}", flags.udp))?;
    let identity = Arc::new(Identity {
        pod: or_hostname(flags.pod),
        node: flags.node,
        draining: AtomicBool::new(false),
    });
    log(format_args!(
        "echo: pod {} on node {:?} serves HTTP on {} and UDP on {}",
        identity.pod, identity.node, flags.http, flags.udp
    ));
    tokio::spawn(serve_udp(socket, identity.clone()));

    let connections = GracefulShutdown::new();
    let serving = serve_http(listener, &identity, &connections);
    let ended = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        log(format_args!("echo: draining for {} ms", flags.drain_ms));
        identity.draining.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(flags.drain_ms)).await;
    };
    tokio::select! {
        () = serving => {}
        () = ended => {}
    }
    // The listener is closed now. Connections without a request in flight close at once.
    let finished = tokio::time::timeout(
        Duration::from_millis(flags.finish_ms),
        connections.shutdown(),
    )
    .await;
    match finished {
        Ok(()) => log(format_args!("echo: done")),
        Err(_) => log(format_args!(
            "echo: requests still in flight after {} ms are cut",
            flags.finish_ms
        )),
    }
    Ok(())
}

/// Accepts until it is dropped, and the listener with it.
async fn serve_http(
    listener: TcpListener,
    identity: &Arc<Identity>,
    connections: &GracefulShutdown,
) {
    loop {
        let (stream, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Too many open files, most likely: others must end before a next one can begin.
                log(format_args!("echo: cannot accept: {error}"));
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        // Small answers are not to wait for more of them. A peer that is gone already shows later.
        let _ = stream.set_nodelay(true);
        let identity = identity.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let identity = identity.clone();
            async move { Ok::<_, Infallible>(respond(&identity, request, client).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            // A client may close its side once it has asked, as nc does.
            .half_close(true)
            .header_read_timeout(Duration::from_secs(60))
            .serve_connection(TokioIo::new(stream), service);
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            // A client that went away is the client's business.
            let _ = connection.await;
        });
    }
}

async fn respond(
    identity: &Identity,
    request: Request<Incoming>,
    client: SocketAddr,
) -> Response<Full<Bytes>> {
    let (head, mut body) = request.into_parts();
    // A request is over when its body is; an error shows again when the answer is sent.
    while let Some(Ok(_)) = body.frame().await {}
    let (status, body) = match (head.uri.path(), identity.is_draining()) {
        ("/healthz", _) => (StatusCode::OK, "ok\n".to_owned()),
        ("/readyz", false) => (StatusCode::OK, "ready\n".to_owned()),
        ("/readyz", true) => (StatusCode::SERVICE_UNAVAILABLE, "draining\n".to_owned()),
        _ => (StatusCode::OK, identity.answer(client)),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        http::HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    if identity.is_draining() {
        // Clients that keep connections must open the next one elsewhere.
        headers.insert(CONNECTION, http::HeaderValue::from_static("close"));
    }
    response
}

async fn serve_udp(socket: UdpSocket, identity: Arc<Identity>) {
    let mut datagram = [0; 2048];
    loop {
        match socket.recv_from(&mut datagram).await {
            Ok((_, client)) => {
                // A lost answer to a datagram is a lost datagram.
                let _ = socket
                    .send_to(identity.answer(client).as_bytes(), client)
                    .await;
            }
            Err(error) => log(format_args!("echo: cannot receive: {error}")),
        }
    }
}

/// A line for whoever reads the log. When nobody does any more, serving goes on.
fn log(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// In a pod the host name is the pod's name.
fn or_hostname(pod: String) -> String {
    if !pod.is_empty() {
        return pod;
    }
    nix::unistd::gethostname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}
