//! The HTTPS server on port 10250: what the API server calls for logs, exec, attach and port-forward.
//!
//! Nobody is let in without the right to what they ask for (`access`); there is no anonymous access. The health endpoint,
//! which tells nothing but "ok", is plain HTTP on the loopback.

mod access;
mod node_logs;
mod query;
mod reviews;
mod tls;
mod tunnel;

use std::convert::Infallible;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio_rustls::TlsAcceptor;

pub use access::{Authority, AuthorityError, Caller, Gate, Right};
pub use reviews::Reviews;
pub use tls::{Tls, TlsError, given};

use crate::logs::{Ended, Output, Selection, stream};
use crate::pod::sandbox::log_directory_name;
use crate::pod::{PodKey, container::log_path, find_container};
use crate::pods::Registry;
use crate::runtime::{ContainerPhase, Runtime, StreamRequest};
use node_logs::Found;
use query::{Query, decode};

/// A TLS handshake that takes longer is given up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a caller may take for the head of a request, and leave a connection idle between two.
const HEAD_TIMEOUT: Duration = Duration::from_secs(180);
/// How often a followed container is looked at although nothing was announced.
const LOOK_PERIOD: Duration = Duration::from_secs(2);

pub type Body = BoxBody<Bytes, std::io::Error>;

/// A ServeError is why a request is refused; it becomes the answer's status and text.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("Unauthorized")]
    Unauthorized,
    #[error("{0}")]
    Forbidden(String),
    #[error("Method Not Allowed")]
    BadMethod,
    #[error("{0}")]
    Unavailable(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    BadRequest(String),
    #[error("{0}")]
    Internal(String),
}

impl ServeError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::BadMethod => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// A Server answers requests about the pods of this node.
pub struct Server {
    pub runtime: Arc<dyn Runtime>,
    pub pods: Registry,
    pub gate: Gate,
    pub log_dir: std::path::PathBuf,
    /// The folder of the node's own log files.
    pub node_log_dir: std::path::PathBuf,
    /// Ids of containers that changed in the runtime.
    pub changes: broadcast::Sender<Arc<str>>,
}

/// Serves HTTPS for ever.
pub async fn serve(server: Arc<Server>, listener: TcpListener, tls: Arc<Tls>) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: accepting at once again would only spin.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (server, acceptor) = (server.clone(), TlsAcceptor::from(tls.current()));
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let shown = stream.get_ref().1.peer_certificates();
                    let certificate = shown.and_then(<[_]>::first).map(|c| c.to_vec());
                    serve_connection(server, stream, certificate.into()).await;
                }
                Ok(Err(error)) => tracing::debug!(%peer, %error, "a TLS handshake failed"),
                Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
            }
        });
    }
}

/// Answers /healthz on the loopback for ever.
pub async fn serve_health(listener: TcpListener) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        tokio::spawn(async move {
            let answer = service_fn(|request: Request<Incoming>| async move {
                Ok::<_, Infallible>(match request.uri().path() {
                    "/healthz" => text(StatusCode::OK, "ok"),
                    _ => text(StatusCode::NOT_FOUND, "not found"),
                })
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), answer)
                .await;
        });
    }
}

async fn serve_connection(
    server: Arc<Server>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    certificate: Arc<Option<Vec<u8>>>,
) {
    let answer = service_fn(move |request| {
        let (server, certificate) = (server.clone(), certificate.clone());
        async move {
            let described = format!("{} {}", request.method(), request.uri().path());
            Ok::<_, Infallible>(
                server
                    .answer(request, certificate.as_deref())
                    .await
                    .unwrap_or_else(|error| {
                        tracing::debug!(request = described, %error, "a request failed");
                        text(error.status(), &error.to_string())
                    }),
            )
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), answer)
        .with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection broke");
    }
}

fn text(status: StatusCode, text: &str) -> Response<Body> {
    let mut answer = Response::new(full(text.to_owned()));
    *answer.status_mut() = status;
    let plain = http::HeaderValue::from_static("text/plain; charset=utf-8");
    answer
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, plain);
    answer
}

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed()
}

impl Server {
    async fn answer(
        &self,
        request: Request<Incoming>,
        certificate: Option<&[u8]>,
    ) -> Result<Response<Body>, ServeError> {
        let path = decode(request.uri().path());
        // Read once, for the right to it and for the answer: no spelling is seen in two ways.
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        self.gate
            .admit(certificate, request.headers(), request.method(), &parts)
            .await?;
        let query = Query::parse(request.uri().query().unwrap_or_default());
        let get = request.method() == Method::GET;
        match (parts.as_slice(), get) {
            (["healthz"], true) => Ok(text(StatusCode::OK, "ok")),
            (["pods"], true) => self.pods(),
            (["metrics"], true) => Ok(text(StatusCode::OK, &self.metrics())),
            (["containerLogs", namespace, pod, container], true) => {
                self.logs(namespace, pod, container, &query).await
            }
            (["logs", below @ ..], true) => self.node_logs(below, path.ends_with('/')).await,
            (["exec", namespace, pod, container] | ["exec", namespace, pod, _, container], _) => {
                let pod = self.find(namespace, pod)?;
                let container_id = self.running(&pod, container).await?;
                let command = query.all("command");
                if command.is_empty() {
                    return Err(ServeError::BadRequest(
                        "you must specify at least one command for the container".to_owned(),
                    ));
                }
                self.tunnel(
                    request,
                    StreamRequest::Exec {
                        container_id,
                        command,
                        tty: query.flag(&["tty"]),
                        stdin: query.flag(&["input", "stdin"]),
                        stdout: query.flag(&["output", "stdout"]),
                        stderr: query.flag(&["error", "stderr"]) && !query.flag(&["tty"]),
                    },
                )
                .await
            }
            (
                ["attach", namespace, pod, container] | ["attach", namespace, pod, _, container],
                _,
            ) => {
                let pod = self.find(namespace, pod)?;
                let container_id = self.running(&pod, container).await?;
                let spec = find_container(&pod, container);
                let tty = spec.and_then(|c| c.tty).unwrap_or(false);
                self.tunnel(
                    request,
                    StreamRequest::Attach {
                        container_id,
                        tty,
                        stdin: query.flag(&["input", "stdin"]),
                        stdout: query.flag(&["output", "stdout"]),
                        stderr: query.flag(&["error", "stderr"]) && !tty,
                    },
                )
                .await
            }
            (["portForward", namespace, pod] | ["portForward", namespace, pod, _], _) => {
                let pod = self.find(namespace, pod)?;
                let view = self
                    .runtime
                    .observe(&PodKey::of(&pod).uid)
                    .await
                    .map_err(|e| ServeError::Internal(e.to_string()))?;
                let sandbox = view.sandboxes.iter().find(|s| s.ready);
                let sandbox = sandbox.ok_or_else(|| {
                    ServeError::NotFound(format!(
                        "pod {namespace}/{} has no sandbox",
                        PodKey::of(&pod).name
                    ))
                })?;
                let ports = query
                    .all("port")
                    .iter()
                    .chain(&query.all("ports"))
                    .flat_map(|p| p.split(','))
                    .filter_map(|p| p.parse().ok())
                    .collect();
                self.tunnel(
                    request,
                    StreamRequest::PortForward {
                        sandbox_id: sandbox.id.clone(),
                        ports,
                    },
                )
                .await
            }
            _ => Err(ServeError::NotFound("404 page not found".to_owned())),
        }
    }

    fn find(&self, namespace: &str, name: &str) -> Result<Arc<Pod>, ServeError> {
        self.pods.find(namespace, name).ok_or_else(|| {
            ServeError::NotFound(format!(
                "pod \"{name}\" is not on this node (namespace {namespace})"
            ))
        })
    }

    async fn running(&self, pod: &Pod, container: &str) -> Result<String, ServeError> {
        let view = self
            .runtime
            .observe(&PodKey::of(pod).uid)
            .await
            .map_err(|e| ServeError::Internal(e.to_string()))?;
        match view.latest(container) {
            Some(run) if run.phase == ContainerPhase::Running => Ok(run.id.clone()),
            Some(_) => Err(ServeError::BadRequest(format!(
                "container {container} is not running"
            ))),
            None => Err(ServeError::NotFound(format!(
                "container not found (\"{container}\")"
            ))),
        }
    }

    async fn tunnel(
        &self,
        request: Request<Incoming>,
        stream: StreamRequest,
    ) -> Result<Response<Body>, ServeError> {
        let url = self
            .runtime
            .stream_url(stream)
            .await
            .map_err(|e| ServeError::Internal(e.to_string()))?;
        tunnel::forward(request, &url)
            .await
            .map_err(|e| ServeError::Internal(e.to_string()))
    }

    fn pods(&self) -> Result<Response<Body>, ServeError> {
        let list = serde_json::json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self.pods.all()});
        let mut answer = Response::new(full(list.to_string()));
        let json = http::HeaderValue::from_static("application/json");
        answer
            .headers_mut()
            .insert(http::header::CONTENT_TYPE, json);
        Ok(answer)
    }

    fn metrics(&self) -> String {
        let pods = self.pods.all();
        let running = pods
            .iter()
            .filter(|p| p.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running"))
            .count();
        format!(
            "# HELP keelway_kubelet_pods Pods that are bound to this node.\n# TYPE keelway_kubelet_pods gauge\nkeelway_kubelet_pods {}\n\
             # HELP kubelet_running_pods Pods that are in phase Running.\n# TYPE kubelet_running_pods gauge\nkubelet_running_pods {running}\n",
            pods.len()
        )
    }

    async fn node_logs(&self, below: &[&str], slash: bool) -> Result<Response<Body>, ServeError> {
        let root = self.node_log_dir.clone();
        let below: Vec<String> = below.iter().map(|part| (*part).to_owned()).collect();
        let found = tokio::task::spawn_blocking(move || {
            let below: Vec<&str> = below.iter().map(String::as_str).collect();
            node_logs::look(&root, &below, slash)
        });
        let found = found
            .await
            .map_err(|e| ServeError::Internal(e.to_string()))?
            .map_err(|error| match error.kind() {
                ErrorKind::NotFound => ServeError::NotFound("404 page not found".to_owned()),
                ErrorKind::PermissionDenied => ServeError::Forbidden("403 Forbidden".to_owned()),
                _ => ServeError::Internal(error.to_string()),
            })?;
        let (body, kind) = match found {
            Found::Folder(page) => (full(page), "text/html; charset=utf-8"),
            Found::File { file, text } => {
                let body = StreamBody::new(node_logs::chunks(file).map_ok(Frame::data));
                let kind = match text {
                    true => "text/plain; charset=utf-8",
                    false => "application/octet-stream",
                };
                (BodyExt::boxed(body), kind)
            }
        };
        let mut answer = Response::new(body);
        let kind = http::HeaderValue::from_static(kind);
        answer
            .headers_mut()
            .insert(http::header::CONTENT_TYPE, kind);
        Ok(answer)
    }

    async fn logs(
        &self,
        namespace: &str,
        name: &str,
        container: &str,
        query: &Query,
    ) -> Result<Response<Body>, ServeError> {
        let pod = self.find(namespace, name)?;
        let key = PodKey::of(&pod);
        let view = self
            .runtime
            .observe(&key.uid)
            .await
            .map_err(|e| ServeError::Internal(e.to_string()))?;
        if find_container(&pod, container).is_none() {
            return Err(ServeError::NotFound(format!(
                "container \"{container}\" in pod \"{name}\" is not known"
            )));
        }
        let mut runs = view
            .containers
            .iter()
            .filter(|c| c.name == container && c.phase != ContainerPhase::Created);
        let previous = query.flag(&["previous"]);
        let run = if previous { runs.nth(1) } else { runs.next() };
        let run = run.ok_or_else(|| {
            ServeError::BadRequest(match previous {
                true => format!(
                    "previous terminated container \"{container}\" in pod \"{name}\" not found"
                ),
                false => format!("container \"{container}\" in pod \"{name}\" is waiting to start"),
            })
        })?;
        let since = match (query.number("sinceSeconds")?, query.get("sinceTime")) {
            (Some(seconds), _) => Some(
                Timestamp::now()
                    - SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX / 2)),
            ),
            (None, Some(time)) => Some(
                time.parse()
                    .map_err(|e| ServeError::BadRequest(format!("sinceTime: {e}")))?,
            ),
            (None, None) => None,
        };
        let selection = Selection {
            tail_lines: query.number("tailLines")?,
            since,
            timestamps: query.flag(&["timestamps"]),
            limit_bytes: query.number("limitBytes")?,
            output: match query.get("stream") {
                None | Some("All") => None,
                Some("Stdout") => Some(Output::Stdout),
                Some("Stderr") => Some(Output::Stderr),
                Some(other) => {
                    let why = format!("stream must be All, Stdout or Stderr, not {other:?}");
                    return Err(ServeError::BadRequest(why));
                }
            },
            follow: query.flag(&["follow"]) && run.phase == ContainerPhase::Running,
        };
        let path = match run.log_path.as_str() {
            "" => self
                .log_dir
                .join(log_directory_name(&key))
                .join(log_path(container, run.attempt)),
            path => path.into(),
        };
        let ended = self.ended(key.uid, run.id.clone());
        let body = StreamBody::new(stream(path, selection, ended).map_ok(Frame::data));
        let mut answer = Response::new(BodyExt::boxed(body));
        let plain = http::HeaderValue::from_static("text/plain");
        answer
            .headers_mut()
            .insert(http::header::CONTENT_TYPE, plain);
        Ok(answer)
    }

    fn ended(&self, pod_uid: String, container_id: String) -> Ended {
        let (runtime, mut changes) = (self.runtime.clone(), self.changes.subscribe());
        Box::pin(async move {
            loop {
                let view = runtime.observe(&pod_uid).await;
                if view.is_ok_and(|view| {
                    !view
                        .containers
                        .iter()
                        .any(|c| c.id == container_id && c.phase == ContainerPhase::Running)
                }) {
                    return;
                }
                let ours =
                    async { while changes.recv().await.is_ok_and(|id| *id != *container_id) {} };
                let _ = tokio::time::timeout(LOOK_PERIOD, ours).await;
            }
        })
    }
}

/// Binds a listener of the server.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, std::io::Error> {
    TcpListener::bind(address).await
}

/// Opens a connection to a streaming address of the runtime.
async fn connect(authority: &str) -> Result<TcpStream, std::io::Error> {
    let stream = TcpStream::connect(authority).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
