//! Requests that another server answers: sent on over a connection of their own, with the answer or the upgraded connection
//! passed back.

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderName, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Incoming};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_util::sync::CancellationToken;

use super::reply::{self, Answer, Body};
use super::status::Status;
use crate::streams::{self, Framing};

/// The largest message of a client: what is typed or copied comes in pieces of some KiB.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Headers that concern one connection only (RFC 9110, section 7.6.1).
const CONNECTION_HEADERS: &[HeaderName] = &[
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// A request's headers without those that are between the client and this server.
pub fn request_headers(headers: &HeaderMap, upgrades: bool) -> HeaderMap {
    let own = |name: &HeaderName| {
        let needed = upgrades && [header::CONNECTION, header::UPGRADE].contains(name);
        (CONNECTION_HEADERS.contains(name) && !needed)
            || *name == header::AUTHORIZATION
            || *name == header::HOST
            || name.as_str() == "keep-alive"
            || name.as_str().starts_with("impersonate-")
    };
    let kept = headers.iter().filter(|(name, _)| !own(name));
    kept.map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

pub fn asks_for_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(header::UPGRADE)
}

pub fn asks_for_websocket(headers: &HeaderMap) -> bool {
    let upgrade = headers.get(header::UPGRADE);
    headers.contains_key(header::SEC_WEBSOCKET_KEY)
        && upgrade.is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// The protocol that a WebSocket client offers to speak inside; empty for other clients.
pub fn websocket_protocols(headers: &HeaderMap) -> Vec<&str> {
    if !asks_for_websocket(headers) {
        return Vec::new();
    }
    let offers = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    offers
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect()
}

/// Sends one request on a fresh connection. `peer` names the other side in errors.
pub async fn exchange<B>(
    connection: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<B>,
    peer: &str,
) -> Result<Response<Incoming>, Status>
where
    B: HttpBody + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let failed = |error: hyper::Error| Status::internal(format!("speaking to {peer}: {error}"));
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(connection))
        .await
        .map_err(failed)?;
    tokio::spawn(connection.with_upgrades());
    sender.send_request(request).await.map_err(failed)
}

/// The answer as it came. After a switch of protocols both connections are joined, byte for byte.
pub fn pass_back(
    mut response: Response<Incoming>,
    upgrade: Option<OnUpgrade>,
    stop: &CancellationToken,
) -> Result<Answer, Status> {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let client = upgrade.ok_or_else(cannot_upgrade)?;
        let server = hyper::upgrade::on(&mut response);
        let stop = stop.clone();
        tokio::spawn(async move {
            if let Some((client, server)) = both(client, server).await {
                let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
                tokio::select! {
                    () = stop.cancelled() => {}
                    // Errors are sides that went away.
                    _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                }
            }
        });
        let mut answer = Response::new(reply::full(Bytes::new()));
        *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        *answer.headers_mut() = response.headers().clone();
        return Ok(answer);
    }
    let (mut head, body) = response.into_parts();
    strip_connection(&mut head.headers);
    let body: Body = body.map_err(Into::into).boxed_unsync();
    Ok(Response::from_parts(head, body))
}

/// Takes away what concerns the connection to the other side only.
pub fn strip_connection(headers: &mut HeaderMap) {
    for name in CONNECTION_HEADERS {
        headers.remove(name);
    }
    headers.remove("keep-alive");
}

/// Both upgraded connections, when both come about.
pub async fn both(
    client: OnUpgrade,
    server: OnUpgrade,
) -> Option<(hyper::upgrade::Upgraded, hyper::upgrade::Upgraded)> {
    match tokio::try_join!(client, server) {
        Ok(both) => Some(both),
        Err(error) => {
            tracing::debug!(%error, "an upgraded connection ended before it began");
            None
        }
    }
}

/// The 101 that makes a client's connection a WebSocket of the given subprotocol.
pub fn accept_websocket(
    headers: &HeaderMap,
    protocol: Option<&'static str>,
) -> Result<Answer, Status> {
    let key = headers
        .get(header::SEC_WEBSOCKET_KEY)
        .ok_or_else(|| Status::bad_request("Sec-WebSocket-Key is missing"))?;
    let accepted = derive_accept_key(key.as_bytes());
    let mut answer = Response::new(reply::full(Bytes::new()));
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(
        header::CONNECTION,
        header::HeaderValue::from_static("Upgrade"),
    );
    headers.insert(
        header::UPGRADE,
        header::HeaderValue::from_static("websocket"),
    );
    if let Some(protocol) = protocol {
        let protocol = header::HeaderValue::from_static(protocol);
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
    }
    let accepted = accepted.parse().map_err(Status::internal)?;
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accepted);
    Ok(answer)
}

/// Gives a client the body of an answer in the messages of a WebSocket: logs and watches may be asked for that way.
pub fn over_websocket(
    answer: Answer,
    parts: &Parts,
    upgrade: Option<OnUpgrade>,
    (framing, protocol): (Framing, Option<&'static str>),
    stop: &CancellationToken,
) -> Result<Answer, Status> {
    if !answer.status().is_success() {
        return Ok(answer);
    }
    let upgrade = upgrade.ok_or_else(cannot_upgrade)?;
    let accepted = accept_websocket(&parts.headers, protocol)?;
    let body = answer.into_body().into_data_stream();
    let stop = stop.clone();
    tokio::spawn(async move {
        match upgrade.await {
            Ok(client) => {
                let client = websocket(client).await;
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = streams::send(client, body, framing) => {}
                }
            }
            Err(error) => tracing::debug!(%error, "a WebSocket ended before it began"),
        }
    });
    Ok(accepted)
}

/// The server's end of an accepted WebSocket.
pub async fn websocket(
    client: hyper::upgrade::Upgraded,
) -> WebSocketStream<TokioIo<hyper::upgrade::Upgraded>> {
    let config = WebSocketConfig::default().max_message_size(Some(MESSAGE_BYTES_MAX));
    WebSocketStream::from_raw_socket(TokioIo::new(client), Role::Server, Some(config)).await
}

pub fn cannot_upgrade() -> Status {
    Status::bad_request("the connection cannot be upgraded")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (
                HeaderName::from_static(name),
                header::HeaderValue::from_static(value),
            )
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn credentials_and_connection_headers_end_here() {
        let given = headers(&[
            ("authorization", "Bearer x"),
            ("impersonate-user", "root"),
            ("connection", "Upgrade"),
            ("upgrade", "SPDY/3.1"),
            ("transfer-encoding", "chunked"),
            ("accept", "text/html"),
        ]);
        let names = |upgrades| {
            let mut names: Vec<String> = request_headers(&given, upgrades)
                .keys()
                .map(|name| name.to_string())
                .collect();
            names.sort();
            names
        };
        assert_eq!(names(false), ["accept"]);
        assert_eq!(names(true), ["accept", "connection", "upgrade"]);
    }

    #[test]
    fn subprotocols_count_only_with_a_websocket() {
        let mut given = headers(&[
            ("upgrade", "WebSocket"),
            ("sec-websocket-key", "x"),
            (
                "sec-websocket-protocol",
                "v5.channel.k8s.io, v4.channel.k8s.io",
            ),
        ]);
        assert_eq!(
            websocket_protocols(&given),
            ["v5.channel.k8s.io", "v4.channel.k8s.io"]
        );
        given.insert(
            header::UPGRADE,
            header::HeaderValue::from_static("SPDY/3.1"),
        );
        assert!(websocket_protocols(&given).is_empty());
    }
}
