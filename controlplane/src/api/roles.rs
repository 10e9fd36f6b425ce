//! Brings the default roles and bindings to what they should be: at each start, since an upgrade may need more rights. What
//! others added stays; an object annotated with `autoupdate: "false"` is left alone.

use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};

use super::bootstrap::{ensure, options, target};
use super::delete::DeleteOptions;
use super::fields::Fields;
use super::status::Status;
use super::write::Part;
use super::{Api, object};
use crate::auth::policy::{self, AUTOUPDATE, Bootstrapped};
use crate::auth::rbac::{GROUP, Rule, covers};

/// Writes at a time: they share the store's commits.
const PARALLEL: usize = 64;

/// Creates what is missing, and adds the rules, subjects, labels and annotations that are missing in what is there.
pub async fn reconcile(api: &Api) -> Result<(), Status> {
    futures::stream::iter(policy::defaults(&api.served))
        .map(|wanted| reconcile_one(api, wanted))
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await
}

async fn reconcile_one(api: &Api, wanted: Bootstrapped) -> Result<(), Status> {
    let version = format!("/apis/{GROUP}/v1");
    let path = match wanted.namespace {
        Some(namespace) => format!("{version}/namespaces/{namespace}/{}", wanted.plural),
        None => format!("{version}/{}", wanted.plural),
    };
    let target = target(&path, &wanted.object)?;
    let resource = target.resource;
    let Some(record) = api.store.get(&target.key()?).await? else {
        return ensure(api, &path, wanted.object).await.map(drop);
    };
    let found = object::decode(&record, resource.kind, &resource.api_version())?;
    if found["metadata"]["annotations"][AUTOUPDATE] == "false" {
        return Ok(());
    }
    let role = |binding: &Value| binding.get("roleRef").cloned();
    if role(&found) != role(&wanted.object) {
        // It cannot be changed.
        api.delete_object(&target, &DeleteOptions::default())
            .await?;
        return ensure(api, &path, wanted.object).await.map(drop);
    }
    if merged(&found, &wanted.object) == found {
        return Ok(());
    }
    api.modify(&target, &options(), Part::Main, |old| {
        Ok(merged(old, &wanted.object))
    })
    .await
    .map(drop)
}

/// What is there, with what is missing of what is wanted.
fn merged(found: &Value, wanted: &Value) -> Value {
    let mut new = found.clone();
    for pointer in ["/metadata/labels", "/metadata/annotations"] {
        for (key, value) in wanted.object(pointer).into_iter().flatten() {
            new.object_mut(pointer)
                .entry(key)
                .or_insert_with(|| value.clone());
        }
    }
    for pointer in ["/subjects", "/aggregationRule/clusterRoleSelectors"] {
        let missing: Vec<Value> = wanted
            .items(pointer)
            .iter()
            .filter(|item| !found.items(pointer).contains(item))
            .cloned()
            .collect();
        if !missing.is_empty() {
            new.set(pointer, [found.items(pointer), &missing[..]].concat());
        }
    }
    let rules = |of: &Value| -> Vec<Rule> {
        serde_json::from_value(of["rules"].clone()).unwrap_or_default()
    };
    let held = rules(found);
    let missing: Vec<Value> = rules(wanted)
        .into_iter()
        .filter(|rule| covers(&held, std::slice::from_ref(rule)).is_err())
        .map(|rule| json!(rule))
        .collect();
    if !missing.is_empty() {
        new.set("/rules", [found.items("/rules"), &missing[..]].concat());
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_added_and_nothing_taken_away() {
        let rule = |verb: &str| json!({"verbs": [verb], "apiGroups": [""], "resources": ["pods"]});
        let wanted = json!({"metadata": {"labels": {"a": "1", "b": "2"}}, "rules": [rule("get"), rule("list")],
            "subjects": [{"kind": "User", "name": "x"}]});
        let found = json!({"metadata": {"labels": {"a": "mine"}}, "rules": [rule("get"), rule("delete")],
            "subjects": [{"kind": "User", "name": "y"}]});
        let new = merged(&found, &wanted);
        assert_eq!(new["metadata"]["labels"], json!({"a": "mine", "b": "2"}));
        assert_eq!(
            new["rules"],
            json!([rule("get"), rule("delete"), rule("list")])
        );
        assert_eq!(new["subjects"].as_array().map(Vec::len), Some(2));
        assert_eq!(merged(&new, &wanted), new, "once is enough");
        let broad = json!({"metadata": {}, "rules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]});
        assert_eq!(
            merged(&broad, &wanted)["rules"],
            broad["rules"],
            "covered already"
        );
    }
}
