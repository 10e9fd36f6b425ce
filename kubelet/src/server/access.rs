//! access: who calls, and may they? What is asked for here is a shell in any pod, so nobody is let in for being known.
//!
//! A caller is known by a client certificate of the cluster's authority, else by a token that the API server knows. What it
//! may do the API server says, as rights on this Node's parts (`nodes/proxy`, `nodes/metrics`, ...), in upstream's names.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use http::{HeaderMap, Method, header};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::ServeError;

/// How long an answer of the API server is believed. A right that was taken away is gone after this.
const KEPT: Duration = Duration::from_secs(10);
/// Answers that are kept at a time, of each sort.
const KEPT_MAX: usize = 1024;

/// A Caller is who a request comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Caller {
    pub user: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl Caller {
    /// From a client certificate that TLS has verified: CN is the user, O the groups. None without a user.
    pub fn from_certificate(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let subject = certificate.subject();
        let user = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
        let organizations = subject.iter_organization();
        let mut groups: Vec<String> = organizations
            .filter_map(|name| name.as_str().ok().map(str::to_owned))
            .collect();
        groups.push("system:authenticated".to_owned());
        (!user.is_empty()).then(|| Self {
            user,
            groups,
            ..Self::default()
        })
    }
}

/// A Right is a verb on a part of this Node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Right {
    pub verb: &'static str,
    pub part: &'static str,
}

/// The rights of which a request needs one; none suffices for a method that nothing here has.
fn needed(method: &Method, path: &[&str]) -> Vec<Right> {
    let verb = match *method {
        Method::GET | Method::HEAD => "get",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => return Vec::new(),
    };
    let one = |verb, part| vec![Right { verb, part }];
    let or_proxy = |part| [part, "proxy"].map(|part| Right { verb, part }).to_vec();
    match path {
        // Entering a pod is more than looking, by whichever method it is asked for.
        ["exec" | "attach" | "portForward" | "run", ..] => one("create", "proxy"),
        ["metrics", ..] => one(verb, "metrics"),
        ["stats", ..] => one(verb, "stats"),
        ["logs", ..] => one(verb, "log"),
        ["checkpoint", ..] => one(verb, "checkpoint"),
        ["healthz"] => or_proxy("healthz"),
        ["pods"] => or_proxy("pods"),
        ["configz"] => or_proxy("configz"),
        _ => one(verb, "proxy"),
    }
}

/// An AuthorityError says why the API server did not answer.
#[derive(Debug, Clone, thiserror::Error)]
#[error("cannot ask the API server {question}: {reason}")]
pub struct AuthorityError {
    pub question: &'static str,
    pub reason: String,
}

/// An Authority knows callers by their tokens, and what each may do to this Node.
#[async_trait]
pub trait Authority: Send + Sync {
    /// Whose token this is; None when it is nobody's.
    async fn caller(&self, token: &str) -> Result<Option<Caller>, AuthorityError>;
    async fn allows(&self, caller: &Caller, right: Right) -> Result<bool, AuthorityError>;
}

/// A Gate lets requests in.
pub struct Gate {
    authority: Box<dyn Authority>,
    callers: Kept<String, Option<Caller>>,
    rights: Kept<(Caller, Right), bool>,
}

impl Gate {
    pub fn new(authority: impl Authority + 'static) -> Self {
        Self {
            authority: Box::new(authority),
            callers: Kept::default(),
            rights: Kept::default(),
        }
    }

    /// Refuses who is not known (401) and what the caller may not do (403).
    pub async fn admit(
        &self,
        certificate: Option<&[u8]>,
        headers: &HeaderMap,
        method: &Method,
        path: &[&str],
    ) -> Result<(), ServeError> {
        let caller = match certificate {
            Some(certificate) => Caller::from_certificate(certificate),
            None => self.holder(headers).await?,
        };
        let caller = caller.ok_or(ServeError::Unauthorized)?;
        let needed = needed(method, path);
        for right in &needed {
            if self.may(&caller, *right).await? {
                return Ok(());
            }
        }
        let Some(first) = needed.first() else {
            return Err(ServeError::BadMethod);
        };
        let parts: Vec<&str> = needed.iter().map(|right| right.part).collect();
        tracing::info!(user = caller.user, verb = first.verb, ?parts, "refused");
        Err(ServeError::Forbidden(format!(
            "Forbidden (user={}, verb={}, resource=nodes, subresource(s)={parts:?})",
            caller.user, first.verb
        )))
    }

    /// Who holds the token of a request.
    async fn holder(&self, headers: &HeaderMap) -> Result<Option<Caller>, ServeError> {
        let sent = headers.get(header::AUTHORIZATION);
        let Some((scheme, token)) = sent
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
        else {
            return Ok(None);
        };
        if !scheme.eq_ignore_ascii_case("bearer") || token.trim().is_empty() {
            return Ok(None);
        }
        let token = token.trim().to_owned();
        if let Some(known) = self.callers.get(&token) {
            return Ok(known);
        }
        let caller = self.authority.caller(&token).await?;
        self.callers.put(token, caller.clone());
        Ok(caller)
    }

    async fn may(&self, caller: &Caller, right: Right) -> Result<bool, ServeError> {
        let question = (caller.clone(), right);
        if let Some(known) = self.rights.get(&question) {
            return Ok(known);
        }
        let allowed = self.authority.allows(caller, right).await?;
        self.rights.put(question, allowed);
        Ok(allowed)
    }
}

impl From<AuthorityError> for ServeError {
    fn from(error: AuthorityError) -> Self {
        tracing::warn!(%error, "a caller can be neither let in nor refused");
        Self::Unavailable(error.to_string())
    }
}

/// Kept is answers that are believed for a while, and not too many of them.
struct Kept<K, V>(Mutex<HashMap<K, (V, Instant)>>);

impl<K, V> Default for Kept<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Hash + Eq, V: Clone> Kept<K, V> {
    fn get(&self, key: &K) -> Option<V> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(key)
            .filter(|(_, since)| since.elapsed() < KEPT)
            .map(|(value, _)| value.clone())
    }

    fn put(&self, key: K, value: V) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT_MAX {
            kept.retain(|_, (_, since)| since.elapsed() < KEPT);
        }
        // Who makes more of them than fit is asked about each time; others' answers stay.
        if kept.len() < KEPT_MAX {
            kept.insert(key, (value, Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_need_the_rights_that_upstream_names() {
        for (method, path, expected) in [
            ("GET", "exec/a/p/c", "create proxy"),
            ("POST", "exec/a/p/c", "create proxy"),
            ("GET", "attach/a/p/uid/c", "create proxy"),
            ("GET", "portForward/a/p", "create proxy"),
            ("GET", "containerLogs/a/p/c", "get proxy"),
            ("GET", "pods", "get pods, get proxy"),
            ("GET", "pods/x", "get proxy"),
            ("GET", "healthz", "get healthz, get proxy"),
            ("GET", "metrics", "get metrics"),
            ("GET", "metrics/cadvisor", "get metrics"),
            ("GET", "stats/summary", "get stats"),
            ("GET", "logs/x", "get log"),
            ("POST", "metrics", "create metrics"),
            ("DELETE", "anything", "delete proxy"),
            ("HEAD", "", "get proxy"),
            ("TRACE", "pods", ""),
        ] {
            let path: Vec<&str> = path.split('/').collect();
            let found = needed(&method.parse().unwrap(), &path);
            let found: Vec<_> = found
                .iter()
                .map(|right| format!("{} {}", right.verb, right.part))
                .collect();
            assert_eq!(found.join(", "), expected, "{method} {path:?}");
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let kept = Kept::default();
        for at in 0..2 * KEPT_MAX {
            kept.put(at, at);
        }
        assert_eq!(kept.0.lock().unwrap().len(), KEPT_MAX);
        assert_eq!((kept.get(&7), kept.get(&KEPT_MAX)), (Some(7), None));
    }
}
