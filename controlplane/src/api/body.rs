//! Bodies of requests: read up to a limit, decoded, and held to what the path says.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{header, request::Parts};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::Value;

use super::config;
use super::fields::{self, Fields};
use super::request::{Query, Target};
use super::status::Status;
use crate::codec::{self, Decoded, FieldValidation, MediaType};
use crate::registry;

/// A body that is too large is read on up to here, and thrown away: a client that is cut off while it sends does not see the
/// answer that says why.
const REFUSED_BYTES_MAX: usize = 64 << 20;

/// How long a body may take, unless the client asks for less: upstream's default for a whole request.
const BODY_PATIENCE: Duration = Duration::from_secs(60);

/// Reads a body up to the limit, as long as the request says that it may take.
pub async fn read_body(parts: &Parts, body: Incoming) -> Result<Bytes, Status> {
    let query = Query::parse(parts.uri.query().unwrap_or(""));
    let asked = query.duration("timeout")?.filter(|asked| !asked.is_zero());
    let patience = asked.map_or(BODY_PATIENCE, |asked| asked.min(BODY_PATIENCE));
    let read = tokio::time::timeout(patience, read_whole(body)).await;
    read.unwrap_or_else(|_| {
        let why = "request did not complete within requested timeout - context deadline exceeded";
        Err(Status::timeout(why))
    })
}

async fn read_whole(mut body: Incoming) -> Result<Bytes, Status> {
    let mut kept = BytesMut::new();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            Status::bad_request(format!(
                "the body of the request could not be read: {error}"
            ))
        })?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        length += data.len();
        if length <= config::BODY_BYTES_MAX {
            kept.extend_from_slice(&data);
        } else if length <= REFUSED_BYTES_MAX {
            kept.clear();
        } else {
            break;
        }
    }
    if length > config::BODY_BYTES_MAX {
        let limit = config::BODY_BYTES_MAX;
        return Err(Status::too_large(format_args!("limit is {limit}")));
    }
    Ok(kept.freeze())
}

pub fn content_type(parts: &Parts) -> &str {
    parts
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("")
}

/// Decodes a body that must be of the given kind.
pub fn decode(
    parts: &Parts,
    body: &[u8],
    api_version: &str,
    kind: &str,
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    let given = content_type(parts);
    let media = MediaType::from_content_type(given).ok_or_else(|| {
        let supported = [
            "application/json",
            "application/yaml",
            "application/vnd.kubernetes.protobuf",
        ];
        Status::unsupported_media_type(&supported)
    })?;
    let decoded = codec::decode(body, media, api_version, kind, validation)
        .map_err(|error| Status::bad_request(error.message))?;
    check_kind(&decoded.value, api_version, kind)?;
    Ok(decoded)
}

/// Refuses an object of another kind or version, in the words of upstream's conversion, which comes upon it.
pub fn check_kind(object: &Value, api_version: &str, kind: &str) -> Result<(), Status> {
    let (given_version, given_kind) = (object.text("/apiVersion"), object.text("/kind"));
    if (given_version, given_kind) == (api_version, kind) {
        return Ok(());
    }
    let (group, version) = registry::split_api_version(given_version);
    let cannot = |why: String| {
        Err(Status::bad_request(format!(
            "{given_kind} in version {version:?} cannot be handled as a {kind}: {why}"
        )))
    };
    if registry::type_of(group, version, given_kind).is_none() {
        return cannot(format!(
            "no kind {given_kind:?} is registered for version {given_version:?} in scheme \
             \"pkg/api/legacyscheme/scheme.go:30\""
        ));
    }
    if given_kind != kind {
        let (own, _) = registry::split_api_version(api_version);
        let package = own.split('.').next().filter(|name| !name.is_empty());
        return cannot(format!(
            "converting ({version}.{given_kind}) to ({}.{kind}): unknown conversion",
            package.unwrap_or("core")
        ));
    }
    Err(Status::bad_request(format!(
        "the API version in the data ({given_version}) does not match the expected API version ({api_version})"
    )))
}

/// Sets the namespace that the path gives, or refuses another one.
pub fn settle_namespace(object: &mut Value, target: &Target) -> Result<(), Status> {
    match target.namespace.as_deref() {
        None => {
            object.remove("/metadata/namespace");
        }
        Some(namespace) => {
            let given = fields::namespace(object);
            if !given.is_empty() && given != namespace {
                return Err(Status::bad_request(
                    "the namespace of the provided object does not match the namespace sent on the request",
                ));
            }
            object.set("/metadata/namespace", namespace);
        }
    }
    Ok(())
}

/// Refuses an object that does not say which one it is, or says another than the path.
pub fn require_name(object: &mut Value, name: &str) -> Result<(), Status> {
    if fields::name(object).is_empty() {
        return Err(Status::bad_request(format!(
            "the name of the object ({name} based on URL) was undeterminable: name must be provided"
        )));
    }
    check_name(object, name)
}

/// Sets the name that the path gives, or refuses another one.
pub fn check_name(object: &mut Value, name: &str) -> Result<(), Status> {
    match fields::name(object) {
        "" => object.set("/metadata/name", name),
        given if given != name => {
            return Err(Status::bad_request(format!(
                "the name of the object ({given}) does not match the name on the URL ({name})"
            )));
        }
        _ => {}
    }
    Ok(())
}
