//! Bootstrap tokens: what a machine may that shows one, and what it may not.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{ask, created, hold};
use crate::server::{Server, text};

const SECRETS: &str = "/api/v1/namespaces/kube-system/secrets";
const REVIEW: &str = "POST /apis/authentication.k8s.io/v1/selfsubjectreviews";
const INFO: &str = "/api/v1/namespaces/kube-public/configmaps/cluster-info";
const GOOD: &str = "abcdef.0123456789abcdef";

/// A token's Secret, as `keelway token create` makes it, with some fields changed.
fn secret(name: &str, changes: &Value) -> Value {
    let mut fields = json!({"token-id": "abcdef", "token-secret": "0123456789abcdef",
        "usage-bootstrap-authentication": "true", "usage-bootstrap-signing": "true",
        "auth-extra-groups": "system:bootstrappers:keelway:join"});
    for (field, value) in changes.as_object().expect("fields") {
        fields[field] = value.clone();
    }
    json!({"metadata": {"name": name}, "type": "bootstrap.kubernetes.io/token", "stringData": fields})
}

fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}")
}

#[test]
fn a_bootstrap_token_lets_a_machine_ask_for_its_certificate_and_no_more() {
    let server = Server::start();
    let shown = bearer(GOOD);
    hold(&server, "", &[&shown], "GET /api", 401);
    created(
        &server,
        SECRETS,
        &secret("bootstrap-token-abcdef", &json!({})),
    );
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"});
    let (code, answer) = ask(&server, "", REVIEW, &[&shown], &review);
    let answer: Value = serde_json::from_str(&answer).expect("a review");
    assert_eq!(code, 201);
    let user = &answer["status"]["userInfo"];
    assert_eq!(user["username"], "system:bootstrap:abcdef");
    assert_eq!(
        user["groups"],
        json!([
            "system:bootstrappers",
            "system:bootstrappers:keelway:join",
            "system:authenticated"
        ])
    );
    // Others who are shown it may ask whose it is.
    let asked = json!({"spec": {"token": GOOD}});
    let answer = created(
        &server,
        "/apis/authentication.k8s.io/v1/tokenreviews",
        &asked,
    );
    assert_eq!(
        answer["status"]["user"]["username"],
        "system:bootstrap:abcdef"
    );
    let asked = json!({"spec": {"token": GOOD, "audiences": ["vault"]}});
    let answer = created(
        &server,
        "/apis/authentication.k8s.io/v1/tokenreviews",
        &asked,
    );
    assert_eq!(answer["status"]["authenticated"], json!(false));

    // Without roles it is nobody that anything was given to.
    let refused = "
        GET /api/v1/nodes
        GET /api/v1/namespaces/kube-system/secrets
        GET /api/v1/namespaces/kube-system/secrets/bootstrap-token-abcdef
        GET /apis/certificates.k8s.io/v1/certificatesigningrequests
        GET /api/v1/nodes | impersonate-user: keelway-admin
        GET /api/v1/nodes | impersonate-user: x | impersonate-group: system:masters";
    hold(&server, "", &[&shown], refused, 403);
    let binding = json!({"metadata": {"name": "join"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-bootstrapper"},
        "subjects": [{"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": "system:bootstrappers:keelway:join"}]});
    created(
        &server,
        "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
        &binding,
    );
    hold(
        &server,
        "",
        &[&shown],
        "GET /apis/certificates.k8s.io/v1/certificatesigningrequests",
        200,
    );
    hold(
        &server,
        "",
        &[&shown],
        refused
            .replace(
                "GET /apis/certificates.k8s.io/v1/certificatesigningrequests\n",
                "",
            )
            .as_str(),
        403,
    );
}

#[test]
fn a_bootstrap_token_that_is_not_good_is_nobodys() {
    let server = Server::start();
    for (name, changes) in [
        (
            "bootstrap-token-abcdef",
            json!({"token-secret": "fedcba9876543210"}),
        ),
        (
            "bootstrap-token-abcdef",
            json!({"expiration": "2026-01-01T00:00:00Z"}),
        ),
        ("bootstrap-token-abcdef", json!({"expiration": "tomorrow"})),
        (
            "bootstrap-token-abcdef",
            json!({"usage-bootstrap-authentication": "false"}),
        ),
        (
            "bootstrap-token-abcdef",
            json!({"auth-extra-groups": "system:masters"}),
        ),
        ("bootstrap-token-abcdef", json!({"token-id": "ghijkl"})),
        ("another-name", json!({})),
    ] {
        created(&server, SECRETS, &secret(name, &changes));
        hold(&server, "", &[&bearer(GOOD)], "GET /api", 401);
        let (code, _, _) = server.curl(&["--request", "DELETE"], &format!("{SECRETS}/{name}"));
        assert_eq!(code, 200, "{name}");
    }
    // Of another type, or in another namespace.
    let mut opaque = secret("bootstrap-token-abcdef", &json!({}));
    opaque["type"] = "Opaque".into();
    created(&server, SECRETS, &opaque);
    created(
        &server,
        "/api/v1/namespaces/default/secrets",
        &secret("bootstrap-token-abcdef", &json!({})),
    );
    hold(&server, "", &[&bearer(GOOD)], "GET /api", 401);
    for token in ["abcdef.0123456789ABCDEF", "abcdef", "abcdef.", ".", "a.b.c"] {
        hold(&server, "", &[&bearer(token)], "GET /api", 401);
    }
}

#[test]
fn anybody_may_read_what_a_cluster_says_of_itself_where_a_role_says_so() {
    let server = Server::start_with("api,controllers");
    let map = json!({"metadata": {"name": "cluster-info"}, "data": {"kubeconfig": "who we are"}});
    created(&server, "/api/v1/namespaces/kube-public/configmaps", &map);
    created(
        &server,
        "/api/v1/namespaces/kube-public/configmaps",
        &json!({"metadata": {"name": "other"}}),
    );
    hold(&server, "", &[], &format!("GET {INFO}"), 403);
    let rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-public";
    let role = json!({"metadata": {"name": "info"}, "rules": [
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "watch", "update"]}]});
    created(&server, &format!("{rbac}/roles"), &role);
    let binding = json!({"metadata": {"name": "info"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "info"},
        "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "system:anonymous"}]});
    created(&server, &format!("{rbac}/rolebindings"), &binding);
    hold(&server, "", &[], &format!("GET {INFO}"), 200);
    // Whatever roles say, it is this object alone, and to be read.
    let refused = format!(
        "GET /api/v1/namespaces/kube-public/configmaps
        GET /api/v1/namespaces/kube-public/configmaps/other
        GET {INFO}/
        GET /api/v1//namespaces/kube-public/configmaps/cluster-info
        PUT {INFO}
        DELETE {INFO}"
    );
    hold(&server, "", &[], &refused, 401);

    // Each token signs it, while it is good.
    created(
        &server,
        SECRETS,
        &secret("bootstrap-token-abcdef", &json!({})),
    );
    let in_two_seconds = jiff::Timestamp::now()
        .checked_add(jiff::SignedDuration::from_secs(3))
        .expect("a time");
    let short = json!({"token-id": "shorts", "expiration": in_two_seconds.to_string()});
    created(&server, SECRETS, &secret("bootstrap-token-shorts", &short));
    let began = Instant::now();
    let signed = |wanted: &[&str]| {
        let (_, _, answer) = server.curl_as("", &[], INFO);
        let map: Value =
            serde_json::from_slice(&answer).unwrap_or_else(|_| panic!("{}", text(&answer)));
        let data = map["data"].as_object().expect("data");
        let names: Vec<&str> = data
            .keys()
            .filter_map(|name| name.strip_prefix("jws-kubeconfig-"))
            .collect();
        names == wanted
    };
    for wanted in [&["abcdef", "shorts"][..], &["abcdef"]] {
        while !signed(wanted) {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "not signed by {wanted:?}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    let (code, _, _) = server.curl(&[], &format!("{SECRETS}/bootstrap-token-shorts"));
    assert_eq!(code, 404, "a token that has expired goes");
}
