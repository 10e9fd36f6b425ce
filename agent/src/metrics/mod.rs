//! `/metrics`, `/healthz` and `/readyz`. docs/metrics.md says what each metric means.

mod measures;
mod render;

pub use measures::{Extent, Measures};

use std::convert::Infallible;
use std::sync::mpsc::{Sender, sync_channel};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::event::Event;
use crate::report::Report;

/// How long the event loop may take to say how it is, before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves until the process ends.
pub async fn serve(listener: TcpListener, events: Sender<Event>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, mostly: waiting a little beats spinning.
                tracing::warn!(%error, "metrics: accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let events = events.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(request, events.clone()));
            let connection = hyper::server::conn::http1::Builder::new()
                // A client may close its side once it has asked.
                .half_close(true)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "metrics: connection");
            }
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    events: Sender<Event>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path();
    if !matches!(path, "/metrics" | "/healthz" | "/livez" | "/readyz") {
        return Ok(plain(
            StatusCode::NOT_FOUND,
            "there are /metrics, /healthz and /readyz\n".into(),
        ));
    }
    let Some(report) = ask(events).await else {
        return Ok(plain(
            StatusCode::SERVICE_UNAVAILABLE,
            "the event loop does not answer\n".into(),
        ));
    };
    Ok(match path {
        "/metrics" => match render::render(&report) {
            Ok(text) => Response::builder()
                .header(
                    "content-type",
                    "application/openmetrics-text; version=1.0.0; charset=utf-8",
                )
                .body(Full::from(text))
                .unwrap_or_default(),
            Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        "/readyz" if !report.ready => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("{}\n", report.problems.join("\n")),
        ),
        _ => plain(StatusCode::OK, "ok\n".into()),
    })
}

async fn ask(events: Sender<Event>) -> Option<Box<Report>> {
    let asked = tokio::task::spawn_blocking(move || {
        let (reply, answer) = sync_channel(1);
        events.send(Event::Report { reply }).ok()?;
        answer.recv_timeout(PATIENCE).ok()
    });
    asked.await.ok().flatten()
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}
