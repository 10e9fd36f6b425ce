//! Subresources: each changes its part of an object by its own rule, and nothing else.

use serde_json::{Value, json};

use crate::kubectl::WEB;
use crate::server::Server;

fn pod(name: &str) -> String {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "web"}}, "spec": {"containers": [
        {"name": "c", "image": "i", "resources": {"requests": {"cpu": "100m"}}}]}})
    .to_string()
}

/// A server with an account for pods.
fn start() -> Server {
    let server = Server::start();
    server.kubectl("create serviceaccount default");
    server
}

/// kubectl create --raw: a POST of one's own.
fn post(server: &Server, path: &str, body: &Value) -> String {
    server.kubectl_in(&format!("create --raw {path} -f -"), &body.to_string())
}

#[test]
fn everything_with_replicas_scales_in_the_same_form() {
    let server = start();
    let labels = json!({"app": "web"});
    let template = json!({"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    for (kind, version, path) in [
        (
            "Deployment",
            "apps/v1",
            "/apis/apps/v1/namespaces/default/deployments",
        ),
        (
            "ReplicaSet",
            "apps/v1",
            "/apis/apps/v1/namespaces/default/replicasets",
        ),
        (
            "StatefulSet",
            "apps/v1",
            "/apis/apps/v1/namespaces/default/statefulsets",
        ),
        (
            "ReplicationController",
            "v1",
            "/api/v1/namespaces/default/replicationcontrollers",
        ),
    ] {
        let selector = match kind {
            "ReplicationController" => labels.clone(),
            _ => json!({"matchLabels": labels}),
        };
        let object = json!({"apiVersion": version, "kind": kind, "metadata": {"name": "web"},
            "spec": {"replicas": 1, "selector": selector, "template": template, "serviceName": "web"}});
        let mut object = object;
        if kind != "StatefulSet" {
            object["spec"]
                .as_object_mut()
                .expect("a spec")
                .remove("serviceName");
        }
        server.kubectl_in("create -f -", &object.to_string());
        server.kubectl(&format!(
            "scale {kind}/web --replicas=4 --current-replicas=1"
        ));
        let scale: Value =
            serde_json::from_str(&server.kubectl(&format!("get --raw {path}/web/scale")))
                .expect("JSON");
        assert_eq!(
            (&scale["kind"], &scale["apiVersion"]),
            (&json!("Scale"), &json!("autoscaling/v1"))
        );
        assert_eq!(scale["spec"]["replicas"], 4, "{kind}");
        assert_eq!(scale["status"]["selector"], "app=web", "{kind}");
        let stored = server.object(&format!("{kind} web"));
        assert_eq!(stored["spec"]["replicas"], 4, "{kind}");
        let refused = server.kubectl_fails(
            &format!("scale {kind}/web --replicas=2 --current-replicas=1"),
            "",
        );
        assert!(
            refused.contains("Expected replicas to be 1, was 4"),
            "{refused}"
        );
    }
}

#[test]
fn a_request_for_a_certificate_is_decided_once() {
    let server = Server::start();
    let object = json!({"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": {"name": "mine"},
        "spec": {"request": "LS0tLS1CRUdJTg==", "signerName": "example.com/test", "usages": ["client auth"]}});
    server.kubectl_in("create -f -", &object.to_string());
    server.kubectl("certificate approve mine");
    let decided = server.object("certificatesigningrequest mine");
    let conditions = decided["status"]["conditions"]
        .as_array()
        .expect("conditions");
    assert_eq!(
        (&conditions[0]["type"], &conditions[0]["status"]),
        (&json!("Approved"), &json!("True"))
    );
    assert!(conditions[0]["lastTransitionTime"].is_string());
    let refused = server.kubectl_fails("certificate deny mine", "");
    assert!(refused.contains("is already Approved"), "{refused}");
    // A status write decides nothing, and keeps the decision.
    server.kubectl(r#"patch csr mine --subresource=status --type=merge -p {"status":{"certificate":"LS0tLS1CRUdJTg=="}}"#);
    let status = server.object("certificatesigningrequest mine")["status"].clone();
    assert_eq!(status["conditions"][0]["type"], "Approved", "{status}");
}

#[test]
fn a_put_creates_what_upstream_lets_it_create_and_nothing_else() {
    let server = Server::start();
    let put = |path: &str, object: &Value| {
        let text = object.to_string();
        let words = [
            "-X",
            "PUT",
            "-H",
            "Content-Type: application/json",
            "--data",
            &text,
        ];
        let (code, _, body) = server.curl(&words, path);
        let answer: Value = serde_json::from_slice(&body).expect("JSON");
        (code, answer)
    };
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"}, "spec": {"holderIdentity": "a"}});
    let path = "/apis/coordination.k8s.io/v1/namespaces/default/leases/l";
    let (code, made) = put(path, &lease);
    assert_eq!(
        (code, made["metadata"]["uid"].is_string()),
        (201, true),
        "{made}"
    );
    // Who replaces one of these says what it replaces.
    let (code, refused) = put(path, &lease);
    let message = refused["message"].as_str().unwrap_or("");
    assert_eq!(code, 422, "{message}");
    assert!(
        message.contains("resourceVersion: Invalid value: 0: must be specified for an update"),
        "{message}"
    );
    let (code, same) = put(path, &made);
    assert_eq!(
        (code, &same["metadata"]["uid"]),
        (200, &made["metadata"]["uid"])
    );
    server.kubectl("delete lease l");
    // Who means the one that was there does not get another.
    let (code, refused) = put(path, &made);
    assert_eq!((code, &refused["reason"]), (409, &json!("Conflict")));
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}});
    let (code, refused) = put("/api/v1/namespaces/default/configmaps/m", &map);
    assert_eq!((code, &refused["reason"]), (404, &json!("NotFound")));
    // Wrong options are named by the kind of the request.
    let (code, refused) = put(&format!("{path}?dryRun=Some"), &lease);
    assert_eq!(code, 422);
    let message = refused["message"].as_str().unwrap_or("");
    assert!(
        message.starts_with("UpdateOptions.meta.k8s.io \"\" is invalid"),
        "{message}"
    );
}

#[test]
fn pods_are_bound_by_either_path_and_only_once() {
    let server = start();
    for name in ["one", "two"] {
        server.kubectl_in("create -f -", &pod(name));
    }
    let binding = |name: &str| json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": {"kind": "Node", "name": "n1"}});
    post(
        &server,
        "/api/v1/namespaces/default/pods/one/binding",
        &binding("one"),
    );
    post(
        &server,
        "/api/v1/namespaces/default/bindings",
        &binding("two"),
    );
    for name in ["one", "two"] {
        let bound = server.object(&format!("pod {name}"));
        assert_eq!(bound["spec"]["nodeName"], "n1");
        assert_eq!(bound["status"]["conditions"][0]["type"], "PodScheduled");
    }
    let refused = server.kubectl_fails(
        "create --raw /api/v1/namespaces/default/bindings -f -",
        &binding("two").to_string(),
    );
    assert!(refused.contains("already assigned to node"), "{refused}");
}

#[test]
fn an_eviction_spends_the_budget_and_is_refused_without_one_left() {
    let server = start();
    let budget = json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "web"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "web"}}}});
    server.kubectl_in("create -f -", &budget.to_string());
    for name in ["one", "two"] {
        server.kubectl_in("create -f -", &pod(name));
        let status =
            r#"{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}}"#;
        server.kubectl(&format!(
            "patch pod {name} --subresource=status --type=merge -p {status}"
        ));
    }
    let eviction = |name: &str| json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}});
    let path = |name: &str| format!("/api/v1/namespaces/default/pods/{name}/eviction");
    let refused = |name: &str| {
        server.kubectl_fails(
            &format!("create --raw {} -f -", path(name)),
            &eviction(name).to_string(),
        )
    };
    let status = r#"{"status":{"observedGeneration":1,"disruptionsAllowed":1,"currentHealthy":2,"desiredHealthy":1,"expectedPods":2}}"#;
    server.kubectl(&format!(
        "patch pdb web --subresource=status --type=merge -p {status}"
    ));
    post(&server, &path("one"), &eviction("one"));
    assert_eq!(
        server.kubectl("get pods -o name"),
        "pod/two\n",
        "it ran nowhere, so it is gone at once"
    );
    let spent = server.object("pdb web")["status"].clone();
    assert_eq!(spent["disruptionsAllowed"], 0);
    assert!(spent["disruptedPods"]["one"].is_string(), "{spent}");
    let said = refused("two");
    assert!(
        said.contains("Cannot evict pod as it would violate the pod's disruption budget"),
        "{said}"
    );
    assert_eq!(server.kubectl("get pods -o name"), "pod/two\n");
    // A second budget for the same pod cannot be kept together with the first.
    server.kubectl_in(
        "create -f -",
        &budget
            .to_string()
            .replace(r#""name":"web""#, r#""name":"more""#),
    );
    let said = refused("two");
    assert!(said.contains("more than one PodDisruptionBudget"), "{said}");
}

#[test]
fn a_pod_gets_ephemeral_containers_and_other_resources_by_their_subresources_alone() {
    let server = start();
    server.kubectl_in("create -f -", &pod("one"));
    let ephemeral =
        r#"{"spec":{"ephemeralContainers":[{"name":"e","image":"j","targetContainerName":"c"}]}}"#;
    let refused = server.kubectl_fails(&format!("patch pod one -p {ephemeral}"), "");
    assert!(
        refused.contains("pod updates may not change fields other than"),
        "{refused}"
    );
    let mut whole: Value =
        serde_json::from_str(&server.kubectl("get pod one -o json")).expect("JSON");
    whole["spec"]["ephemeralContainers"] = json!([{"name": "e", "image": "j"}]);
    whole["spec"]["containers"][0]["image"] = "ignored".into();
    server.kubectl_in(
        "replace --raw /api/v1/namespaces/default/pods/one/ephemeralcontainers -f -",
        &whole.to_string(),
    );
    let now = server.object("pod one");
    assert_eq!(now["spec"]["ephemeralContainers"][0]["image"], "j");
    assert_eq!(
        now["spec"]["containers"][0]["image"], "i",
        "nothing else changes"
    );
    assert_eq!(now["metadata"]["generation"], 2);
    let resize =
        r#"{"spec":{"containers":[{"name":"c","resources":{"requests":{"cpu":"200m"}}}]}}"#;
    let refused = server.kubectl_fails(&format!("patch pod one -p {resize}"), "");
    assert!(
        refused.contains("pod updates may not change fields other than"),
        "{refused}"
    );
    server.kubectl(&format!("patch pod one --subresource=resize -p {resize}"));
    assert_eq!(
        server.object("pod one")["spec"]["containers"][0]["resources"]["requests"]["cpu"],
        "200m"
    );
    let more = r#"{"spec":{"containers":[{"name":"c","resources":{"limits":{"cpu":"1","memory":"1Gi"},"requests":{"cpu":"1","memory":"1Gi"}}}]}}"#;
    let refused =
        server.kubectl_fails(&format!("patch pod one --subresource=resize -p {more}"), "");
    assert!(refused.contains("QOS Class may not change"), "{refused}");
    // What a pod may not ask for at first it may not ask for later.
    let ask = |cpu: &str| {
        let more = format!(
            r#"{{"spec":{{"containers":[{{"name":"c","resources":{{"requests":{{"cpu":"{cpu}"}}}}}}]}}}}"#
        );
        format!("patch pod one --subresource=resize -p {more}")
    };
    server.kubectl("create quota little --hard=requests.cpu=1");
    let refused = server.kubectl_fails(&ask("2"), "");
    assert!(refused.contains("exceeded quota: little"), "{refused}");
    server.kubectl("delete quota little");
    let bounds = r#"{"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "bounds"},
        "spec": {"limits": [{"type": "Pod", "max": {"cpu": "3"}}]}}"#;
    server.kubectl_in("create -f -", bounds);
    let refused = server.kubectl_fails(&ask("4"), "");
    assert!(
        refused.contains("maximum cpu usage per Pod is 3"),
        "{refused}"
    );
    server.kubectl("delete limitrange bounds");
    server.kubectl(&ask("2"));
}

#[test]
fn a_namespace_is_finalized_when_its_last_finalizer_is_taken() {
    let server = Server::start();
    server.kubectl("create namespace going");
    server.kubectl("delete namespace going --wait=false");
    let mut object = server.object("namespace going");
    assert_eq!(object["status"]["phase"], "Terminating");
    object["spec"]["finalizers"] = json!([]);
    server.kubectl_in(
        "replace --raw /api/v1/namespaces/going/finalize -f -",
        &object.to_string(),
    );
    assert!(
        server
            .kubectl_fails("get namespace going", "")
            .contains("not found")
    );
}

#[test]
fn a_list_is_of_the_moment_asked_for() {
    let server = Server::start();
    server.kubectl("create configmap first");
    let list = |query: &str| {
        server
            .raw(&format!("/api/v1/namespaces/default/configmaps?{query}"))
            .1
    };
    let then = list("")["metadata"]["resourceVersion"]
        .as_str()
        .expect("a revision")
        .to_owned();
    server.kubectl_in("create -f -", WEB);
    server.kubectl("create configmap second");
    let names = |list: &Value| {
        let items = list["items"].as_array().expect("items").iter();
        items
            .map(|item| {
                item["metadata"]["name"]
                    .as_str()
                    .expect("a name")
                    .to_owned()
            })
            .collect::<Vec<_>>()
    };
    let exact = list(&format!(
        "resourceVersion={then}&resourceVersionMatch=Exact"
    ));
    assert_eq!(names(&exact), ["first"]);
    assert_eq!(exact["metadata"]["resourceVersion"], then.as_str());
    for query in [
        format!("resourceVersion={then}&resourceVersionMatch=NotOlderThan"),
        format!("resourceVersion={then}"),
        "resourceVersion=0".to_owned(),
    ] {
        assert_eq!(names(&list(&query)), ["first", "second"], "{query}");
    }
    server.kubectl("delete configmap --all");
    assert_eq!(names(&list("")), [""; 0]);
}
