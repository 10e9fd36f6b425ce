//! The codec: request bodies (JSON, YAML, Kubernetes protobuf) to JSON values that fit the tables, with field validation.

use serde_json::{Map, Value};

use crate::registry::{split_api_version, type_of};

mod check;
mod node;
pub mod openapi;
pub mod protobuf;
pub mod quantity;
mod rewrite;
pub mod scan;
pub mod time;
pub mod transcode;
mod wire;
mod words;

use node::{Document, Node};

/// MediaType is the encoding of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MediaType {
    Json,
    Yaml,
    Protobuf,
}

impl MediaType {
    /// From a Content-Type header, parameters ignored; empty is JSON. None: 415.
    pub fn from_content_type(content_type: &str) -> Option<Self> {
        match content_type
            .split(';')
            .next()
            .unwrap_or_default()
            .trim()
            .to_ascii_lowercase()
            .as_str()
        {
            "" | "*/*" | "application/json" => Some(Self::Json),
            "application/yaml" => Some(Self::Yaml),
            "application/vnd.kubernetes.protobuf" => Some(Self::Protobuf),
            _ => None,
        }
    }
}

/// FieldValidation is the query parameter `fieldValidation`: what to do about unknown and duplicate fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldValidation {
    Ignore,
    /// The server's default.
    #[default]
    Warn,
    Strict,
}

impl FieldValidation {
    pub fn parse(s: &str) -> Option<Self> {
        match s {
            "" | "Warn" => Some(Self::Warn),
            "Ignore" => Some(Self::Ignore),
            "Strict" => Some(Self::Strict),
            _ => None,
        }
    }
}

/// Decoded is a body as a JSON object with apiVersion and kind set, unknown fields and nulls of known types removed.
#[derive(Clone, Debug)]
pub struct Decoded {
    pub value: Value,
    /// For `Warning:` headers (299), when validation is Warn.
    pub warnings: Vec<String>,
}

/// DecodeError is a body that cannot be taken: a 400 with this text as the message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct DecodeError {
    pub message: String,
    /// The same without what it is about, for who says that otherwise.
    pub reason: String,
}

impl From<String> for DecodeError {
    fn from(reason: String) -> Self {
        Self {
            message: reason.clone(),
            reason,
        }
    }
}

/// Levels of nesting that an object may have. Upstream takes 10,000; here whatever is stored can be read by parsers that stop at
/// 128, as ours and others do, with the list around it and with managedFields, which are as deep as what they speak of.
pub const DEPTH_MAX: usize = 100;

/// In the words of Go's decoder.
pub const TOO_DEEP: &str = "exceeded max depth";

/// Whether a value has more levels than `levels`; never looks deeper.
pub fn is_deeper_than(value: &Value, levels: usize) -> bool {
    let inside = |inner| levels == 0 || is_deeper_than(inner, levels - 1);
    match value {
        Value::Array(items) => levels == 0 || items.iter().any(inside),
        Value::Object(fields) => levels == 0 || fields.values().any(inside),
        _ => false,
    }
}

/// Decodes a body. `api_version` and `kind` fill in what the body leaves out; a kind that the tables do not know is
/// taken as it is (JSON and YAML) or refused (protobuf).
pub fn decode(
    body: &[u8],
    media: MediaType,
    api_version: &str,
    kind: &str,
    validation: FieldValidation,
) -> Result<Decoded, DecodeError> {
    let unrecognized = |reason: String| DecodeError {
        message: words::unrecognized(body, kind, &reason),
        reason,
    };
    let node = match media {
        MediaType::Protobuf => {
            let value =
                protobuf::decode(body, api_version, kind).map_err(|error| error.to_string())?;
            if is_deeper_than(&value, DEPTH_MAX) {
                return Err(TOO_DEEP.to_owned().into());
            }
            return Ok(Decoded {
                value,
                warnings: Vec::new(),
            });
        }
        MediaType::Json => json(body).map_err(|fault| {
            unrecognized(format!(
                "couldn't get version/kind; json parse error: {fault}"
            ))
        })?,
        MediaType::Yaml => {
            yaml(body, validation).map_err(|fault| unrecognized(words::yaml_fault(&fault)))?
        }
    };
    if !node.is_object() {
        return Err(unrecognized(words::no_object(node.open().describe())));
    }
    finish(node, api_version, kind, validation)
}

/// Checks and prunes a value that did not come as a body (the outcome of a patch) in the same way.
pub fn validate(value: Value, validation: FieldValidation) -> Result<Decoded, DecodeError> {
    finish(value, "", "", validation)
}

/// Parses a document without checking it against a type: the body of a patch.
pub fn parse(body: &[u8], media: MediaType) -> Result<Value, DecodeError> {
    match media {
        MediaType::Json => Ok(json(body)?.into_value()),
        MediaType::Yaml => Ok(yaml(body, FieldValidation::Strict)?.into_value()),
        MediaType::Protobuf => Err("a patch cannot be protobuf".to_owned().into()),
    }
}

/// A patch in JSON, with the fields in it that are there twice.
pub fn parse_patch(body: &[u8]) -> Result<(Value, Vec<String>), DecodeError> {
    Ok(check::check_untyped(json(body)?))
}

/// Bytes that are no text count as U+FFFD, as in Go.
fn json(body: &[u8]) -> Result<Node, String> {
    let text = String::from_utf8_lossy(body);
    serde_json::from_str(&text).map_err(|error| words::json_fault(text.as_bytes(), &error))
}

fn yaml(body: &[u8], validation: FieldValidation) -> Result<Node, String> {
    let mut options = serde_saphyr::Options::default();
    // What Kubernetes' YAML parser does: 0644 is octal, and duplicate keys are an error unless they are to be ignored.
    options.legacy_octal_numbers = true;
    options.duplicate_keys = match validation {
        FieldValidation::Ignore => serde_saphyr::DuplicateKeyPolicy::LastWins,
        _ => serde_saphyr::DuplicateKeyPolicy::Error,
    };
    serde_saphyr::from_slice_with_options(body, options).map_err(|error| error.to_string())
}

fn finish<D: Document>(
    document: D,
    api_version: &str,
    kind: &str,
    validation: FieldValidation,
) -> Result<Decoded, DecodeError> {
    if !document.is_object() {
        let found = document.open().describe();
        return Err(format!("the body must be an object, not {found}").into());
    }
    let given = |key: &str, default: &str| {
        document
            .text(key)
            .filter(|s| !s.is_empty())
            .unwrap_or(default)
            .to_owned()
    };
    let (api_version, kind) = (given("apiVersion", api_version), given("kind", kind));
    let (group, version) = split_api_version(&api_version);
    let cannot = |reason: String| DecodeError {
        message: format!("{kind} in version {version:?} cannot be handled as a {kind}: {reason}"),
        reason,
    };
    // An event of a watch is no object: its type has no room for a kind, and nobody stores one.
    let ty = type_of(group, version, &kind).filter(|ty| ty.field("kind").is_some());
    let (value, faults) = match ty {
        Some(ty) => check::check(document, ty).map_err(cannot)?,
        None => check::check_untyped(document),
    };
    if is_deeper_than(&value, DEPTH_MAX) {
        return Err(cannot(TOO_DEEP.to_owned()));
    }
    let warnings = match validation {
        FieldValidation::Strict if !faults.is_empty() => {
            return Err(cannot(format!(
                "strict decoding error: {}",
                faults.join(", ")
            )));
        }
        FieldValidation::Warn => faults,
        _ => Vec::new(),
    };
    let Value::Object(rest) = value else {
        return Err(cannot("it is not an object".to_owned()));
    };
    let mut out = Map::with_capacity(rest.len() + 2);
    out.insert("apiVersion".to_owned(), api_version.clone().into());
    out.insert("kind".to_owned(), kind.clone().into());
    out.extend(
        rest.into_iter()
            .filter(|(k, _)| k != "apiVersion" && k != "kind"),
    );
    Ok(Decoded {
        value: Value::Object(out),
        warnings,
    })
}

#[cfg(test)]
pub mod arbitrary;
#[cfg(test)]
mod published;
#[cfg(test)]
mod tests;
