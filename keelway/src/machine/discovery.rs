//! How a machine knows a cluster that it has not met: by the public `cluster-info`, whose authority must have the hash that was
//! printed with the token, and which the token must have signed (kubeadm's token discovery).

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client, Config};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::API_PORT;
use super::token::Token;
use crate::forward::names::{self, NameError};
use crate::pki::succession::believed;

/// The object that anybody may read.
pub const NAMESPACE: &str = "kube-public";
pub const NAME: &str = "cluster-info";
pub const CONTENT: &str = "kubeconfig";
/// How long a token may take to sign what a cluster tells of itself; a machine may read that, and may not watch it.
const SIGNING_TIMEOUT: Duration = Duration::from_secs(5);
const SIGNING_RETRY: Duration = Duration::from_millis(200);

#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    #[error("{0:?} is no address of an API server: give IP[:PORT], or a name that resolves")]
    Address(String),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(
        "{0:?} is no hash of an authority: one is sha256: and 64 hexadecimal digits, as `keelway server` prints it"
    )]
    Hash(String),
    #[error("the API server at {address} does not tell of its cluster: {source}")]
    Ask {
        address: SocketAddr,
        source: Box<kube::Error>,
    },
    #[error("what the API server tells of its cluster cannot be used: {0}")]
    Unusable(String),
    #[error(
        "the API server at {address} is not of the cluster that was meant: its authority has the hash {found}, and not the one that was given"
    )]
    OtherAuthority { address: SocketAddr, found: String },
    #[error(
        "the cluster does not know the token {0}: it has expired or was deleted; `keelway token create` makes another on a control plane"
    )]
    Unsigned(String),
    #[error(
        "what the API server tells of its cluster was not signed by the token {0}, although it claims so"
    )]
    BadSignature(String),
}

/// SHA-256 of an authority's public key (its SubjectPublicKeyInfo), as kubeadm writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaHash(String);

impl FromStr for CaHash {
    type Err = DiscoveryError;

    fn from_str(text: &str) -> Result<Self, DiscoveryError> {
        let digits = text.strip_prefix("sha256:").map(str::to_ascii_lowercase);
        let good = |digits: &String| {
            digits.len() == 64 && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
        };
        let digits = digits.filter(good);
        digits
            .map(|digits| CaHash(format!("sha256:{digits}")))
            .ok_or_else(|| DiscoveryError::Hash(text.to_owned()))
    }
}

impl std::fmt::Display for CaHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl CaHash {
    /// Of the first certificate in a PEM text.
    ///
    /// # Errors
    /// When there is none.
    pub fn of_pem(pem: &str) -> Result<Self, DiscoveryError> {
        let bad = |error: &dyn std::fmt::Display| {
            DiscoveryError::Unusable(format!("its authority's certificate: {error}"))
        };
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| bad(&error))?;
        Self::of_der(&der)
    }

    /// Of a certificate.
    ///
    /// # Errors
    /// When it is none.
    pub fn of_der(der: &[u8]) -> Result<Self, DiscoveryError> {
        let bad = |error: &dyn std::fmt::Display| {
            DiscoveryError::Unusable(format!("its authority's certificate: {error}"))
        };
        let (_, certificate) = X509Certificate::from_der(der).map_err(|error| bad(&error))?;
        let digits = sha256(certificate.public_key().raw);
        Ok(CaHash(format!("sha256:{digits}")))
    }
}

/// In hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    let digits = digest.as_ref().iter();
    digits.map(|byte| format!("{byte:02x}")).collect()
}

/// What is known of a cluster once it is trusted.
#[derive(Debug, Clone)]
pub struct Known {
    /// Where it was found.
    pub address: SocketAddr,
    /// PEM of its authority.
    pub ca: String,
}

/// The address of an API server, of `IP`, `IP:PORT`, `https://...` or a name in place of the IP.
///
/// # Errors
/// When it is none, or nobody knows the name.
pub async fn address(text: &str) -> Result<SocketAddr, DiscoveryError> {
    let bare = text.strip_prefix("https://").unwrap_or(text);
    let bare = bare.trim_end_matches('/');
    if let Ok(address) = bare.parse::<SocketAddr>() {
        return Ok(address);
    }
    let inner = bare.trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = inner.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, API_PORT));
    }
    let malformed = || DiscoveryError::Address(text.to_owned());
    let (host, port) = match bare.split_once(':') {
        Some((host, port)) => (host, port.parse().map_err(|_| malformed())?),
        None => (bare, API_PORT),
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if host.is_empty() || !host.chars().all(allowed) {
        return Err(malformed());
    }
    let found = names::resolve(host).await?;
    let ip = found.first().copied().ok_or_else(malformed)?;
    Ok(SocketAddr::new(ip, port))
}

/// Asks an API server for its cluster, and believes it when its authority has the hash and the token has signed what it says.
///
/// A token that was made just now signs a moment later: one that has not is waited for.
///
/// # Errors
/// Why it is not believed.
pub async fn discover(
    address: SocketAddr,
    token: &Token,
    hash: &CaHash,
) -> Result<Known, DiscoveryError> {
    let until = Instant::now() + SIGNING_TIMEOUT;
    loop {
        match discover_once(address, token, hash).await {
            Err(DiscoveryError::Unsigned(_)) if Instant::now() < until => {
                tokio::time::sleep(SIGNING_RETRY).await;
            }
            known => return known,
        }
    }
}

async fn discover_once(
    address: SocketAddr,
    token: &Token,
    hash: &CaHash,
) -> Result<Known, DiscoveryError> {
    // Whoever answers can say anything: it is checked by what it says.
    let seen = ask(address, None).await?;
    let meant = verify(&seen, address, token, hash)?.meant;
    // Once more, from one who holds the key of a certificate that this authority has signed.
    let again = ask(address, Some(&meant)).await?;
    let ca = verify(&again, address, token, hash)?.all;
    Ok(Known { address, ca })
}

async fn ask(address: SocketAddr, ca: Option<&str>) -> Result<ConfigMap, DiscoveryError> {
    let unusable = |error: &dyn std::fmt::Display| DiscoveryError::Unusable(error.to_string());
    let uri = format!("https://{address}");
    let mut config = Config::new(uri.parse().map_err(|error| unusable(&error))?);
    config.proxy_url = None;
    match ca {
        Some(pem) => {
            let all = CertificateDer::pem_slice_iter(pem.as_bytes());
            let all: Result<Vec<_>, _> = all.map(|der| der.map(|der| der.to_vec())).collect();
            config.root_cert = Some(all.map_err(|error| unusable(&error))?);
        }
        None => config.accept_invalid_certs = true,
    }
    let client = Client::try_from(config).map_err(|error| unusable(&error))?;
    let api: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
    api.get(NAME).await.map_err(|source| DiscoveryError::Ask {
        address,
        source: Box::new(source),
    })
}

/// The authorities that `cluster-info` names, PEM.
struct Authorities {
    all: String,
    /// The one that was meant, with what it has signed for: there are several while one takes the place of another.
    meant: String,
}

/// The authorities that `cluster-info` names, when the one that was meant is among them.
fn verify(
    info: &ConfigMap,
    address: SocketAddr,
    token: &Token,
    hash: &CaHash,
) -> Result<Authorities, DiscoveryError> {
    let unusable = |reason: &str| DiscoveryError::Unusable(reason.to_owned());
    let data = info.data.as_ref().ok_or_else(|| unusable("it is empty"))?;
    let content = data
        .get(CONTENT)
        .ok_or_else(|| unusable("it has no kubeconfig"))?;
    let signature = data
        .get(&format!("jws-kubeconfig-{}", token.id()))
        .ok_or_else(|| DiscoveryError::Unsigned(token.id().to_owned()))?;
    if !is_signature(signature, content, token) {
        return Err(DiscoveryError::BadSignature(token.id().to_owned()));
    }
    let config: Value =
        serde_saphyr::from_str(content).map_err(|error| unusable(&error.to_string()))?;
    let ca = config
        .pointer("/clusters/0/cluster/certificate-authority-data")
        .and_then(Value::as_str)
        .and_then(|data| BASE64_STANDARD.decode(data).ok())
        .and_then(|pem| String::from_utf8(pem).ok())
        .ok_or_else(|| unusable("its kubeconfig names no authority"))?;
    let meant = believed(&ca, |der| {
        CaHash::of_der(der).is_ok_and(|found| found == *hash)
    });
    if meant.is_empty() {
        return Err(DiscoveryError::OtherAuthority {
            address,
            found: CaHash::of_pem(&ca)?.to_string(),
        });
    }
    Ok(Authorities { all: ca, meant })
}

/// Whether a detached JSON Web Signature (RFC 7515) is the token's, over the content.
fn is_signature(signature: &str, content: &str, token: &Token) -> bool {
    let Some((header, mac)) = signature.split_once("..") else {
        return false;
    };
    let decoded = |text: &str| BASE64_URL_SAFE_NO_PAD.decode(text).ok();
    let named = decoded(header).and_then(|json| serde_json::from_slice::<Value>(&json).ok());
    let is = |field: &str, wanted: &str| {
        let value = named.as_ref().and_then(|header| header.get(field));
        value.and_then(Value::as_str) == Some(wanted)
    };
    let Some(mac) = decoded(mac).filter(|_| is("alg", "HS256") && is("kid", token.id())) else {
        return false;
    };
    let signed = format!("{header}.{}", BASE64_URL_SAFE_NO_PAD.encode(content));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, token.secret().as_bytes());
    ring::hmac::verify(&key, signed.as_bytes(), &mac).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::Authority;

    fn token() -> Token {
        "abcdef.0123456789abcdef".parse().expect("a token")
    }

    #[test]
    fn a_signature_is_taken_from_the_token_alone() {
        // As the control plane's own test has it.
        let good =
            "eyJhbGciOiJIUzI1NiIsImtpZCI6ImFiY2RlZiJ9..psz1NayrXM3IaFzKZGsb5n_mBl7MjtlsZ1xE8MRmF_4";
        assert!(is_signature(good, "content", &token()));
        assert!(!is_signature(good, "other", &token()));
        let other: Token = "abcdef.0123456789abcdeg".parse().expect("a token");
        assert!(!is_signature(good, "content", &other));
        let none = BASE64_URL_SAFE_NO_PAD.encode(r#"{"alg":"none","kid":"abcdef"}"#);
        assert!(!is_signature(&format!("{none}.."), "content", &token()));
    }

    #[test]
    fn an_authority_of_another_hash_is_refused() {
        let address = "10.0.0.1:6443".parse().expect("an address");
        let [ca, second, other] = [(); 3].map(|()| {
            let made = Authority::new("test", 1).expect("made");
            made.credential.certificate
        });
        let all = ca.clone() + &second;
        let content = format!(
            r#"{{"clusters":[{{"cluster":{{"certificate-authority-data":"{}"}}}}]}}"#,
            BASE64_STANDARD.encode(&all)
        );
        let header = BASE64_URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256","kid":"abcdef"}"#);
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, b"0123456789abcdef");
        let signed = format!("{header}.{}", BASE64_URL_SAFE_NO_PAD.encode(&content));
        let mac = BASE64_URL_SAFE_NO_PAD.encode(ring::hmac::sign(&key, signed.as_bytes()));
        let info = ConfigMap {
            data: Some(
                [
                    (CONTENT.to_owned(), content),
                    (
                        "jws-kubeconfig-abcdef".to_owned(),
                        format!("{header}..{mac}"),
                    ),
                ]
                .into(),
            ),
            ..ConfigMap::default()
        };
        let hash = CaHash::of_pem(&ca).expect("a hash");
        // Either may be meant; what the other one signs is not believed for that.
        for meant in [&ca, &second] {
            let hash = CaHash::of_pem(meant).expect("a hash");
            let found = verify(&info, address, &token(), &hash).expect("good");
            assert_eq!((&found.all, &found.meant), (&all, meant));
        }
        let wrong = CaHash::of_pem(&other).expect("a hash");
        assert!(matches!(
            verify(&info, address, &token(), &wrong),
            Err(DiscoveryError::OtherAuthority { .. })
        ));
        let stranger: Token = "zzzzzz.0123456789abcdef".parse().expect("a token");
        assert!(matches!(
            verify(&info, address, &stranger, &hash),
            Err(DiscoveryError::Unsigned(_))
        ));
    }

    #[tokio::test]
    async fn addresses_of_servers_are_read_in_every_form() {
        for (text, wanted) in [
            ("10.0.0.1", "10.0.0.1:6443"),
            ("10.0.0.1:7443", "10.0.0.1:7443"),
            ("https://10.0.0.1:7443/", "10.0.0.1:7443"),
            ("fd00::1", "[fd00::1]:6443"),
            ("[fd00::1]:7443", "[fd00::1]:7443"),
        ] {
            let found = address(text).await.expect("an address");
            assert_eq!(found.to_string(), wanted, "{text}");
        }
        for bad in ["", "a b", "host:port", "https://"] {
            assert!(address(bad).await.is_err(), "{bad}");
        }
    }

    #[test]
    fn hashes_are_of_kubeadms_form() {
        let text = format!("sha256:{}", "Ab".repeat(32));
        assert_eq!(
            text.parse::<CaHash>().expect("a hash").to_string(),
            text.to_lowercase()
        );
        for bad in ["", "sha256:", "md5:00", &text[..70], &format!("{text}0")] {
            assert!(bad.parse::<CaHash>().is_err(), "{bad}");
        }
    }
}
