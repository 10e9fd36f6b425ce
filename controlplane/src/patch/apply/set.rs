//! Sets of fields, as `fieldsV1` writes them: `{"f:spec": {"f:replicas": {}, "f:containers": {"k:{\"name\":\"a\"}": {".": {}}}}}`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Set is a tree of path elements; `member` says that the path itself belongs to the set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    pub member: bool,
    pub children: BTreeMap<String, Set>,
}

impl Set {
    pub fn leaf() -> Self {
        Self {
            member: true,
            children: BTreeMap::new(),
        }
    }

    pub fn is_empty(&self) -> bool {
        !self.member && self.children.values().all(Self::is_empty)
    }

    /// From `fieldsV1`.
    pub fn parse(fields: &Value) -> Self {
        let Value::Object(map) = fields else {
            return Self::default();
        };
        let mut set = Self {
            member: is_member(map),
            children: BTreeMap::new(),
        };
        for (element, value) in map {
            if element != "." {
                set.children.insert(element.clone(), Self::parse(value));
            }
        }
        set
    }

    /// To `fieldsV1`.
    pub fn render(&self) -> Value {
        let mut out = Map::new();
        if self.member && !self.children.is_empty() {
            out.insert(".".to_owned(), Value::Object(Map::new()));
        }
        for (element, child) in &self.children {
            out.insert(element.clone(), child.render());
        }
        Value::Object(out)
    }

    pub fn union(&mut self, other: &Self) {
        self.member |= other.member;
        for (element, child) in &other.children {
            self.children
                .entry(element.clone())
                .or_default()
                .union(child);
        }
    }

    /// Takes out what `other` has.
    pub fn subtract(&mut self, other: &Self) {
        self.member &= !other.member;
        for (element, child) in &other.children {
            if let Some(own) = self.children.get_mut(element) {
                own.subtract(child);
                if own.is_empty() {
                    self.children.remove(element);
                }
            }
        }
    }

    pub fn intersection(&self, other: &Self) -> Self {
        let mut out = Self {
            member: self.member && other.member,
            children: BTreeMap::new(),
        };
        for (element, child) in &self.children {
            if let Some(theirs) = other.children.get(element) {
                let both = child.intersection(theirs);
                if !both.is_empty() {
                    out.children.insert(element.clone(), both);
                }
            }
        }
        out
    }

    /// Whether `fieldsV1` has a member of this set. Nothing is made to find out, nor below.
    pub fn meets(&self, fields: &Value) -> bool {
        let Value::Object(map) = fields else {
            return false;
        };
        let mut children = self.children.iter();
        (self.member && is_member(map))
            || children.any(|(element, child)| {
                element != "." && map.get(element).is_some_and(|fields| child.meets(fields))
            })
    }

    /// Whether `fieldsV1` has all members of this set.
    pub fn is_within(&self, fields: &Value) -> bool {
        let Value::Object(map) = fields else {
            return self.is_empty();
        };
        let mut children = self.children.iter();
        (!self.member || is_member(map))
            && children.all(|(element, child)| {
                child.is_empty()
                    || map
                        .get(element)
                        .is_some_and(|fields| child.is_within(fields))
            })
    }

    /// The members as `.spec.containers[name="a"].image`.
    pub fn paths(&self) -> Vec<String> {
        fn walk(set: &Set, path: &str, out: &mut Vec<String>) {
            if set.member {
                out.push(path.to_owned());
            }
            for (element, child) in &set.children {
                walk(child, &format!("{path}{}", readable(element)), out);
            }
        }
        let mut out = Vec::new();
        walk(self, "", &mut out);
        out
    }
}

/// Whether `fieldsV1` says so of the path that it is at.
fn is_member(fields: &Map<String, Value>) -> bool {
    fields.is_empty() || fields.contains_key(".")
}

/// A path element as messages have it.
pub fn readable(element: &str) -> String {
    if let Some(name) = element.strip_prefix("f:") {
        return format!(".{name}");
    }
    if let Some(value) = element.strip_prefix("v:") {
        return format!("[={value}]");
    }
    let keys: Map<String, Value> = element
        .strip_prefix("k:")
        .and_then(|k| serde_json::from_str(k).ok())
        .unwrap_or_default();
    let keys: Vec<String> = keys
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    format!("[{}]", keys.join(","))
}
