//! On which nodes a DaemonSet's pod belongs, and the pod made for one node.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{
    Affinity, Node, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod,
    PodSpec, Toleration,
};

use super::super::nodes::{self, tolerate};
use super::super::pods;
use super::{GENERATION_ANNOTATION, GENERATION_LABEL, HASH_LABEL};

/// Whether a node should get a pod, and whether one that is there may stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    pub node: String,
    pub should_run: bool,
    pub should_continue: bool,
}

impl Placement {
    pub fn of(set: &DaemonSet, node: &Node) -> Self {
        let name = node.metadata.name.clone().unwrap_or_default();
        let template = set
            .spec
            .as_ref()
            .and_then(|spec| spec.template.spec.clone())
            .unwrap_or_default();
        let elsewhere = template
            .node_name
            .as_deref()
            .is_some_and(|wanted| !wanted.is_empty() && wanted != name);
        if elsewhere || !nodes::selected(&template, node) {
            return Self {
                node: name,
                should_run: false,
                should_continue: false,
            };
        }
        let tolerations = tolerations(&template);
        let fits = |effects: &[&str]| {
            nodes::untolerated(nodes::taints(node), &tolerations, effects).is_none()
        };
        Self {
            node: name,
            should_run: fits(&["NoSchedule", "NoExecute"]),
            should_continue: fits(&["NoExecute"]),
        }
    }
}

/// The template's tolerations and those that every daemon has: it runs on nodes that are not ready, under pressure
/// or closed to others.
fn tolerations(template: &PodSpec) -> Vec<Toleration> {
    let mut all = template.tolerations.clone().unwrap_or_default();
    let mut add = |key: &str, effect: &str| {
        let toleration = tolerate(key, effect);
        if !all.contains(&toleration) {
            all.push(toleration);
        }
    };
    add(nodes::NOT_READY, "NoExecute");
    add(nodes::UNREACHABLE, "NoExecute");
    add(nodes::DISK_PRESSURE, "NoSchedule");
    add(nodes::MEMORY_PRESSURE, "NoSchedule");
    add(nodes::PID_PRESSURE, "NoSchedule");
    add(nodes::UNSCHEDULABLE, "NoSchedule");
    if template.host_network == Some(true) {
        add(nodes::NETWORK_UNAVAILABLE, "NoSchedule");
    }
    all
}

/// The pod for a node. Node affinity names the node, and the scheduler binds it: so it competes for the node's
/// resources like any other pod.
pub fn pod_for(set: &DaemonSet, node: &str, hash: &str) -> Pod {
    let Some(spec) = set.spec.as_ref() else {
        return Pod::default();
    };
    let mut pod = pods::from_template(&spec.template, set);
    let mut labels = pods::with_label(pod.metadata.labels.as_ref(), HASH_LABEL, hash);
    if let Some(generation) = set
        .metadata
        .annotations
        .as_ref()
        .and_then(|annotations| annotations.get(GENERATION_ANNOTATION))
    {
        labels.insert(GENERATION_LABEL.into(), generation.clone());
    }
    pod.metadata.labels = Some(labels);
    let pod_spec = pod.spec.get_or_insert_default();
    pod_spec.tolerations = Some(tolerations(pod_spec));
    pin(pod_spec, node);
    pod
}

/// Replaces the required node affinity by the node's name: the rest was decided when the node was chosen, and later
/// changes of its labels must not undo it on the way to the scheduler.
fn pin(spec: &mut PodSpec, node: &str) {
    let term = NodeSelectorTerm {
        match_fields: Some(vec![NodeSelectorRequirement {
            key: "metadata.name".into(),
            operator: "In".into(),
            values: Some(vec![node.into()]),
        }]),
        match_expressions: None,
    };
    let affinity: &mut Affinity = spec.affinity.get_or_insert_default();
    let node_affinity: &mut NodeAffinity = affinity.node_affinity.get_or_insert_default();
    node_affinity.required_during_scheduling_ignored_during_execution = Some(NodeSelector {
        node_selector_terms: vec![term],
    });
}

/// The node a daemon pod is on or meant for.
pub fn node_of(pod: &Pod) -> Option<String> {
    if let Some(node) = pods::node_name(pod) {
        return Some(node.into());
    }
    let terms = &pods::spec(pod)
        .affinity
        .as_ref()?
        .node_affinity
        .as_ref()?
        .required_during_scheduling_ignored_during_execution
        .as_ref()?
        .node_selector_terms;
    terms
        .iter()
        .flat_map(|term| term.match_fields.iter().flatten())
        .find(|field| field.key == "metadata.name" && field.operator == "In")
        .and_then(|field| field.values.as_ref()?.first().cloned())
}
