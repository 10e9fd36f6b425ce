//! The fewest writes that turn the slices that are there into slices with the desired endpoints.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::json;

use super::super::labels::Labels;
use super::super::object::{Key, Object, Target};
use super::super::plan::{Action, Plan};
use super::super::pods::controller_reference;
use super::super::snapshot::{SERVICE_NAME_LABEL, Snapshot};
use super::desired::{Shape, address_type};
use super::{HEADLESS_LABEL, MANAGED_BY_LABEL, MANAGER, SLICE_ENDPOINTS_MAX};

pub fn plan(
    snapshot: &Snapshot,
    service: &Service,
    groups: BTreeMap<Shape, Vec<Endpoint>>,
    plan: &mut Plan,
) {
    let mut present: BTreeMap<Shape, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
    let mut useless = Vec::new();
    for slice in snapshot.slices_of_service(&Key::of(&service.metadata)) {
        let manager = slice
            .metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(MANAGED_BY_LABEL));
        if manager.map(String::as_str) != Some(MANAGER)
            || slice.metadata.deletion_timestamp.is_some()
        {
            continue;
        }
        match address_type(&slice.address_type) {
            Some(family) => {
                let shape = Shape::of_ports(family, slice.ports.as_deref().unwrap_or_default());
                present.entry(shape).or_default().push(slice.clone());
            }
            None => useless.push(slice.clone()),
        }
    }
    for (shape, endpoints) in groups {
        let slices = present.remove(&shape).unwrap_or_default();
        group(service, &shape, endpoints, slices, plan);
    }
    useless.extend(present.into_values().flatten());
    for slice in useless {
        plan.push(Action::Delete {
            target: Target::of(&*slice),
            propagation: None,
            grace_seconds: None,
        });
    }
}

/// What identifies an endpoint over time: the pod, and the address it had.
fn identity(endpoint: &Endpoint) -> (String, String) {
    let uid = endpoint
        .target_ref
        .as_ref()
        .and_then(|target| target.uid.clone())
        .unwrap_or_default();
    (uid, endpoint.addresses.first().cloned().unwrap_or_default())
}

fn group(
    service: &Service,
    shape: &Shape,
    wanted: Vec<Endpoint>,
    slices: Vec<Arc<EndpointSlice>>,
    plan: &mut Plan,
) {
    let mut wanted: BTreeMap<_, _> = wanted
        .into_iter()
        .map(|endpoint| (identity(&endpoint), endpoint))
        .collect();
    // Each slice keeps those of its endpoints that are still wanted, in their newest form.
    let mut kept: Vec<(Arc<EndpointSlice>, Vec<Endpoint>, bool)> = Vec::new();
    for slice in slices {
        let old = slice.endpoints.as_deref().unwrap_or_default();
        let new: Vec<Endpoint> = old
            .iter()
            .filter_map(|endpoint| wanted.remove(&identity(endpoint)))
            .collect();
        let changed = new != old || !labels_match(service, &slice);
        kept.push((slice, new, changed));
    }
    let mut rest: Vec<Endpoint> = wanted.into_values().collect();
    // New ones go first where a write is needed anyway, then to the fullest slice that has room for all of them.
    for (_, endpoints, changed) in &mut kept {
        if *changed && !endpoints.is_empty() {
            let room = SLICE_ENDPOINTS_MAX
                .saturating_sub(endpoints.len())
                .min(rest.len());
            endpoints.extend(rest.drain(..room));
        }
    }
    if !rest.is_empty() {
        let roomy = kept
            .iter_mut()
            .filter(|(_, endpoints, _)| endpoints.len() + rest.len() <= SLICE_ENDPOINTS_MAX)
            .max_by_key(|(_, endpoints, _)| endpoints.len());
        if let Some((_, endpoints, changed)) = roomy {
            endpoints.append(&mut rest);
            *changed = true;
        }
    }
    while !rest.is_empty() {
        let part = rest.split_off(rest.len().saturating_sub(SLICE_ENDPOINTS_MAX));
        plan.push(Action::Create(Object::of(new_slice(service, shape, part))));
    }
    // Empty slices go, but for one if nothing else says that the Service has no endpoints.
    let mut any = plan
        .writes
        .iter()
        .any(|write| matches!(write.action, Action::Create(_)))
        || kept.iter().any(|(_, endpoints, _)| !endpoints.is_empty());
    for (slice, endpoints, changed) in kept {
        if endpoints.is_empty() && any {
            plan.push(Action::Delete {
                target: Target::of(&*slice),
                propagation: None,
                grace_seconds: None,
            });
            continue;
        }
        any = true;
        if changed {
            plan.push(Action::Patch {
                target: Target::of(&*slice),
                subresource: None,
                body: json!({
                    "metadata": {
                        "uid": slice.metadata.uid,
                        "resourceVersion": slice.metadata.resource_version,
                        "labels": labels_of(service),
                    },
                    "endpoints": endpoints,
                }),
            });
        }
    }
    if !any {
        plan.push(Action::Create(Object::of(new_slice(
            service,
            shape,
            Vec::new(),
        ))));
    }
}

fn labels_match(service: &Service, slice: &EndpointSlice) -> bool {
    let labels = slice.metadata.labels.as_ref();
    labels_of(service)
        .iter()
        .all(|(name, value)| labels.and_then(|labels| labels.get(name)) == Some(value))
}

/// The Service's own labels and those that say whose the slice is.
fn labels_of(service: &Service) -> Labels {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.insert(
        SERVICE_NAME_LABEL.into(),
        service.metadata.name.clone().unwrap_or_default(),
    );
    labels.insert(MANAGED_BY_LABEL.into(), MANAGER.into());
    if service
        .spec
        .as_ref()
        .and_then(|spec| spec.cluster_ip.as_deref())
        == Some("None")
    {
        labels.insert(HEADLESS_LABEL.into(), String::new());
    } else {
        labels.remove(HEADLESS_LABEL);
    }
    labels
}

fn new_slice(service: &Service, shape: &Shape, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let name = service.metadata.name.as_deref().unwrap_or_default();
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", name.chars().take(57).collect::<String>())),
            namespace: service.metadata.namespace.clone(),
            labels: Some(labels_of(service)),
            owner_references: Some(vec![controller_reference(service)]),
            ..Default::default()
        },
        address_type: shape.address_type.into(),
        endpoints: Some(endpoints),
        ports: Some(shape.endpoint_ports()),
    }
}
