//! What a pod of a StatefulSet is by its ordinal: its name, host name, labels, and the claims that stay when it is replaced.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{
    PersistentVolumeClaim, PersistentVolumeClaimVolumeSource, Pod, PodTemplateSpec, Volume,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use serde_json::json;

use super::super::object::Target;
use super::super::plan::Action;
use super::super::pods;

/// Label of a pod that holds the name of its ControllerRevision.
pub const REVISION_LABEL: &str = "controller-revision-hash";
pub const POD_NAME_LABEL: &str = "statefulset.kubernetes.io/pod-name";
pub const POD_INDEX_LABEL: &str = "apps.kubernetes.io/pod-index";

pub fn set_name(set: &StatefulSet) -> &str {
    set.metadata.name.as_deref().unwrap_or_default()
}

pub fn pod_name(set: &StatefulSet, ordinal: i32) -> String {
    format!("{}-{ordinal}", set_name(set))
}

/// The ordinal that the pod's name gives it in the set.
pub fn ordinal_of(set: &StatefulSet, pod: &Pod) -> Option<i32> {
    let digits = pod
        .metadata
        .name
        .as_deref()?
        .strip_prefix(set_name(set))?
        .strip_prefix('-')?;
    // Another form of the same number would be another name.
    let ordinal: i32 = digits.parse().ok()?;
    (ordinal.to_string() == digits).then_some(ordinal)
}

pub fn revision_of(pod: &Pod) -> Option<&String> {
    pod.metadata.labels.as_ref()?.get(REVISION_LABEL)
}

/// The pod of an ordinal, of a revision's template.
pub fn pod_for(set: &StatefulSet, template: &PodTemplateSpec, revision: &str, ordinal: i32) -> Pod {
    let name = pod_name(set, ordinal);
    let mut pod = pods::from_template(template, set);
    pod.metadata.generate_name = None;
    pod.metadata.name = Some(name.clone());
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(REVISION_LABEL.into(), revision.into());
    labels.insert(POD_NAME_LABEL.into(), name.clone());
    labels.insert(POD_INDEX_LABEL.into(), ordinal.to_string());
    let spec = pod.spec.get_or_insert_default();
    spec.hostname = Some(name);
    spec.subdomain = set
        .spec
        .as_ref()
        .and_then(|spec| spec.service_name.clone())
        .filter(|name| !name.is_empty());
    let claims = claim_names(set, ordinal);
    let mut volumes: Vec<Volume> = claims
        .iter()
        .map(|(volume, claim)| Volume {
            name: volume.clone(),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim.clone(),
                read_only: None,
            }),
            ..Default::default()
        })
        .collect();
    // A claim takes the place of the template's volume of the same name.
    let others = spec.volumes.take().unwrap_or_default();
    volumes.extend(
        others
            .into_iter()
            .filter(|volume| !claims.contains_key(&volume.name)),
    );
    spec.volumes = (!volumes.is_empty()).then_some(volumes);
    pod
}

/// The labels that a pod of the set must have for its place, if it lacks any: those of a pod that was adopted.
pub fn missing_labels(pod: &Pod, ordinal: i32) -> Option<Action> {
    let name = pod.metadata.name.clone().unwrap_or_default();
    let wanted = [
        (POD_NAME_LABEL, name),
        (POD_INDEX_LABEL, ordinal.to_string()),
    ];
    let labels = pod.metadata.labels.as_ref();
    let has =
        |label: &str, value: &String| labels.and_then(|labels| labels.get(label)) == Some(value);
    if wanted.iter().all(|(label, value)| has(label, value)) {
        return None;
    }
    let labels: BTreeMap<_, _> = wanted.into_iter().collect();
    Some(Action::Patch {
        target: Target::of(pod),
        subresource: None,
        body: json!({"metadata": {"uid": pod.metadata.uid, "labels": labels}}),
    })
}

/// Names of the claims of an ordinal, by the volume that uses each.
pub fn claim_names(set: &StatefulSet, ordinal: i32) -> BTreeMap<String, String> {
    templates(set)
        .filter_map(|template| {
            let name = template.metadata.name.clone()?;
            let claim = format!("{name}-{}", pod_name(set, ordinal));
            Some((name, claim))
        })
        .collect()
}

fn templates(set: &StatefulSet) -> impl Iterator<Item = &PersistentVolumeClaim> {
    set.spec
        .iter()
        .flat_map(|spec| spec.volume_claim_templates.iter().flatten())
}

/// The claims of an ordinal as they are made.
pub fn claims(set: &StatefulSet, ordinal: i32) -> Vec<PersistentVolumeClaim> {
    let selector = set
        .spec
        .as_ref()
        .and_then(|spec| spec.selector.match_labels.clone())
        .unwrap_or_default();
    templates(set)
        .map(|template| {
            let meta = &template.metadata;
            let mut labels = meta.labels.clone().unwrap_or_default();
            labels.extend(selector.clone());
            let name = meta.name.as_deref().unwrap_or_default();
            PersistentVolumeClaim {
                metadata: ObjectMeta {
                    name: Some(format!("{name}-{}", pod_name(set, ordinal))),
                    namespace: set.metadata.namespace.clone(),
                    labels: (!labels.is_empty()).then_some(labels),
                    annotations: meta.annotations.clone(),
                    owner_references: claim_owners(set, &[], None),
                    ..Default::default()
                },
                spec: template.spec.clone(),
                status: None,
            }
        })
        .collect()
}

/// The owners that a claim should have beside those that are nobody's business here: the set where claims go with it, the
/// pod where the pod is `condemned` by scaling down and claims go with that. None when it should have none at all.
fn claim_owners(
    set: &StatefulSet,
    present: &[OwnerReference],
    condemned: Option<&Pod>,
) -> Option<Vec<OwnerReference>> {
    let policy = set
        .spec
        .as_ref()
        .and_then(|spec| spec.persistent_volume_claim_retention_policy.as_ref());
    let deletes = |when: Option<&String>| when.is_some_and(|policy| policy == "Delete");
    let with_set = deletes(policy.and_then(|policy| policy.when_deleted.as_ref()));
    let with_pod = deletes(policy.and_then(|policy| policy.when_scaled.as_ref()));
    let ours = |owner: &&OwnerReference| {
        (owner.kind == "StatefulSet" && owner.name == set_name(set))
            || (owner.kind == "Pod" && owner.name.starts_with(&format!("{}-", set_name(set))))
    };
    let mut owners: Vec<_> = present
        .iter()
        .filter(|owner| !ours(owner))
        .cloned()
        .collect();
    match condemned.filter(|_| with_pod) {
        Some(pod) => owners.push(OwnerReference {
            controller: None,
            block_owner_deletion: None,
            ..pods::controller_reference(pod)
        }),
        None if with_set => owners.push(OwnerReference {
            controller: Some(true),
            block_owner_deletion: Some(true),
            ..pods::controller_reference(set)
        }),
        None => {}
    }
    (!owners.is_empty()).then_some(owners)
}

/// The patch that makes a claim's owners what the retention policy says, if they are not.
pub fn claim_update(
    set: &StatefulSet,
    claim: &PersistentVolumeClaim,
    condemned: Option<&Pod>,
) -> Option<Action> {
    let present = claim
        .metadata
        .owner_references
        .as_deref()
        .unwrap_or_default();
    let wanted = claim_owners(set, present, condemned).unwrap_or_default();
    let uids = |owners: &[OwnerReference]| {
        let mut uids: Vec<_> = owners.iter().map(|owner| owner.uid.clone()).collect();
        uids.sort();
        uids
    };
    (uids(present) != uids(&wanted)).then(|| Action::Patch {
        target: Target::of(claim),
        subresource: None,
        body: json!({"metadata": {
            "uid": claim.metadata.uid, "resourceVersion": claim.metadata.resource_version,
            "ownerReferences": wanted,
        }}),
    })
}
