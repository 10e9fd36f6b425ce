//! Preemption: which pods of lower priority would have to go, and where, so that a pod finds a place.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::cache::{Cache, Placed};
use super::decide::{fits, refusals};
use crate::controllers::labels::selector_matches;
use crate::controllers::pods;

/// Nodes with a solution that are compared: of more, the rest is not looked at.
const CANDIDATES_MAX: usize = 100;

const NO_VICTIMS: &str = "No preemption victims found for incoming pod";

/// A place for the pod, and who has to go for it.
#[derive(Clone, Debug)]
pub struct Preemption {
    pub node: String,
    pub victims: Vec<Arc<Pod>>,
    /// Victims that a disruption budget would have spared.
    violations: usize,
}

pub fn priority(pod: &Pod) -> i32 {
    pods::spec(pod).priority.unwrap_or(0)
}

/// Finds the node where making room costs least, or says why none helps, as `kubectl describe pod` shows it. Pure.
pub fn preempt(
    cache: &Cache,
    pod: &Arc<Pod>,
    budgets: &[Arc<PodDisruptionBudget>],
) -> Result<Preemption, String> {
    if pods::spec(pod).preemption_policy.as_deref() == Some("Never") {
        return Err("not eligible due to preemptionPolicy=Never.".into());
    }
    let own = priority(pod);
    let nominated = pod
        .status
        .as_ref()
        .and_then(|status| status.nominated_node_name.as_ref())
        .and_then(|name| cache.nodes.get(name));
    let is_leaving =
        |placed: &Arc<Placed>| pods::is_terminating(&placed.pod) && priority(&placed.pod) < own;
    if nominated.is_some_and(|state| state.pods.values().any(is_leaving)) {
        return Err("not eligible due to a terminating pod on the nominated node.".into());
    }
    let mut trial = cache.clone();
    let mut against: BTreeMap<String, usize> = BTreeMap::new();
    let mut best: Option<Preemption> = None;
    let mut found = 0;
    for name in cache.nodes.keys() {
        match on_node(&mut trial, pod, name, budgets) {
            Ok(preemption) => {
                found += 1;
                if best
                    .as_ref()
                    .is_none_or(|best| cost(&preemption) < cost(best))
                {
                    best = Some(preemption);
                }
                if found >= CANDIDATES_MAX {
                    break;
                }
            }
            Err(reason) => *against.entry(reason).or_default() += 1,
        }
    }
    best.ok_or_else(|| {
        let reasons: Vec<String> = against
            .into_iter()
            .map(|(reason, count)| format!("{count} {reason}"))
            .collect();
        format!(
            "0/{} nodes are available: {}.",
            cache.nodes.len(),
            reasons.join(", ")
        )
    })
}

/// What orders candidates: spared budgets, then how important the victims are, all of them and their number, then how long
/// they have run.
fn cost(preemption: &Preemption) -> (usize, i32, i64, usize, Reverse<Option<Time>>, &str) {
    let priorities = || preemption.victims.iter().map(|victim| priority(victim));
    let highest = priorities().max().unwrap_or(i32::MIN);
    let sum = priorities()
        .map(|priority| i64::from(priority) - i64::from(i32::MIN))
        .sum();
    let started = preemption
        .victims
        .iter()
        .filter(|victim| priority(victim) == highest)
        .filter_map(|victim| victim.status.as_ref()?.start_time.clone())
        .min();
    (
        preemption.violations,
        highest,
        sum,
        preemption.victims.len(),
        Reverse(started),
        &preemption.node,
    )
}

/// The fewest victims on one node. The trial cache is as before afterwards.
fn on_node(
    trial: &mut Cache,
    pod: &Arc<Pod>,
    node: &str,
    budgets: &[Arc<PodDisruptionBudget>],
) -> Result<Preemption, String> {
    let own = priority(pod);
    let lower: Vec<Arc<Pod>> = trial
        .nodes
        .get(node)
        .into_iter()
        .flat_map(|state| state.pods.values())
        .map(|placed| placed.pod.clone())
        .filter(|other| priority(other) < own)
        .collect();
    for other in &lower {
        trial.remove_pod(uid(other));
    }
    let mut against = refusals(trial, pod, node);
    if !against.is_empty() {
        for other in &lower {
            trial.assume(other, node);
        }
        return Err(if against.iter().any(|reason| is_lasting(reason)) {
            "Preemption is not helpful for scheduling".into()
        } else if lower.is_empty() {
            NO_VICTIMS.into()
        } else {
            against.swap_remove(0)
        });
    }
    let (violating, sparing) = split_by_budget(lower, budgets);
    let mut victims = Vec::new();
    let mut violations = 0;
    for (others, violates) in [(violating, true), (sparing, false)] {
        for other in most_important_first(others) {
            trial.assume(&other, node);
            if !fits(trial, pod, node) {
                trial.remove_pod(uid(&other));
                violations += usize::from(violates);
                victims.push(other);
            }
        }
    }
    for victim in &victims {
        trial.assume(victim, node);
    }
    if victims.is_empty() {
        // It fits as it is: the next turn finds that out.
        return Err(NO_VICTIMS.into());
    }
    Ok(Preemption {
        node: node.into(),
        victims,
        violations,
    })
}

/// Whether what stands against the node has nothing to do with the pods on it.
fn is_lasting(reason: &str) -> bool {
    reason == "node(s) were unschedulable"
        || reason.starts_with("node(s) had untolerated taint")
        || reason == "node(s) didn't match Pod's node affinity/selector"
        || reason.ends_with("(missing required label)")
}

fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

fn most_important_first(mut pods: Vec<Arc<Pod>>) -> Vec<Arc<Pod>> {
    pods.sort_by_cached_key(|pod| {
        let started = pod
            .status
            .as_ref()
            .and_then(|status| status.start_time.clone());
        (
            Reverse(priority(pod)),
            started.is_none(),
            started,
            uid(pod).to_string(),
        )
    });
    pods
}

/// Pods whose going a budget does not allow, and the others, when all of them go.
fn split_by_budget(
    lower: Vec<Arc<Pod>>,
    budgets: &[Arc<PodDisruptionBudget>],
) -> (Vec<Arc<Pod>>, Vec<Arc<Pod>>) {
    let mut left: Vec<i32> = budgets
        .iter()
        .map(|budget| {
            let status = budget.status.as_ref();
            status
                .and_then(|status| status.disruptions_allowed)
                .unwrap_or(0)
        })
        .collect();
    most_important_first(lower).into_iter().partition(|pod| {
        let mut violates = false;
        for (budget, left) in budgets.iter().zip(&mut left) {
            let selector = budget.spec.as_ref().and_then(|spec| spec.selector.as_ref());
            let covers = budget.metadata.namespace == pod.metadata.namespace
                && selector.is_some_and(|selector| {
                    selector_matches(selector, pod.metadata.labels.as_ref())
                });
            if covers {
                violates |= *left <= 0;
                *left -= 1;
            }
        }
        violates
    })
}
