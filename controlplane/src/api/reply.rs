//! Answers: bodies, status codes, and objects in the form the client asked for.

use std::convert::Infallible;

use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use serde_json::Value;

use super::request::{Encoding, Form, Target};
use super::status::Status;
use super::{object, table};
use crate::codec::transcode;

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

/// Marks an answer whose body is JSON of our own: it can be encoded in another way. What is passed on from elsewhere
/// stays as it is.
#[derive(Clone, Copy)]
struct Own;

/// The answer in the encoding asked for. What has no protobuf form (tables of our own, OpenAPI) stays JSON.
pub async fn encode(mut answer: Answer, encoding: Encoding) -> Answer {
    if encoding == Encoding::Json || answer.extensions_mut().remove::<Own>().is_none() {
        return answer;
    }
    let (mut head, body) = answer.into_parts();
    let json = match body.collect().await {
        Ok(collected) => collected.to_bytes(),
        Err(error) => return Status::internal(error).into(),
    };
    let encoded = match encoding {
        Encoding::Json => None,
        Encoding::Protobuf => transcode::transcode(&json),
        Encoding::Yaml => serde_json::from_slice::<Value>(&json)
            .ok()
            .and_then(|value| serde_saphyr::to_string(&value).ok())
            .map(String::into_bytes),
    };
    let Some(encoded) = encoded else {
        return Answer::from_parts(head, full(json));
    };
    let content_type = header::HeaderValue::from_static(encoding.media_type());
    head.headers.insert(header::CONTENT_TYPE, content_type);
    Answer::from_parts(head, full(encoded))
}

pub fn bytes(code: StatusCode, content_type: &str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(full(body));
    if content_type == Encoding::Json.media_type() {
        answer.extensions_mut().insert(Own);
    }
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
