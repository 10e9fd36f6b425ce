//! Subresources that are parts of an object, or things done to it: read, or written by a rule of their own.
//!
//! All end in [`Api::modify`], the pipeline that every write goes through; what a rule here works out is stored as it is.

mod approval;
mod eviction;
mod pod;
mod scale;
mod token;

use bytes::Bytes;
use http::{Method, StatusCode, request::Parts};
use serde_json::{Value, json};

use super::body::{check_name, decode, settle_namespace};
use super::change::check_preconditions;
use super::fields::Fields;
use super::patching::Patch;
use super::reply::{self, Answer};
use super::request::Form;
use super::status::{FieldError, Status};
use super::write::Part;
use super::{Api, Call, object};

/// A Rule is what a write of a part makes of the object: from the present one, and the one that was sent.
type Rule = fn(&Value, &Value) -> Result<Value, Status>;

impl Api {
    pub(super) async fn subresource(
        &self,
        call: Call,
        parts: Parts,
        body: Bytes,
    ) -> Result<Answer, Status> {
        let resource = call.target.resource;
        let name = call.target.subresource.clone().unwrap_or_default();
        let rule: (&'static str, Rule) = match (
            resource.group,
            resource.plural,
            name.as_str(),
            parts.method.as_str(),
        ) {
            (_, _, "status", "GET") => return self.get(&call, &parts).await,
            ("certificates.k8s.io", "certificatesigningrequests", "status", "PUT" | "PATCH") => {
                let request = call.target.decode(&self.record(&call.target).await?)?;
                self.check_signer(&call.identity, "sign", &request).await?;
                if parts.method == Method::PUT {
                    return self.update_part(&call, &parts, body, Part::Status).await;
                }
                return self.patch_part(&call, &parts, body, Part::Status).await;
            }
            (_, _, "status", "PUT") => {
                return self.update_part(&call, &parts, body, Part::Status).await;
            }
            (_, _, "status", "PATCH") => {
                return self.patch_part(&call, &parts, body, Part::Status).await;
            }
            (_, _, "scale", "GET" | "PUT" | "PATCH") => {
                return self.scale(&call, &parts, body).await;
            }
            ("", "pods", "binding", "POST") => return self.bind(&call, &parts, body).await,
            ("", "pods", "eviction", "POST") => return self.evict(&call, &parts, body).await,
            ("", "serviceaccounts", "token", "POST") => {
                return self.token(&call, &parts, body).await;
            }
            ("", "namespaces", "finalize", "PUT") => ("finalize", finalizers),
            ("", "pods", "ephemeralcontainers", _) => {
                ("ephemeralcontainers", pod::ephemeral_containers)
            }
            ("", "pods", "resize", _) => ("resize", pod::resources),
            ("certificates.k8s.io", "certificatesigningrequests", "approval", _) => {
                if parts.method == Method::PUT || parts.method == Method::PATCH {
                    let request = call.target.decode(&self.record(&call.target).await?)?;
                    self.check_signer(&call.identity, "approve", &request)
                        .await?;
                }
                ("approval", approval::decision)
            }
            _ => return Err(Status::method_not_allowed()),
        };
        match parts.method {
            Method::GET => self.get(&call, &parts).await,
            Method::PUT | Method::PATCH => self.write_by(rule, &call, &parts, body).await,
            _ => Err(Status::method_not_allowed()),
        }
    }

    /// Updates or patches an object as the rule of one of its parts allows.
    async fn write_by(
        &self,
        (name, rule): (&'static str, Rule),
        call: &Call,
        parts: &Parts,
        body: Bytes,
    ) -> Result<Answer, Status> {
        let form = Form::negotiate(&parts.headers, &call.query)?;
        let options = call.write_options(parts)?;
        let target = &call.target;
        let resource = target.resource;
        let part = Part::Exact(name);
        let mut warnings = Vec::new();
        let sent = if parts.method == Method::PATCH {
            Sent::Patch(Patch::parse(parts, &body, target, &options)?)
        } else {
            let api_version = resource.api_version();
            let validation = options.validation;
            let decoded = decode(parts, &body, &api_version, resource.kind, validation)?;
            warnings = decoded.warnings;
            let mut whole = object::to_stored(decoded.value, resource);
            settle_namespace(&mut whole, target)?;
            check_name(&mut whole, target.object_name()?)?;
            Sent::Whole(whole)
        };
        let outcome = self
            .modify(target, &options, part, |old| {
                let wanted = match &sent {
                    Sent::Whole(whole) => whole.clone(),
                    Sent::Patch(patch) => patch.checked(old, target, &options, part)?.value,
                };
                check_preconditions(target, &wanted, old)?;
                rule(old, &wanted)
            })
            .await?;
        let mut answer = reply::outcome(StatusCode::OK, target, form, outcome)?;
        warnings.append(&mut options.warnings.take());
        reply::warn(&mut answer, &warnings);
        Ok(answer)
    }
}

/// What a request sent: the whole object, or a change of it.
enum Sent {
    Whole(Value),
    Patch(Patch),
}

/// A namespace's finalizers; the last one gone ends its deletion.
fn finalizers(old: &Value, wanted: &Value) -> Result<Value, Status> {
    let mut new = old.clone();
    let finalizers = wanted.items("/spec/finalizers").to_vec();
    let mut errors = Vec::new();
    for (at, finalizer) in finalizers.iter().enumerate() {
        let (path, given) = (format!("spec.finalizers[{at}]"), finalizer.as_str());
        let given = given.unwrap_or("");
        for why in crate::selector::key_faults(given) {
            errors.push(FieldError::invalid(path.as_str(), given, why));
        }
        if given != "kubernetes" && !given.contains('/') {
            let why = "name is neither a standard finalizer name nor is it fully qualified";
            errors.push(FieldError::invalid(path, given, why));
        }
    }
    if !errors.is_empty() {
        let name = old.text("/metadata/name");
        return Err(Status::invalid("", "Namespace", name, errors));
    }
    new.set("/spec/finalizers", finalizers);
    Ok(new)
}

fn success() -> Answer {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
    reply::json(StatusCode::CREATED, &status)
}
