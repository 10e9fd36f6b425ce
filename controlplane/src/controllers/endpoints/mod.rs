//! Where the pods of Services are and which of them may be used: EndpointSlices and, for older clients, Endpoints; and slices
//! that mirror Endpoints which users keep themselves.

mod desired;
mod mirror;
mod reconcile;
mod subsets;
#[cfg(test)]
mod tests;
mod topology;

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;

use self::reconcile::Origin;
use super::labels::Labels;
use super::nodes::{self, Zones};
use super::object::{Key, Object};
use super::plan::{Controller, Keys, Plan, View};
use super::pods::controller_reference;
use super::snapshot::{Change, SERVICE_NAME_LABEL, Snapshot, service_of_slice, service_selector};

pub use self::mirror::CONTROLLER as MIRRORING;
pub use self::subsets::CONTROLLER as SUBSETS;
pub use self::topology::is_shared_out;

/// Endpoints in one slice: upstream's default. A change rewrites one slice, so smaller slices make changes cheaper, and
/// more of them make lists longer.
pub const SLICE_ENDPOINTS_MAX: usize = 100;
const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// When the newest of the changes that a write of endpoints takes in came about: what network programming latency is
/// measured from.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

pub const CONTROLLER: Controller = Controller {
    name: "endpointslice",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    if let Object::EndpointSlice(_) = change.object() {
        for state in change.states() {
            if let Object::EndpointSlice(slice) = state {
                keys.extend(service_of_slice(slice));
            }
        }
    }
    if let Object::Node(_) = change.object() {
        let zones = |object: &Option<Object>| match object {
            Some(Object::Node(node)) => Zones::of(node),
            _ => Zones::default(),
        };
        if zones(&change.old) != zones(&change.new) {
            keys.extend(snapshot.services_by_zones().cloned());
        }
    }
    services_affected(snapshot, change, keys);
}

/// The Services whose endpoints the change may touch.
fn services_affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
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
    nodes::label(node, nodes::ZONE)
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let service = view.snapshot.services.get(key);
    let Some((service, selector)) =
        service.and_then(|service| Some((service, service_selector(service)?)))
    else {
        // No Service: its slices have owners, and garbage collection takes them. A Service that lost its selector keeps
        // its slices for whoever manages them from now on.
        return plan;
    };
    let mut groups = desired::groups(view.snapshot, service, selector);
    if is_shared_out(service) {
        for note in topology::share_out(view.snapshot, service, &mut groups) {
            plan.note(note);
        }
    }
    let trigger_time = trigger_time(view.snapshot, service, selector);
    let origin = Origin {
        service: key.clone(),
        manager: MANAGER,
        owner: controller_reference(&**service),
        labels: slice_labels(service),
        annotations: None,
        trigger_time: trigger_time.map(|time| time.to_string()),
        is_staying: is_staying(view.snapshot, &service.metadata),
    };
    reconcile::plan(view.snapshot, &origin, groups, &mut plan);
    plan
}

/// Whether neither an object nor its namespace is on its way out. What is served to the end, such as a Service that a finalizer holds,
/// has its endpoints kept up to date, and gets no new objects.
fn is_staying(snapshot: &Snapshot, meta: &ObjectMeta) -> bool {
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    meta.deletion_timestamp.is_none() && !snapshot.namespace_is_terminating(namespace)
}

fn is_headless(service: &Service) -> bool {
    let spec = service.spec.as_ref();
    spec.and_then(|spec| spec.cluster_ip.as_deref()) == Some("None")
}

/// The Service's own labels and those that say whose the slice is.
fn slice_labels(service: &Service) -> Labels {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    let name = service.metadata.name.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME_LABEL.into(), name);
    labels.insert(MANAGED_BY_LABEL.into(), MANAGER.into());
    if is_headless(service) {
        labels.insert(HEADLESS_LABEL.into(), String::new());
    } else {
        labels.remove(HEADLESS_LABEL);
    }
    labels
}

/// The newest change of the Service's pods, or its own making.
fn trigger_time(snapshot: &Snapshot, service: &Service, selector: &Labels) -> Option<Timestamp> {
    let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
    let pods = snapshot.pods_with_labels(namespace, selector);
    let changes = pods.filter_map(|pod| {
        super::pods::condition(pod, "Ready")?
            .last_transition_time
            .clone()
    });
    let times = changes.chain(service.metadata.creation_timestamp.clone());
    times.map(|Time(at)| at).max()
}
