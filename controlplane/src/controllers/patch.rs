//! Merge patches that turn one state of an object's part into another.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::object::Typed;
use super::plan::Action;
use super::pods::guarded_status_patch;

/// The merge patch (RFC 7396) that makes `new` of `old`; an empty object when they are equal.
pub fn difference(old: &Value, new: &Value) -> Value {
    let (Value::Object(old), Value::Object(new)) = (old, new) else {
        return new.clone();
    };
    let mut patch = Map::new();
    for (name, value) in new {
        match old.get(name) {
            Some(known) if known == value => {}
            Some(known @ Value::Object(_)) if value.is_object() => {
                patch.insert(name.clone(), difference(known, value));
            }
            _ => {
                patch.insert(name.clone(), value.clone());
            }
        }
    }
    for name in old.keys().filter(|name| !new.contains_key(*name)) {
        patch.insert(name.clone(), Value::Null);
    }
    Value::Object(patch)
}

/// The patch that replaces the status, None when there is nothing to change. It fails if the object has changed since it was
/// seen, so counts that build on their last value are right.
pub fn replace_status<K: Typed, S: Serialize>(
    object: &K,
    old: Option<&S>,
    new: &S,
) -> Option<Action> {
    let patch = difference(
        &old.map_or_else(|| json!({}), |old| json!(old)),
        &json!(new),
    );
    let changes = patch.as_object().is_some_and(|fields| !fields.is_empty());
    changes.then(|| guarded_status_patch(object, patch))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn documents() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(|it| json!(it)),
            (0..5).prop_map(|it| json!(it)),
            proptest::collection::vec(0..3, 0..3).prop_map(|it| json!(it)),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            proptest::collection::btree_map("[a-d]", inner, 0..4).prop_map(|it| json!(it))
        })
    }

    proptest! {
        #[test]
        fn applying_the_difference_gives_the_new_state(
            old in proptest::collection::btree_map("[a-d]", documents(), 0..4),
            new in proptest::collection::btree_map("[a-d]", documents(), 0..4),
        ) {
            let (old, new) = (json!(old), json!(new));
            let mut patched = old.clone();
            json_patch::merge(&mut patched, &difference(&old, &new));
            prop_assert_eq!(patched, new);
        }
    }
}
