//! What the controllers and the scheduler ask of nodes: conditions, taints, and whether a pod may be placed there.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Node, NodeCondition, NodeSelectorTerm, Pod, PodSpec, PreferredSchedulingTerm, Taint, Toleration,
};

use super::labels::{operator_matches, pairs_match};
use super::pods;
use crate::codec::quantity::Quantity;

pub const ZONE: &str = "topology.kubernetes.io/zone";
/// What marks nodes whose processors are not there for pods.
const CONTROL_PLANES: [&str; 2] = [
    "node-role.kubernetes.io/control-plane",
    "node-role.kubernetes.io/master",
];
pub const NOT_READY: &str = "node.kubernetes.io/not-ready";
pub const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
pub const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
pub const MEMORY_PRESSURE: &str = "node.kubernetes.io/memory-pressure";
pub const DISK_PRESSURE: &str = "node.kubernetes.io/disk-pressure";
pub const PID_PRESSURE: &str = "node.kubernetes.io/pid-pressure";
pub const NETWORK_UNAVAILABLE: &str = "node.kubernetes.io/network-unavailable";

pub fn condition<'a>(node: &'a Node, type_: &str) -> Option<&'a NodeCondition> {
    node.status
        .as_ref()?
        .conditions
        .as_ref()?
        .iter()
        .find(|condition| condition.type_ == type_)
}

pub fn label<'a>(node: &'a Node, name: &str) -> Option<&'a String> {
    node.metadata.labels.as_ref()?.get(name)
}

pub fn ready_condition(node: &Node) -> Option<&NodeCondition> {
    condition(node, "Ready")
}

/// Zones is what the ready nodes have of processors, by zone. Control planes do not count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Zones {
    /// Thousandths of processors, and how many nodes they are of.
    known: BTreeMap<String, (u64, usize)>,
    /// Nodes that say nothing of their zone or their processors.
    unknown: usize,
}

impl Zones {
    /// What one node has.
    pub fn of(node: &Node) -> Self {
        let mut zones = Self::default();
        zones.add(node);
        zones
    }

    pub fn add(&mut self, node: &Node) {
        match processors(node) {
            None => {}
            Some(None) => self.unknown += 1,
            Some(Some((zone, amount))) => {
                let known = self.known.entry(zone.to_owned()).or_default();
                *known = (known.0 + amount, known.1 + 1);
            }
        }
    }

    /// Takes away what has been added.
    pub fn take(&mut self, node: &Node) {
        match processors(node) {
            None => {}
            Some(None) => self.unknown = self.unknown.saturating_sub(1),
            Some(Some((zone, amount))) => {
                if let Some(known) = self.known.get_mut(zone) {
                    *known = (known.0.saturating_sub(amount), known.1.saturating_sub(1));
                    if known.1 == 0 {
                        self.known.remove(zone);
                    }
                }
            }
        }
    }

    /// Each zone's part of all processors; None while it is unknown of a single node, and where there is none.
    pub fn shares(&self) -> Option<Vec<(&str, f64)>> {
        let total: u64 = self.known.values().map(|(amount, _)| amount).sum();
        if self.unknown != 0 || total == 0 {
            return None;
        }
        let zones = self.known.iter();
        let shares =
            zones.map(|(zone, (amount, _))| (zone.as_str(), *amount as f64 / total as f64));
        Some(shares.collect())
    }
}

/// The zone of a node that counts for `Zones`, and thousandths of processors; None inside where it does not say.
fn processors(node: &Node) -> Option<Option<(&str, u64)>> {
    let is_control_plane = CONTROL_PLANES
        .iter()
        .any(|name| label(node, name).is_some());
    let is_ready = ready_condition(node).is_some_and(|ready| ready.status == "True");
    if is_control_plane || !is_ready {
        return None;
    }
    let status = node.status.as_ref();
    let allocatable = status.and_then(|status| status.allocatable.as_ref());
    let amount = allocatable
        .and_then(|allocatable| allocatable.get("cpu"))
        .and_then(|cpu| Quantity::parse(&cpu.0))
        .and_then(|cpu| cpu.ratio(Quantity::count(1)))
        .map(|processors| (processors * 1000.0).ceil() as u64)
        .filter(|amount| *amount != 0);
    let zone = label(node, ZONE).filter(|zone| !zone.is_empty());
    Some(zone.map(String::as_str).zip(amount))
}

pub fn taints(node: &Node) -> &[Taint] {
    node.spec
        .as_ref()
        .and_then(|spec| spec.taints.as_deref())
        .unwrap_or_default()
}

pub fn is_unschedulable(node: &Node) -> bool {
    node.spec
        .as_ref()
        .and_then(|spec| spec.unschedulable)
        .unwrap_or(false)
}

pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let is_any = |text: Option<&str>| text.unwrap_or_default().is_empty();
    if !is_any(toleration.effect.as_deref()) && toleration.effect.as_deref() != Some(&taint.effect)
    {
        return false;
    }
    let key = toleration.key.as_deref().unwrap_or_default();
    match toleration.operator.as_deref().unwrap_or("Equal") {
        // Without a key, `Exists` tolerates everything.
        "Exists" => key.is_empty() || key == taint.key,
        "Equal" | "" => {
            key == taint.key
                && toleration.value.as_deref().unwrap_or_default()
                    == taint.value.as_deref().unwrap_or_default()
        }
        _ => false,
    }
}

/// The first taint of one of the effects that the pod does not tolerate.
pub fn untolerated<'a>(
    taints: &'a [Taint],
    tolerations: &[Toleration],
    effects: &[&str],
) -> Option<&'a Taint> {
    taints
        .iter()
        .filter(|taint| effects.contains(&taint.effect.as_str()))
        .find(|taint| {
            !tolerations
                .iter()
                .any(|toleration| tolerates(toleration, taint))
        })
}

/// Whether nodeSelector and required node affinity allow the node.
pub fn selected(spec: &PodSpec, node: &Node) -> bool {
    let labels = node.metadata.labels.as_ref();
    if !spec
        .node_selector
        .as_ref()
        .is_none_or(|pairs| pairs_match(pairs, labels))
    {
        return false;
    }
    let required = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| {
            affinity
                .required_during_scheduling_ignored_during_execution
                .as_ref()
        });
    required.is_none_or(|selector| {
        selector
            .node_selector_terms
            .iter()
            .any(|term| term_matches(term, node))
    })
}

/// A term without requirements selects nothing.
fn term_matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let labels = node.metadata.labels.as_ref();
    expressions.iter().all(|requirement| {
        let found = labels.and_then(|labels| labels.get(&requirement.key));
        operator_matches(
            &requirement.operator,
            found,
            requirement.values.as_deref().unwrap_or_default(),
        )
    }) && fields.iter().all(|requirement| {
        requirement.key == "metadata.name"
            && operator_matches(
                &requirement.operator,
                node.metadata.name.as_ref(),
                requirement.values.as_deref().unwrap_or_default(),
            )
    })
}

/// The summed weight of the preferred terms that the node meets.
pub fn preference(spec: &PodSpec, node: &Node) -> i64 {
    let preferred = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| {
            affinity
                .preferred_during_scheduling_ignored_during_execution
                .as_deref()
        })
        .unwrap_or_default();
    let met = |term: &&PreferredSchedulingTerm| term_matches(&term.preference, node);
    preferred
        .iter()
        .filter(met)
        .map(|term| i64::from(term.weight))
        .sum()
}

pub fn tolerations(pod: &Pod) -> &[Toleration] {
    pods::spec(pod).tolerations.as_deref().unwrap_or_default()
}

/// A toleration of a taint whatever its value.
pub fn tolerate(key: &str, effect: &str) -> Toleration {
    Toleration {
        key: Some(key.into()),
        operator: Some("Exists".into()),
        effect: Some(effect.into()),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taint(key: &str, value: &str, effect: &str) -> Taint {
        Taint {
            key: key.into(),
            value: Some(value.into()),
            effect: effect.into(),
            time_added: None,
        }
    }

    #[test]
    fn a_toleration_matches_by_key_value_and_effect() {
        let toleration = |key: &str, operator: &str, value: &str, effect: &str| Toleration {
            key: Some(key.into()),
            operator: Some(operator.into()),
            value: Some(value.into()),
            effect: Some(effect.into()),
            toleration_seconds: None,
        };
        let taint = taint("a", "1", "NoSchedule");
        for (toleration, expected) in [
            (toleration("a", "Equal", "1", "NoSchedule"), true),
            (toleration("a", "Equal", "1", ""), true),
            (toleration("a", "", "1", ""), true),
            (toleration("a", "Equal", "2", ""), false),
            (toleration("a", "Exists", "", ""), true),
            (toleration("", "Exists", "", ""), true),
            (toleration("b", "Exists", "", ""), false),
            (toleration("a", "Exists", "", "NoExecute"), false),
        ] {
            assert_eq!(tolerates(&toleration, &taint), expected, "{toleration:?}");
        }
    }

    #[test]
    fn affinity_terms_are_alternatives_and_an_empty_one_selects_nothing() {
        use k8s_openapi::api::core::v1::{
            Affinity, NodeAffinity, NodeSelector, NodeSelectorRequirement,
        };
        let node = |name: &str| Node {
            metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
                name: Some(name.into()),
                ..Default::default()
            },
            ..Default::default()
        };
        let by_name = |name: &str| NodeSelectorTerm {
            match_fields: Some(vec![NodeSelectorRequirement {
                key: "metadata.name".into(),
                operator: "In".into(),
                values: Some(vec![name.into()]),
            }]),
            match_expressions: None,
        };
        let spec = |terms: Vec<NodeSelectorTerm>| PodSpec {
            affinity: Some(Affinity {
                node_affinity: Some(NodeAffinity {
                    required_during_scheduling_ignored_during_execution: Some(NodeSelector {
                        node_selector_terms: terms,
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert!(selected(
            &spec(vec![by_name("a"), by_name("b")]),
            &node("b")
        ));
        assert!(!selected(&spec(vec![by_name("a")]), &node("b")));
        assert!(!selected(
            &spec(vec![NodeSelectorTerm::default()]),
            &node("b")
        ));
        assert!(selected(&PodSpec::default(), &node("b")));
    }
}
