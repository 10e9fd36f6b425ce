//! Namespaces: a phase, and a finalizer that holds back deletion until the content is gone.

use serde_json::{Value, json};

use super::{NameRule, Strategy};
use crate::api::fields::{self, Fields};
use crate::api::request::Target;
use crate::api::status::Status;

pub struct Namespace;

/// Namespaces that cannot be deleted, as upstream.
pub const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

impl Strategy for Namespace {
    fn prepare_create(&self, namespace: &mut Value) {
        namespace.set("/status", json!({"phase": "Active"}));
        let finalizers = namespace
            .object_mut("/spec")
            .entry("finalizers")
            .or_insert_with(|| json!([]));
        if let Some(finalizers) = finalizers
            .as_array_mut()
            .filter(|f| !f.iter().any(|f| f == "kubernetes"))
        {
            finalizers.push("kubernetes".into());
        }
    }

    fn default(&self, namespace: &mut Value) {
        let name = fields::name(namespace).to_owned();
        if !name.is_empty() {
            namespace
                .object_mut("/metadata/labels")
                .insert("kubernetes.io/metadata.name".to_owned(), name.into());
        }
    }

    fn prepare_update(&self, namespace: &mut Value, old: &Value) {
        // Only the finalize subresource changes them.
        match old.pointer("/spec/finalizers") {
            Some(finalizers) => namespace.set("/spec/finalizers", finalizers.clone()),
            None => _ = namespace.remove("/spec/finalizers"),
        }
    }

    fn mark_deleted(&self, namespace: &mut Value) {
        namespace.set("/status/phase", "Terminating");
    }

    fn check_delete(&self, target: &Target) -> Result<(), Status> {
        if target
            .name
            .as_deref()
            .is_some_and(|name| IMMORTAL.contains(&name))
        {
            return Err(Status::forbidden(
                target.subject(),
                "this namespace may not be deleted",
            ));
        }
        Ok(())
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["status.phase"]
    }

    fn name_rule(&self) -> NameRule {
        NameRule::Label
    }
}
