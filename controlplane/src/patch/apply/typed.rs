//! Values walked by the tables: which fields differ, how applied ones merge in, how given-up ones go.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::set::Set;
use crate::registry::{Field, FieldType, ListType, Shape, Type};

/// Kind is how server-side apply treats a value.
#[derive(Clone, Copy)]
pub enum Kind {
    Struct(&'static Type),
    Map(&'static FieldType),
    /// A list of structs told apart by keys.
    Keyed(&'static Type, &'static [&'static str]),
    /// A list of scalars without order.
    Set,
    /// Owned and replaced as a whole.
    Atomic,
}

impl Kind {
    fn of_type(ty: &'static FieldType) -> Self {
        match ty {
            FieldType::Ref(id) if id.get().shape == Shape::Struct && !id.get().atomic => {
                Self::Struct(id.get())
            }
            FieldType::Map(inner) => Self::Map(inner),
            _ => Self::Atomic,
        }
    }

    fn of_field(field: &'static Field) -> Self {
        match (&field.ty, field.list_type) {
            (FieldType::Ref(id), _) if id.get().shape == Shape::Struct => {
                if field.atomic.unwrap_or(id.get().atomic) {
                    Self::Atomic
                } else {
                    Self::Struct(id.get())
                }
            }
            (FieldType::Map(inner), _) if field.atomic != Some(true) => Self::Map(inner),
            (FieldType::List(FieldType::Ref(id)), ListType::Map) => {
                Self::Keyed(id.get(), field.list_keys)
            }
            (FieldType::List(_), ListType::Set) => Self::Set,
            _ => Self::Atomic,
        }
    }

    fn of_child(self, name: &str) -> Self {
        match self {
            Self::Struct(ty) => ty.field(name).map_or(Self::Atomic, Self::of_field),
            Self::Map(inner) => Self::of_type(inner),
            _ => Self::Atomic,
        }
    }
}

/// The path element of a list's item: its keys as JSON, with the schema's defaults for those it leaves out.
fn element(item: &Value, ty: &'static Type, keys: &[&str]) -> String {
    let mut out = BTreeMap::new();
    for key in keys {
        let default = || {
            ty.field(key)
                .filter(|f| !f.default.is_empty())
                .and_then(|f| serde_json::from_str(f.default).ok())
        };
        if let Some(value) = item.get(key).cloned().or_else(default) {
            out.insert(*key, value);
        }
    }
    format!(
        "k:{}",
        Value::Object(
            out.into_iter()
                .map(|(k, v)| (k.to_owned(), v))
                .collect::<Map<_, _>>()
        )
    )
}

/// The fields of `new` that `old` does not have with the same value. With no `old`: all fields.
pub fn changed(old: Option<&Value>, new: &Value, kind: Kind) -> Set {
    differing(new, old, kind, |_, _| true)
}

/// The fields of `old` that `new` does not have, whatever their values. With no `new`: all fields.
pub fn gone(old: &Value, new: Option<&Value>, kind: Kind) -> Set {
    differing(old, new, kind, |new, kind| {
        new.is_none_or(|new| has_parts(new, kind))
    })
}

/// The fields of `value` in which it differs from `other`; of those that have no parts and differ, the ones that `counts` says, told
/// what the other has there.
fn differing(
    value: &Value,
    other: Option<&Value>,
    kind: Kind,
    counts: fn(Option<&Value>, Kind) -> bool,
) -> Set {
    let mut out = Set::default();
    if other == Some(value) {
        return out;
    }
    match (kind, value) {
        (Kind::Struct(_) | Kind::Map(_), Value::Object(object)) if !object.is_empty() => {
            for (name, value) in object {
                let other = other.and_then(|other| other.get(name));
                let child = differing(value, other, kind.of_child(name), counts);
                if !child.is_empty() {
                    out.children.insert(format!("f:{name}"), child);
                }
            }
        }
        (Kind::Keyed(ty, keys), Value::Array(items)) if !items.is_empty() => {
            for item in items {
                let id = element(item, ty, keys);
                let other = find(other, &id, ty, keys);
                let mut child = differing(item, other, Kind::Struct(ty), counts);
                child.member = other.is_none();
                if !child.is_empty() {
                    out.children.insert(id, child);
                }
            }
        }
        (Kind::Set, Value::Array(items)) if !items.is_empty() => {
            let others = other.and_then(Value::as_array);
            for item in items {
                if !others.is_some_and(|others| others.contains(item)) {
                    out.children.insert(format!("v:{item}"), Set::leaf());
                }
            }
        }
        _ => out.member = counts(other, kind),
    }
    out
}

/// Whether a value is owned part by part, not as a whole.
fn has_parts(value: &Value, kind: Kind) -> bool {
    match (kind, value) {
        (Kind::Struct(_) | Kind::Map(_), Value::Object(object)) => !object.is_empty(),
        (Kind::Keyed(..) | Kind::Set, Value::Array(items)) => !items.is_empty(),
        _ => false,
    }
}

/// Where a list has two items with the same keys, which nobody could tell apart.
pub fn duplicate(value: &Value, kind: Kind, path: &str) -> Option<String> {
    match (kind, value) {
        (Kind::Struct(_) | Kind::Map(_), Value::Object(object)) => {
            object.iter().find_map(|(name, value)| {
                duplicate(value, kind.of_child(name), &format!("{path}.{name}"))
            })
        }
        (Kind::Keyed(ty, keys), Value::Array(items)) => {
            let mut seen = std::collections::BTreeSet::new();
            items.iter().find_map(|item| {
                let id = element(item, ty, keys);
                let readable = super::set::readable(&id);
                if !seen.insert(id) {
                    return Some(format!("{path}: duplicate entries for key {readable}"));
                }
                duplicate(item, Kind::Struct(ty), &format!("{path}{readable}"))
            })
        }
        (Kind::Set, Value::Array(items)) => items.iter().enumerate().find_map(|(at, item)| {
            let twice = items[..at].contains(item);
            twice.then(|| format!("{path}: duplicate entries for key [={item}]"))
        }),
        _ => None,
    }
}

fn find<'a>(
    list: Option<&'a Value>,
    id: &str,
    ty: &'static Type,
    keys: &[&str],
) -> Option<&'a Value> {
    list?
        .as_array()?
        .iter()
        .find(|item| element(item, ty, keys) == id)
}

/// Merges what is applied into the live value.
pub fn merge(live: &mut Value, applied: &Value, kind: Kind) {
    match (kind, &mut *live, applied) {
        (Kind::Struct(_) | Kind::Map(_), Value::Object(live), Value::Object(applied)) => {
            for (name, value) in applied {
                match live.get_mut(name) {
                    Some(present) => merge(present, value, kind.of_child(name)),
                    None => {
                        live.insert(name.clone(), value.clone());
                    }
                }
            }
        }
        (Kind::Keyed(ty, keys), Value::Array(live), Value::Array(applied)) => {
            for item in applied {
                let id = element(item, ty, keys);
                match live
                    .iter_mut()
                    .find(|present| element(present, ty, keys) == id)
                {
                    Some(present) => merge(present, item, Kind::Struct(ty)),
                    None => live.push(item.clone()),
                }
            }
        }
        (Kind::Set, Value::Array(live), Value::Array(applied)) => {
            for item in applied {
                if !live.contains(item) {
                    live.push(item.clone());
                }
            }
        }
        _ => *live = applied.clone(),
    }
}

/// Takes the members of `gone` out of the value. An object or list that becomes empty by it goes as well, unless one of `kept`
/// has it as it is then: empty.
pub fn remove(value: &mut Value, gone: &Set, kept: &[&Set], kind: Kind) {
    let within = |path: &String| -> Vec<&Set> {
        kept.iter()
            .filter_map(|set| set.children.get(path))
            .collect()
    };
    match (kind, value) {
        (Kind::Struct(_) | Kind::Map(_), Value::Object(object)) => {
            for (path, child) in &gone.children {
                let Some(name) = path.strip_prefix("f:") else {
                    continue;
                };
                let Some(inner) = object.get_mut(name) else {
                    continue;
                };
                let kept = within(path);
                remove(inner, child, &kept, kind.of_child(name));
                let wanted_empty = kept.iter().any(|set| set.member);
                let emptied = !child.children.is_empty() && is_empty(inner) && !wanted_empty;
                if (child.member && child.children.is_empty()) || emptied {
                    object.shift_remove(name);
                }
            }
        }
        (Kind::Keyed(ty, keys), Value::Array(items)) => items.retain_mut(|item| {
            let id = element(item, ty, keys);
            let Some(child) = gone.children.get(&id) else {
                return true;
            };
            if child.member {
                return false;
            }
            remove(item, child, &within(&id), Kind::Struct(ty));
            true
        }),
        (Kind::Set, Value::Array(items)) => {
            items.retain(|item| !gone.children.contains_key(&format!("v:{item}")))
        }
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Object(object) => object.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}
