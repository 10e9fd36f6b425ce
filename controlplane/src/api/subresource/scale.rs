//! `scale`: the number of replicas, in the same form for every kind that has one.

use http::{Method, StatusCode, request::Parts};
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::api::body::{content_type, decode, read_body};
use crate::api::fields::{self, Fields};
use crate::api::reply::{self, Answer};
use crate::api::request::WriteOptions;
use crate::api::status::{FieldError, Status};
use crate::api::write::Part;
use crate::api::{Api, Call};
use crate::patch;

impl Api {
    /// Reads or sets the number of replicas, as `autoscaling/v1` Scale.
    pub(super) async fn scale(
        &self,
        call: &Call,
        parts: &Parts,
        body: Incoming,
    ) -> Result<Answer, Status> {
        let target = &call.target;
        let answer = |object: &Value| reply::json(StatusCode::OK, &scale_of(object));
        if parts.method == Method::GET {
            return Ok(answer(&target.decode(&self.record(target).await?)?));
        }
        let options = WriteOptions::parse(&call.query, &parts.headers)?;
        let body = read_body(body).await?;
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
                        patch::merge(&mut scale, &change);
                    }
                    _ => {
                        let supported = [
                            "application/json-patch+json",
                            "application/merge-patch+json",
                        ];
                        return Err(Status::unsupported_media_type(&supported));
                    }
                }
                Ok(scale)
            })
        };
        let change = |old: &Value| {
            let scale = wanted(&scale_of(old))?;
            let revision = scale.text("/metadata/resourceVersion");
            if !revision.is_empty() && revision != old.text("/metadata/resourceVersion") {
                return Err(Status::modified(target.subject()));
            }
            let replicas = scale.int("/spec/replicas");
            if replicas < 0 {
                let error = FieldError::invalid(
                    "spec.replicas",
                    replicas,
                    "must be greater than or equal to 0",
                );
                return Err(Status::invalid(
                    "autoscaling",
                    "Scale",
                    fields::name(old),
                    vec![error],
                ));
            }
            let mut new = old.clone();
            new.set("/spec/replicas", replicas);
            Ok(new)
        };
        let outcome = self
            .modify(target, &options, Part::Exact("scale"), change)
            .await?;
        Ok(answer(&outcome.into_object()))
    }
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
    let mut parts: Vec<String> = labels
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or("")))
        .collect();
    for expression in selector.items("/matchExpressions") {
        let key = expression.text("/key");
        let values: Vec<&str> = expression
            .items("/values")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        parts.push(match expression.text("/operator") {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    parts.sort();
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
