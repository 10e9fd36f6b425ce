//! OpenAPI documents from the tables: what kubectl needs for validation, patches and `explain`.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::descriptions::Descriptions;
use super::{
    Field, FieldType, ListType, Resource, Shape, Type, TypeId, api_version, generated, groups,
};

/// The definitions' version.
const VERSION: &str = "v1.36.2";
/// Query parameters by method; kubectl looks for `fieldValidation` and `dryRun` here before it uses them.
const WRITE_PARAMETERS: &[&str] = &["dryRun", "fieldManager", "fieldValidation"];
const PATCH_PARAMETERS: &[&str] = &["dryRun", "fieldManager", "fieldValidation", "force"];
const DELETE_PARAMETERS: &[&str] = &["dryRun", "gracePeriodSeconds", "propagationPolicy"];
const LIST_PARAMETERS: &[&str] = &[
    "allowWatchBookmarks",
    "continue",
    "fieldSelector",
    "labelSelector",
    "limit",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "timeoutSeconds",
    "watch",
];
const PATCH_MEDIA: &[&str] = &[
    "application/apply-patch+yaml",
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
];

/// The index at `/openapi/v3`: path -> server-relative URL with a hash.
pub fn v3_index(served: &[&Resource]) -> Value {
    let mut paths = Map::new();
    for (group, version) in served_versions(served) {
        let path = root(group, version).trim_start_matches('/').to_owned();
        let url = format!(
            "/openapi/v3/{path}?hash={:016X}",
            fingerprint(served, group, version)
        );
        paths.insert(path, json!({"serverRelativeURL": url}));
    }
    json!({"paths": paths})
}

/// The document at `/openapi/v3/api/v1` (group "") or `/openapi/v3/apis/<group>/<version>`; None when nothing of it is served.
pub fn v3(served: &[&Resource], group: &str, version: &str) -> Option<Value> {
    let resources: Vec<&Resource> = served
        .iter()
        .copied()
        .filter(|r| r.group == group && r.version == version)
        .collect();
    if resources.is_empty() {
        return None;
    }
    let mut paths = Map::new();
    for resource in &resources {
        add_paths(resource, &mut paths);
    }
    let descriptions = Descriptions::read();
    let schemas = reachable(&resources)
        .into_iter()
        .map(|id| {
            (
                id.get().name.to_owned(),
                schema(id, Dialect::V3, &descriptions),
            )
        })
        .collect();
    Some(document(
        json!({"openapi": "3.0.0"}),
        paths,
        "components",
        json!({"schemas": Value::Object(schemas)}),
    ))
}

/// `/openapi/v2` as JSON.
pub fn v2(served: &[&Resource]) -> Value {
    let descriptions = Descriptions::read();
    let definitions: Map<String, Value> = reachable(served)
        .into_iter()
        .map(|id| {
            (
                id.get().name.to_owned(),
                schema(id, Dialect::V2, &descriptions),
            )
        })
        .collect();
    document(
        json!({"swagger": "2.0"}),
        Map::new(),
        "definitions",
        Value::Object(definitions),
    )
}

fn document(mut out: Value, paths: Map<String, Value>, key: &str, schemas: Value) -> Value {
    out["info"] = json!({"title": "Kubernetes", "version": VERSION});
    out["paths"] = Value::Object(paths);
    out[key] = schemas;
    out
}

fn served_versions(served: &[&Resource]) -> impl Iterator<Item = (&'static str, &'static str)> {
    let versions: BTreeSet<_> = served.iter().map(|r| (r.group, r.version)).collect();
    let all = groups()
        .iter()
        .flat_map(|(group, of)| of.iter().map(move |version| (*group, *version)));
    all.filter(move |pair| versions.contains(pair))
}

/// FNV-1a over what the document depends on: the tables (by this crate's version) and which resources are served.
fn fingerprint(served: &[&Resource], group: &str, version: &str) -> u64 {
    let resources = served
        .iter()
        .filter(|r| r.group == group && r.version == version)
        .map(|r| r.plural);
    let bytes = [VERSION, env!("CARGO_PKG_VERSION"), group, version]
        .into_iter()
        .chain(resources)
        .flat_map(|s| s.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn root(group: &str, version: &str) -> String {
    if group.is_empty() {
        format!("/api/{version}")
    } else {
        format!("/apis/{}", api_version(group, version))
    }
}

fn add_paths(resource: &Resource, paths: &mut Map<String, Value>) {
    let root = root(resource.group, resource.version);
    let everywhere = format!("{root}/{}", resource.plural);
    let collection = if resource.namespaced {
        format!("{root}/namespaces/{{namespace}}/{}", resource.plural)
    } else {
        everywhere.clone()
    };
    if resource.namespaced && resource.verbs.contains(&"list") {
        paths.insert(everywhere, path_item(resource, &["list"], &[]));
    }
    let namespace: &[&str] = if resource.namespaced {
        &["namespace"]
    } else {
        &[]
    };
    let named: &[&str] = if resource.namespaced {
        &["name", "namespace"]
    } else {
        &["name"]
    };
    let verbs = |of: &[&'static str]| {
        resource
            .verbs
            .iter()
            .copied()
            .filter(|v| of.contains(v))
            .collect::<Vec<_>>()
    };
    paths.insert(
        collection.clone(),
        path_item(
            resource,
            &verbs(&["list", "create", "deletecollection"]),
            namespace,
        ),
    );
    let verbs = verbs(&["get", "update", "patch", "delete"]);
    if !verbs.is_empty() {
        paths.insert(
            format!("{collection}/{{name}}"),
            path_item(resource, &verbs, named),
        );
    }
}

fn path_item(resource: &Resource, verbs: &[&str], in_path: &[&str]) -> Value {
    let mut item = Map::new();
    for verb in verbs {
        let (method, action, query, bodies): (_, _, &[&str], &[&str]) = match *verb {
            "list" => ("get", "list", LIST_PARAMETERS, &[]),
            "get" => ("get", "get", &[], &[]),
            "create" => ("post", "post", WRITE_PARAMETERS, &["*/*"]),
            "update" => ("put", "put", WRITE_PARAMETERS, &["*/*"]),
            "patch" => ("patch", "patch", PATCH_PARAMETERS, PATCH_MEDIA),
            "delete" => ("delete", "delete", DELETE_PARAMETERS, &["*/*"]),
            _ => ("delete", "deletecollection", DELETE_PARAMETERS, &["*/*"]),
        };
        let parameters: Vec<Value> = query
            .iter()
            .map(|name| json!({"name": name, "in": "query", "schema": {"type": parameter_type(name), "uniqueItems": true}}))
            .collect();
        let name = resource.ty.get().name;
        let reference = json!({"$ref": format!("#/components/schemas/{name}")});
        let mut operation = json!({
            "parameters": parameters,
            "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": reference}}}},
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": {"group": resource.group, "version": resource.version, "kind": resource.kind},
        });
        if !bodies.is_empty() {
            let content: Map<String, Value> = bodies
                .iter()
                .map(|b| ((*b).to_owned(), json!({"schema": reference})))
                .collect();
            operation["requestBody"] = json!({"content": content});
        }
        item.insert(method.to_owned(), operation);
    }
    if !in_path.is_empty() {
        item.insert(
            "parameters".to_owned(),
            in_path.iter().map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}})).collect(),
        );
    }
    Value::Object(item)
}

fn parameter_type(name: &str) -> &'static str {
    match name {
        "allowWatchBookmarks" | "sendInitialEvents" | "watch" | "force" => "boolean",
        "limit" | "timeoutSeconds" | "gracePeriodSeconds" => "integer",
        _ => "string",
    }
}

/// The types of the resources and of their lists, and everything those refer to.
fn reachable(resources: &[&Resource]) -> BTreeSet<TypeId> {
    let mut wanted: Vec<TypeId> = Vec::new();
    for resource in resources {
        wanted.push(resource.ty);
        let kinds = resource
            .subresources
            .iter()
            .map(|s| (s.group, s.version, s.kind.to_owned()));
        for (group, version, kind) in kinds.chain([(
            resource.group,
            resource.version,
            format!("{}List", resource.kind),
        )]) {
            let row = generated::KINDS
                .iter()
                .find(|(g, v, k, _)| (*g, *v, *k) == (group, version, &*kind));
            wanted.extend(row.map(|row| row.3));
        }
    }
    wanted.extend(
        generated::KINDS
            .iter()
            .filter(|k| k.0.is_empty() && ["DeleteOptions", "Status"].contains(&k.2))
            .map(|k| k.3),
    );
    let mut seen = BTreeSet::new();
    while let Some(id) = wanted.pop() {
        if seen.insert(id) {
            wanted.extend(id.get().fields.iter().filter_map(|f| referenced(&f.ty)));
        }
    }
    seen
}

fn referenced(ty: &FieldType) -> Option<TypeId> {
    match ty {
        FieldType::Ref(id) => Some(*id),
        FieldType::List(inner) | FieldType::Map(inner) => referenced(inner),
        _ => None,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Dialect {
    V2,
    V3,
}

impl Dialect {
    fn reference(self, ty: &Type) -> Value {
        let place = if self == Self::V2 {
            "definitions"
        } else {
            "components/schemas"
        };
        json!({"$ref": format!("#/{place}/{}", ty.name)})
    }
}

fn schema(id: TypeId, dialect: Dialect, descriptions: &Descriptions) -> Value {
    let ty = id.get();
    let mut out = match (ty.shape, dialect) {
        (Shape::Struct, _) => struct_schema(ty, dialect, descriptions),
        (Shape::Time | Shape::MicroTime, _) => json!({"type": "string", "format": "date-time"}),
        (Shape::Quantity, Dialect::V3) => {
            json!({"oneOf": [{"type": "string"}, {"type": "number"}]})
        }
        (Shape::Quantity, Dialect::V2) => json!({"type": "string"}),
        (Shape::IntOrString, Dialect::V3) => {
            json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]})
        }
        (Shape::IntOrString, Dialect::V2) => json!({"type": "string", "format": "int-or-string"}),
        (Shape::RawExtension | Shape::FieldsV1, _) => json!({"type": "object"}),
        (
            Shape::Json | Shape::SchemaOrArray | Shape::SchemaOrBool | Shape::SchemaOrStringArray,
            _,
        ) => json!({}),
    };
    let kinds: Vec<Value> = generated::KINDS
        .iter()
        .filter(|(_, _, _, of)| *of == id)
        .map(|(group, version, kind, _)| json!({"group": group, "version": version, "kind": kind}))
        .collect();
    if !kinds.is_empty() {
        out["x-kubernetes-group-version-kind"] = Value::Array(kinds);
    }
    if let Some(text) = descriptions.of_type(ty.name) {
        out["description"] = text.into();
    }
    out
}

fn struct_schema(ty: &Type, dialect: Dialect, descriptions: &Descriptions) -> Value {
    let mut out = json!({"type": "object"});
    if !ty.fields.is_empty() {
        let properties: Map<String, Value> = ty
            .fields
            .iter()
            .map(|field| {
                let mut schema = field_schema(field, dialect);
                if let Some(text) = descriptions.of_field(ty.name, field.name) {
                    schema["description"] = text.into();
                }
                (field.name.to_owned(), schema)
            })
            .collect();
        out["properties"] = Value::Object(properties);
    }
    let required: Vec<&str> = ty
        .fields
        .iter()
        .filter(|f| f.required)
        .map(|f| f.name)
        .collect();
    if !required.is_empty() {
        out["required"] = json!(required);
    }
    if ty.atomic {
        out["x-kubernetes-map-type"] = "atomic".into();
    }
    out
}

fn field_schema(field: &Field, dialect: Dialect) -> Value {
    let mut out = match (&field.ty, dialect) {
        // In OpenAPI 3.0, siblings of $ref are ignored, so it is wrapped.
        (FieldType::Ref(id), Dialect::V3) => json!({"allOf": [dialect.reference(id.get())]}),
        (ty, _) => type_schema(ty, dialect),
    };
    if !field.default.is_empty() && dialect == Dialect::V3 {
        // The tables are generated from parsed JSON, so this parses.
        out["default"] = serde_json::from_str(field.default).unwrap_or_default();
    }
    if let FieldType::List(_) = field.ty {
        match field.list_type {
            ListType::Atomic => out["x-kubernetes-list-type"] = "atomic".into(),
            ListType::Set => out["x-kubernetes-list-type"] = "set".into(),
            ListType::Map => {
                out["x-kubernetes-list-type"] = "map".into();
                out["x-kubernetes-list-map-keys"] = json!(field.list_keys);
            }
        }
    }
    if let Some(atomic) = field.atomic {
        out["x-kubernetes-map-type"] = if atomic { "atomic" } else { "granular" }.into();
    }
    if !field.merge_key.is_empty() {
        out["x-kubernetes-patch-merge-key"] = field.merge_key.into();
    }
    let strategies = [
        (field.merge, "merge"),
        (field.retain_keys, "retainKeys"),
        (field.replace, "replace"),
    ];
    let strategies: Vec<&str> = strategies
        .iter()
        .filter(|(on, _)| *on)
        .map(|(_, name)| *name)
        .collect();
    if !strategies.is_empty() {
        out["x-kubernetes-patch-strategy"] = strategies.join(",").into();
    }
    out
}

fn type_schema(ty: &FieldType, dialect: Dialect) -> Value {
    match ty {
        FieldType::String => json!({"type": "string"}),
        FieldType::Bytes => json!({"type": "string", "format": "byte"}),
        FieldType::Bool => json!({"type": "boolean"}),
        FieldType::Int32 => json!({"type": "integer", "format": "int32"}),
        FieldType::Int64 => json!({"type": "integer", "format": "int64"}),
        FieldType::Double => json!({"type": "number", "format": "double"}),
        FieldType::Ref(id) => dialect.reference(id.get()),
        FieldType::List(inner) => json!({"type": "array", "items": type_schema(inner, dialect)}),
        FieldType::Map(inner) => {
            json!({"type": "object", "additionalProperties": type_schema(inner, dialect)})
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{resource, resources};
    use super::*;

    fn references(value: &Value, out: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => {
                if let Some(reference) = map.get("$ref").and_then(Value::as_str) {
                    out.insert(reference.rsplit('/').next().unwrap().to_owned());
                }
                map.values().for_each(|v| references(v, out));
            }
            Value::Array(list) => list.iter().for_each(|v| references(v, out)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_of_every_document_resolves() {
        let all: Vec<&Resource> = resources().iter().collect();
        let index = v3_index(&all);
        for (path, entry) in index["paths"].as_object().unwrap() {
            let url = entry["serverRelativeURL"].as_str().unwrap();
            assert!(
                url.starts_with(&format!("/openapi/v3/{path}?hash=")),
                "{url}"
            );
            let (group, version) = match path.split('/').collect::<Vec<_>>()[..] {
                ["api", version] => ("", version),
                ["apis", group, version] => (group, version),
                _ => panic!("{path}"),
            };
            let document = v3(&all, group, version).unwrap();
            let mut wanted = BTreeSet::new();
            references(&document, &mut wanted);
            let schemas = document["components"]["schemas"].as_object().unwrap();
            for name in wanted {
                // CRD fields named $ref are properties, not references.
                assert!(
                    name == "string" || schemas.contains_key(&name),
                    "{name} in {path}"
                );
            }
        }
    }

    #[test]
    fn kubectl_finds_kinds_and_the_field_validation_parameter() {
        let deployments = [resource("apps", "v1", "deployments").unwrap()];
        let document = v3(&deployments, "apps", "v1").unwrap();
        let patch =
            &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
        assert_eq!(
            patch["x-kubernetes-group-version-kind"]["kind"],
            "Deployment"
        );
        assert!(
            patch["parameters"]
                .as_array()
                .unwrap()
                .iter()
                .any(|p| p["name"] == "fieldValidation")
        );
        let schema = &document["components"]["schemas"]["io.k8s.api.apps.v1.Deployment"];
        assert_eq!(
            schema["x-kubernetes-group-version-kind"][0]["group"],
            "apps"
        );
        let containers = &document["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"]
            ["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        assert_eq!(
            containers["items"]["$ref"],
            "#/components/schemas/io.k8s.api.core.v1.Container"
        );
        assert!(v3(&deployments, "", "v1").is_none());
    }

    #[test]
    fn the_hash_changes_with_what_is_served() {
        let one = [resource("apps", "v1", "deployments").unwrap()];
        let two = [one[0], resource("apps", "v1", "daemonsets").unwrap()];
        assert_ne!(v3_index(&one), v3_index(&two));
    }
}
