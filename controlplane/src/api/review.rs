//! Questions about callers: who is this, and what may they do. Nothing is stored; the authorizers that requests go through
//! are the ones that answer.

use http::{StatusCode, request::Parts};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::authorize::{Question, Verdict};
use super::body::{decode, read_body};
use super::config::TOKEN_ISSUER;
use super::fields::Fields;
use super::reply::Answer;
use super::request::{Form, MEDIA_TYPES};
use super::status::{FieldError, Status};
use super::{Api, Call, reply};
use crate::auth::node::node_of;
use crate::auth::{Identity, bootstrap};
use crate::registry::Resource;

/// Whether objects of a resource are questions, answered at once.
pub fn is_review(resource: &Resource) -> bool {
    matches!(
        resource.group,
        "authentication.k8s.io" | "authorization.k8s.io"
    )
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
        let options = call.write_options(&parts)?;
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
        let status = match resource.kind {
            "SelfSubjectReview" => json!({"userInfo": call.identity.user_info()}),
            "SelfSubjectAccessReview" => self.access(&call.identity, &review).await?,
            "SubjectAccessReview" | "LocalSubjectAccessReview" => {
                self.access(&subject(&review), &review).await?
            }
            "SelfSubjectRulesReview" => {
                self.rules(&call.identity, review.text("/spec/namespace"))
                    .await?
            }
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
                self.token_review(review.text("/spec/token"), &audiences)
                    .await?
            }
            _ => return Err(Status::method_not_allowed()),
        };
        review.set("/status", status);
        Ok(reply::json(StatusCode::CREATED, &review))
    }
}

impl Api {
    async fn token_review(&self, token: &str, audiences: &[&str]) -> Result<Value, Status> {
        let (identity, of): (Result<Identity, String>, Vec<String>) =
            match bootstrap::Shown::parse(token) {
                Some(shown) => (
                    self.bootstrap_identity(&shown).await?,
                    vec![TOKEN_ISSUER.to_owned()],
                ),
                None => match self.verify_token(token, audiences).await? {
                    Ok(spec) => (Ok(spec.identity()), spec.audiences),
                    Err(reason) => (Err(reason), Vec::new()),
                },
            };
        let common = audiences
            .iter()
            .filter(|asked| of.iter().any(|has| has == *asked));
        let common: Vec<&&str> = common.collect();
        Ok(match identity {
            Ok(_) if common.is_empty() => {
                json!({"authenticated": false, "error": "the token is for the API server alone"})
            }
            Ok(identity) => {
                json!({"authenticated": true, "user": identity.user_info(), "audiences": common})
            }
            Err(reason) => json!({"authenticated": false, "error": reason}),
        })
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
            let given = review.pointer("/spec/nonResourceAttributes").cloned();
            let given = given.filter(|_| named).unwrap_or_default();
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
    if resource.kind == "SelfSubjectRulesReview" && review.text("/spec/namespace").is_empty() {
        return Err(Status::bad_request("no namespace on request"));
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

/// Whom a SubjectAccessReview is about.
fn subject(review: &Value) -> Identity {
    let texts = |values: &[Value]| {
        let texts = values.iter().filter_map(Value::as_str);
        texts.map(str::to_owned).collect::<Vec<_>>()
    };
    let extra = review.object("/spec/extra").into_iter().flatten();
    Identity {
        user: review.text("/spec/user").to_owned(),
        groups: texts(review.items("/spec/groups")),
        uid: review.text("/spec/uid").to_owned(),
        extra: extra
            .map(|(key, values)| (key.clone(), texts(values.items(""))))
            .collect(),
    }
}

impl Api {
    async fn access(&self, who: &Identity, review: &Value) -> Result<Value, Status> {
        let question = Question::of(review);
        Ok(match self.decide(who, &question.attributes()).await? {
            Verdict::Allowed => json!({"allowed": true}),
            Verdict::Refused(reason) if reason.is_empty() => json!({"allowed": false}),
            Verdict::Refused(reason) => json!({"allowed": false, "reason": reason}),
        })
    }

    /// All that a caller holds in a namespace. What a node may do to single objects no list says.
    async fn rules(&self, who: &Identity, namespace: &str) -> Result<Value, Status> {
        self.authority.rules.catch_up(&*self.store).await?;
        let held = self.authority.rules.view().rules(who, namespace);
        let (paths, resources): (Vec<_>, Vec<_>) = held
            .into_iter()
            .partition(|rule| !rule.non_resource_urls.is_empty());
        let incomplete = node_of(who).is_some();
        Ok(json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": incomplete}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_review_names_its_subject() {
        let review = json!({"spec": {"user": "jane", "groups": ["team"], "uid": "7", "extra": {"scope": ["a"]}}});
        let who = subject(&review);
        assert_eq!((who.user.as_str(), who.uid.as_str()), ("jane", "7"));
        assert_eq!(who.groups, ["team"]);
        assert_eq!(who.extra["scope"], ["a"]);
    }
}
