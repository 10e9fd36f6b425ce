//! The Kubernetes objects that controllers see: a closed set of typed kinds, and the metadata of everything else.

use std::fmt;
use std::sync::{Arc, LazyLock};

use k8s_openapi::api::apps::v1::{
    ControllerRevision, DaemonSet, Deployment, ReplicaSet, StatefulSet,
};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Namespace, Node, ObjectReference, PersistentVolume,
    PersistentVolumeClaim, Pod, ReplicationController, ResourceQuota, Secret, Service,
    ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::ClusterRole;
use k8s_openapi::api::storage::v1::{StorageClass, VolumeAttributesClass};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ListMeta, ObjectMeta};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::snapshot::Table;

/// Namespace and name of an object; the namespace of a cluster-scoped object is empty.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl Key {
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    pub fn cluster(name: &str) -> Self {
        Self::new("", name)
    }

    pub fn of(meta: &ObjectMeta) -> Self {
        Self::new(
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default(),
        )
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the API server calls a resource: where its objects live and what kind they are.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourceType {
    /// Empty for the core group.
    pub group: String,
    pub version: String,
    pub kind: String,
    pub plural: String,
    pub namespaced: bool,
}

impl ResourceType {
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.clone()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// Path of the collection; `namespace` empty asks for all namespaces.
    pub fn path(&self, namespace: &str) -> String {
        let root = if self.group.is_empty() {
            format!("/api/{}", self.version)
        } else {
            format!("/apis/{}/{}", self.group, self.version)
        };
        if self.namespaced && !namespace.is_empty() {
            format!("{root}/namespaces/{namespace}/{}", self.plural)
        } else {
            format!("{root}/{}", self.plural)
        }
    }

    pub fn object_path(&self, key: &Key) -> String {
        format!("{}/{}", self.path(&key.namespace), key.name)
    }
}

/// An object of which only the metadata is known: what owner garbage collection and namespace deletion need.
#[derive(Clone, Debug)]
pub struct MetaObject {
    pub resource: Arc<ResourceType>,
    pub metadata: ObjectMeta,
}

/// A kind with a typed table in the snapshot.
pub trait Typed:
    k8s_openapi::Resource
    + k8s_openapi::Metadata<Ty = ObjectMeta>
    + DeserializeOwned
    + serde::Serialize
    + Clone
    + fmt::Debug
    + Send
    + Sync
    + 'static
{
    const TABLE: Kind;
    fn wrap(object: Arc<Self>) -> Object;
}

macro_rules! kinds {
    ($($Type:ident in $table:ident, $namespaced:expr;)*) => {
        /// The kinds that have typed tables.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Kind { $($Type,)* }

        impl Kind {
            pub const ALL: &'static [Kind] = &[$(Kind::$Type,)*];

            pub fn resource(self) -> &'static Arc<ResourceType> {
                static TYPES: LazyLock<Vec<Arc<ResourceType>>> = LazyLock::new(|| vec![$(Arc::new(ResourceType {
                    group: <$Type as k8s_openapi::Resource>::GROUP.into(),
                    version: <$Type as k8s_openapi::Resource>::VERSION.into(),
                    kind: <$Type as k8s_openapi::Resource>::KIND.into(),
                    plural: <$Type as k8s_openapi::Resource>::URL_PATH_SEGMENT.into(),
                    namespaced: $namespaced,
                }),)*]);
                &TYPES[self as usize]
            }

            /// The typed kind of a resource, if it has one.
            pub fn of(resource: &ResourceType) -> Option<Kind> {
                Kind::ALL.iter().copied().find(|kind| **kind.resource() == *resource)
            }
        }

        $(impl Typed for $Type {
            const TABLE: Kind = Kind::$Type;
            fn wrap(object: Arc<Self>) -> Object { Object::$Type(object) }
        })*

        /// One object, shared.
        #[derive(Clone, Debug)]
        pub enum Object { $($Type(Arc<$Type>),)* Other(Arc<MetaObject>) }

        impl Object {
            pub fn meta(&self) -> &ObjectMeta {
                match self { $(Object::$Type(object) => &object.metadata,)* Object::Other(object) => &object.metadata }
            }

            pub fn resource(&self) -> &Arc<ResourceType> {
                match self { $(Object::$Type(_) => Kind::$Type.resource(),)* Object::Other(object) => &object.resource }
            }

            fn decode_with<T>(
                resource: &Arc<ResourceType>,
                typed: impl TypedDecoder<Output = T>,
            ) -> Result<T, serde_json::Error> {
                match Kind::of(resource) {
                    $(Some(Kind::$Type) => typed.decode::<$Type>(|object| Object::$Type(Arc::new(object))),)*
                    None => typed.decode::<MetaOnly>(|object| {
                        Object::Other(Arc::new(MetaObject { resource: resource.clone(), metadata: object.metadata }))
                    }),
                }
            }

            /// The object's JSON with apiVersion and kind.
            pub fn encode(&self) -> Result<serde_json::Value, serde_json::Error> {
                match self {
                    $(Object::$Type(object) => serde_json::to_value(&**object),)*
                    Object::Other(object) => Ok(serde_json::json!({
                        "apiVersion": object.resource.api_version(),
                        "kind": object.resource.kind,
                        "metadata": object.metadata,
                    })),
                }
            }
        }

        /// One table per typed kind.
        #[derive(Clone, Default)]
        pub struct Tables { $(pub $table: Table<$Type>,)* }

        impl Tables {
            pub(super) fn get_object(&self, kind: Kind, key: &Key) -> Option<Object> {
                match kind { $(Kind::$Type => self.$table.get(key).cloned().map(Object::$Type),)* }
            }

            pub(super) fn put_object(&mut self, key: Key, object: Object) {
                match object { $(Object::$Type(object) => self.$table.put(key, object),)* Object::Other(_) => {} }
            }

            pub(super) fn take_object(&mut self, kind: Kind, key: &Key) {
                match kind { $(Kind::$Type => self.$table.take(key),)* }
            }
        }
    };
}

kinds! {
    Pod in pods, true;
    Node in nodes, false;
    Namespace in namespaces, false;
    Service in services, true;
    EndpointSlice in slices, true;
    Deployment in deployments, true;
    ReplicaSet in replica_sets, true;
    DaemonSet in daemon_sets, true;
    ControllerRevision in revisions, true;
    ServiceAccount in service_accounts, true;
    ConfigMap in config_maps, true;
    Lease in leases, true;
    Job in jobs, true;
    CronJob in cron_jobs, true;
    StatefulSet in stateful_sets, true;
    PersistentVolumeClaim in claims, true;
    Endpoints in endpoints, true;
    ReplicationController in replication_controllers, true;
    PodDisruptionBudget in disruption_budgets, true;
    Secret in secrets, true;
    PersistentVolume in volumes, false;
    StorageClass in storage_classes, false;
    ResourceQuota in quotas, true;
    CertificateSigningRequest in signing_requests, false;
    ClusterRole in cluster_roles, false;
    VolumeAttributesClass in attributes_classes, false;
    ServiceCIDR in service_cidrs, false;
    IPAddress in ip_addresses, false;
}

/// The part of any object's JSON that every object has.
#[derive(Clone, Debug, Deserialize)]
pub struct MetaOnly {
    #[serde(default)]
    pub metadata: ObjectMeta,
}

/// What any decoded object can do before it is wrapped.
pub trait Decoded: DeserializeOwned {
    fn meta_mut(&mut self) -> &mut ObjectMeta;
    /// Drops what nothing here reads.
    fn slim(&mut self) {}
}

macro_rules! decoded {
    ($($Type:ty),*) => {$(impl Decoded for $Type {
        fn meta_mut(&mut self) -> &mut ObjectMeta {
            &mut self.metadata
        }
    })*};
}
decoded!(
    MetaOnly,
    Pod,
    Node,
    Namespace,
    Service,
    EndpointSlice,
    Deployment,
    ReplicaSet,
    DaemonSet,
    ControllerRevision,
    ServiceAccount,
    Lease,
    Job,
    CronJob,
    StatefulSet,
    PersistentVolumeClaim,
    Endpoints,
    ReplicationController,
    PodDisruptionBudget,
    PersistentVolume,
    StorageClass,
    ResourceQuota,
    CertificateSigningRequest,
    ClusterRole,
    VolumeAttributesClass,
    ServiceCIDR,
    IPAddress
);

impl Decoded for ConfigMap {
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }

    fn slim(&mut self) {
        let read = [
            super::namespaced_defaults::ROOT_CA,
            super::bootstrap::CLUSTER_INFO,
        ];
        let name = self.metadata.name.as_deref();
        if !name.is_some_and(|name| read.contains(&name)) {
            self.data = None;
            self.binary_data = None;
        }
    }
}

impl Decoded for Secret {
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }

    /// Nothing secret is kept: of a token, only that it is there. Bootstrap tokens are an exception, since they sign.
    fn slim(&mut self) {
        if super::bootstrap::is_token(self) {
            return;
        }
        if !super::tokens::is_token(self) {
            self.data = None;
            return;
        }
        for (name, value) in self.data.iter_mut().flatten() {
            if name != super::tokens::CA {
                value.0.truncate(1);
            }
        }
    }
}

/// Something that holds objects and is decoded by their kind.
trait TypedDecoder {
    type Output;
    fn decode<K: Decoded>(
        self,
        wrap: impl Fn(K) -> Object,
    ) -> Result<Self::Output, serde_json::Error>;
}

/// `managedFields` go as well: writes are patches, which leave them alone.
fn finish<K: Decoded>(mut object: K, wrap: impl Fn(K) -> Object) -> Object {
    object.meta_mut().managed_fields = None;
    object.slim();
    wrap(object)
}

struct One<'a>(&'a str);

impl TypedDecoder for One<'_> {
    type Output = Object;
    fn decode<K: Decoded>(self, wrap: impl Fn(K) -> Object) -> Result<Object, serde_json::Error> {
        Ok(finish(serde_json::from_str::<K>(self.0)?, wrap))
    }
}

/// A list as the server answers it.
pub struct Listed {
    pub revision: String,
    pub objects: Vec<Object>,
}

impl Listed {
    pub fn decode(resource: &Arc<ResourceType>, json: &str) -> Result<Listed, serde_json::Error> {
        Object::decode_with(resource, Many(json))
    }
}

struct Many<'a>(&'a str);

impl TypedDecoder for Many<'_> {
    type Output = Listed;
    fn decode<K: Decoded>(self, wrap: impl Fn(K) -> Object) -> Result<Listed, serde_json::Error> {
        #[derive(Deserialize)]
        #[serde(bound = "K: DeserializeOwned")]
        struct List<K> {
            metadata: ListMeta,
            items: Option<Vec<K>>,
        }
        let list: List<K> = serde_json::from_str(self.0)?;
        Ok(Listed {
            revision: list.metadata.resource_version.unwrap_or_default(),
            objects: list
                .items
                .into_iter()
                .flatten()
                .map(|object| finish(object, &wrap))
                .collect(),
        })
    }
}

/// One line of a watch.
#[derive(Deserialize)]
#[serde(tag = "type", content = "object", rename_all = "UPPERCASE")]
pub enum WatchLine<K> {
    Added(K),
    Modified(K),
    Deleted(K),
    Bookmark(Box<MetaOnly>),
    Error(serde_json::Value),
}

impl WatchLine<Object> {
    pub fn decode(resource: &Arc<ResourceType>, json: &str) -> Result<Self, serde_json::Error> {
        Object::decode_with(resource, Line(json))
    }
}

struct Line<'a>(&'a str);

impl TypedDecoder for Line<'_> {
    type Output = WatchLine<Object>;
    fn decode<K: Decoded>(
        self,
        wrap: impl Fn(K) -> Object,
    ) -> Result<Self::Output, serde_json::Error> {
        Ok(match serde_json::from_str::<WatchLine<K>>(self.0)? {
            WatchLine::Added(object) => WatchLine::Added(finish(object, wrap)),
            WatchLine::Modified(object) => WatchLine::Modified(finish(object, wrap)),
            WatchLine::Deleted(object) => WatchLine::Deleted(finish(object, wrap)),
            WatchLine::Bookmark(bookmark) => WatchLine::Bookmark(bookmark),
            WatchLine::Error(status) => WatchLine::Error(status),
        })
    }
}

impl Object {
    /// An object of the resource from its JSON.
    pub fn decode(resource: &Arc<ResourceType>, json: &str) -> Result<Object, serde_json::Error> {
        Object::decode_with(resource, One(json))
    }

    pub fn of<K: Typed>(object: K) -> Self {
        K::wrap(Arc::new(object))
    }

    pub fn kind(&self) -> Option<Kind> {
        match self {
            Object::Other(_) => None,
            typed => Kind::of(typed.resource()),
        }
    }

    pub fn key(&self) -> Key {
        Key::of(self.meta())
    }

    pub fn uid(&self) -> &str {
        self.meta().uid.as_deref().unwrap_or_default()
    }

    pub fn revision(&self) -> u64 {
        revision(self.meta())
    }

    /// What a write or an event names the object by.
    #[cfg(test)]
    pub fn target(&self) -> Target {
        Target {
            resource: self.resource().clone(),
            key: self.key(),
            uid: self.uid().into(),
        }
    }
}

/// resourceVersion as the number it is: comparable for objects of one resource (KEP-5504).
pub fn revision(meta: &ObjectMeta) -> u64 {
    meta.resource_version
        .as_deref()
        .and_then(|version| version.parse().ok())
        .unwrap_or(0)
}

/// One object as the goal of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub resource: Arc<ResourceType>,
    pub key: Key,
    pub uid: Arc<str>,
}

impl Target {
    pub fn of<K: Typed>(object: &K) -> Self {
        let meta = object.metadata();
        Self {
            resource: K::TABLE.resource().clone(),
            key: Key::of(meta),
            uid: meta.uid.as_deref().unwrap_or_default().into(),
        }
    }

    pub fn reference(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some(self.resource.api_version()),
            kind: Some(self.resource.kind.clone()),
            namespace: (!self.key.namespace.is_empty()).then(|| self.key.namespace.to_string()),
            name: Some(self.key.name.to_string()),
            uid: (!self.uid.is_empty()).then(|| self.uid.to_string()),
            ..Default::default()
        }
    }
}
