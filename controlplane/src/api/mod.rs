//! The API server: one resource router over the store, driven by the registry's tables.
//!
//! A request goes: [`listener`] (TLS) -> [`Api::handle`] (who and what: [`authenticate`], [`request`]; may they:
//! [`authorize`]) -> [`read`], [`watch`], or on other threads ([`write_threads`]) [`write`], [`delete`] or a
//! [`subresource`] -> [`reply`]. What is special to a kind is in [`strategy`] and [`table`], and nowhere else.

mod admission;
mod allocation;
mod audit;
mod authenticate;
mod authority;
mod authorize;
mod backup;
mod body;
pub mod bootstrap;
mod change;
mod components;
mod compression;
mod config;
mod connect;
mod contention;
mod conversion;
mod delete;
mod documents;
mod encodings;
mod fairness;
mod fields;
mod forward;
mod front_proxy;
mod health;
mod impersonate;
mod kubelet;
mod listener;
mod metrics;
mod negotiation;
mod notices;
mod object;
mod patching;
mod placement;
mod proxy;
mod read;
mod reply;
mod request;
mod review;
mod roles;
mod selection;
mod servers;
mod service_range;
mod status;
mod storing;
mod strategy;
mod subresource;
mod table;
mod unread;
mod unverified;
mod watch;
mod write;
mod write_threads;

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use futures::FutureExt;
use http::{Method, StatusCode, request::Parts};
use hyper::body::Incoming;
use rustls::pki_types::CertificateDer;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::auth::{AuthError, Identity, TokenKeys};
use crate::pki;
use crate::registry::{self, Resource};
use crate::store::{Store, StoreError};
use crate::streams;

pub(crate) use admission::{Usage, covers, usage};
pub(crate) use allocation::MANAGED_BY;
pub use backup::BACKUP_PATH;
pub use config::{AuditFiles, Authorization, Config, TOKEN_ISSUER};
pub use front_proxy::FrontProxyConfig;
use reply::Answer;
use request::{Encoding, Form, ListOptions, Query, Target, WriteOptions};
use status::Status;

/// The API server's state: what it needs besides the store is small and can be rebuilt from the store.
pub struct Api {
    store: Arc<dyn Store>,
    config: Config,
    tokens: TokenKeys,
    authority: authority::Authority,
    placement: authority::Followed<placement::Placement>,
    /// The resources that are offered, of those the tables know.
    served: Vec<&'static Resource>,
    services: allocation::ServiceAllocator,
    events: Arc<watch::EncodedEvents>,
    encodings: Arc<encodings::Encodings>,
    beginnings: watch::Beginnings,
    kubelets: kubelet::Kubelets,
    metrics: metrics::Metrics,
    fairness: fairness::Fairness,
    contention: contention::Contention,
    audit: Option<audit::Audit>,
    proxies: Option<front_proxy::FrontProxies>,
    documents: documents::Documents,
    stop: CancellationToken,
}

/// The other end of a connection.
#[derive(Debug, Default)]
pub struct Peer {
    /// The verified client certificate (DER).
    certificate: Option<Vec<u8>>,
    /// Name of the proxy that it is, when it is one that is believed.
    proxy: Option<String>,
    address: Option<SocketAddr>,
    /// Whom the certificate names: worked out at the first request, for all that follow.
    identity: OnceLock<Option<Arc<Identity>>>,
}

impl Peer {
    /// Whom the client certificate names, when there is one that does.
    fn identity(&self) -> Option<&Arc<Identity>> {
        let read = || {
            let identity = Identity::from_certificate(self.certificate.as_deref()?);
            let refused = |error: &AuthError| tracing::debug!(%error, "certificate refused");
            Some(Arc::new(identity.inspect_err(refused).ok()?))
        };
        self.identity.get_or_init(read).as_ref()
    }
}

/// Why the API server cannot start, or go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Tls(#[from] listener::TlsError),
    #[error("cannot read {path}: {reason}")]
    Key { path: String, reason: String },
    #[error(transparent)]
    Audit(#[from] audit::PolicyError),
    #[error("cannot write the audit log {path}: {reason}")]
    AuditLog { path: String, reason: String },
    #[error("cannot prepare the cluster's first objects: {0}")]
    Bootstrap(String),
    #[error(transparent)]
    Lost(StoreError),
}

/// What is served: the versions that v1.36 serves unless told otherwise, which are the stable ones.
fn served() -> Vec<&'static Resource> {
    let stable = |version: &str| {
        version
            .strip_prefix('v')
            .is_some_and(|v| v.parse::<u8>().is_ok())
    };
    registry::resources()
        .iter()
        .filter(|resource| stable(resource.version))
        .collect()
}

impl Api {
    /// Prepares the server: keys, what Services hold brought together, the cluster's first objects.
    pub async fn start(
        config: Config,
        store: Arc<dyn Store>,
        stop: CancellationToken,
    ) -> Result<Arc<Self>, StartError> {
        let key = |name: &str| {
            let path = config.pki_dir.join(name);
            std::fs::read(&path).map_err(|error| StartError::Key {
                path: path.display().to_string(),
                reason: error.to_string(),
            })
        };
        let tokens = TokenKeys::from_pem(&key("sa.key")?, &key("sa.pub")?, TOKEN_ISSUER).map_err(
            |error| StartError::Key {
                path: config.pki_dir.join("sa.key").display().to_string(),
                reason: error.to_string(),
            },
        )?;
        let audit = config.audit.as_ref().map(open_audit).transpose()?;
        let client_ca = config.pki_dir.join("ca.crt");
        let proxies = config.front_proxies.clone();
        let proxies = proxies.map(|proxies| front_proxy::FrontProxies::new(proxies, &client_ca));
        let proxies = proxies.transpose()?;
        let served = served();
        let api = Arc::new(Self {
            fairness: fairness::Fairness::new(config.requests_max),
            contention: contention::Contention::default(),
            audit,
            proxies,
            services: allocation::ServiceAllocator::new(
                &config.service_cidrs,
                config.kubernetes_ip(),
            ),
            kubelets: kubelet::Kubelets::new(&config.pki_dir)?,
            documents: documents::Documents::default(),
            events: Arc::default(),
            encodings: Arc::default(),
            beginnings: watch::Beginnings::default(),
            metrics: metrics::Metrics::default(),
            store,
            config,
            tokens,
            authority: authority::Authority::default(),
            placement: authority::Followed::default(),
            served,
            stop,
        });
        let failed = |status: Status| StartError::Bootstrap(status.message);
        // First: what the cluster has from its first moment includes Services.
        let repaired = api.repair_allocations().await.map_err(failed)?;
        bootstrap::run(&api).await.map_err(failed)?;
        api.warn(&repaired).await;
        Ok(api)
    }

    /// Serves until the stop token fires, or the state is another one than what was read: then all is to start anew.
    pub async fn serve(self: Arc<Self>, listeners: Vec<TcpListener>) -> Result<(), StartError> {
        let tls = listener::server_tls(&self.config.pki_dir, self.proxies.as_ref())?;
        let stop = self.stop.clone();
        let announced = tokio::spawn(self.clone().stay_announced());
        tokio::spawn(self.clone().forget_unused_encodings());
        tokio::spawn(self.clone().keep_allocations());
        tokio::spawn(self.clone().tell_authorities());
        let store = self.store.clone();
        tokio::select! {
            () = listener::serve(self, tls, listeners, stop) => {}
            lost = store.lost() => return Err(StartError::Lost(lost)),
        }
        // A panic there is in the log, and nothing that is served here depends on it.
        let _ = announced.await;
        Ok(())
    }

    /// Tells extension servers of the authorities of callers once more, whenever these have changed.
    async fn tell_authorities(self: Arc<Self>) {
        let mut files = vec![self.config.pki_dir.join("ca.crt")];
        let proxies = self.proxies.as_ref();
        files.extend(proxies.map(|proxies| proxies.ca_file().to_owned()));
        let mut told = pki::Stamp::of(&files);
        loop {
            let now = tokio::select! {
                () = self.stop.cancelled() => return,
                now = told.changed(&files) => now,
            };
            match bootstrap::extension_authentication(&self).await {
                Ok(()) => told = now,
                Err(status) => {
                    tracing::warn!(
                        error = status.message,
                        "extension servers know the authorities of before"
                    );
                }
            }
        }
    }

    /// Gives memory back when nobody lists in protobuf any more.
    async fn forget_unused_encodings(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(encodings::UNUSED_MAX) => {}
            }
            self.encodings.forget_unused(Instant::now());
            self.beginnings.forget_unused(Instant::now());
        }
    }

    /// The other end of a connection, by the certificates that TLS has taken from it.
    fn peer(&self, chain: &[CertificateDer<'_>], address: Option<SocketAddr>) -> Peer {
        match &self.proxies {
            Some(proxies) => proxies.peer(chain, address),
            None => Peer {
                certificate: chain.first().map(|certificate| certificate.to_vec()),
                address,
                ..Peer::default()
            },
        }
    }

    /// Answers one request. Where requests are recorded, one whose client hangs up is recorded all the same.
    async fn answer(self: Arc<Self>, peer: Arc<Peer>, request: http::Request<Incoming>) -> Answer {
        let gone = CancellationToken::new();
        if self.audit.is_none() {
            return self.handle(&peer, request, &gone).await;
        }
        let _hangs_up = gone.clone().drop_guard();
        let handled = tokio::spawn(async move { self.handle(&peer, request, &gone).await });
        match handled.await {
            Ok(answer) => answer,
            Err(_) => {
                reply::encode(
                    Status::internal("the server is ending").into(),
                    Encoding::Json,
                    false,
                )
                .await
            }
        }
    }

    /// Answers one request. Failures become `Status` objects; a panic becomes one too, and is logged. When its client is `gone`, a
    /// write is done to its end, since it may be done already; nobody reads what else there is, nor ends what it leads to.
    async fn handle(
        self: &Arc<Self>,
        peer: &Peer,
        request: http::Request<Incoming>,
        gone: &CancellationToken,
    ) -> Answer {
        let started = Instant::now();
        let (mut parts, body) = request.into_parts();
        let mut query = Query::parse(parts.uri.query().unwrap_or(""));
        // Before anything is told or decided of the request: it is what it stands for.
        let path = match request::watched_path(&parts.method, parts.uri.path()) {
            Some(watched) => {
                query.turn_on("watch");
                watched
            }
            None => parts.uri.path().to_owned(),
        };
        let seen = metrics::Seen::of(&parts);
        let audited = self
            .audit
            .as_ref()
            .map(|audit| (audit, audit::Asked::of(&parts, &path, &query)));
        let trail = audit::Trail::default();
        if self.audit.is_some() {
            parts.extensions.insert(trail.notes());
        }
        let encoding = Encoding::negotiate(&parts.headers, &query).unwrap_or(Encoding::Json);
        let gzip = compression::wanted(&parts);
        let to_its_end = audited.is_none()
            || (!matches!(parts.method, Method::GET | Method::HEAD)
                && Target::parse(&path).is_some_and(|target| !target.connects()));
        let routed = AssertUnwindSafe(self.route((peer, &trail), parts, (&path, query), body));
        let routed = tokio::select! {
            routed = routed.catch_unwind() => routed,
            () = gone.cancelled(), if !to_its_end => Ok(Err(Status::hung_up())),
        };
        let answer = match routed {
            Ok(Ok(answer)) => answer,
            Ok(Err(status)) => {
                if status.code.is_server_error() {
                    tracing::warn!(path = %seen.path, message = %status.message, "request failed");
                }
                status.into()
            }
            Err(_) => {
                Status::internal("the request made the server panic; its log says where").into()
            }
        };
        let mut answer = reply::encode(answer, encoding, gzip).await;
        if let Some(warning) = deprecation(&seen.path) {
            reply::warn(&mut answer, &[warning.to_owned()]);
        }
        if let Some((audit, asked)) = audited {
            if let Ok(id) = asked.id().parse() {
                answer.headers_mut().insert("audit-id", id);
            }
            audit
                .record(asked, trail, peer.address, answer.status())
                .await;
        }
        reply::finish(&mut answer);
        self.metrics
            .observe(&seen, answer.status(), started.elapsed());
        answer
    }

    async fn route(
        self: &Arc<Self>,
        (peer, trail): (&Peer, &audit::Trail),
        mut parts: Parts,
        (path, query): (&str, Query),
        body: Incoming,
    ) -> Result<Answer, Status> {
        if let Some(health) = self.health(&parts).await {
            return health;
        }
        if matches!(path, "/version" | "/version/") {
            if parts.method != Method::GET {
                return Err(Status::method_not_allowed());
            }
            return Ok(reply::json(StatusCode::OK, &documents::version()));
        }
        let identity = self.authenticate(peer, &parts, trail).await?;
        front_proxy::clear(&mut parts.headers, self.proxies.as_ref());
        let target = Target::parse(path).filter(|target| {
            self.served
                .iter()
                .any(|served| std::ptr::eq(*served, target.resource))
        });
        let verb = target
            .as_ref()
            .map_or("", |target| request::verb(&parts.method, target, &query));
        // Given back with the answer: what is streamed from then on holds nobody up.
        let _seat = self
            .fairness
            .enter(&identity, verb, target.as_ref())
            .await?;
        self.check_access(&identity, &parts.method, path, target.as_ref(), &query)
            .await?;
        if let Some(check) = self.health_check(path).await {
            return check;
        }
        if path == "/metrics" {
            let content = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            return Ok(reply::bytes(
                StatusCode::OK,
                content,
                self.metrics.encode(self.store.revision()),
            ));
        }
        if path == BACKUP_PATH && parts.method == Method::GET {
            return self.backup().await;
        }
        if let Some(document) = self.document(path, &parts) {
            return document;
        }
        let call = Call {
            identity,
            target: target
                .ok_or_else(|| request::name_fault(path).unwrap_or_else(Status::no_such_path))?,
            query,
        };
        call.check_verb(&parts.method)?;
        call.query.duration("timeout")?;
        if call.target.connects() {
            let upgrade = parts.extensions.remove::<hyper::upgrade::OnUpgrade>();
            return self.connect(call, parts, upgrade, body).await;
        }
        if review::is_review(call.target.resource) {
            return self.review(call, parts, body).await;
        }
        if call.target.resource.plural == "componentstatuses" {
            return self.component_statuses(&call, &parts).await;
        }
        if matches!(parts.method, Method::GET | Method::HEAD) {
            return self.read(call, parts).await;
        }
        let body = body::read_body(&parts, body).await?;
        let api = self.clone();
        let written = async move { api.write(call, parts, body).await };
        let written = write_threads::run(&self.config.write_threads, written).await;
        written.unwrap_or_else(|| Err(Status::unavailable("the server is stopping")))
    }

    /// What is there, or what becomes of it.
    async fn read(&self, call: Call, mut parts: Parts) -> Result<Answer, Status> {
        if call.target.subresource.is_some() {
            return self.subresource(call, parts, Bytes::new()).await;
        }
        let named = call.target.name.is_some();
        if named && !call.query.flag("watch") {
            return self.get(&call, &parts).await;
        }
        let form = Form::negotiate(&parts.headers, &call.query)?;
        let mut options = ListOptions::parse(&call.query, call.target.resource)?;
        if named {
            let name = call.target.object_name()?;
            options.fields =
                crate::selector::FieldSelector::parse(&format!("metadata.name={name}"))
                    .map_err(|error| Status::bad_request(error.to_string()))?;
        }
        strategy::check_selectable(&call.target, &options.fields)?;
        if options.watch && forward::asks_for_websocket(&parts.headers) {
            let upgrade = parts.extensions.remove::<hyper::upgrade::OnUpgrade>();
            let events = self.watch(&call, (form, Encoding::Json), options).await?;
            let framing = (streams::Framing::Lines, None);
            forward::over_websocket(events, &parts, upgrade, framing, &self.stop)
        } else if options.watch {
            let encoding = Encoding::negotiate_stream(&parts.headers, &call.query)?;
            self.watch(&call, (form, encoding), options).await
        } else {
            let encoding = Encoding::negotiate(&parts.headers, &call.query)?;
            self.list(&call, (form, encoding), options).await
        }
    }

    /// Changes what is there.
    async fn write(&self, call: Call, parts: Parts, body: Bytes) -> Result<Answer, Status> {
        if call.target.subresource.is_some() {
            return self.subresource(call, parts, body).await;
        }
        if call.target.resource.kind == "Binding" {
            return self.bind(&call, &parts, body).await;
        }
        match (parts.method.clone(), call.target.name.is_some()) {
            (Method::POST, false) => self.create(&call, &parts, body).await,
            (Method::PUT, true) => self.update(&call, &parts, body).await,
            (Method::PATCH, true) => self.patch(&call, &parts, body).await,
            (Method::DELETE, true) => self.delete(&call, &parts, body).await,
            (Method::DELETE, false) => self.delete_collection(&call, &parts, body).await,
            _ => Err(Status::method_not_allowed()),
        }
    }
}

fn open_audit(files: &AuditFiles) -> Result<audit::Audit, StartError> {
    let policy = audit::Policy::read(&files.policy)?;
    let writer = audit::Writer::open(&files.log, files.bytes_max, files.kept);
    let writer = writer.map_err(|error| StartError::AuditLog {
        path: files.log.display().to_string(),
        reason: error.to_string(),
    })?;
    Ok(audit::Audit::new(policy, writer))
}

/// What is said with every answer about kinds that clients should move away from.
fn deprecation(path: &str) -> Option<&'static str> {
    let target = Target::parse(path)?;
    match (target.resource.group, target.resource.plural) {
        ("", "endpoints") => {
            Some("v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice")
        }
        ("", "componentstatuses") => Some("v1 ComponentStatus is deprecated in v1.19+"),
        _ => None,
    }
}

/// An authenticated request to a resource.
struct Call {
    identity: Arc<Identity>,
    target: Target,
    query: Query,
}

impl Call {
    /// How the object is to be written, and by whom.
    fn write_options(&self, parts: &Parts) -> Result<WriteOptions, Status> {
        let options = WriteOptions::parse(&self.query, parts)?;
        Ok(WriteOptions {
            caller: Some(self.identity.clone()),
            notes: parts.extensions.get().cloned(),
            ..options
        })
    }

    /// Whether the resource (or its subresource) has the verb at all.
    fn check_verb(&self, method: &Method) -> Result<(), Status> {
        let verb = request::verb(method, &self.target, &self.query);
        let verbs = match self.target.subresource.as_deref() {
            Some(name) => {
                self.target
                    .resource
                    .subresource(name)
                    .ok_or_else(Status::no_such_path)?;
                // The published verbs of connecting subresources differ from their methods; those check themselves.
                return Ok(());
            }
            None => self.target.resource.verbs,
        };
        // All namespaces at once can be read, and nothing else.
        let everywhere = self.target.resource.namespaced && self.target.namespace.is_none();
        let reads = matches!(verb, "list" | "watch");
        if verbs.contains(&verb) && method != Method::HEAD && (reads || !everywhere) {
            Ok(())
        } else {
            Err(Status::method_not_allowed())
        }
    }
}

impl From<StoreError> for Status {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Compacted { wanted, oldest } => {
                Self::expired(format!("too old resource version: {wanted} ({oldest})"))
            }
            StoreError::Future { wanted, current } => Self::revision_ahead(wanted.0, current.0),
            StoreError::Closed => Self::unavailable("the server is stopping"),
            error @ StoreError::Unavailable { .. } => Self::unavailable(error.to_string()),
            error => Self::internal(error),
        }
    }
}
