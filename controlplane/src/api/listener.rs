//! The HTTPS listener: TLS with optional client certificates, HTTP/1 and HTTP/2, graceful stop.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::Api;
use super::front_proxy::FrontProxies;
use super::unread::Unread;
use crate::pki::{Following, LOOK_PERIOD, PkiError, Reloading, Source};

/// A client must finish its TLS handshake within this.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// One client keeps many watches on one HTTP/2 connection.
const HTTP2_STREAMS_MAX: u32 = 1000;
/// How long an idle HTTP/1 connection is kept. Longer than clients keep theirs (90 s), so that it is they who close it: a
/// server that closes first loses the request that is just being sent.
const IDLE_TIMEOUT: Duration = Duration::from_secs(180);
/// How long a client may leave more of an answer untaken: what upstream gives a whole request.
const UNREAD_MAX: Duration = Duration::from_secs(60);
/// What requests get to finish when the server stops.
const STOP_GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {path}: {reason}")]
    Read { path: String, reason: String },
    #[error(transparent)]
    Certificate(#[from] PkiError),
    #[error("the serving certificate or the CA cannot be used: {0}")]
    Config(String),
}

/// Reads all certificates of a PEM file.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |reason: String| TlsError::Read {
        path: path.display().to_string(),
        reason,
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(|error| failed(error.to_string()))?
        .collect();
    match found {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(failed("it holds no certificate".to_owned())),
        Err(error) => Err(failed(error.to_string())),
    }
}

/// Reads the certificates that others' certificates are checked against.
pub fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| TlsError::Config(error.to_string()))?;
    }
    Ok(roots)
}

/// The server's side of TLS, and what it checks client certificates by.
pub struct ServerTls {
    config: Arc<ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
}

/// The server's side of TLS: a client certificate is asked for, checked when given, and not needed. When the authorities change it is
/// another one, and with it what sessions could be taken up again: nobody stays known by what has not been checked since.
pub fn server_tls(
    pki_dir: &Path,
    proxies: Option<&FrontProxies>,
) -> Result<Arc<Following<ServerTls>>, TlsError> {
    let shown = Reloading::new(Source::files(pki_dir, "apiserver"))?;
    let mut files = vec![pki_dir.join("ca.crt")];
    files.extend(proxies.map(|proxies| proxies.ca_file().to_owned()));
    let read = files.clone();
    Following::new(files, move || {
        let mut known = RootCertStore::empty();
        for file in &read {
            known.extend(roots(file)?.roots);
        }
        let verifier = WebPkiClientVerifier::builder(Arc::new(known))
            .allow_unauthenticated()
            .build()
            .map_err(|error| TlsError::Config(error.to_string()))?;
        let mut config = ServerConfig::builder()
            .with_client_cert_verifier(verifier.clone())
            .with_cert_resolver(shown.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let config = Arc::new(config);
        Ok::<_, TlsError>(ServerTls { config, verifier })
    })
}

/// Tells whenever the authorities have changed, for as long as somebody listens.
async fn tell_changes(tls: Arc<Following<ServerTls>>, changes: watch::Sender<()>) {
    let mut known = tls.current();
    while !changes.is_closed() {
        tokio::time::sleep(LOOK_PERIOD).await;
        let now = tls.current();
        if !Arc::ptr_eq(&known, &now) {
            known = now;
            changes.send_replace(());
        }
    }
}

/// Waits until no authority vouches any more for what a client has shown.
async fn disowned(
    tls: &Following<ServerTls>,
    chain: &[CertificateDer<'static>],
    mut changes: watch::Receiver<()>,
) {
    let Some((first, rest)) = chain.split_first() else {
        return std::future::pending().await;
    };
    while changes.changed().await.is_ok() {
        let verifier = tls.current().verifier.clone();
        let vouched = verifier.verify_client_cert(first, rest, UnixTime::now());
        if vouched.is_err() {
            return;
        }
    }
    std::future::pending().await
}

/// Serves the API on every listener until `stop` fires, then lets requests finish for a moment.
pub async fn serve(
    api: Arc<Api>,
    tls: Arc<Following<ServerTls>>,
    listeners: Vec<TcpListener>,
    stop: CancellationToken,
) {
    let graceful = GracefulShutdown::new();
    let (tell, changes) = watch::channel(());
    tokio::spawn(tell_changes(tls.clone(), tell));
    let (connections, mut accepted) = tokio::sync::mpsc::channel::<TcpStream>(64);
    for listener in listeners {
        tokio::spawn(accept(listener, connections.clone(), stop.clone()));
    }
    drop(connections);
    while let Some(stream) = accepted.recv().await {
        let (api, tls, changes) = (api.clone(), tls.clone(), changes.clone());
        let acceptor = TlsAcceptor::from(tls.current().config.clone());
        let watcher = graceful.watcher();
        tokio::spawn(async move {
            let Ok(Ok(stream)) =
                tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await
            else {
                return; // Probes and clients that do not trust us end here; there is nobody to tell.
            };
            let (tcp, session) = stream.get_ref();
            let chain: Vec<CertificateDer<'static>> =
                session.peer_certificates().unwrap_or_default().to_vec();
            let peer_address = tcp.peer_addr().ok();
            let peer = Arc::new(api.peer(&chain, peer_address));
            let unread = Arc::new(Unread::default());
            let answers = unread.clone();
            let service = service_fn(move |request| {
                let (api, peer, answers) = (api.clone(), peer.clone(), answers.clone());
                async move {
                    let answer = api.answer(peer, request).await;
                    Ok::<_, std::convert::Infallible>(answers.follow(answer))
                }
            });
            let mut server = auto::Builder::new(TokioExecutor::new());
            server
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(IDLE_TIMEOUT);
            server
                .http2()
                .timer(TokioTimer::new())
                .max_concurrent_streams(HTTP2_STREAMS_MAX)
                .keep_alive_interval(Duration::from_secs(30))
                .keep_alive_timeout(Duration::from_secs(30));
            let connection = server
                .serve_connection_with_upgrades(TokioIo::new(stream), service)
                .into_owned();
            // Errors here are clients that went away.
            tokio::select! {
                _ = watcher.watch(connection) => {}
                () = unread.for_longer_than(UNREAD_MAX) => {
                    tracing::debug!(?peer_address, "cut off: it does not read its answer");
                }
                () = disowned(&tls, &chain, changes) => {
                    tracing::debug!(?peer_address, "cut off: its certificate is of an authority of before");
                }
            }
        });
    }
    if tokio::time::timeout(STOP_GRACE, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::warn!("stopped with requests still open");
    }
}

async fn accept(
    listener: TcpListener,
    connections: tokio::sync::mpsc::Sender<TcpStream>,
    stop: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let _ = stream.set_nodelay(true);
                if connections.send(stream).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                // Out of descriptors, most likely: accepting again at once would spin.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
