//! What is special to each kind: defaults, what a write may change, validation, how it is deleted. One file per family.

mod access;
mod admission_policy;
mod autoscaler;
mod batch;
mod certificate;
mod configuration;
mod counted;
mod csi;
mod device;
mod endpoints;
mod extension;
pub(super) mod families;
mod flow;
mod key_pair;
mod metadata;
mod namespace;
mod networking;
mod node;
mod place;
mod pod;
mod pod_spec;
mod policy;
#[cfg(test)]
mod properties;
mod service;
mod service_range;
mod storage;
#[cfg(test)]
mod testing;
mod warnings;
mod webhook;
mod workload;

use serde_json::{Value, json};

use super::request::Target;
use super::status::{FieldError, Status};
use crate::registry::Resource;
use crate::selector::FieldSelector;

pub use certificate::asked_by;
pub use metadata::{dns_label, qualified_name, validate_metadata};
pub use pod::qos_class;
pub use service::{tells_of_health, wants_node_ports};
pub use warnings::{pod_at, warnings};

/// Checks the status of an object, for kinds that have rules for it.
pub fn validate_status(resource: &Resource, object: &Value, errors: &mut Errors) {
    match (resource.group, resource.plural) {
        ("", "services") => service::validate_status(object, errors),
        _ => counted::validate_status(resource, object, errors),
    }
}

pub type Errors = Vec<FieldError>;

/// The hand-written rules of one kind. Everything has a default, which suits kinds without rules.
pub trait Strategy: Sync {
    /// Fills in what clients may leave out; runs on every write.
    fn default(&self, _object: &mut Value) {}

    /// Puts a new object into its first state, whatever the client sent.
    fn prepare_create(&self, _object: &mut Value) {}

    /// Fills in what follows from the identity that a new object has just been given.
    fn assign(&self, _object: &mut Value) {}

    /// Puts back what clients may leave out of an update.
    fn prepare_update(&self, _object: &mut Value, _old: &Value) {}

    /// Puts back what a write of the status may not change of it.
    fn prepare_status(&self, _object: &mut Value, _old: &Value) {}

    fn validate(&self, _object: &Value, _errors: &mut Errors) {}

    fn validate_update(&self, _object: &Value, _old: &Value, _errors: &mut Errors) {}

    /// Whether metadata.generation counts the changes of the spec.
    fn counts_generations(&self) -> bool {
        false
    }

    /// Whether a client may create the object together with its status.
    fn keeps_status(&self) -> bool {
        false
    }

    /// Whether a PUT creates an object that is not there.
    fn creates_on_update(&self) -> bool {
        false
    }

    /// Paths that field selectors may name, besides metadata.name and metadata.namespace.
    fn selectable(&self) -> &'static [&'static str] {
        &[]
    }

    /// How long a deletion waits for whoever runs the object.
    fn grace_s(&self, _object: &Value, _asked: Option<i64>) -> i64 {
        0
    }

    /// What else changes when a deletion begins.
    fn mark_deleted(&self, _object: &mut Value) {}

    /// Refuses to delete what must stay.
    fn check_delete(&self, _target: &Target) -> Result<(), Status> {
        Ok(())
    }

    /// What a name looks like.
    fn name_rule(&self) -> NameRule {
        NameRule::Subdomain
    }
}

/// The forms of names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameRule {
    /// RFC 1123 subdomain.
    Subdomain,
    /// RFC 1123 label.
    Label,
    /// Anything that fits in a path.
    PathSegment,
}

/// Kinds without rules of their own.
struct Plain;
impl Strategy for Plain {}

/// The rules of a resource's kind.
pub fn of(resource: &Resource) -> &'static dyn Strategy {
    match (resource.group, resource.plural) {
        ("", "pods") => &pod::Pod,
        ("", "services") => &service::Service,
        ("", "endpoints") => &endpoints::Endpoints,
        ("discovery.k8s.io", "endpointslices") => &endpoints::EndpointSlice,
        ("", "nodes") => &node::Node,
        ("", "namespaces") => &namespace::Namespace,
        ("", "configmaps") => &configuration::ConfigMap,
        ("", "secrets") => &configuration::Secret,
        ("", "serviceaccounts") => &Plain,
        ("" | "events.k8s.io", "events") => &configuration::Event,
        ("coordination.k8s.io", "leases") => &configuration::Lease,
        ("scheduling.k8s.io", "priorityclasses") => &configuration::PriorityClass,
        ("apps", "deployments") => &workload::Deployment,
        ("apps", "replicasets") => &workload::ReplicaSet,
        ("apps", "daemonsets") => &workload::DaemonSet,
        ("apps", "statefulsets") => &workload::StatefulSet,
        ("apps", "controllerrevisions") => &workload::ControllerRevision,
        ("", "replicationcontrollers") => &workload::ReplicationController,
        ("certificates.k8s.io", "certificatesigningrequests") => &certificate::SigningRequest,
        ("", "podtemplates") => &workload::PodTemplate,
        ("batch", "jobs") => &batch::Job,
        ("batch", "cronjobs") => &batch::CronJob,
        ("", "resourcequotas") => &policy::Quota,
        ("", "limitranges") => &policy::LimitRange,
        ("policy", "poddisruptionbudgets") => &policy::DisruptionBudget,
        ("autoscaling", "horizontalpodautoscalers") => &autoscaler::Autoscaler,
        ("node.k8s.io", "runtimeclasses") => &policy::RuntimeClass,
        ("", "persistentvolumes") => &storage::Volume,
        ("", "persistentvolumeclaims") => &storage::Claim,
        ("storage.k8s.io", "storageclasses") => &storage::StorageClass,
        ("storage.k8s.io", "csidrivers") => &csi::Driver,
        ("storage.k8s.io", "csinodes") => &csi::Node,
        ("storage.k8s.io", "csistoragecapacities") => &csi::Capacity,
        ("storage.k8s.io", "volumeattachments") => &csi::Attachment,
        ("storage.k8s.io", "volumeattributesclasses") => &csi::AttributesClass,
        ("networking.k8s.io", "ingresses") => &networking::Ingress,
        ("networking.k8s.io", "ingressclasses") => &networking::IngressClass,
        ("networking.k8s.io", "networkpolicies") => &networking::NetworkPolicy,
        ("networking.k8s.io", "ipaddresses") => &service_range::IpAddress,
        ("networking.k8s.io", "servicecidrs") => &service_range::ServiceCidr,
        ("rbac.authorization.k8s.io", "roles" | "clusterroles") => &access::Role,
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") => &access::Binding,
        ("flowcontrol.apiserver.k8s.io", "flowschemas") => &flow::FlowSchema,
        ("flowcontrol.apiserver.k8s.io", "prioritylevelconfigurations") => &flow::PriorityLevel,
        ("resource.k8s.io", "deviceclasses") => &device::Class,
        ("resource.k8s.io", "resourceclaims") => &device::Claim,
        ("resource.k8s.io", "resourceclaimtemplates") => &device::ClaimTemplate,
        ("resource.k8s.io", "resourceslices") => &device::Slice,
        (
            "admissionregistration.k8s.io",
            "validatingwebhookconfigurations" | "mutatingwebhookconfigurations",
        ) => &webhook::Configuration,
        (
            "admissionregistration.k8s.io",
            "validatingadmissionpolicies" | "mutatingadmissionpolicies",
        ) => &admission_policy::Policy,
        (
            "admissionregistration.k8s.io",
            "validatingadmissionpolicybindings" | "mutatingadmissionpolicybindings",
        ) => &admission_policy::Binding,
        ("apiextensions.k8s.io", "customresourcedefinitions") => &extension::Definition,
        ("apiregistration.k8s.io", "apiservices") => &extension::Service,
        _ => &Plain,
    }
}

/// What the status of a new object says before anybody has looked at it: clients with types read numbers, and find zeroes.
pub fn first_status(resource: &Resource) -> Option<Value> {
    Some(match (resource.group, resource.plural) {
        ("" | "apps", "replicationcontrollers" | "replicasets") => json!({"replicas": 0}),
        ("apps", "statefulsets") => json!({"replicas": 0, "availableReplicas": 0}),
        ("apps", "daemonsets") => json!({"currentNumberScheduled": 0, "numberMisscheduled": 0,
            "desiredNumberScheduled": 0, "numberReady": 0}),
        ("policy", "poddisruptionbudgets") => json!({"disruptionsAllowed": 0, "currentHealthy": 0,
            "desiredHealthy": 0, "expectedPods": 0}),
        ("storage.k8s.io", "volumeattachments") => json!({"attached": false}),
        (
            "apps"
            | "batch"
            | "networking.k8s.io"
            | "certificates.k8s.io"
            | "admissionregistration.k8s.io"
            | "flowcontrol.apiserver.k8s.io"
            | "resource.k8s.io",
            "deployments"
            | "jobs"
            | "cronjobs"
            | "servicecidrs"
            | "certificatesigningrequests"
            | "validatingadmissionpolicies"
            | "flowschemas"
            | "prioritylevelconfigurations"
            | "resourceclaims",
        ) => json!({}),
        _ => return None,
    })
}

/// Whether who replaces an object must say which version of it was read, as upstream asks for these kinds.
pub fn replaced_by_revision(resource: &Resource) -> bool {
    match resource.group {
        "admissionregistration.k8s.io"
        | "apiextensions.k8s.io"
        | "apiregistration.k8s.io"
        | "coordination.k8s.io"
        | "node.k8s.io"
        | "policy" => true,
        "storage.k8s.io" => matches!(
            resource.plural,
            "csidrivers" | "csinodes" | "csistoragecapacities" | "volumeattachments"
        ),
        _ => false,
    }
}

/// Refuses field selectors on fields that the kind cannot be selected by.
pub fn check_selectable(target: &Target, fields: &FieldSelector) -> Result<(), Status> {
    let selectable = of(target.resource).selectable();
    for path in fields.paths() {
        if path != "metadata.name" && path != "metadata.namespace" && !selectable.contains(&path) {
            let why = match selectable {
                [] => format!(
                    "{path:?} is not a known field selector: only \"metadata.name\", \"metadata.namespace\""
                ),
                _ => format!("field label not supported: {path}"),
            };
            return Err(Status::bad_request(why));
        }
    }
    Ok(())
}
