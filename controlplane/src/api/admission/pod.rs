//! What admission fills into a new pod: its ServiceAccount and token, its priority, its tolerations, its runtime's
//! overhead.

use rand::RngExt;
use serde_json::{Value, json};

use super::stored;
use crate::api::Api;
use crate::api::fields::{self, Fields};
use crate::api::request::Target;
use crate::api::status::Status;

/// Where pods find their ServiceAccount's token.
const TOKEN_MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// A little over an hour, so that kubelets that renew hourly never hold an expired one (as upstream).
const TOKEN_EXPIRATION_S: i64 = 3607;
/// How long a pod stays on a node that went away, unless it says otherwise.
const TOLERATION_S: i64 = 300;

/// Every pod runs as a ServiceAccount that exists, with its token mounted.
pub async fn service_account(api: &Api, target: &Target, pod: &mut Value) -> Result<(), Status> {
    if pod.has("/metadata/annotations/kubernetes.io~1config.mirror") {
        return Ok(()); // A mirror of a pod that the kubelet runs by itself.
    }
    if pod.text("/spec/serviceAccountName").is_empty() {
        pod.set("/spec/serviceAccountName", "default");
    }
    let name = pod.text("/spec/serviceAccountName").to_owned();
    pod.set("/spec/serviceAccount", name.as_str());
    let namespace = target.namespace.as_deref();
    let Some(account) = api.lookup("", "serviceaccounts", namespace, &name).await? else {
        let namespace = namespace.unwrap_or("");
        let why = format!(
            "error looking up service account {namespace}/{name}: serviceaccount {name:?} not found"
        );
        return Err(Status::forbidden(
            target.subject_named(fields::name(pod)),
            why,
        ));
    };
    if pod.items("/spec/imagePullSecrets").is_empty()
        && !account.items("/imagePullSecrets").is_empty()
    {
        pod.set(
            "/spec/imagePullSecrets",
            account["imagePullSecrets"].clone(),
        );
    }
    let wanted = |object: &Value, at: &str| object.pointer(at).and_then(Value::as_bool);
    let mounts = wanted(pod, "/spec/automountServiceAccountToken")
        .or(wanted(&account, "/automountServiceAccountToken"))
        .unwrap_or(true);
    if mounts {
        mount_token(pod);
    }
    Ok(())
}

fn mount_token(pod: &mut Value) {
    let suffix: String = {
        let mut rng = rand::rng();
        let letters = b"bcdfghjklmnpqrstvwxz2456789";
        (0..5)
            .map(|_| char::from(letters[rng.random_range(0..letters.len())]))
            .collect()
    };
    let known = pod
        .items("/spec/volumes")
        .iter()
        .map(|volume| volume.text("/name"));
    let known = known
        .filter(|name| name.starts_with("kube-api-access-"))
        .map(str::to_owned)
        .next();
    let volume = known.clone().unwrap_or(format!("kube-api-access-{suffix}"));
    let mut used = false;
    for list in ["initContainers", "containers"] {
        for container in pod.items_mut(&format!("/spec/{list}")) {
            if container
                .items("/volumeMounts")
                .iter()
                .any(|mount| mount.text("/mountPath") == TOKEN_MOUNT)
            {
                continue;
            }
            let mount = json!({"name": volume, "readOnly": true, "mountPath": TOKEN_MOUNT});
            push(container, "/volumeMounts", mount);
            used = true;
        }
    }
    if used && known.is_none() {
        let projected = json!({"name": volume, "projected": {"defaultMode": 0o644, "sources": [
            {"serviceAccountToken": {"expirationSeconds": TOKEN_EXPIRATION_S, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
        ]}});
        push(pod, "/spec/volumes", projected);
    }
}

fn push(object: &mut Value, pointer: &str, item: Value) {
    match object.pointer_mut(pointer).and_then(Value::as_array_mut) {
        Some(items) => items.push(item),
        None => object.set(pointer, Value::Array(vec![item])),
    }
}

/// A pod's priority is the number behind its class.
pub async fn priority(api: &Api, target: &Target, pod: &mut Value) -> Result<(), Status> {
    let name = pod.text("/spec/priorityClassName").to_owned();
    let class = if name.is_empty() {
        default_class(api).await?
    } else {
        let found = api
            .lookup("scheduling.k8s.io", "priorityclasses", None, &name)
            .await?;
        if found.is_none() {
            let why = format!("no PriorityClass with name {name} was found");
            return Err(Status::forbidden(
                target.subject_named(fields::name(pod)),
                why,
            ));
        }
        found
    };
    let (value, policy) = match &class {
        Some(class) => {
            pod.set("/spec/priorityClassName", fields::name(class));
            (
                class.int("/value"),
                class.text("/preemptionPolicy").to_owned(),
            )
        }
        None => (0, "PreemptLowerPriority".to_owned()),
    };
    if pod.has("/spec/priority") && pod.int("/spec/priority") != value {
        let given = pod.int("/spec/priority");
        let why = format!(
            "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller computed {value} from the given PriorityClass name"
        );
        return Err(Status::forbidden(
            target.subject_named(fields::name(pod)),
            why,
        ));
    }
    pod.set("/spec/priority", value);
    pod.default("/spec/preemptionPolicy", policy);
    Ok(())
}

/// Pods leave nodes that are not ready or not reachable after a while, not at once.
pub fn tolerate_absent_nodes(pod: &mut Value) {
    for key in [
        "node.kubernetes.io/not-ready",
        "node.kubernetes.io/unreachable",
    ] {
        let tolerated = pod.items("/spec/tolerations").iter().any(|toleration| {
            let (of, effect) = (toleration.text("/key"), toleration.text("/effect"));
            (of == key || of.is_empty()) && (effect == "NoExecute" || effect.is_empty())
        });
        if !tolerated {
            let toleration = json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": TOLERATION_S});
            push(pod, "/spec/tolerations", toleration);
        }
    }
}

/// The class of pods that name none, when there is one.
async fn default_class(api: &Api) -> Result<Option<Value>, Status> {
    let classes = stored(api, "scheduling.k8s.io", "priorityclasses", None).await?;
    Ok(classes
        .into_iter()
        .find(|class| class.flag("/globalDefault")))
}

/// At most one PriorityClass is the default.
pub async fn check_single_default(api: &Api, target: &Target, class: &Value) -> Result<(), Status> {
    let name = fields::name(class);
    match default_class(api).await? {
        Some(other) if fields::name(&other) != name => {
            let other = fields::name(&other).to_owned();
            let why = format!(
                "PriorityClass {other} is already marked as default. Only one default can exist"
            );
            Err(Status::forbidden(target.subject_named(name), why))
        }
        _ => Ok(()),
    }
}

/// A pod's runtime class adds its overhead and says where it can run.
pub async fn runtime_class(api: &Api, target: &Target, pod: &mut Value) -> Result<(), Status> {
    let name = pod.text("/spec/runtimeClassName").to_owned();
    let refuse = |pod: &Value, why: String| {
        Err(Status::forbidden(
            target.subject_named(fields::name(pod)),
            why,
        ))
    };
    if name.is_empty() {
        if pod.has("/spec/overhead") {
            let why = "pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead";
            return refuse(pod, why.to_owned());
        }
        return Ok(());
    }
    let Some(class) = api
        .lookup("node.k8s.io", "runtimeclasses", None, &name)
        .await?
    else {
        return refuse(
            pod,
            format!("pod rejected: RuntimeClass {name:?} not found"),
        );
    };
    match class.pointer("/overhead/podFixed") {
        Some(overhead) => {
            if pod.has("/spec/overhead") && pod.pointer("/spec/overhead") != Some(overhead) {
                let why =
                    "pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead";
                return refuse(pod, why.to_owned());
            }
            pod.set("/spec/overhead", overhead.clone());
        }
        None if pod.has("/spec/overhead") => {
            let why = "pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead";
            return refuse(pod, why.to_owned());
        }
        None => {}
    }
    for (key, value) in class
        .object("/scheduling/nodeSelector")
        .into_iter()
        .flatten()
    {
        let selector = pod.object_mut("/spec/nodeSelector");
        match selector.get(key) {
            Some(present) if present != value => {
                let why = format!(
                    "conflict: RuntimeClass.scheduling.nodeSelector[{key}] = {value}; pod.spec.nodeSelector[{key}] = {present}"
                );
                return refuse(pod, why);
            }
            _ => _ = selector.insert(key.clone(), value.clone()),
        }
    }
    for toleration in class.items("/scheduling/tolerations") {
        if !pod.items("/spec/tolerations").contains(toleration) {
            push(pod, "/spec/tolerations", toleration.clone());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_mounted_once_in_every_container() {
        let mut pod = json!({"spec": {"containers": [{"name": "a"}, {"name": "b", "volumeMounts": [
            {"name": "own", "mountPath": TOKEN_MOUNT}]}], "initContainers": [{"name": "i"}]}});
        mount_token(&mut pod);
        let again = pod.clone();
        mount_token(&mut pod);
        assert_eq!(pod, again);
        assert_eq!(pod["spec"]["volumes"].as_array().map(Vec::len), Some(1));
        let volume = &pod["spec"]["volumes"][0];
        assert_eq!(
            pod["spec"]["containers"][0]["volumeMounts"][0]["name"],
            volume["name"]
        );
        assert_eq!(
            pod["spec"]["containers"][1]["volumeMounts"][0]["name"],
            "own"
        );
        assert_eq!(
            volume["projected"]["sources"][1]["configMap"]["name"],
            "kube-root-ca.crt"
        );
    }

    #[test]
    fn tolerations_of_absent_nodes_are_added_unless_given() {
        let mut pod = json!({"spec": {"tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists"}]}});
        tolerate_absent_nodes(&mut pod);
        let tolerations = pod.items("/spec/tolerations");
        assert_eq!(tolerations.len(), 2);
        assert_eq!(tolerations[1]["key"], "node.kubernetes.io/unreachable");
        let mut all = json!({"spec": {"tolerations": [{"operator": "Exists"}]}});
        tolerate_absent_nodes(&mut all);
        assert_eq!(all.items("/spec/tolerations").len(), 1);
    }
}
