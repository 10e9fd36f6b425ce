//! The servers behind the ports.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cluster_model::ServiceKey;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::{HealthOp, ProxyHealth};
use crate::metrics::Measures;

/// The longest pause before a port that could not be had is tried again.
const RETRY: Duration = Duration::from_secs(5);
const RETRY_FIRST: Duration = Duration::from_millis(10);
/// Pauses grow to this before anybody is told.
const PATIENCE: Duration = Duration::from_millis(160);
/// How long a client may take to ask.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const BACKLOG: u32 = 1024;
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");
const NOSNIFF: HeaderName = HeaderName::from_static("x-content-type-options");

/// What a server says when it cannot listen, and when it can again.
#[derive(Clone, Debug)]
pub struct Complaint {
    pub service: ServiceKey,
    pub port: u16,
    /// Absent when all is well again.
    pub error: Option<String>,
}

type Complain = Arc<dyn Fn(Complaint) + Send + Sync>;

/// The health check servers that are open.
pub struct Servers {
    runtime: Handle,
    health: Arc<ProxyHealth>,
    complain: Complain,
    open: BTreeMap<u16, Server>,
}

struct Server {
    local_endpoints: Arc<AtomicU32>,
    serving: AbortHandle,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Servers {
    pub fn new(
        runtime: Handle,
        health: Arc<ProxyHealth>,
        complain: impl Fn(Complaint) + Send + Sync + 'static,
    ) -> Self {
        Self {
            runtime,
            health,
            complain: Arc::new(complain),
            open: BTreeMap::new(),
        }
    }

    /// Carries out a change. Listening itself happens beside, and is tried again for as long as it is wished.
    pub fn apply(&mut self, op: HealthOp) {
        match op {
            HealthOp::Open {
                port,
                service,
                local_endpoints,
            } => {
                // The old one lets go of the port first.
                self.open.remove(&port);
                let count = Arc::new(AtomicU32::new(local_endpoints));
                let answers = ServiceAnswers {
                    service: service.clone(),
                    local_endpoints: count.clone(),
                    health: self.health.clone(),
                };
                let complain = self.complain.clone();
                let say = move |error: Option<&io::Error>| {
                    complain(Complaint {
                        service: service.clone(),
                        port,
                        error: error.map(ToString::to_string),
                    });
                };
                let serving = self.runtime.spawn(async move {
                    let (mut pause, mut complained) = (RETRY_FIRST, false);
                    let listener = loop {
                        match listen_everywhere(port) {
                            Ok(listener) => break listener,
                            // The port's last server may be ending just now.
                            Err(error) if pause >= PATIENCE && !complained => {
                                say(Some(&error));
                                complained = true;
                            }
                            Err(_) => {}
                        }
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(RETRY);
                    };
                    if complained {
                        say(None);
                    }
                    accept(listener, move |_| std::future::ready(answers.answer())).await;
                });
                let server = Server {
                    local_endpoints: count,
                    serving: serving.abort_handle(),
                };
                self.open.insert(port, server);
            }
            HealthOp::Set {
                port,
                local_endpoints,
            } => {
                if let Some(server) = self.open.get(&port) {
                    server
                        .local_endpoints
                        .store(local_endpoints, Ordering::Relaxed);
                }
            }
            HealthOp::Close { port } => drop(self.open.remove(&port)),
        }
    }
}

/// Every address of the node, of both families where it has both.
fn listen_everywhere(port: u16) -> io::Result<TcpListener> {
    let at = |address: SocketAddr| {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        // A server that was just closed leaves connections behind that would hold the port.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    match at((Ipv6Addr::UNSPECIFIED, port).into()) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            at((Ipv4Addr::UNSPECIFIED, port).into())
        }
        listening => listening,
    }
}

async fn accept<F, A>(listener: TcpListener, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, mostly: waiting a little beats spinning.
                tracing::warn!(%error, "health: accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let answer = answer.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answered = answer(request);
                async move { Ok::<_, Infallible>(answered.await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                // A client may close its side once it has asked.
                .half_close(true)
                // A connection that is kept would go on answering for a Service that lost the port.
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "health: connection");
            }
        });
    }
}

fn respond(healthy: bool, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = match healthy {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(NOSNIFF, HeaderValue::from_static("nosniff"));
    response
}

#[derive(Clone)]
struct ServiceAnswers {
    service: ServiceKey,
    local_endpoints: Arc<AtomicU32>,
    health: Arc<ProxyHealth>,
}

impl ServiceAnswers {
    /// The same whatever path is asked for: balancers are configured with all kinds.
    fn answer(&self) -> Response<Full<Bytes>> {
        let count = self.local_endpoints.load(Ordering::Relaxed);
        let proxy = self.health.answer(Instant::now()).healthy;
        let body = json!({
            "service": {"namespace": &*self.service.namespace, "name": &*self.service.name},
            "localEndpoints": count,
            "serviceProxyHealthy": proxy,
        });
        let mut response = respond(count > 0 && proxy, format!("{body:#}"));
        response.headers_mut().insert(WEIGHT, count.into());
        response
    }
}

/// Binds the address as soon as it can be had. `what` is to be served there, for the log.
pub async fn listen(what: &'static str, address: SocketAddr) -> TcpListener {
    let mut complained = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) if !complained => {
                complained = true;
                tracing::warn!(%address, %error, what, "cannot listen; it is tried again");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Serves the proxy's own `/healthz` and `/livez` until the process ends; a port that is taken is tried for again.
pub async fn serve_proxy(address: SocketAddr, health: Arc<ProxyHealth>, measures: Measures) {
    let listener = listen("health", address).await;
    accept(listener, move |request| {
        std::future::ready(proxy_answer(request.uri().path(), &health, &measures))
    })
    .await;
}

fn proxy_answer(path: &str, health: &ProxyHealth, measures: &Measures) -> Response<Full<Bytes>> {
    let answer = health.answer(Instant::now());
    let (healthy, about_node) = match path {
        "/healthz" => (answer.healthy && answer.node_eligible, true),
        "/livez" => (answer.healthy, false),
        _ => {
            let mut response = Response::new(Full::from("there are /healthz and /livez\n"));
            *response.status_mut() = StatusCode::NOT_FOUND;
            return response;
        }
    };
    measures.health_asked(path, healthy);
    let now = jiff::Timestamp::now();
    // A healthy proxy has nothing to update: to those who look at the time it is up to date.
    let updated = if healthy {
        Some(now)
    } else {
        answer.last_updated
    };
    let mut body = json!({"lastUpdated": updated, "currentTime": now});
    if about_node {
        body["nodeEligible"] = answer.node_eligible.into();
    }
    respond(healthy, body.to_string())
}
