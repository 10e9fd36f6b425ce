//! A parsed JSON or YAML document before it is checked: unlike `serde_json::Value`, it keeps duplicate keys.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

#[derive(Clone, Debug)]
pub enum Node {
    Null,
    Bool(bool),
    Number(Number),
    String(String),
    Array(Vec<Node>),
    Object(Vec<(String, Node)>),
}

/// What is checked: a parsed document, or a value that was one before.
pub trait Document: Sized {
    type Items: ExactSizeIterator<Item = Self>;
    type Entries: ExactSizeIterator<Item = (String, Self)>;

    fn open(self) -> Part<Self>;

    fn is_null(&self) -> bool;

    fn is_object(&self) -> bool;

    /// The string at a key of an object.
    fn text(&self, key: &str) -> Option<&str>;

    /// As a value, when it can have no key twice.
    fn without_duplicates(self) -> Result<Value, Self>;
}

/// One level of a document.
pub enum Part<D: Document> {
    Null,
    Bool(bool),
    Number(Number),
    String(String),
    Array(D::Items),
    Object(D::Entries),
}

impl<D: Document> Part<D> {
    /// How Go's decoder names the value in a message.
    pub fn describe(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "bool",
            Self::Number(_) => "number",
            Self::String(_) => "string",
            Self::Array(_) => "array",
            Self::Object(_) => "object",
        }
    }
}

impl Document for Node {
    type Items = std::vec::IntoIter<Self>;
    type Entries = std::vec::IntoIter<(String, Self)>;

    fn open(self) -> Part<Self> {
        match self {
            Self::Null => Part::Null,
            Self::Bool(b) => Part::Bool(b),
            Self::Number(n) => Part::Number(n),
            Self::String(s) => Part::String(s),
            Self::Array(items) => Part::Array(items.into_iter()),
            Self::Object(entries) => Part::Object(entries.into_iter()),
        }
    }

    fn is_null(&self) -> bool {
        matches!(self, Self::Null)
    }

    fn is_object(&self) -> bool {
        matches!(self, Self::Object(_))
    }

    fn text(&self, key: &str) -> Option<&str> {
        let Self::Object(entries) = self else {
            return None;
        };
        let (_, value) = entries.iter().rev().find(|(k, _)| k == key)?;
        if let Self::String(text) = value {
            Some(text)
        } else {
            None
        }
    }

    fn without_duplicates(self) -> Result<Value, Self> {
        Err(self)
    }
}

impl Document for Value {
    type Items = std::vec::IntoIter<Self>;
    type Entries = serde_json::map::IntoIter;

    fn open(self) -> Part<Self> {
        match self {
            Self::Null => Part::Null,
            Self::Bool(b) => Part::Bool(b),
            Self::Number(n) => Part::Number(n),
            Self::String(s) => Part::String(s),
            Self::Array(items) => Part::Array(items.into_iter()),
            Self::Object(entries) => Part::Object(entries.into_iter()),
        }
    }

    fn is_null(&self) -> bool {
        Self::is_null(self)
    }

    fn is_object(&self) -> bool {
        Self::is_object(self)
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    fn without_duplicates(self) -> Result<Value, Self> {
        Ok(self)
    }
}

impl Node {
    /// As a value; of duplicate keys, the last one counts.
    pub fn into_value(self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Bool(b) => Value::Bool(b),
            Self::Number(n) => Value::Number(n),
            Self::String(s) => Value::String(s),
            Self::Array(items) => items.into_iter().map(Self::into_value).collect(),
            Self::Object(entries) => Value::Object(
                entries
                    .into_iter()
                    .map(|(k, v)| (k, v.into_value()))
                    .collect::<Map<_, _>>(),
            ),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }
    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Number(value.into()))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Number(value.into()))
    }
    fn visit_f64<E: Error>(self, value: f64) -> Result<Node, E> {
        Number::from_f64(value)
            .map(Node::Number)
            .ok_or_else(|| E::custom("a number must be finite"))
    }
    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::String(value.to_owned()))
    }
    fn visit_string<E>(self, value: String) -> Result<Node, E> {
        Ok(Node::String(value))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Node::Array(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = access.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Object(entries))
    }
}
