//! Attempts to get in, or to reach further than one may: each is refused, and what is allowed works.

mod authorities;
mod joining;
mod nodes;
mod proxies;
mod rights;
mod users;

use serde_json::{Value, json};

use crate::server::{Server, text};

const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1/namespaces/shop";
const CLUSTER_RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
const CORE: &str = "/api/v1/namespaces/shop";

/// Code and message (or the whole body) of a request.
fn ask(
    server: &Server,
    user: &str,
    request: &str,
    headers: &[&str],
    body: &Value,
) -> (u16, String) {
    let (method, path) = request.split_once(' ').expect("a method and a path");
    let sent = body.to_string();
    let content = match method {
        "PATCH" => "content-type: application/merge-patch+json",
        _ => "content-type: application/json",
    };
    let mut arguments = vec!["--path-as-is", "--request", method, "--max-time", "20"];
    if !body.is_null() {
        arguments.extend(["--header", content, "--data", &sent]);
    }
    for header in headers {
        arguments.extend(["--header", *header]);
    }
    let (code, _, answer) = server.curl_as(user, &arguments, path);
    let message = serde_json::from_slice::<Value>(&answer)
        .ok()
        .and_then(|answer| answer["message"].as_str().map(str::to_owned));
    (code, message.unwrap_or_else(|| text(&answer)))
}

/// Holds that every line of a table gets the code: a method, a path, perhaps a body, and after ` | ` perhaps headers.
fn hold(server: &Server, user: &str, credentials: &[&str], table: &str, expected: u16) {
    for line in table.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let mut parts = line.split(" | ");
        let request = parts.next().expect("a request");
        let (request, body) = match request.find(" {") {
            Some(at) => (&request[..at], &request[at + 1..]),
            None => (request, "null"),
        };
        let body: Value = serde_json::from_str(body).expect("a body");
        let headers: Vec<&str> = credentials.iter().copied().chain(parts).collect();
        let (code, message) = ask(server, user, request, &headers, &body);
        assert_eq!(code, expected, "{user:?}: {line}: {message}");
    }
}

fn created(server: &Server, path: &str, object: &Value) -> Value {
    let sent = object.to_string();
    let arguments = [
        "--header",
        "content-type: application/json",
        "--data",
        &sent,
    ];
    let (code, _, answer) = server.curl(&arguments, path);
    assert_eq!(code, 201, "{path}: {}", text(&answer));
    serde_json::from_slice(&answer).expect("JSON")
}

fn rule(verbs: &[&str], resources: &[&str]) -> Value {
    let groups = ["", "rbac.authorization.k8s.io"];
    json!({"verbs": verbs, "apiGroups": groups, "resources": resources})
}

fn role(name: &str, rules: &Value) -> Value {
    json!({"metadata": {"name": name}, "rules": rules})
}

fn binding(name: &str, kind: &str, role: &str, user: &str) -> Value {
    json!({"metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
        "subjects": [{"kind": "User", "name": user}]})
}

fn pod(name: &str, node: &str, secret: &str) -> Value {
    let mut pod = json!({"metadata": {"name": name}, "spec": {"serviceAccountName": "robot",
        "automountServiceAccountToken": false,
        "containers": [{"name": "c", "image": "i"}],
        "volumes": [{"name": "s", "secret": {"secretName": secret}}]}});
    if !node.is_empty() {
        pod["spec"]["nodeName"] = node.into();
    }
    pod
}

/// A namespace with secrets, a pod on each of two nodes, and jane, who reads pods and manages roles.
fn shop() -> Server {
    shop_of(Server::start())
}

fn shop_of(server: Server) -> Server {
    let named = |name: &str| json!({"metadata": {"name": name}});
    created(&server, "/api/v1/namespaces", &named("shop"));
    for secret in ["one", "two", "loose"] {
        created(&server, &format!("{CORE}/secrets"), &named(secret));
    }
    for account in ["robot", "boss"] {
        created(&server, &format!("{CORE}/serviceaccounts"), &named(account));
    }
    for node in ["node-1", "node-2"] {
        let (code, message) = ask(&server, node, "POST /api/v1/nodes", &[], &named(node));
        assert_eq!(code, 201, "a node registers itself: {message}");
    }
    let pods = format!("{CORE}/pods");
    created(&server, &pods, &pod("first", "node-1", "one"));
    created(&server, &pods, &pod("second", "node-2", "two"));
    let rules = json!([
        rule(&["get", "list", "watch"], &["pods"]),
        rule(&["get"], &["pods/exec"]),
        rule(
            &["get", "create", "update", "patch"],
            &["roles", "rolebindings"]
        ),
    ]);
    created(&server, &format!("{RBAC}/roles"), &role("keeper", &rules));
    let jane = binding("jane", "Role", "keeper", "jane");
    created(&server, &format!("{RBAC}/rolebindings"), &jane);
    server
}

/// A token of a ServiceAccount as a header, for an audience, bound to a pod, a node or nothing.
fn token(server: &Server, account: &str, audience: &str, bound: Option<&Value>) -> String {
    let mut request = json!({"spec": {"expirationSeconds": 600}});
    if !audience.is_empty() {
        request["spec"]["audiences"] = json!([audience]);
    }
    if let Some(bound) = bound {
        request["spec"]["boundObjectRef"] = bound_to(bound);
    }
    let path = format!("{CORE}/serviceaccounts/{account}/token");
    let granted = created(server, &path, &request);
    let token = granted["status"]["token"].as_str().expect("a token");
    format!("authorization: Bearer {token}")
}

fn bound_to(object: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": object["kind"], "name": object["metadata"]["name"], "uid": object["metadata"]["uid"]})
}
