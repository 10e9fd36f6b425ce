//! What a kubelet reaches.

use serde_json::{Value, json};

use super::{CORE, ask, bound_to, hold, pod, shop};
use crate::server::Server;

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";

/// The request for a token of an account that is bound to a pod.
fn token_of(account: &str, pod: &Value) -> String {
    let body = json!({"spec": {"boundObjectRef": bound_to(pod)}});
    format!("POST {CORE}/serviceaccounts/{account}/token {body}")
}

fn pods(server: &Server) -> [Value; 2] {
    ["first", "second"].map(|name| server.raw(&format!("{CORE}/pods/{name}")).1)
}

#[test]
fn a_node_reaches_its_own_pods_and_what_they_use() {
    let server = shop();
    let [first, _] = pods(&server);
    hold(
        &server,
        "node-1",
        &[],
        r#"GET /api/v1/namespaces/shop/secrets/one
           GET /api/v1/namespaces/shop/secrets?fieldSelector=metadata.name%3Done
           GET /api/v1/pods?fieldSelector=spec.nodeName%3Dnode-1
           GET /api/v1/namespaces/shop/pods/first
           GET /api/v1/nodes/node-1
           GET /api/v1/nodes?fieldSelector=metadata.name%3Dnode-1
           GET /api/v1/services
           PATCH /api/v1/nodes/node-1 {"metadata": {"labels": {"kubernetes.io/hostname": "node-1"}}}
           PATCH /api/v1/nodes/node-1/status {"status": {}}
           PATCH /api/v1/namespaces/shop/pods/first/status {"status": {"phase": "Running"}}"#,
        200,
    );
    hold(&server, "node-1", &[], &token_of("robot", &first), 201);
    let lease = format!(r#"POST {LEASES} {{"metadata": {{"name": "node-1"}}}}"#);
    hold(&server, "node-1", &[], &lease, 201);
    // That a pod is gone is what its kubelet has to learn.
    hold(
        &server,
        "node-1",
        &[],
        "GET /api/v1/namespaces/shop/pods/never
         DELETE /api/v1/namespaces/shop/pods/never",
        404,
    );
}

const NOT_A_NODES: &str = r#"
    GET /api/v1/namespaces/shop/secrets/two
    GET /api/v1/namespaces/shop/secrets/loose
    GET /api/v1/namespaces/shop/secrets
    GET /api/v1/namespaces/shop/secrets?watch=true&fieldSelector=metadata.name%3Dtwo
    GET /api/v1/secrets
    GET /api/v1/namespaces/shop/configmaps
    PATCH /api/v1/namespaces/shop/secrets/one {"data": {}}
    GET /api/v1/pods
    GET /api/v1/pods?fieldSelector=spec.nodeName%3Dnode-2
    GET /api/v1/pods?fieldSelector=spec.nodeName!%3Dnode-1
    GET /api/v1/namespaces/shop/pods/second
    PATCH /api/v1/namespaces/shop/pods/second/status {"status": {"phase": "Failed"}}
    PATCH /api/v1/namespaces/shop/pods/first {"metadata": {"labels": {"a": "b"}}}
    DELETE /api/v1/namespaces/shop/pods/second
    POST /api/v1/namespaces/shop/pods/second/eviction {"metadata": {"name": "second"}}
    POST /api/v1/namespaces/shop/pods/first/binding {"target": {"name": "node-1"}}
    POST /api/v1/namespaces/shop/pods/first/exec?command=sh
    GET /api/v1/nodes
    GET /api/v1/nodes/node-2
    PATCH /api/v1/nodes/node-2/status {"status": {}}
    POST /api/v1/nodes {"metadata": {"name": "node-9"}}
    DELETE /api/v1/nodes/node-1
    PATCH /api/v1/nodes/node-1 {"metadata": {"labels": {"node-restriction.kubernetes.io/trusted": "true"}}}
    PATCH /api/v1/nodes/node-1/status {"metadata": {"labels": {"node-restriction.kubernetes.io/trusted": "true"}}}
    PATCH /api/v1/nodes/node-1 {"spec": {"taints": []}}
    PATCH /api/v1/namespaces/shop/pods/first/status {"metadata": {"labels": {"app": "another"}}}
    PATCH /api/v1/namespaces/shop/pods/first/status {"status": {"resourceClaimStatuses": [{"name": "c", "resourceClaimName": "other"}]}}
    POST /api/v1/namespaces/shop/serviceaccounts/robot/token {"spec": {}}
    POST /apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases {"metadata": {"name": "node-2"}}
    PATCH /apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/node-2 {"spec": {}}
    GET /apis/coordination.k8s.io/v1/namespaces/kube-system/leases/kube-scheduler
    PATCH /apis/certificates.k8s.io/v1/certificatesigningrequests/x/approval {"status": {}}
    GET /api/v1/nodes/node-2/proxy/pods
"#;

#[test]
fn a_node_reaches_nothing_of_others() {
    let server = shop();
    let [first, second] = pods(&server);
    hold(&server, "node-1", &[], NOT_A_NODES, 403);
    let mine = pod("mine", "node-1", "loose");
    let makes = format!("POST {CORE}/pods {mine}");
    for attempt in [makes, token_of("robot", &second), token_of("boss", &first)] {
        hold(&server, "node-1", &[], &attempt, 403);
    }
    // A pod that is gone opens nothing any more.
    let gone = format!("DELETE {CORE}/pods/first?gracePeriodSeconds=0");
    hold(&server, "node-1", &[], &gone, 200);
    let secret = format!("GET {CORE}/secrets/one");
    let (code, message) = ask(&server, "node-1", &secret, &[], &Value::Null);
    assert_eq!(code, 403);
    let reason = "no relationship found between node 'node-1' and this object";
    assert!(message.ends_with(reason), "{message}");
}
