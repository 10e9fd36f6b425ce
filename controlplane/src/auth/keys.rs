//! The keys that sign ServiceAccount tokens.

use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256, RsaKeyPair, UnparsedPublicKey,
    VerificationAlgorithm,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{PrivateKeyDer, SubjectPublicKeyInfoDer};
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer, SubjectPublicKeyInfo};
use x509_parser::public_key::PublicKey;

use super::AuthError;
use super::token::base64_url;

/// TokenKeys signs and verifies ServiceAccount tokens. Keys are PEM: ECDSA P-256 as PKCS8 (ES256, what `keelway up`
/// makes) or RSA as PKCS8 or PKCS1 (RS256); which it is, is read from the file.
pub struct TokenKeys {
    pub(super) issuer: String,
    signer: Signer,
    random: SystemRandom,
    verifiers: Vec<Verifier>,
}

enum Signer {
    Ecdsa(EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

struct Verifier {
    /// SHA-256 of the key's SPKI, base64url: the `kid` in a token's header.
    id: String,
    algorithm: &'static str,
    scheme: &'static dyn VerificationAlgorithm,
    key: Vec<u8>,
    /// What a JSON Web Key says of it (RFC 7518, section 6).
    parameters: Vec<(&'static str, String)>,
}

/// The coordinates of a point of P-256, or modulus and exponent of RSA.
fn parameters(spki: &SubjectPublicKeyInfo<'_>) -> Result<Vec<(&'static str, String)>, AuthError> {
    let plain = |kind: &str| kind.to_owned();
    let integer = |bytes: &[u8]| {
        let leading = bytes.iter().take_while(|byte| **byte == 0).count();
        base64_url(&bytes[leading..])
    };
    match spki.parsed() {
        Ok(PublicKey::EC(point)) => {
            // Uncompressed: a 4 before both coordinates.
            let (x, y) = match point.data() {
                [4, both @ ..] if both.len() == 64 => both.split_at(32),
                _ => return Err(AuthError::Key("is not on P-256".to_owned())),
            };
            Ok(vec![
                ("kty", plain("EC")),
                ("crv", plain("P-256")),
                ("x", base64_url(x)),
                ("y", base64_url(y)),
            ])
        }
        Ok(PublicKey::RSA(key)) => Ok(vec![
            ("kty", plain("RSA")),
            ("n", integer(key.modulus)),
            ("e", integer(key.exponent)),
        ]),
        _ => Err(AuthError::Key("has an unreadable public part".to_owned())),
    }
}

impl Verifier {
    fn from_spki(der: &[u8]) -> Result<Self, AuthError> {
        let (_, spki) = SubjectPublicKeyInfo::from_der(der)
            .map_err(|e| AuthError::Key(format!("has an unreadable public part: {e}")))?;
        let key = spki.subject_public_key.data.to_vec();
        // OIDs of RFC 3279 and RFC 5480.
        let (algorithm, scheme): (_, &'static dyn VerificationAlgorithm) =
            match spki.algorithm.algorithm.to_id_string().as_str() {
                "1.2.840.10045.2.1" => ("ES256", &ECDSA_P256_SHA256_FIXED),
                "1.2.840.113549.1.1.1" => ("RS256", &RSA_PKCS1_2048_8192_SHA256),
                other => {
                    return Err(AuthError::Key(format!(
                        "is of type {other}; it must be ECDSA P-256 or RSA"
                    )));
                }
            };
        let digest = ring::digest::digest(&ring::digest::SHA256, der);
        Ok(Self {
            id: base64_url(digest.as_ref()),
            algorithm,
            scheme,
            key,
            parameters: parameters(&spki)?,
        })
    }
}

impl TokenKeys {
    /// `private` signs; `public` may hold several keys, all of which verify, so that a key can be replaced.
    pub fn from_pem(private: &[u8], public: &[u8], issuer: &str) -> Result<Self, AuthError> {
        let random = SystemRandom::new();
        let rejected = |e: ring::error::KeyRejected| {
            AuthError::Key(format!("is not an ECDSA P-256 or RSA key: {e}"))
        };
        let private = PrivateKeyDer::from_pem_slice(private)
            .map_err(|e| AuthError::Key(format!("is not PEM: {e}")))?;
        let signer = match &private {
            PrivateKeyDer::Pkcs8(der) => {
                let der = der.secret_pkcs8_der();
                match EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der, &random) {
                    Ok(pair) => Signer::Ecdsa(pair),
                    Err(_) => Signer::Rsa(RsaKeyPair::from_pkcs8(der).map_err(rejected)?),
                }
            }
            PrivateKeyDer::Pkcs1(der) => {
                Signer::Rsa(RsaKeyPair::from_der(der.secret_pkcs1_der()).map_err(rejected)?)
            }
            _ => {
                return Err(AuthError::Key(
                    "is in SEC1 form; convert it with `openssl pkcs8 -topk8 -nocrypt`".to_owned(),
                ));
            }
        };
        let mut verifiers = Vec::new();
        for der in SubjectPublicKeyInfoDer::pem_slice_iter(public) {
            let der =
                der.map_err(|e| AuthError::Key(format!("has a public part that is not PEM: {e}")))?;
            verifiers.push(Verifier::from_spki(&der)?);
        }
        let signs_with = match &signer {
            Signer::Ecdsa(pair) => pair.public_key().as_ref(),
            Signer::Rsa(pair) => pair.public_key().as_ref(),
        };
        // The signing key first: its id goes into the headers.
        let own = verifiers.iter().position(|v| v.key == signs_with);
        let own = own.ok_or_else(|| {
            AuthError::Key(
                "has no matching public key: sa.key and sa.pub do not belong together".into(),
            )
        })?;
        verifiers.swap(0, own);
        Ok(Self {
            issuer: issuer.to_owned(),
            signer,
            random,
            verifiers,
        })
    }

    /// Algorithm and key id of what this signs.
    pub(super) fn header(&self) -> (&'static str, &str) {
        (self.verifiers[0].algorithm, &self.verifiers[0].id)
    }

    pub(super) fn sign_bytes(&self, message: &[u8]) -> Result<Vec<u8>, AuthError> {
        let failed = |_| AuthError::Key("failed to sign".to_owned());
        match &self.signer {
            Signer::Ecdsa(pair) => Ok(pair
                .sign(&self.random, message)
                .map_err(failed)?
                .as_ref()
                .to_vec()),
            Signer::Rsa(pair) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &self.random, message, &mut signature)
                    .map_err(failed)?;
                Ok(signature)
            }
        }
    }

    /// The algorithms of the keys that verify, each once.
    pub fn algorithms(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.verifiers.iter().map(|v| v.algorithm).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The keys that verify, as a JSON Web Key Set (RFC 7517) for others who are shown our tokens.
    pub fn key_set(&self) -> Value {
        let keys = self.verifiers.iter().map(|verifier| {
            let mut key = json!({"use": "sig", "kid": verifier.id, "alg": verifier.algorithm});
            for (name, value) in &verifier.parameters {
                key[*name] = value.as_str().into();
            }
            key
        });
        json!({"keys": keys.collect::<Vec<_>>()})
    }

    /// The algorithm must be that of the key: a token does not choose how it is verified.
    pub(super) fn verify_bytes(
        &self,
        algorithm: &str,
        id: &str,
        message: &[u8],
        signature: &[u8],
    ) -> bool {
        let fits = |v: &&Verifier| v.algorithm == algorithm && (id.is_empty() || v.id == id);
        self.verifiers.iter().filter(fits).any(|v| {
            UnparsedPublicKey::new(v.scheme, &v.key)
                .verify(message, signature)
                .is_ok()
        })
    }
}
