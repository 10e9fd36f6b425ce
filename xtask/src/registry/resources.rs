//! Resources: `/apis` from the discovery document, `/api/v1` (which that document leaves out) from the paths.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{HEADER, Kind, Source, strings};

/// What the paths do not say about the core group: short names and categories.
const CORE: &[(&str, &[&str], &[&str])] = &[
    ("componentstatuses", &["cs"], &[]),
    ("configmaps", &["cm"], &[]),
    ("endpoints", &["ep"], &[]),
    ("events", &["ev"], &[]),
    ("limitranges", &["limits"], &[]),
    ("namespaces", &["ns"], &[]),
    ("nodes", &["no"], &[]),
    ("persistentvolumeclaims", &["pvc"], &[]),
    ("persistentvolumes", &["pv"], &[]),
    ("pods", &["po"], &["all"]),
    ("replicationcontrollers", &["rc"], &["all"]),
    ("resourcequotas", &["quota"], &[]),
    ("serviceaccounts", &["sa"], &[]),
    ("services", &["svc"], &["all"]),
];

#[derive(Default)]
struct Row {
    kind: String,
    singular: String,
    short_names: Vec<String>,
    categories: Vec<String>,
    namespaced: bool,
    verbs: BTreeSet<String>,
    /// Name -> kind it speaks, verbs.
    subresources: BTreeMap<String, (Kind, BTreeSet<String>)>,
}

/// Group, version, plural.
type Key = (String, String, String);

pub fn render(source: &Source, kinds: &BTreeMap<Kind, usize>) -> Result<String> {
    let mut rows = core(source)?;
    discovered(source, &mut rows)?;
    let mut out = String::from(HEADER);
    out += "use super::super::{Resource, TypeId};\nuse super::{r, s};\n\npub static RESOURCES: &[Resource] = &[\n";
    for ((group, version, plural), row) in &rows {
        let id = kinds.get(&(group.clone(), version.clone(), row.kind.clone()));
        let id = id.with_context(|| {
            format!(
                "{plural} of {group}/{version} speaks {}, which has no type",
                row.kind
            )
        })?;
        let verbs: Vec<_> = row.verbs.iter().collect();
        writeln!(
            out,
            "    r({group:?}, {version:?}, {plural:?}, {:?}, {:?}, {}, TypeId({id}),\n        &{:?}, &{:?}, &{verbs:?}, &[",
            row.kind, row.singular, row.namespaced, row.short_names, row.categories
        )?;
        for (name, ((group, version, kind), verbs)) in &row.subresources {
            let verbs: Vec<_> = verbs.iter().collect();
            writeln!(
                out,
                "            s({name:?}, {group:?}, {version:?}, {kind:?}, &{verbs:?}),"
            )?;
        }
        out += "        ]),\n";
    }
    out += "];\n\npub static GROUPS: &[(&str, &[&str])] = &[\n    (\"\", &[\"v1\"]),\n";
    for item in source.discovery["items"].as_array().into_iter().flatten() {
        let versions: Vec<_> = item["versions"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|v| v["version"].as_str())
            .collect();
        let versions: Vec<_> = versions.into_iter().flatten().collect();
        writeln!(
            out,
            "    ({:?}, &{versions:?}),",
            item["metadata"]["name"].as_str().unwrap_or_default()
        )?;
    }
    out += "];\n";
    Ok(out)
}

fn discovered(source: &Source, rows: &mut BTreeMap<Key, Row>) -> Result<()> {
    for item in source.discovery["items"]
        .as_array()
        .context("discovery.json has no items")?
    {
        let group = item["metadata"]["name"]
            .as_str()
            .context("a group has no name")?;
        for version in item["versions"].as_array().into_iter().flatten() {
            let version_name = version["version"]
                .as_str()
                .context("a version has no name")?;
            for resource in version["resources"].as_array().into_iter().flatten() {
                let text = |key: &str| resource[key].as_str().unwrap_or_default().to_owned();
                let own = |key: &str| {
                    resource["responseKind"][key]
                        .as_str()
                        .unwrap_or_default()
                        .to_owned()
                };
                let mut row = Row {
                    kind: own("kind"),
                    singular: text("singularResource"),
                    short_names: strings(&resource["shortNames"]),
                    categories: strings(&resource["categories"]),
                    namespaced: resource["scope"] == "Namespaced",
                    verbs: strings(&resource["verbs"]).into_iter().collect(),
                    ..Row::default()
                };
                for sub in resource["subresources"].as_array().into_iter().flatten() {
                    let name = sub["subresource"].as_str().unwrap_or_default().to_owned();
                    let of = |key: &str| {
                        sub["responseKind"][key]
                            .as_str()
                            .unwrap_or_default()
                            .to_owned()
                    };
                    // An empty version stands for the resource's own group and version.
                    let speaks = if of("version").is_empty() {
                        (group.to_owned(), version_name.to_owned(), of("kind"))
                    } else {
                        (of("group"), of("version"), of("kind"))
                    };
                    row.subresources
                        .insert(name, (speaks, strings(&sub["verbs"]).into_iter().collect()));
                }
                rows.insert(
                    (group.to_owned(), version_name.to_owned(), text("resource")),
                    row,
                );
            }
        }
    }
    Ok(())
}

fn core(source: &Source) -> Result<BTreeMap<Key, Row>> {
    let mut rows: BTreeMap<Key, Row> = BTreeMap::new();
    for (path, methods) in source
        .paths
        .as_object()
        .context("paths.json is not an object")?
    {
        let Some(path) = path.strip_prefix("/api/v1/") else {
            continue;
        };
        let (watch, path) = path
            .strip_prefix("watch/")
            .map_or((false, path), |rest| (true, rest));
        let (namespaced, path) = path
            .strip_prefix("namespaces/{namespace}/")
            .map_or((false, path), |rest| (true, rest));
        let segments: Vec<&str> = path.split('/').collect();
        let (plural, subresource) = match segments[..] {
            [plural] | [plural, "{name}"] => (plural, None),
            [plural, "{name}", subresource] => (plural, Some(subresource)),
            _ => continue,
        };
        let row = rows
            .entry((String::new(), "v1".to_owned(), plural.to_owned()))
            .or_default();
        row.namespaced |= namespaced;
        for (method, operation) in methods.as_object().into_iter().flatten() {
            let of = |key: &str| {
                operation["gvk"][key]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned()
            };
            if watch {
                row.verbs.insert("watch".to_owned());
                continue;
            }
            let Some(verb) = verb(method, operation) else {
                continue;
            };
            match subresource {
                None => {
                    row.kind = of("kind");
                    row.verbs.insert(verb.to_owned());
                }
                Some(name) => {
                    let speaks = (of("group"), of("version"), of("kind"));
                    row.subresources
                        .entry(name.to_owned())
                        .or_insert_with(|| (speaks, BTreeSet::new()))
                        .1
                        .insert(verb.to_owned());
                }
            }
        }
    }
    for ((_, _, plural), row) in &mut rows {
        row.singular = row.kind.to_lowercase();
        let Some((_, short_names, categories)) = CORE.iter().find(|(name, _, _)| name == plural)
        else {
            continue;
        };
        row.short_names = short_names.iter().map(|s| (*s).to_owned()).collect();
        row.categories = categories.iter().map(|s| (*s).to_owned()).collect();
    }
    Ok(rows)
}

/// The verb of authorization and discovery for an operation. Those that connect (exec, proxy) are told by their method.
fn verb(method: &str, operation: &Value) -> Option<&'static str> {
    Some(match (operation["action"].as_str()?, method) {
        ("list", _) => "list",
        ("get", _) | ("connect", "get") => "get",
        ("post", _) | ("connect", "post") => "create",
        ("put", _) | ("connect", "put") => "update",
        ("patch", _) | ("connect", "patch") => "patch",
        ("delete", _) | ("connect", "delete") => "delete",
        ("deletecollection", _) => "deletecollection",
        _ => return None,
    })
}
