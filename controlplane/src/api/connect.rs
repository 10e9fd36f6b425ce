//! Requests about a running pod, which its kubelet answers: logs, exec, attach, port-forward.
//!
//! Clients speak SPDY or WebSocket, kubelets of every version SPDY. So SPDY is passed on byte for byte, WebSocket channels become
//! SPDY streams here, and older WebSocket protocols are left to the kubelet, whose refusal makes a client try SPDY.

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde_json::Value;

use super::fields::{self, Fields};
use super::kubelet::KubeletAddress;
use super::reply::Answer;
use super::request::{Query, percent_encode};
use super::status::{FieldError, Status};
use super::{Api, Call, forward};
use crate::streams::{self, Channels, Framing, Protocol};

/// The most of a kubelet's error text that is passed on.
const ERROR_BYTES_MAX: usize = 64 << 10;
/// What negotiates the subprotocol of a SPDY connection.
const STREAM_PROTOCOL: &str = "x-stream-protocol-version";

/// What a client's WebSocket is to carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Translation {
    Command(Protocol),
    PortForward,
}

impl Translation {
    /// How a request is to be translated; None when it is passed on as it is.
    fn of(subresource: &str, offered: &[&str]) -> Option<Self> {
        match subresource {
            "exec" | "attach" => Protocol::choose(offered.iter().copied()).map(Self::Command),
            "portforward" if offered.contains(&streams::TUNNELED_PORT_FORWARD) => {
                Some(Self::PortForward)
            }
            _ => None,
        }
    }

    /// The subprotocol towards the client, and towards the kubelet.
    fn protocols(self) -> (&'static str, &'static str) {
        match self {
            Self::Command(protocol) => (protocol.name(), streams::REMOTE_COMMAND),
            Self::PortForward => (streams::TUNNELED_PORT_FORWARD, streams::PORT_FORWARD),
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
        let methods: &[Method] = match (target.resource.plural, subresource) {
            (_, "proxy") => return self.proxy(call, parts, upgrade, body).await,
            ("pods", "log") => &[Method::GET],
            ("pods", "exec" | "attach" | "portforward") => &[Method::GET, Method::POST],
            _ => return Err(Status::method_not_allowed()),
        };
        if !methods.contains(&parts.method) {
            return Err(Status::method_not_allowed());
        }
        if subresource == "log" {
            check_log_options(&call.query, target.object_name()?)?;
        }
        let pod = target.decode(&self.record(target).await?)?;
        let node = pod.text("/spec/nodeName");
        let path = kubelet_path(&call, subresource, &pod)?;
        if node.is_empty() {
            // A log that has not begun is empty; nothing else can be done with a pod that is nowhere.
            if subresource == "log" {
                return Ok(super::reply::text(StatusCode::NO_CONTENT, Bytes::new()));
            }
            let why = format!("pod {} does not have a host assigned", fields::name(&pod));
            return Err(Status::bad_request(why));
        }
        check_command(&call.query, subresource)?;
        let kubelet = self.kubelet_address(node).await?;
        let offered = forward::websocket_protocols(&parts.headers);
        if let Some(translation) = Translation::of(subresource, &offered) {
            let upgrade = upgrade.ok_or_else(forward::cannot_upgrade)?;
            let wanted = channels(&call.query);
            return self
                .translate(translation, &parts, upgrade, kubelet, &path, wanted)
                .await;
        }
        if subresource == "log" {
            let verify = !call.query.flag("insecureSkipTLSVerifyBackend");
            return self.log(&parts, upgrade, kubelet, &path, verify).await;
        }
        let mut request = Request::new(body);
        *request.method_mut() = parts.method.clone();
        *request.headers_mut() =
            forward::request_headers(&parts.headers, forward::asks_for_upgrade(&parts.headers));
        request.headers_mut().remove(header::ACCEPT_ENCODING);
        let response = self.ask(kubelet, &path, request, true).await?;
        forward::pass_back(response, upgrade, &self.stop)
    }

    /// A log as it comes from the kubelet, or in the messages of a WebSocket.
    async fn log(
        &self,
        parts: &Parts,
        upgrade: Option<OnUpgrade>,
        kubelet: KubeletAddress,
        path: &str,
        verify: bool,
    ) -> Result<Answer, Status> {
        let websocket = forward::asks_for_websocket(&parts.headers);
        let offered = forward::websocket_protocols(&parts.headers);
        let framing = Framing::choose(&offered).ok_or_else(|| {
            let offered = offered.join(", ");
            Status::bad_request(format!(
                "the subprotocols {offered} are not supported for logs; binary.k8s.io and base64.binary.k8s.io are"
            ))
        })?;
        // Logs are passed on as they are; nothing here would undo an encoding.
        let request = Request::new(Empty::<Bytes>::new());
        let response = self.ask(kubelet, path, request, verify).await?;
        if !response.status().is_success() {
            return Err(refused(response).await);
        }
        let answer = forward::pass_back(response, None, &self.stop)?;
        if !websocket {
            return Ok(answer);
        }
        forward::over_websocket(answer, parts, upgrade, framing, &self.stop)
    }

    /// Sends a request to a kubelet.
    pub(super) async fn ask<B>(
        &self,
        kubelet: KubeletAddress,
        path: &str,
        mut request: Request<B>,
        verify: bool,
    ) -> Result<Response<Incoming>, Status>
    where
        B: hyper::body::Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        *request.uri_mut() = path.parse::<Uri>().map_err(|error| {
            Status::bad_request(format!("the path cannot be passed on: {error}"))
        })?;
        let host = kubelet.to_string().parse().map_err(Status::internal)?;
        request.headers_mut().insert(header::HOST, host);
        let connection = self.kubelets.connect(kubelet, verify).await?;
        forward::exchange(connection, request, &format!("the kubelet at {kubelet}")).await
    }

    /// Accepts a client's WebSocket once the kubelet has accepted SPDY, so that a refusal is an answer and not a broken stream.
    async fn translate(
        &self,
        translation: Translation,
        parts: &Parts,
        client: OnUpgrade,
        kubelet: KubeletAddress,
        path: &str,
        wanted: Channels,
    ) -> Result<Answer, Status> {
        let (outer, inner) = translation.protocols();
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.method_mut() = Method::POST;
        for (name, value) in [
            ("connection", "Upgrade"),
            ("upgrade", "SPDY/3.1"),
            (STREAM_PROTOCOL, inner),
        ] {
            request
                .headers_mut()
                .insert(name, HeaderValue::from_static(value));
        }
        let mut response = self.ask(kubelet, path, request, true).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refused(response).await);
        }
        let answer = forward::accept_websocket(&parts.headers, Some(outer))?;
        let server = hyper::upgrade::on(&mut response);
        let stop = self.stop.clone();
        tokio::spawn(async move {
            let Some((client, server)) = forward::both(client, server).await else {
                return;
            };
            let (client, server) = (forward::websocket(client).await, TokioIo::new(server));
            let streams = async {
                match translation {
                    Translation::PortForward => streams::tunnel(client, server).await,
                    Translation::Command(protocol) => {
                        let session = streams::Session::new(server);
                        if let Err(error) = streams::relay(client, session, wanted, protocol).await
                        {
                            tracing::debug!(%error, "a command's streams broke off");
                        }
                    }
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = streams => {}
            }
        });
        Ok(answer)
    }
}

/// The streams that a command is asked to be run with.
fn channels(query: &Query) -> Channels {
    Channels {
        stdin: query.flag("stdin"),
        stdout: query.flag("stdout"),
        stderr: query.flag("stderr"),
        tty: query.flag("tty"),
    }
}

/// Options of a log that make no sense are refused before anything is looked up.
fn check_log_options(query: &Query, pod: &str) -> Result<(), Status> {
    let mut errors = Vec::new();
    let tail = query.number("tailLines")?;
    let limit = query.number("limitBytes")?;
    let since = query.number("sinceSeconds")?;
    for (field, value, least) in [
        ("tailLines", tail, 0),
        ("limitBytes", limit, 1),
        ("sinceSeconds", since, 1),
    ] {
        if let Some(value) = value.filter(|value| *value < least) {
            let why = match least {
                0 => "must be greater than or equal to 0",
                _ => "must be greater than 0",
            };
            errors.push(FieldError::invalid(field, value, why));
        }
    }
    if since.is_some() && !query.get("sinceTime").is_empty() {
        let why = "at most one of `sinceTime` or `sinceSeconds` may be specified";
        errors.push(FieldError::forbidden("[]", why));
    }
    match query.get("stream") {
        "" | "All" => {}
        "Stdout" | "Stderr" if tail.is_some() => {
            let why = "`tailLines` and specific `stream` are mutually exclusive for now";
            errors.push(FieldError::forbidden("", why));
        }
        "Stdout" | "Stderr" => {}
        other => {
            let known = ["All", "Stdout", "Stderr"];
            errors.push(FieldError::unsupported("stream", other, &known));
        }
    }
    if errors.is_empty() {
        return Ok(());
    }
    Err(Status::invalid("", "PodLogOptions", pod, errors))
}

/// A command without a stream, or no command at all, is refused before a kubelet is asked.
fn check_command(query: &Query, subresource: &str) -> Result<(), Status> {
    if !matches!(subresource, "exec" | "attach") {
        return Ok(());
    }
    let wanted = channels(query);
    if !(wanted.stdin || wanted.stdout || wanted.stderr) {
        let why = "you must specify at least 1 of stdin, stdout, stderr";
        return Err(Status::bad_request(why));
    }
    if subresource == "exec" && query.get("command").is_empty() {
        return Err(Status::bad_request(
            "you must specify at least 1 command for the container",
        ));
    }
    Ok(())
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
