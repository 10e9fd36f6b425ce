//! Nodes.

use std::collections::BTreeSet;

use serde_json::Value;

use super::metadata::label_value;
use super::place::Place;
use super::{Errors, Strategy};
use crate::api::fields::Fields;
use crate::api::status::FieldError;

pub struct Node;

impl Strategy for Node {
    /// A kubelet registers its node together with its status.
    fn keeps_status(&self) -> bool {
        true
    }

    fn prepare_create(&self, node: &mut Value) {
        node.object_mut("/spec");
    }

    fn validate(&self, node: &Value, errors: &mut Errors) {
        let spec = Place::root(node).field("spec");
        let ranges = spec.field("podCIDRs");
        for range in ranges.items() {
            range.cidr(errors);
        }
        if ranges.len() > 2 {
            let why = "may specify no more than one CIDR for each IP family";
            ranges.invalid(why, errors);
        }
        let mut seen: BTreeSet<(&str, &str)> = BTreeSet::new();
        for taint in spec.field("taints").items() {
            let (key, effect) = (taint.field("key"), taint.field("effect"));
            key.require_name(super::qualified_name, errors);
            taint.field("value").keep_to(label_value, errors);
            effect.require_one_of(&["NoExecute", "NoSchedule", "PreferNoSchedule"], errors);
            if !seen.insert((key.text(), effect.text())) {
                taint.duplicate(errors);
            }
        }
    }

    fn validate_update(&self, node: &Value, old: &Value, errors: &mut Errors) {
        for field in ["podCIDR", "podCIDRs", "providerID"] {
            let pointer = format!("/spec/{field}");
            if old.has(&pointer) && node.pointer(&pointer) != old.pointer(&pointer) {
                let why = "node updates may not change it once it is set";
                errors.push(FieldError::forbidden(format!("spec.{field}"), why));
            }
        }
    }

    fn default(&self, node: &mut Value) {
        // The old and the new field say the same.
        let first = node.items("/spec/podCIDRs").first().cloned();
        match (first, node.pointer("/spec/podCIDR").cloned()) {
            (Some(first), _) => node.set("/spec/podCIDR", first),
            (None, Some(single)) => node.set("/spec/podCIDRs", Value::Array(vec![single])),
            (None, None) => {}
        }
        // Who says what a node has and not what of it pods may have means all.
        if let Some(all) = node.pointer("/status/capacity").cloned() {
            node.default("/status/allocatable", all);
        }
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["spec.unschedulable"]
    }
}
