//! Authorities in files, of which there can be several at a time while one takes the place of another: whom they vouch for, and which
//! of them signs.

use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rcgen::{Issuer, KeyPair, PublicKeyData};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::following::Following;

/// The authority that signs: of those in a PEM text the one whose key this is, wherever it stands.
///
/// # Errors
/// When one of the two cannot be read, or the key is of none of them.
pub fn signing(bundle: &str, key: &str) -> Result<Issuer<'static, KeyPair>, String> {
    let key = KeyPair::from_pem(key).map_err(|error| format!("the key: {error}"))?;
    for certificate in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        let der = certificate.map_err(|error| error.to_string())?;
        let (_, read) = X509Certificate::from_der(&der).map_err(|error| error.to_string())?;
        if read.public_key().raw == key.subject_public_key_info() {
            return Issuer::from_ca_cert_der(&der, key).map_err(|error| error.to_string());
        }
    }
    Err("the key is of none of the authorities".to_owned())
}

/// Whom a client takes for its server: those that the authorities vouch for which its kubeconfig holds, or names, now.
#[derive(Debug)]
pub struct TrustedServers(Arc<Following<Arc<WebPkiServerVerifier>>>);

impl TrustedServers {
    /// None when the kubeconfig says nothing of authorities.
    pub fn of_kubeconfig(path: &Path) -> Option<Self> {
        let config = read_kubeconfig(path).ok()?;
        let mut files = vec![path.to_owned()];
        let named = config.pointer("/clusters/0/cluster/certificate-authority");
        files.extend(named.and_then(serde_json::Value::as_str).map(Into::into));
        let path = path.to_owned();
        Following::new(files, move || verifier(&path))
            .ok()
            .map(Self)
    }
}

fn read_kubeconfig(path: &Path) -> Result<serde_json::Value, String> {
    let text = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_saphyr::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))
}

fn verifier(kubeconfig: &Path) -> Result<Arc<WebPkiServerVerifier>, String> {
    let config = read_kubeconfig(kubeconfig)?;
    let field = |name: &str| {
        let value = config.pointer(&format!("/clusters/0/cluster/{name}"));
        value.and_then(serde_json::Value::as_str)
    };
    let pem = match (
        field("certificate-authority-data"),
        field("certificate-authority"),
    ) {
        (Some(data), _) => BASE64_STANDARD
            .decode(data)
            .map_err(|error| error.to_string())?,
        (None, Some(path)) => std::fs::read(path).map_err(|error| format!("{path}: {error}"))?,
        (None, None) => return Err("it names no authority".to_owned()),
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| error.to_string())
}

impl ServerCertVerifier for TrustedServers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let current = self.0.current();
        current.verify_server_cert(end_entity, intermediates, name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let current = self.0.current();
        current.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let current = self.0.current();
        current.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.current().supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa};

    use super::*;

    fn authority(name: &str) -> (String, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        (params.self_signed(&key).unwrap().pem(), key)
    }

    #[test]
    fn of_several_authorities_the_one_signs_whose_key_is_there() {
        let (old, old_key) = authority("old");
        let (new, new_key) = authority("new");
        let key = KeyPair::generate().unwrap();
        for bundle in [format!("{old}{new}"), format!("{new}{old}")] {
            for (signer, signer_key) in [(&old, &old_key), (&new, &new_key)] {
                let issuer = signing(&bundle, &signer_key.serialize_pem()).unwrap();
                let leaf = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
                let leaf = leaf.signed_by(&key, &issuer).unwrap();
                let (_, leaf) = X509Certificate::from_der(leaf.der()).unwrap();
                let signer = CertificateDer::from_pem_slice(signer.as_bytes()).unwrap();
                let (_, signer) = X509Certificate::from_der(&signer).unwrap();
                assert_eq!(leaf.issuer(), signer.subject());
                leaf.verify_signature(Some(signer.public_key())).unwrap();
            }
            assert!(signing(&bundle, &key.serialize_pem()).is_err());
        }
    }
}
