//! Several authorities at a time, while one takes the place of another: which of them signs, and why the new one is believed.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rcgen::{Issuer, KeyPair, PublicKeyData};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Credential, PkiError, authority, make};

/// Of the authorities in a PEM text the one whose key this is: while one takes the place of another, there are several.
pub(super) fn signing(credential: &Credential) -> Result<Issuer<'static, KeyPair>, PkiError> {
    let subject = "an authority";
    let key = KeyPair::from_pem(&credential.key).map_err(make(subject))?;
    for der in CertificateDer::pem_slice_iter(credential.certificate.as_bytes()) {
        let der = der.map_err(|_| make(subject)(rcgen::Error::CouldNotParseCertificate))?;
        if is_of_key(&der, &key) {
            return Issuer::from_ca_cert_der(&der, key).map_err(make(subject));
        }
    }
    Err(PkiError::Stranger)
}

fn is_of_key(der: &CertificateDer<'_>, key: &KeyPair) -> bool {
    X509Certificate::from_der(der)
        .is_ok_and(|(_, read)| read.public_key().raw == key.subject_public_key_info())
}

/// Whether a PEM text has the certificate of a key.
///
/// # Errors
/// When it is no key.
pub fn has_key(certificates: &str, key: &str) -> Result<bool, PkiError> {
    let key = KeyPair::from_pem(key).map_err(make("an authority"))?;
    let mut all = CertificateDer::pem_slice_iter(certificates.as_bytes());
    Ok(all.any(|der| der.is_ok_and(|der| is_of_key(&der, &key))))
}

/// The key of an authority that is to be, PEM.
///
/// # Errors
/// When the system has no randomness.
pub fn new_key() -> Result<String, PkiError> {
    let key = KeyPair::generate().map_err(make("an authority"))?;
    Ok(key.serialize_pem())
}

/// Makes an authority of a key, to follow the one that signs now: gives its certificate, and another of the same name and key that the one
/// of before has signed. By that those believe in it who trust the one of before.
///
/// # Errors
/// When one of the keys cannot be used.
pub fn successor(cluster: &str, key: &str, before: &Credential) -> Result<[String; 2], PkiError> {
    // No two authorities of a cluster have the same name, so that clients see which one has signed.
    let name = format!(
        "keelway-{cluster}-ca-{}",
        jiff::Timestamp::now().as_second()
    );
    let before = signing(before)?;
    let made = || {
        let key = KeyPair::from_pem(key)?;
        let mut params = authority(&name)?;
        let own = params.self_signed(&key)?;
        params.use_authority_key_identifier_extension = true;
        let vouched = params.signed_by(&key, &before)?;
        Ok([own.pem(), vouched.pem()])
    };
    made().map_err(make(&name))
}

/// The authorities in a PEM text, those of the key first, which signs.
///
/// # Errors
/// When one of the two is something else.
pub fn signing_first(certificates: &str, key: &str) -> Result<Vec<String>, PkiError> {
    let subject = "the authorities";
    let key = KeyPair::from_pem(key).map_err(make(subject))?;
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    for der in CertificateDer::pem_slice_iter(certificates.as_bytes()) {
        let der = der.map_err(|_| make(subject)(rcgen::Error::CouldNotParseCertificate))?;
        let pem = pem_of(&der);
        match X509Certificate::from_der(&der) {
            // What vouches for it comes last: it is needed by those only who do not know it yet.
            Ok((_, read)) if is_of_key(&der, &key) && read.subject() == read.issuer() => {
                first.insert(0, pem);
            }
            _ if is_of_key(&der, &key) => rest.push(pem),
            _ => rest.insert(0, pem),
        }
    }
    first.append(&mut rest);
    Ok(first)
}

/// Of the authorities in a PEM text those that are meant, and those that these have signed for.
pub fn believed(certificates: &str, is_meant: impl Fn(&CertificateDer<'_>) -> bool) -> String {
    let all: Vec<CertificateDer<'_>> = CertificateDer::pem_slice_iter(certificates.as_bytes())
        .flatten()
        .collect();
    let parsed: Vec<(&CertificateDer<'_>, X509Certificate<'_>)> = all
        .iter()
        .filter_map(|der| Some((der, X509Certificate::from_der(der).ok()?.1)))
        .collect();
    let meant: Vec<_> = parsed.iter().filter(|(der, _)| is_meant(der)).collect();
    let is_vouched = |one: &X509Certificate<'_>| {
        let mut signers = meant.iter().map(|(_, signer)| signer.public_key());
        one.is_ca() && signers.any(|key| one.verify_signature(Some(key)).is_ok())
    };
    let vouched: Vec<_> = parsed.iter().filter(|(_, one)| is_vouched(one)).collect();
    let is_believed = |one: &X509Certificate<'_>| {
        let mut signed_for = meant.iter().chain(&vouched);
        signed_for.any(|(_, other)| {
            one.public_key().raw == other.public_key().raw && one.subject() == other.subject()
        })
    };
    let believed = parsed.iter().filter(|(_, one)| is_believed(one));
    believed.map(|(der, _)| pem_of(der)).collect()
}

fn pem_of(der: &CertificateDer<'_>) -> String {
    let text = BASE64_STANDARD.encode(der);
    let lines = text.as_bytes().chunks(64);
    let lines: Vec<_> = lines.map(String::from_utf8_lossy).collect();
    format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        lines.join("\n")
    )
}

/// Whether the first certificate of a PEM text is signed by the first of another.
pub fn is_signed(leaf: &str, authority: &str) -> bool {
    let first = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).ok();
    let (Some(leaf), Some(authority)) = (first(leaf), first(authority)) else {
        return false;
    };
    let parsed = X509Certificate::from_der(&leaf).and_then(|(_, leaf)| {
        let (_, authority) = X509Certificate::from_der(&authority)?;
        Ok(leaf.verify_signature(Some(authority.public_key())).is_ok())
    });
    parsed.unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::super::Authority;
    use super::*;

    #[test]
    fn an_authority_follows_another_and_is_vouched_for_by_it() {
        let old = Authority::new("test", 1).expect("made").credential;
        let key = new_key().expect("made");
        let [own, vouched] = successor("test", &key, &old).expect("made");
        assert!(is_signed(&own, &own) && is_signed(&vouched, &old.certificate));
        assert!(!is_signed(&own, &old.certificate));
        assert!(has_key(&vouched, &key).expect("a key"));
        assert!(!has_key(&old.certificate, &key).expect("a key"));
        // Whichever comes first in a file, the one signs whose key it is.
        let all = [old.certificate.clone(), own.clone(), vouched.clone()];
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let certificate: String = order.map(|at| all[at].clone()).concat();
            for (key, first) in [(&old.key, &old.certificate), (&key, &own)] {
                let ordered = signing_first(&certificate, key).expect("ordered");
                assert_eq!((ordered.len(), &ordered[0]), (3, first), "{order:?}");
                let credential = Credential {
                    certificate: certificate.clone(),
                    key: key.clone(),
                };
                let authority = Authority::load(credential, 1).expect("loaded");
                let leaf = authority.client("somebody", None).expect("signed");
                assert!(is_signed(&leaf.certificate, first));
            }
        }
        // By the old one the new one is believed, and not the other way round; nor whoever is only beside.
        let other = Authority::new("test", 1).expect("made").credential;
        let beside = all.concat() + &other.certificate;
        let by = |meant: &str| {
            let meant = CertificateDer::from_pem_slice(meant.as_bytes()).expect("one");
            believed(&beside, |der| *der == meant)
        };
        assert_eq!(by(&all[0]), all.concat());
        assert_eq!(by(&all[1]), all[1].clone() + &all[2]);
        assert_eq!(by(&other.certificate), other.certificate);
        assert_eq!(believed(&beside, |_| false), "");
        let stranger = Credential {
            certificate: old.certificate,
            key,
        };
        assert!(Authority::load(stranger, 1).is_err());
    }
}
