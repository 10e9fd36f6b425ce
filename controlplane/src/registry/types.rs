//! The shapes of the tables.

/// Resource is one REST resource of a group and version.
#[derive(Debug)]
pub struct Resource {
    /// "" for the core group.
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub plural: &'static str,
    pub singular: &'static str,
    pub short_names: &'static [&'static str],
    pub categories: &'static [&'static str],
    pub namespaced: bool,
    pub verbs: &'static [&'static str],
    pub subresources: &'static [Subresource],
    pub ty: TypeId,
}

impl Resource {
    /// `v1`, `apps/v1`.
    pub fn api_version(&self) -> String {
        super::api_version(self.group, self.version)
    }
    /// `deployments.apps`, `pods`: how messages name it.
    pub fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.plural.to_owned()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }
    pub fn subresource(&self, name: &str) -> Option<&'static Subresource> {
        self.subresources.iter().find(|s| s.name == name)
    }
}

/// Subresource is `/status`, `/scale`, `/log` and the like, with the kind it speaks.
#[derive(Debug)]
pub struct Subresource {
    pub name: &'static str,
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub verbs: &'static [&'static str],
}

/// TypeId is an index into the table of types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TypeId(pub u16);

impl TypeId {
    pub fn get(self) -> &'static Type {
        &super::generated::TYPES[usize::from(self.0)]
    }
}

/// Type is one definition: a struct with fields, or one of the types whose JSON form is special.
#[derive(Debug)]
pub struct Type {
    /// The definition's name, as `io.k8s.api.core.v1.Pod`.
    pub name: &'static str,
    pub shape: Shape,
    /// In order of the JSON name.
    pub fields: &'static [Field],
    /// Protobuf fields in order of the tag; empty for special shapes.
    pub wire: &'static [WireField],
    /// The struct is replaced as a whole by server-side apply.
    pub atomic: bool,
}

impl Type {
    pub fn field(&self, name: &str) -> Option<&'static Field> {
        let fields = self.fields;
        fields
            .binary_search_by(|f| f.name.cmp(name))
            .ok()
            .map(|i| &fields[i])
    }
    /// The last segment of the name: `Pod`.
    pub fn short_name(&self) -> &'static str {
        self.name.rsplit('.').next().unwrap_or(self.name)
    }
}

/// Shape is how a type looks in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// An object with `fields`.
    Struct,
    /// RFC 3339 with seconds.
    Time,
    /// RFC 3339 with microseconds.
    MicroTime,
    /// A decimal with a suffix, as string (or number, when read).
    Quantity,
    /// An integer or a string.
    IntOrString,
    /// `runtime.RawExtension`: an object of any kind.
    RawExtension,
    /// The field set of a managed-fields entry: an object of any shape.
    FieldsV1,
    /// Any JSON at all.
    Json,
    /// CRD schemas: a schema or an array of them.
    SchemaOrArray,
    /// CRD schemas: a schema or a boolean.
    SchemaOrBool,
    /// CRD schemas: a schema or an array of strings.
    SchemaOrStringArray,
}

/// FieldType is the JSON type of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldType {
    String,
    /// Base64 in JSON.
    Bytes,
    Bool,
    Int32,
    Int64,
    Double,
    Ref(TypeId),
    List(&'static FieldType),
    /// String keys.
    Map(&'static FieldType),
}

impl FieldType {
    /// The struct or special type at the end: of a list or map, that of its elements.
    pub fn target(&self) -> Option<&'static Type> {
        match self {
            Self::Ref(id) => Some(id.get()),
            Self::List(inner) | Self::Map(inner) => inner.target(),
            _ => None,
        }
    }
}

/// ListType says how server-side apply merges a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListType {
    Atomic,
    Set,
    /// Elements are told apart by `Field::list_keys`.
    Map,
}

/// Field is one field of a struct.
#[derive(Debug)]
pub struct Field {
    /// The JSON name.
    pub name: &'static str,
    pub ty: FieldType,
    /// Whether the published schema says the field is required (this is not validation).
    pub required: bool,
    /// The published schema's default as JSON, "" when none. Only a few are real defaults.
    pub default: &'static str,
    /// Meaningful for lists.
    pub list_type: ListType,
    pub list_keys: &'static [&'static str],
    /// Whether server-side apply replaces a map or struct as a whole; None: the type decides (`Type::atomic`), maps do not.
    pub atomic: Option<bool>,
    /// Strategic merge patch: lists merge (by `merge_key` when of structs) instead of being replaced.
    pub merge: bool,
    /// "" when none.
    pub merge_key: &'static str,
    /// Strategic merge patch: `retainKeys` strategy.
    pub retain_keys: bool,
    /// Strategic merge patch: a struct or map that is replaced as a whole.
    pub replace: bool,
    /// Go holds it behind a pointer: a zero is a value, not absence.
    pub pointer: bool,
}

/// WireField is one field of the protobuf message of a type.
#[derive(Debug)]
pub struct WireField {
    pub tag: u16,
    pub to: Wire,
}

/// Wire is where a protobuf field goes in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// `Type::fields[i]`, encoded by its type.
    Field(u16),
    /// A message whose fields JSON has inline.
    Inline(TypeId),
    /// `Type::fields[i]`, a list (or map to lists) that protobuf wraps in a message with one repeated field `items`.
    Wrapped(u16),
}
