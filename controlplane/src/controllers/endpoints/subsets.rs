//! Endpoints of Services with a selector: what slices say, in the form of before there were slices. One object holds all
//! addresses of the Service's first address family, up to a bound.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Pod, Service,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::json;

use super::super::labels::Labels;
use super::super::object::{Key, Object, Target};
use super::super::plan::{Action, Controller, Keys, Plan, View};
use super::super::pods;
use super::super::snapshot::{Change, Snapshot, service_selector};
use super::desired::{self, Shape};
use super::{
    HEADLESS_LABEL, TRIGGER_TIME, is_headless, is_staying, services_affected, trigger_time,
};

/// Addresses in one object: upstream's bound.
const ADDRESSES_MAX: usize = 1000;
pub const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
pub const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
pub const MANAGER: &str = "endpoint-controller";
/// Keys of Services that have just gone; their names hold no slash.
const GONE: &str = "gone/";

pub const CONTROLLER: Controller = Controller {
    name: "endpoints",
    affected,
    plan,
};

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    match (change.object(), &change.new) {
        (Object::Endpoints(endpoints), _) => {
            keys.insert(Key::of(&endpoints.metadata));
        }
        (Object::Service(service), None) => {
            let key = Key::of(&service.metadata);
            keys.insert(Key::new(&key.namespace, &format!("{GONE}{}", key.name)));
        }
        _ => services_affected(snapshot, change, keys),
    }
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    if let Some(name) = key.name.strip_prefix(GONE) {
        // Endpoints go with their Service, also those that a user has made.
        let key = Key::new(&key.namespace, name);
        if !view.snapshot.services.contains(&key) {
            delete(view.snapshot, &key, |_| true, &mut plan);
        }
        return plan;
    }
    let Some(service) = view.snapshot.services.get(key) else {
        // Made before their Service, or left over from one that went unseen.
        delete(view.snapshot, key, is_ours, &mut plan);
        return plan;
    };
    let Some(selector) = service_selector(service) else {
        return plan;
    };
    let (subsets, truncated) = subsets(view.snapshot, service, selector);
    let mut annotations = Labels::new();
    if let Some(time) = trigger_time(view.snapshot, service, selector) {
        annotations.insert(TRIGGER_TIME.into(), time.to_string());
    }
    if truncated {
        annotations.insert(OVER_CAPACITY.into(), "truncated".into());
    }
    let labels = labels_of(service);
    let Some(found) = view.snapshot.endpoints.get(key) else {
        if !is_staying(view.snapshot, &service.metadata) {
            return plan;
        }
        plan.push(Action::Create(Object::of(Endpoints {
            metadata: ObjectMeta {
                name: Some(key.name.to_string()),
                namespace: Some(key.namespace.to_string()),
                labels: Some(labels),
                annotations: Some(annotations),
                ..Default::default()
            },
            subsets: (!subsets.is_empty()).then_some(subsets),
        })));
        return plan;
    };
    let marked = found
        .metadata
        .annotations
        .as_ref()
        .is_some_and(|annotations| annotations.contains_key(OVER_CAPACITY));
    let stays = found.subsets.as_deref().unwrap_or_default() == subsets
        && found.metadata.labels.as_ref() == Some(&labels)
        && marked == truncated;
    if !stays {
        let mut written = json!(annotations);
        if marked && !truncated {
            written[OVER_CAPACITY] = json!(null);
        }
        // Labels that the Service has no more go as well.
        let mut written_labels = json!(labels);
        for label in found.metadata.labels.iter().flatten().map(|(name, _)| name) {
            if !labels.contains_key(label) {
                written_labels[label] = json!(null);
            }
        }
        plan.push(Action::Patch {
            target: Target::of(&**found),
            subresource: None,
            body: json!({
                "metadata": {
                    "uid": found.metadata.uid, "resourceVersion": found.metadata.resource_version,
                    "labels": written_labels, "annotations": written,
                },
                "subsets": subsets,
            }),
        });
    }
    plan
}

fn is_ours(endpoints: &Endpoints) -> bool {
    let labels = endpoints.metadata.labels.as_ref();
    labels
        .and_then(|labels| labels.get(MANAGED_BY))
        .map(String::as_str)
        == Some(MANAGER)
}

fn delete(snapshot: &Snapshot, key: &Key, which: fn(&Endpoints) -> bool, plan: &mut Plan) {
    let found = snapshot.endpoints.get(key);
    if let Some(found) = found.filter(|found| which(found)) {
        plan.push(Action::Delete {
            target: Target::of(&**found),
            propagation: None,
            grace_seconds: None,
        });
    }
}

fn labels_of(service: &Service) -> Labels {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    if is_headless(service) {
        labels.insert(HEADLESS_LABEL.into(), String::new());
    } else {
        labels.remove(HEADLESS_LABEL);
    }
    labels
}

/// The Service's endpoints by the ports they share, and whether some had to be left out: those that are not ready first.
fn subsets(
    snapshot: &Snapshot,
    service: &Service,
    selector: &Labels,
) -> (Vec<EndpointSubset>, bool) {
    let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
    let publish = service
        .spec
        .as_ref()
        .and_then(|spec| spec.publish_not_ready_addresses)
        .unwrap_or(false);
    let family = desired::families(service)[0];
    let mut found: Vec<(bool, Shape, EndpointAddress)> = Vec::new();
    for pod in snapshot.pods_with_labels(namespace, selector) {
        if pods::is_terminal(pod) || (pods::is_terminating(pod) && !publish) {
            continue;
        }
        let Some(ip) = desired::addresses(pod).find(|ip| desired::is_of(ip, family)) else {
            continue;
        };
        let shape = Shape::of_ports(family, &desired::ports_in(service, pod));
        found.push((
            publish || pods::is_ready(pod),
            shape,
            address(service, pod, ip),
        ));
    }
    found.sort_by(|a, b| (!a.0, &a.2.ip).cmp(&(!b.0, &b.2.ip)));
    let truncated = found.len() > ADDRESSES_MAX;
    found.truncate(ADDRESSES_MAX);
    let mut subsets: BTreeMap<Shape, EndpointSubset> = BTreeMap::new();
    for (ready, shape, address) in found {
        let subset = subsets.entry(shape).or_default();
        let list = if ready {
            &mut subset.addresses
        } else {
            &mut subset.not_ready_addresses
        };
        list.get_or_insert_default().push(address);
    }
    let subsets = subsets.into_iter().map(|(shape, mut subset)| {
        let ports: Vec<_> = shape
            .ports
            .into_iter()
            .map(|(name, protocol, port, app_protocol)| EndpointPort {
                name: (!name.is_empty()).then_some(name),
                protocol: Some(protocol),
                port,
                app_protocol,
            })
            .collect();
        subset.ports = (!ports.is_empty()).then_some(ports);
        subset
    });
    (subsets.collect(), truncated)
}

fn address(service: &Service, pod: &Pod, ip: &str) -> EndpointAddress {
    let spec = pods::spec(pod);
    let mut target = Target::of(pod).reference();
    target.api_version = None;
    EndpointAddress {
        ip: ip.into(),
        hostname: spec.hostname.clone().filter(|hostname| {
            !hostname.is_empty()
                && spec.subdomain.is_some()
                && spec.subdomain == service.metadata.name
        }),
        node_name: pods::node_name(pod).map(str::to_string),
        target_ref: Some(target),
    }
}
