//! Answers: bodies, status codes, and objects in the form the client asked for.

use std::convert::Infallible;

use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use serde_json::Value;

use super::request::{Form, Target};
use super::status::Status;
use super::{object, table};

/// The body of an answer.
pub type Body = UnsyncBoxBody<Bytes, BodyError>;
pub type Answer = Response<Body>;
/// What may go wrong while a proxied body is streamed.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never: Infallible| match never {})
        .boxed_unsync()
}

/// A body that sends chunks as the stream yields them.
pub fn streamed(chunks: impl futures::Stream<Item = Bytes> + Send + 'static) -> Body {
    use futures::StreamExt;
    StreamBody::new(chunks.map(|chunk| Ok::<_, BodyError>(Frame::data(chunk)))).boxed_unsync()
}

pub fn bytes(code: StatusCode, content_type: &str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(full(body));
    *answer.status_mut() = code;
    let content_type = content_type
        .parse()
        .unwrap_or(header::HeaderValue::from_static("application/json"));
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, content_type);
    answer
}

pub fn text(code: StatusCode, body: impl Into<Bytes>) -> Answer {
    bytes(code, "text/plain; charset=utf-8", body)
}

pub fn json(code: StatusCode, value: &Value) -> Answer {
    bytes(code, "application/json", value.to_string())
}

impl From<Status> for Answer {
    fn from(status: Status) -> Self {
        let mut answer = json(status.code, &status.to_value());
        if let Some(seconds) = status
            .details
            .get("retryAfterSeconds")
            .and_then(Value::as_u64)
        {
            answer
                .headers_mut()
                .insert(header::RETRY_AFTER, seconds.into());
        }
        if status.code == StatusCode::UNAUTHORIZED {
            let scheme = header::HeaderValue::from_static("Bearer realm=\"keelway\"");
            answer
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, scheme);
        }
        answer
    }
}

/// One object in the form asked for.
pub fn object(code: StatusCode, target: &Target, form: Form, object: Value) -> Answer {
    let value = object::from_stored(object, target.resource);
    let value = match form {
        Form::Object => value,
        Form::Partial(version) => table::partial(&value, version),
        Form::Table(version, include) => {
            let printer = table::printer(target.resource.group, target.resource.kind);
            let revision = value
                .pointer("/metadata/resourceVersion")
                .cloned()
                .unwrap_or_default();
            let mut table = table::table(printer, version, [&value], include, true);
            table["metadata"]["resourceVersion"] = revision;
            table
        }
    };
    json(code, &value)
}

/// Adds `Warning` headers, as RFC 7234 and kubectl have them.
pub fn warn(answer: &mut Answer, warnings: &[String]) {
    for warning in warnings {
        let quoted = warning.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = format!("299 - \"{quoted}\"").parse() {
            answer.headers_mut().append(header::WARNING, value);
        }
    }
}
