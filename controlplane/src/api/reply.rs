//! Answers: bodies, status codes, and objects in the form the client asked for.

use std::convert::Infallible;

use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use serde_json::Value;

use super::request::{Encoding, Form, Target};
use super::status::Status;
use super::storing::Outcome;
use super::{compression, object, table};
use crate::codec::transcode;
use crate::store::Record;

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

/// Marks an answer whose body is of our own: it can be encoded in another way. What is passed on from elsewhere stays as
/// it is.
#[derive(Clone, Copy)]
struct Own;

/// The answer in the encoding asked for, compressed where that is asked for and pays.
pub async fn encode(mut answer: Answer, encoding: Encoding, gzip: bool) -> Answer {
    if answer.extensions_mut().remove::<Own>().is_none() {
        return answer;
    }
    if encoding != Encoding::Json && media_type(&answer) == Encoding::Json.media_type() {
        answer = transcoded(answer, encoding).await;
    }
    match gzip {
        true => compression::gzip(answer),
        false => answer,
    }
}

fn media_type(answer: &Answer) -> &str {
    let given = answer.headers().get(header::CONTENT_TYPE);
    given.and_then(|given| given.to_str().ok()).unwrap_or("")
}

/// What has no protobuf form (tables of our own, OpenAPI) stays JSON.
async fn transcoded(answer: Answer, encoding: Encoding) -> Answer {
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
    head.headers.remove(header::CONTENT_LENGTH);
    Answer::from_parts(head, full(encoded))
}

/// A list of stored records in JSON, written record by record.
pub fn records(head: String, records: Vec<Record>) -> Answer {
    const END: &[u8] = b"]}\n";
    let items: usize = records
        .iter()
        .map(|record| object::item_length(record) + 1)
        .sum();
    let length = head.len() + items - usize::from(!records.is_empty()) + END.len();
    let mut records = records.into_iter().peekable();
    let more = move |out: &mut Vec<u8>| {
        let Some(record) = records.next() else {
            out.extend_from_slice(END);
            return false;
        };
        object::write_item(out, &record);
        if records.peek().is_some() {
            out.push(b',');
        }
        true
    };
    in_chunks("application/json", head.into_bytes(), length, more)
}

/// A list in protobuf, written message by message.
pub fn messages(mut list: transcode::List, messages: Vec<Bytes>) -> Answer {
    let (head, length) = (std::mem::take(&mut list.head), list.length);
    let mut messages = messages.into_iter();
    let more = move |out: &mut Vec<u8>| match messages.next() {
        Some(message) => {
            list.write_item(out, &message);
            true
        }
        None => {
            out.extend_from_slice(transcode::List::TAIL);
            false
        }
    };
    in_chunks(Encoding::Protobuf.media_type(), head, length, more)
}

/// Of an answer that holds what it is made of until it is read; watches, logs and what comes from others are as long as they like.
#[derive(Clone, Copy)]
pub struct InChunks;

/// An answer of a known length in the chunks of a stream, so that it is never there as a whole. `more` appends a part to what
/// it is given, and says whether others follow.
fn in_chunks(
    content_type: &str,
    head: Vec<u8>,
    length: usize,
    mut more: impl FnMut(&mut Vec<u8>) -> bool + Send + 'static,
) -> Answer {
    /// As much goes into one chunk, give or take a part.
    const CHUNK_BYTES: usize = 64 << 10;
    let (mut head, mut ended) = (Some(head), false);
    let mut chunk = move || {
        let mut out = Vec::with_capacity((CHUNK_BYTES + CHUNK_BYTES / 4).min(length));
        out.append(&mut head.take().unwrap_or_default());
        while out.len() < CHUNK_BYTES && !ended {
            ended = !more(&mut out);
        }
        (Bytes::from(out), ended)
    };
    let mut answer = bytes(StatusCode::OK, content_type, Bytes::new());
    answer.extensions_mut().insert(Own);
    answer.extensions_mut().insert(InChunks);
    *answer.body_mut() = match length <= CHUNK_BYTES {
        true => full(chunk().0),
        false => streamed(futures::stream::unfold(false, move |over| {
            let next = (!over).then(&mut chunk);
            std::future::ready(next)
        })),
    };
    answer
        .headers_mut()
        .insert(header::CONTENT_LENGTH, length.into());
    answer
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
    let mut text = value.to_string();
    // As upstream: whoever prints a body to a terminal is glad of it.
    text.push('\n');
    bytes(code, "application/json", text)
}

/// What goes with every answer.
pub fn finish(answer: &mut Answer) {
    let headers = answer.headers_mut();
    let uncached = header::HeaderValue::from_static("no-cache, private");
    headers.entry(header::CACHE_CONTROL).or_insert(uncached);
    // An audited request has its event's already.
    if !headers.contains_key("audit-id")
        && let Ok(id) = uuid::Uuid::new_v4().to_string().parse()
    {
        headers.insert("audit-id", id);
    }
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

/// What a write has made of an object, in the form asked for.
pub fn outcome(
    code: StatusCode,
    target: &Target,
    form: Form,
    outcome: Outcome,
) -> Result<Answer, Status> {
    match outcome {
        Outcome::Stored(record) => stored(code, target, form, &record),
        outcome => Ok(object(code, target, form, outcome.into_object(target)?)),
    }
}

/// One stored object in the form asked for: as it is kept, where that is the form.
pub fn stored(
    code: StatusCode,
    target: &Target,
    form: Form,
    record: &Record,
) -> Result<Answer, Status> {
    let resource = target.resource;
    if form != Form::Object || object::converts(resource) {
        return Ok(object(code, target, form, target.decode(record)?));
    }
    let mut out = Vec::with_capacity(record.value.len() + 128);
    let (kind, api_version) = (resource.kind, resource.api_version());
    object::write(&mut out, record, record.revision, kind, &api_version);
    out.push(b'\n');
    Ok(bytes(code, Encoding::Json.media_type(), out))
}

/// One object in the form asked for.
pub fn object(code: StatusCode, target: &Target, form: Form, object: Value) -> Answer {
    let value = object::from_stored(object, target.resource);
    let value = table::shaped(value, form, target.resource, true);
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
