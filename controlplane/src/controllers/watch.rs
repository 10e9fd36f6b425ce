//! The way in: a client of the API server, and watches that turn into snapshot changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncBufReadExt, StreamExt};
use http::{Method, Request};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResourceList;
use kube::client::{Body, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio::sync::mpsc;

use crate::pki::{Reloading, Source, TrustedServers};

use super::object::{Key, Listed, Object, ResourceType, WatchLine};

/// How long one request may take. Watches are not bounded by it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection is tested, and how long the answer may take.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// How long the server may keep a watch open, in seconds. Ending it now and then spreads watches over servers.
const WATCH_SECONDS: u32 = 290;
/// A watch that has been silent for longer than its own time limit hangs on a dead connection.
const WATCH_SILENCE_MAX: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 10);
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot read kubeconfig {path}: {source}")]
    Kubeconfig {
        path: PathBuf,
        source: kube::config::KubeconfigError,
    },
    #[error("cannot make a client of kubeconfig {path}: {source}")]
    Client { path: PathBuf, source: kube::Error },
}

/// Why a request did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The server answered, and refused.
    #[error("{message}")]
    Refused {
        code: u16,
        reason: String,
        message: String,
    },
    /// No answer, or one that cannot be read: whether the request was carried out is not known.
    #[error("no answer to {method} {path}: {message}")]
    Unknown {
        method: Method,
        path: String,
        message: String,
    },
}

impl CallError {
    pub fn code(&self) -> Option<u16> {
        match self {
            CallError::Refused { code, .. } => Some(*code),
            CallError::Unknown { .. } => None,
        }
    }

    pub fn is_already_there(&self) -> bool {
        matches!(self, CallError::Refused { code: 409, reason, .. } if reason == "AlreadyExists")
    }
}

/// A connection to the API server, shared by all who clone it.
#[derive(Clone)]
pub struct Api {
    client: kube::Client,
}

impl Api {
    /// Reads the kubeconfig; nothing is asked of the server yet. `program` is what managedFields and logs name the caller by.
    pub async fn from_kubeconfig(path: &Path, program: &str) -> Result<Self, ClientError> {
        let config = async {
            let kubeconfig = Kubeconfig::read_from(path)?;
            kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await
        };
        let mut config = config.await.map_err(|source| ClientError::Kubeconfig {
            path: path.into(),
            source,
        })?;
        let agent = format!("{program}/{}", env!("CARGO_PKG_VERSION"));
        if let Ok(agent) = http::HeaderValue::try_from(agent) {
            config.headers.push((http::header::USER_AGENT, agent));
        }
        // A certificate in the file itself may be renewed there; what is named by it is read once.
        let renewed = Reloading::new(Source::Kubeconfig(path.into())).ok();
        let trusted = TrustedServers::of_kubeconfig(path);
        let client = connect(config, renewed, trusted).map_err(|source| ClientError::Client {
            path: path.into(),
            source,
        })?;
        Ok(Self { client })
    }

    /// One request; the answer's body. Bodies of PATCH are merge patches, all others JSON.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&serde_json::Value>,
    ) -> Result<String, CallError> {
        let unknown = |message: String| CallError::Unknown {
            method: method.clone(),
            path: path.into(),
            message,
        };
        let content_type = if method == Method::PATCH {
            "application/merge-patch+json"
        } else {
            "application/json"
        };
        let bytes = body
            .map(|body| body.to_string().into_bytes())
            .unwrap_or_default();
        let request = Request::builder()
            .method(method.clone())
            .uri(path)
            .header(http::header::ACCEPT, "application/json")
            .header(http::header::CONTENT_TYPE, content_type)
            .body(bytes)
            .map_err(|error| unknown(error.to_string()))?;
        match tokio::time::timeout(REQUEST_TIMEOUT, self.client.request_text(request)).await {
            Err(_) => Err(unknown(format!(
                "none within {} s",
                REQUEST_TIMEOUT.as_secs()
            ))),
            Ok(Ok(text)) => Ok(text),
            Ok(Err(kube::Error::Api(status))) => Err(CallError::Refused {
                code: status.code,
                reason: status.reason.clone(),
                message: status.message.clone(),
            }),
            Ok(Err(error)) => Err(unknown(error.to_string())),
        }
    }

    /// An object, or None when there is none of that name.
    pub async fn get(
        &self,
        resource: &Arc<ResourceType>,
        key: &Key,
    ) -> Result<Option<Object>, CallError> {
        let path = resource.object_path(key);
        match self.call(Method::GET, &path, None).await {
            Ok(text) => Ok(Some(decode(resource, &path, &text)?)),
            Err(error) if error.code() == Some(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The resources that can be listed, watched and deleted, each in the version that the server prefers.
    pub async fn discover(&self) -> Result<Vec<Arc<ResourceType>>, CallError> {
        let unknown = |error: kube::Error| CallError::Unknown {
            method: Method::GET,
            path: "/apis".into(),
            message: error.to_string(),
        };
        let core = self
            .client
            .list_core_api_resources("v1")
            .await
            .map_err(unknown)?;
        let mut found = usable(&core, "", "v1");
        for group in self.client.list_api_groups().await.map_err(unknown)?.groups {
            let Some(version) = group.preferred_version.as_ref().or(group.versions.first()) else {
                continue;
            };
            let list = self
                .client
                .list_api_group_resources(&version.group_version)
                .await
                .map_err(unknown)?;
            found.extend(usable(&list, &group.name, &version.version));
        }
        Ok(found)
    }

    async fn list(&self, resource: &Arc<ResourceType>) -> Result<Listed, CallError> {
        let path = resource.path("");
        let text = self.call(Method::GET, &path, None).await?;
        Listed::decode(resource, &text).map_err(|error| CallError::Unknown {
            method: Method::GET,
            path,
            message: format!("the answer is not a list of {}: {error}", resource.kind),
        })
    }
}

/// A client whose requests and watches share one HTTP/2 connection: kube's own speaks HTTP/1 only, which takes a connection
/// and a TLS handshake for each of some thirty watches, and leaves Nagle's algorithm on.
fn connect(
    config: kube::Config,
    renewed: Option<Arc<Reloading>>,
    trusted: Option<TrustedServers>,
) -> Result<kube::Client, kube::Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    let mut tls = config.rustls_client_config()?;
    if let Some(renewed) = renewed {
        tls.client_auth_cert_resolver = renewed;
    }
    if let Some(trusted) = trusted.filter(|_| !config.accept_invalid_certs) {
        let mut tls = tls.dangerous();
        tls.set_certificate_verifier(Arc::new(trusted));
    }
    let tls = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_only()
        .enable_all_versions()
        .wrap_connector(tcp);
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_keep_alive_interval(KEEP_ALIVE)
        .http2_keep_alive_timeout(KEEP_ALIVE)
        .build(tls);
    let service = tower::ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .map_err(tower::BoxError::from)
        .service(http);
    Ok(kube::Client::new(service, config.default_namespace))
}

pub fn decode(resource: &Arc<ResourceType>, path: &str, text: &str) -> Result<Object, CallError> {
    Object::decode(resource, text).map_err(|error| CallError::Unknown {
        method: Method::GET,
        path: path.into(),
        message: format!("the answer is not a {}: {error}", resource.kind),
    })
}

fn usable(list: &APIResourceList, group: &str, version: &str) -> Vec<Arc<ResourceType>> {
    let able = |verbs: &[String]| {
        ["list", "watch", "delete"]
            .iter()
            .all(|verb| verbs.iter().any(|found| found == verb))
    };
    list.resources
        .iter()
        .filter(|resource| !resource.name.contains('/') && able(&resource.verbs))
        .map(|resource| {
            Arc::new(ResourceType {
                group: group.into(),
                version: version.into(),
                kind: resource.kind.clone(),
                plural: resource.name.clone(),
                namespaced: resource.namespaced,
            })
        })
        .collect()
}

/// News from the API server.
pub enum Feed {
    /// The resources that there are.
    Resources(Vec<Arc<ResourceType>>),
    /// All objects of a resource at a revision.
    Listed {
        resource: Arc<ResourceType>,
        objects: Vec<Object>,
        revision: u64,
    },
    Changed(Object),
    Gone(Object),
    /// The server does not serve the resource.
    Unserved(Arc<ResourceType>),
}

/// Keeps the receiver informed of all objects of a resource, for as long as there is a receiver.
pub async fn follow(api: Api, resource: Arc<ResourceType>, feed: mpsc::Sender<Feed>) {
    let mut delay = RETRY_MIN;
    while !feed.is_closed() {
        let listed = match api.list(&resource).await {
            Ok(listed) => listed,
            Err(error) => {
                tracing::debug!(resource = resource.plural, %error, "list failed");
                if error.code() == Some(404)
                    && feed.send(Feed::Unserved(resource.clone())).await.is_err()
                {
                    return;
                }
                tokio::time::sleep(delay).await;
                delay = (delay * 2).min(RETRY_MAX);
                continue;
            }
        };
        delay = RETRY_MIN;
        let mut revision = listed.revision;
        let listed = Feed::Listed {
            resource: resource.clone(),
            objects: listed.objects,
            revision: revision.parse().unwrap_or(0),
        };
        if feed.send(listed).await.is_err() {
            return;
        }
        // Watched until the server no longer knows the revision or says something that cannot be read.
        loop {
            match watch(&api, &resource, &mut revision, &feed).await {
                Watched::Ended => delay = RETRY_MIN,
                Watched::Failed(message) => {
                    tracing::debug!(resource = resource.plural, message, "watch failed");
                    tokio::time::sleep(delay).await;
                    delay = (delay * 2).min(RETRY_MAX);
                }
                Watched::ListAgain(message) => {
                    tracing::debug!(
                        resource = resource.plural,
                        message,
                        "watch cannot go on, listing again"
                    );
                    tokio::time::sleep(delay).await;
                    break;
                }
                Watched::NoReceiver => return,
            }
        }
    }
}

enum Watched {
    Ended,
    Failed(String),
    ListAgain(String),
    NoReceiver,
}

async fn watch(
    api: &Api,
    resource: &Arc<ResourceType>,
    revision: &mut String,
    feed: &mpsc::Sender<Feed>,
) -> Watched {
    let path = format!(
        "{}?watch=true&allowWatchBookmarks=true&timeoutSeconds={WATCH_SECONDS}&resourceVersion={revision}",
        resource.path("")
    );
    let request = Request::get(path)
        .header(http::header::ACCEPT, "application/json")
        // Compressed watches come as one gzip member per event, which the client's decoder does not follow.
        .header(http::header::ACCEPT_ENCODING, "identity")
        .body(Vec::new());
    let request = match request {
        Ok(request) => request,
        Err(error) => return Watched::Failed(error.to_string()),
    };
    let stream = match open(api, request).await {
        Ok(stream) => stream,
        Err(kube::Error::Api(status)) if status.code == 410 => {
            return Watched::ListAgain(status.message.clone());
        }
        Err(error) => return Watched::Failed(error.to_string()),
    };
    let mut lines = std::pin::pin!(stream);
    loop {
        let line = match tokio::time::timeout(WATCH_SILENCE_MAX, lines.next()).await {
            Err(_) => return Watched::Failed("silent for too long".into()),
            Ok(None) => return Watched::Ended,
            Ok(Some(Err(error))) => return Watched::Failed(error.to_string()),
            Ok(Some(Ok(line))) => line,
        };
        if line.is_empty() {
            continue;
        }
        let news = match WatchLine::decode(resource, &line) {
            Ok(WatchLine::Added(object) | WatchLine::Modified(object)) => {
                advance(revision, &object);
                Feed::Changed(object)
            }
            Ok(WatchLine::Deleted(object)) => {
                advance(revision, &object);
                Feed::Gone(object)
            }
            Ok(WatchLine::Bookmark(bookmark)) => {
                if let Some(at) = bookmark.metadata.resource_version {
                    *revision = at;
                }
                continue;
            }
            Ok(WatchLine::Error(status)) => return Watched::ListAgain(status.to_string()),
            Err(error) => return Watched::ListAgain(error.to_string()),
        };
        if feed.send(news).await.is_err() {
            return Watched::NoReceiver;
        }
    }
}

/// A watch that breaks off goes on after the last object it brought.
fn advance(revision: &mut String, object: &Object) {
    if let Some(at) = &object.meta().resource_version {
        revision.clone_from(at);
    }
}

async fn open(
    api: &Api,
    request: Request<Vec<u8>>,
) -> Result<impl futures::Stream<Item = std::io::Result<String>> + use<>, kube::Error> {
    // `request_stream` does not look at the status: an error's body would be read as events.
    let response = api.client.send(request.map(Body::from)).await?;
    let (parts, body) = response.into_parts();
    let mut reader = Box::pin(futures::io::BufReader::new(
        futures::TryStreamExt::into_async_read(
            http_body_util::BodyExt::into_data_stream(body)
                .map(|part| part.map_err(std::io::Error::other)),
        ),
    ));
    if !parts.status.is_success() {
        let mut text = String::new();
        let read = futures::AsyncReadExt::read_to_string(&mut reader, &mut text).await;
        let message = read.map_or_else(|error| error.to_string(), |_| text);
        let status = kube::core::Status::failure(&message, parts.status.as_str())
            .with_code(parts.status.as_u16());
        return Err(kube::Error::Api(Box::new(status)));
    }
    Ok(reader.lines())
}
