//! OpenAPI v2 documents as protobuf (gnostic's `openapi.v2.Document`): the only form in which kubectl and helm ask for
//! `/openapi/v2`, which they do to validate what no v3 document describes, as `kind: List`.

use serde_json::{Map, Value};

use super::wire::Writer;

/// The media type that asks for this form, without its version.
pub const MEDIA_TYPE: &str = "application/com.github.proto-openapi.spec.v2";
/// The media type of the answer.
pub const CONTENT_TYPE: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// Encodes the parts of a document that clients use: its version, its info and its definitions.
pub fn encode_openapi_v2(document: &Value) -> Vec<u8> {
    let mut out = Writer::default();
    text(&mut out, 1, &document["swagger"]);
    out.message(2, |info| {
        text(info, 1, &document["info"]["title"]);
        text(info, 2, &document["info"]["version"]);
    });
    out.message(8, |_paths| {});
    out.message(9, |definitions| {
        named_schemas(definitions, &document["definitions"])
    });
    out.out
}

fn text(out: &mut Writer, number: u16, value: &Value) {
    if let Some(text) = value.as_str() {
        out.bytes(number, text.as_bytes());
    }
}

/// `repeated NamedSchema` {1: name, 2: schema} as field 1.
fn named_schemas(out: &mut Writer, schemas: &Value) {
    for (name, value) in schemas.as_object().into_iter().flatten() {
        out.message(1, |named| {
            named.bytes(1, name.as_bytes());
            named.message(2, |out| schema(out, value));
        });
    }
}

/// An `Any` holds its value as YAML, which JSON is.
fn any(out: &mut Writer, number: u16, value: &Value) {
    out.message(number, |any| any.bytes(2, value.to_string().as_bytes()));
}

fn schema(out: &mut Writer, value: &Value) {
    let empty = Map::new();
    for (key, value) in value.as_object().unwrap_or(&empty) {
        match key.as_str() {
            "$ref" => text(out, 1, value),
            "format" => text(out, 2, value),
            "description" => text(out, 4, value),
            "default" => any(out, 5, value),
            "required" => value
                .as_array()
                .into_iter()
                .flatten()
                .for_each(|name| text(out, 19, name)),
            "additionalProperties" => out.message(21, |either| match value {
                Value::Bool(allowed) => either.varint(2, u64::from(*allowed)),
                inner => either.message(1, |out| schema(out, inner)),
            }),
            "type" => out.message(22, |types| text(types, 1, value)),
            "items" => out.message(23, |items| items.message(1, |out| schema(out, value))),
            "properties" => out.message(25, |properties| named_schemas(properties, value)),
            extension if extension.starts_with("x-") => out.message(31, |named| {
                named.bytes(1, extension.as_bytes());
                any(named, 2, value);
            }),
            // The tables make no other keys.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::wire::Reader;
    use super::*;
    use crate::registry::{Resource, openapi, resource};

    /// The contents of a message's fields with a number.
    fn fields(message: &[u8], wanted: u32) -> Vec<Vec<u8>> {
        let mut reader = Reader::new(message);
        let mut out = Vec::new();
        while let Some((number, value)) = reader.next().unwrap() {
            if number == wanted {
                out.push(value.bytes().unwrap().to_vec());
            }
        }
        out
    }

    fn field(message: &[u8], path: &[u32]) -> Vec<u8> {
        path.iter().fold(message.to_vec(), |message, number| {
            fields(&message, *number).remove(0)
        })
    }

    #[test]
    fn schemas_keep_references_types_and_extensions() {
        let document = json!({"swagger": "2.0", "info": {"title": "t", "version": "v"}, "definitions": {"A": {
            "type": "object", "required": ["b"], "x-kubernetes-list-map-keys": ["k"],
            "properties": {"b": {"$ref": "#/definitions/B"}, "c": {"type": "array", "items": {"type": "string"}},
                "d": {"additionalProperties": {"format": "int32"}}}}}});
        let encoded = encode_openapi_v2(&document);
        assert_eq!(field(&encoded, &[1]), b"2.0");
        assert_eq!(field(&encoded, &[9, 1, 1]), b"A");
        let schema = field(&encoded, &[9, 1, 2]);
        assert_eq!(field(&schema, &[22, 1]), b"object");
        assert_eq!(field(&schema, &[19]), b"b");
        assert_eq!(field(&schema, &[31, 1]), b"x-kubernetes-list-map-keys");
        assert_eq!(field(&schema, &[31, 2, 2]), b"[\"k\"]");
        let properties = fields(&field(&schema, &[25]), 1);
        assert_eq!(field(&properties[0], &[2, 1]), b"#/definitions/B");
        assert_eq!(field(&properties[1], &[2, 23, 1, 22, 1]), b"string");
        assert_eq!(field(&properties[2], &[2, 21, 1, 2]), b"int32");
    }

    #[test]
    fn every_definition_of_the_served_kinds_is_there() {
        let served: Vec<&Resource> = vec![resource("apps", "v1", "deployments").unwrap()];
        let document = openapi::v2(&served);
        let definitions = fields(&field(&encode_openapi_v2(&document), &[9]), 1);
        assert_eq!(
            definitions.len(),
            document["definitions"].as_object().unwrap().len()
        );
    }
}
