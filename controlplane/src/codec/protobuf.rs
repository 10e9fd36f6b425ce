//! Kubernetes protobuf to JSON and back, by the tables.
//!
//! A body is the bytes `k8s\0` and a `runtime.Unknown` {1: TypeMeta {1: apiVersion, 2: kind}, 2: raw, 3: contentEncoding,
//! 4: contentType}. Go writes fields that are not pointers even when they are zero, and JSON then leaves most of them
//! out: so does the decoder, except where the field is a pointer in Go or the schema's default is that very zero (which
//! it is exactly when JSON never leaves it out). Where the default is something else (a port's protocol), zero means it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::time;
use super::wire::{Malformed, Reader, Value as Raw, Writer};
use crate::registry::{
    Field, FieldType, Shape, Type, Wire, split_api_version, type_named, type_of,
};

pub const MAGIC: &[u8; 4] = b"k8s\0";
/// Nesting that is accepted; CRD schemas are the deepest there are.
const DEPTH_MAX: usize = 128;
const SCHEMA: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtobufError {
    #[error(
        "provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]"
    )]
    Magic,
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("no kind {kind:?} is registered for version {api_version:?}")]
    Unknown { api_version: String, kind: String },
    #[error("the protobuf message is nested too deeply")]
    Depth,
    #[error("the envelope holds {content_type:?}, which is not supported")]
    Content { content_type: String },
}

/// Envelope is what is around an object.
#[derive(Debug)]
pub struct Envelope<'a> {
    pub api_version: &'a str,
    pub kind: &'a str,
    pub raw: &'a [u8],
    pub content_type: &'a str,
}

impl<'a> Envelope<'a> {
    pub fn open(body: &'a [u8]) -> Result<Self, ProtobufError> {
        let message = body.strip_prefix(MAGIC).ok_or(ProtobufError::Magic)?;
        let mut envelope = Envelope {
            api_version: "",
            kind: "",
            raw: &[],
            content_type: "",
        };
        let mut reader = Reader::new(message);
        while let Some((number, value)) = reader.next()? {
            match number {
                1 => {
                    let mut meta = Reader::new(value.bytes()?);
                    while let Some((number, value)) = meta.next()? {
                        match number {
                            1 => envelope.api_version = value.text()?,
                            2 => envelope.kind = value.text()?,
                            _ => {}
                        }
                    }
                }
                2 => envelope.raw = value.bytes()?,
                4 => envelope.content_type = value.text()?,
                _ => {}
            }
        }
        Ok(envelope)
    }
}

/// The object of a body, with apiVersion and kind; those given stand in for what the envelope leaves out.
pub fn decode(body: &[u8], api_version: &str, kind: &str) -> Result<Value, ProtobufError> {
    let envelope = Envelope::open(body)?;
    let api_version = if envelope.api_version.is_empty() {
        api_version
    } else {
        envelope.api_version
    };
    let kind = if envelope.kind.is_empty() {
        kind
    } else {
        envelope.kind
    };
    let (group, version) = split_api_version(api_version);
    let unknown = || ProtobufError::Unknown {
        api_version: api_version.to_owned(),
        kind: kind.to_owned(),
    };
    let ty = type_of(group, version, kind).ok_or_else(unknown)?;
    let mut out = Map::new();
    out.insert("apiVersion".to_owned(), api_version.into());
    out.insert("kind".to_owned(), kind.into());
    match envelope.content_type {
        "" | "application/vnd.kubernetes.protobuf" => message(envelope.raw, ty, &mut out, 0)?,
        other => {
            return Err(ProtobufError::Content {
                content_type: other.to_owned(),
            });
        }
    }
    Ok(Value::Object(out))
}

fn message(
    bytes: &[u8],
    ty: &'static Type,
    out: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), ProtobufError> {
    if depth > DEPTH_MAX {
        return Err(ProtobufError::Depth);
    }
    let mut reader = Reader::new(bytes);
    while let Some((number, raw)) = reader.next()? {
        // Fields of a newer version are passed over, as Go does.
        let Ok(at) = ty.wire.binary_search_by_key(&number, |w| u32::from(w.tag)) else {
            continue;
        };
        match ty.wire[at].to {
            Wire::Inline(id) => message(raw.bytes()?, id.get(), out, depth + 1)?,
            Wire::Field(i) => field(raw, &ty.fields[usize::from(i)], false, out, depth)?,
            Wire::Wrapped(i) => field(raw, &ty.fields[usize::from(i)], true, out, depth)?,
        }
    }
    Ok(())
}

fn field(
    raw: Raw<'_>,
    field: &'static Field,
    wrapped: bool,
    out: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), ProtobufError> {
    match &field.ty {
        FieldType::List(_) if wrapped => {
            out.insert(field.name.to_owned(), items(raw.bytes()?)?);
        }
        FieldType::List(inner) => {
            let list = out
                .entry(field.name)
                .or_insert_with(|| Value::Array(Vec::new()));
            let Value::Array(list) = list else {
                return Err(Malformed.into());
            };
            match (inner, raw) {
                (FieldType::Int32 | FieldType::Int64 | FieldType::Bool, Raw::Bytes(packed)) => {
                    for n in Reader::new(packed).packed()? {
                        list.push(scalar(Raw::Varint(n), inner)?);
                    }
                }
                _ => list.push(value(raw, inner, depth)?),
            }
        }
        FieldType::Map(inner) => {
            let map = out
                .entry(field.name)
                .or_insert_with(|| Value::Object(Map::new()));
            let Value::Object(map) = map else {
                return Err(Malformed.into());
            };
            let (mut key, mut content) = ("", None);
            let mut reader = Reader::new(raw.bytes()?);
            while let Some((number, raw)) = reader.next()? {
                match number {
                    1 => key = raw.text()?,
                    2 => content = Some(raw),
                    _ => {}
                }
            }
            let content = match content {
                Some(raw) if wrapped => items(raw.bytes()?)?,
                Some(raw) => value(raw, inner, depth)?,
                None if matches!(
                    **inner,
                    FieldType::Int32 | FieldType::Int64 | FieldType::Bool
                ) =>
                {
                    scalar(Raw::Varint(0), inner)?
                }
                None => value(Raw::Bytes(&[]), inner, depth)?,
            };
            map.insert(key.to_owned(), content);
        }
        single => {
            let value = value(raw, single, depth)?;
            let absent = value.is_null()
                || (!field.pointer && zero(&value, single).is_some_and(|it| it != field.default));
            if !absent {
                out.insert(field.name.to_owned(), value);
            }
        }
    }
    Ok(())
}

/// The zero that a value is, if it is one, as the tables write defaults.
fn zero(value: &Value, ty: &FieldType) -> Option<&'static str> {
    if ty
        .target()
        .is_some_and(|target| target.shape != Shape::IntOrString)
    {
        return None;
    }
    match value {
        Value::Bool(false) => Some("false"),
        Value::Number(n) if n.as_f64() == Some(0.0) => Some("0"),
        Value::String(s) if s.is_empty() => Some("\"\""),
        _ => None,
    }
}

/// A message with one repeated string, `items`.
fn items(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let mut out = Vec::new();
    let mut reader = Reader::new(bytes);
    while let Some((number, raw)) = reader.next()? {
        if number == 1 {
            out.push(Value::from(raw.text()?));
        }
    }
    Ok(Value::Array(out))
}

fn scalar(raw: Raw<'_>, ty: &FieldType) -> Result<Value, ProtobufError> {
    Ok(match ty {
        FieldType::Bool => (raw.varint()? != 0).into(),
        FieldType::Int32 => (raw.int()? as i32).into(),
        FieldType::Int64 => raw.int()?.into(),
        FieldType::Double => raw.double()?.into(),
        FieldType::String => raw.text()?.into(),
        FieldType::Bytes => STANDARD.encode(raw.bytes()?).into(),
        FieldType::Ref(_) | FieldType::List(_) | FieldType::Map(_) => return Err(Malformed.into()),
    })
}

fn value(raw: Raw<'_>, ty: &'static FieldType, depth: usize) -> Result<Value, ProtobufError> {
    match ty {
        FieldType::Ref(id) => special_or_struct(raw.bytes()?, id.get(), depth + 1),
        scalar_type => scalar(raw, scalar_type),
    }
}

fn special_or_struct(
    bytes: &[u8],
    ty: &'static Type,
    depth: usize,
) -> Result<Value, ProtobufError> {
    if depth > DEPTH_MAX {
        return Err(ProtobufError::Depth);
    }
    if ty.shape == Shape::Struct {
        let mut out = Map::new();
        message(bytes, ty, &mut out, depth)?;
        return Ok(Value::Object(out));
    }
    let (mut first, mut second, mut third) = (None, Vec::new(), None);
    let mut reader = Reader::new(bytes);
    while let Some((number, raw)) = reader.next()? {
        match number {
            1 => first = Some(raw),
            2 => second.push(raw),
            3 => third = Some(raw),
            _ => {}
        }
    }
    let int = |raw: Option<Raw<'_>>| raw.map_or(Ok(0), Raw::int);
    Ok(match ty.shape {
        Shape::Struct => Value::Null,
        Shape::Time | Shape::MicroTime => {
            let (seconds, nanos) = (int(first)?, int(second.last().copied())? as i32);
            if (seconds, nanos) == (0, 0) {
                return Ok(Value::Null);
            }
            let time = Timestamp::new(seconds, nanos).map_err(|_| Malformed)?;
            if ty.shape == Shape::Time {
                time::render_seconds(time).into()
            } else {
                time::render_micros(time).into()
            }
        }
        Shape::Quantity => {
            let text = first.map_or(Ok(""), Raw::text)?;
            if text.is_empty() {
                "0".into()
            } else {
                super::quantity::canonical(text).ok_or(Malformed)?.into()
            }
        }
        Shape::IntOrString => match int(first)? {
            0 => (int(second.last().copied())? as i32).into(),
            _ => third.map_or(Ok(""), Raw::text)?.into(),
        },
        Shape::RawExtension | Shape::FieldsV1 | Shape::Json => {
            match first.map_or(Ok(&[][..]), Raw::bytes)? {
                [] => Value::Null,
                nested if nested.starts_with(MAGIC) => decode_nested(nested, depth)?,
                raw => serde_json::from_slice(raw).map_err(|_| Malformed)?,
            }
        }
        Shape::SchemaOrArray => match first {
            Some(schema) => special_or_struct(schema.bytes()?, schema_type()?, depth + 1)?,
            None => {
                let schema = schema_type()?;
                let schemas = second
                    .iter()
                    .map(|raw| special_or_struct(raw.bytes()?, schema, depth + 1));
                schemas.collect::<Result<Value, _>>()?
            }
        },
        Shape::SchemaOrBool => match second.last() {
            Some(schema) => special_or_struct(schema.bytes()?, schema_type()?, depth + 1)?,
            None => (int(first)? != 0).into(),
        },
        Shape::SchemaOrStringArray => match first {
            Some(schema) => special_or_struct(schema.bytes()?, schema_type()?, depth + 1)?,
            None => second
                .iter()
                .map(|raw| raw.text().map(Value::from))
                .collect::<Result<Value, _>>()?,
        },
    })
}

fn decode_nested(bytes: &[u8], depth: usize) -> Result<Value, ProtobufError> {
    let envelope = Envelope::open(bytes)?;
    let (group, version) = split_api_version(envelope.api_version);
    let ty = type_of(group, version, envelope.kind).ok_or(Malformed)?;
    let mut out = Map::new();
    out.insert("apiVersion".to_owned(), envelope.api_version.into());
    out.insert("kind".to_owned(), envelope.kind.into());
    message(envelope.raw, ty, &mut out, depth + 1)?;
    Ok(Value::Object(out))
}

fn schema_type() -> Result<&'static Type, ProtobufError> {
    type_named(SCHEMA).ok_or(ProtobufError::Malformed(Malformed))
}

fn write_message(object: &Map<String, Value>, ty: &'static Type, out: &mut Writer) -> Option<()> {
    for wire in ty.wire {
        match wire.to {
            Wire::Inline(id) => {
                let mut inner = Writer::default();
                write_message(object, id.get(), &mut inner)?;
                out.bytes(wire.tag, &inner.out);
            }
            Wire::Field(i) | Wire::Wrapped(i) => {
                let field = &ty.fields[usize::from(i)];
                let wrapped = matches!(wire.to, Wire::Wrapped(_));
                match object.get(field.name) {
                    None | Some(Value::Null) => {}
                    Some(value) => write_field(value, &field.ty, wrapped, wire.tag, out)?,
                }
            }
        }
    }
    Some(())
}

fn write_field(
    value: &Value,
    ty: &'static FieldType,
    wrapped: bool,
    tag: u16,
    out: &mut Writer,
) -> Option<()> {
    match ty {
        FieldType::List(_) if wrapped => out.bytes(tag, &write_items(value)?),
        FieldType::List(inner) => {
            for item in value.as_array()? {
                write_value(item, inner, tag, out)?;
            }
        }
        FieldType::Map(inner) => {
            for (key, value) in value.as_object()? {
                let mut entry = Writer::default();
                entry.bytes(1, key.as_bytes());
                if wrapped {
                    entry.bytes(2, &write_items(value)?);
                } else {
                    write_value(value, inner, 2, &mut entry)?;
                }
                out.bytes(tag, &entry.out);
            }
        }
        single => write_value(value, single, tag, out)?,
    }
    Some(())
}

fn write_items(value: &Value) -> Option<Vec<u8>> {
    let mut out = Writer::default();
    for item in value.as_array()? {
        out.bytes(1, item.as_str()?.as_bytes());
    }
    Some(out.out)
}

fn write_value(value: &Value, ty: &'static FieldType, tag: u16, out: &mut Writer) -> Option<()> {
    match ty {
        FieldType::String => out.bytes(tag, value.as_str()?.as_bytes()),
        FieldType::Bytes => out.bytes(tag, &STANDARD.decode(value.as_str()?).ok()?),
        FieldType::Bool => out.varint(tag, u64::from(value.as_bool()?)),
        FieldType::Int32 | FieldType::Int64 => out.varint(tag, value.as_i64()? as u64),
        FieldType::Double => out.double(tag, value.as_f64()?),
        FieldType::Ref(id) => {
            let mut inner = Writer::default();
            write_special_or_struct(value, id.get(), &mut inner)?;
            out.bytes(tag, &inner.out);
        }
        FieldType::List(_) | FieldType::Map(_) => return None,
    }
    Some(())
}

/// A value of a type that has a form of its own, without tag and length.
pub fn write_special(value: &Value, ty: &'static Type, out: &mut Writer) -> Option<()> {
    write_special_or_struct(value, ty, out)
}

fn write_special_or_struct(value: &Value, ty: &'static Type, out: &mut Writer) -> Option<()> {
    match ty.shape {
        Shape::Struct => write_message(value.as_object()?, ty, out)?,
        Shape::Time | Shape::MicroTime => {
            let time = time::parse(value.as_str()?)?;
            out.varint(1, time.as_second() as u64);
            let nanos = if ty.shape == Shape::Time {
                0
            } else {
                time.subsec_nanosecond()
            };
            out.varint(2, i64::from(nanos) as u64);
        }
        Shape::Quantity => match value {
            Value::String(text) => out.bytes(1, text.as_bytes()),
            Value::Number(number) => out.bytes(1, number.to_string().as_bytes()),
            _ => return None,
        },
        Shape::IntOrString => match value {
            Value::String(text) => {
                out.varint(1, 1);
                out.varint(2, 0);
                out.bytes(3, text.as_bytes());
            }
            number => {
                out.varint(1, 0);
                out.varint(2, number.as_i64()? as u64);
                out.bytes(3, b"");
            }
        },
        Shape::RawExtension | Shape::FieldsV1 | Shape::Json => {
            out.bytes(1, json!(value).to_string().as_bytes())
        }
        Shape::SchemaOrArray | Shape::SchemaOrBool | Shape::SchemaOrStringArray => {
            let schema = type_named(SCHEMA)?;
            let own = if ty.shape == Shape::SchemaOrBool {
                2
            } else {
                1
            };
            match value {
                Value::Object(object) => {
                    let mut inner = Writer::default();
                    write_message(object, schema, &mut inner)?;
                    if ty.shape == Shape::SchemaOrBool {
                        out.varint(1, 1);
                    }
                    out.bytes(own, &inner.out);
                }
                Value::Bool(allowed) => out.varint(1, u64::from(*allowed)),
                Value::Array(items) => {
                    for item in items {
                        match item {
                            Value::String(text) => out.bytes(2, text.as_bytes()),
                            item => {
                                let mut inner = Writer::default();
                                write_message(item.as_object()?, schema, &mut inner)?;
                                out.bytes(2, &inner.out);
                            }
                        }
                    }
                }
                _ => return None,
            }
        }
    }
    Some(())
}

#[cfg(test)]
pub(super) mod tests;
