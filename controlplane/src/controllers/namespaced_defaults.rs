//! What every namespace has: the ServiceAccount `default` and the ConfigMap `kube-root-ca.crt`.

use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::json;

use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Plan, View};
use super::snapshot::{Change, Snapshot};

/// The ConfigMap by which pods know whom to trust as the API server.
pub const ROOT_CA: &str = "kube-root-ca.crt";
const CA_FILE: &str = "ca.crt";
const DESCRIPTION: &str = "kubernetes.io/description";
const DESCRIPTION_TEXT: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal \
endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions \
of Kubernetes clusters.";

pub const CONTROLLER: Controller = Controller {
    name: "namespace-defaults",
    affected,
    plan,
};

fn affected(_: &Snapshot, change: &Change, keys: &mut Keys) {
    match change.object() {
        Object::Namespace(namespace) => {
            keys.insert(Key::of(&namespace.metadata));
        }
        Object::ServiceAccount(account) if account.metadata.name.as_deref() == Some("default") => {
            keys.extend(account.metadata.namespace.as_deref().map(Key::cluster));
        }
        Object::ConfigMap(map) if map.metadata.name.as_deref() == Some(ROOT_CA) => {
            keys.extend(map.metadata.namespace.as_deref().map(Key::cluster));
        }
        _ => {}
    }
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(namespace) = view.snapshot.namespaces.get(key) else {
        return plan;
    };
    if namespace.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let meta = |name: &str| ObjectMeta {
        name: Some(name.into()),
        namespace: Some(key.name.to_string()),
        ..Default::default()
    };
    if !view
        .snapshot
        .service_accounts
        .contains(&Key::new(&key.name, "default"))
    {
        plan.push(Action::Create(Object::of(ServiceAccount {
            metadata: meta("default"),
            ..Default::default()
        })));
    }
    let data = Some([(CA_FILE.to_string(), view.settings.root_ca.clone())].into());
    match view.snapshot.config_maps.get(&Key::new(&key.name, ROOT_CA)) {
        None => {
            let mut metadata = meta(ROOT_CA);
            metadata.annotations =
                Some([(DESCRIPTION.to_string(), DESCRIPTION_TEXT.to_string())].into());
            plan.push(Action::Create(Object::of(ConfigMap {
                metadata,
                data,
                ..Default::default()
            })));
        }
        Some(map) if map.data != data => plan.push(Action::Patch {
            target: Target::of(&**map),
            subresource: None,
            body: json!({"metadata": {"uid": map.metadata.uid}, "data": data}),
        }),
        Some(_) => {}
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Cluster, namespace};
    use super::*;

    #[test]
    fn a_namespace_gets_its_account_and_ca_and_gets_them_back() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        cluster.add(namespace("team"));
        cluster.settle();
        let ca = Key::new("team", ROOT_CA);
        assert!(
            cluster
                .snapshot
                .service_accounts
                .contains(&Key::new("team", "default"))
        );
        assert_eq!(
            cluster
                .snapshot
                .config_maps
                .get(&ca)
                .unwrap()
                .data
                .as_ref()
                .unwrap()[CA_FILE],
            "the root ca"
        );
        cluster.delete_now("default");
        let mut spoiled = (**cluster.snapshot.config_maps.get(&ca).unwrap()).clone();
        spoiled.data = None;
        cluster.update(spoiled);
        cluster.settle();
        assert!(
            cluster
                .snapshot
                .service_accounts
                .contains(&Key::new("team", "default"))
        );
        assert!(
            cluster
                .snapshot
                .config_maps
                .get(&ca)
                .unwrap()
                .data
                .is_some()
        );
    }

    #[test]
    fn a_terminating_namespace_gets_nothing() {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        let mut going = namespace("going");
        going.metadata.deletion_timestamp = Some(cluster.time());
        cluster.add(going);
        cluster.settle();
        assert!(cluster.snapshot.service_accounts.is_empty());
    }
}
