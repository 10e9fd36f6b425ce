//! The state of the cluster as far as it has been seen: tables that share structure, and indexes for the questions that
//! controllers ask. Fed by watches and by the answers to our own writes, whichever comes first.

use std::collections::{HashSet, VecDeque};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::api::apps::v1::{ControllerRevision, ReplicaSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::graph::Graph;
use super::nodes::Zones;
use super::object::{Key, Kind, Object, ResourceType, Tables};
use super::pods::controller_of;

/// Label of a slice that names its Service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Namespace of the Leases that kubelets renew.
pub const NODE_LEASE_NAMESPACE: &str = "kube-node-lease";
/// How many deleted UIDs are remembered. A late answer to a write of ours must not bring a deleted object back; such
/// an answer is late by at most the writes in flight, which are far fewer than this.
const TOMBSTONES_MAX: usize = 16_384;
/// The one property of Services by zones.
const SHARED_OUT: &str = "";

/// Objects of one kind by key, in key order.
#[derive(Clone)]
pub struct Table<K>(im::OrdMap<Key, Arc<K>>);

impl<K> Default for Table<K> {
    fn default() -> Self {
        Self(im::OrdMap::new())
    }
}

impl<K> Table<K> {
    pub fn get(&self, key: &Key) -> Option<&Arc<K>> {
        self.0.get(key)
    }

    pub fn contains(&self, key: &Key) -> bool {
        self.0.contains_key(key)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Arc<K>)> {
        self.0.iter()
    }

    pub fn values(&self) -> impl Iterator<Item = &Arc<K>> {
        self.0.values()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The objects of one namespace.
    pub fn namespace<'a>(
        &'a self,
        namespace: &'a str,
    ) -> impl Iterator<Item = (&'a Key, &'a Arc<K>)> + 'a {
        self.0
            .range(Key::new(namespace, "")..)
            .take_while(move |(key, _)| &*key.namespace == namespace)
    }

    pub(super) fn put(&mut self, key: Key, object: Arc<K>) {
        self.0.insert(key, object);
    }

    pub(super) fn take(&mut self, key: &Key) {
        self.0.remove(key);
    }
}

/// Keys of objects by some property of theirs.
#[derive(Clone, Default)]
struct Index(im::HashMap<Arc<str>, im::OrdSet<Key>>);

impl Index {
    fn add(&mut self, property: &str, key: &Key) {
        match self.0.get_mut(property) {
            Some(keys) => {
                keys.insert(key.clone());
            }
            None => {
                self.0
                    .insert(property.into(), im::OrdSet::unit(key.clone()));
            }
        }
    }

    fn remove(&mut self, property: &str, key: &Key) {
        if let Some(keys) = self.0.get_mut(property) {
            keys.remove(key);
            if keys.is_empty() {
                self.0.remove(property);
            }
        }
    }

    fn get(&self, property: &str) -> impl Iterator<Item = &Key> {
        self.0.get(property).into_iter().flatten()
    }

    fn len(&self, property: &str) -> usize {
        self.0.get(property).map_or(0, im::OrdSet::len)
    }
}

/// What one object was and is; at least one of the two is there.
#[derive(Clone, Debug)]
pub struct Change {
    pub old: Option<Object>,
    pub new: Option<Object>,
}

impl Change {
    /// The newest state known of the object: its last one when it is gone.
    pub fn object(&self) -> &Object {
        self.new
            .as_ref()
            .or(self.old.as_ref())
            .expect("a change has an old or a new state")
    }

    pub fn states(&self) -> impl Iterator<Item = &Object> {
        self.old.iter().chain(self.new.iter())
    }
}

/// An immutable view of the cluster. Cloning is cheap: clones share all that is equal.
#[derive(Clone, Default)]
pub struct Snapshot {
    tables: Tables,
    /// Every object of every resource, by UID, with owners and dependents.
    pub graph: Graph,
    /// Resources that the API server serves with list, watch and delete.
    pub resources: Arc<Vec<Arc<ResourceType>>>,
    pods_by_owner: Index,
    pods_by_node: Index,
    pods_by_label: Index,
    replica_sets_by_owner: Index,
    revisions_by_owner: Index,
    jobs_by_owner: Index,
    services_by_label: Index,
    /// Under one property, those that go by what zones have.
    services_by_zones: Index,
    slices_by_service: Index,
    heartbeats: im::HashMap<Arc<str>, Instant>,
    charges: im::HashMap<Key, Instant>,
    zones: Zones,
    tombstones: Arc<Tombstones>,
}

#[derive(Clone, Default)]
struct Tombstones {
    uids: HashSet<Arc<str>>,
    order: VecDeque<Arc<str>>,
}

impl Deref for Snapshot {
    type Target = Tables;
    fn deref(&self) -> &Tables {
        &self.tables
    }
}

impl Snapshot {
    /// Takes in an object as it was at its resourceVersion. None when that is not news: an older state than the one
    /// known, or an object known to be deleted.
    pub fn apply(&mut self, object: Object, now: Instant) -> Option<Change> {
        let key = object.key();
        if self.tombstones.uids.contains(object.uid()) {
            return None;
        }
        let old = self.current(&object, &key);
        if let Some(old) = &old
            && old.uid() == object.uid()
            && old.revision() >= object.revision()
        {
            return None;
        }
        // A name that was deleted and created again: the old object's references go with it.
        if let Some(old) = &old {
            self.unindex(old, &key);
            if old.uid() != object.uid() {
                self.graph.remove(old.uid());
            }
        }
        self.note_heartbeat(old.as_ref(), &object, &key, now);
        self.note_charge(old.as_ref(), &object, &key, now);
        if let Some(Object::Node(node)) = &old {
            self.zones.take(node);
        }
        if let Object::Node(node) = &object {
            self.zones.add(node);
        }
        self.graph.put(&object);
        self.index(&object, &key);
        self.tables.put_object(key, object.clone());
        Some(Change {
            old,
            new: Some(object),
        })
    }

    /// Takes in that an object is gone.
    pub fn remove(&mut self, object: &Object) -> Option<Change> {
        let key = object.key();
        self.bury(object.uid());
        let old = self
            .current(object, &key)
            .filter(|old| old.uid() == object.uid())?;
        self.unindex(&old, &key);
        self.graph.remove(old.uid());
        if let Some(kind) = old.kind() {
            self.tables.take_object(kind, &key);
        }
        if let Object::Node(node) = &old {
            self.heartbeats.remove(&*key.name);
            self.zones.take(node);
        }
        if matches!(old, Object::ResourceQuota(_)) {
            self.charges.remove(&key);
        }
        Some(Change {
            old: Some(old),
            new: None,
        })
    }

    /// Objects of a resource that a complete list taken at `list_revision` lacks: they are gone, unless they are newer
    /// than the list.
    pub fn missing(
        &self,
        resource: &ResourceType,
        listed: &HashSet<String>,
        list_revision: u64,
    ) -> Vec<Object> {
        self.graph
            .of_resource(resource)
            .filter(|node| !listed.contains(&*node.uid) && node.revision <= list_revision)
            .filter_map(|node| self.object(node.resource.as_ref(), &node.key))
            .collect()
    }

    /// An object by resource and key; of untyped resources, its metadata.
    pub fn object(&self, resource: &ResourceType, key: &Key) -> Option<Object> {
        match Kind::of(resource) {
            Some(kind) => self.tables.get_object(kind, key),
            None => self
                .graph
                .by_key(resource, key)
                .map(|node| Object::Other(node.meta_object())),
        }
    }

    pub fn pods_owned_by<'a>(&'a self, uid: &str) -> impl Iterator<Item = &'a Arc<Pod>> + use<'a> {
        let keys: Vec<&Key> = self.pods_by_owner.get(uid).collect();
        keys.into_iter().filter_map(|key| self.pods.get(key))
    }

    /// Pods of a namespace that no controller owns.
    pub fn orphan_pods<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = &'a Arc<Pod>> + use<'a> {
        let keys: Vec<&Key> = self.pods_by_owner.get(&orphans_of(namespace)).collect();
        keys.into_iter().filter_map(|key| self.pods.get(key))
    }

    pub fn pods_on_node<'a>(&'a self, node: &str) -> impl Iterator<Item = &'a Arc<Pod>> + use<'a> {
        let keys: Vec<&Key> = self.pods_by_node.get(node).collect();
        keys.into_iter().filter_map(|key| self.pods.get(key))
    }

    /// Pods of a namespace that carry all of the given labels, found by the rarest of them.
    pub fn pods_with_labels<'a>(
        &'a self,
        namespace: &str,
        labels: &'a super::labels::Labels,
    ) -> impl Iterator<Item = &'a Arc<Pod>> + use<'a> {
        let rarest = labels
            .iter()
            .map(|(name, value)| label_property(namespace, name, value))
            .min_by_key(|property| self.pods_by_label.len(property));
        let keys: Vec<&Key> = rarest
            .map(|property| self.pods_by_label.get(&property).collect())
            .unwrap_or_default();
        keys.into_iter()
            .filter_map(|key| self.pods.get(key))
            .filter(move |pod| super::labels::pairs_match(labels, pod.metadata.labels.as_ref()))
    }

    /// Services whose selector the labels satisfy.
    pub fn services_selecting<'a>(
        &'a self,
        meta: &'a ObjectMeta,
    ) -> impl Iterator<Item = &'a Key> + 'a {
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        meta.labels
            .iter()
            .flatten()
            .flat_map(move |(name, value)| {
                let property = label_property(namespace, name, value);
                self.services_by_label.get(&property).collect::<Vec<_>>()
            })
            .filter(move |key| {
                self.services
                    .get(key)
                    .and_then(|service| service_selector(service))
                    .is_some_and(|selector| {
                        super::labels::pairs_match(selector, meta.labels.as_ref())
                    })
            })
    }

    pub fn replica_sets_owned_by<'a>(
        &'a self,
        uid: &str,
    ) -> impl Iterator<Item = &'a Arc<ReplicaSet>> + use<'a> {
        let keys: Vec<&Key> = self.replica_sets_by_owner.get(uid).collect();
        keys.into_iter()
            .filter_map(|key| self.replica_sets.get(key))
    }

    pub fn orphan_replica_sets<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = &'a Arc<ReplicaSet>> + use<'a> {
        let keys: Vec<&Key> = self
            .replica_sets_by_owner
            .get(&orphans_of(namespace))
            .collect();
        keys.into_iter()
            .filter_map(|key| self.replica_sets.get(key))
    }

    pub fn revisions_owned_by<'a>(
        &'a self,
        uid: &str,
    ) -> impl Iterator<Item = &'a Arc<ControllerRevision>> + use<'a> {
        let keys: Vec<&Key> = self.revisions_by_owner.get(uid).collect();
        keys.into_iter().filter_map(|key| self.revisions.get(key))
    }

    /// Revisions of a namespace that no controller owns.
    pub fn orphan_revisions<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = &'a Arc<ControllerRevision>> + use<'a> {
        let keys: Vec<&Key> = self
            .revisions_by_owner
            .get(&orphans_of(namespace))
            .collect();
        keys.into_iter().filter_map(|key| self.revisions.get(key))
    }

    pub fn jobs_owned_by<'a>(&'a self, uid: &str) -> impl Iterator<Item = &'a Arc<Job>> + use<'a> {
        let keys: Vec<&Key> = self.jobs_by_owner.get(uid).collect();
        keys.into_iter().filter_map(|key| self.jobs.get(key))
    }

    pub fn slices_of_service<'a>(
        &'a self,
        service: &Key,
    ) -> impl Iterator<Item = &'a Arc<EndpointSlice>> + use<'a> {
        let keys: Vec<&Key> = self.slices_by_service.get(&service.to_string()).collect();
        keys.into_iter().filter_map(|key| self.slices.get(key))
    }

    /// When this process last saw a sign of life of a node: its Lease renewed or its status posted. The node's own
    /// clock is not trusted, nor this one's that can be set.
    pub fn heartbeat(&self, node: &str) -> Option<Instant> {
        self.heartbeats.get(node).copied()
    }

    /// What the nodes have of processors, by zone.
    pub fn zones(&self) -> &Zones {
        &self.zones
    }

    /// Services whose endpoints are shared out among zones.
    pub fn services_by_zones(&self) -> impl Iterator<Item = &Key> {
        self.services_by_zones.get(SHARED_OUT)
    }

    /// When this process last saw that more of a quota was used than before.
    pub fn charged(&self, quota: &Key) -> Option<Instant> {
        self.charges.get(quota).copied()
    }

    /// Whether an object of this UID has been seen to go. False says nothing.
    pub fn is_known_deleted(&self, uid: &str) -> bool {
        self.tombstones.uids.contains(uid)
    }

    pub fn namespace_is_terminating(&self, namespace: &str) -> bool {
        self.namespaces
            .get(&Key::cluster(namespace))
            .is_some_and(|found| found.metadata.deletion_timestamp.is_some())
    }

    fn current(&self, like: &Object, key: &Key) -> Option<Object> {
        match like.kind() {
            Some(kind) => self.tables.get_object(kind, key),
            None => self
                .graph
                .by_key(like.resource(), key)
                .map(|node| Object::Other(node.meta_object())),
        }
    }

    fn bury(&mut self, uid: &str) {
        if uid.is_empty() || self.tombstones.uids.contains(uid) {
            return;
        }
        let uid: Arc<str> = uid.into();
        let tombstones = Arc::make_mut(&mut self.tombstones);
        if tombstones.order.len() >= TOMBSTONES_MAX
            && let Some(oldest) = tombstones.order.pop_front()
        {
            tombstones.uids.remove(&oldest);
        }
        tombstones.uids.insert(uid.clone());
        tombstones.order.push_back(uid);
    }

    fn note_heartbeat(&mut self, old: Option<&Object>, new: &Object, key: &Key, now: Instant) {
        let alive = match (old, new) {
            (old, Object::Lease(lease)) if &*key.namespace == NODE_LEASE_NAMESPACE => {
                let renewed = |object: &Object| match object {
                    Object::Lease(lease) => {
                        lease.spec.as_ref().and_then(|spec| spec.renew_time.clone())
                    }
                    _ => None,
                };
                lease.spec.is_some() && old.and_then(renewed) != renewed(new)
            }
            (Some(Object::Node(old)), Object::Node(new)) => {
                let beat = |node: &k8s_openapi::api::core::v1::Node| {
                    super::nodes::ready_condition(node)
                        .and_then(|condition| condition.last_heartbeat_time.clone())
                };
                beat(old) != beat(new)
            }
            (None, Object::Node(_)) => !self.heartbeats.contains_key(&*key.name),
            _ => false,
        };
        if alive {
            self.heartbeats.insert(key.name.clone(), now);
        }
    }

    fn note_charge(&mut self, old: Option<&Object>, new: &Object, key: &Key, now: Instant) {
        let Object::ResourceQuota(quota) = new else {
            return;
        };
        let before = match old {
            Some(Object::ResourceQuota(before)) => super::quota::shown(before),
            _ => Default::default(),
        };
        let mut shown = super::quota::shown(quota).into_iter();
        if shown.any(|(name, used)| before.get(&name).is_none_or(|before| *before < used)) {
            self.charges.insert(key.clone(), now);
        }
    }

    fn index(&mut self, object: &Object, key: &Key) {
        self.each_property(object, |index, property| index.add(property, key));
    }

    fn unindex(&mut self, object: &Object, key: &Key) {
        self.each_property(object, |index, property| index.remove(property, key));
    }

    fn each_property(&mut self, object: &Object, mut visit: impl FnMut(&mut Index, &str)) {
        match object {
            Object::Pod(pod) => {
                visit(&mut self.pods_by_owner, &owner_property(&pod.metadata));
                let node = pod
                    .spec
                    .as_ref()
                    .and_then(|spec| spec.node_name.as_deref())
                    .unwrap_or_default();
                visit(&mut self.pods_by_node, node);
                let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
                for (name, value) in pod.metadata.labels.iter().flatten() {
                    visit(
                        &mut self.pods_by_label,
                        &label_property(namespace, name, value),
                    );
                }
            }
            Object::ReplicaSet(set) => visit(
                &mut self.replica_sets_by_owner,
                &owner_property(&set.metadata),
            ),
            Object::ControllerRevision(found) => visit(
                &mut self.revisions_by_owner,
                &owner_property(&found.metadata),
            ),
            Object::Job(job) => visit(&mut self.jobs_by_owner, &owner_property(&job.metadata)),
            Object::Service(service) => {
                if super::endpoints::is_shared_out(service) {
                    visit(&mut self.services_by_zones, SHARED_OUT);
                }
                // One pair finds the Service; the rest of its selector is compared then.
                if let Some((name, value)) =
                    service_selector(service).and_then(|selector| selector.iter().next())
                {
                    let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
                    visit(
                        &mut self.services_by_label,
                        &label_property(namespace, name, value),
                    );
                }
            }
            Object::EndpointSlice(slice) => {
                if let Some(service) = service_of_slice(slice) {
                    visit(&mut self.slices_by_service, &service.to_string());
                }
            }
            _ => {}
        }
    }
}

/// The Service that a slice says it belongs to.
pub fn service_of_slice(slice: &EndpointSlice) -> Option<Key> {
    let service = slice.metadata.labels.as_ref()?.get(SERVICE_NAME_LABEL)?;
    Some(Key::new(
        slice.metadata.namespace.as_deref().unwrap_or_default(),
        service,
    ))
}

/// The selector of a Service that has endpoints computed for it.
pub fn service_selector(service: &Service) -> Option<&super::labels::Labels> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    spec.selector
        .as_ref()
        .filter(|selector| !selector.is_empty())
}

fn owner_property(meta: &ObjectMeta) -> String {
    match controller_of(meta) {
        Some(owner) => owner.uid.clone(),
        None => orphans_of(meta.namespace.as_deref().unwrap_or_default()),
    }
}

/// UIDs hold no slash, so this cannot meet one.
fn orphans_of(namespace: &str) -> String {
    format!("orphans/{namespace}")
}

fn label_property(namespace: &str, name: &str, value: &str) -> String {
    format!("{namespace}\n{name}={value}")
}
