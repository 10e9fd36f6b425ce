//! authorities: whom the kubelet takes for the API server, and whose certificates it takes from clients, while one authority takes the
//! place of another. The cluster says which there are (`kube-system/kube-root-ca.crt`), the one that signs first.
//!
//! That ConfigMap is no secret, and not only the cluster's own parts may write it. So a new authority is believed only when one that is
//! trusted already has signed for its key.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use kube::{Api, Client};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::certificates::{Held, write_private};

const NAMESPACE: &str = "kube-system";
const NAME: &str = "kube-root-ca.crt";
const FIELD: &str = "ca.crt";
/// Says of a Node by which authorities its kubelet goes: SHA-256 of what the cluster said of them, once both certificates of the node are
/// of the one that signs.
pub const ANNOTATION: &str = "keelway.io/authorities";
/// More are not believed to be a cluster's.
const AUTHORITIES_MAX: usize = 16;

/// Why some text is not taken for the authorities of the cluster.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("{0} cannot be read: {1}")]
    Read(PathBuf, std::io::Error),
    #[error("what is said of the authorities cannot be used: {0}")]
    Unusable(String),
    #[error("one of the authorities, {0:?}, is signed for by none that is trusted")]
    Stranger(String),
}

/// The authorities that count now.
#[derive(Debug, Clone)]
struct Bundle {
    pem: String,
    certificates: Vec<CertificateDer<'static>>,
    servers: Arc<WebPkiServerVerifier>,
}

impl Bundle {
    fn read(pem: &str) -> Result<Self, AuthorityError> {
        let bad = |error: &dyn std::fmt::Display| AuthorityError::Unusable(error.to_string());
        let certificates = CertificateDer::pem_slice_iter(pem.as_bytes());
        let certificates: Vec<_> = certificates
            .collect::<Result<_, _>>()
            .map_err(|error| bad(&error))?;
        if certificates.is_empty() || certificates.len() > AUTHORITIES_MAX {
            return Err(bad(&format!("{} certificates", certificates.len())));
        }
        if certificates.iter().any(|der| parsed(der).is_none()) {
            return Err(bad(&"one is no certificate"));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = roots(&certificates).map_err(|error| bad(&error))?;
        let servers = WebPkiServerVerifier::builder_with_provider(roots, provider).build();
        Ok(Self {
            pem: pem.to_owned(),
            servers: servers.map_err(|error| bad(&error))?,
            certificates,
        })
    }

    fn parsed(&self) -> Vec<X509Certificate<'_>> {
        let all = self.certificates.iter();
        all.filter_map(|der| parsed(der)).collect()
    }

    /// Whether each of its authorities is trusted already, or signed for by one that is.
    fn follows(&self, trusted: &Self) -> Result<(), AuthorityError> {
        let (all, trusted) = (self.parsed(), trusted.parsed());
        let is_same = |one: &X509Certificate<'_>, other: &X509Certificate<'_>| {
            one.public_key().raw == other.public_key().raw
                && one.subject().as_raw() == other.subject().as_raw()
        };
        // As an authority: it has signed for the keys of leaves, too.
        let is_vouched = |one: &X509Certificate<'_>| {
            let mut signers = trusted.iter();
            one.is_ca() && signers.any(|by| one.verify_signature(Some(by.public_key())).is_ok())
        };
        let stranger = all.iter().find(|one| {
            let is_known = trusted.iter().any(|known| is_same(known, one));
            let mut same = all.iter().filter(|other| is_same(other, one));
            !is_known && !same.any(is_vouched)
        });
        match stranger {
            Some(stranger) => Err(AuthorityError::Stranger(stranger.subject().to_string())),
            None => Ok(()),
        }
    }
}

fn parsed<'a>(der: &'a CertificateDer<'_>) -> Option<X509Certificate<'a>> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(certificate)
}

fn roots(certificates: &[CertificateDer<'static>]) -> Result<Arc<RootCertStore>, rustls::Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate.clone())?;
    }
    Ok(Arc::new(roots))
}

/// The authorities of the cluster, in a file that is replaced when the cluster says so.
#[derive(Debug)]
pub struct Authorities {
    path: PathBuf,
    current: RwLock<Bundle>,
    changed: watch::Sender<()>,
    settled: watch::Sender<Option<String>>,
}

impl Authorities {
    /// Reads what is kept at `path`; at first, that is `given`.
    ///
    /// # Errors
    /// When neither can be used.
    pub fn read(path: PathBuf, given: &str) -> Result<Arc<Self>, AuthorityError> {
        let current = match fs::read_to_string(&path) {
            Ok(pem) => Bundle::read(&pem)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let bundle = Bundle::read(given)?;
                let kept = write_private(&path, given.as_bytes());
                kept.map_err(|error| AuthorityError::Read(path.clone(), error))?;
                bundle
            }
            Err(error) => return Err(AuthorityError::Read(path, error)),
        };
        Ok(Arc::new(Self {
            path,
            current: RwLock::new(current),
            changed: watch::Sender::new(()),
            settled: watch::Sender::new(None),
        }))
    }

    fn get(&self) -> Bundle {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.clone()
    }

    /// Where they are kept.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn servers(&self) -> Arc<WebPkiServerVerifier> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.servers.clone()
    }

    /// Fires when others count.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// What the Node says in [`ANNOTATION`]; None while a certificate of the node is of another authority than the one that signs.
    pub fn goes_by(&self) -> watch::Receiver<Option<String>> {
        self.settled.subscribe()
    }

    /// Whether a certificate is of the authority that signs. One that is not is to be replaced while its own is still trusted.
    pub fn has_signed(&self, leaf: &[u8]) -> bool {
        let bundle = self.get();
        let Some(signer) = bundle.certificates.first().and_then(parsed) else {
            return false;
        };
        X509Certificate::from_der(leaf).is_ok_and(|(_, leaf)| {
            leaf.issuer().as_raw() == signer.subject().as_raw()
                && leaf.verify_signature(Some(signer.public_key())).is_ok()
        })
    }

    /// Takes over what the cluster says: first on disk, then for new connections.
    ///
    /// # Errors
    /// When it cannot be used, or an authority is new that nobody trusted has signed for. What was there before stays then.
    pub fn replace(&self, pem: &str) -> Result<bool, AuthorityError> {
        let trusted = self.get();
        if trusted.pem == pem {
            return Ok(false);
        }
        let new = Bundle::read(pem)?;
        new.follows(&trusted)?;
        let written = write_private(&self.path, pem.as_bytes());
        written.map_err(|error| AuthorityError::Read(self.path.clone(), error))?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        self.changed.send_replace(());
        Ok(true)
    }

    /// Follows what the cluster says, for ever.
    pub async fn follow(&self, client: Client) {
        let maps: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
        // Until a pod of this node refers to it, the kubelet may not see it.
        let mut said = std::pin::pin!(watch_object(maps, NAME).default_backoff());
        while let Some(said) = said.next().await {
            let map = match said {
                Ok(map) => map,
                Err(error) => {
                    tracing::debug!(%error, "the authorities of the cluster cannot be read now");
                    continue;
                }
            };
            let pem = map.and_then(|map| map.data?.remove(FIELD));
            match pem.map(|pem| self.replace(&pem)) {
                Some(Ok(true)) => tracing::info!("the authorities of the cluster have changed"),
                Some(Err(error)) => tracing::warn!(%error, "the authorities of before stay in use"),
                Some(Ok(false)) | None => {}
            }
        }
    }

    /// Keeps it known by which authorities the node goes ([`goes_by`](Self::goes_by)), for ever: once all its certificates are of the one
    /// that signs.
    pub async fn settle(&self, certificates: [&Held; 2]) {
        let mut changes = self.changes();
        let mut renewed = certificates.map(Held::changes);
        loop {
            let bundle = self.get();
            let is_signed = |held: &&Held| held.leaf().is_some_and(|leaf| self.has_signed(&leaf));
            if certificates.iter().all(is_signed) {
                let digest = Sha256::digest(&bundle.pem);
                let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
                self.settled.send_if_modified(|settled| {
                    settled.replace(digest.clone()).as_ref() != Some(&digest)
                });
            }
            let [client, serving] = &mut renewed;
            tokio::select! {
                _ = changes.changed() => {}
                _ = client.changed() => {}
                _ = serving.changed() => {}
            }
        }
    }
}

impl ServerCertVerifier for Authorities {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let servers = self.servers();
        servers.verify_server_cert(end_entity, intermediates, name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let servers = self.servers();
        servers.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let servers = self.servers();
        servers.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.servers().supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

    use super::*;

    struct Authority {
        params: CertificateParams,
        key: KeyPair,
    }

    impl Authority {
        fn new(name: &str) -> Self {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().unwrap();
            Self { params, key }
        }

        fn pem(&self) -> String {
            self.params.self_signed(&self.key).unwrap().pem()
        }

        /// What it has signed for another one's key, under its name.
        fn vouches(&self, other: &Self, is_ca: bool) -> String {
            let mut params = other.params.clone();
            if !is_ca {
                params.is_ca = IsCa::NoCa;
            }
            let issuer = Issuer::from_params(&self.params, &self.key);
            params.signed_by(&other.key, &issuer).unwrap().pem()
        }
    }

    #[test]
    fn a_new_authority_is_believed_when_one_that_is_trusted_has_signed_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.crt");
        let [old, new, evil] = ["old", "new", "evil"].map(Authority::new);
        let kept = Authorities::read(path.clone(), &old.pem()).unwrap();
        let leaf = |by: &Authority| {
            let key = KeyPair::generate().unwrap();
            let issuer = Issuer::from_params(&by.params, &by.key);
            let params = CertificateParams::new(vec!["node".to_owned()]).unwrap();
            params.signed_by(&key, &issuer).unwrap().der().to_vec()
        };
        let (of_old, of_new) = (leaf(&old), leaf(&new));
        let both = old.pem() + &new.pem();
        for wrong in [
            both.clone(),
            new.pem(),
            // As a leaf's key it may have been signed for by anybody's request.
            both.clone() + &old.vouches(&new, false),
            both.clone() + &evil.vouches(&new, true),
            both.clone() + &old.vouches(&evil, false) + &evil.pem(),
            String::new(),
        ] {
            assert!(kept.replace(&wrong).is_err(), "{wrong}");
        }
        assert!(kept.has_signed(&of_old) && !kept.has_signed(&of_new));
        let mut changes = kept.changes();
        let both = both + &old.vouches(&new, true);
        assert!(kept.replace(&both).unwrap());
        assert!(!kept.replace(&both).unwrap());
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        assert!(kept.has_signed(&of_old), "the first is the one that signs");
        assert!(
            kept.replace(&(new.pem() + &old.pem())).unwrap(),
            "in another order"
        );
        assert!(kept.has_signed(&of_new) && !kept.has_signed(&of_old));
        assert!(kept.replace(&new.pem()).unwrap(), "the old one is dropped");
        assert!(kept.replace(&old.pem()).is_err(), "and stays so");
        // What was taken over is there after a restart, whatever was given at first.
        let kept = Authorities::read(path, &old.pem()).unwrap();
        assert!(kept.has_signed(&of_new));
    }
}
