//! Strategic merge patch: lists merge by the keys that the tables give, and directives delete, replace and order.

use serde_json::{Map, Value};

use super::PatchError;
use crate::registry::{Field, FieldType, Shape, Type};

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const ORDER: &str = "$setElementOrder/";

/// Strategic merge patch, by the merge keys of the tables.
pub fn strategic(target: &mut Value, patch: &Value, ty: &'static Type) -> Result<(), PatchError> {
    let Value::Object(patch) = patch else {
        return Err(PatchError::Invalid(
            "the patch must be an object".to_owned(),
        ));
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else {
        return Ok(());
    };
    merge_object(target, patch, Schema::Struct(ty))
}

/// Schema is what is known about an object's values.
#[derive(Clone, Copy)]
enum Schema {
    Struct(&'static Type),
    Map(&'static FieldType),
    /// No type: plain JSON merge.
    Unknown,
}

/// Slot is what is known about one value.
#[derive(Clone, Copy)]
struct Slot {
    ty: Option<&'static FieldType>,
    field: Option<&'static Field>,
}

impl Schema {
    fn slot(self, key: &str) -> Slot {
        match self {
            Self::Struct(ty) => {
                let field = ty.field(key);
                Slot {
                    ty: field.map(|f| &f.ty),
                    field,
                }
            }
            Self::Map(inner) => Slot {
                ty: Some(inner),
                field: None,
            },
            Self::Unknown => Slot {
                ty: None,
                field: None,
            },
        }
    }

    fn of(ty: Option<&'static FieldType>) -> Self {
        match ty {
            Some(FieldType::Ref(id)) if id.get().shape == Shape::Struct => Self::Struct(id.get()),
            Some(FieldType::Map(inner)) => Self::Map(inner),
            _ => Self::Unknown,
        }
    }
}

fn invalid(message: String) -> PatchError {
    PatchError::Invalid(message)
}

fn unknown(directive: &Value) -> PatchError {
    let shown = directive.as_str().map(str::to_owned);
    let shown = shown.unwrap_or_else(|| directive.to_string());
    invalid(format!("unknown patch type: {shown}"))
}

fn list<'a>(value: &'a Value, directive: &str) -> Result<&'a Vec<Value>, PatchError> {
    value
        .as_array()
        .ok_or_else(|| invalid(format!("{directive} must be a list")))
}

fn merge_object(
    target: &mut Map<String, Value>,
    patch: &Map<String, Value>,
    schema: Schema,
) -> Result<(), PatchError> {
    match patch.get(DIRECTIVE).map(Value::as_str) {
        None => {}
        Some(Some("replace")) => {
            target.clear();
            let rest = patch.iter().filter(|(key, _)| *key != DIRECTIVE);
            return merge_object(
                target,
                &rest.map(|(k, v)| (k.clone(), v.clone())).collect(),
                schema,
            );
        }
        Some(Some("delete")) => {
            target.clear();
            return Ok(());
        }
        Some(Some("merge")) => {}
        Some(_) => return Err(unknown(&patch[DIRECTIVE])),
    }
    if let Some(retained) = patch.get(RETAIN_KEYS) {
        retain_keys(target, patch, list(retained, RETAIN_KEYS)?)?;
    }
    for (key, value) in patch {
        if key == DIRECTIVE || key == RETAIN_KEYS {
            continue;
        }
        if let Some(name) = key.strip_prefix(DELETE_FROM) {
            let removed = list(value, key)?;
            if let Some(Value::Array(items)) = target.get_mut(name) {
                items.retain(|item| !removed.contains(item));
            }
            continue;
        }
        if let Some(name) = key.strip_prefix(ORDER) {
            // With the list itself in the patch, it is ordered when that is merged.
            if !patch.contains_key(name)
                && let Some(Value::Array(items)) = target.get_mut(name)
            {
                let merge_key = merge_key(schema.slot(name));
                order(items, &items.clone(), list(value, key)?, merge_key);
            }
            continue;
        }
        if value.is_null() {
            target.shift_remove(key);
            continue;
        }
        let slot = schema.slot(key);
        match value {
            Value::Object(object) => {
                if slot.field.is_some_and(|f| f.replace) && !object.contains_key(DIRECTIVE) {
                    target.insert(key.clone(), value.clone());
                    continue;
                }
                let entry = target
                    .entry(key.clone())
                    .or_insert_with(|| Value::Object(Map::new()));
                if !entry.is_object() {
                    *entry = Value::Object(Map::new());
                }
                if let Value::Object(entry) = entry {
                    merge_object(entry, object, Schema::of(slot.ty))?;
                }
                if object.get(DIRECTIVE).is_some_and(|d| d == "delete") {
                    target.shift_remove(key);
                }
            }
            Value::Array(items) if slot.field.is_some_and(|f| f.merge) => {
                let entry = target
                    .entry(key.clone())
                    .or_insert_with(|| Value::Array(Vec::new()));
                if !entry.is_array() {
                    *entry = Value::Array(Vec::new());
                }
                if let Value::Array(entry) = entry {
                    let before = entry.clone();
                    merge_list(entry, items, slot)?;
                    // Without an order of its own, a patch's items come in the order in which it names them.
                    let wanted = match patch.get(&format!("{ORDER}{key}")) {
                        Some(wanted) => list(wanted, ORDER)?,
                        None => items,
                    };
                    order(entry, &before, wanted, merge_key(slot));
                }
            }
            other => {
                target.insert(key.clone(), other.clone());
            }
        }
    }
    Ok(())
}

fn retain_keys(
    target: &mut Map<String, Value>,
    patch: &Map<String, Value>,
    retained: &[Value],
) -> Result<(), PatchError> {
    let kept = |key: &str| retained.iter().any(|k| k == key);
    let foreign = patch
        .iter()
        .find(|(key, value)| !key.starts_with('$') && !value.is_null() && !kept(key));
    if let Some((key, _)) = foreign {
        return Err(invalid(format!(
            "{RETAIN_KEYS} does not list {key:?}, which the patch sets"
        )));
    }
    target.retain(|key, _| kept(key));
    Ok(())
}

fn merge_key(slot: Slot) -> &'static str {
    slot.field.map_or("", |f| f.merge_key)
}

fn merge_list(target: &mut Vec<Value>, patch: &[Value], slot: Slot) -> Result<(), PatchError> {
    let key = merge_key(slot);
    if key.is_empty() {
        for item in patch {
            if !target.contains(item) {
                target.push(item.clone());
            }
        }
        return Ok(());
    }
    let item_schema = match slot.ty {
        Some(FieldType::List(inner)) => Schema::of(Some(inner)),
        _ => Schema::Unknown,
    };
    let directive = |item: &Value| {
        item.get(DIRECTIVE)
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    // `{$patch: replace}` among the items: the others are the whole new list, also where two have one key.
    if patch
        .iter()
        .any(|item| directive(item).as_deref() == Some("replace"))
    {
        let items = patch.iter().filter(|item| directive(item).is_none());
        *target = items.cloned().collect();
        return Ok(());
    }
    for item in patch {
        let Value::Object(object) = item else {
            return Err(invalid(format!(
                "an element of a list that merges by {key:?} is not an object"
            )));
        };
        let id = object.get(key);
        let position = |target: &[Value]| {
            target
                .iter()
                .position(|t| t.get(key).is_some() && t.get(key) == id)
        };
        match directive(item).as_deref() {
            Some("delete") => {
                let id = id.ok_or_else(|| missing(key))?;
                target.retain(|t| t.get(key) != Some(id));
                continue;
            }
            None | Some("merge") => {}
            Some(_) => return Err(unknown(&item[DIRECTIVE])),
        }
        if id.is_none() {
            return Err(missing(key));
        }
        let at = position(target).unwrap_or_else(|| {
            target.push(Value::Object(Map::new()));
            target.len() - 1
        });
        if let Value::Object(entry) = &mut target[at] {
            merge_object(entry, object, item_schema)?;
        }
    }
    Ok(())
}

fn missing(key: &str) -> PatchError {
    invalid(format!(
        "map: an element of the patch does not contain declared merge key: {key}"
    ))
}

/// Puts the items that `wanted` names into its order; the others keep their place relative to what surrounded them
/// `before` the patch.
fn order(items: &mut Vec<Value>, before: &[Value], wanted: &[Value], key: &str) {
    let id = |item: &Value| {
        if key.is_empty() {
            Some(item.clone())
        } else {
            item.get(key).cloned()
        }
    };
    let wanted_ids: Vec<Option<Value>> = wanted.iter().map(id).collect();
    let was = |item: &Value| before.iter().position(|b| id(b) == id(item));
    let (mut named, others): (Vec<Value>, Vec<Value>) = std::mem::take(items)
        .into_iter()
        .partition(|i| wanted_ids.contains(&id(i)));
    named.sort_by_key(|item| wanted_ids.iter().position(|w| *w == id(item)));
    let (mut named, mut others) = (named.into_iter().peekable(), others.into_iter().peekable());
    loop {
        let other_first = match (named.peek(), others.peek()) {
            (None, None) => return,
            (None, Some(_)) => true,
            (Some(_), None) => false,
            (Some(n), Some(o)) => matches!((was(n), was(o)), (Some(n), Some(o)) if o < n),
        };
        items.extend(if other_first {
            others.next()
        } else {
            named.next()
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::registry::type_of;

    fn patched(target: Value, patch: Value) -> Result<Value, PatchError> {
        let mut target = json!({"spec": {"template": {"spec": target}}});
        let patch = json!({"spec": {"template": {"spec": patch}}});
        strategic(
            &mut target,
            &patch,
            type_of("apps", "v1", "Deployment").unwrap(),
        )?;
        Ok(target["spec"]["template"]["spec"].take())
    }

    #[test]
    fn containers_merge_by_name_and_their_parts_by_theirs() {
        let target = json!({"containers": [
            {"name": "a", "image": "a:1", "env": [{"name": "X", "value": "1"}], "args": ["x", "y"]}, {"name": "b", "image": "b:1"}]});
        let patch = json!({"containers": [{"name": "a", "image": "a:2", "env": [{"name": "Y", "value": "2"}], "args": ["z"]}, {"name": "c"}]});
        assert_eq!(
            patched(target, patch).unwrap(),
            json!({"containers": [
                {"name": "a", "image": "a:2", "env": [{"name": "Y", "value": "2"}, {"name": "X", "value": "1"}], "args": ["z"]},
                {"name": "c"}, {"name": "b", "image": "b:1"}]})
        );
    }

    #[test]
    fn directives_delete_replace_and_order() {
        let target = || json!({"containers": [{"name": "a"}, {"name": "b"}, {"name": "c"}]});
        let names = |value: Value| -> Vec<String> {
            value["containers"]
                .as_array()
                .unwrap()
                .iter()
                .map(|c| c["name"].as_str().unwrap().to_owned())
                .collect()
        };
        let deleted = patched(
            target(),
            json!({"containers": [{"name": "b", "$patch": "delete"}]}),
        )
        .unwrap();
        assert_eq!(names(deleted), ["a", "c"]);
        let replaced = patched(
            target(),
            json!({"containers": [{"$patch": "replace"}, {"name": "z"}]}),
        )
        .unwrap();
        assert_eq!(names(replaced), ["z"]);
        // A node has two addresses of one type.
        let twins = json!({"containers": [{"name": "z"}, {"name": "z"}, {"$patch": "replace"}]});
        assert_eq!(names(patched(target(), twins).unwrap()), ["z", "z"]);
        let ordered = patched(
            target(),
            json!({"$setElementOrder/containers": [{"name": "d"}, {"name": "c"}, {"name": "a"}], "containers": [{"name": "d", "image": "d"}]}),
        );
        assert_eq!(names(ordered.unwrap()), ["d", "b", "c", "a"]);
        let only_order = patched(
            target(),
            json!({"$setElementOrder/containers": [{"name": "c"}, {"name": "b"}, {"name": "a"}]}),
        );
        assert_eq!(names(only_order.unwrap()), ["c", "b", "a"]);
        let gone = patched(
            json!({"securityContext": {"runAsUser": 1}}),
            json!({"securityContext": {"$patch": "delete"}}),
        )
        .unwrap();
        assert_eq!(gone, json!({}));
        let whole = patched(
            json!({"securityContext": {"runAsUser": 1}}),
            json!({"securityContext": {"$patch": "replace", "fsGroup": 2}}),
        );
        assert_eq!(whole.unwrap(), json!({"securityContext": {"fsGroup": 2}}));
    }

    #[test]
    fn retained_keys_drop_the_others() {
        let mut target = json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}});
        let patch = json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}});
        let deployment = type_of("apps", "v1", "Deployment").unwrap();
        strategic(&mut target, &patch, deployment).unwrap();
        assert_eq!(target["spec"]["strategy"], json!({"type": "Recreate"}));
        let wrong = json!({"spec": {"strategy": {"$retainKeys": ["type"], "rollingUpdate": {}}}});
        assert!(strategic(&mut target, &wrong, deployment).is_err());
        let volumes = json!({"volumes": [{"name": "v", "emptyDir": {}}]});
        let patch = json!({"volumes": [{"name": "v", "$retainKeys": ["name", "secret"], "secret": {"secretName": "s"}}]});
        assert_eq!(
            patched(volumes, patch).unwrap(),
            json!({"volumes": [{"name": "v", "secret": {"secretName": "s"}}]})
        );
    }

    #[test]
    fn primitive_lists_that_merge_are_unions_and_can_lose_elements() {
        let mut target = json!({"metadata": {"finalizers": ["a", "b"]}});
        let patch = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c", "b"],
            "$setElementOrder/finalizers": ["c", "b"]}});
        strategic(&mut target, &patch, type_of("", "v1", "Pod").unwrap()).unwrap();
        assert_eq!(target["metadata"]["finalizers"], json!(["c", "b"]));
    }

    #[test]
    fn nulls_delete_and_maps_merge() {
        let mut target = json!({"metadata": {"labels": {"a": "1", "b": "2"}}, "data": {"x": "1"}});
        let patch = json!({"metadata": {"labels": {"a": null, "c": "3"}, "annotations": {"n": null, "k": "v"}}, "data": null});
        strategic(&mut target, &patch, type_of("", "v1", "ConfigMap").unwrap()).unwrap();
        assert_eq!(
            target,
            json!({"metadata": {"labels": {"b": "2", "c": "3"}, "annotations": {"k": "v"}}})
        );
    }

    #[test]
    fn service_ports_merge_by_port_and_selectors_replace_where_the_tables_say_so() {
        let mut service = json!({"spec": {"ports": [{"port": 80, "targetPort": 1}, {"port": 81}]}});
        strategic(
            &mut service,
            &json!({"spec": {"ports": [{"port": 80, "targetPort": 2}]}}),
            type_of("", "v1", "Service").unwrap(),
        )
        .unwrap();
        assert_eq!(
            service["spec"]["ports"],
            json!([{"port": 80, "targetPort": 2}, {"port": 81}])
        );
        let mut budget = json!({"spec": {"selector": {"matchLabels": {"a": "1"}}}});
        let patch = json!({"spec": {"selector": {"matchLabels": {"b": "2"}}}});
        strategic(
            &mut budget,
            &patch,
            type_of("policy", "v1", "PodDisruptionBudget").unwrap(),
        )
        .unwrap();
        assert_eq!(
            budget["spec"]["selector"],
            json!({"matchLabels": {"b": "2"}})
        );
    }

    #[test]
    fn wrong_patches_are_refused() {
        for patch in [
            json!({"containers": [{"image": "x"}]}),
            json!({"containers": ["x"]}),
            json!({"containers": [{"name": "a", "$patch": "explode"}]}),
            json!({"$patch": "explode"}),
            json!({"$setElementOrder/containers": 3}),
            json!({"$retainKeys": "x"}),
        ] {
            assert!(
                matches!(
                    patched(json!({"containers": [{"name": "a"}]}), patch.clone()),
                    Err(PatchError::Invalid(_))
                ),
                "{patch}"
            );
        }
        let mut target = json!({});
        assert!(strategic(&mut target, &json!([]), type_of("", "v1", "Pod").unwrap()).is_err());
    }
}
