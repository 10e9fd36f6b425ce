//! Credentials, and what a user without rights tries.

use serde_json::{Value, json};

use super::{CORE, RBAC, ask, binding, created, hold, pod, role, rule, shop, token};
use crate::server::text;

#[test]
fn nobody_gets_in_without_good_credentials() {
    let server = shop();
    let secrets = format!("GET {CORE}/secrets");
    for user in ["stranger", "expired"] {
        let (code, _) = ask(&server, user, &secrets, &[], &Value::Null);
        assert_eq!(code, 0, "{user} does not even connect");
    }
    let elsewhere = token(&server, "robot", "vault", None);
    let brief = created(&server, &format!("{CORE}/pods"), &pod("brief", "", "one"));
    let orphan = token(&server, "robot", "", Some(&brief));
    let node = server.raw("/api/v1/nodes/node-2").1;
    let lent = token(&server, "robot", "", Some(&node));
    for good in [&orphan, &lent] {
        hold(&server, "", &[good], &secrets, 403);
    }
    let gone = format!(
        "DELETE {CORE}/pods/brief?gracePeriodSeconds=0
         DELETE /api/v1/nodes/node-2"
    );
    hold(&server, "admin", &[], &gone, 200);
    let nonsense = [
        "",
        " | authorization: Bearer nonsense",
        " | authorization: Basic YWRtaW46YWRtaW4=",
        " | x-remote-user: admin | x-remote-group: system:masters",
        " | impersonate-user: admin | impersonate-group: system:masters",
        &format!(" | {elsewhere}"),
        &format!(" | {orphan}"),
        &format!(" | {lent}"),
    ];
    for credentials in nonsense {
        hold(&server, "", &[], &format!("{secrets}{credentials}"), 401);
    }
    // Of two that say who it is, the certificate counts, as upstream, however good the other is.
    let robot = token(&server, "robot", "", None);
    for (user, credentials, expected) in [
        ("", &robot, "system:serviceaccount:shop:robot"),
        ("jane", &robot, "jane"),
        ("jane", &"authorization: Bearer nonsense".to_owned(), "jane"),
    ] {
        let review = "POST /apis/authentication.k8s.io/v1/selfsubjectreviews";
        let (code, said) = ask(&server, user, review, &[credentials], &json!({}));
        let said: Value = serde_json::from_str(&said).expect("a review");
        assert_eq!(code, 201, "{said}");
        assert_eq!(said["status"]["userInfo"]["username"], expected);
    }
    hold(
        &server,
        "",
        &[],
        "GET /livez
         GET /readyz
         GET /healthz
         GET /version",
        200,
    );
    hold(
        &server,
        "",
        &[],
        "GET /
         GET /metrics
         GET /api
         GET /apis
         GET /openapi/v3
         GET /api/v1/namespaces
         GET /readyz/etcd",
        401,
    );
}

/// What jane may not, nor a ServiceAccount without any role.
const OUT_OF_REACH: &str = "
    GET /api/v1/pods
    GET /api/v1/namespaces/kube-system/pods
    GET /api/v1/namespaces/shop/secrets/one
    GET /api/v1/namespaces/shop/secrets?watch=true
    GET //api//v1//namespaces//shop//secrets//one
    GET /api/v1/namespaces/shop/%73ecrets/one
    GET /api/v1/namespaces/shop/secrets/one/
    GET /api/v1/namespaces/shop/secrets/one | x-remote-user: admin | x-remote-group: system:masters
    POST /api/v1/namespaces/shop/secrets/one | x-http-method-override: GET
    DELETE /api/v1/namespaces/shop/pods
    DELETE /api/v1/namespaces/shop/pods/first
    GET /api/v1/namespaces/shop/pods/first/log
    GET /api/v1/nodes/node-1/proxy/containerLogs/shop/first/c
    GET /api/v1/namespaces/shop/services/web/proxy/
    GET /metrics
    POST /api/v1/namespaces/shop/pods/first/exec?command=sh&stdout=true
    GET /api/v1/namespaces/shop/pods/first/exec?command=sh&stdout=true
    GET /api/v1/namespaces/shop/pods/first | impersonate-user: admin
    GET /api/v1/namespaces/shop/pods/first | impersonate-user: jane | impersonate-group: system:masters
    GET /api/v1/namespaces/shop/pods/first | impersonate-user: system:serviceaccount:shop:boss
    GET /api/v1/namespaces/shop/pods/first | impersonate-user: system:node:node-1 | impersonate-group: system:nodes
    GET /api/v1/namespaces/shop/pods/first | impersonate-user: jane | impersonate-uid: 7
";

#[test]
fn a_user_reaches_what_a_role_names_and_nothing_else() {
    let server = shop();
    hold(
        &server,
        "jane",
        &[],
        "GET /api/v1/namespaces/shop/pods
         GET /api/v1/namespaces/shop/pods/first
         GET /apis
         GET /openapi/v3",
        200,
    );
    let (_, message) = ask(
        &server,
        "jane",
        "GET /api/v1/namespaces/shop/secrets",
        &[],
        &Value::Null,
    );
    assert_eq!(
        message,
        r#"secrets is forbidden: User "jane" cannot list resource "secrets" in API group "" in the namespace "shop""#
    );
    hold(&server, "jane", &[], OUT_OF_REACH, 403);
    let robot = token(&server, "robot", "", None);
    hold(&server, "", &[&robot], OUT_OF_REACH, 403);
    // No target at all, so nothing of it is said.
    hold(
        &server,
        "jane",
        &[],
        "GET /api/v1/namespaces/shop%2Fx/pods/first
         GET /api/v1/namespaces/shop/pods/..%2Fsecrets%2Fone
         GET /api/v1/namespaces/shop/pods/../secrets/one",
        404,
    );
    let half = "GET /api/v1/namespaces/shop/pods | impersonate-group: system:masters";
    hold(&server, "jane", &[], half, 400);
}

#[test]
fn what_is_bound_is_in_force_at_once_and_so_is_what_is_taken_away() {
    let server = shop();
    let secret = format!("GET {CORE}/secrets/one");
    let rules = json!([rule(&["get"], &["secrets"])]);
    created(&server, &format!("{RBAC}/roles"), &role("reader", &rules));
    let reads = binding("reads", "Role", "reader", "jane");
    for _ in 0..5 {
        hold(&server, "jane", &[], &secret, 403);
        created(&server, &format!("{RBAC}/rolebindings"), &reads);
        hold(&server, "jane", &[], &secret, 200);
        let away = format!("DELETE {RBAC}/rolebindings/reads");
        hold(&server, "admin", &[], &away, 200);
    }
}

#[test]
fn kubectl_auth_tells_what_one_may_do() {
    let server = shop();
    let said = |user: &str, arguments: &str, input: &str| {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let output = server.kubectl_as(user, &arguments, input);
        (text(&output.stdout), text(&output.stderr))
    };
    for (user, question, answer) in [
        ("jane", "list pods -n shop", "yes"),
        ("jane", "list pods -n default", "no"),
        ("jane", "get /metrics", "no"),
        ("jane", "get /api", "yes"),
        ("jane", "create pods --subresource=exec -n shop", "no"),
        ("admin", "* *", "yes"),
        ("admin", "list pods -n shop --as=jane", "yes"),
        ("admin", "list secrets -n shop --as=jane", "no"),
        (
            "admin",
            "list secrets --as=joe --as-group=system:masters",
            "yes",
        ),
    ] {
        let (out, error) = said(user, &format!("auth can-i {question}"), "");
        assert_eq!(out.trim(), answer, "{user}: {question}: {error}");
    }
    let (list, error) = said("jane", "auth can-i --list -n shop", "");
    for line in [
        "selfsubjectaccessreviews.authorization.k8s.io",
        "pods/exec",
        "[/healthz]",
    ] {
        assert!(list.contains(line), "{line} in {list} {error}");
    }
    let (who, error) = said("jane", "auth whoami", "");
    assert!(
        who.contains("jane") && who.contains("team"),
        "{who} {error}"
    );
    let manifest = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
        "metadata": {"name": "reconciled", "namespace": "shop"}, "rules": [rule(&["get"], &["pods"])]});
    let (out, error) = said("admin", "auth reconcile -f -", &manifest.to_string());
    assert!(out.contains("reconciled"), "{out} {error}");
    let (_, error) = said("jane", "get secrets -n shop", "");
    let refusal = r#"secrets is forbidden: User "jane" cannot list resource "secrets""#;
    assert!(error.contains(refusal), "{error}");
}
