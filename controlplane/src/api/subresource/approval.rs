//! `approval` of a certificate signing request: its conditions, of which a decision is never taken back.

use serde_json::Value;

use crate::api::fields::{self, Fields};
use crate::api::status::{FieldError, Status};

/// Conditions that stay once they are there, and can only be true.
const FINAL: [&str; 3] = ["Approved", "Denied", "Failed"];

/// Takes over the conditions that were sent, with the times they were made at, and labels and annotations.
pub fn decision(old: &Value, wanted: &Value) -> Result<Value, Status> {
    let before = old.items("/status/conditions");
    let mut conditions = wanted.items("/status/conditions").to_vec();
    let mut errors = Vec::new();
    for (at, condition) in conditions.iter_mut().enumerate() {
        let known = find(before, condition.text("/type"));
        let kept = known.filter(|known| known.text("/status") == condition.text("/status"));
        let since = kept.map(|known| known["lastTransitionTime"].clone());
        let now = fields::now();
        condition.default("/lastUpdateTime", now.as_str());
        condition.default("/lastTransitionTime", since.unwrap_or_else(|| now.into()));
        check(condition, &format!("status.conditions[{at}]"), &mut errors);
    }
    for (at, condition) in conditions.iter().enumerate() {
        let kind = condition.text("/type");
        if find(&conditions[..at], kind).is_some() {
            errors.push(FieldError::duplicate(
                format!("status.conditions[{at}].type"),
                kind,
            ));
        }
    }
    for kind in FINAL {
        if find(before, kind).is_some() && find(&conditions, kind).is_none() {
            let why = format!("updates may not remove a condition of type {kind:?}");
            errors.push(FieldError::forbidden("status.conditions", &why));
        }
    }
    if find(&conditions, "Approved").is_some() && find(&conditions, "Denied").is_some() {
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
    for field in ["labels", "annotations"] {
        let pointer = format!("/metadata/{field}");
        match wanted.pointer(&pointer) {
            Some(value) => new.set(&pointer, value.clone()),
            None => _ = new.remove(&pointer),
        }
    }
    if conditions.is_empty() {
        new.remove("/status/conditions");
    } else {
        new.set("/status/conditions", conditions);
    }
    Ok(new)
}

fn find<'a>(conditions: &'a [Value], kind: &str) -> Option<&'a Value> {
    conditions
        .iter()
        .find(|condition| condition.text("/type") == kind)
}

fn check(condition: &Value, at: &str, errors: &mut Vec<FieldError>) {
    let kind = condition.text("/type");
    if kind.is_empty() {
        errors.push(FieldError::required(format!("{at}.type"), ""));
    }
    let known: &[&str] = if FINAL.contains(&kind) {
        &["True"]
    } else {
        &["True", "False", "Unknown"]
    };
    match condition.text("/status") {
        "" => errors.push(FieldError::required(format!("{at}.status"), "")),
        status if !known.contains(&status) => {
            errors.push(FieldError::unsupported(
                format!("{at}.status"),
                status,
                known,
            ));
        }
        _ => {}
    }
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
        let other = json!({"type": "Reviewed", "status": "False"});
        let more =
            decision(&new, &with(json!([other, approved]))).expect("other conditions are free");
        assert_eq!(more["status"]["conditions"][0]["type"], "Reviewed");
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
