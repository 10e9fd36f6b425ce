//! Who sends a request: a client certificate or a ServiceAccount token, and nobody else.

use http::header::AUTHORIZATION;
use http::request::Parts;
use serde_json::Value;

use super::audit::Trail;
use super::fields::Fields;
use super::status::{Status, Subject};
use super::{Api, Peer, config::TOKEN_ISSUER, impersonate, object};
use crate::auth::{Identity, ObjectRef, TokenSpec};
use crate::registry;

impl Api {
    /// The caller, or 401.
    pub(super) async fn authenticate(
        &self,
        peer: &Peer,
        parts: &Parts,
        trail: &Trail,
    ) -> Result<Identity, Status> {
        let caller = self.caller(peer, parts).await?;
        trail.caller(&caller);
        let Some(wished) = impersonate::wished(&parts.headers)? else {
            return Ok(caller);
        };
        let identity = self.impersonate(&caller, wished).await?;
        trail.acting_as(&identity);
        Ok(identity)
    }

    async fn caller(&self, peer: &Peer, parts: &Parts) -> Result<Identity, Status> {
        if let Some(value) = parts.headers.get(AUTHORIZATION) {
            let token = value.to_str().ok().and_then(|text| text.split_once(' '));
            let Some((scheme, token)) = token else {
                return Err(Status::unauthorized());
            };
            if !scheme.eq_ignore_ascii_case("bearer") {
                return Err(Status::unauthorized());
            }
            return match self.verify_token(token.trim(), &[TOKEN_ISSUER]).await? {
                Ok(spec) => Ok(spec.identity()),
                Err(reason) => {
                    tracing::debug!(%reason, "token refused");
                    Err(Status::unauthorized())
                }
            };
        }
        let certificate = peer
            .certificate
            .as_deref()
            .ok_or_else(Status::unauthorized)?;
        Identity::from_certificate(certificate).map_err(|error| {
            tracing::debug!(%error, "certificate refused");
            Status::unauthorized()
        })
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
        Ok(found.is_some_and(|object| object.text("/metadata/uid") == wanted.uid))
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
