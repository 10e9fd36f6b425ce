//! Server-side apply: who manages which field, and what an apply by one of them means.

mod client_side;
mod set;
mod typed;

use serde_json::{Map, Value, json};

use super::PatchError;
use crate::registry::Type;
use set::Set;
use typed::Kind;

/// Manager is who writes, for managedFields.
#[derive(Clone, Copy, Debug)]
pub struct Manager<'a> {
    pub name: &'a str,
    /// "" or `status`, `scale`, ...
    pub subresource: &'a str,
    /// RFC 3339, seconds.
    pub now: &'a str,
}

/// FieldConflict is one field that another manager owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldConflict {
    /// As messages name it: `"kubectl-edit" using apps/v1`.
    pub manager: String,
    /// As `.spec.replicas`.
    pub field: String,
}

/// The wording of the API server, which kubectl shows.
pub(super) fn conflict_message(conflicts: &[FieldConflict]) -> String {
    let mut managers: Vec<&str> = Vec::new();
    for conflict in conflicts {
        if !managers.contains(&conflict.manager.as_str()) {
            managers.push(&conflict.manager);
        }
    }
    let mut lines = Vec::new();
    for manager in managers {
        let fields: Vec<&str> = conflicts
            .iter()
            .filter(|c| c.manager == manager)
            .map(|c| c.field.as_str())
            .collect();
        match fields[..] {
            [field] => lines.push(format!("conflict with {manager}: {field}")),
            _ => lines.push(format!(
                "conflicts with {manager}:\n- {}",
                fields.join("\n- ")
            )),
        }
    }
    let plural = if conflicts.len() == 1 { "" } else { "s" };
    format!(
        "Apply failed with {} conflict{plural}: {}",
        conflicts.len(),
        lines.join("\n")
    )
}

/// Fields that nobody manages: identity, and what the server alone writes.
const UNMANAGED: &[&str] = &["apiVersion", "kind"];
const UNMANAGED_METADATA: &[&str] = &[
    "creationTimestamp",
    "generation",
    "managedFields",
    "name",
    "namespace",
    "resourceVersion",
    "selfLink",
    "uid",
];

fn managed(mut set: Set) -> Set {
    for name in UNMANAGED {
        set.children.remove(&format!("f:{name}"));
    }
    if let Some(metadata) = set.children.get_mut("f:metadata") {
        for name in UNMANAGED_METADATA {
            metadata.children.remove(&format!("f:{name}"));
        }
        metadata.member = false;
        if metadata.is_empty() {
            set.children.remove("f:metadata");
        }
    }
    set
}

/// Entry is one line of managedFields.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    manager: String,
    operation: String,
    subresource: String,
    api_version: String,
    time: String,
    set: Set,
}

impl Entry {
    fn is(&self, manager: Manager<'_>, operation: &str, api_version: &str) -> bool {
        self.manager == manager.name
            && self.subresource == manager.subresource
            && self.operation == operation
            // Applies in another version of the API are the same manager's; updates are kept apart.
            && (operation == APPLY || self.api_version == api_version)
    }

    /// The manager as conflicts name it: updates with the version that they were made in.
    fn readable(&self) -> String {
        let mut out = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            out += &format!(" with subresource {:?}", self.subresource);
        }
        if self.operation == UPDATE {
            out += &format!(" using {}", self.api_version);
        }
        out
    }

    fn render(&self) -> Value {
        let mut out = Map::new();
        for (key, value) in [
            ("manager", &self.manager),
            ("operation", &self.operation),
            ("apiVersion", &self.api_version),
            ("time", &self.time),
        ] {
            if !value.is_empty() {
                out.insert(key.to_owned(), value.clone().into());
            }
        }
        out.insert("fieldsType".to_owned(), "FieldsV1".into());
        out.insert("fieldsV1".to_owned(), self.set.render());
        if !self.subresource.is_empty() {
            out.insert("subresource".to_owned(), self.subresource.clone().into());
        }
        Value::Object(out)
    }
}

const APPLY: &str = "Apply";
const UPDATE: &str = "Update";

fn entries(object: &Value) -> Vec<Entry> {
    let of = |entry: &Value| {
        let text = |key: &str| entry[key].as_str().unwrap_or_default().to_owned();
        let set = Set::parse(&entry["fieldsV1"]);
        Entry {
            manager: text("manager"),
            operation: text("operation"),
            subresource: text("subresource"),
            api_version: text("apiVersion"),
            time: text("time"),
            set,
        }
    };
    object["metadata"]["managedFields"]
        .as_array()
        .into_iter()
        .flatten()
        .map(of)
        .collect()
}

fn store(object: &mut Value, mut entries: Vec<Entry>) {
    entries.retain(|e| !e.set.children.is_empty());
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else {
        return;
    };
    if entries.is_empty() {
        metadata.shift_remove("managedFields");
    } else {
        metadata.insert(
            "managedFields".to_owned(),
            entries.iter().map(Entry::render).collect(),
        );
    }
}

/// Gives `set` to the manager's entry; its time changes only when its fields do, so that a write without effect stays one.
fn record(
    entries: &mut Vec<Entry>,
    manager: Manager<'_>,
    operation: &str,
    api_version: &str,
    set: Set,
) {
    match entries
        .iter_mut()
        .find(|e| e.is(manager, operation, api_version))
    {
        Some(entry) if entry.set == set && entry.api_version == api_version => {}
        Some(entry) => {
            entry.set = set;
            entry.api_version = api_version.to_owned();
            entry.time = manager.now.to_owned();
        }
        None => entries.push(Entry {
            manager: manager.name.to_owned(),
            operation: operation.to_owned(),
            subresource: manager.subresource.to_owned(),
            api_version: api_version.to_owned(),
            time: manager.now.to_owned(),
            set,
        }),
    }
}

/// Server-side apply: the live object (None: create) with `applied` merged in, managedFields kept.
pub fn apply(
    live: Option<&Value>,
    applied: &Value,
    ty: &'static Type,
    manager: Manager<'_>,
    force: bool,
) -> Result<Value, PatchError> {
    if manager.name.is_empty() {
        return Err(PatchError::Invalid(
            "fieldManager is required for apply patch".to_owned(),
        ));
    }
    if applied["metadata"]["managedFields"]
        .as_array()
        .is_some_and(|m| !m.is_empty())
    {
        return Err(PatchError::Invalid(
            "metadata.managedFields must be nil".to_owned(),
        ));
    }
    let kind = Kind::Struct(ty);
    let api_version = applied["apiVersion"].as_str().unwrap_or_default();
    if let Some(duplicate) = typed::duplicate(applied, kind, "") {
        let name = format!(
            "{}/{}; {api_version}, Kind={}",
            applied["metadata"]["namespace"]
                .as_str()
                .unwrap_or_default(),
            applied["metadata"]["name"].as_str().unwrap_or_default(),
            ty.short_name()
        );
        return Err(PatchError::Invalid(format!(
            "failed to create typed patch object ({name}): {duplicate}"
        )));
    }
    let empty = json!({});
    let live = live.unwrap_or(&empty);
    let mut entries = entries(live);
    let wanted = managed(typed::changed(None, applied, kind));
    let differs = managed(typed::changed(Some(live), applied, kind));

    let others = |e: &&mut Entry| !e.is(manager, APPLY, api_version);
    if !force {
        let mut contested: Vec<(String, Set)> = entries
            .iter_mut()
            .filter(others)
            .map(|entry| (entry.readable(), entry.set.intersection(&differs)))
            .collect();
        // What kubectl applied itself, before it did so by the server, is its own.
        let own = client_side::applied_and_unchanged(live, kind, manager);
        for (_, set) in &mut contested {
            set.subtract(&own);
        }
        let conflicts: Vec<FieldConflict> = contested
            .into_iter()
            .flat_map(|(manager, set)| {
                let fields = set.paths().into_iter();
                fields.map(move |field| FieldConflict {
                    manager: manager.clone(),
                    field,
                })
            })
            .collect();
        if !conflicts.is_empty() {
            return Err(PatchError::Conflict(conflicts));
        }
    }
    for entry in entries.iter_mut().filter(others) {
        let taken = entry.set.intersection(&differs);
        entry.set.subtract(&taken);
    }

    let mut merged = live.clone();
    typed::merge(&mut merged, applied, kind);
    // What this manager applied before and does not any more goes, unless somebody else has it too.
    let before = entries
        .iter()
        .find(|e| e.is(manager, APPLY, api_version))
        .map(|e| e.set.clone());
    if let Some(mut gone) = before {
        let others = entries
            .iter()
            .filter(|e| !e.is(manager, APPLY, api_version));
        let kept: Vec<&Set> = others.map(|e| &e.set).chain([&wanted]).collect();
        for set in &kept {
            gone.subtract(set);
            keep_items(&mut gone, set);
        }
        typed::remove(&mut merged, &gone, &kept, kind);
    }
    record(&mut entries, manager, APPLY, api_version, wanted);
    store(&mut merged, entries);
    client_side::sync(&mut merged, applied, manager);
    Ok(merged)
}

/// An item of a list stays as long as somebody has a field inside it, though who added it gives it up.
fn keep_items(gone: &mut Set, kept: &Set) {
    for (element, child) in &mut gone.children {
        if let Some(kept) = kept.children.get(element) {
            if !kept.is_empty() {
                child.member = false;
            }
            keep_items(child, kept);
        }
    }
}

/// Records in `new.metadata.managedFields` what a plain write (create, update, patch) changed relative to `old`.
pub fn track_update(old: Option<&Value>, new: &mut Value, ty: &'static Type, manager: Manager<'_>) {
    let kind = Kind::Struct(ty);
    let changed = managed(typed::changed(old, new, kind));
    let gone = old.map_or_else(Set::default, |old| {
        managed(typed::gone(old, Some(new), kind))
    });
    match old.and_then(|old| kept(old, new, manager, (&changed, &gone))) {
        Some(kept) if kept == &new["metadata"]["managedFields"] => {}
        Some(kept) => {
            if let Some(metadata) = new.get_mut("metadata").and_then(Value::as_object_mut) {
                metadata.insert("managedFields".to_owned(), kept.clone());
            }
        }
        None => track(old, new, manager, (changed, gone)),
    }
}

/// The managedFields of `old`, when a write that changed and took away these fields leaves them as they are: its manager has
/// all that it changed already, and nobody has what is gone. Most writes are such: a controller writes the same fields again.
fn kept<'a>(
    old: &'a Value,
    new: &Value,
    manager: Manager<'_>,
    (changed, gone): (&Set, &Set),
) -> Option<&'a Value> {
    let before = &old["metadata"]["managedFields"];
    let given = &new["metadata"]["managedFields"];
    let left_out = given.as_array().is_none_or(Vec::is_empty);
    if !left_out && given != before {
        return None;
    }
    let mut has_own = changed.is_empty();
    for entry in before.as_array()? {
        let is = |key: &str, value: &str| entry[key].as_str().unwrap_or_default() == value;
        let own = is("manager", manager.name)
            && is("operation", UPDATE)
            && is("subresource", manager.subresource)
            && is("apiVersion", new["apiVersion"].as_str().unwrap_or_default());
        let fields = &entry["fieldsV1"];
        let stays = match own {
            true => changed.is_within(fields),
            false => !changed.meets(fields),
        };
        if !stays || gone.meets(fields) {
            return None;
        }
        has_own |= own;
    }
    has_own.then_some(before)
}

fn track(old: Option<&Value>, new: &mut Value, manager: Manager<'_>, (changed, gone): (Set, Set)) {
    let given = &new["metadata"]["managedFields"];
    // `[{}]` asks to forget who manages what; an absent or empty list does not.
    let forget = given
        .as_array()
        .is_some_and(|list| list.len() == 1 && list[0].as_object().is_some_and(Map::is_empty));
    let mut entries = match (forget, old) {
        (true, _) => Vec::new(),
        (false, Some(old)) if given.as_array().is_none_or(Vec::is_empty) => entries(old),
        (false, _) => entries(new),
    };
    let api_version = new["apiVersion"].as_str().unwrap_or_default().to_owned();
    for entry in &mut entries {
        let before = entry.set.clone();
        entry.set.subtract(&gone);
        if !entry.is(manager, UPDATE, &api_version) {
            entry.set.subtract(&changed);
        }
        if entry.set != before && entry.is(manager, UPDATE, &api_version) {
            entry.time = manager.now.to_owned();
        }
    }
    if !changed.is_empty() && !forget {
        let own = entries
            .iter()
            .find(|e| e.is(manager, UPDATE, &api_version))
            .map(|e| e.set.clone());
        let mut set = own.unwrap_or_default();
        set.union(&changed);
        record(&mut entries, manager, UPDATE, &api_version, set);
    }
    store(new, entries);
}

#[cfg(test)]
mod tests;
