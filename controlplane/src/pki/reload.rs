//! A certificate with its key in files that others replace: TLS gets what is there now, at each new connection.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::following::Following;
use super::{PkiError, file};

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
}

/// What TLS asks for a certificate.
#[derive(Debug)]
pub struct Reloading(Arc<Following<CertifiedKey>>);

impl Reloading {
    /// # Errors
    /// When there is no usable certificate yet.
    pub fn new(source: Source) -> Result<Arc<Self>, PkiError> {
        let files = source.paths().into_iter().map(Path::to_owned).collect();
        let following = Following::new(files, move || source.certified())?;
        Ok(Arc::new(Self(following)))
    }
}

impl ResolvesServerCert for Reloading {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current())
    }
}

impl ResolvesClientCert for Reloading {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
