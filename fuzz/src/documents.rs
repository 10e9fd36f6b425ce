//! Bodies of requests, in all encodings.

use serde_json::Value;

use crate::codec::{self, DEPTH_MAX, FieldValidation, MediaType, protobuf, transcode};
use crate::registry::resources;

/// A body in JSON or YAML.
pub fn document(body: &[u8]) {
    for (media, validation) in [
        (MediaType::Json, FieldValidation::Strict),
        (MediaType::Json, FieldValidation::Warn),
        (MediaType::Yaml, FieldValidation::Warn),
        (MediaType::Yaml, FieldValidation::Ignore),
    ] {
        if let Ok(decoded) = codec::decode(body, media, "v1", "Pod", validation) {
            settled(&decoded.value);
        }
        let _ = codec::parse(body, media);
    }
    // What is stored is ours, but nothing in it may hurt.
    let _ = transcode::transcode(body);
    let _ = transcode::watch_frame("ADDED", body);
}

/// A body in protobuf: as it is, and as the message of the kind that its first two bytes choose.
pub fn protobuf(body: &[u8]) {
    if let Ok(value) = protobuf::decode(body, "v1", "Pod") {
        accepted(&value);
    }
    let Some((choice, message)) = body.split_first_chunk::<2>() else {
        return;
    };
    let resource = &resources()[usize::from(u16::from_le_bytes(*choice)) % resources().len()];
    let mut whole = protobuf::MAGIC.to_vec();
    whole.push(2 << 3 | 2);
    let mut length = message.len();
    while length > 0x7f {
        whole.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    whole.push(length as u8);
    whole.extend_from_slice(message);
    let media = MediaType::Protobuf;
    let (version, kind) = (resource.api_version(), resource.kind);
    if let Ok(decoded) = codec::decode(&whole, media, &version, kind, FieldValidation::Warn) {
        accepted(&decoded.value);
    }
}

/// What comes by protobuf is held to the same as what comes by JSON.
fn accepted(value: &Value) {
    if codec::is_deeper_than(value, DEPTH_MAX) {
        return;
    }
    let checked = codec::validate(value.clone(), FieldValidation::Strict);
    let checked = checked.unwrap_or_else(|error| panic!("{error}: {value}"));
    assert_eq!(checked.value, *value);
    settled(value);
}

/// An object that was accepted is the same when it is read again, and by way of protobuf.
pub fn settled(value: &Value) {
    let text = value.to_string();
    let strict = FieldValidation::Strict;
    let again = codec::decode(text.as_bytes(), MediaType::Json, "", "", strict);
    let again = again.unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(again.value, *value);
    let Some(bytes) = transcode::transcode(text.as_bytes()) else {
        return;
    };
    // Zeroes that Go does not tell from absence go on the first way; nothing does on the second.
    let once = read(&bytes);
    let bytes = transcode::transcode(once.to_string().as_bytes()).expect("its kind is known");
    assert_eq!(read(&bytes), once);
}

fn read(bytes: &[u8]) -> Value {
    protobuf::decode(bytes, "", "").expect("what was written can be read")
}
