//! Which volume fits a claim.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};

use super::super::labels::selector_matches;
use super::super::snapshot::Snapshot;
use super::claim_ref;
use crate::scheduler::parse_milli;

pub fn class_of(claim: &PersistentVolumeClaim) -> &str {
    let spec = claim.spec.as_ref();
    spec.and_then(|spec| spec.storage_class_name.as_deref())
        .unwrap_or_default()
}

/// The smallest free volume that holds what the claim asks for; of equal ones the first by name.
pub fn smallest<'a>(
    snapshot: &'a Snapshot,
    claim: &PersistentVolumeClaim,
) -> Option<&'a Arc<PersistentVolume>> {
    let fitting = snapshot
        .volumes
        .iter()
        .filter(|(_, volume)| fits(volume, claim));
    fitting
        .min_by_key(|(key, volume)| (capacity(volume), (*key).clone()))
        .map(|(_, volume)| volume)
}

fn capacity(volume: &PersistentVolume) -> i128 {
    let spec = volume.spec.as_ref();
    spec.and_then(|spec| spec.capacity.as_ref()?.get("storage"))
        .and_then(|storage| parse_milli(&storage.0))
        .unwrap_or(0)
}

fn fits(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let (Some(has), Some(wants)) = (volume.spec.as_ref(), claim.spec.as_ref()) else {
        return false;
    };
    let asked = wants
        .resources
        .as_ref()
        .and_then(|resources| resources.requests.as_ref()?.get("storage"))
        .and_then(|storage| parse_milli(&storage.0))
        .unwrap_or(0);
    let mode = |mode: &Option<String>| mode.clone().unwrap_or_else(|| "Filesystem".into());
    let modes = has.access_modes.as_deref().unwrap_or_default();
    claim_ref(volume).is_none()
        && volume.metadata.deletion_timestamp.is_none()
        && has.storage_class_name.as_deref().unwrap_or_default() == class_of(claim)
        && mode(&has.volume_mode) == mode(&wants.volume_mode)
        && wants
            .access_modes
            .iter()
            .flatten()
            .all(|wanted| modes.contains(wanted))
        && wants
            .selector
            .as_ref()
            .is_none_or(|selector| selector_matches(selector, volume.metadata.labels.as_ref()))
        && capacity(volume) >= asked
}
