//! NodeRestriction: what a kubelet may write into objects that it may write at all. That they are its own, the authorizer has
//! seen to where their names tell it.

use serde_json::Value;

use crate::api::TOKEN_ISSUER;
use crate::api::fields::{self, Fields};
use crate::api::request::Target;
use crate::api::status::Status;
use crate::auth::Identity;
use crate::auth::node::{MIRROR, node_of, references};

/// Labels of the reserved domains that a kubelet may set on its Node.
const LABELS: [&str; 13] = [
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/instance-type",
    "beta.kubernetes.io/os",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.kubernetes.io/region",
    "failure-domain.kubernetes.io/zone",
    "kubernetes.io/arch",
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
];
const LABEL_DOMAINS: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];

/// Refuses what a node may not write.
pub fn restrict(
    node: &str,
    target: &Target,
    object: &Value,
    old: Option<&Value>,
) -> Result<(), Status> {
    let name = fields::name(object);
    let refuse = |why: String| Err(Status::forbidden(target.subject_named(name), why));
    match (target.resource.group, target.resource.plural) {
        ("", "nodes") => restrict_node(node, object, old).or_else(refuse),
        ("", "pods") if old.is_none() => restrict_mirror(node, object).or_else(refuse),
        ("coordination.k8s.io", "leases") | ("storage.k8s.io", "csinodes") if name != node => {
            refuse(format!("node {node:?} can only write its own"))
        }
        ("resource.k8s.io", "resourceslices") if object.text("/spec/nodeName") != node => {
            refuse(format!("node {node:?} can only write slices of its own"))
        }
        _ => Ok(()),
    }
}

/// Refuses what a node may not write by way of a status.
pub fn restrict_status(
    node: &str,
    target: &Target,
    object: &Value,
    old: &Value,
) -> Result<(), Status> {
    let refuse = |why: String| {
        Err(Status::forbidden(
            target.subject_named(fields::name(object)),
            why,
        ))
    };
    let differs = |pointer: &str| object.pointer(pointer) != old.pointer(pointer);
    match (target.resource.group, target.resource.plural) {
        ("", "nodes") => restrict_node(node, object, Some(old)).or_else(refuse),
        ("", "pods") if old.text("/spec/nodeName") != node => refuse(format!(
            "node {node:?} can only update pod status for pods with spec.nodeName set to itself"
        )),
        // Services, policies and claims go by these.
        ("", "pods") if differs("/metadata/labels") => refuse(format!(
            "node {node:?} cannot update labels through pod status"
        )),
        ("", "pods") if differs("/status/resourceClaimStatuses") => refuse(format!(
            "node {node:?} cannot update resource claim statuses"
        )),
        ("", "persistentvolumeclaims") if claim_but_size(object) != claim_but_size(old) => {
            refuse(format!(
                "node {node:?} is not allowed to update fields other than status.capacity and status.conditions"
            ))
        }
        _ => Ok(()),
    }
}

/// A claim without what a kubelet tells of its volume once that has grown.
fn claim_but_size(claim: &Value) -> Value {
    let mut rest = claim.clone();
    for pointer in [
        "/metadata/managedFields",
        "/metadata/resourceVersion",
        "/status/allocatedResourceStatuses",
        "/status/allocatedResources",
        "/status/capacity",
        "/status/conditions",
        "/status/currentVolumeAttributesClassName",
        "/status/modifyVolumeStatus",
    ] {
        rest.remove(pointer);
    }
    rest
}

fn restrict_node(node: &str, object: &Value, old: Option<&Value>) -> Result<(), String> {
    let name = fields::name(object);
    if name != node {
        return Err(format!(
            "node {node:?} is not allowed to modify node {name:?}"
        ));
    }
    let label = |of: Option<&Value>, key: &str| {
        of.and_then(|of| of["metadata"]["labels"].get(key)).cloned()
    };
    let none = serde_json::Map::new();
    let labels = |of: Option<&Value>| {
        of.and_then(|of| of.object("/metadata/labels"))
            .unwrap_or(&none)
            .keys()
            .cloned()
            .collect::<Vec<_>>()
    };
    let mut forbidden: Vec<String> = labels(Some(object))
        .into_iter()
        .chain(labels(old))
        .filter(|key| label(Some(object), key) != label(old, key) && !may_set(key))
        .collect();
    forbidden.sort();
    forbidden.dedup();
    if !forbidden.is_empty() {
        return Err(format!(
            "is not allowed to set or modify the following labels: {}",
            forbidden.join(", ")
        ));
    }
    let taints = |of: &Value| of.items("/spec/taints").to_vec();
    match old {
        Some(old) if taints(old) != taints(object) => {
            Err(format!("node {node:?} is not allowed to modify taints"))
        }
        Some(old)
            if old["metadata"]["ownerReferences"] != object["metadata"]["ownerReferences"] =>
        {
            Err(format!(
                "node {node:?} is not allowed to modify ownerReferences"
            ))
        }
        _ => Ok(()),
    }
}

fn may_set(label: &str) -> bool {
    let domain = label.split_once('/').map_or("", |(domain, _)| domain);
    let within = |of: &str| {
        domain == of
            || domain
                .strip_suffix(of)
                .is_some_and(|sub| sub.ends_with('.'))
    };
    if within("node-restriction.kubernetes.io") {
        return false;
    }
    let reserved = within("kubernetes.io") || within("k8s.io");
    !reserved || LABELS.contains(&label) || LABEL_DOMAINS.iter().any(|of| within(of))
}

/// A kubelet makes mirrors of the pods it has from files, and no other pods.
fn restrict_mirror(node: &str, pod: &Value) -> Result<(), String> {
    let mirrors = pod
        .object("/metadata/annotations")
        .is_some_and(|annotations| annotations.contains_key(MIRROR));
    if !mirrors {
        return Err(format!(
            "pod does not have {MIRROR:?} annotation, node {node:?} can only create mirror pods"
        ));
    }
    if pod.text("/spec/nodeName") != node {
        return Err(format!(
            "node {node:?} can only create pods with spec.nodeName set to itself"
        ));
    }
    let owners = pod.items("/metadata/ownerReferences");
    let owned = owners.len() == 1
        && owners[0].text("/apiVersion") == "v1"
        && owners[0].text("/kind") == "Node"
        && owners[0].text("/name") == node
        && owners[0].flag("/controller")
        && !owners[0].flag("/blockOwnerDeletion");
    if !owned {
        return Err(format!(
            "node {node:?} can only create pods with an owner reference set to itself"
        ));
    }
    let mut refers = None;
    references(&pod["spec"], &mut |kind, name| {
        refers.get_or_insert_with(|| format!("{kind:?} {name:?}"));
    });
    match refers {
        Some(what) => Err(format!(
            "node {node:?} can not create pods that reference {what}"
        )),
        None => Ok(()),
    }
}

/// Refuses a token that a kubelet asks for, unless it is for a pod on its node.
pub fn check_token(
    caller: &Identity,
    target: &Target,
    request: &Value,
    bound: Option<&Value>,
) -> Result<(), Status> {
    let Some(node) = node_of(caller) else {
        return Ok(());
    };
    let refuse = |why: &str| Err(Status::forbidden(target.subject(), why));
    let reference = &request["spec"]["boundObjectRef"];
    let Some(pod) = bound.filter(|_| reference["kind"] == "Pod") else {
        return refuse("node requested token not bound to a pod");
    };
    if reference.text("/uid").is_empty() {
        return refuse("node requested token with a pod binding without a uid");
    }
    if pod.text("/spec/nodeName") != node {
        return refuse("node requested token bound to a pod scheduled on a different node");
    }
    let sources: Vec<&Value> = pod
        .items("/spec/volumes")
        .iter()
        .flat_map(|volume| volume.items("/projected/sources"))
        .collect();
    let named = |audience: &str| {
        sources.iter().any(|source| {
            source.has("/serviceAccountToken")
                && source.text("/serviceAccountToken/audience") == audience
        })
    };
    for audience in request
        .items("/spec/audiences")
        .iter()
        .filter_map(Value::as_str)
    {
        if !audience.is_empty() && audience != TOKEN_ISSUER && !named(audience) {
            let why = format!("audience {audience:?} not found in pod spec volume");
            return refuse(&why);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(path: &str, object: Value, old: Option<Value>) -> String {
        let target = Target::parse(path).expect("a resource");
        match restrict("n1", &target, &object, old.as_ref()) {
            Ok(()) => String::new(),
            Err(status) => status.message,
        }
    }

    #[test]
    fn a_node_changes_of_itself_what_is_not_for_others_to_rely_on() {
        let node = |name: &str, labels: Value, taints: Value| json!({"metadata": {"name": name, "labels": labels}, "spec": {"taints": taints}});
        let nodes = "/api/v1/nodes";
        let plain = || {
            node(
                "n1",
                json!({"kubernetes.io/hostname": "n1", "rack": "7"}),
                json!([]),
            )
        };
        assert_eq!(refusal(nodes, plain(), None), "");
        assert!(
            refusal(nodes, node("n2", json!({}), json!([])), None)
                .contains("not allowed to modify node")
        );
        for label in [
            "node-restriction.kubernetes.io/pci",
            "a.node-restriction.kubernetes.io/x",
            "node-role.kubernetes.io/control-plane",
            "x.k8s.io/y",
        ] {
            let marked = node("n1", json!({label: ""}), json!([]));
            assert!(
                refusal(nodes, marked.clone(), None).contains(label),
                "{label}"
            );
            assert!(
                refusal(nodes, plain(), Some(marked.clone())).contains(label),
                "{label} taken away"
            );
            assert_eq!(
                refusal(nodes, marked.clone(), Some(marked)),
                "",
                "left alone"
            );
        }
        let tainted = node(
            "n1",
            json!({}),
            json!([{"key": "a", "effect": "NoSchedule"}]),
        );
        let untainted = node("n1", json!({}), json!([]));
        assert!(refusal(nodes, untainted, Some(tainted)).contains("taints"));
    }

    #[test]
    fn a_status_is_no_way_around() {
        let refusal = |path: &str, object: &Value, old: &Value| {
            let target = Target::parse(path).expect("a resource");
            restrict_status("n1", &target, object, old)
                .map_or_else(|status| status.message, |()| String::new())
        };
        let with = |of: &Value, pointer: &str, value: Value| {
            let mut new = of.clone();
            new.set(pointer, value);
            new
        };
        let node = json!({"metadata": {"name": "n1", "labels": {"rack": "7"}}, "spec": {}});
        let nodes = "/api/v1/nodes/n1/status";
        let ready = with(&node, "/status/conditions", json!([{"type": "Ready"}]));
        assert_eq!(refusal(nodes, &ready, &node), "");
        let marked = with(
            &node,
            "/metadata/labels",
            json!({"node-restriction.kubernetes.io/x": "1"}),
        );
        assert!(refusal(nodes, &marked, &node).contains("following labels"));

        let pod = json!({"metadata": {"name": "p", "labels": {"app": "a"}}, "spec": {"nodeName": "n1"},
            "status": {"resourceClaimStatuses": [{"name": "gpu", "resourceClaimName": "own"}]}});
        let pods = "/api/v1/namespaces/a/pods/p/status";
        assert_eq!(
            refusal(pods, &with(&pod, "/status/phase", json!("Running")), &pod),
            ""
        );
        let labelled = with(&pod, "/metadata/labels/app", json!("another"));
        assert!(refusal(pods, &labelled, &pod).contains("cannot update labels"));
        let claims = json!([{"name": "gpu", "resourceClaimName": "other"}]);
        let claimed = with(&pod, "/status/resourceClaimStatuses", claims);
        assert!(refusal(pods, &claimed, &pod).contains("resource claim statuses"));
        let elsewhere = with(&pod, "/spec/nodeName", json!("n2"));
        assert!(refusal(pods, &elsewhere, &elsewhere).contains("set to itself"));

        let claim = json!({"metadata": {"name": "c"}, "status": {"phase": "Bound"}});
        let path = "/api/v1/namespaces/a/persistentvolumeclaims/c/status";
        let grown = with(&claim, "/status/capacity", json!({"storage": "2Gi"}));
        assert_eq!(refusal(path, &grown, &claim), "");
        for (pointer, value) in [
            ("/status/phase", json!("Lost")),
            ("/metadata/labels", json!({"a": "b"})),
            ("/metadata/finalizers", json!([])),
        ] {
            let changed = with(&claim, pointer, value);
            assert!(refusal(path, &changed, &claim).contains("other than status.capacity"));
        }
    }

    #[test]
    fn a_node_makes_mirror_pods_only() {
        let pods = "/api/v1/namespaces/a/pods";
        let mirror = json!({"metadata": {"name": "p", "annotations": {MIRROR: "x"}, "ownerReferences":
            [{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "u", "controller": true}]},
            "spec": {"nodeName": "n1", "containers": [{"name": "c"}]}});
        assert_eq!(refusal(pods, mirror.clone(), None), "");
        let with = |pointer: &str, value: Value| {
            let mut pod = mirror.clone();
            pod.set(pointer, value);
            refusal(pods, pod, None)
        };
        assert!(with("/metadata/annotations", json!({})).contains("can only create mirror pods"));
        assert!(with("/spec/nodeName", json!("n2")).contains("set to itself"));
        assert!(with("/metadata/ownerReferences", json!([])).contains("owner reference"));
        assert!(with("/spec/serviceAccountName", json!("admin")).contains("ServiceAccount"));
        assert!(with("/spec/volumes", json!([{"secret": {"secretName": "s"}}])).contains("Secret"));
    }

    #[test]
    fn a_node_gets_tokens_for_its_own_pods() {
        let target =
            Target::parse("/api/v1/namespaces/a/serviceaccounts/robot/token").expect("a token");
        let caller = Identity {
            user: "system:node:n1".into(),
            groups: vec!["system:nodes".into()],
            ..Identity::default()
        };
        let pod = |node: &str| {
            json!({"spec": {"nodeName": node, "volumes":
            [{"projected": {"sources": [{"serviceAccountToken": {"audience": "vault"}}]}}]}})
        };
        let request = |reference: Value, audience: &str| json!({"spec": {"boundObjectRef": reference, "audiences": [audience]}});
        let own = json!({"kind": "Pod", "name": "p", "uid": "u"});
        let refused = |request: &Value, bound: Option<&Value>| {
            check_token(&caller, &target, request, bound).is_err()
        };
        assert!(!refused(&request(own.clone(), ""), Some(&pod("n1"))));
        assert!(!refused(&request(own.clone(), "vault"), Some(&pod("n1"))));
        assert!(refused(
            &request(own.clone(), "elsewhere"),
            Some(&pod("n1"))
        ));
        assert!(refused(&request(own.clone(), ""), Some(&pod("n2"))));
        assert!(refused(
            &request(json!({"kind": "Pod", "name": "p"}), ""),
            Some(&pod("n1"))
        ));
        assert!(refused(
            &request(json!({"kind": "Secret", "name": "p", "uid": "u"}), ""),
            Some(&pod("n1"))
        ));
        assert!(refused(&request(Value::Null, ""), None));
    }
}
