//! The four patch formats, as requests bring them.

use http::{StatusCode, request::Parts};
use serde_json::Value;

use super::body::{check_kind, check_name, content_type, settle_namespace};
use super::fields::{self, Fields};
use super::request::{Target, WriteOptions};
use super::status::{FieldError, Status};
use super::write::Part;
use crate::codec::{self, Decoded, FieldValidation, MediaType};
use crate::patch;
use crate::registry::{self, Resource};

/// A patch, and what its text gives reason to warn of.
pub struct Patch {
    change: Change,
    warnings: Vec<String>,
}

/// A patch in one of the four formats.
enum Change {
    Json(Value),
    Merge(Value),
    Strategic(Value),
    Apply(Value),
}

impl Patch {
    pub fn parse(
        parts: &Parts,
        body: &[u8],
        target: &Target,
        options: &WriteOptions,
    ) -> Result<Self, Status> {
        let given = content_type(parts);
        let change = match given.split(';').next().unwrap_or("").trim() {
            "application/json-patch+json" => Change::Json,
            "application/merge-patch+json" => Change::Merge,
            "application/strategic-merge-patch+json" => Change::Strategic,
            "application/apply-patch+yaml" => return Self::applied(body, target, options),
            _ => return Err(Status::unsupported_patch()),
        };
        let (patch, faults) = codec::parse_patch(body).map_err(|error| {
            Status::bad_request(format!("error decoding patch: {}", error.reason))
        })?;
        let patch = Self {
            change: change(patch),
            warnings: match options.validation {
                FieldValidation::Ignore => Vec::new(),
                FieldValidation::Warn | FieldValidation::Strict => faults,
            },
        };
        if options.validation == FieldValidation::Strict && !patch.warnings.is_empty() {
            let why = format!("strict decoding error: {}", patch.warnings.join(", "));
            return Err(refused(String::from_utf8_lossy(body).into_owned(), &why));
        }
        Ok(patch)
    }

    fn applied(body: &[u8], target: &Target, options: &WriteOptions) -> Result<Self, Status> {
        let resource = target.resource;
        // Nothing is filled in: a configuration says what it is of.
        let decoded = codec::decode(body, MediaType::Yaml, "", "", FieldValidation::Warn);
        let mut decoded = decoded.map_err(|error| {
            // What has no kind, because it is no YAML or no object, is not spoken of as one.
            let kindless = ["yaml: ", "couldn't get version/kind"];
            match kindless.iter().any(|fault| error.reason.starts_with(fault)) {
                true => Status::bad_request(format!("error decoding YAML: {}", error.reason)),
                false => Status::bad_request(error.message),
            }
        })?;
        let given = (
            decoded.value.text("/apiVersion"),
            decoded.value.text("/kind"),
        );
        if given != (&resource.api_version(), resource.kind) {
            let (group, version) = registry::split_api_version(given.0);
            return Err(Status::bad_request(format!(
                "invalid object type: {group}/{version}, Kind={}",
                given.1
            )));
        }
        let unknown = |fault: &String| {
            let field = fault.strip_prefix("unknown field \"")?.strip_suffix('"')?;
            Some(format!(".{field}: field not declared in schema"))
        };
        let undeclared: Vec<String> = decoded.warnings.iter().filter_map(unknown).collect();
        if !undeclared.is_empty() {
            return Err(untyped(resource, &undeclared));
        }
        if options.validation == FieldValidation::Strict && !decoded.warnings.is_empty() {
            let why = decoded.warnings.join(", ");
            return Err(Status::bad_request(format!(
                "error decoding YAML: strict decoding error: {why}"
            )));
        }
        settle_namespace(&mut decoded.value, target)?;
        check_name(&mut decoded.value, target.object_name()?)?;
        if decoded.value.has("/metadata/managedFields") {
            return Err(Status::bad_request("metadata.managedFields must be nil"));
        }
        keep_part(&mut decoded.value, target);
        Ok(Self {
            change: Change::Apply(decoded.value),
            warnings: decoded.warnings,
        })
    }

    /// Whether it is a server-side apply, which notes its manager itself and may create the object.
    pub fn applies(&self) -> bool {
        matches!(self.change, Change::Apply(_))
    }

    pub fn warnings(&self) -> &[String] {
        &self.warnings
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
        let patched = match &self.change {
            Change::Json(patch) => patch::json(&mut object, patch),
            Change::Merge(patch) => patch::merge(&mut object, patch),
            Change::Strategic(patch) => patch::strategic(&mut object, patch, ty),
            Change::Apply(applied) => {
                let now = fields::now();
                let manager = patch::Manager {
                    name: &options.manager,
                    subresource: part.subresource(),
                    now: &now,
                };
                patch::apply(old, applied, ty, manager, options.force).map(|merged| object = merged)
            }
        };
        patched.map_err(patch_failed)?;
        Ok(object)
    }

    /// The object that the patch makes of `old`, held to its type: what does not fit is told at the field `patch`, as upstream.
    pub fn checked(
        &self,
        old: &Value,
        target: &Target,
        options: &WriteOptions,
        part: Part,
    ) -> Result<Decoded, Status> {
        let patched = self.onto(Some(old), target, options, part)?;
        let resource = target.resource;
        let api_version = resource.api_version();
        let is = |key: &str, expected: &str| patched[key].as_str() == Some(expected);
        if !is("kind", resource.kind) || !is("apiVersion", &api_version) {
            // What the object is, no patch changes.
            check_kind(&patched, &api_version, resource.kind)?;
        }
        codec::validate(patched, options.validation).map_err(|error| {
            let shown = match &self.change {
                Change::Strategic(patch) => go_text(patch),
                // Made once more: only a refusal needs the text.
                _ => match self.onto(Some(old), target, options, part) {
                    Ok(patched) => patched.to_string(),
                    Err(status) => return status,
                },
            };
            refused(shown, &error.reason)
        })
    }
}

/// A configuration with fields that its type does not have: nobody could own them, so they are never dropped. Upstream gives no
/// reason and calls it an error of its own.
fn untyped(resource: &Resource, faults: &[String]) -> Status {
    let faults = match faults {
        [fault] => fault.clone(),
        faults => format!("errors:\n  {}", faults.join("\n  ")),
    };
    let (group, version, kind) = (resource.group, resource.version, resource.kind);
    let message = format!(
        "failed to create typed patch object (/; {group}/{version}, Kind={kind}): {faults}"
    );
    Status::new(StatusCode::INTERNAL_SERVER_ERROR, "", message)
}

fn refused(shown: String, why: &str) -> Status {
    Status::invalid("", "", "", vec![FieldError::invalid("patch", shown, why)])
}

/// A value as Go prints maps: `map[a:1 b:[x y]]`.
fn go_text(value: &Value) -> String {
    match value {
        Value::Null => "<nil>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(go_text).collect();
            format!("[{}]", items.join(" "))
        }
        Value::Object(fields) => {
            let mut fields: Vec<(&String, &Value)> = fields.iter().collect();
            fields.sort_unstable_by_key(|(key, _)| *key);
            let fields = fields.into_iter();
            let fields: Vec<String> = fields
                .map(|(key, value)| format!("{key}:{}", go_text(value)))
                .collect();
            format!("map[{}]", fields.join(" "))
        }
        plain => plain.to_string(),
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
        patch::PatchError::TooLarge(_) => Status::too_large(message),
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_patch_is_shown_as_go_prints_it() {
        let patch = json!({"spec": {"b": [1, "x", null], "a": true}});
        assert_eq!(go_text(&patch), "map[spec:map[a:true b:[1 x <nil>]]]");
    }
}
