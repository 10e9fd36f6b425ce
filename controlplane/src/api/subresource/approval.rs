//! `approval` of a certificate signing request: its conditions of type Approved and Denied, of which neither is taken back.

use serde_json::Value;

use crate::api::fields::{self, Fields};
use crate::api::status::{FieldError, Status};

const DECISIONS: [&str; 2] = ["Approved", "Denied"];

/// Takes over the decision that was sent, with the times it was made at.
pub fn decision(old: &Value, wanted: &Value) -> Result<Value, Status> {
    let mut errors = Vec::new();
    let mut conditions = old.items("/status/conditions").to_vec();
    let sent = wanted.items("/status/conditions");
    let find = |list: &[Value], kind: &str| list.iter().find(|c| c.text("/type") == kind).cloned();
    for kind in DECISIONS {
        let before = find(&conditions, kind);
        let after = find(sent, kind);
        match (before, after) {
            (Some(_), None) => {
                let why = format!("updates may not remove a condition of type {kind:?}");
                errors.push(FieldError::forbidden("status.conditions", &why));
            }
            (before, Some(mut after)) => {
                if after.text("/status") != "True" {
                    let field = "status.conditions.status";
                    errors.push(FieldError::unsupported(
                        field,
                        after.text("/status"),
                        &["True"],
                    ));
                }
                let now = fields::now();
                after.default("/lastUpdateTime", now.as_str());
                let since = before
                    .as_ref()
                    .map(|before| before["lastTransitionTime"].clone());
                after.default("/lastTransitionTime", since.unwrap_or_else(|| now.into()));
                conditions.retain(|condition| condition.text("/type") != kind);
                conditions.push(after);
            }
            (None, None) => {}
        }
    }
    if DECISIONS
        .iter()
        .all(|kind| conditions.iter().any(|c| c.text("/type") == *kind))
    {
        let why = "Approved and Denied conditions are mutually exclusive";
        errors.push(FieldError::invalid("status.conditions", "Denied", why));
    }
    if !errors.is_empty() {
        let kind = "CertificateSigningRequest";
        return Err(Status::invalid(
            "certificates.k8s.io",
            kind,
            fields::name(old),
            errors,
        ));
    }
    let mut new = old.clone();
    if !conditions.is_empty() {
        new.set("/status/conditions", conditions);
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn with(conditions: Value) -> Value {
        json!({"metadata": {"name": "r"}, "spec": {"request": "x"}, "status": {"conditions": conditions}})
    }

    #[test]
    fn a_decision_is_made_once() {
        let fresh = json!({"metadata": {"name": "r"}, "spec": {"request": "x"}});
        let approved = json!({"type": "Approved", "status": "True", "reason": "KubectlApprove"});
        let mut sent = with(json!([approved]));
        sent.set("/spec/request", "another");
        let new = decision(&fresh, &sent).expect("approved");
        assert_eq!(new["spec"]["request"], "x", "nothing else changes");
        assert_eq!(new["status"]["conditions"][0]["reason"], "KubectlApprove");
        assert!(new["status"]["conditions"][0]["lastTransitionTime"].is_string());
        let denied = json!({"type": "Denied", "status": "True"});
        for (sent, message) in [
            (with(json!([])), "may not remove a condition"),
            (with(json!([approved, denied])), "mutually exclusive"),
            (
                with(json!([{"type": "Approved", "status": "False"}])),
                "Unsupported value",
            ),
        ] {
            let refused = decision(&new, &sent).expect_err(message);
            assert!(refused.message.contains(message), "{}", refused.message);
        }
    }
}
