//! Secrets of type `kubernetes.io/service-account-token`: filled with a token of the account that they name, and gone with it.

use k8s_openapi::api::core::v1::{Secret, ServiceAccount};

use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Plan, View};
use super::snapshot::{Change, Snapshot};

pub const TYPE: &str = "kubernetes.io/service-account-token";
pub const ACCOUNT_NAME: &str = "kubernetes.io/service-account.name";
pub const ACCOUNT_UID: &str = "kubernetes.io/service-account.uid";
pub const TOKEN: &str = "token";
pub const CA: &str = "ca.crt";
pub const NAMESPACE: &str = "namespace";

pub const CONTROLLER: Controller = Controller {
    name: "serviceaccount-token",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    match change.object() {
        Object::Secret(secret) if is_token(secret) => {
            keys.insert(Key::of(&secret.metadata));
        }
        Object::ServiceAccount(account) => {
            let name = account.metadata.name.as_deref();
            keys.extend(
                snapshot
                    .secrets
                    .namespace(account.metadata.namespace.as_deref().unwrap_or_default())
                    .filter(|(_, secret)| annotation(secret, ACCOUNT_NAME) == name)
                    .map(|(key, _)| key.clone()),
            );
        }
        _ => {}
    }
}

pub fn is_token(secret: &Secret) -> bool {
    secret.type_.as_deref() == Some(TYPE)
}

fn annotation<'a>(secret: &'a Secret, name: &str) -> Option<&'a str> {
    let annotations = secret.metadata.annotations.as_ref()?;
    annotations.get(name).map(String::as_str)
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(secret) = view
        .snapshot
        .secrets
        .get(key)
        .filter(|secret| is_token(secret))
    else {
        return plan;
    };
    let Some(name) = annotation(secret, ACCOUNT_NAME) else {
        return plan;
    };
    if secret.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let account = view
        .snapshot
        .service_accounts
        .get(&Key::new(&key.namespace, name))
        .filter(|account| belongs(secret, account));
    match account {
        Some(account) => {
            let present = |field: &str| {
                let data = secret.data.as_ref();
                data.and_then(|data| data.get(field))
                    .is_some_and(|value| !value.0.is_empty())
            };
            let same_ca = secret
                .data
                .as_ref()
                .and_then(|data| data.get(CA))
                .is_some_and(|ca| ca.0 == view.settings.root_ca.as_bytes());
            let filled = present(TOKEN)
                && present(NAMESPACE)
                && same_ca
                && annotation(secret, ACCOUNT_UID) == account.metadata.uid.as_deref();
            if !filled && account.metadata.deletion_timestamp.is_none() {
                plan.push(Action::FillToken {
                    secret: Target::of(&**secret),
                    account: Target::of(&**account),
                    has_token: present(TOKEN),
                    root_ca: view.settings.root_ca.clone(),
                });
            }
        }
        // The account is gone, or is another one of the same name: the token is good for nothing.
        None if !view.snapshot.namespace_is_terminating(&key.namespace) => {
            plan.push(Action::Delete {
                target: Target::of(&**secret),
                propagation: None,
                grace_seconds: None,
            });
        }
        None => {}
    }
    plan
}

fn belongs(secret: &Secret, account: &ServiceAccount) -> bool {
    let wanted = annotation(secret, ACCOUNT_UID).filter(|uid| !uid.is_empty());
    wanted.is_none() || wanted == account.metadata.uid.as_deref()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{Cluster, namespace};
    use super::*;

    fn cluster() -> Cluster {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.add(namespace("default"));
        let account = json!({"metadata": {"namespace": "default", "name": "bot"}});
        cluster.add::<ServiceAccount>(serde_json::from_value(account).unwrap());
        let secret = json!({
            "metadata": {"namespace": "default", "name": "bot-token", "annotations": {ACCOUNT_NAME: "bot"}},
            "type": TYPE,
        });
        cluster.add::<Secret>(serde_json::from_value(secret).unwrap());
        cluster.settle();
        cluster
    }

    #[test]
    fn a_token_secret_is_filled_once_and_again_when_it_was_spoiled() {
        let mut cluster = cluster();
        let key = Key::new("default", "bot-token");
        let secret = cluster.snapshot.secrets.get(&key).unwrap().clone();
        let data = secret.data.as_ref().unwrap();
        assert_eq!(data.keys().collect::<Vec<_>>(), [CA, NAMESPACE, TOKEN]);
        assert_eq!(annotation(&secret, ACCOUNT_UID), Some("uid-2"));
        cluster.edit::<Secret>(&key, |secret| {
            secret.data.as_mut().unwrap().remove(TOKEN);
        });
        cluster.settle();
        let secret = cluster.snapshot.secrets.get(&key).unwrap();
        assert!(secret.data.as_ref().unwrap().contains_key(TOKEN));
    }

    #[test]
    fn a_token_secret_goes_with_its_account_and_others_stay() {
        let mut cluster = cluster();
        let other =
            json!({"metadata": {"namespace": "default", "name": "other"}, "type": "Opaque"});
        cluster.add::<Secret>(serde_json::from_value(other).unwrap());
        cluster.delete_now("bot");
        cluster.settle();
        let left: Vec<_> = cluster
            .snapshot
            .secrets
            .iter()
            .map(|(key, _)| key.name.to_string())
            .collect();
        assert_eq!(left, ["other"]);
    }
}
