//! CertificateSigningRequests: they say who asks, and stay as they were asked.

use serde_json::{Value, json};

use super::place::Place;
use super::{Errors, NameRule, Strategy};
use crate::api::fields::Fields;
use crate::auth::Identity;

pub struct SigningRequest;

impl Strategy for SigningRequest {
    fn name_rule(&self) -> NameRule {
        NameRule::PathSegment
    }

    fn validate(&self, request: &Value, errors: &mut Errors) {
        let spec = Place::root(request).field("spec");
        for field in ["request", "signerName", "usages"] {
            spec.field(field).require(errors);
        }
    }

    fn validate_update(&self, request: &Value, old: &Value, errors: &mut Errors) {
        let spec = |request| Place::root(request).field("spec");
        spec(request).unchanged(&spec(old), errors);
    }

    /// Decisions are made by `approval` alone.
    fn prepare_status(&self, request: &mut Value, old: &Value) {
        let mut conditions = request.items("/status/conditions").to_vec();
        for kind in ["Approved", "Denied"] {
            let of_kind = |condition: &Value| condition.text("/type") == kind;
            let made = old.items("/status/conditions").iter().find(|c| of_kind(c));
            match (made, conditions.iter().position(of_kind)) {
                (Some(made), Some(at)) => conditions[at] = made.clone(),
                (Some(made), None) => conditions.push(made.clone()),
                (None, _) => conditions.retain(|condition| !of_kind(condition)),
            }
        }
        if conditions.is_empty() {
            request.remove("/status/conditions");
        } else {
            request.set("/status/conditions", conditions);
        }
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["spec.signerName"]
    }
}

/// Writes down who asks, whatever the client says: it is what approvers go by.
pub fn asked_by(request: &mut Value, caller: &Identity) {
    request.set("/spec/username", caller.user.as_str());
    request.set("/spec/groups", json!(caller.groups));
    for (field, given, empty) in [
        ("uid", json!(caller.uid), caller.uid.is_empty()),
        ("extra", json!(caller.extra), caller.extra.is_empty()),
    ] {
        let pointer = format!("/spec/{field}");
        if empty {
            request.remove(&pointer);
        } else {
            request.set(&pointer, given);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_write_decides_nothing() {
        let with = |conditions: Value| json!({"status": {"conditions": conditions}});
        let approved = json!({"type": "Approved", "status": "True", "reason": "x"});
        let (denied, issued) = (
            json!({"type": "Denied", "status": "True"}),
            json!({"type": "Issued", "status": "True"}),
        );
        for (sent, before, after) in [
            (json!([denied, issued]), json!([]), json!([issued])),
            (
                json!([issued]),
                json!([approved]),
                json!([issued, approved]),
            ),
            (
                json!([{"type": "Approved", "status": "True"}, issued]),
                json!([approved]),
                json!([approved, issued]),
            ),
        ] {
            let mut request = with(sent);
            SigningRequest.prepare_status(&mut request, &with(before));
            assert_eq!(request, with(after));
        }
    }

    #[test]
    fn nobody_asks_in_the_name_of_another() {
        let mut request = json!({"spec": {"username": "root", "groups": ["system:masters"], "uid": "0", "extra": {"a": ["b"]}}});
        let caller = Identity {
            user: "mallory".into(),
            groups: vec!["system:authenticated".into()],
            ..Default::default()
        };
        asked_by(&mut request, &caller);
        let expected = json!({"spec": {"username": "mallory", "groups": ["system:authenticated"]}});
        assert_eq!(request, expected);
    }
}
