//! Questions about callers: who is this, and what may they do. Nothing is stored.
//!
//! Authorization is: whoever authenticates may do everything. The answers say so, and [`allowed`] is the place where
//! rules will be asked.

use http::{StatusCode, request::Parts};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::body::{decode, read_body};
use super::config::TOKEN_ISSUER;
use super::fields::Fields;
use super::reply::Answer;
use super::request::{Form, MEDIA_TYPES, WriteOptions};
use super::status::{FieldError, Status};
use super::{Api, Call, reply};
use crate::registry::Resource;

/// Whether objects of a resource are questions, answered at once.
pub fn is_review(resource: &Resource) -> bool {
    matches!(
        resource.group,
        "authentication.k8s.io" | "authorization.k8s.io"
    )
}

/// Whether a user with these groups may do something, and why.
fn allowed<'a>(user: &str, groups: impl IntoIterator<Item = &'a str>) -> (bool, &'static str) {
    let anonymous = user == "system:anonymous"
        || groups
            .into_iter()
            .any(|group| group == "system:unauthenticated");
    if anonymous {
        (false, "anonymous callers are refused")
    } else {
        (true, "every authenticated caller is allowed everything")
    }
}

impl Api {
    pub(super) async fn review(
        &self,
        call: Call,
        parts: Parts,
        body: Incoming,
    ) -> Result<Answer, Status> {
        // An answer has nothing to print a table or metadata of.
        if Form::negotiate(&parts.headers, &call.query)? != Form::Object {
            return Err(Status::not_acceptable(&MEDIA_TYPES));
        }
        let options = WriteOptions::parse(&call.query, &parts)?;
        let resource = call.target.resource;
        let body = read_body(&parts, body).await?;
        let mut review = decode(
            &parts,
            &body,
            &resource.api_version(),
            resource.kind,
            options.validation,
        )?
        .value;
        check(&review, &call)?;
        let own_groups = || call.identity.groups.iter().map(String::as_str);
        let status = match resource.kind {
            "SelfSubjectReview" => json!({"userInfo": call.identity.user_info()}),
            "SelfSubjectAccessReview" => verdict(allowed(&call.identity.user, own_groups())),
            "SubjectAccessReview" | "LocalSubjectAccessReview" => {
                let groups = review
                    .items("/spec/groups")
                    .iter()
                    .filter_map(Value::as_str);
                let user = review.text("/spec/user");
                verdict(allowed(user, groups))
            }
            "SelfSubjectRulesReview" => json!({
                "resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}],
                "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}], "incomplete": false,
            }),
            "TokenReview" => {
                let asked: Vec<&str> = review
                    .items("/spec/audiences")
                    .iter()
                    .filter_map(Value::as_str)
                    .collect();
                let audiences = if asked.is_empty() {
                    vec![TOKEN_ISSUER]
                } else {
                    asked
                };
                match self
                    .verify_token(review.text("/spec/token"), &audiences)
                    .await?
                {
                    Ok(spec) => {
                        let common: Vec<&str> = audiences
                            .iter()
                            .copied()
                            .filter(|a| spec.audiences.iter().any(|b| a == b))
                            .collect();
                        json!({"authenticated": true, "user": spec.identity().user_info(), "audiences": common})
                    }
                    Err(reason) => json!({"authenticated": false, "error": reason}),
                }
            }
            _ => return Err(Status::method_not_allowed()),
        };
        review.set("/status", status);
        Ok(reply::json(StatusCode::CREATED, &review))
    }
}

/// What a question must have to be one: 422 or 400 with what is missing.
fn check(review: &Value, call: &Call) -> Result<(), Status> {
    let resource = call.target.resource;
    let mut errors = Vec::new();
    let asks_access = matches!(
        resource.kind,
        "SubjectAccessReview" | "LocalSubjectAccessReview" | "SelfSubjectAccessReview"
    );
    if asks_access {
        let named = review.has("/spec/resourceAttributes");
        if named == review.has("/spec/nonResourceAttributes") {
            let given = review.pointer("/spec").cloned().unwrap_or_default();
            let why = match named {
                true => "cannot be specified in combination with resourceAttributes",
                false => {
                    "exactly one of nonResourceAttributes or resourceAttributes must be specified"
                }
            };
            let field = if named {
                "spec.nonResourceAttributes"
            } else {
                "spec.resourceAttributes"
            };
            errors.push(FieldError::invalid(field, given, why));
        }
        let nobody =
            review.text("/spec/user").is_empty() && review.items("/spec/groups").is_empty();
        if nobody && resource.kind != "SelfSubjectAccessReview" {
            let why = "at least one of user or group must be specified";
            errors.push(FieldError::invalid("spec.user", "", why));
        }
    }
    if resource.kind == "LocalSubjectAccessReview" {
        let namespace = call.target.namespace.as_deref().unwrap_or("");
        let asked = review.text("/spec/resourceAttributes/namespace");
        if asked != namespace {
            let field = "spec.resourceAttributes.namespace";
            errors.push(FieldError::invalid(
                field,
                asked,
                "must match metadata.namespace",
            ));
        }
        if review.has("/spec/nonResourceAttributes") {
            let why = "disallowed on this kind of request";
            let given = review["spec"]["nonResourceAttributes"].clone();
            errors.push(FieldError::invalid(
                "spec.nonResourceAttributes",
                given,
                why,
            ));
        }
    }
    if resource.kind == "TokenReview" && review.text("/spec/token").is_empty() {
        return Err(Status::bad_request(
            "token is required for TokenReview in authentication",
        ));
    }
    if errors.is_empty() {
        return Ok(());
    }
    Err(Status::invalid(resource.group, resource.kind, "", errors))
}

fn verdict((allowed, reason): (bool, &str)) -> Value {
    json!({"allowed": allowed, "reason": reason})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_anonymous_callers_are_refused() {
        assert!(allowed("jane", ["system:authenticated"]).0);
        assert!(!allowed("system:anonymous", []).0);
        assert!(!allowed("x", ["system:unauthenticated"]).0);
    }
}
