//! Reading and writing fields of JSON objects by pointer ("/spec/nodeName"); absent and wrongly typed fields read as empty.

use serde_json::{Map, Value};

/// Access to the fields of an object by JSON pointer.
pub trait Fields {
    fn text(&self, pointer: &str) -> &str;
    fn int(&self, pointer: &str) -> i64;
    fn flag(&self, pointer: &str) -> bool;
    fn items(&self, pointer: &str) -> &[Value];
    fn object(&self, pointer: &str) -> Option<&Map<String, Value>>;
    fn has(&self, pointer: &str) -> bool;
    /// The mutable object at `pointer`, created (with its parents) when absent.
    fn object_mut(&mut self, pointer: &str) -> &mut Map<String, Value>;
    /// Mutable items of the array at `pointer`, none when absent.
    fn items_mut(&mut self, pointer: &str) -> &mut [Value];
    /// Sets a field unless it is there with a value that is not null.
    fn default(&mut self, pointer: &str, value: impl Into<Value>);
    fn set(&mut self, pointer: &str, value: impl Into<Value>);
    fn remove(&mut self, pointer: &str) -> Option<Value>;
}

impl Fields for Value {
    fn text(&self, pointer: &str) -> &str {
        at(self, pointer).and_then(Value::as_str).unwrap_or("")
    }

    fn int(&self, pointer: &str) -> i64 {
        at(self, pointer).and_then(Value::as_i64).unwrap_or(0)
    }

    fn flag(&self, pointer: &str) -> bool {
        at(self, pointer).and_then(Value::as_bool).unwrap_or(false)
    }

    fn items(&self, pointer: &str) -> &[Value] {
        at(self, pointer)
            .and_then(Value::as_array)
            .map_or(&[], Vec::as_slice)
    }

    fn object(&self, pointer: &str) -> Option<&Map<String, Value>> {
        at(self, pointer).and_then(Value::as_object)
    }

    fn has(&self, pointer: &str) -> bool {
        at(self, pointer).is_some_and(|value| !value.is_null())
    }

    fn object_mut(&mut self, pointer: &str) -> &mut Map<String, Value> {
        let mut at = self;
        for key in pointer.split('/').skip(1) {
            at = as_object(at)
                .entry(key)
                .or_insert_with(|| Value::Object(Map::new()));
        }
        as_object(at)
    }

    fn items_mut(&mut self, pointer: &str) -> &mut [Value] {
        at_mut(self, pointer)
            .and_then(Value::as_array_mut)
            .map_or(&mut [], Vec::as_mut_slice)
    }

    fn default(&mut self, pointer: &str, value: impl Into<Value>) {
        let value = value.into();
        // Go's empty text means the same as none.
        let empty = value.is_string() && at(self, pointer).and_then(Value::as_str) == Some("");
        if empty || !self.has(pointer) {
            self.set(pointer, value);
        }
    }

    fn set(&mut self, pointer: &str, value: impl Into<Value>) {
        let (parent, key) = pointer
            .rsplit_once('/')
            .expect("a pointer starts with a slash");
        self.object_mut(parent).insert(key.to_owned(), value.into());
    }

    fn remove(&mut self, pointer: &str) -> Option<Value> {
        let (parent, key) = pointer
            .rsplit_once('/')
            .expect("a pointer starts with a slash");
        at_mut(self, parent)?.as_object_mut()?.shift_remove(key)
    }
}

/// What [`Value::pointer`] gives: that makes two texts of each step, and most of what is done with an object are such steps.
fn at<'a>(value: &'a Value, pointer: &str) -> Option<&'a Value> {
    let Some(steps) = plain_steps(pointer) else {
        return value.pointer(pointer);
    };
    let mut at = value;
    for step in steps {
        at = match at {
            Value::Object(fields) => fields.get(step)?,
            Value::Array(items) => items.get(step.parse::<usize>().ok()?)?,
            _ => return None,
        };
    }
    Some(at)
}

fn at_mut<'a>(value: &'a mut Value, pointer: &str) -> Option<&'a mut Value> {
    let Some(steps) = plain_steps(pointer) else {
        return value.pointer_mut(pointer);
    };
    let mut at = value;
    for step in steps {
        at = match at {
            Value::Object(fields) => fields.get_mut(step)?,
            Value::Array(items) => items.get_mut(step.parse::<usize>().ok()?)?,
            _ => return None,
        };
    }
    Some(at)
}

/// The steps of a pointer in which nothing is escaped.
fn plain_steps(pointer: &str) -> Option<impl Iterator<Item = &str>> {
    let plain = pointer.starts_with('/') && !pointer.contains('~');
    plain.then(|| pointer[1..].split('/'))
}

/// `value` as an object; anything else becomes an empty one.
fn as_object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("it was just made an object")
}

/// The name of an object.
pub fn name(object: &Value) -> &str {
    object.text("/metadata/name")
}

/// The namespace of an object; empty for cluster-wide kinds.
pub fn namespace(object: &Value) -> &str {
    object.text("/metadata/namespace")
}

/// The present moment as the API writes it: RFC 3339, UTC, whole seconds.
pub fn now() -> String {
    timestamp(jiff::Timestamp::now())
}

/// A moment as the API writes it: RFC 3339, UTC, whole seconds.
pub fn timestamp(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pointers_lead_where_those_of_the_standard_lead() {
        let mut value = json!({"a": {"b": [1, {"c": "x"}], "d/e": 2, "": {"": 3}}, "t": "text"});
        for pointer in [
            "", "/", "a", "/a", "/a/b", "/a/b/0", "/a/b/1/c", "/a/b/2", "/a/b/x", "/a/d~1e",
            "/a/d/e", "/a//", "/t/0", "/t", "/none/b",
        ] {
            let expected = value.pointer(pointer).cloned();
            assert_eq!(at(&value, pointer), expected.as_ref(), "{pointer:?}");
            assert_eq!(
                at_mut(&mut value, pointer).cloned(),
                expected,
                "{pointer:?}"
            );
        }
    }
}
