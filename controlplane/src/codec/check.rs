//! The check of a document against the tables: types must fit, unknown and duplicate fields are found, nulls go, and
//! quantities and times take their canonical form.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::map::Entry;
use serde_json::{Map, Number, Value};

use super::node::{Document, Part};
use super::{quantity, time};
use crate::registry::{Field, FieldType, Shape, Type, Wire, type_named};

/// Faults that do not make the document unusable: what `fieldValidation` is about.
pub type StrictFaults = Vec<String>;

const SCHEMA: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";

/// The value of the document, with the strict faults found; Err is a mismatch of types, in the words of Go's decoder.
pub fn check<D: Document>(document: D, ty: &'static Type) -> Result<(Value, StrictFaults), String> {
    let mut checker = Checker::default();
    let value = checker
        .of_type(document, ty, &Path::START)?
        .unwrap_or_else(|| Value::Object(Map::new()));
    Ok((value, checker.faults))
}

/// Untyped documents can have duplicate fields only.
pub fn check_untyped<D: Document>(document: D) -> (Value, StrictFaults) {
    let mut checker = Checker::default();
    (checker.free(document, &Path::START), checker.faults)
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Field(&'a str),
    /// Of a struct, which Go may have in parts: its decoder names the part too.
    Member(&'static Type, &'a str),
    /// Of a map: Go's decoder names the map alone when the type of a value is wrong.
    Key(&'a str),
    Index(usize),
}

/// Where in the document the checker is: the last step, and the way there. Nothing is made of it but by a fault.
struct Path<'a> {
    last: Option<(&'a Path<'a>, Step<'a>)>,
}

impl Path<'_> {
    const START: Path<'static> = Path { last: None };

    fn to<'a>(&'a self, step: Step<'a>) -> Path<'a> {
        Path {
            last: Some((self, step)),
        }
    }

    fn steps(&self) -> Vec<Step<'_>> {
        let Some((before, step)) = self.last else {
            return Vec::new();
        };
        let mut steps = before.steps();
        steps.push(step);
        steps
    }

    /// The path with list indexes, as strict faults have it.
    fn strict(&self, last: &str) -> String {
        let mut out = String::new();
        for step in self.steps() {
            match step {
                Step::Field(name) | Step::Member(_, name) | Step::Key(name) => {
                    if !out.is_empty() {
                        out.push('.');
                    }
                    out += name;
                }
                Step::Index(i) => out += &format!("[{i}]"),
            }
        }
        if out.is_empty() {
            last.to_owned()
        } else {
            format!("{out}.{last}")
        }
    }
}

#[derive(Default)]
struct Checker {
    /// The innermost struct.
    owner: Option<&'static Type>,
    faults: StrictFaults,
}

impl Checker {
    fn mismatch(&self, what: &str, go_type: &str, at: &Path<'_>) -> String {
        let Some(owner) = self.owner else {
            return format!("json: cannot unmarshal {what} into Go value of type {go_type}");
        };
        let mut path: Vec<&str> = Vec::new();
        for step in at.steps() {
            match step {
                Step::Member(ty, name) => {
                    parts(ty, name, &mut path);
                    path.push(name);
                }
                Step::Field(name) => path.push(name),
                Step::Key(_) | Step::Index(_) => {}
            }
        }
        format!(
            "json: cannot unmarshal {what} into Go struct field {}.{} of type {go_type}",
            owner.short_name(),
            path.join(".")
        )
    }

    fn duplicate(&mut self, key: &str, at: &Path<'_>) {
        let fault = format!("duplicate field {:?}", at.strict(key));
        self.faults.push(fault);
    }

    /// Puts a member into a map; of one that is there twice, the last one counts.
    fn put(&mut self, out: &mut Map<String, Value>, key: String, value: Value, at: &Path<'_>) {
        match out.entry(key) {
            Entry::Vacant(free) => {
                free.insert(value);
            }
            Entry::Occupied(mut taken) => {
                self.duplicate(taken.key(), at);
                taken.insert(value);
            }
        }
    }

    /// None is null: absent.
    fn of_field_type<D: Document>(
        &mut self,
        document: D,
        ty: &'static FieldType,
        at: &Path<'_>,
    ) -> Result<Option<Value>, String> {
        if let FieldType::Ref(id) = ty {
            return self.of_type(document, id.get(), at);
        }
        Ok(Some(match (ty, document.open()) {
            (_, Part::Null) => return Ok(None),
            (FieldType::String, Part::String(s)) => Value::String(s),
            (FieldType::Bool, Part::Bool(b)) => Value::Bool(b),
            (FieldType::Int32, Part::Number(n))
                if n.as_i64().is_some_and(|i| i32::try_from(i).is_ok()) =>
            {
                Value::Number(n)
            }
            (FieldType::Int64, Part::Number(n)) if n.as_i64().is_some() => Value::Number(n),
            (FieldType::Double, Part::Number(n)) => Value::Number(n),
            (FieldType::Int32 | FieldType::Int64, Part::Number(n)) => {
                return Err(self.mismatch(&format!("number {n}"), &go_type(ty), at));
            }
            (FieldType::Bytes, Part::String(s)) => Value::String(bytes(&s)?),
            (FieldType::List(inner), Part::Array(items)) => {
                let mut out = Vec::with_capacity(items.len());
                for (i, item) in items.enumerate() {
                    let item = self.of_field_type(item, inner, &at.to(Step::Index(i)))?;
                    out.push(item.unwrap_or_else(|| zero(inner)));
                }
                Value::Array(out)
            }
            (FieldType::Map(inner), Part::Object(entries)) => {
                let mut out = Map::with_capacity(entries.len());
                for (key, value) in entries {
                    let value = self.of_field_type(value, inner, &at.to(Step::Key(&key)))?;
                    let value = value.unwrap_or_else(|| zero(inner));
                    self.put(&mut out, key, value, at);
                }
                Value::Object(out)
            }
            (ty, part) => return Err(self.mismatch(part.describe(), &go_type(ty), at)),
        }))
    }

    fn of_type<D: Document>(
        &mut self,
        document: D,
        ty: &'static Type,
        at: &Path<'_>,
    ) -> Result<Option<Value>, String> {
        if document.is_null() {
            return Ok(None);
        }
        match ty.shape {
            Shape::Struct => self.of_struct(document.open(), ty, at).map(Some),
            Shape::Time | Shape::MicroTime => {
                let text = match document.open() {
                    Part::String(text) => text,
                    part => return Err(self.mismatch(part.describe(), "string", at)),
                };
                let canonical = if ty.shape == Shape::Time {
                    time::seconds(&text)
                } else {
                    time::micros(&text)
                };
                let layout = "2006-01-02T15:04:05Z07:00";
                canonical.map(|t| Some(t.into())).ok_or_else(|| {
                    // Where Go's parser stops: at the year, when there is none.
                    let year = text.bytes().take(4).all(|byte| byte.is_ascii_digit());
                    let wanted = if year && text.len() >= 4 {
                        layout
                    } else {
                        "2006"
                    };
                    format!(
                        "parsing time {text:?} as {layout:?}: cannot parse {text:?} as {wanted:?}"
                    )
                })
            }
            Shape::Quantity => {
                let text = match document.open() {
                    Part::String(text) => text.trim().to_owned(),
                    Part::Number(n) => n.to_string(),
                    _ => return Err(quantity::INVALID.to_owned()),
                };
                quantity::canonical(&text)
                    .map(|q| Some(q.into()))
                    .ok_or_else(|| quantity::INVALID.to_owned())
            }
            Shape::IntOrString => match document.open() {
                Part::Number(n) if n.as_i64().is_some_and(|i| i32::try_from(i).is_ok()) => {
                    Ok(Some(Value::Number(n)))
                }
                Part::String(s) => Ok(Some(Value::String(s))),
                Part::Number(n) => Err(self.mismatch(&format!("number {n}"), "int32", at)),
                part => Err(self.mismatch(part.describe(), "int32", at)),
            },
            Shape::RawExtension | Shape::FieldsV1 | Shape::Json => {
                Ok(Some(self.free(document, at)))
            }
            Shape::SchemaOrArray | Shape::SchemaOrBool | Shape::SchemaOrStringArray => {
                self.schema_or(document.open(), ty, at).map(Some)
            }
        }
    }

    fn of_struct<D: Document>(
        &mut self,
        part: Part<D>,
        ty: &'static Type,
        at: &Path<'_>,
    ) -> Result<Value, String> {
        let entries = match part {
            Part::Object(entries) => entries,
            part => return Err(self.mismatch(part.describe(), &go_name(ty), at)),
        };
        let owner = self.owner.replace(ty);
        let mut out = Map::with_capacity(entries.len());
        let mut seen: Vec<&'static str> = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            let Some(field) = ty.field(&key) else {
                self.faults
                    .push(format!("unknown field {:?}", at.strict(&key)));
                continue;
            };
            if seen.contains(&field.name) {
                self.duplicate(&key, at);
            }
            seen.push(field.name);
            let value = self.of_field_type(value, &field.ty, &at.to(Step::Member(ty, &key)))?;
            match value.filter(|value| !is_left_out(value, field)) {
                Some(value) => {
                    out.insert(key, value);
                }
                // A later null takes back what an earlier duplicate said.
                None => {
                    out.shift_remove(&key);
                }
            }
        }
        self.owner = owner;
        Ok(Value::Object(out))
    }

    /// The alternatives of CRD schemas.
    fn schema_or<D: Document>(
        &mut self,
        part: Part<D>,
        ty: &'static Type,
        at: &Path<'_>,
    ) -> Result<Value, String> {
        let schema =
            type_named(SCHEMA).ok_or_else(|| "the tables have no CRD schemas".to_owned())?;
        match (ty.shape, part) {
            (Shape::SchemaOrBool, Part::Bool(b)) => Ok(Value::Bool(b)),
            (Shape::SchemaOrArray, Part::Array(items)) => {
                let checked = items.map(|item| self.of_struct(item.open(), schema, at));
                checked.collect::<Result<Vec<_>, _>>().map(Value::Array)
            }
            (Shape::SchemaOrStringArray, Part::Array(items)) => {
                let mut texts = Vec::with_capacity(items.len());
                for (i, item) in items.enumerate() {
                    let at = at.to(Step::Index(i));
                    let text = self.of_field_type(item, &FieldType::String, &at)?;
                    texts.push(text.unwrap_or_else(|| zero(&FieldType::String)));
                }
                Ok(Value::Array(texts))
            }
            (_, part) => self.of_struct(part, schema, at),
        }
    }

    /// A part without a type: only duplicates are looked for.
    fn free<D: Document>(&mut self, document: D, at: &Path<'_>) -> Value {
        let part = match document.without_duplicates() {
            Ok(value) => return value,
            Err(document) => document.open(),
        };
        match part {
            Part::Object(entries) => {
                let mut out = Map::with_capacity(entries.len());
                for (key, value) in entries {
                    let value = self.free(value, &at.to(Step::Field(&key)));
                    self.put(&mut out, key, value, at);
                }
                Value::Object(out)
            }
            Part::Array(items) => {
                let items = items.enumerate();
                let free = |(i, item)| self.free(item, &at.to(Step::Index(i)));
                Value::Array(items.map(free).collect())
            }
            Part::Null => Value::Null,
            Part::Bool(b) => Value::Bool(b),
            Part::Number(n) => Value::Number(n),
            Part::String(s) => Value::String(s),
        }
    }
}

/// Whether Go leaves a value out when it writes the object: the zero of a field that it does not hold behind a pointer. Kept, it
/// would be a difference to who reads the object and writes it back, and a new generation where nothing changes.
fn is_left_out(value: &Value, field: &Field) -> bool {
    if field.pointer || field.required {
        return false;
    }
    // The published schema has a zero for the default of what is written even so.
    let zero = match (&field.ty, value) {
        (FieldType::List(_), Value::Array(items)) => return items.is_empty(),
        (FieldType::Map(_), Value::Object(entries)) => return entries.is_empty(),
        (FieldType::String | FieldType::Bytes, Value::String(text)) if text.is_empty() => "\"\"",
        (FieldType::Bool, Value::Bool(false)) => "false",
        (FieldType::Int32 | FieldType::Int64 | FieldType::Double, Value::Number(number))
            if number.as_f64() == Some(0.0) =>
        {
            "0"
        }
        _ => return false,
    };
    zero != field.default
}

/// The parts of a struct that a field is in, the outermost first: what JSON has inline and Go embeds.
fn parts(ty: &'static Type, name: &str, path: &mut Vec<&str>) {
    let mut inline = ty.wire.iter().filter_map(|wire| match wire.to {
        Wire::Inline(id) => Some(id.get()),
        _ => None,
    });
    if let Some(part) = inline.find(|part| part.field(name).is_some()) {
        path.push(part.short_name());
        parts(part, name, path);
    }
}

fn bytes(text: &str) -> Result<String, String> {
    // Go ignores line breaks in base64.
    let text: String = text.chars().filter(|c| !matches!(c, '\n' | '\r')).collect();
    match STANDARD.decode(&text) {
        Ok(decoded) => Ok(STANDARD.encode(decoded)),
        Err(
            base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _),
        ) => Err(format!("illegal base64 data at input byte {at}")),
        // Go names the beginning of the group of four that is cut off.
        Err(_) => {
            let at = text.len() / 4 * 4;
            Err(format!("illegal base64 data at input byte {at}"))
        }
    }
}

/// What Go makes of null inside a list or map.
fn zero(ty: &FieldType) -> Value {
    match ty {
        FieldType::String | FieldType::Bytes => Value::String(String::new()),
        FieldType::Bool => Value::Bool(false),
        FieldType::Int32 | FieldType::Int64 | FieldType::Double => Value::Number(Number::from(0)),
        FieldType::List(_) => Value::Array(Vec::new()),
        FieldType::Map(_) => Value::Object(Map::new()),
        FieldType::Ref(id) => match id.get().shape {
            Shape::Quantity => Value::String("0".to_owned()),
            Shape::Struct => Value::Object(Map::new()),
            Shape::IntOrString => Value::Number(Number::from(0)),
            _ => Value::Null,
        },
    }
}

fn go_name(ty: &Type) -> String {
    let mut segments = ty.name.rsplit('.');
    let name = segments.next().unwrap_or_default();
    format!("{}.{name}", segments.next().unwrap_or_default())
}

fn go_type(ty: &FieldType) -> String {
    match ty {
        FieldType::String => "string".to_owned(),
        FieldType::Bytes => "[]uint8".to_owned(),
        FieldType::Bool => "bool".to_owned(),
        FieldType::Int32 => "int32".to_owned(),
        FieldType::Int64 => "int64".to_owned(),
        FieldType::Double => "float64".to_owned(),
        FieldType::Ref(id) => go_name(id.get()),
        FieldType::List(inner) => format!("[]{}", go_type(inner)),
        FieldType::Map(inner) => format!("map[string]{}", go_type(inner)),
    }
}
