//! ControllerRevisions of a DaemonSet: one per template it has had, which is what `kubectl rollout history` and `undo` read.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use serde_json::{Value, json};

use super::super::object::{Key, Object, Target};
use super::super::plan::{Action, Plan};
use super::super::pods;
use super::super::snapshot::Snapshot;
use super::{HASH_LABEL, PodsByNode};

/// What a revision holds: the patch that brings its template back.
fn data(set: &DaemonSet) -> Value {
    let mut template = set
        .spec
        .as_ref()
        .map(|spec| json!(spec.template))
        .unwrap_or_default();
    if let Value::Object(template) = &mut template {
        template.insert("$patch".into(), json!("replace"));
    }
    json!({"spec": {"template": template}})
}

/// Hash of the revision of the current template. None when the revision is not there yet: then the plan creates it.
pub fn current(snapshot: &Snapshot, set: &DaemonSet, plan: &mut Plan) -> Option<String> {
    let data = data(set);
    let known = history(snapshot, set);
    let newest = known
        .iter()
        .map(|revision| revision.revision)
        .max()
        .unwrap_or(0);
    let equal = known
        .iter()
        .rev()
        .find(|revision| revision.data.as_ref().map(|found| &found.0) == Some(&data));
    if let Some(revision) = equal {
        if revision.revision < newest {
            // A template that came back is the newest revision again.
            plan.push(Action::Patch {
                target: Target::of(&***revision),
                subresource: None,
                body: json!({"metadata": {"uid": revision.metadata.uid}, "revision": newest + 1}),
            });
        }
        return hash_of(revision);
    }
    let collisions = set
        .status
        .as_ref()
        .and_then(|status| status.collision_count);
    let template = &set.spec.as_ref()?.template;
    let hash = pods::template_hash(template, collisions);
    let key = Target::of(set).key;
    let name = format!("{}-{hash}", key.name);
    if let Some(taken) = snapshot.revisions.get(&Key::new(&key.namespace, &name)) {
        if known.iter().any(|revision| Arc::ptr_eq(revision, taken)) {
            // Ours and of the same hash: the server has filled in the stored template differently.
            return Some(hash);
        }
        plan.push(pods::status_patch(
            set,
            json!({"collisionCount": collisions.unwrap_or(0) + 1}),
        ));
        return None;
    }
    let template_labels = template
        .metadata
        .as_ref()
        .and_then(|meta| meta.labels.as_ref());
    plan.push(Action::Create(Object::of(ControllerRevision {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: set.metadata.namespace.clone(),
            labels: Some(pods::with_label(template_labels, HASH_LABEL, &hash)),
            annotations: set.metadata.annotations.clone(),
            owner_references: Some(vec![pods::controller_reference(set)]),
            ..Default::default()
        },
        data: Some(RawExtension(data)),
        revision: newest + 1,
    })));
    None
}

/// The DaemonSet's revisions, oldest first.
fn history<'a>(snapshot: &'a Snapshot, set: &DaemonSet) -> Vec<&'a Arc<ControllerRevision>> {
    let uid = set.metadata.uid.as_deref().unwrap_or_default();
    let mut known: Vec<_> = snapshot.revisions_owned_by(uid).collect();
    known.sort_by_key(|revision| revision.revision);
    known
}

fn hash_of(revision: &ControllerRevision) -> Option<String> {
    revision.metadata.labels.as_ref()?.get(HASH_LABEL).cloned()
}

/// Deletes the oldest revisions past `revisionHistoryLimit` that no pod is of.
pub fn clear_history(
    snapshot: &Snapshot,
    set: &DaemonSet,
    hash: &str,
    owned: &PodsByNode<'_>,
    plan: &mut Plan,
) {
    let limit = set
        .spec
        .as_ref()
        .and_then(|spec| spec.revision_history_limit)
        .unwrap_or(10);
    let live: BTreeSet<&str> = owned
        .values()
        .flatten()
        .filter_map(|pod| pod.metadata.labels.as_ref()?.get(HASH_LABEL))
        .map(String::as_str)
        .chain([hash])
        .collect();
    let idle: Vec<_> = history(snapshot, set)
        .into_iter()
        .filter(|revision| hash_of(revision).is_none_or(|found| !live.contains(found.as_str())))
        .filter(|revision| revision.metadata.deletion_timestamp.is_none())
        .collect();
    let surplus = idle
        .len()
        .saturating_sub(usize::try_from(limit).unwrap_or(0));
    for revision in idle.into_iter().take(surplus) {
        plan.push(Action::Delete {
            target: Target::of(&**revision),
            propagation: None,
            grace_seconds: None,
        });
    }
}
