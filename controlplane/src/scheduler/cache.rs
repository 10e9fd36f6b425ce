//! The nodes with what is placed on them, pods that were assigned a moment ago included.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};

use super::affinity::required_apart;
use super::resources::{Amounts, likely_use, needs};
use crate::controllers::labels::Labels;
use crate::controllers::object::Key;
use crate::controllers::pods::{self, controller_of};

/// A port of the node that a pod takes for itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    /// `0.0.0.0` stands for every address.
    pub address: String,
    pub protocol: String,
    pub port: i32,
}

impl HostPort {
    pub fn clashes(&self, other: &HostPort) -> bool {
        let any = |port: &HostPort| port.address == "0.0.0.0";
        self.port == other.port
            && self.protocol == other.protocol
            && (self.address == other.address || any(self) || any(other))
    }
}

/// What placing a pod takes from a node, and what others may want to know of it.
#[derive(Clone, Debug)]
pub struct Placed {
    pub pod: Arc<Pod>,
    pub needs: Amounts,
    /// Millicores and bytes with defaults for what asks for nothing.
    pub likely: (i64, i64),
    pub ports: Vec<HostPort>,
    pub owner: Option<String>,
}

impl Placed {
    pub fn of(pod: &Arc<Pod>) -> Self {
        Self {
            pod: pod.clone(),
            needs: needs(pod),
            likely: likely_use(pod),
            ports: host_ports(pod),
            owner: controller_of(&pod.metadata).map(|owner| owner.uid.clone()),
        }
    }
}

fn host_ports(pod: &Pod) -> Vec<HostPort> {
    let spec = pods::spec(pod);
    let on_host = spec.host_network == Some(true);
    spec.containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| {
            let number = port
                .host_port
                .filter(|port| *port > 0)
                .or(on_host.then_some(port.container_port))?;
            Some(HostPort {
                address: port
                    .host_ip
                    .clone()
                    .filter(|ip| !ip.is_empty())
                    .unwrap_or_else(|| "0.0.0.0".into()),
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".into()),
                port: number,
            })
        })
        .collect()
}

/// One node and the pods on it.
#[derive(Clone, Debug)]
pub struct NodeState {
    pub node: Arc<Node>,
    pub allocatable: Amounts,
    pub used: Amounts,
    pub likely: (i64, i64),
    /// By UID.
    pub pods: BTreeMap<String, Arc<Placed>>,
    /// Pods per owner.
    pub owners: HashMap<String, usize>,
}

impl NodeState {
    fn new(node: Arc<Node>) -> Self {
        let allocatable = Amounts::of(
            node.status
                .as_ref()
                .and_then(|status| status.allocatable.as_ref()),
        );
        Self {
            node,
            allocatable,
            used: Amounts::default(),
            likely: (0, 0),
            pods: BTreeMap::new(),
            owners: HashMap::new(),
        }
    }

    pub fn name(&self) -> &str {
        self.node.metadata.name.as_deref().unwrap_or_default()
    }

    fn place(&mut self, uid: &str, placed: Arc<Placed>) {
        self.used.add(&placed.needs);
        self.likely.0 += placed.likely.0;
        self.likely.1 += placed.likely.1;
        if let Some(owner) = &placed.owner {
            *self.owners.entry(owner.clone()).or_default() += 1;
        }
        self.pods.insert(uid.into(), placed);
    }

    fn unplace(&mut self, uid: &str) {
        let Some(placed) = self.pods.remove(uid) else {
            return;
        };
        self.used.subtract(&placed.needs);
        self.likely.0 -= placed.likely.0;
        self.likely.1 -= placed.likely.1;
        if let Some(owner) = &placed.owner
            && let Some(count) = self.owners.get_mut(owner)
        {
            *count -= 1;
            if *count == 0 {
                self.owners.remove(owner);
            }
        }
    }
}

/// All nodes, by name, and where each pod is.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    pub nodes: BTreeMap<String, NodeState>,
    /// Pods on nodes that are not known (any more): they count once the node is.
    homeless: HashMap<String, (String, Arc<Placed>)>,
    /// Labels of the namespaces: affinity terms may select by them.
    pub namespaces: HashMap<String, Labels>,
    /// Pods on nodes that keep others away, by UID: few, as a rule, and asked for with every pod.
    apart: BTreeSet<String>,
    /// Pods for which room is being made on a node, by UID.
    nominated: HashMap<String, (String, Arc<Placed>)>,
    /// Node of each pod by UID, and whether the API server has confirmed it.
    places: HashMap<String, (String, bool)>,
}

impl Cache {
    pub fn put_node(&mut self, node: Arc<Node>) {
        let name = node.metadata.name.clone().unwrap_or_default();
        let mut state = NodeState::new(node);
        if let Some(old) = self.nodes.remove(&name) {
            for (uid, placed) in old.pods {
                state.place(&uid, placed);
            }
        }
        let waiting: Vec<String> = self
            .homeless
            .iter()
            .filter(|(_, (node, _))| *node == name)
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in waiting {
            if let Some((_, placed)) = self.homeless.remove(&uid) {
                state.place(&uid, placed);
            }
        }
        self.nodes.insert(name, state);
    }

    pub fn remove_node(&mut self, name: &str) {
        if let Some(old) = self.nodes.remove(name) {
            for (uid, placed) in old.pods {
                self.homeless.insert(uid, (name.into(), placed));
            }
        }
    }

    /// Takes in the state of a pod as the API server has it.
    pub fn put_pod(&mut self, pod: &Arc<Pod>) {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let node = pods::node_name(pod).filter(|_| !pods::is_terminal(pod));
        match (self.places.get(uid), node) {
            // Assigned here, and not heard of yet.
            (Some((_, false)), None) if !pods::is_terminal(pod) => {}
            (_, None) => self.remove_pod(uid),
            (_, Some(node)) => self.place(uid, node.to_string(), Placed::of(pod), true),
        }
    }

    /// Counts a pod where it is about to be bound.
    pub fn assume(&mut self, pod: &Arc<Pod>, node: &str) {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        self.place(uid, node.into(), Placed::of(pod), false);
    }

    /// The binding of an assumed pod failed.
    pub fn forget(&mut self, uid: &str) {
        if self
            .places
            .get(uid)
            .is_some_and(|(_, confirmed)| !confirmed)
        {
            self.remove_pod(uid);
        }
    }

    /// Keeps room on a node for a pod that waits for others to go.
    pub fn nominate(&mut self, pod: &Arc<Pod>, node: &str) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        self.nominated
            .insert(uid, (node.into(), Arc::new(Placed::of(pod))));
    }

    pub fn nominated_on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Arc<Placed>> + 'a {
        let all = self.nominated.values();
        all.filter(move |(name, _)| name == node)
            .map(|(_, placed)| placed)
    }

    pub fn is_placed(&self, uid: &str) -> bool {
        self.places.contains_key(uid)
    }

    /// Placed pods with required anti-affinity, with their nodes.
    pub fn keeping_apart(&self) -> impl Iterator<Item = (&NodeState, &Arc<Placed>)> {
        self.apart.iter().filter_map(|uid| {
            let state = self.nodes.get(&self.places.get(uid)?.0)?;
            Some((state, state.pods.get(uid)?))
        })
    }

    pub fn remove_pod(&mut self, uid: &str) {
        self.nominated.remove(uid);
        self.apart.remove(uid);
        if let Some((node, _)) = self.places.remove(uid) {
            match self.nodes.get_mut(&node) {
                Some(state) => state.unplace(uid),
                None => {
                    self.homeless.remove(uid);
                }
            }
        }
    }

    fn place(&mut self, uid: &str, node: String, placed: Placed, confirmed: bool) {
        self.remove_pod(uid);
        if !required_apart(&placed.pod).is_empty() {
            self.apart.insert(uid.into());
        }
        let placed = Arc::new(placed);
        match self.nodes.get_mut(&node) {
            Some(state) => state.place(uid, placed),
            None => {
                self.homeless.insert(uid.into(), (node.clone(), placed));
            }
        }
        self.places.insert(uid.into(), (node, confirmed));
    }

    /// Pods of a namespace on the node.
    pub fn pods_in<'a>(
        state: &'a NodeState,
        namespace: &'a str,
    ) -> impl Iterator<Item = &'a Arc<Placed>> + 'a {
        state
            .pods
            .values()
            .filter(move |placed| placed.pod.metadata.namespace.as_deref() == Some(namespace))
    }
}

/// Key of a pod in the queue.
pub fn key_of(pod: &Pod) -> Key {
    Key::of(&pod.metadata)
}
