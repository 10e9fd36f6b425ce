//! Subresources: status, scale, binding, eviction, token, finalize.

use http::{Method, StatusCode, request::Parts};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::body::{decode, read_body};
use super::fields::{self, Fields};
use super::reply::Answer;
use super::request::{Form, Target, WriteOptions};
use super::status::{FieldError, Status};
use super::write::Part;
use super::{Api, Call, object, reply};
use crate::auth::AuthError;
use crate::codec::FieldValidation;
use crate::{patch, registry};

impl Api {
    pub(super) async fn subresource(
        &self,
        call: Call,
        parts: Parts,
        body: Incoming,
    ) -> Result<Answer, Status> {
        let name = call.target.subresource.clone().unwrap_or_default();
        let group = call.target.resource.group;
        match (
            group,
            call.target.resource.plural,
            name.as_str(),
            parts.method.as_str(),
        ) {
            (_, _, "status", "GET") => self.get(&call, &parts).await,
            (_, _, "status", "PUT") => self.update_part(&call, &parts, body, Part::Status).await,
            (_, _, "status", "PATCH") => self.patch_part(&call, &parts, body, Part::Status).await,
            (_, _, "scale", "GET" | "PUT" | "PATCH") => self.scale(&call, &parts, body).await,
            ("", "pods", "binding", "POST") => self.bind(&call, &parts, body).await,
            ("", "pods", "eviction", "POST") => self.evict(&call, &parts, body).await,
            ("", "serviceaccounts", "token", "POST") => self.token(&call, &parts, body).await,
            ("", "namespaces", "finalize", "PUT") => self.finalize(&call, &parts, body).await,
            _ => Err(Status::method_not_allowed()),
        }
    }

    /// Reads or sets the number of replicas, as `autoscaling/v1` Scale.
    async fn scale(&self, call: &Call, parts: &Parts, body: Incoming) -> Result<Answer, Status> {
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
            let given = super::body::content_type(parts)
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
                        return Err(Status::unsupported_media_type(&given, &supported));
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

    /// Puts a pod on a node, once.
    async fn bind(&self, call: &Call, parts: &Parts, body: Incoming) -> Result<Answer, Status> {
        let options = WriteOptions::parse(&call.query, &parts.headers)?;
        let binding = decode(
            parts,
            &read_body(body).await?,
            "v1",
            "Binding",
            options.validation,
        )?
        .value;
        let target = &call.target;
        let node = binding.text("/target/name").to_owned();
        if node.is_empty() {
            let error = FieldError::required("target.name", "");
            return Err(Status::invalid(
                "",
                "Binding",
                target.object_name()?,
                vec![error],
            ));
        }
        let change = |old: &Value| {
            let uid = binding.text("/metadata/uid");
            if !uid.is_empty() && uid != old.text("/metadata/uid") {
                return Err(Status::conflict(
                    target.subject(),
                    format!("the pod has another UID than {uid}"),
                ));
            }
            if old.has("/metadata/deletionTimestamp") {
                let why = format!(
                    "pod {} is being deleted, cannot be assigned to a host",
                    fields::name(old)
                );
                return Err(Status::conflict(target.subject(), why));
            }
            if !old.text("/spec/nodeName").is_empty() {
                let why = format!(
                    "pod {} is already assigned to node {:?}",
                    fields::name(old),
                    old.text("/spec/nodeName")
                );
                return Err(Status::conflict(target.subject(), why));
            }
            let mut new = old.clone();
            new.set("/spec/nodeName", node.as_str());
            for (key, value) in binding
                .object("/metadata/annotations")
                .into_iter()
                .flatten()
            {
                new.object_mut("/metadata/annotations")
                    .insert(key.clone(), value.clone());
            }
            let scheduled = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": fields::now()});
            let mut conditions = new.items("/status/conditions").to_vec();
            conditions.retain(|condition| condition.text("/type") != "PodScheduled");
            conditions.push(scheduled);
            new.set("/status/conditions", conditions);
            Ok(new)
        };
        self.modify(target, &options, Part::Exact("binding"), change)
            .await?;
        Ok(success())
    }

    /// Deletes a pod on behalf of whoever drains its node.
    async fn evict(&self, call: &Call, parts: &Parts, body: Incoming) -> Result<Answer, Status> {
        let mut options = WriteOptions::parse(&call.query, &parts.headers)?;
        let eviction = decode(
            parts,
            &read_body(body).await?,
            "policy/v1",
            "Eviction",
            options.validation,
        )?
        .value;
        options.dry_run |= eviction
            .items("/deleteOptions/dryRun")
            .iter()
            .any(|value| value == "All");
        let record = self.record(&call.target).await?;
        let pod = call.target.decode(&record)?;
        let over = matches!(
            pod.text("/status/phase"),
            "Succeeded" | "Failed" | "Pending"
        );
        if !over {
            self.check_budgets(&call.target, &pod).await?;
        }
        let asked = eviction
            .pointer("/deleteOptions")
            .cloned()
            .unwrap_or_default();
        self.delete_as_asked(&call.target, &asked, &options).await?;
        Ok(success())
    }

    /// A pod that a disruption budget covers goes only when the budget allows one more disruption.
    async fn check_budgets(&self, target: &Target, pod: &Value) -> Result<(), Status> {
        let Some(resource) = registry::resource("policy", "v1", "poddisruptionbudgets") else {
            return Ok(());
        };
        let prefix = object::prefix(resource, target.namespace.as_deref());
        let page = self.store.list(crate::store::Range::all(&prefix)).await?;
        for record in &page.records {
            let budget = object::decode(record, resource.kind, &resource.api_version())?;
            let selector = budget
                .pointer("/spec/selector")
                .cloned()
                .unwrap_or_default();
            let selector =
                crate::selector::LabelSelector::from_object(&selector).map_err(Status::internal)?;
            if selector.matches(pod) && budget.int("/status/disruptionsAllowed") <= 0 {
                let mut status = Status::too_many_requests(
                    "Cannot evict pod as it would violate the pod's disruption budget.",
                    0,
                );
                let message = format!(
                    "The disruption budget {} needs more healthy pods",
                    fields::name(&budget)
                );
                status.details.insert(
                    "causes".into(),
                    json!([{"reason": "DisruptionBudget", "message": message}]),
                );
                return Err(status);
            }
        }
        Ok(())
    }

    /// Issues a token for a ServiceAccount.
    async fn token(&self, call: &Call, parts: &Parts, body: Incoming) -> Result<Answer, Status> {
        let options = WriteOptions::parse(&call.query, &parts.headers)?;
        let body = read_body(body).await?;
        let request = decode(
            parts,
            &body,
            "authentication.k8s.io/v1",
            "TokenRequest",
            options.validation,
        )?
        .value;
        let account = call.target.decode(&self.record(&call.target).await?)?;
        let (kind, name) = (
            request.text("/spec/boundObjectRef/kind"),
            request.text("/spec/boundObjectRef/name"),
        );
        let namespace = call.target.namespace.as_deref();
        let bound = match kind {
            "" => None,
            "Pod" | "Secret" | "Node" => {
                let plural = format!("{}s", kind.to_lowercase());
                let found = self
                    .lookup("", &plural, namespace.filter(|_| kind != "Node"), name)
                    .await?;
                let subject = super::status::Subject {
                    group: "",
                    resource: &plural,
                    name,
                };
                Some(found.ok_or_else(|| Status::not_found(subject))?)
            }
            _ => {
                let error = FieldError::unsupported(
                    "spec.boundObjectRef.kind",
                    kind,
                    &["Node", "Pod", "Secret"],
                );
                return Err(Status::invalid(
                    "authentication.k8s.io",
                    "TokenRequest",
                    name,
                    vec![error],
                ));
            }
        };
        let now = jiff::Timestamp::now().as_second();
        let granted = self
            .tokens
            .grant(&request, &account, bound.as_ref(), now)
            .map_err(|error| match error {
                AuthError::Request { field, reason } => {
                    let given = request
                        .pointer(&format!("/{}", field.replace('.', "/")))
                        .cloned()
                        .unwrap_or_default();
                    let error = FieldError::invalid(field, given, reason);
                    Status::invalid("authentication.k8s.io", "TokenRequest", name, vec![error])
                }
                error => Status::internal(error),
            })?;
        Ok(reply::json(StatusCode::CREATED, &granted))
    }

    /// Sets a namespace's finalizers; the last one gone ends its deletion.
    async fn finalize(&self, call: &Call, parts: &Parts, body: Incoming) -> Result<Answer, Status> {
        let form = Form::negotiate(&parts.headers, &call.query)?;
        let options = WriteOptions::parse(&call.query, &parts.headers)?;
        let wanted = decode(
            parts,
            &read_body(body).await?,
            "v1",
            "Namespace",
            FieldValidation::Ignore,
        )?
        .value;
        let change = |old: &Value| {
            let mut new = old.clone();
            new.set(
                "/metadata/resourceVersion",
                wanted.text("/metadata/resourceVersion"),
            );
            new.set(
                "/spec/finalizers",
                wanted.items("/spec/finalizers").to_vec(),
            );
            Ok(new)
        };
        let outcome = self
            .modify(&call.target, &options, Part::Exact("finalize"), change)
            .await?;
        Ok(reply::object(
            StatusCode::OK,
            &call.target,
            form,
            outcome.into_object(),
        ))
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
    let mut parts: Vec<String> = selector
        .object("/matchLabels")
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

fn success() -> Answer {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
    reply::json(StatusCode::CREATED, &status)
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
    }
}
