//! The snapshot, and what a change makes of it.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use im::HashMap;

use crate::{
    EndpointSlice, Kind, Node, Object, ObjectKey, ObjectRef, Pod, Service, ServiceKey, SliceKey,
};

/// An immutable view of the cluster. Clones share everything; `apply` copies only the path to what changed.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    services: HashMap<ServiceKey, Arc<Service>>,
    slices: HashMap<SliceKey, Arc<EndpointSlice>>,
    /// The slices of each Service, ordered by name, so that plans do not depend on the order of arrival.
    slices_of: HashMap<ServiceKey, Arc<Vec<Arc<EndpointSlice>>>>,
    nodes: HashMap<Arc<str>, Arc<Node>>,
    pods: HashMap<ObjectKey, Arc<Pod>>,
    synced: [bool; Kind::ALL.len()],
}

/// One thing that happened in the cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    Upsert(Object),
    Remove(ObjectRef),
    /// The complete list of a kind: what is not in it is gone. The kind counts as synced from here on.
    Replace(Kind, Vec<Object>),
}

/// The keys whose plans may differ since they were last planned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Services that changed, or whose slices did.
    pub services: BTreeSet<ServiceKey>,
    pub nodes: BTreeSet<Arc<str>>,
    pub pods: BTreeSet<ObjectKey>,
    /// Kinds whose first complete list has arrived.
    pub synced: BTreeSet<Kind>,
}

impl Dirty {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Snapshot {
    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// All Services, in no particular order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The slices of a Service, ordered by name. The Service itself need not exist.
    pub fn slices(&self, service: &ServiceKey) -> &[Arc<EndpointSlice>] {
        self.slices_of
            .get(service)
            .map_or(&[], |slices| slices.as_slice())
    }

    /// All slices, in no particular order.
    pub fn all_slices(&self) -> impl Iterator<Item = &Arc<EndpointSlice>> {
        self.slices.values()
    }

    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.get(name)
    }

    /// All Nodes, in no particular order.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    pub fn pod(&self, key: &ObjectKey) -> Option<&Arc<Pod>> {
        self.pods.get(key)
    }

    /// All Pods, in no particular order.
    pub fn pods(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.values()
    }

    /// The number of objects of a kind.
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Service => self.services.len(),
            Kind::EndpointSlice => self.slices.len(),
            Kind::Node => self.nodes.len(),
            Kind::Pod => self.pods.len(),
        }
    }

    /// Whether a complete list of the kind has ever arrived. Before that, an absent object means nothing.
    pub fn synced(&self, kind: Kind) -> bool {
        self.synced[kind as usize]
    }

    /// Applies one change and adds to `dirty` the keys that it touched. A change that changes nothing adds none.
    pub fn apply(&mut self, change: Change, dirty: &mut Dirty) {
        match change {
            Change::Upsert(object) => self.upsert(object, dirty),
            Change::Remove(reference) => self.remove(&reference, dirty),
            Change::Replace(kind, objects) => self.replace(kind, objects, dirty),
        }
    }

    fn upsert(&mut self, object: Object, dirty: &mut Dirty) {
        match object {
            Object::Service(service) => {
                if self.services.get(&service.key) != Some(&service) {
                    dirty.services.insert(service.key.clone());
                    self.services.insert(service.key.clone(), service);
                }
            }
            Object::EndpointSlice(slice) => {
                let old = self.slices.get(&slice.key);
                if old == Some(&slice) {
                    return;
                }
                let moved_from = old
                    .and_then(|old| old.service.clone())
                    .filter(|key| Some(key) != slice.service.as_ref());
                if let Some(key) = moved_from {
                    self.unindex(&key, &slice.key);
                    dirty.services.insert(key);
                }
                if let Some(service) = &slice.service {
                    self.index(service, &slice);
                    dirty.services.insert(service.clone());
                }
                self.slices.insert(slice.key.clone(), slice);
            }
            Object::Node(node) => {
                if self.nodes.get(&node.name) != Some(&node) {
                    dirty.nodes.insert(node.name.clone());
                    self.nodes.insert(node.name.clone(), node);
                }
            }
            Object::Pod(pod) => {
                if self.pods.get(&pod.key) != Some(&pod) {
                    dirty.pods.insert(pod.key.clone());
                    self.pods.insert(pod.key.clone(), pod);
                }
            }
        }
    }

    fn remove(&mut self, reference: &ObjectRef, dirty: &mut Dirty) {
        let key = &reference.key;
        match reference.kind {
            Kind::Service => {
                if self.services.remove(key).is_some() {
                    dirty.services.insert(key.clone());
                }
            }
            Kind::EndpointSlice => {
                if let Some(service) = self
                    .slices
                    .remove(key)
                    .and_then(|slice| slice.service.clone())
                {
                    self.unindex(&service, key);
                    dirty.services.insert(service);
                }
            }
            Kind::Node => {
                if self.nodes.remove(&key.name).is_some() {
                    dirty.nodes.insert(key.name.clone());
                }
            }
            Kind::Pod => {
                if self.pods.remove(key).is_some() {
                    dirty.pods.insert(key.clone());
                }
            }
        }
    }

    fn replace(&mut self, kind: Kind, objects: Vec<Object>, dirty: &mut Dirty) {
        let listed: HashSet<ObjectKey> = objects
            .iter()
            .map(|object| object.reference().key)
            .collect();
        let gone: Vec<ObjectKey> = match kind {
            Kind::Service => self
                .services
                .keys()
                .filter(|key| !listed.contains(key))
                .cloned()
                .collect(),
            Kind::EndpointSlice => self
                .slices
                .keys()
                .filter(|key| !listed.contains(key))
                .cloned()
                .collect(),
            Kind::Pod => self
                .pods
                .keys()
                .filter(|key| !listed.contains(key))
                .cloned()
                .collect(),
            Kind::Node => {
                let keys = self.nodes.keys().map(|name| ObjectKey {
                    namespace: "".into(),
                    name: name.clone(),
                });
                keys.filter(|key| !listed.contains(key)).collect()
            }
        };
        for key in gone {
            self.remove(&ObjectRef { kind, key }, dirty);
        }
        for object in objects {
            debug_assert_eq!(object.kind(), kind);
            self.upsert(object, dirty);
        }
        if !std::mem::replace(&mut self.synced[kind as usize], true) {
            dirty.synced.insert(kind);
        }
    }

    fn index(&mut self, service: &ServiceKey, slice: &Arc<EndpointSlice>) {
        let slices = Arc::make_mut(self.slices_of.entry(service.clone()).or_default());
        match slices.binary_search_by(|other| other.key.name.cmp(&slice.key.name)) {
            Ok(at) => slices[at] = slice.clone(),
            Err(at) => slices.insert(at, slice.clone()),
        }
    }

    fn unindex(&mut self, service: &ServiceKey, slice: &SliceKey) {
        let Some(slices) = self.slices_of.get_mut(service) else {
            return;
        };
        let slices = Arc::make_mut(slices);
        slices.retain(|other| other.key != *slice);
        if slices.is_empty() {
            self.slices_of.remove(service);
        }
    }
}

impl PartialEq for Snapshot {
    fn eq(&self, other: &Self) -> bool {
        self.services == other.services
            && self.slices == other.slices
            && self.slices_of == other.slices_of
            && self.nodes == other.nodes
            && self.pods == other.pods
            && self.synced == other.synced
    }
}
