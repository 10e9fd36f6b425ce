//! The fewest writes that turn the slices that are there into slices with the desired endpoints, in an order in which no endpoint
//! is missing meanwhile: slices are made and changed first, and what is left over goes once that has been done.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use serde_json::{Value, json};

use super::super::labels::Labels;
use super::super::object::{Key, Object, Target};
use super::super::plan::{Action, Plan, Write};
use super::super::snapshot::Snapshot;
use super::desired::{Shape, address_type};
use super::{MANAGED_BY_LABEL, SLICE_ENDPOINTS_MAX, TRIGGER_TIME};

/// What slices are made from, and what they carry of it.
pub struct Origin {
    /// The Service.
    pub service: Key,
    /// Value of the label that says who keeps the slices: others' slices of the Service are left alone.
    pub manager: &'static str,
    /// Slices of another owner are those of one that was here before, and go with it.
    pub owner: OwnerReference,
    pub labels: Labels,
    /// What slices have taken over of annotations; None where annotations are nobody's concern.
    pub annotations: Option<Labels>,
    pub trigger_time: Option<String>,
    /// Whether slices may be made, and those of another owner replaced: garbage collection may be at work where the owner is on its
    /// way out, and leave slices behind for the next one.
    pub is_staying: bool,
}

/// A slice that stays, and what will be in it.
struct Kept {
    slice: Arc<EndpointSlice>,
    endpoints: Vec<Endpoint>,
    changed: bool,
}

/// The endpoints of one shape that are wanted, by what identifies them, and the slices that hold some of them.
struct Group {
    wanted: BTreeMap<(String, String), Endpoint>,
    slices: Vec<Arc<EndpointSlice>>,
}

/// What comes of the groups: slices that are to change, that are to be, and that nobody needs as they are.
#[derive(Default)]
struct Balance {
    changes: Vec<Action>,
    wanted: Vec<(Shape, Vec<Endpoint>)>,
    spare: Vec<Arc<EndpointSlice>>,
}

pub fn plan(
    snapshot: &Snapshot,
    origin: &Origin,
    groups: BTreeMap<Shape, Vec<Endpoint>>,
    plan: &mut Plan,
) {
    let group = |(shape, endpoints): (Shape, Vec<Endpoint>)| {
        let named = endpoints.into_iter().map(|one| (identity(&one), one));
        let group = Group {
            wanted: named.collect(),
            slices: Vec::new(),
        };
        (shape, group)
    };
    let mut groups: BTreeMap<Shape, Group> = groups.into_iter().map(group).collect();
    let mut balance = Balance::default();
    let (mut strangers, mut homeless) = (Vec::new(), Vec::new());
    for slice in snapshot.slices_of_service(&origin.service) {
        let labels = slice.metadata.labels.as_ref();
        let manager = labels.and_then(|labels| labels.get(MANAGED_BY_LABEL));
        if manager.map(String::as_str) != Some(origin.manager)
            || slice.metadata.deletion_timestamp.is_some()
        {
            continue;
        }
        match shape_of(slice).filter(|_| is_owned(origin, slice)) {
            None if origin.is_staying => strangers.push(slice.clone()),
            None => {}
            Some(shape) => match groups.get_mut(&shape) {
                Some(group) => group.slices.push(slice.clone()),
                None => homeless.push(slice.clone()),
            },
        }
    }
    // A slice whose ports nobody has any more goes to where most of its endpoints are now: a Service that gains a port changes
    // its slices, and none of its endpoints is anywhere else meanwhile.
    for slice in homeless {
        let family = slice.address_type.as_str();
        let home = groups
            .iter_mut()
            .filter(|(shape, _)| shape.address_type == family)
            .map(|(_, group)| (group.has_of(&slice), group))
            .filter(|(count, _)| *count > 0)
            .max_by_key(|(count, _)| *count);
        match home {
            Some((_, group)) => group.slices.push(slice),
            None => balance.spare.push(slice),
        }
    }
    for (shape, group) in groups {
        settle(origin, &shape, group, &mut balance);
    }
    // What is wanted is made of what is spare, and of nothing where that does not suffice.
    for (shape, endpoints) in balance.wanted {
        let same_family = |slice: &Arc<EndpointSlice>| slice.address_type == shape.address_type;
        match balance.spare.iter().position(same_family) {
            Some(at) => {
                let slice = balance.spare.swap_remove(at);
                let change = change(origin, &shape, &slice, &endpoints);
                balance.changes.push(change);
            }
            None if origin.is_staying => {
                plan.push(Action::Create(Object::of(new_slice(
                    origin, &shape, endpoints,
                ))));
            }
            None => {}
        }
    }
    let deletes = balance.spare.into_iter().chain(strangers);
    let delete = |slice: Arc<EndpointSlice>| Action::Delete {
        target: Target::of(&*slice),
        propagation: None,
        grace_seconds: None,
    };
    for stage in [balance.changes, deletes.map(delete).collect()] {
        let writes = stage.into_iter().map(|action| Write { action, note: None });
        plan.then.push(writes.collect());
    }
    plan.then.retain(|stage| !stage.is_empty());
}

fn is_owned(origin: &Origin, slice: &EndpointSlice) -> bool {
    let owners = slice.metadata.owner_references.as_deref();
    let mut owners = owners.unwrap_or_default().iter();
    owners.any(|owner| owner.uid == origin.owner.uid && owner.kind == origin.owner.kind)
}

fn shape_of(slice: &EndpointSlice) -> Option<Shape> {
    let ports = slice.ports.as_deref().unwrap_or_default();
    address_type(&slice.address_type).map(|family| Shape::of_ports(family, ports))
}

/// What identifies an endpoint over time: the pod, and the address it had.
pub fn identity(endpoint: &Endpoint) -> (String, String) {
    let uid = endpoint
        .target_ref
        .as_ref()
        .and_then(|target| target.uid.clone())
        .unwrap_or_default();
    (uid, endpoint.addresses.first().cloned().unwrap_or_default())
}

impl Group {
    /// How many of a slice's endpoints are wanted here.
    fn has_of(&self, slice: &EndpointSlice) -> usize {
        let endpoints = slice.endpoints.iter().flatten();
        endpoints
            .filter(|endpoint| self.wanted.contains_key(&identity(endpoint)))
            .count()
    }
}

fn settle(origin: &Origin, shape: &Shape, group: Group, balance: &mut Balance) {
    let Group { mut wanted, slices } = group;
    let nothing = wanted.is_empty();
    // Each slice keeps those of its endpoints that are still wanted, in their newest form.
    let mut kept: Vec<Kept> = Vec::new();
    for slice in slices {
        let old = slice.endpoints.as_deref().unwrap_or_default();
        let endpoints: Vec<Endpoint> = old
            .iter()
            .filter_map(|endpoint| wanted.remove(&identity(endpoint)))
            .collect();
        if endpoints.is_empty() && !(nothing && kept.is_empty()) {
            balance.spare.push(slice);
            continue;
        }
        let changed = endpoints != old
            || shape_of(&slice).as_ref() != Some(shape)
            || !carries(origin, &slice);
        kept.push(Kept {
            slice,
            endpoints,
            changed,
        });
    }
    let mut rest: Vec<Endpoint> = wanted.into_values().collect();
    // New ones go first where a write is needed anyway, the fullest slices first.
    kept.sort_by_key(|kept| std::cmp::Reverse(kept.endpoints.len()));
    for kept in kept.iter_mut().filter(|kept| kept.changed) {
        let room = SLICE_ENDPOINTS_MAX.saturating_sub(kept.endpoints.len());
        kept.endpoints.extend(rest.drain(..room.min(rest.len())));
    }
    // Then to the fullest slice that has room for all that are left of them, and to slices of their own before that.
    while !rest.is_empty() {
        let roomy = kept.iter_mut().filter(|kept| !kept.changed);
        let roomy = roomy
            .filter(|kept| kept.endpoints.len() + rest.len() <= SLICE_ENDPOINTS_MAX)
            .max_by_key(|kept| kept.endpoints.len());
        match roomy {
            Some(kept) => {
                kept.endpoints.append(&mut rest);
                kept.changed = true;
            }
            None => {
                let part = rest.len().saturating_sub(SLICE_ENDPOINTS_MAX);
                balance.wanted.push((shape.clone(), rest.split_off(part)));
            }
        }
    }
    if nothing && kept.is_empty() {
        // One says that there is nobody.
        balance.wanted.push((shape.clone(), Vec::new()));
    }
    for kept in kept.into_iter().filter(|kept| kept.changed) {
        let change = change(origin, shape, &kept.slice, &kept.endpoints);
        balance.changes.push(change);
    }
}

/// Whether a slice carries what it should of its origin, and nothing else. The time of the last change is no change.
fn carries(origin: &Origin, slice: &EndpointSlice) -> bool {
    let meta = &slice.metadata;
    let present = meta.annotations.iter().flatten();
    let mut present = present.filter(|(name, _)| *name != TRIGGER_TIME);
    let annotated = origin.annotations.as_ref().is_none_or(|wanted| {
        let mut count = 0;
        present.all(|(name, value)| {
            count += 1;
            wanted.get(name) == Some(value)
        }) && count == wanted.len()
    });
    annotated && meta.labels.as_ref() == Some(&origin.labels)
}

fn change(origin: &Origin, shape: &Shape, slice: &EndpointSlice, endpoints: &[Endpoint]) -> Action {
    let meta = &slice.metadata;
    let mut annotations = json!(annotations(origin));
    match &origin.annotations {
        Some(_) => drop_others(&mut annotations, meta.annotations.as_ref()),
        None if origin.trigger_time.is_none() => annotations[TRIGGER_TIME] = Value::Null,
        None => {}
    }
    let mut labels = json!(origin.labels);
    drop_others(&mut labels, meta.labels.as_ref());
    let mut body = json!({
        "metadata": {
            "uid": meta.uid,
            "resourceVersion": meta.resource_version,
            "labels": labels,
            "annotations": annotations,
        },
        "endpoints": endpoints,
    });
    if shape_of(slice).as_ref() != Some(shape) {
        body["ports"] = json!(shape.endpoint_ports());
    }
    Action::Patch {
        target: Target::of(slice),
        subresource: None,
        body,
    }
}

/// Lets a merge patch take away what is present and not wanted.
fn drop_others(wanted: &mut Value, present: Option<&Labels>) {
    for name in present.into_iter().flatten().map(|(name, _)| name) {
        if wanted.get(name).is_none() {
            wanted[name] = Value::Null;
        }
    }
}

fn annotations(origin: &Origin) -> Labels {
    let mut annotations = origin.annotations.clone().unwrap_or_default();
    let time = origin.trigger_time.clone();
    annotations.extend(time.map(|time| (TRIGGER_TIME.to_owned(), time)));
    annotations
}

fn new_slice(origin: &Origin, shape: &Shape, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let prefix: String = origin.service.name.chars().take(57).collect();
    let annotations = annotations(origin);
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
