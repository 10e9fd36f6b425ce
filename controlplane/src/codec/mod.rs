//! The codec: request bodies (JSON, YAML, Kubernetes protobuf) to JSON values that fit the tables, with field validation.

use serde_json::Value;

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
    todo!(
        "{} {media:?} {api_version} {kind} {validation:?}",
        body.len()
    )
}

/// Checks and prunes a value that did not come as a body (the outcome of a patch) in the same way.
pub fn validate(value: Value, validation: FieldValidation) -> Result<Decoded, DecodeError> {
    todo!("{value} {validation:?}")
}

/// Encodes an object whose apiVersion and kind the tables know as Kubernetes protobuf, envelope included; None when they do not.
pub fn encode_protobuf(value: &Value) -> Option<Vec<u8>> {
    todo!("{value}")
}
