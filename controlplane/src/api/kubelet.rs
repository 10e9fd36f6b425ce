//! Requests that a pod's kubelet answers: logs, exec, attach, port-forward, and what `nodes/proxy` names.
//!
//! An upgraded connection (WebSocket or SPDY) is passed on byte for byte; what protocol runs inside is between kubectl and
//! the kubelet. A refused upgrade is passed back, and kubectl then tries its next protocol.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::fields::{self, Fields};
use super::listener::{self, TlsError};
use super::reply::{self, Answer, Body};
use super::request::percent_encode;
use super::status::Status;
use super::{Api, Call};

const KUBELET_PORT: i64 = 10250;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The most of a kubelet's error text that is passed on.
const ERROR_BYTES_MAX: usize = 64 << 10;

/// How kubelets are reached: over TLS, with the API server's own client certificate.
pub struct Kubelets {
    tls: TlsConnector,
}

impl Kubelets {
    pub fn new(pki_dir: &Path) -> Result<Self, TlsError> {
        let certificates = listener::certificates(&pki_dir.join("apiserver-kubelet-client.crt"))?;
        let key = listener::private_key(&pki_dir.join("apiserver-kubelet-client.key"))?;
        let config = ClientConfig::builder()
            .with_root_certificates(listener::roots(&pki_dir.join("ca.crt"))?)
            .with_client_auth_cert(certificates, key)
            .map_err(|error| TlsError::Config(error.to_string()))?;
        Ok(Self {
            tls: TlsConnector::from(Arc::new(config)),
        })
    }

    async fn connect(
        &self,
        address: IpAddr,
        port: u16,
    ) -> Result<tokio_rustls::client::TlsStream<TcpStream>, Status> {
        let failed = |why: String| {
            Status::new(
                StatusCode::BAD_GATEWAY,
                "ServiceUnavailable",
                format!("cannot reach the kubelet at {address}:{port}: {why}"),
            )
        };
        let connecting = async {
            let stream = TcpStream::connect((address, port)).await?;
            stream.set_nodelay(true)?;
            self.tls
                .connect(ServerName::IpAddress(address.into()), stream)
                .await
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => Err(failed("it does not answer".to_owned())),
        }
    }
}

impl Api {
    pub(super) async fn connect(
        &self,
        call: Call,
        parts: Parts,
        upgrade: Option<OnUpgrade>,
        body: Incoming,
    ) -> Result<Answer, Status> {
        let target = &call.target;
        let subresource = target.subresource.as_deref().unwrap_or("");
        let object = target.decode(&self.record(target).await?)?;
        let (node, path) = match (target.resource.plural, subresource) {
            ("pods", "log" | "exec" | "attach" | "portforward") => {
                let node = object.text("/spec/nodeName").to_owned();
                if node.is_empty() {
                    let why = format!(
                        "pod {} does not have a host assigned",
                        fields::name(&object)
                    );
                    return Err(Status::bad_request(why));
                }
                (node, kubelet_path(&call, subresource, &object)?)
            }
            ("nodes", "proxy") => {
                let query = parts
                    .uri
                    .query()
                    .map_or(String::new(), |query| format!("?{query}"));
                let path = if target.rest.is_empty() {
                    "/"
                } else {
                    &target.rest
                };
                (fields::name(&object).to_owned(), format!("{path}{query}"))
            }
            _ => return Err(Status::method_not_allowed()),
        };
        let (address, port) = self.kubelet_address(&node).await?;
        let stream = self.kubelets.connect(address, port).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| {
                Status::internal(format!("speaking to the kubelet at {address}: {error}"))
            })?;
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::builder()
            .method(parts.method.clone())
            .uri(path.parse::<Uri>().map_err(|error| {
                Status::bad_request(format!("the path cannot be passed on: {error}"))
            })?)
            .body(body)
            .map_err(Status::internal)?;
        *request.headers_mut() = passed_on(&parts.headers);
        let host = format!("{}:{port}", bracketed(address));
        if let Ok(host) = host.parse() {
            request.headers_mut().insert(header::HOST, host);
        }
        let mut response = sender.send_request(request).await.map_err(|error| {
            Status::internal(format!("speaking to the kubelet at {address}: {error}"))
        })?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let upgrade =
                upgrade.ok_or_else(|| Status::bad_request("the connection cannot be upgraded"))?;
            let kubelet = hyper::upgrade::on(&mut response);
            tokio::spawn(tunnel(upgrade, kubelet, self.stop.clone()));
            let mut answer = Response::new(reply::full(Bytes::new()));
            *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            *answer.headers_mut() = response.headers().clone();
            return Ok(answer);
        }
        if subresource == "log" && !response.status().is_success() {
            return Err(refused(response).await);
        }
        let (head, body) = response.into_parts();
        let body: Body = body.map_err(Into::into).boxed_unsync();
        let mut answer = Response::new(body);
        *answer.status_mut() = head.status;
        if let Some(content) = head.headers.get(header::CONTENT_TYPE) {
            answer
                .headers_mut()
                .insert(header::CONTENT_TYPE, content.clone());
        }
        Ok(answer)
    }

    /// Where the kubelet of a node listens.
    async fn kubelet_address(&self, node: &str) -> Result<(IpAddr, u16), Status> {
        let found = self.lookup("", "nodes", None, node).await?;
        let subject = super::status::Subject {
            group: "",
            resource: "nodes",
            name: node,
        };
        let found = found.ok_or_else(|| Status::not_found(subject))?;
        let address = found
            .items("/status/addresses")
            .iter()
            .find(|address| address.text("/type") == "InternalIP")
            .and_then(|address| address.text("/address").parse().ok())
            .ok_or_else(|| Status::internal(format!("node {node} has no internal address yet")))?;
        let port = match found.int("/status/daemonEndpoints/kubeletEndpoint/Port") {
            0 => KUBELET_PORT,
            port => port,
        };
        Ok((address, u16::try_from(port).map_err(Status::internal)?))
    }
}

fn bracketed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

/// The request's headers without those that are between the client and this server.
fn passed_on(headers: &HeaderMap) -> HeaderMap {
    let own = |name: &str| {
        matches!(
            name,
            "authorization" | "host" | "content-length" | "transfer-encoding" | "accept-encoding"
        ) || name.starts_with("impersonate-")
    };
    headers
        .iter()
        .filter(|(name, _)| !own(name.as_str()))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// Path and query that the kubelet knows the request by.
fn kubelet_path(call: &Call, subresource: &str, pod: &Value) -> Result<String, Status> {
    let (namespace, name) = (fields::namespace(pod), fields::name(pod));
    let query = &call.query;
    let mut passed: Vec<(&str, &str)> = Vec::new();
    let first = match subresource {
        "portforward" => {
            passed.extend(query.all("ports").map(|port| ("port", port)));
            return Ok(with_query(
                format!("/portForward/{namespace}/{name}"),
                &passed,
            ));
        }
        "log" => {
            let known = [
                "follow",
                "previous",
                "timestamps",
                "sinceSeconds",
                "sinceTime",
                "tailLines",
                "limitBytes",
                "stream",
            ];
            passed.extend(
                known
                    .iter()
                    .filter(|key| !query.get(key).is_empty())
                    .map(|key| (*key, query.get(key))),
            );
            "containerLogs"
        }
        connect => {
            passed.extend(query.all("command").map(|part| ("command", part)));
            // The kubelet has other names for the streams.
            for (key, kubelet_key) in [
                ("stdin", "input"),
                ("stdout", "output"),
                ("stderr", "error"),
                ("tty", "tty"),
            ] {
                if query.flag(key) {
                    passed.push((kubelet_key, "1"));
                }
            }
            connect
        }
    };
    let container = container(pod, query.get("container"))?;
    Ok(with_query(
        format!("/{first}/{namespace}/{name}/{container}"),
        &passed,
    ))
}

fn with_query(path: String, query: &[(&str, &str)]) -> String {
    let pairs: Vec<String> = query
        .iter()
        .map(|(key, value)| format!("{key}={}", percent_encode(value)))
        .collect();
    if pairs.is_empty() {
        path
    } else {
        format!("{path}?{}", pairs.join("&"))
    }
}

/// The container asked for, or the pod's only one.
fn container<'a>(pod: &'a Value, asked: &'a str) -> Result<&'a str, Status> {
    let name = fields::name(pod);
    let names = |list: &str| {
        pod.items(list)
            .iter()
            .map(|container| container.text("/name"))
            .collect::<Vec<_>>()
    };
    let all = [
        names("/spec/containers"),
        names("/spec/initContainers"),
        names("/spec/ephemeralContainers"),
    ]
    .concat();
    let mains = names("/spec/containers");
    match (asked, mains.as_slice()) {
        ("", [only]) => Ok(only),
        ("", _) => {
            let choices = mains.join(" ");
            Err(Status::bad_request(format!(
                "a container name must be specified for pod {name}, choose one of: [{choices}]"
            )))
        }
        (asked, _) if all.contains(&asked) => Ok(asked),
        (asked, _) => Err(Status::bad_request(format!(
            "container {asked} is not valid for pod {name}"
        ))),
    }
}

/// Both directions of an upgraded connection, until either side ends it.
async fn tunnel(client: OnUpgrade, kubelet: OnUpgrade, stop: tokio_util::sync::CancellationToken) {
    let (client, kubelet) = match tokio::try_join!(client, kubelet) {
        Ok(both) => both,
        Err(error) => {
            return tracing::debug!(%error, "an upgraded connection ended before it began");
        }
    };
    let (mut client, mut kubelet) = (TokioIo::new(client), TokioIo::new(kubelet));
    tokio::select! {
        () = stop.cancelled() => {}
        // Errors are sides that went away.
        _ = tokio::io::copy_bidirectional(&mut client, &mut kubelet) => {}
    }
}

/// What the kubelet says is wrong, as a Status.
async fn refused(response: Response<Incoming>) -> Status {
    let code = response.status();
    let body = Limited::new(response.into_body(), ERROR_BYTES_MAX)
        .collect()
        .await;
    let bytes = body
        .map(http_body_util::Collected::to_bytes)
        .unwrap_or_default();
    let text = match serde_json::from_slice::<Value>(&bytes) {
        Ok(status) if status.has("/message") => status.text("/message").to_owned(),
        _ => String::from_utf8_lossy(&bytes).trim().to_owned(),
    };
    let reason = match code {
        StatusCode::BAD_REQUEST => "BadRequest",
        StatusCode::NOT_FOUND => "NotFound",
        StatusCode::FORBIDDEN => "Forbidden",
        StatusCode::UNAUTHORIZED => "Unauthorized",
        _ => "InternalError",
    };
    Status::new(code, reason, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::request::{Query, Target};
    use serde_json::json;

    fn path(subresource: &str, query: &str) -> Result<String, Status> {
        let target =
            Target::parse(&format!("/api/v1/namespaces/a/pods/p/{subresource}")).expect("a pod");
        let call = Call {
            identity: Default::default(),
            target,
            query: Query::parse(query),
        };
        let pod = json!({"metadata": {"name": "p", "namespace": "a"}, "spec": {"containers": [{"name": "c"}],
            "initContainers": [{"name": "i"}]}});
        kubelet_path(&call, subresource, &pod)
    }

    #[test]
    fn requests_are_put_as_the_kubelet_knows_them() {
        let exec = path(
            "exec",
            "command=sh&command=-c&command=echo+a%26b&stdin=true&stdout=true&tty=false",
        )
        .expect("exec");
        assert_eq!(
            exec,
            "/exec/a/p/c?command=sh&command=-c&command=echo%20a%26b&input=1&output=1"
        );
        let log = path("log", "container=i&follow=true&tailLines=5&pretty=1").expect("log");
        assert_eq!(log, "/containerLogs/a/p/i?follow=true&tailLines=5");
        assert_eq!(
            path("portforward", "ports=80").expect("port-forward"),
            "/portForward/a/p?port=80"
        );
        assert_eq!(
            path("log", "container=x").expect_err("unknown").message,
            "container x is not valid for pod p"
        );
    }
}
