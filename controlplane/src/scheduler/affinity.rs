//! Inter-pod affinity: pods that want to be, or must not be, where certain other pods are.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Node, Pod, PodAffinityTerm, WeightedPodAffinityTerm};

use super::cache::{Cache, NodeState};
use crate::controllers::labels::selector_matches;
use crate::controllers::{nodes, pods};

/// Nodes with one value of one label.
type Domain = (String, String);

/// What the pods that are placed mean for where one more may go, worked out once per pod.
#[derive(Default)]
pub struct Affinity {
    /// Topology keys of the required terms, with the domains that hold pods matching all of the terms.
    wanted_keys: Vec<String>,
    wanted: BTreeSet<Domain>,
    /// The pod is the first of a group that wants to be together: it may start anywhere.
    starts_group: bool,
    /// Domains of pods that it must not be with.
    avoided: BTreeSet<Domain>,
    /// Domains of pods that must not be with it.
    forbidden: BTreeSet<Domain>,
    /// Summed weights of preferred terms.
    preferred: BTreeMap<Domain, i64>,
}

impl Affinity {
    pub fn of(cache: &Cache, pod: &Pod) -> Self {
        let mut result = Self::default();
        let affinity = pods::spec(pod).affinity.as_ref();
        let with = affinity.and_then(|affinity| affinity.pod_affinity.as_ref());
        let apart = affinity.and_then(|affinity| affinity.pod_anti_affinity.as_ref());
        let required = with
            .and_then(|with| {
                with.required_during_scheduling_ignored_during_execution
                    .as_deref()
            })
            .unwrap_or_default();
        let avoided = required_apart(pod);
        let likes = with
            .and_then(|with| {
                with.preferred_during_scheduling_ignored_during_execution
                    .as_deref()
            })
            .unwrap_or_default();
        let dislikes = apart
            .and_then(|apart| {
                apart
                    .preferred_during_scheduling_ignored_during_execution
                    .as_deref()
            })
            .unwrap_or_default();
        if !(required.is_empty() && avoided.is_empty() && likes.is_empty() && dislikes.is_empty()) {
            for state in cache.nodes.values() {
                for placed in state.pods.values() {
                    let other = &placed.pod;
                    if !required.is_empty()
                        && required.iter().all(|term| matches(cache, term, pod, other))
                    {
                        result
                            .wanted
                            .extend(required.iter().filter_map(|term| domain(state, term)));
                    }
                    let avoids = avoided
                        .iter()
                        .filter(|term| matches(cache, term, pod, other));
                    result
                        .avoided
                        .extend(avoids.filter_map(|term| domain(state, term)));
                    result.weigh(cache, state, likes, 1, pod, other);
                    result.weigh(cache, state, dislikes, -1, pod, other);
                }
            }
        }
        result.wanted_keys = required
            .iter()
            .map(|term| term.topology_key.clone())
            .collect();
        result.starts_group =
            result.wanted.is_empty() && required.iter().all(|term| matches(cache, term, pod, pod));
        for (state, placed) in cache.keeping_apart() {
            let terms = required_apart(&placed.pod).iter();
            let against = terms.filter(|term| matches(cache, term, &placed.pod, pod));
            result
                .forbidden
                .extend(against.filter_map(|term| domain(state, term)));
        }
        result
    }

    fn weigh(
        &mut self,
        cache: &Cache,
        state: &NodeState,
        terms: &[WeightedPodAffinityTerm],
        sign: i64,
        pod: &Pod,
        other: &Pod,
    ) {
        for term in terms {
            if matches(cache, &term.pod_affinity_term, pod, other)
                && let Some(domain) = domain(state, &term.pod_affinity_term)
            {
                *self.preferred.entry(domain).or_default() += sign * i64::from(term.weight);
            }
        }
    }

    /// What stands against the node.
    pub fn refusal(&self, node: &Node) -> Option<&'static str> {
        let holds = |domains: &BTreeSet<Domain>| {
            domains
                .iter()
                .any(|(key, value)| nodes::label(node, key) == Some(value))
        };
        let together = self
            .wanted_keys
            .iter()
            .all(|key| match nodes::label(node, key) {
                Some(value) => {
                    self.starts_group || self.wanted.contains(&(key.clone(), value.clone()))
                }
                None => false,
            });
        if !together {
            Some("node(s) didn't match pod affinity rules")
        } else if holds(&self.avoided) {
            Some("node(s) didn't match pod anti-affinity rules")
        } else if holds(&self.forbidden) {
            Some("node(s) didn't satisfy existing pods anti-affinity rules")
        } else {
            None
        }
    }

    /// The summed weights of what the pod would meet, or not meet, on the node.
    pub fn preference(&self, node: &Node) -> i64 {
        let met = self
            .preferred
            .iter()
            .filter(|((key, value), _)| nodes::label(node, key) == Some(value));
        met.map(|(_, weight)| weight).sum()
    }
}

/// Terms that keep a pod apart from others.
pub fn required_apart(pod: &Pod) -> &[PodAffinityTerm] {
    let affinity = pods::spec(pod).affinity.as_ref();
    affinity
        .and_then(|affinity| affinity.pod_anti_affinity.as_ref())
        .and_then(|apart| {
            apart
                .required_during_scheduling_ignored_during_execution
                .as_deref()
        })
        .unwrap_or_default()
}

/// Whether a term of `owner` means the pod `other`.
fn matches(cache: &Cache, term: &PodAffinityTerm, owner: &Pod, other: &Pod) -> bool {
    if pods::is_terminating(other) || pods::is_terminal(other) {
        return false;
    }
    let namespace = other.metadata.namespace.as_deref().unwrap_or_default();
    let named = term.namespaces.as_deref().unwrap_or_default();
    let in_namespace = match &term.namespace_selector {
        Some(selector) => {
            selector_matches(selector, cache.namespaces.get(namespace))
                || named.iter().any(|name| name == namespace)
        }
        None if named.is_empty() => owner.metadata.namespace.as_deref() == Some(namespace),
        None => named.iter().any(|name| name == namespace),
    };
    // Without a selector nothing is meant.
    let selector = term.label_selector.as_ref();
    in_namespace
        && selector
            .is_some_and(|selector| selector_matches(selector, other.metadata.labels.as_ref()))
}

fn domain(state: &NodeState, term: &PodAffinityTerm) -> Option<Domain> {
    Some((
        term.topology_key.clone(),
        nodes::label(&state.node, &term.topology_key)?.clone(),
    ))
}
