//! Failed requests as `Status` objects, worded so that kubectl prints what users know from upstream.

use std::fmt;

use http::StatusCode;
use serde_json::{Map, Value, json};

/// A failed request: what the client gets as a `Status` object.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Status {
    pub code: StatusCode,
    pub reason: &'static str,
    pub message: String,
    /// Boxed: it is large, and every result of this module has room for a failure.
    pub details: Box<Map<String, Value>>,
    /// Where an expired list may go on.
    pub continue_token: Option<String>,
}

/// What names an object in messages: `pods "a"`, `deployments.apps "b"`.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    pub group: &'a str,
    pub resource: &'a str,
    pub name: &'a str,
}

impl Subject<'_> {
    fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.resource.to_owned()
        } else {
            format!("{}.{}", self.resource, self.group)
        }
    }

    fn details(&self) -> Map<String, Value> {
        let given = [
            ("name", self.name),
            ("group", self.group),
            ("kind", self.resource),
        ];
        let given = given.into_iter().filter(|(_, value)| !value.is_empty());
        given
            .map(|(key, value)| (key.into(), value.into()))
            .collect()
    }
}

/// One thing wrong with one field: a cause in a 422 answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    pub field: String,
    pub reason: &'static str,
    pub message: String,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

impl FieldError {
    pub fn required(field: impl Into<String>, why: &str) -> Self {
        let message = if why.is_empty() {
            "Required value".to_owned()
        } else {
            format!("Required value: {why}")
        };
        Self {
            field: field.into(),
            reason: "FieldValueRequired",
            message,
        }
    }

    pub fn invalid(
        field: impl Into<String>,
        value: impl Into<Value>,
        why: impl AsRef<str>,
    ) -> Self {
        let message = format!("Invalid value: {}: {}", value.into(), why.as_ref());
        Self {
            field: field.into(),
            reason: "FieldValueInvalid",
            message,
        }
    }

    pub fn forbidden(field: impl Into<String>, why: &str) -> Self {
        Self {
            field: field.into(),
            reason: "FieldValueForbidden",
            message: format!("Forbidden: {why}"),
        }
    }

    pub fn duplicate(field: impl Into<String>, value: impl Into<Value>) -> Self {
        Self {
            field: field.into(),
            reason: "FieldValueDuplicate",
            message: format!("Duplicate value: {}", value.into()),
        }
    }

    pub fn not_found(field: impl Into<String>, value: impl Into<Value>) -> Self {
        Self {
            field: field.into(),
            reason: "FieldValueNotFound",
            message: format!("Not found: {}", value.into()),
        }
    }

    /// The values that are known, in order of the alphabet.
    pub fn unsupported(
        field: impl Into<String>,
        value: impl Into<Value>,
        allowed: &[&str],
    ) -> Self {
        let mut allowed = allowed.to_vec();
        allowed.sort_unstable();
        Self::unsupported_as_listed(field, value, &allowed)
    }

    /// The values that are known, as they are given: upstream sorts most such lists, and not all.
    pub fn unsupported_as_listed(
        field: impl Into<String>,
        value: impl Into<Value>,
        allowed: &[&str],
    ) -> Self {
        let names: Vec<String> = allowed.iter().map(|name| format!("{name:?}")).collect();
        let message = format!(
            "Unsupported value: {}: supported values: {}",
            value.into(),
            names.join(", ")
        );
        Self {
            field: field.into(),
            reason: "FieldValueNotSupported",
            message,
        }
    }

    pub fn too_long(field: impl Into<String>, bytes_max: usize) -> Self {
        Self {
            field: field.into(),
            reason: "FieldValueTooLong",
            message: format!("Too long: may not be more than {bytes_max} bytes"),
        }
    }
}

impl Status {
    pub fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            details: Box::default(),
            continue_token: None,
        }
    }

    fn about(
        subject: Subject<'_>,
        code: StatusCode,
        reason: &'static str,
        message: String,
    ) -> Self {
        Self {
            code,
            reason,
            message,
            details: Box::new(subject.details()),
            continue_token: None,
        }
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    pub fn too_large(what: impl fmt::Display) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "RequestEntityTooLarge",
            format!("Request entity too large: {what}"),
        )
    }

    pub fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized")
    }

    pub fn internal(message: impl fmt::Display) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "InternalError",
            format!("Internal error occurred: {message}"),
        )
    }

    /// For the audit log: the client is not there to read it. The code is the one that proxies have for it; HTTP has none.
    pub fn hung_up() -> Self {
        let code = StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST);
        Self::new(code, "ClientClosedRequest", "the client hung up".to_owned())
    }

    /// No such path, group, version or resource.
    pub fn no_such_path() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "NotFound",
            "the server could not find the requested resource",
        )
    }

    pub fn not_found(subject: Subject<'_>) -> Self {
        let message = format!("{} {:?} not found", subject.qualified(), subject.name);
        Self::about(subject, StatusCode::NOT_FOUND, "NotFound", message)
    }

    pub fn already_exists(subject: Subject<'_>) -> Self {
        let message = format!("{} {:?} already exists", subject.qualified(), subject.name);
        Self::about(subject, StatusCode::CONFLICT, "AlreadyExists", message)
    }

    /// The name that a prefix was made up to is taken.
    pub fn already_exists_generated(subject: Subject<'_>) -> Self {
        let mut status = Self::already_exists(subject);
        status.message += ", the server was not able to generate a unique name for the object";
        status.details.insert("retryAfterSeconds".into(), 1.into());
        status
    }

    pub fn conflict(subject: Subject<'_>, why: impl fmt::Display) -> Self {
        let message = format!(
            "Operation cannot be fulfilled on {} {:?}: {why}",
            subject.qualified(),
            subject.name
        );
        Self::about(subject, StatusCode::CONFLICT, "Conflict", message)
    }

    /// The write was based on an older version of the object.
    pub fn modified(subject: Subject<'_>) -> Self {
        Self::conflict(
            subject,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    pub fn forbidden(subject: Subject<'_>, why: impl fmt::Display) -> Self {
        let message = match (subject.resource, subject.name) {
            ("", _) => format!("forbidden: {why}"),
            (_, "") => format!("{} is forbidden: {why}", subject.qualified()),
            (_, name) => format!("{} {name:?} is forbidden: {why}", subject.qualified()),
        };
        Self::about(subject, StatusCode::FORBIDDEN, "Forbidden", message)
    }

    /// The object breaks rules of its kind; `kind` as `Deployment`, with its group.
    pub fn invalid(group: &str, kind: &str, name: &str, errors: Vec<FieldError>) -> Self {
        let qualified = if group.is_empty() {
            kind.to_owned()
        } else {
            format!("{kind}.{group}")
        };
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let list = if lines.len() == 1 {
            lines[0].clone()
        } else {
            format!("[{}]", lines.join(", "))
        };
        let mut details = Subject {
            group,
            resource: kind,
            name,
        }
        .details();
        let causes = errors
            .into_iter()
            .map(|error| json!({"reason": error.reason, "message": error.message, "field": error.field}))
            .collect();
        details.insert("causes".into(), Value::Array(causes));
        let message = format!("{qualified} {name:?} is invalid: {list}");
        Self {
            code: StatusCode::UNPROCESSABLE_ENTITY,
            reason: "Invalid",
            message,
            details: Box::new(details),
            continue_token: None,
        }
    }

    pub fn method_not_allowed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        )
    }

    /// The body is in a format that the path does not take at all.
    pub fn unsupported_patch() -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "UnsupportedMediaType",
            "415: Unsupported Media Type",
        )
    }

    pub fn unsupported_media_type(supported: &[&str]) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            supported.join(", ")
        );
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "UnsupportedMediaType",
            message,
        )
    }

    pub fn not_acceptable(supported: &[&str]) -> Self {
        let supported = supported.join(", ");
        Self::new(
            StatusCode::NOT_ACCEPTABLE,
            "NotAcceptable",
            format!("406: Not Acceptable\n\nAvailable representations: {supported}"),
        )
    }

    /// The revision asked for is not kept any more.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GONE, "Expired", message)
    }

    pub fn timeout(message: &str) -> Self {
        let message = format!("Timeout: {message}");
        Self::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", message)
    }

    /// The revision asked for has not been reached yet; clients retry.
    pub fn revision_ahead(asked: u64, current: u64) -> Self {
        let mut status = Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            "Timeout",
            format!("Timeout: Too large resource version: {asked}, current: {current}"),
        );
        let cause =
            json!({"reason": "ResourceVersionTooLarge", "message": "Too large resource version"});
        status.details.insert("causes".into(), json!([cause]));
        status.details.insert("retryAfterSeconds".into(), 1.into());
        status
    }

    pub fn too_many_requests(message: impl Into<String>, retry_after_s: u32) -> Self {
        let mut status = Self::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", message);
        if retry_after_s > 0 {
            status
                .details
                .insert("retryAfterSeconds".into(), retry_after_s.into());
        }
        status
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "ServiceUnavailable",
            message,
        )
    }

    /// The object clients read.
    pub fn to_value(&self) -> Value {
        let mut object = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason,
        });
        if let Some(token) = &self.continue_token {
            object["metadata"]["continue"] = token.as_str().into();
        }
        if self.reason.is_empty() {
            object.as_object_mut().map(|fields| fields.remove("reason"));
        }
        // What is said of a path alone has details too, with nothing in them, as upstream.
        let of_path = matches!(self.reason, "NotFound" | "MethodNotAllowed" | "Invalid");
        if of_path || !self.details.is_empty() {
            object["details"] = Value::Object(*self.details.clone());
        }
        object["code"] = self.code.as_u16().into();
        object
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_read_as_upstream_words_them() {
        let subject = Subject {
            group: "apps",
            resource: "deployments",
            name: "web",
        };
        assert_eq!(
            Status::not_found(subject).message,
            r#"deployments.apps "web" not found"#
        );
        let errors = vec![
            FieldError::required("spec.selector", ""),
            FieldError::invalid("metadata.name", "A", "bad"),
        ];
        let status = Status::invalid("apps", "Deployment", "web", errors);
        assert_eq!(
            status.message,
            r#"Deployment.apps "web" is invalid: [spec.selector: Required value, metadata.name: Invalid value: "A": bad]"#
        );
        assert_eq!(
            status.to_value()["details"]["causes"][1]["field"],
            "metadata.name"
        );
        let unsupported = FieldError::unsupported("spec.type", "X", &["NodePort", "ClusterIP"]);
        assert_eq!(
            unsupported.message,
            r#"Unsupported value: "X": supported values: "ClusterIP", "NodePort""#
        );
    }
}
