//! Nodes.

use serde_json::Value;

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
        for (at, cidr) in node.items("/spec/podCIDRs").iter().enumerate() {
            let cidr = cidr.as_str().unwrap_or("");
            if cidr.parse::<ipnetwork::IpNetwork>().is_err() {
                let field = format!("spec.podCIDRs[{at}]");
                errors.push(FieldError::invalid(
                    field,
                    cidr,
                    "must be a valid CIDR value, (e.g. 10.9.8.0/24)",
                ));
            }
        }
        for (at, taint) in node.items("/spec/taints").iter().enumerate() {
            let at = format!("spec.taints[{at}]");
            if let Some(why) = super::qualified_name(taint.text("/key")) {
                errors.push(FieldError::invalid(
                    format!("{at}.key"),
                    taint.text("/key"),
                    why,
                ));
            }
            super::one_of(
                taint,
                "/effect",
                &at,
                &["NoSchedule", "PreferNoSchedule", "NoExecute"],
                errors,
            );
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
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["spec.unschedulable"]
    }
}
