//! Who sends a request: whom a proxy speaks for, a client certificate, a ServiceAccount's token or a bootstrap token, and nobody else.

use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::Method;
use http::header::AUTHORIZATION;
use http::request::Parts;
use serde_json::Value;

use super::audit::Trail;
use super::fields::Fields;
use super::status::{Status, Subject};
use super::{Api, Peer, config::TOKEN_ISSUER, impersonate, object};
use crate::auth::{Identity, ObjectRef, TokenSpec, bootstrap};
use crate::registry;

/// How long after its end has begun what a token is bound to is still good for it.
const ENDING_MAX: jiff::SignedDuration = jiff::SignedDuration::from_secs(60);
/// The one object that may be read by who has shown nothing, if a Role lets `system:anonymous`: what machines that join know the
/// cluster by.
const CLUSTER_INFO: &str = "/api/v1/namespaces/kube-public/configmaps/cluster-info";

impl Api {
    /// The caller, or 401.
    pub(super) async fn authenticate(
        &self,
        peer: &Peer,
        parts: &Parts,
        trail: &Trail,
    ) -> Result<Arc<Identity>, Status> {
        let caller = self.caller(peer, parts).await?;
        trail.caller(&caller);
        let Some(wished) = impersonate::wished(&parts.headers)? else {
            return Ok(caller);
        };
        let identity = Arc::new(self.impersonate(&caller, wished).await?);
        trail.acting_as(&identity);
        Ok(identity)
    }

    /// The caller by the first that says who it is, in upstream's order: a proxy's headers, the client certificate, the token.
    async fn caller(&self, peer: &Peer, parts: &Parts) -> Result<Arc<Identity>, Status> {
        let proxies = self.proxies.as_ref();
        if let Some(identity) = proxies.and_then(|known| known.identity(peer, &parts.headers)) {
            return Ok(Arc::new(identity));
        }
        if let Some(identity) = peer.identity() {
            return Ok(identity.clone());
        }
        if let Some(value) = parts.headers.get(AUTHORIZATION) {
            let token = value.to_str().ok().and_then(|text| text.split_once(' '));
            let Some((scheme, token)) = token else {
                return Err(Status::unauthorized());
            };
            if !scheme.eq_ignore_ascii_case("bearer") {
                return Err(Status::unauthorized());
            }
            return match self.token_identity(token.trim()).await? {
                Ok(identity) => Ok(Arc::new(identity)),
                Err(reason) => {
                    tracing::debug!(%reason, "token refused");
                    Err(Status::unauthorized())
                }
            };
        }
        // A certificate that names nobody is no nobody's request.
        let unsigned = peer.certificate.is_none();
        if unsigned && parts.method == Method::GET && parts.uri.path() == CLUSTER_INFO {
            return Ok(Arc::new(Identity::anonymous()));
        }
        Err(Status::unauthorized())
    }

    async fn token_identity(&self, token: &str) -> Result<Result<Identity, String>, Status> {
        if let Some(shown) = bootstrap::Shown::parse(token) {
            return self.bootstrap_identity(&shown).await;
        }
        let spec = self.verify_token(token, &[TOKEN_ISSUER]).await?;
        Ok(spec.map(|spec| spec.identity()))
    }

    /// Who shows a bootstrap token, when it is good; else why not.
    pub(super) async fn bootstrap_identity(
        &self,
        shown: &bootstrap::Shown<'_>,
    ) -> Result<Result<Identity, String>, Status> {
        let name = shown.secret_name();
        let found = self
            .lookup("", "secrets", Some(bootstrap::NAMESPACE), &name)
            .await?;
        let Some(secret) = found.filter(|secret| {
            secret.text("/type") == bootstrap::SECRET_TYPE
                && !secret.has("/metadata/deletionTimestamp")
        }) else {
            return Ok(Err(format!("there is no bootstrap token {}", shown.id)));
        };
        let field = |key: &str| {
            let value = secret.pointer("/data")?.get(key)?.as_str()?;
            String::from_utf8(BASE64_STANDARD.decode(value).ok()?).ok()
        };
        let now = jiff::Timestamp::now().as_second();
        let kept = bootstrap::Kept::read(&name, field);
        let identity = kept.and_then(|kept| kept.identity(shown, now));
        Ok(identity.map_err(|error| error.to_string()))
    }

    /// A token's claims, when it is good and all that it is bound to still exists; else why not.
    pub(super) async fn verify_token(
        &self,
        token: &str,
        audiences: &[&str],
    ) -> Result<Result<TokenSpec, String>, Status> {
        let now = jiff::Timestamp::now().as_second();
        let spec = match self.tokens.verify(token, audiences, now) {
            Ok(spec) => spec,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let namespace = Some(spec.namespace.as_str());
        let bound = [
            ("serviceaccounts", namespace, Some(&spec.service_account)),
            ("pods", namespace, spec.pod.as_ref()),
            ("secrets", namespace, spec.secret.as_ref()),
            // Where it is bound to a pod, the node is only told of.
            (
                "nodes",
                None,
                spec.node.as_ref().filter(|_| spec.pod.is_none()),
            ),
        ];
        for (plural, namespace, wanted) in bound {
            let Some(wanted) = wanted else { continue };
            if !self.exists(plural, namespace, wanted).await? {
                return Ok(Err(format!(
                    "is bound to {plural} {:?}, which is gone",
                    wanted.name
                )));
            }
        }
        Ok(Ok(spec))
    }

    async fn exists(
        &self,
        plural: &str,
        namespace: Option<&str>,
        wanted: &ObjectRef,
    ) -> Result<bool, Status> {
        let found = self.lookup("", plural, namespace, &wanted.name).await?;
        let now = jiff::Timestamp::now();
        let ended = |object: &Value| {
            let since = object.text("/metadata/deletionTimestamp").parse();
            since.is_ok_and(|since: jiff::Timestamp| now.duration_since(since) > ENDING_MAX)
        };
        Ok(found
            .is_some_and(|object| object.text("/metadata/uid") == wanted.uid && !ended(&object)))
    }

    /// An object of a core or other stable resource, as stored.
    pub(super) async fn lookup(
        &self,
        group: &str,
        plural: &str,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<Option<Value>, Status> {
        let resource = registry::resource(group, "v1", plural).ok_or_else(|| {
            Status::not_found(Subject {
                group,
                resource: plural,
                name,
            })
        })?;
        let record = self
            .store
            .get(&object::key(resource, namespace, name))
            .await?;
        record
            .map(|record| object::decode(&record, resource.kind, &resource.api_version()))
            .transpose()
    }
}
