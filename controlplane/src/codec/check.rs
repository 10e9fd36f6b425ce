//! The check of a document against the tables: types must fit, unknown and duplicate fields are found, nulls go, and
//! quantities and times take their canonical form.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Number, Value};

use super::node::Node;
use super::{quantity, time};
use crate::registry::{Field, FieldType, Shape, Type, Wire, type_named};

/// Faults that do not make the document unusable: what `fieldValidation` is about.
pub type StrictFaults = Vec<String>;

const SCHEMA: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";

/// The value of the document, with the strict faults found; Err is a mismatch of types, in the words of Go's decoder.
pub fn check(node: Node, ty: &'static Type) -> Result<(Value, StrictFaults), String> {
    let mut checker = Checker {
        path: Vec::new(),
        owner: None,
        faults: Vec::new(),
    };
    let value = checker
        .of_type(node, ty)?
        .unwrap_or_else(|| Value::Object(Map::new()));
    Ok((value, checker.faults))
}

/// Untyped documents can have duplicate fields only.
pub fn check_untyped(node: Node) -> (Value, StrictFaults) {
    let mut checker = Checker {
        path: Vec::new(),
        owner: None,
        faults: Vec::new(),
    };
    (checker.free(node), checker.faults)
}

enum Step {
    Field(String),
    /// Of a struct, which Go may have in parts: its decoder names the part too.
    Member(&'static Type, String),
    /// Of a map: Go's decoder names the map alone when the type of a value is wrong.
    Key(String),
    Index(usize),
}

struct Checker {
    path: Vec<Step>,
    /// The innermost struct.
    owner: Option<&'static Type>,
    faults: StrictFaults,
}

impl Checker {
    /// The path with list indexes, as strict faults have it.
    fn strict_path(&self, last: &str) -> String {
        let mut out = String::new();
        for step in &self.path {
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

    fn mismatch(&self, what: &str, go_type: &str) -> String {
        let Some(owner) = self.owner else {
            return format!("json: cannot unmarshal {what} into Go value of type {go_type}");
        };
        let mut path: Vec<&str> = Vec::new();
        for step in &self.path {
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

    /// None is null: absent.
    fn of_field_type(
        &mut self,
        node: Node,
        ty: &'static FieldType,
    ) -> Result<Option<Value>, String> {
        if let FieldType::Ref(id) = ty {
            return self.of_type(node, id.get());
        }
        Ok(Some(match (ty, node) {
            (_, Node::Null) => return Ok(None),
            (FieldType::String, Node::String(s)) => Value::String(s),
            (FieldType::Bool, Node::Bool(b)) => Value::Bool(b),
            (FieldType::Int32, Node::Number(n))
                if n.as_i64().is_some_and(|i| i32::try_from(i).is_ok()) =>
            {
                Value::Number(n)
            }
            (FieldType::Int64, Node::Number(n)) if n.as_i64().is_some() => Value::Number(n),
            (FieldType::Double, Node::Number(n)) => Value::Number(n),
            (FieldType::Int32 | FieldType::Int64, Node::Number(n)) => {
                return Err(self.mismatch(&format!("number {n}"), &go_type(ty)));
            }
            (FieldType::Bytes, Node::String(s)) => Value::String(bytes(&s)?),
            (FieldType::List(inner), Node::Array(items)) => {
                let mut out = Vec::with_capacity(items.len());
                for (i, item) in items.into_iter().enumerate() {
                    self.path.push(Step::Index(i));
                    out.push(
                        self.of_field_type(item, inner)?
                            .unwrap_or_else(|| zero(inner)),
                    );
                    self.path.pop();
                }
                Value::Array(out)
            }
            (FieldType::Map(inner), Node::Object(entries)) => {
                let mut out = Map::with_capacity(entries.len());
                for (key, value) in entries {
                    self.path.push(Step::Key(key.clone()));
                    let value = self
                        .of_field_type(value, inner)?
                        .unwrap_or_else(|| zero(inner));
                    self.path.pop();
                    if out.insert(key.clone(), value).is_some() {
                        self.faults
                            .push(format!("duplicate field {:?}", self.strict_path(&key)));
                    }
                }
                Value::Object(out)
            }
            (ty, node) => return Err(self.mismatch(&node.describe(), &go_type(ty))),
        }))
    }

    fn of_type(&mut self, node: Node, ty: &'static Type) -> Result<Option<Value>, String> {
        if matches!(node, Node::Null) {
            return Ok(None);
        }
        match ty.shape {
            Shape::Struct => self.of_struct(node, ty).map(Some),
            Shape::Time | Shape::MicroTime => {
                let Node::String(text) = node else {
                    return Err(self.mismatch(&node.describe(), "string"));
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
                let text = match node {
                    Node::String(text) => text.trim().to_owned(),
                    Node::Number(n) => n.to_string(),
                    _ => return Err(quantity::INVALID.to_owned()),
                };
                quantity::canonical(&text)
                    .map(|q| Some(q.into()))
                    .ok_or_else(|| quantity::INVALID.to_owned())
            }
            Shape::IntOrString => match node {
                Node::Number(n) if n.as_i64().is_some_and(|i| i32::try_from(i).is_ok()) => {
                    Ok(Some(Value::Number(n)))
                }
                Node::String(s) => Ok(Some(Value::String(s))),
                Node::Number(n) => Err(self.mismatch(&format!("number {n}"), "int32")),
                node => Err(self.mismatch(&node.describe(), "int32")),
            },
            Shape::RawExtension | Shape::FieldsV1 | Shape::Json => Ok(Some(self.free(node))),
            Shape::SchemaOrArray | Shape::SchemaOrBool | Shape::SchemaOrStringArray => {
                self.schema_or(node, ty).map(Some)
            }
        }
    }

    fn of_struct(&mut self, node: Node, ty: &'static Type) -> Result<Value, String> {
        let Node::Object(entries) = node else {
            return Err(self.mismatch(&node.describe(), &go_name(ty)));
        };
        let owner = self.owner.replace(ty);
        let mut out = Map::with_capacity(entries.len());
        let mut seen: Vec<&'static str> = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            let Some(field) = ty.field(&key) else {
                self.faults
                    .push(format!("unknown field {:?}", self.strict_path(&key)));
                continue;
            };
            if seen.contains(&field.name) {
                self.faults
                    .push(format!("duplicate field {:?}", self.strict_path(&key)));
            }
            seen.push(field.name);
            self.path.push(Step::Member(ty, key.clone()));
            let value = self.of_field_type(value, &field.ty)?;
            self.path.pop();
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
    fn schema_or(&mut self, node: Node, ty: &'static Type) -> Result<Value, String> {
        let schema =
            type_named(SCHEMA).ok_or_else(|| "the tables have no CRD schemas".to_owned())?;
        match (ty.shape, node) {
            (Shape::SchemaOrBool, Node::Bool(b)) => Ok(Value::Bool(b)),
            (Shape::SchemaOrArray, Node::Array(items)) => {
                let checked = items.into_iter().map(|item| self.of_struct(item, schema));
                checked.collect::<Result<Vec<_>, _>>().map(Value::Array)
            }
            (Shape::SchemaOrStringArray, node @ Node::Array(_)) => {
                static STRINGS: FieldType = FieldType::List(&FieldType::String);
                Ok(self.of_field_type(node, &STRINGS)?.unwrap_or_default())
            }
            (_, node) => self.of_struct(node, schema),
        }
    }

    /// A part without a type: only duplicates are looked for.
    fn free(&mut self, node: Node) -> Value {
        match node {
            Node::Object(entries) => {
                let mut out = Map::with_capacity(entries.len());
                for (key, value) in entries {
                    self.path.push(Step::Field(key.clone()));
                    let value = self.free(value);
                    self.path.pop();
                    if out.insert(key.clone(), value).is_some() {
                        self.faults
                            .push(format!("duplicate field {:?}", self.strict_path(&key)));
                    }
                }
                Value::Object(out)
            }
            Node::Array(items) => {
                let mut out = Vec::with_capacity(items.len());
                for (i, item) in items.into_iter().enumerate() {
                    self.path.push(Step::Index(i));
                    out.push(self.free(item));
                    self.path.pop();
                }
                Value::Array(out)
            }
            scalar => scalar.into_value(),
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
