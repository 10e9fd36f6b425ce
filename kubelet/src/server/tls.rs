//! tls: the server's certificate, and the authority that clients' certificates must be signed by.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustls::server::{ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// A TlsError names the file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{path}: {message}")]
    File { path: PathBuf, message: String },
    #[error("certificate and key do not make a server: {0}")]
    Config(#[from] rustls::Error),
}

fn bad(path: &Path, message: String) -> TlsError {
    TlsError::File {
        path: path.to_path_buf(),
        message,
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let read = read.map_err(|error| bad(path, error.to_string()))?;
    if read.is_empty() {
        Err(bad(path, "holds no certificate".to_owned()))
    } else {
        Ok(read)
    }
}

/// A certificate and key in files, as they are now.
pub fn given(cert: &Path, key: &Path) -> Result<Arc<dyn ResolvesServerCert>, TlsError> {
    let chain = certificates(cert)?;
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|error| bad(key, error.to_string()))?;
    let provider = rustls::crypto::ring::default_provider();
    let certified = CertifiedKey::from_der(chain, key_der, &provider)?;
    Ok(Arc::new(SingleCertAndKey::from(certified)))
}

/// The TLS side of the server: TLS 1.2 or 1.3. A client may come without a certificate, to show a token; not with a bad one. The file with
/// the authorities may be replaced: what is in it then counts from the next connection on.
pub struct Tls {
    shown: Arc<dyn ResolvesServerCert>,
    client_ca: PathBuf,
    state: Mutex<(Stamp, Arc<ServerConfig>)>,
}

/// What changes when a file is replaced.
type Stamp = Option<(SystemTime, u64, u64)>;

fn stamp(path: &Path) -> Stamp {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.ino(), meta.len()))
}

impl Tls {
    /// # Errors
    /// When the authorities cannot be used.
    pub fn new(shown: Arc<dyn ResolvesServerCert>, client_ca: &Path) -> Result<Self, TlsError> {
        let stamp = stamp(client_ca);
        let config = server_config(shown.clone(), client_ca)?;
        Ok(Self {
            shown,
            client_ca: client_ca.to_owned(),
            state: Mutex::new((stamp, config)),
        })
    }

    pub fn current(&self) -> Arc<ServerConfig> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamp(&self.client_ca);
        if now != state.0 {
            state.0 = now;
            match server_config(self.shown.clone(), &self.client_ca) {
                Ok(config) => {
                    tracing::info!(file = %self.client_ca.display(), "clients are of other authorities now");
                    state.1 = config;
                }
                Err(error) => tracing::warn!(%error, "clients stay of the authorities of before"),
            }
        }
        state.1.clone()
    }
}

fn server_config(
    shown: Arc<dyn ResolvesServerCert>,
    client_ca: &Path,
) -> Result<Arc<ServerConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    for root in certificates(client_ca)? {
        roots
            .add(root)
            .map_err(|error| bad(client_ca, error.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build();
    let verifier = verifier.map_err(|error| bad(client_ca, error.to_string()))?;
    let builder =
        ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(shown);
    // Upgrades (exec, attach, port-forward) exist in HTTP/1.1 only.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
