//! Events of a watch, as the body has them: lines of JSON, or frames of protobuf.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::api::request::{Encoding, Form, Target};
use crate::api::status::Status;
use crate::api::{object, table};
use crate::codec::transcode;
use crate::store::{Record, Revision};

/// What marks the bookmark that ends the initial events (KEP-3157).
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// What happened to an object from a watcher's view: it may enter and leave a selector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Added,
    Modified,
    Deleted,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

/// An event, from a record.
pub fn from_record(
    kind: Kind,
    record: &Record,
    revision: Revision,
    target: &Target,
    encoding: Encoding,
) -> Bytes {
    event(kind.name(), encoding, record.value.len() + 160, |out| {
        object::write(
            out,
            record,
            revision,
            target.resource.kind,
            &target.resource.api_version(),
        )
    })
}

/// An event, from an object.
pub fn from_object(kind: &str, object: &Value, encoding: Encoding) -> Bytes {
    let json = object.to_string();
    event(kind, encoding, json.len() + 32, |out| {
        out.extend_from_slice(json.as_bytes())
    })
}

/// One event of the body: a line of JSON, or a frame of protobuf.
fn event(
    kind: &str,
    encoding: Encoding,
    size: usize,
    write_object: impl FnOnce(&mut Vec<u8>),
) -> Bytes {
    let mut out = Vec::with_capacity(size);
    if encoding == Encoding::Protobuf {
        write_object(&mut out);
        // What the tables do not fit was not stored by way of them. Other watchers must not lose theirs by it.
        return transcode::watch_frame(kind, &out)
            .unwrap_or_else(|| {
                tracing::error!(kind, "an event has no protobuf form");
                let status = Status::internal("an object has no protobuf form").to_value();
                transcode::watch_frame("ERROR", status.to_string().as_bytes()).unwrap_or_default()
            })
            .into();
    }
    out.extend_from_slice(br#"{"type":""#);
    out.extend_from_slice(kind.as_bytes());
    out.extend_from_slice(br#"","object":"#);
    write_object(&mut out);
    out.extend_from_slice(b"}\n");
    Bytes::from(out)
}

pub fn error_event(status: &Status, encoding: Encoding) -> Bytes {
    from_object("ERROR", &status.to_value(), encoding)
}

/// Whether objects go out as their stored bytes.
pub fn plain(form: Form, target: &Target) -> bool {
    form == Form::Object && !object::converts(target.resource)
}

/// An event of a decoded object, in the form asked for.
pub fn shaped(
    kind: Kind,
    object: Value,
    (form, encoding): (Form, Encoding),
    target: &Target,
    headed: &mut bool,
) -> Bytes {
    let object = object::from_stored(object, target.resource);
    let first = !std::mem::replace(headed, true);
    let shaped = table::shaped(object, form, target.resource, first);
    from_object(kind.name(), &shaped, encoding)
}

/// An event that only says how far the watch has come.
pub fn bookmark(
    target: &Target,
    (form, encoding): (Form, Encoding),
    revision: Revision,
    ends_initial: bool,
) -> Bytes {
    let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
    if ends_initial {
        metadata["annotations"] = json!({ INITIAL_EVENTS_END: "true" });
    }
    let object = match form {
        Form::Object => {
            let resource = target.resource;
            json!({"kind": resource.kind, "apiVersion": resource.api_version(), "metadata": metadata})
        }
        Form::Partial(version) => {
            let api_version = format!("meta.k8s.io/{version}");
            json!({"kind": "PartialObjectMetadata", "apiVersion": api_version, "metadata": metadata})
        }
        Form::Table(version, _) => {
            let row = json!({"cells": [], "object": {"kind": "PartialObjectMetadata",
                "apiVersion": format!("meta.k8s.io/{version}"), "metadata": metadata}});
            json!({"kind": "Table", "apiVersion": format!("meta.k8s.io/{version}"), "columnDefinitions": [],
                "metadata": {"resourceVersion": revision.to_string()}, "rows": [row]})
        }
    };
    from_object("BOOKMARK", &object, encoding)
}
