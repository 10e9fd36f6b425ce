//! Held: a certificate with its key that TLS uses for every new connection, replaced while connections are made.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::CertificateError;

/// A Held certificate is none until the first one is there. TLS finds it here at each handshake.
#[derive(Debug)]
pub struct Held {
    /// The file with chain and key, PEM.
    pub path: PathBuf,
    current: RwLock<Option<Current>>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Clone)]
struct Current {
    key: Arc<CertifiedKey>,
    life: Life,
}

/// When a certificate is good, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    pub from_s: i64,
    pub until_s: i64,
}

impl Life {
    /// When it is to be renewed: after 70 to 90 % of its life, for each node at another moment, so that nodes that joined together
    /// do not renew together (upstream's rule).
    pub fn renewal_s(self, node: &str) -> i64 {
        let spread = node
            .bytes()
            .fold(0_u64, |sum, byte| sum.wrapping_mul(31) + u64::from(byte));
        let percent = 70 + i64::try_from(spread % 21).unwrap_or(0);
        let life_s = (self.until_s - self.from_s).max(0);
        self.from_s + life_s / 100 * percent + life_s % 100 * percent / 100
    }
}

impl Held {
    /// Reads the file, if there is one that is still good. One that cannot be used counts as none: a new one is asked for.
    pub fn read(path: PathBuf) -> Self {
        let held = Self {
            path,
            current: RwLock::default(),
            changed: watch::Sender::new(()),
        };
        match fs::read(&held.path) {
            Ok(pem) => match parse(&pem) {
                Ok(current) if current.life.until_s > Timestamp::now().as_second() => {
                    held.set(current);
                }
                Ok(_) => tracing::warn!(path = %held.path.display(), "the certificate has expired"),
                Err(error) => tracing::warn!(path = %held.path.display(), %error, "not usable"),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(path = %held.path.display(), %error, "not readable"),
        }
        held
    }

    /// Takes over a new certificate: first on disk, then for new connections.
    ///
    /// # Errors
    /// When the two do not belong together, or the disk is full; the old one stays then.
    pub fn replace(&self, certificate: &str, key: &str) -> Result<(), CertificateError> {
        let pem = format!("{}\n{key}", certificate.trim_end());
        let current = parse(pem.as_bytes())?;
        write_private(&self.path, pem.as_bytes()).map_err(|source| CertificateError::Write {
            path: self.path.clone(),
            source,
        })?;
        self.set(current);
        Ok(())
    }

    fn set(&self, current: Current) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(current);
        self.changed.send_replace(());
    }

    /// Fires when there is another certificate.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The certificate itself; None while there is none.
    pub fn leaf(&self) -> Option<CertificateDer<'static>> {
        self.get()?.key.cert.first().cloned()
    }

    fn get(&self) -> Option<Current> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.clone()
    }

    /// None while there is no certificate.
    pub fn life(&self) -> Option<Life> {
        self.get().map(|current| current.life)
    }

    /// How long it need not be renewed. Somebody who has removed its file wants a new one now.
    pub fn rest(&self, node: &str, now: Timestamp) -> Duration {
        let Some(life) = self.life().filter(|_| self.path.exists()) else {
            return Duration::ZERO;
        };
        let seconds = life.renewal_s(node) - now.as_second();
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
    }
}

fn parse(pem: &[u8]) -> Result<Current, CertificateError> {
    let bad = |error: &dyn std::fmt::Display| CertificateError::Unusable(error.to_string());
    let chain = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| bad(&error))?;
    let leaf = chain.first().ok_or_else(|| bad(&"there is none"))?;
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|error| bad(&error))?;
    let validity = leaf.validity();
    let life = Life {
        from_s: validity.not_before.timestamp(),
        until_s: validity.not_after.timestamp(),
    };
    let key = PrivateKeyDer::from_pem_slice(pem).map_err(|error| bad(&error))?;
    let provider = rustls::crypto::ring::default_provider();
    let key = CertifiedKey::from_der(chain, key, &provider).map_err(|error| bad(&error))?;
    Ok(Current {
        key: Arc::new(key),
        life,
    })
}

/// Replaces a file that only its owner may read, whole or not at all.
pub fn write_private(path: &Path, contents: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

impl ResolvesServerCert for Held {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.get().map(|current| current.key)
    }
}

impl ResolvesClientCert for Held {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.get().map(|current| current.key)
    }

    fn has_certs(&self) -> bool {
        self.get().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credential(days: u64) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["n".to_owned()]).unwrap();
        let now = Timestamp::now().as_second();
        let at = |second: i64| {
            rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(u64::try_from(second).unwrap())
        };
        params.not_before = at(now - 3600);
        params.not_after = at(now + i64::try_from(days * 86_400).unwrap() - 60);
        let certificate = params.self_signed(&key).unwrap().pem();
        (certificate, key.serialize_pem())
    }

    #[test]
    fn renewal_is_in_the_last_third_of_a_life_and_not_for_all_at_once() {
        let life = Life {
            from_s: 1000,
            until_s: 2000,
        };
        let moments: std::collections::BTreeSet<i64> = (0..100)
            .map(|n| life.renewal_s(&format!("node-{n}")))
            .collect();
        assert!(moments.iter().all(|at| (1700..=1900).contains(at)));
        assert!(moments.len() > 5, "{moments:?}");
    }

    #[test]
    fn a_new_certificate_is_there_at_once_and_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("client.pem");
        let held = Held::read(path.clone());
        assert!(held.life().is_none());
        assert_eq!(held.rest("n", Timestamp::now()), Duration::ZERO);
        let (certificate, key) = credential(10);
        held.replace(&certificate, &key).unwrap();
        let life = held.life().unwrap();
        assert_eq!(Held::read(path.clone()).life(), Some(life));
        assert!(held.rest("n", Timestamp::now()) > Duration::from_secs(6 * 86_400));
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        fs::remove_file(&path).unwrap();
        assert_eq!(held.rest("n", Timestamp::now()), Duration::ZERO);
    }

    #[test]
    fn what_has_expired_or_does_not_belong_together_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("client.pem");
        let (expired, key) = credential(0);
        fs::write(&path, format!("{expired}{key}")).unwrap();
        assert!(Held::read(path.clone()).life().is_none());
        let held = Held::read(path.clone());
        let (certificate, _) = credential(10);
        let (_, other) = credential(10);
        assert!(held.replace(&certificate, &other).is_err());
        assert!(held.life().is_none());
    }
}
