//! tunnel: passing an upgraded connection on to the runtime's streaming server, byte for byte.
//!
//! Whether it carries SPDY or WebSocket makes no difference here. What the runtime refuses is refused with its own
//! answer, so that a client can fall back to another protocol.

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;

use super::{Body, connect};

/// A TunnelError says why the runtime's streaming server could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error("the runtime's streaming address {0} cannot be used")]
    Address(String),
    #[error("cannot reach the runtime's streaming server at {address}: {source}")]
    Connect {
        address: String,
        source: std::io::Error,
    },
    #[error("the runtime's streaming server: {0}")]
    Http(#[from] hyper::Error),
    #[error("cannot pass the request on: {0}")]
    Request(#[from] http::Error),
}

/// Sends the request to `url`, and answers with what came back; after 101 both ends are joined.
pub async fn forward(
    mut request: Request<Incoming>,
    url: &str,
) -> Result<Response<Body>, TunnelError> {
    let bad = || TunnelError::Address(url.to_owned());
    let uri: Uri = url.parse().map_err(|_| bad())?;
    let authority = uri.authority().ok_or_else(bad)?.to_string();
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let stream = connect(&authority)
        .await
        .map_err(|source| TunnelError::Connect {
            address: authority.clone(),
            source,
        })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a connection to the runtime's streaming server broke");
        }
    });
    let mut outgoing = Request::builder()
        .method(request.method().clone())
        .uri(path)
        .body(Empty::new())?;
    *outgoing.headers_mut() = passed_on(request.headers(), &authority);
    let mut answer = sender.send_request(outgoing).await?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        let (parts, body) = answer.into_parts();
        let body = body.map_err(std::io::Error::other).boxed();
        return Ok(Response::from_parts(parts, body));
    }
    let (inner, outer) = (
        hyper::upgrade::on(&mut answer),
        hyper::upgrade::on(&mut request),
    );
    tokio::spawn(async move {
        let (Ok(inner), Ok(outer)) = tokio::join!(inner, outer) else {
            tracing::debug!("an upgrade was not completed");
            return;
        };
        // An end that closes is the normal way for a stream to stop.
        let _ =
            tokio::io::copy_bidirectional(&mut TokioIo::new(inner), &mut TokioIo::new(outer)).await;
    });
    let mut upgraded = Response::new(super::full(Bytes::new()));
    *upgraded.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *upgraded.headers_mut() = answer.headers().clone();
    Ok(upgraded)
}

/// All headers but those about the caller: the runtime need not know who asks.
fn passed_on(headers: &HeaderMap, authority: &str) -> HeaderMap {
    let mut passed = headers.clone();
    passed.remove(http::header::AUTHORIZATION);
    // The runtime's WebSocket server compares Origin with Host and knows neither of the caller's.
    passed.remove(http::header::ORIGIN);
    if let Ok(host) = authority.parse() {
        passed.insert(http::header::HOST, host);
    }
    passed
}
