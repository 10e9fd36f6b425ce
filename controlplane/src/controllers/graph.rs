//! Who owns whom: every object of the cluster by UID, with the UIDs that depend on it.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use super::object::{Key, MetaObject, Object, ResourceType, Target};

/// What garbage collection knows of one object.
#[derive(Clone, Debug)]
pub struct GraphNode {
    pub resource: Arc<ResourceType>,
    pub key: Key,
    pub uid: Arc<str>,
    pub revision: u64,
    pub owners: Arc<[OwnerReference]>,
    pub finalizers: Arc<[String]>,
    pub deleting: bool,
}

impl GraphNode {
    pub fn target(&self) -> Target {
        Target {
            resource: self.resource.clone(),
            key: self.key.clone(),
            uid: self.uid.clone(),
        }
    }

    pub fn has_finalizer(&self, name: &str) -> bool {
        self.finalizers.iter().any(|finalizer| finalizer == name)
    }

    /// The node as an object again: the metadata that the graph keeps.
    pub(super) fn meta_object(&self) -> Arc<MetaObject> {
        let namespace = &self.key.namespace;
        Arc::new(MetaObject {
            resource: self.resource.clone(),
            metadata: ObjectMeta {
                namespace: (!namespace.is_empty()).then(|| namespace.to_string()),
                name: Some(self.key.name.to_string()),
                uid: Some(self.uid.to_string()),
                resource_version: Some(self.revision.to_string()),
                owner_references: (!self.owners.is_empty()).then(|| self.owners.to_vec()),
                finalizers: (!self.finalizers.is_empty()).then(|| self.finalizers.to_vec()),
                ..Default::default()
            },
        })
    }
}

/// All objects, by UID, by resource and key, and by owner.
#[derive(Clone, Default)]
pub struct Graph {
    nodes: im::HashMap<Arc<str>, Arc<GraphNode>>,
    keys: im::HashMap<ResourceType, im::OrdMap<Key, Arc<str>>>,
    dependents: im::HashMap<Arc<str>, im::OrdSet<Arc<str>>>,
}

impl Graph {
    pub fn get(&self, uid: &str) -> Option<&Arc<GraphNode>> {
        self.nodes.get(uid)
    }

    pub fn by_key(&self, resource: &ResourceType, key: &Key) -> Option<&Arc<GraphNode>> {
        self.nodes.get(self.keys.get(resource)?.get(key)?)
    }

    /// Objects that name `uid` as an owner, whether an object of that UID exists or not.
    pub fn dependents<'a>(
        &'a self,
        uid: &str,
    ) -> impl Iterator<Item = &'a Arc<GraphNode>> + use<'a> {
        self.dependents
            .get(uid)
            .into_iter()
            .flatten()
            .filter_map(|uid| self.nodes.get(uid))
    }

    pub fn of_resource<'a>(
        &'a self,
        resource: &ResourceType,
    ) -> impl Iterator<Item = &'a Arc<GraphNode>> + use<'a> {
        self.keys
            .get(resource)
            .into_iter()
            .flat_map(|keys| keys.values())
            .filter_map(|uid| self.nodes.get(uid))
    }

    /// Every object in a namespace, resource by resource.
    pub fn of_namespace<'a>(
        &'a self,
        namespace: &'a str,
    ) -> impl Iterator<Item = &'a Arc<GraphNode>> + 'a {
        self.keys.values().flat_map(move |keys| {
            keys.range(Key::new(namespace, "")..)
                .take_while(move |(key, _)| &*key.namespace == namespace)
                .filter_map(|(_, uid)| self.nodes.get(uid))
        })
    }

    pub(super) fn put(&mut self, object: &Object) {
        let meta = object.meta();
        let uid: Arc<str> = object.uid().into();
        if let Some(old) = self.nodes.get(&uid).cloned() {
            self.unlink(&old);
        }
        let node = Arc::new(GraphNode {
            resource: object.resource().clone(),
            key: object.key(),
            uid: uid.clone(),
            revision: object.revision(),
            owners: meta.owner_references.clone().unwrap_or_default().into(),
            finalizers: meta.finalizers.clone().unwrap_or_default().into(),
            deleting: meta.deletion_timestamp.is_some(),
        });
        for owner in node.owners.iter() {
            let owner: Arc<str> = owner.uid.as_str().into();
            self.dependents
                .entry(owner)
                .or_default()
                .insert(uid.clone());
        }
        self.keys
            .entry((*node.resource).clone())
            .or_default()
            .insert(node.key.clone(), uid.clone());
        self.nodes.insert(uid, node);
    }

    pub(super) fn remove(&mut self, uid: &str) {
        let Some(node) = self.nodes.remove(uid) else {
            return;
        };
        self.unlink(&node);
        if let Some(keys) = self.keys.get_mut(&*node.resource)
            && keys.get(&node.key) == Some(&node.uid)
        {
            keys.remove(&node.key);
        }
    }

    fn unlink(&mut self, node: &GraphNode) {
        for owner in node.owners.iter() {
            if let Some(dependents) = self.dependents.get_mut(owner.uid.as_str()) {
                dependents.remove(&node.uid);
                if dependents.is_empty() {
                    self.dependents.remove(owner.uid.as_str());
                }
            }
        }
    }
}
