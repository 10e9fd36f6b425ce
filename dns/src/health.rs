//! `/healthz`, `/readyz` and `/metrics` over plain HTTP.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::server::Shared;

/// Binds `address` and answers until the process ends. Ready means synced, and not about to stop.
pub async fn start(
    shared: Arc<Shared>,
    stopping: Arc<AtomicBool>,
    address: SocketAddr,
) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::task::yield_now().await;
                continue;
            };
            let (shared, stopping) = (shared.clone(), stopping.clone());
            tokio::spawn(async move {
                let service = service_fn(|request| {
                    let response = respond(&shared, &stopping, &request);
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
    shared: &Shared,
    stopping: &AtomicBool,
    request: &Request<Incoming>,
) -> Response<Full<Bytes>> {
    let (status, body) = match request.uri().path() {
        "/healthz" | "/health" => (StatusCode::OK, "ok\n".into()),
        "/readyz" | "/ready" if stopping.load(Ordering::Relaxed) => {
            (StatusCode::SERVICE_UNAVAILABLE, "stopping\n".into())
        }
        "/readyz" | "/ready" if !shared.zone.load().synced() => (
            StatusCode::SERVICE_UNAVAILABLE,
            "Services and EndpointSlices are not synced yet\n".into(),
        ),
        "/readyz" | "/ready" => (StatusCode::OK, "ok\n".into()),
        "/metrics" => (StatusCode::OK, shared.metrics.text()),
        _ => (
            StatusCode::NOT_FOUND,
            "paths: /healthz, /readyz, /metrics\n".into(),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
}
