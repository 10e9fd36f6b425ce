//! The tables against types that others have made from the same definitions: what k8s-openapi reads and writes of an object
//! of ours is that object, whether it comes as JSON or has been protobuf in between.

use k8s_openapi::Resource;
use k8s_openapi::api::{
    admissionregistration::v1 as admissionregistration, apps::v1 as apps,
    authentication::v1 as authentication, authorization::v1 as authorization,
    autoscaling::v1 as autoscaling_v1, autoscaling::v2 as autoscaling, batch::v1 as batch,
    certificates::v1 as certificates, coordination::v1 as coordination, core::v1 as core,
    discovery::v1 as discovery, events::v1 as events, flowcontrol::v1 as flowcontrol,
    networking::v1 as networking, node::v1 as node, policy::v1 as policy, rbac::v1 as rbac,
    resource::v1 as resource, scheduling::v1 as scheduling, storage::v1 as storage,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1 as apiregistration;
use proptest::prelude::*;
use serde_json::Value;

use super::arbitrary::object_of;
use super::protobuf;
use super::transcode::transcode;
use crate::registry::resources;

/// The object as k8s-openapi reads and writes it; None for kinds that are not in the list.
macro_rules! through {
    ($object:expr; $($kind:ty),* $(,)?) => {
        $(
            if $object["apiVersion"] == <$kind>::API_VERSION && $object["kind"] == <$kind>::KIND {
                let read: Result<$kind, _> = serde_json::from_value($object.clone());
                return Some(read.and_then(serde_json::to_value));
            }
        )*
    };
}

fn through(object: &Value) -> Option<serde_json::Result<Value>> {
    through!(object;
        admissionregistration::MutatingAdmissionPolicy, admissionregistration::MutatingAdmissionPolicyBinding,
        admissionregistration::MutatingWebhookConfiguration, admissionregistration::ValidatingAdmissionPolicy,
        admissionregistration::ValidatingAdmissionPolicyBinding, admissionregistration::ValidatingWebhookConfiguration,
        apiextensions::CustomResourceDefinition, apiregistration::APIService,
        apps::ControllerRevision, apps::DaemonSet, apps::Deployment, apps::ReplicaSet, apps::StatefulSet,
        authentication::SelfSubjectReview, authentication::TokenReview,
        authorization::LocalSubjectAccessReview, authorization::SelfSubjectAccessReview,
        authorization::SelfSubjectRulesReview, authorization::SubjectAccessReview,
        autoscaling::HorizontalPodAutoscaler, autoscaling_v1::HorizontalPodAutoscaler,
        batch::CronJob, batch::Job, certificates::CertificateSigningRequest, coordination::Lease,
        core::Binding, core::ComponentStatus, core::ConfigMap, core::Endpoints, core::Event, core::LimitRange,
        core::Namespace, core::Node, core::PersistentVolume, core::PersistentVolumeClaim, core::Pod, core::PodTemplate,
        core::ReplicationController, core::ResourceQuota, core::Secret, core::Service, core::ServiceAccount,
        discovery::EndpointSlice, events::Event, flowcontrol::FlowSchema, flowcontrol::PriorityLevelConfiguration,
        networking::IPAddress, networking::Ingress, networking::IngressClass, networking::NetworkPolicy,
        networking::ServiceCIDR, node::RuntimeClass, policy::PodDisruptionBudget,
        rbac::ClusterRole, rbac::ClusterRoleBinding, rbac::Role, rbac::RoleBinding,
        resource::DeviceClass, resource::ResourceClaim, resource::ResourceClaimTemplate, resource::ResourceSlice,
        scheduling::PriorityClass, storage::CSIDriver, storage::CSINode, storage::CSIStorageCapacity,
        storage::StorageClass, storage::VolumeAttachment, storage::VolumeAttributesClass,
    );
    None
}

/// Where `found` lacks or changes something of `wanted`. Go's types write some fields that are empty; that is no difference.
fn difference(wanted: &Value, found: &Value, path: &str) -> Option<String> {
    match (wanted, found) {
        (Value::Object(wanted), Value::Object(found)) => wanted
            .iter()
            .find_map(|(key, value)| match found.get(key) {
                Some(found) => difference(value, found, &format!("{path}.{key}")),
                None if is_empty(value) => None,
                None => Some(format!("{path}.{key} is lost")),
            })
            .or_else(|| {
                let added = found
                    .iter()
                    // Objects inside objects are of a kind there, whether they say so or not.
                    .filter(|(key, _)| *key != "apiVersion" && *key != "kind")
                    .find(|(key, value)| !wanted.contains_key(*key) && !is_empty(value));
                added.map(|(key, value)| format!("{path}.{key} is {value}, out of nothing"))
            }),
        (Value::Array(wanted), Value::Array(found)) if wanted.len() == found.len() => wanted
            .iter()
            .zip(found)
            .find_map(|(wanted, found)| difference(wanted, found, path)),
        (Value::Number(wanted), Value::Number(found)) if wanted.as_f64() == found.as_f64() => None,
        _ if wanted == found => None,
        _ => Some(format!("{path} is {found}, not {wanted}")),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty() || text == "0",
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
    }
}

#[test]
fn every_served_kind_is_compared() {
    for resource in resources()
        .iter()
        .filter(|resource| resource.version == "v1")
    {
        let object =
            serde_json::json!({"apiVersion": resource.api_version(), "kind": resource.kind});
        assert!(through(&object).is_some(), "{}", resource.qualified());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn other_types_of_the_same_definitions_read_and_write_our_objects(
        object in prop::sample::select(resources().iter().filter(|r| r.version == "v1").collect::<Vec<_>>())
            .prop_flat_map(object_of)
    ) {
        let text = object.to_string();
        let bytes = transcode(text.as_bytes()).expect("the tables know the kind");
        let decoded = protobuf::decode(&bytes, "", "").expect("our own protobuf");
        for object in [&object, &decoded] {
            let written = through(object).expect("a kind of the list");
            let written = match written {
                Ok(written) => written,
                // Where the generator has stopped; Go writes null there.
                Err(error) if error.to_string().starts_with("missing field") => continue,
                Err(error) => return Err(TestCaseError::fail(format!("{error} in {object}"))),
            };
            prop_assert_eq!(difference(object, &written, ""), None, "{}", object);
        }
    }
}
