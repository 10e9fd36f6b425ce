//! Binds claims to volumes that were provided beforehand, and frees volumes whose claims are gone; `protection.rs` holds back
//! the deletion of what is in use. Nothing here makes volumes.

mod matching;
pub(crate) mod protection;
#[cfg(test)]
mod tests;

use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolume, PersistentVolumeClaim};
use serde_json::{Value, json};

use super::object::{Key, Object, Target, Typed};
use super::plan::{Action, Controller, Keys, Note, Plan, View};
use super::pods;
use super::snapshot::{Change, Snapshot};

const REPORTER: &str = "persistentvolume-controller";
const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";
/// Provisioner of classes whose volumes somebody makes by hand.
const NO_PROVISIONER: &str = "kubernetes.io/no-provisioner";

pub const CLAIMS: Controller = Controller {
    name: "persistentvolumeclaim-binder",
    affected: claims_affected,
    plan: plan_claim,
};

pub const VOLUMES: Controller = Controller {
    name: "persistentvolume-binder",
    affected: volumes_affected,
    plan: plan_volume,
};

fn claims_affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    let waiting = |keys: &mut Keys| {
        keys.extend(
            snapshot
                .claims
                .iter()
                .filter(|(_, claim)| phase_of_claim(claim) != "Bound")
                .map(|(key, _)| key.clone()),
        );
    };
    match change.object() {
        Object::PersistentVolumeClaim(claim) => {
            keys.insert(Key::of(&claim.metadata));
        }
        Object::PersistentVolume(volume) => {
            keys.extend(claim_of(volume));
            if change.new.is_some() {
                waiting(keys);
            }
        }
        Object::StorageClass(_) => waiting(keys),
        // Claims may wait for their first consumer.
        Object::Pod(pod) if change.old.is_none() => {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            keys.extend(claims_in(pod).map(|name| Key::new(namespace, name)));
        }
        _ => {}
    }
}

fn volumes_affected(_: &Snapshot, change: &Change, keys: &mut Keys) {
    for state in change.states() {
        match state {
            Object::PersistentVolume(volume) => {
                keys.insert(Key::of(&volume.metadata));
            }
            Object::PersistentVolumeClaim(claim) => {
                keys.extend(volume_name(claim).map(Key::cluster));
            }
            _ => {}
        }
    }
}

fn claims_in(pod: &k8s_openapi::api::core::v1::Pod) -> impl Iterator<Item = &str> {
    pods::spec(pod)
        .volumes
        .iter()
        .flatten()
        .filter_map(|volume| Some(volume.persistent_volume_claim.as_ref()?.claim_name.as_str()))
}

fn phase_of_claim(claim: &PersistentVolumeClaim) -> &str {
    let status = claim.status.as_ref();
    status
        .and_then(|status| status.phase.as_deref())
        .unwrap_or("Pending")
}

fn phase_of(volume: &PersistentVolume) -> &str {
    let status = volume.status.as_ref();
    status
        .and_then(|status| status.phase.as_deref())
        .unwrap_or("Pending")
}

fn volume_name(claim: &PersistentVolumeClaim) -> Option<&str> {
    let name = claim.spec.as_ref()?.volume_name.as_deref();
    name.filter(|name| !name.is_empty())
}

fn claim_ref(volume: &PersistentVolume) -> Option<&ObjectReference> {
    volume.spec.as_ref()?.claim_ref.as_ref()
}

/// Key of the claim that a volume is for.
fn claim_of(volume: &PersistentVolume) -> Option<Key> {
    let reference = claim_ref(volume)?;
    Some(Key::new(
        reference.namespace.as_deref()?,
        reference.name.as_deref()?,
    ))
}

/// Whether the volume is for this very claim; a reference without a UID was written by a user ahead of the claim.
fn is_for(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    claim_of(volume) == Some(Key::of(&claim.metadata))
        && claim_ref(volume)
            .and_then(|reference| reference.uid.as_ref())
            .is_none_or(|uid| Some(uid) == claim.metadata.uid.as_ref())
}

fn plan_claim(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(claim) = view.snapshot.claims.get(key) else {
        return plan;
    };
    if claim.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    if let Some(name) = volume_name(claim) {
        match view.snapshot.volumes.get(&Key::cluster(name)) {
            Some(volume) if is_for(volume, claim) => bind(claim, volume, &mut plan),
            // The user has chosen it; it is told so.
            Some(volume) if claim_of(volume).is_none() => bind(claim, volume, &mut plan),
            Some(_) => {}
            None if is_bound(claim) => lose(claim, &mut plan),
            None => {}
        }
        return plan;
    }
    let promised = view
        .snapshot
        .volumes
        .values()
        .find(|volume| claim_ref(volume).is_some() && is_for(volume, claim));
    let found = match promised {
        Some(volume) => Some(volume),
        None if waits_for_consumer(view.snapshot, claim) => {
            let message = "waiting for first consumer to be created before binding";
            pending(claim, "WaitForFirstConsumer", message, &mut plan);
            return plan;
        }
        None => matching::smallest(view.snapshot, claim),
    };
    match found {
        Some(volume) => bind(claim, volume, &mut plan),
        None => {
            let message =
                "no persistent volumes available for this claim and no storage class is set";
            let class = matching::class_of(claim);
            let provisioner = view
                .snapshot
                .storage_classes
                .get(&Key::cluster(class))
                .map(|class| class.provisioner.clone())
                .filter(|name| name != NO_PROVISIONER);
            match provisioner {
                Some(name) => {
                    let message = format!(
                        "Waiting for a volume to be created either by the external provisioner '{name}' or manually by the system administrator"
                    );
                    pending(claim, "ExternalProvisioning", &message, &mut plan);
                }
                None if class.is_empty() => pending(claim, "FailedBinding", message, &mut plan),
                None => {
                    let message = format!("storageclass.storage.k8s.io {class:?} not found");
                    let known = view.snapshot.storage_classes.contains(&Key::cluster(class));
                    if !known {
                        pending(claim, "ProvisioningFailed", &message, &mut plan);
                    } else {
                        pending(claim, "", "", &mut plan);
                    }
                }
            }
        }
    }
    plan
}

fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    claim
        .metadata
        .annotations
        .as_ref()
        .is_some_and(|annotations| annotations.contains_key(BIND_COMPLETED))
}

/// Whether the claim's class binds only when a pod needs the claim, and none does yet.
fn waits_for_consumer(snapshot: &Snapshot, claim: &PersistentVolumeClaim) -> bool {
    let class = snapshot
        .storage_classes
        .get(&Key::cluster(matching::class_of(claim)));
    let waits = class.and_then(|class| class.volume_binding_mode.as_deref())
        == Some("WaitForFirstConsumer");
    let key = Key::of(&claim.metadata);
    waits
        && !snapshot
            .pods
            .namespace(&key.namespace)
            .any(|(_, pod)| claims_in(pod).any(|name| name == &*key.name))
}

/// A claim that waits says so, with the reason as an event.
fn pending(claim: &PersistentVolumeClaim, reason: &'static str, message: &str, plan: &mut Plan) {
    if claim
        .status
        .as_ref()
        .and_then(|status| status.phase.as_ref())
        .is_none()
    {
        plan.push(pods::status_patch(claim, json!({"phase": "Pending"})));
    }
    if !reason.is_empty() {
        let target = Target::of(claim);
        plan.note(Note::normal(&target, REPORTER, reason, message));
    }
}

fn lose(claim: &PersistentVolumeClaim, plan: &mut Plan) {
    if phase_of_claim(claim) != "Lost" {
        let note = Note::warning(
            &Target::of(claim),
            REPORTER,
            "ClaimLost",
            "Bound claim has lost its PersistentVolume. Data on the volume is lost!",
        );
        plan.push_noted(pods::status_patch(claim, json!({"phase": "Lost"})), note);
    }
}

fn annotate<K: Typed>(object: &K, annotations: &[&str], fields: Value) -> Action {
    let annotations: serde_json::Map<String, Value> = annotations
        .iter()
        .map(|name| ((*name).to_string(), json!("yes")))
        .collect();
    let mut body = json!({"metadata": {
        "uid": object.metadata().uid, "resourceVersion": object.metadata().resource_version,
        "annotations": annotations,
    }});
    if let (Value::Object(body), Value::Object(fields)) = (&mut body, fields) {
        body.extend(fields);
    }
    Action::Patch {
        target: Target::of(object),
        subresource: None,
        body,
    }
}

/// The next step towards a bound pair: the volume says whose it is, then the claim does, then both are Bound. The volume
/// comes first, since of two claims only one can be written there.
fn bind(claim: &PersistentVolumeClaim, volume: &PersistentVolume, plan: &mut Plan) {
    let reference = claim_ref(volume);
    if reference.and_then(|reference| reference.uid.as_ref()) != claim.metadata.uid.as_ref() {
        let by_controller: &[&str] = if reference.is_none() {
            &[BOUND_BY_CONTROLLER]
        } else {
            &[]
        };
        let wanted = Target::of(claim).reference();
        plan.push(annotate(
            volume,
            by_controller,
            json!({"spec": {"claimRef": wanted}}),
        ));
        return;
    }
    let name = volume.metadata.name.clone().unwrap_or_default();
    if volume_name(claim).is_none() {
        let fields = json!({"spec": {"volumeName": name}});
        plan.push(annotate(
            claim,
            &[BIND_COMPLETED, BOUND_BY_CONTROLLER],
            fields,
        ));
        return;
    }
    if !is_bound(claim) {
        plan.push(annotate(claim, &[BIND_COMPLETED], json!({})));
        return;
    }
    let spec = volume.spec.as_ref();
    let capacity = spec.and_then(|spec| spec.capacity.clone());
    let modes = spec.and_then(|spec| spec.access_modes.clone());
    let status = claim.status.as_ref();
    let says = status.is_some_and(|status| {
        status.phase.as_deref() == Some("Bound")
            && status.capacity == capacity
            && status.access_modes == modes
    });
    if !says {
        let status = json!({"phase": "Bound", "capacity": capacity, "accessModes": modes});
        plan.push(pods::status_patch(claim, status));
    }
}

fn plan_volume(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(volume) = view.snapshot.volumes.get(key) else {
        return plan;
    };
    let uid = claim_ref(volume).and_then(|reference| reference.uid.as_ref());
    let claim = claim_of(volume).and_then(|key| view.snapshot.claims.get(&key));
    let phase = match (uid, claim) {
        (None, _) => "Available",
        (Some(uid), Some(claim)) if claim.metadata.uid.as_ref() == Some(uid) => {
            if volume_name(claim) == Some(&*key.name) {
                "Bound"
            } else if volume_name(claim).is_some() {
                // Two volumes were promised to one claim, and it took the other.
                unpromise(volume, &mut plan);
                return plan;
            } else {
                // The claim has not answered yet.
                "Available"
            }
        }
        (Some(_), _) => "Released",
    };
    if phase == "Released" && reclaim_policy(volume) == "Delete" && phase_of(volume) == "Released" {
        let message = "error getting deleter volume plugin for volume: no volume plugin matched";
        let target = Target::of(&**volume);
        let failed = json!({"phase": "Failed", "message": message});
        let note = Note::warning(&target, REPORTER, "VolumeFailedDelete", message);
        plan.push_noted(pods::status_patch(&**volume, failed), note);
        return plan;
    }
    let settled =
        phase_of(volume) == phase || (phase == "Released" && phase_of(volume) == "Failed");
    if !settled {
        let status = json!({
            "phase": phase, "message": null,
            "lastPhaseTransitionTime": k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(view.now),
        });
        plan.push(pods::status_patch(&**volume, status));
    }
    plan
}

fn reclaim_policy(volume: &PersistentVolume) -> &str {
    let spec = volume.spec.as_ref();
    spec.and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref())
        .unwrap_or("Retain")
}

/// Takes a promise back that the controller made; one that a user wrote stays, without the UID.
fn unpromise(volume: &PersistentVolume, plan: &mut Plan) {
    let ours = volume
        .metadata
        .annotations
        .as_ref()
        .is_some_and(|annotations| annotations.contains_key(BOUND_BY_CONTROLLER));
    let reference = if ours {
        Value::Null
    } else {
        json!({"uid": null, "resourceVersion": null})
    };
    plan.push(annotate(
        volume,
        &[],
        json!({"spec": {"claimRef": reference}}),
    ));
}
