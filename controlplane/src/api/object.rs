//! The stored form of objects, and how it is served without being decoded.
//!
//! Stored is compact JSON without kind, apiVersion and resourceVersion, and with `metadata` first. So every stored value
//! begins with [`HEAD`], and serving one is: what the kind says, the resourceVersion, the rest of the bytes. Labels come first in
//! the metadata: lists by label look no further.

use bytes::Bytes;
use serde_json::{Map, Value};

use super::status::Status;
use crate::registry::Resource;
use crate::store::{Record, Revision};

pub use super::conversion::{converts, from_stored, stored_resource, stored_selector, to_stored};

/// How every stored value begins. The metadata is never empty: each object has a name.
const HEAD: &[u8] = br#"{"metadata":{"#;

/// Encodes an object for the store.
pub fn encode(mut object: Value) -> Bytes {
    let empty = Map::new();
    let fields = object.as_object_mut().map(std::mem::take).unwrap_or(empty);
    let mut stored = Map::with_capacity(fields.len());
    stored.insert("metadata".to_owned(), Value::Object(Map::new()));
    for (key, mut value) in fields {
        if key == "metadata" {
            if let Some(metadata) = value.as_object_mut() {
                metadata.shift_remove("resourceVersion");
                metadata.shift_remove("selfLink");
                if let Some(labels) = metadata.shift_remove("labels") {
                    metadata.shift_insert(0, "labels".to_owned(), labels);
                }
            }
            stored["metadata"] = value;
        } else if key != "kind" && key != "apiVersion" {
            stored.insert(key, value);
        }
    }
    Bytes::from(Value::Object(stored).to_string())
}

/// Decodes a record into an object as clients see it.
pub fn decode(record: &Record, kind: &str, api_version: &str) -> Result<Value, Status> {
    decode_at(record, record.revision, kind, api_version)
}

/// Decodes a record, with another resourceVersion than the one it was written at.
pub fn decode_at(
    record: &Record,
    revision: Revision,
    kind: &str,
    api_version: &str,
) -> Result<Value, Status> {
    let stored: Value = serde_json::from_slice(&record.value).map_err(|error| {
        Status::internal(format!("{} is stored as broken JSON: {error}", record.key))
    })?;
    let mut object = Map::new();
    object.insert("kind".to_owned(), kind.into());
    object.insert("apiVersion".to_owned(), api_version.into());
    if let Value::Object(fields) = stored {
        object.extend(fields);
    }
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert("resourceVersion".to_owned(), revision.to_string().into());
    }
    Ok(Value::Object(object))
}

/// Appends a record as an object of its own, with kind and apiVersion.
pub fn write(
    out: &mut Vec<u8>,
    record: &Record,
    revision: Revision,
    kind: &str,
    api_version: &str,
) {
    out.extend_from_slice(br#"{"kind":""#);
    out.extend_from_slice(kind.as_bytes());
    out.extend_from_slice(br#"","apiVersion":""#);
    out.extend_from_slice(api_version.as_bytes());
    out.extend_from_slice(br#"","#);
    write_fields(out, record, revision);
}

/// Appends a record as an item of a list, where the list's kind says what it is.
pub fn write_item(out: &mut Vec<u8>, record: &Record) {
    out.push(b'{');
    write_fields(out, record, record.revision);
}

/// How many bytes [`write_item`] appends.
pub fn item_length(record: &Record) -> usize {
    let digits = record.revision.0.checked_ilog10().unwrap_or(0) as usize + 1;
    br#""resourceVersion":"","#.len() + digits + record.value.len()
}

fn write_fields(out: &mut Vec<u8>, record: &Record, revision: Revision) {
    out.extend_from_slice(&HEAD[1..]);
    out.extend_from_slice(br#""resourceVersion":""#);
    out.extend_from_slice(revision.to_string().as_bytes());
    out.extend_from_slice(br#"","#);
    out.extend_from_slice(record.value.get(HEAD.len()..).unwrap_or_default());
}

/// Where objects of a resource are stored. Both kinds of events share one place.
pub fn prefix(resource: &Resource, namespace: Option<&str>) -> String {
    let group = match (resource.group, resource.plural) {
        ("", _) | ("events.k8s.io", "events") => "core",
        (group, _) => group,
    };
    match namespace {
        Some(namespace) => format!("/{group}/{}/{namespace}/", resource.plural),
        None => format!("/{group}/{}/", resource.plural),
    }
}

/// The key of one object.
pub fn key(resource: &Resource, namespace: Option<&str>, name: &str) -> String {
    format!(
        "{}{name}",
        prefix(resource, namespace.filter(|_| resource.namespaced))
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(object: Value) -> Record {
        Record {
            key: "/core/pods/a/b".into(),
            value: encode(object),
            revision: Revision(7),
            created: Revision(5),
        }
    }

    #[test]
    fn a_served_object_is_the_stored_bytes_with_kind_and_revision() {
        let object = json!({"kind": "Pod", "apiVersion": "v1", "spec": {"x": 1},
            "metadata": {"name": "b", "resourceVersion": "3"}});
        let record = record(object);
        assert_eq!(
            &record.value[..],
            br#"{"metadata":{"name":"b"},"spec":{"x":1}}"#
        );
        let mut out = Vec::new();
        write(&mut out, &record, record.revision, "Pod", "v1");
        let served: Value = serde_json::from_slice(&out).expect("served JSON");
        let expected = json!({"kind": "Pod", "apiVersion": "v1",
            "metadata": {"resourceVersion": "7", "name": "b"}, "spec": {"x": 1}});
        assert_eq!(served, expected);
        assert_eq!(decode(&record, "Pod", "v1").expect("decoded"), expected);
        let mut item = Vec::new();
        write_item(&mut item, &record);
        assert_eq!(item.len(), item_length(&record));
        assert_eq!(
            item,
            br#"{"metadata":{"resourceVersion":"7","name":"b"},"spec":{"x":1}}"#
        );
    }
}
