//! `eviction`: deleting a pod on behalf of whoever drains its node, as far as disruption budgets allow it.

use bytes::Bytes;
use http::request::Parts;
use serde_json::{Value, json};

use super::success;
use crate::api::body::decode;
use crate::api::fields::{self, Fields};
use crate::api::reply::Answer;
use crate::api::request::{Target, WriteOptions};
use crate::api::status::Status;
use crate::api::write::Part;
use crate::api::{Api, Call, object};
use crate::registry;
use crate::selector::LabelSelector;
use crate::store::Range;

/// How soon a client may try again when a budget's status is behind its spec.
const RETRY_S: u32 = 10;

impl Api {
    pub(super) async fn evict(
        &self,
        call: &Call,
        parts: &Parts,
        body: Bytes,
    ) -> Result<Answer, Status> {
        let mut options = call.write_options(parts)?;
        let eviction = decode(parts, &body, "policy/v1", "Eviction", options.validation)?.value;
        let target = &call.target;
        let name = target.object_name()?;
        let named = fields::name(&eviction);
        if !named.is_empty() && named != name {
            return Err(Status::bad_request(
                "name in URL does not match name in Eviction object",
            ));
        }
        let asked = eviction.items("/deleteOptions/dryRun");
        options.dry_run |= asked.iter().any(|value| value == "All");
        let pod = target.decode(&self.record(target).await?)?;
        if disrupts(&pod) {
            self.spend_budget(target, &pod, &options).await?;
        }
        // Said before it goes: whoever counts its failure may leave this one out.
        self.modify(target, &options, Part::Status, |pod| Ok(disrupted(pod)))
            .await?;
        let asked = eviction
            .pointer("/deleteOptions")
            .cloned()
            .unwrap_or_default();
        self.delete_as_asked(target, &asked, &options).await?;
        Ok(success())
    }

    /// Takes one disruption from the budget that covers the pod, if there is one.
    async fn spend_budget(
        &self,
        target: &Target,
        pod: &Value,
        options: &WriteOptions,
    ) -> Result<(), Status> {
        let budgets = registry::resource("policy", "v1", "poddisruptionbudgets")
            .ok_or_else(|| Status::internal("disruption budgets are not known"))?;
        let prefix = object::prefix(budgets, target.namespace.as_deref());
        let page = self.store.list(Range::all(&prefix)).await?;
        let mut covering = Vec::new();
        for record in &page.records {
            let budget = object::decode(record, budgets.kind, &budgets.api_version())?;
            let selector = budget
                .pointer("/spec/selector")
                .cloned()
                .unwrap_or_default();
            let selector = LabelSelector::from_object(&selector).map_err(Status::internal)?;
            if selector.matches(pod) {
                covering.push(fields::name(&budget).to_owned());
            }
        }
        let budget = match covering.as_slice() {
            [] => return Ok(()),
            [one] => Target {
                resource: budgets,
                namespace: target.namespace.clone(),
                name: Some(one.clone()),
                subresource: None,
                rest: String::new(),
            },
            _ => {
                return Err(Status::internal(
                    "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
                ));
            }
        };
        self.modify(&budget, options, Part::Exact("status"), |budget| {
            disrupt(budget, pod)
        })
        .await
        .map(drop)
    }
}

/// The pod with the condition that says that it is being evicted (KEP-3329).
fn disrupted(pod: &Value) -> Value {
    let mut conditions = pod.items("/status/conditions").to_vec();
    conditions.retain(|condition| condition.text("/type") != "DisruptionTarget");
    conditions.push(json!({
        "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI",
        "message": "Eviction API: evicting", "lastTransitionTime": fields::now(),
    }));
    let mut pod = pod.clone();
    pod.set("/status/conditions", conditions);
    pod
}

/// Whether a pod's going is a disruption: one that has ended, has not begun or goes already disturbs nobody.
fn disrupts(pod: &Value) -> bool {
    let phase = pod.text("/status/phase");
    !(matches!(phase, "Succeeded" | "Failed" | "Pending") || pod.has("/metadata/deletionTimestamp"))
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod.items("/status/conditions");
    let mut ready = conditions.iter().filter(|c| c.text("/type") == "Ready");
    ready.any(|condition| condition.text("/status") == "True")
}

/// The budget after the pod has gone, or why it may not go.
fn disrupt(budget: &Value, pod: &Value) -> Result<Value, Status> {
    let name = fields::name(budget);
    let count = |field: &str| budget.int(&format!("/status/{field}"));
    if !is_ready(pod) {
        // An unready pod is not counted as healthy, so its going costs the budget nothing (KEP-3017).
        let free = match budget.text("/spec/unhealthyPodEvictionPolicy") {
            "AlwaysAllow" => true,
            _ => count("desiredHealthy") > 0 && count("currentHealthy") >= count("desiredHealthy"),
        };
        if free {
            return Ok(budget.clone());
        }
    }
    let refused = |retry_s: u32, message: String| {
        let mut status = Status::too_many_requests(
            "Cannot evict pod as it would violate the pod's disruption budget.",
            retry_s,
        );
        let cause = json!([{"reason": "DisruptionBudget", "message": message}]);
        status.details.insert("causes".into(), cause);
        Err(status)
    };
    if count("observedGeneration") < budget.int("/metadata/generation") {
        let why = format!("The disruption budget {name} is still being processed by the server.");
        return refused(RETRY_S, why);
    }
    let allowed = count("disruptionsAllowed");
    if allowed < 1 {
        let (desired, current) = (count("desiredHealthy"), count("currentHealthy"));
        let why = format!(
            "The disruption budget {name} needs {desired} healthy pods and has {current} currently"
        );
        return refused(0, why);
    }
    let mut new = budget.clone();
    new.set("/status/disruptionsAllowed", allowed - 1);
    new.object_mut("/status/disruptedPods")
        .insert(fields::name(pod).to_owned(), fields::now().into());
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(status: Value) -> Value {
        json!({"metadata": {"name": "b", "generation": 1}, "spec": {}, "status": status})
    }

    fn pod(ready: &str) -> Value {
        json!({"metadata": {"name": "p"}, "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]}})
    }

    #[test]
    fn a_disruption_is_counted_until_none_is_left() {
        let one_left = json!({"observedGeneration": 1, "disruptionsAllowed": 1, "desiredHealthy": 1, "currentHealthy": 2});
        let spent = disrupt(&budget(one_left), &pod("True")).expect("allowed");
        assert_eq!(spent["status"]["disruptionsAllowed"], 0);
        assert!(spent["status"]["disruptedPods"]["p"].is_string());
        let refused = disrupt(&spent, &pod("True")).expect_err("none is left");
        assert_eq!(refused.code, 429);
        assert_eq!(refused.details["causes"][0]["reason"], "DisruptionBudget");
        let message = "The disruption budget b needs 1 healthy pods and has 2 currently";
        assert_eq!(refused.details["causes"][0]["message"], message);
    }

    #[test]
    fn a_budget_that_nobody_has_looked_at_allows_nothing_yet() {
        let refused =
            disrupt(&budget(json!({"disruptionsAllowed": 5})), &pod("True")).expect_err("stale");
        assert_eq!(refused.details["retryAfterSeconds"], 10);
    }

    #[test]
    fn an_unready_pod_may_go_when_the_others_suffice_or_the_budget_says_so() {
        let spent = |healthy: i64| {
            budget(
                json!({"observedGeneration": 1, "disruptionsAllowed": 0, "desiredHealthy": 2, "currentHealthy": healthy}),
            )
        };
        assert!(disrupt(&spent(2), &pod("False")).is_ok());
        assert!(disrupt(&spent(1), &pod("False")).is_err());
        let mut lenient = spent(1);
        lenient.set("/spec/unhealthyPodEvictionPolicy", "AlwaysAllow");
        assert!(disrupt(&lenient, &pod("False")).is_ok());
    }
}
