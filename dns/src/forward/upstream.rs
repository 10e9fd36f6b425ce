//! One upstream server: how it is reached, what is known of its health and habits.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::exchange::{Outgoing, Question, Received, by_stream, by_udp};
use super::{ForwardError, ForwardRules};
use crate::answer::Rcode;
use crate::message::{BadReply, Reply, belongs, is_truncated};
use crate::metrics::{Forwarding, UpstreamMetrics};
use crate::query::rtype;

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(4);
const CHECK: Duration = Duration::from_secs(2);
/// How long TCP may take to confirm an answer whose spelling has changed.
const CONFIRM: Duration = Duration::from_secs(1);
/// Connections that are kept for the next question, and for how long.
const IDLE_MAX: usize = 16;
const IDLE: Duration = Duration::from_secs(8);
/// Answers with changed spelling that were confirmed, after which random spelling is given up.
const SPELLING_LOST: u32 = 3;

/// How a server is spoken to by TLS (RFC 7858).
#[derive(Clone)]
pub struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
}

/// Why no TLS can be spoken.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("no certificate authorities are configured (`tls CA`), and {} is missing", .0.display())]
    NoAuthorities(PathBuf),
    #[error("{0:?} is not a server's name")]
    Name(String),
    #[error("TLS: {0}")]
    Config(#[from] tokio_rustls::rustls::Error),
}

/// Where distributions keep the authorities that everyone trusts.
const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

impl Tls {
    /// TLS to servers that `authorities` vouch for under `name`, with a certificate of our own if `own` names its files.
    pub fn new(
        name: &str,
        authorities: Option<&Path>,
        own: Option<(&Path, &Path)>,
    ) -> Result<Self, TlsError> {
        let system = Path::new(SYSTEM_AUTHORITIES);
        if authorities.is_none() && !system.exists() {
            return Err(TlsError::NoAuthorities(system.into()));
        }
        let mut roots = RootCertStore::empty();
        let path = authorities.unwrap_or(system);
        let certificates = certificates(path)?;
        let (added, _) = roots.add_parsable_certificates(certificates);
        if added == 0 {
            return Err(bad_file(path, "holds no certificate"));
        }
        let builder = ClientConfig::builder().with_root_certificates(roots);
        let config = match own {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = self::certificates(certificate)?;
                let pem = fs::read(key).map_err(|error| bad_file(key, error))?;
                let key =
                    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| bad_file(key, error))?;
                builder.with_client_auth_cert(chain, key)?
            }
        };
        let name =
            ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.into()))?;
        Ok(Self {
            connector: TlsConnector::from(Arc::new(config)),
            name,
        })
    }
}

fn bad_file(path: &Path, reason: impl ToString) -> TlsError {
    TlsError::File {
        path: path.into(),
        reason: reason.to_string(),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = fs::read(path).map_err(|error| bad_file(path, error))?;
    CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| bad_file(path, error))
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

struct Idle {
    stream: Box<dyn Stream>,
    since: Instant,
}

/// An upstream server.
pub struct Upstream {
    pub address: SocketAddr,
    tls: Option<Tls>,
    failures: AtomicU32,
    checking: AtomicBool,
    /// It was seen to forward to this server: it is not asked any more.
    leads_back: AtomicBool,
    /// Answers whose spelling had changed although they were confirmed.
    spelling_lost: AtomicU32,
    /// It does not know EDNS.
    plain: AtomicBool,
    usual_delay_us: AtomicU64,
    idle: Mutex<Vec<Idle>>,
    metrics: UpstreamMetrics,
}

impl Upstream {
    pub fn new(address: SocketAddr, tls: Option<Tls>, metrics: &Forwarding) -> Arc<Self> {
        Arc::new(Self {
            address,
            tls,
            failures: AtomicU32::new(0),
            checking: AtomicBool::new(false),
            leads_back: AtomicBool::new(false),
            spelling_lost: AtomicU32::new(0),
            plain: AtomicBool::new(false),
            usual_delay_us: AtomicU64::new(0),
            idle: Mutex::new(Vec::new()),
            metrics: metrics.upstream(address),
        })
    }

    pub fn is_down(&self, failures_max: u32) -> bool {
        failures_max > 0 && self.failures.load(Ordering::Relaxed) >= failures_max
    }

    pub fn leads_back(&self) -> bool {
        self.leads_back.load(Ordering::Relaxed)
    }

    /// Says that what was sent to this upstream came back here.
    pub fn found_leading_back(&self) {
        if !self.leads_back.swap(true, Ordering::Relaxed) {
            tracing::error!(upstream = %self.address, "it forwards to this server, so it is not asked any more; mend the configuration");
        }
    }

    /// How long its answers take as a rule; zero when nothing is known.
    pub fn usual_delay(&self) -> Duration {
        Duration::from_micros(self.usual_delay_us.load(Ordering::Relaxed))
    }

    pub(super) fn answered(&self, took: Duration, rcode: Rcode) {
        self.failures.store(0, Ordering::Relaxed);
        let took_us = took.as_micros() as u64;
        let before = self.usual_delay_us.load(Ordering::Relaxed);
        let now = if before == 0 {
            took_us
        } else {
            (before * 7 + took_us) / 8
        };
        self.usual_delay_us.store(now, Ordering::Relaxed);
        self.metrics.answered(took, rcode);
    }

    /// Counts a failure and has the upstream checked until it answers again.
    pub(super) fn failed(self: &Arc<Self>, rules: &ForwardRules) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        if rules.failures_max == 0 || self.checking.swap(true, Ordering::Relaxed) {
            return;
        }
        // Weak: an upstream that a reload took away is not checked for ever.
        let (weak, rules) = (Arc::downgrade(self), rules.clone());
        tokio::spawn(async move {
            loop {
                sleep(rules.check_every).await;
                let Some(upstream) = weak.upgrade() else {
                    return;
                };
                if upstream.check(&rules).await {
                    upstream.failures.store(0, Ordering::Relaxed);
                    upstream.checking.store(false, Ordering::Relaxed);
                    return;
                }
                upstream.metrics.check_failed();
            }
        });
    }

    /// Whether it answers anything at all.
    async fn check(&self, rules: &ForwardRules) -> bool {
        let question = Question {
            name: rules.check_name.wire().to_vec(),
            rtype: rtype::NS,
            dnssec_ok: false,
            checking_disabled: false,
        };
        let mut outgoing = question.outgoing(false, false);
        if !rules.check_recursive {
            outgoing.not_recursive();
        }
        let asked = async {
            if self.tls.is_some() || rules.tcp_only {
                self.by_connection(&outgoing).await.is_ok()
            } else {
                by_udp(self.address, &outgoing).await.is_ok()
            }
        };
        timeout(CHECK, asked).await.unwrap_or(false)
    }

    /// Asks once, and again where the first answer shows how to ask better.
    pub(super) async fn ask(
        &self,
        question: &Question,
        tcp_only: bool,
    ) -> Result<Reply, ForwardError> {
        let edns = !self.plain.load(Ordering::Relaxed);
        let asked = timeout(ATTEMPT, self.ask_with(question, edns, tcp_only));
        let reply = self.in_time(asked.await)?;
        if edns && matches!(reply.rcode, Rcode::FormErr | Rcode::NotImp) {
            let asked = timeout(ATTEMPT, self.ask_with(question, false, tcp_only));
            let again = self.in_time(asked.await)?;
            if matches!(again.rcode, Rcode::NoError | Rcode::NxDomain) {
                self.plain.store(true, Ordering::Relaxed);
            }
            return Ok(again);
        }
        Ok(reply)
    }

    fn in_time<T>(
        &self,
        outcome: Result<Result<T, ForwardError>, tokio::time::error::Elapsed>,
    ) -> Result<T, ForwardError> {
        outcome.unwrap_or_else(|_| Err(ForwardError::Silence(ATTEMPT)))
    }

    async fn ask_with(
        &self,
        question: &Question,
        edns: bool,
        tcp_only: bool,
    ) -> Result<Reply, ForwardError> {
        let io = |source| ForwardError::Io {
            server: self.address,
            source,
        };
        let read = |message: &[u8]| {
            Reply::read(message, question.bytes(), question.rtype).map_err(|source| {
                ForwardError::Reply {
                    server: self.address,
                    source,
                }
            })
        };
        let spell = self.spelling_lost.load(Ordering::Relaxed) < SPELLING_LOST;
        let outgoing = question.outgoing(edns, spell);
        if self.tls.is_some() || tcp_only {
            let message = self.by_connection(&outgoing).await.map_err(io)?;
            return read(&message);
        }
        match by_udp(self.address, &outgoing).await.map_err(io)? {
            Received::Answer(message) if !is_truncated(&message) => read(&message),
            Received::Answer(message) => match self.by_connection(&outgoing).await {
                Ok(whole) => read(&whole),
                // A part is better than nothing: it is passed on as what it is.
                Err(error) => {
                    tracing::debug!(upstream = %self.address, %error, "a truncated answer, and no TCP");
                    read(&message)
                }
            },
            Received::Suspect => {
                // A connection can't be forged from afar.
                let confirmed = timeout(CONFIRM, self.by_connection(&outgoing)).await;
                let message = match confirmed
                    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                {
                    Ok(message) => message,
                    // No TCP: then it is asked as a server is that keeps no spelling, with id and port to be guessed alone.
                    Err(error) => {
                        tracing::debug!(upstream = %self.address, %error, "another spelling, and no TCP");
                        self.ask_unspelled(question, edns).await.map_err(io)?
                    }
                };
                let reply = read(&message)?;
                if belongs(&message, outgoing.id, outgoing.question()) != Ok(()) {
                    self.spelling_lost.fetch_add(1, Ordering::Relaxed);
                }
                Ok(reply)
            }
        }
    }

    /// Asks by UDP in lower case.
    async fn ask_unspelled(&self, question: &Question, edns: bool) -> io::Result<Vec<u8>> {
        let outgoing = question.outgoing(edns, false);
        match by_udp(self.address, &outgoing).await? {
            Received::Answer(message) => Ok(message),
            Received::Suspect => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                BadReply::OtherSpelling,
            )),
        }
    }

    /// Asks by TCP or TLS, over a connection that is left from before if there is one.
    async fn by_connection(&self, outgoing: &Outgoing) -> io::Result<Vec<u8>> {
        if let Some(mut stream) = self.kept() {
            // It may have been closed meanwhile: then a new one is tried.
            if let Ok(message) = by_stream(&mut *stream, outgoing).await {
                return self.checked(message, outgoing, stream);
            }
        }
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let mut stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(stream),
            Some(tls) => Box::new(tls.connector.connect(tls.name.clone(), stream).await?),
        };
        let message = by_stream(&mut *stream, outgoing).await?;
        self.checked(message, outgoing, stream)
    }

    fn checked(
        &self,
        message: Vec<u8>,
        outgoing: &Outgoing,
        stream: Box<dyn Stream>,
    ) -> io::Result<Vec<u8>> {
        match belongs(&message, outgoing.id, outgoing.question()) {
            Ok(()) | Err(BadReply::OtherSpelling) => {
                let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
                if idle.len() < IDLE_MAX {
                    let since = Instant::now();
                    idle.push(Idle { stream, since });
                }
                Ok(message)
            }
            Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }

    fn kept(&self) -> Option<Box<dyn Stream>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|one| one.since.elapsed() < IDLE);
        idle.pop().map(|one| one.stream)
    }

    /// Sends a question whose return here would show a loop; an answer is not waited for.
    pub fn send_probe(self: &Arc<Self>, name: Vec<u8>) {
        let upstream = self.clone();
        tokio::spawn(async move {
            let question = Question {
                name,
                rtype: rtype::HINFO,
                dnssec_ok: false,
                checking_disabled: false,
            };
            let outgoing = question.outgoing(true, false);
            let asked = async {
                if upstream.tls.is_some() {
                    let _ = upstream.by_connection(&outgoing).await;
                } else {
                    let _ = by_udp(upstream.address, &outgoing).await;
                }
            };
            let _ = timeout(CHECK, asked).await;
        });
    }
}
