//! Where a pod goes: the nodes that it fits on, and the best of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, Taint};

use super::affinity::Affinity;
use super::cache::{Cache, NodeState, Placed};
use super::preempt::priority;
use super::resources::{CPU, MEMORY, PODS};
use super::spread::Constraint;
use crate::controllers::{nodes, pods};

/// How a pod came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Node(String),
    /// Why no node takes it, as `kubectl describe pod` shows it.
    Nowhere(String),
}

// What each consideration may add to a node's score, at most. Spreading the pods of one owner counts most, so that a
// small Deployment does not end up on one node because that is the emptiest by a little.
const SPREAD: i64 = 300;
const SPREAD_ZONES: i64 = 150;
const CONSTRAINTS: i64 = 300;
const PREFERENCE: i64 = 200;
const COMPANY: i64 = 200;
const TAINTS: i64 = 300;
const FREE: i64 = 100;
const BALANCE: i64 = 50;

const ZONE: &str = "topology.kubernetes.io/zone";

/// Decides for one pod. Pure: the caller counts the pod where it goes.
pub fn decide(cache: &Cache, pod: &Arc<Pod>) -> Decision {
    if cache.nodes.is_empty() {
        return Decision::Nowhere("no nodes available to schedule pods".into());
    }
    let placed = Placed::of(pod);
    let constraints = Constraint::all(cache, pod);
    let affinity = Affinity::of(cache, pod);
    let mut refusals: BTreeMap<String, usize> = BTreeMap::new();
    let mut fitting: Vec<&NodeState> = Vec::new();
    for state in cache.nodes.values() {
        match refusal(cache, state, &placed, &constraints, &affinity) {
            reasons if reasons.is_empty() => fitting.push(state),
            reasons => {
                for reason in reasons {
                    *refusals.entry(reason).or_default() += 1;
                }
            }
        }
    }
    match best(cache, &fitting, &placed, &constraints, &affinity) {
        Some(state) => Decision::Node(state.name().into()),
        None => {
            let reasons: Vec<String> = refusals
                .into_iter()
                .map(|(reason, count)| format!("{count} {reason}"))
                .collect();
            Decision::Nowhere(format!(
                "0/{} nodes are available: {}.",
                cache.nodes.len(),
                reasons.join(", ")
            ))
        }
    }
}

/// Why a node cannot take a pod; nothing when it can.
pub fn refusals(cache: &Cache, pod: &Arc<Pod>, node: &str) -> Vec<String> {
    let Some(state) = cache.nodes.get(node) else {
        return vec!["node(s) were not found".into()];
    };
    let constraints = Constraint::all(cache, pod);
    let affinity = Affinity::of(cache, pod);
    refusal(cache, state, &Placed::of(pod), &constraints, &affinity)
}

/// Whether a node can take a pod.
pub fn fits(cache: &Cache, pod: &Arc<Pod>, node: &str) -> bool {
    refusals(cache, pod, node).is_empty()
}

/// Why the node cannot take the pod: the first thing that stands against it, or all resources that it lacks.
fn refusal(
    cache: &Cache,
    state: &NodeState,
    placed: &Placed,
    constraints: &[Constraint],
    affinity: &Affinity,
) -> Vec<String> {
    let node = &state.node;
    let spec = pods::spec(&placed.pod);
    let one = |reason: &str| vec![reason.to_string()];
    let tolerations = nodes::tolerations(&placed.pod);
    if nodes::is_unschedulable(node) {
        let closed = Taint {
            key: nodes::UNSCHEDULABLE.into(),
            effect: "NoSchedule".into(),
            ..Default::default()
        };
        if !tolerations
            .iter()
            .any(|toleration| nodes::tolerates(toleration, &closed))
        {
            return one("node(s) were unschedulable");
        }
    }
    if let Some(taint) = nodes::untolerated(
        nodes::taints(node),
        tolerations,
        &["NoSchedule", "NoExecute"],
    ) {
        let value = taint.value.as_deref().unwrap_or_default();
        return vec![format!(
            "node(s) had untolerated taint {{{}: {value}}}",
            taint.key
        )];
    }
    if !nodes::selected(spec, node) {
        return one("node(s) didn't match Pod's node affinity/selector");
    }
    let taken = |state: &NodeState| {
        state.pods.values().any(|other| {
            other
                .ports
                .iter()
                .any(|theirs| placed.ports.iter().any(|ours| ours.clashes(theirs)))
        })
    };
    if !placed.ports.is_empty() && taken(state) {
        return one("node(s) didn't have free ports for the requested pod ports");
    }
    // Room that was made for others of no less priority is theirs.
    let mut used = state.used.clone();
    for other in cache.nominated_on(state.name()) {
        if other.pod.metadata.uid != placed.pod.metadata.uid
            && priority(&other.pod) >= priority(&placed.pod)
        {
            used.add(&other.needs);
        }
    }
    let lacking: Vec<String> = placed
        .needs
        .iter()
        .filter(|(name, amount)| {
            *amount > 0 && used.get(name) + amount > state.allocatable.get(name)
        })
        .map(|(name, _)| {
            if name == PODS {
                "Too many pods".into()
            } else {
                format!("Insufficient {name}")
            }
        })
        .collect();
    if !lacking.is_empty() {
        return lacking;
    }
    for constraint in constraints.iter().filter(|constraint| constraint.required) {
        match constraint.excess(node) {
            None => {
                return one(
                    "node(s) didn't match pod topology spread constraints (missing required label)",
                );
            }
            Some(excess) if excess > 0 => {
                return one("node(s) didn't match pod topology spread constraints");
            }
            Some(_) => {}
        }
    }
    affinity.refusal(node).map(one).unwrap_or_default()
}

fn best<'a>(
    cache: &Cache,
    fitting: &[&'a NodeState],
    placed: &Placed,
    constraints: &[Constraint],
    affinity: &Affinity,
) -> Option<&'a NodeState> {
    if fitting.len() <= 1 {
        return fitting.first().copied();
    }
    let spec = pods::spec(&placed.pod);
    let on_node = |state: &NodeState| -> i64 {
        let owned = placed
            .owner
            .as_ref()
            .and_then(|owner| state.owners.get(owner))
            .copied()
            .unwrap_or(0);
        i64::try_from(owned).unwrap_or(i64::MAX)
    };
    let mut in_zone: BTreeMap<&String, i64> = BTreeMap::new();
    for state in cache.nodes.values() {
        if let Some(zone) = nodes::label(&state.node, ZONE) {
            *in_zone.entry(zone).or_default() += on_node(state);
        }
    }
    let zone_count =
        |state: &&NodeState| nodes::label(&state.node, ZONE).map_or(0, |zone| in_zone[zone]);
    let prefer_not = |state: &&NodeState| -> i64 {
        let tolerations = nodes::tolerations(&placed.pod);
        let unwanted = nodes::taints(&state.node).iter().filter(|taint| {
            taint.effect == "PreferNoSchedule"
                && !tolerations
                    .iter()
                    .any(|toleration| nodes::tolerates(toleration, taint))
        });
        unwanted.count().try_into().unwrap_or(i64::MAX)
    };
    let mut scores = vec![0i64; fitting.len()];
    add_fewer(&mut scores, fitting, SPREAD, |state| on_node(state));
    add_fewer(&mut scores, fitting, SPREAD_ZONES, zone_count);
    add_fewer(&mut scores, fitting, TAINTS, prefer_not);
    let preferences: Vec<i64> = fitting
        .iter()
        .map(|state| nodes::preference(spec, &state.node))
        .collect();
    add_more(&mut scores, &preferences, PREFERENCE);
    let company: Vec<i64> = fitting
        .iter()
        .map(|state| affinity.preference(&state.node))
        .collect();
    add_more(&mut scores, &company, COMPANY);
    for constraint in constraints.iter().filter(|constraint| !constraint.required) {
        let worst = constraint.counts.values().copied().max().unwrap_or(0) + 1;
        add_fewer(&mut scores, fitting, CONSTRAINTS, |state| {
            constraint.count(&state.node).unwrap_or(worst)
        });
    }
    for (score, state) in scores.iter_mut().zip(fitting) {
        *score += room(state, placed);
    }
    let chosen = fitting.iter().zip(&scores).max_by_key(|(state, score)| {
        // Among equals the node with the fewest pods; then one that differs from pod to pod.
        (
            **score,
            std::cmp::Reverse(state.pods.len()),
            mix(placed.pod.metadata.uid.as_deref(), state.name()),
        )
    });
    chosen.map(|(state, _)| *state)
}

/// Adds up to `weight`, more for smaller counts.
fn add_fewer(
    scores: &mut [i64],
    fitting: &[&NodeState],
    weight: i64,
    count: impl Fn(&&NodeState) -> i64,
) {
    let counts: Vec<i64> = fitting.iter().map(count).collect();
    let most = counts.iter().copied().max().unwrap_or(0);
    if most > 0 {
        for (score, count) in scores.iter_mut().zip(counts) {
            *score += weight * (most - count) / most;
        }
    }
}

/// Adds up to `weight`, more for larger values, which may be negative.
fn add_more(scores: &mut [i64], values: &[i64], weight: i64) {
    let most = values.iter().copied().max().unwrap_or(0);
    let least = values.iter().copied().min().unwrap_or(0);
    if most > least {
        for (score, value) in scores.iter_mut().zip(values) {
            *score += weight * (value - least) / (most - least);
        }
    }
}

/// Points for what would be left of CPU and memory, and for using the two in proportion.
fn room(state: &NodeState, placed: &Placed) -> i64 {
    let free = |used: i64, more: i64, total: i64| -> i64 {
        if total <= 0 {
            0
        } else {
            (total.saturating_sub(used).saturating_sub(more))
                .max(0)
                .saturating_mul(FREE)
                / total
        }
    };
    let cpu = free(state.likely.0, placed.likely.0, state.allocatable.get(CPU));
    let memory = free(
        state.likely.1,
        placed.likely.1,
        state.allocatable.get(MEMORY),
    );
    (cpu + memory) / 2 + BALANCE - (cpu - memory).abs() * BALANCE / FREE
}

/// A number that depends on both, to break ties differently for different pods.
fn mix(uid: Option<&str>, node: &str) -> u64 {
    let bytes = uid.unwrap_or_default().bytes().chain(node.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// What of a node decides where pods can go: a change of anything else wakes nobody.
pub fn matters_to_pods(old: &Node, new: &Node) -> bool {
    let allocatable = |node: &Node| {
        node.status
            .as_ref()
            .and_then(|status| status.allocatable.clone())
    };
    old.metadata.labels != new.metadata.labels
        || nodes::taints(old) != nodes::taints(new)
        || nodes::is_unschedulable(old) != nodes::is_unschedulable(new)
        || allocatable(old) != allocatable(new)
}
