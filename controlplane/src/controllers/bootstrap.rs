//! Bootstrap tokens: each signs what joining machines read of the cluster before they trust it, and goes when it has expired.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Plan, View};
use super::snapshot::{Change, Snapshot};
use crate::auth::bootstrap::{Kept, NAMESPACE, SECRET_TYPE, sign};

/// What machines read that join: a kubeconfig without credentials, and a signature of it by each token.
pub const CLUSTER_INFO: &str = "cluster-info";
pub const CLUSTER_INFO_NAMESPACE: &str = "kube-public";
const CONTENT: &str = "kubeconfig";
const SIGNATURE_PREFIX: &str = "jws-kubeconfig-";

pub const SIGNER: Controller = Controller {
    name: "bootstrap-signer",
    affected: signatures_affected,
    plan: plan_signatures,
};

pub const CLEANER: Controller = Controller {
    name: "token-cleaner",
    affected: tokens_affected,
    plan: plan_token,
};

pub fn is_token(secret: &Secret) -> bool {
    secret.type_.as_deref() == Some(SECRET_TYPE)
        && secret.metadata.namespace.as_deref() == Some(NAMESPACE)
}

fn is_cluster_info(key: &Key) -> bool {
    (&*key.namespace, &*key.name) == (CLUSTER_INFO_NAMESPACE, CLUSTER_INFO)
}

fn signatures_affected(_: &Snapshot, change: &Change, keys: &mut Keys) {
    let counts = match change.object() {
        Object::Secret(secret) => is_token(secret),
        Object::ConfigMap(map) => is_cluster_info(&Key::of(&map.metadata)),
        _ => false,
    };
    if counts {
        keys.insert(Key::new(CLUSTER_INFO_NAMESPACE, CLUSTER_INFO));
    }
}

fn tokens_affected(_: &Snapshot, change: &Change, keys: &mut Keys) {
    if let Some(Object::Secret(secret)) = &change.new
        && is_token(secret)
    {
        keys.insert(Key::of(&secret.metadata));
    }
}

fn kept(secret: &Secret) -> Option<Kept> {
    let data = secret.data.as_ref();
    let name = secret.metadata.name.as_deref().unwrap_or_default();
    let read = Kept::read(name, |field| {
        let value = data.and_then(|data| data.get(field))?;
        String::from_utf8(value.0.clone()).ok()
    });
    read.ok()
}

fn plan_signatures(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(map) = view.snapshot.config_maps.get(key) else {
        return plan;
    };
    let data = map.data.clone().unwrap_or_default();
    let mut wanted: BTreeMap<String, String> = BTreeMap::new();
    if let Some(content) = data.get(CONTENT) {
        let now_s = view.now.as_second();
        let secrets = view.snapshot.secrets.namespace(NAMESPACE);
        let tokens = secrets.filter(|(_, secret)| is_token(secret));
        for token in tokens.filter_map(|(_, secret)| kept(secret)) {
            let Some(key) = token.signing_key(now_s) else {
                continue;
            };
            let signature = sign(&token.id, key, content);
            wanted.insert(format!("{SIGNATURE_PREFIX}{}", token.id), signature);
            look_again(&mut plan, &token);
        }
    }
    let changes = signature_changes(map, &wanted);
    if !changes.is_empty() {
        let meta = &map.metadata;
        plan.push(Action::Patch {
            target: Target::of(&**map),
            subresource: None,
            body: json!({
                "metadata": {"uid": meta.uid, "resourceVersion": meta.resource_version},
                "data": changes,
            }),
        });
    }
    plan
}

/// The fields to set, and those to take away, as a merge patch has them.
fn signature_changes(
    map: &ConfigMap,
    wanted: &BTreeMap<String, String>,
) -> BTreeMap<String, Value> {
    let data = map.data.iter().flatten();
    let there = data.filter(|(name, _)| name.starts_with(SIGNATURE_PREFIX));
    let mut changes: BTreeMap<String, Value> = there
        .filter(|(name, _)| !wanted.contains_key(*name))
        .map(|(name, _)| (name.clone(), Value::Null))
        .collect();
    for (name, signature) in wanted {
        if map.data.as_ref().and_then(|data| data.get(name)) != Some(signature) {
            changes.insert(name.clone(), signature.as_str().into());
        }
    }
    changes
}

fn look_again(plan: &mut Plan, token: &Kept) {
    let at = token.expires_s.map(Timestamp::from_second);
    if let Some(Ok(at)) = at {
        plan.look_again(at);
    }
}

fn plan_token(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(secret) = view.snapshot.secrets.get(key) else {
        return plan;
    };
    // What is no token stays for somebody to look at.
    let Some(token) = kept(secret).filter(|_| is_token(secret)) else {
        return plan;
    };
    if token.has_expired(view.now.as_second()) {
        plan.push(Action::Delete {
            target: Target::of(&**secret),
            propagation: None,
            grace_seconds: None,
        });
    } else {
        look_again(&mut plan, &token);
    }
    plan
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::super::testing::Cluster;
    use super::*;

    fn token(id: &str, expiration: &str) -> Secret {
        let mut secret: Secret = serde_json::from_value(json!({
            "metadata": {"namespace": NAMESPACE, "name": format!("bootstrap-token-{id}")},
            "type": SECRET_TYPE,
        }))
        .unwrap();
        let fields = [
            ("token-id", id),
            ("token-secret", "0123456789abcdef"),
            ("expiration", expiration),
            ("usage-bootstrap-signing", "true"),
        ];
        let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
        let data = fields.map(|(name, value)| (name.to_owned(), bytes(value)));
        secret.data = Some(data.into());
        secret
    }

    fn info(content: &str) -> ConfigMap {
        serde_json::from_value(json!({
            "metadata": {"namespace": CLUSTER_INFO_NAMESPACE, "name": CLUSTER_INFO},
            "data": {CONTENT: content},
        }))
        .unwrap()
    }

    fn signatures(cluster: &Cluster) -> Vec<(String, String)> {
        let key = Key::new(CLUSTER_INFO_NAMESPACE, CLUSTER_INFO);
        let map = cluster.snapshot.config_maps.get(&key).unwrap();
        let data = map.data.clone().unwrap_or_default().into_iter();
        data.filter(|(name, _)| name.starts_with(SIGNATURE_PREFIX))
            .collect()
    }

    #[test]
    fn every_token_signs_while_it_is_good_and_goes_when_it_has_expired() {
        let mut cluster = Cluster::new(&[SIGNER, CLEANER]);
        cluster.add(info("who we are"));
        cluster.add(token("aaaaaa", "2026-01-01T01:00:00Z"));
        cluster.add(token("bbbbbb", "2026-01-02T00:00:00Z"));
        cluster.settle();
        let signed = |id: &str| {
            let signature = sign(id, b"0123456789abcdef", "who we are");
            (format!("{SIGNATURE_PREFIX}{id}"), signature)
        };
        assert_eq!(signatures(&cluster), [signed("aaaaaa"), signed("bbbbbb")]);
        cluster.advance(3600);
        cluster.settle();
        assert_eq!(signatures(&cluster), [signed("bbbbbb")]);
        assert_eq!(cluster.snapshot.secrets.len(), 1);
    }

    #[test]
    fn what_is_said_of_the_cluster_is_signed_anew_when_it_changes() {
        let mut cluster = Cluster::new(&[SIGNER, CLEANER]);
        cluster.add(token("aaaaaa", "2026-01-02T00:00:00Z"));
        cluster.add(info("one"));
        cluster.settle();
        let before = signatures(&cluster);
        let key = Key::new(CLUSTER_INFO_NAMESPACE, CLUSTER_INFO);
        cluster.edit::<ConfigMap>(&key, |map| {
            let data = map.data.as_mut().unwrap();
            data.insert(CONTENT.into(), "two".into());
        });
        cluster.settle();
        assert_ne!(signatures(&cluster), before);
        assert_eq!(
            signatures(&cluster)[0].1,
            sign("aaaaaa", b"0123456789abcdef", "two")
        );
    }
}
