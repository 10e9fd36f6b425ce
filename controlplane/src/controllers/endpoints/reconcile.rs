//! The fewest writes that turn the slices that are there into slices with the desired endpoints.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use serde_json::json;

use super::super::labels::Labels;
use super::super::object::{Key, Object, Target};
use super::super::plan::{Action, Plan};
use super::super::snapshot::Snapshot;
use super::desired::{Shape, address_type};
use super::{MANAGED_BY_LABEL, SLICE_ENDPOINTS_MAX};

/// What slices are made from, and what they carry of it.
pub struct Origin {
    /// The Service.
    pub service: Key,
    /// Value of the label that says who keeps the slices: others' slices of the Service are left alone.
    pub manager: &'static str,
    pub owner: OwnerReference,
    pub labels: Labels,
    pub annotations: Labels,
}

pub fn plan(
    snapshot: &Snapshot,
    origin: &Origin,
    groups: BTreeMap<Shape, Vec<Endpoint>>,
    plan: &mut Plan,
) {
    let mut present: BTreeMap<Shape, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
    let mut useless = Vec::new();
    for slice in snapshot.slices_of_service(&origin.service) {
        let manager = slice
            .metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(MANAGED_BY_LABEL));
        if manager.map(String::as_str) != Some(origin.manager)
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
        group(origin, &shape, endpoints, slices, plan);
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
    origin: &Origin,
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
        let changed = new != old || !labels_match(origin, &slice);
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
        plan.push(Action::Create(Object::of(new_slice(origin, shape, part))));
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
                        "labels": origin.labels,
                        "annotations": origin.annotations,
                    },
                    "endpoints": endpoints,
                }),
            });
        }
    }
    if !any {
        plan.push(Action::Create(Object::of(new_slice(
            origin,
            shape,
            Vec::new(),
        ))));
    }
}

fn labels_match(origin: &Origin, slice: &EndpointSlice) -> bool {
    let labels = slice.metadata.labels.as_ref();
    origin
        .labels
        .iter()
        .all(|(name, value)| labels.and_then(|labels| labels.get(name)) == Some(value))
}

fn new_slice(origin: &Origin, shape: &Shape, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let prefix: String = origin.service.name.chars().take(57).collect();
    let annotations = origin.annotations.clone();
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{prefix}-")),
            namespace: Some(origin.service.namespace.to_string()),
            labels: Some(origin.labels.clone()),
            annotations: (!annotations.is_empty()).then_some(annotations),
            owner_references: Some(vec![origin.owner.clone()]),
            ..Default::default()
        },
        address_type: shape.address_type.into(),
        endpoints: Some(endpoints),
        ports: Some(shape.endpoint_ports()),
    }
}
