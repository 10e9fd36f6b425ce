//! What the controllers ask of pods, owners and pod templates.

use k8s_openapi::api::core::v1::{Pod, PodCondition, PodSpec, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::labels::Labels;
use super::object::{Key, Target, Typed};
use super::plan::Action;

pub fn condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status
        .as_ref()?
        .conditions
        .as_ref()?
        .iter()
        .find(|condition| condition.type_ == type_)
}

pub fn phase(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
        .unwrap_or("Pending")
}

/// Whether the pod has run to its end.
pub fn is_terminal(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

pub fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Whether the pod counts as a replica.
pub fn is_active(pod: &Pod) -> bool {
    !is_terminal(pod) && !is_terminating(pod)
}

pub fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|condition| condition.status == "True")
}

/// Whether a pod has been ready for as long as its controller asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Availability {
    Now,
    At(Timestamp),
    No,
}

pub fn availability(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> Availability {
    let Some(ready) = condition(pod, "Ready").filter(|condition| condition.status == "True") else {
        return Availability::No;
    };
    if min_ready_seconds <= 0 {
        return Availability::Now;
    }
    let Some(Time(since)) = ready.last_transition_time else {
        return Availability::No;
    };
    let at = since
        .saturating_add(SignedDuration::from_secs(min_ready_seconds.into()))
        .unwrap_or(Timestamp::MAX);
    if at <= now {
        Availability::Now
    } else {
        Availability::At(at)
    }
}

pub fn node_name(pod: &Pod) -> Option<&str> {
    pod.spec
        .as_ref()?
        .node_name
        .as_deref()
        .filter(|name| !name.is_empty())
}

/// The owner that manages the object.
pub fn controller_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references
        .iter()
        .flatten()
        .find(|owner| owner.controller == Some(true))
}

/// A reference that makes `owner` the managing owner of what carries it.
pub fn controller_reference<K: Typed>(owner: &K) -> OwnerReference {
    let meta = owner.metadata();
    OwnerReference {
        api_version: K::API_VERSION.into(),
        kind: K::TABLE.resource().kind.clone(),
        name: meta.name.clone().unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// Key of the object's controller if that is of the given kind.
pub fn controller_key(meta: &ObjectMeta, kind: &str) -> Option<Key> {
    let owner = controller_of(meta).filter(|owner| owner.kind == kind)?;
    Some(Key::new(
        meta.namespace.as_deref().unwrap_or_default(),
        &owner.name,
    ))
}

/// The patch that makes `owner` the controller of an object that has none.
pub fn adopt<K: Typed, O: Typed>(object: &K, owner: &O) -> Action {
    let mut owners = object
        .metadata()
        .owner_references
        .clone()
        .unwrap_or_default();
    owners.push(controller_reference(owner));
    owners_patch(object, owners)
}

/// The patch that takes `owner_uid` off the object's owners.
pub fn release<K: Typed>(object: &K, owner_uid: &str) -> Action {
    let mut owners = object
        .metadata()
        .owner_references
        .clone()
        .unwrap_or_default();
    owners.retain(|owner| owner.uid != owner_uid);
    owners_patch(object, owners)
}

fn owners_patch<K: Typed>(object: &K, owners: Vec<OwnerReference>) -> Action {
    let meta = object.metadata();
    Action::Patch {
        target: Target::of(object),
        subresource: None,
        body: json!({"metadata": {
            "uid": meta.uid, "resourceVersion": meta.resource_version, "ownerReferences": owners,
        }}),
    }
}

/// A merge patch of the status of an object whose status nobody else writes. It names no resourceVersion: a write of ours
/// to the same object's spec may be on its way, and what the status says is newer with every plan.
pub fn status_patch<K: Typed>(object: &K, status: Value) -> Action {
    Action::Patch {
        target: Target::of(object),
        subresource: Some("status"),
        body: json!({"metadata": {"uid": object.metadata().uid}, "status": status}),
    }
}

/// A merge patch of the status of an object that others write too: it fails if the object has changed since it was seen.
pub fn guarded_status_patch<K: Typed>(object: &K, status: Value) -> Action {
    Action::Patch {
        target: Target::of(object),
        subresource: Some("status"),
        body: json!({
            "metadata": {"uid": object.metadata().uid, "resourceVersion": object.metadata().resource_version},
            "status": status,
        }),
    }
}

/// The patch that says of a pod that it has failed because nobody runs it any more; with reason and message, that it was
/// disrupted.
pub fn fail(pod: &Pod, disrupted: Option<(&str, &str)>, now: Timestamp) -> Action {
    let mut status = json!({"phase": "Failed"});
    if let Some((reason, message)) = disrupted {
        status["conditions"] = with_disruption(pod, reason, message, now);
    }
    guarded_status_patch(pod, status)
}

/// The pod's conditions, with the one that says that it is being disrupted, and why (KEP-3329).
pub fn with_disruption(pod: &Pod, reason: &str, message: &str, now: Timestamp) -> Value {
    let known = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.clone());
    let mut conditions = known.unwrap_or_default();
    conditions.retain(|condition| condition.type_ != DISRUPTED);
    conditions.push(PodCondition {
        type_: DISRUPTED.into(),
        status: "True".into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        last_transition_time: Some(Time(now)),
        ..Default::default()
    });
    json!(conditions)
}

pub const DISRUPTED: &str = "DisruptionTarget";

/// A pod of a template for a controller that names its pods `<owner>-xxxxx`.
pub fn from_template<K: Typed>(template: &PodTemplateSpec, owner: &K) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    let owner_meta = owner.metadata();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(name_prefix(owner_meta.name.as_deref().unwrap_or_default())),
            namespace: owner_meta.namespace.clone(),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![controller_reference(owner)]),
            ..Default::default()
        },
        spec: Some(template.spec.clone().unwrap_or_default()),
        status: None,
    }
}

/// `generateName` of the pods of an owner, short enough that a name of 63 characters (a host name) results.
pub fn name_prefix(owner: &str) -> String {
    let mut prefix: String = owner.chars().take(57).collect();
    prefix.push('-');
    prefix
}

/// A short hash of a pod template, in the alphabet of Kubernetes' generated names. It only names things: whether two
/// templates are equal is decided by comparing them.
pub fn template_hash(template: &PodTemplateSpec, collisions: Option<i32>) -> String {
    let mut hash = fnv1a(
        serde_json::to_string(template)
            .unwrap_or_default()
            .as_bytes(),
        0x811c_9dc5,
    );
    if let Some(collisions) = collisions {
        hash = fnv1a(&collisions.to_le_bytes(), hash);
    }
    hash.to_string()
        .bytes()
        .map(|digit| NAME_ALPHABET[digit as usize % NAME_ALPHABET.len()] as char)
        .collect()
}

/// Letters and digits that cannot form words, as upstream's generated names use.
pub const NAME_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

fn fnv1a(bytes: &[u8], seed: u32) -> u32 {
    bytes.iter().fold(seed, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// A template without one of its labels, for comparing templates of which one carries a hash.
pub fn without_label(template: &PodTemplateSpec, label: &str) -> PodTemplateSpec {
    let mut template = template.clone();
    if let Some(labels) = template
        .metadata
        .as_mut()
        .and_then(|meta| meta.labels.as_mut())
    {
        labels.remove(label);
    }
    template
}

pub fn with_label(labels: Option<&Labels>, name: &str, value: &str) -> Labels {
    let mut labels = labels.cloned().unwrap_or_default();
    labels.insert(name.into(), value.into());
    labels
}

/// An absolute number or a percentage of `total`, rounded up or down. What cannot be read counts as 0.
pub fn scaled(value: Option<&IntOrString>, total: i32, round_up: bool, default: &str) -> i32 {
    let default = IntOrString::String(default.into());
    match value.unwrap_or(&default) {
        IntOrString::Int(number) => *number,
        IntOrString::String(text) => {
            let Some(percent) = text.strip_suffix('%') else {
                return text.parse().unwrap_or(0);
            };
            let product = i64::from(total) * percent.parse::<i64>().unwrap_or(0);
            let result = if round_up {
                (product + 99).div_euclid(100)
            } else {
                product.div_euclid(100)
            };
            result.try_into().unwrap_or(i32::MAX)
        }
    }
}

/// How many times the pod's containers have restarted, at most of any of them.
pub fn restarts_max(pod: &Pod) -> i32 {
    let statuses = pod
        .status
        .iter()
        .flat_map(|status| status.container_statuses.iter().flatten());
    statuses
        .map(|status| status.restart_count)
        .max()
        .unwrap_or(0)
}

pub fn spec(pod: &Pod) -> &PodSpec {
    static EMPTY: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);
    pod.spec.as_ref().unwrap_or(&EMPTY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_round_as_asked() {
        let percent = |text: &str| IntOrString::String(text.into());
        for (value, total, up, expected) in [
            (Some(percent("25%")), 10, true, 3),
            (Some(percent("25%")), 10, false, 2),
            (Some(percent("100%")), 7, false, 7),
            (Some(percent("1%")), 0, true, 0),
            (Some(IntOrString::Int(4)), 10, true, 4),
            (None, 4, true, 1),
        ] {
            assert_eq!(
                scaled(value.as_ref(), total, up, "25%"),
                expected,
                "{value:?} of {total}"
            );
        }
    }

    #[test]
    fn a_template_hash_changes_with_template_and_collisions_and_is_a_valid_label() {
        let mut template = PodTemplateSpec::default();
        let first = template_hash(&template, None);
        assert_eq!(first, template_hash(&template, None));
        assert_ne!(first, template_hash(&template, Some(1)));
        template.spec = Some(PodSpec {
            node_name: Some("n".into()),
            ..Default::default()
        });
        assert_ne!(first, template_hash(&template, None));
        assert!(first.bytes().all(|byte| NAME_ALPHABET.contains(&byte)) && first.len() <= 10);
    }

    #[test]
    fn a_pod_becomes_available_after_min_ready_seconds() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let pod = |since: &str| Pod {
            status: Some(k8s_openapi::api::core::v1::PodStatus {
                conditions: Some(vec![PodCondition {
                    type_: "Ready".into(),
                    status: "True".into(),
                    last_transition_time: Some(Time(since.parse().unwrap())),
                    ..Default::default()
                }]),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(
            availability(&pod("2026-01-01T00:00:50Z"), 0, now),
            Availability::Now
        );
        assert_eq!(
            availability(&pod("2026-01-01T00:00:50Z"), 10, now),
            Availability::Now
        );
        let later = "2026-01-01T00:01:01Z".parse().unwrap();
        assert_eq!(
            availability(&pod("2026-01-01T00:00:51Z"), 10, now),
            Availability::At(later)
        );
        assert_eq!(availability(&Pod::default(), 0, now), Availability::No);
    }

    #[test]
    fn a_long_owner_name_leaves_room_for_the_suffix() {
        assert_eq!(name_prefix(&"x".repeat(80)).len() + 5, 63);
    }
}
