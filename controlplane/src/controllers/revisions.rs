//! ControllerRevisions of a workload: one per template it has had, which is what `kubectl rollout history` and `undo` read.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use serde_json::{Value, json};

use super::labels::selector_matches;
use super::object::{Key, Object, Target, Typed};
use super::plan::{Action, Plan};
use super::pods;
use super::snapshot::Snapshot;

/// A workload, as far as its revisions go.
pub struct Versioned<'a, K> {
    pub owner: &'a K,
    pub selector: &'a LabelSelector,
    pub template: &'a PodTemplateSpec,
    /// `status.collisionCount`.
    pub collisions: Option<i32>,
    /// `spec.revisionHistoryLimit`.
    pub limit: Option<i32>,
    /// Label of a revision that holds the hash of its template.
    pub hash_label: &'static str,
}

impl<'a, K: Typed> Versioned<'a, K> {
    /// What a revision holds: the patch that brings its template back.
    fn data(&self) -> Value {
        let mut template = json!(self.template);
        if let Value::Object(template) = &mut template {
            template.insert("$patch".into(), json!("replace"));
        }
        json!({"spec": {"template": template}})
    }

    /// The workload's revisions, oldest first.
    pub fn history<'s>(&self, snapshot: &'s Snapshot) -> Vec<&'s Arc<ControllerRevision>> {
        let uid = self.owner.metadata().uid.as_deref().unwrap_or_default();
        let mut known: Vec<_> = snapshot.revisions_owned_by(uid).collect();
        known.sort_by_key(|revision| revision.revision);
        known
    }

    /// The revision of the current template. None when it is not there yet: then the plan makes it.
    pub fn current<'s>(
        &self,
        snapshot: &'s Snapshot,
        plan: &mut Plan,
    ) -> Option<&'s Arc<ControllerRevision>> {
        let namespace = self
            .owner
            .metadata()
            .namespace
            .as_deref()
            .unwrap_or_default();
        let mut adopted = false;
        for orphan in snapshot.orphan_revisions(namespace) {
            if selector_matches(self.selector, orphan.metadata.labels.as_ref())
                && orphan.metadata.deletion_timestamp.is_none()
            {
                plan.push(pods::adopt(&**orphan, self.owner));
                adopted = true;
            }
        }
        if adopted {
            return None;
        }
        let data = self.data();
        let known = self.history(snapshot);
        let newest = known
            .iter()
            .map(|revision| revision.revision)
            .max()
            .unwrap_or(0);
        let equal = known
            .iter()
            .rev()
            .copied()
            .find(|revision| revision.data.as_ref().map(|found| &found.0) == Some(&data));
        if let Some(revision) = equal {
            if revision.revision < newest {
                // A template that came back is the newest revision again.
                plan.push(Action::Patch {
                    target: Target::of(&**revision),
                    subresource: None,
                    body: json!({"metadata": {"uid": revision.metadata.uid}, "revision": newest + 1}),
                });
            }
            return Some(revision);
        }
        let hash = pods::template_hash(self.template, self.collisions);
        let key = Key::of(self.owner.metadata());
        let name = format!("{}-{hash}", key.name);
        if let Some(taken) = snapshot.revisions.get(&Key::new(&key.namespace, &name)) {
            if known.iter().any(|revision| Arc::ptr_eq(revision, taken)) {
                // Ours and of the same hash: the server has filled in the stored template differently.
                return Some(taken);
            }
            plan.push(pods::status_patch(
                self.owner,
                json!({"collisionCount": self.collisions.unwrap_or(0) + 1}),
            ));
            return None;
        }
        plan.push(Action::Create(Object::of(self.revision(
            name,
            &hash,
            data,
            newest + 1,
        ))));
        None
    }

    fn revision(&self, name: String, hash: &str, data: Value, number: i64) -> ControllerRevision {
        let owner = self.owner.metadata();
        let labels = self
            .template
            .metadata
            .as_ref()
            .and_then(|meta| meta.labels.as_ref());
        ControllerRevision {
            metadata: ObjectMeta {
                name: Some(name),
                namespace: owner.namespace.clone(),
                labels: Some(pods::with_label(labels, self.hash_label, hash)),
                annotations: owner.annotations.clone(),
                owner_references: Some(vec![pods::controller_reference(self.owner)]),
                ..Default::default()
            },
            data: Some(RawExtension(data)),
            revision: number,
        }
    }

    /// The hash that a revision carries.
    pub fn hash_of(&self, revision: &ControllerRevision) -> Option<String> {
        revision
            .metadata
            .labels
            .as_ref()?
            .get(self.hash_label)
            .cloned()
    }

    /// Deletes the oldest revisions past `revisionHistoryLimit` that are not in use.
    pub fn clear_history(
        &self,
        snapshot: &Snapshot,
        in_use: impl Fn(&ControllerRevision) -> bool,
        plan: &mut Plan,
    ) {
        let idle: Vec<_> = self
            .history(snapshot)
            .into_iter()
            .filter(|revision| !in_use(revision))
            .filter(|revision| revision.metadata.deletion_timestamp.is_none())
            .collect();
        let limit = usize::try_from(self.limit.unwrap_or(10)).unwrap_or(0);
        let surplus = idle.len().saturating_sub(limit);
        for revision in idle.into_iter().take(surplus) {
            plan.push(Action::Delete {
                target: Target::of(&**revision),
                propagation: None,
                grace_seconds: None,
            });
        }
    }
}
