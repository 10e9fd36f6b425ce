//! Topology spread constraints: how evenly matching pods lie over the domains that a label makes of the nodes.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Pod, TopologySpreadConstraint};

use super::cache::Cache;
use crate::controllers::labels::selector_matches;
use crate::controllers::{nodes, pods};

/// A topology spread constraint with the matching pods counted per domain.
pub struct Constraint {
    topology_key: String,
    pub required: bool,
    max_skew: i64,
    self_match: i64,
    pub counts: BTreeMap<String, i64>,
    /// Fewest matching pods in any domain that the pod may use.
    minimum: i64,
}

impl Constraint {
    pub fn all(cache: &Cache, pod: &Pod) -> Vec<Constraint> {
        let constraints = pods::spec(pod).topology_spread_constraints.iter().flatten();
        constraints
            .map(|constraint| Constraint::of(cache, pod, constraint))
            .collect()
    }

    fn of(cache: &Cache, pod: &Pod, constraint: &TopologySpreadConstraint) -> Constraint {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let mut selector = constraint.label_selector.clone();
        for key in constraint.match_label_keys.iter().flatten() {
            if let (Some(selector), Some(value)) = (
                &mut selector,
                pod.metadata
                    .labels
                    .as_ref()
                    .and_then(|labels| labels.get(key)),
            ) {
                selector
                    .match_labels
                    .get_or_insert_default()
                    .insert(key.clone(), value.clone());
            }
        }
        // Without a selector nothing matches.
        let matches = |other: &Pod| {
            selector
                .as_ref()
                .is_some_and(|selector| selector_matches(selector, other.metadata.labels.as_ref()))
        };
        let mut counts: BTreeMap<String, i64> = BTreeMap::new();
        for state in cache.nodes.values() {
            let Some(domain) = nodes::label(&state.node, &constraint.topology_key) else {
                continue;
            };
            if constraint.node_affinity_policy.as_deref() != Some("Ignore")
                && !nodes::selected(pods::spec(pod), &state.node)
            {
                continue;
            }
            let matching = Cache::pods_in(state, namespace)
                .filter(|placed| !pods::is_terminating(&placed.pod) && matches(&placed.pod))
                .count();
            *counts.entry(domain.clone()).or_default() +=
                i64::try_from(matching).unwrap_or(i64::MAX);
        }
        let enough_domains = constraint
            .min_domains
            .is_none_or(|min| i64::from(min) <= i64::try_from(counts.len()).unwrap_or(0));
        let minimum = if enough_domains {
            counts.values().copied().min().unwrap_or(0)
        } else {
            0
        };
        Constraint {
            topology_key: constraint.topology_key.clone(),
            required: constraint.when_unsatisfiable == "DoNotSchedule",
            max_skew: constraint.max_skew.into(),
            self_match: matches(pod).into(),
            counts,
            minimum,
        }
    }

    pub fn count(&self, node: &Node) -> Option<i64> {
        Some(
            self.counts
                .get(nodes::label(node, &self.topology_key)?)
                .copied()
                .unwrap_or(0),
        )
    }

    /// By how much the node's domain would exceed the allowed skew; None when the node is in no domain.
    pub fn excess(&self, node: &Node) -> Option<i64> {
        Some(self.count(node)? + self.self_match - self.minimum - self.max_skew)
    }
}
