//! What a kubelet may reach: its own Node, the pods on it, and what those pods refer to.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::{Identity, Resource};

pub const NODES_GROUP: &str = "system:nodes";
const USER_PREFIX: &str = "system:node:";
const LEASE_NAMESPACE: &str = "kube-node-lease";
/// What marks a pod that its kubelet has from a file.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// The node that a caller is the kubelet of.
pub fn node_of(caller: &Identity) -> Option<&str> {
    caller
        .user
        .strip_prefix(USER_PREFIX)
        .filter(|name| !name.is_empty() && caller.in_group(NODES_GROUP))
}

/// The kinds of objects that pods refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Secret,
    ConfigMap,
    Claim,
    ServiceAccount,
    ResourceClaim,
}

/// What must hold, beside the rules for nodes, before a node is allowed something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing more.
    Met,
    Refused(String),
    /// A pod on the node refers to the object.
    Used(Kind),
    /// The pod is on the node (or is not there, which the answer may say).
    Bound,
    /// The claim that the volume is bound to is used by a pod on the node.
    VolumeUsed,
    /// The object names the node in this field.
    Names(&'static str),
}

/// What a node must meet to do something to a resource.
pub fn condition(node: &str, verb: &str, asked: &Resource<'_>) -> Condition {
    let refused = Condition::Refused;
    let own = |what: &str| match asked.name {
        name if name == node => Condition::Met,
        // The name is in the body; admission sees to it.
        "" if verb == "create" => Condition::Met,
        _ => refused(format!(
            "can only access {what} with the same name as the requesting node"
        )),
    };
    match (asked.group, asked.resource, asked.subresource) {
        ("", "secrets" | "configmaps", "") => match (verb, asked.name, asked.resource) {
            ("get" | "list" | "watch", "", _) => refused("No Object name found".to_owned()),
            ("get" | "list" | "watch", _, "secrets") => Condition::Used(Kind::Secret),
            ("get" | "list" | "watch", _, _) => Condition::Used(Kind::ConfigMap),
            _ => refused("can only read resources of this type".to_owned()),
        },
        ("", "persistentvolumeclaims", "" | "status") => Condition::Used(Kind::Claim),
        ("", "persistentvolumes", _) => Condition::VolumeUsed,
        ("", "serviceaccounts", "token") => Condition::Used(Kind::ServiceAccount),
        ("resource.k8s.io", "resourceclaims", _) => Condition::Used(Kind::ResourceClaim),
        ("resource.k8s.io", "resourceslices", _) => match verb {
            "create" => Condition::Met,
            "list" | "watch" | "deletecollection" if asked.node == node => Condition::Met,
            "list" | "watch" | "deletecollection" => {
                refused("can only list, watch and delete its own resource slices, by a nodeName field selector".to_owned())
            }
            _ => Condition::Names("/spec/nodeName"),
        },
        ("storage.k8s.io", "volumeattachments", _) => Condition::Names("/spec/nodeName"),
        ("storage.k8s.io", "csinodes", _) => own("CSINode"),
        ("coordination.k8s.io", "leases", _) if asked.namespace != LEASE_NAMESPACE => {
            refused(format!("can only access leases in the {LEASE_NAMESPACE:?} system namespace"))
        }
        ("coordination.k8s.io", "leases", _) => own("node lease"),
        ("", "nodes", "" | "status") => match verb {
            "get" | "list" | "watch" if asked.name != node => refused(format!(
                "node {node:?} cannot read {:?}, only its own Node object",
                asked.name
            )),
            _ => match own("Node") {
                Condition::Refused(_) => refused(format!(
                    "node {node:?} is not allowed to modify node {:?}",
                    asked.name
                )),
                met => met,
            },
        },
        ("", "pods", "") => match verb {
            "create" => Condition::Met,
            "list" | "watch" if asked.node == node => Condition::Met,
            "list" | "watch" => {
                refused("can only list/watch pods with spec.nodeName field selector".to_owned())
            }
            _ => Condition::Bound,
        },
        ("", "pods", _) => Condition::Bound,
        _ => Condition::Met,
    }
}

/// The part of a stored pod that matters here. The rest is not made into a tree.
#[derive(Deserialize)]
struct Pod {
    #[serde(default)]
    spec: Value,
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    status: Status,
}

#[derive(Default, Deserialize)]
struct Metadata {
    #[serde(default)]
    annotations: Option<HashMap<String, Value>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    #[serde(default)]
    resource_claim_statuses: Value,
}

/// A pod's node, and the names that it refers to in its namespace.
#[derive(Debug, Default)]
struct Bound {
    node: String,
    uses: Vec<(Kind, String)>,
}

/// NodePods knows the node of every pod, and what the pods of each node refer to.
#[derive(Default)]
pub struct NodePods {
    /// By namespace, then by name.
    pods: HashMap<String, HashMap<String, Bound>>,
    /// By node, then by namespace and what is referred to: how many pods do.
    uses: HashMap<String, HashMap<(Kind, String, String), usize>>,
}

impl NodePods {
    /// Takes over a pod as it is stored; None when it is gone.
    pub fn set_pod(&mut self, namespace: &str, name: &str, pod: Option<&[u8]>) {
        let pods = self.pods.entry(namespace.to_owned()).or_default();
        let bound = pod.and_then(|bytes| serde_json::from_slice::<Pod>(bytes).ok());
        let before = match bound {
            Some(pod) => {
                let bound = Bound::of(&pod);
                if !bound.node.is_empty() {
                    let uses = self.uses.entry(bound.node.clone()).or_default();
                    for (kind, used) in &bound.uses {
                        let key = (*kind, namespace.to_owned(), used.clone());
                        *uses.entry(key).or_default() += 1;
                    }
                }
                pods.insert(name.to_owned(), bound)
            }
            None => pods.remove(name),
        };
        if pods.is_empty() {
            self.pods.remove(namespace);
        }
        let Some(before) = before.filter(|bound| !bound.node.is_empty()) else {
            return;
        };
        if let Some(uses) = self.uses.get_mut(&before.node) {
            for (kind, used) in before.uses {
                let key = (kind, namespace.to_owned(), used);
                if let Some(count) = uses.get_mut(&key) {
                    *count -= 1;
                    if *count == 0 {
                        uses.remove(&key);
                    }
                }
            }
            if uses.is_empty() {
                self.uses.remove(&before.node);
            }
        }
    }

    /// Whether a pod on the node refers to an object.
    pub fn uses(&self, node: &str, kind: Kind, namespace: &str, name: &str) -> bool {
        self.uses
            .get(node)
            .is_some_and(|uses| uses.contains_key(&(kind, namespace.to_owned(), name.to_owned())))
    }

    /// The node of a pod, "" before it has one; None when there is no such pod.
    pub fn node_of(&self, namespace: &str, name: &str) -> Option<&str> {
        Some(&self.pods.get(namespace)?.get(name)?.node)
    }
}

impl Bound {
    fn of(pod: &Pod) -> Self {
        let node = pod.spec["nodeName"].as_str().unwrap_or_default().to_owned();
        let mut uses = Vec::new();
        let mirrored = pod
            .metadata
            .annotations
            .as_ref()
            .is_some_and(|annotations| annotations.contains_key(MIRROR));
        // A kubelet makes mirror pods itself: they must not open anything to it.
        if !node.is_empty() && !mirrored {
            references(&pod.spec, &mut |kind, name| {
                uses.push((kind, name.to_owned()))
            });
            for claim in pod
                .status
                .resource_claim_statuses
                .as_array()
                .into_iter()
                .flatten()
            {
                if let Some(name) = claim["resourceClaimName"].as_str() {
                    uses.push((Kind::ResourceClaim, name.to_owned()));
                }
            }
        }
        Self { node, uses }
    }
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Names every object that a pod's spec refers to.
pub fn references(spec: &Value, found: &mut impl FnMut(Kind, &str)) {
    let mut name = |kind, value: &Value| {
        if let Some(name) = value.as_str().filter(|name| !name.is_empty()) {
            found(kind, name);
        }
    };
    name(Kind::ServiceAccount, &spec["serviceAccountName"]);
    for secret in items(&spec["imagePullSecrets"]) {
        name(Kind::Secret, &secret["name"]);
    }
    for claim in items(&spec["resourceClaims"]) {
        name(Kind::ResourceClaim, &claim["resourceClaimName"]);
    }
    for volume in items(&spec["volumes"]) {
        name(Kind::Secret, &volume["secret"]["secretName"]);
        name(Kind::Secret, &volume["azureFile"]["secretName"]);
        name(Kind::Secret, &volume["csi"]["nodePublishSecretRef"]["name"]);
        for source in [
            "cephfs",
            "cinder",
            "flexVolume",
            "iscsi",
            "rbd",
            "scaleIO",
            "storageos",
        ] {
            name(Kind::Secret, &volume[source]["secretRef"]["name"]);
        }
        name(Kind::ConfigMap, &volume["configMap"]["name"]);
        name(Kind::Claim, &volume["persistentVolumeClaim"]["claimName"]);
        for source in items(&volume["projected"]["sources"]) {
            name(Kind::Secret, &source["secret"]["name"]);
            name(Kind::ConfigMap, &source["configMap"]["name"]);
        }
    }
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        for container in items(&spec[list]) {
            for from in items(&container["envFrom"]) {
                name(Kind::Secret, &from["secretRef"]["name"]);
                name(Kind::ConfigMap, &from["configMapRef"]["name"]);
            }
            for variable in items(&container["env"]) {
                let from = &variable["valueFrom"];
                name(Kind::Secret, &from["secretKeyRef"]["name"]);
                name(Kind::ConfigMap, &from["configMapKeyRef"]["name"]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked<'a>(resource: &'a str, namespace: &'a str, name: &'a str) -> Resource<'a> {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        Resource {
            resource,
            subresource,
            namespace,
            name,
            ..Resource::default()
        }
    }

    #[test]
    fn a_node_is_a_user_of_the_group_of_nodes() {
        let caller = |user: &str, groups: &[&str]| Identity {
            user: user.to_owned(),
            groups: groups.iter().map(|g| (*g).to_owned()).collect(),
            ..Identity::default()
        };
        assert_eq!(
            node_of(&caller("system:node:n1", &["system:nodes"])),
            Some("n1")
        );
        assert_eq!(
            node_of(&caller("system:node:n1", &["system:authenticated"])),
            None
        );
        assert_eq!(node_of(&caller("jane", &["system:nodes"])), None);
        assert_eq!(node_of(&caller("system:node:", &["system:nodes"])), None);
    }

    #[test]
    fn a_node_is_held_to_itself() {
        let refused = |verb, resource: &Resource<'_>| {
            matches!(condition("n1", verb, resource), Condition::Refused(_))
        };
        for (verb, resource) in [
            ("get", asked("nodes", "", "n2")),
            ("list", asked("nodes", "", "")),
            ("patch", asked("nodes", "", "n2")),
            ("patch", asked("nodes/status", "", "n2")),
            ("list", asked("pods", "", "")),
            ("watch", asked("pods", "a", "")),
            ("list", asked("secrets", "a", "")),
            ("watch", asked("configmaps", "", "")),
            ("update", asked("secrets", "a", "x")),
        ] {
            assert!(refused(verb, &resource), "{verb} {resource:?}");
        }
        let lease = |namespace, name| Resource {
            group: "coordination.k8s.io",
            ..asked("leases", namespace, name)
        };
        assert!(refused("update", &lease("kube-system", "n1")));
        assert!(refused("update", &lease("kube-node-lease", "n2")));
        assert_eq!(
            condition("n1", "update", &lease("kube-node-lease", "n1")),
            Condition::Met
        );
        assert_eq!(
            condition("n1", "create", &lease("kube-node-lease", "")),
            Condition::Met
        );
        assert_eq!(
            condition("n1", "watch", &asked("nodes", "", "n1")),
            Condition::Met
        );
        let own = Resource {
            node: "n1",
            ..asked("pods", "", "")
        };
        assert_eq!(condition("n1", "list", &own), Condition::Met);
        assert_eq!(
            condition("n1", "get", &asked("secrets", "a", "x")),
            Condition::Used(Kind::Secret)
        );
        assert_eq!(
            condition("n1", "patch", &asked("pods/status", "a", "x")),
            Condition::Bound
        );
    }

    fn pod(node: &str) -> Vec<u8> {
        json!({"metadata": {}, "spec": {"nodeName": node, "serviceAccountName": "robot",
            "imagePullSecrets": [{"name": "pull"}],
            "volumes": [{"secret": {"secretName": "s"}}, {"persistentVolumeClaim": {"claimName": "data"}},
                {"projected": {"sources": [{"configMap": {"name": "kube-root-ca.crt"}}, {"serviceAccountToken": {}}]}}],
            "initContainers": [{"envFrom": [{"configMapRef": {"name": "settings"}}]}],
            "containers": [{"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "key", "key": "k"}}}]}]}})
        .to_string()
        .into_bytes()
    }

    #[test]
    fn a_node_reaches_what_its_pods_refer_to_for_as_long_as_they_are_there() {
        let mut pods = NodePods::default();
        pods.set_pod("a", "p", Some(&pod("")));
        assert_eq!(pods.node_of("a", "p"), Some(""));
        assert!(!pods.uses("", Kind::Secret, "a", "s"));
        pods.set_pod("a", "p", Some(&pod("n1")));
        pods.set_pod("a", "q", Some(&pod("n1")));
        let all = [
            (Kind::ServiceAccount, "robot"),
            (Kind::Secret, "pull"),
            (Kind::Secret, "s"),
            (Kind::Secret, "key"),
            (Kind::Claim, "data"),
            (Kind::ConfigMap, "kube-root-ca.crt"),
            (Kind::ConfigMap, "settings"),
        ];
        for (kind, name) in all {
            assert!(pods.uses("n1", kind, "a", name), "{kind:?} {name}");
            assert!(!pods.uses("n2", kind, "a", name) && !pods.uses("n1", kind, "b", name));
        }
        pods.set_pod("a", "p", None);
        assert!(
            pods.uses("n1", Kind::Secret, "a", "s"),
            "the other pod is still there"
        );
        pods.set_pod("a", "q", None);
        assert!(!pods.uses("n1", Kind::Secret, "a", "s"));
        assert_eq!(pods.node_of("a", "q"), None);
        assert!(
            pods.pods.is_empty() && pods.uses.is_empty(),
            "nothing is kept"
        );
    }

    #[test]
    fn a_mirror_pod_opens_nothing() {
        let mut pods = NodePods::default();
        let mut mirror: Value = serde_json::from_slice(&pod("n1")).unwrap();
        mirror["metadata"]["annotations"] = json!({MIRROR: "x"});
        pods.set_pod("a", "p", Some(mirror.to_string().as_bytes()));
        assert_eq!(pods.node_of("a", "p"), Some("n1"));
        assert!(!pods.uses("n1", Kind::Secret, "a", "s"));
    }
}
