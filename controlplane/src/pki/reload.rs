//! A certificate with its key in files that others replace: TLS gets what is there now, at each new connection.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::{PkiError, file};

/// How often it is looked whether files have changed, when connections are made.
const LOOK_PERIOD: Duration = Duration::from_secs(2);

/// Where certificate and key are, both PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Files {
        certificate: PathBuf,
        key: PathBuf,
    },
    /// `client-certificate-data` and `client-key-data` of the first user.
    Kubeconfig(PathBuf),
}

impl Source {
    pub fn files(folder: &Path, name: &str) -> Self {
        Self::Files {
            certificate: folder.join(format!("{name}.crt")),
            key: folder.join(format!("{name}.key")),
        }
    }

    fn paths(&self) -> Vec<&Path> {
        match self {
            Self::Files { certificate, key } => vec![certificate, key],
            Self::Kubeconfig(path) => vec![path],
        }
    }

    /// Certificate and key, PEM.
    ///
    /// # Errors
    /// When a file is missing or holds something else.
    pub fn read(&self) -> Result<(Vec<u8>, Vec<u8>), PkiError> {
        let read = |path: &Path| fs::read(path).map_err(file("read", path));
        match self {
            Self::Files { certificate, key } => Ok((read(certificate)?, read(key)?)),
            Self::Kubeconfig(path) => {
                let unusable = |reason: String| PkiError::Unusable {
                    path: path.clone(),
                    reason,
                };
                let config: serde_json::Value = serde_saphyr::from_slice(&read(path)?)
                    .map_err(|error| unusable(error.to_string()))?;
                let data = |field: &str| {
                    let value = config.pointer(&format!("/users/0/user/{field}"));
                    let value = value.and_then(serde_json::Value::as_str);
                    let value = value.ok_or_else(|| unusable(format!("it has no {field}")))?;
                    BASE64_STANDARD
                        .decode(value)
                        .map_err(|error| unusable(format!("{field}: {error}")))
                };
                Ok((data("client-certificate-data")?, data("client-key-data")?))
            }
        }
    }

    /// Whether the certificate is in these files; a kubeconfig may name another one.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn holds_certificate(&self) -> Result<bool, PkiError> {
        let Self::Kubeconfig(path) = self else {
            return Ok(true);
        };
        let text = fs::read_to_string(path).map_err(file("read", path))?;
        Ok(text.contains("client-certificate-data"))
    }

    /// Whether certificate and key belong together.
    pub fn is_pair(&self) -> bool {
        self.certified().is_ok()
    }

    fn certified(&self) -> Result<CertifiedKey, PkiError> {
        let (certificate, key) = self.read()?;
        let unusable = |reason: String| PkiError::Unusable {
            path: self.paths()[0].to_owned(),
            reason,
        };
        let chain = CertificateDer::pem_slice_iter(&certificate).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|error| unusable(error.to_string()))?;
        let key =
            PrivateKeyDer::from_pem_slice(&key).map_err(|error| unusable(error.to_string()))?;
        let provider = rustls::crypto::ring::default_provider();
        CertifiedKey::from_der(chain, key, &provider).map_err(|error| unusable(error.to_string()))
    }

    /// What changes when a file is replaced.
    fn stamp(&self) -> Vec<Option<SystemTime>> {
        let of = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified()).ok();
        self.paths().into_iter().map(of).collect()
    }
}

/// What TLS asks for a certificate.
#[derive(Debug)]
pub struct Reloading {
    source: Source,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    current: Arc<CertifiedKey>,
    stamp: Vec<Option<SystemTime>>,
    looked: Instant,
}

impl Reloading {
    /// # Errors
    /// When there is no usable certificate yet.
    pub fn new(source: Source) -> Result<Arc<Self>, PkiError> {
        let stamp = source.stamp();
        let current = Arc::new(source.certified()?);
        let state = Mutex::new(State {
            current,
            stamp,
            looked: Instant::now(),
        });
        Ok(Arc::new(Self { source, state }))
    }

    fn current(&self) -> Arc<CertifiedKey> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() >= LOOK_PERIOD {
            state.looked = Instant::now();
            let stamp = self.source.stamp();
            if stamp != state.stamp {
                match self.source.certified() {
                    Ok(new) => {
                        tracing::info!(source = ?self.source, "a new certificate is used");
                        state.current = Arc::new(new);
                        state.stamp = stamp;
                    }
                    // Half of a pair may be replaced already: it is looked at again soon.
                    Err(error) => tracing::warn!(%error, "the old certificate stays in use"),
                }
            }
        }
        state.current.clone()
    }
}

impl ResolvesServerCert for Reloading {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl ResolvesClientCert for Reloading {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
