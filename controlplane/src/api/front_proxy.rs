//! Proxies in front of the API server: one that shows a certificate of an authority kept for proxies alone says by headers whom it
//! speaks for (Kubernetes: request-header authentication). From anybody else these headers mean nothing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use http::{HeaderMap, HeaderName};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use serde_json::{Value, json};

use super::Peer;
use super::listener::{TlsError, roots};
use super::request::percent_decode;
use crate::auth::{Identity, common_name};
use crate::pki::Following;

/// What proxies are known by, and the headers in which they say whom they speak for.
#[derive(Debug, Clone)]
pub struct FrontProxyConfig {
    /// The authority of their certificates. It is to sign nobody else's: whoever has one of it can be anybody.
    pub ca_file: PathBuf,
    /// Common names that are believed; every one, when there are none.
    pub names: Vec<String>,
    pub user_headers: Vec<String>,
    pub group_headers: Vec<String>,
    pub uid_headers: Vec<String>,
    /// What headers of extra fields begin with; the rest of a name is the field.
    pub extra_prefixes: Vec<String>,
}

/// The proxies that are believed.
pub struct FrontProxies {
    config: FrontProxyConfig,
    headers: Headers,
    verifiers: Arc<Following<Verifiers>>,
}

struct Verifiers {
    clients: Arc<dyn ClientCertVerifier>,
    proxies: Arc<dyn ClientCertVerifier>,
}

struct Headers {
    user: Vec<HeaderName>,
    group: Vec<HeaderName>,
    uid: Vec<HeaderName>,
    extra: Vec<String>,
}

impl Headers {
    /// Those that Kubernetes recommends: they are taken off every request, whether or not proxies are known.
    fn usual() -> Self {
        let name = |name| vec![HeaderName::from_static(name)];
        Self {
            user: name("x-remote-user"),
            group: name("x-remote-group"),
            uid: name("x-remote-uid"),
            extra: vec!["x-remote-extra-".to_owned()],
        }
    }

    fn of(config: &FrontProxyConfig) -> Result<Self, TlsError> {
        let names = |texts: &[String]| {
            let name = |text: &String| {
                HeaderName::try_from(text.as_str())
                    .map_err(|_| TlsError::Config(format!("{text:?} is no header")))
            };
            texts.iter().map(name).collect::<Result<Vec<_>, _>>()
        };
        let extra = config.extra_prefixes.iter();
        Ok(Self {
            user: names(&config.user_headers)?,
            group: names(&config.group_headers)?,
            uid: names(&config.uid_headers)?,
            extra: extra.map(|prefix| prefix.to_ascii_lowercase()).collect(),
        })
    }

    fn field<'a>(&self, name: &'a HeaderName) -> Option<&'a str> {
        let mut prefixes = self.extra.iter();
        prefixes.find_map(|prefix| name.as_str().strip_prefix(prefix.as_str()))
    }

    fn clear(&self, headers: &mut HeaderMap) {
        for name in self.user.iter().chain(&self.group).chain(&self.uid) {
            headers.remove(name);
        }
        let extra = headers.keys().filter(|name| self.field(name).is_some());
        for name in extra.cloned().collect::<Vec<_>>() {
            headers.remove(name);
        }
    }

    /// Whom the headers speak for; None when they name nobody.
    fn identity(&self, headers: &HeaderMap) -> Option<Identity> {
        let values = |names: &[HeaderName]| -> Vec<String> {
            let values = names.iter().flat_map(|name| headers.get_all(name));
            let texts = values.filter_map(|value| value.to_str().ok());
            let texts = texts.filter(|text| !text.is_empty());
            texts.map(str::to_owned).collect()
        };
        let user = values(&self.user).into_iter().next()?;
        let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for name in headers.keys() {
            if let Some(field) = self.field(name) {
                let said = extra.entry(percent_decode(field).into_owned()).or_default();
                said.extend(values(std::slice::from_ref(name)));
            }
        }
        let identity = Identity {
            user,
            groups: values(&self.group),
            uid: values(&self.uid).into_iter().next().unwrap_or_default(),
            extra,
        };
        Some(identity.among_everybody())
    }
}

impl FrontProxies {
    /// # Errors
    /// When a header cannot be one, or an authority cannot be read.
    pub fn new(config: FrontProxyConfig, client_ca: &Path) -> Result<Self, TlsError> {
        let (client_ca, proxy_ca) = (client_ca.to_owned(), config.ca_file.clone());
        let files = vec![client_ca.clone(), proxy_ca.clone()];
        let verifier = |path: &Path| -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
            let built = WebPkiClientVerifier::builder(Arc::new(roots(path)?)).build();
            built.map_err(|error| TlsError::Config(error.to_string()))
        };
        let verifiers = Following::new(files, move || {
            Ok::<_, TlsError>(Verifiers {
                clients: verifier(&client_ca)?,
                proxies: verifier(&proxy_ca)?,
            })
        })?;
        Ok(Self {
            headers: Headers::of(&config)?,
            verifiers,
            config,
        })
    }

    pub fn ca_file(&self) -> &Path {
        &self.config.ca_file
    }

    /// The other end of a connection, by what it has shown: TLS took either authority's certificates, and what one has signed says
    /// nothing to the other.
    pub fn peer(&self, chain: &[CertificateDer<'_>], address: Option<SocketAddr>) -> Peer {
        let signed = |by: &Arc<dyn ClientCertVerifier>| {
            let (first, rest) = chain.split_first()?;
            by.verify_client_cert(first, rest, UnixTime::now()).ok()?;
            Some(first.to_vec())
        };
        let verifiers = self.verifiers.current();
        let name = signed(&verifiers.proxies).and_then(|certificate| common_name(&certificate));
        let names = &self.config.names;
        Peer {
            certificate: signed(&verifiers.clients),
            proxy: name.filter(|name| names.is_empty() || names.contains(name)),
            address,
            ..Peer::default()
        }
    }

    /// Whom a proxy speaks for; None when the peer is none, or says nobody's name.
    pub fn identity(&self, peer: &Peer, headers: &HeaderMap) -> Option<Identity> {
        peer.proxy.as_ref()?;
        self.headers.identity(headers)
    }

    /// What extension servers are told, to believe the same proxies: entries of `kube-system/extension-apiserver-authentication`.
    ///
    /// # Errors
    /// When the authority cannot be read.
    pub fn published(&self) -> Result<Value, std::io::Error> {
        let config = &self.config;
        let list = |texts: &[String]| json!(texts).to_string();
        Ok(json!({
            "requestheader-client-ca-file": std::fs::read_to_string(&config.ca_file)?,
            "requestheader-allowed-names": list(&config.names),
            "requestheader-username-headers": list(&config.user_headers),
            "requestheader-group-headers": list(&config.group_headers),
            "requestheader-uid-headers": list(&config.uid_headers),
            "requestheader-extra-headers-prefix": list(&config.extra_prefixes),
        }))
    }
}

/// Takes off what only this server was to be told: behind it the headers would be believed without having been checked.
pub fn clear(headers: &mut HeaderMap, proxies: Option<&FrontProxies>) {
    static USUAL: LazyLock<Headers> = LazyLock::new(Headers::usual);
    USUAL.clear(headers);
    if let Some(proxies) = proxies {
        proxies.headers.clear(headers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().expect("a value"));
        }
        headers
    }

    #[test]
    fn headers_say_whom_a_proxy_speaks_for() {
        let said = headers(&[
            ("x-remote-user", ""),
            ("x-remote-user", "jane"),
            ("x-remote-group", "team"),
            ("x-remote-group", "others"),
            ("x-remote-uid", "7"),
            ("x-remote-extra-example.org%2fscope", "a"),
            ("x-remote-extra-example.org%2fscope", "b"),
        ]);
        let identity = Headers::usual().identity(&said).expect("somebody");
        let all = ["team", "others", "system:authenticated"];
        assert_eq!(
            (identity.user.as_str(), identity.uid.as_str()),
            ("jane", "7")
        );
        assert_eq!(identity.groups, all);
        assert_eq!(identity.extra["example.org/scope"], ["a", "b"]);
        let nobody = headers(&[("x-remote-group", "system:masters")]);
        assert_eq!(Headers::usual().identity(&nobody), None);
    }

    #[test]
    fn nothing_of_it_goes_on() {
        let mut said = headers(&[
            ("x-remote-user", "jane"),
            ("x-remote-group", "team"),
            ("x-remote-extra-scope", "a"),
            ("x-remote-extra-other", "b"),
            ("x-remotely", "kept"),
        ]);
        clear(&mut said, None);
        assert_eq!(said.keys().collect::<Vec<_>>(), ["x-remotely"]);
    }
}
