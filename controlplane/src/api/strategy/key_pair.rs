//! Whether a certificate and a key of a TLS Secret belong together, in the words that Go's TLS has for what does not.

use base64::Engine;
use rustls::crypto::ring::sign::any_supported_type;
use rustls_pki_types::PrivateKeyDer;
use x509_parser::pem::Pem;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::SubjectPublicKeyInfo;

const CERTIFICATE: &str = "CERTIFICATE";
const KEY: &str = "PRIVATE KEY";

/// What keeps a server from using the two, each PEM in base64 as in a Secret's data; None where they are fine, and where
/// this cannot be known.
pub fn fault(certificate: &str, key: &str) -> Option<String> {
    check(&decode(certificate), &decode(key)).err()
}

fn decode(text: &str) -> Vec<u8> {
    let engine = base64::engine::general_purpose::STANDARD;
    engine.decode(text).unwrap_or_default()
}

fn check(certificate: &[u8], key: &[u8]) -> Result<(), String> {
    let certificate = find(certificate, |label| label == CERTIFICATE).map_err(|skipped| {
        match skipped.as_slice() {
            [] => "tls: failed to find any PEM data in certificate input".to_owned(),
            [one] if one.ends_with(KEY) => "tls: failed to find certificate PEM data in certificate input, but did find a private key; PEM inputs may have been switched".to_owned(),
            _ => format!("tls: failed to find \"CERTIFICATE\" PEM block in certificate input after skipping PEM blocks of the following types: [{}]", skipped.join(" ")),
        }
    })?;
    let key = find(key, |label| label.ends_with(KEY)).map_err(|skipped| {
        match skipped.as_slice() {
            [] => "tls: failed to find any PEM data in key input".to_owned(),
            [one] if one == CERTIFICATE => "tls: found a certificate rather than a key in the PEM for the private key".to_owned(),
            _ => format!("tls: failed to find PEM block with type ending in \"PRIVATE KEY\" in key input after skipping PEM blocks of the following types: [{}]", skipped.join(" ")),
        }
    })?;
    let Ok((_, certificate)) = X509Certificate::from_der(&certificate.contents) else {
        return Err("x509: malformed certificate".to_owned());
    };
    let unreadable = || Err("tls: failed to parse private key".to_owned());
    let Ok(der) = PrivateKeyDer::try_from(key.contents) else {
        return unreadable();
    };
    // Keys of lengths and curves that are not used here may be good ones: nothing is said of them.
    let Ok(signing) = any_supported_type(&der) else {
        return Ok(());
    };
    let Some(public) = signing.public_key() else {
        return Ok(());
    };
    let Ok((_, public)) = SubjectPublicKeyInfo::from_der(&public) else {
        return Ok(());
    };
    let certified = certificate.public_key();
    if certified.algorithm.algorithm != public.algorithm.algorithm {
        return Err("tls: private key type does not match public key type".to_owned());
    }
    if certified.subject_public_key != public.subject_public_key {
        return Err("tls: private key does not match public key".to_owned());
    }
    Ok(())
}

/// The first PEM block of a kind, or the labels of all those that are of others.
fn find(text: &[u8], wanted: impl Fn(&str) -> bool) -> Result<Pem, Vec<String>> {
    let mut skipped = Vec::new();
    for block in Pem::iter_from_buffer(text).map_while(Result::ok) {
        if wanted(&block.label) {
            return Ok(block);
        }
        skipped.push(block.label);
    }
    Err(skipped)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(algorithm: &'static rcgen::SignatureAlgorithm) -> (String, String) {
        let key = rcgen::KeyPair::generate_for(algorithm).expect("a key");
        let certificate = rcgen::CertificateParams::new(vec!["x.example".to_owned()])
            .and_then(|params| params.self_signed(&key))
            .expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }

    #[test]
    fn what_does_not_fit_together_is_told() {
        let (certificate, key) = pair(&rcgen::PKCS_ECDSA_P256_SHA256);
        let (_, other) = pair(&rcgen::PKCS_ECDSA_P256_SHA256);
        let (edwards, edwards_key) = pair(&rcgen::PKCS_ED25519);
        let both = format!("{certificate}{key}");
        let odd = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let locked =
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
        for (certificate, key, expected) in [
            (certificate.as_str(), key.as_str(), None),
            (&edwards, &edwards_key, None),
            (&both, &both, None),
            ("", &key, Some("any PEM data in certificate input")),
            (&key, &key, Some("may have been switched")),
            (odd, &key, Some("following types: [X509 CRL]")),
            (broken, &key, Some("malformed certificate")),
            (&certificate, "x", Some("any PEM data in key input")),
            (&certificate, &certificate, Some("rather than a key")),
            (&certificate, locked, Some("failed to parse private key")),
            (&certificate, &other, Some("does not match public key")),
            (&certificate, &edwards_key, Some("key type does not match")),
        ] {
            let found = check(certificate.as_bytes(), key.as_bytes()).err();
            let fits = match (&found, expected) {
                (None, None) => true,
                (Some(found), Some(expected)) => found.contains(expected),
                _ => false,
            };
            assert!(fits, "{found:?}, not {expected:?}");
        }
        let engine = base64::engine::general_purpose::STANDARD;
        assert_eq!(
            fault(&engine.encode(certificate), &engine.encode(key)),
            None
        );
        assert!(fault("", "").is_some());
    }
}
