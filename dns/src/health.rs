//! `/healthz`, `/readyz`, `/metrics` and `/explain` over plain HTTP.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use hickory_proto::rr::RecordType;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::explain::explain;
use crate::name::Name;
use crate::server::Shared;

/// What Prometheus asks for, as `prometheus-client` writes it.
const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// Binds `address` and answers until the process ends. Ready means that everything that is asked for is known, and that the end
/// is not near.
pub async fn start(shared: Arc<Shared>, address: SocketAddr) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        loop {
            let Ok((stream, client)) = listener.accept().await else {
                tokio::task::yield_now().await;
                continue;
            };
            let shared = shared.clone();
            tokio::spawn(async move {
                let service = service_fn(|request| {
                    let response = respond(&shared, client, &request);
                    async move { Ok::<_, Infallible>(response) }
                });
                let io = TokioIo::new(stream);
                if let Err(error) = hyper::server::conn::http1::Builder::new()
                    .serve_connection(io, service)
                    .await
                {
                    tracing::debug!(%error, "health connection");
                }
            });
        }
    });
    Ok(address)
}

fn respond(
    shared: &Arc<Shared>,
    client: SocketAddr,
    request: &Request<Incoming>,
) -> Response<Full<Bytes>> {
    let zone = shared.zone.load();
    let (status, body) = match request.uri().path() {
        "/healthz" | "/health" => (StatusCode::OK, "ok\n".into()),
        "/readyz" | "/ready" if shared.is_stopping() => {
            (StatusCode::SERVICE_UNAVAILABLE, "stopping\n".into())
        }
        "/readyz" | "/ready" if !zone.synced() => (
            StatusCode::SERVICE_UNAVAILABLE,
            "Services and EndpointSlices are not synced yet\n".into(),
        ),
        "/readyz" | "/ready" if !zone.pods_synced() => (
            StatusCode::SERVICE_UNAVAILABLE,
            "Pods are not synced yet\n".into(),
        ),
        "/readyz" | "/ready" => (StatusCode::OK, "ok\n".into()),
        "/metrics" => (StatusCode::OK, shared.metrics.text()),
        "/explain" => explanation(shared, client, request.uri().query().unwrap_or_default()),
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
