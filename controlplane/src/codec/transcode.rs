//! JSON text straight to protobuf, by the tables and without a tree between: how stored objects are served to clients
//! that ask for protobuf.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::protobuf::{MAGIC, write_special};
use super::time;
use super::wire::Writer;
use crate::registry::{FieldType, Shape, Type, Wire, split_api_version, type_of};

/// What an object says it is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head<'a> {
    #[serde(borrow)]
    api_version: &'a str,
    #[serde(borrow)]
    kind: &'a str,
}

/// The object with its envelope; None when the tables do not know its kind, or a value does not fit its type.
pub fn transcode(json: &[u8]) -> Option<Vec<u8>> {
    let mut out = Writer {
        out: Vec::with_capacity(json.len()),
    };
    write_object(json, &mut out)?;
    Some(out.out)
}

/// An object without its envelope, as items of lists are. None as for [`transcode`].
pub fn message(ty: &'static Type, json: &[u8]) -> Option<Vec<u8>> {
    let mut out = Writer {
        out: Vec::with_capacity(json.len()),
    };
    write_message(ty, json, &mut out)?;
    Some(out.out)
}

/// List is what stands around the items of a list, which follow one another between its head and [`List::TAIL`].
pub struct List {
    /// The envelope and the list's metadata.
    pub head: Vec<u8>,
    /// How long all of it is.
    pub length: usize,
    tag: u16,
}

impl List {
    pub const TAIL: &'static [u8] = b"\x1a\0\x22\0";

    /// Of metadata in JSON, and items that are as long as said. None as for [`transcode`].
    pub fn new(
        api_version: &str,
        list_kind: &str,
        metadata: &[u8],
        lengths: impl Iterator<Item = usize>,
    ) -> Option<Self> {
        let (group, version) = split_api_version(api_version);
        let ty = type_of(group, version, list_kind)?;
        let (about, listed) = (place(ty, "metadata")?, place(ty, "items")?);
        let FieldType::Ref(about_type) = about.ty else {
            return None;
        };
        let mut first = Writer::default();
        first.nested(about.tag, |out| {
            write_message(about_type.get(), metadata, out)
        })?;
        let items: usize = lengths
            .map(|length| Writer::bytes_length(listed.tag, length))
            .sum();
        let mut head = Writer::default();
        envelope(api_version, list_kind, &mut head);
        head.prefix(2, first.out.len() + items);
        head.out.extend_from_slice(&first.out);
        Some(Self {
            length: head.out.len() + items + Self::TAIL.len(),
            head: head.out,
            tag: listed.tag,
        })
    }

    /// Appends an item, which is a [`message`].
    pub fn write_item(&self, out: &mut Vec<u8>, item: &[u8]) {
        let mut writer = Writer {
            out: std::mem::take(out),
        };
        writer.bytes(self.tag, item);
        *out = writer.out;
    }
}

/// What says that protobuf follows, and of which kind it is.
fn envelope(api_version: &str, kind: &str, out: &mut Writer) {
    out.out.extend_from_slice(MAGIC);
    out.message(1, |meta| {
        meta.bytes(1, api_version.as_bytes());
        meta.bytes(2, kind.as_bytes());
    });
}

/// Frames is what stands around the objects of a kind in the events of a watch: four bytes of length (big endian), then a
/// `WatchEvent` {1: type, 2: RawExtension {1: object with its envelope}} without an envelope of its own.
pub struct Frames {
    envelope: Vec<u8>,
}

impl Frames {
    pub fn new(api_version: &str, kind: &str) -> Self {
        let mut out = Writer::default();
        envelope(api_version, kind, &mut out);
        Self { envelope: out.out }
    }

    /// Appends the event of an object, which is a [`message`]. None for one that is longer than a frame can be.
    pub fn write(&self, out: &mut Vec<u8>, event_type: &str, message: &[u8]) -> Option<()> {
        let object =
            self.envelope.len() + Writer::bytes_length(2, message.len()) + List::TAIL.len();
        let extension = Writer::bytes_length(1, object);
        let event = Writer::bytes_length(1, event_type.len()) + Writer::bytes_length(2, extension);
        let length = u32::try_from(event).ok()?;
        let mut frame = Writer {
            out: std::mem::take(out),
        };
        frame.out.extend_from_slice(&length.to_be_bytes());
        frame.bytes(1, event_type.as_bytes());
        frame.prefix(2, extension);
        frame.prefix(1, object);
        frame.out.extend_from_slice(&self.envelope);
        frame.bytes(2, message);
        frame.out.extend_from_slice(List::TAIL);
        *out = frame.out;
        Some(())
    }
}

/// One event of a watch, as [`Frames`] has it. None as for [`transcode`].
pub fn watch_frame(event_type: &str, json: &[u8]) -> Option<Vec<u8>> {
    let (head, ty) = typed(json)?;
    let mut frame = Vec::new();
    Frames::new(head.api_version, head.kind).write(&mut frame, event_type, &message(ty, json)?)?;
    Some(frame)
}

/// What an object says it is, and its type.
fn typed(json: &[u8]) -> Option<(Head<'_>, &'static Type)> {
    let head: Head<'_> = serde_json::from_slice(json).ok()?;
    let (group, version) = split_api_version(head.api_version);
    let ty = type_of(group, version, head.kind)?;
    Some((head, ty))
}

fn write_object(json: &[u8], out: &mut Writer) -> Option<()> {
    let (head, ty) = typed(json)?;
    envelope(head.api_version, head.kind, out);
    out.nested(2, |raw| write_message(ty, json, raw))?;
    out.out.extend_from_slice(List::TAIL);
    Some(())
}

fn write_message(ty: &'static Type, json: &[u8], out: &mut Writer) -> Option<()> {
    let mut json = serde_json::Deserializer::from_slice(json);
    Message { ty, out }.deserialize(&mut json).ok()
}

/// An object into the message of a struct.
struct Message<'w> {
    ty: &'static Type,
    out: &'w mut Writer,
}

/// Where a JSON field goes in a message: by which messages that JSON has inline, under which tag, as what.
struct Place {
    /// The tags of the inline messages, the innermost first; empty when the field is the message's own.
    within: Vec<u16>,
    tag: u16,
    ty: &'static FieldType,
    wrapped: bool,
}

fn place(ty: &'static Type, key: &str) -> Option<Place> {
    let at = ty.fields.binary_search_by(|field| field.name.cmp(key)).ok();
    let own = at.and_then(|at| {
        ty.wire.iter().find_map(|wire| match wire.to {
            Wire::Field(i) if usize::from(i) == at => Some((wire.tag, false)),
            Wire::Wrapped(i) if usize::from(i) == at => Some((wire.tag, true)),
            _ => None,
        })
    });
    if let (Some(at), Some((tag, wrapped))) = (at, own) {
        return Some(Place {
            within: Vec::new(),
            tag,
            ty: &ty.fields[at].ty,
            wrapped,
        });
    }
    ty.wire.iter().find_map(|wire| match wire.to {
        Wire::Inline(id) => place(id.get(), key).map(|mut place| {
            place.within.push(wire.tag);
            place
        }),
        _ => None,
    })
}

/// Messages that JSON has inline: their fields may stand anywhere, so they are gathered, and written at the end.
#[derive(Default)]
struct Gathered {
    fields: Writer,
    messages: Vec<(u16, Gathered)>,
}

impl Gathered {
    /// The message at the end of the tags, of which the last leads into the outermost.
    fn reach(&mut self, within: &[u16]) -> &mut Writer {
        let Some((tag, inner)) = within.split_last() else {
            return &mut self.fields;
        };
        let at = self.messages.iter().position(|(of, _)| of == tag);
        let at = at.unwrap_or_else(|| {
            self.messages.push((*tag, Self::default()));
            self.messages.len() - 1
        });
        self.messages[at].1.reach(inner)
    }

    fn write(&self, out: &mut Writer) {
        out.out.extend_from_slice(&self.fields.out);
        for (tag, message) in &self.messages {
            out.nested(*tag, |out| message.write(out));
        }
    }
}

impl<'de> DeserializeSeed<'de> for Message<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Message<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut gathered = Gathered::default();
        while let Some(place) = map.next_key_seed(FieldKey(self.ty))? {
            let Some(place) = place else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let out = match place.within.as_slice() {
                [] => &mut *self.out,
                within => gathered.reach(within),
            };
            map.next_value_seed(Content {
                ty: place.ty,
                tag: place.tag,
                wrapped: place.wrapped,
                out,
            })?;
        }
        gathered.write(self.out);
        Ok(())
    }
}

/// The key of a field of a type, read as the place that it leads to; None when it leads nowhere.
struct FieldKey(&'static Type);

impl<'de> DeserializeSeed<'de> for FieldKey {
    type Value = Option<Place>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for FieldKey {
    type Value = Option<Place>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<Self::Value, E> {
        Ok(place(self.0, key))
    }
}

/// The key of an entry of a map, written as such.
struct EntryKey<'w>(&'w mut Writer);

impl<'de> DeserializeSeed<'de> for EntryKey<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for EntryKey<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<(), E> {
        self.0.bytes(1, key.as_bytes());
        Ok(())
    }
}

/// A value of a field, written with its tag. Null writes nothing.
struct Content<'w> {
    ty: &'static FieldType,
    tag: u16,
    /// The list is inside a message of its own.
    wrapped: bool,
    out: &'w mut Writer,
}

impl<'de> DeserializeSeed<'de> for Content<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        let FieldType::Ref(id) = self.ty else {
            return json.deserialize_any(self);
        };
        let shape = id.get().shape;
        match shape {
            Shape::Struct
            | Shape::Time
            | Shape::MicroTime
            | Shape::Quantity
            | Shape::IntOrString => json.deserialize_any(self),
            Shape::RawExtension | Shape::FieldsV1 | Shape::Json => {
                let text = super::rewrite::text(json)?;
                if text != b"null" {
                    self.out.message(self.tag, |raw| raw.bytes(1, &text));
                }
                Ok(())
            }
            Shape::SchemaOrArray | Shape::SchemaOrBool | Shape::SchemaOrStringArray => {
                let value = serde_json::Value::deserialize(json)?;
                if value.is_null() {
                    return Ok(());
                }
                let ty = id.get();
                let written = self
                    .out
                    .nested(self.tag, |inner| write_special(&value, ty, inner));
                written.ok_or_else(|| D::Error::custom("a schema does not fit its type"))
            }
        }
    }
}

impl Content<'_> {
    fn shape(&self) -> Option<Shape> {
        match self.ty {
            FieldType::Ref(id) => Some(id.get().shape),
            _ => None,
        }
    }

    fn integer<E: Error>(self, n: i64) -> Result<(), E> {
        match (self.ty, self.shape()) {
            (FieldType::Int32 | FieldType::Int64, _) => {
                self.out.varint(self.tag, n.cast_unsigned())
            }
            (FieldType::Double, _) => self.out.double(self.tag, n as f64),
            (_, Some(Shape::IntOrString)) => self.out.message(self.tag, |inner| {
                inner.varint(1, 0);
                inner.varint(2, n.cast_unsigned());
                inner.bytes(3, b"");
            }),
            (_, Some(Shape::Quantity)) => self
                .out
                .message(self.tag, |inner| inner.bytes(1, n.to_string().as_bytes())),
            _ => return Err(E::custom("a number where none fits")),
        }
        Ok(())
    }
}

impl<'de> Visitor<'de> for Content<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a value of {:?}", self.ty)
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        match self.ty {
            FieldType::Bool => self.out.varint(self.tag, u64::from(value)),
            _ => return Err(E::custom("a boolean where none fits")),
        }
        Ok(())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        self.integer(value)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        let value = i64::try_from(value).map_err(E::custom)?;
        self.integer(value)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        match (self.ty, self.shape()) {
            (FieldType::Double, _) => self.out.double(self.tag, value),
            (_, Some(Shape::Quantity)) => self.out.message(self.tag, |inner| {
                inner.bytes(1, value.to_string().as_bytes());
            }),
            _ => return Err(E::custom("a fraction where none fits")),
        }
        Ok(())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        match (self.ty, self.shape()) {
            (FieldType::String, _) => self.out.bytes(self.tag, text.as_bytes()),
            (FieldType::Bytes, _) => {
                let bytes = STANDARD.decode(text).map_err(E::custom)?;
                self.out.bytes(self.tag, &bytes);
            }
            (_, Some(Shape::Quantity)) => {
                self.out
                    .message(self.tag, |inner| inner.bytes(1, text.as_bytes()));
            }
            (_, Some(Shape::IntOrString)) => self.out.message(self.tag, |inner| {
                inner.varint(1, 1);
                inner.varint(2, 0);
                inner.bytes(3, text.as_bytes());
            }),
            (_, Some(shape @ (Shape::Time | Shape::MicroTime))) => {
                let time = time::parse(text).ok_or_else(|| E::custom("not a time"))?;
                let nanos = match shape {
                    Shape::Time => 0,
                    _ => i64::from(time.subsec_nanosecond()),
                };
                self.out.message(self.tag, |inner| {
                    inner.varint(1, time.as_second().cast_unsigned());
                    inner.varint(2, nanos.cast_unsigned());
                });
            }
            _ => return Err(E::custom("a string where none fits")),
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let FieldType::List(inner) = self.ty else {
            return Err(A::Error::custom("a list where none fits"));
        };
        let mut write = |tag: u16, out: &mut Writer| {
            let item = Content {
                ty: inner,
                tag,
                wrapped: false,
                out,
            };
            items.next_element_seed(item)
        };
        if !self.wrapped {
            while write(self.tag, self.out)?.is_some() {}
            return Ok(());
        }
        self.out.nested(self.tag, |wrapper| {
            while write(1, wrapper)?.is_some() {}
            Ok(())
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        match self.ty {
            FieldType::Ref(id) if id.get().shape == Shape::Struct => self
                .out
                .nested(self.tag, |out| Message { ty: id.get(), out }.visit_map(map)),
            FieldType::Map(inner) => {
                let mut key = Writer::default();
                while map.next_key_seed(EntryKey(&mut key))?.is_some() {
                    self.out.nested(self.tag, |entry| {
                        entry.out.append(&mut key.out);
                        map.next_value_seed(Content {
                            ty: inner,
                            tag: 2,
                            wrapped: self.wrapped,
                            out: entry,
                        })
                    })?;
                }
                Ok(())
            }
            _ => Err(A::Error::custom("an object where none fits")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::protobuf;
    use super::*;

    #[test]
    fn messages_inside_messages_that_json_has_inline_are_gathered() {
        let policy = serde_json::json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
            "metadata": {}, "spec": {"matchConstraints": {"resourceRules": [
                {"operations": ["CREATE"], "resourceNames": ["x"], "apiGroups": [""], "resources": ["pods"], "scope": "*"}]}}});
        let bytes = transcode(policy.to_string().as_bytes()).expect("a known kind");
        assert_eq!(protobuf::decode(&bytes, "", ""), Ok(policy));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for json in [
            r#"{"kind":"Nothing","apiVersion":"v1"}"#,
            r#"{"apiVersion":"v1"}"#,
            r#"{"kind":"Pod","apiVersion":"v1","spec":[]}"#,
            r#"{"kind":"Pod","apiVersion":"v1","metadata":{"name":1}}"#,
            r#"{"kind":"Pod","apiVersion":"v1","#,
        ] {
            assert!(transcode(json.as_bytes()).is_none(), "{json}");
        }
    }
}
