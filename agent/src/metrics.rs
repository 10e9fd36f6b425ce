//! `/metrics`, `/healthz` and `/readyz`.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::mpsc::{Sender, sync_channel};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
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
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "metrics: connection");
            }
        });
    }
}

/// Binds the address, with the reason when it cannot be had.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
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
        "/metrics" => match render(&report) {
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

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PacketLabels {
    reason: String,
    class: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    command: String,
    outcome: String,
}

/// A report in the OpenMetrics text format. Counters live in the kernel and in the loop; a registry is filled per scrape.
fn render(report: &Report) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("keelway");
    let gauges: [(&str, &str, i64); 10] = [
        (
            "ready",
            "Whether pods can be served",
            i64::from(report.ready),
        ),
        ("services", "Services known", signed(report.services)),
        (
            "endpoint_slices",
            "EndpointSlices known",
            signed(report.endpoint_slices),
        ),
        ("nodes", "Nodes known", signed(report.nodes)),
        (
            "service_ports",
            "Service ports in the maps",
            signed(report.service_ports),
        ),
        (
            "frontends",
            "Frontends in the maps",
            signed(report.frontends),
        ),
        ("backends", "Backends in the maps", signed(report.backends)),
        (
            "routes",
            "Routes to other nodes' pods",
            signed(report.routes),
        ),
        (
            "addresses_allocated",
            "Pod addresses in use",
            signed(report.allocations.len()),
        ),
        (
            "addresses_capacity",
            "Pod addresses of this node",
            i64::try_from(report.addresses_capacity).unwrap_or(i64::MAX),
        ),
    ];
    for (name, help, value) in gauges {
        let gauge: Gauge = Gauge::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    }
    let counters = [
        (
            "batches",
            "Batches of changes applied to the maps",
            report.batches,
        ),
        (
            "batches_failed",
            "Batches that failed, to be tried again",
            report.batches_failed,
        ),
        (
            "objects_rejected",
            "Objects of the API that were malformed",
            report.rejected_objects,
        ),
        (
            "refusals",
            "Wishes that could not be met, such as a frontend of two Services",
            report.refusals,
        ),
    ];
    for (name, help, value) in counters {
        registry.register(name, help, counted(value));
    }
    let packets = Family::<PacketLabels, Counter>::default();
    for counter in &report.counters {
        let labels = PacketLabels {
            reason: counter.reason.clone(),
            class: counter.class.clone(),
        };
        packets.get_or_create(&labels).inc_by(counter.packets);
    }
    registry.register(
        "dataplane",
        "What became of packets and socket calls, by reason",
        packets,
    );
    let requests = Family::<RequestLabels, Counter>::default();
    for (name, count) in &report.cni_requests {
        let (command, outcome) = name.split_once(' ').unwrap_or((name, ""));
        let labels = RequestLabels {
            command: command.into(),
            outcome: outcome.into(),
        };
        requests.get_or_create(&labels).inc_by(*count);
    }
    registry.register("cni_requests", "Requests of the CNI plugin", requests);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn counted(value: u64) -> impl EncodeMetric + std::fmt::Debug + Send + Sync + 'static {
    let counter: Counter = Counter::default();
    counter.inc_by(value);
    counter
}
