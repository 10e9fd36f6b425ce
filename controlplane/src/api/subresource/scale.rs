//! `scale`: the number of replicas, in the same form for every kind that has one.

use bytes::Bytes;
use http::{Method, StatusCode, request::Parts};
use serde_json::{Value, json};

use crate::api::body::{check_kind, check_name, content_type, decode, settle_namespace};
use crate::api::fields::{self, Fields};
use crate::api::patching::patch_failed;
use crate::api::reply::{self, Answer};
use crate::api::request::{Target, WriteOptions};
use crate::api::status::{FieldError, Status};
use crate::api::storing::Outcome;
use crate::api::write::Part;
use crate::api::{Api, Call};
use crate::codec::{self, MediaType};
use crate::patch;

impl Api {
    /// Reads or sets the number of replicas, as `autoscaling/v1` Scale.
    pub(super) async fn scale(
        &self,
        call: &Call,
        parts: &Parts,
        body: Bytes,
    ) -> Result<Answer, Status> {
        let target = &call.target;
        let answer = |object: &Value| reply::json(StatusCode::OK, &scale_of(object));
        if parts.method == Method::GET {
            return Ok(answer(&target.decode(&self.record(target).await?)?));
        }
        let options = call.write_options(parts)?;
        let wanted: ScaleChange = if parts.method == Method::PUT {
            let decoded = decode(parts, &body, "autoscaling/v1", "Scale", options.validation)?;
            Box::new(move |_| Ok(decoded.value.clone()))
        } else {
            let given = content_type(parts)
                .split(';')
                .next()
                .unwrap_or("")
                .trim()
                .to_owned();
            if given == "application/apply-patch+yaml" {
                let outcome = self.apply_scale(target, &options, &body).await?;
                return Ok(answer(&outcome.into_object(target)?));
            }
            let change: Value = serde_json::from_slice(&body).map_err(|error| {
                Status::bad_request(format!("the patch is not valid JSON: {error}"))
            })?;
            Box::new(move |scale| {
                let mut scale = scale.clone();
                match given.as_str() {
                    "application/json-patch+json" => {
                        patch::json(&mut scale, &change)
                            .map_err(|error| Status::bad_request(error.to_string()))?;
                    }
                    // A Scale has no lists: both merges are the same.
                    "application/merge-patch+json" | "application/strategic-merge-patch+json" => {
                        patch::merge(&mut scale, &change).map_err(patch_failed)?;
                    }
                    _ => {
                        let supported = [
                            "application/json-patch+json",
                            "application/merge-patch+json",
                            "application/apply-patch+yaml",
                        ];
                        return Err(Status::unsupported_media_type(&supported));
                    }
                }
                Ok(scale)
            })
        };
        let change = |old: &Value| {
            let mut scale = wanted(&scale_of(old))?;
            check_name(&mut scale, target.object_name()?)?;
            let revision = scale.text("/metadata/resourceVersion");
            if !revision.is_empty() && revision != old.text("/metadata/resourceVersion") {
                return Err(Status::modified(target.subject()));
            }
            let replicas = scale.int("/spec/replicas");
            check(replicas, fields::name(old))?;
            let mut new = old.clone();
            new.set("/spec/replicas", replicas);
            Ok(new)
        };
        let outcome = self
            .modify(target, &options, Part::Exact("scale"), change)
            .await?;
        Ok(answer(&outcome.into_object(target)?))
    }
}

impl Api {
    /// Server-side apply of a Scale: it owns the replicas of the object behind it, by way of this subresource.
    async fn apply_scale(
        &self,
        target: &Target,
        options: &WriteOptions,
        body: &[u8],
    ) -> Result<Outcome, Status> {
        let name = target.object_name()?;
        let (group, kind) = ("autoscaling/v1", "Scale");
        let mut scale = codec::decode(body, MediaType::Yaml, group, kind, options.validation)
            .map_err(|error| Status::bad_request(error.message))?
            .value;
        check_kind(&scale, group, kind)?;
        settle_namespace(&mut scale, target)?;
        check_name(&mut scale, name)?;
        if scale.has("/metadata/managedFields") {
            return Err(Status::bad_request("metadata.managedFields must be nil"));
        }
        let resource = target.resource;
        let mut applied = json!({"apiVersion": resource.api_version(), "kind": resource.kind,
            "metadata": {"name": name}});
        if let Some(namespace) = &target.namespace {
            applied["metadata"]["namespace"] = namespace.as_str().into();
        }
        if scale.has("/spec/replicas") {
            check(scale.int("/spec/replicas"), name)?;
            applied["spec"] = json!({"replicas": scale["spec"]["replicas"]});
        }
        let now = fields::now();
        let manager = patch::Manager {
            name: &options.manager,
            subresource: "scale",
            now: &now,
        };
        let revision = scale.text("/metadata/resourceVersion");
        let uid = scale.text("/metadata/uid");
        self.apply_part(target, options, Part::Exact("scale"), |old| {
            let ty = resource.ty.get();
            let mut new = patch::apply(Some(old), &applied, ty, manager, options.force)
                .map_err(patch_failed)?;
            for (field, given) in [("resourceVersion", revision), ("uid", uid)] {
                if !given.is_empty() {
                    new.set(&format!("/metadata/{field}"), given);
                }
            }
            Ok(new)
        })
        .await
    }
}

fn check(replicas: i64, name: &str) -> Result<(), Status> {
    if replicas >= 0 {
        return Ok(());
    }
    let why = "must be greater than or equal to 0";
    let error = FieldError::invalid("spec.replicas", replicas, why);
    Err(Status::invalid("autoscaling", "Scale", name, vec![error]))
}

/// What a request makes of a Scale.
type ScaleChange = Box<dyn Fn(&Value) -> Result<Value, Status> + Send + Sync>;

/// The Scale of an object with replicas and a selector.
fn scale_of(object: &Value) -> Value {
    let mut metadata =
        json!({"name": fields::name(object), "namespace": fields::namespace(object)});
    for field in ["uid", "resourceVersion", "creationTimestamp"] {
        metadata[field] = object["metadata"][field].clone();
    }
    let selector = object
        .pointer("/spec/selector")
        .cloned()
        .unwrap_or_default();
    json!({"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata,
        "spec": {"replicas": object.int("/spec/replicas")},
        "status": {"replicas": object.int("/status/replicas"), "selector": selector_text(&selector)}})
}

/// A label selector in the form of query parameters.
fn selector_text(selector: &Value) -> String {
    // A ReplicationController has the labels alone.
    let labels = match selector.has("/matchLabels") || selector.has("/matchExpressions") {
        true => selector.object("/matchLabels"),
        false => selector.as_object(),
    };
    let mut parts: Vec<(&str, String)> = labels
        .into_iter()
        .flatten()
        .map(|(key, value)| {
            let value = value.as_str().unwrap_or("");
            (key.as_str(), format!("{key}={value}"))
        })
        .collect();
    for expression in selector.items("/matchExpressions") {
        let key = expression.text("/key");
        let values: Vec<&str> = expression
            .items("/values")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        let part = match expression.text("/operator") {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        };
        parts.push((key, part));
    }
    parts.sort_by_key(|(key, _)| *key);
    let parts: Vec<String> = parts.into_iter().map(|(_, part)| part).collect();
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_shows_replicas_and_selector() {
        let object = json!({"metadata": {"name": "web", "namespace": "a", "resourceVersion": "9"},
            "spec": {"replicas": 3, "selector": {"matchLabels": {"b": "2", "a": "1"}}}, "status": {"replicas": 2}});
        let scale = scale_of(&object);
        assert_eq!(scale["spec"]["replicas"], 3);
        assert_eq!(
            scale["status"],
            json!({"replicas": 2, "selector": "a=1,b=2"})
        );
        assert_eq!(scale["metadata"]["resourceVersion"], "9");
        assert_eq!(selector_text(&json!({"b": "2", "a": "1"})), "a=1,b=2");
    }
}
