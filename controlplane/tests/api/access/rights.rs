//! Handing out rights, and deciding on certificates.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use super::{CLUSTER_RBAC, CORE, RBAC, ask, binding, created, hold, pod, role, rule, shop};

#[test]
fn nobody_hands_out_or_takes_more_than_they_hold() {
    let server = shop();
    let (roles, bindings) = (format!("{RBAC}/roles"), format!("{RBAC}/rolebindings"));
    let held = role("pods", &json!([rule(&["get", "list"], &["pods"])]));
    hold(&server, "jane", &[], &format!("POST {roles} {held}"), 201);
    let to_joe = binding("joe", "Role", "pods", "joe");
    hold(
        &server,
        "jane",
        &[],
        &format!("POST {bindings} {to_joe}"),
        201,
    );
    let more = json!([rule(&["get"], &["secrets"])]);
    let all = json!([{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]);
    created(&server, &roles, &role("boss", &all));
    let to_jane = |name: &str, kind: &str, role: &str| binding(name, kind, role, "jane");
    let attempts: [(&str, String, Value); 13] = [
        ("POST", roles.clone(), role("more", &more)),
        ("POST", roles.clone(), role("all", &all)),
        ("PUT", format!("{roles}/keeper"), role("keeper", &more)),
        ("PATCH", format!("{roles}/keeper"), json!({"rules": more})),
        ("PATCH", format!("{roles}/pods"), json!({"rules": all})),
        ("POST", bindings.clone(), to_jane("boss", "Role", "boss")),
        (
            "POST",
            bindings.clone(),
            to_jane("admin", "ClusterRole", "cluster-admin"),
        ),
        (
            "POST",
            bindings.clone(),
            to_jane("edit", "ClusterRole", "system:aggregate-to-edit"),
        ),
        (
            "POST",
            format!("{CLUSTER_RBAC}/clusterroles"),
            role("all", &all),
        ),
        (
            "POST",
            format!("{CLUSTER_RBAC}/clusterrolebindings"),
            to_jane("admin", "ClusterRole", "cluster-admin"),
        ),
        (
            "POST",
            format!("{CORE}/serviceaccounts/boss/token"),
            json!({"spec": {}}),
        ),
        (
            "POST",
            format!("{CORE}/pods"),
            pod("third", "node-1", "one"),
        ),
        (
            "POST",
            "/apis/authorization.k8s.io/v1/subjectaccessreviews".to_owned(),
            json!({"spec": {"user": "admin", "nonResourceAttributes": {"verb": "get", "path": "/"}}}),
        ),
    ];
    for (method, path, body) in attempts {
        let attempt = format!("{method} {path} {body}");
        hold(&server, "jane", &[], &attempt, 403);
    }
    let post = format!("POST {roles}");
    let (_, message) = ask(&server, "jane", &post, &[], &role("more", &more));
    let missing = r#"{APIGroups:[""], Resources:["secrets"], Verbs:["get"]}"#;
    let refusal = format!("is attempting to grant RBAC permissions not currently held:\n{missing}");
    assert!(message.contains(&refusal), "{message}");
    let none = to_jane("none", "Role", "missing");
    hold(
        &server,
        "jane",
        &[],
        &format!("POST {bindings} {none}"),
        404,
    );
    // A label may have other roles take the rules over; what the collector of garbage writes gives nothing, whatever the rules.
    let label =
        json!({"metadata": {"labels": {"rbac.authorization.k8s.io/aggregate-to-edit": "true"}}});
    let admin = format!("{CLUSTER_RBAC}/clusterroles/cluster-admin");
    for role in [&format!("{roles}/boss"), &admin] {
        let labelled = format!("PATCH {role} {label}");
        hold(&server, "jane", &[], &labelled, 403);
    }
    let held_back = json!({"metadata": {"finalizers": ["example.com/wait"]}});
    let finalized = format!("PATCH {roles}/boss {held_back}");
    hold(&server, "jane", &[], &finalized, 200);
}

#[test]
fn who_may_bind_or_escalate_may_hand_out_more() {
    let server = shop();
    let all = json!([{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]);
    let (roles, bindings) = (format!("{RBAC}/roles"), format!("{RBAC}/rolebindings"));
    created(&server, &roles, &role("boss", &all));
    let own = |verb: &str, name: &str| {
        json!([{"verbs": [verb], "apiGroups": ["rbac.authorization.k8s.io"],
            "resources": ["roles"], "resourceNames": [name]}])
    };
    let to_joe = binding("boss", "Role", "boss", "joe");
    let binds = format!("POST {bindings} {to_joe}");
    hold(&server, "jane", &[], &binds, 403);
    created(&server, &roles, &role("binder", &own("bind", "boss")));
    let binder = binding("binder", "Role", "binder", "jane");
    created(&server, &bindings, &binder);
    hold(&server, "jane", &[], &binds, 201);
    let all = json!({"rules": all});
    let escalates = format!("PATCH {roles}/keeper {all}");
    hold(&server, "jane", &[], &escalates, 403);
    let escalate = role("escalator", &own("escalate", "keeper"));
    created(&server, &roles, &escalate);
    let escalator = binding("escalator", "Role", "escalator", "jane");
    created(&server, &bindings, &escalator);
    hold(&server, "jane", &[], &escalates, 200);
}

#[test]
fn certificates_are_decided_and_signed_by_those_trusted_with_their_signer() {
    let server = shop();
    let requests = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    let request = json!({"metadata": {"name": "x"}, "spec": {"request": "eA==",
        "usages": ["client auth"], "signerName": "example.org/own"}});
    created(&server, requests, &request);
    let rules = |signers: &str| {
        json!([
            {"verbs": ["update", "patch", "get"], "apiGroups": ["certificates.k8s.io"],
                "resources": ["certificatesigningrequests/approval", "certificatesigningrequests/status"]},
            {"verbs": ["approve"], "apiGroups": ["certificates.k8s.io"], "resources": ["signers"],
                "resourceNames": [signers]},
        ])
    };
    // Not even for who may do all: whoever approves such a request would have to hold all that it gives.
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut masters = rcgen::CertificateParams::default();
    let name = &mut masters.distinguished_name;
    name.push(rcgen::DnType::OrganizationName, "system:masters");
    let pem = masters.serialize_request(&key).expect("a request");
    let pem = BASE64_STANDARD.encode(pem.pem().expect("PEM"));
    let masters = json!({"metadata": {"name": "y"}, "spec": {"request": pem, "usages": ["client auth"],
        "signerName": "kubernetes.io/kube-apiserver-client"}});
    hold(
        &server,
        "admin",
        &[],
        &format!("POST {requests} {masters}"),
        403,
    );
    let approver = role("approver", &rules("example.com/*"));
    created(&server, &format!("{CLUSTER_RBAC}/clusterroles"), &approver);
    let jane = binding("approver", "ClusterRole", "approver", "jane");
    let bindings = format!("{CLUSTER_RBAC}/clusterrolebindings");
    created(&server, &bindings, &jane);
    let approval = json!({"status": {"conditions":
        [{"type": "Approved", "status": "True", "reason": "x", "message": "x"}]}});
    let approves = format!("PATCH {requests}/x/approval");
    let (code, message) = ask(&server, "jane", &approves, &[], &approval);
    assert!(
        code == 403 && message.contains("not permitted to approve"),
        "{code} {message}"
    );
    let signs = format!("PATCH {requests}/x/status");
    let signed = json!({"status": {"certificate": "eA=="}});
    let (code, message) = ask(&server, "jane", &signs, &[], &signed);
    assert!(
        code == 403 && message.contains("not permitted to sign"),
        "{code} {message}"
    );
    let trusted = json!({"rules": rules("example.org/*")});
    let trust = format!("PATCH {CLUSTER_RBAC}/clusterroles/approver {trusted}");
    hold(&server, "admin", &[], &trust, 200);
    hold(&server, "jane", &[], &format!("{approves} {approval}"), 200);
}

#[test]
fn who_asks_for_a_certificate_is_known_however_it_is_asked_for() {
    let server = shop();
    let rules = json!([{"verbs": ["create", "patch"], "apiGroups": ["certificates.k8s.io"],
        "resources": ["certificatesigningrequests"]}]);
    let asker = role("asker", &rules);
    created(&server, &format!("{CLUSTER_RBAC}/clusterroles"), &asker);
    let jane = binding("asker", "ClusterRole", "asker", "jane");
    let bindings = format!("{CLUSTER_RBAC}/clusterrolebindings");
    created(&server, &bindings, &jane);
    let request = json!({"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
        "metadata": {"name": "x"}, "spec": {"request": "eA==", "usages": ["client auth"],
        "signerName": "example.org/own", "username": "system:node:node-1", "groups": ["system:nodes"]}});
    let body = request.to_string();
    let path = "/apis/certificates.k8s.io/v1/certificatesigningrequests/x?fieldManager=a";
    let arguments = [
        "--request",
        "PATCH",
        "--header",
        "content-type: application/apply-patch+yaml",
        "--data",
        &body,
    ];
    let (code, _, answer) = server.curl_as("jane", &arguments, path);
    let made: Value = serde_json::from_slice(&answer).expect("JSON");
    assert_eq!(code, 201, "{made}");
    assert_eq!(made["spec"]["username"], "jane");
    assert_eq!(
        made["spec"]["groups"],
        json!(["team", "system:authenticated"])
    );
}
