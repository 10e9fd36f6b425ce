//! `/healthz`, `/readyz`, `/metrics` and `/explain` over plain HTTP.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::rr::RecordType;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::explain::explain;
use crate::name::Name;
use crate::server::Shared;
use crate::shares::Shares;

/// What Prometheus asks for, as `prometheus-client` writes it.
const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// Connections at once, whoever they are of: a client has no more than are free, so that whoever looks after this server gets through.
const CONNECTIONS_MAX: usize = 64;
/// How long a connection may take, for its one request and the answer. Nobody who means it needs longer.
const CONNECTION: Duration = Duration::from_secs(10);
/// A pause where there are no descriptors left: others are being served and will give some back.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(50);
/// Explanations at once: each looks at every object.
const EXPLANATIONS_MAX: usize = 1;

/// Binds `address` and answers until the process ends. Ready means that everything that is asked for is known, and that the end
/// is not near.
pub async fn start(shared: Arc<Shared>, address: SocketAddr) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let places = Shares::new(CONNECTIONS_MAX, CONNECTIONS_MAX);
    let asked = Arc::new(Asked {
        shared,
        explanations: Semaphore::new(EXPLANATIONS_MAX),
    });
    tokio::spawn(async move {
        loop {
            let (stream, client) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accepting at {address}");
                    sleep(OUT_OF_DESCRIPTORS).await;
                    continue;
                }
            };
            let Some(place) = places.take(client.ip()) else {
                continue;
            };
            let asked = asked.clone();
            tokio::spawn(async move {
                if timeout(CONNECTION, asked.serve(stream, client))
                    .await
                    .is_err()
                {
                    tracing::debug!(%client, "health connection: it takes too long");
                }
                drop(place);
            });
        }
    });
    Ok(address)
}

/// Who is asked, by all connections of an address.
struct Asked {
    shared: Arc<Shared>,
    explanations: Semaphore,
}

impl Asked {
    async fn serve(&self, stream: TcpStream, client: SocketAddr) {
        let service = service_fn(|request| {
            let response = respond(self, client, &request);
            async move { Ok::<_, Infallible>(response) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service);
        if let Err(error) = served.await {
            tracing::debug!(%error, "health connection");
        }
    }
}

fn respond(
    asked: &Asked,
    client: SocketAddr,
    request: &Request<Incoming>,
) -> Response<Full<Bytes>> {
    let shared = &asked.shared;
    let (status, body) = match request.uri().path() {
        "/healthz" | "/health" => (StatusCode::OK, "ok\n".into()),
        "/readyz" | "/ready" => match shared.unready() {
            None => (StatusCode::OK, "ok\n".into()),
            Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        },
        "/metrics" => (StatusCode::OK, shared.metrics.text()),
        "/explain" => match asked.explanations.try_acquire() {
            Ok(_permit) => explanation(shared, client, request.uri().query().unwrap_or_default()),
            Err(_) => (
                StatusCode::TOO_MANY_REQUESTS,
                "another explanation is being made\n".into(),
            ),
        },
        _ => (
            StatusCode::NOT_FOUND,
            "paths: /healthz, /readyz, /metrics, /explain?name=NAME&type=TYPE[&client=ADDRESS]\n"
                .into(),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    if request.uri().path() == "/metrics" {
        response.headers_mut().insert(CONTENT_TYPE, OPEN_METRICS);
    }
    response
}

fn explanation(shared: &Arc<Shared>, client: SocketAddr, query: &str) -> (StatusCode, String) {
    let value = |key: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(name, _)| *name == key).map(|(_, value)| value)
    };
    let name = Name::parse(value("name").unwrap_or("."));
    let rtype = value("type").unwrap_or("A").parse::<RecordType>();
    let client = value("client").map_or(Ok(client.ip()), str::parse);
    match (name, rtype, client) {
        (Ok(name), Ok(rtype), Ok(client)) => {
            (StatusCode::OK, explain(shared, &name, rtype.into(), client))
        }
        _ => (
            StatusCode::BAD_REQUEST,
            "/explain?name=NAME&type=TYPE[&client=ADDRESS]\n".into(),
        ),
    }
}
