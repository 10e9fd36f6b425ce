//! EndpointSlice: for every Service with a selector, slices that say where its pods are and which of them may be used.

mod desired;
mod reconcile;
#[cfg(test)]
mod tests;

use k8s_openapi::api::core::v1::{Node, Pod};

use super::object::{Key, Object};
use super::plan::{Controller, Keys, Plan, View};
use super::snapshot::{Change, Snapshot, service_of_slice, service_selector};

/// Endpoints in one slice: upstream's default. A change rewrites one slice, so smaller slices make changes cheaper, and
/// more of them make lists longer.
pub const SLICE_ENDPOINTS_MAX: usize = 100;
const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

pub const CONTROLLER: Controller = Controller {
    name: "endpointslice",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    if let (Some(Object::Pod(old)), Some(Object::Pod(new))) = (&change.old, &change.new)
        && same_for_endpoints(old, new)
    {
        return;
    }
    if let (Some(Object::Node(old)), Some(Object::Node(new))) = (&change.old, &change.new)
        && zone(old) == zone(new)
    {
        return;
    }
    for state in change.states() {
        match state {
            Object::Service(service) => {
                keys.insert(Key::of(&service.metadata));
            }
            Object::Pod(pod) => keys.extend(snapshot.services_selecting(&pod.metadata).cloned()),
            Object::EndpointSlice(slice) => keys.extend(service_of_slice(slice)),
            Object::Node(node) => {
                let pods = snapshot.pods_on_node(node.metadata.name.as_deref().unwrap_or_default());
                keys.extend(
                    pods.flat_map(|pod| snapshot.services_selecting(&pod.metadata).cloned()),
                );
            }
            _ => {}
        }
    }
}

/// Whether two states of a pod give the same endpoints: most updates of a pod's status do.
fn same_for_endpoints(old: &Pod, new: &Pod) -> bool {
    let seen = |pod: &Pod| {
        (
            super::pods::is_ready(pod),
            super::pods::is_terminating(pod),
            super::pods::phase(pod).to_string(),
            desired::addresses(pod)
                .map(str::to_string)
                .collect::<Vec<_>>(),
            pod.metadata.labels.clone(),
        )
    };
    let place = |pod: &Pod| {
        let spec = super::pods::spec(pod);
        (
            spec.node_name.clone(),
            spec.hostname.clone(),
            spec.subdomain.clone(),
        )
    };
    old.metadata.uid == new.metadata.uid && seen(old) == seen(new) && place(old) == place(new)
}

fn zone(node: &Node) -> Option<&String> {
    node.metadata
        .labels
        .as_ref()?
        .get("topology.kubernetes.io/zone")
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let service = view.snapshot.services.get(key);
    let live = service.filter(|service| service.metadata.deletion_timestamp.is_none());
    let Some((service, selector)) =
        live.and_then(|service| Some((service, service_selector(service)?)))
    else {
        // No Service: its slices have owners, and garbage collection takes them. A Service that lost its selector keeps
        // its slices for whoever manages them from now on.
        return plan;
    };
    if view.snapshot.namespace_is_terminating(&key.namespace) {
        return plan;
    }
    let groups = desired::groups(view.snapshot, service, selector);
    reconcile::plan(view.snapshot, service, groups, &mut plan);
    plan
}
