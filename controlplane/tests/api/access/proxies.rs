//! Proxies in front of the API server, and who would pass for one.

use serde_json::{Value, json};

use super::{CORE, ask, hold, shop_of, token};
use crate::server::Server;

const JANE: &str = "x-remote-user: jane";
const ADMIN: &str = "x-remote-user: admin | x-remote-group: system:masters";

#[test]
fn a_proxy_speaks_for_others_and_nobody_else_does() {
    let server = shop_of(Server::start_told(|folder| {
        let ca = folder.join("proxy-ca.crt");
        vec![
            format!("--requestheader-client-ca-file={}", ca.display()),
            "--requestheader-allowed-names=front-proxy".to_owned(),
        ]
    }));
    let (pods, secrets) = (format!("GET {CORE}/pods"), format!("GET {CORE}/secrets"));

    // What jane may, and what she may not; the proxy has no rights of its own, and its certificate makes it nobody.
    hold(&server, "front-proxy", &[JANE], &pods, 200);
    hold(&server, "front-proxy", &[JANE], &secrets, 403);
    hold(
        &server,
        "front-proxy",
        &[],
        &format!("{secrets} | {ADMIN}"),
        200,
    );
    hold(&server, "front-proxy", &[], &pods, 401);
    hold(&server, "front-proxy", &["x-remote-user:"], &pods, 401);
    hold(
        &server,
        "front-proxy",
        &["x-remote-group: system:masters"],
        &pods,
        401,
    );
    // Without a word of anybody, what else it shows counts.
    let robot = token(&server, "robot", "", None);
    hold(&server, "front-proxy", &[&robot], &secrets, 403);

    // A proxy of another name; the same name from the clients' authority; clients; nobody.
    for (user, code) in [
        ("other-proxy", 401),
        ("jane", 403),
        ("", 401),
        ("node-1", 403),
    ] {
        hold(&server, user, &[], &format!("{secrets} | {ADMIN}"), code);
    }
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"});
    let who = |user: &str, headers: &[&str]| {
        let path = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
        let sent = review.to_string();
        let mut arguments = vec![
            "--header",
            "content-type: application/json",
            "--data",
            &sent,
        ];
        for header in headers {
            arguments.extend(["--header", *header]);
        }
        let (code, _, answer) = server.curl_as(user, &arguments, path);
        assert_eq!(code, 201, "{user}");
        let answer: Value = serde_json::from_slice(&answer).expect("JSON");
        answer["status"]["userInfo"].clone()
    };
    assert_eq!(who("posing", &[JANE])["username"], "front-proxy");
    let said = [
        JANE,
        "x-remote-group: team",
        "x-remote-group: others",
        "x-remote-uid: 7",
        "x-remote-extra-scopes%2fone: a",
    ];
    assert_eq!(
        who("front-proxy", &said),
        json!({"username": "jane", "uid": "7", "groups": ["team", "others", "system:authenticated"], "extra": {"scopes/one": ["a"]}})
    );

    // Extension servers are told to believe the same.
    let map = server.object("configmap -n kube-system extension-apiserver-authentication");
    let file = |name: &str| std::fs::read_to_string(server.path(name)).expect("a file");
    assert_eq!(map["data"]["client-ca-file"], file("ca.crt"));
    assert_eq!(
        map["data"]["requestheader-client-ca-file"],
        file("proxy-ca.crt")
    );
    assert_eq!(
        map["data"]["requestheader-allowed-names"],
        r#"["front-proxy"]"#
    );
    assert_eq!(
        map["data"]["requestheader-username-headers"],
        r#"["X-Remote-User"]"#
    );
}

#[test]
fn without_an_authority_for_proxies_there_are_none() {
    let server = shop_of(Server::start());
    let (code, _) = ask(
        &server,
        "front-proxy",
        &format!("GET {CORE}/pods"),
        &[JANE],
        &Value::Null,
    );
    assert_eq!(code, 0, "its certificate is a stranger's");
}
