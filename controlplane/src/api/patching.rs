//! The four patch formats, as requests bring them.

use http::{StatusCode, request::Parts};
use serde_json::Value;

use super::body::{check_kind, check_name, content_type, settle_namespace};
use super::fields::{self, Fields};
use super::request::{Target, WriteOptions};
use super::status::Status;
use super::write::Part;
use crate::codec::{self, Decoded, MediaType};
use crate::patch;

/// A patch in one of the four formats.
pub enum Patch {
    Json(Value),
    Merge(Value),
    Strategic(Value),
    Apply(Decoded),
}

impl Patch {
    pub fn parse(
        parts: &Parts,
        body: &[u8],
        target: &Target,
        options: &WriteOptions,
    ) -> Result<Self, Status> {
        let json = || {
            serde_json::from_slice::<Value>(body).map_err(|error| {
                Status::bad_request(format!("the patch is not valid JSON: {error}"))
            })
        };
        let given = content_type(parts);
        match given.split(';').next().unwrap_or("").trim() {
            "application/json-patch+json" => Ok(Self::Json(json()?)),
            "application/merge-patch+json" => Ok(Self::Merge(json()?)),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic(json()?)),
            "application/apply-patch+yaml" => {
                let resource = target.resource;
                let api_version = resource.api_version();
                let mut decoded = codec::decode(
                    body,
                    MediaType::Yaml,
                    &api_version,
                    resource.kind,
                    options.validation,
                )
                .map_err(|error| Status::bad_request(error.message))?;
                check_kind(&decoded.value, &api_version, resource.kind)?;
                settle_namespace(&mut decoded.value, target)?;
                check_name(&mut decoded.value, target.object_name()?)?;
                if decoded.value.has("/metadata/managedFields") {
                    return Err(Status::bad_request("metadata.managedFields must be nil"));
                }
                keep_part(&mut decoded.value, target);
                Ok(Self::Apply(decoded))
            }
            _ => {
                let supported = [
                    "application/json-patch+json",
                    "application/merge-patch+json",
                    "application/strategic-merge-patch+json",
                    "application/apply-patch+yaml",
                ];
                Err(Status::unsupported_media_type(&supported))
            }
        }
    }

    pub fn warnings(&self) -> &[String] {
        match self {
            Self::Apply(decoded) => &decoded.warnings,
            _ => &[],
        }
    }

    /// The object that the patch makes of `old`.
    pub fn onto(
        &self,
        old: Option<&Value>,
        target: &Target,
        options: &WriteOptions,
        part: Part,
    ) -> Result<Value, Status> {
        let ty = target.resource.ty.get();
        let mut object = old.cloned().unwrap_or_default();
        let patched = match self {
            Self::Json(patch) => patch::json(&mut object, patch),
            Self::Merge(patch) => {
                patch::merge(&mut object, patch);
                Ok(())
            }
            Self::Strategic(patch) => patch::strategic(&mut object, patch, ty),
            Self::Apply(applied) => {
                let now = fields::now();
                let manager = patch::Manager {
                    name: &options.manager,
                    subresource: part.subresource(),
                    now: &now,
                };
                patch::apply(old, &applied.value, ty, manager, options.force)
                    .map(|merged| object = merged)
            }
        };
        patched.map_err(patch_failed)?;
        Ok(object)
    }
}

/// Takes out of an applied configuration what its path cannot write: nobody comes to own that.
fn keep_part(applied: &mut Value, target: &Target) {
    let Some(fields) = applied.as_object_mut() else {
        return;
    };
    if target.subresource.as_deref() == Some("status") {
        let kept = ["apiVersion", "kind", "metadata", "status"];
        fields.retain(|field, _| kept.contains(&field.as_str()));
    } else if target.resource.subresource("status").is_some() {
        fields.shift_remove("status");
    }
}

/// A patch that failed, as clients are told of it.
pub fn patch_failed(error: patch::PatchError) -> Status {
    let message = error.to_string();
    match error {
        patch::PatchError::Invalid(_) => Status::bad_request(message),
        patch::PatchError::Unprocessable(_) => {
            // Without a name in the details, kubectl shows the message.
            Status::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message)
        }
        patch::PatchError::Conflict(conflicts) => {
            let mut status = Status::new(StatusCode::CONFLICT, "Conflict", message);
            let causes = conflicts.into_iter().map(|conflict| {
                serde_json::json!({"reason": "FieldManagerConflict", "field": conflict.field,
                    "message": format!("conflict with {}", conflict.manager)})
            });
            status.details.insert("causes".into(), causes.collect());
            status
        }
    }
}
