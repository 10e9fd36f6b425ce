//! What is in use is not deleted under its users: claims stay until no pod on a node uses them, volumes until they are not
//! bound, classes of attributes until nothing names them. Admission gives each a finalizer, which goes here.

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Value, json};

use super::super::object::{Key, Object, Target, Typed};
use super::super::plan::{Action, Controller, Keys, Plan, View};
use super::super::snapshot::{Change, Snapshot};
use super::phase_of;

pub const CLAIM: &str = "kubernetes.io/pvc-protection";
pub const VOLUME: &str = "kubernetes.io/pv-protection";
pub const CLASS: &str = "kubernetes.io/vac-protection";

pub const CLAIMS: Controller = Controller {
    name: "persistentvolumeclaim-protection",
    affected: claims_affected,
    plan: plan_claim,
};

pub const VOLUMES: Controller = Controller {
    name: "persistentvolume-protection",
    affected: volumes_affected,
    plan: plan_volume,
};

pub const CLASSES: Controller = Controller {
    name: "volumeattributesclass-protection",
    affected: classes_affected,
    plan: plan_class,
};

fn claims_affected(_: &Snapshot, change: &Change, keys: &mut Keys) {
    for state in change.states() {
        match state {
            Object::PersistentVolumeClaim(claim) => {
                keys.insert(Key::of(&claim.metadata));
            }
            Object::Pod(pod) => {
                let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
                keys.extend(claims_of(pod).map(|name| Key::new(namespace, &name)));
            }
            _ => {}
        }
    }
}

fn volumes_affected(_: &Snapshot, change: &Change, keys: &mut Keys) {
    if let Object::PersistentVolume(volume) = change.object() {
        keys.insert(Key::of(&volume.metadata));
    }
}

fn classes_affected(_: &Snapshot, change: &Change, keys: &mut Keys) {
    for state in change.states() {
        match state {
            Object::VolumeAttributesClass(class) => {
                keys.insert(Key::of(&class.metadata));
            }
            Object::PersistentVolumeClaim(claim) => {
                keys.extend(classes_of_claim(claim).map(Key::cluster));
            }
            Object::PersistentVolume(volume) => {
                keys.extend(class_of_volume(volume).map(Key::cluster));
            }
            _ => {}
        }
    }
}

/// Names of the claims of a pod, those made for it among them.
fn claims_of(pod: &Pod) -> impl Iterator<Item = String> + '_ {
    let volumes = pod.spec.iter().flat_map(|spec| &spec.volumes).flatten();
    volumes.filter_map(|volume| match &volume.persistent_volume_claim {
        Some(source) => Some(source.claim_name.clone()),
        None => {
            volume.ephemeral.as_ref()?;
            let pod = pod.metadata.name.as_deref().unwrap_or_default();
            Some(format!("{pod}-{}", volume.name))
        }
    })
}

/// Whether a pod uses a claim: from when it has a node, which may have mounted it, until the pod is gone.
pub fn uses(pod: &Pod, claim: &PersistentVolumeClaim) -> bool {
    let spec = pod.spec.as_ref();
    let placed = spec.and_then(|spec| spec.node_name.as_deref());
    placed.is_some_and(|node| !node.is_empty())
        && claims_of(pod).any(|name| Some(&name) == claim.metadata.name.as_ref())
}

fn classes_of_claim(claim: &PersistentVolumeClaim) -> impl Iterator<Item = &str> {
    let status = claim.status.as_ref();
    let modified = status.and_then(|status| status.modify_volume_status.as_ref());
    let names = [
        claim
            .spec
            .as_ref()
            .and_then(|spec| spec.volume_attributes_class_name.as_deref()),
        status.and_then(|status| status.current_volume_attributes_class_name.as_deref()),
        modified.and_then(|status| status.target_volume_attributes_class_name.as_deref()),
    ];
    names.into_iter().flatten()
}

fn class_of_volume(volume: &PersistentVolume) -> Option<&str> {
    let spec = volume.spec.as_ref()?;
    spec.volume_attributes_class_name.as_deref()
}

/// The patch that gives an object its finalizers.
pub fn hold(meta: &ObjectMeta, finalizers: Vec<&str>) -> Value {
    json!({"metadata": {
        "uid": meta.uid, "resourceVersion": meta.resource_version, "finalizers": finalizers,
    }})
}

/// The patch that takes a finalizer away.
pub fn release(meta: &ObjectMeta, finalizer: &str) -> Value {
    let held = meta.finalizers.iter().flatten().map(String::as_str);
    hold(meta, held.filter(|held| *held != finalizer).collect())
}

fn released<K: Typed>(object: &K, finalizer: &str) -> Action {
    Action::Patch {
        target: Target::of(object),
        subresource: None,
        body: release(object.metadata(), finalizer),
    }
}

/// Gives an object its finalizer, or takes it away (`released`) when it is to go and nothing uses it.
fn settle<K: Typed>(
    object: &K,
    finalizer: &'static str,
    used: impl FnOnce() -> bool,
    released: impl FnOnce() -> Action,
) -> Plan {
    let mut plan = Plan::nothing();
    let meta = object.metadata();
    let held = meta.finalizers.iter().flatten().map(String::as_str);
    let goes = meta.deletion_timestamp.is_some();
    match (goes, held.clone().any(|held| held == finalizer)) {
        // It was made before there was protection.
        (false, false) => plan.push(Action::Patch {
            target: Target::of(object),
            subresource: None,
            body: hold(meta, held.chain([finalizer]).collect()),
        }),
        (true, true) if !used() => plan.push(released()),
        _ => {}
    }
    plan
}

fn plan_claim(view: &View<'_>, key: &Key) -> Plan {
    let Some(claim) = view.snapshot.claims.get(key) else {
        return Plan::nothing();
    };
    let used = || {
        let mut pods = view.snapshot.pods.namespace(&key.namespace);
        pods.any(|(_, pod)| uses(pod, claim))
    };
    settle(&**claim, CLAIM, used, || {
        Action::ReleaseClaim(claim.clone())
    })
}

fn plan_volume(view: &View<'_>, key: &Key) -> Plan {
    let Some(volume) = view.snapshot.volumes.get(key) else {
        return Plan::nothing();
    };
    let used = || phase_of(volume) == "Bound";
    settle(&**volume, VOLUME, used, || released(&**volume, VOLUME))
}

fn plan_class(view: &View<'_>, key: &Key) -> Plan {
    let Some(class) = view.snapshot.attributes_classes.get(key) else {
        return Plan::nothing();
    };
    let used = || {
        let mut claims = view.snapshot.claims.values();
        let mut volumes = view.snapshot.volumes.values();
        let named = |name: &str| name == &*key.name;
        claims.any(|claim| classes_of_claim(claim).any(named))
            || volumes.any(|volume| class_of_volume(volume).is_some_and(named))
    };
    settle(&**class, CLASS, used, || released(&**class, CLASS))
}
