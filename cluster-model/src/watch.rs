//! Changes from a Kubernetes API: lists and watches, begun again for as long as the process lives.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use kube::runtime::utils::Backoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Config};
use tokio::sync::mpsc;

use crate::arrived::{Arrived, Watched};
use crate::{
    Change, EndpointSlice, Kind, Node, Object, ObjectKey, ObjectRef, Pod, Rejected, Service, share,
};

pub use kube;

/// Where the API server is, and as whom to speak to it.
#[derive(Clone, Debug, Default)]
pub struct ApiOptions {
    /// A kubeconfig file; without one, the ServiceAccount of the pod this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// The server's URL, in place of the one that the kubeconfig or the environment names.
    pub api_server: Option<String>,
}

/// Why no client could be made.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("kubeconfig {}: {source}", path.display())]
    Kubeconfig {
        path: PathBuf,
        source: kube::config::KubeconfigError,
    },
    #[error("API server {url:?} is not a URL such as https://192.0.2.1:6443")]
    Url { url: String },
    #[error(
        "no kubeconfig is given and this is no pod ({} is missing): pass --kubeconfig",
        path.display()
    )]
    NoCredentials { path: PathBuf },
    #[error("in-cluster configuration: {0}; pass --api-server or --kubeconfig")]
    InCluster(#[from] kube::config::InClusterError),
    #[error("client: {0}")]
    Client(#[from] kube::Error),
}

const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// A client of the API server that the options describe. Connects when first used.
pub async fn client(options: &ApiOptions) -> Result<Client, ApiError> {
    let url = match &options.api_server {
        None => None,
        Some(url) => match url.parse::<http::Uri>() {
            Ok(uri) if uri.scheme().is_some() && uri.host().is_some() => Some(uri),
            _ => return Err(ApiError::Url { url: url.clone() }),
        },
    };
    let config = match (&options.kubeconfig, url) {
        (Some(path), url) => {
            let failed = |source| ApiError::Kubeconfig {
                path: path.clone(),
                source,
            };
            let file = Kubeconfig::read_from(path).map_err(failed)?;
            let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .map_err(failed)?;
            if let Some(url) = url {
                config.cluster_url = url;
            }
            config
        }
        (None, Some(url)) => in_pod(url)?,
        (None, None) => Config::incluster()?,
    };
    Ok(Client::try_from(config)?)
}

/// The pod's own credentials with another address of the server: the one in the environment is a Service's, and
/// whoever makes Services work must not depend on them.
fn in_pod(url: http::Uri) -> Result<Config, ApiError> {
    let token = Path::new(SERVICE_ACCOUNT).join("token");
    if !token.exists() {
        return Err(ApiError::NoCredentials { path: token });
    }
    let mut config = Config::new(url);
    config.root_cert_file = Some(Path::new(SERVICE_ACCOUNT).join("ca.crt"));
    // Without a list kube asks the system for its authorities first, and our images have none. An empty one trusts
    // nobody; the verifier that reads the file takes its place.
    config.root_cert = Some(Vec::new());
    config.auth_info = AuthInfo {
        token_file: Some(token.to_string_lossy().into_owned()),
        ..AuthInfo::default()
    };
    Ok(config)
}

/// The files that a client is made of. It reads certificates and keys when it is made, and a token every minute by a clock that can be set;
/// where they are replaced because they end, another one must be made.
pub fn credentials(options: &ApiOptions) -> Vec<PathBuf> {
    let Some(path) = &options.kubeconfig else {
        return ["token", "ca.crt"]
            .map(|name| Path::new(SERVICE_ACCOUNT).join(name))
            .into();
    };
    let mut files = vec![path.clone()];
    if let Ok(read) = Kubeconfig::read_from(path) {
        let users = read
            .auth_infos
            .into_iter()
            .filter_map(|user| user.auth_info);
        let clusters = read.clusters.into_iter().filter_map(|one| one.cluster);
        let named = users
            .flat_map(|user| [user.client_certificate, user.client_key, user.token_file])
            .chain(clusters.map(|cluster| cluster.certificate_authority));
        files.extend(named.flatten().map(PathBuf::from));
    }
    files
}

/// The servers that a kubeconfig names; none when it cannot be read, which is said when a client is made of it.
pub fn servers(kubeconfig: &Path) -> Vec<String> {
    let read = Kubeconfig::read_from(kubeconfig).unwrap_or_default();
    let clusters = read.clusters.into_iter().filter_map(|one| one.cluster);
    clusters.filter_map(|cluster| cluster.server).collect()
}

/// What a watch reports.
#[derive(Clone, Debug)]
pub enum Report {
    Change(Change),
    /// An object was malformed; the `Change` before, which removes it or lists the others, has made it absent.
    Rejected(Rejected),
    /// Of this kind everything up to a resourceVersion has been reported: the end of what one event brought.
    Reached {
        kind: Kind,
        version: u64,
    },
    /// The server does not take who asks for whom it should know. The `Failed` after it says so in words.
    Refused,
    /// The server could not be asked. The watch goes on, with growing pauses.
    Failed {
        kind: Kind,
        error: String,
    },
}

/// Lists and watches the kinds, and sends what it learns until the receiver is gone. A kind's first complete list
/// arrives as one `Change::Replace`; so does every list after a watch was lost.
pub async fn watch(client: Client, kinds: &[Kind], reports: mpsc::Sender<Report>) {
    follow(client, kinds, List::Objects(Vec::new()), reports).await;
}

/// As [`watch`], for those who need only what names are made of, and `part` of that. Lists are held as bytes until they are complete: kept
/// between the pages that they are read from, small objects would leave as much memory free as they take.
pub async fn watch_part(
    client: Client,
    kinds: &[Kind],
    part: fn(Object) -> Object,
    reports: mpsc::Sender<Report>,
) {
    let list = List::Packed {
        part,
        frames: Vec::new(),
        others: Vec::new(),
    };
    follow(client, kinds, list, reports).await;
}

async fn follow(client: Client, kinds: &[Kind], list: List, reports: mpsc::Sender<Report>) {
    let streams = kinds.iter().map(|kind| {
        let list = list.clone();
        match kind {
            Kind::Service => stream::<Service>(&client, *kind, Object::Service, list),
            Kind::EndpointSlice => {
                stream::<EndpointSlice>(&client, *kind, Object::EndpointSlice, list)
            }
            Kind::Node => stream::<Node>(&client, *kind, Object::Node, list),
            Kind::Pod => stream::<Pod>(&client, *kind, Object::Pod, list),
        }
    });
    let mut all = futures::stream::select_all(streams);
    while let Some(report) = all.next().await {
        if reports.send(report).await.is_err() {
            return;
        }
    }
}

/// A list that is not complete yet.
#[derive(Clone)]
enum List {
    Objects(Vec<Object>),
    Packed {
        part: fn(Object) -> Object,
        frames: Vec<u8>,
        /// Of kinds that have no frames.
        others: Vec<Object>,
    },
}

impl List {
    /// What is wanted of an object.
    fn part(&self, object: Object) -> Object {
        match self {
            List::Objects(_) => object,
            List::Packed { part, .. } => part(object),
        }
    }

    fn clear(&mut self) {
        match self {
            List::Objects(objects) => objects.clear(),
            List::Packed { frames, others, .. } => {
                frames.clear();
                others.clear();
            }
        }
    }

    fn push(&mut self, object: Object) {
        let object = self.part(object);
        match self {
            List::Objects(objects) => objects.push(object),
            List::Packed { frames, others, .. } if share::KINDS.contains(&object.kind()) => {
                share::put(frames, &share::Message::Listed(object));
            }
            List::Packed { others, .. } => others.push(object),
        }
    }

    fn take(&mut self) -> Vec<Object> {
        match self {
            List::Objects(objects) => std::mem::take(objects),
            List::Packed {
                part,
                frames,
                others,
            } => {
                let frames = std::mem::take(frames);
                let mut objects = std::mem::take(others);
                let mut rest = &frames[..];
                while let Some(message) = share::next(&mut rest) {
                    if let share::Message::Listed(object) = message {
                        objects.push(part(object));
                    }
                }
                objects
            }
        }
    }
}

/// Pauses between attempts: soon at first, for a server that restarts; at most five seconds, so that a node is not long without
/// news when the server is back; never quite the same, so that many nodes do not come at once.
#[derive(Default)]
struct Pauses {
    attempts: u32,
    last: Option<Instant>,
}

const PAUSE_MIN_MS: u64 = 100;
const PAUSE_MAX_MS: u64 = 5_000;

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        // A watch in which nothing happens tells nobody that it is well.
        let quiet = Duration::from_millis(4 * PAUSE_MAX_MS);
        if self.last.is_some_and(|last| last.elapsed() > quiet) {
            self.attempts = 0;
        }
        let doubled = PAUSE_MIN_MS << self.attempts.min(10);
        self.attempts += 1;
        self.last = Some(Instant::now());
        let random = RandomState::new().build_hasher().finish();
        let pause = doubled.min(PAUSE_MAX_MS);
        Some(Duration::from_millis(pause / 2 + random % (pause / 2 + 1)))
    }
}

impl Backoff for Pauses {
    /// Called with everything that is not an error, and that a list is about to be asked for is told as such: a server that is away would be
    /// asked ten times a second. What goes well for longer than the longest pause is believed.
    fn reset(&mut self) {
        let longest = Duration::from_millis(PAUSE_MAX_MS);
        if self.last.is_some_and(|last| last.elapsed() > longest) {
            *self = Self::default();
        }
    }
}

/// Whether a server has answered, and one of the two refuses the other: by a status, or already in the handshake of TLS.
fn refuses(error: &watcher::Error) -> bool {
    use watcher::Error::{
        InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed,
    };
    const UNAUTHORIZED: u16 = 401;
    match error {
        WatchError(status) => status.code == UNAUTHORIZED,
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status)) => status.code == UNAUTHORIZED,
        NoResourceVersion => false,
        InitialListFailed(error) | WatchStartFailed(error) | WatchFailed(error) => {
            let error: &(dyn std::error::Error + 'static) = error;
            let mut causes = std::iter::successors(Some(error), |error| error.source());
            // An alert of the server's, or a server that whoever asks does not take for its own: the authority is another by now.
            causes.any(|cause| {
                let words = cause.to_string();
                ["received fatal alert", "invalid peer certificate"]
                    .iter()
                    .any(|refusal| words.contains(refusal))
            })
        }
    }
}

fn version_of(text: Option<&str>) -> u64 {
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}

/// Objects of a list that are asked for at a time: each answer is held whole until it is read.
const PAGE_OBJECTS: u32 = 500;

type Reports = std::pin::Pin<Box<dyn Stream<Item = Report> + Send>>;

fn stream<T: Watched>(
    client: &Client,
    kind: Kind,
    wrap: fn(Arc<T>) -> Object,
    mut list: List,
) -> Reports {
    let config = watcher::Config::default().page_size(PAGE_OBJECTS);
    let events = watcher(Api::<Arrived<T>>::all(client.clone()), config).backoff(Pauses::default());
    let mut malformed: Vec<Report> = Vec::new();
    let mut reached = 0;
    let reports = events.flat_map(move |event| {
        let mut out = Vec::with_capacity(2);
        let told = match &event {
            Ok(
                watcher::Event::InitApply(object)
                | watcher::Event::Apply(object)
                | watcher::Event::Delete(object),
            ) => version_of(object.meta.resource_version.as_deref()),
            _ => 0,
        };
        // Versions of one resource are numbers that grow (KEP-5504); a server of another mind counts as having none.
        reached = told.max(reached);
        let listing = matches!(
            event,
            Ok(watcher::Event::Init | watcher::Event::InitApply(_))
        );
        match event {
            Ok(watcher::Event::Init) => {
                list.clear();
                malformed.clear();
            }
            Ok(watcher::Event::InitApply(arrived)) => match arrived.object {
                Ok(object) => list.push(wrap(object)),
                Err(rejected) => malformed.push(Report::Rejected(rejected)),
            },
            Ok(watcher::Event::InitDone) => {
                out.push(Report::Change(Change::Replace(kind, list.take())));
                out.append(&mut malformed);
            }
            Ok(watcher::Event::Apply(arrived)) => match arrived.object {
                Ok(object) => {
                    out.push(Report::Change(Change::Upsert(list.part(wrap(object)))));
                }
                Err(rejected) => {
                    let gone = rejected.object.clone();
                    out.extend([
                        Report::Change(Change::Remove(gone)),
                        Report::Rejected(rejected),
                    ]);
                }
            },
            Ok(watcher::Event::Delete(arrived)) => {
                // The name is all that matters: the last state of a deleted object may be malformed too.
                let meta = &arrived.meta;
                let key = ObjectKey::new(
                    meta.namespace.clone().unwrap_or_default(),
                    meta.name.clone().unwrap_or_default(),
                );
                out.push(Report::Change(Change::Remove(ObjectRef { kind, key })));
            }
            Err(error) => {
                tracing::warn!(%kind, %error, "watch");
                if refuses(&error) {
                    out.push(Report::Refused);
                }
                out.push(Report::Failed {
                    kind,
                    error: error.to_string(),
                });
            }
        }
        if !listing {
            out.push(Report::Reached {
                kind,
                version: reached,
            });
        }
        futures::stream::iter(out)
    });
    Box::pin(reports)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16) -> kube::core::Status {
        kube::core::Status {
            code,
            ..kube::core::Status::default()
        }
    }

    #[test]
    fn a_server_that_does_not_know_who_asks_is_told_from_one_that_is_away() {
        use watcher::Error::{InitialListFailed, WatchError, WatchFailed, WatchStartFailed};
        let alert = || {
            let inner = std::io::Error::other("received fatal alert: CertificateExpired");
            kube::Error::Service(Box::new(std::io::Error::other(inner)))
        };
        let api = |code| kube::Error::Api(Box::new(status(code)));
        let away = kube::Error::Service("connection refused".into());
        for (error, expected) in [
            (InitialListFailed(api(401)), true),
            (WatchStartFailed(api(401)), true),
            (WatchError(Box::new(status(401))), true),
            (WatchFailed(alert()), true),
            (InitialListFailed(api(503)), false),
            (InitialListFailed(api(403)), false),
            (WatchError(Box::new(status(410))), false),
            (WatchFailed(away), false),
        ] {
            assert_eq!(refuses(&error), expected, "{error:?}");
        }
    }

    #[test]
    fn a_clients_credentials_are_the_kubeconfig_and_what_it_names() {
        let folder = tempfile::tempdir().unwrap();
        let kubeconfig = folder.path().join("kubeconfig");
        let text = "{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}], \
            clusters: [{name: c, cluster: {server: 'https://192.0.2.1', certificate-authority: ca.crt}}], \
            users: [{name: u, user: {client-certificate: /etc/client.pem, client-key: /etc/client.key}}]}";
        std::fs::write(&kubeconfig, text).unwrap();
        let options = ApiOptions {
            kubeconfig: Some(kubeconfig.clone()),
            api_server: None,
        };
        let ca = folder.path().join("ca.crt");
        let files = [
            kubeconfig,
            "/etc/client.pem".into(),
            "/etc/client.key".into(),
            ca,
        ];
        assert_eq!(credentials(&options), files);
        assert_eq!(credentials(&ApiOptions::default()).len(), 2);
    }

    #[test]
    fn pauses_grow_to_five_seconds_and_begin_again_after_success() {
        let mut pauses = Pauses::default();
        let first = pauses.next().unwrap();
        assert!(first >= Duration::from_millis(50) && first <= Duration::from_millis(100));
        for _ in 0..100 {
            assert!(pauses.next().unwrap() <= Duration::from_secs(5));
        }
        assert!(pauses.next().unwrap() >= Duration::from_millis(2500));
        // "A list is asked for" is no success.
        pauses.reset();
        assert!(pauses.next().unwrap() >= Duration::from_millis(2500));
        pauses.last = Instant::now().checked_sub(Duration::from_millis(PAUSE_MAX_MS + 1));
        pauses.reset();
        assert!(pauses.next().unwrap() <= Duration::from_millis(100));
    }
}
