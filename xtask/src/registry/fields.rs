//! Types with their JSON fields and protobuf tags, matched with each other.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Source, last_segment, strings};

pub const META_PREFIX: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";
/// Kinds of meta.k8s.io/v1 that the schemas leave out because no path of theirs is published.
pub const META_KINDS: &[&str] = &["PartialObjectMetadata", "PartialObjectMetadataList"];

/// Prefixes of definition names and of protobuf packages for the same thing.
const PACKAGES: &[(&str, &str)] = &[
    ("io.k8s.api.", "k8s.io.api."),
    ("io.k8s.apimachinery.", "k8s.io.apimachinery."),
    ("io.k8s.kube-aggregator.", "k8s.io.kube_aggregator."),
    (
        "io.k8s.apiextensions-apiserver.",
        "k8s.io.apiextensions_apiserver.",
    ),
];

/// Types whose JSON form is not their message's, by the last two segments of the name.
const SPECIAL: &[(&str, Shape)] = &[
    ("v1.Time", Shape::Time),
    ("v1.MicroTime", Shape::MicroTime),
    ("resource.Quantity", Shape::Quantity),
    ("intstr.IntOrString", Shape::IntOrString),
    ("runtime.RawExtension", Shape::RawExtension),
    ("v1.FieldsV1", Shape::FieldsV1),
    ("v1.JSON", Shape::Json),
    ("v1.JSONSchemaPropsOrArray", Shape::SchemaOrArray),
    ("v1.JSONSchemaPropsOrBool", Shape::SchemaOrBool),
    (
        "v1.JSONSchemaPropsOrStringArray",
        Shape::SchemaOrStringArray,
    ),
];

/// Fields that Kubernetes' Go types hold behind a pointer, where a zero therefore differs from absence: a fact that neither
/// the schemas nor the protobuf definitions tell. One type a line, then its fields.
const POINTERS: &str = include_str!("pointers.txt");

fn pointers() -> BTreeSet<(&'static str, &'static str)> {
    let lines = POINTERS.lines().filter_map(|line| line.split_once(": "));
    lines
        .flat_map(|(ty, fields)| fields.split(' ').map(move |field| (ty, field)))
        .collect()
}

/// Mirrors `registry::Shape`; its Debug form is what is generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Struct,
    Time,
    MicroTime,
    Quantity,
    IntOrString,
    RawExtension,
    FieldsV1,
    Json,
    SchemaOrArray,
    SchemaOrBool,
    SchemaOrStringArray,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Ty {
    String,
    Bytes,
    Bool,
    Int32,
    Int64,
    Double,
    Ref(String),
    List(Box<Ty>),
    Map(Box<Ty>),
}

impl Ty {
    pub fn render(&self, ids: &BTreeMap<&str, usize>) -> Result<String> {
        Ok(match self {
            Self::Ref(name) => {
                let id = ids
                    .get(name.as_str())
                    .with_context(|| format!("no type is named {name}"))?;
                format!("Ref(TypeId({id}))")
            }
            Self::List(inner) => format!("List(&{})", inner.render(ids)?),
            Self::Map(inner) => format!("Map(&{})", inner.render(ids)?),
            scalar => format!("{scalar:?}"),
        })
    }
}

#[derive(Debug)]
pub struct FieldRow {
    pub ty: Ty,
    required: bool,
    default: String,
    list_type: &'static str,
    list_keys: Vec<String>,
    atomic: Option<bool>,
    merge: bool,
    merge_key: String,
    retain_keys: bool,
    replace: bool,
    pointer: bool,
}

impl FieldRow {
    fn plain(ty: Ty) -> Self {
        Self {
            ty,
            required: false,
            default: String::new(),
            list_type: "",
            list_keys: Vec::new(),
            atomic: None,
            merge: false,
            merge_key: String::new(),
            retain_keys: false,
            replace: false,
            pointer: false,
        }
    }

    /// The chain of const methods that sets what is not the default.
    pub fn render_options(&self) -> String {
        let mut out = String::new();
        if self.required {
            out += ".required()";
        }
        if !self.default.is_empty() {
            out += &format!(".default({:?})", self.default);
        }
        match self.list_type {
            "set" => out += ".set()",
            "map" => out += &format!(".map(&{:?})", self.list_keys),
            _ => {}
        }
        if let Some(atomic) = self.atomic {
            out += &format!(".atomic({atomic})");
        }
        if self.merge {
            out += &format!(".merge({:?})", self.merge_key);
        }
        if self.retain_keys {
            out += ".retain_keys()";
        }
        if self.replace {
            out += ".replace()";
        }
        if self.pointer {
            out += ".pointer()";
        }
        out
    }
}

#[derive(Debug)]
pub enum WireRow {
    Field(String),
    Inline(String),
    Wrapped(String),
}

impl WireRow {
    pub fn render(&self, row: &TypeRow, ids: &BTreeMap<&str, usize>) -> Result<String> {
        let index = |name: &String| {
            row.fields
                .keys()
                .position(|f| f == name)
                .with_context(|| format!("no field {name}"))
        };
        Ok(match self {
            Self::Field(name) => format!("To({})", index(name)?),
            Self::Wrapped(name) => format!("Wrapped({})", index(name)?),
            Self::Inline(name) => format!("Inline(TypeId({}))", ids[name.as_str()]),
        })
    }
}

#[derive(Debug)]
pub struct TypeRow {
    pub shape: Shape,
    pub atomic: bool,
    pub fields: BTreeMap<String, FieldRow>,
    pub wire: BTreeMap<u64, WireRow>,
}

/// All types: every definition, and the messages that JSON has inline only.
pub fn collect(source: &Source) -> Result<BTreeMap<String, TypeRow>> {
    let mut types = BTreeMap::new();
    for (name, definition) in source
        .definitions
        .as_object()
        .context("definitions.json is not an object")?
    {
        let row = defined(source, name, definition).with_context(|| name.clone())?;
        types.insert(name.clone(), row);
    }
    let mut wanted: Vec<String> = META_KINDS
        .iter()
        .map(|k| format!("{META_PREFIX}{k}"))
        .collect();
    wanted.extend(types.values().flat_map(references));
    while let Some(name) = wanted.pop() {
        if types.contains_key(&name) {
            continue;
        }
        let row = message_only(source, &name).with_context(|| name.clone())?;
        wanted.extend(references(&row));
        types.insert(name, row);
    }
    for (ty, field) in pointers() {
        // The list may be of a newer version than the schemas.
        if let Some(field) = types.get_mut(ty).and_then(|row| row.fields.get_mut(field)) {
            field.pointer = true;
        }
    }
    Ok(types)
}

fn references(row: &TypeRow) -> Vec<String> {
    fn of(ty: &Ty, out: &mut Vec<String>) {
        match ty {
            Ty::Ref(name) => out.push(name.clone()),
            Ty::List(inner) | Ty::Map(inner) => of(inner, out),
            _ => {}
        }
    }
    let mut out = Vec::new();
    row.fields.values().for_each(|f| of(&f.ty, &mut out));
    out.extend(row.wire.values().filter_map(|w| {
        if let WireRow::Inline(name) = w {
            Some(name.clone())
        } else {
            None
        }
    }));
    out
}

fn shape(name: &str) -> Shape {
    let special = SPECIAL.iter().find(|(end, _)| {
        name.strip_suffix(end)
            .is_some_and(|rest| rest.ends_with('.'))
    });
    special.map_or(Shape::Struct, |(_, shape)| *shape)
}

/// A type that has a schema.
fn defined(source: &Source, name: &str, definition: &Value) -> Result<TypeRow> {
    let shape = shape(name);
    let required = strings(&definition["required"]);
    let mut fields = BTreeMap::new();
    for (field, schema) in definition["properties"].as_object().into_iter().flatten() {
        let row = field_row(schema, required.contains(field)).with_context(|| field.clone())?;
        fields.insert(field.clone(), row);
    }
    let mut row = TypeRow {
        shape,
        atomic: definition["x-kubernetes-map-type"] == "atomic",
        fields,
        wire: BTreeMap::new(),
    };
    if shape == Shape::Struct {
        row.wire = wire(source, &message_name(name), &row.fields)?;
    }
    Ok(row)
}

/// A type that only protobuf has: its message's fields, with the JSON types they must have.
fn message_only(source: &Source, name: &str) -> Result<TypeRow> {
    let package = message_name(name);
    let message = source.messages[&package]
        .as_object()
        .with_context(|| format!("no message {package}"))?;
    let mut fields = BTreeMap::new();
    for (field, entry) in message {
        fields.insert(
            field.clone(),
            FieldRow::plain(message_type(&package, entry)?),
        );
    }
    if META_KINDS.contains(&name.trim_start_matches(META_PREFIX)) {
        fields.insert("apiVersion".into(), FieldRow::plain(Ty::String));
        fields.insert("kind".into(), FieldRow::plain(Ty::String));
    }
    let wire = wire(source, &package, &fields)?;
    Ok(TypeRow {
        shape: Shape::Struct,
        atomic: false,
        fields,
        wire,
    })
}

fn field_row(schema: &Value, required: bool) -> Result<FieldRow> {
    let strategies: Vec<&str> = schema["x-kubernetes-patch-strategy"]
        .as_str()
        .unwrap_or_default()
        .split(',')
        .collect();
    for strategy in &strategies {
        if !["", "merge", "retainKeys", "replace"].contains(strategy) {
            bail!("patch strategy {strategy:?} is not known");
        }
    }
    let list_type = match schema["x-kubernetes-list-type"].as_str() {
        Some("set") => "set",
        Some("map") => "map",
        Some("atomic") | None => "",
        Some(other) => bail!("list type {other:?} is not known"),
    };
    let atomic = match schema["x-kubernetes-map-type"].as_str() {
        Some("atomic") => Some(true),
        Some("granular") => Some(false),
        None => None,
        Some(other) => bail!("map type {other:?} is not known"),
    };
    Ok(FieldRow {
        ty: schema_type(schema)?,
        required,
        default: schema
            .get("default")
            .map(Value::to_string)
            .unwrap_or_default(),
        list_type,
        list_keys: strings(&schema["x-kubernetes-list-map-keys"]),
        atomic,
        merge: strategies.contains(&"merge"),
        merge_key: schema["x-kubernetes-patch-merge-key"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        retain_keys: strategies.contains(&"retainKeys"),
        replace: strategies.contains(&"replace"),
        pointer: false,
    })
}

fn schema_type(schema: &Value) -> Result<Ty> {
    if let Some(reference) = schema["$ref"]
        .as_str()
        .or_else(|| schema["allOf"][0]["$ref"].as_str())
    {
        return Ok(Ty::Ref(last_segment(reference)?.to_owned()));
    }
    Ok(match (schema["type"].as_str(), schema["format"].as_str()) {
        (Some("string"), Some("byte")) => Ty::Bytes,
        (Some("string"), None) => Ty::String,
        (Some("boolean"), None) => Ty::Bool,
        (Some("integer"), Some("int32")) => Ty::Int32,
        (Some("integer"), Some("int64")) => Ty::Int64,
        (Some("number"), Some("double")) => Ty::Double,
        (Some("array"), None) => Ty::List(Box::new(schema_type(&schema["items"])?)),
        (Some("object"), None) => Ty::Map(Box::new(schema_type(&schema["additionalProperties"])?)),
        other => bail!("schema type {other:?} is not known"),
    })
}

fn message_name(definition: &str) -> String {
    for (ours, theirs) in PACKAGES {
        if let Some(rest) = definition.strip_prefix(ours) {
            return format!("{theirs}{rest}");
        }
    }
    definition.to_owned()
}

fn definition_name(message: &str) -> String {
    for (ours, theirs) in PACKAGES {
        if let Some(rest) = message.strip_prefix(theirs) {
            return format!("{ours}{rest}");
        }
    }
    message.to_owned()
}

/// The full name of a message type used in a package: `.a.b.C` is absolute, `C` is of the same package.
fn resolve(package: &str, ty: &str) -> String {
    match ty.strip_prefix('.') {
        Some(absolute) => absolute.to_owned(),
        None => format!(
            "{}.{ty}",
            package.rsplit_once('.').map_or("", |(parent, _)| parent)
        ),
    }
}

fn message_type(package: &str, entry: &Value) -> Result<Ty> {
    let ty = entry["type"].as_str().context("a field has no type")?;
    let single = |ty: &str| match ty {
        "string" => Ty::String,
        "bytes" => Ty::Bytes,
        "bool" => Ty::Bool,
        "int32" => Ty::Int32,
        "int64" => Ty::Int64,
        "double" => Ty::Double,
        message => Ty::Ref(definition_name(&resolve(package, message))),
    };
    if let Some(value) = ty
        .strip_prefix("map<string,")
        .and_then(|t| t.strip_suffix('>'))
    {
        return Ok(Ty::Map(Box::new(single(value))));
    }
    let single = single(ty);
    Ok(if entry["repeated"] == true {
        Ty::List(Box::new(single))
    } else {
        single
    })
}

/// Matches the fields of a message with those of the JSON object.
fn wire(
    source: &Source,
    message: &str,
    fields: &BTreeMap<String, FieldRow>,
) -> Result<BTreeMap<u64, WireRow>> {
    let mut wire = BTreeMap::new();
    for (name, entry) in source.messages[message].as_object().into_iter().flatten() {
        let tag = entry["tag"]
            .as_u64()
            .with_context(|| format!("{name} has no tag"))?;
        let ty = message_type(message, entry)?;
        // `Webhooks`, `uID`, `xKubernetesIntOrString`, `ref` are JSON's webhooks, uid, x-kubernetes-int-or-string, $ref.
        let plain = |s: &str| s.replace(['-', '$'], "").to_lowercase();
        let exact = fields.get_key_value(name.as_str());
        let field = exact.or_else(|| fields.iter().find(|(f, _)| plain(f) == plain(name)));
        let to = match field {
            Some((field, row)) if row.ty == ty => WireRow::Field(field.clone()),
            Some((field, row)) if is_wrapped(source, &row.ty, &ty) => {
                WireRow::Wrapped(field.clone())
            }
            Some((field, row)) => bail!("{field} is {:?} in JSON and {ty:?} in protobuf", row.ty),
            None => match ty {
                Ty::Ref(inner) => WireRow::Inline(inner),
                other => bail!("protobuf's {name} ({other:?}) is not in JSON"),
            },
        };
        wire.insert(tag, to);
    }
    Ok(wire)
}

/// Whether protobuf has a message with one repeated string `items` where JSON has a list of strings.
fn is_wrapped(source: &Source, json: &Ty, wire: &Ty) -> bool {
    match (json, wire) {
        (Ty::Map(json), Ty::Map(wire)) => is_wrapped(source, json, wire),
        (Ty::List(item), Ty::Ref(wrapper)) => {
            let message = &source.messages[&message_name(wrapper)];
            **item == Ty::String
                && message["items"]["repeated"] == true
                && message["items"]["tag"] == 1
        }
        _ => false,
    }
}
